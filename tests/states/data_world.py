"""World of a data slab: mounts write, die and are evicted, while drive servers and coordinators come and go.

Place      state checker, above world.py.
Real       Bus of each mount; SlabChanges, DriveControl, DataBook, Eviction, take_census, judge, restore,
           forget_lost_copies, bring_in_sync, slab_state; MarkBook of each drive server. Run step by step.
Modelled   drive servers (drive_model.py) and links (links.py). What a coordinator does when something happens:
           `look` and `drop` are coordinator/membership_reactions.py, `_restore` and `_drop_forever`, and resync.py,
           `_work_on`; `evict` is session_desk.py, `_carry_out`. Of a mount's session (csvfs/mount/session.py), that it
           asks. Batches are durable when they were executed.
Symmetry   by the first state: mount m1 has the write lease and has sent its writes, m2 comes after it. Members are
           not alike: the first in-sync one is the source.

Checked    in every state: I1, I2, I3; I5: once the lease has passed on, all copies that m2 may read are equal where
           it is not writing. In steps: I1 of every commit, I6.
"""

from collections.abc import Callable, Hashable, Iterator
from typing import Any

from coordinator.drive_control import DriveControl
from coordinator.eviction import Eviction
from coordinator.restoration import forget_lost_copies, restore, take_census
from coordinator.resync import bring_in_sync
from coordinator.slab_book import DataBook, Outcome
from coordinator.slab_changes import SlabChanges
from csvfs.errors import CsvfsError, Fenced, Unavailable
from csvfs.ids import DriveId, Epoch, NodeName, SlabId, Term
from csvfs.wire.block_messages import ROLE_IN_SYNC, SlabDescriptor
from tests.states.drive_model import BLOCKS, SLAB, VOLUME, DriveServer
from tests.states.explorer import Violation
from tests.states.links import Links
from tests.states.schedule import Ask, Task, freeze
from tests.states.world import Setup, SlabWorld, Step
from tests.states.writer import Writer

COORDINATOR = "coordinator"


class _Owner:
    """Of the mount's session: asks the coordinator (coordinator/service.py, `_slab_failed`)."""

    def __init__(self, world: "DataWorld", name: str) -> None:
        self._world = world
        self._name = name

    async def slab_failed(self, slab: SlabId, epoch: int, drives: list[DriveId], reason: str) -> SlabDescriptor:
        world = self._world
        if self._name in world.ended:
            raise Fenced(f"{self._name} was evicted")
        if world.coordinator is None:
            raise Unavailable("no coordinator")
        answers: list[tuple[Any, CsvfsError | None]] = []
        task = Task(
            f"slab_failed of {self._name}",
            COORDINATOR,
            world.coordinator.changes.failed(slab, Epoch(epoch), drives, ""),
            lambda result, error: answers.append((result, error)),
        )
        world.add(task)
        if not answers:
            await Ask(f"{self._name} hears of the slab", ready=lambda: bool(answers) or task.ended)
        if not answers:
            raise Unavailable("the coordinator has ended")
        if self._name in world.ended:
            raise Fenced(f"{self._name} was evicted")
        result, error = answers[0]
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]


class _Session:
    """Of Session: what Eviction needs."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer.writer
        self.incarnation = writer.incarnation
        self.node = NodeName(writer.name)
        self.last_answer = 0.0


class Coordinator:
    """One term: everything of it that is in memory."""

    def __init__(self, world: "DataWorld", term: int) -> None:
        self.term = term
        self._world = world
        links: Any = Links(world, COORDINATOR, COORDINATOR, term)
        metadata: Any = world
        self.control = DriveControl(links, links, Term(term), world.source)
        self.changes = SlabChanges(DataBook(metadata, self._run, self._wait_durable), self.control)
        self._facts: Any = world
        self._eviction = Eviction(VOLUME, self.changes, self.control, self._facts)

    async def _run(self, apply: Callable[[], Outcome]) -> Outcome:
        await Ask("a change is committed")
        return apply()

    async def _wait_durable(self) -> None:
        """Batches are durable at once."""

    async def evict(self, writer: Writer) -> None:
        session: Any = _Session(writer)
        await self._eviction.fence_out(session, succeeded=lambda: not writer.alive)
        await Ask(f"{writer.name} is forgotten, its leases pass on")
        self._world.lease_passes_on(writer)

    async def look(self) -> None:
        changes = self.changes
        since = changes.change_count
        census = await take_census(self.control, self._facts, VOLUME, self._world.drive_nodes())
        await restore(changes, census, since)
        await forget_lost_copies(changes, census)
        for descriptor in changes.book.all():
            for member in descriptor.members:
                if member.role != ROLE_IN_SYNC and member.drive in census.node_of:
                    await bring_in_sync(changes, descriptor.slab, member.drive)

    def fingerprint(self) -> Hashable:
        changes = self.changes
        return self.term, freeze(changes._settled), freeze(changes._changed_at), freeze(changes._equalizing)


class DataWorld(SlabWorld):
    """See the head of this module. Also the volume's metadata, as DataBook has it: what outlives coordinators."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._committed = self.first_descriptor()
        self.ended: set[str] = set()  # mounts that were evicted
        self.holder = "m1"  # of the write lease
        self.coordinator: Coordinator | None = None
        self._term = 0
        self._begin_coordinator()
        self._add_mount("m1")
        for name in setup.ahead:
            server = self.servers[NodeName(name)]
            end = self.writers["m1"].links.ready(server.node).link.end
            server.write(end, 1, 1, server.epoch, setup.writes[0], 1)
        for value, block in enumerate(setup.writes, 1):
            self.writers["m1"].write(block, value)
        if setup.dead:
            self.kill_writer(self.writers["m1"])

    def _add_mount(self, name: str) -> None:
        writer = self.writers[name] = Writer(self, name, f"mount/{name}", 1, _Owner(self, name))
        writer.connect(self.descriptor)

    def _begin_coordinator(self) -> None:
        self._term += 1
        self.coordinator = Coordinator(self, self._term)

    @property
    def descriptor(self) -> SlabDescriptor:
        return self._committed

    def slab(self, slab: SlabId) -> SlabDescriptor:
        return self._committed

    def slabs(self) -> Iterator[SlabDescriptor]:
        return iter([self._committed])

    def set_slab(self, descriptor: SlabDescriptor) -> None:
        self.check_committed(self._committed, descriptor)
        self._committed = descriptor

    def lease_passes_on(self, writer: Writer) -> None:
        self.ended.add(writer.name)
        self.holder = "m2"
        self._add_mount("m2")

    # -- steps -----------------------------------------------------------------------------------

    def activities(self) -> Iterator[Step]:
        heir = self.writers.get("m2")
        if heir is not None and len(heir.sent) < len(self.setup.later):
            block, value = self.setup.later[len(heir.sent)], 11 + len(heir.sent)
            yield f"m2 writes {value}", lambda: heir.write(block, value)
        coordinator = self.coordinator
        if coordinator is None:
            yield "a coordinator takes over", self._begin_coordinator
            return
        if sum(task.owner == COORDINATOR for task in self.tasks) >= self.setup.tasks_max:
            return
        first = self.writers["m1"]
        if "m1" not in self.ended and (not first.alive or first.fenced):
            yield from self._due("evict m1", lambda: coordinator.evict(first))
        for server in self.servers.values():
            is_writable = any(member.node == server.node for member in self.descriptor.writable)
            if not server.up and is_writable and len(self.descriptor.in_sync) > 1:
                yield from self._due(
                    f"drop {server.node}", lambda node=server.node: coordinator.changes.drop_node(node, "gone")
                )
        if any(self._wants_look(server) for server in self.servers.values()):
            yield from self._due("look", coordinator.look)

    def _due(self, name: str, make: Callable[[], Any]) -> Iterator[Step]:
        if not any(task.name == name for task in self.tasks):
            yield name, lambda: self.add(Task(name, COORDINATOR, make()))

    def _wants_look(self, server: DriveServer) -> bool:
        """Whether a look at it would bring the slab further."""
        in_sync = any(member.node == server.node for member in self.descriptor.in_sync)
        is_whole = in_sync and server.in_service and server.epoch == self.descriptor.epoch
        return self.reaches(COORDINATOR, server.node) and not is_whole

    def who(self) -> tuple[str, ...]:
        return (COORDINATOR, self.holder) if self.writers[self.holder].alive else (COORDINATOR,)

    def more_faults(self) -> Iterator[Step]:
        first = self.writers["m1"]
        if "writer" in self.setup.faults and first.alive and "m1" not in self.ended:
            yield "m1 is killed", lambda: self.kill_writer(first)
            if self.coordinator is not None and not any(task.name == "evict m1" for task in self.tasks):
                yield "m1 does not answer, and is evicted", self._evict_living
        if "coordinator" in self.setup.faults and self.coordinator is not None:
            yield "the coordinator is killed", self._kill_coordinator

    def _evict_living(self) -> None:
        assert self.coordinator is not None
        self.add(Task("evict m1", COORDINATOR, self.coordinator.evict(self.writers["m1"])))

    def _kill_coordinator(self) -> None:
        self.coordinator = None
        self.kill_tasks(COORDINATOR)

    # -- what must hold --------------------------------------------------------------------------

    def check(self) -> None:
        super().check()
        if self.holder == "m2":
            self._check_passed()

    def _check_passed(self) -> None:
        """m2 reads from whichever in-sync copy it likes."""
        heir = self.writers["m2"]
        known = heir.bus.descriptor(SLAB) or self.descriptor
        members = [self.servers[member.node] for member in known.in_sync]
        served = [server for server in members if server.serves_reads(known.epoch)]
        pending = {block for block, value in heir.sent if value not in heir.acked}
        for block in set(range(BLOCKS)) - pending:
            if len({server.values[block] for server in served}) > 1:
                found = " or ".join(f"{server.values[block]} from {server.node}" for server in served)
                raise Violation(f"I5: the lease has passed on, and block {block} is read as {found}")

    def landed(self, server: DriveServer, end: Any) -> None:
        """Once the lease has passed on, nothing of its former holder lands where it counts."""
        is_in_sync = any(member.node == server.node for member in self.descriptor.in_sync)
        if end.writer == "mount/m1" and "m1" in self.ended and is_in_sync and server.epoch == self.descriptor.epoch:
            raise Violation(f"I6: a write of m1 lands on {server.node} after its lease has passed on")

    def fingerprint(self) -> Hashable:
        coordinator = None if self.coordinator is None else self.coordinator.fingerprint()
        return super().fingerprint(), coordinator, self._term, self.holder, tuple(sorted(self.ended))
