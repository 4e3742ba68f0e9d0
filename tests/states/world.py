"""What the worlds of slabs have in common: servers, links, tasks, faults, and what must hold of a slab's copies.

Place      state checker, above writer.py.
Faults     `faults_max` of the kinds a setup names, at every step: a server is killed; somebody is cut off from a
           server (healed at any later step); a call is not answered in time. Worlds add the death of writers.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

from csvfs.block import slab_state
from csvfs.errors import CsvfsError, TimedOut, Unavailable
from csvfs.ids import DriveId, NodeName
from csvfs.wire.block_messages import SlabDescriptor
from tests.states.drive_model import BLOCKS, SLAB, DriveServer, ServerEnd
from tests.states.explorer import Violation
from tests.states.links import Call
from tests.states.schedule import Ask, Task
from tests.states.writer import Writer

Step = tuple[str, Callable[[], None]]


@dataclass(slots=True, frozen=True)
class Setup:
    """
    writes      blocks that the first writer has just sent writes of, in this order
    later       blocks that its successor writes
    out         members that are out of sync at first
    ahead       of these, those that took the first write before they left, as nobody else did
    dead        the first writer has died at once: what it sent is on its way
    faults      kinds of faults: writer, coordinator, server, cut, late
    tasks_max   of the coordinator at a time
    rests       chunks may be unmarked by their writers' word: without, there are fewer states
    """

    members: int = 2
    writes: tuple[int, ...] = (0,)
    later: tuple[int, ...] = ()
    out: tuple[str, ...] = ()
    ahead: tuple[str, ...] = ()
    dead: bool = False
    faults: tuple[str, ...] = ("writer", "coordinator", "server", "cut", "late")
    faults_max: int = 2
    tasks_max: int = 1
    rests: bool = True


class SlabWorld:
    """One slab and its members. Also the facts that a coordinator asks for (ClusterFacts)."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        names = [NodeName(name) for name in "ABC"[: setup.members]]
        self.servers = {name: DriveServer(name, number) for number, name in enumerate(names, 1)}
        self.writers: dict[str, Writer] = {}
        self.tasks: list[Task] = []
        self.cuts: set[tuple[str, NodeName]] = set()
        self.late: list[tuple[str, Call]] = []
        self.faults_left = setup.faults_max

    def first_descriptor(self) -> SlabDescriptor:
        """With those that are `out` out, and installed on the others."""
        descriptor = slab_state.new_slab(SLAB, [(server.drive_id, name) for name, server in self.servers.items()])
        for name in self.setup.out:
            descriptor = slab_state.drop_members(descriptor, [self.servers[NodeName(name)].drive_id])
        for name, server in self.servers.items():
            if name not in self.setup.out:
                server.epoch = descriptor.epoch
        return descriptor

    @property
    def descriptor(self) -> SlabDescriptor:
        """As committed."""
        raise NotImplementedError

    # -- facts -----------------------------------------------------------------------------------

    def reaches(self, who: str, node: NodeName) -> bool:
        return self.servers[node].up and (who, node) not in self.cuts

    def server(self, node: NodeName) -> DriveServer | None:
        return self.servers[node] if self.servers[node].up else None

    def source(self, node: NodeName) -> tuple[str, int] | None:
        return (node, 0) if self.servers[node].up else None

    def is_alive(self, node: NodeName) -> bool:
        return node in self.servers or self.writers[node].alive

    def drive_nodes(self) -> list[NodeName]:
        return list(self.servers)

    def drives_of(self, node: NodeName) -> list[DriveId]:
        return [self.servers[node].drive_id]

    # -- steps -----------------------------------------------------------------------------------

    def steps(self) -> list[str]:
        return [name for name, _ in self._steps()]

    def do(self, step: str) -> None:
        for name, go in self._steps():
            if name == step:
                go()
                self._after()
                return
        raise AssertionError(f"{step!r} cannot happen now")

    def add(self, task: Task) -> None:
        if not task.ended:
            self.tasks.append(task)

    def _after(self) -> None:
        """What follows at once."""
        for writer in list(self.writers.values()):
            if writer.alive:
                for task in writer.repairs():
                    self.add(task)
        self.tasks = [task for task in self.tasks if not task.ended]

    def _steps(self) -> Iterator[Step]:
        yield from self._frames()
        yield from self._task_steps()
        for number, (what, call) in enumerate(self.late):
            if self.servers[call.node].up:
                yield f"late: {what} ({number})", lambda number=number: self._carry_out_late(number)  # type: ignore[misc]
        yield from self._server_steps()
        for who, node in sorted(self.cuts):
            yield f"{who} reaches {node} again", lambda cut=(who, node): self.cuts.discard(cut)  # type: ignore[misc]
        yield from self.activities()
        if self.faults_left:
            for name, go in (*self._faults(), *self.more_faults()):
                yield name, lambda go=go: self._fault(go)  # type: ignore[misc]

    def activities(self) -> Iterable[Step]:
        """What is due in this world."""
        return ()

    def more_faults(self) -> Iterable[Step]:
        """Faults of this world alone."""
        return ()

    def _fault(self, go: Callable[[], None]) -> None:
        self.faults_left -= 1
        go()

    def _frames(self) -> Iterator[Step]:
        for server in self.servers.values():
            for end in server.ends:
                if end.frames:
                    frame = end.frames[0]
                    late = "" if frame.link.closed is None else "late: "
                    name = f"{late}{server.node} takes write {frame.value} of {end.writer} {end.incarnation}"
                    yield (
                        f"{name} at epoch {frame.epoch}",
                        lambda server=server, end=end: self._deliver(server, end),  # type: ignore[misc]
                    )

    def _deliver(self, server: DriveServer, end: ServerEnd) -> None:
        frame = end.frames.pop(0)
        error: CsvfsError | None = None
        try:
            server.write(end, frame.sequence, frame.below, frame.epoch, frame.block, frame.value)
            self.landed(server, end)
        except CsvfsError as refused:
            error = refused
        frame.link.answered(frame, error)

    def landed(self, server: DriveServer, end: ServerEnd) -> None:
        """A write was taken. Raises Violation."""

    def _task_steps(self) -> Iterator[Step]:
        for task in self.tasks:
            ask = task.ask
            if ask is None or not ask.ready():
                continue
            call = ask.data
            if call is None:
                yield f"{task.name}: {ask.what}", task.answer
            elif not self.reaches(call.links.who, call.node):
                yield f"{task.name}: {ask.what} fails", lambda task=task: task.fail(Unavailable("out of reach"))  # type: ignore[misc]
            else:
                yield f"{task.name}: {ask.what}", lambda task=task, call=call: self._answer(task, call)  # type: ignore[misc]
                if self.faults_left and "late" in self.setup.faults:
                    yield (
                        f"{task.name}: {ask.what} is not answered in time",
                        lambda task=task, ask=ask: self._fault(lambda: self._time_out(task, ask)),  # type: ignore[misc]
                    )

    def _answer(self, task: Task, call: Call) -> None:
        try:
            answer = call.carry_out()
        except CsvfsError as error:
            task.fail(error)
        else:
            task.answer(answer)

    def _time_out(self, task: Task, ask: Ask) -> None:
        self.late.append((f"{ask.what} for {ask.data.links.who} {ask.data.links.incarnation}", ask.data))
        task.fail(TimedOut("no answer"))

    def _carry_out_late(self, number: int) -> None:
        _, call = self.late.pop(number)
        try:
            call.carry_out()
        except CsvfsError:
            return  # nobody hears it

    def _server_steps(self) -> Iterator[Step]:
        for server in self.servers.values():
            if not server.up:
                yield f"{server.node} starts", server.start
            if not (server.up and self.setup.rests):
                continue
            if server.can_unmark():
                yield f"{server.node} flushes, and its chunks rest", server.flush_and_rest
            for writer in self.writers.values():
                ready = writer.links.ready(server.node)
                below = writer.bus.completed_below()
                if writer.alive and ready is not None and ready.link.end.marks.below < below and ready.link.end.marks.marks:
                    yield (
                        f"{server.node} hears what of {writer.name} is complete",
                        lambda marks=ready.link.end.marks, below=below: setattr(marks, "below", below),  # type: ignore[misc]
                    )

    # -- faults ----------------------------------------------------------------------------------

    def _faults(self) -> Iterator[Step]:
        for server in self.servers.values():
            if server.up and "server" in self.setup.faults:
                yield f"{server.node} is killed", lambda server=server: self._kill_server(server)  # type: ignore[misc]
            if "cut" in self.setup.faults:
                for who in self.who():
                    if (who, server.node) not in self.cuts:
                        yield (
                            f"{who} is cut off from {server.node}",
                            lambda who=who, node=server.node: self._cut(who, node),  # type: ignore[misc]
                        )

    def who(self) -> Iterable[str]:
        """Who may be cut off from a server."""
        return ()

    def _cut(self, who: str, node: NodeName) -> None:
        self.cuts.add((who, node))
        for writer in self.writers.values():
            if writer.name == who:
                writer.links.lose(node)

    def _kill_server(self, server: DriveServer) -> None:
        server.kill()
        self.late = [(what, call) for what, call in self.late if call.node != server.node]

    def kill_writer(self, writer: Writer) -> None:
        writer.alive = False
        self.kill_tasks(writer.name)
        writer.links.die()

    def kill_tasks(self, owner: str) -> None:
        for task in self.tasks:
            if task.owner == owner:
                task.kill()

    # -- what must hold --------------------------------------------------------------------------

    def check(self) -> None:
        members = [self.servers[member.node] for member in self.descriptor.in_sync]
        for server in self.servers.values():
            if server.epoch > self.descriptor.epoch:
                raise Violation(f"I1: {server.node} has epoch {server.epoch}; {self.descriptor.epoch} is committed")
        for block in range(BLOCKS):
            self._check_block(block, members)

    def _check_block(self, block: int, members: list[DriveServer]) -> None:
        acked = max((value for value in self._acked() if self._block_of(value) == block), default=0)
        for member in members:
            value = member.values[block]
            if value < acked:
                raise Violation(f"I2: write {acked} of block {block} was acknowledged; {member.node} has {value}")
            for other in members:
                if other.values[block] < value and block not in member.active:
                    raise Violation(
                        f"I3: {member.node} has write {value} of block {block}, {other.node} has {other.values[block]}, "
                        f"and it is not active on {member.node}"
                    )

    def _acked(self) -> Iterator[int]:
        for writer in self.writers.values():
            yield from writer.acked

    def _block_of(self, value: int) -> int:
        return next(
            block for writer in self.writers.values() for block, sent in writer.sent if sent == value
        )

    def check_committed(self, before: SlabDescriptor, after: SlabDescriptor) -> None:
        """Of every change that is committed. Raises Violation."""
        if after.epoch != before.epoch + 1:
            raise Violation(f"I1: epoch {after.epoch} is committed behind {before.epoch}")
        if not {m.drive for m in before.in_sync} & {m.drive for m in after.in_sync}:
            raise Violation(f"I1: the in-sync sets of epochs {before.epoch} and {after.epoch} share no member")

    def fingerprint(self) -> Hashable:
        return (
            self.descriptor,
            tuple(server.fingerprint() for server in self.servers.values()),
            tuple(
                (end.writer, end.incarnation, tuple((f.sequence, f.epoch, f.below, f.counts) for f in end.frames))
                for server in self.servers.values()
                for end in server.ends
                if end.frames
            ),
            tuple(writer.fingerprint() for writer in self.writers.values()),
            tuple(sorted(hash(task.fingerprint()) for task in self.tasks)),
            tuple(what for what, _ in self.late),
            tuple(sorted(self.cuts)), self.faults_left,
        )  # fmt: skip
