"""What a drive server does for its links: blocks, slabs, fences (PROTOCOL.md, "Calls to a drive server").

Place      block floor; drive_server.py is the process around it.
Hot path   WRITE and READ are handled inline in the engine's task: unpack, check, pwrite or preadv, answer.
Order      One thread applies everything, so a fence that was answered is a barrier (I6), and writes of one
           link are applied in the order they were sent (I4).

Invariants
  I2  A WRITE is taken only at the installed epoch, from a writer that is not fenced.
  I3  A chunk is active, durably, before its data is written; writer_marks.py says when no longer.
  I5  Nothing is served when this node may not serve (liveness), nor from copies not in service.
"""

import logging
from collections.abc import Callable
from time import perf_counter, perf_counter_ns
from typing import Any

import trio
from crc32c import crc32c

from csvfs.block import latency
from csvfs.block.compression import shrink
from csvfs.block.drive import Drive
from csvfs.block.flushes import Flushes
from csvfs.block.pace import Foreground
from csvfs.block.served_drives import ServedDrive, ServedDrives
from csvfs.block.slab_copy import SlabCopy
from csvfs.block.writer_marks import MarkBook, WriterMarks
from csvfs.errors import (
    BadRequest,
    Corrupt,
    CsvfsError,
    Disconnected,
    DriveFailed,
    Fenced,
    LeaseLost,
    ProtocolError,
    StaleEpoch,
    Unavailable,
    UnflushedLost,
)
from csvfs.ids import DriveId, Epoch, Incarnation, NodeName, SlabId, Term, VolumeId
from csvfs.net.calls import CallTable
from csvfs.net.engine import Engine
from csvfs.net.link import Link
from csvfs.units import BLOCK_SIZE, BLOCKS_PER_CHUNK
from csvfs.wire.block_messages import (
    BLOCK_COUNT_MAX,
    BLOCK_HEAD,
    FLUSH_HEAD,
    FLUSH_LATER_EPOCH,
    FLUSH_NOT_SERVED,
    READ_COMPRESSED,
    ROLE_IN_SYNC,
    ROLE_JOINING,
    pack_flush_refused,
    unpack_checksums,
    unpack_flush_rows,
)
from csvfs.wire.frames import Frame, Kind

log = logging.getLogger(__name__)

_CHUNK_SHIFT = BLOCKS_PER_CHUNK.bit_length() - 1
_HEAD_SIZE = BLOCK_HEAD.size
WRITE_SLOW_S = 0.001


class Client:
    """The peer of one link after its `hello`."""

    __slots__ = ("copies", "fenced", "foreground", "incarnation", "link", "marks", "volume", "writer")

    def __init__(
        self, link: Link, volume: VolumeId, writer: str, incarnation: Incarnation, marks: WriterMarks
    ) -> None:
        self.link = link
        self.volume = volume
        self.writer = writer
        self.foreground = writer.startswith("mount/")  # programs wait for its reads and writes
        self.incarnation = incarnation
        self.marks = marks
        self.fenced = False
        self.copies: dict[tuple[int, int], SlabCopy] = {}  # (drive index, slab) to a copy in service


class BlockService:
    """State of a drive server: its drives, clients, fences and terms."""

    def __init__(
        self,
        engine: Engine,
        node: NodeName,
        cluster: bytes,
        incarnation: Incarnation,
        may_serve: Callable[[], bool],
    ) -> None:
        self.engine = engine
        self.node = node
        self.cluster = cluster
        self.incarnation = incarnation
        self.drives = ServedDrives()
        self.marks = MarkBook()
        self.foreground = Foreground()
        self.calls = CallTable({})
        self.nursery: trio.Nursery | None = None  # set before the first link
        self.clients: set[Client] = set()
        self._may_serve = may_serve
        self._fences: dict[tuple[VolumeId, str], Incarnation] = {}
        self._terms: dict[VolumeId, int] = {}
        self.drive_failed = trio.Event()  # replaced by drive_watch.py, which looks after the drives when it is set
        self.flushes = Flushes(engine, self.marks, lambda: self.drive_failed.set())

    # -- links -----------------------------------------------------------------------------------

    def accept(self, link: Link) -> None:
        """Serve a new link; until its `hello` it can do nothing else."""
        link.on_frame = self._on_frame
        link.on_close = self._on_close

    def _on_close(self, link: Link, error: CsvfsError) -> None:
        if link.owner is not None:
            self.clients.discard(link.owner)

    def hello(self, link: Link, volume: VolumeId, writer: str, incarnation: Incarnation) -> None:
        """Bind the link to a writer's incarnation; earlier links of the writer end (I4).

        Raises  Fenced. AccessDenied: the writer is of another node than the link's certificate.
        """
        kind, _, rest = writer.partition("/")
        if kind in ("mount", "server"):
            link.require_node(rest.partition("/")[0])
        key = (volume, writer)
        fence = self._fences.get(key, Incarnation(0))
        if incarnation < fence:
            raise Fenced(f"{writer} incarnation {incarnation} was evicted; {fence} is the least allowed")
        for client in list(self.clients):
            if client.volume == volume and client.writer == writer and writer not in ("", "admin"):
                if client.incarnation > incarnation:
                    raise Fenced(f"{writer} incarnation {client.incarnation} is newer than {incarnation}")
                client.link.close(Disconnected(f"{writer} connected anew"))
        client = Client(link, volume, writer, incarnation, self.marks.writer(volume, writer, incarnation))
        self.clients.add(client)
        link.owner = client

    def fence(self, volume: VolumeId, writer: str, min_incarnation: Incarnation) -> None:
        """Take nothing of older incarnations of `writer` from now on (I6: one thread, so nothing is under
        way)."""
        key = (volume, writer)
        self._fences[key] = max(min_incarnation, self._fences.get(key, Incarnation(0)))
        for client in list(self.clients):
            if client.volume == volume and client.writer == writer and client.incarnation < min_incarnation:
                client.fenced = True
                client.link.close(Fenced(f"{writer} incarnation {client.incarnation} was evicted"))

    def is_over(self, volume: bytes, writer: str, incarnation: Incarnation) -> bool:
        """Whether nothing of it lands any more."""
        return incarnation < self._fences.get((VolumeId(volume), writer), 0)

    def check_term(self, volume: VolumeId, term: int) -> None:
        """Register `term`, or refuse it. Raises Fenced when a higher one is registered."""
        registered = self._terms.get(volume, 0)
        if term < registered:
            raise Fenced(f"term {term} of the volume is over; the registered one is {registered}")
        if term > registered:
            self._terms[volume] = term
            self.fence(volume, "coordinator", Incarnation(term))

    # -- frames ----------------------------------------------------------------------------------

    def _on_frame(self, link: Link, frame: Frame) -> None:
        kind = frame.kind
        if kind == Kind.CALL:
            assert self.nursery is not None
            self.calls.handle(link, frame, self.nursery)
            return
        try:
            if kind == Kind.WRITE:
                began_ns = perf_counter_ns()
                if self._write(link, frame).foreground:
                    self.foreground.note(perf_counter_ns() - began_ns)
            elif kind == Kind.READ:
                self._read(link, frame)
            elif kind == Kind.FLUSH:
                self._flush(link, frame)
            elif kind == Kind.HEAL:
                self._heal(link, frame)
            else:
                raise ProtocolError(f"frames of kind {kind} are not served here")
        except ProtocolError:
            raise  # closes the link
        except CsvfsError as error:
            if isinstance(error, DriveFailed):
                self.drive_failed.set()
            link.reply_error(frame.request_id, error)

    def _resolve(self, link: Link, index: int, slab: int) -> tuple[Client, SlabCopy]:
        client: Client | None = link.owner
        self.engine.hot()
        if client is None:
            raise ProtocolError(f"{link.peer} reads or writes before its hello")
        if client.fenced:
            raise Fenced(f"{client.writer} incarnation {client.incarnation} was evicted")
        if not self._may_serve():
            raise LeaseLost(f"node {self.node} lost its lease in the cluster store and serves nothing")
        copy = client.copies.get((index, slab))
        if copy is None:
            served = self.drives.by_index(index)
            copy = self.drives.copy_in_service(served, client.volume, SlabId(slab))
            client.copies[(index, slab)] = copy
        return client, copy

    def _write(self, link: Link, frame: Frame) -> Client:
        head, payload = frame.head, frame.payload
        if len(head) < _HEAD_SIZE:
            raise ProtocolError("a WRITE head is cut short")
        slab, sequence, below, epoch, block, count, index, _ = BLOCK_HEAD.unpack_from(head)
        packed = head[_HEAD_SIZE:]
        checksums = unpack_checksums(packed, count)
        if len(payload) != count * BLOCK_SIZE:
            raise ProtocolError(f"a WRITE of {count} blocks carries {len(payload)} bytes")
        client, copy = self._resolve(link, index, slab)
        if epoch != copy.epoch:
            raise StaleEpoch(f"slab {slab} is at epoch {copy.epoch}, not {epoch}")
        self._check_range(copy, block, count)
        _verify_payload(copy, block, payload, checksums)
        began = perf_counter()
        copy.write_blocks(block, payload, bytes(packed))
        took_s = perf_counter() - began
        if took_s > WRITE_SLOW_S:  # the page cache takes microseconds: what took longer waited for the medium
            self._note_slow_write(index, took_s)
        marks = client.marks
        marks.below = below
        first = block >> _CHUNK_SHIFT
        marks.marks[(copy, first)] = sequence
        for chunk in range(first + 1, ((block + count - 1) >> _CHUNK_SHIFT) + 1):
            marks.marks[(copy, chunk)] = sequence
        link.send(Kind.WRITTEN, frame.request_id)
        return client

    def _note_slow_write(self, index: int, took_s: float) -> None:
        self.drives.by_index(index).latency.record_slow_write(took_s, trio.current_time())

    def _read(self, link: Link, frame: Frame) -> None:
        began_ns = perf_counter_ns()
        if len(frame.head) != _HEAD_SIZE:
            raise ProtocolError("a READ head has the wrong size")
        slab, _, _, epoch, block, count, index, flags = BLOCK_HEAD.unpack(frame.head)
        if not 0 < count <= BLOCK_COUNT_MAX:
            raise ProtocolError(f"a READ of {count} blocks")
        client, copy = self._resolve(link, index, slab)
        if epoch > copy.epoch:
            raise StaleEpoch(f"slab {slab} is at epoch {copy.epoch} on node {self.node}, not yet {epoch}")
        self.check_in_sync(copy)
        self._check_range(copy, block, count)
        compressed = bool(flags & READ_COMPRESSED)
        got = None if compressed else copy.read_blocks_nowait(block, count)
        if got is None:
            assert self.nursery is not None
            noted_ns = began_ns if client.foreground else 0
            served = self.drives.by_index(index)
            args = (link, frame.request_id, served, copy, block, count, compressed, noted_ns)
            self.nursery.start_soon(self._read_cold, *args)
            return
        link.send(Kind.READ_DATA, frame.request_id, got[0], got[1])
        if client.foreground:
            self.foreground.note(perf_counter_ns() - began_ns)

    async def _read_cold(
        self,
        link: Link,
        request_id: int,
        served: ServedDrive,
        copy: SlabCopy,
        block: int,
        count: int,
        compressed: bool,
        noted_ns: int,
    ) -> None:
        """Bring the blocks into memory in a thread, then read them in the engine's thread like all others.

        Args  compressed: then compress them in a thread. noted_ns: when a request came that somebody waits
              for; 0: nobody does.
        """
        measured = served.latency
        token = measured.begin(latency.READ, trio.current_time())
        try:
            try:
                await self.in_thread_of(served, copy.warm_blocks, block, count)
            finally:
                measured.end(token, trio.current_time())
            packed, data = copy.read_blocks(block, count)
            if compressed:
                data = await self.in_thread(shrink, data) or data
            link.send(Kind.READ_DATA, request_id, packed, data)
            if noted_ns:
                self.foreground.note(perf_counter_ns() - noted_ns)
        except CsvfsError as error:
            link.reply_error(request_id, error)

    def _heal(self, link: Link, frame: Frame) -> None:
        head, payload = frame.head, frame.payload
        if len(head) < _HEAD_SIZE:
            raise ProtocolError("a HEAL head is cut short")
        slab, _, _, epoch, block, count, index, _ = BLOCK_HEAD.unpack_from(head)
        checksums = unpack_checksums(head[_HEAD_SIZE:], count)
        if len(payload) != count * BLOCK_SIZE:
            raise ProtocolError(f"a HEAL of {count} blocks carries {len(payload)} bytes")
        _, copy = self._resolve(link, index, slab)
        if epoch != copy.epoch:
            raise StaleEpoch(f"slab {slab} is at epoch {copy.epoch}, not {epoch}")
        self._check_range(copy, block, count)
        healed = 0
        for position, checksum in enumerate(checksums):
            data = payload[position * BLOCK_SIZE : (position + 1) * BLOCK_SIZE]
            if checksum and (crc32c(data, copy.seed ^ (block + position)) or 1) != checksum:
                raise Corrupt(f"slab {slab} block {block + position}: damaged on the way to node {self.node}")
            healed += copy.heal_block(block + position, data, checksum)
        if healed:
            log.warning("slab %d on node %s: %d blocks from %d on healed", slab, self.node, healed, block)
        link.reply(frame.request_id, healed)

    def check_in_sync(self, copy: SlabCopy) -> None:
        """I5: a copy that joins has not all it will have. Who reads there goes by an epoch at which it was in sync, and may
        have got its lease after the copy had gone out. Raises StaleEpoch: ask the owner."""
        if copy.role == ROLE_JOINING:
            raise StaleEpoch(f"slab {copy.slab} on node {self.node} is being brought in sync at epoch {copy.epoch}")

    def _check_range(self, copy: SlabCopy, block: int, count: int) -> None:
        if block + count > copy.block_count:
            raise BadRequest(
                f"blocks {block} to {block + count - 1} exceed a slab of {copy.block_count} blocks"
            )

    # -- flush -----------------------------------------------------------------------------------

    def _flush(self, link: Link, frame: Frame) -> None:
        """FLUSH: answered when all its drives are flushed, with the first error if there is one.

        A row says what its writer takes for the slab's epoch: of a copy that is not at that one, it is told so. Whatever
        may have lost what was written before is at a later one.
        """
        client: Client | None = link.owner
        if client is None or len(frame.head) < FLUSH_HEAD.size:
            raise ProtocolError(f"{link.peer} sent a FLUSH that is cut short, or before its hello")
        (below,) = FLUSH_HEAD.unpack_from(frame.head)
        self.engine.hot()
        client.marks.below = max(client.marks.below, below)
        rows = unpack_flush_rows(frame.head[FLUSH_HEAD.size :])
        whys = [self._why_not_flushed(client, *row) for row in rows]
        refused = pack_flush_refused((number, why) for number, why in enumerate(whys) if why)
        indexes = dict.fromkeys(index for index, _, _ in rows)
        request_id = frame.request_id
        errors: list[CsvfsError] = []
        remaining = len(indexes)

        def flushed(error: CsvfsError | None) -> None:
            nonlocal remaining
            remaining -= 1
            if error is not None:
                errors.append(error)
            if not remaining and errors:
                link.reply_error(request_id, errors[0])
            elif not remaining:
                link.send(Kind.WRITTEN, request_id, refused)

        for served in [self.drives.by_index(index) for index in indexes]:
            try:
                self.flushes.request(served, flushed)
            except CsvfsError as error:
                flushed(error)

    def _why_not_flushed(self, client: Client, index: int, epoch: Epoch, slab: SlabId) -> int:
        """0: the copy is in service at `epoch`; else as in the answer to a FLUSH. Raises NotFound: no such drive."""
        served = self.drives.by_index(index)
        copy = None if served.drive is None else served.drive.find(client.volume, slab)
        if copy is None or copy not in served.in_service or copy.epoch < epoch:
            return FLUSH_NOT_SERVED
        return FLUSH_LATER_EPOCH if copy.epoch > epoch else 0

    def close(self, *, clean: bool = True) -> None:
        """End the flush threads, then flush and close the drives; `clean=False`: as a kill would."""
        self.flushes.close()
        self.drives.close(clean=clean)

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run what may wait for a disk in a thread; its end is seen at once, by trio."""
        self.engine.trio_awaited += 1
        try:
            return await trio.to_thread.run_sync(function, *args)
        finally:
            self.engine.trio_awaited -= 1

    async def in_thread_of(self, served: ServedDrive, function: Callable[..., None], *args: Any) -> None:
        """Run what may wait for the medium of a drive in a thread of that drive; left to itself when the drive is
        given up, or the caller is cancelled."""
        self.engine.trio_awaited += 1
        scope = trio.CancelScope()
        served.waits.add(scope)
        try:
            with scope:
                await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True, limiter=served.threads)
        finally:
            served.waits.discard(scope)
            self.engine.trio_awaited -= 1

    def give_up(self, served: ServedDrive, drive: Drive) -> None:
        """The drive has failed: nothing of it is in service any more, and nobody waits for it any more."""
        served.in_service.clear()
        self.forget_copies()
        self.marks.forget_drive(drive)
        served.state, served.fault = f"failed: {drive.failure}", drive.fault
        self.flushes.give_up(served, drive.failed_error())
        for scope in served.waits:
            scope.cancel()
        self.drive_failed.set()  # the cluster is told now, however long closing takes

    # -- slabs -----------------------------------------------------------------------------------

    def put_in_service(self, served: ServedDrive, copy: SlabCopy) -> None:
        served.in_service.add(copy)

    def release_drive(self, drive_id: DriveId) -> None:
        """Stop serving a drive that no slab needs any more, so that it may be used for something else."""
        served = self.drives.by_id(drive_id)
        self.flushes.end(served)
        self.forget_copies()
        if served.drive is not None:
            self.marks.forget_drive(served.drive)
        self.drives.release(drive_id)

    def forget_copies(self) -> None:
        """A copy was deleted: links must look theirs up again."""
        for client in self.clients:
            client.copies.clear()

    async def install(
        self,
        served: ServedDrive,
        volume: VolumeId,
        slab: SlabId,
        epoch: Epoch,
        role: int,
        term: int,
        *,
        alone: bool,
        accepts_loss: int | None = None,
    ) -> None:
        """Set a copy's epoch and role, and put it in service (I1: the epoch only grows).

        Args     alone: it is the slab's only in-sync copy. accepts_loss: and what it had not flushed is known to be
                 lost, since the opening of the drive with this number.
        Raises   Unavailable: it is not, and has not been in service since this process started: it may lack
                 what was acknowledged since, so it has to leave the in-sync set and be resynced (I7).
                 UnflushedLost: it is alone, and its drive has lost what was not flushed: that has to be committed before
                 (I8: who flushes what it wrote earlier is to hear of it).
        """
        drive = served.opened()
        copy = self.drives.copy(served, volume, slab)
        if role == ROLE_IN_SYNC and copy not in served.in_service and not alone:
            raise Unavailable(
                f"slab {slab} on drive {served.drive_id.hex()[:8]}: its server has started anew, so only a resync "
                "makes it in sync again"
            )
        opens = drive.superblock.opens
        if role == ROLE_IN_SYNC and copy not in served.in_service and drive.contents_lost and accepts_loss != opens:
            lost = UnflushedLost(
                f"slab {slab} on drive {served.drive_id.hex()[:8]}: what was not flushed is lost: its machine lost power, "
                "or its flush failed"
            )
            lost.opens = opens
            raise lost
        if role == ROLE_IN_SYNC and copy not in served.in_service and drive.unclean:
            # It is the last copy: what a killed writer left torn becomes old or new.
            # In a thread: after a power cut every chunk is active, and nobody uses a copy not in service.
            torn = await trio.to_thread.run_sync(drive.adopt_torn, copy)
            if torn:
                log.warning("slab %d on drive %s: %d torn blocks adopted", slab, served.path, torn)
        if epoch > copy.epoch or copy not in served.in_service:
            # A pull of this epoch must not undo what is written at it (I7), so that is noted from here on. A copy
            # not in service has taken nothing in the life of this process, even if it knows the epoch already.
            copy.joining_begin()
        drive.set_epoch(copy, epoch, role, Term(term))
        served.in_service.add(copy)


def _verify_payload(copy: SlabCopy, block: int, payload: memoryview, checksums: tuple[int, ...]) -> None:
    """Raises Corrupt when a block does not match the checksum it came with (0 never matches)."""
    seed = copy.seed
    if len(checksums) == 1:
        if (crc32c(payload, seed ^ block) or 1) != checksums[0]:
            raise Corrupt(f"slab {copy.slab} block {block}: damaged on the way here")
        return
    for position, checksum in enumerate(checksums):
        begin = position * BLOCK_SIZE
        if (crc32c(payload[begin : begin + BLOCK_SIZE], seed ^ (block + position)) or 1) != checksum:
            raise Corrupt(f"slab {copy.slab} block {block + position}: damaged on the way here")
