"""Three drive servers with a drive each and one writer, in one process over loopback: for tests of the bus."""

import os
from collections.abc import Callable
from pathlib import Path

import trio

from csvfs.block.block_service import BlockService
from csvfs.block.bus import SILENCE_MS_MAX, Bus
from csvfs.block.drive_calls import DriveCalls
from csvfs.block.drive_watch import HANG_S, DriveWatch
from csvfs.block.formatting import format_drive
from csvfs.block.server_links import ServerAddress, ServerLinks
from csvfs.block.slab_state import begin_joining, complete_joining, drop_members
from csvfs.errors import Unavailable
from csvfs.ids import DriveId, Epoch, Incarnation, NodeName, PoolId, SlabId, VolumeId
from csvfs.net.engine import Engine
from csvfs.net.link import Listener
from csvfs.units import MIB
from csvfs.wire.block_messages import ROLE_IN_SYNC, Member, SlabDescriptor

CLUSTER = b"c" * 16
POOL = PoolId(b"p" * 16)
VOLUME = VolumeId(b"v" * 16)
SLAB_SIZE = 4 * MIB
SLAB = SlabId(7)


class Server:
    """One node's drive server on an engine of its own, so that it can be killed and started again."""

    def __init__(self, node: str, path: Path, drive_id: DriveId) -> None:
        self.node = NodeName(node)
        self.path = path
        self.drive_id = drive_id
        self.drives = {drive_id: path}  # all of them
        self.incarnation = 0
        self.port = 0
        self.service: BlockService | None = None
        self.may_serve = True
        self.reports: dict = {}
        self.on_reports = self._keep
        self.hang_s = HANG_S
        self.on_end: Callable[[], None] = lambda: None
        self.make_engine: Callable[[], Engine] = Engine
        self.make_calls: Callable[[BlockService, Engine], DriveCalls] = DriveCalls
        self._scope: trio.CancelScope | None = None

    async def _keep(self, reports: dict) -> None:
        """What the watch over the drives tells the cluster."""
        self.reports = reports

    async def start(self, nursery: trio.Nursery) -> None:
        self.incarnation += 1
        await nursery.start(self._run)

    async def _run(self, task_status=trio.TASK_STATUS_IGNORED) -> None:
        engine = self.make_engine()
        service = BlockService(engine, self.node, CLUSTER, Incarnation(self.incarnation), lambda: self.may_serve)
        self.make_calls(service, engine)
        self.service = service
        try:
            with trio.CancelScope() as self._scope:
                await self._serve(engine, service, task_status)
        finally:  # also when the test ends: flush threads and mappings must not outlive it
            for client in list(service.clients):
                client.link.close()
            service.close(clean=False)
            self.on_end()
            engine.close()
            self.service = None

    async def _serve(self, engine: Engine, service: BlockService, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            service.nursery = nursery
            self._open_drives()
            watch = DriveWatch(service, self.on_reports, hang_s=self.hang_s)
            nursery.start_soon(watch.watch_forever)
            nursery.start_soon(watch.retry_forever, lambda served: self._open_drives())
            listener = Listener(engine, ("127.0.0.1", 0), service.accept)
            self.port = listener.port
            nursery.start_soon(engine.run_forever)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                listener.close()

    def _open_drives(self) -> None:
        assert self.service is not None
        for drive_id, path in self.drives.items():
            self.service.drives.open(drive_id, str(path), pool_id=POOL, cluster_id=CLUSTER)

    async def kill(self) -> None:
        """As kill -9: connections break, nothing is flushed or marked clean."""
        assert self._scope is not None
        self._scope.cancel()
        while self.service is not None:
            await trio.sleep(0.001)

    def copy(self, slab: SlabId = SLAB):
        assert self.service is not None
        return self.service.drives.by_id(self.drive_id).opened().find(VOLUME, slab)


class Owner:
    """Decides about slabs as a coordinator does: drops failed members and installs the new epoch first."""

    def __init__(self, cluster: "BlockCluster") -> None:
        self.cluster = cluster
        self.descriptors: dict[SlabId, SlabDescriptor] = {}
        self.reports: list[tuple[SlabId, int, list[DriveId], str]] = []
        self.links: ServerLinks | None = None
        self._changing = trio.Lock()  # one change at a time: two with the same epoch would be two truths

    async def slab_failed(self, slab, epoch, drives, reason):
        async with self._changing:
            return await self._slab_failed(slab, epoch, drives, reason)

    async def _slab_failed(self, slab, epoch, drives, reason):
        self.reports.append((slab, epoch, drives, reason))
        descriptor = self.descriptors[slab]
        if not drives or epoch < descriptor.epoch:
            return descriptor
        try:
            dropped = drop_members(descriptor, drives)
        except Exception as error:
            raise Unavailable(str(error)) from None
        await self.commit(dropped)
        return dropped

    async def commit(self, descriptor: SlabDescriptor) -> None:
        for member in descriptor.writable:
            items = [[member.drive, descriptor.slab, descriptor.epoch, member.role]]
            answer = await self.links.call(member.node, "install", {"term": 1, "items": items}, timeout_s=60)
            assert answer["refused"] == []
        self.descriptors[descriptor.slab] = descriptor

    async def resync(self, slab: SlabId, server: Server, even_if_lost: bool = False) -> dict:
        """Bring the copy on `server` back into sync."""
        async with self._changing:
            descriptor = self.descriptors[slab]
            since = next(member.since for member in descriptor.members if member.drive == server.drive_id)
            joining = begin_joining(descriptor, server.drive_id)
            await self.commit(joining)
        source = self.cluster.server_of(joining.in_sync[0].node)
        args = {
            "drive": server.drive_id,
            "slab": slab,
            "epoch": joining.epoch,
            "since": since,
            "chunks": None,
            "term": 1,
            "even_if_lost": even_if_lost,
            "source": self.cluster.source(server, source),
        }
        pulled = await self.links.call(server.node, "pull", args, timeout_s=60)
        async with self._changing:
            assert self.descriptors[slab] == joining
            await self.commit(complete_joining(joining, server.drive_id))
        return pulled


class BlockCluster:
    def __init__(self, path: Path, nursery: trio.Nursery, count: int = 3) -> None:
        self.nursery = nursery
        self.servers = [
            Server(f"n{index}", path / f"d{index}", DriveId(bytes([index]) * 16))
            for index in range(1, count + 1)
        ]
        self.engine = Engine()
        self.owner = Owner(self)
        self._buses: list[Bus] = []
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        try:
            await self.engine.run_forever()
        finally:
            for bus in self._buses:
                bus.close()
            if self.owner.links is not None:
                self.owner.links.close()
            self.engine.close()

    def source(self, target: Server, source: Server) -> dict[str, object]:
        """Where `target` is to pull from."""
        return {"address": "127.0.0.1", "port": source.port, "drive": source.drive_id}

    def server_of(self, node: str) -> Server:
        return next(server for server in self.servers if server.node == node)

    def directory(self, node: NodeName) -> ServerAddress | None:
        server = self.server_of(node)
        if server.service is None:
            return None
        return ServerAddress(node, "127.0.0.1", server.port, "", Incarnation(server.incarnation))

    def links(self, writer: str, incarnation: int = 1) -> ServerLinks:
        return ServerLinks(
            self.engine, self.directory, cluster=CLUSTER, volume=VOLUME, writer=writer,
            incarnation=Incarnation(incarnation), local_node=NodeName("n1"),
        )  # fmt: skip

    def bus(self, writer: str = "mount/n1", incarnation: int = 1, silence_ms_max: int = SILENCE_MS_MAX) -> Bus:
        bus = Bus(
            self.links(writer, incarnation), self.owner, volume=VOLUME, local_node=NodeName("n1"),
            silence_ms_max=silence_ms_max,
        )  # fmt: skip
        self._buses.append(bus)
        self.nursery.start_soon(bus.run_forever)
        for descriptor in self.owner.descriptors.values():
            bus.learn(descriptor)
        return bus

    async def start(self) -> None:
        for server in self.servers:
            with server.path.open("wb") as file:
                os.ftruncate(file.fileno(), 64 * MIB)
            format_drive(
                str(server.path), drive_id=server.drive_id, pool_id=POOL, cluster_id=CLUSTER,
                node=server.node, slab_size=SLAB_SIZE, label="",
            )  # fmt: skip
            await server.start(self.nursery)
        self.owner.links = self.links("coordinator")
        await self.create_slab(SLAB)

    async def create_slab(self, slab: SlabId) -> None:
        members = tuple(Member(server.drive_id, server.node, ROLE_IN_SYNC) for server in self.servers)
        self.owner.descriptors[slab] = SlabDescriptor(slab, Epoch(1), members)
        for server in self.servers:
            args = {"drive": server.drive_id, "slab": slab, "epoch": 1, "term": 1}
            await self.owner.links.call(server.node, "create_slab", args, timeout_s=60)


async def write(bus: Bus, block: int, data: bytes, slab: SlabId = SLAB) -> None:
    """Write and wait for the answer; raises what the bus answers."""
    done = trio.Event()
    result = []

    def finish(error):
        result.append(error)
        done.set()

    bus.write(slab, block, data, finish)
    await done.wait()
    if result[0] is not None:
        raise result[0]
