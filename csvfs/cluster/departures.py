"""Quarantine: a node that comes and goes is kept at a distance for a while. Pure.

Place      cluster floor; admin/node_standing.py writes down what this decides.
Departure  A node's lease that ended without an orderly stop, and not while the node was in maintenance. It is counted when
           the node is back. After `limit` of them within WINDOW_S it is quarantined for QUARANTINE_S: it serves, and is
           given no volumes to coordinate and no new slabs while others suffice. Then the count begins anew.
Why        Each departure makes all others wait, and a resync follows; a node with a bad cable would make that a habit.
Clock      The wall clock of the node itself, as a count has to outlive reboots. Nothing that could lose data hangs on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

WINDOW_S = 3600
QUARANTINE_S = 7200
LIMIT_DEFAULT = 3  # departures; of a new cluster
LIMIT_MAX = 100


@dataclass(slots=True, frozen=True)
class Verdict:
    """`departures`: when (s), of the last hour, to be remembered. `is_quarantined`: it begins now."""

    departures: tuple[int, ...]
    is_quarantined: bool


def note_departure(departures: Sequence[int], now_s: int, limit: int) -> Verdict:
    """What one more departure, seen at `now_s`, makes of those before. `limit` 0: nobody is quarantined."""
    recent = (*within_window(departures, now_s), now_s)[-LIMIT_MAX:]
    if 0 < limit <= len(recent):
        return Verdict((), True)
    return Verdict(recent, False)


def within_window(departures: Sequence[int], now_s: int) -> tuple[int, ...]:
    """Those that still count. One of the future is a clock that was set back: it does not."""
    return tuple(when for when in departures if now_s - WINDOW_S < when <= now_s)
