"""Janitor: lets go of deleted files that nobody has open any more, and of space granted ahead to files at
rest.

Place      coordinator floor; above batches.py and leases.py.
Writer     its one task; others only note inodes.
Begins     when the grace period after a takeover is over: until all mounts have said what they hold, or were evicted,
           the lease table knows nobody who has a file open, and the blocks of one in use would go to another (T4).
"""

import logging
from collections.abc import Awaitable, Callable

import trio

from coordinator.batches import Batches
from coordinator.leases import Leases
from coordinator.metadata import Metadata
from csvfs.errors import Conflict, CsvfsError, NotFound
from csvfs.ids import InodeNo

log = logging.getLogger(__name__)

NOTES_MAX = (
    65_536  # of files at rest; more are forgotten, and keep a little space until they are next written
)
INODES_PER_CHANGE = 16
DELAY_S = 0.05  # collects what belongs together
LOOK_S = 30.0  # after which all orphans are looked at, and not only those of which somebody let go
_BLOCKS, _SIZE = 7, 6  # in an attr; blocks are of 512 bytes


class Janitor:
    """`orphaned` and `lowered` may be called from anywhere, also for inodes that need nothing.

    wait_open   returns when the lease table says all that is held
    holds       whether somebody may have the inode open who has no lease (departures.py)
    """

    def __init__(
        self,
        metadata: Metadata,
        batches: Batches,
        leases: Leases,
        wait_open: Callable[[], Awaitable[None]],
        holds: Callable[[InodeNo], bool] = lambda ino: False,
    ) -> None:
        self._holds = holds
        self._metadata = metadata
        self._batches = batches
        self._leases = leases
        self._wait_open = wait_open
        self._orphans: dict[InodeNo, None] = {}
        self._free: dict[InodeNo, None] = {}  # of these, those that may be held by nobody now
        self._at_rest: dict[InodeNo, None] = {}
        self._wanted = trio.Event()

    def orphaned(self, ino: InodeNo) -> None:
        """Its last name is gone, or it was made without one."""
        self._orphans[ino] = self._free[ino] = None
        self._wanted.set()

    def knows(self, ino: InodeNo) -> bool:
        """Whether the orphan is let go once nobody holds it."""
        return ino in self._orphans

    def lowered(self, ino: InodeNo) -> None:
        """A session holds less of it than before."""
        if ino in self._orphans:
            self._free[ino] = None
            self._wanted.set()
        elif (
            len(self._at_rest) < NOTES_MAX and not self._leases.holds_data(ino) and self._has_space_ahead(ino)
        ):
            self._at_rest[ino] = None
            self._wanted.set()

    def look(self) -> None:
        """What was held by nobody but a departed session may be held by nobody now."""
        if self._orphans:
            self._free.update(self._orphans)
            self._wanted.set()

    def _is_held(self, ino: InodeNo) -> bool:
        return self._leases.table.is_held(ino) or self._holds(ino)

    def _has_space_ahead(self, ino: InodeNo) -> bool:
        try:
            attr = self._metadata.getattr(ino)
        except CsvfsError:
            return False
        return attr[_BLOCKS] * 512 >= attr[_SIZE] + 4096

    def load(self) -> None:
        """Of a database just opened: orphans whose holders may be gone."""
        for ino in self._metadata.orphans():
            self.orphaned(InodeNo(ino))

    async def run_forever(self) -> None:
        """Raises what ends the batches."""
        await self._wait_open()
        look_s = trio.current_time() + LOOK_S
        while True:
            with trio.move_on_at(look_s):
                await self._wanted.wait()
            if trio.current_time() >= look_s:
                self.look()
                look_s = trio.current_time() + LOOK_S
            self._wanted = trio.Event()
            await trio.sleep(DELAY_S)
            free, self._free = self._free, {}
            await self._each([ino for ino in free if ino in self._orphans and not self._is_held(ino)], self._drop)
            await self._each(list(self._at_rest), self._shorten)

    async def _each(self, inos: list[InodeNo], change: Callable[[InodeNo], None]) -> None:
        for start in range(0, len(inos), INODES_PER_CHANGE):
            async with trio.open_nursery() as nursery:
                for ino in inos[start : start + INODES_PER_CHANGE]:
                    nursery.start_soon(self._one, ino, change)

    async def _one(self, ino: InodeNo, change: Callable[[InodeNo], None]) -> None:
        try:
            await self._batches.run(lambda: change(ino))
        except CsvfsError as error:
            if not isinstance(error, NotFound):
                log.warning("inode %d cannot be tidied up now: %s", ino, error)

    def _drop(self, ino: InodeNo) -> None:
        """Within a batch: whoever got hold of the inode meanwhile keeps it."""
        if self._is_held(ino):
            return
        try:
            done = self._metadata.drop_orphan(ino)
        except Conflict:
            done = True  # it has a name now (O_TMPFILE)
        except CsvfsError:
            self._orphans.pop(ino, None)
            raise
        if done:
            self._orphans.pop(ino, None)
        else:
            self._free[ino] = None
            self._wanted.set()

    def _shorten(self, ino: InodeNo) -> None:
        if self._leases.holds_data(ino):
            self._at_rest.pop(ino, None)
            return  # its layout may be in use
        try:
            done = self._metadata.trim_allocation_ahead(ino)
        except CsvfsError:
            self._at_rest.pop(ino, None)
            raise
        if done:
            self._at_rest.pop(ino, None)
        else:
            self._wanted.set()
