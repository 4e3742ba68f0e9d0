"""Sessions: the mounts that this coordinator serves, one incarnation of one node's mount each.

Place      coordinator floor; above csvfs/net and metadata.py, below leases.py and service.py.
Owns       which link speaks for which session. What must outlive this process (the sessions themselves, their
           last replies) is in the metadata database.

Invariants
  I11  A change that carries `op` is executed once per session: its reply is stored in the same transaction,
       and found by whoever sends it again, to this coordinator or the next.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from coordinator.departures import Departed
from coordinator.lease_table import SessionKey
from csvfs.errors import CsvfsError, Disconnected, Fenced, NotFound
from csvfs.ids import Incarnation, InodeNo, NodeName
from csvfs.wire.control import pack_value, unpack_value

BUSY_S = 3.0  # it says so once a second


class SessionLink(Protocol):
    """Of Link: what a session needs."""

    owner: Any

    @property
    def closed(self) -> CsvfsError | None: ...
    def call(self, name: str, args: dict[str, Any], *, timeout_s: float) -> Any: ...
    def close(self, error: CsvfsError | None = None) -> None: ...


class ReplyStore(Protocol):
    """Of Metadata: the stored replies."""

    def reply_of(self, session: int, op: int) -> bytes | None: ...
    def store_reply(self, session: int, op: int, reply: bytes) -> None: ...
    def op_done(self, session: int, op: int) -> None: ...


@dataclass(slots=True, eq=False)
class Session:
    """`id`: in the database. `reclaimed`: it has said all that it holds. `ended`: evicted or being
    evicted, or for the moment in which the next process of its mount takes it over. `leaving`: it ends by its own wish,
    and does nothing any more."""

    id: int
    key: SessionKey
    link: SessionLink | None = None
    reclaimed: bool = False
    claiming_s: float = 0.0  # when it said last what it holds, in parts
    ended: bool = False
    leaving: bool = False
    changing: bool = False  # the next process is about to go on with it; `ended` meanwhile
    inherited: list[int] | None = None  # from a process that died: slabs it may have written to without a flush
    open_files: int | None = None  # as its mount said last, once a second; None: it has not said yet
    busy_until: float = 0.0  # I/O of it waits for a slab, as it said last
    mode: str = ""  # how its I/O goes (csvfs/mount/waits.py), as it said last; empty: not yet
    why: str = ""
    final: bool = False  # nobody will go on for it when it has ended
    departed: Departed | None = None  # what it goes on for, until it has said what it holds
    refused: set[InodeNo] = field(default_factory=set)  # of its claims then: others may have written to these
    last_answer: float = field(default_factory=trio.current_time)  # when it was last told anything
    unreachable_since: float = field(default_factory=trio.current_time)  # meaningful while there is no link
    connected: trio.Event = field(default_factory=trio.Event)  # set while there is a link

    @property
    def node(self) -> NodeName:
        return self.key[0]

    @property
    def incarnation(self) -> Incarnation:
        return self.key[1]

    def is_busy(self, now_s: float) -> bool:
        """Whether its I/O waits for a slab, as it said a moment ago: then it cannot answer recalls, and is in contact."""
        return self.link is not None and now_s < self.busy_until

    @property
    def writer(self) -> str:
        """Its name with drive servers, which a fence uses."""
        return f"mount/{self.node}"

    def attach(self, link: SessionLink) -> None:
        """A new link speaks for it; the one before, if any, ends."""
        before, self.link = self.link, link
        link.owner = self
        self.connected.set()
        if before is not None and before is not link:
            before.close(Disconnected(f"{self.writer} connected anew"))

    def detach(self, link: SessionLink) -> None:
        """That link has closed."""
        if self.link is link:
            self.link = None
            self.connected = trio.Event()
            self.unreachable_since = trio.current_time()

    async def call(self, name: str, args: dict[str, Any], *, timeout_s: float) -> Any:
        """Ask the mount. Raises Disconnected (no link now), TimedOut, or what it answers."""
        link = self.link
        if link is None:
            raise Disconnected(f"{self.writer} incarnation {self.incarnation} is not connected")
        return await link.call(name, args, timeout_s=timeout_s)


class Sessions:
    """All sessions of one volume, by (node, incarnation)."""

    def __init__(self) -> None:
        self._by_key: dict[SessionKey, Session] = {}

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_key.values()))

    def add(self, session: Session) -> Session:
        """Returns the one that was there already, if so."""
        return self._by_key.setdefault(session.key, session)

    def get(self, key: SessionKey) -> Session | None:
        return self._by_key.get(key)

    def rename(self, session: Session, incarnation: Incarnation) -> None:
        """Another process goes on with it."""
        self._by_key.pop(session.key, None)
        session.key = (session.node, incarnation)
        self._by_key[session.key] = session

    def remove(self, session: Session) -> None:
        self._by_key.pop(session.key, None)

    def older_of(self, node: NodeName, incarnation: Incarnation) -> list[Session]:
        """Earlier incarnations of the node's mount: they are dead, and must be evicted before it is
        served."""
        return [session for session in self if session.node == node and session.incarnation < incarnation]

    def check_newest(self, node: NodeName, incarnation: Incarnation) -> None:
        """Raises Fenced when a later incarnation of the node's mount is known."""
        for session in self:
            if session.node == node and session.incarnation > incarnation:
                raise Fenced(
                    f"mount of {node}, incarnation {incarnation}: {session.incarnation} has taken its place"
                )

    @property
    def unclaimed(self) -> list[Session]:
        """Those that have not said what they hold: while there are any, no lease may be granted. One that goes on for
        a departed session holds nothing."""
        return [session for session in self if not session.reclaimed and session.departed is None]


@dataclass(slots=True, frozen=True)
class Outcome:
    """Of a change. `reply` None: there is more to do in a further batch. `stored`: said before, maybe history
    now."""

    reply: dict[str, Any] | None
    stored: bool = False


def once(
    store: ReplyStore, session: Session, op: int, op_done: int, apply: Callable[[], dict[str, Any] | None]
) -> Callable[[], Outcome]:
    """`apply` as a change that is executed exactly once (I11), to be run inside a batch.

    apply   returns the reply, or None where it has to be called again in another batch; until then it may be
            repeated from its beginning by a successor, without harm.
    """

    def change() -> Outcome:
        if session.ended:
            raise Fenced(f"{session.writer} incarnation {session.incarnation} was evicted")
        try:
            stored = store.reply_of(session.id, op)
        except NotFound:
            raise Fenced(f"{session.writer} incarnation {session.incarnation} was evicted") from None
        if stored is not None:
            return Outcome(unpack_value(stored), stored=True)
        reply = apply()
        if reply is None:
            return Outcome(None)
        store.op_done(session.id, min(op_done, op))
        store.store_reply(session.id, op, pack_value(reply))
        return Outcome(reply)

    return change
