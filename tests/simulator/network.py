"""The simulated network: links between simulated processes, with delays, breaks, partitions and pauses.

Place      simulator, above events.py. `SimLink` is csvfs.net.link.Link with pipes instead of a socket: requests,
           answers and calls are the real code, frames are really packed and parsed.
Model      TCP. What one side sends arrives in order or not at all. A connection may break at any frame. While a
           direction is cut, frames wait; after PEER_SILENT_S the sender gives the connection up. A process
           that is stopped takes in nothing and lets nothing out, but its kernel still acknowledges. The buffer
           of a frame is overwritten when its handler returns, as that of the real link is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

import trio

from csvfs.errors import CsvfsError, Disconnected, ProtocolError, TimedOut, Unavailable
from csvfs.net.link import _ANSWERS, Address, Link, Payload, _ignore_frame, describe_address
from csvfs.wire.frames import ACCEPTING_SIDE_BIT, Frame, Kind, pack_frame, parse_frame
from tests.simulator.events import EventQueue

if TYPE_CHECKING:
    from tests.simulator.process import Process

PEER_SILENT_S = 8.0  # TCP_USER_TIMEOUT of net/link.py
_END = b""  # of a connection


class ProcessKilled(BaseException):
    """Raised inside of a process at the instant at which it is killed."""


class Pipe:
    """One direction of a connection."""

    def __init__(self, network: Network, sender: SimLink, receiver: SimLink) -> None:
        self.network = network
        self.sender = sender
        self.receiver = receiver
        self._items: deque[tuple[float, bytes | bytearray | Callable[[], None], bool]] = deque()
        self._last_due = 0.0
        self._scheduled = False
        self._stalls = 0

    def send(self, item: bytes | bytearray | Callable[[], None]) -> None:
        network = self.network
        now = network.now
        due = max(self._last_due, now + network.delay(self.sender.process, self.receiver.process))
        self._last_due = due
        self._items.append((due, item, self.sender.process.paused))
        if not self._scheduled:
            self._scheduled = True
            network.events.at(due, self.pump)

    def drop(self, keep: int = 0) -> None:
        """Lose what is on its way, but for the first `keep` frames."""
        while len(self._items) > keep:
            self._items.pop()

    def drop_held(self) -> None:
        """The sender died while it was stopped: what it was about to send never left."""
        self._items = deque(item for item in self._items if not item[2])

    def pump(self) -> None:
        """Deliver what is due, as far as it may pass."""
        self._scheduled = False
        while self._items:
            due, item, held = self._items[0]
            if due > self.network.now:
                self._scheduled = True
                self.network.events.at(due, self.pump)
                return
            if not self.network.passable(self, held):
                self._stall()
                return
            self._items.popleft()
            self.receiver.take(item)

    def _stall(self) -> None:
        self.network.stalled[self] = None
        self._stalls += 1
        stalls = self._stalls
        if not self.receiver.process.paused and not self.sender.process.paused:
            self.network.events.after(PEER_SILENT_S, lambda: self._give_up(stalls))

    def _give_up(self, stalls: int) -> None:
        if self in self.network.stalled and self._stalls == stalls and self.sender.closed is None:
            self.sender.close(Disconnected(f"connection to {self.sender.peer} broke: nothing acknowledged"))

    def resume(self) -> None:
        if not self._scheduled:
            self.pump()


class SimLink(Link):
    """One end of a connection. The base class's socket and buffers do not exist."""

    def __init__(self, process: Process, peer: str, *, accepting: bool) -> None:
        self.engine = process.engine
        self.process = process
        self.peer = peer
        self.closed = None
        self.on_frame = _ignore_frame
        self.on_close = lambda link, error: None
        self.owner = None
        self.progress_ns = process.network.now_ns()
        self.out: Pipe
        self._request_id = ACCEPTING_SIDE_BIT if accepting else 0
        self._waiting = {}
        process.links[self] = None

    def send(self, kind: int, request_id: int, head: bytes = b"", payload: Payload | None = None) -> None:
        if self.closed is not None:
            return
        if kind == Kind.WRITE and self.process.role in self.out.network.before_write:
            self.out.network.before_write.pop(self.process.role)(self.process)
        if payload is None:
            self.out.send(bytearray(pack_frame(kind, request_id, head)))
        else:
            self.out.send(bytearray(pack_frame(kind, request_id, head, len(payload)) + bytes(payload)))

    def take(self, item: bytes | bytearray | Callable[[], None]) -> None:
        """What arrives: a frame, the opening or the end of the connection."""
        if callable(item):
            if self.process.alive:
                item()
        elif self.closed is not None:
            if item:  # who sends to a connection that is gone is told so
                self.out.network.events.after(0.001, self.out.receiver.reset)
        elif not item:
            self.close(Disconnected(f"{self.peer} closed the connection"))
        else:
            self._take_frame(item)

    def _take_frame(self, buffer: bytes | bytearray) -> None:
        process = self.process
        try:
            frame: Frame = parse_frame(memoryview(buffer))
            if frame.kind in _ANSWERS:
                self._take_answer(frame)
            else:
                self.on_frame(self, frame)
        except ProtocolError as error:
            self.close(error)
        except ProcessKilled:
            process.kill("in the middle of a store")
            return
        assert isinstance(buffer, bytearray)
        buffer[:] = b"\xee" * len(buffer)

    async def _wait(self, done: trio.Event, timeout_s: float) -> None:
        """As that of the real link, at half its cost: an event in place of a scope."""
        self.process.network.events.after(timeout_s, done.set)
        await done.wait()

    def close(self, error: CsvfsError | None = None) -> None:
        if self.closed is not None:
            return
        self.out.send(_END)
        self._end(error or Disconnected(f"connection to {self.peer} was closed here"))

    def reset(self) -> None:
        """The connection is gone without a word."""
        if self.closed is None:
            self._end(Disconnected(f"connection to {self.peer} was reset"))

    def _end(self, error: CsvfsError) -> None:
        self.closed = error
        self.process.links.pop(self, None)
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer(None, Disconnected(f"connection to {self.peer} was lost: {error}"))
        self.on_close(self, error)

    def die(self, *, quietly: bool) -> None:
        """Its process was killed: nobody is called back. quietly: its machine is off and says nothing."""
        self.closed = Disconnected("its process is dead")
        self._waiting = {}
        self.out.drop_held()
        # What its system had not taken yet, or the wire not yet, is lost: for each connection another part.
        rng = self.out.network.rng
        if rng.random() < 0.5:
            self.out.drop(rng.randrange(4))
        if not quietly:
            self.out.send(_END)


class SimListener:
    """As csvfs.net.link.Listener: opened in the process of `engine`."""

    def __init__(self, engine: Any, address: Address, on_link: Callable[[Link], None]) -> None:
        self.process: Process = engine.process
        network = self.process.network
        self.port = 0
        if not isinstance(address, str):
            network.last_port += 1
            self.port = network.last_port
            address = (address[0], self.port)
        self.address = address
        self.on_link = on_link
        network.listeners[address] = self

    def close(self) -> None:
        listeners = self.process.network.listeners
        if listeners.get(self.address) is self:
            del listeners[self.address]


class Network:
    """All connections of a run, and what is wrong with them at the moment."""

    def __init__(self, events: EventQueue, rng: Random) -> None:
        self.events = events
        self.rng = rng
        self.clock = events._clock
        self.listeners: dict[Address, SimListener] = {}
        self.last_port = 7000
        self.cut: set[tuple[str, str]] = set()  # (from node, to node)
        self.scale = 1.0  # of all delays of the run
        self.slow: dict[str, float] = {}  # node to seconds that its frames take longer
        self.stalled: dict[Pipe, None] = {}
        self.held: set[Pipe] = set()  # deliver nothing at the moment
        self.held_senders: set[Process] = set()  # of which nothing arrives, by any connection
        self.before_write: dict[str, Callable[[Process], None]] = {}  # by role: once, before one sends its next WRITE
        self.links: list[SimLink] = []  # one end of each connection made

    @property
    def now(self) -> float:
        return self.clock.now

    def now_ns(self) -> int:
        return int(self.clock.now * 1e9)

    def delay(self, source: Process, target: Process) -> float:
        base = 0.00005 if source.node == target.node else 0.0002
        slow = self.slow.get(source.node, 0.0) + self.slow.get(target.node, 0.0)
        return self.scale * base * (1 + 4 * self.rng.random()) + slow * self.rng.random()

    def passable(self, pipe: Pipe, held: bool) -> bool:
        source, target = pipe.sender.process, pipe.receiver.process
        if target.paused or (held and source.paused) or not target.machine.up:
            return False
        if pipe in self.held or source in self.held_senders:
            return False
        return source.node == target.node or (source.node, target.node) not in self.cut

    def kick(self) -> None:
        """Something was healed or goes on: let through what may pass now."""
        stalled, self.stalled = self.stalled, {}
        for pipe in stalled:
            pipe.resume()

    def break_some(self) -> str | None:
        """Break one connection, losing some of what is on its way."""
        self.links = [link for link in self.links if link.closed is None]
        if not self.links:
            return None
        near = self.rng.choice(self.links)
        far = near.out.receiver
        for end in (near, far):
            end.out.drop(self.rng.randrange(3))
            end.out.send(_END)
        return f"{near.process.name} - {far.process.name}"

    def reaches(self, source: Process, target: Process) -> bool:
        """In both directions."""
        pairs = {(source.node, target.node), (target.node, source.node)}
        return target.machine.up and (source.node == target.node or not pairs & self.cut)

    def hold_some(self) -> Pipe | None:
        """One direction of one connection delivers nothing any more, as where packets are lost again and again."""
        self.links = [link for link in self.links if link.closed is None]
        if not self.links:
            return None
        near = self.rng.choice(self.links)
        pipe = near.out if self.rng.random() < 0.5 else near.out.receiver.out
        self.held.add(pipe)
        return pipe

    def let_go(self, pipe: Pipe) -> None:
        if pipe in self.held:
            self.held.discard(pipe)
            self.kick()

    def let_sender_go(self, process: Process) -> None:
        self.held_senders.discard(process)
        self.kick()

    def let_all_go(self) -> None:
        self.before_write.clear()
        self.held.clear()
        self.held_senders.clear()
        self.kick()

    async def connect(self, engine: Any, address: Address, *, timeout_s: float) -> Link:
        """As csvfs.net.link.connect, from the process of `engine`."""
        process: Process = engine.process
        node = process.node if isinstance(address, str) else address[0]
        blocked = {(process.node, node), (node, process.node)} & self.cut
        if node not in process.world.machines or not process.world.machines[node].up or blocked:
            await trio.sleep(timeout_s)
            raise TimedOut(f"{describe_address(address)} did not accept a connection within {timeout_s:g} s")
        await self.events.sleep(0.0005 * (1 + self.rng.random()))
        listener = self.listeners.get(address)
        if listener is None or not listener.process.alive:
            raise Unavailable(f"cannot connect to {describe_address(address)}: refused")
        near = SimLink(process, describe_address(address), accepting=False)
        far = SimLink(listener.process, process.name, accepting=True)
        near.out, far.out = Pipe(self, near, far), Pipe(self, far, near)
        near.out.send(lambda: listener.on_link(far))
        self.links.append(near)
        return near
