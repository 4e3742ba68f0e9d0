"""A block cluster with TLS whose nodes reach each other by wires that can be cut, one pair of nodes at a time.

A cut wire keeps what is sent into it, as a network does that loses packets which are sent again: after healing it
arrives, late.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import trio

from csvfs.admin.cluster_ca import issue, make_authority, write_certificates
from csvfs.block.block_service import BlockService
from csvfs.block.drive_calls import DriveCalls
from csvfs.block.server_links import ServerAddress, ServerLinks
from csvfs.block.tunnel_desk import TunnelDesk
from csvfs.ids import Incarnation, NodeName
from csvfs.net.detours import Paths, Waypoint
from csvfs.net.engine import Engine
from csvfs.net.tls import Identity
from csvfs.net.tunnels import Tunnels
from csvfs.store.etcd_place import EtcdPlace
from tests.block_cluster import CLUSTER, VOLUME, BlockCluster, Server

PATIENCE_S = 60

OURS, THEIRS = make_authority("Tower"), make_authority("Strangers")


def make_place(directory: Path, node: str, authority: tuple[str, str] = OURS) -> Path:
    """Certificates of `node` in a directory of their own."""
    directory.mkdir(parents=True)
    write_certificates(EtcdPlace(directory), issue(*authority, node, "127.0.0.1"))
    return directory


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not condition():
            await trio.sleep(0.005)


class Wire:
    """From one node to another's drive server: a port of its own, and what is sent into it goes on to that server."""

    def __init__(self, target: Server) -> None:
        self.port = 0
        self.accepted = 0
        self._held = 0  # pieces that were read and not sent on yet
        self._target = target
        self._whole = trio.Event()
        self._whole.set()

    @property
    def empty(self) -> bool:
        """All that came out of one end so far has gone into the other."""
        return self._held == 0

    def cut(self) -> None:
        self._whole = trio.Event()

    def heal(self) -> None:
        self._whole.set()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._join, listeners)

    async def _join(self, near: trio.SocketStream) -> None:
        self.accepted += 1
        async with near:
            await self._whole.wait()
            with contextlib.suppress(OSError):
                far = await trio.open_tcp_stream("127.0.0.1", self._target.port)
                async with far, trio.open_nursery() as nursery:
                    nursery.start_soon(self._carry, near, far)
                    nursery.start_soon(self._carry, far, near)

    async def _carry(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                self._held += 1
                try:
                    await self._whole.wait()
                    await sink.send_all(data)
                finally:
                    self._held -= 1
        await self._whole.wait()
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await sink.send_eof()


class DetourCluster(BlockCluster):
    """`wires[a, b]`: what a reaches b's drive server by. The writer is on n1."""

    def __init__(self, path: Path, nursery: trio.Nursery, count: int) -> None:
        super().__init__(path, nursery, count)
        self.identities = {
            server.node: Identity(server.node, make_place(path / "tls" / server.node, server.node))
            for server in self.servers
        }
        self.engine.identity = self.identities["n1"]
        self.wires = {(a.node, b.node): Wire(b) for a in self.servers for b in self.servers if a is not b}
        self.tunnels: dict[str, Tunnels] = {}
        self.paths = self._paths(self.engine, "n1")
        for server in self.servers:
            server.make_engine = partial(Engine, self.identities[server.node])
            server.make_calls = partial(self._make_calls, server)

    def _paths(self, engine: Engine, node: str) -> Paths:
        async def waypoints() -> list[Waypoint]:
            there = [server.node for server in self.servers if server.service is not None and server.node != node]
            return [Waypoint(other, "127.0.0.1", self.wires[node, other].port) for other in there]

        return Paths(engine, waypoints, cluster=CLUSTER, node=node)

    def _make_calls(self, server: Server, service: BlockService, engine: Engine) -> DriveCalls:
        async def find(node: str, kind: str) -> tuple[str, int] | None:
            ports = {other: wire.port for (here, other), wire in self.wires.items() if here == server.node}
            port = {**ports, server.node: server.port}.get(node)
            return None if port is None or kind != "drives" else ("127.0.0.1", port)

        tunnels = self.tunnels[server.node] = Tunnels(engine)
        server.on_end = tunnels.close
        desk = TunnelDesk(tunnels, find, cluster=CLUSTER, node=server.node, may_serve=lambda: server.may_serve)
        return DriveCalls(service, engine, desk=desk, paths=self._paths(engine, server.node))

    def cut(self, a: str, b: str) -> None:
        """In both directions."""
        self.wires[a, b].cut()
        self.wires[b, a].cut()

    def heal(self, a: str, b: str) -> None:
        self.wires[a, b].heal()
        self.wires[b, a].heal()

    def directory(self, node: NodeName) -> ServerAddress | None:
        """As seen from n1, where all the clients are."""
        server = self.server_of(node)
        if server.service is None:
            return None
        port = server.port if node == "n1" else self.wires["n1", node].port
        return ServerAddress(node, "127.0.0.1", port, "", Incarnation(server.incarnation))

    def source(self, target: Server, source: Server) -> dict[str, object]:
        port = self.wires[target.node, source.node].port
        return {"address": "127.0.0.1", "port": port, "drive": source.drive_id, "node": source.node}

    def links(self, writer: str, incarnation: int = 1) -> ServerLinks:
        return ServerLinks(
            self.engine, self.directory, cluster=CLUSTER, volume=VOLUME, writer=writer,
            incarnation=Incarnation(incarnation), local_node=NodeName("n1"), paths=self.paths,
        )  # fmt: skip

    async def start(self) -> None:
        for wire in self.wires.values():
            await self.nursery.start(wire.run)
        await super().start()
        assert self.owner.links is not None
        self.nursery.start_soon(partial(self.owner.links.mind_paths_forever, hurry=True))

    def passed_on_by(self, node: str) -> int:
        """How many connections go through `node` now."""
        return self.tunnels[node].count


@contextlib.asynccontextmanager
async def detour_cluster(path: Path, count: int = 3) -> AsyncIterator[DetourCluster]:
    """Started; until the end of the block."""
    async with trio.open_nursery() as nursery:
        cluster = DetourCluster(path, nursery, count)
        await cluster.start()
        yield cluster
        nursery.cancel_scope.cancel()
