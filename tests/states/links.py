"""Links of the state checker: frames and calls on their way to drive servers, for the product's Bus and DriveControl.

Place      state checker, above drive_model.py, under the worlds.
A model    of csvfs/block/server_links.py and csvfs/net/link.py: frames of a link arrive in their order or not at all;
           a link that breaks is answered with Disconnected at once, and what was sent by it may still arrive, until the
           server hears of a new link of that writer, or of its fence. A call that is not answered in time may be
           carried out later. Pulls go on behind the back of whoever asked for them.
"""

from collections.abc import Callable, Hashable
from types import SimpleNamespace
from typing import Any, Protocol

from csvfs.errors import CsvfsError, Disconnected, Fenced, Unavailable
from csvfs.ids import DriveId, Incarnation, NodeName
from csvfs.units import BLOCKS_PER_CHUNK
from csvfs.wire.block_messages import BLOCK_HEAD
from tests.states.drive_model import DriveServer, PullModel, ServerEnd
from tests.states.schedule import Ask


class Ground(Protocol):
    """Of the world: what links need."""

    servers: dict[NodeName, DriveServer]

    def reaches(self, who: str, node: NodeName) -> bool: ...


class Frame:
    """A WRITE on its way."""

    def __init__(self, link: "Link", head: bytes, data: memoryview, answer: Any) -> None:
        self.link = link
        _, self.sequence, self.below, self.epoch, block, _, _, _ = BLOCK_HEAD.unpack_from(head)
        self.block = block // BLOCKS_PER_CHUNK
        self.value = data[0]
        self.answer = answer

    @property
    def counts(self) -> bool:
        """Whether the sender still waits for the answer to this sending."""
        return self.link.closed is None and bool(self.answer.write.attempt == self.answer.attempt)


class Link:
    """The sender's end of a link."""

    def __init__(self, end: ServerEnd) -> None:
        self.end = end
        self.closed: CsvfsError | None = None
        self._unanswered: list[Frame] = []

    def request(self, kind: int, head: bytes, data: memoryview, answer: Any) -> None:
        frame = Frame(self, head, data, answer)
        self._unanswered.append(frame)
        self.end.frames.append(frame)

    def answered(self, frame: Frame, error: CsvfsError | None) -> None:
        if self.closed is None:
            self._unanswered.remove(frame)
            frame.answer(None, error)

    def close(self, error: CsvfsError) -> None:
        if self.closed is None:
            self.closed = error
            unanswered, self._unanswered = self._unanswered, []
            for frame in unanswered:
                frame.answer(None, error)


class Call:
    """What an Ask for a call carries. `fenced`: a later term keeps it out, however late it is."""

    def __init__(self, links: "Links", node: NodeName, run: Callable[[], Any], *, fenced: bool = True) -> None:
        self.links = links
        self.node = node
        self._run = run
        self._fenced = fenced

    def carry_out(self) -> Any:
        """At the server. Raises CsvfsError."""
        server = self.links.ground.servers[self.node]
        if self._fenced:
            if self.links.incarnation < server.fences.get(self.links.writer, 0):
                raise Fenced(f"{self.links.writer} {self.links.incarnation} is over")
            self.links.open(server)
        return self._run()


class Links:
    """Of ServerLinks: what Bus and DriveControl use, for one incarnation of one writer."""

    def __init__(self, ground: Ground, who: str, writer: str, incarnation: int) -> None:
        self.ground = ground
        self.who = who
        self.writer = writer
        self.incarnation = incarnation
        self.engine = SimpleNamespace(hot=lambda: None)
        self.on_lost: Callable[[NodeName], None] = lambda node: None
        self.paths = None
        self.servers: dict[NodeName, Any] = {}

    # -- for the bus -----------------------------------------------------------------------------

    def ready(self, node: NodeName) -> Any:
        return self.servers.get(node)

    async def serving(self, node: NodeName, drive: DriveId) -> Any:
        if node not in self.servers:
            await Ask(f"{self.who} connects to {node}")
            if not self.ground.reaches(self.who, node):
                raise Unavailable(f"{node} cannot be reached")
            self.open(self.ground.servers[node])
        return self.servers[node]

    def open(self, server: DriveServer) -> None:
        """A link whose hello is answered. Raises Fenced."""
        if server.node not in self.servers:
            link = Link(server.hello(self.writer, self.incarnation))
            remote = SimpleNamespace(index=0, state="ok")
            self.servers[server.node] = SimpleNamespace(
                link=link, drives={server.drive_id: remote}, drive_index=lambda drive: 0
            )

    def lose(self, node: NodeName) -> None:
        """The link to `node` breaks."""
        server = self.servers.pop(node, None)
        if server is not None:
            server.link.close(Disconnected("broken"))

    def lose_closed(self) -> None:
        """Links that their server has closed break here too."""
        for node, server in list(self.servers.items()):
            if server.link.end.closed:
                self.lose(node)

    def die(self) -> None:
        """The process has ended: nobody hears answers; what was sent may still arrive."""
        for server in self.servers.values():
            server.link.closed = Disconnected("its sender has ended")
        self.servers.clear()

    # -- for the coordinator's calls -------------------------------------------------------------

    async def connected(self, node: NodeName) -> Any:
        if not self.ground.reaches(self.who, node):
            raise Unavailable(f"{node} cannot be reached")
        return SimpleNamespace(incarnation=Incarnation(self.ground.servers[node].incarnation))

    async def call(self, node: NodeName, name: str, args: dict[str, Any], *, timeout_s: float) -> Any:
        server = self.ground.servers[node]
        if name != "pull":
            return await Ask(f"{name} on {node}", Call(self, node, lambda: server.call(name, args)))
        pull = await Ask(f"pull on {node} begins", Call(self, node, lambda: PullModel(server, args), fenced=False))
        source = self.ground.servers[args["source"]["address"]]
        await Ask(f"pull on {node} reads from {source.node}", Call(self, node, lambda: pull.read(source), fenced=False))
        return await Ask(f"pull on {node} stores", Call(self, node, pull.store, fenced=False))

    def drop(self, node: NodeName, reason: str) -> None:
        """Calls that are late stay late."""

    def fingerprint(self) -> Hashable:
        return tuple(sorted((node, server.link.end.closed) for node, server in self.servers.items()))
