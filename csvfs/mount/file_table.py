"""The file table: what stands between the FUSE channel and the coordinator and drives of the volume.

Place      mount floor; gathers leases.py, read_path.py, write_path.py, truncation.py,
           holes.py, cloning.py, recall.py and shedding.py.
Tasks      `run_forever`: every second it reports times of files written to, gives back what nobody uses any
           more, and watches whether this node may serve. Recalls run in the session's nursery.
Limits     those of shedding.py.

Invariant  I8: fsync answers only after every member flushed what was acknowledged before. A flush that failed
           is reported to it, and to every fsync of the inode until it is closed: what the drive lost
           meanwhile cannot be had back by flushing again.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import trio

from csvfs.errors import CsvfsError, Fenced
from csvfs.mount.access_times import AccessTimes
from csvfs.mount.barred import Barred
from csvfs.mount.cloning import Cloning
from csvfs.mount.file_state import (
    LEASE_NONE,
    LEASE_OPEN,
    LEASE_READ,
    LEASE_WRITE,
    BufferedWrite,
    FileState,
)
from csvfs.mount.guard import Guard
from csvfs.mount.holes import Holes
from csvfs.mount.inheritance import Inheritance
from csvfs.mount.inode_rows import Row
from csvfs.mount.lapse import Lapse
from csvfs.mount.leases import Coordinator, KeptInodes, Leases
from csvfs.mount.read_path import ReadPath
from csvfs.mount.recall import KernelNotifier, Recaller
from csvfs.mount.reports import Reports
from csvfs.mount.request_journal import RequestJournal
from csvfs.mount.segments import SegmentedError
from csvfs.mount.set_id import SetId
from csvfs.mount.shared_write import SharedWrite
from csvfs.mount.shedding import INODES_MAX, KERNEL_INODES_MAX, Shedding
from csvfs.mount.truncation import Truncation
from csvfs.mount.write_path import WritePath
from csvfs.volume import file_io
from csvfs.volume.file_io import BlockBus, Data, WriteDone

log = logging.getLogger(__name__)

RECALL_FLUSH_S = 2.0  # below Options.recall_timeout_ms
MAINTENANCE_S = 1.0
GUARD_S = 0.05
TIMES_S = 5.0  # as `attribute_report_ms` of config.py


class FileTable:
    """One per mount. `nursery` outlives it; start `run_forever` in it."""

    read_nowait: Callable[[int, int, int], Data | list[Data] | None]
    write_nowait: Callable[[int, int, memoryview, int, WriteDone], bool]

    def __init__(
        self,
        *,
        coordinator: Coordinator,
        bus: BlockBus,
        notifier: KernelNotifier,
        guard: Guard,
        nursery: trio.Nursery,
        io_timeout_s: float = 60.0,
        times_s: float = TIMES_S,
        inodes_max: int = INODES_MAX,
        kernel_inodes_max: int = KERNEL_INODES_MAX,
        kept: KeptInodes | None = None,
        journal: RequestJournal | None = None,
        on_emptied: Callable[[bool], None] = lambda emptied: None,
    ) -> None:
        """kept: is told of every inode of which the kernel may cache something. journal: knows where appends go.
        on_emptied: whether the kernel shows nothing that it has cached, as this mount may not serve."""
        journal = self._journal = journal or RequestJournal()
        self._coordinator = coordinator
        self._bus = bus
        self._notifier = notifier
        self._guard = guard
        self._nursery = nursery
        self._times_s = times_s
        self._timed: dict[FileState, None] = {}
        self._io_timeout_s = io_timeout_s
        self.open_files = 0  # by programs here, each as often as it is open
        self.leases = Leases(coordinator, bus, kept)
        self._recaller = Recaller(self.leases, notifier, nursery, self._lowered)
        self.inheritance = Inheritance(self.leases, bus)
        self._recaller.ready = self.inheritance.ready
        self._lapse = Lapse(self.leases, notifier, nursery, guard.serving, on_emptied)
        self.serves_again = self._lapse.over
        self.barred = Barred(self.leases.kept)
        self.access = AccessTimes(coordinator, self.leases.states)
        self._recaller.settled = self.access.answered
        self._reads = ReadPath(self.leases, bus, guard, io_timeout_s, self.access)
        self._reports = Reports(self.leases, coordinator, self._timed)
        self.shedding = Shedding(
            self.leases, bus, self._reports, self._recaller, notifier, self._timed, inodes_max, kernel_inodes_max
        )
        self.shedding.report_accesses = self.access.report
        self._forgotten = self.shedding.forgotten
        self.release_unused = self.shedding.shed
        self._writes = WritePath(
            self.leases, bus, self._reports, notifier, guard, nursery, io_timeout_s, journal, self._give_up
        )  # fmt: skip
        self.leases.wrote_before = lambda state: self._reports.set_time(state, time.time_ns())
        self._truncation = Truncation(self.leases, coordinator, self._writes, self._give_up, io_timeout_s)
        self._holes = Holes(
            self.leases, coordinator, self._reports, self._writes, self.getattr, self._give_up, io_timeout_s
        )
        self._shared = SharedWrite(
            self.leases, coordinator, bus, guard, io_timeout_s, self.inheritance, journal, self._settle_for_recall
        )
        cloning = Cloning(
            self.leases, bus, self._reports, self._writes, self.getattr, self._give_up, io_timeout_s
        )
        set_id = SetId(self.leases, coordinator, notifier, self.getattr)
        self._bind(cloning, set_id)

    def _bind(self, cloning: Cloning, set_id: SetId) -> None:
        """Once: the channel calls them for every request."""
        self.read_nowait = self._reads.read_nowait
        self.write_nowait = self._writes.write_nowait
        self.read_segments = self._shared.read_nowait
        self.write_segments = self._shared.write_nowait
        self.truncate = self._truncation.truncate
        self.fallocate = self._holes.fallocate
        self.seek = self._holes.seek
        self.copy_range = cloning.copy_range
        self.set_id_is_due = set_id.is_due
        self.clear_set_id = set_id.clear
        self.stamp = self.leases.stamp
        self.recalled_since = self.leases.recalled_since
        self.changed_since = self.leases.changed_since
        self.changed = self.leases.changed

    # -- reads and writes that wait ------------------------------------------------------------------

    async def read(self, ino: int, offset: int, size: int, *, direct: bool = False) -> list[Data]:
        """See ReadPath.read. direct: past the kernel's cache."""
        while direct:
            state = self.leases.states.get(ino)
            if state is not None and state.segments is not None and state.lease < LEASE_READ:
                data = await self._shared.read(state, offset, size)
                if data is not None:
                    return data
            try:
                return await self._reads.read(ino, offset, size, direct=True)
            except SegmentedError:
                continue
        return await self._reads.read(ino, offset, size)

    async def write(self, ino: int, offset: int, data: memoryview, write_flags: int, *, direct: bool = False) -> None:
        """See WritePath.write. direct: past the kernel's cache."""
        while direct:
            state = self.leases.states.get(ino)
            if state is not None and state.segments is not None and state.lease < LEASE_READ:
                written = await self._shared.write(state, offset, data)
                if written:
                    return
                if written is False:
                    break
            try:
                await self._writes.write(ino, offset, data, write_flags, direct=True)
                return
            except SegmentedError:
                continue
        await self._writes.write(ino, offset, data, write_flags)

    # -- leases ----------------------------------------------------------------------------------

    def holds(self, ino: int) -> int:
        """The lease held now: 0 none, 1 open, 2 read, 3 write."""
        state = self.leases.states.get(ino)
        return LEASE_NONE if state is None else state.lease

    def may_answer(self, ino: int) -> bool:
        """Whether what was learned under the lease on `ino` may be told now, without another await."""
        return self.holds(ino) >= LEASE_READ and self._guard.serving()

    def granted(self, ino: int, kind: int, attr: list | None, asked: int, changed: bool = False) -> None:
        """A reply of the coordinator said so. Call before the next await after the reply.

        asked: `stamp` before the call. changed: the call changed the attributes to these.
        """
        self._forgotten.pop(ino, None)
        self.leases.granted(ino, kind, attr, asked, changed)

    def granted_directory(self, ino: int, kind: int) -> None:
        """As granted, for a directory whose attributes the reply does not have."""
        self._forgotten.pop(ino, None)
        state = self.leases.state(ino)
        state.directory = state.used = True
        self.leases.granted(ino, kind, None, 0)

    def set_parent(self, ino: int, parent: int) -> None:
        """Directory `ino` was found in `parent`."""
        state = self.leases.states.get(ino)
        if state is not None:
            state.parent = parent

    def parent(self, ino: int) -> int:
        """Of a directory, as it was found last; itself where that is not known, and for the root."""
        state = self.leases.states.get(ino)
        return state.parent if state is not None and state.parent else ino

    def claims(self) -> list[list[int]]:
        """See session.LeaseHolder."""
        return self.leases.claims()

    def claims_of_segments(self) -> list[list[Any]]:
        """See session.LeaseHolder."""
        return self.leases.claims_of_segments()

    def without_segments(self, inos: list[int]) -> None:
        """The coordinator knows of no segments of these that we have. What was begun there is not done again."""
        self.inheritance.refused([ino for ino in inos if self.inheritance.is_begun(ino, None)])
        for ino in inos:
            if ino in self.leases.states:
                self._shared.drop(self.leases.states[ino])

    def refused(self, inos: list[int], *, are_open: bool = False) -> None:
        """A coordinator gave these leases to others before we could claim them. are_open: it counts the inodes as open
        here."""
        self.without_segments(inos)
        if not are_open:
            self._recaller.lose([self.leases.states[ino] for ino in inos if ino in self.leases.states])
            return
        self.inheritance.refused(inos)
        self.lowered(inos)

    def lowered(self, inos: list[int]) -> None:
        """What is held on these is that they are open."""
        states = [self.leases.states[ino] for ino in inos if ino in self.leases.states]
        self._lose_but_open(states)
        self._forgotten |= {state.ino: None for state in states if not state.open_count}

    def _lose_but_open(self, states: list[FileState]) -> None:
        self._recaller.lose([state for state in states if max(state.lease, state.inherited) > LEASE_OPEN])
        for state in states:
            state.lease = LEASE_OPEN
            self.leases.kept.lease(state.ino, LEASE_OPEN)
            state.regate()

    def adopted(self, lost_locks: list[int] | None) -> None:
        """This mount was evicted before the process before this one was followed by us, and may go on without leases.

        lost_locks: inodes on which programs here had locks that others have got; None: nobody knows.
        """
        states = list(self.leases.states.values())
        self.leases.mark_all_recalled()
        self._notifier.increment_epoch()
        self._recaller.lose([state for state in states if state.inherited == LEASE_READ])
        for state in states:
            if state.inherited:
                self._recaller.invalidate_attr(state.ino)
        self._lose_but_open([state for state in states if state.open_count and not state.inherited])
        first_new = time.monotonic_ns()
        for state in states:
            if lost_locks is None or state.ino in lost_locks:
                self.barred.bar(state.ino, state.open_count, first_new)

    async def recall(self, ino: int, kind: int, attr: bool) -> dict[str, Any]:
        """See session.LeaseHolder. Cancel: leaves the lease as it is, the recall unanswered."""
        reply = await self._recaller.recall(ino, kind, attr)
        state = self.leases.states.get(ino)
        if state is not None and not state.directory and state.lease < LEASE_WRITE:
            # The next holder's fsync speaks for what was written here (I8), so it goes to the media first. A disk
            # that takes longer than this is left to finish by itself: a recall has a deadline, and we one life.
            await self._settle_for_recall(state)
        return reply

    async def recall_segment(self, ino: int, segment: int, kind: int) -> dict[str, Any]:
        """See session.LeaseHolder. Cancel: leaves the lease as it is, the recall unanswered."""
        state = self.leases.states.get(ino)
        if state is None:
            await trio.lowlevel.checkpoint()
            state = self.leases.states.get(ino)
        return {"kind": LEASE_NONE} if state is None else await self._shared.recall(state, segment, kind)

    async def flush_segments(self, ino: int) -> None:
        """See session.LeaseHolder: another node's fsync speaks for what was written here. Raises as fsync."""
        state = self.leases.states.get(ino)
        await self.inheritance.flush()
        if state is not None:
            async with state.flushing:
                await self._flush_slabs(state)

    async def _settle_for_recall(self, state: FileState) -> None:
        with trio.move_on_after(RECALL_FLUSH_S):
            await self._settle(state)
            await self._settle_inherited()

    def set_given(self, is_given: Callable[[int], bool]) -> None:
        """`is_given(ino)`: whether the kernel was told of the inode and has not forgotten it."""
        self._recaller.is_given = is_given

    def query(self, ino: int) -> dict[str, Any] | None:
        """See session.LeaseHolder."""
        state = self.leases.states.get(ino)
        if state is not None and state.segments is not None and state.segments.times_dirty:
            return {"size": None, "mtime_ns": state.segments.mtime_ns, "atime_ns": None}
        return self._recaller.query(ino)

    def take_over(self, rows: list[Row]) -> None:
        """What the process before this one left, before anything else is done; see inheritance.py."""
        lost = self.inheritance.take(rows, self._journal.begun_before())
        for row in rows:
            if row.barred:
                self.barred.bar(row.ino, row.opens, time.monotonic_ns())
        self.open_files = sum(row.opens for row in rows)
        self._recaller.lose(lost)

    def _give_up(self, state: FileState) -> None:
        """Give a lease back that we are no longer sure to understand."""

        async def take_back() -> None:
            if state.recall is None:
                await self._recaller.take_back(state, LEASE_NONE)

        self._nursery.start_soon(take_back)

    # -- attributes ------------------------------------------------------------------------------

    def getattr_nowait(self, ino: int) -> list | None:
        """The attributes, if they are known under a lease of READ or more."""
        state = self.leases.states.get(ino)
        known = state is not None and state.lease >= LEASE_READ and state.attr is not None and not state.stale
        return state.attributes() if state is not None and known and self._guard.serving() else None

    def knows_attributes(self, ino: int) -> bool:
        """Whether those told last were told under a lease that is held, and may be cached as long as it is."""
        return self.getattr_nowait(ino) is not None

    async def getattr(self, ino: int) -> list:
        """The attributes, by our lease where we have one, else as the coordinator says.

        Raises  NotFound; Unavailable, TimedOut after io_timeout_s. Cancel safe.
        """
        known = self.getattr_nowait(ino)
        if known is not None:
            return known
        asked = self.stamp()
        reply = await self._coordinator.call("getattr", {"ino": ino})
        self.granted(ino, reply["lease"], reply["attr"], asked)
        state = self.leases.states[ino]
        return state.attributes() if state.attr is not None else list(reply["attr"])

    async def statfs(self, ino: int) -> dict[str, int]:
        """size, free, files, files_free, name_max; bytes. Of the volume, or of the quota that `ino` counts for."""
        figures: dict[str, int] = await self._coordinator.call("statfs", {"ino": ino})
        return figures

    # -- open files ------------------------------------------------------------------------------

    async def open(self, ino: int, writing: bool) -> None:
        """The kernel opens the inode: from now on, until `closed`, it is held at least as OPEN.

        Writing: returns once no page is cached under a read lease (M4); one call where there was one.
        Raises  NotFound, Unavailable ... of the call; then it is not open. Cancel: as for errors.
        """
        state = self.leases.state(ino)
        state.open_count += 1
        state.used = True
        self.open_files += 1
        state.write_opens += writing
        state.regate()
        self._forgotten.pop(ino, None)
        try:
            while state.lease == LEASE_NONE or (writing and (state.inherited or state.lease == LEASE_READ)):
                if state.lease == LEASE_NONE:
                    await self.leases.acquire(state, LEASE_OPEN, 0, 0)
                else:
                    count = 0 if state.extents.covers(0, 1) else 1  # it will be read or written next
                    await self.leases.acquire(state, LEASE_WRITE, 0, count)
        except BaseException:
            self.closed(ino, writing)
            raise

    def closed(self, ino: int, writing: bool) -> None:
        """The end of an `open`; writing: as it was opened."""
        state = self.leases.states.get(ino)
        if state is None or not state.open_count:
            return
        state.open_count -= 1
        self.open_files -= 1
        state.write_opens -= writing
        state.regate()
        if not state.open_count:
            state.failure = None
            self.access.closed(state)
            if state.lease <= LEASE_OPEN:
                self._forgotten[ino] = None  # nothing is cached under it

    def forget(self, ino: int) -> None:
        """The kernel knows the inode no more, and caches nothing of it."""
        if ino in self.leases.states:
            self._forgotten[ino] = None

    def buffered_write(self, ino: int, offset: int, size: int) -> BufferedWrite:
        """A WRITE of the page cache has arrived; its `ended` is to be called just before it is answered."""
        return BufferedWrite(self.leases.state(ino), offset, offset + size)

    # -- fsync -----------------------------------------------------------------------------------

    async def fsync(self, ino: int) -> None:
        """All bytes acknowledged before are on the medium of all members, and all that leads to them (I8).

        Raises  the error of a failed flush, again at every fsync until the file is closed. Unavailable,
                TimedOut: nothing is promised, another fsync may succeed. Cancel safe.
        """
        state = self.leases.state(ino)
        state.waiting += 1
        try:
            await self.inheritance.flush()
            await state.wait_writes()
            # One at a time: the second waits for what the first took over.
            async with state.flushing:
                await self._flush_slabs(state)
                await self._flush_metadata(state)
            await self._shared.flush(state)  # others have us flush meanwhile
        finally:
            state.waiting -= 1

    async def _flush_slabs(self, state: FileState) -> None:
        if state.failure is not None:
            raise state.failure
        slabs, state.dirty_slabs = state.dirty_slabs, {}
        if slabs:
            try:
                await self._bus.flush(slabs)
            except BaseException as error:
                state.dirtied(slabs)
                if isinstance(error, CsvfsError) and not error.retryable:
                    state.failure = error
                raise
            if (lost := file_io.lost_before_flush(self._bus, slabs)) is not None:
                state.failure = lost
                raise lost

    async def _flush_metadata(self, state: FileState) -> None:
        # The time of the last write is not waited for: it is reported within `times_s`, as with lazytime. A
        # commit per fsync would cost a database's log three more writes, on three nodes, for a number that
        # nobody reads.
        if state.metadata_dirty:
            state.metadata_dirty = False
            try:
                await self._coordinator.call("fsync", {})
            except BaseException:
                state.metadata_dirty = True
                raise

    def flush_is_due(self, ino: int) -> bool:
        """False: `flush` would do nothing."""
        state = self.leases.states.get(ino)
        return state is not None and state.times_dirty

    async def flush(self, ino: int) -> None:
        """close(2), or a time about to be set by hand: report the time of the last write if it is not known
        yet."""
        if self.flush_is_due(ino):
            state = self.leases.states[ino]
            await state.wait_writes()
            await self._reports.commit_times(state)

    def _lowered(self, state: FileState) -> None:
        """A write lease went: the next holder's fsync speaks for our writes too, so get them onto the
        media."""
        if state.dirty_slabs:
            self._nursery.start_soon(self._settle, state)

    async def _settle(self, state: FileState) -> bool:
        """Flush data that nobody asked to be flushed; whether nothing is left. An fsync elsewhere has the
        coordinator flush what leads to it."""
        try:
            async with state.flushing:
                if state.dirty_slabs and state.failure is None:
                    await self._flush_slabs(state)
        except CsvfsError as error:
            log.warning("flush of inode %d behind its last use: %s", state.ino, error)
            return not error.retryable
        return True

    async def _settle_inherited(self) -> None:
        try:
            await self.inheritance.flush()
        except CsvfsError as error:
            log.warning("flush of what the mount before wrote: %s", error)

    # -- maintenance -----------------------------------------------------------------------------

    async def run_forever(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_guard_forever)
            nursery.start_soon(self._report_times_forever)
            nursery.start_soon(self.access.run_forever, self._times_s)
            while True:
                await trio.sleep(MAINTENANCE_S)
                await self.release_unused()

    async def empty(self) -> None:
        """This mount was evicted: returns when the kernel shows nothing that it has cached. The guard is closed."""
        self._lapse.begin()
        await self._lapse.emptied.wait()

    async def _watch_guard_forever(self) -> None:
        served = False
        while True:
            serving = self._guard.serving()  # notices a lapse even when nobody reads or writes
            if served and not serving:
                self._lapse.begin()
            served = serving
            if self._guard.may_restore():
                self._restore()
            await trio.sleep(GUARD_S)

    def _restore(self) -> None:
        """The node's lease was not renewed in time, and goes on: nobody has counted this node as gone, and all that we hold
        is still ours, with the writes that were under way (guard.py)."""
        log.warning("this node could not serve for a while, and goes on")
        self.leases.mark_all_recalled()
        self._lapse.over()
        self._guard.restored()

    async def _report_times_forever(self) -> None:
        while True:
            await trio.sleep(self._times_s)
            await self.report_times()

    async def _report_segments(self) -> None:
        try:
            await self._shared.report_times()
        except CsvfsError as error:
            log.info("times of files that several nodes write are not reported: %s", error)

    async def report_times(self) -> None:
        """Tell the coordinator the times of the last writes and reads that it does not know yet."""
        await self.access.report()
        await self._report_segments()
        states = list(self._timed)
        self._timed.clear()
        for state in states:
            try:
                await self._reports.commit_times(state)
            except Fenced:
                return
            except CsvfsError as error:
                log.info("time of inode %d not reported: %s", state.ino, error)
                self._timed[state] = None
