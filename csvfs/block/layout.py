"""Where everything lies on a drive, and the CRC-64 of on-disk structures (FORMAT.md, "Drive").

Place      block floor, lowest. No I/O.
Rule       the whole layout is a function of (size, slab_size); a superblock records it for other readers, and
           one that records anything else is not used.
"""

import sys
from dataclasses import dataclass
from functools import lru_cache

import crcmod.predefined

from csvfs.errors import BadRequest, Corrupt
from csvfs.units import (
    BLOCK_SIZE,
    BLOCKS_PER_CHUNK,
    CHUNK_SIZE,
    KIB,
    MIB,
    SLAB_SIZE_MAX,
    SLAB_SIZE_MIN,
    format_size,
)

# The tables are used in place, through a mapping: their u32 are those of the machine.
assert sys.byteorder == "little", "the csvfs drive format is little-endian and mapped into memory"

structure_checksum = crcmod.predefined.mkPredefinedCrcFun("crc-64-jones")
assert structure_checksum(b"123456789") == 0xCAA717168609F281  # FORMAT.md, "Checksums"

SUPERBLOCK_SIZE = 4 * KIB
SUPERBLOCK_COPIES = 4
HEAD_SIZE = 128 * KIB  # reserved at the start: copy 0 at 0, copy 1 at 64 KiB
TAIL_SIZE = 128 * KIB  # reserved at the end: copy 2 at its start, copy 3 in the last 4 KiB
ENTRY_SIZE = 512
ALIGN_DATA = MIB
SLOT_COUNT_MAX = 1 << 20  # 64 TiB of slabs of 64 MiB; entries of all are kept in memory

# The map area of a slot: header, active map, written map.
SLOT_HEADER_SIZE = 64
ACTIVE_MAP_OFFSET = 512
WRITTEN_MAP_OFFSET = 2048
assert SLAB_SIZE_MAX // CHUNK_SIZE // 8 <= WRITTEN_MAP_OFFSET - ACTIVE_MAP_OFFSET


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@dataclass(slots=True, frozen=True)
class Layout:
    """Offsets and sizes in bytes. Made by `layout_of`; a mount uses it to read its own node's drives."""

    size: int  # as recorded: a multiple of 4 KiB
    slab_size: int
    slot_count: int
    table_offsets: tuple[int, int]  # halves A and B of the slot table
    metadata_offset: int
    metadata_stride: int  # per slot
    data_offset: int

    @property
    def blocks_per_slab(self) -> int:
        return self.slab_size // BLOCK_SIZE

    @property
    def chunks_per_slab(self) -> int:
        return self.slab_size // CHUNK_SIZE

    @property
    def checksums_size(self) -> int:
        """Of one slot's checksum table, padded; it comes first in the slot's metadata."""
        return _round_up(4 * self.blocks_per_slab, BLOCK_SIZE)

    @property
    def epochs_size(self) -> int:
        """Of one slot's chunk-epoch table, padded; it follows the checksum table."""
        return _round_up(4 * self.chunks_per_slab, BLOCK_SIZE)

    @property
    def maps_size(self) -> int:
        """Of one slot's map area, padded; it comes last."""
        return _round_up(WRITTEN_MAP_OFFSET + self.blocks_per_slab // 8, BLOCK_SIZE)

    @property
    def metadata_size(self) -> int:
        """Of the metadata of all slots."""
        return self.slot_count * self.metadata_stride

    @property
    def superblock_offsets(self) -> tuple[int, int, int, int]:
        return superblock_offsets(self.size)

    def entry_offset(self, slot: int, half: int) -> int:
        return self.table_offsets[half] + slot * ENTRY_SIZE

    def slot_metadata_offset(self, slot: int) -> int:
        return self.metadata_offset + slot * self.metadata_stride

    def slot_maps_offset(self, slot: int) -> int:
        return self.slot_metadata_offset(slot) + self.checksums_size + self.epochs_size

    def slot_header_offset(self, slot: int) -> int:
        """Of the header that says of which slab the metadata of a slot is (slot_tables.pack_slot_header)."""
        return self.slot_maps_offset(slot)

    def slot_data_offset(self, slot: int) -> int:
        return self.data_offset + slot * self.slab_size

    def block_data_offset(self, slot: int, block: int) -> int:
        """Of the 4,096 bytes of a block."""
        return self.data_offset + slot * self.slab_size + block * BLOCK_SIZE

    def block_checksum_offset(self, slot: int, block: int) -> int:
        """Of the u32 of a block in its checksum table; entries of consecutive blocks are consecutive."""
        return self.metadata_offset + slot * self.metadata_stride + 4 * block

    def block_written_offset(self, slot: int, block: int) -> int:
        """Of the byte of the written map that holds a block's bit, 1 << (block % 8)."""
        return self.slot_maps_offset(slot) + WRITTEN_MAP_OFFSET + block // 8

    def to_map(self) -> dict[str, int]:
        """What another process needs to make the same layout; travels as msgpack."""
        return {"size": self.size, "slab_size": self.slab_size}

    @staticmethod
    def from_map(value: object) -> "Layout":
        """Raises BadRequest on anything but what `to_map` gave."""
        if isinstance(value, dict):
            size, slab_size = value.get("size"), value.get("slab_size")
            if isinstance(size, int) and isinstance(slab_size, int):
                return layout_of(size, slab_size)
        raise BadRequest(f"not a drive layout: {value!r}")


def superblock_offsets(size: int) -> tuple[int, int, int, int]:
    """Of the four copies on a drive of `size` bytes (a multiple of 4 KiB)."""
    return (0, HEAD_SIZE // 2, size - TAIL_SIZE, size - SUPERBLOCK_SIZE)


def check_slab_size(slab_size: int) -> None:
    """Raises BadRequest unless it is a power of two in 4 MiB..256 MiB."""
    if not SLAB_SIZE_MIN <= slab_size <= SLAB_SIZE_MAX or slab_size & (slab_size - 1):
        raise BadRequest(
            f"slab size {slab_size} B is not a power of two from {format_size(SLAB_SIZE_MIN)} "
            f"to {format_size(SLAB_SIZE_MAX)}"
        )


def _with_slots(size: int, slab_size: int, slot_count: int) -> Layout:
    blocks, chunks = slab_size // BLOCK_SIZE, slab_size // CHUNK_SIZE
    stride = (
        _round_up(4 * blocks, BLOCK_SIZE)
        + _round_up(4 * chunks, BLOCK_SIZE)
        + _round_up(WRITTEN_MAP_OFFSET + blocks // 8, BLOCK_SIZE)
    )
    table_size = _round_up(slot_count * ENTRY_SIZE, BLOCK_SIZE)
    metadata_offset = HEAD_SIZE + 2 * table_size
    data_offset = _round_up(metadata_offset + slot_count * stride, ALIGN_DATA)
    tables = (HEAD_SIZE, HEAD_SIZE + table_size)
    return Layout(size, slab_size, slot_count, tables, metadata_offset, stride, data_offset)


def _end(layout: Layout) -> int:
    return layout.data_offset + layout.slot_count * layout.slab_size + TAIL_SIZE


def size_needed(slab_size: int) -> int:
    """Bytes of the smallest drive that holds one slab of this size."""
    check_slab_size(slab_size)
    return _end(_with_slots(0, slab_size, 1))


@lru_cache(maxsize=64)
def layout_of(size: int, slab_size: int) -> Layout:
    """The layout of a drive of `size` bytes, with as many slots as fit. BadRequest: too small, odd sizes."""
    check_slab_size(slab_size)
    size -= size % BLOCK_SIZE
    needed = size_needed(slab_size)
    if size < needed:
        raise BadRequest(
            f"too small ({size} B, needs at least {needed} B for slabs of {format_size(slab_size)})"
        )
    stride = _with_slots(size, slab_size, 1).metadata_stride
    slots = min((size - HEAD_SIZE - TAIL_SIZE) // (slab_size + stride + 2 * ENTRY_SIZE), SLOT_COUNT_MAX)
    while slots > 1 and _end(_with_slots(size, slab_size, slots)) > size:
        slots -= 1  # padding took the place of one; at most a few rounds
    return _with_slots(size, slab_size, slots)


def check_zero(raw: bytes, start: int, what: str) -> None:
    """Reserved bytes are zero, and verified. Raises Corrupt."""
    if raw[start:].strip(b"\0"):
        raise Corrupt(f"{what}: reserved bytes from {start} on are not zero")


_SLAB = layout_of(1 << 30, 64 * MIB)
assert (_SLAB.checksums_size, _SLAB.epochs_size, _SLAB.maps_size) == (64 * KIB, 4 * KIB, 4 * KIB)  # FORMAT.md
assert _SLAB.metadata_stride == 72 * KIB
assert BLOCKS_PER_CHUNK == 16  # two bytes of written map per chunk
