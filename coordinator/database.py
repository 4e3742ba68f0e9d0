"""The database connection, its transactions, and the counters that every part of the metadata shares.

Place      coordinator floor; above slab_vfs.py, below inodes, space, extents, replies, namespace, metadata.
Owns       the connection, `counters`, and the order in which parts write back what they keep in memory.

Parts keep rows in memory while a batch runs: `flush` writes the changed ones, `forget` drops them all after a
rollback, `settle` is told that a batch is committed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, Protocol

import apsw

from coordinator.schema import SCHEMA_VERSION, TABLES, VERSIONS_KNOWN
from coordinator.slab_image import PAGES_PER_BLOCK, SlabImage
from coordinator.slab_vfs import connect
from coordinator.watch import Watch
from csvfs.errors import Corrupt, NoSpace
from csvfs.ids import ROOT_INODE

CHECKPOINT_WAL_USED = 0.25  # above it a checkpoint is due
CHECKPOINT_WAL_USED_MAX = 0.5  # above it `begin` does not wait for one any longer


@dataclass(slots=True)
class Counters:
    """The one row of table `counters`."""

    next_ino: int = ROOT_INODE + 1
    next_slab: int = 1
    next_trim: int = 1
    next_session: int = 1
    files: int = 0  # inodes, the root and orphans included
    used_blocks: int = 0  # in extents
    free_blocks: int = 0  # of all slabs; what is neither used nor free waits to be trimmed
    slab_blocks: int = 0  # of all slabs


# Not astuple: it copies deeply, which takes 20 us.
_counter_values = attrgetter(*(field.name for field in fields(Counters)))
_COUNTERS_READ = f"SELECT {', '.join(field.name for field in fields(Counters))} FROM counters WHERE id = 1"
_COUNTERS_WRITE = f"INSERT OR REPLACE INTO counters VALUES(1{', ?' * len(fields(Counters))})"


class Part(Protocol):
    def flush(self) -> None: ...
    def forget(self) -> None: ...
    def settle(self) -> None: ...


class Database:
    """One connection, one transaction at a time."""

    def __init__(self, image: SlabImage, connection: apsw.Connection, vfs: apsw.VFS) -> None:
        self.image = image
        self._connection = connection
        self._vfs = vfs
        self._cursor = connection.cursor()
        self._parts: list[Part] = []
        self.counters = Counters()
        self.watch = Watch()
        self._counters_stored: tuple[int, ...] = ()
        self.active = False  # a batch runs
        self._doom: Exception | None = None  # what made a commit of it impossible
        self._pages_max = image.database_pages_max

    @staticmethod
    def create(image: SlabImage) -> "Database":
        """An empty database with our tables. Not one yet that `open` takes: see SlabImage.write_header."""
        connection, vfs = connect(image)
        database = Database(image, connection, vfs)
        database.begin()
        for statement in TABLES.split(";"):
            database.run(statement)
        database.run(f"PRAGMA user_version={SCHEMA_VERSION}")
        database.commit()
        return database

    @staticmethod
    def open(image: SlabImage) -> "Database":
        """Raises Corrupt: not a database of ours."""
        try:
            connection, vfs = connect(image)
        except apsw.Error as error:
            raise Corrupt(f"metadata database cannot be opened: {error}; see csvfs volume status") from None
        database = Database(image, connection, vfs)
        try:
            ((version,),) = database.rows("PRAGMA user_version")
            if version not in VERSIONS_KNOWN:
                raise Corrupt(
                    f"metadata database has schema {version}, this csvfs reads {max(VERSIONS_KNOWN)}; upgrade"
                )
            database._load_counters()
        except BaseException:
            database.close()
            raise
        return database

    def add_part(self, part: Part) -> None:
        """Parts flush in the order they were added: one that makes work for another comes first."""
        self._parts.append(part)

    # Statements

    def rows(self, statement: str, bindings: Sequence[Any] = ()) -> list[tuple]:
        """All rows at once, so that no statement stays open over a commit. Raises Corrupt, NoSpace."""
        try:
            return self._cursor.execute(statement, bindings).fetchall()  # type: ignore[return-value]
        except Exception as error:
            raise self._failed(error) from error

    def run(self, statement: str, bindings: Sequence[Any] = ()) -> None:
        """Raises Corrupt, NoSpace."""
        try:
            self._cursor.execute(statement, bindings)
        except Exception as error:
            raise self._failed(error) from error

    def run_many(self, statement: str, bindings: Sequence[Sequence[Any]]) -> None:
        """Raises Corrupt, NoSpace."""
        try:
            self._cursor.executemany(statement, bindings)
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> Exception:
        """A failed statement dooms its batch."""
        return self.doom(_ours(error))

    def doom(self, error: Exception) -> Exception:
        """A batch that runs cannot be committed any more: an operation may be half done. Returns `error`."""
        if self.active and self._doom is None:
            self._doom = error
            if not self._connection.in_transaction:
                # SQLite has rolled back by itself. What still comes must not be committed piecemeal.
                self._connection.execute("BEGIN")
        return error

    def changes(self) -> int:
        """Rows changed by the last statement."""
        return self._connection.changes()

    # Transactions

    def begin(self) -> None:
        """Start a batch. Checkpoints first where the WAL has become too full to wait for an idle moment."""
        assert not self.active, "one batch at a time"
        if self.image.wal_used > CHECKPOINT_WAL_USED_MAX:
            self.checkpoint()
        if self._pages_max != self.image.database_pages_max:
            self._pages_max = self.image.database_pages_max
            self.rows(f"PRAGMA max_page_count={self._pages_max}")
        self.run("BEGIN IMMEDIATE")
        self.active = True

    def commit(self) -> None:
        """Commit the batch. Raises NoSpace, Corrupt ...: a statement failed, nothing of it was applied."""
        assert self.active
        try:
            if self._doom is not None:
                raise self._doom
            self.flush()
            values = _counter_values(self.counters)
            if values != self._counters_stored:
                self.run(_COUNTERS_WRITE, values)
            self.run("COMMIT")
        except BaseException:
            self.rollback()
            raise
        self.active = False
        self._counters_stored = values
        for part in self._parts:
            part.settle()

    def rollback(self) -> None:
        """Undo the batch. Also right after an error that made SQLite roll back by itself."""
        self.active = False
        self.watch.rolled_back = True
        self._doom = None
        if self._connection.in_transaction:
            self.run("ROLLBACK")
        for part in self._parts:
            part.forget()
        self._load_counters()

    def flush(self) -> None:
        """Write changed rows back, so that statements of the batch that runs see them."""
        for part in self._parts:
            part.flush()

    @property
    def checkpoint_due(self) -> bool:
        return self.image.wal_used > CHECKPOINT_WAL_USED

    def checkpoint(self) -> None:
        """Copy the WAL's pages to their places; between batches. The next batch starts the WAL anew."""
        assert not self.active
        try:
            frames, copied = self._connection.wal_checkpoint()
        except apsw.Error as error:
            raise _ours(error) from error
        if frames == copied:
            self.image.wal_end = 0

    def used_blocks(self) -> int:
        """Blocks of the address space up to the end of the database, with pages that only the WAL holds."""
        ((pages,),) = self.rows("PRAGMA page_count")
        return self.image.database_block + -(-int(pages) // PAGES_PER_BLOCK)

    def close(self) -> None:
        """Writes nothing: an open batch is dropped."""
        self._connection.close()
        self._vfs.unregister()

    def _load_counters(self) -> None:
        found = self.rows(_COUNTERS_READ)
        if found:
            self.counters = Counters(*found[0])
            self._counters_stored = found[0]


def _ours(error: Exception) -> Exception:
    if isinstance(error, apsw.FullError):
        return NoSpace(f"metadata slabs: {error}; add a metadata slab or use smaller batches")
    if isinstance(error, apsw.CorruptError | apsw.NotADBError | apsw.IOError):
        return Corrupt(f"metadata database: {error}; see csvfs volume status")
    return error
