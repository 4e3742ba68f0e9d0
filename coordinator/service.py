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
from random import Random
from typing import Any

import trio

from coordinator import arguments
from coordinator.arguments import Args
from coordinator.batches import Batches
from coordinator.cluster_facts import ClusterFacts
from coordinator.dispatch import Dispatch
from coordinator.drive_control import DriveControl
from coordinator.eviction import Eviction
from coordinator.health import Health
from coordinator.janitor import Janitor
from coordinator.leases import Leases
from coordinator.membership_reactions import MembershipReactions
from coordinator.metadata import Metadata
from coordinator.metadata_log import MetadataLog
from coordinator.metadata_space import MetadataSpace
from coordinator.questions import Reply
from coordinator.resync import Resync
from coordinator.session_desk import SessionDesk
from coordinator.sessions import Session
from coordinator.slab_book import DataBook, MetadataBook
from coordinator.slab_changes import SlabChanges
from coordinator.slab_manager import SlabManager
from csvfs.block.bus import Bus
from csvfs.errors import BadRequest, CsvfsError, Fenced, LeaseLost, NotCoordinator
from csvfs.ids import DriveId, Epoch, Incarnation, InodeNo, NodeName, SlabId, Term, VolumeId
from csvfs.net.calls import field
from csvfs.net.link import Link
from csvfs.units import BLOCK_SIZE
from csvfs.wire.control import unpack_call
from csvfs.wire.frames import Frame, Kind

log = logging.getLogger(__name__)

CALLS_MAX = 4_096  # of all sessions being worked on
SLABS_ASKED_MAX = 65_536
# Served before all sessions have reclaimed: they need no lease that is not held already.
_EARLY_CALLS = frozenset(
    ("hello", "reclaim", "allocate", "commit", "release", "slab_failed", "slabs", "fsync")
)


@dataclass(slots=True, frozen=True)
class VolumeSetup:
    """What a service is told of its volume and node."""

    name: str
    volume: VolumeId
    copies: int
    size: int  # bytes; 0: as large as the pool
    slab_size: int  # bytes
    node: NodeName
    term: Term
    recall_timeout_s: float
    reclaim_timeout_s: float

    @property
    def slab_blocks(self) -> int:
        return self.slab_size // BLOCK_SIZE


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
    ) -> None:
        self.setup = setup
        self._metadata = metadata
        self._may_serve = may_serve
        self.log = MetadataLog(bus, metadata.image, book.slabs, setup.slab_blocks)
        self.batches = Batches(metadata, self.log, may_serve)
        data_book = DataBook(metadata, self.batches.run, self._wait_durable)
        self.changes = SlabChanges(data_book, control)
        self.resync = Resync(setup.slab_size)
        self.slabs = SlabManager(
            metadata, self.batches, self.log, self.changes, control, facts,
            copies=setup.copies, slab_blocks=setup.slab_blocks,
            size_blocks_max=setup.size // BLOCK_SIZE, rng=rng,
        )  # fmt: skip
        self._metadata_space = MetadataSpace(metadata, self.log, book, self.slabs, bus)
        self.desk = SessionDesk(
            metadata, self.batches, Eviction(self.changes, control, facts), facts,
            reclaim_timeout_s=setup.reclaim_timeout_s,
        )  # fmt: skip
        self.leases = Leases(
            self.desk.sessions,
            recall_timeout_s=setup.recall_timeout_s,
            report=self.desk.report,
            evict=self.desk.evict,
            lowered=self._lowered,
        )
        self.desk.leases = self.leases
        self._janitor = Janitor(metadata, self.batches, self.leases)
        self.dispatch = Dispatch(
            metadata, self.batches, self.log, self.leases, self.slabs, self._janitor.orphaned
        )
        self.members = MembershipReactions(
            setup.volume, control, facts, [metadata_changes, self.changes], self.resync, self.slabs, self.desk
        )
        self._health = Health([book, data_book])
        self._nursery: trio.Nursery | None = None
        self._call_count = 0
        self._async_calls: dict[str, Callable[[Session, Args], Awaitable[Any]]] = {
            "reclaim": self._reclaim,
            "acquire": self.dispatch.acquire,
            "allocate": self.dispatch.allocate,
            "slab_failed": self._slab_failed,
            "fsync": self._fsync,
        }
        self._plain_calls: dict[str, Callable[[Session, Args], Any]] = {
            "release": self.dispatch.release,
            "slabs": self._slabs,
            "statfs": lambda session, args: self.statfs(),
            "volume_status": lambda session, args: self.volume_status(),
        }

    def _lowered(self, ino: InodeNo) -> None:
        self._janitor.lowered(ino)

    async def _wait_durable(self) -> None:
        await self.log.wait(self.log.position)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled, or until another coordinator is at work: raises that."""
        self.desk.load()
        self._janitor.load()
        self.log.append(self._metadata.image.take_log())  # what recovery of the database has written
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self.log.run_forever)
                nursery.start_soon(self.batches.run_forever)
                nursery.start_soon(self.leases.run_forever)
                nursery.start_soon(self.desk.run_forever)
                nursery.start_soon(self.resync.run_forever)
                nursery.start_soon(self.slabs.grow_forever)
                nursery.start_soon(self.slabs.trim_forever)
                nursery.start_soon(self._metadata_space.grow_forever)
                nursery.start_soon(self.members.run_forever)
                nursery.start_soon(self._janitor.run_forever)
                task_status.started()
        finally:
            self._nursery = None
            error = NotCoordinator(f"volume {self.setup.name} is not coordinated here any more")
            self.batches.close(error)
            self.log.fail(error)
            for session in self.desk.sessions:
                if session.link is not None:
                    session.link.close(error)

    # -- calls -----------------------------------------------------------------------------------

    async def hello(self, link: Link, args: Args) -> dict[str, Any]:
        """A mount introduces itself; the link is its from now on. Raises Fenced, and as `desk.welcome`."""
        node, incarnation = NodeName(field(args, "node", str)), Incarnation(field(args, "incarnation", int))
        session = await self.desk.welcome(node, incarnation)
        if link.closed is not None:
            raise link.closed
        self._check_serving()
        session.attach(link)
        session.last_answer = trio.current_time()
        return {"term": self.setup.term, "volume": self.setup.volume, "slab_size": self.setup.slab_size}

    def on_frame(self, link: Link, session: Session, frame: Frame) -> None:
        """One frame of a session's link. Raises ProtocolError: the link is closed."""
        if frame.kind != Kind.CALL:
            link.reply_error(frame.request_id, BadRequest(f"frames of kind {frame.kind} are not served here"))
            return
        name, args = unpack_call(frame.head)
        try:
            self._check_session(session)
            self._check_serving()
            value = self._answer_now(session, name, args)
        except CsvfsError as error:
            self._reply_error(link, session, frame.request_id, error)
            return
        except Exception:
            self._report_bug(link, frame.request_id, name)
            return
        if value is not None:
            self._reply(link, session, frame.request_id, value)
        elif self._nursery is None or self._call_count >= CALLS_MAX:
            link.reply_error(
                frame.request_id, NotCoordinator(f"volume {self.setup.name} takes no more calls now")
            )
        else:
            self._call_count += 1
            self._nursery.start_soon(self._serve, link, session, frame.request_id, name, args)

    def _answer_now(self, session: Session, name: str, args: Args) -> Any:
        """The value of a call that needs no wait; None: a task has to serve it."""
        if not self.desk.is_open and name not in _EARLY_CALLS:
            return None
        if name == "statfs" and not self.slabs.spaces_known:
            return None
        plain = self._plain_calls.get(name)
        if plain is not None:
            return plain(session, args)
        if self.log.durable < self.log.position:
            return None  # what is true now could still un-happen
        reply = self.dispatch.answer_now(session, name, args)
        return None if isinstance(reply, Reply) else reply

    async def _serve(self, link: Link, session: Session, request_id: int, name: str, args: Args) -> None:
        try:
            if name not in _EARLY_CALLS:
                await self.desk.wait_open()
            result = await self._call(session, name, args)
            self._check_serving()
            value = self.dispatch.sealed(session, result) if isinstance(result, Reply) else result
            self._check_session(session)
            self._reply(link, session, request_id, value)
        except CsvfsError as error:
            self._reply_error(link, session, request_id, error)
        except Exception:
            self._report_bug(link, request_id, name)
        finally:
            self._call_count -= 1

    async def _call(self, session: Session, name: str, args: Args) -> Any:
        self._check_session(session)
        if self.dispatch.is_change(name):
            return await self.dispatch.change(session, name, args)
        handler = self._async_calls.get(name)
        if handler is not None:
            result = await handler(session, args)
            if isinstance(result, Reply):
                return await self.dispatch.finish_answer(session, result)
            return result
        if name == "statfs":
            await self.slabs.wait_spaces()
        plain = self._plain_calls.get(name)
        if plain is not None:
            return plain(session, args)
        reply = self.dispatch.answer_now(session, name, args)
        if reply is None:
            raise BadRequest(f"call {name!r} is not served here")
        return await self.dispatch.finish_answer(session, reply) if isinstance(reply, Reply) else reply

    def _reply(self, link: Link, session: Session, request_id: int, value: Any) -> None:
        session.last_answer = trio.current_time()
        link.reply(request_id, value)

    def _reply_error(self, link: Link, session: Session, request_id: int, error: CsvfsError) -> None:
        if not isinstance(error, Fenced):
            session.last_answer = trio.current_time()
        link.reply_error(request_id, error)

    def _report_bug(self, link: Link, request_id: int, name: str) -> None:
        log.exception("call %r of %s failed in a way nobody planned for", name, link.peer)
        link.reply_error(request_id, CsvfsError(f"call {name!r} failed; the log of the coordinator says how"))

    def _check_session(self, session: Session) -> None:
        if session.ended:
            raise Fenced(
                f"{session.writer} incarnation {session.incarnation} was evicted; it has to start anew"
            )

    def _check_serving(self) -> None:
        if not self._may_serve():
            raise LeaseLost(
                f"node {self.setup.node} has lost its lease; volume {self.setup.name} moves elsewhere"
            )

    # -- calls that are not of one file ----------------------------------------------------------

    async def _reclaim(self, session: Session, args: Args) -> dict[str, Any]:
        refused, reports = self.dispatch.reclaim(session, args)
        for ino, size, mtime_ns in reports:
            if size or mtime_ns:
                await self.desk.report(ino, size, mtime_ns, None)
        if arguments.flag(args, "last"):
            self.desk.claimed(session)
        return {"refused": refused}

    async def _slab_failed(self, session: Session, args: Args) -> list[Any]:
        slab, epoch = SlabId(arguments.number(args, "slab")), Epoch(arguments.number_or_zero(args, "epoch"))
        drives = [DriveId(drive) for drive in field(args, "drives", list) if isinstance(drive, bytes)]
        reason = f"{session.writer}: {args.get('reason')}"[:500]
        descriptor = await self.changes.failed(slab, epoch, drives, reason)
        if drives:
            self.members.look_into(drives)
        await self._wait_durable()
        return descriptor.to_wire()

    def _slabs(self, session: Session, args: Args) -> list[Any]:
        ids = field(args, "ids", list)
        if len(ids) > SLABS_ASKED_MAX:
            raise BadRequest(f"{len(ids)} slabs asked for at once; at most {SLABS_ASKED_MAX}")
        return [self._metadata.slab(int(slab)).to_wire() for slab in ids]

    async def _fsync(self, session: Session, args: Args) -> dict[str, Any]:
        return await self.dispatch.flush()

    def statfs(self) -> dict[str, int]:
        """Sizes in bytes of one copy."""
        statistics = self._metadata.statfs()
        blocks = statistics.slab_blocks + self.slabs.free_slabs_in_pool() * self.setup.slab_blocks
        if self.setup.size:
            blocks = min(blocks, self.setup.size // BLOCK_SIZE)
        return {
            "size": blocks * BLOCK_SIZE,
            "free": max(0, blocks - statistics.used_blocks) * BLOCK_SIZE,
            "files": statistics.files + statistics.files_free,
            "files_free": statistics.files_free,
            "name_max": statistics.name_size_max,
        }

    def volume_status(self) -> dict[str, Any]:
        sessions = [
            {
                "node": session.node,
                "incarnation": session.incarnation,
                "connected": session.link is not None,
                "leases": self.leases.table.lease_counts().get(session.key, 0),
            }
            for session in self.desk.sessions
        ]
        return {
            **self._health.to_status(),
            "jobs": self.resync.to_status(),
            "sessions": sessions,
            "term": self.setup.term,
            "batches": self.batches.batch_count,
            "changes": self.batches.change_count,
        }
