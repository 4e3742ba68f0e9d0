"""Quotas: how many blocks and files the trees of some directories have, and may have.

Place      coordinator floor; above database.py, below inodes.py, which tells it of every change. Synchronous.
Owns       tables quotas, quota_members. quota_trees.py says which inode belongs to which.
Cost       a volume without quotas: one look at an empty dict per change. With some: one row read for an inode that is
           not in memory yet.
Counted    blocks in extents, also those granted ahead, and inodes of every kind, the directory itself included; what
           has no name any more counts until it is let go of. A file with several names counts once.
"""

from dataclasses import dataclass

from coordinator.database import Database
from coordinator.schema import QUOTAS
from csvfs.errors import QuotaExceeded
from csvfs.units import BLOCK_SIZE, format_size

IN_FORCE, COUNTING, REMOVING = 0, 1, 2  # quotas.state
QUOTAS_MAX = 10_000  # of a volume; all are in memory, some 200 B each
ROOTS_CACHED_MAX = 100_000  # inode -> root, some 100 B each
_COLUMNS = "root, blocks_max, files_max, blocks, files, state"


@dataclass(slots=True)
class Quota:
    """Of the tree below directory `root`. Limits of 0: none."""

    root: int
    blocks_max: int
    files_max: int
    blocks: int
    files: int
    state: int

    @property
    def blocks_left(self) -> int | None:
        """None: as many as the volume has."""
        return max(0, self.blocks_max - self.blocks) if self.blocks_max and self.state != REMOVING else None

    @property
    def blocks_ahead(self) -> int:
        """How many may be granted ahead to a file that grows: what is not used yet must not keep others out."""
        left = self.blocks_left
        return 1 << 62 if left is None else left // 8

    @property
    def files_left(self) -> int | None:
        return max(0, self.files_max - self.files) if self.files_max and self.state != REMOVING else None

    def check(self, blocks: int, files: int) -> None:
        """Whether so many more fit. Raises QuotaExceeded."""
        blocks_left, files_left = self.blocks_left, self.files_left
        if blocks and blocks_left is not None and blocks > blocks_left:
            raise QuotaExceeded(
                f"directory {self.root} has a quota of {format_size(self.blocks_max * BLOCK_SIZE)} and "
                f"{format_size(self.blocks * BLOCK_SIZE)} in use: {format_size(blocks * BLOCK_SIZE)} more do not fit; "
                "delete some, or csvfs quota set"
            )
        if files and files_left is not None and files > files_left:
            raise QuotaExceeded(
                f"directory {self.root} has a quota of {self.files_max} files and has {self.files}: delete some, or "
                "csvfs quota set"
            )


class Quotas:
    """All quotas of the volume. Whoever changes a Quota calls `changed` in the same batch."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.by_root: dict[int, Quota] = {}
        self._roots: dict[int, int] = {}  # inode -> root, 0: none; not all
        self._changed: set[int] = set()
        database.add_part(self)
        self._load()

    def prepare(self) -> None:
        """Between batches: volumes that were made before there were quotas get their tables."""
        if self._has_tables():
            return
        self._database.begin()
        for statement in QUOTAS.split(";"):
            self._database.run(statement)
        self._database.commit()

    def _has_tables(self) -> bool:
        return bool(self._database.rows("SELECT 1 FROM sqlite_master WHERE name = 'quota_members_by_root'"))

    def _load(self) -> None:
        rows = self._database.rows(f"SELECT {_COLUMNS} FROM quotas") if self._has_tables() else []
        self.by_root = {row[0]: Quota(*row) for row in rows}

    # What belongs to which

    def of(self, ino: int) -> Quota | None:
        """The quota that the inode counts for."""
        if not self.by_root:
            return None
        root = self._roots.get(ino)
        if root is None:
            rows = self._database.rows("SELECT root FROM quota_members WHERE ino = ?", (ino,))
            root = self._roots[ino] = rows[0][0] if rows else 0
        return self.by_root.get(root)

    def join(self, quota: Quota, ino: int, blocks: int) -> None:
        """An inode of so many blocks counts from now on; of none before. In a batch."""
        self._database.run("INSERT INTO quota_members(ino, root) VALUES(?,?)", (ino, quota.root))
        self._roots[ino] = quota.root
        self.used(quota, blocks, 1)

    def leave(self, quota: Quota, ino: int, blocks: int) -> None:
        """It does not any more. In a batch."""
        self._database.run("DELETE FROM quota_members WHERE ino = ?", (ino,))
        self._roots[ino] = 0
        self.used(quota, -blocks, -1)

    def used(self, quota: Quota, blocks: int, files: int) -> None:
        quota.blocks += blocks
        quota.files += files
        self.changed(quota)

    def forget_members(self, quota: Quota, limit: int) -> bool:
        """Some of those that count for it do not any more; whether all. In a batch."""
        rows = self._database.rows("SELECT ino FROM quota_members WHERE root = ? LIMIT ?", (quota.root, limit))
        self._database.run_many("DELETE FROM quota_members WHERE ino = ?", rows)
        for (ino,) in rows:
            self._roots[ino] = 0
        return len(rows) < limit

    # Quotas themselves

    def changed(self, quota: Quota) -> None:
        assert self._database.active, "changes need a batch"
        self._changed.add(quota.root)

    def add(self, quota: Quota) -> None:
        if len(self.by_root) >= QUOTAS_MAX:
            raise QuotaExceeded(f"the volume has {QUOTAS_MAX} quotas, more there may not be; csvfs quota remove one")
        self.by_root[quota.root] = quota
        self._roots.clear()  # nothing was remembered of inodes while there were none
        self.changed(quota)

    def remove(self, quota: Quota) -> None:
        """Of which no inode is a member any more."""
        self._database.run("DELETE FROM quotas WHERE root = ?", (quota.root,))
        self._database.run("DELETE FROM quota_walk WHERE root = ?", (quota.root,))
        self.by_root.pop(quota.root, None)
        self._changed.discard(quota.root)

    # Part

    def flush(self) -> None:
        if self._changed:
            rows = [
                (quota.root, quota.blocks_max, quota.files_max, quota.blocks, quota.files, quota.state)
                for quota in map(self.by_root.__getitem__, self._changed)
            ]
            self._database.run_many(f"INSERT OR REPLACE INTO quotas({_COLUMNS}) VALUES(?,?,?,?,?,?)", rows)
            self._changed.clear()

    def forget(self) -> None:
        self._changed.clear()
        self._roots.clear()
        self._load()

    def settle(self) -> None:
        if len(self._roots) > ROOTS_CACHED_MAX:
            self._roots.clear()


def problems(database: Database) -> list[str]:
    """What does not fit together, a line each; for consistency.py."""
    if not database.rows("SELECT 1 FROM sqlite_master WHERE name = 'quota_members_by_root'"):
        return []
    counted = {
        root: (files, blocks)
        for root, files, blocks in database.rows(
            "SELECT m.root, count(*), sum(i.blocks) FROM quota_members m JOIN inodes i ON i.ino = m.ino GROUP BY m.root"
        )
    }
    found = []
    for root, files, blocks, state in database.rows("SELECT root, files, blocks, state FROM quotas"):
        has = counted.pop(root, (0, 0))
        if state != REMOVING and has != (files, blocks):
            found.append(f"quota of directory {root} says {files} files and {blocks} blocks, has {has[0]} and {has[1]}")
    found += [f"{files} inodes count for a quota of directory {root}, which has none" for root, (files, _) in counted.items()]
    orphaned = database.rows(
        "SELECT count(*) FROM quota_members m LEFT JOIN inodes i ON i.ino = m.ino WHERE i.ino IS NULL"
    )
    if orphaned[0][0]:
        found.append(f"{orphaned[0][0]} inodes that do not exist count for quotas")
    return found
