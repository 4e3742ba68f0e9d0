"""The metadata log on its way: ordered block writes and barriers, from the image to the metadata slabs'
members.

Place      coordinator floor; between slab_image.py and block/bus.py.
Writer     the service's batch task appends; bus callbacks advance.

Invariants
  G1  Writes are handed to the bus in log order; behind a barrier only when all before it are on all members
      and flushed. So at any instant the members hold a state in which SQLite may have crashed.
  G2  `durable` only grows, and position p is durable iff every write appended up to p is on all in-sync
      members.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import trio

from coordinator.slab_image import LogBarrier, LogEntry, LogWrite
from csvfs.errors import CsvfsError, DriveFailed, Unavailable
from csvfs.ids import SlabId
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import BLOCK_COUNT_MAX

log = logging.getLogger(__name__)

FLUSH_RETRY_S = 0.2
Done = Callable[[CsvfsError | None], None]


class LogBus(Protocol):
    """Of Bus: what the log needs."""

    def write(self, slab: SlabId, block: int, data: memoryview | bytes, done: Done) -> None: ...
    async def flush(self, slabs: Iterable[SlabId]) -> None: ...


class LogImage(Protocol):
    """Of SlabImage: what the log needs."""

    def written(self, entries: list[LogEntry]) -> None: ...


class _Part:
    """One appended batch: durable when nothing of it is unsent or unanswered, and the parts before it are."""

    __slots__ = ("entries", "position", "remaining", "waiting")

    def __init__(self, position: int, entries: list[LogEntry]) -> None:
        self.position = position
        self.entries = entries
        self.remaining = len(entries)
        self.waiting: list[Done] = []


class MetadataLog:
    """Sends the log of one image; run `run_forever` beside the bus."""

    def __init__(self, bus: LogBus, image: LogImage, slabs: Sequence[SlabId], blocks_per_slab: int) -> None:
        self._bus = bus
        self._image = image
        self.slabs = list(slabs)  # in the order of their blocks
        self._blocks_per_slab = blocks_per_slab
        self._unsent: deque[tuple[_Part, LogEntry]] = deque()
        self._parts: deque[_Part] = deque()
        self._in_flight = 0  # bus writes
        self._barrier_due = trio.Event()
        self._flushing = False
        self._failure: CsvfsError | None = None
        self.on_room: Callable[[], None] = lambda: None  # fewer batches are in flight than before
        self.position = 0  # of the last batch appended
        self.durable = 0

    # -- appending -------------------------------------------------------------------------------

    def append(self, entries: list[LogEntry]) -> int:
        """Send `entries` after all before; returns the position that is durable when they are."""
        if not entries:
            return self.position
        self.position += 1
        part = _Part(self.position, entries)
        self._parts.append(part)
        self._unsent.extend((part, entry) for entry in entries)
        self._pump()
        return self.position

    def add_slab(self, slab: SlabId) -> None:
        """The address space grew by one slab."""
        self.slabs.append(slab)

    @property
    def batches_in_flight(self) -> int:
        return len(self._parts)

    def when_durable(self, position: int, done: Done) -> None:
        """Call `done(None)` once `position` is durable, now if it is; `done(error)` if the log has ended."""
        if position <= self.durable:
            done(None)
        elif self._failure is not None:
            done(self._failure)
        else:
            self._parts[position - self._parts[0].position].waiting.append(done)

    async def wait(self, position: int) -> None:
        """Until `position` is durable. Raises what ended the log. Cancel safe."""
        if position <= self.durable:
            return
        event = trio.Event()
        self.when_durable(position, lambda error: event.set())
        await event.wait()
        if position > self.durable:
            assert self._failure is not None
            raise self._failure

    async def flush(self) -> None:
        """All that was appended before is on the media of all members (I8). Raises what the bus raises."""
        await self.wait(self.position)
        await self._bus.flush(self.slabs)

    # -- sending ---------------------------------------------------------------------------------

    def _pump(self) -> None:
        unsent = self._unsent
        while unsent and not self._flushing and self._failure is None:
            part, entry = unsent[0]
            if isinstance(entry, LogBarrier):
                self._flushing = True
                if self._in_flight == 0:
                    self._barrier_due.set()
                return
            unsent.popleft()
            self._send_run(part, entry)

    def _send_run(self, part: _Part, first: LogWrite) -> None:
        """Send consecutive blocks that follow each other in the log as one write."""
        slab_index, block = divmod(first.block, self._blocks_per_slab)
        data = [first.data]
        limit = min(BLOCK_COUNT_MAX, self._blocks_per_slab - block)
        while self._unsent and len(data) < limit:
            next_part, entry = self._unsent[0]
            follows = isinstance(entry, LogWrite) and entry.block == first.block + len(data)
            if next_part is not part or not follows:
                break
            assert isinstance(entry, LogWrite)
            data.append(entry.data)
            self._unsent.popleft()
        count = len(data)
        self._in_flight += 1
        payload = data[0] if count == 1 else b"".join(data)
        assert len(payload) == count * BLOCK_SIZE
        self._bus.write(
            self.slabs[slab_index], block, payload, lambda error: self._answered(part, count, error)
        )

    def _answered(self, part: _Part, count: int, error: CsvfsError | None) -> None:
        self._in_flight -= 1
        if error is not None:
            self.fail(error)
            return
        part.remaining -= count
        self._advance()
        if self._flushing and self._in_flight == 0:
            self._barrier_due.set()

    def _advance(self) -> None:
        before = len(self._parts)
        waiting: list[Done] = []
        while self._parts and self._parts[0].remaining == 0 and self._failure is None:
            part = self._parts.popleft()
            self.durable = part.position
            self._image.written(part.entries)
            waiting += part.waiting
        has_advanced = len(self._parts) < before
        for done in waiting:
            done(None)
        if has_advanced:
            self.on_room()

    def fail(self, error: CsvfsError) -> None:
        """The log cannot go on (this term is fenced): whoever waits is told so."""
        if self._failure is None:
            self._failure = error
        self._unsent.clear()
        for part in self._parts:
            waiting, part.waiting = part.waiting, []
            for done in waiting:
                done(self._failure)
        self._barrier_due.set()

    async def run_forever(self) -> None:
        """Carry out barriers until the log fails (raises that) or is cancelled."""
        while True:
            await self._barrier_due.wait()
            self._barrier_due = trio.Event()
            if self._failure is not None:
                raise self._failure
            if not self._flushing or self._in_flight:
                continue
            try:
                await self._bus.flush(self.slabs)
            except (Unavailable, DriveFailed) as error:
                # The bus has had the failed member taken out, or could not yet: the next flush says. A drive
                # whose flush failed fails every later one too, so that nothing is retried into silence (I8).
                log.warning("metadata cannot be flushed: %s", error)
                await trio.sleep(FLUSH_RETRY_S)
                self._barrier_due.set()
                continue
            except CsvfsError as error:
                self.fail(error)
                raise
            part, barrier = self._unsent.popleft()
            assert isinstance(barrier, LogBarrier)
            part.remaining -= 1
            self._flushing = False
            self._advance()
            self._pump()
