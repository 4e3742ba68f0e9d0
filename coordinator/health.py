"""Health: the state of a volume's slabs in numbers, for `volume_status` and `statfs`.

Place      coordinator floor; over slab_book.py. Synchronous.
"""

from collections.abc import Callable, Iterable
from typing import Any

import trio

from coordinator.slab_book import SlabBook
from csvfs.block.placement import DomainOf
from csvfs.fault_domains import misplaced_copies
from csvfs.ids import METADATA_SLAB_ID_MIN
from csvfs.wire.block_messages import ROLE_JOINING, SlabDescriptor

HEALTHY, DEGRADED, NO_REDUNDANCY = "Healthy", "Degraded", "No redundancy"  # admin/status.py knows these words
CACHED_S = 1.0  # counting reads every descriptor: 40,000 take about 200 ms


def state_of(descriptor: SlabDescriptor, wanted: int) -> str:
    """`in sync`, `resyncing`, `degraded` or `no redundancy`, for `wanted` copies.

    While a copy is moved there are more members than are wanted: that is no degradation.
    """
    in_sync = len(descriptor.in_sync)
    if in_sync >= wanted:
        return "in sync"
    if in_sync <= 1:
        return "no redundancy"
    joins = any(member.role == ROLE_JOINING for member in descriptor.members)
    return "resyncing" if joins else "degraded"


class Health:
    """Counts slabs by state, now and then; and those with two copies in one fault domain."""

    def __init__(
        self, books: Iterable[SlabBook], wanted: Callable[[SlabDescriptor], int], domain_of: DomainOf
    ) -> None:
        self._books = list(books)
        self._wanted = wanted
        self._domain_of = domain_of
        self._counted_at = -CACHED_S
        self._counts: dict[str, int] = {}
        self._misplaced = 0
        self._by_copies: dict[str, int] = {}

    def counts(self) -> dict[str, int]:
        """Slabs by state."""
        now = trio.current_time()
        if now - self._counted_at >= CACHED_S:
            counts: dict[str, int] = {}
            misplaced = 0
            by_copies: dict[str, int] = {}
            for book in self._books:
                for descriptor in book.all():
                    wanted = self._wanted(descriptor)
                    state = state_of(descriptor, wanted)
                    counts[state] = counts.get(state, 0) + 1
                    domains = [self._domain_of(member.node) for member in descriptor.in_sync]
                    misplaced += misplaced_copies(domains, wanted) > 0
                    if descriptor.slab < METADATA_SLAB_ID_MIN:
                        has = str(len(descriptor.in_sync))
                        by_copies[has] = by_copies.get(has, 0) + 1
            self._counts, self._by_copies, self._counted_at = counts, by_copies, now
            self._misplaced = misplaced
        return self._counts

    def to_status(self) -> dict[str, Any]:
        counts = self.counts()
        if counts.get("no redundancy"):
            word = NO_REDUNDANCY
        elif counts.get("degraded") or counts.get("resyncing") or self._misplaced:
            word = DEGRADED
        else:
            word = HEALTHY
        return {
            "health": word,
            "slabs": dict(counts),
            "slabs_by_copies": dict(self._by_copies),
            "misplaced": self._misplaced,
        }
