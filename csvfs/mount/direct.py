"""Direct: the frequent requests about names, unpacked and answered without the way through pyfuse3 and back.

Place      mount floor; between channel.py and operations.py. The operations are the same as pyfuse3 calls; so are
           the replies, which relay.py completes under its rule K1.
           All that changes something is here: request_journal.py must know for which request a call is made.
Why        the way through pyfuse3 costs two messages and two turns of trio, 100 us and more of a request that
           otherwise takes one call of the coordinator.
Rule       bodies come from the kernel: one that is too short is answered with EIO by the channel.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from csvfs.mount import fuse_abi as abi
from csvfs.mount.relay import Pending, Relay


class Operations(Protocol):
    """Of operations.py; `ctx` may be any Caller."""

    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> tuple: ...
    async def create_unnamed(self, parent: int, mode: int, flags: int, ctx: Any) -> tuple: ...
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> Any: ...
    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None: ...
    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None: ...
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: Any,
    ) -> None: ...
    async def open(self, inode: int, flags: int, ctx: Any) -> Any: ...
    async def change_attributes(self, inode: int, changes: dict[str, Any]) -> Any: ...
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Any) -> Any: ...
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: Any) -> Any: ...
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any) -> Any: ...
    async def removexattr(self, inode: int, name: bytes, ctx: Any) -> None: ...


@dataclass(slots=True)
class Caller:
    """As pyfuse3.RequestContext."""

    uid: int
    gid: int
    pid: int
    umask: int = 0  # of requests that make something


# Synchronous, when the request was read: (unique, what it is about, its body) -> what a task has to do.
Prepared = Callable[[int], Awaitable[None]]


class Direct:
    def __init__(self, operations: Operations, relay: Relay) -> None:
        self._operations = operations
        self._relay = relay
        self.by_opcode: dict[int, Callable[[Pending, Caller, bytes], Prepared]] = {
            abi.CREATE: self._create,
            abi.TMPFILE: self._tmpfile,
            abi.MKDIR: self._mkdir,
            abi.UNLINK: self._unlink,
            abi.RMDIR: self._rmdir,
            abi.RENAME: self._rename,
            abi.RENAME2: self._rename2,
            abi.OPEN: self._open,
            abi.SETATTR: self._setattr,
            abi.MKNOD: self._mknod,
            abi.SYMLINK: self._symlink,
            abi.LINK: self._link,
            abi.REMOVEXATTR: self._removexattr,
        }

    def prepare(self, opcode: int, node: int, request: memoryview) -> Prepared:
        """Unpack a whole request, which may be overwritten afterwards. Raises struct.error, ValueError."""
        _, _, _, _, uid, gid, pid, _, _ = abi.IN_HEADER.unpack_from(request)
        pending = self._relay.pending(opcode, node)
        return self.by_opcode[opcode](pending, Caller(uid, gid, pid), bytes(request[abi.IN_HEADER.size :]))

    def _create(self, pending: Pending, caller: Caller, body: bytes) -> Prepared:
        flags, mode, caller.umask, _ = abi.CREATE_IN.unpack_from(body)
        name = _name(body[abi.CREATE_IN.size :])
        pending.detail = flags

        async def run(unique: int) -> None:
            info, entry = await self._operations.create(pending.node, name, mode, flags, caller)
            opened = abi.OPEN_OUT.pack(info.fh, 0, 0)
            self._relay.answer(unique, pending, abi.pack_entry(entry) + opened)

        return run

    def _tmpfile(self, pending: Pending, caller: Caller, body: bytes) -> Prepared:
        flags, mode, caller.umask, _ = abi.CREATE_IN.unpack_from(body)  # behind it a name that means nothing
        pending.detail = flags

        async def run(unique: int) -> None:
            info, entry = await self._operations.create_unnamed(pending.node, mode, flags, caller)
            self._relay.answer(unique, pending, abi.pack_entry(entry) + abi.OPEN_OUT.pack(info.fh, 0, 0))

        return run

    def _mkdir(self, pending: Pending, caller: Caller, body: bytes) -> Prepared:
        mode, caller.umask = abi.MKDIR_IN.unpack_from(body)
        name = _name(body[abi.MKDIR_IN.size :])

        async def run(unique: int) -> None:
            entry = await self._operations.mkdir(pending.node, name, mode, caller)
            self._relay.answer(unique, pending, abi.pack_entry(entry))

        return run

    def _unlink(self, pending: Pending, caller: Caller, body: bytes) -> Prepared:
        name = _name(body)

        async def run(unique: int) -> None:
            await self._operations.unlink(pending.node, name, caller)
            self._relay.answer(unique, pending, b"")

        return run

    def _rmdir(self, pending: Pending, caller: Caller, body: bytes) -> Prepared:
        name = _name(body)

        async def run(unique: int) -> None:
            await self._operations.rmdir(pending.node, name, caller)
            self._relay.answer(unique, pending, b"")

        return run

    def _rename(self, pending: Pending, caller: Caller, body: bytes) -> Prepared:
        (new_parent,) = abi.RENAME_IN.unpack_from(body)
        return self._renaming(pending, caller, new_parent, 0, body[abi.RENAME_IN.size :])

    def _rename2(self, pending: Pending, caller: Caller, body: bytes) -> Prepared:
        new_parent, flags, _ = abi.RENAME2_IN.unpack_from(body)
        return self._renaming(pending, caller, new_parent, flags, body[abi.RENAME2_IN.size :])

    def _renaming(
        self, pending: Pending, caller: Caller, new_parent: int, flags: int, names: bytes
    ) -> Prepared:
        old, separator, new = names.partition(b"\0")
        old_name, new_name = _name(old + separator), _name(new)

        async def run(unique: int) -> None:
            await self._operations.rename(pending.node, old_name, new_parent, new_name, flags, caller)
            self._relay.answer(unique, pending, b"")

        return run

    def _open(self, pending: Pending, caller: Caller, body: bytes) -> Prepared:
        flags, _ = abi.OPEN_IN.unpack_from(body)
        pending.detail = flags

        async def run(unique: int) -> None:
            info = await self._operations.open(pending.node, flags, caller)
            self._relay.answer(unique, pending, abi.OPEN_OUT.pack(info.fh, 0, 0))

        return run

    def _setattr(self, pending: Pending, caller: Caller, body: bytes) -> Prepared:
        changes = _changes(body)

        async def run(unique: int) -> None:
            entry = await self._operations.change_attributes(pending.node, changes)
            self._relay.answer(unique, pending, abi.pack_attr(entry))

        return run

    def _mknod(self, pending: Pending, caller: Caller, body: bytes) -> Prepared:
        mode, rdev, caller.umask, _ = abi.MKNOD_IN.unpack_from(body)
        name = _name(body[abi.MKNOD_IN.size :])

        async def run(unique: int) -> None:
            entry = await self._operations.mknod(pending.node, name, mode, rdev, caller)
            self._relay.answer(unique, pending, abi.pack_entry(entry))

        return run

    def _symlink(self, pending: Pending, caller: Caller, body: bytes) -> Prepared:
        name, separator, target = body.partition(b"\0")
        name, target = _name(name + separator), _name(target)

        async def run(unique: int) -> None:
            entry = await self._operations.symlink(pending.node, name, target, caller)
            self._relay.answer(unique, pending, abi.pack_entry(entry))

        return run

    def _link(self, pending: Pending, caller: Caller, body: bytes) -> Prepared:
        (ino,) = abi.LINK_IN.unpack_from(body)
        name = _name(body[abi.LINK_IN.size :])

        async def run(unique: int) -> None:
            entry = await self._operations.link(ino, pending.node, name, caller)
            self._relay.answer(unique, pending, abi.pack_entry(entry))

        return run

    def _removexattr(self, pending: Pending, caller: Caller, body: bytes) -> Prepared:
        name = _name(body)

        async def run(unique: int) -> None:
            await self._operations.removexattr(pending.node, name, caller)
            self._relay.answer(unique, pending, b"")

        return run


def _changes(body: bytes) -> dict[str, Any]:
    """As VolumeOperations.change_attributes wants them."""
    numbers = abi.SETATTR_IN.unpack_from(body)
    valid, _, _, size, _, atime_s, mtime_s, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = numbers
    now_ns = time.time_ns()

    def when(seconds: int, rest_ns: int, given: int, now: int) -> int | None:
        if valid & now:
            return now_ns
        return seconds * 1_000_000_000 + rest_ns if valid & given else None

    return {
        "mode": mode & 0o7777 if valid & abi.SET_MODE else None,
        "uid": uid if valid & abi.SET_UID else None,
        "gid": gid if valid & abi.SET_GID else None,
        "size": size if valid & abi.SET_SIZE else None,
        "atime_ns": when(atime_s, atime_ns, abi.SET_ATIME, abi.SET_ATIME_NOW),
        "mtime_ns": when(mtime_s, mtime_ns, abi.SET_MTIME, abi.SET_MTIME_NOW),
    }


def _name(field: bytes) -> bytes:
    name, end, rest = field.partition(b"\0")
    if not name or not end or rest:
        raise ValueError(f"{field!r} is not one name with its NUL")
    return name
