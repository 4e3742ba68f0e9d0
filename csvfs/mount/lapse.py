"""While this mount may not serve, the kernel must not show what it has cached, either (I5).

Place      mount floor; beside recall.py, started by file_table.py.
When       the guard says no: the node's lease has run out, or the coordinator has not been heard for 4 s. Half a second
           later others may be given our leases (cluster/liveness.py, coordinator/eviction.py), and what the kernel
           shows without asking us may be old from then on.
How        names at once, by the epoch; attributes and pages by one thread that goes over all inodes. Pages with a READ or
           WRITE of theirs unanswered are left out, since they would hold it up; nobody is shown them, and they follow
           behind the answer. Files held for writing come last, each for itself: write-back of their mmapped pages may
           have to wait until we serve again.
Leases     stay, if it is only the coordinator that was not heard: whoever was not evicted goes on.
"""

import logging

import trio

from csvfs.mount.file_state import LEASE_READ, LEASE_WRITE, WHOLE_FILE, FileState
from csvfs.mount.leases import Leases
from csvfs.mount.recall import KernelNotifier, Range, without
from csvfs.units import BLOCK_SIZE

log = logging.getLogger(__name__)

_ATTRIBUTES_ALONE = (-1, 0)


class Lapse:
    """`nursery`: outlives all of it."""

    def __init__(self, leases: Leases, notifier: KernelNotifier, nursery: trio.Nursery) -> None:
        self._leases = leases
        self._notifier = notifier
        self._nursery = nursery

    def begin(self) -> None:
        """The guard has just begun to say no."""
        states = [state for state in self._leases.states.values() if max(state.lease, state.inherited) >= LEASE_READ]
        self._leases.mark_all_recalled()  # what is on its way to the kernel is not cached there
        self._notifier.increment_epoch()
        if not states:
            return
        log.warning("this node may not serve now: the kernel's caches of %d inodes are emptied", len(states))
        first: list[tuple[int, int, int]] = []
        for state in states:
            if state.directory:
                first.append((state.ino, *_ATTRIBUTES_ALONE))
                continue
            locked = _locked(state)
            free = without([WHOLE_FILE], sorted(locked))
            if LEASE_WRITE in (state.lease, state.inherited):
                first.append((state.ino, *_ATTRIBUTES_ALONE))
                self._nursery.start_soon(self._take_back, state.ino, free)
            else:
                first += [(state.ino, *pages) for pages in free]
            if locked:
                self._nursery.start_soon(self._take_back, state.ino, [(at, end - at) for at, end in locked])
        self._nursery.start_soon(self._notifier.invalidate_all, first)

    async def _take_back(self, ino: int, ranges: list[Range]) -> None:
        for offset, length in ranges:
            await self._notifier.invalidate_pages(ino, offset, length)


def _locked(state: FileState) -> list[tuple[int, int]]:
    """Pages, as (offset, end) in bytes, that the kernel may keep locked until we answer."""
    spans = [*state.pages_read.values(), *((write.offset, write.end) for write in state.buffered)]
    return [(begin & -BLOCK_SIZE, (end + BLOCK_SIZE - 1) & -BLOCK_SIZE) for begin, end in spans]
