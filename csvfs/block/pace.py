"""Pace: how fast copies are pulled onto a drive, so that the programs that use the pool hardly notice.

Place      block floor, in the drive server. `next_rate` is pure; Pacer keeps its state per drive; Foreground
           measures how long reads and writes of mounts take here.
Feedback   Every INTERVAL_S the rate of a drive's pulls is set anew from how long foreground requests took
           lately, beside how long they take when nothing is pulled: slower than the level allows: half the
           rate; else a quarter more; nobody there: full speed. A floor keeps every repair going to its end.
           The source's foreground counts as well: what is read there is asked for with each interval
           (`load`).
"""

import math
from dataclasses import dataclass

import trio

from csvfs.units import MIB

SPEEDS = ("very low", "low", "medium", "high", "very high")  # as in Storage Spaces
SPEED_DEFAULT = 2
RATE_MIN = 8 * MIB  # bytes per second and drive: a drive of 4 TiB is refilled within 6 days, whatever happens
RATE_MAX = 4096 * MIB  # as good as unlimited
INTERVAL_S = 0.1
# How many times the idle latency foreground requests may take, by level.
SLOWDOWN_MAX = (1.1, 1.25, 1.5, 2.0, 4.0)
# What a level starts from when somebody begins to use the drives that were idle.
RATE_START = (8 * MIB, 16 * MIB, 64 * MIB, 128 * MIB, 256 * MIB)
LAG_US_FREE = 500.0  # a timer may be so late without anybody having waited
# Fewer requests than this in an interval, which took next to nothing, are nobody at work.
REQUESTS_MIN = 5
BUSY_SHARE_MIN = 0.01
_DOWN, _UP = 0.5, 1.25
_BURST_S = 0.05  # what may be taken at once after a wait


def next_rate(level: int, latency_us: float | None, baseline_us: float, rate: float) -> float:
    """Bytes per second for the next interval.

    Args    level: index into SPEEDS. latency_us: mean of foreground requests of the last interval, None:
            there were none. baseline_us: their mean when nothing is pulled. rate: of the last interval.
    """
    if latency_us is None:
        return float(RATE_MAX)
    if rate >= RATE_MAX:  # they have just come: begin from a rate that hurts nobody
        rate = float(RATE_START[level])
    slowed = latency_us > baseline_us * SLOWDOWN_MAX[level]
    return min(max(rate * (_DOWN if slowed else _UP), float(RATE_MIN)), RATE_MAX / 2)


@dataclass(slots=True, frozen=True)
class Load:
    """What foreground requests took in the last interval. `latency_us` None: there were none."""

    latency_us: float | None
    baseline_us: float

    @property
    def slowdown(self) -> float:
        """1.0: as fast as without pulls."""
        return 0.0 if self.latency_us is None else self.latency_us / max(self.baseline_us, 1.0)


class Foreground:
    """How long reads and writes of mounts take here. `note` is on the hot path: two additions.

    The baseline follows what is measured while nothing is pulled, and falls at once when it turns out too
    high; while pulls go on it only drifts up slowly, so that a load that has become heavier for good is not
    blamed on them for ever.
    """

    def __init__(self) -> None:
        self._count = 0
        self._total_ns = 0
        self._lag_us = 0.0
        self._closed_at_s = -math.inf
        self._baseline_us = math.inf
        self.last = Load(None, 1.0)

    def note(self, took_ns: int) -> None:
        """One request of somebody who waits for it."""
        self._count += 1
        self._total_ns += took_ns

    def note_lag(self, lag_s: float) -> None:
        """How much too late this process did something: requests wait as long before they are looked at."""
        self._lag_us = max(self._lag_us, max(0.0, lag_s * 1e6 - LAG_US_FREE))

    def load(self, now_s: float, *, pulling: bool) -> Load:
        """Of the last interval, which is closed when it has lasted INTERVAL_S. pulling: copies were pulled
        onto or from a drive here during it."""
        if now_s - self._closed_at_s < INTERVAL_S * 0.9:
            return self.last
        self._closed_at_s = now_s
        if self._count >= REQUESTS_MIN or self._total_ns / 1e9 > BUSY_SHARE_MIN * INTERVAL_S:
            self.last = self._close(self._total_ns / self._count / 1000 + self._lag_us, pulling=pulling)
        else:
            self.last = Load(None, self.last.baseline_us)
        self._count = self._total_ns = 0
        self._lag_us = 0.0
        return self.last

    def _close(self, latency_us: float, *, pulling: bool) -> Load:
        if latency_us < self._baseline_us:
            self._baseline_us = latency_us
        else:
            self._baseline_us += (latency_us - self._baseline_us) * (0.001 if pulling else 0.2)
        return Load(latency_us, self._baseline_us)


class Pacer:
    """Bytes that may be pulled onto one drive, by all its pulls together."""

    def __init__(self) -> None:
        self.rate = float(RATE_MAX)
        self.level = SPEED_DEFAULT
        self._free_at_s = -math.inf  # when all that was taken has been paid for

    def adjust(self, loads: list[Load]) -> None:
        """Set the rate for the next interval by the worst of `loads`: here, and at the sources."""
        busy = [load for load in loads if load.latency_us is not None]
        worst = max(busy, key=lambda load: load.slowdown, default=Load(None, 1.0))
        self.rate = next_rate(self.level, worst.latency_us, worst.baseline_us, self.rate)

    async def take(self, size: int) -> None:
        """Wait until `size` bytes may be pulled. Cancel safe."""
        now_s = trio.current_time()
        start_s = max(self._free_at_s, now_s - _BURST_S)
        self._free_at_s = start_s + size / self.rate
        if start_s > now_s:
            await trio.sleep(start_s - now_s)
