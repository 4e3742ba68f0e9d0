"""Space: the volume's data slabs, which of their blocks are free, and what waits to be trimmed.

Place      coordinator floor; above database.py, below extents.py.
Owns       tables slabs and trims, bitmaps in memory, and the place where the next new file goes; the volume's
           size, which bounds what is granted.

Invariants
  P1  A block is in exactly one of: an extent, a row of trims, free in its slab's bitmap.
  P2  A freed block is granted again only after all members have trimmed it; it is trimmed only after the
      change that freed it cannot be lost any more.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from coordinator.database import Database
from csvfs.errors import Conflict, Corrupt, Exists, NotFound
from csvfs.ids import METADATA_SLAB_ID_MIN, SlabId
from csvfs.units import BLOCK_SIZE, SLAB_SIZE_MAX
from csvfs.wire.block_messages import SlabDescriptor
from csvfs.wire.control import pack_value, unpack_value

BITMAPS_LOADED_MAX = 256  # 16 KiB each for slabs of 64 MiB
SLAB_BLOCKS_MAX = SLAB_SIZE_MAX // BLOCK_SIZE
LEFT_UNBOUNDED = 1 << 62  # blocks

_FREE = b"\0"
_USED = b"\1"
_FROM_DIGITS = bytes.maketrans(b"01", b"\0\1")


@dataclass(slots=True, frozen=True)
class Piece:
    """`count` blocks of a slab, from `block` on."""

    slab: int
    block: int
    count: int


@dataclass(slots=True, frozen=True)
class Trim:
    """Freed blocks on their way to be free. `id` grows with every one."""

    id: int
    slab: int
    block: int
    count: int


class _Bitmap:
    """Which blocks of one slab are taken, one byte per block: bytearray.find does the searching."""

    __slots__ = ("changed", "cursor", "free", "taken")

    def __init__(self, blocks: int, free: int, packed: bytes) -> None:
        self.taken = _unpack_bits(packed, blocks)
        if len(self.taken) != blocks or self.taken.count(_FREE) != free:
            raise Corrupt(f"bitmap of {blocks} blocks does not have {free} free; run the metadata check")
        self.free = free
        self.cursor = 0  # the search starts here
        self.changed = False

    def take(self, slab: int, count: int, pieces: list[Piece]) -> int:
        """Take up to `count` free blocks from the cursor on, wrapping around once; returns how many."""
        taken = self.taken
        count = min(count, self.free)
        left = count
        block = self.cursor
        while left:
            block = taken.find(_FREE, block)
            if block < 0:
                block = 0  # `free` says there are some: they lie before the cursor
                continue
            end = taken.find(_USED, block, block + left)
            if end < 0:
                end = min(block + left, len(taken))
            size = end - block
            taken[block:end] = _USED * size
            pieces.append(Piece(slab, block, size))
            left -= size
            block = end
        if count:
            self.free -= count
            self.cursor = block
            self.changed = True
        return count

    def give(self, block: int, count: int) -> None:
        self.taken[block : block + count] = bytes(count)
        self.free += count
        self.changed = True


class Space:
    """Where extents come from and go to."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._bitmaps: dict[int, _Bitmap] = {}
        self._descriptors: dict[int, SlabDescriptor] = {}
        self._current = 0  # slab that new files go to; 0: none yet
        self.limit_blocks = 0  # the volume's size; 0: whatever the slabs have. Kept up to date by its settings
        self._new_trims: list[tuple[int, int, int, int]] = []
        self._handed_upto = 0  # trims up to this id are with the service, or done
        self._handed_back: list[Trim] = []
        self._done: list[Trim] = []  # trimmed; freed by the next flush, kept until that is committed
        self._done_flushed = 0
        database.add_part(self)

    # Slabs

    def new_slab_id(self) -> SlabId:
        """A number never used before; commit it before anything of that slab is created on a drive."""
        counters = self._database.counters
        slab = counters.next_slab
        assert slab < METADATA_SLAB_ID_MIN
        counters.next_slab += 1
        return SlabId(slab)

    def add_slab(self, descriptor: SlabDescriptor, blocks: int) -> None:
        """A new slab, all of it free. Raises Exists, Conflict: its number was never given out."""
        if not 0 < descriptor.slab < self._database.counters.next_slab or not 0 < blocks <= SLAB_BLOCKS_MAX:
            raise Conflict(
                f"slab {descriptor.slab} of {blocks} blocks was not planned; take new_slab_id first"
            )
        if self._database.rows("SELECT 1 FROM slabs WHERE id = ?", (descriptor.slab,)):
            raise Exists(f"slab {descriptor.slab} exists already")
        self._database.watch.slab(descriptor.slab)
        row = (descriptor.slab, blocks, blocks, pack_value(descriptor.to_wire()), bytes(-(-blocks // 8)))
        self._database.run("INSERT INTO slabs(id, blocks, free, descriptor, bitmap) VALUES(?,?,?,?,?)", row)
        self._database.counters.free_blocks += blocks
        self._database.counters.slab_blocks += blocks

    def slab(self, slab: int) -> SlabDescriptor:
        """Raises NotFound."""
        descriptor = self._descriptors.get(slab)
        if descriptor is None:
            rows = self._database.rows("SELECT descriptor FROM slabs WHERE id = ?", (slab,))
            if not rows:
                raise NotFound(f"slab {slab} does not exist")
            descriptor = self._descriptors[slab] = SlabDescriptor.from_wire(unpack_value(rows[0][0]))
        return descriptor

    def slabs(self) -> Iterator[SlabDescriptor]:
        """All of them, by number; for jobs, not for single operations."""
        after = 0
        while rows := self._database.rows(
            "SELECT id, descriptor FROM slabs WHERE id > ? ORDER BY id LIMIT 1000", (after,)
        ):
            for _, descriptor in rows:
                yield SlabDescriptor.from_wire(unpack_value(descriptor))
            after = rows[-1][0]

    def set_slab(self, descriptor: SlabDescriptor) -> None:
        """Commit a change of members. Raises NotFound, Conflict: its epoch does not grow (I1)."""
        known = self.slab(descriptor.slab)
        if descriptor.epoch <= known.epoch:
            raise Conflict(
                f"slab {descriptor.slab} is at epoch {known.epoch}, cannot go to {descriptor.epoch}"
            )
        packed = pack_value(descriptor.to_wire())
        self._database.run("UPDATE slabs SET descriptor = ? WHERE id = ?", (packed, descriptor.slab))
        self._descriptors[descriptor.slab] = descriptor

    def empty_slabs(self, limit: int) -> list[SlabId]:
        """Slabs without a single block in use or waiting to be trimmed."""
        self.flush()
        rows = self._database.rows("SELECT id FROM slabs WHERE free = blocks ORDER BY id LIMIT ?", (limit,))
        return [SlabId(slab) for (slab,) in rows]

    def remove_slab(self, slab: int) -> None:
        """Give up an empty slab: drives may forget it once that is committed. Raises NotFound, Conflict."""
        self.slab(slab)
        self.flush()
        ((blocks, free),) = self._database.rows("SELECT blocks, free FROM slabs WHERE id = ?", (slab,))
        if free != blocks:
            raise Conflict(f"slab {slab} has {blocks - free} blocks in use")
        self._database.watch.slab(slab)
        self._database.run("DELETE FROM slabs WHERE id = ?", (slab,))
        self._database.counters.free_blocks -= blocks
        self._database.counters.slab_blocks -= blocks
        self._bitmaps.pop(slab, None)
        self._descriptors.pop(slab, None)
        if self._current == slab:
            self._current = 0

    # Taking

    @property
    def left_blocks(self) -> int:
        """How many more blocks files may have within the volume's size, whether or not slabs have them."""
        if not self.limit_blocks:
            return LEFT_UNBOUNDED
        return max(0, self.limit_blocks - self._database.counters.used_blocks)

    @property
    def available_blocks(self) -> int:
        """How many blocks can be granted now."""
        return min(self._database.counters.free_blocks, self.left_blocks)

    def take(self, count: int, near: tuple[int, int] | None) -> list[Piece]:
        """Exactly `count` blocks, of which `counters.free_blocks` must have that many.

        Args     near: (slab, block) where the file would like to go on; None: a file's first blocks.
        """
        counters = self._database.counters
        assert count <= counters.free_blocks
        pieces: list[Piece] = []
        left = count
        if near is not None:
            bitmap = self._bitmap(near[0])
            cursor, bitmap.cursor = bitmap.cursor, near[1]
            left -= bitmap.take(near[0], left, pieces)
            if near[0] != self._current:
                bitmap.cursor = cursor
        while left:
            slab = self._slab_with_room()
            left -= self._bitmap(slab).take(slab, left, pieces)
        counters.free_blocks -= count
        for piece in pieces:
            self._database.watch.slab(piece.slab)
        return pieces

    def _slab_with_room(self) -> int:
        if self._current and self._bitmap(self._current).free:
            return self._current
        self.flush()  # so that the index knows what this batch has taken and freed
        rows = self._database.rows(
            "SELECT id FROM slabs WHERE free > 0 AND id > ? ORDER BY id LIMIT 1", (self._current,)
        ) or self._database.rows("SELECT id FROM slabs WHERE free > 0 ORDER BY id LIMIT 1")
        if not rows:
            free = self._database.counters.free_blocks
            raise self._database.doom(
                Corrupt(f"{free} blocks count as free, but are in no slab; check the volume")
            )
        self._current = int(rows[0][0])
        return self._current

    def _bitmap(self, slab: int) -> _Bitmap:
        bitmap = self._bitmaps.get(slab)
        if bitmap is None:
            rows = self._database.rows("SELECT blocks, free, bitmap FROM slabs WHERE id = ?", (slab,))
            if not rows:
                raise self._database.doom(Corrupt(f"slab {slab} has blocks in use, but does not exist"))
            try:
                bitmap = self._bitmaps[slab] = _Bitmap(*rows[0])
            except Corrupt as error:
                raise self._database.doom(Corrupt(f"slab {slab}: {error}")) from None
        return bitmap

    # Freeing

    def free_later(self, pieces: Iterable[Piece]) -> None:
        """Blocks that no extent has any more: free once trimmed on all members (P2)."""
        counters = self._database.counters
        for piece in pieces:
            self._database.watch.slab(piece.slab)
            self._new_trims.append((counters.next_trim, piece.slab, piece.block, piece.count))
            counters.next_trim += 1

    def trim_mark(self) -> int:
        """To be taken between batches: the trims committed so far. See take_trims."""
        return self._database.counters.next_trim - 1

    def take_trims(self, limit: int, mark: int) -> list[Trim]:
        """Trims to carry out on all members now; each is handed out once.

        Args     mark: a trim_mark after which the log was written to all members and flushed: were the
                 freeing lost in a power cut after its trim had been done, a file would have lost bytes (P2).
        """
        if self._handed_back:
            trims, self._handed_back = self._handed_back[:limit], self._handed_back[limit:]
            return trims
        rows = self._database.rows(
            "SELECT id, slab, block, count FROM trims WHERE id > ? AND id <= ? ORDER BY id LIMIT ?",
            (self._handed_upto, mark, limit),
        )
        if rows:
            self._handed_upto = rows[-1][0]
        return [Trim(*row) for row in rows]

    def trims_done(self, trims: Iterable[Trim]) -> None:
        """They are trimmed on all members. The next batch that commits makes them free."""
        self._done.extend(trims)

    def trims_failed(self, trims: Iterable[Trim]) -> None:
        """Not done on all members, and none is on its way any more: take_trims has them again."""
        self._handed_back.extend(trims)

    # Repair

    def reread(self) -> None:
        """Believe the table alone, into which everything has been flushed."""
        self._bitmaps.clear()
        self._current = 0

    def correct(self, slab: int, taken: int) -> None:
        """Bit n of `taken`: block n is. Where this differs from what was recorded, the counters follow."""
        ((blocks, free),) = self._database.rows("SELECT blocks, free FROM slabs WHERE id = ?", (slab,))
        packed = taken.to_bytes(-(-blocks // 8), "little")
        now_free = blocks - taken.bit_count()
        self._database.watch.slab(slab)
        self._database.run("UPDATE slabs SET free = ?, bitmap = ? WHERE id = ?", (now_free, packed, slab))
        self._database.counters.free_blocks += now_free - free
        self.reread()

    def free_blocks_of(self, slab: int, blocks: int) -> None:
        """As free_later, of the blocks with a bit in `blocks`."""
        while blocks:
            first = (blocks & -blocks).bit_length() - 1
            count = (~(blocks >> first) & (blocks >> first) + 1).bit_length() - 1
            self.free_later([Piece(slab, first, count)])
            blocks &= ~((1 << count) - 1 << first)

    # Part

    def flush(self) -> None:
        if self._new_trims:
            self._database.run_many(
                "INSERT INTO trims(id, slab, block, count) VALUES(?,?,?,?)", self._new_trims
            )
            self._new_trims = []
        while self._database.active and self._done_flushed < len(self._done):
            self._make_free(self._done[self._done_flushed])
            self._done_flushed += 1
        changed = [(slab, bitmap) for slab, bitmap in self._bitmaps.items() if bitmap.changed]
        if changed:
            rows = [(bitmap.free, _pack_bits(bitmap.taken), slab) for slab, bitmap in changed]
            self._database.run_many("UPDATE slabs SET free = ?, bitmap = ? WHERE id = ?", rows)
            for _, bitmap in changed:
                bitmap.changed = False

    def _make_free(self, trim: Trim) -> None:
        self._database.watch.slab(trim.slab)
        self._database.run("DELETE FROM trims WHERE id = ?", (trim.id,))
        if self._database.changes() == 1:
            self._bitmap(trim.slab).give(trim.block, trim.count)
            self._database.counters.free_blocks += trim.count

    def forget(self) -> None:
        self._bitmaps.clear()
        self._descriptors.clear()
        self._new_trims = []
        self._done_flushed = 0
        self._current = 0

    def settle(self) -> None:
        del self._done[: self._done_flushed]
        self._done_flushed = 0
        if len(self._bitmaps) > BITMAPS_LOADED_MAX:
            self._bitmaps.clear()
        if len(self._descriptors) > BITMAPS_LOADED_MAX * 64:
            self._descriptors.clear()


def _pack_bits(taken: bytearray) -> bytes:
    """One bit per block, bit 0 of byte 0 first."""
    # As one large number: each step makes every byte collect the bits of twice as many bytes that follow it,
    # so that in the end every byte has the bits of eight.
    bits = int.from_bytes(taken, "little")
    bits |= bits >> 7
    bits |= bits >> 14
    bits |= bits >> 28
    return bits.to_bytes(len(taken), "little")[::8]


def _unpack_bits(packed: bytes, blocks: int) -> bytearray:
    digits = format(int.from_bytes(packed, "little"), f"0{blocks}b").encode()
    return bytearray(digits[::-1].translate(_FROM_DIGITS))
