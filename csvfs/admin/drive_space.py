"""How the slots of the drives are used, and which drives are fuller than the rest.

Place      admin floor. Pure.
Words      fullness: used slots of all slots, in percent. A hot spot is a drive that is more than HOT_POINTS fuller
           than the drives that take slabs are together: levelling is under way there, or the fault domains allow no
           more, or a job is paused.
"""

from collections.abc import Iterable
from dataclasses import dataclass

HOT_POINTS = 5.0  # percent of a drive's slots: closer than this counts as level (ARCHITECTURE.md, "Repair")


@dataclass(slots=True, frozen=True)
class DriveFill:
    """`takes_slabs`: it is in use and neither retired nor on its way out."""

    slots: int
    used: int
    takes_slabs: bool

    @property
    def percent(self) -> float:
        return 100.0 * self.used / self.slots if self.slots else 0.0


def pool_percent(fills: Iterable[DriveFill]) -> float:
    """Fullness of the drives that take slabs, together."""
    counted = [fill for fill in fills if fill.takes_slabs]
    slots = sum(fill.slots for fill in counted)
    return 100.0 * sum(fill.used for fill in counted) / slots if slots else 0.0


def hot_points(fill: DriveFill, pool: float) -> float:
    """How many points it is fuller than the pool, when that makes it a hot spot; else 0."""
    points = fill.percent - pool
    return points if fill.takes_slabs and points > HOT_POINTS else 0.0
