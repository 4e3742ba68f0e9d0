"""Calls of the command line to drive servers and coordinators: short deadlines, never a hang.

Place      admin floor, over net/. One engine and one nursery per command.
Errors     every call ends within its deadline with a value or a CsvfsError.
"""

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import trio

from csvfs.admin.cluster_view import ClusterView, Record
from csvfs.block.tunnel_desk import waypoints_of
from csvfs.errors import CsvfsError, Unavailable
from csvfs.net.detours import COORDINATOR, DRIVES, Paths, Waypoint
from csvfs.net.engine import Engine
from csvfs.net.link import Address, connect
from csvfs.net.tls import Identity

CALL_TIMEOUT_S = 2.0  # for connecting and answering together: an administrator waits, perhaps in the dark
ADMIN_WRITER = "admin"  # the one writer that may be connected several times at once


class Peers:
    """The processes of other nodes, as the cluster store names them; through a third one where there is no path."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._view: ClusterView | None = None  # as last given
        self._paths: Paths | None = None

    def _paths_of(self, view: ClusterView) -> Paths | None:
        """None: there is no cluster yet."""
        self._view = view
        if self._paths is None and view.cluster is not None:
            own = self._engine.identity.node if self._engine.identity is not None else ""
            self._paths = Paths(self._engine, self._waypoints, cluster=view.cluster.id(), node=own)
        return self._paths

    async def _waypoints(self) -> list[Waypoint]:
        servers = self._view.servers if self._view is not None else {}
        return waypoints_of({node: record.value for node, record in servers.items()})

    async def drive_server(self, view: ClusterView, node: str, name: str, **args: Any) -> Any:
        """One call to a node's drive server. Raises Unavailable or what the server answers. Cancel safe."""
        server = view.servers.get(node)
        if server is None:
            raise Unavailable(f"node {node} runs no drive server")
        hello = {
            "cluster": view.cluster.id() if view.cluster else b"",
            "volume": None,
            "writer": ADMIN_WRITER,
            "incarnation": 1,
        }
        return await self._call(_address(server), node, hello, name, args, paths=self._paths_of(view))

    async def ping(self, address: Address, node: str) -> None:
        """Whether a node's drive server is there. Raises Disconnected, TimedOut: it is not. Cancel safe."""
        await self._call(address, node, None, "ping", {})

    async def host(self, view: ClusterView, node: str, name: str) -> Any:
        """One call to a node's coordinator host. Raises Unavailable or what it answers. Cancel safe."""
        host = view.coordinators.get(node)
        if host is None:
            raise Unavailable(f"node {node} runs no coordinator host")
        return await self._call(
            _address(host), node, None, name, {}, paths=self._paths_of(view), service=COORDINATOR
        )

    async def coordinator(self, view: ClusterView, volume: str, name: str, **args: Any) -> Any:
        """One call to a volume's coordinator. Raises Unavailable or what it answers. Cancel safe."""
        return await self.coordinator_slowly(view, volume, name, CALL_TIMEOUT_S, **args)

    async def coordinator_slowly(
        self, view: ClusterView, volume: str, name: str, timeout_s: float, **args: Any
    ) -> Any:
        """As coordinator, for a call that takes its time: at most `timeout_s`."""
        owner = view.owners.get(volume)
        if owner is None:
            raise Unavailable(f"volume {volume} has no coordinator at the moment")
        return await self._call(
            _address(owner), owner.text("node"), None, name, {"volume": volume, **args}, timeout_s,
            paths=self._paths_of(view), service=COORDINATOR,
        )  # fmt: skip

    async def local(self, path: str, name: str, timeout_s: float) -> Any:
        """One call to a process of this node by its unix socket. Raises Unavailable or what it answers. Cancel safe."""
        return await self._call(path, "", None, name, {}, timeout_s)

    async def _call(
        self,
        address: Address,
        node: str,
        hello: dict[str, Any] | None,
        name: str,
        args: dict[str, Any],
        timeout_s: float | None = None,
        *,
        paths: Paths | None = None,
        service: str = DRIVES,
    ) -> Any:
        deadline = trio.current_time() + (timeout_s or CALL_TIMEOUT_S)
        if paths is None:
            link = await connect(self._engine, address, timeout_s=CALL_TIMEOUT_S, node=node)
        else:
            link = await paths.connect(address, node=node, service=service, timeout_s=CALL_TIMEOUT_S)
        try:
            if hello is not None:
                await link.call("hello", hello, timeout_s=_left_s(deadline))
            return await link.call(name, args, timeout_s=_left_s(deadline))
        finally:
            link.close()


def _left_s(deadline: float) -> float:
    return max(deadline - trio.current_time(), 0.05)


def _address(record: Record) -> Address:
    host, port = record.text("address"), record.number("port")
    if not host or not 0 < port < 65_536:
        raise Unavailable(f"cluster store key {record.key} gives no address to call: {host!r} port {port}")
    return (host, port)


@asynccontextmanager
async def open_peers(identity: Identity | None = None) -> AsyncIterator[Peers]:
    """An engine that runs while the context is entered. `identity`: this node's; None: without TLS."""
    engine = Engine(identity)
    failure: CsvfsError | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.run_forever)
            try:
                yield Peers(engine)
            except CsvfsError as error:  # carried out of the nursery, which would wrap it in a group
                failure = error
            finally:
                nursery.cancel_scope.cancel()
    finally:
        engine.close()
    if failure is not None:
        raise failure


async def answer_or_error(
    call: Awaitable[Any], key: str, answers: dict[str, Any], errors: dict[str, str]
) -> None:
    """Await `call`; its value goes into `answers[key]`, or its error's text into `errors[key]`."""
    try:
        answers[key] = await call
    except CsvfsError as error:
        errors[key] = str(error)
