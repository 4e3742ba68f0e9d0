"""`python -m csvfs.mount.process VOLUME`: one volume's mount on this node, a child of `csvfs node run`.

Place      mount floor; puts everything below together.
Order      The session with the coordinator first, then the mount: an empty directory becomes the volume,
           never a volume that does not answer. Where a process before this one has died, its FUSE session goes on
           instead (held_session.py, inheritance.py).
Ends       SIGTERM: unmounts, gives its leases back, status 0. /dev/fuse gone: status 1, and the kernel fails what was
           waiting. Killed, ended by a bug, or evicted (Fenced; the kernel's caches are emptied first): nothing is told
           to the kernel, and the next process goes on, if it may.
"""

import gc
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pyfuse3
import trio

from csvfs.block.bus import Bus
from csvfs.block.server_links import ServerAddress, ServerLinks
from csvfs.block.tunnel_desk import waypoints_of
from csvfs.cluster.liveness import Liveness
from csvfs.cluster.membership import View, keep_view_forever
from csvfs.cluster.node_process import ProcessNumbers, call_when_signalled, run_process
from csvfs.config import NodeConfig, check_name
from csvfs.errors import CsvfsError, Fenced, NotFound, Unavailable
from csvfs.ids import DriveId, Incarnation, NodeName, SlabId, VolumeId
from csvfs.mount import device, waits
from csvfs.mount.admin_socket import AdminSocket
from csvfs.mount.channel import Channel
from csvfs.mount.coordinator_path import CoordinatorPath
from csvfs.mount.direct import Direct
from csvfs.mount.file_locks import FileLocks
from csvfs.mount.file_table import FileTable
from csvfs.mount.guard import CONTACT_S_MAX, Guard
from csvfs.mount.held_session import inherited_session
from csvfs.mount.notify import KernelNotifier
from csvfs.mount.operations import VolumeOperations
from csvfs.mount.owner import VolumeOwner
from csvfs.mount.relay import LEASE_NONE, PYFUSE3_TASKS_MAX, Relay
from csvfs.mount.request_journal import RequestJournal
from csvfs.mount.session import NotInheritedError, Session
from csvfs.net.detours import Paths, Waypoint
from csvfs.net.engine import Engine
from csvfs.net.tls import open_identity
from csvfs.store.opening import open_store
from csvfs.store.revoked import follow_revoked_forever
from csvfs.volume.file_io import BlockBus
from csvfs.wire.block_messages import SlabDescriptor

log = logging.getLogger(__name__)

STORE_WAIT_S = 10.0
CONTACT_NS_MAX = int(CONTACT_S_MAX * 1e9)
UNMOUNT_WAIT_S = 5.0  # for programs that still use files here; then their accesses fail
FAREWELL_WAIT_S = 2.0
EMPTY_WAIT_S = 1.0  # when evicted; then the parent sees to it
RELEASE_BATCH = 1024
OWNER_PATIENCE_S = 3.0  # see Bus; a call to the coordinator lasts as long as it cannot decide, up to the io_timeout


class CoordinatorOfSlabs:
    """See bus.SlabOwner: for data slabs that is the volume's coordinator."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def slab_failed(
        self, slab: SlabId, epoch: int, drives: list[DriveId], reason: str
    ) -> SlabDescriptor:
        args = {"slab": slab, "epoch": epoch, "drives": drives, "reason": reason}
        return SlabDescriptor.from_wire(await self._session.call("slab_failed", args))

    async def make_equal(self, slab: SlabId, chunks: list[int]) -> None:
        """See given_up.py."""
        args = {"slab": slab, "epoch": 0, "drives": [], "reason": "writes were given up", "torn": chunks}
        await self._session.call("slab_failed", args)


def server_directory(view: View) -> Callable[[NodeName], ServerAddress | None]:
    """Where drive servers listen, as the cluster store says now."""

    def find(node: NodeName) -> ServerAddress | None:
        row = view.servers.get(node)
        if row is None:
            return None
        try:
            address, port, unix_path = str(row["address"]), int(row["port"]), str(row.get("unix") or "")
            return ServerAddress(node, address, port, unix_path, Incarnation(int(row["incarnation"])))
        except (KeyError, TypeError, ValueError) as error:
            log.error("servers/%s in the cluster store is malformed: %s", node, error)
            return None

    return find


class MountProcess:
    """Everything of one mount. `failure`: why it had to end, if not asked to."""

    def __init__(
        self, config: NodeConfig, volume_name: str, incarnation: Incarnation, node_incarnation: Incarnation
    ) -> None:
        self._config = config
        self._volume_name = volume_name
        self._incarnation = incarnation
        self._liveness = Liveness(config.liveness_path, node_incarnation)
        self._mount_point = config.cluster_root / volume_name
        self._engine = Engine(open_identity(config))
        self._view = View()
        self._end = trio.Event()
        held = inherited_session()
        self._fd = -1 if held is None else held[0]
        self._record = None if held is None else held[1]
        self._takes_over = self._record is not None and self._record.has_served
        self._journal = RequestJournal() if self._record is None else self._record.journal
        self._serves = False  # the kernel is answered
        self._evicted = trio.Event()
        self.failure: CsvfsError | None = None

    def _follow_volume(self, bus: Bus) -> None:
        """What `volumes/<name>` says now: it may be changed while we are mounted."""
        min_copies = self._view.volumes.get(self._volume_name, {}).get("min_copies")
        bus.min_copies = max(1, min_copies) if isinstance(min_copies, int) else 1

    async def run(self) -> None:
        """Until SIGTERM or SIGINT, or until it cannot go on. Raises CsvfsError: it could not begin."""
        store = open_store(self._config.store)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call_when_signalled, self._end.set)
                nursery.start_soon(self._engine.run_forever)
                nursery.start_soon(keep_view_forever, store, self._view)
                if self._engine.identity is not None:
                    nursery.start_soon(follow_revoked_forever, store, self._engine.identity.revoke)
                with trio.CancelScope() as serving:
                    nursery.start_soon(self._cancel_at_end, serving)
                    await self._serve(nursery)
                nursery.cancel_scope.cancel()
        finally:
            await store.close()

    def _fail(self, error: Exception) -> None:
        if self.failure is None:
            self.failure = error if isinstance(error, CsvfsError) else Unavailable(str(error))
            log.error("the mount of %s ends: %s", self._volume_name, error)
            may_be_followed = isinstance(error, Fenced) and not isinstance(error, NotInheritedError)
            if self._record is not None and may_be_followed:
                self._evicted.set()
                return
            if self._record is not None:
                self._record.over()
        self._end.set()

    async def _end_when_evicted(self, guard: Guard, table: FileTable) -> None:
        """Others have our leases: the kernel must show nothing of before, and whoever goes on for us comes back to it."""
        await self._evicted.wait()
        guard.close()
        if self._record is not None:
            self._record.covered_until(0)
        with trio.move_on_after(EMPTY_WAIT_S):
            await table.empty()
        self._end.set()

    async def _cancel_at_end(self, scope: trio.CancelScope) -> None:
        await self._end.wait()
        scope.cancel()

    async def _volume_ids(self) -> tuple[bytes, VolumeId]:
        """Of the cluster and the volume."""
        with trio.move_on_after(STORE_WAIT_S):
            await self._view.ready.wait()
        cluster, volume = self._view.cluster, self._view.volumes.get(self._volume_name)
        if cluster is None:
            raise Unavailable("the cluster store has no cluster yet; see csvfs cluster create")
        if volume is None:
            raise NotFound(f"there is no volume {self._volume_name}; see csvfs volume list")
        ids = cluster.get("id"), volume.get("id")
        if not all(isinstance(value, bytes) and len(value) == 16 for value in ids):
            raise Unavailable(f"the ids of cluster or volume {self._volume_name} in the store are malformed")
        return bytes(ids[0]), VolumeId(bytes(ids[1]))  # type: ignore[arg-type]

    async def _serve(self, nursery: trio.Nursery) -> None:
        cluster, volume = await self._volume_ids()
        node = self._config.node
        options = self._config.options
        guard = Guard(self._liveness.may_serve)
        paths = Paths(self._engine, self._waypoints, cluster=cluster, node=node)
        owner_view = VolumeOwner(self._view, self._volume_name)
        way = CoordinatorPath(paths, owner_view, connect_timeout_s=options.connect_timeout_ms / 1000)
        session = Session(
            volume=self._volume_name,
            node=node,
            incarnation=self._incarnation,
            owner=owner_view,
            connect=way.connect,
            on_fenced=self._fail,
            on_contact=lambda sent_ns: self._on_contact(guard, table, sent_ns),
            news=lambda: waits.news(self._facts(guard, session, bus, way)),
            io_timeout_s=options.io_timeout_ms / 1000,
            journal=self._journal,
            inherit=self._takes_over,
        )
        bus = self._make_bus(cluster, volume, session, paths)
        if self._record is None:
            self._fd = device.open_device()
        notifier = KernelNotifier(self._fd)
        times_s = options.attribute_report_ms / 1000
        table = FileTable(
            coordinator=session,
            bus=cast(BlockBus, bus),  # it names slabs by SlabId, file I/O by int
            notifier=notifier,
            guard=guard,
            nursery=nursery,
            times_s=times_s,
            io_timeout_s=options.io_timeout_ms / 1000,
            kept=None if self._record is None else self._record.inodes,
            journal=self._journal,
            on_emptied=(lambda emptied: None) if self._record is None else self._record.emptied,
        )
        if self._record is not None:
            nursery.start_soon(self._end_when_evicted, guard, table)
        if self._takes_over and self._record is not None:
            table.take_over(self._record.left)
        session.holder = table
        socket = self._open_socket(nursery, lambda: self._why(self._facts(guard, session, bus, way)))
        nursery.start_soon(session.run_forever)
        nursery.start_soon(way.return_forever)
        nursery.start_soon(bus.run_forever)
        nursery.start_soon(table.run_forever)
        if self._takes_over:
            await session.wait_linked()
            table.inheritance.owes(session.hello["unflushed"])
            nursery.start_soon(table.inheritance.flush_soon)
        else:
            await session.call("statfs", {})  # the coordinator is there
        try:
            await self._mount_and_serve(nursery, session, table)
        finally:
            with trio.CancelScope(shield=True):
                if self.failure is None and (self._end.is_set() or self._record is None):
                    await self._say_farewell(session, table)
            if socket is not None:
                socket.close()
            bus.close()

    def _make_bus(self, cluster: bytes, volume: VolumeId, session: Session, paths: Paths) -> Bus:
        node, options = self._config.node, self._config.options
        links = ServerLinks(
            self._engine,
            server_directory(self._view),
            cluster=cluster,
            volume=volume,
            writer=f"mount/{node}",
            incarnation=self._incarnation,
            local_node=node,
            paths=paths,
        )
        self._view.on_change(links.check_servers)  # a node without power breaks no connection
        owner = CoordinatorOfSlabs(session)
        bus = Bus(
            links,
            owner,
            volume=volume,
            local_node=node,
            silence_ms_max=options.write_timeout_ms,
            io_timeout_s=options.io_timeout_ms / 1000,
            owner_patience_s=OWNER_PATIENCE_S,
            make_equal=owner.make_equal,
        )
        self._view.on_change(lambda: self._follow_volume(bus))
        self._follow_volume(bus)
        bus.on_fenced = self._fail
        return bus

    def _on_contact(self, guard: Guard, table: FileTable, sent_ns: int) -> None:
        if not guard.lapsed:
            table.serves_again()
        guard.contact(sent_ns)
        if self._record is not None and not self._evicted.is_set():
            self._record.covered_until(sent_ns + CONTACT_NS_MAX)

    async def _waypoints(self) -> list[Waypoint]:
        return waypoints_of(self._view.servers)

    def _open_socket(self, nursery: trio.Nursery, why: Callable[[], dict[str, Any]]) -> AdminSocket | None:
        """None: it cannot be made, and `csvfs why` says less; no reason not to mount."""
        try:
            return AdminSocket(self._engine, self._config.mount_socket(self._volume_name), nursery, why)
        except OSError as error:
            log.error("no socket to say what %s waits for: %s", self._volume_name, error)
            return None

    def _facts(self, guard: Guard, session: Session, bus: Bus, way: CoordinatorPath) -> waits.Facts:
        slabs = [
            waits.SlabWait(
                state.descriptor.slab, len(state.parked), state.parked[0].parked_since, state.trouble, state.in_vain
            )
            for state in bus.waiting()
        ]
        return waits.Facts(
            now_s=trio.current_time(),
            io_timeout_s=self._config.options.io_timeout_ms / 1000,
            lapsed=guard.lapsed,
            serving=guard.serving(),
            has_owner=self._volume_name in self._view.owners,
            unlinked_s=session.unlinked_s,
            calls=session.waits(),
            slabs=slabs,
            detours=_detours(bus, way),
        )

    def _why(self, facts: waits.Facts) -> dict[str, Any]:
        mode, reason = waits.mode(facts)
        process = {
            "pid": os.getpid(),
            "incarnation": self._incarnation,
            "serves": self._serves,
            "can_be_followed": self._record is not None and self._record.has_served,
        }
        known = {"node": self._config.node, "mode": mode, "why": reason, "waits": waits.rows(facts)}
        return {**known, "process": process}

    async def _mount_and_serve(self, nursery: trio.Nursery, session: Session, table: FileTable) -> None:
        record = self._record
        noted = None if record is None else record.inodes
        operations = VolumeOperations(session, table, first_handle=(self._incarnation << 32) + 1)
        relay = Relay(
            self._engine,
            self._fd,
            table,
            operations,
            on_failure=self._fail,
            noted=noted,
            on_served=(lambda init: None) if record is None else record.served,
        )
        table.set_given(lambda ino: ino in relay.lookups)
        table.shedding.lookups = lambda: relay.lookups
        direct = Direct(operations, relay)
        locks = self._locks(session)
        channel = Channel(
            self._engine, self._fd, table, operations, relay, direct, self._journal, noted, locks, table.barred
        )
        pyfuse3.init(operations, relay.pyfuse3_mount_point(), set())
        nursery.start_soon(pyfuse3.main, 1, PYFUSE3_TASKS_MAX)
        if self._takes_over and record is not None:
            relay.take_over(record.init, {row.ino: row.lookups for row in record.left if row.lookups})
            channel.take_over(nursery, table.inheritance)
            log.info("%s at %s goes on with %d inodes", self._volume_name, self._mount_point, len(record.left))
        else:
            device.mount(self._fd, self._mount_point, self._volume_name)
            channel.start(nursery)
            log.info("%s is mounted at %s", self._volume_name, self._mount_point)
        self._serves = True
        try:
            await channel.ended.wait()
            self._fail(Unavailable(f"{self._mount_point} was unmounted by somebody else"))
        finally:
            if record is None or (self._end.is_set() and not self._evicted.is_set()):
                with trio.CancelScope(shield=True):
                    if self.failure is None:
                        await unmount_in_order(self._mount_point, channel.ended.wait)
                device.abort(self._mount_point)
            # else a bug ends us, or an eviction, and the next process goes on.
            channel.close()

    def _locks(self, session: Session) -> FileLocks:
        locks = FileLocks(session)
        locks.learn(session.hello)
        return locks

    async def _say_farewell(self, session: Session, table: FileTable) -> None:
        """Report times and give all leases back, so that nobody has to wait for them."""
        with trio.move_on_after(FAREWELL_WAIT_S):
            try:
                await table.report_times()
                held = [row[0] for row in table.claims()]
                for first in range(0, len(held), RELEASE_BATCH):
                    items = [[ino, LEASE_NONE] for ino in held[first : first + RELEASE_BATCH]]
                    await session.call("release", {"items": items})
                await session.call("goodbye", {})
            except CsvfsError as error:
                log.info("leases not given back, they will be recalled: %s", error)


def _detours(bus: Bus, way: CoordinatorPath) -> list[waits.Detour]:
    found = [waits.Detour(f"the drives of {node}", via, why) for node, (via, why) in sorted(bus.links.detours().items())]
    to_coordinator = way.detour()
    if to_coordinator is not None:
        node, via, why = to_coordinator
        found.append(waits.Detour(f"the coordinator on {node}", via, why))
    return found


async def unmount_in_order(mount_point: Path, wait_ended: Callable[[], Awaitable[None]]) -> None:
    """Unmount; programs that use it get UNMOUNT_WAIT_S to end. Returns whether or not it worked."""
    with trio.move_on_after(UNMOUNT_WAIT_S):
        while not await trio.to_thread.run_sync(device.unmount, mount_point, abandon_on_cancel=True):
            await trio.sleep(0.1)
        await wait_ended()


async def run_mount(config: NodeConfig, volume_name: str) -> int:
    """The exit status."""
    check_name(volume_name, "volume")
    numbers = ProcessNumbers.from_environment()
    process = MountProcess(config, volume_name, numbers.incarnation, numbers.node_incarnation)
    await process.run()
    return 0 if process.failure is None else 1


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m csvfs.mount.process VOLUME", file=sys.stderr)
        return 2
    # As of the coordinator host: inodes live long and form no cycles, and a look at all of them for garbage stops the mount
    # for a tenth of a second and more.
    gc.set_threshold(10_000, 20, 50)
    return run_process(run_mount, sys.argv[1])


if __name__ == "__main__":
    sys.exit(main())
