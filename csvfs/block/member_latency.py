"""How long members take to answer reads, as one reader sees it: when to ask another one too, and whom last.

Place      block floor, under bus_reads.py. Pure but for the clock.
"""

from collections.abc import Sequence
from statistics import median
from time import monotonic

from csvfs.block.latency import FORGET_S, KindLatency, is_outlier
from csvfs.ids import DriveId

HEDGE_S_UNKNOWN = 0.050  # while nothing is known of the peers
HEDGE_S_MIN = 0.010  # a busy machine takes this long now and then: twice the work would help nobody
HEDGE_S_MAX = 1.0
_HEDGE_FACTOR = 2.0


class MemberLatencies:
    """Of one bus, by drive."""

    def __init__(self) -> None:
        self._of: dict[DriveId, KindLatency] = {}

    def record(self, drive: DriveId, seconds: float) -> None:
        self._of.setdefault(drive, KindLatency()).record(seconds, monotonic())

    def hedge_after_s(self, peers: Sequence[DriveId]) -> float:
        """How long to wait for one member before one of `peers` is asked too: twice what they take at worst."""
        known = [latency.peak for latency in map(self._recent, peers) if latency is not None]
        if not known:
            return HEDGE_S_UNKNOWN
        return min(max(_HEDGE_FACTOR * median(known), HEDGE_S_MIN), HEDGE_S_MAX)

    def slow(self, drives: Sequence[DriveId]) -> set[DriveId]:
        """Those that take much longer than the others. Nothing measured for a minute: they get a new chance."""
        recent = {drive: latency for drive in drives if (latency := self._recent(drive)) is not None}
        return {
            drive
            for drive, latency in recent.items()
            if is_outlier(latency.average, [other.average for peer, other in recent.items() if peer != drive])
        }

    def _recent(self, drive: DriveId) -> KindLatency | None:
        latency = self._of.get(drive)
        return latency if latency is not None and monotonic() - latency.last_at <= FORGET_S else None
