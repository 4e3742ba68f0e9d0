"""Batches: changes of the metadata, many in one SQLite transaction, answered when their log is on the
members.

Place      coordinator floor; above metadata.py and metadata_log.py, below everything that changes metadata.
Writer     `_execute_waiting` alone runs transactions: from the engine's task when changes have arrived or the
           log has room again, from `run_forever` for changes of other tasks. A batch takes whatever waits;
           while its log is on the way the next one is executed (group commit), up to BATCHES_IN_FLIGHT_MAX.

Invariants
  I11  A change is executed once, or not at all if its caller gave up before that.
  B1   Who asked for a change hears its result only after the log up to it is durable: nothing that anybody
       was told can un-happen. Errors count as results: they too tell what the state was.
"""

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import trio

from coordinator.slab_image import LogEntry
from csvfs.errors import CsvfsError, LeaseLost, NoSpace, Unavailable

log = logging.getLogger(__name__)

BATCH_SIZE_MAX = 256  # changes: about 300 KiB of log, a few ms of execution
BATCHES_IN_FLIGHT_MAX = 8
CHECKPOINT_IDLE_S = 0.05
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

    on_room: Callable[[], None]

    @property
    def batches_in_flight(self) -> int: ...
    def append(self, entries: list[LogEntry]) -> int: ...
    def when_durable(self, position: int, done: Callable[[CsvfsError | None], None]) -> None: ...


Told = Callable[[Any, CsvfsError | None], None]  # exactly one of value and error counts


class _Change:
    """One change on its way. `executed` is told once, synchronously, when the change is decided."""

    __slots__ = ("apply", "done", "error", "executed", "value")

    def __init__(self, apply: Callable[[], Any], executed: Told | None, done: Told) -> None:
        self.apply = apply
        self.executed = executed
        self.done = done
        self.value: Any = None
        self.error: CsvfsError | None = None


class Batches:
    """The queue of changes and their execution.

    soon   runs a function once all that has arrived together has been looked at, so that it shares a batch.
    """

    def __init__(
        self,
        metadata: BatchMetadata,
        metadata_log: BatchLog,
        may_serve: Callable[[], bool],
        soon: Callable[[Callable[[], None]], None] = lambda function: function(),
    ) -> None:
        self._metadata = metadata
        self._log = metadata_log
        self._may_serve = may_serve
        self._soon = soon
        self._execution_due = False
        self._waiting: deque[_Change] = deque()
        self._wanted = trio.Event()
        self._closed: CsvfsError | None = None
        self._failure: Exception | None = None  # a bug, or metadata that cannot be read: for run_forever
        self._unanswered: set[_Change] = set()
        self._executed_at = 0.0  # when a batch was executed last
        self._checkpoint_awaited = False  # run_forever looks for an idle moment
        metadata_log.on_room = self._room
        self.applied_count = 0  # of changes: grows before each of them, and is the same while nothing changes
        self.batch_count = 0
        self.change_count = 0

    def submit(self, apply: Callable[[], Any], executed: Told | None, done: Told) -> None:
        """As `run`, without a task: `done` is called once with what `run` would return or raise.

        It is called from the engine's task when the log is durable, or at once when nothing can be executed.
        """
        if self._closed is not None:
            self._refuse(executed, done, self._closed)
        elif len(self._waiting) >= CHANGES_WAITING_MAX:
            text = f"{CHANGES_WAITING_MAX} changes of metadata wait already; try again"
            self._refuse(executed, done, Unavailable(text))
        else:
            self._waiting.append(_Change(apply, executed, done))
            self._execute_soon()

    @staticmethod
    def _refuse(executed: Told | None, done: Told, error: CsvfsError) -> None:
        if executed is not None:
            executed(None, error)
        done(None, error)

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
        answered = trio.Event()
        change = _Change(apply, executed, lambda value, error: answered.set())
        self._waiting.append(change)
        self._wanted.set()  # by the task, so that what other tasks want in this moment shares the batch
        try:
            await answered.wait()
        except trio.Cancelled:
            if change in self._waiting:
                self._waiting.remove(change)
                self._tell(change, None, Unavailable("the change was called off"))
            raise
        if change.error is not None:
            raise change.error
        return change.value  # type: ignore[no-any-return]

    async def run_forever(self) -> None:
        """Execute what `run` is given, and checkpoints. Raises what made execution impossible."""
        try:
            while True:
                self._execute_waiting()
                if self._failure is not None:
                    raise self._failure
                self._wanted = trio.Event()
                self._checkpoint_awaited = self._metadata.checkpoint_due
                if not self._checkpoint_awaited:
                    await self._wanted.wait()
                elif self._is_idle():
                    self._checkpoint()
                else:
                    with trio.move_on_after(CHECKPOINT_IDLE_S):
                        await self._wanted.wait()
        finally:
            self.close(Unavailable("the coordinator of this volume has stopped here"))

    def close(self, error: CsvfsError) -> None:
        """Nothing is executed any more; whoever waits gets `error`."""
        self._closed = self._closed or error
        waiting, self._waiting = self._waiting, deque()
        unanswered, self._unanswered = self._unanswered, set()
        for change in waiting:
            self._tell(change, None, error)
        for change in [*waiting, *unanswered]:
            change.error = error
            change.done(None, error)

    # -- when ------------------------------------------------------------------------------------

    def _execute_soon(self) -> None:
        if not self._execution_due:
            self._execution_due = True
            self._soon(self._execute_waiting)

    def _room(self) -> None:
        if self._waiting:
            self._execute_soon()

    def _execute_waiting(self) -> None:
        """As much as the log has room for. What goes wrong beyond single changes ends `run_forever`."""
        self._execution_due = False
        try:
            while self._waiting and self._closed is None and self._failure is None:
                if self._log.batches_in_flight >= BATCHES_IN_FLIGHT_MAX:
                    return
                batch = [self._waiting.popleft() for _ in range(min(BATCH_SIZE_MAX, len(self._waiting)))]
                self._unanswered.update(batch)
                position = self._execute(batch)
                self._log.when_durable(position, partial(self._answer, batch))
        except Exception as error:
            self._fail(error)

    def _answer(self, batch: list[_Change], error: CsvfsError | None) -> None:
        if error is None and not self._may_serve():
            # B1 holds, but another coordinator may be at work already: what this one knows is history (I5).
            error = LeaseLost("this node has lost its lease in the cluster store")
        for change in batch:
            if change in self._unanswered:  # else `close` has answered
                self._unanswered.discard(change)
                if error is not None:
                    change.error = error
                try:
                    change.done(change.value, change.error)
                except Exception as bug:  # its volume ends, not the engine that called us
                    self._fail(bug)

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._wanted.set()

    @property
    def has_failed(self) -> bool:
        """True: `run_forever` is about to raise. What the metadata says may not be in the log."""
        return self._failure is not None

    # -- one batch, synchronously ----------------------------------------------------------------

    def _is_idle(self) -> bool:
        """Changes behind a checkpoint wait for its barriers, two flushes: better when there are none."""
        rested = trio.current_time() - self._executed_at >= CHECKPOINT_IDLE_S
        return rested and not self._waiting and self._log.batches_in_flight == 0

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
        self._executed_at = trio.current_time()
        if not self._checkpoint_awaited and self._metadata.checkpoint_due:
            self._checkpoint_awaited = True
            self._wanted.set()
        return self._log.append(self._metadata.image.take_log())

    def _try_together(self, batch: list[_Change]) -> bool:
        """All in one transaction; False: nothing was done, they must go one by one."""
        metadata = self._metadata
        metadata.begin()
        try:
            for change in batch:
                change.value, change.error = None, None
                self.applied_count += 1
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
        self.applied_count += 1
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
