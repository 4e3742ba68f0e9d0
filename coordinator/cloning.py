"""Cloning: one file gets blocks that another one has; and a shared block is replaced before it is written.

Place      coordinator floor; above extents.py and shared_blocks.py, below metadata.py.
Clone      one transaction shares at most CLONE_EXTENTS_MAX extents: the caller goes on from where it got to. Within
           one, a block of the target has what it had or what the source has, never a hole in between.
Replacing  two steps: `unshare` sets fresh blocks aside, and once the mount has copied into them and flushed that,
           `replace` puts them in place. Whatever ends in between, the file has what it had.
"""

from dataclasses import dataclass

from coordinator.database import Database
from coordinator.extents import Extent, Extents, check_range
from coordinator.inodes import Inodes
from coordinator.shared_blocks import Row, SharedBlocks
from coordinator.space import Piece, Space
from csvfs.errors import BadRequest
from csvfs.units import BLOCK_SIZE

CLONE_EXTENTS_MAX = 512  # of the source and of the target, in one transaction


@dataclass(slots=True, frozen=True)
class Cloned:
    """attr: of the target. count: blocks done, from the first on. extents: of the target, of these blocks alone."""

    attr: list[int]
    count: int
    extents: list[Extent]


@dataclass(slots=True, frozen=True)
class Unshared:
    """rows: fresh blocks for those that are shared. missing: so many are lacking in slabs, or in the volume's size; then
    none were set aside."""

    rows: list[Row]
    missing: int


class Cloning:
    def __init__(
        self, database: Database, inodes: Inodes, space: Space, extents: Extents, shared: SharedBlocks
    ) -> None:
        self._database = database
        self._inodes = inodes
        self._space = space
        self._extents = extents
        self._shared = shared

    def clone(
        self, ino: int, block: int, count: int, target: int, target_block: int, now_ns: int
    ) -> Cloned:
        """Blocks `target_block` on of the target are those of the source, holes too; its size grows over them.

        Raises   NotFound, IsADirectory, Conflict: no regular file. BadRequest: the ranges overlap in one file, or that of
                 the source reaches over its end. FileTooBig, QuotaExceeded: shared blocks count as any for a quota.
        """
        source, into = self._inodes.file(ino), self._inodes.file(target)
        check_range(block, count)
        check_range(target_block, count)
        if ino == target and abs(target_block - block) < count:
            raise BadRequest(f"inode {ino}: blocks {block} and {target_block}, {count} each, overlap")
        if (block + count) * BLOCK_SIZE > source.size:
            raise BadRequest(f"inode {ino} of {source.size} B has no blocks {block}+{count}")
        count = self._within_limit(ino, block, count)
        count = self._within_limit(target, target_block, count)
        found = self._clipped_layout(ino, block, count)
        quota = self._inodes.quotas.of(target)
        if quota is not None:
            had = self._clipped_layout(target, target_block, count)
            quota.check(max(0, sum(e.count for e in found) - sum(e.count for e in had)), 0)
        for extent in found:
            self._shared.share(Piece(extent.slab, extent.slab_block, extent.count))
        self._extents.clear_range(into, target_block, target_block + count)
        moved = [
            Extent(e.block - block + target_block, e.count, e.slab, e.slab_block) for e in found
        ]
        self._extents.put(into, moved)
        into.size = max(into.size, (target_block + count) * BLOCK_SIZE)
        into.ctime = now_ns
        self._inodes.changed(into)
        return Cloned(into.attr(), count, moved)

    def _clipped_layout(self, ino: int, block: int, count: int) -> list[Extent]:
        return [_clipped(extent, block, block + count) for extent in self._extents.layout(ino, block, count)]

    def _within_limit(self, ino: int, block: int, count: int) -> int:
        extents = self._extents.layout(ino, block, count, CLONE_EXTENTS_MAX + 1)
        return extents[-1].block - block if len(extents) > CLONE_EXTENTS_MAX else count

    def unshare(self, ino: int, block: int, count: int, session: int) -> Unshared:
        """Set fresh blocks aside for those of the range that other extents have, too.

        Raises   NotFound, IsADirectory, Conflict: no regular file. BadRequest, FileTooBig.
        """
        self._inodes.file(ino)
        check_range(block, count)
        self._shared.drop_replacements(ino, block, block + count)
        shared: list[tuple[int, int]] = []
        for part in self._clipped_layout(ino, block, count):
            for at, size, owners in self._shared.owners(part.slab, part.slab_block, part.count):
                if owners:
                    shared.append((part.block + at - part.slab_block, size))
        missing = sum(size for _, size in shared) - self._space.available_blocks
        if shared and missing > 0:
            return Unshared([], missing)
        rows = [
            row for first, size in shared for row in self._shared.take_replacements(ino, session, first, size)
        ]
        return Unshared(rows, 0)

    def replace(self, ino: int, session: int, rows: list[Row], now_ns: int) -> list[int]:
        """Put what `unshare` gave in place of what the file has there; returns the attr.

        Raises   NotFound, Conflict: it is not (any more) set aside for that. Then nothing was replaced.
        """
        inode = self._inodes.file(ino)
        self._shared.hand_over(ino, session, rows)
        for block, count, slab, slab_block in rows:
            self._extents.clear_range(inode, block, block + count)
            self._extents.put(inode, [Extent(block, count, slab, slab_block)])
        inode.ctime = now_ns
        self._inodes.changed(inode)
        return inode.attr()


def _clipped(extent: Extent, block: int, end: int) -> Extent:
    first = max(extent.block, block)
    return Extent(first, min(extent.end, end) - first, extent.slab, extent.slab_block + first - extent.block)
