"""Writes that were given up: answered with an error because their slab could not be written for the io_timeout.

Place      block floor, under bus.py.
Why        Some members may have taken such a write and others not. Nobody sends it again: its caller may have given
           its lease away since. So the chunks it went to are made equal on all members by the slab's owner, under a
           new epoch, as after the death of a writer. Until then the write counts as incomplete, so that its members
           keep the chunks marked (I3).
"""

import logging
from collections.abc import Awaitable, Callable

import trio

from csvfs.block.bus_writes import PendingWrite
from csvfs.errors import CsvfsError, Fenced, InputOutputError
from csvfs.ids import SlabId
from csvfs.units import BLOCKS_PER_CHUNK

log = logging.getLogger(__name__)

RETRY_S = 1.0
RETRY_S_MAX = 30.0

MakeEqual = Callable[[SlabId, list[int]], Awaitable[None]]


class GivenUpWrites:
    """`make_equal(slab, chunks)` returns when the chunks are the same on all members of the slab."""

    def __init__(self, make_equal: MakeEqual | None) -> None:
        self._make_equal = make_equal
        self._writes: dict[SlabId, list[PendingWrite]] = {}
        self._wanted = trio.Event()

    def add(self, slab: SlabId, writes: list[PendingWrite], error: CsvfsError) -> None:
        """Answer the writes with an error."""
        log.error("slab %d: %d writes given up: %s", slab, len(writes), error)
        self._writes.setdefault(slab, []).extend(writes)
        self._wanted.set()
        for write in writes:
            write.attempt += 1  # late answers of members mean nothing any more
            waited_s = trio.current_time() - write.parked_since
            write.finish(InputOutputError(f"slab {slab} could not be written for {waited_s:.0f} s: {error}"))

    async def run_forever(self) -> None:
        """Have slabs made equal, over failures, until cancelled."""
        delay_s = RETRY_S
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            for slab in list(self._writes):
                if self._make_equal is None:
                    continue
                writes = list(self._writes[slab])
                try:
                    await self._make_equal(slab, chunks_of(writes))
                except Fenced:
                    return  # others see to what we have written
                except CsvfsError as error:
                    log.warning("slab %d is not made equal yet: %s", slab, error)
                    self._wanted.set()
                    continue
                self._done(slab, writes)
                delay_s = RETRY_S
            if self._wanted.is_set():
                await trio.sleep(delay_s)
                delay_s = min(2 * delay_s, RETRY_S_MAX)

    def _done(self, slab: SlabId, writes: list[PendingWrite]) -> None:
        for write in writes:
            write.complete = True
        rest = [write for write in self._writes.pop(slab) if write not in writes]
        if rest:
            self._writes[slab] = rest
            self._wanted.set()


def chunks_of(writes: list[PendingWrite]) -> list[int]:
    chunks: set[int] = set()
    for write in writes:
        last = write.block + write.count - 1
        chunks.update(range(write.block // BLOCKS_PER_CHUNK, last // BLOCKS_PER_CHUNK + 1))
    return sorted(chunks)
