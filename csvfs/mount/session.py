"""The session: this mount's side of the conversation with its volume's coordinator, wherever that is.

Place      mount floor, on net/link.py. One per mount process and incarnation.
Finds      the coordinator by the volume's owner key (OwnerView). Whenever the link breaks, or the owner
           moves, it connects again, says `hello`, and to a coordinator of a new term `reclaim`s all leases
           held.
Calls      wait, and are sent again, over everything that another try may cure, until io_timeout_s.

Invariants
  I11  A call that changes metadata has a number `op`, the same however often it is sent; `op_done` tells
       below which number no call will be sent again. So it is carried out once, and every try gets the first
       answer.
       Calls that a process before this one may have made have the number of then (request_journal.py); their
       answers are marked `history`: what they say was true once.
  Q1   An answer that was computed for an earlier sending carries no leases: they may be gone meanwhile.
  Q2   Nothing is sent to a coordinator before it has all our claims.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import trio

from csvfs.clock import MonotonicNs, monotonic_ns
from csvfs.errors import CsvfsError, Disconnected, Fenced, NotCoordinator, TimedOut, Unavailable
from csvfs.mount.request_journal import RequestJournal
from csvfs.mount.waits import CallWait
from csvfs.net.calls import CallTable, field
from csvfs.net.link import Address, Link

log = logging.getLogger(__name__)

# PROTOCOL.md, "Calls to a coordinator": those with a star.
NUMBERED_CALLS = frozenset(
    (
        "setattr", "make", "link", "unlink", "rename", "setxattr", "removexattr", "allocate", "commit", "punch",
        "clone", "unshare", "replace",
    )
)  # fmt: skip
_LEASES_IN_REPLIES = ("lease", "dir_lease", "new_dir_lease")

RETRY_S_MIN = 0.02
RETRY_S_MAX = 0.2
HELLO_TIMEOUT_S = 5.0
PING_INTERVAL_S = 1.0  # see CONTACT_S_MAX of guard.py
PING_TIMEOUT_S = 2.5
RECLAIM_BATCH = 1000
RUNS_BATCH = 20_000  # of segments: some 200 KiB


class OwnerView(Protocol):
    """Where the volume's coordinator is, as the cluster store says; cluster/membership.py knows."""

    def address(self) -> Address | None:
        """None: nobody is elected."""
        ...

    async def wait_change(self, known: Address | None) -> None:
        """Returns when `address()` is not `known` (any more), or was written anew. Cancel safe."""
        ...


class LeaseHolder(Protocol):
    """What the session asks of the file table."""

    open_files: int

    def claims(self) -> list[list[int]]: ...
    def claims_of_segments(self) -> list[list[Any]]: ...
    def without_segments(self, inos: list[int]) -> None: ...
    async def recall_segment(self, ino: int, segment: int, kind: int) -> dict[str, Any]: ...
    async def flush_segments(self, ino: int) -> None: ...
    def refused(self, inos: list[int], *, are_open: bool = False) -> None: ...
    def lowered(self, inos: list[int]) -> None: ...
    def adopted(self, lost_locks: list[int] | None) -> None: ...
    async def recall(self, ino: int, kind: int, attr: bool) -> dict[str, Any]: ...
    def query(self, ino: int) -> dict[str, Any] | None: ...


class NotInheritedError(Fenced):
    """The session of the process before cannot be taken over, by nobody."""


class Session:
    """Set `holder` before `run_forever`; `call` may be used at any time, it waits for the connection."""

    def __init__(
        self,
        *,
        volume: str,
        node: str,
        incarnation: int,
        owner: OwnerView,
        connect: Callable[[Address], Awaitable[Link]],
        on_fenced: Callable[[Fenced], None],
        on_contact: Callable[[int], None] = lambda sent_ns: None,
        news: Callable[[], dict[str, Any]] = dict,
        io_timeout_s: float = 60.0,
        clock: MonotonicNs = monotonic_ns,
        journal: RequestJournal | None = None,
        inherit: bool = False,
    ) -> None:
        """journal: gives calls their numbers. inherit: go on with the session of an earlier process of this mount, which
        is dead; `hello` says whether we do. on_fenced: this incarnation was evicted, the process has to end. on_contact(sent_ns): an answer
        came. news(): how this mount's I/O goes, told to the coordinator with every ping (waits.py)."""
        self._hello_args = {"volume": volume, "node": node, "incarnation": incarnation}
        self._owner = owner
        self._connect = connect
        self._on_fenced = on_fenced
        self._on_contact = on_contact
        self._news = news
        self._io_timeout_s = io_timeout_s
        self._clock = clock
        self.holder: LeaseHolder | None = None
        self.hello: dict[str, Any] = {}  # the coordinator's last reply: term, volume, slab_size
        self._link: Link | None = None  # ready for calls (Q2)
        self._changed = trio.Event()  # of _link or _fenced
        self._fenced: Fenced | None = None
        self._term = 0
        self._journal = journal or RequestJournal()
        self._inherit = inherit
        self._waits: dict[object, CallWait] = {}
        self.unlinked_s: float | None = trio.current_time()  # since when there is no link; None: there is one
        self._calls = CallTable({"recall": self._serve_recall, "query": self._serve_query, "flush": self._serve_flush})

    # -- calls -----------------------------------------------------------------------------------

    async def call(self, name: str, args: dict[str, Any]) -> Any:
        """Ask the coordinator; waits while there is none.

        Raises  what the coordinator answers. Unavailable, TimedOut: not answered within io_timeout_s; the
                call may have been carried out. Fenced: this incarnation is over.
        Cancel  safe at any await; the call may have been carried out.
        """
        if name not in NUMBERED_CALLS:
            return await self._call(name, args, None)
        op, is_history = self._journal.number(name)
        try:
            value = await self._call(name, args, op)
        finally:
            self._journal.answered(op)
        return {**value, "history": True} if is_history and isinstance(value, dict) else value

    async def _call(self, name: str, args: dict[str, Any], op: int | None) -> Any:
        token = object()
        self._waits[token] = CallWait(name, args, trio.current_time())
        try:
            return await self._call_until_answered(name, args, op, token)
        finally:
            del self._waits[token]

    def waits(self) -> list[CallWait]:
        """Calls without an answer, for people who ask."""
        return list(self._waits.values())

    async def _call_until_answered(self, name: str, args: dict[str, Any], op: int | None, token: object) -> Any:
        retry_s = RETRY_S_MIN
        sent = 0
        error: CsvfsError = TimedOut(f"no coordinator for {name!r} within {self._io_timeout_s:g} s")
        began_s = trio.current_time()
        deadline = began_s + self._io_timeout_s
        # The deadline is told to whatever waits: a scope around all of it would cost every call some 20 us.
        while (left_s := deadline - trio.current_time()) > 0:
            link = self._link
            if link is None or link.closed is not None or self._fenced is not None:
                with trio.move_on_at(deadline) as scope:
                    link = await self._connected()
                if scope.cancelled_caught or link is None:
                    break
            if op is not None:
                args = {**args, "op": op, "op_done": self._journal.lowest}
            sent_ns = self._clock()
            sent += 1
            try:
                value = await link.call(name, args, timeout_s=left_s)
            except Fenced as fenced:
                self._fence(fenced)
                raise
            except Unavailable as failure:
                error = failure
                self._waits[token] = CallWait(name, args, began_s, str(failure))
                if isinstance(failure, Disconnected):
                    continue  # waiting for the next link is pause enough
                if isinstance(failure, NotCoordinator):
                    self._drop(link, failure)
                with trio.move_on_at(deadline):
                    await self._pause(retry_s)
                retry_s = min(2 * retry_s, RETRY_S_MAX)
                continue
            self._on_contact(sent_ns)
            return _without_leases(value) if op is not None and sent > 1 else value
        raise error

    async def _pause(self, seconds: float) -> None:
        """Until it makes sense to try again: at once when the owner changes."""
        with trio.move_on_after(seconds):
            await self._owner.wait_change(self._owner.address())

    async def wait_linked(self) -> None:
        """Until a coordinator knows us. Raises Fenced."""
        await self._connected()

    async def _connected(self) -> Link:
        while True:
            if self._fenced is not None:
                raise self._fenced
            if self._link is not None and self._link.closed is None:
                return self._link
            await self._changed.wait()

    # -- the link --------------------------------------------------------------------------------

    async def run_forever(self) -> None:
        """Keep a link to the coordinator. Ends by cancel, or after on_fenced."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ping_forever)
            retry_s = RETRY_S_MIN
            while True:
                address = self._owner.address()
                if address is None:
                    await self._owner.wait_change(None)
                    continue
                try:
                    lost = await self._open_there(address, nursery)
                except Fenced as fenced:
                    self._fence(fenced)
                    nursery.cancel_scope.cancel()
                    return
                except CsvfsError as error:
                    log.info("coordinator at %s: %s", address, error)
                    await self._pause(retry_s)
                    retry_s = min(2 * retry_s, RETRY_S_MAX)
                    continue
                retry_s = RETRY_S_MIN
                await self._until_lost_or_moved(lost, address)

    async def _open_there(self, address: Address, nursery: trio.Nursery) -> trio.Event:
        """As `_open`, as long as the coordinator is said to be there: a host that hangs may keep us waiting."""
        attempt, watching = trio.CancelScope(), trio.CancelScope()

        async def watch_owner() -> None:
            with watching:
                await self._owner.wait_change(address)
                attempt.cancel()

        nursery.start_soon(watch_owner)
        try:
            with attempt:
                return await self._open(address, nursery)
        finally:
            watching.cancel()
        raise NotCoordinator(f"the coordinator is no longer at {address}")

    async def _open(self, address: Address, nursery: trio.Nursery) -> trio.Event:
        """Connect, introduce ourselves, reclaim; returns what is set when the link is lost."""
        link = await self._connect(address)
        lost = trio.Event()
        link.on_close = lambda link, error: lost.set()
        link.on_frame = lambda link, frame: self._calls.handle(link, frame, nursery)
        try:
            sent_ns = self._clock()
            asked = {**self._hello_args, "inherit": self._inherit, "term": self._term}
            hello = await link.call("hello", asked, timeout_s=HELLO_TIMEOUT_S)
            if self._inherit and not hello.get("inherited"):
                raise NotInheritedError(f"the session of the mount before could not be taken over from {link.peer}")
            term = field(hello, "term", int)
            if term < self._term:
                raise NotCoordinator(f"{link.peer} coordinates term {term}, we know term {self._term}")
            is_adopted = self._inherit and hello.get("adopted") is True
            if is_adopted and self.holder is not None:
                self.holder.adopted(hello.get("lost_locks"))
            if term > self._term:
                await self._reclaim(link, is_adopted)
        except BaseException:
            link.close()
            raise
        self._term = term
        self.hello = hello
        self._inherit = False
        self._link = link
        self.unlinked_s = None
        self._tell_changed()
        self._on_contact(sent_ns)
        return lost

    async def _reclaim(self, link: Link, is_adopted: bool) -> None:
        """Tell a new coordinator, or one that had evicted us, what we hold, or what the process before us noted; give up
        what it refuses."""
        assert self.holder is not None
        claims = self.holder.claims()
        *more, segments = _batches(self.holder.claims_of_segments())
        for batch in more:
            await self._claim(link, {"leases": [], "last": False, "segments": batch}, is_adopted)
        for first in range(0, max(1, len(claims)), RECLAIM_BATCH):
            args = {
                "leases": claims[first : first + RECLAIM_BATCH],
                "last": first + RECLAIM_BATCH >= len(claims),
            }
            if segments and args["last"]:
                args["segments"] = segments
            await self._claim(link, args, is_adopted)

    async def _claim(self, link: Link, args: dict[str, Any], is_adopted: bool) -> None:
        assert self.holder is not None
        reply = await link.call("reclaim", args, timeout_s=HELLO_TIMEOUT_S)
        refused, lowered = field(reply, "refused", list), field({"lowered": []} | reply, "lowered", list)
        if without := reply.get("without_segments"):
            self.holder.without_segments(without)
        if lowered:
            self.holder.lowered(lowered)
        if refused:
            self.holder.refused(refused, are_open=is_adopted or bool(lowered))

    async def _until_lost_or_moved(self, lost: trio.Event, address: Address) -> None:
        async def watch_owner() -> None:
            # A coordinator that is gone without a word would keep its calls waiting until TCP gives it up.
            await self._owner.wait_change(address)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_owner)
            await lost.wait()
            nursery.cancel_scope.cancel()
        link, self._link = self._link, None
        self._note_unlinked()
        if link is not None:
            link.close(Disconnected(f"the coordinator is no longer at {link.peer}"))

    def _note_unlinked(self) -> None:
        if self.unlinked_s is None:
            self.unlinked_s = trio.current_time()

    def _drop(self, link: Link, error: CsvfsError) -> None:
        if self._link is link:
            self._link = None
            self._note_unlinked()
        link.close(Disconnected(str(error)))

    async def _ping_forever(self) -> None:
        """Keep contact; notice a coordinator that hangs."""
        while True:
            await trio.sleep(PING_INTERVAL_S)
            link = self._link
            if link is None:
                continue
            sent_ns = self._clock()
            try:
                open_files = 0 if self.holder is None else self.holder.open_files
                ping = {"ids": [], "open": open_files, **self._news()}
                await link.call("slabs", ping, timeout_s=PING_TIMEOUT_S)
            except Fenced as fenced:
                self._fence(fenced)
                self._drop(link, fenced)
                return
            except CsvfsError as error:
                if link.closed is None:
                    log.warning("coordinator at %s: %s", link.peer, error)
                    self._drop(link, error)
            else:
                self._on_contact(sent_ns)

    def _fence(self, fenced: Fenced) -> None:
        if self._fenced is None:
            self._fenced = fenced
            log.error("this mount was evicted and has to start anew: %s", fenced)
            self._on_fenced(fenced)
            self._tell_changed()

    def _tell_changed(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    # -- what the coordinator asks ---------------------------------------------------------------

    async def _serve_recall(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        assert self.holder is not None
        if "segment" in args:
            return await self.holder.recall_segment(field(args, "ino", int), field(args, "segment", int), field(args, "kind", int))
        return await self.holder.recall(
            field(args, "ino", int), field(args, "kind", int), bool(args.get("attr"))
        )

    async def _serve_flush(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        assert self.holder is not None
        await self.holder.flush_segments(field(args, "ino", int))
        return {}

    def _serve_query(self, link: Link, args: dict[str, Any]) -> dict[str, Any] | None:
        assert self.holder is not None
        return self.holder.query(field(args, "ino", int))


def _batches(claims: list[list[Any]]) -> list[list[list[Any]]]:
    """Claims of segments, as many runs of them as one call may have; at least one batch."""
    batches: list[list[list[Any]]] = [[]]
    left = RUNS_BATCH
    for ino, mtime_ns, runs in claims:
        parts = [runs[at : at + RUNS_BATCH] for at in range(0, max(1, len(runs)), RUNS_BATCH)]
        for part in parts:
            size = max(1, len(part))
            if size > left:
                batches.append([])
                left = RUNS_BATCH
            batches[-1].append([ino, mtime_ns, part])
            left -= size
    return batches


def _without_leases(value: Any) -> Any:
    """Q1."""
    if isinstance(value, dict):
        return {**value, **{key: 0 for key in _LEASES_IN_REPLIES if key in value}}
    return value
