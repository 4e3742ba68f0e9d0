"""Ownership: which volume moves next, so that coordinators are spread evenly over the nodes.

Place      cluster floor. Pure: functions of the view and of now. coordinator/moves.py carries it out, election.py
           says who takes what was given up.
How        Every host computes the same move from the same view; the one that is to give does. Two that see
           different views may move two volumes at once: that costs a pause, no more.
Hysteresis A volume goes from a node only to one that has two fewer, so afterwards neither has more than before of
           the other. A node that has just come receives nothing before it has stayed for a while (`Tenures`), and
           each time it left the while doubles.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from csvfs.ids import NodeName

STEADY_S = 10.0
STEADY_S_MAX = 320.0
FORGIVEN_S = 3_600.0  # so long ago, a departure does not count any more
GAP_MIN = 2  # with 1 a volume would go to and fro


@dataclass(slots=True)
class _Tenure:
    since_s: float | None = None  # None: it is away
    left_s: list[float] = field(default_factory=list)


class Tenures:
    """Since when each node has been a candidate without a break."""

    def __init__(self) -> None:
        self._nodes: dict[NodeName, _Tenure] = {}

    def follow(self, candidates: Collection[NodeName], excused: Collection[NodeName], now_s: float) -> None:
        """Who is a candidate now. `excused`: whoever of these is none was sent away, and did not drop out."""
        for node in candidates:
            tenure = self._nodes.setdefault(node, _Tenure())
            if tenure.since_s is None:
                tenure.since_s = now_s
        for node, tenure in list(self._nodes.items()):
            tenure.left_s = [left_s for left_s in tenure.left_s if now_s - left_s < FORGIVEN_S]
            if node not in candidates and tenure.since_s is not None:
                tenure.since_s = None
                if node not in excused:
                    tenure.left_s.append(now_s)
            if tenure.since_s is None and not tenure.left_s:
                del self._nodes[node]

    def steady(self, now_s: float) -> set[NodeName]:
        """Who has stayed long enough to be given volumes."""
        return {
            node
            for node, tenure in self._nodes.items()
            if tenure.since_s is not None and now_s - tenure.since_s >= _wanted_s(len(tenure.left_s))
        }


def _wanted_s(departures: int) -> float:
    return float(min(STEADY_S * 2**departures, STEADY_S_MAX))


class Move(NamedTuple):
    """`giver` gives up one volume, and `receiver` is the first candidate for it."""

    giver: NodeName
    receiver: NodeName


def next_move(
    owners: Mapping[str, NodeName],
    pinned: Collection[str],
    candidates: Collection[NodeName],
    steady: Collection[NodeName],
) -> Move | None:
    """The next step towards an even spread; None: it is even, or not known to be worth a move now.

    Args  owners: volume -> node, of all volumes that want one. pinned: volumes that are where somebody wants
          them. candidates: nodes that may take volumes. steady: those of them that have stayed long enough.
    """
    if not candidates or any(owner not in candidates for owner in owners.values()):
        return None  # what has to move comes first
    loads = Counter(dict.fromkeys(candidates, 0))
    loads.update(owners.values())
    receiver = min(candidates, key=lambda node: (loads[node], node))  # as election.decide has it
    if receiver not in steady:
        return None
    can_give = {node for volume, node in owners.items() if volume not in pinned}
    givers = [node for node in can_give if loads[node] >= loads[receiver] + GAP_MIN]
    return Move(min(givers, key=lambda node: (-loads[node], node)), receiver) if givers else None
