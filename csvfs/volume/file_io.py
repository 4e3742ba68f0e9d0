"""Blocks of one file, through its extent map, to and from the bus.

Place      volume floor. Knows pieces and blocks; nothing of leases, sizes or the coordinator.
Limits     one message carries at most BLOCK_COUNT_MAX blocks; longer pieces are cut here.
"""

import time
from collections.abc import Callable, Iterable
from typing import Protocol

import trio

from csvfs.errors import CsvfsError, InputOutputError, Unavailable, UnflushedLost
from csvfs.ids import Epoch
from csvfs.units import BLOCK_SIZE
from csvfs.volume.extents import Piece
from csvfs.wire.block_messages import BLOCK_COUNT_MAX, EPOCH_UNKNOWN, ZERO_BLOCK, SlabDescriptor

ZEROS = bytes(BLOCK_COUNT_MAX * BLOCK_SIZE)

Data = bytes | memoryview
WriteDone = Callable[[CsvfsError | None], None]
Epochs = dict[int, Epoch]  # by slab
RETRY_S = 0.2  # between tries to read what no copy answers for


class BlockBus(Protocol):
    """What file I/O needs of block/bus.py."""

    def descriptor(self, slab: int, /) -> SlabDescriptor | None: ...
    def learn(self, descriptor: SlabDescriptor, /) -> None: ...
    def write(self, slab: int, block: int, data: Data, done: WriteDone, /) -> None: ...
    async def read(self, slab: int, block: int, count: int, /) -> bytes: ...
    def read_local(self, slab: int, block: int, count: int, /) -> bytes | None: ...
    async def flush(self, slabs: Iterable[int], /) -> None: ...
    async def trim(self, items: list[tuple[int, int, int]], /) -> None: ...


def cut(pieces: Iterable[Piece]) -> list[Piece]:
    """The same pieces, none longer than a message may carry."""
    short = []
    for block, count, slab, slab_block in pieces:
        for done in range(0, count, BLOCK_COUNT_MAX):
            size = min(BLOCK_COUNT_MAX, count - done)
            short.append((block + done, size, slab, slab_block + done if slab >= 0 else 0))
    return short


def read_local(bus: BlockBus, pieces: Iterable[Piece]) -> list[Data] | None:
    """All pieces at once, holes as zeros; None: at least one is not to be had without waiting."""
    buffers: list[Data] = []
    for _, count, slab, slab_block in cut(pieces):
        data = _zeros(count) if slab < 0 else bus.read_local(slab, slab_block, count)
        if data is None:
            return None
        buffers.append(data)
    return buffers


async def read(bus: BlockBus, pieces: Iterable[Piece]) -> list[Data]:
    """All pieces, verified (I9), holes as zeros; from this node's drives where that goes without waiting.

    Raises  Corrupt, Unavailable. Cancel safe.
    """
    buffers: list[Data] = []
    for _, count, slab, slab_block in cut(pieces):
        if slab < 0:
            buffers.append(_zeros(count))
            continue
        data = bus.read_local(slab, slab_block, count)
        buffers.append(await bus.read(slab, slab_block, count) if data is None else data)
    return buffers


class NotRead(Unavailable):
    """What a write has to keep of blocks cannot be read now. Nothing was written."""


async def read_kept(bus: BlockBus, pieces: Iterable[Piece]) -> bytearray:
    """As `read`, for a write that keeps some of it. Raises Corrupt, NotRead. Cancel safe."""
    try:
        return bytearray(b"".join(await read(bus, pieces)))
    except Unavailable as error:
        raise NotRead(str(error)) from None


async def wait_again(error: Unavailable, deadline: float) -> None:
    """No copy can be reached now. deadline: as of `time.monotonic`. Raises InputOutputError: that has been so for too long."""
    if time.monotonic() + RETRY_S >= deadline:
        raise InputOutputError(f"not read within the io_timeout: {error}")
    await trio.sleep(RETRY_S)


class Landing:
    """Writes of several pieces on their way; `done` is told the first error, or None, when all have ended."""

    __slots__ = ("done", "error", "remaining")

    def __init__(self, remaining: int, done: WriteDone) -> None:
        self.remaining = remaining
        self.done = done
        self.error: CsvfsError | None = None

    def landed(self, error: CsvfsError | None) -> None:
        if error is not None and self.error is None:
            self.error = error
        self.remaining -= 1
        if not self.remaining:
            self.done(self.error)


def epochs(bus: BlockBus, pieces: Iterable[Piece]) -> Epochs:
    """Of the slabs of `pieces`, as known now: taken before they are written, for `lost_before_flush`."""
    return {slab: epoch_of(bus, slab) for slab in {piece[2] for piece in pieces}}


def epoch_of(bus: BlockBus, slab: int) -> Epoch:
    known = bus.descriptor(slab)
    return EPOCH_UNKNOWN if known is None else known.epoch


def lost_before_flush(bus: BlockBus, written: Epochs) -> UnflushedLost | None:
    """After a flush of these slabs. None: what was written to them, from those epochs on, is on the media (I8); else the
    copies in sync have lost in between what they had not flushed."""
    for slab, epoch in written.items():
        known = bus.descriptor(slab)
        if known is not None and known.lost_epoch > epoch:
            return UnflushedLost(
                f"slab {slab}: the drives of all its copies lost power, or failed to flush, before epoch {known.lost_epoch}: "
                f"what was written since epoch {epoch} was not flushed and may be lost: write it again"
            )
    return None


def write(bus: BlockBus, pieces: Iterable[Piece], data: Data, done: WriteDone) -> None:
    """Write `data` to `pieces` (no holes among them), in order. `data` must stay until `done`."""
    short = cut(pieces)
    view = memoryview(data)
    landed = Landing(len(short), done).landed
    at = 0
    for _, count, slab, slab_block in short:
        size = count * BLOCK_SIZE
        bus.write(slab, slab_block, view[at : at + size], landed)
        at += size


class Delivery:
    """A `write` that a task waits for, having done something else meanwhile."""

    def __init__(self, bus: BlockBus, pieces: list[Piece], data: Data) -> None:
        self._ended = trio.Event()
        self._error: CsvfsError | None = None
        self.epochs = epochs(bus, pieces)
        write(bus, pieces, data, self._done)

    def _done(self, error: CsvfsError | None) -> None:
        self._error = error
        self._ended.set()

    async def wait(self) -> CsvfsError | None:
        """None once all is on all members (I2), else the first error. Cancelled: it may land or not."""
        await self._ended.wait()
        return self._error


def clip(buffers: list[Data], skip: int, size: int) -> list[Data]:
    """`size` bytes of the concatenated `buffers` from byte `skip` on, without copying."""
    result: list[Data] = []
    for data in buffers:
        if skip >= len(data):
            skip -= len(data)
            continue
        part = memoryview(data)[skip : skip + size] if skip or size < len(data) else data
        skip = 0
        size -= len(part)
        result.append(part)
        if not size:
            break
    return result


def _zeros(count: int) -> Data:
    return ZERO_BLOCK if count == 1 else memoryview(ZEROS)[: count * BLOCK_SIZE]
