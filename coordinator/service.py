"""Service: one volume, coordinated here under one term.

Place      coordinator floor; the assembly of all parts. host.py starts it, and gives it links and frames.
Tasks      those of its parts, `_watch_members_forever`, one per call that has to wait.
Ends       with NotCoordinator or Fenced when a later term is at work, with LeaseLost when this node may not
           serve any more; by cancel: what was acknowledged is on the members, so nothing is owed.

Invariants
  I5   Nothing is answered when the node's lease may have run out: the liveness page is looked at before each
       reply.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, NamedTuple

import trio

from coordinator import arguments
from coordinator.adoption import Adoption
from coordinator.arguments import Args
from coordinator.batches import Batches
from coordinator.check_desk import CheckDesk
from coordinator.cluster_facts import ClusterFacts
from coordinator.copy_verify import CopyVerifier
from coordinator.departures import Departures
from coordinator.dispatch import Acquisition, Change, Dispatch, NeedsChangedError, NeedsSpaceError
from coordinator.drive_control import DriveControl
from coordinator.eviction import Eviction
from coordinator.file_integrity import FileIntegrity
from coordinator.file_map import file_map
from coordinator.healing import Healing
from coordinator.health import Health
from coordinator.janitor import Janitor
from coordinator.job_record import JobRecord
from coordinator.leases import Leases
from coordinator.lock_desk import CALLS as LOCK_CALLS
from coordinator.lock_desk import LockDesk
from coordinator.lost import LostSlabs
from coordinator.lost_blocks import LostBlocks
from coordinator.membership_reactions import MembershipReactions
from coordinator.metadata import Metadata
from coordinator.metadata_log import MetadataLog
from coordinator.metadata_space import MetadataSpace
from coordinator.questions import Reply
from coordinator.quota_desk import QuotaDesk
from coordinator.scrub import Scrub
from coordinator.session_calls import SessionCalls
from coordinator.session_desk import SessionDesk
from coordinator.sessions import Session
from coordinator.settling import Settling
from coordinator.shared_write import SegmentLeases, SharedWrite
from coordinator.slab_book import DataBook, MetadataBook, SlabBook
from coordinator.slab_changes import SlabChanges
from coordinator.slab_manager import SlabManager
from coordinator.volume_control import VolumeControl
from coordinator.volume_facts import DESCRIPTION, description_of, pack_description
from coordinator.volume_figures import VolumeFigures
from coordinator.volume_settings import VolumeSettings
from csvfs.block.bus import Bus
from csvfs.errors import BadRequest, CsvfsError, Fenced, LeaseLost, NotCoordinator
from csvfs.ids import Incarnation, InodeNo, NodeName, Term, VolumeId
from csvfs.net.calls import field
from csvfs.net.link import Link
from csvfs.units import BLOCK_SIZE
from csvfs.wire.control import unpack_call
from csvfs.wire.frames import Frame, Kind

log = logging.getLogger(__name__)

CALLS_MAX = 4_096  # of all sessions being worked on
_ADD_DESCRIPTION = "INSERT OR REPLACE INTO settings(name, value) VALUES(?,?)"
# Served before all sessions have reclaimed: they need no lease that is not held already.
_EARLY_CALLS = frozenset(
    ("hello", "reclaim", "allocate", "commit", "release", "slab_failed", "slabs", "fsync", "goodbye")
)
_LAST_CALLS = frozenset(("goodbye", "slabs"))  # served after a goodbye; nothing that could get a lease


@dataclass(slots=True, frozen=True)
class VolumeSetup:
    """What a service is told of its volume and node. `copies`, `size`: of one that is being created; later the
    settings say (volume_settings.py)."""

    name: str
    volume: VolumeId
    copies: int
    size: int  # bytes; 0: as large as the pool
    slab_size: int  # bytes
    node: NodeName
    term: Term
    recall_timeout_s: float
    reclaim_timeout_s: float
    remember_s: float = 75.0  # how long a mount that was evicted may come again (departures.py)
    drive_retire_s: float = 900.0  # how long a drive may be away before its copies are made elsewhere

    @property
    def slab_blocks(self) -> int:
        return self.slab_size // BLOCK_SIZE


class Caller(NamedTuple):
    """Whom to answer."""

    link: Link
    session: Session
    request_id: int
    name: str  # of the call


class Service:
    """One volume's calls and jobs, over metadata that takeover.py has opened."""

    def __init__(
        self,
        setup: VolumeSetup,
        metadata: Metadata,
        bus: Bus,
        book: MetadataBook,
        metadata_changes: SlabChanges,
        control: DriveControl,
        facts: ClusterFacts,
        may_serve: Callable[[], bool],
        rng: Random,
        record: JobRecord,
        settings: VolumeSettings,
        soon: Callable[[Callable[[], None]], None],
    ) -> None:
        """soon: see Batches."""
        self.setup = setup
        self._metadata = metadata
        self._facts = facts
        self._may_serve = may_serve
        self._settings = settings
        self._nursery: trio.Nursery | None = None
        self._call_count = 0
        self._metadata_book = book
        self.log = MetadataLog(bus, metadata.image, book.slabs, setup.slab_blocks)
        self.batches = Batches(metadata, self.log, may_serve, soon)
        self._data_book = DataBook(metadata, self.batches.run, self._wait_durable)
        self.changes = SlabChanges(self._data_book, control)
        self._put_together_slabs(control, metadata_changes, record, rng)
        self._metadata_space = MetadataSpace(metadata, self.log, book, self.slabs, bus, metadata_changes)
        self._put_together_sessions(control)
        self.members = MembershipReactions(
            setup.volume, control, facts, [metadata_changes, self.changes], self.resync, self.slabs, self.desk
        )
        self._put_together_verification(control, book, metadata_changes, record)
        settings.on_change = self._follow_settings
        self._follow_settings()
        self.control = VolumeControl(settings, metadata, self.changes, self.slabs, facts, setup.slab_size)
        self._put_together_figures([book, self._data_book])
        self._calls = SessionCalls(
            metadata, self.log, self.desk, self._adoption, self.dispatch, self.changes, self.slabs, self.members, self.lost,
            self.quotas, self.figures, self.shared_write,
        )  # fmt: skip

    def _put_together_slabs(
        self, control: DriveControl, metadata_changes: SlabChanges, record: JobRecord, rng: Random
    ) -> None:
        setup, copies = self.setup, self._settings.facts.copies
        self.slabs = SlabManager(
            self._metadata, self.batches, self.log, self.changes, control, self._facts,
            copies=copies, slab_blocks=setup.slab_blocks, rng=rng,
        )  # fmt: skip
        self.healing = Healing(
            setup.name, [metadata_changes, self.changes], control, self._facts, self.slabs, record,
            copies=copies, slab_size=setup.slab_size, drive_retire_s=setup.drive_retire_s, rng=rng,
        )  # fmt: skip
        self.resync = self.healing.resync

    def _put_together_sessions(self, control: DriveControl) -> None:
        """What sessions hold and change, and who tidies up behind them."""
        setup, metadata, batches, facts = self.setup, self._metadata, self.batches, self._facts
        self.departures = Departures(metadata, batches, setup.remember_s, facts.is_evicted)
        self.desk = SessionDesk(
            metadata, batches, Eviction(setup.volume, self.changes, control, facts), facts, self.departures,
            reclaim_timeout_s=setup.reclaim_timeout_s,
        )  # fmt: skip
        self.leases = Leases(
            self.desk.sessions,
            recall_timeout_s=setup.recall_timeout_s,
            report=self.desk.report,
            accessed=self.desk.accessed,
            evict=self.desk.evict,
            lowered=self._lowered,
            is_alive=facts.is_alive,
        )
        self.desk.leases = self.leases
        self.leases.table.on_write = self.departures.wrote
        self._adoption = Adoption(metadata, self.leases)
        segments = SegmentLeases(
            self.desk.sessions,
            recall_timeout_s=setup.recall_timeout_s,
            report=self.desk.report,
            accessed=self.desk.accessed,
            evict=self.desk.evict,
            lowered=lambda key: None,
            is_alive=facts.is_alive,
        )
        segments.beside = self.leases
        self.shared_write = SharedWrite(metadata, batches, self.desk.sessions, self.leases, segments)
        self.desk.shared_write = self.shared_write
        self._janitor = Janitor(metadata, batches, self.leases, self.desk.wait_open, self.departures.holds)
        self.departures.on_forgotten = self._janitor.look
        self.locks = LockDesk(metadata, batches, self.departures)
        self._settling = Settling(metadata.shared, batches, self.log)
        self.check_desk = CheckDesk(metadata, batches, self.leases, self._janitor)
        self.quotas = QuotaDesk(metadata, batches)
        self.dispatch = Dispatch(metadata, batches, self.log, self.leases, self.slabs, self._janitor.orphaned)
        self.dispatch.questions.sharers = self.shared_write.members
        self.dispatch.given_back = self.shared_write.release

    def _put_together_verification(
        self, control: DriveControl, book: MetadataBook, metadata_changes: SlabChanges, record: JobRecord
    ) -> None:
        """What looks at copies, and says what is lost."""
        setup, metadata, facts = self.setup, self._metadata, self._facts
        self.lost_blocks = LostBlocks(metadata, self.batches)
        verifier = CopyVerifier(control, self.lost_blocks, self.members.look_into)
        self.scrub = Scrub(
            setup.name, metadata, self.batches, [self.changes, metadata_changes], control, facts, verifier,
            slab_blocks=setup.slab_blocks, is_paused=lambda: record.is_paused("scrub"),
        )  # fmt: skip
        self.lost = LostSlabs(
            setup.name, setup.volume, metadata, self.changes, control, facts, book.store, self.lost_blocks, verifier
        )
        self.lost.on_accepted = self.members.look_into
        self.integrity = FileIntegrity(metadata, self.changes, control, self.lost, self.lost_blocks, verifier)

    def _put_together_figures(self, books: list[SlabBook]) -> None:
        self._health = Health(books, self.healing.wanted, self._facts.domain_of)
        self.figures = VolumeFigures(
            self.setup.term, self._metadata, self.slabs, books, self._health, self.healing, self.desk, self.leases,
            self.lost, self.lost_blocks, self.scrub, self.batches,
        )  # fmt: skip
        self.statfs = self.figures.statfs
        self.is_whole = self.figures.is_whole
        self.waits = self.figures.waits
        self.volume_status = self.figures.status

    def _lowered(self, ino: InodeNo) -> None:
        self._janitor.lowered(ino)
        self.locks.look(ino)  # a session that ended has let go of the files it had open, and of its locks before

    async def _wait_durable(self) -> None:
        # On the media: an epoch that a power cut of all could take back would bring back the in-sync set before it,
        # whose members may lack what was flushed since (I1).
        await self.log.flush()

    def _follow_settings(self) -> None:
        self._metadata.space.limit_blocks = self._settings.size_bound // BLOCK_SIZE
        self.slabs.copies = self.healing.copies = self._settings.facts.copies

    async def _describe_forever(self) -> None:
        """Keep in the metadata what the cluster store says of the volume, so that the drives alone can tell."""
        view = self._facts.view
        while True:
            packed = pack_description(view.volumes.get(self.setup.name, {}))
            if packed != pack_description(description_of(self._metadata)) and len(packed) > 1:
                await self.batches.run(partial(self._metadata.database.run, _ADD_DESCRIPTION, (DESCRIPTION, packed)))
            await view.wait_changed()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled, or until another coordinator is at work: raises that."""
        self.desk.load(self.setup.term, {slab.slab: slab.lost_epoch for slab in self._metadata_book.all()})
        self._janitor.load()
        self._metadata.locks.prepare()
        self._metadata.quotas.prepare()
        self.log.append(self._metadata.image.take_log())  # what recovery of the database has written
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._take_calls_until_cancelled)
                nursery.start_soon(self.log.run_forever)
                nursery.start_soon(self.batches.run_forever)
                nursery.start_soon(self.leases.run_forever)
                nursery.start_soon(self.desk.run_forever)
                nursery.start_soon(self.departures.run_forever)
                nursery.start_soon(self.healing.run_forever)
                nursery.start_soon(self.slabs.grow_forever)
                nursery.start_soon(self.slabs.trim_forever)
                nursery.start_soon(self._metadata_space.grow_forever)
                nursery.start_soon(self.members.run_forever)
                nursery.start_soon(self.quotas.run_forever)
                nursery.start_soon(self._settling.run_forever)
                nursery.start_soon(self._janitor.run_forever)
                nursery.start_soon(self.check_desk.run_forever)
                nursery.start_soon(self.scrub.run_forever)
                nursery.start_soon(self._describe_forever)
                nursery.start_soon(self._settings.follow_forever)
                task_status.started()
        finally:
            error = self.gone()
            self.batches.close(error)
            self.log.fail(error)
            for session in self.desk.sessions:
                if session.link is not None:
                    session.link.close(error)

    async def _take_calls_until_cancelled(self) -> None:
        """A nursery whose tasks have all ended takes no more, and its owner hears of that a moment later: by then a call that
        arrives is refused, since this is one of the tasks."""
        try:
            await trio.sleep_forever()
        finally:
            self._nursery = None

    @property
    def is_running(self) -> bool:
        return self._nursery is not None

    def gone(self) -> NotCoordinator:
        """What callers hear who come, or are still there, when it has ended."""
        return NotCoordinator(f"volume {self.setup.name} is not coordinated here any more")

    # -- calls -----------------------------------------------------------------------------------

    async def hello(self, link: Link, args: Args) -> dict[str, Any]:
        """A mount introduces itself; the link is its from now on.

        Raises  Fenced, and as `desk.welcome`. AccessDenied: it is of another node than the link's certificate.
        """
        node, incarnation = NodeName(field(args, "node", str)), Incarnation(arguments.number(args, "incarnation"))
        link.require_node(node)
        session = await self.desk.welcome(node, incarnation, inherit=arguments.flag(args, "inherit"), term=arguments.number_or_zero(args, "term"))
        if link.closed is not None:
            raise link.closed
        self._check_serving()
        session.attach(link)
        session.last_answer = trio.current_time()
        setup = self.setup
        known = {"term": setup.term, "volume": setup.volume, "slab_size": setup.slab_size}
        known |= {"inherited": session.inherited is not None, "claimed": session.reclaimed}
        if session.departed is not None:
            known |= {"adopted": True, "lost_locks": self.departures.lost_locks(session.id)}
        return {**known, "unflushed": self.desk.unflushed(session), "locks": self.locks.owners_of(session)}

    def on_frame(self, link: Link, session: Session, frame: Frame) -> None:
        """One frame of a session's link. Raises ProtocolError: the link is closed."""
        if frame.kind != Kind.CALL:
            link.reply_error(frame.request_id, BadRequest(f"frames of kind {frame.kind} are not served here"))
            return
        name, args = unpack_call(frame.head)
        caller = Caller(link, session, frame.request_id, name)
        if self._nursery is None or self._call_count >= CALLS_MAX:
            error = NotCoordinator(f"volume {self.setup.name} takes no more calls now")
            link.reply_error(frame.request_id, error)
            return
        self._call_count += 1
        try:
            self._check_session(session, name)
            self._check_serving()
        except CsvfsError as refusal:
            self._answer(caller, None, refusal)
            return
        try:
            if not self._serve_now(caller, args):
                self._start_task(self._serve_later, caller, args)
        except CsvfsError as failure:
            self._answer_when_durable(caller, None, failure)
        except Exception:
            self._report_bug(caller)

    def _serve_now(self, caller: Caller, args: Args) -> bool:
        """Serve a call that need not wait for anything but the log; False: a task has to do it."""
        name, session = caller.name, caller.session
        if not self.desk.is_open and name not in _EARLY_CALLS:
            return False
        if self.dispatch.is_change(name):
            self._start_change(caller, self.dispatch.begin_change(session, name, args))
            return True
        if name in LOCK_CALLS:
            self._start_task(self._serve_lock, caller, args)
            return True
        if name in self.dispatch.takers:
            self.dispatch.takers[name](session, args, partial(self._allocated, caller, args))
            return True
        if self._calls.has_to_wait(name):
            return False
        if name == "segments" or (name == "acquire" and self.shared_write.wants(session, args)):
            self._start_task(self._serve_segments if name == "segments" else self._share, caller, args)
            return True
        if name == "acquire":
            wanted = self.dispatch.begin_acquisition(session, args)
            if not wanted.ticket.granted:
                self._start_task(self._wait_to_acquire, caller, wanted)
                return True
            reply: Reply | None = self.dispatch.acquired(wanted)
        else:
            plain = self._calls.plain.get(name)
            reply = plain(session, args) if plain is not None else self.dispatch.question(session, name, args)
        if reply is None:
            raise BadRequest(f"call {name!r} is not served here")
        if reply.writer is not None or reply.sharers:
            # Without the lease, so nobody has to be kept off: who asks the writer may wait for a second.
            self.dispatch.answered(reply)
            self._start_task(self._complete, caller, reply)
        else:
            self._answer_when_durable(caller, reply, None)
        return True

    def _answer_when_durable(self, caller: Caller, reply: Reply | None, error: CsvfsError | None) -> None:
        """B1: what is true now may be what a batch in flight has made so, errors included."""
        position = self.log.position if reply is None else reply.position
        self.log.when_durable(position, lambda failure: self._answer(caller, reply, failure or error))

    def _start_task(self, function: Callable[..., Awaitable[None]], caller: Caller, *args: Any) -> None:
        """`function(caller, *args)` answers; what it raises is answered here."""

        async def run() -> None:
            try:
                await function(caller, *args)
            except CsvfsError as error:
                self._answer_when_durable(caller, None, error)
            except Exception:
                self._report_bug(caller)

        if self._nursery is None:
            self._answer(caller, None, NotCoordinator(f"volume {self.setup.name} takes no more calls now"))
        else:
            self._nursery.start_soon(run)

    async def _serve_later(self, caller: Caller, args: Args) -> None:
        """A call that has to wait."""
        if caller.name not in _EARLY_CALLS:
            await self.desk.wait_open()
        self._check_session(caller.session, caller.name)
        if not self._serve_now(caller, args):
            await self._complete(caller, await self._calls.later[caller.name](caller.session, args))

    async def _complete(self, caller: Caller, reply: Reply) -> None:
        try:
            await self.dispatch.complete(reply)
            self._answer(caller, reply, None)
        finally:
            self.dispatch.answered(reply)

    async def _serve_lock(self, caller: Caller, args: Args) -> None:
        value = await self.locks.call(caller.session, caller.link, caller.name, args)
        await self._complete(caller, Reply(value, position=self.log.position))

    async def _share(self, caller: Caller, args: Args) -> None:
        await self._complete(caller, await self.shared_write.share(caller.session, args))

    async def _serve_segments(self, caller: Caller, args: Args) -> None:
        block, count = arguments.number_or_zero(args, "block"), arguments.number_or_zero(args, "blocks")

        def describe(value: dict[str, Any], ino: InodeNo) -> None:
            if count:
                self.dispatch.add_layout(value, ino, block, count)

        reply = await self.shared_write.ask(caller.session, args, describe)
        reply.position = self.log.position
        await self._complete(caller, reply)

    async def _wait_to_acquire(self, caller: Caller, wanted: Acquisition) -> None:
        await self.leases.wait(caller.session, wanted.ticket)
        await self._complete(caller, self.dispatch.acquired(wanted))

    async def _wait_to_change(self, caller: Caller, change: Change) -> None:
        await self.leases.wait(caller.session, change.ticket)
        self._start_change(caller, change)

    async def _wait_to_allocate(self, caller: Caller, args: Args, blocks: int) -> None:
        await self.dispatch.make_space(blocks)
        if caller.link.closed is not None:
            raise caller.link.closed  # whoever goes on for it asks anew
        self.dispatch.takers[caller.name](caller.session, args, partial(self._allocated, caller, args))

    def _start_change(self, caller: Caller, change: Change) -> None:
        if change.ticket.granted:
            self.dispatch.carry_out(change, partial(self._changed, caller, change))
        else:
            self._start_task(self._wait_to_change, caller, change)

    def _allocated(
        self, caller: Caller, args: Args, reply: Reply | None, error: CsvfsError | None
    ) -> None:
        if isinstance(error, NeedsSpaceError):
            self._start_task(self._wait_to_allocate, caller, args, error.blocks)
        else:
            self._answer(caller, reply, error)

    def _changed(
        self, caller: Caller, change: Change, reply: Reply | None, error: CsvfsError | None
    ) -> None:
        """A change is durable, or was not done."""
        try:
            if isinstance(error, NeedsChangedError):
                self.dispatch.renew_change(change)
                self._start_change(caller, change)
            else:
                self._answer(caller, reply, error)
        except CsvfsError as failure:
            self._answer(caller, None, failure)
        except Exception:
            self._report_bug(caller)

    def _answer(self, caller: Caller, reply: Reply | None, error: CsvfsError | None) -> None:
        """The end of every call but those with a bug: nothing it says can un-happen any more."""
        try:
            if error is not None:
                raise error
            assert reply is not None
            self._check_serving()
            self._check_session(caller.session, caller.name)
            value = self.dispatch.sealed(caller.session, reply)
            caller.session.last_answer = trio.current_time()
            caller.link.reply(caller.request_id, value)
        except CsvfsError as failure:
            if not isinstance(failure, Fenced):
                caller.session.last_answer = trio.current_time()
            caller.link.reply_error(caller.request_id, failure)
        except Exception:
            self._report_bug(caller)
            return
        finally:
            if reply is not None:
                self.dispatch.answered(reply)
        self._call_count -= 1

    def _report_bug(self, caller: Caller) -> None:
        name = caller.name
        log.exception("call %r of %s failed in a way nobody planned for", name, caller.link.peer)
        error = CsvfsError(f"call {name!r} failed; the log of the coordinator says how")
        caller.link.reply_error(caller.request_id, error)
        self._call_count -= 1

    def _check_session(self, session: Session, name: str) -> None:
        if session.ended and not (session.leaving and name in _LAST_CALLS):
            raise Fenced(
                f"{session.writer} incarnation {session.incarnation} was evicted; it has to start anew"
            )

    def _check_serving(self) -> None:
        if not self._may_serve():
            raise LeaseLost(
                f"node {self.setup.node} has lost its lease; volume {self.setup.name} moves elsewhere"
            )
        if self.batches.has_failed:
            raise NotCoordinator(f"volume {self.setup.name} is given up by node {self.setup.node}")

    # -- calls of people ---------------------------------------------------------------------------

    def file_map(self, args: Args) -> dict[str, Any]:
        """The call `file_map`, for people."""
        return file_map(self._metadata, args)

    async def repair_now(self) -> dict[str, Any]:
        """The call `repair`: look at all drives and slabs at once, and say what there is to do."""
        self.members.look_into(())
        await self.healing.look_now()
        return self.volume_status()
