"""Writing down how a node came and went, and putting it into quarantine (cluster/departures.py decides).

Place      admin floor, below node_run.py.
Keys       `standing/<node>`     running: a lease of it was begun and not ended in order; departures: when (s)
           `quarantine/<node>`   since (s), why. Its store lease is as long as the quarantine: the store ends it.
Setting    `quarantine` of the key `cluster`: after how many departures within an hour; absent or 0: never. Labs have
           none: there nodes are killed on purpose.
"""

import logging
import time

from csvfs.cluster.departures import QUARANTINE_S, WINDOW_S, Verdict, note_departure, within_window
from csvfs.cluster.membership import item_map
from csvfs.store.interface import ClusterStore, Compare, Delete, Item, Put
from csvfs.wire.control import pack_value

logger = logging.getLogger(__name__)


class Standing:
    """Of one node, as read before it begins a lease."""

    def __init__(self, node: str, item: Item | None, verdict: Verdict, lease: int) -> None:
        self.node = node
        self._item = item
        self._verdict = verdict
        self._lease = lease

    def compares(self) -> list[Compare]:
        return [Compare(f"standing/{self.node}", self._item.revision if self._item else 0)]

    def changes(self) -> list[Put | Delete]:
        """To be made in the transaction that begins the lease."""
        value = {"running": True, "departures": list(self._verdict.departures)}
        changes: list[Put | Delete] = [Put(f"standing/{self.node}", pack_value(value))]
        if self._verdict.is_quarantined:
            why = f"it came and went too often within {WINDOW_S // 60} minutes"
            quarantine = {"since": int(time.time()), "why": why}
            changes.append(Put(f"quarantine/{self.node}", pack_value(quarantine), self._lease))
            logger.error(
                "node %s is quarantined: %s; it gets no volumes and no new slabs for %d minutes, or until csvfs node"
                " resume %s", self.node, why, QUARANTINE_S // 60, self.node,
            )  # fmt: skip
        return changes


async def read_standing(store: ClusterStore, node: str, limit: int, *, is_attended: bool) -> Standing:
    """is_attended: it is in maintenance, where it may go. Raises Unavailable."""
    item = await store.get(f"standing/{node}")
    known = item_map(item)
    listed = known.get("departures")
    departures = [when for when in listed if isinstance(when, int)] if isinstance(listed, list) else []
    now_s = int(time.time())
    if known.get("running") is True and not is_attended:
        verdict = note_departure(departures, now_s, limit)
    else:
        verdict = Verdict(within_window(departures, now_s), False)
    lease = await store.grant_lease(QUARANTINE_S * 1000) if verdict.is_quarantined else 0
    return Standing(node, item, verdict, lease)


async def note_orderly_end(store: ClusterStore, node: str) -> None:
    """This lease ends because somebody wants it to. Raises Unavailable."""
    item = await store.get(f"standing/{node}")
    if item is not None:
        value = {**item_map(item), "running": False}
        await store.transact([Compare(item.key, item.revision)], [Put(item.key, pack_value(value))])
