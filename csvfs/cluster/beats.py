"""Beats: how the others learn that a node is gone when the store counts its lease anew. Pure.

Place      cluster floor; admin/node_beats.py is the shell around it, under `csvfs node run`.
Why        etcd's leases are in its leader's memory. A new leader counts them all from the beginning, so a node without
           power that led etcd would be counted as gone 3 s after the *election*, not after its last word: 6.1 s in all.
           So a node also writes `beats/<node>`, which is in etcd's log and no leader forgets.
Rules      B1  A node serves for at most `serve_s` after it sent the last beat that was committed (and not longer than its
               lease allows, I5). A beat is committed only while `alive/<node>` stands.
           B2  Who has heard nothing of a node for `gone_s` removes its `alive` by a transaction that holds only if the
               last beat heard is the last one committed. What is heard was committed before, and sent before that: so
               the node has served nothing for at least gone_s - serve_s, whatever was on its way.
           B3  While the store takes nothing, nobody's beats come. So a silence counts only while one's own beats are
               taken, and not at once after a break: all have to be given time to be heard again. A break no longer than
               an election with retries takes delays little, since whoever died in it was silent before.
"""

from dataclasses import dataclass

BEATS = "beats/"
EXTRA_MS = 200  # beats are written to disks, so they may be that much later than renewals
SETTLE_S = 1.0  # after a short break: two beats of everybody


@dataclass(slots=True, frozen=True)
class BeatTimes:
    """All in seconds. interval_s: between two beats. See the module's docstring for the others."""

    interval_s: float
    serve_s: float
    gone_s: float

    @property
    def gap_s(self) -> float:
        """Two committed beats of one node further apart than this are a break."""
        return 2 * self.interval_s + 0.2

    @property
    def short_break_s(self) -> float:
        """An election, 1.2 s and two flushes, with a beat lost before and one after it: 2.4 s of 3.7."""
        return 0.7 * self.gone_s


def beat_times(node_lease_ms: int, heartbeat_ms: int, margin_ms: int) -> BeatTimes:
    """Of nodes with these options."""
    serve_ms = node_lease_ms + EXTRA_MS
    return BeatTimes(heartbeat_ms / 1000, serve_ms / 1000, (serve_ms + margin_ms) / 1000)


class Beats:
    """What one node has heard of the others. Times are those of its own monotonic clock, in seconds."""

    def __init__(self, times: BeatTimes) -> None:
        self._times = times
        self._heard: dict[str, tuple[int, float]] = {}  # node -> revision of its last beat, when it was heard
        self._own_s: float | None = None  # when the last own beat was known to be committed
        self._not_before_s = 0.0

    def committed(self, now_s: float) -> None:
        """A beat of our own was taken by the store."""
        break_s = self._times.gone_s if self._own_s is None else now_s - self._own_s
        if break_s > self._times.gap_s:
            settle_s = SETTLE_S if break_s <= self._times.short_break_s else self._times.gone_s
            self._not_before_s = max(self._not_before_s, now_s + settle_s)
        self._own_s = now_s

    def heard(self, node: str, revision: int, now_s: float) -> None:
        """`node` has beaten; what was heard before is no news."""
        if revision > self._heard.get(node, (0, 0.0))[0]:
            self._heard[node] = (revision, now_s)

    def forget(self, node: str) -> None:
        """Its lease is over, however it ended."""
        self._heard.pop(node, None)

    def silent(self, now_s: float) -> list[tuple[str, int]]:
        """Nodes to be counted as gone (B2, B3), each with the revision of its last beat."""
        if self._own_s is None or now_s - self._own_s > self._times.gap_s or now_s < self._not_before_s:
            return []
        gone_s = self._times.gone_s
        return [(node, revision) for node, (revision, heard_s) in self._heard.items() if now_s - heard_s >= gone_s]
