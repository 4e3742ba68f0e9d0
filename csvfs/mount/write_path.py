"""Writes: at once into allocated blocks under a write lease, else after asking for what is missing.

Place      mount floor. `write_nowait` is the hot path: no await, no task.

Invariants
  I2  Done means on all members, and if the file grew, its size committed.
  I4  Only under the write lease. Writes of whole allocated blocks go to the bus as they come and land in that
      order. All others claim their blocks first: nothing else is under way there between their read and their
      write.
  W1  Bytes beyond the end in the last block are garbage, unless `tail_zero` says otherwise: they are zeroed
      on the drives before a size beyond them is committed.
  W2  Blocks beyond the end may be allocated, and up to `allocated_upto` hold old bytes: who leaves a gap
  trims them.
  W3  `size` grows after both; so a reader here never sees the new end with old bytes.
  W4  Write-back of mmapped pages never grows a file: what the kernel still holds beyond the end was cut off.
  W5  Pages dirtied by mmap under a lease that was then lost are not written back.
  W6  Blocks that other files have, too, are never written: they are replaced first (unsharing.py).
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import trio

from csvfs.errors import CsvfsError, InputOutputError, LeaseLost, TimedOut
from csvfs.mount import fuse_abi
from csvfs.mount.file_state import LEASE_WRITE, WHOLE_FILE, Claim, FileState, InFlight
from csvfs.mount.guard import Guard
from csvfs.mount.leases import Leases
from csvfs.mount.recall import KernelNotifier
from csvfs.mount.reports import Reports
from csvfs.mount.request_journal import RequestJournal
from csvfs.mount.unsharing import Unsharing, around
from csvfs.units import BLOCK_SIZE
from csvfs.volume import file_io
from csvfs.volume.extents import Piece
from csvfs.volume.file_io import BlockBus, Delivery, NotRead, WriteDone
from csvfs.wire.block_messages import BLOCK_COUNT_MAX

FUSE_WRITE_CACHE = fuse_abi.WRITE_CACHE
# Of the channel, with the kernel's write flags: the file was opened with O_APPEND, and `offset` is only where the kernel
# believes its end to be.
WRITE_APPEND = 1 << 31

GAP_BLOCKS_MAX = 65_536  # space beyond the end is given ahead: it lies right behind the end, less than this

_BLOCK_SHIFT = BLOCK_SIZE.bit_length() - 1
_BLOCK_MASK = BLOCK_SIZE - 1

_time_ns = time.time_ns


@dataclass(slots=True)
class _Request:
    """One write that has to wait. `deadline`: of time.monotonic."""

    state: FileState
    token: object
    offset: int
    data: memoryview
    cached: bool
    append: bool
    deadline: float
    direct: bool = False

    @property
    def end(self) -> int:
        return self.offset + len(self.data)

    def within(self) -> memoryview:
        """W4: what of it lies within the file."""
        return self.data[: max(0, self.state.size - self.offset)]


class WritePath:
    def __init__(
        self,
        leases: Leases,
        bus: BlockBus,
        reports: Reports,
        notifier: KernelNotifier,
        guard: Guard,
        nursery: trio.Nursery,
        io_timeout_s: float,
        journal: RequestJournal,
        give_up: Callable[[FileState], None],
    ) -> None:
        """give_up(state): give the lease back, soon; what is known of the inode may be wrong."""
        self._leases = leases
        self._journal = journal
        self._states = leases.states
        self._bus = bus
        self._bus_write = bus.write
        self._reports = reports
        self._set_time = reports.set_time
        self._notifier = notifier
        self._guard = guard
        self._serving = guard.serving
        self._nursery = nursery
        self._io_timeout_s = io_timeout_s
        self._unsharing = Unsharing(leases, bus, reports, give_up)

    # -- hot -------------------------------------------------------------------------------------

    def write_nowait(
        self, ino: int, offset: int, data: memoryview, write_flags: int, done: WriteDone
    ) -> bool:
        """True: taken; `done(error or None)` follows exactly once, `data` is kept until then. False: use
        `write`."""
        state = self._states.get(ino)
        if state is None or (write_flags and not self._takes(state, write_flags)):
            return False
        if not (state.writable or (write_flags and state.lease == LEASE_WRITE and not state.truncating)):
            return False
        size = len(data)
        end = offset + size
        if (offset | size) & _BLOCK_MASK or end > state.size or not size or not self._serving():
            return False
        first = offset >> _BLOCK_SHIFT
        last = end >> _BLOCK_SHIFT
        if state.claims and state.is_claimed(first, last):
            return False
        if state.shared and state.extents.is_shared(first, last - first):
            return False
        index = bisect_right(state.starts, first) - 1
        if index < 0:
            return False
        start, run_end, slab, slab_block = state.runs[index]
        if last > run_end or slab < 0 or last - first > BLOCK_COUNT_MAX:
            return self._write_pieces(state, first, last, data, write_flags, done)
        write = InFlight(state, first, last, {slab: file_io.epoch_of(self._bus, slab)}, done)
        state.writes[write] = None
        self._touched(state, offset, size, write_flags)
        self._bus_write(slab, slab_block + first - start, data, write.landed)
        return True

    def _takes(self, state: FileState, write_flags: int) -> bool:
        """Whether a write with flags may go the fast way: write-back may while others are parked."""
        if write_flags & FUSE_WRITE_CACHE:
            return not state.lost
        return not write_flags & WRITE_APPEND and state.writable

    def _write_pieces(
        self, state: FileState, first: int, last: int, data: memoryview, write_flags: int, done: WriteDone
    ) -> bool:
        """As write_nowait, of several runs, slabs or messages."""
        pieces = state.extents.pieces(first, last - first)
        if pieces is None or any(slab < 0 for _, _, slab, _ in pieces):
            return False
        write = InFlight(state, first, last, file_io.epochs(self._bus, pieces), done)
        write.remaining = 1  # file_io counts the pieces
        state.writes[write] = None
        self._touched(state, first << _BLOCK_SHIFT, len(data), write_flags)
        file_io.write(self._bus, pieces, data, write.landed)
        return True

    def touch(self, state: FileState, mtime_ns: int) -> bool:
        """Set the time of the last write, as one that writes nothing does. False: not without waiting."""
        if not state.writable or not self._serving():
            return False
        self._reports.set_time(state, mtime_ns)
        return True

    def _touched(self, state: FileState, offset: int, size: int, write_flags: int) -> None:
        self._set_time(state, _time_ns())
        if state.taint is not None and not write_flags & FUSE_WRITE_CACHE:
            state.taint.append((offset, size))

    # -- with waiting ----------------------------------------------------------------------------

    async def write(self, ino: int, offset: int, data: memoryview, write_flags: int, *, direct: bool = False) -> None:
        """Write any bytes anywhere: takes the lease, allocates, reads what is kept of partial blocks.

        Raises  NotFound, NoSpace; Unavailable, TimedOut after io_timeout_s; DriveFailed, Corrupt, Fenced. The
                bytes written to may then be old, new or a mix of both.
        SegmentedError: as Leases.acquire.
        Cancel  as for errors; `data` must stay as it is even then, some of it may still be on its way.
        """
        if not data:
            return
        deadline = time.monotonic() + self._io_timeout_s
        cached = bool(write_flags & FUSE_WRITE_CACHE)
        append = bool(write_flags & WRITE_APPEND) and not cached
        state = self._leases.state(ino)
        if cached and state.lost:
            # Dirtied under a lease that was lost: others may have written there since. msync and fsync report it.
            raise CsvfsError(
                f"inode {ino}: the lease of pages written through mmap was lost before they were"
            )
        token = object()
        state.waiting += 1
        try:
            await self._write_until_done(_Request(state, token, offset, data, cached, append, deadline, direct))
        finally:
            state.waiting -= 1
            state.stuck.pop(token, None)

    async def _write_until_done(self, request: "_Request") -> None:
        state = request.state
        while True:
            await self._prepare(request)
            if request.append or (not request.cached and request.end > state.size):
                break
            if await self.counted(state, self._overwrite(state, request.offset, request.within()), request.deadline):
                return
        # The lock comes before lease and count: who waits for it keeps neither a recall nor a truncation
        # waiting.
        async with state.tail:
            while True:
                await self._prepare(request)
                at = self._journal.place(state.size) if request.append else request.offset
                if at + len(request.data) <= state.size:  # another writer was here first
                    work = self._overwrite(state, at, request.data)
                else:
                    work = self._extend(state, at, request.data, request.offset)
                is_moved = request.append and at + len(request.data) <= state.size and at != request.offset
                if await self.counted(state, work, request.deadline, retries=not request.append):
                    if is_moved:
                        self._forget_pages(state)
                    return
                # Meanwhile others may append. Nothing of ours is there, unless the process before has begun with it.
                if request.append and not self._journal.take_place_back():
                    raise LeaseLost(f"inode {state.ino}: what an append has to keep cannot be read, and part of it may be there")

    async def _prepare(self, request: "_Request") -> None:
        """Until lease and layout are there and nothing parks the write; no await between that and the
        return."""
        state = request.state
        while True:
            if state.lease < LEASE_WRITE:
                state.note_stuck(request.token, request.offset, request.end)
            await self.wait_writable(state, request.cached, request.deadline)
            at = state.size if request.append and state.lease == LEASE_WRITE else request.offset
            missing = self._missing(state, at, len(request.data))
            if missing is None:
                state.stuck.pop(request.token, None)
                return
            await self._leases.acquire(state, LEASE_WRITE, *missing, direct=request.direct)

    async def counted(
        self, state: FileState, work: Coroutine[Any, Any, None], deadline: float, *, retries: bool = True
    ) -> bool:
        """Do it while recalls and truncations wait for it. False: the lease was lost, or what it has to keep could not be
        read; try again. Raises InputOutputError when the latter lasts until the deadline."""
        not_read: NotRead | None = None
        state.writers += 1
        try:
            await work
        except LeaseLost:
            if not retries:
                raise  # part of it may be there: at the new end it would be there twice
            return False
        except NotRead as error:
            not_read = error
        finally:
            state.writers -= 1
            state.notify()
        if not_read is not None:
            await file_io.wait_again(not_read, deadline)
        return not_read is None

    async def wait_writable(self, state: FileState, cached: bool, deadline: float) -> None:
        """Until nothing parks this write and this node may serve; then no await until the lease is looked
        at."""
        while True:
            holds = (
                state.recall is not None if state.lease < LEASE_WRITE else state.write_holds and not cached
            )
            parked = state.truncating or holds
            if not parked and self._guard.serving():
                return
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimedOut(f"inode {state.ino} could not be written within {self._io_timeout_s:g} s")
            if parked:
                with trio.move_on_after(left_s):
                    await state.wait_change()
            else:
                await self._guard.wait_serving(left_s)

    def _missing(self, state: FileState, offset: int, size: int) -> tuple[int, int] | None:
        """The blocks whose layout must be asked for first, (block, count); None: lease and layout are
        there."""
        first = offset >> _BLOCK_SHIFT
        count = ((offset + size + _BLOCK_MASK) >> _BLOCK_SHIFT) - first
        if state.lease < LEASE_WRITE or not state.extents.covers(first, count):
            return first, count
        if offset + size > state.size:
            tail = state.size >> _BLOCK_SHIFT
            gap = min(first - tail, GAP_BLOCKS_MAX)
            if gap > 0 and not state.extents.covers(tail, gap):
                return tail, gap
        return None

    def _forget_pages(self, state: FileState) -> None:
        """Of an append that went elsewhere than the kernel believed: its pages hold the data at the wrong
        place."""
        self._leases.mark_recalled(state.ino)
        self._notifier.invalidate_attr(state.ino)
        # Behind our answer, which unlocks these pages.
        self._nursery.start_soon(self._notifier.invalidate_pages, state.ino, *WHOLE_FILE)

    async def _overwrite(self, state: FileState, offset: int, data: memoryview) -> None:
        """Within the file."""
        if not data:
            return
        first, last = offset >> _BLOCK_SHIFT, (offset + len(data) + _BLOCK_MASK) >> _BLOCK_SHIFT
        claim = await self._claim(state, first, last)
        try:
            blocks = await self._whole_blocks(state, offset, data)
            # Write-back counts as filling its pages, too: a pass may have left them out while it was stuck.
            self._touched(state, offset, len(data), 0)
            if await self._replaced(state, first, last, blocks):
                return
            await self._reports.allocate(state, first, last, 0)
            delivery = self._deliver(state, first, last, blocks)
            error = await delivery.wait()
            state.dirtied(delivery.epochs)
            if error is not None:
                raise error
        finally:
            state.unclaim(claim)

    async def _extend(self, state: FileState, offset: int, data: memoryview, believed: int) -> None:
        """Beyond the end of the file; `state.tail` is held, so the end stays where it is.

        believed: where the kernel believes the data to go.
        """
        end = offset + len(data)
        first, last = offset >> _BLOCK_SHIFT, (end + _BLOCK_MASK) >> _BLOCK_SHIFT
        await self.zero_tail(state)
        await self.clear_gap(state, first)
        claim = await self._claim(state, first, last)
        try:
            blocks = await self._whole_blocks(state, offset, data)
            self._touched(state, offset, len(data), 0)
            await self._replaced(state, first, last, blocks)
            await self._reports.allocate(state, first, last, end)
            state.allocated_upto = max(state.allocated_upto, last)  # until the size says so, these are W2
            delivery = self._deliver(state, first, last, blocks)
            failure: CsvfsError | None = None
            try:
                if state.committed < end:
                    await self._reports.commit(state, end)
            except CsvfsError as error:
                failure = error
            failure = await delivery.wait() or failure
            state.dirtied(delivery.epochs)
            # W3. When one of both failed, the coordinator's size counts: it only grows.
            state.size = max(state.size, end if failure is None else state.committed)
            if failure is not None:
                raise failure
            state.tail_zero = end
        finally:
            state.unclaim(claim)
        if offset != believed:
            self._forget_pages(state)

    async def _whole_blocks(self, state: FileState, offset: int, data: memoryview) -> memoryview:
        """`data` grown to whole blocks: with what the file holds around it, zeros beyond its end."""
        end = offset + len(data)
        head = offset & _BLOCK_MASK
        tail = -end & _BLOCK_MASK
        if not head and not tail:
            return data
        first, last = offset >> _BLOCK_SHIFT, (end + _BLOCK_MASK) >> _BLOCK_SHIFT
        blocks = bytearray((last - first) << _BLOCK_SHIFT)
        if head:
            blocks[:BLOCK_SIZE] = await self._valid_block(state, first)
        if tail and end < state.size and (last - 1 != first or not head):
            blocks[-BLOCK_SIZE:] = await self._valid_block(state, last - 1)
        blocks[head : head + len(data)] = data
        return memoryview(blocks)

    async def _valid_block(self, state: FileState, block: int) -> bytes | bytearray:
        """One block as the file has it: zeros where it has nothing, and beyond its end."""
        valid = min(BLOCK_SIZE, state.size - (block << _BLOCK_SHIFT))
        if valid <= 0:
            return bytes(BLOCK_SIZE)
        content = await file_io.read_kept(self._bus, _pieces(state, block, 1))
        content[valid:] = bytes(BLOCK_SIZE - valid)
        return content

    async def _claim(self, state: FileState, first: int, last: int) -> Claim:
        """As FileState.claim; of shared blocks with all that are replaced together."""
        return await state.claim(*(around(first, last) if state.extents.is_shared(first, last - first) else (first, last)))

    async def _replaced(self, state: FileState, first: int, last: int, blocks: memoryview) -> bool:
        """W6: none of these blocks is shared any more. True: and they have the content `blocks`, on the media."""
        # Not while it was claimed did any become so: a clone waits for all writes.
        is_shared = state.extents.is_shared(first, last - first)
        return is_shared and await self._unsharing.replace(state, first, last, blocks)

    def _deliver(self, state: FileState, first: int, last: int, blocks: memoryview) -> Delivery:
        assert not state.extents.is_shared(first, last - first), "W6"
        return Delivery(self._bus, _pieces(state, first, last - first), blocks)

    async def zero(self, state: FileState, offset: int, end: int) -> None:
        """Make bytes `offset..end` of one block zeros, as far as they lie within the file and in no hole.

        Raises, Cancel   as write.
        """
        deadline = time.monotonic() + self._io_timeout_s
        zeros = memoryview(bytes(end - offset))
        request = _Request(state, object(), offset, zeros, cached=False, append=False, deadline=deadline)
        try:
            while True:
                await self._prepare(request)
                if not state.extents.allocated(offset >> _BLOCK_SHIFT, 1):
                    return
                if await self.counted(state, self._overwrite(state, offset, request.within()), deadline):
                    return
        finally:
            state.stuck.pop(request.token, None)

    # -- the end of the file ---------------------------------------------------------------------

    async def zero_tail(self, state: FileState) -> None:
        """W1: make the rest of the last block zeros, on all members. Raises NotRead: what it has to keep cannot be read."""
        size = state.size
        if not size & _BLOCK_MASK or state.tail_zero == size:
            return
        block = size >> _BLOCK_SHIFT
        if state.extents.allocated(block, 1):
            claim = await self._claim(state, block, block + 1)
            try:
                content = memoryview(await self._valid_block(state, block))
                if not await self._replaced(state, block, block + 1, content):
                    delivery = self._deliver(state, block, block + 1, content)
                    error = await delivery.wait()
                    state.dirtied(delivery.epochs)
                    if error is not None:
                        raise error
            finally:
                state.unclaim(claim)
        state.tail_zero = size

    async def clear_gap(self, state: FileState, first: int) -> None:
        """W2: blocks between the end of the file and block `first` must read as zeros."""
        end = (state.size + _BLOCK_MASK) >> _BLOCK_SHIFT
        last = min(first, state.allocated_upto)
        pieces = state.extents.allocated(end, last - end) if end < last else []
        if state.extents.is_shared(end, last - end):
            # None is behind the end of a file, as its coordinator knows it: here it is not known what that is.
            raise InputOutputError(f"inode {state.ino}: blocks behind its end are shared; its size is asked for anew")
        if not pieces:
            return
        losses = state.losses
        try:
            await self._bus.trim([(slab, block, count) for _, count, slab, block in pieces])
        except CsvfsError as error:
            if not error.retryable:
                raise
            # A drive server that has just started, or one that has died. A write knows how to wait for both.
            await self._write_zeros(state, pieces, losses)

    async def _write_zeros(self, state: FileState, pieces: list[Piece], losses: int) -> None:
        """losses: those of the inode when the pieces were its own."""
        for block, count, slab, slab_block in pieces:
            for at in range(0, count, BLOCK_COUNT_MAX):
                if state.losses != losses:  # these blocks may be another file's by now
                    raise LeaseLost(f"the write lease of inode {state.ino} was lost while a gap was cleared") from None
                size = min(BLOCK_COUNT_MAX, count - at)
                zeros = memoryview(file_io.ZEROS)[: size * BLOCK_SIZE]
                delivery = Delivery(self._bus, [(block + at, size, slab, slab_block + at)], zeros)
                error = await delivery.wait()
                state.dirtied(delivery.epochs)
                if error is not None:
                    raise error


def _pieces(state: FileState, block: int, count: int) -> list[Piece]:
    """Of the layout that was there when the write began; gone only where all leases were lost meanwhile."""
    pieces = state.extents.pieces(block, count)
    if pieces is None:
        raise LeaseLost(f"the write lease of inode {state.ino} was lost; the write is tried again")
    return pieces
