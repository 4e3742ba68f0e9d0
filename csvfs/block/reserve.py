"""The reserve: free space that is kept so that a lost drive can be rebuilt at once, and how full a pool is.

Place      block floor. Pure.
Rule       The largest drive of each node, of at most NODES_MAX nodes; but at most a quarter of the pool, so that a pool
           of few drives can be used at all (three nodes of two drives each would keep half of it free). Nothing where
           nothing could be rebuilt anyway: one drive per fault domain, and as many copies as domains.
Guard      New data slabs are refused when they would eat into it. Metadata slabs and repairs may use it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

NODES_MAX = 4
SHARE_MAX = 4  # a quarter
WARN_PERCENT = (70, 80, 90)


@dataclass(slots=True, frozen=True)
class DriveSlots:
    node: str
    domain: str
    slots: int


def reserve_slots(drives: Iterable[DriveSlots], copies: int) -> int:
    """Slots to keep free. `copies`: the most that a volume of the pool has."""
    by_node: dict[str, list[int]] = {}
    by_domain: dict[str, int] = {}
    for drive in drives:
        by_node.setdefault(drive.node, []).append(drive.slots)
        by_domain[drive.domain] = by_domain.get(drive.domain, 0) + 1
    one_each = all(count == 1 for count in by_domain.values())
    if one_each and len(by_domain) <= copies:
        return 0
    largest = sorted((max(slots) for slots in by_node.values()), reverse=True)
    total = sum(sum(slots) for slots in by_node.values())
    return min(sum(largest[:NODES_MAX]), total // SHARE_MAX)


def percent_used(size: int, free: int, reserve: int) -> float:
    """Of what may be used; at 100 writes to new space fail. All in one unit; more than 100: repairs took some."""
    usable = size - reserve
    return 100.0 * (size - free) / usable if usable > 0 else 0.0


def warning_of(percent: float) -> str:
    """One line for administrators; empty: nothing to say."""
    passed = [limit for limit in WARN_PERCENT if percent >= limit]
    if not passed:
        return ""
    if percent >= 100:
        return "the pool is full: writes fail, what is there can be read; delete files or add drives"
    urgency = {70: "plan for more drives", 80: "add drives", 90: "add drives now, or delete files"}[passed[-1]]
    return f"the pool is {percent:.0f} % full: {urgency}"
