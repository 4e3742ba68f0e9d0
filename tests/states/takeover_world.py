"""World of a metadata slab: a coordinator writes, loses its volume without knowing, and others take over.

Place      state checker, above world.py.
Real       take_ownership, release_ownership, MetadataBook; Bus of each coordinator; SlabChanges, DriveControl,
           `_secure_once` (take_census, restore, judge, equalize), bring_in_sync, slab_state; MarkBook.
Modelled   drive servers (drive_model.py), links (links.py), and the cluster store, which does one operation at a
           time: an answer that got lost looks like one that never came. Of coordinator/host.py, that a volume without
           owner is taken, and a coordinator that finds its term over ends.
Symmetry   by the first state: c1 coordinates under term 1 and has sent its writes. Any further one is like the next.

Checked    in every state: I1, I2, I3; in steps: I1 of every commit, with the term under which it is made; terms only
           grow, and no two hosts hold one. When a takeover ends: all in-sync copies are equal, and from then on nothing
           of an earlier term lands where it counts (I6).
"""

from collections.abc import Hashable, Iterator
from typing import Any

from coordinator.drive_control import DriveControl
from coordinator.slab_book import MetadataBook, pack_descriptors, parse_descriptors
from coordinator.slab_changes import SlabChanges
from coordinator.takeover import secure_metadata_slabs
from csvfs.cluster.election import take_ownership
from csvfs.errors import Unavailable
from csvfs.ids import DriveId, Epoch, Incarnation, NodeName, SlabId, Term
from csvfs.store.interface import Compare, Delete, Item, Put, TransactionResult
from csvfs.wire.block_messages import SlabDescriptor
from csvfs.wire.control import pack_value, unpack_value
from tests.states.drive_model import BLOCKS, SLAB, VOLUME, DriveServer
from tests.states.explorer import Violation
from tests.states.schedule import Ask, Task, freeze
from tests.states.world import Setup, SlabWorld, Step
from tests.states.writer import Writer

NAME = "v"
META, TERM, OWNER = f"meta/{NAME}", f"term/{NAME}", f"owner/{NAME}"
HOSTS_MAX = 3  # incarnations of coordinator hosts, one after the other


class Store:
    """The cluster store as one host sees it."""

    def __init__(self, world: "TakeoverWorld", host: str) -> None:
        self._world = world
        self._host = host

    async def get(self, key: str) -> Item | None:
        await Ask(f"{self._host} reads {key}")
        return self._world.items.get(key)

    async def transact(self, compares: list[Compare], changes: list[Put | Delete]) -> TransactionResult:
        lost = await Ask(f"{self._host} changes {', '.join(change.key for change in changes)}", LOSABLE)
        result = self._world.transact(self._host, compares, changes)
        if lost:
            raise Unavailable("the store's answer was lost")
        return result


LOSABLE = object()  # an Ask whose answer may get lost


class _Owner:
    """As coordinator/serving.py, MetadataSlabOwner."""

    def __init__(self, host: "Host") -> None:
        self._host = host

    async def slab_failed(self, slab: SlabId, epoch: int, drives: list[DriveId], reason: str) -> SlabDescriptor:
        return await self._host.changes.failed(slab, Epoch(epoch), drives, reason)


class Host:
    """One coordinator: from the moment it has a term."""

    def __init__(self, world: "TakeoverWorld", name: str, term: int) -> None:
        self.name = name
        self.term = term
        self.secured = False
        self.writer = Writer(world, name, "coordinator", term, _Owner(self))
        links: Any = self.writer.links
        store: Any = Store(world, name)
        self.control = DriveControl(links, links, Term(term), world.source)
        self.book = MetadataBook(store, NAME, Term(term))
        self.changes = SlabChanges(self.book, self.control)
        self.changes.on_settled = self.writer.bus.learn

    def fingerprint(self) -> Hashable:
        book, changes = self.book, self.changes
        return (
            self.name, self.term, self.secured, freeze(book._descriptors), freeze(book._changing),
            freeze(changes._settled), freeze(changes._changed_at), freeze(changes._equalizing),
        )  # fmt: skip


class TakeoverWorld(SlabWorld):
    """See the head of this module."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.items: dict[str, Item] = {}
        self.revision = 1
        self.hosts: dict[str, Host] = {}
        self.terms_of: dict[int, str] = {}
        self._started = 1
        descriptor = self.first_descriptor()
        self._put(META, pack_descriptors([descriptor]))
        self._put(TERM, pack_value({"term": 1}))
        self._put(OWNER, pack_value({"node": "c1", "address": "", "port": 0, "incarnation": 1}))
        first = self._add_host("c1", 1)
        first.book._descriptors = {SLAB: descriptor}  # it has been at work for a while
        first.changes._settled = {SLAB: descriptor.epoch}
        first.secured = True
        first.writer.connect(descriptor)
        for server in self.servers.values():
            server.term = 1
            server.fences["coordinator"] = 1
        for value, block in enumerate(setup.writes, 1):
            first.writer.write(block, value)
        if setup.dead:
            self._kill_host(first)

    def _add_host(self, name: str, term: int) -> Host:
        host = self.hosts[name] = Host(self, name, term)
        self.writers[name] = host.writer
        self.terms_of[term] = name
        return host

    # -- the store -------------------------------------------------------------------------------

    def _put(self, key: str, value: bytes) -> None:
        self.items[key] = Item(key, value, self.revision, 0)

    def transact(self, who: str, compares: list[Compare], changes: list[Put | Delete]) -> TransactionResult:
        for compare in compares:
            item = self.items.get(compare.key)
            if (item.revision if item else 0) != compare.revision:
                return TransactionResult(False, self.revision)
        self.revision += 1
        for change in changes:
            if isinstance(change, Put):
                self._check_put(who, change)
                self._put(change.key, change.value)
            else:
                self.items.pop(change.key, None)
        return TransactionResult(True, self.revision)

    def _check_put(self, who: str, change: Put) -> None:
        if change.key == META:
            after = parse_descriptors(Item(META, change.value, 0, 0))[SLAB]
            self.check_committed(self.descriptor, after)
            if self.hosts[who].term != self.term:
                raise Violation(f"I1: {who} commits a change under term {self.hosts[who].term}; {self.term} is granted")
        if change.key == TERM:
            term = unpack_value(change.value)["term"]
            if term <= self.term or term in self.terms_of:
                raise Violation(f"I1: term {term} is granted to {who} behind term {self.term}")

    @property
    def term(self) -> int:
        return int(unpack_value(self.items[TERM].value)["term"])

    @property
    def descriptor(self) -> SlabDescriptor:
        return parse_descriptors(self.items[META])[SLAB]

    # -- steps -----------------------------------------------------------------------------------

    def activities(self) -> Iterator[Step]:
        if OWNER not in self.items and self._started < HOSTS_MAX:
            number = self._started + 1
            yield f"c{number} tries to take the volume", lambda: self._start(number)
        for host in self.hosts.values():
            if host.secured and host.term > 1 and host.writer.alive and len(host.writer.sent) < len(self.setup.later):
                block, value = self.setup.later[len(host.writer.sent)], 10 * host.term + len(host.writer.sent)
                yield f"{host.name} writes {value}", lambda host=host, block=block, value=value: host.writer.write(block, value)  # type: ignore[misc]

    def _start(self, number: int) -> None:
        self._started = number
        self.add(Task(f"takeover by c{number}", f"c{number}", self._take_over(number)))

    async def _take_over(self, number: int) -> None:
        name = NodeName(f"c{number}")
        store: Any = Store(self, name)
        while True:
            try:
                term = await take_ownership(store, NAME, name, "", 0, Incarnation(number), 0)
                break
            except Unavailable:
                continue
        if term is None:
            return
        if term in self.terms_of:
            raise Violation(f"I1: term {term} is held by {self.terms_of[term]} and {name}")
        host = self._add_host(name, term)
        facts: Any = self
        await secure_metadata_slabs(host.book, host.changes, host.control, facts, VOLUME)
        self._check_secured(host)
        host.secured = True

    def _check_secured(self, host: Host) -> None:
        """It opens the database: from whichever in-sync copy it likes."""
        members = [self.servers[member.node] for member in self.descriptor.in_sync]
        for block in range(BLOCKS):
            if len({server.values[block] for server in members if server.up}) > 1 and host.term == self.term:
                found = " or ".join(f"{server.values[block]} from {server.node}" for server in members)
                raise Violation(f"I5: {host.name} opens the database, and block {block} is read as {found}")

    def landed(self, server: DriveServer, end: Any) -> None:
        secured = max(host.term for host in self.hosts.values() if host.secured)
        is_in_sync = any(member.node == server.node for member in self.descriptor.in_sync)
        if end.incarnation < secured and is_in_sync and server.epoch == self.descriptor.epoch:
            raise Violation(f"I6: a write of term {end.incarnation} lands on {server.node}; term {secured} serves")

    def _task_steps(self) -> Iterator[Step]:
        ours = [task for task in self.tasks if task.ask is not None and task.ask.data is LOSABLE]
        for task in ours:
            what = task.ask.what if task.ask is not None else ""
            yield f"{task.name}: {what}", lambda task=task: task.answer(False)  # type: ignore[misc]
            if self.faults_left and "late" in self.setup.faults:
                yield (
                    f"{task.name}: {what}; the answer is lost",
                    lambda task=task: self._fault(lambda: task.answer(True)),  # type: ignore[misc]
                )
        tasks, self.tasks = self.tasks, [task for task in self.tasks if task not in ours]
        found = list(super()._task_steps())
        self.tasks = tasks
        yield from found

    def who(self) -> tuple[str, ...]:
        return tuple(host.name for host in self.hosts.values() if host.writer.alive)

    def more_faults(self) -> Iterator[Step]:
        if "writer" in self.setup.faults:
            owner = self.items.get(OWNER)
            if owner is not None:
                yield "the owner's lease ends, and it does not know", lambda: self._delete_owner()
        if "coordinator" in self.setup.faults:
            for host in self.hosts.values():
                if host.writer.alive:
                    yield f"{host.name} is killed", lambda host=host: self._kill_host(host)  # type: ignore[misc]

    def _delete_owner(self) -> None:
        self.revision += 1
        self.items.pop(OWNER, None)

    def _kill_host(self, host: Host) -> None:
        self.kill_writer(host.writer)
        owner = self.items.get(OWNER)
        if owner is not None and unpack_value(owner.value)["node"] == host.name:
            self._delete_owner()

    def fingerprint(self) -> Hashable:
        stored = tuple((key, item.value, item.revision) for key, item in sorted(self.items.items()))
        return super().fingerprint(), stored, tuple(host.fingerprint() for host in self.hosts.values()), self._started

