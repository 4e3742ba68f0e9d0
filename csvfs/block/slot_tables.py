"""The tables of one slot, as views into the drive's mapping (FORMAT.md, "Slot metadata").

Place      block floor, above layout.py; opened and closed by drive.py, used by slab_copy.py.
Rule       `read_slot_metadata` reads a slot's metadata by pread before any view of it is made: so an error of
           the medium, or damage, is a typed error. (A page that the kernel dropped and then cannot read
           again, or a file that someone truncates, still ends the process by SIGBUS: its drives are then open
           uncleanly, as after a kill.)
"""

import os
import struct

from csvfs.block.layout import (
    ACTIVE_MAP_OFFSET,
    SLOT_HEADER_SIZE,
    WRITTEN_MAP_OFFSET,
    Layout,
    structure_checksum,
)
from csvfs.errors import Corrupt, DriveFailed
from csvfs.ids import DriveId, SlabId, VolumeId

SLOT_HEADER_MAGIC = b"CSVFSMD1"
_HEADER = struct.Struct("<8sQ16s16sQI4x")  # magic, checksum, drive, volume, slab, slot
assert _HEADER.size == SLOT_HEADER_SIZE  # FORMAT.md, "Slot metadata"
_CHECKSUM_START = 16


def pack_slot_header(drive_id: DriveId, volume: VolumeId, slab: SlabId, slot: int) -> bytes:
    body = _HEADER.pack(b"", 0, drive_id, volume, slab, slot)[_CHECKSUM_START:]
    return struct.pack("<8sQ", SLOT_HEADER_MAGIC, structure_checksum(body)) + body


def read_slot_metadata(fd: int, layout: Layout, slot: int) -> bytes:
    """All metadata of a slot. Raises DriveFailed when the medium gives an error or not all of it."""
    offset = layout.slot_metadata_offset(slot)
    try:
        raw = os.pread(fd, layout.metadata_stride, offset)
    except OSError as error:
        raise DriveFailed(f"metadata of slot {slot} cannot be read: {error.strerror}") from None
    if len(raw) != layout.metadata_stride:
        raise DriveFailed(
            f"metadata of slot {slot}: {len(raw)} B of {layout.metadata_stride} B: truncated drive"
        )
    return raw


def check_slot_header(raw: bytes, layout: Layout, wanted: bytes) -> None:
    """Raises Corrupt unless the metadata of a slot is that of the slab the slot table says."""
    start = layout.checksums_size + layout.epochs_size
    found = raw[start : start + SLOT_HEADER_SIZE]
    if found != wanted:
        why = "is all zeros" if not found.strip(b"\0") else "is damaged or of another slab"
        raise Corrupt(f"the header of its metadata {why}; this copy must be made anew from another one")


class SlotTables:
    """Views of one slot's tables: u32 per block and per chunk, a bit per chunk and per block."""

    __slots__ = ("active", "checksum_bytes", "checksums", "epochs", "header", "header_wanted", "written")

    def __init__(self, mapping: memoryview, layout: Layout, slot: int, header_wanted: bytes) -> None:
        start = slot * layout.metadata_stride
        epochs = start + layout.checksums_size
        maps = epochs + layout.epochs_size
        self.checksum_bytes = mapping[start : start + 4 * layout.blocks_per_slab]
        self.checksums = self.checksum_bytes.cast("I")
        self.epochs = mapping[epochs : epochs + 4 * layout.chunks_per_slab].cast("I")
        # Without a checksum nothing vouches for a block but the header: zeroed tables must not be holes.
        self.header = mapping[maps : maps + SLOT_HEADER_SIZE]
        self.header_wanted = header_wanted
        active = maps + ACTIVE_MAP_OFFSET
        self.active = mapping[active : active + layout.chunks_per_slab // 8]
        written = maps + WRITTEN_MAP_OFFSET
        self.written = mapping[written : written + layout.blocks_per_slab // 8]

    @property
    def header_holds(self) -> bool:
        return self.header == self.header_wanted

    def release(self) -> None:
        for view in (self.checksums, self.checksum_bytes, self.epochs, self.header, self.active, self.written):
            view.release()


def any_bits(bits: memoryview, start: int, end: int) -> bool:
    """Whether a bit of start..end-1 is set."""
    whole = int.from_bytes(bits[start >> 3 : (end + 7) >> 3], "little")
    return bool(whole >> (start & 7) & ((1 << (end - start)) - 1))


def set_bits(bits: memoryview | bytearray, start: int, end: int) -> None:
    """Set the bits of start..end-1, end > start."""
    first, last = start >> 3, (end + 7) >> 3
    mask = ((1 << (end - start)) - 1) << (start & 7)
    whole = int.from_bytes(bits[first:last], "little")
    if whole & mask != mask:
        bits[first:last] = (whole | mask).to_bytes(last - first, "little")


def clear_bits(bits: memoryview | bytearray, start: int, end: int) -> None:
    """Clear the bits of start..end-1, end > start."""
    first, last = start >> 3, (end + 7) >> 3
    mask = ((1 << (end - start)) - 1) << (start & 7)
    whole = int.from_bytes(bits[first:last], "little")
    if whole & mask:
        bits[first:last] = (whole & ~mask).to_bytes(last - first, "little")
