"""Shared write: a file that several nodes write at once, each in segments of its own (DESIGN: the shared-write lease).

Place      coordinator floor; above leases.py, below service.py.
Why        Two nodes that write one file past their caches would move its write lease with every turn, 10 ms each time.
How        The coordinator keeps the write lease itself, as the session SHARERS, and leases out **segments**, SEGMENT_BLOCKS
           of the file each: READ to any number of nodes, WRITE to one. It is the same table, with the same rules (T1 to
           T4), keyed by segment; a second one, since a segment is not an inode. Every node with segments also holds READ on
           the file's MEMBER key: to end the sharing, SHARERS takes WRITE on it, which recalls all that it has from each.
Layout     stands still meanwhile, and so does the size: whoever grows, cuts, punches or clones the file, fills a hole,
           or caches anything of it needs a lease on the inode, and the recall from SHARERS ends the sharing first.
Begins     where direct I/O has taken the lease from one node to another MOVES_MIN times, none of them MOVE_S after the
           one before; ends when a lease on the inode is asked for, or the last node gives its segments back.
Claims     A mount says after a takeover which segments it has. The next process of one that has died says in which it must
           do again what was begun there; of other segments that the one before had it holds none, and answers so.
"""

import logging
import stat
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import trio

from coordinator import arguments
from coordinator.arguments import Args
from coordinator.batches import Batches
from coordinator.lease_table import NONE, OPEN, READ, SHARERS, WRITE, Need, Recall, SessionKey, Ticket
from coordinator.leases import Leases, Waiting, int_of
from coordinator.metadata import Metadata
from coordinator.questions import Reply
from coordinator.sessions import Session, Sessions
from csvfs.errors import BadRequest, CsvfsError, Fenced, NotFound, Unavailable
from csvfs.ids import InodeNo
from csvfs.units import BLOCK_SIZE
from csvfs.volume.extents import FILE_BLOCKS_MAX

log = logging.getLogger(__name__)

SEGMENT_BLOCKS = 256  # 1 MiB: as much as one request of the kernel has at most
SEGMENTS_MAX = FILE_BLOCKS_MAX // SEGMENT_BLOCKS
SEGMENTS_ASKED_MAX = 16
RUNS_MAX = 65_536  # of segments, and as many files, in one call
FLUSH_S_MAX = 30.0
RETRY_S = 0.1
MOVES_MIN = 4
MOVE_S = 1.0
MOVES_NOTED_MAX = 1024  # files
MEMBER = -1  # in place of a segment's number
_MODE, _SIZE, _MTIME = 1, 6, 9  # in an attr
_NEEDS = {READ: Need.READ, WRITE: Need.WRITE}
_KEY_BITS = SEGMENTS_MAX.bit_length() + 1


def key_of(ino: int, segment: int) -> InodeNo:
    """What the table of segments has in place of an inode."""
    return InodeNo(ino << _KEY_BITS | segment + 1)


def place_of(key: InodeNo) -> tuple[InodeNo, int]:
    """The inode and the segment, or MEMBER, that a key stands for."""
    return InodeNo(key >> _KEY_BITS), (key & (1 << _KEY_BITS) - 1) - 1


class SegmentLeases(Leases):
    """The table of segments, and its recalls.

    beside   whose nursery has the tasks
    left     (session, inode, segment or MEMBER): it has that no more
    owes     (session, inode): what it wrote where others may write now is not all on the media
    wrote    (inode, mtime_ns): what it told of it; in the metadata when that returns
    """

    beside: Leases
    left: Callable[[SessionKey, InodeNo, int], None]
    owes: Callable[[Session, InodeNo], None]
    wrote: Callable[[InodeNo, int], Awaitable[None]]

    def _send(self, recall: Recall) -> None:
        self._under_way[recall] = trio.current_time() + self._recall_timeout_s
        self.beside.start(self._recall_noted, recall)

    def waiting(self, count_max: int) -> list[Waiting]:
        """As of Leases, of the inodes whose segments they are."""
        return [
            (Ticket(ticket.session, {place_of(key)[0]: need for key, need in ticket.needs.items()}), since_s, [
                (replace(recall, ino=place_of(recall.ino)[0]), until_s) for recall, until_s in recalls
            ])
            for ticket, since_s, recalls in super().waiting(count_max)
        ]  # fmt: skip

    def _name_of(self, recall: Recall) -> str:
        ino, segment = place_of(recall.ino)
        return f"all segments of inode {ino}" if segment == MEMBER else f"segment {segment} of inode {ino}"

    def _call_of(self, recall: Recall) -> dict[str, Any]:
        ino, segment = place_of(recall.ino)
        return {"ino": ino, "segment": segment, "kind": recall.to_kind, "attr": False}

    async def _take_answer(self, session: Session, recall: Recall, answer: Any) -> None:
        fields = answer if isinstance(answer, dict) else {}
        ino, segment = place_of(recall.ino)
        mtime_ns = int_of(fields, "mtime_ns")
        if mtime_ns and segment == MEMBER:
            await self.wrote(ino, mtime_ns)
            if session.ended:
                return
        if segment == MEMBER or recall.to_kind == NONE:
            self.left(session.key, ino, segment)
        if segment != MEMBER and fields.get("owes") is True:
            self.owes(session, ino)
        # A segment that is given back is not held as open, either.
        self.perform(self.table.answer(session.key, recall.ino, NONE if recall.to_kind == NONE else READ))
        if recall.to_kind == NONE:
            self.perform(self.table.release(session.key, recall.ino, NONE))


@dataclass(slots=True, eq=False)
class _Shared:
    """A file that is shared."""

    ending: bool = False
    held: dict[SessionKey, set[int]] = field(default_factory=dict)  # segments that a session may have
    owing: dict[Session, int] = field(default_factory=dict)  # who has to flush before another's fsync is answered; since when


class SharedWrite:
    """All shared files of one volume. `leases`: of inodes; `segments`: of segments."""

    def __init__(
        self, metadata: Metadata, batches: Batches, sessions: Sessions, leases: Leases, segments: SegmentLeases
    ) -> None:
        self._metadata = metadata
        self._batches = batches
        self._sessions = sessions
        self._leases = leases
        self.segments = segments
        self._files: dict[InodeNo, _Shared] = {}
        self._beginning: dict[InodeNo, trio.Event] = {}
        self._debts = 0
        self._moves: dict[InodeNo, tuple[int, float]] = {}  # how many, and when the last one was; that one at the end
        self._self = Session(0, SHARERS, reclaimed=True)
        segments.left = self._left_segment
        segments.wrote = self.wrote
        segments.owes = self._owes
        leases.end_shared = self._end
        leases.trim_segments = segments.trim
        leases.waiting_for_segments = segments.waiting

    # -- beginning -------------------------------------------------------------------------------

    def wants(self, session: Session, args: Args) -> bool:
        """Whether an `acquire` for direct I/O is answered by `share`; it counts as a move of the lease if not.

        A call that is not for direct I/O has the moves forgotten.
        """
        ino, kind = arguments.inode(args), arguments.number(args, "kind", OPEN, WRITE)
        if kind < READ:
            return False
        if not arguments.flag(args, "direct"):
            self._moves.pop(ino, None)
            return False
        if ino in self._beginning or ((shared := self._files.get(ino)) is not None and not shared.ending):
            return True
        if shared is not None or not self._leases.table.contends(session.key, ino, kind):
            return False
        now_s = trio.current_time()
        count, last_s = self._moves.pop(ino, (0, 0.0))
        count = count + 1 if now_s - last_s < MOVE_S else 1
        if count >= MOVES_MIN and stat.S_ISREG(self._metadata.getattr(ino)[_MODE]):
            return True
        self._moves[ino] = (count, now_s)
        if len(self._moves) > MOVES_NOTED_MAX:
            del self._moves[next(iter(self._moves))]
        return False

    async def share(self, session: Session, args: Args) -> Reply:
        """The answer to an `acquire` that `wants`: the file is shared, `segments` are to be asked for.

        Raises  NotFound, TimedOut, Fenced. Cancel safe.
        """
        ino = arguments.inode(args)
        self._metadata.getattr(ino)
        while ino in self._beginning:
            await self._beginning[ino].wait()
        if ino not in self._files:
            self._beginning[ino] = trio.Event()
            try:
                ticket = await self._leases.take(self._self, {ino: Need.WRITE})
                self._add(ino)
                self._leases.finish(ticket)
            finally:
                self._beginning.pop(ino).set()
            log.info("inode %d is shared: nodes that write to it get a segment of it each", ino)
        if session.ended:
            raise Fenced(f"{session.writer} incarnation {session.incarnation} was evicted")
        self._leases.table.reclaim(session.key, ino, OPEN)
        serial = self._leases.table.serial(session.key, ino)
        return Reply({"segmented": True, "extents": [], "slabs": []}, {"lease": (ino, serial)})

    def _add(self, ino: InodeNo) -> _Shared:
        shared = self._files[ino] = _Shared()
        return shared

    # -- segments --------------------------------------------------------------------------------

    async def ask(self, session: Session, args: Args, describe: Callable[[dict[str, Any], InodeNo], None]) -> Reply:
        """The call `segments`. describe(value, ino): adds the layout that was asked for.

        Raises  BadRequest, NotFound, TimedOut, Fenced. Cancel safe.
        """
        ino, kind = arguments.inode(args), arguments.number(args, "kind", READ, WRITE)
        first = arguments.number(args, "first", 0, SEGMENTS_MAX - 1)
        count = arguments.number(args, "count", 1, SEGMENTS_ASKED_MAX)
        wanted = range(first, first + count)
        shared = self._files.get(ino)
        if shared is None or shared.ending:
            return self._over(session, ino)
        keys = [key_of(ino, segment) for segment in (MEMBER, *wanted)]
        table = self.segments.table
        needs = dict.fromkeys(keys[1:], _NEEDS[kind]) | {keys[0]: Need.READ}
        ticket = await self.segments.take(session, needs)
        shared = self._files.get(ino)  # another one maybe: the segments are of this one now
        if shared is None:
            self._give_back(session, keys, ticket)
            return self._over(session, ino)
        shared.held.setdefault(session.key, set()).update(wanted)
        if shared.ending:  # and it is asked for all of it, or will be
            self.segments.finish(ticket)
            return self._over(session, ino)
        value: dict[str, Any] = {}
        try:
            value["size"] = self._metadata.getattr(ino)[_SIZE]
            value["owed"] = any(other is not session for other in shared.owing)
            describe(value, ino)
        except BaseException:
            self.segments.finish(ticket)
            raise
        held = [(segment, table.serial(session.key, key)) for segment, key in zip((MEMBER, *wanted), keys, strict=True)]

        def seal() -> None:
            """As it leaves: what of it may be told."""
            value["held"] = [
                [segment, table.lease_at_send(session.key, key_of(ino, segment), serial)] for segment, serial in held
            ]

        return Reply(value, seal=seal, finish=lambda: self.segments.finish(ticket))

    def _over(self, session: Session, ino: InodeNo) -> Reply:
        """member: it will be asked for what it has."""
        return Reply({"over": True, "member": self.segments.table.held(session.key, key_of(ino, MEMBER)) >= READ})

    def _give_back(self, session: Session, keys: list[InodeNo], ticket: Ticket) -> None:
        """The sharing has ended meanwhile: whoever asked is told of nothing that it would hold."""
        for key in keys:
            self.segments.perform(self.segments.table.release(session.key, key, NONE))
        self.segments.finish(ticket)

    # -- the end ---------------------------------------------------------------------------------

    async def _end(self, ino: InodeNo) -> None:
        """Returns when no session has a segment of the file any more; SHARERS may give its lease back then."""
        shared = self._files.get(ino)
        if shared is None:
            return
        shared.ending = True
        while True:
            try:
                ticket = await self.segments.take(self._self, {key_of(ino, MEMBER): Need.WRITE})
                break
            except Unavailable:  # not given back yet: who does not answer is evicted; or too many wait
                await trio.sleep(RETRY_S)
        del self._files[ino]
        self.segments.perform(self.segments.table.release(SHARERS, key_of(ino, MEMBER), NONE))
        self.segments.finish(ticket)
        log.info("inode %d is shared no more", ino)

    def _left_segment(self, key: SessionKey, ino: InodeNo, segment: int) -> None:
        if segment == MEMBER:
            self._left(key, ino)
        elif (shared := self._files.get(ino)) is not None and key in shared.held:
            shared.held[key].discard(segment)

    def _left(self, key: SessionKey, ino: InodeNo) -> None:
        """A session has nothing of the file any more."""
        shared = self._files.get(ino)
        if shared is None:
            return
        for segment in shared.held.pop(key, ()):
            self.segments.perform(self.segments.table.release(key, key_of(ino, segment), NONE))
        self.segments.perform(self.segments.table.release(key, key_of(ino, MEMBER), NONE))
        shared.owing = {session: debt for session, debt in shared.owing.items() if session.key != key}
        if not shared.held and not shared.ending:
            del self._files[ino]
            shared.ending = True  # for those who wait with it in hand
            self._leases.release_of(SHARERS, ino, NONE)

    def release(self, session: Session, ino: InodeNo) -> None:
        """The session has given the inode back."""
        shared = self._files.get(ino)
        if shared is not None:
            self._left(session.key, ino)

    # -- sessions --------------------------------------------------------------------------------

    def rename(self, old: SessionKey, new: SessionKey) -> None:
        """Another process goes on with a session."""
        for shared in self._files.values():
            if old in shared.held:
                shared.held[new] = shared.held.pop(old)
                session = self._sessions.get(new)
                if session is not None:
                    self._add_debt(session, shared)
        self.segments.interrupt(old)
        self.segments.rename(old, new)

    def end_session(self, key: SessionKey) -> None:
        """It is fenced on every drive, and its writes are equal everywhere: its segments pass on."""
        self.segments.end_session(key)
        for ino, shared in list(self._files.items()):
            if key in shared.held:
                # Others may write where it has, and nobody gets a write lease for that.
                self._leases.table.on_write(SHARERS, ino)
            self._left(key, ino)

    def reclaim(self, session: Session, args: Args) -> list[int]:
        """What a session says that it has: [ino, mtime_ns, [[first, count, kind]]]. The inodes of which it cannot have that."""
        without = []
        for ino, mtime_ns, runs in claims_of(args):
            if session.departed is not None or not self._claim(session, ino, runs):
                without.append(int(ino))
            elif mtime_ns:
                self._batches.submit(partial(self._keep_time, ino, mtime_ns), None, _noted)
        return without

    def _claim(self, session: Session, ino: InodeNo, runs: list[list[int]]) -> bool:
        shared = self._files.get(ino)
        if session.reclaimed:  # the next process of a mount: what the one before had is known here
            return shared is not None and session.key in shared.held
        try:
            self._metadata.getattr(ino)
        except NotFound:
            return False
        if shared is None:
            if not self._leases.table.reclaim(SHARERS, ino, WRITE):
                return False
            shared = self._add(ino)
            for other in self._sessions:  # who has given all back, and not flushed it, does not claim anything
                self._add_debt(other, shared)
        table = self.segments.table
        table.reclaim(session.key, key_of(ino, MEMBER), READ)
        held = shared.held.setdefault(session.key, set())
        for first, count, kind in runs:
            for segment in range(first, first + count):
                if not table.reclaim(session.key, key_of(ino, segment), kind):
                    self._left(session.key, ino)
                    return False
                held.add(segment)
        return True

    # -- flushes ---------------------------------------------------------------------------------

    def _owes(self, session: Session, ino: InodeNo) -> None:
        shared = self._files.get(ino)
        if shared is not None and session.key in shared.held:
            self._add_debt(session, shared)

    def _add_debt(self, session: Session, shared: _Shared) -> None:
        self._debts += 1
        shared.owing[session] = self._debts

    async def flush(self, session: Session, args: Args) -> Reply:
        """The call `segments_flush`: returns when all that others owed before is on the media, or they are gone.

        Raises  TimedOut; what a flush there raises. Cancel safe.
        """
        ino = arguments.inode(args)
        shared = self._files.get(ino)
        if shared is None:
            return Reply({})  # each has flushed before it gave back what it had
        errors: list[CsvfsError] = []
        deadline = trio.current_time() + FLUSH_S_MAX
        async with trio.open_nursery() as nursery:
            for owing in shared.owing:
                if owing is not session:
                    nursery.start_soon(self._have_flushed, owing, ino, shared, deadline, errors)
        if errors:
            raise errors[0]
        return Reply({})

    async def _have_flushed(
        self, session: Session, ino: InodeNo, shared: _Shared, deadline: float, errors: list[CsvfsError]
    ) -> None:
        """Returns when it has flushed what it owed, or is gone, or has failed to."""
        while (debt := shared.owing.get(session)) is not None:
            try:
                await session.call("flush", {"ino": ino}, timeout_s=max(RETRY_S, deadline - trio.current_time()))
            except CsvfsError as error:
                is_over = trio.current_time() >= deadline
                if isinstance(error, Fenced) or (error.retryable and is_over):
                    # Said of another mount: our caller would take it for its own. It is being evicted, or cannot be reached.
                    error = Unavailable(f"{session.writer} has not flushed inode {ino}: {error}")
                if is_over or not error.retryable:
                    errors.append(error)
                    return
                await trio.sleep(RETRY_S)
            else:
                if shared.owing.get(session) == debt:  # what it owes from now on is not our caller's
                    del shared.owing[session]
                return

    # -- times -----------------------------------------------------------------------------------

    def members(self, ino: InodeNo) -> list[Session]:
        """Those who may know a later time of the last write than the metadata."""
        shared = self._files.get(ino)
        found = [self._sessions.get(key) for key in shared.held] if shared is not None else []
        return [session for session in found if session is not None]

    async def written(self, session: Session, args: Args) -> Reply:
        """The call `segments_written`: when a session has written last."""
        ino, mtime_ns = arguments.inode(args), arguments.time_ns(args, "mtime_ns")
        shared = self._files.get(ino)
        if mtime_ns and shared is not None and session.key in shared.held:
            await self.wrote(ino, mtime_ns)
        return Reply({})

    async def wrote(self, ino: InodeNo, mtime_ns: int) -> None:
        """Raises what ends the batches. A file that is gone is no error."""
        try:
            await self._batches.run(lambda: self._keep_time(ino, mtime_ns))
        except CsvfsError as error:
            if isinstance(error, Fenced) or error.retryable:
                raise
            log.info("the time of inode %d is not kept: %s", ino, error)

    def _keep_time(self, ino: InodeNo, mtime_ns: int) -> None:
        """In a batch. Several nodes write, and tell it in any order."""
        if self._metadata.getattr(ino)[_MTIME] < mtime_ns:
            self._metadata.commit_file(ino, 0, mtime_ns, None, time.time_ns())


def claims_of(args: Args) -> list[tuple[InodeNo, int, list[list[int]]]]:
    """Rows of `segments` in a `reclaim`. Raises BadRequest."""
    rows = args.get("segments") or []
    if not isinstance(rows, list) or len(rows) > RUNS_MAX:
        raise BadRequest(f"segments must be a list of at most {RUNS_MAX} rows")
    claims: list[tuple[InodeNo, int, list[list[int]]]] = []
    for row in rows:
        if not isinstance(row, list) or len(row) != 3 or not all(isinstance(number, int) for number in row[:2]):
            raise BadRequest("segments must be [ino, mtime_ns, runs]")
        ino = arguments.number({"ino": row[0]}, "ino", 1)
        runs = arguments.rows({"runs": row[2]}, "runs", 3, RUNS_MAX)
        for first, count, kind in runs:
            if not (isinstance(first, int) and isinstance(count, int) and kind in (READ, WRITE)):
                raise BadRequest("runs must be [first, count, kind]")
            if not (first >= 0 and count > 0 and first + count <= SEGMENTS_MAX):
                raise BadRequest(f"segments {first} to {first + count} are not of a file")
        claims.append((InodeNo(ino), max(0, row[1]), runs))
    return claims


def _noted(value: object, error: CsvfsError | None) -> None:
    if error is not None:
        log.info("the time of a file is not kept: %s", error)


assert SEGMENT_BLOCKS * BLOCK_SIZE == 1 << 20
