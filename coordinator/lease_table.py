"""Lease table: which session may cache or write which inode, and who waits for it.

Place      coordinator floor. Pure: no I/O, clock or trio. Requests in; recalls to send and tickets granted
           out.
Writer     the service's one thread.

A **ticket** is a request for one or more inodes at once, each with a Need. It is granted for all of them or
for none, so a ticket never holds one inode while it waits for another. Granted, it keeps others off until
`finish`: between the recall of other nodes' caches and the change itself nobody can cache the old state
again.

Invariants
  T1  A write lease excludes read and write leases of other sessions.
  T2  A session is given nothing on an inode while a recall of it is unanswered: its answer says what it
      holds.
  T3  Of two tickets of different sessions that exclude each other, the elder is granted first; the eldest
      waiting ticket waits only for answers to recalls (which have a deadline) and for granted tickets (which
      finish).
  T4  The table may believe that a session holds more than it does, never less.

A **serial** marks when a session's lease was granted, last recalled, or last spoken for in an answer. A reply is computed at one moment and
leaves later, when its log is durable; it carries the lease only if the serial is still the same (see
`lease_at_send`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice
from types import MappingProxyType

from csvfs.errors import Unavailable
from csvfs.ids import Incarnation, InodeNo, NodeName

NONE, OPEN, READ, WRITE = range(4)

SessionKey = tuple[NodeName, Incarnation]

# Holds the write lease of files that several nodes write at once (shared_write.py). No node has such a name.
SHARERS: SessionKey = (NodeName("nodes that share it"), Incarnation(0))

TICKETS_MAX = 65_536  # requests waiting or being carried out; more are refused
LEASES_PER_SESSION_MAX = 262_144  # about 150 MB of table per session; the longest held are recalled beyond it


class Need(Enum):
    """What a request needs of the other sessions."""

    OPEN = auto()  # nothing; the session is noted as having the file open
    READ = auto()  # nobody else writes; the session gets a read lease
    WRITE = auto()  # nobody else reads or writes; the session gets the write lease
    ENTRIES = auto()  # nobody else caches anything of the inode; the session's own lease stays
    ATTRIBUTES = auto()  # nobody else caches its attributes; all leases stay


_GIVES = {Need.OPEN: OPEN, Need.READ: READ, Need.WRITE: WRITE, Need.ENTRIES: NONE, Need.ATTRIBUTES: NONE}


@dataclass(slots=True, frozen=True)
class Recall:
    """Ask `session` to lower its lease on `ino` to `to_kind` and, with `attr`, to forget its attributes."""

    session: SessionKey
    ino: InodeNo
    to_kind: int
    attr: bool


@dataclass(slots=True, eq=False)
class Ticket:
    session: SessionKey
    needs: Mapping[InodeNo, Need]
    granted: bool = False
    finished: bool = False
    asked: set[tuple[InodeNo, SessionKey]] = field(default_factory=set)  # to forget attributes


@dataclass(slots=True, frozen=True)
class Grant:
    ticket: Ticket


Action = Recall | Grant


@dataclass(slots=True)
class _Held:
    kind: int
    serial: int
    write_grant: int = 0  # of the last time it became a write lease


_NO_RECALLS: Mapping[SessionKey, Recall] = MappingProxyType({})


@dataclass(slots=True)
class _Inode:
    """All but `holders` are replaced and not changed: most of them are empty, and take nothing."""

    holders: dict[SessionKey, _Held] = field(default_factory=dict)
    recalls: Mapping[SessionKey, Recall] = field(default_factory=lambda: _NO_RECALLS)
    opened: frozenset[SessionKey] = frozenset()  # got OPEN while a recall was unanswered
    tickets: tuple[Ticket, ...] = ()  # eldest first, granted and waiting

    def no_recall(self, session: SessionKey) -> None:
        if session in self.recalls:
            self.recalls = {key: recall for key, recall in self.recalls.items() if key != session} or _NO_RECALLS

    def no_open(self, session: SessionKey) -> None:
        if session in self.opened:
            self.opened -= {session}


class LeaseTable:
    """All leases of one volume. Methods return what to do next, in order."""

    def __init__(self) -> None:
        self._inodes: dict[InodeNo, _Inode] = {}
        self._sessions: dict[SessionKey, dict[InodeNo, None]] = {}  # inodes held, the longest held first
        self._serial = 0
        self._write_grants = 0
        self._ticket_count = 0
        self.on_write: Callable[[SessionKey, InodeNo], None] = lambda session, ino: None  # got the write lease

    # -- requests --------------------------------------------------------------------------------

    def begin(self, session: SessionKey, needs: Mapping[InodeNo, Need]) -> tuple[Ticket, list[Action]]:
        """Ask for `needs`. The ticket may be granted at once; else a Grant follows from a later call.

        Raises  Unavailable: too many requests wait.
        """
        if self._ticket_count >= TICKETS_MAX:
            raise Unavailable(f"{TICKETS_MAX} requests wait for leases of this volume; try again")
        ticket = Ticket(session, needs)
        self._ticket_count += 1
        for ino in needs:
            inode = self._inode(ino)
            inode.tickets = (*inode.tickets, ticket)
        actions: list[Action] = []
        self._try_grant(ticket, actions, announce=False)
        return ticket, actions

    def finish(self, ticket: Ticket) -> list[Action]:
        """The request was carried out, or its caller gave up waiting. Twice does no harm."""
        if ticket.finished:
            return []
        ticket.finished = True
        self._ticket_count -= 1
        for ino in ticket.needs:
            inode = self._inodes[ino]
            inode.tickets = tuple(other for other in inode.tickets if other is not ticket)
        actions: list[Action] = []
        for ino in ticket.needs:
            self._pump(ino, actions)
        return actions

    def try_read(self, session: SessionKey, ino: InodeNo) -> int | None:
        """A read lease at once, if nobody has to be asked and nobody waits for the inode; its serial or
        None."""
        inode = self._inode(ino)
        if (
            session in inode.recalls
            or any(
                ticket.session != session and _exclude(Need.READ, ticket.needs[ino])
                for ticket in inode.tickets
            )
            or any(held.kind == WRITE and other != session for other, held in inode.holders.items())
        ):
            return None
        return self._raise_to(session, ino, inode, READ).serial

    def reclaim(self, session: SessionKey, ino: InodeNo, kind: int) -> bool:
        """After a takeover: a session says what it holds. False: another session's claim excludes it."""
        inode = self._inode(ino)
        others = max((held.kind for other, held in inode.holders.items() if other != session), default=NONE)
        if (kind == WRITE and others >= READ) or (kind == READ and others == WRITE):
            return False
        if kind > NONE:
            self._raise_to(session, ino, inode, kind)
        return True

    # -- what sessions give back -----------------------------------------------------------------

    def answer(self, session: SessionKey, ino: InodeNo, kept: int) -> list[Action]:
        """A recall was answered: the session holds at most `kept`. An answer to no recall changes nothing."""
        inode = self._inodes.get(ino)
        if inode is None or session not in inode.recalls:
            return []
        recall = inode.recalls[session]
        inode.no_recall(session)
        if recall.attr:
            kept = recall.to_kind  # T4: only attributes were asked for
        elif recall.to_kind == READ:
            kept = min(kept, READ)
        else:
            kept = min(kept, OPEN)
        if session in inode.opened:  # the answer may be older than the open
            inode.no_open(session)
            kept = max(kept, OPEN)
        self._lower_to(session, ino, inode, kept)
        if session in inode.holders:
            # A reply computed while the recall was unanswered may know less than what the recall was for.
            self._serial += 1
            inode.holders[session].serial = self._serial
        actions: list[Action] = []
        self._pump(ino, actions)
        return actions

    def release(self, session: SessionKey, ino: InodeNo, kind: int) -> list[Action]:
        """The session lowers its lease to `kind` by itself. A recall under way still awaits its answer."""
        inode = self._inodes.get(ino)
        if inode is None or session not in inode.holders:
            return []
        inode.no_open(session)
        self._lower_to(session, ino, inode, kind)
        actions: list[Action] = []
        self._pump(ino, actions)
        return actions

    def end_session(self, session: SessionKey) -> tuple[list[InodeNo], list[Action]]:
        """The session is gone and fenced: its leases pass on. Returns the inodes that it held, and
        actions."""
        held = list(self._sessions.pop(session, ()))
        touched = set(held)
        for ino, inode in self._inodes.items():
            if session in inode.recalls or any(ticket.session == session for ticket in inode.tickets):
                touched.add(ino)
        for ino in touched:
            inode = self._inodes[ino]
            inode.holders.pop(session, None)
            inode.no_recall(session)
            inode.no_open(session)
        actions: list[Action] = []
        tickets = dict.fromkeys(ticket for ino in touched for ticket in self._inodes[ino].tickets)
        waiting = [ticket for ticket in tickets if ticket.session == session and not ticket.granted]
        for ticket in waiting:
            actions.extend(self.finish(ticket))
        for ino in touched:
            self._pump(ino, actions)
        return held, actions

    def rename(self, old: SessionKey, new: SessionKey) -> list[Action]:
        """Another process goes on with a session: leases and unanswered recalls are its own from now on, without a
        gap in which somebody else could have got one. What the earlier process waits for is given up."""
        self._sessions[new] = self._sessions.pop(old, {})
        waiting: dict[Ticket, None] = {}
        for inode in self._inodes.values():
            if old in inode.holders:
                inode.holders[new] = inode.holders.pop(old)
            if old in inode.recalls:
                recall = inode.recalls[old]
                inode.no_recall(old)
                inode.recalls = {**inode.recalls, new: Recall(new, recall.ino, recall.to_kind, recall.attr)}
            if old in inode.opened:
                inode.opened = inode.opened - {old} | {new}
            for ticket in inode.tickets:
                ticket.asked = {(ino, new if asked == old else asked) for ino, asked in ticket.asked}
                if ticket.session == old:
                    ticket.session = new
                    if not ticket.granted:
                        waiting[ticket] = None
        return [action for ticket in waiting for action in self.finish(ticket)]

    def trim(self) -> list[Action]:
        """Recall the longest-held leases of sessions that hold too many. To be called now and then."""
        actions: list[Action] = []
        for session, inos in self._sessions.items():
            for ino in _first(inos, len(inos) - LEASES_PER_SESSION_MAX):
                inos[ino] = inos.pop(ino)  # to the end: if it is open there, it stays
                inode = self._inodes[ino]
                idle = not inode.tickets and session not in inode.recalls
                if idle and inode.holders[session].kind >= READ:
                    self._send(Recall(session, ino, NONE, False), inode, actions)
        return actions

    # -- questions -------------------------------------------------------------------------------

    def held(self, session: SessionKey, ino: InodeNo) -> int:
        inode = self._inodes.get(ino)
        held = inode.holders.get(session) if inode is not None else None
        return held.kind if held is not None else NONE

    def serial(self, session: SessionKey, ino: InodeNo) -> int:
        """Of the session's lease on `ino`; 0: none."""
        inode = self._inodes.get(ino)
        held = inode.holders.get(session) if inode is not None else None
        return held.serial if held is not None else 0

    def write_grant(self, session: SessionKey, ino: InodeNo) -> int:
        """A number for the time since which the session has the write lease on `ino` without a break; 0: it has
        none. A change that was asked for under another one is nobody's wish any more."""
        inode = self._inodes.get(ino)
        held = inode.holders.get(session) if inode is not None else None
        return held.write_grant if held is not None and held.kind == WRITE else 0

    def lease_at_send(self, session: SessionKey, ino: InodeNo, serial: int | None) -> int:
        """The lease that a reply computed under `serial` may carry now; NONE when it was recalled since.

        T2: while a recall is unanswered, its answer says what is held: a lease that left behind the recall would
        be believed after the answer has given it up.
        """
        inode = self._inodes.get(ino)
        held = inode.holders.get(session) if inode is not None and serial else None
        if inode is None or held is None or held.serial != serial:
            return NONE
        if session in inode.recalls:
            return OPEN if session in inode.opened else NONE
        return held.kind

    def writer(self, ino: InodeNo) -> SessionKey | None:
        """Who holds the write lease, whose size and times are the true ones."""
        inode = self._inodes.get(ino)
        if inode is not None:
            for session, held in inode.holders.items():
                if held.kind == WRITE:
                    return session
        return None

    def contends(self, session: SessionKey, ino: InodeNo, kind: int) -> bool:
        """Whether a lease of READ or more on `ino` has to come from another session, or one waits for it that excludes it."""
        inode = self._inodes.get(ino)
        if inode is None:
            return False
        need, least = (Need.WRITE, READ) if kind == WRITE else (Need.READ, WRITE)
        return any(held.kind >= least for other, held in inode.holders.items() if other != session) or any(
            _exclude(need, ticket.needs[ino]) for ticket in inode.tickets if ticket.session != session
        )

    def readers(self, ino: InodeNo) -> list[SessionKey]:
        """Those who hold READ."""
        inode = self._inodes.get(ino)
        return [] if inode is None else [session for session, held in inode.holders.items() if held.kind == READ]

    def highest(self, ino: InodeNo) -> int:
        """The highest lease that any session holds on `ino`, or may be about to hold."""
        inode = self._inodes.get(ino)
        if inode is None:
            return NONE
        given = (_GIVES[ticket.needs[ino]] for ticket in inode.tickets)
        return max((*(held.kind for held in inode.holders.values()), *given), default=NONE)

    def held_by(self, session: SessionKey) -> list[InodeNo]:
        """All inodes on which the session holds anything."""
        return list(self._sessions.get(session, ()))

    def is_held(self, ino: InodeNo) -> bool:
        """Whether any session has the inode open or cached, or is about to."""
        inode = self._inodes.get(ino)
        return inode is not None and bool(inode.holders or inode.recalls or inode.tickets)

    def recalls_of(self, session: SessionKey) -> list[Recall]:
        """Recalls that the session has not answered: they are sent again when it connects again."""
        return [inode.recalls[session] for inode in self._inodes.values() if session in inode.recalls]

    def lease_counts(self) -> dict[SessionKey, int]:
        return {session: len(inos) for session, inos in self._sessions.items()}

    def _inode(self, ino: InodeNo) -> _Inode:
        inode = self._inodes.get(ino)
        if inode is None:
            inode = self._inodes[ino] = _Inode()
        return inode

    # -- the machine -----------------------------------------------------------------------------

    def _try_grant(self, ticket: Ticket, actions: list[Action], *, announce: bool = True) -> None:
        """Grant `ticket` if nothing stands in its way; else recall what does, wherever it is first in
        line."""
        free = True
        for ino, need in ticket.needs.items():
            inode = self._inodes[ino]
            if _is_behind(ticket, ino, inode):
                free = False
                continue
            if _GIVES[need] >= READ and ticket.session in inode.recalls:
                free = False  # T2
            if self._recall_others(ticket, ino, need, inode, actions):
                free = False
        if not free:
            return
        ticket.granted = True
        for ino, need in ticket.needs.items():
            inode = self._inodes[ino]
            kind = _GIVES[need]
            if kind > NONE:
                if ticket.session in inode.recalls:
                    inode.opened |= {ticket.session}
                self._raise_to(ticket.session, ino, inode, kind)
        if announce:
            actions.append(Grant(ticket))

    def _recall_others(
        self, ticket: Ticket, ino: InodeNo, need: Need, inode: _Inode, actions: list[Action]
    ) -> bool:
        """Send the recalls that `need` requires; whether an answer is still missing."""
        waiting = False
        for other, held in inode.holders.items():
            if other == ticket.session or held.kind < READ:
                continue
            if need is Need.OPEN or (need is Need.READ and held.kind != WRITE):
                continue
            if need is Need.ATTRIBUTES and (ino, other) in ticket.asked and other not in inode.recalls:
                continue
            waiting = True
            if other in inode.recalls:
                continue  # Its answer comes first; what is then still in the way is recalled again.
            if need is Need.ATTRIBUTES:
                ticket.asked.add((ino, other))
                recall = Recall(other, ino, held.kind, True)
            else:
                recall = Recall(other, ino, READ if need is Need.READ else NONE, False)
            self._send(recall, inode, actions)
        return waiting

    def _send(self, recall: Recall, inode: _Inode, actions: list[Action]) -> None:
        inode.recalls = {**inode.recalls, recall.session: recall}
        self._serial += 1
        inode.holders[recall.session].serial = self._serial
        actions.append(recall)

    def _pump(self, ino: InodeNo, actions: list[Action]) -> None:
        inode = self._inodes.get(ino)
        if inode is None:
            return
        for ticket in inode.tickets:
            if not (ticket.granted or ticket.finished):
                self._try_grant(ticket, actions)
        if not (inode.holders or inode.recalls or inode.tickets):
            del self._inodes[ino]

    def _raise_to(self, session: SessionKey, ino: InodeNo, inode: _Inode, kind: int) -> _Held:
        held = inode.holders.get(session)
        if held is None:
            self._serial += 1
            held = inode.holders[session] = _Held(kind, self._serial)
            self._sessions.setdefault(session, {})[ino] = None
        elif held.kind < kind:
            if held.kind < READ:
                self._serial += 1
                held.serial = self._serial
            held.kind = kind
        else:
            return held
        if kind == WRITE:
            self._write_grants += 1
            held.write_grant = self._write_grants
            self.on_write(session, ino)
        return held

    def _lower_to(self, session: SessionKey, ino: InodeNo, inode: _Inode, kind: int) -> None:
        held = inode.holders.get(session)
        if held is None:
            return
        if kind <= NONE:
            del inode.holders[session]
            del self._sessions[session][ino]
        elif kind < held.kind:
            held.kind = kind
            self._serial += 1
            held.serial = self._serial


def _exclude(first: Need, second: Need) -> bool:
    """Whether tickets of two sessions for one inode cannot be granted at the same time."""
    return Need.OPEN not in (first, second) and not (first is Need.READ and second is Need.READ)


def _is_behind(ticket: Ticket, ino: InodeNo, inode: _Inode) -> bool:
    """Whether an elder or a granted ticket of another session keeps this one off `ino` (T3)."""
    is_elder = True
    for other in inode.tickets:
        if other is ticket:
            is_elder = False
        elif (
            (is_elder or other.granted)
            and other.session != ticket.session
            and _exclude(ticket.needs[ino], other.needs[ino])
        ):
            return True
    return False


def _first(items: Iterable[InodeNo], count: int) -> list[InodeNo]:
    return list(islice(items, max(0, count)))
