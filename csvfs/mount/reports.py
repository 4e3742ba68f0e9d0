"""Reports: what a writer asks of the coordinator, and tells it, under the write lease: space, size, times.

Place      mount floor; under write_path.py and holes.py.
Rule       A refusal counts only if the lease was ours all the time: else it is LeaseLost, to be tried again under
           the next one.
"""

from typing import Any

from csvfs.errors import Conflict, LeaseLost, NoSpace
from csvfs.mount.file_state import BLOCKS, LEASE_WRITE, MTIME, FileState
from csvfs.mount.leases import Coordinator, Leases


class Reports:
    def __init__(self, leases: Leases, coordinator: Coordinator, timed: dict[FileState, None]) -> None:
        """timed: collects the states whose mtime has to be reported some time."""
        self._leases = leases
        self._coordinator = coordinator
        self._timed = timed

    def set_time(self, state: FileState, mtime_ns: int) -> None:
        """The file was written to just now; reported some time."""
        state.mtime_ns = mtime_ns
        state.atime_seen = False
        if not state.times_dirty:
            state.times_dirty = True
            self._timed[state] = None
            self._leases.kept.timed(state.ino, True)

    async def allocate(self, state: FileState, first: int, last: int, size: int) -> None:
        """Fill the holes of blocks `first..last`; commits `size` (0: none) along with it. No holes: no
        call.

        Raises  LeaseLost, NoSpace; Unavailable ... of the call.
        """
        hole = state.extents.first_hole(first, last - first)
        while hole is not None:
            await self.fill(state, hole, last - hole, size)
            before, hole = hole, state.extents.first_hole(first, last - first)
            if hole is not None and hole <= before:
                raise NoSpace(f"inode {state.ino}: no space came for block {hole}; see `csvfs status`")

    async def fill(self, state: FileState, block: int, count: int, size: int) -> None:
        """As allocate, of a range whose layout need not be known; always one call."""
        while state.moving:  # the answer may tell of whole extents, also where blocks are being moved
            await state.wait_change()
        state.fills += 1
        try:
            mtime_ns = state.mtime_ns
            args = {"ino": state.ino, "block": block, "count": count, "size": size, "mtime_ns": mtime_ns}
            reply = await self.ask(state, "allocate", args)
            if state.lease < LEASE_WRITE:
                raise LeaseLost(f"the write lease of inode {state.ino} was lost while space was asked for")
            self._leases.take_layout(state, block, count, reply)
        finally:
            state.fills -= 1
            state.notify()
        self._reported(state, mtime_ns)
        state.committed = max(state.committed, size)
        self.changed(state, reply)

    def changed(self, state: FileState, reply: dict[str, Any]) -> None:
        """A reply says how many blocks the file has now."""
        state.metadata_dirty = True
        attr = reply.get("attr")
        if state.attr is not None and isinstance(attr, list):
            state.attr[BLOCKS] = attr[BLOCKS]

    async def commit(self, state: FileState, size: int) -> None:
        mtime_ns = state.mtime_ns
        args = {"ino": state.ino, "size": size, "mtime_ns": mtime_ns, "atime_ns": None}
        await self.ask(state, "commit", args)
        state.metadata_dirty = True
        state.committed = max(state.committed, size)
        self._reported(state, mtime_ns)

    async def ask(self, state: FileState, name: str, args: dict[str, Any]) -> Any:
        """Raises LeaseLost where the lease is gone, or the answer may be no only because it went on the way."""
        losses = state.losses
        if state.lease < LEASE_WRITE:
            raise LeaseLost(f"the write lease of inode {state.ino} was lost before {name!r} was asked for")
        try:
            return await self._coordinator.call(name, args)
        except Conflict:
            if state.losses == losses:
                raise
            raise LeaseLost(
                f"the write lease of inode {state.ino} was lost before {name!r} was answered"
            ) from None

    async def commit_times(self, state: FileState) -> None:
        """Tell the coordinator when the file was written last, if it does not know."""
        if not state.times_dirty or state.lease < LEASE_WRITE:
            return
        mtime_ns = state.mtime_ns
        # Without a size: a truncation may be under way, and this arrive behind it.
        args = {"ino": state.ino, "size": 0, "mtime_ns": mtime_ns, "atime_ns": None}
        try:
            await self.ask(state, "commit", args)
        except LeaseLost:
            return  # the time went with the lease
        self._reported(state, mtime_ns)

    def _reported(self, state: FileState, mtime_ns: int) -> None:
        """The coordinator has our time now; a newer one stays to be reported."""
        if state.mtime_ns == mtime_ns:
            state.times_dirty = False
            self._leases.kept.timed(state.ino, False)
        if state.attr is not None:
            state.attr[MTIME] = mtime_ns
