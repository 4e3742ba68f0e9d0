"""Reads: at once where lease, layout and a local copy are at hand, else after asking for what is missing.

Place      mount floor. `read_nowait` is the hot path: no await, no task, attributes looked up once.
Invariant  A byte is returned only under a lease of READ or more (M4: WRITE, where the file is open for writing),
           from the layout learned under it, below the size that this lease vouches for (I5); holes are zeros.
Ends       The kernel may believe a file to be longer than it is, until a READ comes back short. An empty answer has it believe
           that the file ends where that READ began, and drop what READs asked for before say of the end: so the READs before
           it in the file that are under way are answered first (linux/fs/fuse, fuse_read_update_size).
"""

import time
from bisect import bisect_right

import trio

from csvfs.errors import Fenced, TimedOut, Unavailable
from csvfs.mount.access_times import AccessTimes
from csvfs.mount.file_state import FileState
from csvfs.mount.guard import Guard
from csvfs.mount.leases import Leases
from csvfs.units import BLOCK_SIZE
from csvfs.volume import file_io
from csvfs.volume.extents import FILE_BLOCKS_MAX, Piece
from csvfs.volume.file_io import ZEROS, BlockBus, Data
from csvfs.wire.block_messages import BLOCK_COUNT_MAX

_BLOCK_SHIFT = BLOCK_SIZE.bit_length() - 1
_BLOCK_MASK = BLOCK_SIZE - 1


class ReadPath:
    def __init__(
        self, leases: Leases, bus: BlockBus, guard: Guard, io_timeout_s: float, access: AccessTimes
    ) -> None:
        self._leases = leases
        self._states = leases.states
        self._bus = bus
        self._read_local = bus.read_local
        self._accessed = access.accessed
        self._guard = guard
        self._serving = guard.serving
        self._io_timeout_s = io_timeout_s

    def read_nowait(self, ino: int, offset: int, size: int) -> Data | list[Data] | None:
        """min(size, file size - offset) bytes, as one buffer or several; None: use `read`."""
        state = self._states.get(ino)
        if state is None or not state.readable or not self._serving():
            return None
        if not state.atime_seen:
            self._accessed(state)
        if offset + size > state.size:
            size = state.size - offset
            if size <= 0:
                return None  # "Ends"
        end = offset + size
        if state.buffered and state.is_buffered(offset, end):
            return None
        first = offset >> _BLOCK_SHIFT
        last = (end + _BLOCK_MASK) >> _BLOCK_SHIFT
        index = bisect_right(state.starts, first) - 1
        if index < 0:
            return None
        start, run_end, slab, slab_block = state.runs[index]
        count = last - first
        data: Data | None
        if last > run_end or slab < 0 or not 0 < count <= BLOCK_COUNT_MAX:
            return self._read_pieces(state, offset, size)
        data = self._read_local(slab, slab_block + first - start, count)
        if data is None:
            return None
        if state.taint is not None:
            state.taint.append((offset, size))
        if (offset | size) & _BLOCK_MASK:
            skip = offset & _BLOCK_MASK
            return data[skip : skip + size]
        return data

    def _read_pieces(self, state: FileState, offset: int, size: int) -> list[Data] | None:
        """As read_nowait, of more than one run, or of holes."""
        first = offset >> _BLOCK_SHIFT
        pieces = state.extents.pieces(first, ((offset + size + _BLOCK_MASK) >> _BLOCK_SHIFT) - first)
        buffers = None if pieces is None else file_io.read_local(self._bus, pieces)
        if buffers is None:
            return None
        if state.taint is not None:
            state.taint.append((offset, size))
        return file_io.clip(buffers, offset & _BLOCK_MASK, size)

    async def read(self, ino: int, offset: int, size: int, *, direct: bool = False) -> list[Data]:
        """As read_nowait, waiting for lease, layout and drives.

        The caller answers the kernel without another await: a recall waits for reads under way to be
        answered.
        Raises  NotFound; Unavailable, TimedOut, InputOutputError after io_timeout_s; Corrupt: no copy verified;
                Lost. SegmentedError: as Leases.acquire. Cancel safe.
        """
        deadline = time.monotonic() + self._io_timeout_s
        state = self._leases.state(ino)
        token = object()
        ahead: set[object] | None = None  # reads that an empty answer waits for
        is_answered = True  # else the kernel keeps these pages locked, until the next process answers
        state.waiting += 1
        state.pages_read[token] = (offset, offset + size)
        try:
            while True:
                if state.lease < state.lease_to_read:
                    # The kernel keeps these pages locked until our answer: no recall may wait for them.
                    state.note_stuck(token, offset, offset + size)
                await self._wait_readable(state, offset, offset + size, deadline)
                leased = state.lease >= state.lease_to_read
                wanted = min(size, state.size - offset) if leased else size
                if wanted <= 0:
                    if ahead is None:
                        await trio.lowlevel.checkpoint()  # those asked for together with us have begun then
                        ahead = {other for other, (start, _) in state.pages_read.items() if start < offset}
                    elif ahead.isdisjoint(state.pages_read):
                        return []
                    else:
                        state.note_stuck(token, offset, offset + size)
                        await self._wait_for_others(state, deadline)
                    continue
                first = offset >> _BLOCK_SHIFT
                count = ((offset + wanted + _BLOCK_MASK) >> _BLOCK_SHIFT) - first
                pieces = state.extents.pieces(first, count) if leased else None
                if pieces is not None:
                    state.stuck.pop(token, None)
                    try:
                        return await self._read_leased(state, offset, wanted, pieces)
                    except Unavailable as error:
                        await file_io.wait_again(error, deadline)  # a recall need not wait for us meanwhile
                        continue
                if first + count > FILE_BLOCKS_MAX:
                    first = count = 0  # of no file; the lease will say where this one ends
                await self._leases.acquire(state, state.lease_to_read, first, count, direct=direct)
        except Fenced:
            is_answered = False
            raise
        finally:
            state.waiting -= 1
            if is_answered:
                del state.pages_read[token]
                if state.pages_read:
                    state.notify()  # who waits for us to be answered: the caller does that before they have a turn
            state.stuck.pop(token, None)

    async def _wait_for_others(self, state: FileState, deadline: float) -> None:
        """Until something has changed. Raises TimedOut."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimedOut(f"inode {state.ino} could not be read within {self._io_timeout_s:g} s")
        with trio.move_on_after(left_s):
            await state.wait_change()

    async def _read_leased(self, state: FileState, offset: int, size: int, pieces: list[Piece]) -> list[Data]:
        if not state.atime_seen:
            self._accessed(state)
        token = object()
        state.reads[token] = None
        try:
            buffers = await file_io.read(self._bus, pieces)
        finally:
            del state.reads[token]
            state.notify()
        if state.taint is not None:
            state.taint.append((offset, size))
        return file_io.clip(buffers, offset & _BLOCK_MASK, size)

    async def _wait_readable(self, state: FileState, offset: int, end: int, deadline: float) -> None:
        """Until nothing parks this read and this node may serve; then no await until the lease is looked at."""
        while (parked := self._is_parked(state, offset, end)) or not self._guard.serving():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimedOut(f"inode {state.ino} could not be read within {self._io_timeout_s:g} s")
            if parked:
                with trio.move_on_after(left_s):
                    await state.wait_change()
            else:
                await self._guard.wait_serving(left_s)

    def _is_parked(self, state: FileState, offset: int, end: int) -> bool:
        # Without the lease: whoever gets it next comes after the recall under way.
        return (
            bool(state.read_holds)
            or (state.recall is not None and state.lease < state.lease_to_read)
            or state.is_buffered(offset, end)
        )


assert len(ZEROS) == BLOCK_COUNT_MAX * BLOCK_SIZE  # a piece that is a hole is one slice of it
