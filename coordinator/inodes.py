"""Inodes: rows of the table, kept as objects while they are in use.

Place      coordinator floor; above database.py, below extents, attributes, namespace.
Owns       the inode cache. Whoever changes an Inode calls `changed` on it in the same batch, which also tells the quotas.
"""

import stat
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.database import Database
from coordinator.quotas import Quotas
from csvfs.errors import Conflict, IsADirectory, NotADirectory, NotFound
from csvfs.units import BLOCK_SIZE

INO_LIMIT = 1 << 62
TIME_MIN, TIME_MAX = -(1 << 63), (1 << 63) - 1  # ns
CACHE_INODES_MAX = 50_000  # about 250 B each
SIZES_PER_STATEMENT = 1000
DIRECTORY_SIZE = BLOCK_SIZE  # what stat says of any directory
_SECTORS_PER_BLOCK = BLOCK_SIZE // 512
_COLUMNS = "ino, mode, nlink, uid, gid, rdev, size, blocks, atime, mtime, ctime, generation, parent, xattrs"
ATTR_COLUMNS = (
    "i.ino, i.mode, i.nlink, i.uid, i.gid, i.rdev, i.size, i.blocks * 8,"
    " i.atime, i.mtime, i.ctime, i.generation, i.xattrs"
)
assert _SECTORS_PER_BLOCK == 8  # ATTR_COLUMNS
_READ = f"SELECT {_COLUMNS} FROM inodes WHERE ino = ?"
_WRITE = f"INSERT OR REPLACE INTO inodes({_COLUMNS}) VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?)"


@dataclass(slots=True)
class Inode:
    """Times in ns, size in bytes. `blocks`: of 4,096 bytes, in extents. `parent`: of directories, else 0. `charged`:
    blocks that a quota, if it counts for one, knows of."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    generation: int
    parent: int
    xattrs: int  # how many
    charged: int = 0  # not stored

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def attr(self) -> list[int]:
        """As PROTOCOL.md, "Calls to a coordinator", has it."""
        return [
            self.ino, self.mode, self.nlink, self.uid, self.gid, self.rdev, self.size,
            self.blocks * _SECTORS_PER_BLOCK, self.atime, self.mtime, self.ctime, self.generation, self.xattrs,
        ]  # fmt: skip


class Inodes:
    """All inodes of the volume."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.quotas = Quotas(database)
        self._cache: dict[int, Inode] = {}
        self._changed: dict[int, Inode] = {}
        database.add_part(self)

    def get(self, ino: int) -> Inode:
        """Raises NotFound."""
        inode = self._cache.get(ino)
        if inode is None:
            if not 0 < ino < INO_LIMIT:
                raise NotFound(f"inode {ino} does not exist: numbers go from 1 to {INO_LIMIT - 1}")
            rows = self._database.rows(_READ, (ino,))
            if not rows:
                raise NotFound(f"inode {ino} does not exist")
            inode = self._cache[ino] = Inode(*rows[0])
            inode.charged = inode.blocks
        return inode

    def sizes(self, inos: Sequence[int]) -> dict[int, int]:
        """By number, of those that exist; between batches. A tenth of the time of `get`, and nothing is cached."""
        assert not self._changed, "what a batch has changed is not in the table yet"
        found: dict[int, int] = {}
        for first in range(0, len(inos), SIZES_PER_STATEMENT):
            some = inos[first : first + SIZES_PER_STATEMENT]
            marks = ",".join("?" * len(some))
            found.update(self._database.rows(f"SELECT ino, size FROM inodes WHERE ino IN ({marks})", some))
        return found

    def directory(self, ino: int) -> Inode:
        """Raises NotFound, NotADirectory."""
        inode = self.get(ino)
        if not stat.S_ISDIR(inode.mode):
            raise NotADirectory(f"inode {ino} is not a directory")
        return inode

    def file(self, ino: int) -> Inode:
        """A regular file. Raises NotFound, IsADirectory, Conflict: a symlink, device, pipe or socket."""
        inode = self.get(ino)
        if not stat.S_ISREG(inode.mode):
            if inode.is_directory:
                raise IsADirectory(f"inode {ino} is a directory")
            raise Conflict(f"inode {ino} of mode {inode.mode:#o} is not a regular file and has no blocks")
        return inode

    def add(self, inode: Inode) -> None:
        """A new one, whose number comes from `counters.next_ino`: never used before."""
        self._cache[inode.ino] = inode
        self._database.counters.files += 1
        self._database.watch.came(inode.ino, 1)
        self.changed(inode)

    def changed(self, inode: Inode) -> None:
        assert self._database.active, "changes need a batch"
        self._changed[inode.ino] = inode
        self._database.watch.inode(inode.ino)
        if inode.blocks != inode.charged and self.quotas.by_root:
            quota = self.quotas.of(inode.ino)
            if quota is not None:
                self.quotas.used(quota, inode.blocks - inode.charged, 0)
            inode.charged = inode.blocks

    def remove(self, inode: Inode) -> None:
        self._cache.pop(inode.ino, None)
        self._changed.pop(inode.ino, None)
        quota = self.quotas.of(inode.ino)
        if quota is not None:
            self.quotas.leave(quota, inode.ino, inode.charged)
            if quota.root == inode.ino:
                self.quotas.forget_members(quota, 1 << 62)  # files without a name at most
                self.quotas.remove(quota)
        self._database.run("DELETE FROM inodes WHERE ino = ?", (inode.ino,))
        self._database.counters.files -= 1
        self._database.watch.came(inode.ino, -1)

    def flush(self) -> None:
        if self._changed:
            rows = [
                (
                    i.ino, i.mode, i.nlink, i.uid, i.gid, i.rdev, i.size, i.blocks,
                    i.atime, i.mtime, i.ctime, i.generation, i.parent, i.xattrs,
                )
                for i in self._changed.values()
            ]  # fmt: skip
            self._database.run_many(_WRITE, rows)
            self._changed.clear()

    def reread(self) -> None:
        """Believe the table alone, into which everything has been flushed."""
        assert not self._changed
        self._cache.clear()

    def forget(self) -> None:
        self._changed.clear()
        self._cache.clear()

    def settle(self) -> None:
        if len(self._cache) > CACHE_INODES_MAX:
            self._cache.clear()
