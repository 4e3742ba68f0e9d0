"""The lock desk: fcntl and flock locks of all nodes' programs, granted, waited for and given up.

Place      coordinator floor; above file_locks.py (what is held, in the metadata) and batches.py, below service.py.
Owns       who waits. That needs not outlive this process: mounts ask the next coordinator again.
Limits     WAITS_MAX programs wait for locks of this volume; one call waits WAIT_S, then its mount asks again.
Departed   Locks of a session that was evicted and may come again stand in nobody's way; who asks for what they exclude, or
           asks whether it is free, takes them away (departures.py).
Order      A call is carried out only while the link that brought it is its session's: else the mount has sent it again
           by another one, and what it asked for there may have been given up since.

Invariant  L1 (file_locks.py). So a lock is taken and given up in a batch, and told when that is durable (B1).
"""

from dataclasses import dataclass, field
from typing import Any

import trio

from coordinator import arguments
from coordinator.arguments import I64_MAX, Args
from coordinator.batches import Batches
from coordinator.departures import Departures
from coordinator.lock_ranges import LOCK_END, FileLock, OwnerKey, conflicts, is_deadlock
from coordinator.metadata import Metadata
from coordinator.sessions import Session, SessionLink
from csvfs.errors import BadRequest, CsvfsError, Deadlock, Disconnected, Fenced, TooManyLocks

WAITS_MAX = 1024
WAIT_S = 10.0  # well below io_timeout_ms: a mount that hears nothing for that long believes its coordinator dead
OWNERS_TOLD_MAX = 10_000  # in the reply of a hello; a mount that holds more is told "many"

CALLS = frozenset(("lock", "unlock", "getlock", "lock_cancel"))


@dataclass(slots=True, eq=False)
class Waiting:
    """A program that waits for a lock. `token`: names it within its session."""

    session: Session
    link: SessionLink
    ino: int
    wanted: FileLock
    token: int
    woken: trio.Event = field(default_factory=trio.Event)
    cancelled: bool = False

    @property
    def is_over(self) -> bool:
        """Nobody would hear of the lock."""
        return self.session.ended or self.session.link is not self.link or self.link.closed is not None


class LockDesk:
    def __init__(self, metadata: Metadata, batches: Batches, departures: Departures) -> None:
        self._metadata = metadata
        self._departures = departures
        self._locks = metadata.locks
        self._batches = batches
        self._waiting: dict[int, list[Waiting]] = {}  # by inode, the eldest first
        self._by_token: dict[tuple[int, int], Waiting] = {}  # (session, token)
        self._waiting_count = 0

    async def call(self, session: Session, link: SessionLink, name: str, args: Args) -> dict[str, Any]:
        """One of CALLS (PROTOCOL.md). Raises BadRequest, Deadlock, TooManyLocks, Disconnected, Fenced. Cancel safe."""
        ino = arguments.inode(args)
        if name == "lock_cancel":
            return {"found": self._cancel(session, arguments.number(args, "token"))}
        if name == "unlock":
            await self._unlock(session, link, ino, args)
            return {}
        wanted = _wanted(session, args)
        if name == "getlock":
            in_the_way = conflicts(self._locks.of_file(ino), wanted)
            if any(self._departures.is_weak(lock.session) for lock in in_the_way):
                in_the_way = await self._batches.run(lambda: self._without_weak(ino, wanted))
            return {"lock": _described(in_the_way[0], session) if in_the_way else None}
        if not arguments.flag(args, "wait"):
            return {"granted": not await self._try(session, link, ino, wanted, None)}
        waiting = Waiting(session, link, ino, wanted, arguments.number(args, "token"))
        return {"granted": await self._wait(waiting)}

    def owners_of(self, session: Session) -> list[list[int]] | None:
        """[inode, owner, handle] of all locks of the session; None: too many to say."""
        rows = self._locks.of_session(session.id)
        return [list(row) for row in rows] if len(rows) <= OWNERS_TOLD_MAX else None

    # -- taking ----------------------------------------------------------------------------------

    async def _try(
        self, session: Session, link: SessionLink, ino: int, wanted: FileLock, waiting: Waiting | None
    ) -> bool:
        """Whether something stands in the way; then `waiting` is in line, in the same step."""

        def apply() -> list[FileLock]:
            _check(session, link)
            if self._departures.has_weak_locks():
                self._without_weak(ino, wanted)
            return self._locks.take(ino, wanted)

        def executed(in_the_way: list[FileLock] | None, error: CsvfsError | None) -> None:
            if in_the_way and waiting is not None:
                self._waiting.setdefault(ino, []).append(waiting)
            self.look(ino)  # a lock may have become weaker, or been given up to be changed

        in_the_way = await self._batches.run(apply, executed)
        return bool(in_the_way)

    def _without_weak(self, ino: int, wanted: FileLock) -> list[FileLock]:
        """In a batch: what stands in the way; of departed sessions nothing does, and then they have lost it."""
        in_the_way = conflicts(self._locks.of_file(ino), wanted)
        weak = {lock.session for lock in in_the_way if self._departures.is_weak(lock.session)}
        self._departures.take_locks(weak, ino)
        return [lock for lock in in_the_way if lock.session not in weak]

    async def _wait(self, waiting: Waiting) -> bool:
        """Until it has the lock, or WAIT_S are over, or it is cancelled: whether it has it."""
        if self._waiting_count >= WAITS_MAX:
            raise TooManyLocks(f"{WAITS_MAX} programs wait for locks of this volume already")
        name = (waiting.session.id, waiting.token)
        self._by_token[name] = waiting
        self._waiting_count += 1
        deadline = trio.current_time() + WAIT_S
        try:
            while True:
                waiting.woken = trio.Event()
                if not await self._try(waiting.session, waiting.link, waiting.ino, waiting.wanted, waiting):
                    return True
                self._check_deadlock(waiting)
                with trio.move_on_at(deadline) as scope:
                    if not waiting.cancelled:
                        await waiting.woken.wait()
                if scope.cancelled_caught or waiting.cancelled:
                    return False
                self._leave(waiting)
        finally:
            self._waiting_count -= 1
            if self._by_token.get(name) is waiting:
                del self._by_token[name]
            self._leave(waiting)
            self.look(waiting.ino)  # it may have been woken for nothing, and another may have what it did not take

    def _leave(self, waiting: Waiting) -> None:
        line = self._waiting.get(waiting.ino, [])
        if waiting in line:
            line.remove(waiting)
        if not line:
            self._waiting.pop(waiting.ino, None)

    def _cancel(self, session: Session, token: int) -> bool:
        """Whether such a program waits here."""
        waiting = self._by_token.get((session.id, token))
        if waiting is None:
            return False
        waiting.cancelled = True
        waiting.woken.set()
        return True

    def _check_deadlock(self, waiting: Waiting) -> None:
        """Only POSIX locks, as in Linux. Raises Deadlock."""
        if waiting.wanted.flock:
            return

        def blockers_of(owner: OwnerKey) -> list[OwnerKey]:
            return [
                lock.key
                for line in self._waiting.values()
                for other in line
                if other.wanted.key == owner and not other.is_over
                for lock in conflicts(self._locks.of_file(other.ino), other.wanted)
            ]

        mine = conflicts(self._locks.of_file(waiting.ino), waiting.wanted)
        if is_deadlock(waiting.wanted.key, [lock.key for lock in mine], blockers_of):
            raise Deadlock(f"inode {waiting.ino}: whoever holds the lock waits for one of the same owner")

    # -- giving up -------------------------------------------------------------------------------

    async def _unlock(self, session: Session, link: SessionLink, ino: int, args: Args) -> None:
        handle = arguments.optional_number(args, "handle")
        like = None if handle is not None else _wanted(session, args)

        def apply() -> bool:
            _check(session, link)
            if like is not None:
                return self._locks.give_up(ino, like)
            return self._locks.give_up_handle(ino, session.id, handle or 0)

        def executed(changed: bool | None, error: CsvfsError | None) -> None:
            if changed:
                self.look(ino)

        await self._batches.run(apply, executed)

    def look(self, ino: int) -> None:
        """Something of its locks may have gone: whoever gets one now tries again, the eldest first."""
        line = self._waiting.get(ino)
        if not line:
            return
        held = [lock for lock in self._locks.of_file(ino) if not self._departures.is_weak(lock.session)]
        for waiting in line:
            if waiting.is_over:
                waiting.woken.set()  # it finds out by itself
            elif not conflicts(held, waiting.wanted):
                waiting.woken.set()
                held.append(waiting.wanted)


def _check(session: Session, link: SessionLink) -> None:
    if session.ended:
        raise Fenced(f"{session.writer} incarnation {session.incarnation} was evicted")
    if session.link is not link or link.closed is not None:
        raise Disconnected(f"{session.writer} connected anew")


def _wanted(session: Session, args: Args) -> FileLock:
    first = arguments.number(args, "first", 0, LOCK_END)
    last = arguments.number(args, "last", 0, LOCK_END)
    if last < first:
        raise BadRequest(f"a lock from byte {first} to {last} has none")
    return FileLock(
        session.id,
        arguments.flag(args, "flock"),
        arguments.number(args, "owner", -I64_MAX - 1),
        first,
        last,
        arguments.flag(args, "exclusive"),
        arguments.number_or_zero(args, "pid"),
        arguments.number_or_zero(args, "opened"),
    )


def _described(lock: FileLock, session: Session) -> list[Any]:
    """The number of a process is of use on its own node only."""
    return [lock.exclusive, lock.first, lock.last, lock.pid if lock.session == session.id else 0]

