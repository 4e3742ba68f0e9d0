"""The tables of one copy of a slab: which chunks are active, their epochs, what was written since joining began.

Place      block floor; the lower half of slab_copy.py, which moves the blocks these tables vouch for. Synchronous.
Tables     checksum table, chunk epochs, active map and written map of the slot (FORMAT.md, "Slot metadata")
           are used in place through the drive's mapping, after one pread of them has shown that the medium
           can give them. A store into the mapping survives a kill of the process; a flush of the drive makes
           it durable.

Invariants
  I3  A chunk is marked active before any of its blocks changes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING

from csvfs.block.layout import BLOCKS_PER_CHUNK
from csvfs.block.slot_tables import SlotTables, clear_bits, set_bits
from csvfs.errors import BadRequest, Corrupt
from csvfs.ids import Epoch, SlabId, Term, VolumeId
from csvfs.wire.block_messages import slab_seed

if TYPE_CHECKING:
    from csvfs.block.drive import Drive

_CHUNK_SHIFT = BLOCKS_PER_CHUNK.bit_length() - 1


class CopyTables:
    """Raises of all methods: those of SlabCopy."""

    __slots__ = (
        "_drive",
        "_fd",
        "_since_joining",
        "block_count",
        "damaged",
        "data_offset",
        "epoch",
        "recently_used",
        "role",
        "seed",
        "slab",
        "slot",
        "tables",
        "term",
        "volume",
    )

    def __init__(
        self,
        drive: Drive,
        fd: int,
        slot: int,
        volume: VolumeId,
        slab: SlabId,
        epoch: Epoch,
        role: int,
        term: Term,
    ) -> None:
        self._drive = drive
        self._fd = fd
        self.slot = slot
        self.volume = volume
        self.slab = slab
        self.epoch = epoch
        self.role = role
        self.term = term
        self.seed = slab_seed(volume, slab)
        self.data_offset = drive.layout.slot_data_offset(slot)
        self.block_count = drive.layout.blocks_per_slab
        self.tables: SlotTables | None = None  # None: not open; Drive.open_tables opens and closes them
        self.recently_used = False
        self.damaged = False  # its tables are not those of this slab: it must be made anew from another copy
        self._since_joining: bytearray | None = None

    def __repr__(self) -> str:
        return f"SlabCopy(volume={self.volume.hex()}, slab={self.slab}, slot={self.slot}, epoch={self.epoch})"

    @property
    def drive(self) -> Drive:
        return self._drive

    def _open(self) -> SlotTables:
        """The tables, opened when they are not. Every operation starts here."""
        if self._drive.failure is not None:
            raise self._drive.failed_error()
        if self.damaged:
            raise self._damaged_error()
        self.recently_used = True
        return self.tables or self._drive.open_tables(self)

    def _check_header(self, tables: SlotTables) -> None:
        """Before blocks without a checksum are taken for holes. Raises Corrupt: the tables were overwritten."""
        if not tables.header_holds:
            self.damaged = True
            self._drive.close_tables(self)
            self._drive.counters.checksum_errors += 1
            raise self._damaged_error()

    def _damaged_error(self) -> Corrupt:
        return Corrupt(
            f"drive {self._drive.path}: slab {self.slab}: its tables are damaged; another copy must be read, and "
            "this one made anew"
        )

    def _check_range(self, block: int, count: int) -> None:
        if block < 0 or count <= 0 or block + count > self.block_count:
            raise BadRequest(
                f"blocks {block}+{count} are outside slab {self.slab} of {self.block_count} blocks"
            )

    # Marks of what is written

    def _mark(self, tables: SlotTables, block: int, end: int, epoch: int) -> None:
        """The chunks of a range are active and of `epoch`; its blocks are written since joining began."""
        epochs, active = tables.epochs, tables.active
        for chunk in range(block >> _CHUNK_SHIFT, ((end - 1) >> _CHUNK_SHIFT) + 1):
            bit = 1 << (chunk & 7)
            marks = active[chunk >> 3]
            if not marks & bit:
                active[chunk >> 3] = marks | bit
            if epochs[chunk] < epoch:
                epochs[chunk] = epoch
        if self._since_joining is not None:
            set_bits(self._since_joining, block, end)

    def _not_written(self, block: int, end: int) -> None:
        """A write failed (a full file system): a pull must not take these blocks for newer ones, and skip them."""
        if self._since_joining is not None:
            clear_bits(self._since_joining, block, end)

    def _mark_pulled(self, tables: SlotTables, block: int, end: int, epoch: int) -> None:
        """As _mark; but what is pulled is not written since joining: a later pull may replace it."""
        marks, self._since_joining = self._since_joining, None
        try:
            self._mark(tables, block, end, epoch)
        finally:
            self._since_joining = marks

    # Active chunks and chunk epochs

    def active_chunks(self) -> list[int]:
        """Chunks with writes not known to be flushed and complete on every member (I3)."""
        if self.tables is None:
            self._open()
        assert self.tables is not None
        marks = bytes(self.tables.active)
        if marks.count(0) == len(marks):
            return []
        return [
            (index << 3) + bit
            for index, byte in enumerate(marks)
            if byte
            for bit in range(8)
            if byte >> bit & 1
        ]

    def clear_active(self, chunks: Iterable[int]) -> None:
        """Unmark chunks. Rule: each was flushed after its last write, which is complete on all members."""
        active = self._open().active
        for chunk in chunks:
            self._check_range(chunk << _CHUNK_SHIFT, BLOCKS_PER_CHUNK)
            active[chunk >> 3] &= ~(1 << (chunk & 7)) & 0xFF

    def chunk_epochs(self) -> array[int]:
        """A copy of the chunk-epoch table, by chunk; 0: never written."""
        return array("I", bytes(self._open().epochs))

    def stamp_chunks(self, chunks: Iterable[int], epoch: int) -> None:
        """Raise the chunk epochs of `chunks` to `epoch`; those above stay."""
        epochs = self._open().epochs
        for chunk in chunks:
            self._check_range(chunk << _CHUNK_SHIFT, BLOCKS_PER_CHUNK)
            if epochs[chunk] < epoch:
                epochs[chunk] = epoch

    def checksums(self) -> array[int]:
        """A copy of the checksum table, by block; NEVER_WRITTEN: never written or trimmed."""
        return array("I", bytes(self._open().checksum_bytes))

    # Joining: what is pulled must not overwrite what a writer sent meanwhile

    def joining_begin(self) -> None:
        """From now on remember which blocks are written or trimmed."""
        self._open()
        self._since_joining = bytearray(self.block_count // 8)

    def joining_end(self) -> None:
        self._since_joining = None

    def written_since_joining(self, block: int) -> bool:
        marks = self._since_joining
        return marks is not None and bool(marks[block >> 3] >> (block & 7) & 1)
