"""How long a drive takes, by kind of operation, and which drive is much slower than its peers.

Place      block floor. Pure: times are arguments, in seconds of one monotonic clock.
Measured   what may wait for the medium: writes into the page cache (slow when the kernel throttles), reads that
           were not in memory, flushes.
Rule       An outlier takes more than RATIO_MIN times the median of its peers and more than `floor_s`. Both: a
           pool of hard disks among which one is twice as slow has none, and so has one of fast flash drives.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from math import exp
from statistics import median

WRITE, READ, FLUSH = "write", "read", "flush"
KINDS = (WRITE, READ, FLUSH)

RATIO_MIN = 10.0
FLOOR_S = 0.050
SLOW_AFTER_S = 30.0
RETIRE_AFTER_S = 300.0
FORGET_S = 60.0  # what was measured longer ago says nothing about now
FRESH_S = 15.0  # a drive becomes an outlier by what was measured within this time: one slow flush makes none
TOLD_MS_MIN = 5  # a tenth of FLOOR_S: what is quicker makes no difference to whether a peer is an outlier
_WEIGHT = 0.1  # of a new sample in the average, at least
_AVERAGE_S = 5.0  # the time that the average is about, where samples are rare: a hang is not believed for minutes
_PEAK_DECAY = 0.98  # of the p99-like peak, with every sample


@dataclass(slots=True)
class KindLatency:
    """Seconds. `peak` decays: about the 99th percentile of the last few hundred samples."""

    average: float = 0.0
    peak: float = 0.0
    count: int = 0
    last_at: float = -FORGET_S

    def record(self, seconds: float, now: float) -> None:
        if self.count == 0 or now - self.last_at > FORGET_S:
            self.average = self.peak = seconds
        else:
            weight = max(_WEIGHT, 1 - exp((self.last_at - now) / _AVERAGE_S))
            self.average += weight * (seconds - self.average)
            self.peak = max(seconds, self.peak * _PEAK_DECAY)
        self.count += 1
        self.last_at = now


@dataclass(slots=True)
class DriveLatency:
    """Of one drive. An operation under way counts with the time it has taken so far, so a hang is seen too."""

    kinds: dict[str, KindLatency] = field(default_factory=lambda: {kind: KindLatency() for kind in KINDS})
    _under_way: dict[int, tuple[str, float]] = field(default_factory=dict)
    _next_token: int = 0
    _writes: int = 0  # of the drive when they were last counted
    _slow_writes: int = 0  # recorded since

    def record(self, kind: str, seconds: float, now: float) -> None:
        self.kinds[kind].record(seconds, now)

    def record_slow_write(self, seconds: float, now: float) -> None:
        """The hot path records only writes that took long; `count_writes` makes up for the others."""
        self._slow_writes += 1
        self.record(WRITE, seconds, now)

    def count_writes(self, total: int, now: float) -> None:
        """`total` writes were done since the drive was opened: those not recorded took next to nothing."""
        fast = total - self._writes - self._slow_writes
        self._writes, self._slow_writes = total, 0
        measured = self.kinds[WRITE]
        if fast > 0:
            if now - measured.last_at > FORGET_S:
                measured.average = measured.peak = 0.0
            measured.average *= (1 - _WEIGHT) ** min(fast, 1000)
            measured.peak *= _PEAK_DECAY ** min(fast, 1000)
            measured.count += fast
            measured.last_at = now

    def begin(self, kind: str, now: float) -> int:
        """An operation that may take long begins; give the token to `end`."""
        self._next_token += 1
        self._under_way[self._next_token] = (kind, now)
        return self._next_token

    def end(self, token: int, now: float) -> None:
        kind, began = self._under_way.pop(token)
        self.kinds[kind].record(now - began, now)

    def longest(self, now: float) -> float:
        """Seconds that what is under way has taken so far, at most."""
        return max((now - began for _, began in self._under_way.values()), default=0.0)

    def current(self, kind: str, now: float, forget_s: float = FORGET_S) -> float | None:
        """Seconds that an operation takes now; None: nothing is known of the last `forget_s`."""
        measured = self.kinds[kind]
        known = measured.average if now - measured.last_at <= forget_s else None
        waiting = [now - began for waiting_kind, began in self._under_way.values() if waiting_kind == kind]
        if not waiting:
            return known
        longest = max(waiting)
        return longest if known is None else max(known, longest)

    def to_map(self, now: float) -> dict[str, dict[str, float]]:
        """For status: milliseconds by kind; kinds of which nothing is known are left out."""
        rows = {}
        for kind in KINDS:
            current = self.current(kind, now)
            if current is not None:
                rows[kind] = {"now_ms": current * 1000, "p99_ms": self.kinds[kind].peak * 1000}
        return rows

    def describe(self) -> str:
        """`write 12 ms, flush 800 ms` of the averages; what takes less than 1 ms is not said."""
        known = [(k, latency.average) for k, latency in self.kinds.items() if latency.average >= 0.001]
        return ", ".join(f"{kind} {average * 1000:.0f} ms" for kind, average in known) or "nothing known"


def is_outlier(own_s: float, peers_s: list[float], floor_s: float = FLOOR_S) -> bool:
    """Whether a latency is much above its peers'. Without peers nobody is an outlier."""
    return bool(peers_s) and own_s > floor_s and own_s > RATIO_MIN * median(peers_s)


def slow_drives(
    latencies: Mapping[int, DriveLatency],
    now: float,
    elsewhere: Mapping[str, list[float]] | None = None,
    floor_s: float = FLOOR_S,
    flagged: Container[int] = (),
) -> set[int]:
    """The drives (by the caller's numbers) that are outliers in some kind of operation.

    Args  elsewhere: by kind the latencies of drives of other nodes, in seconds. flagged: drives that have long been
          outliers, and stay so until something better is measured or all is forgotten.
    """
    slow: set[int] = set()
    for kind in KINDS:
        now_s = {number: latency.current(kind, now) for number, latency in latencies.items()}
        for number, latency in latencies.items():
            own_s = latency.current(kind, now, FORGET_S if number in flagged else FRESH_S)
            if own_s is None or own_s <= floor_s:
                continue
            peers = [other for peer, other in now_s.items() if peer != number and other is not None]
            peers += (elsewhere or {}).get(kind, [])
            if is_outlier(own_s, peers, floor_s):
                slow.add(number)
    return slow


def above_floor(latency: DriveLatency, now: float, floor_s: float = FLOOR_S) -> bool:
    """Whether anything takes so long that the peers are worth asking."""
    return any((latency.current(kind, now) or 0.0) > floor_s for kind in KINDS)


def told_ms(latency: DriveLatency, now: float, before: Mapping[str, int]) -> dict[str, int]:
    """What the other nodes are told: by kind of which anything is known, milliseconds that it takes at most.

    Coarse, and it stays what it was (`before`) until it is clearly wrong, so that it changes seldom: it is told to
    the whole cluster. What is under way is left out for the same reason.
    """
    rows = {}
    for kind, measured in latency.kinds.items():
        if measured.count and now - measured.last_at <= FORGET_S:
            rows[kind] = _told_step(measured.average * 1000, before.get(kind, 0))
    return rows


def _told_step(average_ms: float, before: int) -> int:
    lowest = 0.0 if before == TOLD_MS_MIN else before / 3
    if before and lowest <= average_ms <= before * 1.2:
        return before
    step = TOLD_MS_MIN
    while step < average_ms:
        step *= 2
    return step
