"""The image: a metadata database's bytes as blocks of the metadata slabs, and the log of what changed.

Place      coordinator floor; below slab_vfs.py. Synchronous: no network; the service sends the log.
Layout     block 0 header, then the WAL region, then the database file (FORMAT.md, "Metadata slabs").
Owns       what was written and is not on the members yet (overlay), and a copy of the WAL region.

Invariants
  M1  The log keeps SQLite's order: two writes of one block are merged only if no barrier lies between them.
      Every prefix of it is therefore a state in which SQLite may have crashed, and from which it recovers.
  M2  A block is read from the members only if nothing newer of it is in the overlay.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

import crcmod.predefined

from csvfs.errors import BadRequest, Corrupt, NoSpace
from csvfs.ids import VolumeId
from csvfs.units import BLOCK_SIZE, MIB

ReadBlocks = Callable[[int, int], bytes | memoryview]  # (block, count) -> count * 4,096 bytes, verified

# Of the database, in bytes. A small change writes about six pages: small ones make its log, which goes to all
# members, a third as long as pages of a block's size do.
PAGE_SIZE = 1024
PAGES_PER_BLOCK = BLOCK_SIZE // PAGE_SIZE
WAL_BLOCKS_MAX = 16 * MIB // BLOCK_SIZE
WAL_BLOCKS_MIN = 64
WAL_FIRST_BLOCK = 1
FORMAT_VERSION = 1
_MAGIC = b"CSVFSMD1"
_HEADER = struct.Struct(
    "<8sQIIIII16s"
)  # magic, checksum, version, page size, wal block, wal blocks, db block, volume
_CHECKED_FROM = 16
assert _HEADER.size == 52  # FORMAT.md, "Metadata slabs"
_crc64 = crcmod.predefined.mkPredefinedCrcFun("crc-64-we")

# 64 MiB, as SQLite's cache. A checkpoint writes pages; the rest of their blocks has to be at hand, for it holds
# up everything: whatever SQLite changes it has read before.
RECENT_BLOCKS_MAX = 16_384
_LOAD_BLOCKS = 64  # the WAL region is read from the members in pieces of this size, when first touched
_PAGE_COUNT_OFFSET = 28  # of a SQLite database header: its size in pages, big-endian
_ZERO_BLOCK = bytes(BLOCK_SIZE)


@dataclass(slots=True, frozen=True, eq=False)
class LogWrite:
    """Write `data` (4,096 bytes) to `block` of the address space."""

    block: int
    data: bytes


@dataclass(slots=True, frozen=True, eq=False)
class LogBarrier:
    """All writes before it must be on the medium before any write behind it is."""


LogEntry = LogWrite | LogBarrier


class SlabImage:
    """Block device of one metadata database; not shared between threads."""

    def __init__(
        self, read_blocks: ReadBlocks, capacity_blocks: int, wal_blocks: int, *, created: bool
    ) -> None:
        self._read_blocks = read_blocks
        self.capacity_blocks = capacity_blocks
        self.wal_blocks = wal_blocks
        self.database_block = WAL_FIRST_BLOCK + wal_blocks
        self._overlay: dict[int, bytes] = {}  # header and database blocks that the members lack
        self._recent: dict[int, bytes] = {}  # as the members have them
        self._log: list[LogEntry] = []
        self._behind_barrier = False  # something was written since the last barrier, taken or not
        # Writes since the last barrier or take_log. None: a WAL block; its bytes are taken at the end.
        self._stretch: dict[int, bytes | None] = {}
        self._wal = bytearray(wal_blocks * BLOCK_SIZE)  # checkpoints read it back, so it stays in memory
        self._wal_unread: set[int] = set() if created else set(range(-(-wal_blocks // _LOAD_BLOCKS)))
        # Recovery reads frames until one does not verify: after a start the whole region is a right size.
        self.wal_size = 0 if created else wal_blocks * BLOCK_SIZE
        self.wal_end = 0  # bytes; end of the last write
        self.database_size = 0  # bytes
        if not created:
            self.database_size = self._database_size_on_members()

    @staticmethod
    def create(read_blocks: ReadBlocks, capacity_blocks: int, first_slab_blocks: int) -> "SlabImage":
        """An empty image over slabs that read as zeros. It counts as one once `write_header` is in the log.

        Args     capacity_blocks: of all metadata slabs; first_slab_blocks: of the first, which holds the WAL.
        Raises   BadRequest: too small.
        """
        wal_blocks = min(WAL_BLOCKS_MAX, first_slab_blocks // 4)
        if wal_blocks < WAL_BLOCKS_MIN or capacity_blocks < first_slab_blocks:
            raise BadRequest(
                f"metadata needs a slab of {4 * WAL_BLOCKS_MIN} blocks at least, got {first_slab_blocks}"
                f" of {capacity_blocks}; choose a larger slab size"
            )
        return SlabImage(read_blocks, capacity_blocks, wal_blocks, created=True)

    @staticmethod
    def open(read_blocks: ReadBlocks, capacity_blocks: int, volume: VolumeId) -> "SlabImage":
        """The image that the members hold. Raises Corrupt: block 0 is no header of this volume's metadata."""
        header = bytes(read_blocks(0, 1))
        return SlabImage(
            read_blocks, capacity_blocks, _parse_header(header, capacity_blocks, volume), created=False
        )

    def write_header(self, volume: VolumeId) -> None:
        """Make the image valid: the last write of its creation."""
        self.barrier()
        fields = (FORMAT_VERSION, PAGE_SIZE, WAL_FIRST_BLOCK, self.wal_blocks, self.database_block, volume)
        block = bytearray(BLOCK_SIZE)
        _HEADER.pack_into(block, 0, _MAGIC, 0, *fields)
        _HEADER.pack_into(block, 0, _MAGIC, _crc64(block[_CHECKED_FROM:]), *fields)
        self._write_block(0, bytes(block))
        self.barrier()

    # The log

    def take_log(self) -> list[LogEntry]:
        """All that was written since the last call, in the order the members must get it."""
        self._end_stretch()
        log, self._log = self._log, []
        return log

    def written(self, entries: list[LogEntry]) -> None:
        """`entries` are on the members: from now on their blocks are read there (unless written again)."""
        overlay = self._overlay
        for entry in entries:
            if isinstance(entry, LogWrite) and overlay.get(entry.block) is entry.data:
                del overlay[entry.block]
                self._remember(entry.block, entry.data)

    @property
    def overlay_blocks(self) -> int:
        """How many blocks wait in memory to be written to the members."""
        return len(self._overlay)

    def barrier(self) -> None:
        """SQLite relies on all that was written before; it may have left with an earlier take_log already."""
        self._end_stretch()
        if self._behind_barrier:
            self._log.append(LogBarrier())
            self._behind_barrier = False

    def _end_stretch(self) -> None:
        for block, data in self._stretch.items():
            if data is None:
                offset = (block - WAL_FIRST_BLOCK) * BLOCK_SIZE
                data = bytes(self._wal[offset : offset + BLOCK_SIZE])
            self._log.append(LogWrite(block, data))
            self._behind_barrier = True
        self._stretch.clear()

    # Space

    def grow(self, capacity_blocks: int) -> None:
        """The service has added a slab. Capacity never shrinks."""
        self.capacity_blocks = max(self.capacity_blocks, capacity_blocks)

    @property
    def database_pages_max(self) -> int:
        return (self.capacity_blocks - self.database_block) * PAGES_PER_BLOCK

    @property
    def wal_used(self) -> float:
        """0 to 1: how much of the WAL region the frames since the last restart fill."""
        return self.wal_end / len(self._wal)

    # The write-ahead log file

    def read_wal(self, amount: int, offset: int) -> bytes:
        end = min(offset + amount, self.wal_size)
        if end <= offset:
            return b""
        self._load_wal(offset, end)
        return bytes(self._wal[offset:end])

    def write_wal(self, data: bytes | memoryview, offset: int) -> None:
        """Raises NoSpace when the write would leave the region: the transaction is too large."""
        end = offset + len(data)
        if end > len(self._wal):
            raise NoSpace(
                f"transaction exceeds the metadata log of {self.wal_blocks} blocks; use smaller batches"
            )
        first, last = offset // BLOCK_SIZE, (end - 1) // BLOCK_SIZE
        pieces = (first // _LOAD_BLOCKS, last // _LOAD_BLOCKS)
        if last - first > _LOAD_BLOCKS or not self._wal_unread.isdisjoint(pieces):
            self._load_wal(offset, end)
        self._wal[offset:end] = data
        for block in range(first, last + 1):
            self._stretch[WAL_FIRST_BLOCK + block] = None
        self.wal_end = end
        self.wal_size = max(self.wal_size, end)

    def truncate_wal(self, size: int) -> None:
        """Only to nothing: its header is wiped, so that no old frame is found again."""
        if size == 0 and self.wal_size:
            self.write_wal(_ZERO_BLOCK, 0)
            self.wal_size = self.wal_end = 0

    def _load_wal(self, start: int, end: int) -> None:
        if not self._wal_unread:
            return
        piece_size = _LOAD_BLOCKS * BLOCK_SIZE
        for piece in range(start // piece_size, (end - 1) // piece_size + 1):
            if piece in self._wal_unread:
                first = piece * _LOAD_BLOCKS
                count = min(_LOAD_BLOCKS, self.wal_blocks - first)
                data = self._from_members(WAL_FIRST_BLOCK + first, count)
                self._wal[first * BLOCK_SIZE : (first + count) * BLOCK_SIZE] = data
                self._wal_unread.discard(piece)

    # The database file

    def read_database(self, amount: int, offset: int) -> bytes:
        end = min(offset + amount, self.database_size)
        if end <= offset:
            return b""
        first, skip = divmod(offset, BLOCK_SIZE)
        last = (end - 1) // BLOCK_SIZE
        if first == last:
            block = self._block(self.database_block + first)
            return block if end - offset == BLOCK_SIZE else block[skip : skip + end - offset]
        data = b"".join(self._block(self.database_block + block) for block in range(first, last + 1))
        return data[skip : skip + end - offset]

    def write_database(self, data: bytes | memoryview, offset: int) -> None:
        """Raises NoSpace past the capacity. SQLite is told the capacity, so only a bug gets that far."""
        end = offset + len(data)
        if self.database_block + -(-end // BLOCK_SIZE) > self.capacity_blocks:
            raise NoSpace(f"metadata slabs of {self.capacity_blocks} blocks are full; add a slab")
        done = 0
        while done < len(data):
            block, skip = divmod(offset + done, BLOCK_SIZE)
            size = min(BLOCK_SIZE - skip, len(data) - done)
            piece = bytes(data[done : done + size])
            if size != BLOCK_SIZE:
                known = block * BLOCK_SIZE < self.database_size
                old = self._block(self.database_block + block) if known else _ZERO_BLOCK
                piece = old[:skip] + piece + old[skip + size :]
            self._write_block(self.database_block + block, piece)
            done += size
        self.database_size = max(self.database_size, end)

    def truncate_database(self, size: int) -> None:
        self.database_size = min(self.database_size, size)

    def _write_block(self, block: int, data: bytes) -> None:
        self._recent.pop(block, None)
        self._overlay[block] = data
        self._stretch[block] = data

    def _block(self, block: int) -> bytes:
        data = self._overlay.get(block) or self._recent.get(block)
        if data is None:
            data = self._from_members(block, 1)
            self._remember(block, data)
        return data

    def _remember(self, block: int, data: bytes) -> None:
        if len(self._recent) >= RECENT_BLOCKS_MAX:
            del self._recent[next(iter(self._recent))]
        self._recent[block] = data

    def _from_members(self, block: int, count: int) -> bytes:
        data = bytes(self._read_blocks(block, count))
        if len(data) != count * BLOCK_SIZE:
            raise Corrupt(f"metadata block {block}: got {len(data)} bytes, want {count * BLOCK_SIZE}")
        return data

    def _database_size_on_members(self) -> int:
        # Pages that only the WAL knows of do not count: SQLite learns the size from the WAL then.
        page_one = self._from_members(self.database_block, 1)
        pages = int.from_bytes(page_one[_PAGE_COUNT_OFFSET : _PAGE_COUNT_OFFSET + 4], "big")
        if not 0 < pages <= self.database_pages_max:
            raise Corrupt(
                f"metadata database says {pages} pages, its slabs have room for {self.database_pages_max};"
                " check the volume's list of metadata slabs"
            )
        return pages * PAGE_SIZE


def _parse_header(block: bytes, capacity_blocks: int, volume: VolumeId) -> int:
    """How many blocks the WAL region has."""
    if len(block) != BLOCK_SIZE:
        raise Corrupt(f"metadata header: got {len(block)} bytes, want {BLOCK_SIZE}")
    magic, checksum, version, page_size, wal_block, wal_blocks, database_block, owner = _HEADER.unpack_from(
        block
    )
    if magic != _MAGIC:
        raise Corrupt(
            f"metadata header: magic {magic!r}, want {_MAGIC!r}; creation was not finished, or a wrong slab"
        )
    if _crc64(block[_CHECKED_FROM:]) != checksum:
        raise Corrupt(f"metadata header: its checksum is not {checksum:#018x}; see csvfs volume status")
    if version != FORMAT_VERSION:
        raise Corrupt(f"metadata header: version {version}, this csvfs reads {FORMAT_VERSION}; upgrade csvfs")
    if owner != volume:
        raise Corrupt(f"metadata header: of volume {owner.hex()}, want {volume.hex()}")
    sane = (
        page_size == PAGE_SIZE
        and wal_block == WAL_FIRST_BLOCK
        and WAL_BLOCKS_MIN <= wal_blocks <= WAL_BLOCKS_MAX
        and database_block == wal_block + wal_blocks
        and database_block < capacity_blocks
        and not any(block[_HEADER.size :])
    )
    if not sane:
        raise Corrupt(
            f"metadata header: page size {page_size}, log {wal_block}+{wal_blocks}, database at"
            f" {database_block} of {capacity_blocks} blocks do not fit together"
        )
    return int(wal_blocks)
