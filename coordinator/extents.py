"""Extents: which blocks of which slabs hold a file's blocks.

Place      coordinator floor; above inodes.py, space.py and shared_blocks.py, below cloning, attributes, namespace, metadata.
Owns       table extents, and `blocks` of inodes.

A hole has no extent. Blocks that were granted but never written read as zeros, so more may be granted than
was asked for: whole chunks below the end of a file, and ahead of a file that grows.
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.database import Database
from coordinator.inodes import TIME_MAX, TIME_MIN, Inode, Inodes
from coordinator.shared_blocks import SharedBlocks
from coordinator.space import Piece, Space
from csvfs.errors import BadRequest, FileTooBig
from csvfs.units import BLOCK_SIZE, BLOCKS_PER_CHUNK, MIB, TIB

FILE_SIZE_MAX = 16 * TIB
FILE_BLOCKS_MAX = FILE_SIZE_MAX // BLOCK_SIZE
AHEAD_BLOCKS_MIN = BLOCKS_PER_CHUNK
AHEAD_BLOCKS_MAX = 16 * MIB // BLOCK_SIZE
PIECES_PER_CALL_MAX = 1024  # new extents of one `allocate`: bounds the transaction
SEEK_EXTENTS_MAX = 4096  # looked at for one `seek`
SEEK_EXTENTS_FIRST = 8  # most holes are near
LAYOUT_EXTENTS_MAX = 16_384  # of one reply, which may have 1 MiB

_NO_EXTENT_BEHIND = FILE_BLOCKS_MAX
_READ = """
SELECT block, count, slab, slab_block FROM extents
WHERE ino = ?1 AND block >= ifnull((SELECT max(block) FROM extents WHERE ino = ?1 AND block <= ?2), ?2)
AND block < ?3 ORDER BY block LIMIT ?4
"""  # the last extent that starts at or before ?2, and all that start before ?3


@dataclass(slots=True, frozen=True)
class Extent:
    """File blocks `block` to `block + count` lie in slab `slab` from `slab_block` on."""

    block: int
    count: int
    slab: int
    slab_block: int

    @property
    def end(self) -> int:
        return self.block + self.count

    def to_wire(self) -> list[int]:
        return [self.block, self.count, self.slab, self.slab_block]


@dataclass(slots=True, frozen=True)
class Allocation:
    """What `allocate` did.

    attr      of the file afterwards
    extents   those that overlap the range, whole, by file block, with what was given ahead
    missing   blocks for which no slab, or the volume's size, has room: nothing was changed; make room, call again
    reached   no hole before this block of the range. Less than its end: call again for the rest, from there
    """

    attr: list[int]
    extents: list[Extent]
    missing: int
    reached: int


class Extents:
    """The layouts of all files."""

    def __init__(self, database: Database, inodes: Inodes, space: Space, shared: SharedBlocks) -> None:
        self._database = database
        self._inodes = inodes
        self._space = space
        self._shared = shared
        # A truncate frees at most so many at once; each may change about 1/100 of a page in two tables.
        self.free_extents_max = min(16_384, database.image.wal_blocks * 8)

    def layout(self, ino: int, block: int, count: int, limit: int = LAYOUT_EXTENTS_MAX) -> list[Extent]:
        """Extents that overlap the range, whole, by file block; the first `limit` of them.

        Raises NotFound, IsADirectory, Conflict: no regular file. BadRequest: range out of bounds.
        """
        inode = self._inodes.file(ino)
        check_range(block, count)
        if inode.blocks == 0:
            return []
        extents = self._read(ino, block, block + count, limit + 1)
        return [extent for extent in extents if extent.end > block][:limit]

    def seek(self, ino: int, block: int, *, hole: bool) -> tuple[int, bool]:
        """The first block from `block` on that has space (hole: that has none), and True; or a block, and
        False: none before that one, look again from there. Raises NotFound, IsADirectory, Conflict."""
        self._inodes.file(ino)
        if not hole:
            extents = [extent for extent in self._read(ino, block, FILE_BLOCKS_MAX, 2) if extent.end > block]
            return (max(block, extents[0].block), True) if extents else (FILE_BLOCKS_MAX, True)
        limit = SEEK_EXTENTS_FIRST
        while True:
            at, found = self._seek_hole(ino, block, limit)
            if found or limit >= SEEK_EXTENTS_MAX:
                return at, found
            limit = min(8 * limit, SEEK_EXTENTS_MAX)

    def _seek_hole(self, ino: int, block: int, limit: int) -> tuple[int, bool]:
        """As `seek`, looking at so many extents."""
        extents = self._read(ino, block, FILE_BLOCKS_MAX, limit)
        for extent in extents:
            if extent.block > block:
                return block, True
            block = max(block, extent.end)
        return block, len(extents) < limit

    def allocate(self, ino: int, block: int, count: int, size: int, mtime_ns: int, now_ns: int) -> Allocation:
        """Fill the holes of a range of blocks, and raise the file's size to `size` bytes if that is larger.

        Args     size, mtime_ns: 0: leave.
        Raises   NotFound, IsADirectory, Conflict: no regular file. BadRequest. FileTooBig.
        """
        inode = self._inodes.file(ino)
        check_range(block, count)
        if size > FILE_SIZE_MAX:
            raise FileTooBig(f"inode {ino}: {size} B, a file may have {FILE_SIZE_MAX} B")
        if not TIME_MIN <= mtime_ns <= TIME_MAX:
            raise BadRequest(f"time {mtime_ns} ns does not fit 64 bits")
        end = block + count
        known = self._read(ino, block, end, PIECES_PER_CALL_MAX) if inode.blocks else []
        if len(known) == PIECES_PER_CALL_MAX:
            end = min(end, known[-1].end)
        holes = _holes(known, block, end)
        reached = end
        needed = sum(hole_end - hole for hole, hole_end in holes)
        available = self._space.available_blocks
        quota = self._inodes.quotas.of(ino)
        if quota is not None and needed:
            quota.check(needed, 0)
        if needed > available:
            missing = needed - available
            return Allocation(inode.attr(), [e for e in known if e.end > block], missing, holes[0][0])
        given_end = end
        if holes:
            wide = self._widen(inode, known, holes)
            room = available if quota is None else min(available, needed + quota.blocks_ahead)
            if sum(hole_end - hole for hole, hole_end in wide) <= room:
                holes = wide
            reached = min(end, self._fill(inode, known, holes))
            given_end = max(end, holes[-1][1])
        if size > inode.size:
            inode.size = size
        if mtime_ns:
            inode.mtime = mtime_ns
        inode.ctime = now_ns
        self._inodes.changed(inode)
        extents = self._read(ino, block, given_end, LAYOUT_EXTENTS_MAX)
        return Allocation(inode.attr(), [e for e in extents if e.end > block], 0, reached)

    def free_from(self, inode: Inode, block: int) -> int:
        """Give up the blocks from `block` on: free_range to the end of the file and of what was given ahead."""
        return self.free_range(inode, block, FILE_BLOCKS_MAX)

    def free_range(self, inode: Inode, block: int, end: int) -> int:
        """Give up the blocks `block` to `end`, the last first; returns the block it got to.

        More than `block`: there are too many extents for one transaction; call again in the next.
        """
        return self._free(inode, block, end, self.free_extents_max)

    def clear_range(self, inode: Inode, block: int, end: int) -> None:
        """As free_range, of few enough extents for one transaction."""
        reached = self._free(inode, block, end, LAYOUT_EXTENTS_MAX)
        assert reached == block

    def _free(self, inode: Inode, block: int, end: int, limit: int) -> int:
        if block >= end:
            return block
        self._shared.drop_replacements(inode.ino, block, end)
        if inode.blocks == 0:
            return block
        if end < FILE_BLOCKS_MAX:
            self._split(inode.ino, end)
        rows = self._database.rows(
            "SELECT block, count, slab, slab_block FROM extents WHERE ino = ? AND block >= ? AND block < ?"
            " ORDER BY block DESC LIMIT ?",
            (inode.ino, block, end, limit + 1),
        )
        reached = block
        if len(rows) > limit:
            rows = rows[:limit]
            reached = rows[-1][0]
        freed = [Piece(slab, slab_block, count) for _, count, slab, slab_block in rows]
        if rows:
            self._database.run(
                "DELETE FROM extents WHERE ino = ? AND block >= ? AND block < ?", (inode.ino, reached, end)
            )
        if reached == block:
            freed += self._shorten(inode.ino, block)
        blocks = sum(piece.count for piece in freed)
        if blocks:
            ownerless = self._shared.release(freed)
            self._space.free_later(ownerless)
            inode.blocks -= blocks
            self._database.counters.used_blocks -= sum(piece.count for piece in ownerless)
            self._inodes.changed(inode)
        return reached

    def put(self, inode: Inode, extents: Iterable[Extent]) -> None:
        """Add these, by file block, where there is a hole. Their blocks count as used already."""
        previous: Extent | None = None
        for extent in extents:
            if previous is None:
                previous = next(iter(self._last_before(inode.ino, extent.block)), None)
            previous = self._append(
                inode.ino, previous, extent.block, Piece(extent.slab, extent.slab_block, extent.count)
            )
            inode.blocks += extent.count
        self._inodes.changed(inode)

    def shared_in(self, extents: Iterable[Extent]) -> list[list[int]]:
        """[file block, count]: what of them other extents have, too, or had just now: it may not be written."""
        return [
            [extent.block + at - extent.slab_block, count]
            for extent in extents
            for at, count, owners in self._shared.owners(extent.slab, extent.slab_block, extent.count)
            if owners
        ]

    def _split(self, ino: int, block: int) -> None:
        """Make two of the extent that starts before `block` and reaches over it."""
        for extent in self._last_before(ino, block):
            if extent.end > block:
                keep = block - extent.block
                self._set_count(ino, extent, keep)
                self._insert(ino, Extent(block, extent.count - keep, extent.slab, extent.slab_block + keep))

    def _shorten(self, ino: int, end: int) -> list[Piece]:
        """Cut the extent that starts before `end` and reaches over it; returns what it had behind."""
        for extent in self._last_before(ino, end):
            if extent.end > end:
                keep = end - extent.block
                self._set_count(ino, extent, keep)
                return [Piece(extent.slab, extent.slab_block + keep, extent.count - keep)]
        return []

    def _last_before(self, ino: int, block: int) -> list[Extent]:
        """The last extent that starts before `block`, if there is one."""
        query = (
            "SELECT block, count, slab, slab_block FROM extents WHERE ino = ? AND block < ?"
            " ORDER BY block DESC LIMIT 1"
        )
        return [Extent(*row) for row in self._database.rows(query, (ino, block))]

    def _set_count(self, ino: int, extent: Extent, count: int) -> None:
        self._database.run("UPDATE extents SET count = ? WHERE ino = ? AND block = ?", (count, ino, extent.block))

    def _insert(self, ino: int, extent: Extent) -> None:
        self._database.run(
            "INSERT INTO extents(ino, block, slab, slab_block, count) VALUES(?,?,?,?,?)",
            (ino, extent.block, extent.slab, extent.slab_block, extent.count),
        )

    def punch(self, ino: int, block: int, count: int, now_ns: int) -> tuple[list[int], int]:
        """Make a hole of a range of blocks; returns the attr and the block it got to (see free_range).

        Raises   NotFound, IsADirectory, Conflict: no regular file. BadRequest, FileTooBig: no such range.
        """
        inode = self._inodes.file(ino)
        check_range(block, count)
        reached = self.free_range(inode, block, block + count)
        inode.ctime = now_ns
        self._inodes.changed(inode)
        return inode.attr(), reached

    def trim_allocation_ahead(self, ino: int) -> bool:
        """Give up blocks behind the end of a file that nobody writes. False: call again (see free_from)."""
        inode = self._inodes.file(ino)
        end = -(-inode.size // BLOCK_SIZE)
        return self.free_from(inode, end) == end

    def _read(self, ino: int, block: int, end: int, limit: int) -> list[Extent]:
        """The last extent that starts at or before `block`, wherever it ends, and those behind it."""
        return [Extent(*row) for row in self._database.rows(_READ, (ino, block, end, limit))]

    def _widen(
        self, inode: Inode, known: list[Extent], holes: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Holes with the chunks around them, as far as these are free and worth it."""
        if inode.blocks == 0 and holes[-1][1] * BLOCK_SIZE > inode.size:
            return holes  # a new file is most often a small one: give it what it has
        wide: list[tuple[int, int]] = []
        size_blocks = -(-inode.size // BLOCK_SIZE)
        starts = [extent.block for extent in known]
        for start, end in holes:
            index = bisect_left(starts, end)  # only the last hole may have no known extent behind it
            behind = starts[index] if index < len(starts) else self._next_extent(inode.ino, end)
            index = bisect_left(starts, start)
            before = known[index - 1].end if index else 0
            grows = behind == _NO_EXTENT_BEHIND and end > size_blocks
            if grows and inode.blocks and before == start and known:
                ahead = min(max(inode.blocks, AHEAD_BLOCKS_MIN), AHEAD_BLOCKS_MAX)
                wide.append((start, min(end + ahead, FILE_BLOCKS_MAX)))
                continue
            chunk_end = -(-end // BLOCKS_PER_CHUNK) * BLOCKS_PER_CHUNK
            wide_end = max(end, min(chunk_end, behind, size_blocks))
            wide.append((max(before, start - start % BLOCKS_PER_CHUNK), wide_end))
        return wide

    def _next_extent(self, ino: int, block: int) -> int:
        ((found,),) = self._database.rows(
            "SELECT min(block) FROM extents WHERE ino = ? AND block >= ?", (ino, block)
        )
        return _NO_EXTENT_BEHIND if found is None else int(found)

    def _fill(self, inode: Inode, known: list[Extent], holes: list[tuple[int, int]]) -> int:
        """Take space for the holes; returns where the first one starts that is left for another call."""
        before = {extent.end: extent for extent in known}
        previous = known[0] if known and known[0].block <= holes[0][0] else None
        added = 0
        for start, end in holes:
            if added >= PIECES_PER_CALL_MAX:
                return start
            previous = before.get(start, previous)
            near = None if previous is None else (previous.slab, previous.slab_block + previous.count)
            block = start
            for piece in self._space.take(end - start, near):
                previous = self._append(inode.ino, previous, block, piece)
                block += piece.count
                added += 1
            inode.blocks += end - start
            self._database.counters.used_blocks += end - start
        return FILE_BLOCKS_MAX

    def _append(self, ino: int, previous: Extent | None, block: int, piece: Piece) -> Extent:
        joins = (
            previous is not None
            and previous.end == block
            and previous.slab == piece.slab
            and previous.slab_block + previous.count == piece.block
        )
        if joins and previous is not None:
            extent = Extent(previous.block, previous.count + piece.count, piece.slab, previous.slab_block)
            self._set_count(ino, extent, extent.count)
            return extent
        extent = Extent(block, piece.count, piece.slab, piece.block)
        self._insert(ino, extent)
        return extent


def check_range(block: int, count: int) -> None:
    if block < 0 or count <= 0:
        raise BadRequest(f"blocks {block}+{count} are no range")
    if block + count > FILE_BLOCKS_MAX:
        raise FileTooBig(f"blocks {block}+{count} reach over {FILE_SIZE_MAX} B, the largest file")


def _holes(extents: list[Extent], block: int, end: int) -> list[tuple[int, int]]:
    """What of `block` to `end` no extent covers; `extents` by file block."""
    holes = []
    for extent in extents:
        if extent.block >= end:
            break
        if extent.block > block:
            holes.append((block, extent.block))
        block = max(block, extent.end)
    if block < end:
        holes.append((block, end))
    return holes
