"""`csvfs node run`: holds the node's lease in the cluster store, and runs the node's processes under it.

Place      admin floor. Starts `csvfs.block.drive_server`, `coordinator.host` and `csvfs.mount.process` by
           name.
Deletes    what its children wrote (`servers/`, `coordinators/`, `owner/`) as soon as they are dead: nobody waits for a
           timeout. The lease itself is node_lease.py's.
Children   get CSVFS_CONFIG, CSVFS_NODE_LEASE (attach your keys to it), CSVFS_NODE_INCARNATION (of the lease:
           give it to Liveness), CSVFS_INCARNATION (of this start of this child; grows), CSVFS_ROLE.

Invariants (N1: node_lease.py)
  N2  A lease that is lost stays lost: the page is closed, every child killed and reaped before the next
      lease.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import trio

from csvfs.admin.child import Child, ChildPlan, bound_log
from csvfs.admin.claim_watch import claim_forever
from csvfs.admin.cluster_root import ClusterRoot
from csvfs.admin.evicted_watch import raise_when_evicted
from csvfs.admin.mount_keeper import MountKeeper
from csvfs.admin.mount_keepers import MountKeepers
from csvfs.admin.node_lease import NodeLease, next_incarnation, unavailable_logged
from csvfs.admin.node_standing import note_orderly_end
from csvfs.admin.reach_watch import report_reach_forever
from csvfs.admin.run_lock import run_dir_lock
from csvfs.admin.store_member import store_member
from csvfs.cluster.election import release_earlier_hosts, release_host
from csvfs.cluster.liveness import Liveness
from csvfs.cluster.membership import View, item_map, keep_view_forever
from csvfs.cluster.node_process import (
    INCARNATION_ENVIRONMENT,
    LEASE_ENVIRONMENT,
    NODE_INCARNATION_ENVIRONMENT,
    ROLE_ENVIRONMENT,
)
from csvfs.config import CONFIG_ENVIRONMENT, NodeConfig, check_name, load_config
from csvfs.errors import BadRequest, CsvfsError
from csvfs.ids import Incarnation
from csvfs.store.interface import ClusterStore, Compare, Delete
from csvfs.store.opening import etcd_place, is_etcd, open_store

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
                keepers = MountKeepers(root, config.options.io_timeout_ms / 1000, nursery)
                try:
                    while not stopping.is_set():
                        await _UnderLease(config, store, view, commands or Commands(), root, keepers).run(stopping)
                finally:
                    with trio.CancelScope(shield=True):
                        await keepers.end_all()
                root.close()
                nursery.cancel_scope.cancel()


async def _be_witness(config: NodeConfig, store: ClusterStore, stopping: trio.Event) -> None:
    """Run the member of the cluster store and nothing else, until `stopping`. Raises Evicted."""
    logger.info("node %s is a witness: it runs a member of the cluster store alone", config.node)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raise_when_evicted, config, store, View())
        await stopping.wait()
        nursery.cancel_scope.cancel()


class _UnderLease:
    """One lease of the node and everything that runs under it."""

    def __init__(
        self,
        config: NodeConfig,
        store: ClusterStore,
        view: View,
        commands: Commands,
        root: ClusterRoot,
        keepers: MountKeepers,
    ) -> None:
        self._config = config
        self._keepers = keepers
        self._root = root
        self._store = store
        self._view = view
        self._commands = commands
        self._lease = NodeLease(config, store, view)
        self._children: dict[str, Child] = {}  # drives, coordinator
        self._mounts: dict[str, tuple[object, Child]] = {}  # volume name -> volume id, its mount
        self._poked = trio.Event()

    async def run(self, stopping: trio.Event) -> None:
        """Returns when `stopping` is set and all is stopped, or when the lease was lost and all is dead."""
        with trio.CancelScope() as asked:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when, stopping, asked)
                await self._lease.begin()
                nursery.cancel_scope.cancel()
        if not self._lease.id:
            return  # asked to stop before there was a lease
        try:
            async with trio.open_nursery() as nursery:
                self._lease.keep(nursery)
                nursery.start_soon(self._run_child, ROLE_DRIVES, self._commands.drives, self._drives_died)
                nursery.start_soon(
                    self._run_child, ROLE_COORDINATOR, self._commands.coordinator, self._host_died
                )
                if has_desk(self._config):
                    nursery.start_soon(self._run_child, ROLE_DESK, self._commands.desk)
                nursery.start_soon(claim_forever, self._config, self._store, self._view, self._lease.id)
                nursery.start_soon(report_reach_forever, self._config, self._store, self._view, self._lease.id)
                with trio.CancelScope() as mounting:
                    nursery.start_soon(_cancel_when, stopping, mounting)
                    await self._keep_mounts_forever(nursery)
                await self._stop_in_order()
                nursery.cancel_scope.cancel()
        finally:
            self._lease.close()

    # Children

    def _plan(self, role: str, argv: tuple[str, ...]) -> ChildPlan:
        def environment(incarnation: Incarnation) -> dict[str, str]:
            return os.environ | {
                CONFIG_ENVIRONMENT: str(self._config.path),
                LEASE_ENVIRONMENT: str(self._lease.id),
                NODE_INCARNATION_ENVIRONMENT: str(self._lease.incarnation),
                INCARNATION_ENVIRONMENT: str(incarnation),
                ROLE_ENVIRONMENT: role.partition("-")[0],
                "PYTHONUNBUFFERED": "1",
            }

        async def incarnation() -> Incarnation:
            while True:
                with unavailable_logged():
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
            with unavailable_logged():
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
                    keeper, child = await self._mount_child(name, wanted[name])
                    self._mounts[name] = (wanted[name], child)
                    nursery.start_soon(keeper.look_after, child)
                await self._poked.wait()
        finally:
            forget()

    def _poke(self) -> None:
        self._poked.set()

    async def _mount_child(self, volume_name: str, volume_id: object) -> tuple[MountKeeper, Child]:
        plan = self._plan(f"{ROLE_MOUNT}-{volume_name}", (*self._commands.mount, volume_name))
        keeper = await self._keepers.keeper(volume_name, volume_id)
        keeper.adapt(plan, Liveness(self._config.liveness_path, self._lease.incarnation).may_serve)
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
        with unavailable_logged():
            await note_orderly_end(self._store, self._config.node)
            await self._store.revoke_lease(self._lease.id)


def has_desk(config: NodeConfig) -> bool:
    """Whether this node can let others in: it has the CA's key."""
    return is_etcd(config.store) and etcd_place(config.store).ca_key_path.exists()


def _is_volume_name(name: str) -> bool:
    """The name becomes a directory below cluster_root: `..` in the store must not make it another one."""
    try:
        check_name(name, "volume")
    except BadRequest as error:
        logger.error("%s; not mounted", error)
        return False
    return True


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
            with unavailable_logged():
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
