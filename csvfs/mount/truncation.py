"""Truncation: a change of a file's size, which the coordinator makes while nothing is under way here.

Place      mount floor; beside write_path.py.
Order      Wait for what is under way. Growing: zeros behind the old end first (W1, W2 of write_path.py).
           Shrinking: readers lose sight of the blocks first, since the coordinator trims them and gives them
           to other files. Then the coordinator is asked. While it works no write begins; but a recall does
           not wait for it, as it may answer only after that recall.
"""

import time
from collections.abc import Callable
from typing import Any

from csvfs.errors import CsvfsError
from csvfs.mount.file_state import BLOCKS, LEASE_WRITE, SIZE, FileState
from csvfs.mount.leases import Coordinator, Leases
from csvfs.mount.write_path import GAP_BLOCKS_MAX, WritePath
from csvfs.units import BLOCK_SIZE
from csvfs.volume import file_io
from csvfs.volume.extents import BLOCKS_MAX
from csvfs.volume.file_io import NotRead


class Truncation:
    def __init__(
        self,
        leases: Leases,
        coordinator: Coordinator,
        writes: WritePath,
        give_up: Callable[[FileState], None],
        io_timeout_s: float,
    ) -> None:
        """give_up(state): give the lease back, soon; what is known of the inode may be wrong."""
        self._leases = leases
        self._coordinator = coordinator
        self._writes = writes
        self._give_up = give_up
        self._io_timeout_s = io_timeout_s

    async def truncate(self, ino: int, changes: dict[str, Any]) -> list:
        """Carry out a `setattr` that has a `size`; returns the attributes afterwards.

        Raises  NotFound, FileTooBig, NoSpace; Unavailable, TimedOut: it may have been carried out.
        Cancel  as Unavailable.
        """
        state = self._leases.state(ino)
        if self._changes_nothing(state, changes) and self._writes.touch(state, changes["mtime_ns"]):
            return state.attributes()
        state.waiting += 1
        state.truncations += 1
        try:
            async with state.tail:
                before = await self._prepare(state, changes["size"])
            try:
                return await self._carry_out(state, changes, before)
            finally:
                state.truncating = False
                state.regate()
        finally:
            state.truncations -= 1
            state.waiting -= 1

    def _changes_nothing(self, state: FileState, changes: dict[str, Any]) -> bool:
        """But the time of the last write: an empty file opened with O_TRUNC, mostly."""
        return (
            changes["size"] == state.size
            and state.attr is not None
            and not state.stale
            and not state.tail.locked()
            and all(changes.get(name) is None for name in ("mode", "uid", "gid", "atime_ns"))
        )

    async def _prepare(self, state: FileState, size: int) -> int:
        """Leaves with `truncating` set, nothing under way, zeros behind the end; returns the size before."""
        deadline = time.monotonic() + self._io_timeout_s
        while True:
            await self._writes.wait_writable(state, False, deadline)
            missing = self._missing(state, size)
            if missing is not None:
                await self._leases.acquire(state, LEASE_WRITE, *missing)
                continue
            try:
                return await self._begin(state, size)
            except NotRead as error:
                await file_io.wait_again(error, deadline)  # recalls do not wait for that

    async def _begin(self, state: FileState, size: int) -> int:
        """The part of `_prepare` that recalls wait for. Raises NotRead: as if it had not begun."""
        before = state.size
        state.writers += 1
        state.truncating = True
        state.regate()
        try:
            if size > before:
                await self._writes.zero_tail(state)
                await self._writes.clear_gap(state, -(-size // BLOCK_SIZE))
            else:
                state.size = size
                state.extents.forget(-(-size // BLOCK_SIZE))
            reads = dict(state.reads)
            while state.writes or state.writers > 1 or any(read in state.reads for read in reads):
                await state.wait_change()
        except BaseException:
            if size <= before:  # else it is as it was, or another one was granted after a loss of the lease
                state.size = before
            state.truncating = False
            raise
        finally:
            state.writers -= 1
            state.regate()
        return before

    def _missing(self, state: FileState, size: int) -> tuple[int, int] | None:
        """As of a write: the layout around the end must be known to zero what lies behind it."""
        end = state.size // BLOCK_SIZE
        if state.lease < LEASE_WRITE:
            return end, 1
        count = min(-(-size // BLOCK_SIZE) - end, GAP_BLOCKS_MAX)
        return (end, count) if count > 0 and not state.extents.covers(end, count) else None

    async def _carry_out(self, state: FileState, changes: dict[str, Any], before: int) -> list:
        stamp = self._leases.stamp()
        try:
            reply = await self._coordinator.call("setattr", {"ino": state.ino, **changes})
        except BaseException as error:
            if isinstance(error, CsvfsError) and not error.retryable:
                state.size = before  # refused
            elif state.lease == LEASE_WRITE:
                self._give_up(state)  # it may be done or not; readers keep to the smaller size until then
            raise
        if reply.get("history"):  # what was true when the process before this one asked
            reply = await self._coordinator.call("getattr", {"ino": state.ino})
        attr: list = reply["attr"]
        state.metadata_dirty = True
        state.times_dirty = False
        self._leases.kept.timed(state.ino, False)
        self._leases.granted(state.ino, reply["lease"], attr, stamp, changed=True)
        if state.lease == LEASE_WRITE:
            state.attr = list(attr)
            state.size = state.committed = attr[SIZE]
            state.tail_zero = -1
            end = -(-attr[SIZE] // BLOCK_SIZE)
            state.extents.forget(end)
            gave_up = attr[SIZE] < before or attr[BLOCKS] == 0
            if gave_up and not self._leases.recalled_since(state.ino, stamp):
                state.extents.learn(end, BLOCKS_MAX - end, ())  # all that was behind the new end
        return list(attr)
