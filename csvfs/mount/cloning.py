"""Cloning: copy_file_range(2) that shares blocks, instead of copying what is in them.

Place      mount floor; beside holes.py, above read_path.py and write_path.py.
What       Whole blocks of files whose ranges lie alike in their blocks are shared; what is left at both ends of such a range,
           and ranges that lie otherwise, are copied (the latter by the kernel, through its cache).
Leases     The write leases of both files: nobody else has a layout that calls these blocks unshared, also none that would
           become writable later. While the coordinator makes the clone no write to either file is under way here, no
           read of what the target had, and no question about a layout; what was known of both ranges is forgotten.
           Which node gets both first keeps the one while it waits for the other, in the order of the inodes.
Locks      `tail` of both files, the smaller inode first: a clone waits for the writes to both, and so would whoever else
           waits for all writes of one of them.
fsync      of the target speaks for what the source was written before (I8): the slabs of its new extents count as dirty.
"""

import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import trio

from csvfs.errors import BadRequest, CsvfsError, FileTooBig, LeaseLost, NotSupported, TimedOut
from csvfs.mount.file_state import LEASE_WRITE, SIZE, FileState
from csvfs.mount.leases import Leases
from csvfs.mount.quiet import nothing_under_way
from csvfs.mount.reports import Reports
from csvfs.mount.write_path import GAP_BLOCKS_MAX, WritePath
from csvfs.units import BLOCK_SIZE
from csvfs.volume import file_io
from csvfs.volume.extents import FILE_BLOCKS_MAX
from csvfs.volume.file_io import BlockBus, NotRead

PIN_S = 1.0  # below Options.recall_timeout_ms


class Cloning:
    def __init__(
        self,
        leases: Leases,
        bus: BlockBus,
        reports: Reports,
        writes: WritePath,
        getattr: Callable[[int], Awaitable[list]],
        give_up: Callable[[FileState], None],
        io_timeout_s: float,
    ) -> None:
        """give_up(state): give the lease back, soon; what is known of the inode may be wrong."""
        self._leases = leases
        self._bus = bus
        self._reports = reports
        self._writes = writes
        self._getattr = getattr
        self._give_up = give_up
        self._io_timeout_s = io_timeout_s

    async def copy_range(self, ino: int, offset: int, target: int, target_offset: int, length: int) -> int:
        """copy_file_range(2) within this volume; returns how many bytes were copied: up to the end of the source.

        Raises  NotSupported: the ranges do not lie alike in their blocks. BadRequest: they overlap in one file.
                FileTooBig, NotFound, NoSpace; Unavailable, TimedOut: a part of it may have been done. Cancel as these.
        """
        if min(offset, target_offset, length) < 0:
            raise BadRequest(f"inode {ino}: no range of {length} bytes at {offset}")
        if ino == target and abs(offset - target_offset) < length:
            raise BadRequest(f"inode {ino}: {length} bytes at {offset} and at {target_offset} overlap")
        if target_offset + length > FILE_BLOCKS_MAX * BLOCK_SIZE:
            end = target_offset + length
            raise FileTooBig(f"inode {target}: {end} B, a file may have {FILE_BLOCKS_MAX * BLOCK_SIZE} B")
        if (offset - target_offset) % BLOCK_SIZE:
            raise NotSupported(f"inode {ino}: bytes at {offset} cannot be shared with those at {target_offset}")
        source, into = self._leases.state(ino), self._leases.state(target)
        source.waiting += 1
        into.waiting += 1
        done = 0
        try:
            # Once: a clone within one file may make it longer than the range it began with.
            length = min(length, (await self._getattr(ino))[SIZE] - offset)
            is_end = False
            while done < length and not is_end:
                count, is_end = await self._some(
                    source, offset + done, into, target_offset + done, length - done
                )
                done += count
        except CsvfsError:
            if not done:
                raise
        finally:
            source.waiting -= 1
            into.waiting -= 1
        return done

    async def _some(
        self, source: FileState, offset: int, into: FileState, target_offset: int, length: int
    ) -> tuple[int, bool]:
        """The next bytes of the range: how many; whether the source ends behind them. It is not looked at again then:
        what is copied within one file may have made it longer, and what lies there would be copied, too."""
        wanted = min(length, BLOCK_SIZE - offset % BLOCK_SIZE)
        length = min(length, (await self._getattr(source.ino))[SIZE] - offset)
        if length <= 0:
            return 0, True
        if not offset % BLOCK_SIZE and length >= BLOCK_SIZE:
            block, target_block = offset // BLOCK_SIZE, target_offset // BLOCK_SIZE
            count = await self._share(source, block, into, target_block, length // BLOCK_SIZE)
            if count:
                return count * BLOCK_SIZE, False
        size = min(length, BLOCK_SIZE - offset % BLOCK_SIZE)
        data = await self._read(source, offset, size)
        if data:
            await self._writes.write(into.ino, target_offset, memoryview(data), 0)
        return len(data), len(data) < wanted

    async def _read(self, source: FileState, offset: int, size: int) -> bytes:
        """Bytes of one block, as many as there are. Not by ReadPath, which takes it for the kernel's, with a page locked."""
        block = offset // BLOCK_SIZE
        deadline = time.monotonic() + self._io_timeout_s
        while True:
            await self._writable(source, deadline)
            pieces = source.extents.pieces(block, 1)
            if pieces is None:
                await self._leases.acquire(source, LEASE_WRITE, block, 1)
                continue
            not_read: NotRead | None = None
            source.writers += 1
            try:
                size = max(0, min(size, source.size - offset))
                content = await file_io.read_kept(self._bus, pieces)
            except NotRead as error:
                not_read = error
            finally:
                source.writers -= 1
                source.notify()
            if not_read is not None:
                await file_io.wait_again(not_read, deadline)
                continue
            return bytes(content[offset % BLOCK_SIZE :][:size])

    async def _writable(self, state: FileState, deadline: float) -> None:
        """Under the write lease, parked by nothing; no await between that and the return."""
        while True:
            await self._writes.wait_writable(state, False, deadline)
            if state.lease == LEASE_WRITE:
                return
            await self._leases.acquire(state, LEASE_WRITE, 0, 0)

    # -- whole blocks ----------------------------------------------------------------------------

    async def _share(self, source: FileState, block: int, into: FileState, target_block: int, count: int) -> int:
        """Have the target share blocks of the source; returns how many. 0: the source became shorter."""
        states = {state.ino: state for state in (source, into)}
        deadline = time.monotonic() + self._io_timeout_s
        async with AsyncExitStack() as locks:
            for ino in sorted(states):
                await locks.enter_async_context(states[ino].tail)
            while time.monotonic() < deadline:
                try:
                    async with AsyncExitStack() as pins:
                        if not await self._pin([states[ino] for ino in sorted(states)], pins, deadline):
                            continue
                        missing = self._missing(into, target_block + count)
                        if missing is not None:
                            await self._leases.acquire(into, LEASE_WRITE, *missing)
                        if missing is None or self._missing(into, target_block + count) is None:
                            return await self._clone(source, block, into, target_block, count)
                except LeaseLost:
                    continue
                except NotRead as error:
                    await file_io.wait_again(error, deadline)  # recalls do not wait for that
        raise TimedOut(f"inode {source.ino}: no clone of it could be made within {self._io_timeout_s:g} s")

    async def _pin(self, states: list[FileState], pins: AsyncExitStack, deadline: float) -> bool:
        """Hold the write leases of all of them, the first while the next is waited for: two nodes that clone the same
        files both ways would go on taking them from each other. Recalls of those that are held wait meanwhile, so that
        must be short. False: try again."""
        with trio.move_on_after(PIN_S) as scope:
            scope.deadline += deadline - time.monotonic()  # of the first one, which keeps nobody waiting
            for state in states:
                await self._writable(state, deadline)
                state.writers += 1  # from here on a recall waits
                pins.callback(_unpin, state)
                scope.deadline = trio.current_time() + PIN_S
        return not scope.cancelled_caught and all(state.lease == LEASE_WRITE for state in states)

    def _missing(self, into: FileState, end: int) -> tuple[int, int] | None:
        """As of a write: the layout around the end must be known, to zero what lies behind it."""
        first = into.size // BLOCK_SIZE
        count = max(1, min(end - first, GAP_BLOCKS_MAX))
        return None if end <= first or into.extents.covers(first, count) else (first, count)

    async def _clone(self, source: FileState, block: int, into: FileState, target_block: int, count: int) -> int:
        count = min(count, source.size // BLOCK_SIZE - block)
        if count <= 0:
            return 0
        if (target_block + count) * BLOCK_SIZE > into.size:
            losses = into.losses
            await self._writes.zero_tail(into)
            await self._writes.clear_gap(into, target_block)
            if into.losses != losses:  # what lies behind the end was not known all the time
                raise LeaseLost(f"the write lease of inode {into.ino} was lost; the clone is tried again")
        ranges = {source.ino: [(block, block + count)]}
        ranges.setdefault(into.ino, []).append((target_block, target_block + count))
        states = {state.ino: state for state in (source, into)}
        async with AsyncExitStack() as quiet:
            for ino in sorted(states):
                await quiet.enter_async_context(nothing_under_way(states[ino], *ranges[ino]))
            return await self._ask(source, block, into, target_block, count)

    async def _ask(self, source: FileState, block: int, into: FileState, target_block: int, count: int) -> int:
        args = {
            "ino": source.ino, "block": block, "count": count, "target": into.ino, "target_block": target_block,
        }  # fmt: skip
        if source.lease < LEASE_WRITE:
            raise LeaseLost(f"the write lease of inode {source.ino} was lost before it was cloned")
        losses = source.losses
        try:
            reply = await self._reports.ask(into, "clone", args)
        except LeaseLost:
            raise
        except BaseException as error:
            if source.losses != losses:
                raise LeaseLost(f"the write lease of inode {source.ino} was lost while it was cloned") from None
            if not isinstance(error, CsvfsError) or error.retryable:
                self._give_up(source)  # it may be done or not
                self._give_up(into)
            raise
        done: int = reply["count"]
        if into.lease == LEASE_WRITE:
            self._leases.take_layout(into, target_block, done, reply)
            into.tail_zero = -1
            into.committed = max(into.committed, (target_block + done) * BLOCK_SIZE)
            into.size = max(into.size, (target_block + done) * BLOCK_SIZE)
            now = {extent[2]: file_io.epoch_of(self._bus, extent[2]) for extent in reply["extents"]}
            into.dirtied({slab: source.dirty_slabs.get(slab, epoch) for slab, epoch in now.items()})
        into.failure = into.failure or source.failure
        self._reports.set_time(into, time.time_ns())
        self._reports.changed(into, reply)
        return done


def _unpin(state: FileState) -> None:
    state.writers -= 1
    state.notify()
