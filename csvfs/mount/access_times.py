"""Access times, as Linux's relatime keeps them: noted when a file is read, told to the coordinator lazily.

Place      mount floor; under read_path.py, recall.py and operations.py.
Rule       A read sets the time when it is not later than the last change of the file (mtime, ctime), or older than a day.
           `FileState.atime_seen` says that there is nothing to look at: all that the hot path asks.
Told       in batches: every few seconds, soon after the last close, with the answer to a recall, and to whoever asks while we
           hold the write lease. Nobody waits for it, and a mount that is killed loses what it had not told.
Explicit   times win. Who sets one here holds off what is noted (`explicit`); for one set on another node our attributes are
           recalled first: the answer takes along what is noted, after a batch on its way has been answered, and
           nothing is noted until the new attributes are known.
Limits     ITEMS_MAX of one call. What is noted is bounded by the inodes that are remembered.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from csvfs.errors import CsvfsError
from csvfs.mount.file_state import ATIME, CTIME, LEASE_READ, MTIME, FileState
from csvfs.mount.leases import Coordinator

log = logging.getLogger(__name__)

DAY_NS = 24 * 3600 * 1_000_000_000
LOOK_AGAIN_S = 3600.0  # at every inode, whether its access time has become a day old
SOON_S = 0.1  # after a close: those of many small files go together
ITEMS_MAX = 4096


class AccessTimes:
    """`states`: all that is known, by inode. `enabled`: else reads change no times (noatime)."""

    def __init__(
        self,
        coordinator: Coordinator,
        states: dict[int, FileState],
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._coordinator = coordinator
        self._states = states
        self.clock_ns = clock_ns
        self._noted: dict[FileState, None] = {}
        self._sent: set[FileState] = set()
        self._answered = trio.Event()
        self._explicit: dict[int, int] = {}  # inode -> how many are setting its times
        self._due = trio.Event()
        self._looked_s = 0.0
        self.enabled = True

    # -- noting ----------------------------------------------------------------------------------

    def accessed(self, state: FileState) -> None:
        """It is read. Call where `atime_seen` is false. Synchronous."""
        attr, state.atime_seen = state.attr, True
        if attr is None or state.stale or state.lease < LEASE_READ:
            return  # looked at again when they are known
        if not self.enabled or state.ino in self._explicit:
            return
        now_ns = self.clock_ns()
        known_ns = state.atime_ns or attr[ATIME]
        changed_ns = max(attr[MTIME], attr[CTIME], state.mtime_ns if state.times_dirty else 0)
        if known_ns <= changed_ns or now_ns - known_ns >= DAY_NS:
            state.atime_ns = now_ns
            self._noted[state] = None

    def accessed_inode(self, ino: int) -> None:
        """As accessed, of a directory or symlink, of which changes by others are not all noticed."""
        state = self._states.get(ino)
        if state is not None:
            self.accessed(state)

    @contextmanager
    def explicit(self, ino: int) -> Iterator[None]:
        """Somebody sets a time of the inode: what was noted before does not count, nor what is read meanwhile. Await
        `answered` inside, before it is set."""
        self._explicit[ino] = self._explicit.get(ino, 0) + 1
        state = self._states.get(ino)
        if state is not None:
            self.forget(state)
        try:
            yield
        finally:
            left = self._explicit.pop(ino) - 1
            if left:
                self._explicit[ino] = left

    def forget(self, state: FileState) -> None:
        """What was noted is told otherwise, or void."""
        state.atime_ns = 0
        self._noted.pop(state, None)

    def is_noted(self, ino: int) -> bool:
        state = self._states.get(ino)
        return state is not None and state.atime_ns != 0

    # -- telling ---------------------------------------------------------------------------------

    def closed(self, state: FileState) -> None:
        """Nobody has it open any more: others may want to know soon."""
        if state.atime_ns:
            self._due.set()

    async def answered(self, ino: int) -> None:
        """Until no batch with the inode is on its way: what comes behind it counts. Cancel safe."""
        while any(state.ino == ino for state in self._sent):
            await self._answered.wait()

    async def run_forever(self, interval_s: float) -> None:
        """Tell what is noted every `interval_s`, and soon after a close. Until cancelled."""
        while True:
            with trio.move_on_after(interval_s):
                await self._due.wait()
                await trio.sleep(SOON_S)
            self._due = trio.Event()
            await self.report()
            if trio.current_time() >= self._looked_s + LOOK_AGAIN_S:
                self._looked_s = trio.current_time()
                for state in self._states.values():
                    state.atime_seen = False

    async def report(self) -> None:
        """Tell the coordinator all that is noted. What cannot be told now stays noted. Cancel safe. Raises nothing of the
        call's."""
        while self._noted and not self._sent:
            first = list(self._noted)[:ITEMS_MAX]
            batch = {state: state.atime_ns for state in first if state.atime_ns}
            for state in first:
                if state not in batch:
                    del self._noted[state]  # it went with the lease
            if not batch:
                continue
            self._sent = set(batch)
            try:
                items = [[state.ino, atime_ns] for state, atime_ns in batch.items()]
                await self._coordinator.call("accessed", {"items": items})
            except CsvfsError as error:
                log.info("access times of %d inodes not reported: %s", len(batch), error)
                return
            finally:
                self._sent = set()
                self._answered.set()
                self._answered = trio.Event()
            for state, atime_ns in batch.items():
                if state.atime_ns == atime_ns:
                    self.forget(state)
                    if state.attr is not None:
                        state.attr[ATIME] = atime_ns
