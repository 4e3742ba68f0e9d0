"""Makes names and extents by the hundred thousand: a session at a coordinator that asks for many things at once.

Place      tests, under scale.py. Blocks.
Why        a kernel makes the names of one directory one after the other. A million of them take an hour on a busy machine,
           and what is to be measured is what one costs when they are there.
Session    of a node of its own, which is put into the cluster store as one that is alive and is taken out again. It comes
           through the unix socket of the coordinator's node and gives its leases back as it goes.
"""

import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from csvfs.errors import ProtocolError
from csvfs.wire.control import pack_call, pack_value, unpack_call, unpack_error, unpack_value
from csvfs.wire.frames import FRAME_HEADER_SIZE, Frame, Kind, frame_size, pack_frame, parse_frame

IN_FLIGHT_MAX = 256
RELEASE_EVERY = 1000
RECEIVE_SIZE = 1 << 20
ANSWER_S_MAX = 60.0
LEASE_WRITE = 3

T = TypeVar("T")
Say = Callable[[str], None]


class Filler:
    """One link. Raises what the coordinator answers, OSError."""

    def __init__(self, path: Path, volume: str, node: str, say: Say) -> None:
        self._say = say
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_S_MAX)
        self._socket.connect(str(path))
        self._buffer = bytearray()
        self._request_id = 0
        self._op = 0
        self._in_flight: dict[int, int] = {}  # request id -> op, 0: none
        self._held: list[int] = []
        self._values: list[Any] = []
        self.call("hello", {"volume": volume, "node": node, "incarnation": time.time_ns() >> 20, "inherit": False})

    def close(self) -> None:
        """In order: nothing of the session is left, and so nothing of its leases."""
        self._release()
        self._wait(0)
        self.call("goodbye", {})
        self._socket.close()

    def call(self, name: str, args: dict[str, Any]) -> Any:
        """One call without a number, and its answer."""
        self._wait(0)
        self._values.clear()
        self._send(name, args, numbered=False)
        self._wait(0)
        return self._values[-1]

    def make_directory(self, parent: int, name: bytes) -> int:
        self._wait(0)
        self._values.clear()
        self._make(parent, name, 0o40755)
        self._wait(0)
        return int(self._values[-1]["attr"][0])

    def make(self, parent: int, names: Iterable[bytes]) -> None:
        """Empty files."""
        for name in self._told(names):
            self._make(parent, name, 0o100644)
        self._wait(0)

    def allocate(self, ino: int, blocks: Iterable[int]) -> None:
        """Space for single blocks of a file: an extent each, where they lie far apart."""
        self.call("acquire", {"ino": ino, "kind": LEASE_WRITE, "block": 0, "count": 0})
        for block in self._told(blocks):
            self._send("allocate", {"ino": ino, "block": block, "count": 1, "size": 0, "mtime_ns": 0}, numbered=True)
        self._wait(0)

    def _told(self, names: Iterable[T]) -> Iterator[T]:
        began = said = time.monotonic()
        for number, name in enumerate(names):
            yield name
            if time.monotonic() - said >= 5:
                said = time.monotonic()
                self._say(f"  {number:,}, {number / (said - began):,.0f}/s")

    def _make(self, parent: int, name: bytes, mode: int) -> None:
        args = {"parent": parent, "name": name, "mode": mode, "uid": 0, "gid": 0, "umask": 0, "rdev": 0, "target": None}
        self._send("make", args, numbered=True)

    def _send(self, name: str, args: dict[str, Any], *, numbered: bool) -> None:
        self._wait(IN_FLIGHT_MAX - 1)
        self._request_id += 1
        op = 0
        if numbered:
            self._op = op = self._op + 1
            args |= {"op": op, "op_done": next((o for o in self._in_flight.values() if o), op)}
        self._in_flight[self._request_id] = op
        self._socket.sendall(pack_frame(Kind.CALL, self._request_id, pack_call(name, args)))

    def _wait(self, in_flight: int) -> None:
        """Until no more than so many calls are not answered."""
        while len(self._in_flight) > in_flight:
            data = self._socket.recv(RECEIVE_SIZE)
            if not data:
                raise ProtocolError("the coordinator closed the link")
            self._buffer += data
            self._take_frames()

    def _take_frames(self) -> None:
        view = memoryview(bytes(self._buffer))
        at = 0
        while len(view) - at >= FRAME_HEADER_SIZE and len(view) - at >= (size := frame_size(view[at:])):
            self._take(parse_frame(view[at : at + size]))
            at += size
        del self._buffer[:at]

    def _take(self, frame: Frame) -> None:
        if frame.kind == Kind.CALL:
            name, _ = unpack_call(frame.head)
            assert name in ("recall", "query"), name
            value = {"kind": 0, "size": None, "mtime_ns": None, "atime_ns": None}
            self._socket.sendall(pack_frame(Kind.REPLY, frame.request_id, pack_value(value)))
            return
        if frame.kind == Kind.ERROR:
            raise unpack_error(frame.head)
        del self._in_flight[frame.request_id]
        value = unpack_value(frame.head)
        self._values.append(value)
        if isinstance(value, dict) and "extents" not in value and value.get("attr"):
            self._held.append(value["attr"][0])
        if len(self._values) >= RELEASE_EVERY:
            self._values.clear()
            self._release()

    def _release(self) -> None:
        held, self._held = self._held, []
        if held:
            self._request_id += 1
            self._in_flight[self._request_id] = 0
            items = [[ino, 0] for ino in held]
            self._socket.sendall(pack_frame(Kind.CALL, self._request_id, pack_call("release", {"items": items})))
