"""`csvfs node run`: holds the node's lease in the cluster store, and runs the node's processes under it.

Place      admin floor. Starts `csvfs.block.drive_server`, `coordinator.host` and `csvfs.mount.process` by
           name.
Writer     of `alive/<node>`, `nodes/<node>`, `incarnations/<node>` and the liveness page. It deletes what its
           children wrote (`servers/`, `coordinators/`, `owner/`) as soon as they are dead: nobody waits for a
           timeout.
Children   get CSVFS_CONFIG, CSVFS_NODE_LEASE (attach your keys to it), CSVFS_NODE_INCARNATION (of the lease:
           give it to Liveness), CSVFS_INCARNATION (of this start of this child; grows), CSVFS_ROLE.

Invariants
  N1  The liveness page says at most `time the heartbeat was sent + lease - margin` (I5).
  N2  A lease that is lost stays lost: the page is closed, every child killed and reaped before the next
      lease.
"""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import trio

from csvfs.admin.child import Child, ChildPlan, bound_log
from csvfs.admin.claim_watch import claim_forever
from csvfs.admin.cluster_root import ClusterRoot
from csvfs.admin.evicted_watch import raise_when_evicted
from csvfs.admin.mount_keeper import MountKeeper
from csvfs.admin.node_standing import Standing, note_orderly_end, read_standing
from csvfs.admin.reach_watch import report_reach_forever
from csvfs.admin.run_lock import run_dir_lock
from csvfs.admin.store_member import store_member
from csvfs.clock import monotonic_ns
from csvfs.cluster.election import release_earlier_hosts, release_host
from csvfs.cluster.liveness import Liveness, LivenessWriter, serve_until_ns
from csvfs.cluster.membership import View, item_map, keep_view_forever
from csvfs.cluster.node_process import (
    INCARNATION_ENVIRONMENT,
    LEASE_ENVIRONMENT,
    NODE_INCARNATION_ENVIRONMENT,
    ROLE_ENVIRONMENT,
)
from csvfs.config import CONFIG_ENVIRONMENT, NodeConfig, check_name, load_config
from csvfs.errors import BadRequest, Conflict, CsvfsError, NotFound, Unavailable
from csvfs.ids import Incarnation
from csvfs.store.interface import ClusterStore, Compare, Delete, Item, Put
from csvfs.store.opening import etcd_place, is_etcd, open_store
from csvfs.wire.control import pack_value

logger = logging.getLogger(__name__)
RETRY_S = 0.2
LOG_CHECK_S = 5.0

ROLE_DRIVES, ROLE_COORDINATOR, ROLE_MOUNT, ROLE_DESK = "drives", "coordinator", "mount", "desk"


@dataclass(slots=True, frozen=True)
class Commands:
    """What the roles of a node run; replaced in tests. The volume's name is appended to `mount`."""

    drives: tuple[str, ...] = (sys.executable, "-m", "csvfs.block.drive_server")
    coordinator: tuple[str, ...] = (sys.executable, "-m", "coordinator.host")
    mount: tuple[str, ...] = (sys.executable, "-m", "csvfs.mount.process")
    desk: tuple[str, ...] = (sys.executable, "-m", "csvfs.admin.join_desk")


async def run_node(config: NodeConfig, commands: Commands | None = None) -> None:
    """Run this node until SIGTERM or SIGINT, then stop it in order: mounts, coordinator, drives, lease.

    Raises   Conflict: another `node run` has this run_dir, or this node name. Evicted. BadRequest: the store's URL.
    Cancel   kills the children and leaves the keys to the lease's end.
    """
    config.log_dir.mkdir(parents=True, exist_ok=True)
    stopping = trio.Event()
    with (
        _plain_errors(),
        run_dir_lock(config.run_dir),
        trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
    ):
        async with store_member(config, ROLE_ENVIRONMENT), _opened_store(config.store, signals) as store:
            if store is None:
                return
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_stop_on_signal, signals, stopping)
                nursery.start_soon(_bound_logs_forever, config)
                if config.witness:
                    await _be_witness(config, store, stopping)
                    nursery.cancel_scope.cancel()
                    return
                view = View()
                nursery.start_soon(keep_view_forever, store, view)
                nursery.start_soon(raise_when_evicted, config, store, view)
                root = ClusterRoot(config.cluster_root)
                root.open()
                while not stopping.is_set():
                    await _NodeLease(config, store, view, commands or Commands(), root).run(stopping)
                root.close()
                nursery.cancel_scope.cancel()


async def _be_witness(config: NodeConfig, store: ClusterStore, stopping: trio.Event) -> None:
    """Run the member of the cluster store and nothing else, until `stopping`. Raises Evicted."""
    logger.info("node %s is a witness: it runs a member of the cluster store alone", config.node)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raise_when_evicted, config, store, View())
        await stopping.wait()
        nursery.cancel_scope.cancel()


class _NodeLease:
    """One lease of the node and everything that runs under it."""

    def __init__(
        self, config: NodeConfig, store: ClusterStore, view: View, commands: Commands, root: ClusterRoot
    ) -> None:
        self._config = config
        self._root = root
        self._store = store
        self._view = view
        self._commands = commands
        self._lease = 0
        self._incarnation = Incarnation(0)
        self._children: dict[str, Child] = {}  # drives, coordinator
        self._mounts: dict[str, tuple[object, Child]] = {}  # volume name -> volume id, its mount
        self._poked = trio.Event()

    async def run(self, stopping: trio.Event) -> None:
        """Returns when `stopping` is set and all is stopped, or when the lease was lost and all is dead."""
        with trio.CancelScope() as asked:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when, stopping, asked)
                sent_ns = await self._begin()
                nursery.cancel_scope.cancel()
        if not self._lease:
            return  # asked to stop before there was a lease
        page = LivenessWriter(self._config.liveness_path, self._incarnation)
        page.serve_until(self._serve_until_ns(sent_ns))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._heartbeat_forever, page, nursery.cancel_scope)
                nursery.start_soon(self._expire_when_gone, page)
                nursery.start_soon(self._run_child, ROLE_DRIVES, self._commands.drives, self._drives_died)
                nursery.start_soon(
                    self._run_child, ROLE_COORDINATOR, self._commands.coordinator, self._host_died
                )
                if has_desk(self._config):
                    nursery.start_soon(self._run_child, ROLE_DESK, self._commands.desk)
                nursery.start_soon(claim_forever, self._config, self._store, self._view, self._lease)
                nursery.start_soon(report_reach_forever, self._config, self._store, self._view, self._lease)
                with trio.CancelScope() as mounting:
                    nursery.start_soon(_cancel_when, stopping, mounting)
                    await self._keep_mounts_forever(nursery)
                await self._stop_in_order()
                nursery.cancel_scope.cancel()
        finally:
            page.close()

    # The lease

    async def _begin(self) -> int:
        """Get a lease and register; returns when (CLOCK_MONOTONIC, ns) the lease was asked for."""
        key = f"alive/{self._config.node}"
        deadline = trio.current_time() + 2 * self._config.options.node_lease_ms / 1000
        while True:
            with _unavailable_logged():
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
                compares = [Compare(key, 0), Compare(node.key, known.revision if known else 0)]
                compares.append(Compare(f"evicted/{self._config.node}", 0))  # raise_when_evicted ends us then
                compares += standing.compares()
                with contextlib.suppress(NotFound):  # so slow that the lease has ended already
                    if (await self._store.transact(compares, changes)).succeeded:
                        self._lease, self._incarnation = lease, incarnation
                        logger.info("node %s is alive, incarnation %d", self._config.node, incarnation)
                        return sent_ns
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

    async def _heartbeat_forever(self, page: LivenessWriter, scope: trio.CancelScope) -> None:
        interval_s = self._config.options.heartbeat_ms / 1000
        reachable = True
        while True:
            began, sent_ns = trio.current_time(), monotonic_ns()
            try:
                with trio.fail_after(self._config.options.node_lease_ms / 1000):
                    await self._store.keep_alive(self._lease)
                page.serve_until(self._serve_until_ns(sent_ns))
                if not reachable:
                    logger.info("the cluster store answers again: node %s serves", self._config.node)
                reachable = True
            except NotFound:
                page.expire()
                logger.error("node %s lost its lease; all its processes are killed", self._config.node)
                scope.cancel()
                return
            except (Unavailable, trio.TooSlowError) as error:
                if reachable:
                    reason = str(error) or "the cluster store does not answer"
                    logger.error(
                        "no heartbeat: %s; serving ends in %.0f ms", reason, max(0, self._remaining_ms(sent_ns))
                    )
                reachable = False
            await trio.sleep_until(began + interval_s)

    async def _expire_when_gone(self, page: LivenessWriter) -> None:
        """A lease should not end before its time; where it does (etcd issue 15247: a leader whose disk hung
        revokes what was renewed elsewhere) the others count this node as gone from then on, so it stops then."""

        def is_there() -> bool:
            alive = self._view.alive.get(self._config.node)
            return alive is not None and alive.get("incarnation") == self._incarnation

        await self._view.wait_until(is_there)
        await self._view.wait_until(lambda: not is_there())
        page.expire()

    def _serve_until_ns(self, sent_ns: int) -> int:
        options = self._config.options
        return serve_until_ns(sent_ns, options.node_lease_ms, options.margin_ms)

    def _remaining_ms(self, sent_ns: int) -> float:
        return (self._serve_until_ns(sent_ns) - monotonic_ns()) / 1e6 - self._config.options.heartbeat_ms

    # Children

    def _plan(self, role: str, argv: tuple[str, ...]) -> ChildPlan:
        def environment(incarnation: Incarnation) -> dict[str, str]:
            return os.environ | {
                CONFIG_ENVIRONMENT: str(self._config.path),
                LEASE_ENVIRONMENT: str(self._lease),
                NODE_INCARNATION_ENVIRONMENT: str(self._incarnation),
                INCARNATION_ENVIRONMENT: str(incarnation),
                ROLE_ENVIRONMENT: role.partition("-")[0],
                "PYTHONUNBUFFERED": "1",
            }

        async def incarnation() -> Incarnation:
            while True:
                with _unavailable_logged():
                    return await next_incarnation(self._store, self._config.node)
                await trio.sleep(RETRY_S)

        log_path = self._config.log_dir / f"{role}.log"
        backoff_max_s = self._config.options.restart_backoff_max_ms / 1000
        hang_s, frozen_s = self._config.options.hang_ms / 1000, self._config.options.frozen_ms / 1000
        return ChildPlan(role, list(argv), environment, incarnation, log_path, backoff_max_s, hang_s, frozen_s)

    async def _run_child(self, role: str, argv: tuple[str, ...], after: Callable | None = None) -> None:
        plan = self._plan(role, argv)
        plan.after = after or plan.after
        if role == ROLE_COORDINATOR:
            plan.before = self._bury_hosts
        child = self._children[role] = Child(plan)
        await child.keep_running()

    async def _drives_died(self, incarnation: Incarnation) -> None:
        await self._until_done(lambda: self._delete_own(f"servers/{self._config.node}", incarnation))

    async def _host_died(self, incarnation: Incarnation) -> None:
        async def bury() -> None:
            await release_host(self._store, self._config.node, incarnation)
            await self._delete_own(f"coordinators/{self._config.node}", incarnation)

        await self._until_done(bury)

    async def _bury_hosts(self, incarnation: Incarnation) -> None:
        """What `_host_died` had no time for, because the store could not be reached."""
        await self._until_done(lambda: release_earlier_hosts(self._store, self._config.node, incarnation))

    async def _until_done(self, action: Callable) -> None:
        """After a death Child bounds it by a deadline; what is not deleted then goes with the node's lease."""
        while True:
            with _unavailable_logged():
                await action()
                return
            await trio.sleep(RETRY_S)

    async def _delete_own(self, key: str, incarnation: Incarnation) -> None:
        item = await self._store.get(key)
        if item is not None and item_map(item).get("incarnation") == incarnation:
            await self._store.transact([Compare(key, item.revision)], [Delete(key)])

    # Mounts

    async def _keep_mounts_forever(self, nursery: trio.Nursery) -> None:
        """One mount for each volume that is online; a volume made again under an old name gets a new one."""
        forget = self._view.on_change(self._poke)
        try:
            while True:
                self._poked = trio.Event()
                wanted = {
                    name: volume.get("id")
                    for name, volume in self._view.volumes.items()
                    if volume.get("state") == "online" and _is_volume_name(name)
                }
                for name, (volume_id, child) in list(self._mounts.items()):
                    if wanted.get(name) != volume_id:
                        nursery.start_soon(self._end_mount, name, child)
                for name in sorted(set(wanted) - set(self._mounts)):
                    keeper, child = self._mount_child(name)
                    self._mounts[name] = (wanted[name], child)
                    nursery.start_soon(keeper.look_after, child)
                await self._poked.wait()
        finally:
            forget()

    def _poke(self) -> None:
        self._poked.set()

    def _mount_child(self, volume_name: str) -> tuple[MountKeeper, Child]:
        plan = self._plan(f"{ROLE_MOUNT}-{volume_name}", (*self._commands.mount, volume_name))
        keeper = MountKeeper(self._root, volume_name, Liveness(self._config.liveness_path, self._incarnation).may_serve)
        keeper.adapt(plan)
        return keeper, Child(plan)

    async def _end_mount(self, volume_name: str, child: Child) -> None:
        await child.stop(self._config.options.stop_timeout_ms / 1000)
        if self._mounts.get(volume_name, (None, None))[1] is child:
            del self._mounts[volume_name]
            self._root.remove_point(volume_name)
        self._poke()

    async def _stop_in_order(self) -> None:
        """Mounts first, as they flush through the others; then the coordinator, which writes to drives."""
        grace_s = self._config.options.stop_timeout_ms / 1000
        async with trio.open_nursery() as nursery:
            for name, (_, child) in list(self._mounts.items()):
                nursery.start_soon(self._end_mount, name, child)
        for role in (ROLE_DESK, ROLE_COORDINATOR, ROLE_DRIVES):
            if role in self._children:
                await self._children[role].stop(grace_s)
        with _unavailable_logged():
            await note_orderly_end(self._store, self._config.node)
            await self._store.revoke_lease(self._lease)


def has_desk(config: NodeConfig) -> bool:
    """Whether this node can let others in: it has the CA's key."""
    return is_etcd(config.store) and etcd_place(config.store).ca_key_path.exists()


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


def _is_volume_name(name: str) -> bool:
    """The name becomes a directory below cluster_root: `..` in the store must not make it another one."""
    try:
        check_name(name, "volume")
    except BadRequest as error:
        logger.error("%s; not mounted", error)
        return False
    return True


@contextlib.contextmanager
def _unavailable_logged() -> Iterator[None]:
    """Swallow Unavailable: the caller tries again, or leaves it to the lease."""
    try:
        yield
    except Unavailable as error:
        logger.warning("%s", error)


@contextlib.asynccontextmanager
async def _opened_store(url: str, signals: AsyncIterator[int]) -> AsyncIterator[ClusterStore | None]:
    """The store, as soon as it can be opened; None: a signal came first."""
    store: ClusterStore | None = None
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            await anext(signals)
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up)
        while store is None:
            with _unavailable_logged():
                store = open_store(url)
                break
            await trio.sleep(RETRY_S)
        nursery.cancel_scope.cancel()
    try:
        yield store
    finally:
        if store is not None:
            await store.close()


async def _stop_on_signal(signals: AsyncIterator[int], stopping: trio.Event) -> None:
    number = await anext(signals)
    logger.info("%s: stopping", signal.Signals(number).name)
    stopping.set()


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def _bound_logs_forever(config: NodeConfig) -> None:
    while True:
        for path in config.log_dir.glob("*.log"):
            await trio.to_thread.run_sync(bound_log, path, config.options.log_size_max_kib * 1024)
        await trio.sleep(LOG_CHECK_S)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """A CsvfsError as itself, not in the groups that nurseries make of it."""
    try:
        yield
    except BaseExceptionGroup as group:
        expected, others = group.split(CsvfsError)
        if expected is None or others is not None:
            raise
        error: BaseException = expected
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def main() -> None:
    """`python -m csvfs.admin.node_run`: the same as `csvfs node run`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        trio.run(run_node, load_config())
    except CsvfsError as error:
        sys.exit(f"csvfs node run: {error}")


if __name__ == "__main__":
    main()
