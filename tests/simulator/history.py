"""The history checker: what was written, acknowledged, flushed and read, block by block, and what may not be.

Place      simulator; knows nothing of the system but what programs see.
Rules      H1  A read returns the content of one write of that block, whole: never a third thing.
           H2  It is the last acknowledged one, or one issued since that may have been carried out.
           H3  An unanswered write becomes old or new once: what a read has shown while no write was under way
               stays, until something is written.
           H4  After a power cut of all copies that had it, a block may fall back, but not behind the last flush
               that was answered.
           H5  The writer of what may be gone by that is told so by its next flush, if it lives.
Order      writes of one block are numbered in the order in which they were issued: programs hold a lease.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import lru_cache

from csvfs.units import BLOCK_SIZE

Key = tuple[int, int]  # (slab, block)
_TOKEN = struct.Struct("<QII")
_ZERO = bytes(BLOCK_SIZE)


class Violation(Exception):
    """The system did what it must never do."""


class Unhealed(Violation):
    """It told no lie, but does not come back to order by itself."""


@lru_cache(maxsize=4096)
def content(key: Key, number: int) -> bytes:
    """Of the write with this number of this block; 0: never written."""
    if number == 0:
        return _ZERO
    return _TOKEN.pack(key[0], key[1], number) * (BLOCK_SIZE // _TOKEN.size)


class BlockHistory:
    __slots__ = ("acked", "by", "flushed", "gone_upto", "in_flight", "issued", "lost_by")

    def __init__(self) -> None:
        self.issued = 0  # the last write
        self.acked = 0  # reads that begin now return nothing older
        self.flushed = 0  # survives everything
        self.gone_upto = 0  # writes behind `acked` up to this one were not carried out, and never will be
        self.in_flight: set[int] = set()  # of writers that live
        self.by: object = None  # who wrote what was acknowledged last
        self.lost_by: object = None  # whose acknowledged write may be gone, and who has not been told


class History:
    """All blocks of a run."""

    def __init__(self) -> None:
        self._blocks: dict[Key, BlockHistory] = {}
        self.reads = 0
        self.writes = 0
        self.flushes = 0

    def block(self, key: Key) -> BlockHistory:
        found = self._blocks.get(key)
        if found is None:
            found = self._blocks[key] = BlockHistory()
        return found

    def keys(self) -> list[Key]:
        return sorted(self._blocks)

    # -- writes ----------------------------------------------------------------------------------

    def begin_write(self, key: Key) -> int:
        """A write of the block is issued; returns its number, which makes its content."""
        block = self.block(key)
        block.issued += 1
        block.in_flight.add(block.issued)
        return block.issued

    def acknowledge(self, key: Key, number: int, by: object) -> None:
        """The program was told that it is written."""
        block = self.block(key)
        self.writes += 1
        block.in_flight.discard(number)
        block.acked = max(block.acked, number)
        block.by = by

    def abandon(self, key: Key, number: int) -> None:
        """Its writer is dead, or was told that it is out: old or new."""
        self.block(key).in_flight.discard(number)

    # -- flushes ---------------------------------------------------------------------------------

    def begin_flush(self, slabs: Iterable[int]) -> list[tuple[Key, int]]:
        wanted = set(slabs)
        return [(key, block.acked) for key, block in self._blocks.items() if key[0] in wanted]

    def lost_of(self, by: object, slabs: Iterable[int]) -> set[Key]:
        """Of which blocks acknowledged writes of this writer may be gone, without its having been told."""
        wanted = set(slabs)
        return {key for key, block in self._blocks.items() if key[0] in wanted and block.lost_by is by}

    def told_of_loss(self, by: object, slabs: Iterable[int]) -> None:
        for key in self.lost_of(by, slabs):
            self.block(key).lost_by = None

    def end_flush(self, begun: list[tuple[Key, int]], lost: set[Key]) -> None:
        """The program was told that all acknowledged before is on the media. `lost`: `lost_of` when it began. Raises Violation."""
        self.flushes += 1
        for key in lost:
            raise Violation(f"slab {key[0]} block {key[1]}: flushed, but what was written had been lost with all copies (H5)")
        for key, number in begun:
            block = self.block(key)
            block.flushed = max(block.flushed, number)

    def power_lost(self, slab: int) -> None:
        """All copies that had what was not flushed have lost it (H4)."""
        for key, block in self._blocks.items():
            if key[0] == slab:
                if block.acked > block.flushed:
                    block.lost_by = block.by
                block.acked = block.flushed
                block.gone_upto = 0

    # -- reads -----------------------------------------------------------------------------------

    def begin_read(self, key: Key) -> tuple[int, int, int]:
        """What `end_read` wants to know of the time when the read began."""
        block = self.block(key)
        return block.acked, block.gone_upto, block.issued

    def end_read(self, key: Key, begun: tuple[int, int, int], data: bytes | bytearray | memoryview) -> int:
        """Judge what a read returned. Raises Violation."""
        block = self.block(key)
        self.reads += 1
        data = bytes(data)
        number = 0 if data == _ZERO else _TOKEN.unpack_from(data)[2]
        if number > block.issued or data != content(key, number):
            raise Violation(f"slab {key[0]} block {key[1]}: a third thing: {data[:32].hex()} (H1)")
        acked, gone_upto, issued = min(begun[0], block.acked), begun[1], begun[2]
        if number < acked:
            raise Violation(f"slab {key[0]} block {key[1]}: read {number}, but {acked} was acknowledged (H2)")
        if acked == begun[0] and acked < number <= gone_upto:
            raise Violation(f"slab {key[0]} block {key[1]}: read {number}, but {acked} was settled (H3)")
        if not block.in_flight and issued == block.issued and acked == begun[0]:
            block.acked = max(block.acked, number)
            block.gone_upto = block.issued
        return number
