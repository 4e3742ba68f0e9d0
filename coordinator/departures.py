"""Departures: what stays of a mount that was evicted, for a while, in case the next process of its FUSE session comes.

Place      coordinator floor; above metadata.py, below session_desk.py, adoption.py, lock_desk.py and janitor.py.
Why        A node that was cut off, and a mount that did not answer in time, are evicted; their kernel lives on, and so do
           the programs, which wait. Whoever goes on for such a mount **adopts** what is left.
Rule       All that a departed session had stays its own, **without force**: nobody waits for it, and what somebody
           else takes is gone for good.
           - Leases passed on when it was evicted. Which inodes others have had the write lease on since is noted
             (`changed`): of these nothing may be done that its processes may have begun before.
           - File locks stay. Who asks for one that they exclude, or asks whether there is one, gets it, and the departed
             session has lost all its locks on that inode (`take_locks`).
           - Files that it had open and that have no name any more are not let go of (`holds`).
           - Its stored replies stay (I11).
Where      The mark that a session is departed, its locks, those it has lost, and its replies are in the metadata. What
           others have changed is known to the coordinator that evicted it, and to no other: for the next one all is
           changed (CHANGED_MAX likewise).
Ends       After `remember_s`; when its node is evicted for good; when a mount of its node comes that does not go on for
           it; when it has been adopted, and has said what it holds.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import trio

from coordinator.batches import Batches
from coordinator.lease_table import SessionKey
from coordinator.metadata import Metadata
from csvfs.errors import CsvfsError, Fenced
from csvfs.ids import Incarnation, InodeNo, NodeName, SlabId

log = logging.getLogger(__name__)

CHANGED_MAX = 65_536  # inodes noted per session, 4 MB or so
LOST_LOCKS_TOLD_MAX = 10_000
EXPIRY_LOOK_S = 1.0
# Rows of table settings: `departed/<session>` -> one of these two, `locks-lost/<session>/<inode>`.
DEPARTED, ADOPTING = b"departed", b"adopting"
_MARK, _LOST = "departed/", "locks-lost/"
_PUT = "INSERT OR REPLACE INTO settings(name, value) VALUES(?,?)"


@dataclass(slots=True, eq=False)
class Departed:
    """`id`: of the session in the database. `written`: slabs that it may not have flushed; `held`: inodes that it had;
    `changed`: those that others may have changed since. None of each: not known, so all."""

    id: int
    node: NodeName
    incarnation: Incarnation
    written: set[SlabId] | None = None
    held: set[InodeNo] | None = None
    changed: set[InodeNo] | None = None
    until: float = 0.0
    adopting: bool = False  # the next process is there, and has not said yet what it holds

    def may_be_changed(self, ino: int) -> bool:
        return self.changed is None or ino in self.changed


class Departures:
    """At most one of each node. `on_forgotten`: something was let go of."""

    def __init__(
        self, metadata: Metadata, batches: Batches, remember_s: float, is_evicted: Callable[[NodeName], bool]
    ) -> None:
        """is_evicted: whether a node has gone for good."""
        self._metadata = metadata
        self._database = metadata.database
        self._batches = batches
        self._remember_s = remember_s
        self._is_evicted = is_evicted
        self._of_node: dict[NodeName, Departed] = {}
        self._weak: set[int] = set()  # ids of sessions whose locks have no force
        self.on_forgotten: Callable[[], None] = lambda: None

    def marks(self) -> dict[int, bytes]:
        """By session; of a database just opened."""
        rows = self._database.rows("SELECT name, value FROM settings WHERE name GLOB ?", (f"{_MARK}*",))
        return {int(name.removeprefix(_MARK)): bytes(value) for name, value in rows}

    # -- who has departed ------------------------------------------------------------------------

    def of_node(self, node: NodeName) -> Departed | None:
        return self._of_node.get(node)

    def is_for_good(self, node: NodeName) -> bool:
        """Whether a session of this node that is evicted now need not be remembered."""
        return self._is_evicted(node)

    def add(self, departed: Departed) -> Departed:
        """From now on it counts, and what others change is noted. Its leases have not passed on yet."""
        departed.until = departed.until or trio.current_time() + self._remember_s
        self._of_node[departed.node] = departed
        if departed.adopting:
            self._weak.discard(departed.id)
        else:
            self._weak.add(departed.id)
        return departed

    def wrote(self, session: SessionKey, ino: InodeNo) -> None:
        """A session has got the write lease on an inode."""
        for departed in self._of_node.values():
            if departed.node != session[0] and departed.changed is not None:
                departed.changed.add(ino)
                if len(departed.changed) > CHANGED_MAX:
                    departed.changed = None

    def holds(self, ino: InodeNo) -> bool:
        """Whether a departed session may have the inode open."""
        return any(departed.held is None or ino in departed.held for departed in self._of_node.values())

    # -- locks without force ---------------------------------------------------------------------

    def has_weak_locks(self) -> bool:
        return bool(self._weak)

    def is_weak(self, session: int) -> bool:
        """Whether locks of the session stand in nobody's way."""
        return session in self._weak

    def take_locks(self, sessions: Iterable[int], ino: int) -> None:
        """In a batch: these, which are departed, lose their locks on the inode to somebody else."""
        for session in sessions:
            self._metadata.locks.end_session(session, ino)
            self._database.run(_PUT, (f"{_LOST}{session}/{ino}", b""))
            log.warning("locks of departed session %d on inode %d pass on", session, ino)

    def lost_locks(self, session: int) -> list[int] | None:
        """Inodes on which it has lost locks since it departed; None: too many to say."""
        prefix = f"{_LOST}{session}/"
        rows = self._database.rows("SELECT name FROM settings WHERE name GLOB ?", (f"{prefix}*",))
        if len(rows) > LOST_LOCKS_TOLD_MAX:
            return None
        return [int(name.removeprefix(prefix)) for (name,) in rows]

    # -- changes of state, each in a batch -------------------------------------------------------

    def mark(self, session: int, mark: bytes) -> None:
        """DEPARTED, ADOPTING: also for the next coordinator."""
        self._database.run(_PUT, (f"{_MARK}{session}", mark))

    def unmark(self, session: int) -> None:
        """It is as any other, or gone."""
        self._database.run("DELETE FROM settings WHERE name = ?", (f"{_MARK}{session}",))
        self._database.run("DELETE FROM settings WHERE name GLOB ?", (f"{_LOST}{session}/*",))

    # -- the end ---------------------------------------------------------------------------------

    async def settle(self, departed: Departed) -> None:
        """The next process has said what it holds: an ordinary session from now on. Raises what ends the batches."""
        await self._batches.run(lambda: self.unmark(departed.id))
        self.drop(departed)

    async def forget(self, departed: Departed) -> None:
        """Nobody goes on for it. Raises what ends the batches."""

        def end() -> None:
            self._metadata.end_session(departed.id)
            self.unmark(departed.id)

        await self._batches.run(end)
        self.drop(departed)
        log.info("mount/%s, incarnation %d, is forgotten: nobody went on for it", departed.node, departed.incarnation)

    async def forget_node(self, node: NodeName) -> None:
        """Of a node whose mount has begun anew."""
        departed = self._of_node.get(node)
        if departed is not None and not departed.adopting:
            await self.forget(departed)

    def nodes(self) -> list[NodeName]:
        """Those with a departed session."""
        return list(self._of_node)

    def drop(self, departed: Departed) -> None:
        """It counts no more."""
        self._weak.discard(departed.id)
        if self._of_node.get(departed.node) is departed:
            del self._of_node[departed.node]
        self.on_forgotten()

    async def run_forever(self) -> None:
        """Forget those whose time is over. Raises Fenced."""
        while True:
            await trio.sleep(EXPIRY_LOOK_S)
            for departed in list(self._of_node.values()):
                is_over = trio.current_time() >= departed.until or self._is_evicted(departed.node)
                if not is_over or departed.adopting:
                    continue
                try:
                    await self.forget(departed)
                except Fenced:
                    raise
                except CsvfsError as error:
                    log.info("mount/%s is not forgotten yet: %s", departed.node, error)
