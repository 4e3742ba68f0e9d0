"""The embedded store: a SQLite file for a cluster whose nodes are all on one machine.

Place      store floor, one back end of interface.py.
Owns       `store.db` (WAL, synchronous=FULL: a transaction that has been answered survives a power cut) and
           `store.db-leases` (embedded_leases.py), `store.db-lock` (held while opening).
Blocking   Reads and lease renewals run inline: microseconds, no fsync, never behind a writer (WAL). Where
           SQLite says busy they are tried again after a trio sleep. Transactions fsync, so they run in a
           worker thread, one at a time per handle; between processes SQLite's write lock decides.
Watches    A watch sleeps until the bell rings (embedded_bell.py), or 200 ms at most; then it asks `PRAGMA
           data_version` (2 us), and reads what has a higher revision when that has moved. Deleted keys stay
           as rows without a value until compaction; a watch that fell behind it lists everything and compares
           with what it knew.

Invariants
  S1  `revision` and the rows that bear it change in one SQLite transaction; so what has a revision above the
      one last seen, read in one snapshot, is exactly what changed since.
  S2  A key is attached to a lease only while that lease is alive, checked under the main write lock; whoever
      deletes the keys of an ended lease takes that lock later, and so finds the key.
"""

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import trio

from csvfs.clock import MonotonicNs, monotonic_ns
from csvfs.errors import Corrupt, NotFound, Unavailable
from csvfs.store.embedded_bell import Bell, BellListener
from csvfs.store.embedded_leases import LeaseTable
from csvfs.store.interface import Change, Compare, Delete, Item, Put, TransactionResult
from csvfs.store.limits import check_changes, check_key, check_ttl

TOMBSTONES_KEPT = 1000  # deleted keys remembered for watches; a watch behind them lists anew
LEASE_CHECK_INTERVAL_NS = 100_000_000  # how late a watch sees at most that a lease ran out
BUSY_SLEEP_S = 0.002
BUSY_TIMEOUT_S = 5.0
_KEY_LAST = "\U0010ffff"
_FORMAT = 1

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS state(
    id INTEGER PRIMARY KEY CHECK (id = 1), format INTEGER NOT NULL, revision INTEGER NOT NULL,
    compacted INTEGER NOT NULL, boot TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS items(
    key TEXT PRIMARY KEY, value BLOB, revision INTEGER NOT NULL, lease INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS items_by_revision ON items(revision);
CREATE INDEX IF NOT EXISTS items_by_lease ON items(lease) WHERE lease != 0;
"""
# A row without a value is a deleted key (a tombstone). `compacted`: tombstones up to this revision are gone.


def boot_id() -> str:
    """Changes with every boot of this machine, and so tells whether a CLOCK_MONOTONIC deadline means
    anything."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class EmbeddedStore:
    """A handle of one process; several handles and processes may be open on one file."""

    def __init__(
        self,
        path: Path,
        *,
        gate: Path | None = None,
        clock: MonotonicNs = monotonic_ns,
        boot: str | None = None,
    ) -> None:
        """Open, creating what is missing.

        Args     gate: while this file exists every operation raises Unavailable, and watches wait.
                 clock, boot: replaced in tests.
        Raises   Unavailable: cannot be opened now. Corrupt: not a store, or damaged.
        """
        self._gate = os.fspath(gate) if gate is not None else None
        self._clock = clock
        self._path = path
        self._write_lock = trio.Lock()
        self._closed = False
        self._leases_checked_ns = 0
        lease_path = path.with_name(path.name + "-leases")
        self._bell_path = path.with_name(path.name + "-bell")
        with _sqlite_errors(path), _opening_lock(path):
            self._bell = Bell(self._bell_path)
            self._writer = _connect(path, BUSY_TIMEOUT_S)
            self._prepare(boot_id() if boot is None else boot, lease_path)
            self._reader = _connect(path, BUSY_TIMEOUT_S)
            self._reader.execute("PRAGMA busy_timeout = 0")  # only from now on: it is tried again by _inline
            self._reader.execute("PRAGMA query_only = ON")
            self._leases = LeaseTable(lease_path, clock, busy_timeout_ms=0)
            self._writer_leases = LeaseTable(lease_path, clock, busy_timeout_ms=int(1000 * BUSY_TIMEOUT_S))

    def _prepare(self, boot: str, lease_path: Path) -> None:
        """Make the tables; end all leases when this is the first opening since the machine booted."""
        self._writer.executescript(_SCHEMA)
        with _transaction(self._writer):
            self._writer.execute("INSERT OR IGNORE INTO state VALUES (1, ?, 0, 0, ?)", (_FORMAT, boot))
            found, last_boot = self._writer.execute("SELECT format, boot FROM state").fetchone()
            if found != _FORMAT:
                raise Corrupt(f"{self._path} has format {found}, this csvfs reads {_FORMAT}; upgrade csvfs")
            if last_boot != boot:
                # Nobody has the lease table open: whoever had died with the machine, and _opening_lock is
                # ours.
                for suffix in ("", "-wal", "-shm"):
                    lease_path.with_name(lease_path.name + suffix).unlink(missing_ok=True)
                self._delete_keys("SELECT key FROM items WHERE lease != 0", ())
                self._writer.execute("UPDATE state SET boot = ?", (boot,))

    # Reads

    async def get(self, key: str) -> Item | None:
        check_key(key)
        await self._sweep_if_due(0)
        query = "SELECT key, value, revision, lease FROM items WHERE key = ? AND value IS NOT NULL"
        row = await self._inline(lambda: self._reader.execute(query, (key,)).fetchone())
        return Item(*row) if row else None

    def _list(self, prefix: str) -> list[Item]:
        query = """SELECT key, value, revision, lease FROM items
                   WHERE key >= ? AND key < ? AND value IS NOT NULL ORDER BY key"""
        return [Item(*row) for row in self._reader.execute(query, (prefix, prefix + _KEY_LAST))]

    # Transactions

    async def transact(
        self, compares: list[Compare], changes: list[Put | Delete], *, repeatable: bool = False
    ) -> TransactionResult:
        """See interface.py. Raises NotFound when a Put names a lease that has ended; nothing is changed then.

        Cancel   safe; a transaction that has begun is finished before Cancelled is raised.
        """
        check_changes(changes)
        return await self._in_thread(lambda: self._transact(compares, changes))

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        return (await self.transact([], [Put(key, value, lease)])).revision

    async def delete(self, key: str) -> None:
        await self.transact([], [Delete(key)])

    def _transact(self, compares: list[Compare], changes: list[Put | Delete]) -> TransactionResult:
        self._sweep()
        with _transaction(self._writer):
            revision = self._revision(self._writer)
            for compare in compares:
                query = "SELECT revision FROM items WHERE key = ? AND value IS NOT NULL"
                row = self._writer.execute(query, (compare.key,)).fetchone()
                if (row[0] if row else 0) != compare.revision:
                    return TransactionResult(False, revision)
            for change in changes:  # all before the first change: nothing is to be undone
                if (
                    isinstance(change, Put)
                    and change.lease
                    and not self._writer_leases.is_alive(change.lease)
                ):
                    raise NotFound(f"{change.key}: lease {change.lease:#x} has ended; grant a new one")
            return TransactionResult(True, self._apply(changes, revision))

    def _apply(self, changes: list[Put | Delete], revision: int) -> int:
        changed = 0
        for change in changes:
            if isinstance(change, Put):
                query = "INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?)"
                row = (change.key, change.value, revision + 1, change.lease)
            else:
                query = """UPDATE items SET value = NULL, revision = ?, lease = 0
                           WHERE key = ? AND value IS NOT NULL"""
                row = (revision + 1, change.key)  # type: ignore[assignment]
            changed += self._writer.execute(query, row).rowcount
        if not changed:
            return revision
        self._writer.execute("UPDATE state SET revision = ?", (revision + 1,))
        self._compact()
        return revision + 1

    def _delete_keys(self, query: str, parameters: tuple[object, ...]) -> None:
        """Delete the keys that `query` selects, as one change; within a transaction."""
        keys = [key for (key,) in self._writer.execute(query, parameters)]
        self._apply([Delete(key) for key in keys], self._revision(self._writer))

    def _compact(self) -> None:
        query = "SELECT revision FROM items WHERE value IS NULL ORDER BY revision DESC LIMIT 1 OFFSET ?"
        row = self._writer.execute(query, (2 * TOMBSTONES_KEPT,)).fetchone()
        if row is None:
            return
        (kept,) = self._writer.execute(query, (TOMBSTONES_KEPT,)).fetchone()
        self._writer.execute("DELETE FROM items WHERE value IS NULL AND revision <= ?", (kept,))
        self._writer.execute("UPDATE state SET compacted = ?", (kept,))

    @staticmethod
    def _revision(connection: sqlite3.Connection) -> int:
        (revision,) = connection.execute("SELECT revision FROM state").fetchone()
        return int(revision)

    # Leases

    async def grant_lease(self, ttl_ms: int) -> int:
        check_ttl(ttl_ms)
        return await self._inline(lambda: self._leases.grant(ttl_ms))

    async def keep_alive(self, lease: int) -> None:
        await self._inline(lambda: self._leases.keep_alive(lease))

    async def revoke_lease(self, lease: int) -> None:
        await self._inline(lambda: self._leases.end(lease))
        await self._in_thread(self._sweep)

    async def _sweep_if_due(self, interval_ns: int) -> None:
        """Delete the keys of leases that have ended, unless that was looked at less than `interval_ns`
        ago."""
        now = self._clock()
        if interval_ns and now - self._leases_checked_ns < interval_ns:
            return
        self._leases_checked_ns = now
        if await self._inline(self._leases.any_over):
            await self._in_thread(self._sweep)

    def _sweep(self) -> None:
        if not self._writer_leases.any_over():
            return
        self._writer_leases.end_expired()
        with _transaction(self._writer):
            ended = self._writer_leases.ended()  # under the main write lock (S2)
            for lease in ended:
                self._delete_keys("SELECT key FROM items WHERE lease = ?", (lease,))
        self._writer_leases.forget(ended)

    # Watches

    @contextlib.asynccontextmanager
    async def watch(self, prefix: str) -> AsyncIterator[AsyncIterator[list[Change]]]:
        """See interface.py. Entering raises Unavailable; afterwards the iterator waits instead."""
        revision, known = await self._inline(lambda: self._snapshot(prefix))
        bell = BellListener(self._bell_path)
        try:
            yield _Watch(self, bell, prefix, revision, known)
        finally:
            bell.close()

    def _snapshot(self, prefix: str) -> tuple[int, dict[str, int]]:
        """The store's revision, and that of each key under `prefix`, of one instant."""
        with _transaction(self._reader, "BEGIN"):
            revision = self._revision(self._reader)
            return revision, {item.key: item.revision for item in self._list(prefix)}

    async def _next_changes(self, watch: "_Watch") -> list[Change]:
        while True:
            try:
                await self._sweep_if_due(LEASE_CHECK_INTERVAL_NS)
                batch = await self._inline(lambda: self._poll(watch))
                if batch:
                    return batch  # no await since `watch` was moved on: a cancelled caller loses nothing
            except _Closed:
                raise
            except Unavailable:
                pass  # the gate, or SQLite is busy: what changes meanwhile is found afterwards
            await watch.bell.wait()

    def _poll(self, watch: "_Watch") -> list[Change]:
        version = self._data_version()
        if version == watch.version:
            return []
        watch.revision, batch = self._changes(watch.prefix, watch.revision, watch.known)
        watch.version = version  # as of before the read: what came in between is looked for again
        return batch

    def _data_version(self) -> int:
        (version,) = self._reader.execute("PRAGMA data_version").fetchone()
        return int(version)

    def _changes(self, prefix: str, after: int, known: dict[str, int]) -> tuple[int, list[Change]]:
        """The store's revision and what changed under `prefix` since revision `after`; updates `known`."""
        with _transaction(self._reader, "BEGIN"):
            revision, compacted = self._reader.execute("SELECT revision, compacted FROM state").fetchone()
            if revision == after:
                return revision, []
            if after < compacted:
                batch = self._difference(prefix, known, revision)
            else:
                query = """SELECT key, value, revision, lease FROM items
                           WHERE revision > ? AND key >= ? AND key < ? ORDER BY revision, key"""
                rows = self._reader.execute(query, (after, prefix, prefix + _KEY_LAST)).fetchall()
                # A key that came and went since `after` was never seen by this watch: its going is no news.
                batch = [_change(row) for row in rows if row[1] is not None or row[0] in known]
        for change in batch:
            if change.item is None:
                del known[change.key]
            else:
                known[change.key] = change.revision
        return revision, batch

    def _difference(self, prefix: str, known: dict[str, int], revision: int) -> list[Change]:
        """What changed against `known`, for a watch whose tombstones are compacted away."""
        items = {item.key: item for item in self._list(prefix)}
        gone = [Change(key, None, revision) for key in known if key not in items]
        changed = [item for item in items.values() if known.get(item.key) != item.revision]
        changed.sort(key=lambda item: item.revision)
        return [Change(item.key, item, item.revision) for item in changed] + gone

    # Shell

    async def close(self) -> None:
        """Close this handle; operations raise Unavailable from now on and watches end with it."""
        if self._closed:
            return
        self._closed = True
        with trio.CancelScope(shield=True):
            async with self._write_lock:
                await trio.to_thread.run_sync(self._close)

    def _close(self) -> None:
        for resource in (self._leases, self._writer_leases, self._reader, self._writer, self._bell):
            resource.close()

    async def _inline(self, operation: Callable[[], T]) -> T:
        """Run a short operation here, again while SQLite is busy. A checkpoint."""
        await trio.lowlevel.checkpoint()
        deadline_ns = monotonic_ns() + int(BUSY_TIMEOUT_S * 1e9)
        while True:
            self._refuse_when_closed()
            try:
                with _sqlite_errors(self._path):
                    return operation()
            except _Busy:
                if monotonic_ns() > deadline_ns:
                    raise
            await trio.sleep(BUSY_SLEEP_S)

    async def _in_thread(self, operation: Callable[[], T]) -> T:
        """Run what may fsync, in a worker thread; once begun it is finished even when cancelled."""

        def run() -> T:
            try:
                return operation()
            finally:
                self._bell.ring()

        async with self._write_lock:
            self._refuse_when_closed()
            with _sqlite_errors(self._path):
                return await trio.to_thread.run_sync(run)

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise _Closed(f"the store {self._path} has been closed by this process")
        if self._gate is not None and os.path.exists(self._gate):
            raise Unavailable(
                f"the store {self._path} is cut off by {self._gate}; `csvfs lab heal` removes it"
            )

    # Last, because in the lines below it `list` is this method and no type any more.
    async def list(self, prefix: str) -> list[Item]:
        await self._sweep_if_due(0)
        return await self._inline(lambda: self._list(prefix))


class _Watch:
    """Where one watch stands. Its `anext` may be cancelled and called again."""

    def __init__(
        self, store: EmbeddedStore, bell: BellListener, prefix: str, revision: int, known: dict[str, int]
    ) -> None:
        self._store = store
        self.bell = bell
        self.prefix = prefix
        self.revision = revision
        self.known = known  # key -> revision as this watch last told
        self.version = -1

    def __aiter__(self) -> "_Watch":
        return self

    async def __anext__(self) -> list[Change]:
        return await self._store._next_changes(self)


class _Busy(Unavailable):
    """SQLite's lock is held by another process at the moment."""


class _Closed(Unavailable):
    """This handle is closed."""


def _change(row: tuple[str, bytes | None, int, int]) -> Change:
    key, value, revision, lease = row
    return Change(key, None if value is None else Item(key, value, revision, lease), revision)


def _connect(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


@contextlib.contextmanager
def _opening_lock(path: Path) -> Iterator[None]:
    """One opener at a time: so the tables are made, and leases of an earlier boot ended, once."""
    try:
        descriptor = os.open(f"{path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Unavailable(f"the store {path} cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            raise _Busy(
                f"the store {path} has been busy for {BUSY_TIMEOUT_S:.0f} s; is a process stopped?"
            ) from None
        raise Unavailable(f"the store {path} does not work: {error}") from None
    except sqlite3.DatabaseError as error:
        raise Corrupt(f"the store {path} is damaged: {error}; restore it from a backup") from None
