"""File locks of this node's programs: fcntl, OFD and flock locks, asked of the coordinator, which has those of all nodes.

Place      mount floor; used by channel.py. The kernel keeps none of its own (FUSE_POSIX_LOCKS, FUSE_FLOCK_LOCKS).
Ends       A program that closes a file gives up its POSIX locks of it: FLUSH names the owner. The last close of an open
           file gives up what was taken through it, flock and OFD locks: RELEASE names its handle. Both cost a call
           only where something may be held.
Waiting    A blocking lock is a call that the coordinator answers within some seconds, "not yet" if need be; then it is
           asked again, so a takeover on the way needs nothing special. INTERRUPT, by a signal or a kill, breaks it off
           at the coordinator, whose answer to the lock itself says how it ended.
Limits     WAITS_MAX programs wait here; further ones get ENOLCK.

Invariant  L1 of coordinator/file_locks.py. A lock is said to be had only after the coordinator's answer; all that a
           call asks for may be asked twice without harm.
"""

import errno
import fcntl
import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from csvfs.errors import CsvfsError, Fenced, TooManyLocks
from csvfs.mount import fuse_abi as abi
from csvfs.mount.leases import Coordinator
from csvfs.mount.request_journal import UNIQUE_MASK

log = logging.getLogger(__name__)

LOCK_END = (1 << 63) - 1  # the kernel's "to the end of the file"
WAITS_MAX = 1024  # each keeps a task of the channel's REQUESTS_WAITING_MAX
EARLY_MAX = 256
RETRY_S = 0.5
CANCEL_RETRY_S = 0.05


@dataclass(slots=True)
class Waiting:
    """A program that waits for a lock."""

    ino: int
    token: int
    interrupted: bool = False
    over: trio.Event = field(default_factory=trio.Event)


@dataclass(slots=True, eq=False)
class GivingUp:
    """Locks that a close gives up. `asked`: the last request for one of them, as of then."""

    ino: int
    args: dict[str, Any]
    known: dict[tuple[int, int], int]
    whose: int
    asked: int
    over: trio.Event = field(default_factory=trio.Event)


class FileLocks:
    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._nursery: trio.Nursery | None = None
        self._tokens = itertools.count(1)
        self._waiting: dict[int, Waiting] = {}  # by `unique` of the request
        self._early: dict[int, None] = {}  # requests that were interrupted and do not wait here (yet)
        # What may be held, with the number of the last request for it: (inode, owner), and (inode, handle).
        self._owners: dict[tuple[int, int], int] = {}
        self._handles: dict[tuple[int, int], int] = {}
        self._many = False  # more is held than the coordinator could say: every close asks
        self._giving_up: dict[int, set[trio.Event]] = {}  # inode -> releases under way

    def start(self, nursery: trio.Nursery) -> None:
        """`nursery`: for what goes on behind an answer."""
        self._nursery = nursery

    def learn(self, hello: dict[str, Any]) -> None:
        """From the coordinator's answer to a hello: what this session held before this process knew of it."""
        held = hello.get("locks", ())
        self._many = self._many or held is None
        for ino, owner, handle in held or ():
            self._owners.setdefault((ino, owner), 0)
            self._handles.setdefault((ino, handle), 0)

    # -- asking ----------------------------------------------------------------------------------

    async def get(self, unique: int, ino: int, body: bytes) -> bytes:
        """The reply to a GETLK. Raises struct.error, CsvfsError. Cancel safe."""
        _, _, first, last, _, pid, _, _ = abi.LK_IN.unpack_from(body)
        found = (await self._coordinator.call("getlock", _arguments(ino, body)))["lock"]
        if found is None:
            return abi.pack_lock_reply(unique, first, last, fcntl.F_UNLCK, pid)
        exclusive, first, last, pid = found
        return abi.pack_lock_reply(unique, first, last, fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK, pid)

    async def set(self, unique: int, ino: int, body: bytes, *, waits: bool) -> int:
        """A SETLK or SETLKW; the errno to answer, 0: done. Raises struct.error, CsvfsError: it may have been done.

        Cancel  the program's process or this mount ends: its locks end with its files, or its session.
        """
        handle, owner, _, _, kind, _, _, _ = abi.LK_IN.unpack_from(body)
        args = _arguments(ino, body)
        for under_way in list(self._giving_up.get(ino, ())):
            await under_way.wait()  # of files closed before; a program may count on that
        if kind == fcntl.F_UNLCK:
            await self._coordinator.call("unlock", args)
            return 0
        token = next(self._tokens)
        self._owners[ino, _signed(owner)] = self._handles[ino, _unsigned63(handle)] = token
        if not waits:
            reply = await self._coordinator.call("lock", {**args, "wait": False})
            return 0 if reply["granted"] else errno.EAGAIN
        return await self._wait(unique, Waiting(ino, token), {**args, "wait": True, "token": token})

    async def _wait(self, unique: int, waiting: Waiting, args: dict[str, Any]) -> int:
        if len(self._waiting) >= WAITS_MAX:
            raise TooManyLocks(f"{WAITS_MAX} programs of this node wait for locks of this volume already")
        unique &= UNIQUE_MASK  # one that comes again may have been interrupted under either name
        self._waiting[unique] = waiting
        waiting.interrupted = unique in self._early
        try:
            while not waiting.interrupted:
                if (await self._coordinator.call("lock", args))["granted"]:
                    return 0
            return errno.EINTR
        finally:
            del self._waiting[unique]
            waiting.over.set()

    def interrupt(self, body: memoryview) -> None:
        """An INTERRUPT: a signal has come for a program that waits. One for another request changes nothing."""
        unique = abi.INTERRUPT_IN.unpack_from(body)[0] & UNIQUE_MASK
        waiting = self._waiting.get(unique)
        if waiting is None:
            self._early[unique] = None  # what is asked anew of a later process may come behind it
            if len(self._early) > EARLY_MAX:
                del self._early[next(iter(self._early))]
        if waiting is not None and not waiting.interrupted and self._nursery is not None:
            waiting.interrupted = True
            self._nursery.start_soon(self._cancel, waiting)

    async def _cancel(self, waiting: Waiting) -> None:
        """Until the program waits no more: a cancel may overtake the lock that it is about."""
        args = {"ino": waiting.ino, "token": waiting.token}
        while not waiting.over.is_set():
            try:
                await self._coordinator.call("lock_cancel", args)
            except CsvfsError as error:
                log.info("a wait for a lock on inode %d is not broken off yet: %s", waiting.ino, error)
            with trio.move_on_after(CANCEL_RETRY_S):
                await waiting.over.wait()

    # -- the end of files ------------------------------------------------------------------------

    def is_due(self, ino: int, body: memoryview) -> bool:
        """Whether the FLUSH has locks to give up: `flush` does it."""
        owner = abi.FLUSH_IN.unpack_from(body)[3]
        return self._many or (ino, _signed(owner)) in self._owners

    async def flush(self, ino: int, owner: int) -> None:
        """close(2): the process `owner` of the FLUSH has no POSIX lock of the file any more.

        Raises  CsvfsError: not yet; it goes on behind. Cancel: as that, unless the mount ends.
        """
        owner = _signed(owner)
        args = {"ino": ino, "owner": owner, "first": 0, "last": LOCK_END}
        giving_up = self._begin(ino, self._owners, owner, args)
        await self._give_up(giving_up, tries=1)

    def closing(self, ino: int, handle: int) -> Callable[[], Awaitable[None]] | None:
        """A RELEASE: what is to be done before it is answered, so that nothing taken through the open file is held any
        more; None: nothing. Whoever serves the session next does it, if this process ends meanwhile."""
        handle = _unsigned63(handle)
        if not self._many and (ino, handle) not in self._handles:
            return None
        giving_up = self._begin(ino, self._handles, handle, {"ino": ino, "handle": handle})
        return partial(self._give_up, giving_up)

    def _begin(self, ino: int, known: dict[tuple[int, int], int], whose: int, args: dict[str, Any]) -> "GivingUp":
        """Synchronously, as the request was read: a lock that is asked for next waits for it."""
        giving_up = GivingUp(ino, args, known, whose, known.get((ino, whose), 0))
        self._giving_up.setdefault(ino, set()).add(giving_up.over)
        return giving_up

    async def _give_up(self, what: "GivingUp", tries: int = 0) -> None:
        """Until it is done, or the session has ended. Else others would wait for a program that is gone.

        tries: so many before the error is raised and the rest goes on behind; 0: none is raised.
        """
        behind = False
        try:
            while True:
                try:
                    await self._coordinator.call("unlock", what.args)
                    break
                except Fenced:
                    return  # the session takes them along
                except CsvfsError as error:
                    log.info("locks of inode %d are not given up yet: %s", what.ino, error)
                    if tries == 1 and self._nursery is not None:
                        behind = True
                        self._nursery.start_soon(self._give_up, what)
                        raise
                await trio.sleep(RETRY_S)
            if what.known.get((what.ino, what.whose)) == what.asked:  # else a lock was asked for meanwhile
                del what.known[what.ino, what.whose]
        finally:
            if not behind:
                self._end(what)

    def _end(self, what: "GivingUp") -> None:
        what.over.set()
        under_way = self._giving_up[what.ino]
        under_way.discard(what.over)
        if not under_way:
            del self._giving_up[what.ino]


def _arguments(ino: int, body: bytes) -> dict[str, Any]:
    handle, owner, first, last, kind, pid, flags, _ = abi.LK_IN.unpack_from(body)
    return {
        "ino": ino, "owner": _signed(owner), "flock": bool(flags & abi.LK_FLOCK), "exclusive": kind == fcntl.F_WRLCK,
        "first": min(first, LOCK_END), "last": min(last, LOCK_END), "pid": pid, "opened": _unsigned63(handle),
    }  # fmt: skip


def _signed(owner: int) -> int:
    """A number of the kernel as the database keeps it."""
    return owner - (1 << 64) if owner >> 63 else owner


def _unsigned63(handle: int) -> int:
    """Handles are ours (relay.py): they are small, and nothing else is let through."""
    return handle & LOCK_END
