"""Holes: which parts of a file have space, by fallocate(2) and lseek(2).

Place      mount floor; beside write_path.py and truncation.py.
fallocate  Space is asked for, or given back, a window at a time: between two of them the lease may move.
           *Zeros*: of partial blocks they are written. Whole ones are given back, which makes a hole of them,
           and for ZERO_RANGE they get fresh space, which reads as zeros.
Giving     While the coordinator gives blocks back no write is under way here, no read of these blocks, and no
back       question about the layout: they are trimmed and given to other files as soon as the change is safe,
           so nothing that was learned before it may be used behind it.
seek       The coordinator knows all space that a file has. What was granted and never written counts as data.
"""

import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from csvfs.errors import BadRequest, CsvfsError, FileTooBig, LeaseLost, NoSpace, NotSupported
from csvfs.mount.file_state import BLOCKS, LEASE_WRITE, SIZE, FileState
from csvfs.mount.leases import Coordinator, Leases
from csvfs.mount.quiet import nothing_under_way
from csvfs.mount.reports import Reports
from csvfs.mount.write_path import GAP_BLOCKS_MAX, WritePath
from csvfs.units import BLOCK_SIZE, GIB
from csvfs.volume.extents import FILE_BLOCKS_MAX

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16  # <linux/falloc.h>
WINDOW_BLOCKS = GIB // BLOCK_SIZE  # of one call for space: may have to make sixteen slabs
BEYOND_BLOCKS_MAX = GAP_BLOCKS_MAX // 2  # behind the end of a file: 128 MiB
SECTORS_PER_BLOCK = BLOCK_SIZE // 512


class Holes:
    def __init__(
        self,
        leases: Leases,
        coordinator: Coordinator,
        reports: Reports,
        writes: WritePath,
        getattr: Callable[[int], Awaitable[list]],
        give_up: Callable[[FileState], None],
        io_timeout_s: float,
    ) -> None:
        """give_up(state): give the lease back, soon; what is known of the inode may be wrong."""
        self._leases = leases
        self._coordinator = coordinator
        self._reports = reports
        self._writes = writes
        self._getattr = getattr
        self._give_up = give_up
        self._io_timeout_s = io_timeout_s

    async def fallocate(self, ino: int, offset: int, length: int, mode: int) -> None:
        """fallocate(2), mode 0, KEEP_SIZE, ZERO_RANGE with and without, and PUNCH_HOLE | KEEP_SIZE.

        Space beyond the end (KEEP_SIZE) is at most BEYOND_BLOCKS_MAX, and given back when the file is at rest.
        Raises  BadRequest, FileTooBig, NoSpace, NotSupported: another mode. Unavailable, TimedOut: a part of it
                may have been done. Cancel as these.
        """
        end = offset + length
        if offset < 0 or length <= 0:
            raise BadRequest(f"inode {ino}: no range of {length} bytes at {offset}")
        if end > FILE_BLOCKS_MAX * BLOCK_SIZE:
            raise FileTooBig(f"inode {ino}: {end} B, a file may have {FILE_BLOCKS_MAX * BLOCK_SIZE} B")
        if mode not in (0, KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE):
            raise NotSupported(f"fallocate mode {mode:#x} is not known here")
        state = self._leases.state(ino)
        state.waiting += 1
        try:
            async with state.tail:  # the end of the file stays where it is, but for our own doing
                if mode & (PUNCH_HOLE | ZERO_RANGE):
                    await self._clear(state, offset, end)
                if not mode & (PUNCH_HOLE | ZERO_RANGE):
                    await self._check_room(state, -(-length // BLOCK_SIZE))
                if not mode & PUNCH_HOLE:
                    await self._fill(state, offset, end, grows=not mode & KEEP_SIZE)
        finally:
            state.waiting -= 1

    # -- space -----------------------------------------------------------------------------------

    async def _fill(self, state: FileState, offset: int, end: int, *, grows: bool) -> None:
        """Space for bytes `offset..end`; grows: the file ends there at least, afterwards. It grows with every
        window: there is never much space behind its end (W2 of write_path.py)."""
        first, last = offset // BLOCK_SIZE, -(-end // BLOCK_SIZE)
        if not grows:
            size = (await self._getattr(state.ino))[SIZE]
            last = min(last, size // BLOCK_SIZE + BEYOND_BLOCKS_MAX)
        while first < last:
            upto = min(last, first + WINDOW_BLOCKS)
            size = min(end, upto * BLOCK_SIZE) if grows else 0
            await self._under_lease(
                state, upto if grows else 0, partial(self._window, state, first, upto, size)
            )
            first = upto

    async def _check_room(self, state: FileState, count: int) -> None:
        """Refuse at once what cannot fit, rather than when the pool is full."""
        attr = await self._getattr(state.ino)
        free = (await self._coordinator.call("statfs", {}))["free"]
        if (count - attr[BLOCKS] // SECTORS_PER_BLOCK) * BLOCK_SIZE > free:
            raise NoSpace(
                f"inode {state.ino}: no room for {count} blocks, {free} B are free; see `csvfs status`"
            )

    async def _window(self, state: FileState, first: int, last: int, size: int) -> None:
        grows, losses = size > state.size, state.losses
        if grows:
            await self._writes.zero_tail(state)
            await self._writes.clear_gap(state, last)
        if state.losses != losses:  # what lies behind the end was not known all the time
            raise LeaseLost(f"the write lease of inode {state.ino} was lost; space is asked for again")
        self._reports.set_time(state, time.time_ns())
        await self._reports.fill(state, first, last - first, size if grows else 0)
        if grows:
            state.size = max(state.size, size)

    # -- holes -----------------------------------------------------------------------------------

    async def _clear(self, state: FileState, offset: int, end: int) -> None:
        """Bytes `offset..end` read as zeros, and whole blocks of them have no space."""
        head, tail = -(-offset // BLOCK_SIZE) * BLOCK_SIZE, end // BLOCK_SIZE * BLOCK_SIZE
        if offset < head:
            await self._writes.zero(state, offset, min(head, end))
        await self._under_lease(state, 0, partial(self._give_back, state, offset, end))
        if head <= tail < end:
            await self._writes.zero(state, tail, end)

    async def _give_back(self, state: FileState, offset: int, end: int) -> None:
        first, last = -(-offset // BLOCK_SIZE), end // BLOCK_SIZE
        if end >= state.size:
            last = -(-end // BLOCK_SIZE)  # behind the end of the file there is nothing to keep
        if first >= last:
            return
        async with nothing_under_way(state, (first, last)):
            args = {"ino": state.ino, "block": first, "count": last - first}
            try:
                reply = await self._reports.ask(state, "punch", args)
            except LeaseLost:
                raise
            except BaseException as error:
                if not isinstance(error, CsvfsError) or error.retryable:
                    self._give_up(state)  # it may be done or not
                raise
            if state.lease == LEASE_WRITE:
                state.extents.learn(first, last - first, ())
                state.tail_zero = -1
            self._reports.set_time(state, time.time_ns())
            self._reports.changed(state, reply)

    async def _under_lease(
        self, state: FileState, grows_upto: int, work: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """Do it under the write lease, and again where that is lost meanwhile.

        grows_upto: the layout from the end of the file to this block must be known, to zero what lies there.
        """
        deadline = time.monotonic() + self._io_timeout_s
        while True:
            await self._writes.wait_writable(state, False, deadline)
            end = state.size // BLOCK_SIZE
            count = max(1, min(grows_upto - end, GAP_BLOCKS_MAX))
            if state.lease < LEASE_WRITE or (grows_upto > end and not state.extents.covers(end, count)):
                await self._leases.acquire(state, LEASE_WRITE, end, count)
            elif await self._writes.counted(state, work(), deadline):
                return

    # -- lseek -----------------------------------------------------------------------------------

    async def seek(self, ino: int, offset: int, whence: int) -> int | None:
        """SEEK_DATA or SEEK_HOLE: where the next data, or the next hole, begins. None: there is none (ENXIO).

        Raises  NotFound, BadRequest; Unavailable, TimedOut. Cancel safe.
        """
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise BadRequest(f"inode {ino}: lseek whence {whence}")
        hole = whence == os.SEEK_HOLE
        size = (await self._getattr(ino))[SIZE]
        at = offset
        while 0 <= at < size:
            reply = await self._coordinator.call(
                "seek", {"ino": ino, "block": at // BLOCK_SIZE, "hole": hole}
            )
            at = max(at, reply["block"] * BLOCK_SIZE)
            if at < size and reply["found"]:
                return at
        return size if hole and 0 <= offset < size else None
