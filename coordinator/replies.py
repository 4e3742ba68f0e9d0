"""Replies: what was answered to whom, so that what is sent again after a failover is not done again (I11).

Place      coordinator floor; above database.py, below metadata.py.
Owns       tables sessions and replies. All of it is in memory: sessions have few operations in flight.
"""

from dataclasses import dataclass, field

from coordinator.database import Database
from csvfs.errors import BadRequest, Conflict, Fenced, NotFound


@dataclass(slots=True)
class Session:
    """One incarnation of a node's mount. `done_below`: it has received all answers to smaller ops."""

    id: int
    node: str
    incarnation: int
    last_op: int = 0
    done_below: int = 0
    replies: dict[int, bytes] = field(default_factory=dict)


class Replies:
    """Sessions and their last replies, changed only inside batches."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sessions: dict[int, Session] = {}
        self._new_replies: list[tuple[int, int, bytes]] = []
        self._changed: dict[int, int] = {}  # session -> its done_below as it is in the table
        database.add_part(self)

    def load(self) -> None:
        self._sessions = {
            row[0]: Session(*row)
            for row in self._database.rows("SELECT id, node, incarnation, last_op, done_below FROM sessions")
        }
        for session, op, reply in self._database.rows("SELECT session, op, reply FROM replies"):
            self._sessions[session].replies[op] = reply

    def sessions(self) -> list[Session]:
        return list(self._sessions.values())

    def id_of(self, node: str, incarnation: int) -> int:
        """Of a session that is known. Raises NotFound."""
        for session in self._sessions.values():
            if (session.node, session.incarnation) == (node, incarnation):
                return session.id
        raise NotFound(f"mount of {node}, incarnation {incarnation}, has no session (any more)")

    def open_session(self, node: str, incarnation: int) -> Session:
        """The session of that mount, new or known. Raises Fenced: a later incarnation of it is known."""
        known = {s.incarnation: s for s in self._sessions.values() if s.node == node}
        if known and max(known) > incarnation:
            raise Fenced(f"mount of {node}, incarnation {incarnation}: {max(known)} has taken its place")
        if incarnation in known:
            return known[incarnation]
        assert self._database.active, "changes need a batch"
        counters = self._database.counters
        session = Session(counters.next_session, node, incarnation)
        counters.next_session += 1
        row = (session.id, node, incarnation, 0, 0)
        self._database.run(
            "INSERT INTO sessions(id, node, incarnation, last_op, done_below) VALUES(?,?,?,?,?)", row
        )
        self._sessions[session.id] = session
        return session

    def relabel(self, session: int, incarnation: int) -> None:
        """The next process of the same mount goes on with it (session_desk.py, "inherit"): its replies stay."""
        assert self._database.active, "changes need a batch"
        self._session(session).incarnation = incarnation
        self._database.run("UPDATE sessions SET incarnation = ? WHERE id = ?", (incarnation, session))

    def end_session(self, session: int) -> None:
        """Forget it and its replies: it was evicted, or has said goodbye. Unknown ones are no error."""
        assert self._database.active, "changes need a batch"
        self._new_replies = [row for row in self._new_replies if row[0] != session]
        self._changed.pop(session, None)
        self._sessions.pop(session, None)
        self._database.run("DELETE FROM replies WHERE session = ?", (session,))
        self._database.run("DELETE FROM sessions WHERE id = ?", (session,))

    def reply_of(self, session: int, op: int) -> bytes | None:
        """The stored reply; None: the operation was not done yet. Raises NotFound, Conflict, BadRequest."""
        known = self._session(session)
        if op <= 0:
            raise BadRequest(f"operation number {op} of session {session}; they start at 1")
        if op < known.done_below:
            raise Conflict(
                f"operation {op} of session {session}: its answer was confirmed, it cannot come again"
            )
        return known.replies.get(op)

    def store_reply(self, session: int, op: int, reply: bytes) -> None:
        """Belongs to the batch that does the operation. Raises NotFound, Conflict: there is one already."""
        assert self._database.active, "changes need a batch"
        known = self._session(session)
        if op in known.replies or op < known.done_below:
            raise Conflict(f"operation {op} of session {session} has a reply already")
        known.replies[op] = reply
        known.last_op = max(known.last_op, op)
        self._changed.setdefault(session, known.done_below)
        self._new_replies.append((session, op, reply))

    def op_done(self, session: int, op: int) -> None:
        """The session has received all answers to operations below `op`: these may go. Raises NotFound."""
        known = self._session(session)
        if op <= known.done_below:
            return
        assert self._database.active, "changes need a batch"
        self._changed.setdefault(session, known.done_below)
        known.done_below = op
        for old in [old for old in known.replies if old < op]:
            del known.replies[old]

    def _session(self, session: int) -> Session:
        known = self._sessions.get(session)
        if known is None:
            raise NotFound(f"session {session} does not exist (any more)")
        return known

    # Part

    def flush(self) -> None:
        for session, done_below in self._changed.items():
            known = self._sessions[session]
            if known.done_below > done_below:
                self._database.run(
                    "DELETE FROM replies WHERE session = ? AND op < ?", (session, known.done_below)
                )
            self._database.run(
                "UPDATE sessions SET last_op = ?, done_below = ? WHERE id = ?",
                (known.last_op, known.done_below, session),
            )
        wanted = [row for row in self._new_replies if row[1] in self._sessions[row[0]].replies]
        if wanted:
            self._database.run_many("INSERT INTO replies(session, op, reply) VALUES(?,?,?)", wanted)
        self._new_replies = []
        self._changed.clear()

    def forget(self) -> None:
        self._new_replies = []
        self._changed.clear()
        self.load()

    def settle(self) -> None:
        pass
