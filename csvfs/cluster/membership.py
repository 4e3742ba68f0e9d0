"""Membership: what this process knows of the cluster, kept up to date from the cluster store.

Place      cluster floor; the trio shell around a dict per kind of key (ARCHITECTURE.md, "Cluster store
           keys").
Writer     `keep_view_forever` alone; everybody else reads `View`, whose tables change only between awaits.
Cost       one watch per process.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar

import trio

from csvfs.cluster.beats import BEATS
from csvfs.errors import CsvfsError, Unavailable
from csvfs.ids import DriveId, NodeName, Term, id_bytes
from csvfs.store.interface import Change, ClusterStore, Item
from csvfs.wire.control import unpack_value

logger = logging.getLogger(__name__)
RETRY_INTERVAL_S = 0.2

Map = dict[str, Any]
T = TypeVar("T")


class View:
    """The cluster as last heard. Values are the maps of the store, as they are; treat them as read-only.

    After a partition a view is old until the store can be reached again: it says what was, never what is.
    What must not be wrong is decided by compare-and-swap in the store, by fences and by the liveness page.
    """

    def __init__(self) -> None:
        self.cluster: Map | None = None
        self.pool: Map | None = None
        self.nodes: dict[NodeName, Map] = {}
        self.alive: dict[NodeName, Map] = {}
        self.servers: dict[NodeName, Map] = {}
        self.coordinators: dict[NodeName, Map] = {}
        self.drives: dict[DriveId, Map] = {}
        self.volumes: dict[str, Map] = {}
        self.owners: dict[str, Map] = {}
        self.maintenance: dict[NodeName, Map] = {}  # nodes that are drained or paused
        self.evicted: dict[NodeName, Map] = {}  # must not start any more
        self.quarantine: dict[NodeName, Map] = {}  # nodes that come and go: see cluster/departures.py
        self.terms: dict[str, Term] = {}
        self.revision = 0  # of the last change heard
        self.ready = trio.Event()  # the store has been read once
        self._callbacks: list[Callable[[], None]] = []
        self._changed = trio.Event()
        self._tables: dict[str, tuple[dict[Any, Any], Callable[[str], Any]]] = {
            "nodes": (self.nodes, NodeName),
            "alive": (self.alive, NodeName),
            "servers": (self.servers, NodeName),
            "coordinators": (self.coordinators, NodeName),
            "drives": (self.drives, _drive_id),
            "volumes": (self.volumes, str),
            "owner": (self.owners, str),
            "maintenance": (self.maintenance, NodeName),
            "evicted": (self.evicted, NodeName),
            "quarantine": (self.quarantine, NodeName),
        }

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback()` called, synchronously, after each batch of changes; returns what undoes that."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    async def wait_changed(self) -> None:
        """Wait for the next batch of changes after this call."""
        await self._changed.wait()

    async def wait_until(self, condition: Callable[[], T], timeout_s: float = math.inf) -> T:
        """Wait until `condition()` is true, looking after each batch; returns what it returned.

        Raises   trio.TooSlowError after `timeout_s`.
        """
        with trio.fail_after(timeout_s):
            while not (result := condition()):
                await self._changed.wait()
        return result

    def apply(self, changes: list[Change]) -> None:
        """Take over changes of the store, then tell everybody who waits. Beats are no news: they come all the time."""
        news = not changes
        for change in changes:
            self.revision = max(self.revision, change.revision)
            if not change.key.startswith(BEATS):
                news = True
                self._apply_one(change.key, change.item.value if change.item else None)
        if not news:
            return
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        for callback in list(self._callbacks):
            callback()

    def _apply_one(self, key: str, packed: bytes | None) -> None:
        kind, _, name = key.partition("/")
        try:
            value = _unpack_map(packed)
            if key == "cluster":
                self.cluster = value
            elif key == "pool":
                self.pool = value
            elif kind == "term":
                self._apply_term(name, value)
            elif kind in self._tables:
                table, to_id = self._tables[kind]
                if value is None:
                    table.pop(to_id(name), None)
                else:
                    table[to_id(name)] = value
        except (CsvfsError, ValueError, TypeError) as error:
            # Somebody wrote nonsense under a key; the others must not suffer, and the key is as good as
            # absent.
            logger.error("cluster store key %s is malformed and ignored: %s", key, error)

    def _apply_term(self, volume_name: str, value: Map | None) -> None:
        if value is None:
            self.terms.pop(volume_name, None)
        else:
            self.terms[volume_name] = Term(int(value.get("term", 0)))


def _drive_id(text: str) -> DriveId:
    return DriveId(id_bytes(bytes.fromhex(text)))


def _unpack_map(packed: bytes | None) -> Map | None:
    if packed is None:
        return None
    value = unpack_value(packed)
    if not isinstance(value, dict):
        raise ValueError(f"a map was expected, not {type(value).__name__}")
    return value


def item_map(item: Item | None) -> Map:
    """The map in an item of the store; {} when it is absent or malformed."""
    try:
        return _unpack_map(item.value if item else None) or {}
    except (CsvfsError, ValueError):
        return {}


async def keep_view_forever(
    store: ClusterStore, view: View, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Keep `view` up to date until cancelled; started once the store has been read.

    While the store cannot be reached it waits, and the view stays as it was.
    """
    while True:
        try:
            async with store.watch("") as changes:
                # What changes between entering and the list comes twice; the second time it changes nothing.
                items = await store.list("")
                view.apply([Change(item.key, item, item.revision) for item in items])
                view.ready.set()
                task_status.started()
                async for batch in changes:
                    view.apply(batch)
        except Unavailable as error:
            if view.ready.is_set():
                raise  # an open watch waits by itself; this is a store handle that was closed
            logger.warning("cluster store: %s; trying again", error)
            await trio.sleep(RETRY_INTERVAL_S)
