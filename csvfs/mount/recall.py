"""Recall: give a lease back, with nothing of it left in the kernel's cache.

Place      mount floor. One recall of an inode at a time; different inodes do not wait for each other.

The kernel locks a page while a READ of it is unanswered, and an invalidation waits for that lock: so parking
READs during an invalidation can deadlock, and answering them can fill pages behind it. Hence passes:

    first pass    nothing is parked; the whole file. This also writes dirty mmapped pages back: their WRITEs,
                  flagged FUSE_WRITE_CACHE, are served, the lease is still held.
    later passes  new READs and WRITEs (but those) are parked; the pages filled since the pass before began.
                  If one takes longer than PARKED_MS_MAX, what is parked is served after all, and another pass
                  follows.
    the end       a pass with all parked, during which nothing was filled, and nothing is under way any more.
                  In the same synchronous step the lease is lowered; what was parked goes and asks for it
                  anew.

A recall to READ lets pages stay: one pass, which writes dirty pages back, then no more writes. Of a file that
is open for writing here nothing stays (M4).

Stuck      A WRITE to a file that is only held for reading (and a READ, where it is open for writing) needs the
           write lease, which the coordinator gives nobody before this recall is answered; the kernel may keep
           its pages locked meanwhile. The pass begins anew without them, and they are invalidated behind the
           WRITE or READ. None of them is dirty: that needs the write lease (M4).
Yielding   Where that does not help (too many of them; or a truncation that waits at the coordinator, during
           which the kernel writes nothing back) the recall is answered at once and the invalidation goes on
           behind it: for a moment programs on this node may still see old pages, but every write of theirs
           needs a new lease first.
Not heard  An inode that the kernel was given is not known to it before the program that looked it up has had its turn;
           then it keeps, for as long as the reply says, the attributes of before. So it is told again until it knows
           the inode, or has given it back, and the recall is answered then (HEARD_S_MAX at the latest).
"""

import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

import trio

from csvfs.mount.file_state import (
    LEASE_NONE,
    LEASE_OPEN,
    LEASE_READ,
    LEASE_WRITE,
    WHOLE_FILE,
    FileState,
    Recall,
)
from csvfs.mount.leases import Leases

log = logging.getLogger(__name__)

PARKED_MS_MAX = 500
# Of PARKED_MS_MAX; then a recall yields to a truncation, although mmapped stores may then be written back late.
TRUNCATION_WAITS = 4
HEARD_POLL_S = 0.001
HEARD_S_MAX = 2.0  # below Options.recall_timeout_ms
REPLANS_MAX = 4  # passes begun anew for stuck WRITEs; each left behind keeps a thread

Range = tuple[int, int]  # offset, length in bytes


class KernelNotifier(Protocol):
    """What is needed of mount/notify.py."""

    def invalidate_attr(self, ino: int) -> bool: ...
    async def invalidate_pages(self, ino: int, offset: int, length: int) -> None: ...
    async def invalidate_all(self, ranges: list[tuple[int, int, int]]) -> None: ...
    async def prune(self, inos: list[int]) -> None: ...
    def increment_epoch(self) -> None: ...


class Recaller:
    """Answers the coordinator's `recall` calls. `nursery` outlives all of them."""

    def __init__(
        self,
        leases: Leases,
        notifier: KernelNotifier,
        nursery: trio.Nursery,
        lowered: Callable[[FileState], None],
        parked_ms_max: int = PARKED_MS_MAX,
    ) -> None:
        """`lowered` is told of each inode whose write lease was given back."""
        self._leases = leases
        self._notifier = notifier
        self._nursery = nursery
        self._lowered = lowered
        self._parked_s_max = parked_ms_max / 1000
        self._behind: dict[FileState, int] = {}  # passes that go on behind an answered recall
        self._unheard: dict[int, None] = {}  # inodes that the kernel was given and does not know
        self.is_given: Callable[[int], bool] = lambda ino: False  # whether the kernel was told of it, and has not forgotten
        # Until a recall may be answered; see inheritance.py.
        self.ready: Callable[[FileState], Awaitable[None]] | None = None
        self.settled: Callable[[int], Awaitable[None]] | None = None  # see AccessTimes.answered

    async def recall(self, ino: int, kind: int, attr: bool) -> dict[str, Any]:
        """Lower the lease on `ino` to `kind`; with `attr` forget its attributes. Returns the reply."""
        # Replies that came before this recall are applied first (leases.py, "Order").
        await trio.lowlevel.checkpoint()
        state = self._leases.states.get(ino)
        while state is not None and state.recall is not None:
            await state.wait_change()
            state = self._leases.states.get(ino)
        if state is None:
            self._leases.mark_recalled(ino)
            return {"kind": LEASE_NONE, "size": None, "mtime_ns": None, "atime_ns": None}
        if state.inherited or state.replays:
            assert self.ready is not None
            await self.ready(state)
        if self.settled is not None:
            await self.settled(ino)
        if state.lease > kind:
            await self.take_back(state, kind)
        elif attr:
            report = _report(state)
            self._forget_attributes(state)
            if state.lease == LEASE_WRITE or report["atime_ns"]:
                if self._unheard:
                    await self._wait_heard(ino)
                return {"kind": state.lease, **report}
        if self._unheard:
            await self._wait_heard(ino)
        if state.lease == LEASE_WRITE:
            return {"kind": state.lease, **_report(state)}
        report = state.report or {"size": None, "mtime_ns": None, "atime_ns": None}
        return {"kind": state.lease, **report}

    def query(self, ino: int) -> dict[str, Any] | None:
        """What only the holder of the write lease knows; None: that is not us."""
        state = self._leases.states.get(ino)
        if state is None or state.lease != LEASE_WRITE:
            return None
        return _report(state)

    async def take_back(self, state: FileState, kind: int) -> None:
        """Empty the kernel's cache of the inode and lower the lease to `kind`, or OPEN while it is open."""
        if state.directory:
            self._notifier.increment_epoch()
        if not state.has_pages:
            self._lower(state, kind)
            return
        recall = state.recall = Recall()
        held = _Holds(state)
        try:
            if kind == LEASE_READ and not state.write_opens:
                await self._stop_writing(state, recall, held)
            if state.lease >= LEASE_READ and (kind < LEASE_READ or state.write_opens):
                kind = LEASE_NONE  # opened for writing, maybe only during `_stop_writing`
                held.release()
                await self._empty(state, recall, held)
            # Pages may have been filled behind a pass that is still under way.
            behind = [WHOLE_FILE] if recall.yielding else _as_ranges(state.stuck.values())
            if behind:
                self._behind[state] = self._behind.get(state, 0) + 1
                self._leases.kept.lost(state.ino, True)
                self._nursery.start_soon(self._pass_behind, state, behind)
            self._lower(state, kind)
        finally:
            state.recall = None
            state.taint = None
            held.release()

    async def take_back_idle(self, states: list[FileState]) -> list[FileState]:
        """As take_back to NONE, of many inodes at once that nobody has open: so nothing of them is dirty or locked.

        Returns  those that nobody opened meanwhile, lowered without an await before the return. The others keep their lease.
        """
        for state in states:
            state.recall, state.used = Recall(), False
        lowered = []
        try:
            await self._notifier.invalidate_all([(s.ino, *WHOLE_FILE) for s in states if s.has_pages])
        finally:
            for state in states:
                state.recall = None
                state.notify()
        for state in states:
            # Dirty: written back just now, and not on the media: whoever gets the lease next speaks for it (I8).
            if not (state.used or state.is_busy() or state.dirty_slabs or state.reads or state.writers):
                lowered.append(state)
        if any(state.directory for state in lowered):
            self._notifier.increment_epoch()
        for state in lowered:
            self._lower(state, LEASE_NONE)
        return lowered

    async def _stop_writing(self, state: FileState, recall: Recall, held: "_Holds") -> None:
        """Until no write is under way and none can begin; pages stay readable."""
        await self._invalidate(state, recall, [WHOLE_FILE])
        held.hold_writes()
        while state.writes or state.writers:
            await state.wait_change()

    async def _empty(self, state: FileState, recall: Recall, held: "_Holds") -> None:
        """Until no page of the inode is cached, no I/O under way, and none can begin (or the recall
        yields)."""
        ranges: list[Range] = [WHOLE_FILE]
        holding = False
        while True:
            tainted: list[Range] = []
            state.taint = tainted
            if holding:
                held.hold_all()
            overdue = await self._invalidate(state, recall, ranges, held if holding else None)
            if recall.yielding:
                held.hold_all()
            if recall.yielding or (holding and not overdue):
                while state.reads or state.writers or state.writes:
                    await state.wait_change()
                if recall.yielding or not tainted:
                    return  # and to the lowering without an await in between
            ranges = _merged(tainted)
            holding = True

    async def _invalidate(
        self, state: FileState, recall: Recall, ranges: list[Range], held: "_Holds | None" = None
    ) -> bool:
        """One pass over `ranges`. True: it took so long that what `held` parked was served meanwhile."""
        overdue = False
        waits = 0
        for attempt in range(REPLANS_MAX):
            done = trio.Event()
            recall.signal = trio.Event()
            todo = without(ranges, sorted(state.stuck.values()))
            self._nursery.start_soon(self._run_pass, state, todo, done)
            while not (done.is_set() or recall.signal.is_set()):
                with trio.move_on_after(self._parked_s_max) as patience:
                    await _either(done, recall.signal)
                if not patience.cancelled_caught:
                    continue
                waits += 1
                if held is not None and not overdue:
                    overdue = True
                    held.release()
                elif (attempt and state.lease < LEASE_WRITE) or (
                    state.truncations and waits >= TRUNCATION_WAITS
                ):
                    recall.yielding = True
                    recall.signal.set()
            if done.is_set() or recall.yielding:
                return overdue
        recall.yielding = True
        return overdue

    async def _run_pass(self, state: FileState, ranges: list[Range], done: trio.Event) -> None:
        for offset, length in ranges:
            await self._notifier.invalidate_pages(state.ino, offset, length)
        done.set()

    async def _pass_behind(self, state: FileState, ranges: list[Range]) -> None:
        await self._run_pass(state, ranges, trio.Event())
        left = self._behind.pop(state) - 1
        if left:
            self._behind[state] = left
        elif not state.lost:
            self._leases.kept.lost(state.ino, False)

    def _lower(self, state: FileState, kind: int) -> None:
        """The one synchronous step in which the lease goes."""
        wrote = state.lease == LEASE_WRITE
        if wrote:
            state.report = _report(state)
            state.attr = state.attributes() if state.attr is not None else None
            state.times_dirty = False
        elif state.atime_ns:
            state.report = _report(state)
            state.attr = state.attributes() if state.attr is not None else None
        state.atime_ns = 0
        kept = LEASE_OPEN if state.open_count else LEASE_NONE
        state.lease = min(state.lease, kind if kind == LEASE_READ else kept)
        if state.lease < LEASE_READ:
            state.extents.clear()
            state.attr = None
            state.metadata_dirty = True  # others may change it now
        state.tail_zero = -1
        self._leases.kept.timed(state.ino, state.times_dirty)
        self._leases.kept.lease(state.ino, state.lease)
        self._leases.mark_recalled(state.ino)
        self.invalidate_attr(state.ino)
        state.regate()
        if wrote:
            self._lowered(state)

    def _forget_attributes(self, state: FileState) -> None:
        """Somebody is about to change them, maybe the time of the last write: the coordinator is told ours with the
        answer, and from then on that there counts.
        """
        state.attr = None
        state.atime_ns = 0
        if state.lease == LEASE_WRITE:
            state.times_dirty = False
            state.mtime_ns = 0
            self._leases.kept.timed(state.ino, False)
        if state.directory:
            self._notifier.increment_epoch()
        self._leases.mark_recalled(state.ino)
        self.invalidate_attr(state.ino)

    def invalidate_attr(self, ino: int) -> None:
        """Have the kernel forget the attributes, also of an inode that it is only about to know ("Not heard")."""
        if not self._notifier.invalidate_attr(ino) and self.is_given(ino) and ino not in self._unheard:
            self._unheard[ino] = None
            self._nursery.start_soon(self._tell_until_heard, ino)

    async def _tell_until_heard(self, ino: int) -> None:
        while self.is_given(ino) and not self._notifier.invalidate_attr(ino):
            await trio.sleep(HEARD_POLL_S)
        del self._unheard[ino]

    async def _wait_heard(self, ino: int) -> None:
        """Until the kernel has forgotten the attributes, HEARD_S_MAX at most."""
        with trio.move_on_after(HEARD_S_MAX):
            while ino in self._unheard:
                await trio.sleep(HEARD_POLL_S)

    def lose(self, states: list[FileState]) -> None:
        """These leases may be somebody else's already: stop serving by them now, then empty the kernel's
        caches."""
        if not states:
            return
        files = [state for state in states if state.has_pages]
        for state in states:
            self._leases.lose(state)
            self.invalidate_attr(state.ino)
            if not state.has_pages:
                self._leases.kept.lost(state.ino, False)
        for state in files:
            state.lost += 1
        self._notifier.increment_epoch()
        self._nursery.start_soon(self._empty_lost, files)

    async def _empty_lost(self, files: list[FileState]) -> None:
        log.warning("leases on %d files were lost; their cached pages are dropped", len(files))
        for state in files:
            await self._notifier.invalidate_pages(state.ino, *WHOLE_FILE)
            state.lost -= 1
            if not state.lost and state not in self._behind:
                self._leases.kept.lost(state.ino, False)


class _Holds:
    """What one recall parks, released exactly once however it ends."""

    def __init__(self, state: FileState) -> None:
        self._state = state
        self._reads = 0
        self._writes = 0

    def hold_all(self) -> None:
        self._set(1, 1)

    def hold_writes(self) -> None:
        self._set(0, 1)

    def release(self) -> None:
        self._set(0, 0)

    def _set(self, reads: int, writes: int) -> None:
        state = self._state
        state.read_holds += reads - self._reads
        state.write_holds += writes - self._writes
        self._reads, self._writes = reads, writes
        state.regate()


async def _either(first: trio.Event, second: trio.Event) -> None:
    """Returns when one of them is set."""

    async def wait(event: trio.Event) -> None:
        await event.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, first)
        nursery.start_soon(wait, second)


def _report(state: FileState) -> dict[str, Any]:
    size = state.size if state.lease == LEASE_WRITE else None
    mtime_ns = state.mtime_ns if state.times_dirty else None
    return {"size": size, "mtime_ns": mtime_ns, "atime_ns": state.atime_ns or None}


def _merged(ranges: list[Range]) -> list[Range]:
    """The same bytes in fewer ranges."""
    merged: list[Range] = []
    for offset, length in sorted(ranges):
        if merged and offset <= merged[-1][0] + merged[-1][1]:
            start, size = merged[-1]
            merged[-1] = (start, max(size, offset + length - start))
        else:
            merged.append((offset, length))
    return merged


def _as_ranges(spans: Iterable[tuple[int, int]]) -> list[Range]:
    return [(offset, end - offset) for offset, end in spans]


def without(ranges: list[Range], spans: list[tuple[int, int]]) -> list[Range]:
    """`ranges` (length 0: to the end) less the sorted (offset, end) `spans`."""
    left: list[Range] = []
    for offset, length in ranges:
        end = offset + length if length else None
        for start, stop in spans:
            if stop <= offset or (end is not None and start >= end):
                continue
            if start > offset:
                left.append((offset, start - offset))
            offset = stop
        if end is None:
            left.append((offset, 0))
        elif offset < end:
            left.append((offset, end - offset))
    return left
