"""Drive servers as the state checker sees them: one drive, one copy of one slab, its blocks as numbers of writes.

Place      state checker, under the worlds.
A model    of what is I/O in the product, and the only one of the block layer:
             hello, fence, check_term, _write, _read, install csvfs/block/block_service.py
             register_term, settle, equal, unequal, active,
             stamp, list_slabs, create_slab, pull            csvfs/block/drive_calls.py, pull.py (`run`, `_stale_chunks`,
                                                             `_copy_run`, `settled_chunks`)
             _mark, stamp_chunks, clear_active               csvfs/block/copy_tables.py
             apply_pulled_blocks                             csvfs/block/slab_copy.py
           `MarkBook`, which says what may be unmarked, is the product's.
Kills      leave all that was stored (the page cache outlives a process); nothing of the process. No power cuts:
           those are the simulator's.
"""

from collections.abc import Hashable
from typing import Any

from csvfs.block.writer_marks import MarkBook
from csvfs.errors import BadRequest, CsvfsError, DriveFailed, Fenced, StaleEpoch, Unavailable
from csvfs.ids import DriveId, Epoch, Incarnation, NodeName, SlabId, VolumeId
from csvfs.wire.block_messages import ROLE_IN_SYNC, ROLE_JOINING
from tests.states.explorer import Violation

SLAB = SlabId(7)
VOLUME = VolumeId(b"v" * 16)
BLOCKS = 2  # each in a chunk of its own
RESTED_S = 1000.0


class ServerEnd:
    """A link as the server has it: frames that arrived and were not handled, until the server closes it."""

    def __init__(self, writer: str, incarnation: int) -> None:
        self.writer = writer
        self.incarnation = incarnation
        self.frames: list[Any] = []
        self.closed = False
        self.marks: Any = None


class DriveServer:
    """The drive server of one node, its drive, and the copy on it."""

    def __init__(self, name: str, number: int) -> None:
        self.node = NodeName(name)
        self.drive_id = DriveId(bytes([number]) * 16)
        self.drive = self  # as a SlabCopy has it, for MarkBook
        # On the medium
        self.exists = True
        self.epoch = 1
        self.role = ROLE_IN_SYNC
        self.values = [0] * BLOCKS
        self.stamps = [0] * BLOCKS
        self.active: set[int] = set()
        # In the process
        self.incarnation = 0
        self.up = False
        self.start()
        self.in_service = True

    # -- the process -----------------------------------------------------------------------------

    def start(self) -> None:
        self.up = True
        self.incarnation += 1
        self.in_service = False
        self.since_joining: set[int] | None = None
        self.marks = MarkBook()
        self.fences: dict[str, int] = {}
        self.term = 0
        self.ends: list[ServerEnd] = []

    def kill(self) -> None:
        self.up = False
        self.in_service = False
        for end in self.ends:
            end.closed = True
        self.ends = []
        self.marks = MarkBook()

    def hello(self, writer: str, incarnation: int) -> ServerEnd:
        if incarnation < self.fences.get(writer, 0):
            raise Fenced(f"{writer} was evicted")
        for end in self.ends:
            if end.writer == writer:
                end.closed = True
        self.ends = [end for end in self.ends if not end.closed]
        end = ServerEnd(writer, incarnation)
        end.marks = self.marks.writer(VOLUME, writer, Incarnation(incarnation))
        self.ends.append(end)
        return end

    def check_term(self, term: int) -> None:
        if term < self.term:
            raise Fenced(f"term {term} is over")
        if term > self.term:
            self.term = term
            self.fence("coordinator", term)

    def fence(self, writer: str, min_incarnation: int) -> None:
        self.fences[writer] = max(min_incarnation, self.fences.get(writer, 0))
        for end in self.ends:
            if end.writer == writer and end.incarnation < min_incarnation:
                end.closed = True
        self.ends = [end for end in self.ends if not end.closed]

    # -- blocks ----------------------------------------------------------------------------------

    def write(self, end: ServerEnd, sequence: int, below: int, epoch: int, block: int, value: int) -> None:
        """Raises what a WRITE is answered with."""
        if end.incarnation < self.fences.get(end.writer, 0):
            raise Violation(f"I6: a write of {end.writer} lands on {self.node} behind the fence that was answered")
        if not self.in_service:
            raise Unavailable("not in service")
        if epoch != self.epoch:
            raise StaleEpoch(f"at epoch {self.epoch}, not {epoch}")
        self._mark(block, self.epoch)
        if self.since_joining is not None:
            self.since_joining.add(block)
        self.values[block] = value
        end.marks.below = below
        end.marks.marks[(self, block)] = sequence

    def serves_reads(self, epoch: int) -> bool:
        """Whether a READ at `epoch` is answered with data."""
        return self.in_service and epoch <= self.epoch and self.role == ROLE_IN_SYNC

    def _mark(self, chunk: int, epoch: int) -> None:
        self.active.add(chunk)
        self.stamps[chunk] = max(self.stamps[chunk], epoch)

    def flush_and_rest(self) -> None:
        """The drive is flushed, and what may be unmarked has rested."""
        covered = self.marks.begin_flush(self)
        unmark = self.marks.flushed(self, covered, 0.0)
        rested = self.marks.rested(self, RESTED_S)
        for chunks in (*unmark.values(), *rested.values()):
            self.active.difference_update(chunks)

    def can_unmark(self) -> bool:
        """Whether flush_and_rest would change anything."""
        complete = any(
            sequence < marks.below
            for marks in self.marks._writers.values()
            for sequence in marks.marks.values()
        )
        return complete or bool(self.marks._awaiting_flush.get(self)) or bool(self.marks._resting.get(self))

    # -- calls -----------------------------------------------------------------------------------

    def call(self, name: str, args: dict[str, Any]) -> Any:
        """Raises CsvfsError, as the server would answer."""
        handler = getattr(self, f"_call_{name}", None)
        if handler is None:
            raise BadRequest(f"{name} is not modelled")
        return handler(args)

    def _call_register_term(self, args: dict[str, Any]) -> None:
        self.check_term(args["term"])

    def _call_fence(self, args: dict[str, Any]) -> None:
        self.fence(args["writer"], args["min_incarnation"])

    def _call_settle(self, args: dict[str, Any]) -> None:
        self.marks.settle(VOLUME, args["writer"], args["min_incarnation"])

    def _call_active(self, args: dict[str, Any]) -> list[list[Any]]:
        of_writer = self.marks.of_writer(VOLUME, args["writer"])
        of_all = self.marks.of_writer(VOLUME, None)
        chunks = [
            chunk
            for chunk in sorted(self.active)
            if (self, chunk) in of_writer
            or self.marks.is_unsettled((self, chunk))
            or ((self, chunk) not in of_all and not self.marks.is_resting((self, chunk)))
        ]
        return [[self.drive_id, SLAB, chunks]] if chunks and self.exists else []

    def _call_list_slabs(self, args: dict[str, Any]) -> list[list[Any]]:
        if not self.exists:
            return []
        return [[VOLUME, SLAB, self.epoch, self.role, self.in_service, False]]

    def _call_install(self, args: dict[str, Any]) -> dict[str, Any]:
        self.check_term(args["term"])
        refused = []
        for number, (drive, slab, epoch, role) in enumerate(args["items"]):
            try:
                self._install(epoch, role, alone=number in args["alone"])
            except CsvfsError as error:
                refused.append([drive, slab, str(error)])
        return {"refused": refused, "lost": []}

    def _install(self, epoch: int, role: int, *, alone: bool) -> None:
        if not self.exists:
            raise DriveFailed("no such copy")
        if role == ROLE_IN_SYNC and not self.in_service and not alone:
            raise Unavailable("its server has started anew")
        if epoch > self.epoch or not self.in_service:
            self.since_joining = set()
        if epoch < self.epoch:
            raise StaleEpoch("below the installed one")
        self.epoch, self.role = epoch, role
        self.in_service = True

    def _call_create_slab(self, args: dict[str, Any]) -> dict[str, Any]:
        self.check_term(args["term"])
        if not self.exists:
            self.exists, self.epoch, self.role = True, args["epoch"], args["role"]
            self.values, self.stamps, self.active = [0] * BLOCKS, [0] * BLOCKS, set()
        if args["role"] == ROLE_JOINING:
            self.since_joining = set()
        self.in_service = True
        return {"slot": 0}

    def _check_epoch(self, args: dict[str, Any]) -> None:
        if args["epoch"] != self.epoch:
            raise StaleEpoch("at another epoch")

    def _call_equal(self, args: dict[str, Any]) -> None:
        self._check_epoch(args)
        chunks = [(self, chunk) for chunk in args["chunks"] if chunk in self.active]
        self.marks.made_equal(chunks, lambda volume, writer, inc: inc < self.fences.get(writer, 0))

    def unequal(self) -> set[int]:
        self.marks.sweep()
        return {chunk for chunk in self.active if self.marks.is_incomplete((self, chunk))}

    def _call_stamp(self, args: dict[str, Any]) -> None:
        self._check_epoch(args)
        for chunk in args["chunks"]:
            self.stamps[chunk] = max(self.stamps[chunk], args["epoch"])

    def fingerprint(self) -> Hashable:
        marks = tuple(
            sorted(
                (writer, incarnation, found.below, tuple(sorted((chunk, seq) for (_, chunk), seq in found.marks.items())))
                for (_, writer, incarnation), found in self.marks._writers.items()
                if found.marks
            )
        )
        return (
            self.exists, self.epoch, self.role, tuple(self.values), tuple(self.stamps), tuple(sorted(self.active)),
            self.up, self.in_service, None if self.since_joining is None else tuple(sorted(self.since_joining)),
            marks, tuple(sorted(chunk for _, chunk in self.marks._unsettled)),
            tuple(sorted(chunk for _, chunk in self.marks._awaiting_flush.get(self, ()))),
            tuple(sorted(chunk for _, chunk in self.marks._resting.get(self, ()))),
            tuple(sorted(self.fences.items())), self.term,
        )  # fmt: skip


class PullModel:
    """A pull in its two halves: what is read at the source, and what is stored at the target."""

    def __init__(self, target: DriveServer, args: dict[str, Any]) -> None:
        self.target = target
        self.epoch = Epoch(args["epoch"])
        self.since = args["since"]
        self.chunks: list[int] | None = args["chunks"]
        target.check_term(args["term"])
        if target.epoch != self.epoch:
            raise StaleEpoch("install first")
        self.active_before = set(target.active)
        self.pulled: dict[int, tuple[int, int]] = {}
        self.unequal: set[int] = set()

    def read(self, source: DriveServer) -> None:
        if not source.up or not source.in_service or not source.exists:
            raise Unavailable("the source does not serve")
        if not source.serves_reads(self.epoch):
            raise StaleEpoch("not installed at the source")
        self.pulled = {chunk: (source.values[chunk], source.stamps[chunk]) for chunk in self._stale(source)}
        self.unequal = set(self.pulled) if self.chunks is not None else source.unequal()

    def _stale(self, source: DriveServer) -> list[int]:
        if self.chunks is not None:
            return sorted(set(self.chunks))
        if self.since:
            stale = {chunk for chunk in range(BLOCKS) if source.stamps[chunk] >= self.since}
            return sorted(stale | self.active_before | source.unequal())
        return [chunk for chunk in range(BLOCKS) if source.stamps[chunk] or self.target.stamps[chunk]]

    def store(self) -> dict[str, Any]:
        target = self.target
        if not target.up:
            raise Unavailable("the target has ended")
        self.target.marks.note_unsettled((target, chunk) for chunk in self.pulled)
        for chunk, (value, stamp) in self.pulled.items():
            if target.epoch != self.epoch:
                raise StaleEpoch("the slab moved on")
            if target.since_joining is None:
                raise BadRequest("not joining")
            if chunk not in target.since_joining:
                target._mark(chunk, max(1, stamp))
                target.values[chunk] = value
        settled = self.settled()
        target.marks.forget_unsettled((target, chunk) for chunk in settled)
        target.active.difference_update(chunk for chunk in settled if not target.marks.is_marked((target, chunk)))
        return {"bytes": len(self.pulled), "chunks": len(self.pulled), "lost": []}

    def settled(self) -> set[int]:
        if self.target.epoch != self.epoch:
            return set()
        return (set(self.pulled) | (self.active_before if self.chunks is None else set())) - self.unequal
