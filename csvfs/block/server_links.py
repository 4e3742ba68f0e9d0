"""Connections to drive servers: one per node, for one volume and one writer.

Place      block floor, on net/. Used by the bus, and by whoever has calls for drive servers (PROTOCOL.md,
           "Calls to a drive server").
Owns       at most one link per node. All writes of this writer to a node go over that link, in order (I4).
Detours    With `paths`, a node that cannot be reached is reached through another one (net/detours.py): a link like any
           other, which its server gives up when the same writer says hello by another path. `mind_paths_forever` leaves
           a path that gives no answers any more, and goes back to the straight one: it takes the link out of use, waits
           until nothing is under way on it, and says hello.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from csvfs.clock import monotonic_ns
from csvfs.errors import CsvfsError, Disconnected, DriveFailed, Fenced, ProtocolError, Unavailable
from csvfs.ids import DriveId, Incarnation, NodeName, VolumeId, id_bytes
from csvfs.net.detours import DRIVES, Paths
from csvfs.net.engine import Engine
from csvfs.net.link import Address, Link, connect
from csvfs.wire.control import pack_call
from csvfs.wire.frames import Kind

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
LIST_INTERVAL_S = 0.2  # so often a server is asked at most whether a drive that was bad is in order by now
WATCH_INTERVAL_S = 0.5
WATCH_LATE_NS = 1_000_000_000  # from one look to the next: longer, and this process stood still
RETURN_INTERVAL_S = 1.0  # after one try of the straight path to a node, while a detour is in use, comes the next
DOUBT_S = 1.5  # nothing answered for so long, and other paths to the node are tried
DOUBT_INTERVAL_S = 5.0
DRAIN_S = 1.0  # then new requests wait at most so long for those that are under way on the detour
EXCUSED_MAX = 4  # detours to one node that broke within EXCUSED_S: more, and it is the node that is to blame
EXCUSED_S = 30.0
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
    return_due_s: float = field(default_factory=lambda: trio.current_time() + RETURN_INTERVAL_S)
    doubt_due_s: float = 0.0
    excuses: bool = False  # by another path than the link before: what failed there failed for want of a path

    @property
    def via(self) -> str:
        """The node in between; empty: none."""
        return self.link.via

    @property
    def silent_s(self) -> float:
        """For how long nothing was answered, while something waits."""
        return (monotonic_ns() - self.link.progress_ns) / 1e9

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


Look = Callable[[NodeName, ServerLink, Address, Paths], Awaitable[None]]


class ServerLinks:
    """Links by node, opened on demand, shared by all who ask.

    writer       `mount/<node>`, `coordinator`, `server/<node>` or `admin`; with `incarnation` it is what
                 fences name.
    local_node   its server is reached by its unix socket.
    paths        None: there are straight ones only.
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
        paths: Paths | None = None,
    ) -> None:
        self.engine = engine
        self.paths = paths
        self._directory = directory
        self._hello = {"cluster": cluster, "volume": volume, "writer": writer, "incarnation": incarnation}
        self._local_node = local_node
        self._links: dict[NodeName, ServerLink] = {}
        self._opening: dict[NodeName, trio.Event] = {}
        self._broken_detours: dict[NodeName, list[float]] = {}
        self.on_lost: Callable[[NodeName], None] = lambda node: None
        self.on_moving: Callable[[], None] = lambda: None  # an open link is not to be used any more: ask `ready` again

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
        if self.paths is None or node == self._local_node:
            link = await connect(self.engine, address, timeout_s=CONNECT_TIMEOUT_S, node=node)
        else:
            link = await self.paths.connect(address, node=node, service=DRIVES, timeout_s=CONNECT_TIMEOUT_S)
        if link.via:
            log.warning("the drive server of node %s is reached through node %s only", node, link.via)
        return await self._introduce(node, link)

    async def _introduce(self, node: NodeName, link: Link) -> ServerLink:
        """Say hello on a new link, which is closed if that fails."""
        try:
            answer = await link.call("hello", self._hello, timeout_s=CONNECT_TIMEOUT_S)
            opened = _parse_hello(node, link, answer)
        except BaseException as error:
            link.close(error if isinstance(error, Fenced) else None)
            raise
        if link.closed is not None:
            raise Disconnected(f"the drive server of node {node} closed the connection at once")
        opened.excuses = bool(link.via) and len(self._recently_broken(node)) < EXCUSED_MAX
        link.on_close = lambda closed, error: self._on_close(node, closed)
        return opened

    def _on_close(self, node: NodeName, link: Link) -> None:
        current = self._links.get(node)
        if current is not None and current.link is link:
            del self._links[node]
            if link.via:
                self._broken_detours[node] = [*self._recently_broken(node), trio.current_time()]
            self.on_lost(node)

    def _recently_broken(self, node: NodeName) -> list[float]:
        since = trio.current_time() - EXCUSED_S
        return [when for when in self._broken_detours.get(node, ()) if when > since]

    # -- detours ---------------------------------------------------------------------------------

    def detours(self) -> dict[NodeName, tuple[str, str]]:
        """Nodes that are reached through another one: that one, and why the straight path is not taken."""
        if self.paths is None:
            return {}
        return {node: (server.via, self.paths.why(node)) for node, server in self._links.items() if server.via}

    def is_detoured(self, node: NodeName) -> bool:
        server = self._links.get(node)
        return server is not None and server.link.via != ""

    async def mind_paths_forever(self, *, hurry: bool) -> None:
        """Leave paths that do not work any more, and detours when the straight path works again, until cancelled.

        hurry   when going back, new requests wait up to DRAIN_S for those under way. Else only when nothing is under
                way: for calls that take long.
        """
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(WATCH_INTERVAL_S)
                now_s = trio.current_time()
                for node, server in self._links.items():
                    waiting = server.link.waiting_count
                    if node == self._local_node:
                        continue
                    if waiting and server.silent_s > DOUBT_S and now_s >= server.doubt_due_s:
                        server.doubt_due_s = now_s + CONNECT_TIMEOUT_S + DOUBT_INTERVAL_S
                        nursery.start_soon(self._look, self._try_others, node, server)
                    elif server.via and (hurry or not waiting) and now_s >= server.return_due_s:
                        server.return_due_s = now_s + CONNECT_TIMEOUT_S + RETURN_INTERVAL_S
                        nursery.start_soon(self._look, self._try_straight, node, server)

    async def _look(self, look: Look, node: NodeName, server: ServerLink) -> None:
        listed = self._directory(node)
        if listed is None or self.paths is None:
            return
        try:
            await look(node, server, (listed.address, listed.port), self.paths)
        except CsvfsError as error:
            log.debug("no other path to node %s: %s", node, error)

    async def _try_straight(self, node: NodeName, server: ServerLink, address: Address, paths: Paths) -> None:
        link = await paths.connect_straight(address, node=node, timeout_s=CONNECT_TIMEOUT_S)
        if self._links.get(node) is server:
            await self._move(node, server, link, drain=True)
        else:
            link.close()  # it was lost meanwhile, and whoever needs it has opened another one

    async def _try_others(self, node: NodeName, server: ServerLink, address: Address, paths: Paths) -> None:
        """Nothing comes by the open link. A server that is slow to answer lets us in anew by the same path; where it does
        so by another path alone, this one is lost, and need not be waited for."""
        before_ns = server.link.progress_ns
        link = await paths.connect(address, node=node, service=DRIVES, timeout_s=CONNECT_TIMEOUT_S)
        is_silent = self._links.get(node) is server and server.link.progress_ns == before_ns
        if is_silent and link.via != server.via:
            await self._move(node, server, link, drain=False)
        else:
            link.close()

    async def _move(self, node: NodeName, server: ServerLink, link: Link, *, drain: bool) -> None:
        """From `server` to `link`, which is open and has said nothing yet. Whoever asks for the node waits meanwhile."""
        del self._links[node]
        self._opening[node] = trio.Event()
        self.on_moving()
        try:
            if drain:
                await _drain(server.link)
            else:
                server.link.close(Disconnected(f"node {node} does not answer by this path"))
            if server.link.waiting_count:
                self._links[node] = server  # as before; the next try is in RETURN_INTERVAL_S
            else:
                self._links[node] = await self._introduce_or_open(node, link)
        except CsvfsError as error:
            log.info("node %s is not reached any more: %s", node, error)
        finally:
            current = self._links.get(node)
            for old in (server.link, link):
                if current is None or current.link is not old:
                    old.close(Disconnected(f"node {node} is reached by another path now"))
            self._opening.pop(node).set()
            if current is None:
                self.on_lost(node)

    async def _introduce_or_open(self, node: NodeName, link: Link) -> ServerLink:
        try:
            # The server closes the link before, before it answers: nothing comes by it any more (I4).
            opened = await self._introduce(node, link)
        except CsvfsError as error:
            log.info("another path to node %s was there for a moment only: %s", node, error)
            return await self._open(node)
        opened.excuses = True
        log.warning("the drive server of node %s is reached %s now", node, f"through node {link.via}" if link.via else "by the straight path")
        return opened

    async def call(self, node: NodeName, name: str, args: dict[str, Any], *, timeout_s: float) -> Any:
        """One call to `node`'s drive server, made once more when only its path was lost: all calls may be.

        Raises   what the server answers, Unavailable, TimedOut. Cancel safe; it may still be carried out.
        """
        server = await self.connected(node)
        try:
            return await server.link.call(name, args, timeout_s=timeout_s)
        except Disconnected:
            if self.paths is None or server.link.closed is None:
                raise
            again = await self.connected(node)
            if not again.excuses:
                raise
            return await again.link.call(name, args, timeout_s=timeout_s)

    def tell_all(self, name: str, args: dict[str, Any]) -> None:
        """Send a call over every open link and ignore the answers: for hints that may get lost."""
        for server in list(self._links.values()):  # one that breaks leaves
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


async def without_excused(
    links: ServerLinks, drives: Mapping[NodeName, Iterable[DriveId]], failures: dict[DriveId, CsvfsError]
) -> dict[DriveId, CsvfsError]:
    """`failures` but for those of links that broke, of drives (by node) whose server is reached by another path now:
    there they are no drive's fault, and what was sent is to be sent again. Raises nothing. Cancel safe."""
    left = dict(failures)
    for node, of_node in drives.items():
        broken = [drive for drive in of_node if isinstance(left.get(drive), Disconnected)]
        if broken and links.paths is not None:
            try:
                server = await links.connected(node)
            except CsvfsError:
                continue  # by no path
            for drive in broken if server.excuses else ():
                del left[drive]
    return left


async def _drain(link: Link) -> None:
    """Until nothing is under way on it, or for DRAIN_S."""
    with trio.move_on_after(DRAIN_S):
        while link.waiting_count and link.closed is None:
            await trio.sleep(0.001)


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
