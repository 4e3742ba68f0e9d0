"""Drive watch: how the pool's drives stand, and for how long those that are away have been away.

Place      coordinator floor; over cluster_facts.py and what drive servers answered last (slab_manager.py).
           Synchronous; time comes in as an argument.
Time       Away time is summed up from a monotonic clock and recorded with the jobs (job_record.py) now and
           then: a coordinator that takes over goes on from there, and no wall clock is involved.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from coordinator.cluster_facts import ClusterFacts
from coordinator.repair_plan import AWAY_TOO_LONG, STAYS, UNKNOWN, Standing
from csvfs.block.placement import DriveSpace
from csvfs.ids import DriveId, NodeName
from csvfs.wire.block_messages import Member


@dataclass(slots=True)
class _Away:
    since_s: float  # on our clock
    before_ms: int  # as earlier coordinators counted


class DriveWatch:
    """`spaces`: the drives in order as their servers said last, whatever their usage.

    retire_after_s   how long a drive may be away before it is counted as lost.
    """

    def __init__(
        self, facts: ClusterFacts, spaces: Callable[[], Collection[DriveSpace]], retire_after_s: float
    ) -> None:
        self._facts = facts
        self._spaces = spaces
        self._retire_after_s = retire_after_s
        self._away: dict[DriveId, _Away] = {}
        self._serving: dict[DriveId, DriveSpace] = {}
        self._now_s = 0.0

    def load(self, away_ms: dict[DriveId, int], now_s: float) -> None:
        """What the coordinator before us had counted: a drive that is here after all is forgotten by
        `update`."""
        self._away = {drive: _Away(now_s, before_ms) for drive, before_ms in away_ms.items()}

    def update(self, now_s: float) -> None:
        """Look at the view and the servers' last answers."""
        self._now_s = now_s
        self._serving = {
            space.drive: space for space in self._spaces() if self._facts.server(space.node) is not None
        }
        for drive in self._facts.view.drives:
            if drive in self._serving:
                self._away.pop(drive, None)
            elif drive not in self._away or self._is_held(drive):
                self._away[drive] = _Away(now_s, 0)
        for drive in [drive for drive in self._away if drive not in self._facts.view.drives]:
            del self._away[drive]

    def _is_held(self, drive: DriveId) -> bool:
        """It or its node is away on purpose: that time does not count."""
        node = self._facts.node_of(drive)
        return self._facts.is_attended(drive) or (node is not None and self._facts.in_maintenance(node))

    def away_ms(self) -> dict[DriveId, int]:
        """For the record: what each drive that is away has been away for."""
        enough_s = self._retire_after_s
        return {d: round(min(self._away_s(away), enough_s) * 1000) for d, away in self._away.items()}

    def _away_s(self, away: _Away) -> float:
        return away.before_ms / 1000 + self._now_s - away.since_s

    def standing(self, member: Member) -> Standing:
        """As of the last `update`."""
        drive = member.drive
        space = self._serving.get(drive)
        leaving, lost_in_s = STAYS, None
        if drive not in self._facts.view.drives:
            leaving = UNKNOWN
        elif self._facts.usage(drive) is not None:
            leaving = str(self._facts.usage(drive))
        elif space is None:
            away = self._away.get(drive)
            lost_in_s = max(0.0, self._retire_after_s - (0.0 if away is None else self._away_s(away)))
            leaving = AWAY_TOO_LONG if lost_in_s <= 0 else STAYS
        return Standing(
            domain=self._facts.domain_of(member.node),
            # A drive without a key is served until its server starts anew, but nobody may count on it.
            serves=space is not None,
            leaving=leaving,
            fullness=0.0 if space is None else space.fullness,
            lost_in_s=lost_in_s,
        )

    def signature(self) -> object:
        """Equal as long as no plan can have changed because of a drive."""
        return (
            frozenset(self._serving),
            frozenset((d, self._facts.usage(d), self._facts.takes_slabs(d)) for d in self._facts.view.drives),
            frozenset(d for d, away in self._away.items() if self._away_s(away) >= self._retire_after_s),
            frozenset((node, self._facts.domain_of(node)) for node in self._facts.drive_nodes()),
            frozenset(self._facts.view.maintenance),
            frozenset(self._facts.view.quarantine),
        )

    def next_loss_s(self) -> float | None:
        """In how many seconds the next drive that is away will count as lost."""
        left = [self._retire_after_s - self._away_s(away) for away in self._away.values()]
        return min((seconds for seconds in left if seconds > 0), default=None)

    def candidates(self) -> list[DriveSpace]:
        """Drives that serve and take slabs."""
        return [
            space
            for drive, space in self._serving.items()
            if self._facts.takes_slabs(drive) and not self._facts.is_aside(space.node)
        ]

    def nodes_that_stay(self) -> set[NodeName]:
        """Nodes with a drive whose copies are to stay, up or down."""
        nodes = (self._facts.node_of(d) for d in self._facts.view.drives if self._facts.stays(d))
        return {node for node in nodes if node is not None}
