"""Shared blocks: which blocks of slabs several files have, and the fresh ones that are to take their place.

Place      coordinator floor; above database.py, shared_runs.py and space.py, below extents.py and cloning.py.
Owns       tables `shared` and `replacements`. Both are made by the first clone of a volume, which also raises the schema's
           version: an older csvfs would free blocks that other files still have, so it shall refuse to open it. A volume
           without clones has neither, and pays for neither.

Invariants
  P3  An owner of a block is one extent with it. A block that two or more have is in a row of `shared` with their number,
      and is freed when its last owner gives it up. Nobody writes a block that is in such a row. With one owner left the
      row stays until that is on the media of all members (settling.py): a power cut that brought back the other owner
      would show it what the one that was left had written since.
  P4  A replacement is a block that no file has yet: it belongs to one block of one file and to a session, whose mount is
      copying into it. It is freed when that session has ended (it is fenced by then), when the file's block goes, or
      when the block is to be replaced anew: whoever wrote there has ended.
"""

from collections.abc import Iterable

from coordinator import shared_runs
from coordinator.database import Database
from coordinator.schema import SHARED_BLOCKS, VERSION_WITH_SHARED_BLOCKS
from coordinator.shared_runs import Run
from coordinator.space import Piece, Space
from csvfs.errors import Conflict

_READ = """
SELECT block, count, owners FROM shared
WHERE slab = ?1 AND block >= ifnull((SELECT max(block) FROM shared WHERE slab = ?1 AND block < ?2), ?2)
AND block <= ?3 ORDER BY block
"""  # the last run that starts before ?2, and all that start up to ?3
_OVERLAPPING = (
    "SELECT block, slab, slab_block, count FROM replacements WHERE ino = ? AND block < ? AND block + count > ?"
)
_EXACT = (
    "SELECT 1 FROM replacements WHERE ino = ? AND session = ? AND block = ? AND count = ? AND slab = ? AND slab_block = ?"
)

Row = tuple[int, int, int, int]  # of a file: block, count, slab, slab block
Unsettled = tuple[int, int, int]  # slab, block, count


class SharedBlocks:
    """Of one volume. Changes belong to a batch."""

    def __init__(self, database: Database, space: Space) -> None:
        self._database = database
        self._space = space
        self._exists = False
        self._lately: set[Unsettled] = set()  # rows of one owner that were made since `unsettled` was asked
        self.forget()
        database.add_part(self)

    # -- owners ----------------------------------------------------------------------------------

    def owners(self, slab: int, block: int, count: int) -> list[Run]:
        """How many extents have each of these blocks, in pieces (block, count, owners) in order. 0: one, or none, and the
        block may be written; else it may not."""
        if not self._exists:
            return [(block, count, 0)]
        return shared_runs.owners_of(self._runs(slab, block, count), block, count)

    def share(self, piece: Piece) -> None:
        """One owner more: an extent with these blocks was added to those that have them."""
        self._prepare()
        self._database.watch.slab(piece.slab)
        runs = self._runs(piece.slab, piece.block, piece.count)
        self._store(piece.slab, runs, shared_runs.with_owner(runs, piece.block, piece.count))

    def release(self, pieces: Iterable[Piece]) -> list[Piece]:
        """An owner less: these extents are gone. Returns what nobody has any more, to be freed."""
        if not self._exists:
            return list(pieces)
        freed: list[Piece] = []
        for piece in pieces:
            self._database.watch.slab(piece.slab)
            runs = self._runs(piece.slab, piece.block, piece.count)
            left, ownerless = shared_runs.without_owner(runs, piece.block, piece.count)
            self._store(piece.slab, runs, left)
            freed += [Piece(piece.slab, block, count) for block, count in ownerless]
        return freed

    def unsettled(self, limit: int) -> list[Unsettled]:
        """Blocks that have one owner only, but may not be written yet. Between batches; see `settle_owners`."""
        if not self._exists:
            return []
        self._lately.clear()
        query = "SELECT slab, block, count FROM shared WHERE owners = 1 ORDER BY slab, block LIMIT ?"
        return self._database.rows(query, (limit,))  # type: ignore[return-value]

    def settle_owners(self, rows: Iterable[Unsettled]) -> None:
        """What `unsettled` gave, once all that was committed then is on the media: these may be written."""
        known = [row for row in rows if row not in self._lately]  # else it was shared again, and given up, since
        statement = "DELETE FROM shared WHERE slab = ? AND block = ? AND count = ? AND owners = 1"
        self._database.run_many(statement, known)

    def _runs(self, slab: int, block: int, count: int) -> list[Run]:
        return self._database.rows(_READ, (slab, block, block + count))  # type: ignore[return-value]

    def _store(self, slab: int, before: list[Run], after: list[Run]) -> None:
        gone, new = set(before) - set(after), set(after) - set(before)
        if gone:
            blocks = [(slab, block) for block, _, _ in gone]
            self._database.run_many("DELETE FROM shared WHERE slab = ? AND block = ?", blocks)
        if new:
            rows = [(slab, *run) for run in sorted(new)]
            self._lately.update((slab, block, count) for block, count, owners in new if owners == 1)
            self._database.run_many("INSERT INTO shared(slab, block, count, owners) VALUES(?,?,?,?)", rows)

    # -- replacements ----------------------------------------------------------------------------

    def take_replacements(self, ino: int, session: int, block: int, count: int) -> list[Row]:
        """Fresh blocks for file blocks `block` on, of which `space.available_blocks` must have that many."""
        assert self._exists, "without shared blocks there is nothing to replace"
        rows: list[Row] = []
        for piece in self._space.take(count, None):
            rows.append((block, piece.count, piece.slab, piece.block))
            block += piece.count
        self._database.run_many(
            "INSERT INTO replacements(ino, session, block, count, slab, slab_block) VALUES(?,?,?,?,?,?)",
            [(ino, session, *row) for row in rows],
        )
        self._database.counters.used_blocks += count
        return rows

    def hand_over(self, ino: int, session: int, rows: Iterable[Row]) -> None:
        """These replacements become extents of their file. Raises Conflict: they are not there (any more)."""
        rows = list(rows)
        for row in rows:
            if not self._exists or not self._database.rows(_EXACT, (ino, session, *row)):
                raise Conflict(f"inode {ino}: nothing was set aside to replace blocks {row[0]}+{row[1]}; ask anew")
            self._database.watch.slab(row[2])
        self._database.run_many(
            "DELETE FROM replacements WHERE ino = ? AND block = ?", [(ino, row[0]) for row in rows]
        )

    def drop_replacements(self, ino: int, block: int, end: int) -> None:
        """Free what was to replace any of these blocks of a file."""
        if self._exists:
            self._drop(self._database.rows(_OVERLAPPING, (ino, end, block)), "ino", ino)

    def end_session(self, session: int) -> None:
        """Nothing of that session is on its way to a drive any more."""
        if self._exists:
            columns = "block, slab, slab_block, count"
            rows = self._database.rows(f"SELECT {columns} FROM replacements WHERE session = ?", (session,))
            self._drop(rows, "session", session)

    def _drop(self, rows: list[tuple], column: str, key: int) -> None:
        if not rows:
            return
        self._database.run_many(
            f"DELETE FROM replacements WHERE {column} = ? AND slab = ? AND slab_block = ?",
            [(key, slab, slab_block) for _, slab, slab_block, _ in rows],
        )
        pieces = [Piece(slab, slab_block, count) for _, slab, slab_block, count in rows]
        self._space.free_later(pieces)
        self._database.counters.used_blocks -= sum(piece.count for piece in pieces)

    # -- the tables ------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if not self._exists:
            for statement in SHARED_BLOCKS.split(";"):
                self._database.run(statement)
            self._database.run(f"PRAGMA user_version={VERSION_WITH_SHARED_BLOCKS}")
            self._exists = True

    # Part

    def flush(self) -> None:
        pass

    def forget(self) -> None:
        self._exists = bool(self._database.rows("SELECT 1 FROM sqlite_master WHERE name = 'shared'"))

    def settle(self) -> None:
        pass
