"""File locks in the metadata: table locks, changed in the batches of whoever locks and unlocks.

Place      coordinator floor; above database.py and lock_ranges.py, below metadata.py. Synchronous.
Why here   A lock lasts exactly as long as its session, whatever becomes of coordinators and mount processes meanwhile:
           the next coordinator has nothing to be told, and nothing to believe.

Invariant
  L1  No two owners hold locks that exclude each other, and nobody is told of a lock before it is in the log of all
      members. A lock ends when its owner gives it up, or when its session has ended: after its mount was fenced.
"""

from coordinator.database import Database
from coordinator.lock_ranges import FileLock, conflicts, with_lock, without
from coordinator.schema import FILE_LOCKS
from csvfs.errors import TooManyLocks

LOCKS_PER_FILE_MAX = 4096
_COLUMNS = "session, flock, owner, first, last, exclusive, pid, handle"
_OF_FILE = f"SELECT {_COLUMNS} FROM locks WHERE ino = ?"
_ADD = f"INSERT INTO locks(ino, {_COLUMNS}) VALUES(?,?,?,?,?,?,?,?,?)"
_REMOVE = "DELETE FROM locks WHERE ino = ? AND session = ? AND flock = ? AND owner = ?"


class FileLocks:
    """All locks of the volume."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def prepare(self) -> None:
        """Between batches: volumes that were made before there were locks get their table."""
        if self._database.rows("SELECT 1 FROM sqlite_master WHERE name = 'locks_of_session'"):
            return
        self._database.begin()
        for statement in FILE_LOCKS.split(";"):
            self._database.run(statement)
        self._database.commit()

    def of_file(self, ino: int) -> list[FileLock]:
        """In no order."""
        return [
            FileLock(session, bool(flock), owner, first, last, bool(exclusive), pid, handle)
            for session, flock, owner, first, last, exclusive, pid, handle in self._database.rows(_OF_FILE, (ino,))
        ]

    def of_session(self, session: int) -> list[tuple[int, int, int]]:
        """(inode, owner, handle) of all that it holds, each once."""
        return self._database.rows("SELECT DISTINCT ino, owner, handle FROM locks WHERE session = ?", (session,))

    def take(self, ino: int, wanted: FileLock) -> list[FileLock]:
        """Lock; what stands in the way is returned, and then nothing is locked. In a batch.

        A flock that changes its kind is given up first, as Linux does: two that both wait to make theirs exclusive
        would wait for ever. Raises TooManyLocks.
        """
        held = self.of_file(ino)
        own = [lock for lock in held if lock.key == wanted.key]
        in_the_way = conflicts(held, wanted)
        if in_the_way and not (wanted.flock and own and own[0].exclusive != wanted.exclusive):
            return in_the_way
        after = [] if in_the_way else with_lock(own, wanted)
        if len(held) - len(own) + len(after) > max(LOCKS_PER_FILE_MAX, len(held)):
            raise TooManyLocks(f"inode {ino} has {len(held)} locks, may have {LOCKS_PER_FILE_MAX}")
        self._replace(ino, own, after, wanted)
        return in_the_way

    def give_up(self, ino: int, like: FileLock) -> bool:
        """Unlock the bytes of `like` of its owner; whether there was anything. In a batch. Raises TooManyLocks."""
        held = self.of_file(ino)
        own = [lock for lock in held if lock.key == like.key]
        after = without(own, like.first, like.last)
        if len(after) > len(own) and len(held) >= LOCKS_PER_FILE_MAX:
            raise TooManyLocks(f"inode {ino} has {len(held)} locks, may have {LOCKS_PER_FILE_MAX}: it cannot be split")
        self._replace(ino, own, after, like)
        return after != own

    def give_up_handle(self, ino: int, session: int, handle: int) -> bool:
        """Unlock all that was taken through an open file; whether there was anything. In a batch."""
        arguments = (ino, session, handle)
        self._database.run("DELETE FROM locks WHERE ino = ? AND session = ? AND handle = ?", arguments)
        return self._database.changes() > 0

    def end_session(self, session: int, ino: int | None = None) -> None:
        """In a batch: nothing of the session's mount can land any more. `ino`: of this file alone."""
        if ino is None:
            self._database.run("DELETE FROM locks WHERE session = ?", (session,))
        else:
            self._database.run("DELETE FROM locks WHERE ino = ? AND session = ?", (ino, session))

    def _replace(self, ino: int, before: list[FileLock], after: list[FileLock], like: FileLock) -> None:
        if sorted(before, key=lambda lock: lock.first) == after:
            return
        self._database.run(_REMOVE, (ino, *like.key))
        self._database.run_many(
            _ADD,
            [(ino, *like.key, lock.first, lock.last, lock.exclusive, lock.pid, lock.handle) for lock in after],
        )
