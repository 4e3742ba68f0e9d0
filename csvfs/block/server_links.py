"""Connections to drive servers: one per node, for one volume and one writer.

Place      block floor, on net/. Used by the bus, and by whoever has calls for drive servers (PROTOCOL.md,
           "Calls to a drive server").
Owns       at most one link per node. All writes of this writer to a node go over that link, in order (I4).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from csvfs.clock import monotonic_ns
from csvfs.errors import Disconnected, DriveFailed, Fenced, ProtocolError, Unavailable
from csvfs.ids import DriveId, Incarnation, NodeName, VolumeId, id_bytes
from csvfs.net.engine import Engine
from csvfs.net.link import Address, Link, connect
from csvfs.wire.control import pack_call
from csvfs.wire.frames import Kind

CONNECT_TIMEOUT_S = 2.0
LIST_INTERVAL_S = 0.2  # so often a server is asked at most whether a drive that was bad is in order by now
WATCH_INTERVAL_S = 0.5
WATCH_LATE_NS = 1_000_000_000  # from one look to the next: longer, and this process stood still
_PING = pack_call("ping", {})


@dataclass(slots=True, frozen=True)
class ServerAddress:
    """Where a node's drive server listens, as `servers/<node>` in the cluster store says."""

    node: NodeName
    address: str
    port: int
    unix_path: str
    incarnation: Incarnation


# None: the node has no drive server now.
ServerDirectory = Callable[[NodeName], ServerAddress | None]


@dataclass(slots=True, frozen=True)
class RemoteDrive:
    """A drive as its server's `hello` describes it."""

    drive: DriveId
    index: int
    path: str
    state: str


@dataclass(slots=True)
class ServerLink:
    """An open link whose `hello` was answered."""

    node: NodeName
    link: Link
    incarnation: Incarnation
    drives: dict[DriveId, RemoteDrive] = field(default_factory=dict)
    listed_s: float = field(default_factory=trio.current_time)  # when `drives` was true

    def serves(self, drive: DriveId) -> bool:
        """As far as is known."""
        remote = self.drives.get(drive)
        return remote is not None and remote.state == "ok"

    def drive_index(self, drive: DriveId) -> int:
        """Raises DriveFailed when the server does not serve the drive."""
        remote = self.drives.get(drive)
        if remote is None or remote.state != "ok":
            state = "not there" if remote is None else remote.state
            raise DriveFailed(f"drive {drive.hex()[:8]} of node {self.node} is {state}; see csvfs drive list")
        return remote.index


class ServerLinks:
    """Links by node, opened on demand, shared by all who ask.

    writer       `mount/<node>`, `coordinator`, `server/<node>` or `admin`; with `incarnation` it is what
                 fences name.
    local_node   its server is reached by its unix socket.
    """

    def __init__(
        self,
        engine: Engine,
        directory: ServerDirectory,
        *,
        cluster: bytes,
        volume: VolumeId | None,
        writer: str,
        incarnation: Incarnation,
        local_node: NodeName,
    ) -> None:
        self.engine = engine
        self._directory = directory
        self._hello = {"cluster": cluster, "volume": volume, "writer": writer, "incarnation": incarnation}
        self._local_node = local_node
        self._links: dict[NodeName, ServerLink] = {}
        self._opening: dict[NodeName, trio.Event] = {}
        self.on_lost: Callable[[NodeName], None] = lambda node: None

    def ready(self, node: NodeName) -> ServerLink | None:
        """The open link to `node`'s drive server, or None."""
        return self._links.get(node)

    async def connected(self, node: NodeName) -> ServerLink:
        """The link to `node`, opened if need be.

        Raises  Unavailable (no server, refused, cluster mismatch), TimedOut, Fenced. Cancel safe.
        """
        while node not in self._links:
            opening = self._opening.get(node)
            if opening is not None:
                await opening.wait()
                if node not in self._links:
                    raise Unavailable(f"the drive server of node {node} could not be reached")
                continue
            self._opening[node] = trio.Event()
            try:
                self._links[node] = await self._open(node)
            finally:
                self._opening.pop(node).set()
        return self._links[node]

    async def serving(self, node: NodeName, drive: DriveId) -> ServerLink:
        """As connected; but of a drive that the server did not have when the link was opened it is asked
        again.

        Without it a drive that was added to a node would count as failed until the next connection.
        """
        server = await self.connected(node)
        is_due = drive not in server.drives or trio.current_time() - server.listed_s >= LIST_INTERVAL_S
        if not server.serves(drive) and is_due:
            server.listed_s = trio.current_time()
            rows = await server.link.call("drives", {}, timeout_s=CONNECT_TIMEOUT_S)
            server.drives.update(_parse_drives(node, rows))
        return server

    async def _open(self, node: NodeName) -> ServerLink:
        server = self._directory(node)
        if server is None:
            raise Unavailable(f"node {node} runs no drive server now; see csvfs node list")
        address: Address = (server.address, server.port)
        if node == self._local_node and server.unix_path:
            address = server.unix_path
        link = await connect(self.engine, address, timeout_s=CONNECT_TIMEOUT_S, node=node)
        try:
            answer = await link.call("hello", self._hello, timeout_s=CONNECT_TIMEOUT_S)
            opened = _parse_hello(node, link, answer)
        except BaseException as error:
            link.close(error if isinstance(error, Fenced) else None)
            raise
        if link.closed is not None:
            raise Disconnected(f"the drive server of node {node} closed the connection at once")
        link.on_close = lambda closed, error: self._on_close(node, closed)
        return opened

    def _on_close(self, node: NodeName, link: Link) -> None:
        current = self._links.get(node)
        if current is not None and current.link is link:
            del self._links[node]
            self.on_lost(node)

    async def call(self, node: NodeName, name: str, args: dict[str, Any], *, timeout_s: float) -> Any:
        """One call to `node`'s drive server. Raises what the server answers, Unavailable, TimedOut."""
        server = await self.connected(node)
        return await server.link.call(name, args, timeout_s=timeout_s)

    def tell_all(self, name: str, args: dict[str, Any]) -> None:
        """Send a call over every open link and ignore the answers: for hints that may get lost."""
        for server in self._links.values():
            server.link.request(Kind.CALL, pack_call(name, args), None, lambda frame, error: None)

    def drop(self, node: NodeName, reason: str) -> None:
        """Close the link to `node` now: what waits for it fails at once instead of at a time-out."""
        server = self._links.get(node)
        if server is not None:
            server.link.close(Disconnected(f"gave up the drive server of node {node}: {reason}"))

    def check_servers(self) -> None:
        """Drop links to servers that the cluster store no longer lists, or lists anew: call when it
        changes."""
        for node, server in list(self._links.items()):
            listed = self._directory(node)
            if listed is None or listed.incarnation != server.incarnation:
                self.drop(node, "its drive server is gone, says the cluster store")

    async def follow_servers_forever(self) -> None:
        """As `watch_forever`, without a limit to silence: for links of calls that take long.

        Without it a call to a node that lost power lasts to its time-out: nothing is sent there that could break.
        """
        while True:
            await trio.sleep(WATCH_INTERVAL_S)
            self.check_servers()

    async def watch_forever(self, silence_ms_max: int) -> None:
        """Drop links whose server answers nothing for `silence_ms_max` though requests wait.

        A flush may take longer than that on a busy disk: so a server that owes an answer is pinged, and only
        one that does not answer even this is given up. When this process stood still itself (no processor, or
        stopped), what came meanwhile is yet to be read: nobody is given up before the next look.
        """
        is_excused = False
        while True:
            began_ns = monotonic_ns()
            await trio.sleep(WATCH_INTERVAL_S)
            self.check_servers()
            now_ns = monotonic_ns()
            is_excused = now_ns - began_ns > WATCH_LATE_NS and not is_excused  # not twice in a row: it has a limit
            for node, server in list(self._links.items()):
                silent_ms = (now_ns - server.link.progress_ns) // 1_000_000
                if not server.link.waiting_count:
                    continue
                if silent_ms > silence_ms_max and not is_excused:
                    self.drop(node, f"no answer for {silent_ms} ms")
                elif silent_ms > silence_ms_max // 4:
                    server.link.request(Kind.CALL, _PING, None, lambda frame, error: None)

    def close(self) -> None:
        for server in list(self._links.values()):
            server.link.close()


def _parse_hello(node: NodeName, link: Link, answer: Any) -> ServerLink:
    try:
        incarnation = Incarnation(int(answer["incarnation"]))
        return ServerLink(node, link, incarnation, _parse_drives(node, answer["drives"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(
            f"the drive server of node {node} answered hello with nonsense: {error!r}"
        ) from None


def _parse_drives(node: NodeName, rows: Any) -> dict[DriveId, RemoteDrive]:
    drives = {}
    try:
        for row in rows:
            drive = DriveId(id_bytes(row["id"]))
            drives[drive] = RemoteDrive(drive, int(row["index"]), str(row["path"]), str(row["state"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(
            f"the drive server of node {node} lists its drives as nonsense: {error!r}"
        ) from None
    return drives
