"""Dispatch: one call of a session, from its frame to the reply that carries the leases held at that moment.

Place      coordinator floor; above questions.py, operations.py, batches.py, leases.py, below service.py.
Order      A reply leaves only when the log is durable up to the moment it was computed: nobody is told a
           state that could un-happen. Its leases are looked up as it leaves: a recall sent meanwhile takes
           them out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from coordinator import arguments
from coordinator.arguments import Args
from coordinator.batches import Batches
from coordinator.extents import Extent
from coordinator.lease_table import NONE, OPEN, READ, WRITE, Need, Ticket
from coordinator.leases import Leases, int_of
from coordinator.metadata import Metadata
from coordinator.metadata_log import MetadataLog
from coordinator.operations import Needs, Operation, Operations, Value, lease_of_new
from coordinator.questions import Questions, Reply
from coordinator.sessions import Outcome, Session, once
from coordinator.slab_manager import SlabManager
from csvfs.errors import BadRequest, Conflict, CsvfsError, Fenced, NotFound
from csvfs.ids import Incarnation, InodeNo

RELEASE_ITEMS_MAX = 65_536
ACCESSED_ITEMS_MAX = 4096
ALLOCATE_BLOCKS_MAX = 1 << 20  # 4 GiB in one call
LAYOUT_EXTENTS_MAX = 16_384
UNSHARE_BLOCKS_MAX = 1024
_NEED_OF_KIND = {OPEN: Need.OPEN, READ: Need.READ, WRITE: Need.WRITE}
_SIZE, _ATIME, _MTIME = 6, 8, 9  # in an attr


class NeedsChangedError(Conflict):
    """A name leads elsewhere than when leases were taken: the operation begins anew."""


class NeedsSpaceError(Conflict):
    """An allocation has to wait for `blocks` free blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__(f"{blocks} free blocks are needed")
        self.blocks = blocks


@dataclass(slots=True, eq=False)
class Acquisition:
    """`before`: the lease held when it was asked for."""

    session: Session
    ino: InodeNo
    block: int
    count: int
    before: int
    ticket: Ticket


@dataclass(slots=True, eq=False)
class Change:
    """A call that changes metadata, on its way. `looked_at`: applied_count of the batches, as of `needs`."""

    session: Session
    op: int
    op_done: int
    operation: Operation
    needs: Needs
    ticket: Ticket
    looked_at: int
    incarnation: Incarnation  # of the process that asked


ChangeDone = Callable[[Reply | None, CsvfsError | None], None]  # exactly one of both


class Dispatch:
    """Carries out calls of sessions. `orphaned(ino)`: an inode may have lost its last name."""

    def __init__(
        self,
        metadata: Metadata,
        batches: Batches,
        metadata_log: MetadataLog,
        leases: Leases,
        slabs: SlabManager,
        orphaned: Callable[[InodeNo], None],
    ) -> None:
        self._metadata = metadata
        self._batches = batches
        self._log = metadata_log
        self._leases = leases
        self._slabs = slabs
        self._orphaned = orphaned
        self.questions = Questions(metadata, leases)
        self._operations = Operations(metadata, leases.table)
        self.given_back: Callable[[Session, InodeNo], None] = lambda session, ino: None  # see SharedWrite.release
        # Changes that may have to wait for space.
        self.takers = {"allocate": self.allocate, "unshare": self.unshare}

    # -- questions -------------------------------------------------------------------------------

    def question(self, session: Session, name: str, args: Args) -> Reply | None:
        """The answer to a question; None: `name` is not one. Raises CsvfsError."""
        question = self.questions.by_name.get(name)
        if question is None:
            return None
        reply = question(session, args)
        reply.position = self._log.position
        return reply

    async def complete(self, reply: Reply) -> None:
        """Ask the writer of the file, if there is another one, and wait until nothing of it can un-happen."""
        if reply.writer is not None:
            attr = reply.value["attr"]
            _merge(attr, await self._leases.query(reply.writer, InodeNo(attr[0])))
        if reply.sharers:
            await self._ask_sharers(reply)
        await self._log.wait(reply.position)

    async def _ask_sharers(self, reply: Reply) -> None:
        attr = reply.value["attr"]

        async def ask(session: Session) -> None:
            told = await self._leases.query(session, InodeNo(attr[0]))
            attr[_MTIME] = max(attr[_MTIME], int_of(told or {}, "mtime_ns") or 0)

        async with trio.open_nursery() as nursery:
            for session in reply.sharers:
                nursery.start_soon(ask, session)

    def sealed(self, session: Session, reply: Reply) -> Any:
        """The value with the leases as they are now: to be sent without another await."""
        for field, (ino, serial) in reply.leases.items():
            reply.value[field] = self._leases.table.lease_at_send(session.key, ino, serial)
        if reply.seal is not None:
            reply.seal()
        return reply.value

    # -- changes ---------------------------------------------------------------------------------

    def is_change(self, name: str) -> bool:
        return name in self._operations.by_name

    def begin_change(self, session: Session, name: str, args: Args) -> Change:
        """One operation that changes metadata; its ticket may have to wait. Raises BadRequest and as
        Leases.begin."""
        op, op_done = arguments.number(args, "op", 1), arguments.number(args, "op_done")
        operation = self._operations.by_name[name](session.key, args)
        needs = operation.needs()
        ticket = self._leases.begin(session, needs)
        applied = self._batches.applied_count
        return Change(session, op, op_done, operation, needs, ticket, applied, session.incarnation)

    def renew_change(self, change: Change) -> None:
        """After NeedsChangedError: new needs, a new ticket."""
        change.needs = change.operation.needs()
        change.ticket = self._leases.begin(change.session, change.needs)
        change.looked_at = self._batches.applied_count

    def carry_out(self, change: Change, done: ChangeDone) -> None:
        """Execute, exactly once (I11), what has been granted; `done` is called when that is durable."""

        def apply() -> Value | None:
            # Nothing was changed since the needs were looked up if this is the next change of all.
            if self._batches.applied_count != change.looked_at + 1 and operation.needs() != change.needs:
                raise NeedsChangedError("names have changed meanwhile")
            reply = operation.apply()
            return None if operation.again(reply) else reply

        def executed(outcome: Outcome | None, error: CsvfsError | None) -> None:
            if outcome is not None and outcome.reply is None:
                return  # not finished: the ticket stays
            # Right after the transaction: the ticket has kept others off, now the session may cache the new
            # state.
            self._leases.finish(change.ticket)
            if outcome is not None and outcome.reply is not None and not outcome.stored:
                leases.update(self._leases_after(change.session, operation, outcome.reply))

        def durable(outcome: Outcome, error: CsvfsError | None) -> None:
            if error is None and outcome.reply is None:
                self._batches.submit(transaction, executed, durable)
                return
            self._leases.finish(change.ticket)
            if error is not None:
                done(None, error)
                return
            assert outcome.reply is not None
            for field in operation.leases(outcome.reply):
                # A stored reply may be history: it carries no leases.
                leases.setdefault(field, (InodeNo(0), None))
            done(Reply(outcome.reply, leases), None)

        if change.session.incarnation != change.incarnation:
            # The next process sends it again, under the same number.
            self._leases.finish(change.ticket)
            raise Fenced(f"another process goes on for {change.session.writer} incarnation {change.incarnation}")
        operation = change.operation
        leases: dict[str, tuple[InodeNo, int | None]] = {}
        transaction = once(self._metadata, change.session, change.op, change.op_done, apply)
        self._batches.submit(transaction, executed, durable)

    def _leases_after(
        self, session: Session, operation: Operation, reply: Value
    ) -> dict[str, tuple[InodeNo, int | None]]:
        for ino in operation.made(reply):
            self._leases.table.reclaim(session.key, ino, lease_of_new(reply["attr"]))
        for ino in operation.orphans(reply):
            self._orphaned(ino)
        fields = operation.leases(reply).items()
        return {field: (ino, self._leases.table.try_read(session.key, ino)) for field, ino in fields}

    # -- layouts and leases ----------------------------------------------------------------------

    def begin_acquisition(self, session: Session, args: Args) -> Acquisition:
        """A lease, maybe with a layout; its ticket may have to wait. Raises NotFound before anybody is asked
        to give anything back, and as Leases.begin."""
        ino, kind = arguments.inode(args), arguments.number(args, "kind", OPEN, WRITE)
        block, count = arguments.number_or_zero(args, "block"), arguments.number_or_zero(args, "count")
        before = self._leases.table.held(session.key, ino)
        self._metadata.getattr(ino)
        ticket = self._leases.begin(session, {ino: _NEED_OF_KIND[kind]})
        return Acquisition(session, ino, block, count, before, ticket)

    def acquired(self, wanted: Acquisition) -> Reply:
        """Its ticket has been granted. It is the reply's from now on (`answered`): were it finished before that has
        left, whoever waits next would recall the lease at once, and the reply could not carry it (T2). Two who wait
        for each other's lease would then be told all the time that they hold none, and both ask again."""
        session, ino = wanted.session, wanted.ino
        try:
            attr = self._metadata.getattr(ino)
            value: Value = {"extents": [], "slabs": []}
            writer = None
            if wanted.ticket.needs[ino] is not Need.OPEN:
                # An OPEN is answered also while another session's change waits that has had the attributes forgotten: with
                # the lease that stays they would be believed, and nobody would take them back again.
                value["attr"], writer = attr, self._leases.other_writer(session, ino)
            if wanted.count:
                self.add_layout(value, ino, wanted.block, wanted.count)
        except BaseException as error:
            if isinstance(error, NotFound):
                self._leases.release(session, ino, wanted.before)
            self._leases.finish(wanted.ticket)
            raise
        leases: dict[str, tuple[InodeNo, int | None]] = {
            "lease": (ino, self._leases.table.serial(session.key, ino))
        }
        return Reply(value, leases, writer, self._log.position, wanted.ticket)

    def answered(self, reply: Reply) -> None:
        """The reply has left, or never will. Twice does no harm."""
        if reply.ticket is not None:
            self._leases.finish(reply.ticket)
        if reply.finish is not None:
            reply.finish()

    def add_layout(self, value: dict[str, Any], ino: InodeNo, block: int, count: int) -> None:
        extents = self._metadata.layout(ino, block, count, LAYOUT_EXTENTS_MAX)
        value["extents"] = [extent.to_wire() for extent in extents]
        value["slabs"] = self._descriptors({extent.slab for extent in extents})
        value |= self._shared(extents)

    def _shared(self, extents: list[Extent]) -> Value:
        """Only where there is something to say: most volumes have no clones."""
        shared = self._metadata.shared_in(extents)
        return {"shared": shared} if shared else {}

    def _descriptors(self, slabs: set[int]) -> list[list]:
        return [self._metadata.slab(slab).to_wire() for slab in sorted(slabs)]

    def allocate(self, session: Session, args: Args, done: ChangeDone) -> None:
        """Fill the holes of a range, in as many transactions as it takes; the last one is the one that
        counts. `done`: as of carry_out, or at once with NeedsSpaceError."""
        op, op_done = arguments.number(args, "op", 1), arguments.number(args, "op_done")
        ino, block = arguments.inode(args), arguments.number(args, "block")
        count = arguments.number(args, "count", 1, ALLOCATE_BLOCKS_MAX)
        size, mtime_ns = arguments.number_or_zero(args, "size"), arguments.number_or_zero(args, "mtime_ns")
        end = block + count
        # From where on there may be holes, and how many blocks must be free, if too few are: as the last
        # transaction found it.
        start, reached, needed = block, block, 0

        def apply() -> Value | None:
            nonlocal needed, reached
            self._operations.check_holds(session.key, ino, WRITE)
            now_ns = self._operations.now_ns()
            allocated = self._metadata.allocate(ino, start, end - start, size, mtime_ns, now_ns)
            # In all, not how many more: by the time somebody looks, others may have freed or taken some.
            needed = allocated.missing and allocated.missing + self._metadata.space.available_blocks
            reached = start if needed else max(start, allocated.reached)
            if reached < end:
                return None
            known = self._metadata.layout(ino, block, count, LAYOUT_EXTENTS_MAX)
            extents = {extent.block: extent for extent in [*known, *allocated.extents]}
            return {
                "attr": allocated.attr,
                "size": allocated.attr[_SIZE],
                "extents": [extents[first].to_wire() for first in sorted(extents)],
                "slabs": self._descriptors({extent.slab for extent in extents.values()}),
                **self._shared(list(extents.values())),
            }

        def durable(outcome: Outcome, error: CsvfsError | None) -> None:
            nonlocal start
            self._slabs.note_use()
            if error is not None:
                done(None, error)
            elif outcome.reply is not None:
                done(Reply(outcome.reply), None)
            elif needed:
                done(None, NeedsSpaceError(needed))
            else:
                start = reached
                self._batches.submit(transaction, None, durable)

        transaction = once(self._metadata, session, op, op_done, apply)
        self._batches.submit(transaction, None, durable)

    def unshare(self, session: Session, args: Args, done: ChangeDone) -> None:
        """Set fresh blocks aside for shared ones. `done`: as of allocate."""
        op, op_done = arguments.number(args, "op", 1), arguments.number(args, "op_done")
        ino, block = arguments.inode(args), arguments.number(args, "block")
        count = arguments.number(args, "count", 1, UNSHARE_BLOCKS_MAX)
        check_grant = self._operations.grant_of(session.key, ino)
        needed = 0

        def apply() -> Value | None:
            nonlocal needed
            check_grant()
            unshared = self._metadata.unshare(ino, block, count, session.id)
            needed = unshared.missing and unshared.missing + self._metadata.space.available_blocks
            if needed:
                return None
            rows = [list(row) for row in unshared.rows]
            return {"rows": rows, "slabs": self._descriptors({row[2] for row in rows})}

        def durable(outcome: Outcome, error: CsvfsError | None) -> None:
            self._slabs.note_use()
            if error is None and outcome.reply is None:
                error = NeedsSpaceError(needed)
            done(None if error is not None else Reply(outcome.reply), error)

        self._batches.submit(once(self._metadata, session, op, op_done, apply), None, durable)

    async def make_space(self, blocks: int) -> None:
        """After NeedsSpaceError, before the allocation begins anew. Raises NoSpace."""
        await self._slabs.ensure_free(blocks)

    async def accessed(self, session: Session, args: Args) -> Reply:
        """When inodes were read under leases that are still held; of others it is void."""
        rows = arguments.rows(args, "items", 2, ACCESSED_ITEMS_MAX)
        if any(not isinstance(number, int) or number <= 0 for row in rows for number in row):
            raise BadRequest("items must be [ino, atime_ns]")

        def apply() -> list[InodeNo]:
            return [
                InodeNo(ino)
                for ino, atime_ns in rows
                if self._leases.table.held(session.key, InodeNo(ino)) >= READ and self._metadata.accessed(ino, atime_ns)
            ]

        for ino in await self._batches.run(apply):
            self._leases.outdated(session.key, ino)
        return Reply({}, position=self._log.position)

    def release(self, session: Session, args: Args) -> Reply:
        for ino, kind in arguments.rows(args, "items", 2, RELEASE_ITEMS_MAX):
            if not isinstance(ino, int) or not isinstance(kind, int) or not NONE <= kind <= WRITE:
                raise BadRequest("items must be [ino, kind]")
            if kind == NONE:
                self.given_back(session, InodeNo(ino))
            self._leases.release(session, InodeNo(ino), kind)
        return Reply({})

    def reclaim(
        self, session: Session, args: Args
    ) -> tuple[list[int], list[tuple[InodeNo, int, int | None]]]:
        """Refused inodes, and what the session reports of files that it was writing: (ino, size,
        mtime_ns)."""
        refused: list[int] = []
        reports: list[tuple[InodeNo, int, int | None]] = []
        claims = claims_of(args)
        sizes = self._metadata.inodes.sizes([ino for ino, _, _, _ in claims])
        for ino, kind, size, mtime_ns in claims:
            if ino not in sizes or not self._leases.table.reclaim(session.key, InodeNo(ino), kind):
                refused.append(ino)
            elif kind == WRITE and ((size or 0) > sizes[ino] or mtime_ns):  # else it says what is committed
                reports.append((InodeNo(ino), size or 0, mtime_ns or None))
        return refused, reports

    def confirm(self, session: Session, args: Args) -> dict[str, list[int]]:
        """What the next process of a mount believes to hold, by the notes of the one before, against what is known here: that
        one may have been killed before it noted what it had given back, or was refused.

        `lowered`: it holds less, and has it open, if it is there. `refused`: others may have written there, too, since
        what it is asked anew was begun.
        """
        table = self._leases.table
        short = {InodeNo(ino): kind for ino, kind, _, _ in claims_of(args) if table.held(session.key, InodeNo(ino)) < kind}
        there = self._metadata.inodes.sizes(list(short))
        for ino in short:
            if ino in there:
                table.reclaim(session.key, ino, OPEN)
        lowered = [int(ino) for ino, kind in short.items() if kind > OPEN or ino not in there]
        return {"lowered": lowered, "refused": [ino for ino in lowered if ino in session.refused]}

    async def flush(self) -> Reply:
        """All metadata that anybody was told of is on the media of all members (I8)."""
        await self._log.flush()
        return Reply({})


def claims_of(args: Args) -> list[list[Any]]:
    """Rows of [ino, kind, size, mtime_ns]. Raises BadRequest."""
    claims = arguments.rows(args, "leases", 4, RELEASE_ITEMS_MAX)
    for ino, kind, _, _ in claims:
        if not isinstance(ino, int) or not isinstance(kind, int) or not OPEN <= kind <= WRITE:
            raise BadRequest("leases must be [ino, kind, size, mtime_ns]")
    return claims


def _merge(attr: list[int], told: dict[str, Any] | None) -> None:
    """Size and times as the holder of the write lease knows them."""
    for index, name in ((_SIZE, "size"), (_MTIME, "mtime_ns"), (_ATIME, "atime_ns")):
        value = told.get(name) if told is not None else None
        if isinstance(value, int) and not isinstance(value, bool):
            attr[index] = max(attr[index], value) if index == _SIZE else value
