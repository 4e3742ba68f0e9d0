"""Inheritance: what a mount process takes over from one that died, over the same FUSE session.

Place      mount floor; above leases.py, below file_table.py.
Leases     are ours at the coordinator already (its session_desk.py, "inherit"): nobody had one in between. What belongs to
           one (size, layout) is asked for when it is first needed (Leases.restore); until then it counts as OPEN,
           while a recall is still answered by emptying the kernel's cache.
Replays    The kernel asks again what was not answered. A WRITE that the dead process had carried out is carried out again:
           harmless as long as nobody else has written there since. So a recall waits until all that the kernel resends
           has begun, and what of it changes data of that inode has ended.
Adoption   Where this mount was evicted meanwhile, the coordinator may let it go on all the same (its departures.py): write
           leases are claimed anew, and come back where nobody else has written; of other inodes nothing is held. What
           comes again is carried out again as above, but not on inodes where somebody has written (`refused`): there
           it would undo that.
Flushes    What the dead process wrote and did not flush is flushed before any fsync is answered (I8).
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import trio

from csvfs.errors import CsvfsError
from csvfs.mount.file_state import LEASE_OPEN, LEASE_READ, LEASE_WRITE, FileState
from csvfs.mount.inode_rows import Row
from csvfs.mount.leases import Leases
from csvfs.mount.segments import Segments
from csvfs.volume import file_io
from csvfs.volume.file_io import BlockBus, Epochs
from csvfs.wire.block_messages import SlabDescriptor

log = logging.getLogger(__name__)

RETRY_S = 0.5


class Inheritance:
    """Of one mount process; empty where it began with a session of its own."""

    def __init__(self, leases: Leases, bus: BlockBus) -> None:
        self._leases = leases
        self._bus = bus
        self._resent = trio.Event()
        self._resent.set()
        self._flushing = trio.Lock()
        self._unflushed: Epochs = {}
        self._failure: CsvfsError | None = None
        self._refused: set[int] = set()
        self._begun: dict[int, tuple[int, list[int]]] = {}  # by request: where it was begun, and is not done again yet
        self._asked_anew: set[int] = set()
        self.unsettled: set[int] = set()  # open files; the process before may have owed an fsync of them what others wrote

    def take(self, rows: Iterable[Row], begun: Mapping[int, tuple[int, list[int]]]) -> list[FileState]:
        """Before the first word to the coordinator. Returns the inodes of which pages may be left that no lease covers.

        begun: see RequestJournal.begun_before: these segments are held. Until `resent`, recalls of what is taken over here wait.
        """
        self._resent = trio.Event()
        lost = []
        for row in rows:
            state = self._leases.state(row.ino)
            state.lease = min(row.kind, LEASE_OPEN)
            state.inherited = row.kind if row.kind >= LEASE_READ else 0
            state.inherited_time = row.timed
            state.open_count, state.write_opens = row.opens, row.writing
            state.regate()
            if row.lost:
                lost.append(state)
        self._begun = dict(begun)
        self.unsettled = {ino for ino, state in self._leases.states.items() if state.open_count}
        for ino, segments in begun.values():
            state = self._leases.state(ino)
            if state.segments is None:
                state.segments = Segments()
            state.segments.kinds |= dict.fromkeys(segments, LEASE_WRITE)
        return lost

    def refused(self, inos: Iterable[int]) -> None:
        """Others may have written to these since this mount was evicted."""
        self._refused.update(inos)

    def refuses(self, ino: int) -> bool:
        """Whether a change of data that comes again must not be carried out, as it may have been before."""
        if ino not in self._refused:
            return False
        log.error(
            "inode %d: what was being written when this mount was evicted is not repeated, another node has written since:"
            " the program gets EIO", ino,
        )  # fmt: skip
        return True

    def resent(self) -> None:
        """All that the kernel wanted to ask anew has begun."""
        for unique in [unique for unique in self._begun if unique not in self._asked_anew]:
            self._end_begun(unique)  # it has its answer
        self._resent.set()

    def replay_begins(self, ino: int, unique: int) -> None:
        """A request that changes the inode's data, and that may have been carried out already."""
        self._leases.state(ino).replays += 1
        self._asked_anew.add(unique)

    def _end_begun(self, unique: int) -> None:
        ino, _ = self._begun.pop(unique)
        state = self._leases.states.get(ino)
        if state is not None:
            state.notify()

    def is_begun(self, ino: int, segment: int | None) -> bool:
        """Whether a write that was begun there, None: anywhere in the file, has to be done again first."""
        return any(at == ino and (segment is None or segment in segments) for at, segments in self._begun.values())

    def replay_ends(self, ino: int, unique: int) -> None:
        if unique in self._begun:
            self._end_begun(unique)
        state = self._leases.states.get(ino)
        if state is not None and state.replays:
            state.replays -= 1
            state.notify()

    async def wait_resent(self) -> None:
        await self._resent.wait()

    async def ready(self, state: FileState) -> None:
        """Until a recall of the inode may be answered. Raises as Leases.restore. Cancel safe."""
        await self._resent.wait()
        await self._leases.restore(state)
        while state.replays:
            await state.wait_change()

    # -- flushes ---------------------------------------------------------------------------------

    def owes(self, descriptors: Iterable[Any]) -> None:
        """A flush of these slabs is a flush of all that was left unflushed. Raises ProtocolError."""
        for value in descriptors:
            descriptor = SlabDescriptor.from_wire(value)
            self._bus.learn(descriptor)
            self._unflushed[descriptor.slab] = descriptor.epoch

    async def flush(self) -> None:
        """Nothing is left unflushed of what was taken over.

        Raises  as FileTable.fsync; what a drive could not flush is reported to every call. Cancel safe.
        """
        if not self._unflushed:
            return
        async with self._flushing:
            if self._failure is not None:
                raise self._failure
            if not self._unflushed:
                return
            try:
                await self._bus.flush(self._unflushed)
                if (lost := file_io.lost_before_flush(self._bus, self._unflushed)) is not None:
                    raise lost
            except CsvfsError as error:
                if not error.retryable:
                    self._failure = error
                raise
            self._unflushed = {}

    async def flush_soon(self) -> None:
        """A task: so that the first fsync finds nothing to do."""
        while self._unflushed and self._failure is None:
            try:
                await self.flush()
            except CsvfsError as error:
                log.warning("what the mount before wrote is not flushed yet: %s", error)
                await trio.sleep(RETRY_S)
