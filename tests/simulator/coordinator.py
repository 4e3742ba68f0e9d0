"""The coordinator's side in the simulator: real takeover, slab changes, restoration, resync and eviction.

Place      simulator. Production's host, service and session desk are replaced by what little of them the block layer
           needs: an election, sessions, and leases on regions of slabs (one holder each). All else is real.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import trio

from coordinator.cluster_facts import ClusterFacts
from coordinator.eviction import Eviction
from coordinator.membership_reactions import MembershipReactions
from coordinator.metadata_log import MetadataLog
from coordinator.resync import Resync
from coordinator.service import VolumeSetup
from coordinator.serving import MetadataSlabOwner, VolumeLinks
from coordinator.sessions import Session
from coordinator.slab_book import DataBook, MetadataBook
from coordinator.slab_changes import SlabChanges
from coordinator.slab_manager import SlabManager
from coordinator.takeover import bring_members_back, secure_metadata_slabs
from csvfs.block.bus import Bus
from csvfs.cluster.election import decide, release_ownership, take_ownership
from csvfs.cluster.membership import View, keep_view_forever
from csvfs.errors import Corrupt, CsvfsError, Disconnected, Fenced, LeaseLost, NotCoordinator, Unavailable
from csvfs.ids import DriveId, Epoch, Incarnation, NodeName, SlabId
from csvfs.net.calls import CallTable
from csvfs.net.link import Link
from csvfs.units import BLOCK_SIZE
from csvfs.wire.control import pack_value
from csvfs.wire.frames import Frame
from tests.simulator.journal import BLOCKS, Journal, SessionKey
from tests.simulator.network import SimListener
from tests.simulator.process import Process

RECALL_TIMEOUT_S = 2.0
WRITE_TIMEOUT_MS = 2000
ELECTION_INTERVAL_S = 2.0
LIVENESS_S = 0.3


class Host:
    """The process that coordinates the volume when its node was elected."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.world = process.world
        self.view = View()
        self.facts = ClusterFacts(self.view)
        self.service: SimService | None = None
        self._port = 0
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        process = self.process
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(keep_view_forever, process.store, self.view)
            listener = SimListener(process.engine, (process.node, 0), self._accept)
            self._port = listener.port
            value = {"address": process.node, "port": self._port, "incarnation": process.incarnation}
            await process.store.put(
                f"coordinators/{process.node}", pack_value(value), process.machine.lease
            )
            nursery.start_soon(self._watch_liveness_forever)
            await self._elect_forever()

    async def _watch_liveness_forever(self) -> None:
        lost = trio.Event()

        def look() -> None:
            if self.process.may_serve() or self.process.paused:
                self.world.events_queue.after(LIVENESS_S, look)
            else:
                lost.set()

        look()
        await lost.wait()
        raise LeaseLost(f"node {self.process.node} lost its lease")

    async def _elect_forever(self) -> None:
        name, process = self.world.volume_name, self.process
        ownerless_since: float | None = None
        while True:
            await process.gate()
            now = trio.current_time()
            if name in self.view.owners:
                ownerless_since = None
            else:
                ownerless_since = now if ownerless_since is None else ownerless_since
                alive = [node for node in self.view.coordinators if node in self.view.alive]
                for attempt in decide(process.node, [name], {}, alive, {}, int(ownerless_since * 1e9)):
                    if attempt.start_ns <= now * 1e9 and process.may_serve():
                        await self._take()
            with trio.move_on_after(0.1 if name not in self.view.owners else ELECTION_INTERVAL_S):
                await self.view.wait_changed()

    async def _take(self) -> None:
        process, name = self.process, self.world.volume_name
        try:
            term = await take_ownership(
                process.store, name, process.node, process.node, self._port, process.incarnation,
                process.machine.lease,
            )  # fmt: skip
        except CsvfsError:
            return
        if term is None:
            return
        self.world.trace(f"{process.name} coordinates with term {term}")
        setup = VolumeSetup(
            name=name, volume=self.world.volume, copies=self.world.copies, size=0,
            slab_size=self.world.slab_size, node=process.node, term=term, recall_timeout_s=RECALL_TIMEOUT_S,
            reclaim_timeout_s=1.0,
        )  # fmt: skip
        self.service = SimService(self, setup)
        try:
            await self.service.run()
        except* (NotCoordinator, Fenced, Unavailable) as group:
            self.world.trace(f"{process.name} term {term} ends: {group.exceptions[0]}")
        finally:
            self.service = None
            given_up = not process.alive or await self._give_up()
        await trio.sleep(0.5)
        while not given_up:
            await trio.sleep(0.5)
            given_up = await self._give_up()

    async def _give_up(self) -> bool:
        """As the host does."""
        process = self.process
        with trio.CancelScope(shield=True), trio.move_on_after(2):
            try:
                await release_ownership(process.store, self.world.volume_name, process.node, process.incarnation)
                return True
            except CsvfsError:
                self.world.trace(f"{process.name} could not give the volume up")
        return False

    def _accept(self, link: Link) -> None:
        link.on_frame = self._on_frame

    def _on_frame(self, link: Link, frame: Frame) -> None:
        service = self.service
        if service is None or service.nursery is None:
            link.reply_error(frame.request_id, NotCoordinator("the volume is not coordinated here"))
        else:
            service.calls.handle(link, frame, service.nursery)


class SimService:
    """One term of the volume's coordinator."""

    def __init__(self, host: Host, setup: VolumeSetup) -> None:
        self.host = host
        self.process = host.process
        self.world = host.world
        self.setup = setup
        self.facts = host.facts
        self.nursery: trio.Nursery | None = None
        self.ready = False
        self.resync = Resync(setup.name, setup.slab_size, lambda: False)
        self.sessions: dict[SessionKey, Session] = {}
        self.newest: dict[str, int] = {}
        self._evictions: dict[SessionKey, trio.Event] = {}
        self._regions: dict[int, trio.Lock] = {}
        self.calls = CallTable(
            {
                "hello": self._hello,
                "ping": self._serving(self._ping),
                "acquire": self._serving(self._acquire),
                "release": self._serving(self._release),
                "trim": self._serving(self._trim),
                "slab_failed": self._serving(self._slab_failed),
            }
        )

    async def run(self) -> None:
        process, world = self.process, self.world
        links = VolumeLinks(process.engine, self.facts, world.cluster, self.setup)  # type: ignore[arg-type]
        self.control = links.control
        self.book = MetadataBook(process.store, self.setup.name, self.setup.term)
        self.metadata_changes = SlabChanges(self.book, links.control)
        bus = Bus(
            links.writes, MetadataSlabOwner(self.metadata_changes), volume=self.setup.volume,
            local_node=process.node, silence_ms_max=WRITE_TIMEOUT_MS,
        )  # fmt: skip
        self.metadata_changes.on_settled = bus.learn
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bus.run_forever)
                nursery.start_soon(links.pulls.follow_servers_forever)
                await secure_metadata_slabs(
                    self.book, self.metadata_changes, links.control, self.facts, self.setup.volume
                )
                await self._open_journal(bus)
                self.nursery = nursery
                self._begin(nursery)
        finally:
            self.nursery = None
            bus.close()
            links.close()
            for session in self.sessions.values():
                if session.link is not None:
                    session.link.close(NotCoordinator("the volume is not coordinated here any more"))

    async def _open_journal(self, bus: Bus) -> None:
        slab = self.book.slabs[0]
        try:
            data = bytes(await bus.read(slab, 1, BLOCKS))
        except Corrupt:  # as serving.py
            await bring_members_back(self.metadata_changes)
            data = bytes(await bus.read(slab, 1, BLOCKS))
        blocks = [data[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE] for index in range(BLOCKS)]
        self.journal = Journal(blocks)
        self.world.trace(f"{self.process.name} opened the journal at commit {self.journal.commit}")
        self.world.journal_opened(list(self.journal.slabs()))
        self.log = MetadataLog(bus, self.journal, self.book.slabs, self.setup.slab_blocks)
        book = DataBook(self.journal, self.commit, self._wait_durable)  # type: ignore[arg-type]
        self.changes = SlabChanges(book, self.control)
        self.eviction = Eviction(self.setup.volume, self.changes, self.control, self.facts)
        for key in sorted(self.journal.sessions):
            self.sessions[key] = Session(0, (NodeName(key[0]), Incarnation(key[1])))

    def _begin(self, nursery: trio.Nursery) -> None:
        slabs: Any = SimpleNamespace(
            next_slab_id=1 << 40, creating=set(), pool_changed=lambda: None, delete_copy=self._delete_copy
        )
        desk: Any = SimpleNamespace(evict_dead_nodes=self._evict_dead_nodes)
        members = MembershipReactions(
            self.setup.volume, self.control, self.facts, [self.metadata_changes, self.changes], self.resync,
            slabs, desk,
        )  # fmt: skip
        self.members = members
        self.log.append(self.journal.take_log())
        nursery.start_soon(self.log.run_forever)
        nursery.start_soon(members.run_forever)
        nursery.start_soon(self.resync.run_forever)
        nursery.start_soon(self._watch_owner_forever)
        self.ready = True
        self._evict_dead_nodes()

    async def _watch_owner_forever(self) -> None:
        """As the host does: give up what somebody else has by now."""
        while True:
            term = self.host.view.terms.get(self.setup.name)
            if term is not None and term > self.setup.term:
                raise NotCoordinator(f"term {term} is at work elsewhere")
            await self.host.view.wait_changed()

    async def commit(self, change: Callable[[], Any]) -> Any:
        """Apply a change and return its value when it is on all members of the metadata slabs."""
        result = change()
        position = self.log.append(self.journal.take_log())
        descriptors = list(self.journal.slabs())
        await self.log.wait(position)
        self.world.descriptors_changed(descriptors)
        return result

    async def _wait_durable(self) -> None:
        """As service.py."""
        await self.log.flush()

    async def _delete_copy(self, slab: SlabId, node: NodeName, drive: DriveId) -> None:
        try:
            await self.control.delete_slab(slab, node, drive)
        except Fenced:
            raise
        except CsvfsError:
            return

    # -- calls -----------------------------------------------------------------------------------

    def _serving(self, handler: Callable[[Session, Any], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def serve(link: Link, args: Any) -> Any:
            session: Session | None = link.owner
            if session is None or session.ended:
                raise Fenced("this session has ended; start anew")
            self._check_serving()
            try:
                value = await handler(session, args)
            except trio.Cancelled:
                raise
            if session.ended:
                raise Fenced("this session has ended; start anew")
            self._check_serving()
            session.last_answer = trio.current_time()
            return value

        return serve

    def _check_serving(self) -> None:
        if not self.process.may_serve() or self.nursery is None:
            raise NotCoordinator("this node may not serve now")

    async def _hello(self, link: Link, args: Any) -> Any:
        if not self.ready:
            raise NotCoordinator("not ready yet")
        node, incarnation = args["node"], args["incarnation"]
        key: SessionKey = (node, incarnation)
        self._check_evicted(key)
        self.newest[node] = max(incarnation, self.newest.get(node, 0))
        for older in [other for other in self.sessions if other[0] == node and other[1] < incarnation]:
            await self._evict(self.sessions[older], "a later incarnation has come")
        session = self.sessions.get(key)
        if session is None:
            await self.commit(lambda: self.journal.sessions.add(key))
            self._check_evicted(key)
            session = self.sessions.setdefault(
                key, Session(0, (NodeName(node), Incarnation(incarnation)))
            )
        if session.ended:
            raise Fenced("this session has ended; start anew")
        if link.closed is not None:
            raise link.closed
        self._check_serving()
        session.attach(link)
        session.last_answer = trio.current_time()
        return {"term": self.setup.term}

    def _check_evicted(self, key: SessionKey) -> None:
        if key[1] <= self.journal.evicted.get(key[0], 0) or self.newest.get(key[0], 0) > key[1]:
            raise Fenced("this session was evicted; start anew")

    async def _ping(self, session: Session, args: Any) -> Any:
        return {}

    async def _slab_failed(self, session: Session, args: Any) -> Any:
        drives = [DriveId(drive) for drive in args["drives"]]
        slab = SlabId(args["slab"])
        try:
            descriptor = await self.changes.failed(slab, Epoch(args["epoch"]), drives, args["reason"])
        finally:
            if drives:
                self.members.look_into(drives)
        return descriptor.to_wire()

    async def _acquire(self, session: Session, args: Any) -> Any:
        region = int(args["region"])
        key: SessionKey = (session.node, session.incarnation)
        async with self._regions.setdefault(region, trio.Lock()):
            holder = self.journal.leases.get(region)
            if holder is not None and holder != key:
                await self._recall(region, holder)
            if session.ended:
                raise Fenced("this session has ended; start anew")

            def grant() -> list[Any]:
                self.journal.leases[region] = key
                return [self.journal.slab(SlabId(slab)).to_wire() for slab in args["slabs"]]

            return {"slabs": await self.commit(grant)}

    async def _recall(self, region: int, holder: SessionKey) -> None:
        session = self.sessions.get(holder)
        if session is None:
            return
        try:
            await session.call("recall", {"region": region}, timeout_s=RECALL_TIMEOUT_S)
        except Disconnected:
            with trio.move_on_after(RECALL_TIMEOUT_S):
                await session.connected.wait()
                try:
                    await session.call("recall", {"region": region}, timeout_s=RECALL_TIMEOUT_S)
                    return
                except CsvfsError:
                    pass
            await self._evict(session, "it is not connected")
        except CsvfsError as error:
            await self._evict(session, f"it does not give back region {region}: {error}")

    async def _release(self, session: Session, args: Any) -> Any:
        region = int(args["region"])
        key: SessionKey = (session.node, session.incarnation)
        if self.journal.leases.get(region) == key:
            await self.commit(lambda: self.journal.leases.pop(region, None))
        return {}

    async def _trim(self, session: Session, args: Any) -> Any:
        """As the real trims of freed blocks: on all members of an unchanged epoch, or not done."""
        manager: Any = SimpleNamespace(_changes=self.changes, _control=self.control)
        trim: Any = SimpleNamespace(block=args["block"], count=args["count"])
        await self.log.flush()
        return {"done": await SlabManager._trim_slab(manager, SlabId(args["slab"]), [trim])}

    # -- evictions -------------------------------------------------------------------------------

    def _evict_dead_nodes(self) -> None:
        assert self.nursery is not None
        for session in list(self.sessions.values()):
            if not session.ended and not self.facts.is_alive(session.node):
                self.nursery.start_soon(self._evict, session, f"node {session.node} is gone")

    async def _evict(self, session: Session, reason: str) -> None:
        key: SessionKey = (session.node, session.incarnation)
        event = self._evictions.get(key)
        if event is not None:
            await event.wait()
            return
        event = self._evictions[key] = trio.Event()
        session.ended = True
        self.world.trace(f"{self.process.name} evicts {session.writer}/{session.incarnation}: {reason}")
        if session.link is not None:
            session.link.close(Fenced(f"evicted: {reason}"))
        assert self.nursery is not None
        self.nursery.start_soon(self._carry_out, session, key, event)
        await event.wait()

    async def _carry_out(self, session: Session, key: SessionKey, event: trio.Event) -> None:
        await self.eviction.fence_out(session, succeeded=lambda: self.newest.get(key[0], 0) > key[1])

        def forget() -> None:
            self.journal.evicted[key[0]] = max(key[1], self.journal.evicted.get(key[0], 0))
            self.journal.sessions.discard(key)
            for region in [r for r, holder in self.journal.leases.items() if holder == key]:
                del self.journal.leases[region]

        await self.commit(forget)
        self.sessions.pop(key, None)
        self._evictions.pop(key).set()
        self.world.trace(f"{self.process.name} evicted {session.writer}/{session.incarnation}")

