"""Batches: changes of the metadata, many in one SQLite transaction, answered when their log is on the
members.

Place      coordinator floor; above metadata.py and metadata_log.py, below everything that changes metadata.
Writer     `run_forever` alone runs transactions. A batch takes whatever waits; while its log is on the way
           the next one is executed (group commit), up to BATCHES_IN_FLIGHT_MAX.

Invariants
  I11  A change is executed once, or not at all if its caller gave up before that.
  B1   Who asked for a change hears its result only after the log up to it is durable: nothing that anybody
       was told can un-happen. Errors count as results: they too tell what the state was.
"""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import trio

from coordinator.slab_image import LogEntry
from csvfs.errors import CsvfsError, LeaseLost, NoSpace, Unavailable

log = logging.getLogger(__name__)

BATCH_SIZE_MAX = 256  # changes: about 300 KiB of log, a few ms of execution
BATCHES_IN_FLIGHT_MAX = 8
CHANGES_WAITING_MAX = 16_384

T = TypeVar("T")


class BatchImage(Protocol):
    def take_log(self) -> list[LogEntry]: ...


class BatchMetadata(Protocol):
    """Of Metadata: its transactions."""

    @property
    def image(self) -> BatchImage: ...
    @property
    def checkpoint_due(self) -> bool: ...
    def begin(self) -> None: ...
    def commit(self) -> None: ...
    def rollback(self) -> None: ...
    def checkpoint(self) -> None: ...


class BatchLog(Protocol):
    """Of MetadataLog."""

    @property
    def position(self) -> int: ...
    def append(self, entries: list[LogEntry]) -> int: ...
    async def wait(self, position: int) -> None: ...
    async def wait_room(self, batches_max: int) -> None: ...


class _Change:
    """One change on its way. `executed` is told once, synchronously, when the change is decided."""

    __slots__ = ("abandoned", "apply", "done", "error", "executed", "value")

    def __init__(
        self, apply: Callable[[], Any], executed: Callable[[Any, CsvfsError | None], None] | None
    ) -> None:
        self.apply = apply
        self.executed = executed
        self.done = trio.Event()
        self.value: Any = None
        self.error: CsvfsError | None = None
        self.abandoned = False


class Batches:
    """The queue of changes and the task that executes them."""

    def __init__(
        self, metadata: BatchMetadata, metadata_log: BatchLog, may_serve: Callable[[], bool]
    ) -> None:
        self._metadata = metadata
        self._log = metadata_log
        self._may_serve = may_serve
        self._waiting: deque[_Change] = deque()
        self._wanted = trio.Event()
        self._closed: CsvfsError | None = None
        self._unanswered: set[_Change] = set()
        self.batch_count = 0
        self.change_count = 0

    async def run(
        self,
        apply: Callable[[], T],
        executed: Callable[[T | None, CsvfsError | None], None] | None = None,
    ) -> T:
        """Execute `apply()` in a batch and return its value once that is durable.

        apply     synchronous; may be called a second time after its transaction was rolled back, so it
                  changes nothing but metadata. A CsvfsError it raises is its result and must leave metadata
                  as it was.
        executed  called right after the transaction, before any other change, with the value or the error.
        Raises    what `apply` raises; Unavailable: too many wait; what ended the log: the change may be lost
                  or not.
        Cancel    a change that was not executed yet is dropped (`executed` hears Unavailable); else it goes
                  on.
        """
        if self._closed is not None:
            raise self._closed
        if len(self._waiting) >= CHANGES_WAITING_MAX:
            raise Unavailable(f"{CHANGES_WAITING_MAX} changes of metadata wait already; try again")
        change = _Change(apply, executed)
        self._waiting.append(change)
        self._wanted.set()
        try:
            await change.done.wait()
        except trio.Cancelled:
            if change in self._waiting:
                self._waiting.remove(change)
                self._tell(change, None, Unavailable("the change was called off"))
            raise
        if change.error is not None:
            raise change.error
        return change.value  # type: ignore[no-any-return]

    async def run_forever(self) -> None:
        """Execute batches until cancelled. Raises what ended the log, and bugs."""
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    if not self._waiting:
                        if self._metadata.checkpoint_due:
                            self._checkpoint()
                        self._wanted = trio.Event()
                        await self._wanted.wait()
                    await self._log.wait_room(BATCHES_IN_FLIGHT_MAX)
                    batch = [self._waiting.popleft() for _ in range(min(BATCH_SIZE_MAX, len(self._waiting)))]
                    if not batch:
                        continue
                    self._unanswered.update(batch)
                    position = self._execute(batch)
                    nursery.start_soon(self._answer, batch, position)
        finally:
            self.close(Unavailable("the coordinator of this volume has stopped here"))

    async def _answer(self, batch: list[_Change], position: int) -> None:
        await self._log.wait(position)
        for change in batch:
            self._unanswered.discard(change)
            if not self._may_serve():
                # B1 holds, but another coordinator may be at work already: what this one knows is history
                # (I5).
                change.error = LeaseLost("this node has lost its lease in the cluster store")
            change.done.set()

    def close(self, error: CsvfsError) -> None:
        """Nothing is executed any more; whoever waits gets `error`."""
        self._closed = self._closed or error
        waiting, self._waiting = self._waiting, deque()
        for change in waiting:
            self._tell(change, None, error)
        for change in [*waiting, *self._unanswered]:
            change.error = error
            change.done.set()
        self._unanswered.clear()

    # -- one batch, synchronously ----------------------------------------------------------------

    def _checkpoint(self) -> None:
        self._metadata.checkpoint()
        self._log.append(self._metadata.image.take_log())

    def _execute(self, batch: list[_Change]) -> int:
        """Returns the position at which the batch is durable."""
        self.batch_count += 1
        self.change_count += len(batch)
        if not self._try_together(batch):
            for change in batch:
                self._execute_alone(change)
        return self._log.append(self._metadata.image.take_log())

    def _try_together(self, batch: list[_Change]) -> bool:
        """All in one transaction; False: nothing was done, they must go one by one."""
        metadata = self._metadata
        metadata.begin()
        try:
            for change in batch:
                change.value, change.error = None, None
                try:
                    change.value = change.apply()
                except NoSpace:
                    raise
                except CsvfsError as error:
                    change.error = error
            metadata.commit()
        except Exception as error:
            metadata.rollback()
            if not isinstance(error, NoSpace):
                log.exception("a batch of %d changes failed; doing them one by one", len(batch))
            return False
        for change in batch:
            self._tell(change, change.value, change.error)
        return True

    def _execute_alone(self, change: _Change) -> None:
        metadata = self._metadata
        change.value, change.error = None, None
        metadata.begin()
        try:
            change.value = change.apply()
            metadata.commit()
        except CsvfsError as error:
            metadata.rollback()
            change.error = error
        except Exception:
            metadata.rollback()
            log.exception("a change of metadata failed in a way nobody planned for")
            change.error = CsvfsError("the change failed; the log of the coordinator says how")
        self._tell(change, change.value, change.error)

    @staticmethod
    def _tell(change: _Change, value: Any, error: CsvfsError | None) -> None:
        if change.executed is not None:
            change.executed(value, error)
