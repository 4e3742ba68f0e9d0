"""While this mount may not serve, the kernel must not show what it has cached, either (I5).

Place      mount floor; beside recall.py, started by file_table.py.
When       the guard says no: the node's lease has run out, or the coordinator has not been heard for 4 s. Half a second
           later others may be given our leases (cluster/liveness.py, coordinator/eviction.py), and what the kernel
           shows without asking us may be old from then on.
How        names at once, by the epoch; attributes and pages by a thread that goes over all inodes. Pages with a READ or
           WRITE of theirs unanswered are left out, since they would hold it up; nobody is shown them, and they follow
           behind the answer. A program may ask for a page meanwhile: a thread that is held up by one (STUCK_S) is left
           to itself, and another one goes on without it. Whoever asks waits from then on, so that ends. Files held for
           writing come each for itself: write-back of their mmapped pages may have to wait until we serve again.
Emptied    is said when all but that is done: then the parent may keep the session for the next process, however long that
           takes (held_session.py). Files held for writing are waited for WRITTEN_S: their dirty pages can only go
           when somebody takes them.
Leases     stay, if it is only the coordinator that was not heard: whoever was not evicted goes on.
"""

import logging
from collections.abc import Callable

import trio

from csvfs.mount.file_state import LEASE_READ, LEASE_WRITE, WHOLE_FILE, FileState
from csvfs.mount.leases import Leases
from csvfs.mount.recall import KernelNotifier, without
from csvfs.units import BLOCK_SIZE

log = logging.getLogger(__name__)

_ATTRIBUTES_ALONE = (-1, 0)
WRITTEN_S = 0.3
SLICE = 256  # inodes: some milliseconds
STUCK_S = 0.25
TRIES_MAX = 20  # each that is held up leaves a thread behind
TRIES_OF_WRITTEN = 3


class Lapse:
    """`nursery`: outlives all of it."""

    def __init__(
        self,
        leases: Leases,
        notifier: KernelNotifier,
        nursery: trio.Nursery,
        serving: Callable[[], bool],
        on_emptied: Callable[[bool], None],
    ) -> None:
        """serving: what the guard says. on_emptied: whether the kernel shows nothing that it has cached."""
        self._leases = leases
        self._notifier = notifier
        self._nursery = nursery
        self._serving = serving
        self._on_emptied = on_emptied
        self._round = 0
        self.emptied = trio.Event()

    def over(self) -> None:
        """Just before this mount serves again."""
        self._round += 1
        if self.emptied.is_set():
            self.emptied = trio.Event()
        self._on_emptied(False)

    def begin(self) -> None:
        """The guard has just begun to say no."""
        self._round += 1
        states = [state for state in self._leases.states.values() if max(state.lease, state.inherited) >= LEASE_READ]
        self._leases.mark_all_recalled()  # what is on its way to the kernel is not cached there
        self._notifier.increment_epoch()
        if states:
            log.warning("this node may not serve now: the kernel's caches of %d inodes are emptied", len(states))
        for state in states:
            for offset, end in _locked(state) if state.has_pages else []:
                self._nursery.start_soon(self._take_back, state.ino, offset, end - offset)
        self._nursery.start_soon(self._empty, self._round, states)

    async def _empty(self, number: int, states: list[FileState]) -> None:
        written = [state for state in states if LEASE_WRITE in (state.lease, state.inherited) and state.has_pages]
        left = len(written)
        done = trio.Event()

        async def empty_written(state: FileState) -> None:
            nonlocal left
            await self._empty_slice([state], TRIES_OF_WRITTEN)
            left -= 1
            if not left:
                done.set()

        await self._notifier.invalidate_all([(state.ino, *_ATTRIBUTES_ALONE) for state in states])
        for state in written:
            self._nursery.start_soon(empty_written, state)
        of_writers = set(written)
        others = [state for state in states if state.has_pages and state not in of_writers]
        is_empty = True
        for first in range(0, len(others), SLICE):
            is_empty = await self._empty_slice(others[first : first + SLICE]) and is_empty
        with trio.move_on_after(WRITTEN_S if written else 0):
            await done.wait()
        if is_empty and number == self._round and not self._serving():
            self._on_emptied(True)
            self.emptied.set()

    async def _empty_slice(self, states: list[FileState], tries: int = TRIES_MAX) -> bool:
        """Whether nothing is cached of them any more that somebody could be shown."""
        for _ in range(tries):
            ranges = [
                (state.ino, *pages) for state in states for pages in without([WHOLE_FILE], sorted(_locked(state)))
            ]
            with trio.move_on_after(STUCK_S):
                await self._notifier.invalidate_all(ranges)
                return True
        return False

    async def _take_back(self, ino: int, offset: int, length: int) -> None:
        await self._notifier.invalidate_pages(ino, offset, length)


def _locked(state: FileState) -> list[tuple[int, int]]:
    """Pages, as (offset, end) in bytes, that the kernel may keep locked until we answer."""
    spans = [*state.pages_read.values(), *((write.offset, write.end) for write in state.buffered)]
    return [(begin & -BLOCK_SIZE, (end + BLOCK_SIZE - 1) & -BLOCK_SIZE) for begin, end in spans]
