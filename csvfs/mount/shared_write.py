"""Shared write: direct I/O on a file that several nodes write at once, in the segments that this node holds.

Place      mount floor; beside read_path.py and write_path.py, under file_table.py; over segments.py and leases.py.
Fits       what changes neither size nor layout: reads, and writes of whole blocks that the file has for itself. Everything
           else takes the lease on the inode, as ever, and so ends the sharing.
Recall     of a segment: nothing new begins there, what is under way ends, then it is answered. Of MEMBER: likewise of all,
           and what was written goes to the media first.
Flushes    Whoever gets a segment speaks with his fsync for what others have written there (I8). It would cost a flush for
           each move to have that on the media before; so the answer says whether it is not, and who gets the segment
           hears that (`Segments.owed`), and his next fsync has the coordinator ask those who owe a flush for it.
Heir       A write that is begun in a segment is noted with its request (request_journal.py) until the kernel has its answer. So the
           next process of a mount knows which segments it must have, claims them, and gives none of them back before
           what was begun there is done again. Of others that the process before had it knows nothing, and needs nothing.
"""

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import trio

from csvfs.errors import BadRequest, TimedOut, Unavailable
from csvfs.mount.file_state import LEASE_NONE, LEASE_OPEN, LEASE_READ, LEASE_WRITE, SIZE, FileState
from csvfs.mount.guard import Guard
from csvfs.mount.inheritance import Inheritance
from csvfs.mount.leases import Coordinator, Leases, window_of
from csvfs.mount.request_journal import RequestJournal, current_request
from csvfs.mount.segments import MEMBER, SEGMENT_SIZE, Segments, SegmentWrite, Use, segments_of
from csvfs.units import BLOCK_SIZE
from csvfs.volume import file_io
from csvfs.volume.extents import FILE_BLOCKS_MAX, Piece
from csvfs.volume.file_io import BlockBus, Data, Delivery, WriteDone
from csvfs.wire.block_messages import BLOCK_COUNT_MAX

_BLOCK_SHIFT = BLOCK_SIZE.bit_length() - 1
_BLOCK_MASK = BLOCK_SIZE - 1
_SEGMENT_SHIFT = SEGMENT_SIZE.bit_length() - 1
_FILE_SIZE_MAX = FILE_BLOCKS_MAX * BLOCK_SIZE

_time_ns = time.time_ns


class SharedWrite:
    """Where it says None, the file is not shared any more, or about to be so no more."""

    def __init__(
        self,
        leases: Leases,
        coordinator: Coordinator,
        bus: BlockBus,
        guard: Guard,
        io_timeout_s: float,
        inheritance: Inheritance,
        journal: RequestJournal,
        settle: Callable[[FileState], Awaitable[None]],
    ) -> None:
        """settle(state): what was written is on the media, or will be soon."""
        self._leases = leases
        self._states = leases.states
        self._read_local = bus.read_local
        self._bus_write = bus.write
        self._serving = guard.serving
        self._coordinator = coordinator
        self._bus = bus
        self._guard = guard
        self._io_timeout_s = io_timeout_s
        self._inheritance = inheritance
        self._journal = journal
        self._settle = settle
        self._timed: dict[FileState, None] = {}

    # -- hot -------------------------------------------------------------------------------------

    def read_nowait(self, ino: int, offset: int, size: int) -> Data | None:
        """As `read`, at once; None: use that. Begun and ended in this one step, so no recall has to wait for it (S2)."""
        state = self._states.get(ino)
        segments = state.segments if state is not None else None
        if segments is None or segments.ending or offset + size > segments.size or not size:
            return None
        kinds, first, end = segments.kinds, offset >> _SEGMENT_SHIFT, offset + size
        if not (kinds.get(first, 0) and kinds.get((end - 1) >> _SEGMENT_SHIFT, 0)) or not self._serving():
            return None
        block, last = offset >> _BLOCK_SHIFT, (end + _BLOCK_MASK) >> _BLOCK_SHIFT
        run = segments.extents.find(block)
        if run is None or run[1] < last or run[2] < 0 or last - block > BLOCK_COUNT_MAX:
            return None
        data = self._read_local(run[2], run[3] + block - run[0], last - block)
        if data is None or not (offset | size) & _BLOCK_MASK:
            return data
        skip = offset & _BLOCK_MASK
        return memoryview(data)[skip : skip + size]

    def write_nowait(self, ino: int, offset: int, data: memoryview, done: WriteDone, request: int) -> bool:
        """True: taken, as WritePath.write_nowait. False: use `write`. request: of the journal."""
        state = self._states.get(ino)
        segments = state.segments if state is not None else None
        size = len(data)
        end = offset + size
        if state is None or segments is None or segments.ending or end > segments.size or not size:
            return False
        first, last = offset >> _SEGMENT_SHIFT, (end - 1) >> _SEGMENT_SHIFT
        kinds = segments.kinds
        if kinds.get(first, 0) != LEASE_WRITE or kinds.get(last, 0) != LEASE_WRITE or (offset | size) & _BLOCK_MASK:
            return False
        block, count = offset >> _BLOCK_SHIFT, size >> _BLOCK_SHIFT
        run = segments.extents.find(block)
        if run is None or run[1] < block + count or run[2] < 0 or count > BLOCK_COUNT_MAX or not self._serving():
            return False
        if segments.extents.is_shared(block, count):
            return False
        self._journal.begins_in(request, ino, first, last)
        epochs = {run[2]: file_io.epoch_of(self._bus, run[2])}
        write = SegmentWrite(state, segments, Use(first, last, True), epochs, done)
        self._touched(state, segments)
        self._bus_write(run[2], run[3] + block - run[0], data, write.landed)
        return True

    def _touched(self, state: FileState, segments: Segments) -> None:
        segments.mtime_ns = max(segments.mtime_ns, _time_ns())
        if not segments.times_dirty:
            segments.times_dirty = True
            self._timed[state] = None

    # -- I/O -------------------------------------------------------------------------------------

    async def read(self, state: FileState, offset: int, size: int) -> list[Data] | None:
        """min(size, file size - offset) bytes. None: see the class.

        Raises  as ReadPath.read. Cancel safe.
        """
        deadline = time.monotonic() + self._io_timeout_s
        size = min(size, _FILE_SIZE_MAX - offset)
        if size <= 0:
            return []  # of no file
        first, last = offset >> _BLOCK_SHIFT, (offset + size + _BLOCK_MASK) >> _BLOCK_SHIFT
        state.waiting += 1
        try:
            while (segments := await self._ready(state, offset, size, LEASE_READ, deadline)) is not None:
                wanted = min(size, segments.size - offset)
                if wanted <= 0:
                    return []
                count = min(last, (segments.size + _BLOCK_MASK) >> _BLOCK_SHIFT) - first
                pieces = segments.extents.pieces(first, count)
                assert pieces is not None
                try:
                    buffers = await self._read(state, segments, offset, wanted, pieces)
                except Unavailable as error:
                    await file_io.wait_again(error, deadline)
                else:
                    return file_io.clip(buffers, offset & _BLOCK_MASK, wanted)
            return None
        finally:
            state.waiting -= 1

    async def _read(self, state: FileState, segments: Segments, offset: int, size: int, pieces: list[Piece]) -> list[Data]:
        use = _use(segments, offset, offset + size, writes=False)
        try:
            return await file_io.read(self._bus, pieces)
        finally:
            _ended(state, segments, use)

    async def write(self, state: FileState, offset: int, data: memoryview) -> bool | None:
        """Whether it was written: False: it needs the lease on the inode. None: see the class.

        Raises  as WritePath.write. Cancel: as there.
        """
        end = offset + len(data)
        if (offset | len(data)) & _BLOCK_MASK or end > _FILE_SIZE_MAX:
            return False
        deadline = time.monotonic() + self._io_timeout_s
        first, count = offset >> _BLOCK_SHIFT, len(data) >> _BLOCK_SHIFT
        state.waiting += 1
        try:
            segments = await self._ready(state, offset, len(data), LEASE_WRITE, deadline)
            if segments is None:
                return None
            pieces = segments.extents.pieces(first, count) if end <= segments.size else None
            if pieces is None or any(slab < 0 for _, _, slab, _ in pieces) or segments.extents.is_shared(first, count):
                return False
            await self._write(state, segments, offset, data, pieces)
            return True
        finally:
            state.waiting -= 1

    async def _write(
        self, state: FileState, segments: Segments, offset: int, data: memoryview, pieces: list[Piece]
    ) -> None:
        use = _use(segments, offset, offset + len(data), writes=True)
        self._journal.begins_in(current_request.get(), state.ino, use.first, use.last)
        try:
            self._touched(state, segments)
            delivery = Delivery(self._bus, pieces, data)
            error = await delivery.wait()
            # Now, not when it was sent: a flush between the two would not have covered it (I8).
            state.dirtied(delivery.epochs)
            if error is not None:
                raise error
        finally:
            _ended(state, segments, use)

    # -- leases ----------------------------------------------------------------------------------

    async def _ready(self, state: FileState, offset: int, size: int, kind: int, deadline: float) -> Segments | None:
        """Segments and layout of the range, as far as the file goes, are there, and this node may serve; no await since.

        None: see the class. Raises TimedOut, LeaseLost, and as the call.
        """
        wanted = segments_of(offset, offset + size)
        first, last = offset >> _BLOCK_SHIFT, (offset + size + _BLOCK_MASK) >> _BLOCK_SHIFT
        while True:
            segments = state.segments
            if segments is None or segments.ending:
                return None
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimedOut(f"inode {state.ino}: no segment of it within {self._io_timeout_s:g} s")
            if not self._guard.serving():
                await self._guard.wait_serving(left_s)
                continue
            is_held = segments.holds(wanted, kind)
            count = last - first
            if is_held and segments.size >= 0:
                count = max(0, min(last, (segments.size + _BLOCK_MASK) >> _BLOCK_SHIFT) - first)
                if segments.extents.covers(first, count):
                    return segments
            if is_held:
                await self._ask_layout(state, segments, first, count)
            elif segments.is_asked(wanted, kind):
                with trio.move_on_after(left_s):
                    await state.wait_change()
            else:
                await self._ask(state, segments, wanted, kind)

    async def _ask_layout(self, state: FileState, segments: Segments, first: int, count: int) -> None:
        """By questions, which are answered also while what is held is being recalled."""
        async with state.mapping:
            if segments.size < 0:
                reply = await self._coordinator.call("getattr", {"ino": state.ino})
                segments.size = reply["attr"][SIZE]
                return
            if segments.extents.covers(first, count) or state.segments is not segments:
                return
            block, end = window_of(segments.extents.first_unknown(first, count))
            args = {"ino": state.ino, "kind": LEASE_OPEN, "block": block, "count": end - block}
            reply = await self._coordinator.call("acquire", args)
            if state.segments is segments and segments.kinds:  # else it may be out of date
                self._learn(state, segments, block, end - block, reply)

    def _learn(self, state: FileState, segments: Segments, block: int, count: int, reply: dict[str, Any]) -> None:
        self._leases.take_slabs(state, reply["extents"], reply)
        segments.extents.learn(block, count, reply["extents"], reply.get("shared") or ())

    async def _ask(self, state: FileState, segments: Segments, wanted: range, kind: int) -> None:
        """Segments, with their layout: also where that is known, for the slabs may have lost a copy since, and what others have
        written there is not on it (I5)."""
        blocks = 1 << (_SEGMENT_SHIFT - _BLOCK_SHIFT)
        args = {
            "ino": state.ino, "kind": kind, "first": wanted.start, "count": len(wanted),
            "block": wanted.start * blocks, "blocks": len(wanted) * blocks,
        }  # fmt: skip
        token = object()
        segments.asking[token] = (wanted, kind)
        try:
            reply = await self._coordinator.call("segments", args)
            # Until the end without an await: a recall that was sent behind this reply comes after it.
            if state.segments is segments:
                self._take(state, segments, args, reply)
        finally:
            del segments.asking[token]
            state.notify()

    def _take(self, state: FileState, segments: Segments, args: dict[str, Any], reply: dict[str, Any]) -> None:
        if reply.get("over"):
            segments.ending = True
            if not reply.get("member"):
                segments.kinds.clear()  # nobody will ask for them
            if not (segments.kinds or segments.uses):
                self.drop(state)
            return
        held = {segment: kind for segment, kind in reply["held"] if kind}
        if MEMBER not in held or segments.ending:
            return  # it is being asked for back
        del held[MEMBER]
        if not held:
            return
        self._learn(state, segments, args["block"], args["blocks"], reply)
        segments.size = reply["size"]
        segments.owed += bool(reply.get("owed"))
        segments.kinds |= {segment: max(kind, segments.kinds.get(segment, 0)) for segment, kind in held.items()}

    def drop(self, state: FileState) -> None:
        """Nothing is held any more."""
        segments, state.segments = state.segments, None
        if segments is not None:
            if segments.settled != segments.owed:
                self._inheritance.unsettled.add(state.ino)  # others may be at their flush yet
            state.notify()

    async def recall(self, state: FileState, segment: int, kind: int) -> dict[str, Any]:
        """Lower the lease on a segment to `kind`, or give all back (MEMBER). Returns the reply. Cancel: unanswered."""
        # Replies that came before this recall are applied first.
        await trio.lowlevel.checkpoint()
        await self._inheritance.wait_resent()
        while self._inheritance.is_begun(state.ino, None if segment == MEMBER else segment):
            await state.wait_change()
        segments = state.segments
        if segments is None:
            if segment == MEMBER:
                await self._settle(state)  # what the process before has written
            return {"kind": LEASE_NONE, "mtime_ns": None}
        if segment == MEMBER:
            segments.ending = segments.recalled = True
            kind = LEASE_NONE
        elif kind >= LEASE_READ:
            if segment in segments.kinds:
                segments.kinds[segment] = min(kind, segments.kinds[segment])
        else:
            segments.kinds.pop(segment, None)
        while segments.is_used(segment, by_writes_alone=kind >= LEASE_READ):
            await state.wait_change()
        if segment == MEMBER:
            await self._settle(state)
        kept = segments.kinds.get(segment, LEASE_NONE)
        if segment == MEMBER and state.segments is segments:
            self.drop(state)
        mtime_ns = segments.mtime_ns if segments.times_dirty else None
        return {"kind": kept, "mtime_ns": mtime_ns, "owes": bool(state.dirty_slabs) or state.flushing.locked()}

    # -- flushes ---------------------------------------------------------------------------------

    async def flush(self, state: FileState) -> None:
        """What others have written to segments that came here is on the media. Raises as the call. Cancel safe."""
        segments, unsettled = state.segments, self._inheritance.unsettled
        if state.ino not in unsettled and (segments is None or segments.settled == segments.owed):
            return
        async with state.settling:
            owed = 0 if segments is None else segments.owed
            if state.ino in unsettled or (segments is not None and segments.settled != owed):
                # BadRequest: of an earlier version, during an upgrade, with which no file is shared.
                with suppress(BadRequest):
                    await self._coordinator.call("segments_flush", {"ino": state.ino})
                unsettled.discard(state.ino)
                if segments is not None:
                    segments.settled = owed

    # -- times -----------------------------------------------------------------------------------

    async def report_times(self) -> None:
        """Tell the coordinator when files were written last that it does not know of yet."""
        states = list(self._timed)
        self._timed.clear()
        for state in states:
            segments = state.segments
            if segments is None or not segments.times_dirty:
                continue
            mtime_ns = segments.mtime_ns
            try:
                await self._coordinator.call("segments_written", {"ino": state.ino, "mtime_ns": mtime_ns})
            except BaseException:
                self._timed[state] = None
                raise
            if segments.mtime_ns == mtime_ns:
                segments.times_dirty = False


def _use(segments: Segments, offset: int, end: int, *, writes: bool) -> Use:
    span = segments_of(offset, end)
    use = Use(span.start, span.stop - 1, writes)
    segments.uses[use] = None
    return use


def _ended(state: FileState, segments: Segments, use: Use) -> None:
    del segments.uses[use]
    state.notify()
