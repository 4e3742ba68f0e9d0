"""Session desk: who comes, who stays, who has to go: hello, reclaim after a takeover, eviction.

Place      coordinator floor; above sessions.py, eviction.py, batches.py, leases.py, below service.py.
Owns       the sessions of one volume, and for each node the incarnations that were evicted (kept in the
           database: an evicted mount that wakes up later still believes in its leases, whoever coordinates
           then).
Tasks      the grace period after a takeover, and one per eviction.
"""

import logging
import time

import trio

from coordinator.batches import Batches
from coordinator.cluster_facts import ClusterFacts
from coordinator.departures import ADOPTING, DEPARTED, Departed, Departures
from coordinator.eviction import Eviction
from coordinator.leases import Leases
from coordinator.metadata import Metadata
from coordinator.sessions import Session, Sessions
from coordinator.shared_write import SharedWrite
from csvfs.errors import CsvfsError, Fenced, NotFound
from csvfs.ids import DriveId, Epoch, Incarnation, InodeNo, NodeName, SlabId
from csvfs.wire.control import pack_value, unpack_value

log = logging.getLogger(__name__)

CLAIMING_TIMES_MAX = 15  # reclaim_timeout, for all parts together
ABSENT_TIMES_MAX = 5  # reclaim_timeout, for a mount of a node that is alive to say hello
_EVICTED = "evicted/"  # rows of table settings: name -> the last incarnation evicted, in decimal
_LOST_EPOCHS = "lost_epochs"  # likewise: msgpack list of [metadata slab, the epoch of its last loss of what was not flushed]
_WHOLE_SINCE = "whole_since"  # the term that began after the last of these, in decimal


class SessionDesk:
    """Set `leases` and `shared_write` before use."""

    def __init__(
        self,
        metadata: Metadata,
        batches: Batches,
        eviction: Eviction,
        facts: ClusterFacts,
        departures: Departures,
        *,
        reclaim_timeout_s: float,
    ) -> None:
        self.sessions = Sessions()
        self.leases: Leases | None = None
        self.shared_write: SharedWrite | None = None
        self._metadata = metadata
        self._batches = batches
        self._eviction = eviction
        self._facts = facts
        self._departures = departures
        self._reclaim_timeout_s = reclaim_timeout_s
        self._newest: dict[NodeName, Incarnation] = {}  # that have said hello
        self._evicted: dict[NodeName, Incarnation] = {}
        self._evictions: dict[Session, trio.Event] = {}
        self._inheriting: dict[NodeName, trio.Lock] = {}
        self._due, self._due_evictions = trio.open_memory_channel[tuple[Session, str]](float("inf"))
        self._whole_since = 0  # what an earlier term has granted may not be in the metadata
        self._lost_epochs: dict[SlabId, Epoch] = {}
        self._loss_unnoted = False
        self._open = trio.Event()
        self._claimed = trio.Event()

    def load(self, term: int, lost_epochs: dict[SlabId, Epoch]) -> None:
        """The sessions of the coordinator before: they have to reclaim what they hold.

        lost_epochs  of the metadata slabs. If one is new, nobody is believed that he holds anything: what he was given since
                     the last flush may not be in the metadata, and be given to others.
        """
        marks = self._departures.marks()
        for known in self._metadata.sessions.sessions():
            key = (NodeName(known.node), Incarnation(known.incarnation))
            departed = None
            if known.id in marks:  # what others have done since, the coordinator before knew
                departed = self._departures.add(Departed(known.id, *key, adopting=marks[known.id] == ADOPTING))
            if departed is None or departed.adopting:
                self.sessions.add(Session(known.id, key, departed=departed))
        for name, value in self._metadata.database.rows("SELECT name, value FROM settings"):
            if name.startswith(_EVICTED):
                self._evicted[NodeName(name.removeprefix(_EVICTED))] = Incarnation(int(value))
            elif name == _LOST_EPOCHS:
                self._lost_epochs = {SlabId(slab): Epoch(epoch) for slab, epoch in unpack_value(value)}
            elif name == _WHOLE_SINCE:
                self._whole_since = int(value)
        if any(epoch > self._lost_epochs.get(slab, 0) for slab, epoch in lost_epochs.items()):
            self._lost_epochs, self._whole_since, self._loss_unnoted = lost_epochs, term, True
            for session in self.sessions:
                session.final = True
                self._begin(session, "what it was given may not be in the metadata, whose drives all lost power")

    async def _note_loss(self) -> None:
        """Behind the evictions. Whoever was to go on for a session of before begins anew."""
        for node in self._departures.nodes():
            await self._departures.forget_node(node)

        def note() -> None:
            self._set(_LOST_EPOCHS, pack_value([[slab, epoch] for slab, epoch in self._lost_epochs.items()]))
            self._set(_WHOLE_SINCE, str(self._whole_since).encode())

        await self._batches.run(note)
        self._loss_unnoted = False

    # -- the grace period ------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether leases may be granted: everybody has said what they hold, or was evicted."""
        return self._open.is_set()

    async def wait_open(self) -> None:
        await self._open.wait()

    def claiming(self, session: Session) -> None:
        """It has said a part of what it holds, or what it said is being written down."""
        session.claiming_s = trio.current_time()

    def claimed(self, session: Session) -> None:
        """It has said all that it holds."""
        session.reclaimed = True
        claimed, self._claimed = self._claimed, trio.Event()
        claimed.set()

    async def run_forever(self) -> None:
        """Raises Fenced: another coordinator is at work."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._grace)
            async for session, reason in self._due_evictions:
                nursery.start_soon(self._carry_out, session, reason)

    async def _grace(self) -> None:
        began_s = trio.current_time()
        while any(self._is_awaited(session, began_s) for session in self.sessions.unclaimed):
            self.evict_dead_nodes()
            claimed = self._claimed
            if all(session.ended and not session.changing for session in self.sessions.unclaimed):
                break
            with trio.move_on_after(min(0.1, self._reclaim_timeout_s)):
                await claimed.wait()
        for session in self.sessions.unclaimed:
            await self.evict(session, "it did not reclaim its leases after the takeover")
        if self._loss_unnoted:
            await self._note_loss()
        self._open.set()

    def _is_awaited(self, session: Session, began_s: float) -> bool:
        """A mount of very many leases takes its time to say them: as long as it gets on it is not evicted for that.

        Of one that is not connected though its node is alive, the next process is probably on its way: it died with the
        coordinator, and evicted it would lose its locks, and what it was writing. On a busy machine that takes seconds.
        """
        wait_s = self._reclaim_timeout_s
        if session.link is None and self._facts.is_alive(session.node):
            return trio.current_time() < began_s + ABSENT_TIMES_MAX * wait_s
        ends_s = min(max(began_s, session.claiming_s) + wait_s, began_s + CLAIMING_TIMES_MAX * wait_s)
        return trio.current_time() < ends_s

    # -- coming ----------------------------------------------------------------------------------

    async def welcome(self, node: NodeName, incarnation: Incarnation, inherit: bool = False, term: int = 0) -> Session:
        """The session of a mount that says hello; its earlier incarnations are evicted first.

        inherit  It goes on for an earlier process of the same mount, which is dead: what that holds becomes its own.
                 Where that cannot be, `Session.inherited` of what is returned is None.
        term     The last that it knows; 0: none.
        Raises   Fenced: it was evicted, or a later incarnation is known.
        """
        self._check_not_evicted(node, incarnation)
        if 0 < term < self._whole_since:
            raise Fenced(
                f"mount of {node}, incarnation {incarnation}: all drives of the volume's metadata lost power since term {term}, "
                "and what it was given may not be there; it has to start anew"
            )
        self.sessions.check_newest(node, incarnation)
        self._newest[node] = max(incarnation, self._newest.get(node, Incarnation(0)))
        if inherit:
            async with self._inheriting.setdefault(node, trio.Lock()):
                await self._inherit(node, incarnation)
            self._check_not_evicted(node, incarnation)
            self.sessions.check_newest(node, incarnation)
        for older in self.sessions.older_of(node, incarnation):
            older.final = True
            await self.evict(older, f"incarnation {incarnation} has taken its place")
        if not inherit:
            await self._departures.forget_node(node)
        session = self.sessions.get((node, incarnation))
        if session is None:
            known = await self._batches.run(lambda: self._metadata.open_session(node, incarnation))
            self._check_not_evicted(node, incarnation)
            self.sessions.check_newest(node, incarnation)
            # One that nobody knew holds nothing that it would have to reclaim.
            session = self.sessions.add(Session(known.id, (node, incarnation), reclaimed=True))
            log.info("mount of %s, incarnation %d, is new", node, incarnation)
        if session.ended:
            raise Fenced(f"mount of {node}, incarnation {incarnation}, was evicted; it has to start anew")
        return session

    async def _inherit(self, node: NodeName, incarnation: Incarnation) -> None:
        """The newest session of the node's mount becomes that of its next process, leases and all.

        Nobody else gets one of its leases in between, so its kernel may keep what it caches. What its dead process
        had on the way to drives either landed on all members or is made equal, and nothing of it lands later (I6).
        """
        older = self.sessions.older_of(node, incarnation)
        session = max(older, key=lambda session: session.incarnation, default=None)
        if session is not None and session.ended and session in self._evictions:
            await self._evictions[session].wait()
            session = None
        if session is None:
            await self._adopt(node, incarnation)
            return
        assert self.leases is not None
        dead = session.key
        session.ended = session.changing = True  # its own calls are refused, until the next process is in its place
        if session.link is not None:
            session.link.close(Fenced(f"incarnation {incarnation} goes on for {session.writer}"))
        self.leases.interrupt(dead)
        try:
            written = await self._eviction.fence_out(session, succeeded=lambda: True)
            await self._batches.run(lambda: self._relabel(session, incarnation))
        except BaseException:
            self._begin(session, "it could not be taken over")
            raise
        finally:
            session.changing = False
        self._evicted[node] = max(dead[1], self._evicted.get(node, Incarnation(0)))
        if session in self._evictions:
            return  # meanwhile, for another reason
        self.sessions.rename(session, incarnation)
        self.leases.rename(dead, session.key)
        if self.shared_write is not None:
            self.shared_write.rename(dead, session.key)
        session.ended, session.inherited = False, sorted({*(session.inherited or ()), *written})
        log.info("incarnation %d goes on for %s, incarnation %d", incarnation, session.writer, dead[1])

    async def _adopt(self, node: NodeName, incarnation: Incarnation) -> None:
        """The next process of a mount that was evicted goes on for it, without its leases (departures.py)."""
        departed = self._departures.of_node(node)
        if self._loss_unnoted or departed is None or departed.adopting or departed.incarnation >= incarnation:
            return
        departed.adopting = True  # it is not forgotten meanwhile
        try:
            await self._batches.run(lambda: self._relabel_departed(departed, incarnation))
        except BaseException:
            departed.adopting = False
            raise
        log.info("mount of %s, incarnation %d, goes on for %d, which was evicted", node, incarnation, departed.incarnation)
        departed.incarnation = incarnation
        self._departures.add(departed)
        session = self.sessions.add(Session(departed.id, (node, incarnation), departed=departed))
        written = departed.written
        session.inherited = sorted(written if written is not None else {d.slab for d in self._metadata.slabs()})

    def _relabel_departed(self, departed: Departed, incarnation: Incarnation) -> None:
        """In a batch."""
        self._metadata.relabel_session(departed.id, incarnation)
        self._departures.mark(departed.id, ADOPTING)

    async def settle(self, session: Session) -> None:
        """One that goes on for a departed session has said all that it holds. Raises what ends the batches."""
        departed, session.departed = session.departed, None
        if departed is not None:
            await self._departures.settle(departed)

    def unflushed(self, session: Session) -> list[list]:
        """Descriptors of slabs: whoever flushes them has flushed every drive that the session may have written to
        before its process died. One per drive: a flush is of a whole drive."""
        wanted: list[list] = []
        seen: set[DriveId] = set()
        for slab in session.inherited or ():
            try:
                descriptor = self._metadata.slab(slab)
            except NotFound:
                continue  # given back meanwhile
            drives = {member.drive for member in descriptor.writable}
            if not drives <= seen:
                wanted.append(descriptor.to_wire())
                seen |= drives
        return wanted

    def _relabel(self, session: Session, incarnation: Incarnation) -> None:
        """In a batch."""
        self._keep_evicted(session)
        self._metadata.relabel_session(session.id, incarnation)

    def _check_not_evicted(self, node: NodeName, incarnation: Incarnation) -> None:
        if incarnation <= self._evicted.get(node, 0):
            raise Fenced(f"mount of {node}, incarnation {incarnation}, was evicted; it has to start anew")

    # -- going -----------------------------------------------------------------------------------

    def evict_dead_nodes(self) -> None:
        """Begin to evict the sessions of nodes whose lease is over: nothing on them serves any more."""
        for session in self.sessions:
            if not session.ended and not self._facts.is_alive(session.node):
                self._begin(session, f"node {session.node} is gone")

    async def evict(self, session: Session, reason: str) -> None:
        """Returns when the session is fenced and its leases have passed on. Cancel: it is evicted all the
        same."""
        await self._begin(session, reason).wait()

    async def dismiss(self, session: Session) -> None:
        """It has said goodbye. Returns when nothing of it is left: what it did last is equal on all members.

        Its incarnation counts as evicted: it never comes again. Cancel: it is dismissed all the same.
        """
        session.leaving = True
        await self.evict(session, "it has said goodbye")

    def _begin(self, session: Session, reason: str) -> trio.Event:
        event = self._evictions.get(session)
        if event is None:
            event = self._evictions[session] = trio.Event()
            session.ended = True  # from here on its calls are refused
            self._due.send_nowait((session, reason))
        return event

    async def _carry_out(self, session: Session, reason: str) -> None:
        level = logging.INFO if session.leaving else logging.WARNING
        log.log(level, "evicting %s, incarnation %d: %s", session.writer, session.incarnation, reason)
        if session.link is not None and not session.leaving:
            session.link.close(
                Fenced(f"{session.writer} incarnation {session.incarnation} was evicted: {reason}")
            )
        written = await self._eviction.fence_out(
            session,
            succeeded=lambda: session.leaving or self._newest.get(session.node, 0) > session.incarnation,
        )
        departs = not (session.leaving or session.final or self._departures.is_for_good(session.node))
        await self._batches.run(lambda: self._depart(session) if departs else self._forget(session))
        self._evicted[session.node] = max(
            session.incarnation, self._evicted.get(session.node, Incarnation(0))
        )
        self.sessions.remove(session)
        assert self.leases is not None
        if departs:
            self._departures.add(self._what_departs(session, written))  # before its leases pass on
        elif session.departed is not None:
            self._departures.drop(session.departed)
        if self.shared_write is not None:
            self.shared_write.end_session(session.key)
        self.leases.end_session(session.key)
        self._evictions.pop(session).set()
        log.log(level, "evicted %s, incarnation %d", session.writer, session.incarnation)

    def _what_departs(self, session: Session, written: set[SlabId]) -> Departed:
        assert self.leases is not None
        held = set(self.leases.table.held_by(session.key))
        departed = session.departed
        if departed is not None:  # the one that was to go on for it
            departed.adopting = False
            if departed.held is not None:
                departed.held |= held
            if departed.written is not None:
                departed.written |= written
            return departed
        written = written | {SlabId(slab) for slab in session.inherited or ()}
        is_known = session.reclaimed
        return Departed(
            session.id, *session.key, written if is_known else None, held if is_known else None, changed=set()
        )

    def _depart(self, session: Session) -> None:
        """In a batch: somebody may go on for it yet."""
        self._keep_evicted(session)
        self._departures.mark(session.id, DEPARTED)

    def _forget(self, session: Session) -> None:
        """In a batch."""
        self._keep_evicted(session)
        if session.departed is not None:
            self._departures.unmark(session.id)
        self._metadata.end_session(session.id)

    def _keep_evicted(self, session: Session) -> None:
        """In a batch: who was evicted stays evicted, also for the next coordinator."""
        incarnation = max(session.incarnation, self._evicted.get(session.node, Incarnation(0)))
        self._set(f"{_EVICTED}{session.node}", str(incarnation).encode())

    def _set(self, name: str, value: bytes) -> None:
        """In a batch."""
        self._metadata.database.run("INSERT OR REPLACE INTO settings(name, value) VALUES(?,?)", (name, value))

    # -- what they tell --------------------------------------------------------------------------

    def accessed(self, ino: InodeNo, atime_ns: int) -> None:
        """An access time that came with the answer to a recall; nobody waits for it."""

        def done(value: object, error: CsvfsError | None) -> None:
            if error is not None:
                log.info("the access time of inode %d is not kept: %s", ino, error)

        self._batches.submit(lambda: self._metadata.accessed(ino, atime_ns), None, done)

    async def report(self, ino: InodeNo, size: int, mtime_ns: int | None, atime_ns: int | None) -> None:
        """Size and times of a file that was being written under a lease. A file that is gone is no error."""
        try:
            await self._batches.run(
                lambda: self._metadata.commit_file(ino, size, mtime_ns, atime_ns, time.time_ns())
            )
        except CsvfsError as error:
            if isinstance(error, Fenced) or error.retryable:
                raise
            log.info("what was reported of inode %d is not kept: %s", ino, error)
