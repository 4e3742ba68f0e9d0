"""Moves: which of its volumes a host gives up, so that another node takes them, and when.

Place      coordinator floor, under host.py. The shell around cluster/ownership.py: what it remembers of the view.
Order      A node in maintenance, or quarantine, gives all up. Then what somebody asked for (`csvfs volume move`), at once. Then
           preferred nodes that are back, and an even spread: one volume at a time, and only such that are whole,
           for a takeover begins what it repairs anew.
"""

from collections.abc import Callable

import trio

from csvfs.cluster.membership import View
from csvfs.cluster.ownership import Tenures, next_move
from csvfs.ids import NodeName

ASKED_PATIENCE_S = 10.0  # a preferred node that does not take the volume is not moved to again before this
SPREAD_PATIENCE_S = 60.0
INTERVAL_S = 3.0  # after an owner has changed, before the next move of an even spread: a takeover takes less


class Moves:
    """One host's. `look` follows the view; `reason` then says of a volume of this host why it shall go."""

    def __init__(self, node: NodeName, view: View) -> None:
        self._node = node
        self._view = view
        self._tenures = Tenures()
        self._owners: dict[str, NodeName] = {}
        self._changed_at = trio.current_time()
        self._preferred: dict[str, object] = {}
        self._asked: set[str] = set()  # somebody has changed what is preferred
        self._moved_at: dict[str, float] = {}

    def candidates(self) -> list[NodeName]:
        """Hosts that may take volumes: those of nodes in maintenance or quarantine only when there are no others."""
        alive = [node for node in self._view.coordinators if node in self._view.alive]
        aside = self._view.maintenance.keys() | self._view.quarantine.keys()
        return [node for node in alive if node not in aside] or alive

    def look(self) -> None:
        """Take note of the view as it is now."""
        now_s = trio.current_time()
        self._tenures.follow(self.candidates(), self._view.maintenance, now_s)
        owners = {name: NodeName(str(value.get("node"))) for name, value in self._view.owners.items()}
        if owners != self._owners:
            self._owners, self._changed_at = owners, now_s
        preferred = {name: value.get("preferred") for name, value in self._view.volumes.items()}
        self._asked |= {name for name, node in preferred.items() if node != self._preferred.get(name, node)}
        self._asked = {name for name in self._asked if preferred.get(name) not in (None, owners.get(name))}
        self._preferred = preferred
        self._moved_at = {name: at for name, at in self._moved_at.items() if name in preferred}

    def reason(self, name: str, is_whole: Callable[[], bool]) -> str:
        """Why volume `name` of this host shall be given up now; empty: it stays.

        is_whole   whether all its slabs have all their copies: asked only when it matters.
        """
        candidates = self.candidates()
        now_s = trio.current_time()
        moved_s = now_s - self._moved_at.get(name, -SPREAD_PATIENCE_S)
        if self._node not in candidates and candidates:
            return "the node is in maintenance or quarantine" if moved_s >= ASKED_PATIENCE_S else ""
        preferred = self._preferred.get(name)
        steady = self._tenures.steady(now_s)
        if preferred != self._node and preferred in candidates:
            if moved_s < ASKED_PATIENCE_S:
                return ""
            if name in self._asked:
                return f"{preferred} was asked for"
            return f"{preferred} is preferred" if preferred in steady and self._is_quiet(now_s) and is_whole() else ""
        if preferred == self._node or moved_s < SPREAD_PATIENCE_S or not self._is_quiet(now_s):
            return ""
        move = next_move(self._owners, self._pinned(candidates), candidates, steady)
        if move is None or move.giver != self._node or not is_whole():
            return ""
        return f"{move.receiver} has fewer volumes"

    def moved(self, name: str) -> None:
        """It is being given up: nothing else moves before that is over."""
        self._moved_at[name] = self._changed_at = trio.current_time()

    def _is_quiet(self, now_s: float) -> bool:
        is_owned = all(name in self._owners for name in self._view.volumes)
        return is_owned and now_s - self._changed_at >= INTERVAL_S

    def _pinned(self, candidates: list[NodeName]) -> set[str]:
        return {name for name, node in self._preferred.items() if node in candidates}
