"""The lease of a node in the cluster store: begun, kept, lost.

Place      admin floor, below node_run.py, which runs the node's processes under it.
Writer     of `alive/<node>`, `nodes/<node>`, `incarnations/<node>`, `beats/<node>` and the liveness page.

Invariants
  N1  The liveness page says at most `time the heartbeat was sent + lease - margin` (I5), nor more than the beats allow
      (cluster/beats.py), where the store is etcd.
"""

import contextlib
import logging
import time
from collections.abc import Iterator

import trio

from csvfs.admin.node_beats import NodeBeats, ServingTime
from csvfs.admin.node_standing import Standing, read_standing
from csvfs.clock import monotonic_ns
from csvfs.cluster.beats import BEATS, beat_times
from csvfs.cluster.liveness import LivenessWriter, serve_until_ns
from csvfs.cluster.membership import View, item_map
from csvfs.config import NodeConfig
from csvfs.errors import Conflict, NotFound, Unavailable
from csvfs.ids import Incarnation
from csvfs.store.interface import ClusterStore, Compare, Item, Put
from csvfs.store.opening import is_etcd
from csvfs.wire.control import pack_value

logger = logging.getLogger(__name__)
RETRY_S = 0.2


class NodeLease:
    """One lease of the node; a lost one stays lost. `id` 0: not begun yet."""

    def __init__(self, config: NodeConfig, store: ClusterStore, view: View) -> None:
        self.id = 0
        self.incarnation = Incarnation(0)
        self._config = config
        self._store = store
        self._view = view
        self._sent_ns = 0
        self._alive_revision = 0
        self._has_beats = is_etcd(config.store)
        self._page: LivenessWriter | None = None
        self._scope: trio.CancelScope | None = None

    def keep(self, nursery: trio.Nursery) -> None:
        """Let the node serve under it, from now on until it is lost; then the nursery is cancelled."""
        self._page = LivenessWriter(self._config.liveness_path, self.incarnation)
        self._scope = nursery.cancel_scope
        serving = ServingTime(self._page, has_beats=self._has_beats)
        if self._has_beats:
            self._start_beats(nursery, serving)
        serving.renewed(self._serve_until_ns(self._sent_ns))
        nursery.start_soon(self._heartbeat_forever, serving)
        nursery.start_soon(self._expire_when_gone)

    def close(self) -> None:
        """Nothing serves under it any more."""
        if self._page is not None:
            self._page.close()

    async def begin(self) -> None:
        """Get a lease and register. Raises Conflict: another machine has this node's name. Cancel safe."""
        key = f"alive/{self._config.node}"
        deadline = trio.current_time() + 2 * self._config.options.node_lease_ms / 1000
        while True:
            with unavailable_logged():
                await self._end_earlier_lease(key, give_up=trio.current_time() > deadline)
                incarnation = await next_incarnation(self._store, self._config.node)
                standing = await self._standing()
                sent_ns = monotonic_ns()
                lease = await self._store.grant_lease(self._config.options.node_lease_ms)
                address = self._config.address
                alive = {"incarnation": incarnation, "address": address, "started": int(time.time())}
                known = await self._store.get(f"nodes/{self._config.node}")
                node = Put(f"nodes/{self._config.node}", pack_value(self._node_value(known)))
                changes = [node, Put(key, pack_value(alive), lease), *standing.changes()]
                if self._has_beats:
                    changes.append(Put(BEATS + self._config.node, b"", lease))
                compares = [Compare(key, 0), Compare(node.key, known.revision if known else 0)]
                compares.append(Compare(f"evicted/{self._config.node}", 0))  # raise_when_evicted ends us then
                compares += standing.compares()
                with contextlib.suppress(NotFound):  # so slow that the lease has ended already
                    begun = await self._store.transact(compares, changes)
                    if begun.succeeded:
                        self.id, self.incarnation = lease, incarnation
                        self._sent_ns, self._alive_revision = sent_ns, begun.revision
                        logger.info("node %s is alive, incarnation %d", self._config.node, incarnation)
                        return
            await trio.sleep(RETRY_S)

    async def _standing(self) -> Standing:
        cluster = item_map(await self._store.get("cluster"))
        limit = cluster.get("quarantine")
        attended = await self._store.get(f"maintenance/{self._config.node}") is not None
        return await read_standing(
            self._store, self._config.node, limit if isinstance(limit, int) else 0, is_attended=attended
        )

    def _node_value(self, known: Item | None) -> dict[str, object]:
        """Its place is what csvfs domain said last; the configuration's counts while nothing was said."""
        value = item_map(known) if known else {}
        place = self._config.place.to_map()
        return {**({"place": place} if place else {}), **value, "address": self._config.address}

    async def _end_earlier_lease(self, key: str, *, give_up: bool) -> None:
        """End what an earlier `node run` of this node left: its children are dead, as they die with it."""
        item = await self._store.get(key)
        if item is None:
            return
        address = item_map(item).get("address")
        if address == self._config.address:
            await self._store.revoke_lease(item.lease)
        elif give_up:
            raise Conflict(f"node {self._config.node} is alive at {address}; give this one another name")

    def _lose(self) -> None:
        assert self._page is not None and self._scope is not None
        self._page.expire()
        if not self._scope.cancel_called:
            logger.error("node %s lost its lease; all its processes are killed", self._config.node)
        self._scope.cancel()

    def _start_beats(self, nursery: trio.Nursery, serving: ServingTime) -> None:
        options = self._config.options
        times = beat_times(options.node_lease_ms, options.heartbeat_ms, options.margin_ms)
        serving.beaten(self._sent_ns + int(times.serve_s * 1e9))
        node, revision = self._config.node, self._alive_revision
        beats = NodeBeats(self._store, node, self.id, revision, times, serving, self._lose)
        nursery.start_soon(beats.beat_forever)
        nursery.start_soon(beats.watch_forever)

    async def _heartbeat_forever(self, serving: ServingTime) -> None:
        interval_s = self._config.options.heartbeat_ms / 1000
        reachable = True
        while True:
            began, sent_ns = trio.current_time(), monotonic_ns()
            try:
                with trio.fail_after(self._config.options.node_lease_ms / 1000):
                    await self._store.keep_alive(self.id)
                serving.renewed(self._serve_until_ns(sent_ns))
                if not reachable:
                    logger.info("the cluster store answers again: node %s serves", self._config.node)
                reachable = True
            except NotFound:
                self._lose()
                return
            except (Unavailable, trio.TooSlowError) as error:
                if reachable:
                    reason = str(error) or "the cluster store does not answer"
                    logger.error(
                        "no heartbeat: %s; serving ends in %.0f ms", reason, max(0, self._remaining_ms(sent_ns))
                    )
                reachable = False
            await trio.sleep_until(began + interval_s)

    async def _expire_when_gone(self) -> None:
        """A lease should not end before its time; where it does (etcd issue 15247: a leader whose disk hung
        revokes what was renewed elsewhere) the others count this node as gone from then on, so it stops then."""

        def is_there() -> bool:
            alive = self._view.alive.get(self._config.node)
            return alive is not None and alive.get("incarnation") == self.incarnation

        await self._view.wait_until(is_there)
        await self._view.wait_until(lambda: not is_there())
        assert self._page is not None
        self._page.expire()

    def _serve_until_ns(self, sent_ns: int) -> int:
        options = self._config.options
        return serve_until_ns(sent_ns, options.node_lease_ms, options.margin_ms)

    def _remaining_ms(self, sent_ns: int) -> float:
        return (self._serve_until_ns(sent_ns) - monotonic_ns()) / 1e6 - self._config.options.heartbeat_ms


async def next_incarnation(store: ClusterStore, node: str) -> Incarnation:
    """A number that no start of any process of `node` has had before. Raises Unavailable."""
    key = f"incarnations/{node}"
    while True:
        item = await store.get(key)
        last = item_map(item).get("last") if item else 0
        if not isinstance(last, int) or last < 0:  # starting over would let fenced numbers come back
            raise Conflict(f"{key} holds no number; restore the cluster store")
        put = Put(key, pack_value({"last": last + 1}))
        if (await store.transact([Compare(key, item.revision if item else 0)], [put])).succeeded:
            return Incarnation(last + 1)


@contextlib.contextmanager
def unavailable_logged() -> Iterator[None]:
    """Swallow Unavailable: the caller tries again, or leaves it to the lease."""
    try:
        yield
    except Unavailable as error:
        logger.warning("%s", error)
