"""Block reader: reads metadata blocks while SQLite waits, that is without giving up the thread.

Place      coordinator floor; beside the bus, which cannot be awaited from within SQLite.
Why        SQLite's pages are cached (slab_vfs.py) and written through memory; what is read here is cold, and
           the drive servers answer from another process. One blocking connection per node, with short
           time-outs.
Epochs     a change of members is committed before it is installed; in between members refuse the new epoch, and are
           asked at the one before (`readable`). Else a checkpoint that reads just then would end the service.
Errors     every in-sync member is tried; Unavailable when none answers with blocks that verify (I9).
Detours    (net/detours.py) are tried when no member is reached by the straight path, WAYPOINTS_MAX for each.
"""

import contextlib
import logging
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from coordinator.slab_book import MetadataBook
from csvfs.block.server_links import ServerAddress
from csvfs.errors import Corrupt, CsvfsError, Disconnected, Fenced, ProtocolError, Unavailable
from csvfs.ids import Epoch, Incarnation, NodeName, SlabId, VolumeId, id_bytes
from csvfs.net.detours import DRIVES, Waypoint
from csvfs.net.tls import Identity
from csvfs.units import BLOCK_SIZE
from csvfs.wire import control
from csvfs.wire.block_messages import (
    BLOCK_COUNT_MAX,
    BLOCK_HEAD,
    NEVER_WRITTEN,
    ZERO_BLOCK,
    Member,
    SlabDescriptor,
    block_checksum,
    slab_seed,
    unpack_checksums,
)
from csvfs.wire.frames import FRAME_HEADER_SIZE, Frame, Kind, frame_size, pack_frame, parse_frame

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 1.0
READ_TIMEOUT_S = 2.0
WAYPOINTS_MAX = 2  # nothing else is done meanwhile

ReadLocal = Callable[[SlabId, int, int], "bytes | bytearray | None"]


def readable(committed: SlabDescriptor, settled: SlabDescriptor | None) -> tuple[Epoch, tuple[Member, ...]]:
    """At which epoch metadata is read, and from whom.

    settled  the newest descriptor that is installed on all its members; None: not known yet.
    Nothing was acknowledged at a later epoch than that (I2), so a member in sync by both has all that was.
    """
    if settled is not None and settled.epoch < committed.epoch:
        drives = {member.drive for member in settled.in_sync}
        both = tuple(member for member in committed.in_sync if member.drive in drives)
        if both:
            return settled.epoch, both
    return committed.epoch, committed.in_sync


class _Connection:
    """One request at a time."""

    def __init__(
        self,
        server: ServerAddress,
        hello: dict[str, Any],
        identity: Identity | None,
        *,
        local: bool,
        waypoint: Waypoint | None = None,
    ) -> None:
        """`waypoint`: by a detour through that node."""
        address: Any = server.unix_path if local and server.unix_path else (server.address, server.port)
        if waypoint is not None:
            address = (waypoint.address, waypoint.port)
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.incarnation = server.incarnation
        self._node = server.node
        self._request_id = 0
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(CONNECT_TIMEOUT_S)
            self._socket.connect(address)
            if waypoint is not None:
                self._go_through(waypoint, hello, identity)
            if identity is not None and family != socket.AF_UNIX:
                self._socket = identity.shake_hands_blocking(self._socket, server.node)
            self._socket.settimeout(READ_TIMEOUT_S)
            answer = control.unpack_value(self.request(Kind.CALL, control.pack_call("hello", hello)).head)
            self.indexes = {
                id_bytes(row["id"]): int(row["index"]) for row in answer["drives"] if row["state"] == "ok"
            }
        except (OSError, KeyError, TypeError, ValueError) as error:
            self.close()
            raise Unavailable(f"drive server of node {server.node}: {error!r}") from None
        except BaseException:
            self.close()
            raise

    def _go_through(self, waypoint: Waypoint, hello: dict[str, Any], identity: Identity | None) -> None:
        """Have the node in between pass the connection on: PROTOCOL.md, "Detours"."""
        if identity is not None:
            self._socket = identity.shake_hands_blocking(self._socket, waypoint.node)
        self._socket.settimeout(READ_TIMEOUT_S)
        ask = {"cluster": hello["cluster"], "node": self._node, "service": DRIVES}
        self.request(Kind.CALL, control.pack_call("via", ask))
        self._socket = socket.socket(fileno=self._socket.detach())  # without its seal
        self._socket.settimeout(READ_TIMEOUT_S)

    def request(self, kind: int, head: bytes) -> Frame:
        """Send one frame and wait for its answer. Raises Disconnected, ProtocolError, or what is answered."""
        self._request_id += 1
        try:
            self._socket.sendall(pack_frame(kind, self._request_id, head))
            header = self._receive(FRAME_HEADER_SIZE)
            size = frame_size(memoryview(header))
            frame = parse_frame(memoryview(header + self._receive(size - FRAME_HEADER_SIZE)))
        except OSError as error:
            raise Disconnected(f"drive server of node {self._node}: {error}") from None
        if frame.request_id != self._request_id:
            raise ProtocolError(f"drive server of node {self._node} answers another question")
        if frame.kind == Kind.ERROR:
            raise control.unpack_error(frame.head)
        return frame

    def _receive(self, size: int) -> bytes:
        pieces, missing = [], size
        while missing:
            piece = self._socket.recv(missing)
            if not piece:
                raise Disconnected(f"the drive server of node {self._node} closed the connection")
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()


class BlockReader:
    """Called by SlabImage: linear blocks of the metadata's address space, through its slabs."""

    def __init__(
        self,
        book: MetadataBook,
        directory: Callable[[NodeName], ServerAddress | None],
        *,
        cluster: bytes,
        volume: VolumeId,
        term: int,
        local_node: NodeName,
        blocks_per_slab: int,
        identity: Identity | None = None,
        waypoints: Callable[[], Iterable[Waypoint]] = tuple,
    ) -> None:
        """`waypoints`: nodes that may pass us on, this one among them or not."""
        self._book = book
        self._waypoints = waypoints
        self._identity = identity
        self._directory = directory
        self._hello = {
            "cluster": cluster, "volume": volume, "writer": "coordinator-reader",
            "incarnation": Incarnation(term),
        }  # fmt: skip
        self._volume = volume
        self._local_node = local_node
        self._blocks_per_slab = blocks_per_slab
        self._connections: dict[NodeName, _Connection] = {}
        self.read_local: ReadLocal = lambda slab, block, count: (
            None
        )  # this node's own copy, where there is one
        self.settled: Callable[[SlabId], SlabDescriptor | None] = lambda slab: None  # see `readable`

    def read(self, block: int, count: int) -> bytes:
        """`count` blocks, verified. Raises Corrupt, Unavailable."""
        pieces = []
        while count:
            index, slab_block = divmod(block, self._blocks_per_slab)
            step = min(count, self._blocks_per_slab - slab_block, BLOCK_COUNT_MAX)
            pieces.append(self._read_slab(self._book.slabs[index], slab_block, step))
            block += step
            count -= step
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_slab(self, slab: SlabId, block: int, count: int) -> bytes:
        data = self.read_local(slab, block, count)
        if data is not None:
            return bytes(data)
        epoch, in_sync = readable(self._book.current(slab), self.settled(slab))
        failures: list[CsvfsError] = []
        members = sorted(in_sync, key=lambda member: member.node != self._local_node)
        for member, waypoint in self._ways(members, failures):
            try:
                return self._read_member(member, slab, epoch, block, count, waypoint)
            except Fenced:
                raise
            except CsvfsError as error:
                self._drop(member.node)
                failures.append(error)
        if count > 1 and any(isinstance(error, Corrupt) for error in failures):
            # No member has all of the range intact; each block may still have one that is.
            return b"".join(self._read_slab(slab, block + index, 1) for index in range(count))
        text = "; ".join(str(error) for error in failures)
        kind = Corrupt if failures and all(isinstance(error, Corrupt) for error in failures) else Unavailable
        raise kind(
            f"metadata slab {slab} blocks {block} to {block + count - 1}: {text or 'no in-sync member'}"
        )

    def _ways(
        self, members: list[Member], failures: list[CsvfsError]
    ) -> Iterator[tuple[Member, Waypoint | None]]:
        """All members by the straight path, then by detours those that were not reached. `failures`: of those that were
        tried so far, in order."""
        for member in members:
            yield member, None
        unreached = [
            member for member, error in zip(members, failures, strict=True)
            if isinstance(error, Unavailable) and member.node != self._local_node
        ]  # fmt: skip
        for member in unreached:
            others = [w for w in self._waypoints() if w.node not in (member.node, self._local_node)]
            for waypoint in others[:WAYPOINTS_MAX]:
                yield member, waypoint

    def _read_member(
        self, member: Member, slab: SlabId, epoch: Epoch, block: int, count: int, waypoint: Waypoint | None
    ) -> bytes:
        connection = self._connected(member.node, waypoint)
        if member.drive not in connection.indexes:
            self._drop(member.node)  # the drive may have been added since
            connection = self._connected(member.node, waypoint)
        index = connection.indexes.get(member.drive)
        if index is None:
            raise Unavailable(f"node {member.node} does not serve drive {member.drive.hex()[:8]}")
        head = BLOCK_HEAD.pack(slab, 0, 0, epoch, block, count, index, 0)
        frame = connection.request(Kind.READ, head)
        data = bytearray(frame.payload)
        if frame.kind != Kind.READ_DATA or len(data) != count * BLOCK_SIZE:
            raise ProtocolError(
                f"node {member.node} answered a READ of {count} blocks with {len(data)} bytes"
            )
        seed = slab_seed(self._volume, slab)
        view = memoryview(data)
        for position, checksum in enumerate(unpack_checksums(frame.head, count)):
            begin = position * BLOCK_SIZE
            if checksum == NEVER_WRITTEN:
                data[begin : begin + BLOCK_SIZE] = ZERO_BLOCK
            elif block_checksum(view[begin : begin + BLOCK_SIZE], seed, block + position) != checksum:
                raise Corrupt(
                    f"slab {slab} block {block + position} from node {member.node}: checksum"
                )
        return bytes(data)

    def _connected(self, node: NodeName, waypoint: Waypoint | None) -> _Connection:
        """One that is open is used, whatever its path is."""
        server = self._directory(node)
        connection = self._connections.get(node)
        if server is None:
            raise Unavailable(f"node {node} runs no drive server now")
        if connection is None or connection.incarnation != server.incarnation:
            self._drop(node)
            local = node == self._local_node
            connection = _Connection(server, self._hello, self._identity, local=local, waypoint=waypoint)
            self._connections[node] = connection
        return connection

    def _drop(self, node: NodeName) -> None:
        connection = self._connections.pop(node, None)
        if connection is not None:
            connection.close()

    def close(self) -> None:
        for node in list(self._connections):
            self._drop(node)
