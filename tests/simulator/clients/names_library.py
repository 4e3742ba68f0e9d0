"""In place of pyfuse3: unpacks the kernel's requests about names, calls the real operations, packs their replies.

Place      simulator, under the real relay.py, whose rules (K1) the replies then pass through.
"""

from __future__ import annotations

import errno
import struct
from types import SimpleNamespace
from typing import Any

import trio
from pyfuse3 import EntryAttributes, FUSEError

from csvfs.mount import fuse_abi as abi
from csvfs.mount.direct import Caller
from csvfs.mount.operations import VolumeOperations
from csvfs.mount.relay import Relay
from tests.simulator.clients.kernel import LINK_IN, SETATTR_IN, SETATTR_SIZE

_CALLER = Caller(0, 0, 1)


class NamesLibrary:
    """The far end of the relay's socket pair. `nursery`: of the mount."""

    def __init__(self, relay: SimRelay, operations: VolumeOperations, nursery: trio.Nursery) -> None:
        self._relay = relay
        self._operations = operations
        self._nursery = nursery

    def send(self, request: memoryview) -> None:
        self._nursery.start_soon(self._serve, bytes(request))

    async def _serve(self, request: bytes) -> None:
        _, opcode, unique, node, _, _, _, _, _ = abi.IN_HEADER.unpack_from(request)
        try:
            body = await self._carry_out(opcode, node, request[abi.IN_HEADER.size :])
            reply = abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(body), 0, unique) + body
        except FUSEError as error:
            reply = abi.pack_error_reply(unique, error.errno)
        self._relay.take(reply)

    async def _carry_out(self, opcode: int, node: int, body: bytes) -> bytes:
        operations = self._operations
        if opcode == abi.LOOKUP:
            entry = await operations.lookup(node, body[:-1], _CALLER)  # type: ignore[arg-type]
            if entry.st_ino == 0:
                return abi.pack_absent_reply(0, int(entry.entry_timeout))[abi.OUT_HEADER.size :]
            return abi.pack_entry(entry)
        if opcode == abi.GETATTR:
            return _pack_attr(await operations.getattr(node, _CALLER))  # type: ignore[arg-type]
        if opcode == abi.SETATTR:
            return _pack_attr(await self._setattr(node, body))
        if opcode == abi.LINK:
            (ino,) = LINK_IN.unpack_from(body)
            name = body[LINK_IN.size : -1]
            return abi.pack_entry(await operations.link(ino, node, name, _CALLER))  # type: ignore[arg-type]
        if opcode == abi.OPENDIR:
            return abi.OPEN_OUT.pack(await operations.opendir(node, _CALLER), 0, 0)  # type: ignore[arg-type]
        if opcode == abi.READDIRPLUS:
            fh, offset, size, _, _, _, _ = abi.READ_IN.unpack_from(body)
            token = _Listing(size)
            await operations.readdir(fh, offset, token)  # type: ignore[arg-type]
            return bytes(token.body)
        raise FUSEError(errno.ENOSYS)

    async def _setattr(self, node: int, body: bytes) -> EntryAttributes:
        valid, _, _, size, *_ = SETATTR_IN.unpack_from(body)
        attr = EntryAttributes()
        attr.st_size = size
        names = ("mode", "uid", "gid", "size", "atime", "mtime")
        fields: Any = SimpleNamespace(**{f"update_{name}": False for name in names})
        fields.update_size = bool(valid & SETATTR_SIZE)
        return await self._operations.setattr(node, attr, fields, None, _CALLER)  # type: ignore[arg-type]


class _Listing:
    """A ReaddirToken."""

    def __init__(self, size_max: int) -> None:
        self.size_max = size_max
        self.body = bytearray()


def readdir_reply(token: Any, name: bytes, attr: EntryAttributes, next_id: int) -> bool:
    """As pyfuse3's: one fuse_direntplus; False: it does not fit any more."""
    size = (abi.DIRENT.size + len(name) + 7) // 8 * 8
    if len(token.body) + abi.ENTRY_OUT_SIZE + size > token.size_max * 4:
        return False
    entry = abi.DIRENT.pack(attr.st_ino, next_id, len(name), 0) + name
    token.body += abi.pack_entry(attr) + entry.ljust(size, b"\0")
    return True


def _pack_attr(entry: EntryAttributes) -> bytes:
    packed = abi.pack_entry(entry)
    valid = struct.unpack_from("=QQQQ", packed)[3]
    return abi.ATTR_VALID.pack(valid, 0) + bytes(4) + packed[40 : 40 + abi.ATTR.size]


class SimRelay(Relay):
    """The real relay, without a socket pair."""

    def __init__(
        self,
        engine: Any,
        device_fd: int,
        table: Any,
        operations: VolumeOperations,
        nursery: trio.Nursery,
        minor: int,
        noted: Any,
    ) -> None:
        super().__init__(engine, device_fd, table, operations, on_failure=lambda error: None, noted=noted)
        for end in (self._socket, self._pyfuse3_socket):
            end.close()
        self.minor = minor
        self._socket: Any = NamesLibrary(self, operations, nursery)  # type: ignore[assignment]

    def take_over(self, init: bytes, lookups: dict[int, int]) -> None:
        """What was agreed on with the kernel is known."""
        self.lookups = lookups

    def take(self, reply: bytes) -> None:
        self._reply[: len(reply)] = reply
        self._take_reply(self._reply[: len(reply)])
