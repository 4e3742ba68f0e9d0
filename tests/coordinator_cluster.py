"""A small cluster in one process: real store, drive servers and coordinator hosts over loopback; simple
mounts."""

import contextlib
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import trio

from coordinator.host import Host
from coordinator.serving import serve_volume
from coordinator.slab_book import MetadataBook, parse_descriptors
from coordinator.slab_manager import AHEAD_SLABS
from csvfs.block.bus import Bus
from csvfs.block.formatting import format_drive
from csvfs.block.server_links import ServerAddress, ServerLinks
from csvfs.errors import CsvfsError, Fenced, NotCoordinator, Unavailable
from csvfs.ids import DriveId, Incarnation, NodeName, SlabId, VolumeId
from csvfs.net.engine import Engine
from csvfs.net.link import Link, connect
from csvfs.store.embedded import EmbeddedStore
from csvfs.units import BLOCK_SIZE, MIB
from csvfs.wire.block_messages import BLOCK_COUNT_MAX, SlabDescriptor
from csvfs.wire.control import pack_value, unpack_call, unpack_value
from tests.block_cluster import CLUSTER, POOL, SLAB_SIZE, Server

NAME = "v"
VOLUME = VolumeId(b"V" * 16)
DRIVE_SIZE = 256 * MIB


class TestCluster:
    __test__ = False

    def __init__(self, path: Path, nursery: trio.Nursery, nodes: int = 3) -> None:
        self.nursery = nursery
        self.store = EmbeddedStore(path / "store.db")
        self.lease = 0
        self.drive_size = DRIVE_SIZE
        self.drive_retire_ms = 900_000
        # Long, for a test that is about something else: on a busy machine this thread stands still for long too.
        self.recall_timeout_ms = 20_000
        self.reclaim_timeout_ms = 20_000
        self.hosts: dict[str, Host] = {}
        self._host_scopes: dict[str, trio.CancelScope] = {}
        self._running_hosts = 0
        self._incarnation = 100
        names = [f"n{index}" for index in range(1, nodes + 1)]
        self.servers = {
            name: Server(name, path / f"drive-{name}", DriveId(name.encode().ljust(16, b"-")))
            for name in names
        }
        self.serving: dict[str, bool] = dict.fromkeys(names, True)

    async def start(self) -> "TestCluster":
        self.nursery.start_soon(self._close_store_at_the_end)
        self.lease = await self.store.grant_lease(600_000)
        await self.store.put("cluster", pack_value({"id": CLUSTER, "name": "test"}))
        await self.store.put("pool", pack_value({"id": POOL, "name": "pool", "slab_size": SLAB_SIZE}))
        for name, server in self.servers.items():
            await self.store.put(f"nodes/{name}", pack_value({"address": "127.0.0.1"}))
            await self._make_drive(name, server.drive_id, server.path, self.drive_size)
            await self.start_node(name)
            await self.start_server(name)
        return self

    async def _close_store_at_the_end(self) -> None:
        """Hosts that end use it still."""
        store = self.store
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                while self._running_hosts:
                    await trio.sleep(0.001)
                await store.close()
                await self.store.close()  # a test may have replaced it

    def format(self, name: str) -> None:
        """Its drive has nothing on it any more, but its id."""
        self._format(name, self.servers[name].drive_id, self.servers[name].path, self.drive_size)

    def _format(self, name: str, drive_id: DriveId, path: Path, size: int) -> None:
        with path.open("wb") as file:
            file.truncate(size)
        format_drive(
            str(path), drive_id=drive_id, pool_id=POOL, cluster_id=CLUSTER,
            node=NodeName(name), slab_size=SLAB_SIZE, label="",
        )  # fmt: skip

    async def _make_drive(self, name: str, drive_id: DriveId, path: Path, size: int) -> None:
        self._format(name, drive_id, path, size)
        self.servers[name].drives[drive_id] = path
        value = {"node": name, "path": str(path), "size": size, "kind": "file", "state": "ok"}
        await self.store.put(f"drives/{drive_id.hex()}", pack_value({**value, "slots": size // SLAB_SIZE}))

    async def add_drive(self, name: str, *, size: int = DRIVE_SIZE) -> DriveId:
        """A further drive on a node whose drive server is up; it serves it at once."""
        server = self.servers[name]
        number = len(server.drives) + 1
        drive_id = DriveId(f"{name}.{number}".encode().ljust(16, b"-"))
        path = server.path.with_name(f"drive-{name}-{number}")
        await self._make_drive(name, drive_id, path, size)
        assert server.service is not None
        server.service.drives.open(drive_id, str(path), pool_id=POOL, cluster_id=CLUSTER)
        return drive_id

    async def release_removed_drives_forever(self) -> None:
        """As the drive server process does when the key of a drive says that no slab needs it."""
        while True:
            for item in await self.store.list("drives/"):
                value = unpack_value(item.value)
                server = self.servers[value["node"]]
                drive_id = DriveId(bytes.fromhex(item.key.removeprefix("drives/")))
                is_served = server.service is not None and drive_id in server.drives
                if value.get("usage") == "removed" and is_served:
                    server.service.release_drive(drive_id)
                    del server.drives[drive_id]
            await trio.sleep(0.02)

    async def set_usage(self, drive_id: DriveId, usage: str) -> None:
        item = await self.store.get(f"drives/{drive_id.hex()}")
        assert item is not None
        await self.store.put(item.key, pack_value({**unpack_value(item.value), "usage": usage}))

    async def start_node(self, name: str) -> None:
        self.serving[name] = True
        await self.store.put(
            f"alive/{name}", pack_value({"incarnation": 1, "address": "127.0.0.1"}), self.lease
        )

    async def start_server(self, name: str) -> None:
        server = self.servers[name]
        registered = trio.Event()

        async def publish(reports: dict[str, Any]) -> None:
            await registered.wait()
            server.reports = reports
            await self._register(server)

        server.on_reports = publish
        await server.start(self.nursery)
        await self._register(server)
        registered.set()

    async def _register(self, server: Server) -> None:
        value = {
            "address": "127.0.0.1", "port": server.port, "unix": "", "incarnation": server.incarnation,
            "drives": server.reports,
        }  # fmt: skip
        await self.store.put(f"servers/{server.node}", pack_value(value), self.lease)

    async def kill_server(self, name: str, *, noticed: bool = True) -> None:
        await self.servers[name].kill()
        if noticed:
            await self.store.delete(f"servers/{name}")

    async def start_host(self, name: str) -> Host:
        self._incarnation += 1
        host = Host(
            NodeName(name), "127.0.0.1", 0,
            unix_path=None, store=self.store, cluster=CLUSTER, lease=self.lease,
            incarnation=Incarnation(self._incarnation), may_serve=lambda: self.serving[name],
            recall_timeout_ms=self.recall_timeout_ms, reclaim_timeout_ms=self.reclaim_timeout_ms,
            write_timeout_ms=20_000,
            drive_retire_ms=self.drive_retire_ms,
            serve=partial(serve_volume, make_reader=self.make_reader, rng=Random(1)), rng=Random(1),
        )  # fmt: skip
        started = trio.Event()
        self.nursery.start_soon(self._run_host, name, host, started)
        await started.wait()
        self.hosts[name] = host
        return host

    async def _run_host(self, name: str, host: Host, started: trio.Event) -> None:
        self._running_hosts += 1
        try:
            with trio.CancelScope() as scope:
                self._host_scopes[name] = scope
                async with trio.open_nursery() as nursery:
                    await nursery.start(host.run)
                    started.set()
        finally:
            for handler in list(host.engine._handlers.values()):
                owner = getattr(handler, "__self__", None)
                if isinstance(owner, Link):  # a process that ends closes its sockets
                    owner.close()
            host.engine.close()
            self._running_hosts -= 1

    async def kill_host(self, name: str) -> None:
        """As kill -9: its tasks end, its sockets close, the node's `run` buries it."""
        host = self.hosts.pop(name)
        host.owned_names = list(host.owned)  # type: ignore[attr-defined]
        self._host_scopes.pop(name).cancel()
        await self.store.delete(f"coordinators/{name}")
        for item in await self.store.list("owner/"):
            if unpack_value(item.value)["node"] == name:
                await self.store.delete(item.key)

    def make_reader(self, book: MetadataBook, bus: Bus) -> "DirectReader":
        return DirectReader(self, book)

    # -- the volume ------------------------------------------------------------------------------

    async def create_volume(self, copies: int = 3, size: int = 0) -> None:
        value = {
            "id": VOLUME, "name": NAME, "copies": copies, "size": size, "state": "creating", "resiliency": "mirror",
        }  # fmt: skip
        await self.store.put(f"volumes/{NAME}", pack_value(value))

    async def volume(self) -> dict[str, Any]:
        item = await self.store.get(f"volumes/{NAME}")
        return {} if item is None else unpack_value(item.value)

    async def wait_serving(self, within_s: float = 60) -> Any:
        with trio.fail_after(within_s):
            while True:
                for host in self.hosts.values():
                    owned = host.owned.get(NAME)
                    if owned is not None and owned.service is not None:
                        return owned.service
                await trio.sleep(0.01)

    async def wait_grown(self) -> Any:
        """Until the slabs that are kept ahead of what files need are there; returns the service."""
        slabs = (await self.wait_serving()).slabs

        def is_grown() -> bool:
            ahead = min(AHEAD_SLABS * slabs.slab_blocks, slabs._metadata.space.left_blocks)
            return slabs._metadata.statfs().free_blocks >= ahead and not slabs._growing

        await self.wait(is_grown)
        return await self.wait_serving()

    async def metadata_slabs(self) -> list[SlabDescriptor]:
        item = await self.store.get(f"meta/{NAME}")
        assert item is not None
        return list(parse_descriptors(item).values())

    def copy(self, node: str, slab: int) -> Any:
        """The node's copy of a slab, on whichever of its drives it is."""
        service = self.servers[node].service
        assert service is not None
        opened = (service.drives.by_id(drive_id).opened() for drive_id in self.servers[node].drives)
        return next((copy for drive in opened if (copy := drive.find(VOLUME, SlabId(slab)))), None)

    def copy_on(self, drive_id: DriveId, slab: int) -> Any:
        """The copy on one drive, or None."""
        server = next(server for server in self.servers.values() if drive_id in server.drives)
        if server.service is None:
            return None
        return server.service.drives.by_id(drive_id).opened().find(VOLUME, SlabId(slab))

    async def wait(self, condition: Any, within_s: float = 60) -> None:
        with trio.fail_after(within_s):
            while not condition():
                await trio.sleep(0.01)

    async def mount(self, node: str, incarnation: int = 1) -> "Mount":
        mount = Mount(self, node, incarnation)
        await mount.start()
        return mount


class DirectReader:
    """Stands for the blocking reader: the drive servers run in this very thread."""

    def __init__(self, cluster: TestCluster, book: MetadataBook) -> None:
        self._cluster = cluster
        self._book = book

    def read(self, block: int, count: int) -> bytes:
        return b"".join(self._read_block(block + index) for index in range(count))

    def _read_block(self, block: int) -> bytes:
        index, slab_block = divmod(block, SLAB_SIZE // BLOCK_SIZE)
        descriptor = self._book.current(self._book.slabs[index])
        for member in descriptor.in_sync:
            copy = self._cluster.copy_on(member.drive, descriptor.slab)
            if copy is not None:
                return bytes(copy.read_blocks(slab_block, 1)[1])
        raise Unavailable("no in-sync member is up")

    def close(self) -> None:
        pass


class Mount:
    """Says hello, sends calls until they are answered, gives leases back as told, writes data by its bus."""

    def __init__(self, cluster: TestCluster, node: str, incarnation: int) -> None:
        self.cluster = cluster
        self.node = node
        self.incarnation = incarnation
        self.engine = Engine()
        self.link: Link | None = None
        self.term = 0
        self.op = 0
        self.unanswered: dict[int, None] = {}
        self.held: dict[int, int] = {}
        self.segments: dict[int, dict[int, int]] = {}  # by inode
        self.written_ns = 0  # told of files of segments
        self.flushes = 0  # asked for by others
        self.flush_error: CsvfsError | None = None
        self.recalls: list[dict[str, Any]] = []
        self.answers_recalls = True
        self.may_claim = trio.Event()  # a test may have it wait with that after a takeover
        self.may_claim.set()
        self.inherits = False
        self.claims_all = True  # else it has more to say, and never does
        self.hello: dict[str, Any] = {}
        self.size_reported: int | None = None
        self.accessed_ns: int | None = None  # told with the answers to recalls
        self._scope = trio.CancelScope()
        self._connecting = trio.Lock()
        self.bus: Bus | None = None

    async def start(self) -> None:
        links = ServerLinks(
            self.engine, self._server, cluster=CLUSTER, volume=VOLUME, writer=f"mount/{self.node}",
            incarnation=Incarnation(self.incarnation), local_node=NodeName(self.node),
        )  # fmt: skip
        self.bus = Bus(links, self, volume=VOLUME, local_node=NodeName(self.node))
        self.cluster.nursery.start_soon(self._run)
        await self.connect()

    async def _run(self) -> None:
        assert self.bus is not None
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.engine.run_forever)
                    nursery.start_soon(self.bus.run_forever)
                    nursery.start_soon(self._stay_connected)
        finally:
            self._close_links()
            self.engine.close()

    def kill(self) -> None:
        """As kill -9 of the process."""
        self._scope.cancel()
        self._close_links()

    def _close_links(self) -> None:
        if self.link is not None:
            self.link.close()
        if self.bus is not None:
            self.bus.close()

    def _server(self, node: NodeName) -> ServerAddress | None:
        server = self.cluster.servers[node]
        if server.service is None:
            return None
        return ServerAddress(node, "127.0.0.1", server.port, "", Incarnation(server.incarnation))

    async def slab_failed(
        self, slab: SlabId, epoch: int, drives: list[DriveId], reason: str
    ) -> SlabDescriptor:
        args = {"slab": slab, "epoch": epoch, "drives": drives, "reason": reason}
        return SlabDescriptor.from_wire(await self.call("slab_failed", **args))

    async def _stay_connected(self) -> None:
        """As a real mount: it reclaims its leases from the next coordinator also when no program asks for anything."""
        with contextlib.suppress(Fenced):
            while True:
                if self.link is not None and self.link.closed is not None:
                    await self.connect()
                await trio.sleep(0.02)

    async def connect(self) -> None:
        """To the coordinator, whoever it is, unless it is connected. Raises Fenced."""
        async with self._connecting:
            while self.link is None or self.link.closed is not None:
                try:
                    await self._connect_once()
                except (Unavailable, KeyError):
                    await trio.sleep(0.02)

    async def _connect_once(self) -> None:
        item = await self.cluster.store.get(f"owner/{NAME}")
        if item is None:
            raise Unavailable("no owner")
        owner = unpack_value(item.value)
        port = self.cluster.hosts[owner["node"]]._port
        link = await connect(self.engine, ("127.0.0.1", port), timeout_s=60)
        try:
            await self._greet(link)
        except BaseException:
            link.close()
            raise
        self.link = link

    async def _greet(self, link: Link) -> None:
        link.on_frame = self._on_frame
        hello = {"volume": NAME, "node": self.node, "incarnation": self.incarnation, "inherit": self.inherits, "term": self.term}
        answer = self.hello = await link.call("hello", hello, timeout_s=60)
        self.inherits = False
        if answer["term"] > self.term:
            self.term = answer["term"]
            await self.may_claim.wait()
            leases = [[ino, kind, 0, 0] for ino, kind in self.held.items() if kind]
            self.claim_reply = reply = await link.call("reclaim", self._claims(leases), timeout_s=60)
            for ino in reply["refused"]:
                self.held[ino] = int(bool(answer.get("adopted")))
            self.held.update(dict.fromkeys(reply.get("lowered", ()), 1))

    def _claims(self, leases: list[list[int]]) -> dict[str, Any]:
        segments = [
            [ino, 0, [[segment, 1, kind] for segment, kind in held.items() if segment >= 0 and kind]]
            for ino, held in self.segments.items()
        ]
        return {"leases": leases, "last": self.claims_all, "segments": segments}

    def _give_back(self, args: dict[str, Any]) -> int:
        held = self.segments.get(args["ino"])
        if args["segment"] < 0 or not held:
            self.segments.pop(args["ino"], None)
            return 0
        kept = held[args["segment"]] = min(args["kind"], held.get(args["segment"], 0))
        return kept

    def _on_frame(self, link: Link, frame: Any) -> None:
        name, args = unpack_call(frame.head)
        if name == "flush":
            self.flushes += 1
            if self.flush_error is not None:
                link.reply_error(frame.request_id, self.flush_error)
            else:
                link.reply(frame.request_id, {})
            return
        if name == "query":
            size = self.size_reported
            if self.segments.get(args["ino"]):
                link.reply(frame.request_id, {"size": None, "mtime_ns": self.written_ns or None, "atime_ns": None})
                return
            link.reply(frame.request_id, size and {"size": size, "mtime_ns": 5, "atime_ns": None})
            return
        self.recalls.append(args)
        if not self.answers_recalls:
            return
        if "segment" in args:
            kept = self._give_back(args)
            link.reply(frame.request_id, {"kind": kept, "mtime_ns": self.written_ns or None, "owes": True})
            return
        held = self.held.get(args["ino"], 0)
        if not args["attr"]:
            held = self.held[args["ino"]] = min(held, args["kind"])
        link.reply(
            frame.request_id,
            {"kind": held, "size": self.size_reported, "mtime_ns": None, "atime_ns": self.accessed_ns},
        )

    async def call(self, call_name: str, /, **args: Any) -> Any:
        """Ask the coordinator, over its failures."""
        while True:
            if self.link is None or self.link.closed is not None:
                await self.connect()
            assert self.link is not None
            try:
                reply = await self.link.call(call_name, args, timeout_s=60)
                break
            except NotCoordinator:
                self.link.close()
            except Unavailable:
                await trio.sleep(0.02)
        if isinstance(reply, dict) and isinstance(reply.get("attr"), list) and "lease" in reply:
            ino = reply["attr"][0]
            self.held[ino] = max(self.held.get(ino, 0), reply["lease"])
        return reply

    async def change(self, call_name: str, /, **args: Any) -> Any:
        """A numbered call."""
        self.op += 1
        op = self.op
        self.unanswered[op] = None
        try:
            return await self.call(call_name, op=op, op_done=min(self.unanswered), **args)
        finally:
            del self.unanswered[op]

    async def make(self, name: bytes, parent: int = 1, mode: int = 0o100644) -> int:
        reply = await self.change("make", parent=parent, name=name, mode=mode, uid=0, gid=0, rdev=0)
        return int(reply["attr"][0])

    async def acquire(self, ino: int, kind: int, count: int = 0) -> dict[str, Any]:
        while True:
            reply = await self.call("acquire", ino=ino, kind=kind, block=0, count=count)
            for value in reply["slabs"]:
                self.bus.learn(SlabDescriptor.from_wire(value))  # type: ignore[union-attr]
            if reply["lease"] >= kind:
                return reply  # type: ignore[no-any-return]

    async def acquire_direct(self, ino: int, kind: int) -> bool:
        """For I/O past the cache: whether the file is shared, and `segments` are to be asked for."""
        reply = await self.call("acquire", ino=ino, kind=kind, block=0, count=0, direct=True)
        self.held[ino] = max(self.held.get(ino, 0), reply["lease"])
        return bool(reply.get("segmented"))

    async def ask_segment(self, ino: int, segment: int, kind: int) -> dict[str, Any]:
        reply: dict[str, Any] = await self.call("segments", ino=ino, kind=kind, first=segment, count=1, block=0, blocks=0)
        if not reply.get("over"):
            self.segments.setdefault(ino, {}).update({number: kind for number, kind in reply["held"] if kind})
        return reply

    async def write(self, ino: int, data: bytes) -> None:
        """From the beginning of a file whose write lease is held; returns when it is acknowledged."""
        count = len(data) // BLOCK_SIZE
        reply = await self.change("allocate", ino=ino, block=0, count=count, size=len(data), mtime_ns=0)
        for value in reply["slabs"]:
            self.bus.learn(SlabDescriptor.from_wire(value))  # type: ignore[union-attr]
        for block, length, slab, slab_block in reply["extents"]:
            for index in range(max(0, block), min(count, block + length), BLOCK_COUNT_MAX):
                end = min(count, block + length, index + BLOCK_COUNT_MAX)
                piece = data[index * BLOCK_SIZE : end * BLOCK_SIZE]
                await self.write_block(slab, slab_block + index - block, piece)

    async def write_block(self, slab: int, block: int, data: bytes) -> None:
        done = trio.Event()
        result: list[CsvfsError | None] = []

        def finish(error: CsvfsError | None) -> None:
            result.append(error)
            done.set()

        self.bus.write(SlabId(slab), block, data, finish)  # type: ignore[union-attr]
        await done.wait()
        if result[0] is not None:
            raise result[0]

    async def read(self, ino: int, count: int) -> bytes:
        reply = await self.acquire(ino, 2, count)
        content = bytearray(count * BLOCK_SIZE)
        for block, length, slab, slab_block in reply["extents"]:
            for index in range(block, min(count, block + length), BLOCK_COUNT_MAX):
                end = min(count, block + length, index + BLOCK_COUNT_MAX)
                found = await self.bus.read(  # type: ignore[union-attr]
                    SlabId(slab), slab_block + index - block, end - index
                )
                content[index * BLOCK_SIZE : end * BLOCK_SIZE] = bytes(found)
        return bytes(content)
