"""Leases in action: sends recalls, waits for their answers, evicts those who do not give any.

Place      coordinator floor; the trio shell around lease_table.py, below operations.py and service.py.
Tasks      one per recall under way, in the service's nursery.
Limits     a recall is answered within `recall_timeout_s`, or its session is evicted; so a request for a lease
           waits at most for as many recalls as there are elder requests.
Busy       A mount whose reads or writes wait for a slab cannot empty the kernel's cache, which has pages of theirs
           locked. As long as it says so (once a second), it has more time, up to BUSY_S_MAX: it is healthy, its
           programs get an answer or an error after its io_timeout, and whoever asks would wait for the slab as well.
Absent     A mount that has lost its connection though its node is alive has probably died, and the next process of it is on
           its way (session_desk.py, "inherit"): it has ABSENT_TIMES_MAX times as long. That one is asked anew, and has
           all the time that is due.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from itertools import islice
from typing import Any

import trio

from coordinator.lease_table import (
    NONE,
    READ,
    SHARERS,
    WRITE,
    Action,
    Grant,
    LeaseTable,
    Need,
    Recall,
    SessionKey,
    Ticket,
)
from coordinator.sessions import Session, Sessions
from csvfs.errors import CsvfsError, Disconnected, Fenced, TimedOut
from csvfs.ids import InodeNo, NodeName

log = logging.getLogger(__name__)

WAIT_S_MAX = 60.0  # for a lease; recalls are shorter, so only a long queue of them takes this long
QUERY_TIMEOUT_S = 1.0
TRIM_INTERVAL_S = 1.0
ABSENT_TIMES_MAX = 3  # recall_timeout
OUTDATED_MAX = 16_384  # more are not told
OUTDATED_AT_ONCE = 64
BUSY_S_MAX = 120.0  # for one recall; the io_timeout is 60 s unless somebody has changed it

# A request that waits, since when, for which recalls, and until when each of these.
Waiting = tuple[Ticket, float, list[tuple[Recall, float]]]


class Leases:
    """The lease table, and the calls it makes necessary.

    report   what a writer told when it gave its lease back: (ino, size or 0, mtime_ns or None, atime_ns or None);
             it is in the metadata when the call returns
    accessed  as report, of an access time alone: on its way to the metadata, ahead of what is submitted next
    evict    ends a session that does not answer: returns when it is fenced and its leases have passed on
    lowered  an inode is held by fewer now: `open` leases of deleted files, space granted ahead
    """

    def __init__(
        self,
        sessions: Sessions,
        *,
        recall_timeout_s: float,
        report: Callable[[InodeNo, int, int | None, int | None], Awaitable[None]],
        accessed: Callable[[InodeNo, int], None],
        evict: Callable[[Session, str], Awaitable[None]],
        lowered: Callable[[InodeNo], None],
        is_alive: Callable[[NodeName], bool],
    ) -> None:
        """is_alive: whether a node's lease holds."""
        self.table = LeaseTable()
        self._sessions = sessions
        self._recall_timeout_s = recall_timeout_s
        self._report = report
        self._accessed = accessed
        self._evict = evict
        self._lowered = lowered
        self._is_alive = is_alive
        self._granted: dict[Ticket, trio.Event] = {}
        self._since_s: dict[Ticket, float] = {}  # of those in _granted
        self._under_way: dict[Recall, float] = {}  # until when an answer is waited for
        self._outdated: dict[tuple[SessionKey, InodeNo], None] = {}
        self._outdated_due = trio.Event()
        self._nursery: trio.Nursery | None = None
        self.trim_segments: Callable[[], None] = lambda: None
        self.waiting_for_segments: Callable[[int], list[Waiting]] = lambda count_max: []
        self.end_shared: Callable[[InodeNo], Awaitable[None]] | None = None  # see shared_write.py
        self._recalls, self._recalls_due = trio.open_memory_channel[Recall](float("inf"))

    # -- requests --------------------------------------------------------------------------------

    def begin(self, session: Session, needs: Mapping[InodeNo, Need]) -> Ticket:
        """A ticket, maybe granted; else `wait` for it. The caller finishes it.

        Raises  Fenced: the session was evicted. Unavailable: too many requests wait.
        """
        if session.ended:
            raise Fenced(f"{session.writer} incarnation {session.incarnation} was evicted")
        ticket, actions = self.table.begin(session.key, needs)
        if not ticket.granted:
            self._granted[ticket] = trio.Event()
            self._since_s[ticket] = trio.current_time()
        self.perform(actions)
        return ticket

    async def wait(self, session: Session, ticket: Ticket) -> None:
        """Until the ticket of `begin` is granted. When this raises, it is finished.

        Raises  TimedOut, Fenced: the session was evicted meanwhile. Cancel safe.
        """
        event = self._granted.get(ticket)
        if event is None:
            return
        try:
            with trio.move_on_after(WAIT_S_MAX):
                await event.wait()
        except BaseException:
            self.finish(ticket)
            raise
        if ticket.granted and not session.ended:
            self._granted.pop(ticket, None)
            self._since_s.pop(ticket, None)
            return
        self.finish(ticket)
        if session.ended:
            raise Fenced(f"{session.writer} incarnation {session.incarnation} was evicted")
        inodes = sorted(ticket.needs)
        raise TimedOut(f"leases on inodes {inodes} were not given back within {WAIT_S_MAX:g} s; try again")

    async def take(self, session: Session, needs: Mapping[InodeNo, Need]) -> Ticket:
        """A granted ticket; the caller finishes it. Raises as `begin` and `wait`. Cancel safe."""
        ticket = self.begin(session, needs)
        await self.wait(session, ticket)
        return ticket

    def finish(self, ticket: Ticket) -> None:
        self._granted.pop(ticket, None)
        self._since_s.pop(ticket, None)
        self.perform(self.table.finish(ticket))

    def waiting(self, count_max: int) -> list[Waiting]:
        """Requests that wait, the eldest first: since when, for which recalls, and until when each of these."""
        recalls: dict[InodeNo, list[tuple[Recall, float]]] = {}
        for recall, until_s in self._under_way.items():
            recalls.setdefault(recall.ino, []).append((recall, until_s))
        waiting = (item for item in self._since_s.items() if not item[0].granted)
        found = [
            (ticket, since_s, [row for ino in ticket.needs for row in recalls.get(ino, ())])
            for ticket, since_s in islice(waiting, count_max)
        ]
        return [*found, *self.waiting_for_segments(count_max - len(found))]

    def release(self, session: Session, ino: InodeNo, kind: int) -> None:
        self.release_of(session.key, ino, kind)

    def release_of(self, key: SessionKey, ino: InodeNo, kind: int) -> None:
        self.perform(self.table.release(key, ino, kind))
        self._lowered(ino)

    def rename(self, old: SessionKey, new: SessionKey) -> None:
        """Another process goes on with the session `old`, whose calls are refused. Its recalls without an answer are
        sent again."""
        self.perform(self.table.rename(old, new))
        self.perform(list(self.table.recalls_of(new)))

    def interrupt(self, key: SessionKey) -> None:
        """What waits for a lease of the session, which has ended or pauses, looks up: it hears Fenced."""
        for ticket, event in list(self._granted.items()):
            if ticket.session == key:
                event.set()

    def end_session(self, key: SessionKey) -> None:
        """It is fenced on every drive, and its writes are equal everywhere: its leases pass on."""
        held, actions = self.table.end_session(key)
        self.interrupt(key)
        self.perform(actions)
        for ino in held:
            self._lowered(ino)

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Grant):
                event = self._granted.get(action.ticket)
                if event is not None:
                    event.set()
            else:
                self._send(action)

    def _send(self, recall: Recall) -> None:
        self._recalls.send_nowait(recall)

    # -- recalls ---------------------------------------------------------------------------------

    async def run_forever(self) -> None:
        """Send recalls until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._trim_forever)
            nursery.start_soon(self._tell_outdated_forever)
            try:
                async for recall in self._recalls_due:
                    self._under_way[recall] = trio.current_time() + self._recall_timeout_s
                    nursery.start_soon(self._recall_noted, recall)
            finally:
                self._nursery = None

    def start(self, function: Callable[[Recall], Awaitable[None]], recall: Recall) -> None:
        """A task, as long as `run_forever` runs."""
        if self._nursery is not None:
            self._nursery.start_soon(function, recall)

    async def _trim_forever(self) -> None:
        while True:
            await trio.sleep(TRIM_INTERVAL_S)
            self.trim()

    def trim(self) -> None:
        """Have sessions give back the longest held of very many leases."""
        self.perform(self.table.trim())
        self.trim_segments()

    async def _recall_noted(self, recall: Recall) -> None:
        try:
            if recall.session == SHARERS and self.end_shared is not None:
                await self.end_shared(recall.ino)
                self.perform(self.table.answer(SHARERS, recall.ino, NONE))
                self.release_of(SHARERS, recall.ino, NONE)
            else:
                await self._recall(recall)
        finally:
            self._under_way.pop(recall, None)

    async def _recall(self, recall: Recall) -> None:
        session = self._sessions.get(recall.session)
        if session is None or session.ended:
            return  # end_session answers for it
        answer: dict[str, Any] | None = None
        reason = "it did not answer"
        args = self._call_of(recall)
        began_s = trio.current_time()
        deadline = began_s + self._recall_timeout_s
        while answer is None and not session.ended and session.key == recall.session:
            if (now_s := trio.current_time()) >= deadline:
                why = self._waits_longer(session, now_s, began_s)
                if not why:
                    break
                deadline = self._under_way[recall] = now_s + self._recall_timeout_s
                log.warning("%s %s, and is waited for with %s", session.writer, why, self._name_of(recall))
            try:
                # Of a recall that is under way already the mount makes no second one.
                answer = await session.call("recall", args, timeout_s=deadline - trio.current_time())
            except TimedOut as error:
                reason = str(error)
            except Disconnected as error:
                reason = str(error)
                with trio.move_on_at(deadline):
                    await session.connected.wait()  # by another link: the recall is sent again
            except CsvfsError as error:
                reason = str(error)
                break
        if session.ended or session.key != recall.session:
            return  # the next process of the mount is asked anew (rename)
        if answer is None:
            log.warning(
                "%s did not give back %s within %g s (%s): it is evicted",
                session.writer, self._name_of(recall), self._recall_timeout_s, reason,
            )  # fmt: skip
            await self._evict(session, f"it did not give back its lease on {self._name_of(recall)}: {reason}")
            return
        await self._take_answer(session, recall, answer)

    def _name_of(self, recall: Recall) -> str:
        return f"inode {recall.ino}"

    def _call_of(self, recall: Recall) -> dict[str, Any]:
        return {"ino": recall.ino, "kind": recall.to_kind, "attr": recall.attr}

    def _waits_longer(self, session: Session, now_s: float, began_s: float) -> str:
        """Why a session that has not answered in time is not evicted yet; empty: it is."""
        if session.is_busy(now_s):
            return "waits for a slab" if now_s < began_s + BUSY_S_MAX else ""
        if session.link is None and self._is_alive(session.node):
            ends_s = began_s + ABSENT_TIMES_MAX * self._recall_timeout_s
            return "has lost its connection on a node that is alive" if now_s < ends_s else ""
        return ""

    async def _take_answer(self, session: Session, recall: Recall, answer: Any) -> None:
        fields = answer if isinstance(answer, dict) else {}
        kind = fields.get("kind")
        kind = kind if isinstance(kind, int) and NONE <= kind <= WRITE else recall.to_kind
        mtime_ns, atime_ns = int_of(fields, "mtime_ns"), int_of(fields, "atime_ns")
        held = self.table.held(session.key, recall.ino)
        if atime_ns and held >= READ:
            self._accessed(recall.ino, atime_ns)  # not worth waiting for
        if mtime_ns and held == WRITE:
            # Before the lease passes on: whoever gets it must see the times of what was written under it. Sizes are
            # committed already, each before its write was answered; and the one that is told here may be that of
            # before a truncation which has been carried out meanwhile.
            await self._report(recall.ino, 0, mtime_ns, None)
            if session.ended:
                return
        self.perform(self.table.answer(session.key, recall.ino, kind))
        self._lowered(recall.ino)

    # -- attributes of before --------------------------------------------------------------------

    def outdated(self, session: SessionKey, ino: InodeNo) -> None:
        """An access time was changed by `session`: who else caches attributes of the inode is to ask anew. Nobody waits for
        it, and nobody is evicted for not answering: that is not worth it."""
        for other in self.table.readers(ino):
            if other != session and len(self._outdated) < OUTDATED_MAX:
                self._outdated[other, ino] = None
                self._outdated_due.set()

    async def _tell_outdated_forever(self) -> None:
        while True:
            await self._outdated_due.wait()
            self._outdated_due = trio.Event()
            while self._outdated:
                batch = list(self._outdated)[:OUTDATED_AT_ONCE]
                async with trio.open_nursery() as nursery:
                    for key, ino in batch:
                        del self._outdated[key, ino]
                        nursery.start_soon(self._tell_outdated, key, ino)

    async def _tell_outdated(self, key: SessionKey, ino: InodeNo) -> None:
        session = self._sessions.get(key)
        if session is None or session.ended or self.table.held(key, ino) != READ:
            return
        try:
            answer = await session.call("recall", {"ino": ino, "kind": WRITE, "attr": True}, timeout_s=QUERY_TIMEOUT_S)
        except CsvfsError as error:
            log.info("%s was told that inode %d was read: %s", session.writer, ino, error)
            return
        fields = answer if isinstance(answer, dict) else {}
        atime_ns, mtime_ns = int_of(fields, "atime_ns"), int_of(fields, "mtime_ns")
        if atime_ns and self.table.held(key, ino) >= READ:
            self._accessed(ino, atime_ns)
        if mtime_ns and self.table.held(key, ino) == WRITE:  # it has got that lease meanwhile
            await self._report(ino, 0, mtime_ns, None)

    # -- questions -------------------------------------------------------------------------------

    def other_writer(self, session: Session | None, ino: InodeNo) -> Session | None:
        """Who else holds the write lease, and so knows size and times best."""
        writer = self.table.writer(ino)
        if writer is None or (session is not None and writer == session.key):
            return None
        return self._sessions.get(writer)

    async def query(self, writer: Session, ino: InodeNo) -> dict[str, Any] | None:
        """Size and times as the writer knows them; None: it holds nothing any more, or does not say.

        Without an answer what the metadata says is good: sizes are committed before a write is acknowledged.
        """
        try:
            answer = await writer.call("query", {"ino": ino}, timeout_s=QUERY_TIMEOUT_S)
        except CsvfsError as error:
            log.info("%s was asked about inode %d: %s", writer.writer, ino, error)
            return None
        return answer if isinstance(answer, dict) else None

    def holds_data(self, ino: InodeNo) -> bool:
        """Whether anybody may have the layout of a file in memory."""
        return self.table.highest(ino) >= READ


def int_of(fields: dict[str, Any], name: str) -> int | None:
    value = fields.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
