"""What a volume's coordinator says of it to people and to statfs(2): space, health, jobs, sessions, and what waits.

Place      coordinator floor; over the parts of a service, which service.py puts together.
"""

from typing import Any

from coordinator.batches import Batches
from coordinator.healing import Healing
from coordinator.health import HEALTHY, Health
from coordinator.leases import Leases
from coordinator.lost import LostSlabs
from coordinator.lost_blocks import LostBlocks
from coordinator.metadata import Metadata
from coordinator.scrub import Scrub
from coordinator.session_desk import SessionDesk
from coordinator.slab_book import SlabBook
from coordinator.slab_manager import SlabManager
from coordinator.waits import describe_waits
from csvfs.ids import Term
from csvfs.units import BLOCK_SIZE


class VolumeFigures:
    """`books`: of all slabs, the metadata's first. Nothing here waits."""

    def __init__(
        self,
        term: Term,
        metadata: Metadata,
        slabs: SlabManager,
        books: list[SlabBook],
        health: Health,
        healing: Healing,
        desk: SessionDesk,
        leases: Leases,
        lost: LostSlabs,
        lost_blocks: LostBlocks,
        scrub: Scrub,
        batches: Batches,
    ) -> None:
        self._term = term
        self._metadata = metadata
        self._slabs = slabs
        self._books = books
        self._health = health
        self._healing = healing
        self._desk = desk
        self._leases = leases
        self._lost = lost
        self._lost_blocks = lost_blocks
        self._scrub = scrub
        self._batches = batches

    def statfs(self) -> dict[str, int]:
        """Sizes in bytes of one copy."""
        statistics = self._metadata.statfs()
        blocks = statistics.slab_blocks + self._slabs.free_slabs_in_pool() * self._slabs.slab_blocks
        limit = self._metadata.space.limit_blocks
        if limit:
            blocks = min(blocks, limit)
        return {
            "size": blocks * BLOCK_SIZE,
            "free": max(0, blocks - statistics.used_blocks) * BLOCK_SIZE,
            "files": statistics.files + statistics.files_free,
            "files_free": statistics.files_free,
            "name_max": statistics.name_size_max,
        }

    def is_whole(self) -> bool:
        """Whether all slabs have all their copies, and all mounts of before the takeover have come or gone: then
        another coordinator takes over in a moment, and nothing that is under way begins anew."""
        return self._desk.is_open and self._health.to_status()["health"] == HEALTHY

    def waits(self) -> dict[str, Any]:
        """What waits here, and on what: for people."""
        return describe_waits(self._desk, self._leases, self._books, self._lost)

    def status(self) -> dict[str, Any]:
        """The call `volume_status`."""
        counts = self._leases.table.lease_counts()
        sessions = [
            {
                "node": session.node,
                "incarnation": session.incarnation,
                "connected": session.link is not None,
                "leases": counts.get(session.key, 0),
                "open_files": session.open_files,
                "mode": session.mode,
                "why": session.why,
            }
            for session in self._desk.sessions
        ]
        return {
            **self._health.to_status(),
            "jobs": [*self._healing.to_status(), *self._scrub.job_rows()],
            "scrub": {**self._scrub.to_status(), "lost_blocks": self._lost_blocks.count},
            "sessions": sessions,
            "term": self._term,
            "batches": self._batches.batch_count,
            "changes": self._batches.change_count,
        }
