"""The copies on a lab's drives, read beside the running servers: are all that count equal, block by block?

Place      tests. Reads drive files with the layout and slot table of the product; page cache and mappings of one
           file are one, so what the servers have stored is seen at once. For a lab that is at rest.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from random import Random

from csvfs.block.layout import ACTIVE_MAP_OFFSET, ENTRY_SIZE, Layout
from csvfs.block.slot_table import STATE_IN_USE, SlotTable
from csvfs.block.superblock import read_superblock
from csvfs.errors import Corrupt
from csvfs.ids import METADATA_SLAB_ID_MIN
from csvfs.units import BLOCK_SIZE, BLOCKS_PER_CHUNK
from csvfs.wire.block_messages import ROLE_IN_SYNC


@dataclass(slots=True, frozen=True)
class CopyOnDrive:
    """One copy as its drive has it."""

    path: str
    layout: Layout
    slot: int
    volume: bytes
    slab: int
    epoch: int
    role: int

    def read(self, offset: int, size: int) -> bytes:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def checksums(self) -> bytes:
        return self.read(self.layout.block_checksum_offset(self.slot, 0), 4 * self.layout.blocks_per_slab)

    def active_chunks(self) -> int:
        """How many chunks are marked active."""
        offset = self.layout.slot_maps_offset(self.slot) + ACTIVE_MAP_OFFSET
        raw = self.read(offset, self.layout.chunks_per_slab // 8)
        return int.from_bytes(raw, "little").bit_count()

    def written_blocks(self) -> list[int]:
        raw = self.checksums()
        return [b for b in range(self.layout.blocks_per_slab) if raw[4 * b : 4 * b + 4] != b"\0\0\0\0"]


def copies_on(path: str) -> Iterator[CopyOnDrive]:
    """The copies on one drive; nothing of a file that is no drive (any more)."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        superblock = read_superblock(fd, os.fstat(fd).st_size).superblock
        entries = SlotTable(fd, superblock.layout, superblock.drive_id).entries
    except Corrupt:
        return
    finally:
        os.close(fd)
    for slot, entry in enumerate(entries):
        if entry is not None and entry.state == STATE_IN_USE:
            yield CopyOnDrive(
                path, superblock.layout, slot, bytes(entry.volume), entry.slab, entry.epoch, entry.role
            )


@dataclass(slots=True)
class Comparison:
    slabs: int = 0
    copies: int = 0
    blocks: int = 0  # written ones, of all slabs once
    unequal: list[str] = field(default_factory=list)


def compare_copies(paths: Iterable[str], wanted: int = 3) -> Comparison:
    """All copies in sync at each slab's newest epoch: as many as wanted, and with equal checksums of all blocks."""
    by_slab: dict[tuple[bytes, int], list[CopyOnDrive]] = defaultdict(list)
    for path in paths:
        for copy in copies_on(path):
            by_slab[copy.volume, copy.slab].append(copy)
    result = Comparison()
    for (_, slab), copies in sorted(by_slab.items()):
        newest = max(copy.epoch for copy in copies)
        counted = [c for c in copies if c.epoch == newest and c.role == ROLE_IN_SYNC]
        result.slabs += 1
        result.copies += len(counted)
        first = counted[0].checksums() if counted else b""
        result.blocks += sum(first[i : i + 4] != b"\0\0\0\0" for i in range(0, len(first), 4))
        if len(counted) != wanted:
            result.unequal.append(f"slab {slab}: {len(counted)} copies in sync at epoch {newest}, not {wanted}")
        for copy in counted[1:]:
            other = copy.checksums()
            if other != first:
                block = next(i for i in range(0, len(first), 4) if first[i : i + 4] != other[i : i + 4]) // 4
                result.unequal.append(f"slab {slab} block {block}: {counted[0].path} and {copy.path} differ")
    return result


def flip_bit(path: str, bit: int) -> None:
    """`bit`: its number from the start of the file."""
    fd = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(fd, 1, bit // 8)
        os.pwrite(fd, bytes([byte[0] ^ 1 << bit % 8]), bit // 8)
    finally:
        os.close(fd)


def changed_chunks(before: dict[tuple[bytes, int], bytes], after: dict[tuple[bytes, int], bytes]) -> int:
    """Chunks in which the checksum of any block is another one: what was written in between, seen from outside."""
    size = 4 * BLOCKS_PER_CHUNK
    count = 0
    for key, sums in after.items():
        old = before.get(key, bytes(len(sums)))
        count += sum(sums[at : at + size] != old[at : at + size] for at in range(0, len(sums), size))
    return count


def checksum_tables(paths: Iterable[str]) -> dict[tuple[bytes, int], bytes]:
    """By volume and slab; for drives of one node, which have one copy of each slab."""
    return {(copy.volume, copy.slab): copy.checksums() for path in paths for copy in copies_on(path)}


def rot(paths: list[str], rng: Random, count: int) -> dict[str, int]:
    """Flip `count` single bits on these drives, each in another place; how many of what.

    Half in data, two fifths in checksums, the rest in entries of the slot table (one half of each) and superblocks
    (two of four). Of data slabs only: what a coordinator overwrites just then is healed without being found.
    """
    copies = [c for path in paths for c in copies_on(path) if c.slab < METADATA_SLAB_ID_MIN]
    written = [(copy, block) for copy in copies for block in copy.written_blocks()]
    layouts = [(path, next(copies_on(path)).layout) for path in paths]
    superblocks = [(path, offset, 312) for path, layout in layouts for offset in layout.superblock_offsets[:2]]
    slots = [(path, layout, slot) for path, layout in layouts for slot in range(layout.slot_count)]
    chosen_slots = rng.sample(slots, min(len(slots), count // 20))
    entries = [
        (path, layout.entry_offset(slot, rng.randrange(2)), ENTRY_SIZE) for path, layout, slot in chosen_slots
    ]
    sums = 2 * count // 5
    chosen = rng.sample(written, count - len(superblocks) - len(entries))
    spots = superblocks + entries
    spots += [(c.path, c.layout.block_checksum_offset(c.slot, block), 4) for c, block in chosen[:sums]]
    spots += [(c.path, c.layout.block_data_offset(c.slot, block), BLOCK_SIZE) for c, block in chosen[sums:]]
    for path, offset, size in spots:
        flip_bit(path, offset * 8 + rng.randrange(size * 8))
    return {
        "data": len(chosen) - sums, "checksums": sums, "slot entries": len(entries), "superblocks": len(superblocks),
    }  # fmt: skip
