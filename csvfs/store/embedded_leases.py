"""The lease table of the embedded store: who renewed when, in a database of its own that is never flushed.

Place      store floor, below embedded.py. Synchronous.
Why apart  A lease is renewed twice a second by each node and must cost no fsync; deadlines are
           CLOCK_MONOTONIC and mean nothing after a reboot, so there is nothing to make durable. With
           synchronous=OFF a crash of any process loses nothing (the kernel has the pages); a power cut may
           ruin this file, and the first opener after a boot makes a new one.

Invariants
  E1  A lease ends by one committed update here (`ended`), under this database's write lock. keep_alive takes
      the same lock, so either it came first and the lease lives, or it is told NotFound.
  E2  The keys of an ended lease are deleted from the main database afterwards, by whoever comes next, and
      only then is its row here removed. So a crash in between leaves work to do, never a key that stays for
      ever.
"""

import secrets
import sqlite3
from pathlib import Path

from csvfs.clock import MonotonicNs
from csvfs.errors import NotFound

_OPEN_TIMEOUT_S = 5.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS leases(
    id INTEGER PRIMARY KEY, ttl_ns INTEGER NOT NULL, deadline_ns INTEGER NOT NULL, ended INTEGER NOT NULL)
"""


class LeaseTable:
    """One connection to the lease table; used by one thread at a time.

    All methods raise sqlite3.OperationalError when the table is locked for longer than the given timeout.
    """

    def __init__(self, path: Path, clock: MonotonicNs, *, busy_timeout_ms: int) -> None:
        self._clock = clock
        self._db = sqlite3.connect(
            path, timeout=_OPEN_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute(_SCHEMA)
        self._db.execute(f"PRAGMA busy_timeout = {busy_timeout_ms}")

    def grant(self, ttl_ms: int) -> int:
        # Ids are random: they need no counter that would have to survive a reboot. 62 bits: SQLite's are
        # signed.
        lease = secrets.randbits(62) | 1
        ttl_ns = ttl_ms * 1_000_000
        row = (lease, ttl_ns, self._clock() + ttl_ns)
        self._db.execute("INSERT INTO leases VALUES (?, ?, ?, 0)", row)
        return lease

    def keep_alive(self, lease: int) -> None:
        """Raises NotFound when the lease has ended (E1)."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            now = self._clock()  # under the lock: nobody ends the lease between this and the commit
            updated = self._db.execute(
                "UPDATE leases SET deadline_ns = ? + ttl_ns WHERE id = ? AND ended = 0 AND deadline_ns > ?",
                (now, lease, now),
            ).rowcount
        finally:
            self._db.execute("COMMIT")
        if not updated:
            raise NotFound(f"lease {lease:#x} has ended; its keys are gone, grant a new one")

    def end(self, lease: int) -> None:
        self._db.execute("UPDATE leases SET ended = 1 WHERE id = ?", (lease,))

    def end_expired(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.execute("UPDATE leases SET ended = 1 WHERE deadline_ns <= ?", (self._clock(),))
        finally:
            self._db.execute("COMMIT")

    def any_over(self) -> bool:
        """Whether a lease has ended, or run out, whose keys are not deleted yet (E2)."""
        query = "SELECT 1 FROM leases WHERE ended = 1 OR deadline_ns <= ? LIMIT 1"
        return self._db.execute(query, (self._clock(),)).fetchone() is not None

    def ended(self) -> list[int]:
        return [lease for (lease,) in self._db.execute("SELECT id FROM leases WHERE ended = 1")]

    def forget(self, leases: list[int]) -> None:
        """Their keys are deleted, durably (E2)."""
        self._db.executemany("DELETE FROM leases WHERE id = ? AND ended = 1", [(lease,) for lease in leases])

    def is_alive(self, lease: int) -> bool:
        query = "SELECT 1 FROM leases WHERE id = ? AND ended = 0 AND deadline_ns > ?"
        return self._db.execute(query, (lease, self._clock())).fetchone() is not None

    def close(self) -> None:
        self._db.close()
