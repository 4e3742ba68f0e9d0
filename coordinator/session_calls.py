"""Calls of a session that are not of one file: what it holds, slabs that failed, what all of the volume is like.

Place      coordinator floor; above session_desk.py and dispatch.py, below service.py, which checks session and lease.
"""

from collections.abc import Awaitable, Callable

import trio

from coordinator import arguments
from coordinator.adoption import Adoption
from coordinator.arguments import Args
from coordinator.departures import Departed
from coordinator.dispatch import Dispatch
from coordinator.lost import LostSlabs
from coordinator.membership_reactions import MembershipReactions
from coordinator.metadata import Metadata
from coordinator.metadata_log import MetadataLog
from coordinator.questions import Reply
from coordinator.quota_desk import QuotaDesk
from coordinator.session_desk import SessionDesk
from coordinator.sessions import BUSY_S, Session
from coordinator.shared_write import SharedWrite
from coordinator.slab_changes import SlabChanges
from coordinator.slab_manager import SlabManager
from coordinator.volume_figures import VolumeFigures
from csvfs.errors import BadRequest
from csvfs.ids import DriveId, Epoch, InodeNo, SlabId
from csvfs.net.calls import field

SLABS_ASKED_MAX = 65_536
MODE_WORDS_MAX = 300


class SessionCalls:
    """`plain`, `later`: by the name of the call; later ones wait for something. They raise CsvfsError."""

    def __init__(
        self,
        metadata: Metadata,
        log: MetadataLog,
        desk: SessionDesk,
        adoption: Adoption,
        dispatch: Dispatch,
        changes: SlabChanges,
        slabs: SlabManager,
        members: MembershipReactions,
        lost: LostSlabs,
        quotas: QuotaDesk,
        figures: VolumeFigures,
        shared_write: SharedWrite,
    ) -> None:
        self._metadata = metadata
        self._log = log
        self._desk = desk
        self._adoption = adoption
        self._dispatch = dispatch
        self._changes = changes
        self._slabs = slabs
        self._members = members
        self._lost = lost
        self._quotas = quotas
        self._figures = figures
        self._shared_write = shared_write
        self.later: dict[str, Callable[[Session, Args], Awaitable[Reply]]] = {
            "reclaim": self._reclaim,
            "accessed": dispatch.accessed,
            "statfs": self._statfs_later,
            "slab_failed": self._slab_failed,
            "fsync": self._fsync,
            "goodbye": self._goodbye,
            "segments_written": shared_write.written,
            "segments_flush": shared_write.flush,
        }
        self.plain: dict[str, Callable[[Session, Args], Reply]] = {
            "release": dispatch.release,
            "slabs": self._asked_slabs,
            "statfs": self._statfs,
            "volume_status": self._status,
        }

    def has_to_wait(self, name: str) -> bool:
        return name in self.later and (name != "statfs" or not self._slabs.spaces_known)

    async def _reclaim(self, session: Session, args: Args) -> Reply:
        if session.departed is not None:
            return await self._adopt(session, session.departed, args)
        without = self._shared_write.reclaim(session, args)
        if session.reclaimed and session.inherited is not None:
            known = {**self._dispatch.confirm(session, args), "without_segments": without}
            return Reply(known, position=self._log.position)
        refused, reports = self._dispatch.reclaim(session, args)
        self._desk.claiming(session)
        for ino, size, mtime_ns in reports:
            await self._desk.report(ino, size, mtime_ns, None)
            self._desk.claiming(session)
        if arguments.flag(args, "last"):
            self._desk.claimed(session)
        return Reply({"refused": refused, "without_segments": without}, position=self._log.position)

    async def _adopt(self, session: Session, departed: Departed, args: Args) -> Reply:
        without = self._shared_write.reclaim(session, args)
        await self._desk.wait_open()  # others must have said what they hold
        refused = [*await self._adoption.reclaim(session, departed, args), *without]
        session.refused.update(map(InodeNo, refused))
        self._desk.claiming(session)
        if arguments.flag(args, "last"):
            await self._desk.settle(session)
            self._desk.claimed(session)
        return Reply({"refused": refused}, position=self._log.position)

    async def _slab_failed(self, session: Session, args: Args) -> Reply:
        slab, epoch = SlabId(arguments.number(args, "slab")), Epoch(arguments.number_or_zero(args, "epoch"))
        drives = [DriveId(drive) for drive in field(args, "drives", list) if isinstance(drive, bytes)]
        reason = f"{session.writer}: {args.get('reason')}"[:500]
        torn = args.get("torn")
        if torn:
            await self._changes.equalize({slab: arguments.chunk_numbers(torn, self._slabs.slab_blocks)})
        self._lost.check(self._changes.book.current(slab))
        descriptor = await self._changes.failed(slab, epoch, drives, reason)
        if drives:
            self._members.look_into(drives)
        return Reply(descriptor.to_wire(), position=self._log.position)

    def _asked_slabs(self, session: Session, args: Args) -> Reply:
        """Without ids it asks whether we are there, which must not depend on the log going on."""
        ids = field(args, "ids", list)
        if len(ids) > SLABS_ASKED_MAX:
            raise BadRequest(f"{len(ids)} slabs asked for at once; at most {SLABS_ASKED_MAX}")
        if not all(isinstance(slab, int) and 0 <= slab <= arguments.I64_MAX for slab in ids):
            raise BadRequest("slab ids are whole numbers")
        open_files = arguments.optional_number(args, "open")
        session.open_files = session.open_files if open_files is None else open_files
        if isinstance(args.get("mode"), str):
            session.mode, session.why = args["mode"][:MODE_WORDS_MAX], str(args.get("why") or "")[:MODE_WORDS_MAX]
            session.busy_until = trio.current_time() + BUSY_S if args.get("busy") is True else 0.0
        descriptors = [self._metadata.slab(int(slab)).to_wire() for slab in ids]
        return Reply(descriptors, position=self._log.position if ids else 0)

    async def _fsync(self, session: Session, args: Args) -> Reply:
        return await self._dispatch.flush()

    async def _goodbye(self, session: Session, args: Args) -> Reply:
        await self._desk.dismiss(session)
        return Reply({}, position=self._log.position)

    def _statfs(self, session: Session, args: Args) -> Reply:
        ino, figures = arguments.optional_number(args, "ino", 1), self._figures.statfs()
        return Reply(figures if ino is None else self._quotas.statfs(ino, figures), position=self._log.position)

    async def _statfs_later(self, session: Session, args: Args) -> Reply:
        await self._slabs.wait_spaces()
        return self._statfs(session, args)

    def _status(self, session: Session, args: Args) -> Reply:
        """Figures for people, who need them most when the log does not go on."""
        return Reply(self._figures.status())
