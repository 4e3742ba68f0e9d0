"""One drive's copy of a slab: reads, writes, trims, heals of verified blocks.

Place      block floor, above copy_tables.py; made by drive.py, whose drive server calls it inline: synchronous,
           no locks, no trio. All calls for one drive come from one thread (only Drive.flush may run in another).

Order of stores, so that a kill at any point leaves old or new content, or a chunk that says it is active
  write     active mark and chunk epoch, data, checksum, written bit.     trim: written bit, checksum, hole.
  So a written bit without a checksum is never left by a kill: it means that a table was damaged.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Sequence

from crc32c import crc32c

from csvfs.block.copy_tables import CopyTables
from csvfs.block.layout import BLOCKS_PER_CHUNK
from csvfs.block.medium import punch_hole
from csvfs.block.slot_tables import SlotTables, any_bits, clear_bits, set_bits
from csvfs.errors import BadRequest, Corrupt, DriveFailed
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import NEVER_WRITTEN, ZERO_BLOCK

Data = bytes | bytearray | memoryview
_NO_CHECKSUM = bytes(4)
_CHUNK_SHIFT = BLOCKS_PER_CHUNK.bit_length() - 1
_BLOCK_SHIFT = BLOCK_SIZE.bit_length() - 1
_NOT_NOWAIT = (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class SlabCopy(CopyTables):
    """Made by Drive.create_slab and Drive.open; found by Drive.find.

    All methods raise DriveFailed (I/O error, or the drive failed before), Corrupt (the slot's metadata is
    damaged) and BadRequest (a range outside the slab). Blocks and chunks are numbered from 0 within the slab.
    """

    __slots__ = ()

    # Writing

    def write_blocks(self, block: int, data: Data, checksums: Data) -> None:
        """Write consecutive blocks that the caller has verified against `checksums` (packed u32).

        When it returns, data and checksums are in the hands of the operating system (durable after
        Drive.flush). After an error some of the blocks may be torn; their chunks are active.
        """
        tables = self.tables
        if tables is None or self._drive.failure is not None:
            tables = self._open()
        self.recently_used = True
        count = len(checksums) >> 2
        end = block + count
        if block < 0 or count == 0 or end > self.block_count or len(data) != count << _BLOCK_SHIFT:
            self._check_range(block, count)
            raise BadRequest(f"{len(data)} bytes of data for {count} checksums")
        self._mark(tables, block, end, self.epoch)
        try:
            self._store(tables, block, end, data, checksums)
        except DriveFailed:
            self._not_written(block, end)
            raise
        self._drive.counters.writes += 1

    def _store(self, tables: SlotTables, block: int, end: int, data: Data, checksums: Data) -> None:
        try:
            written = os.pwrite(self._fd, data, self.data_offset + (block << _BLOCK_SHIFT))
        except OSError as error:
            raise self._drive.io_error("write", self.slab, block, error) from None
        if written != len(data):
            self._store_rest(block, data, written)
        tables.checksum_bytes[block << 2 : end << 2] = checksums
        bits = tables.written
        if end - block == 1:
            old = bits[block >> 3]
            bit = 1 << (block & 7)
            if not old & bit:
                bits[block >> 3] = old | bit
        else:
            set_bits(bits, block, end)

    def _store_rest(self, block: int, data: Data, written: int) -> None:
        """After a short pwrite (a file system fills up): go on until all is written or an error says why."""
        offset = self.data_offset + (block << _BLOCK_SHIFT)
        view = memoryview(data)
        while written < len(view):
            try:
                written += os.pwrite(self._fd, view[written:], offset + written)
            except OSError as error:
                raise self._drive.io_error("write", self.slab, block, error) from None

    def trim_blocks(self, block: int, count: int) -> None:
        """Make blocks read as zeros; in a drive file their space is given back."""
        tables = self._open()
        self._check_range(block, count)
        self._mark(tables, block, block + count, self.epoch)
        try:
            self._erase(tables, block, block + count)
        except DriveFailed:
            self._not_written(block, block + count)
            raise

    def _erase(self, tables: SlotTables, block: int, end: int) -> None:
        clear_bits(tables.written, block, end)
        tables.checksum_bytes[block << 2 : end << 2] = bytes((end - block) << 2)
        if not self._drive.is_file:
            return  # the old bytes stay, unread: a discard per trim would stall the device
        try:
            punch_hole(self._fd, self.data_offset + (block << _BLOCK_SHIFT), (end - block) << _BLOCK_SHIFT)
        except OSError as error:
            raise self._drive.io_error("trim", self.slab, block, error) from None

    def heal_block(self, block: int, data: Data, checksum: int) -> bool:
        """Rewrite a block with the content of another in-sync copy, iff what is stored does not verify now.

        Args     checksum: NEVER_WRITTEN when the other copy has never written it; `data` is ignored then.
        Returns  whether it was rewritten. Raises BadRequest when data and checksum do not agree.
        """
        tables = self._open()
        self._check_range(block, 1)
        if checksum != NEVER_WRITTEN and (len(data) != BLOCK_SIZE or self._checksum(data, block) != checksum):
            raise BadRequest(f"slab {self.slab} block {block}: the healing data does not match its checksum")
        if self._is_good(tables, block):
            return False
        if checksum == NEVER_WRITTEN:
            self._erase(tables, block, block + 1)
        else:
            self._store(tables, block, block + 1, data, checksum.to_bytes(4, "little"))
        self._drive.counters.healed += 1
        return True

    # Reading

    def read_blocks(self, block: int, count: int) -> tuple[bytes, Data]:
        """Packed checksums and data of consecutive blocks, verified; blocks never written are zeros.

        Raises  Corrupt, with `bad_blocks`, when some do not verify or cannot be read from the medium.
        """
        tables = self.tables
        if tables is None or self._drive.failure is not None:
            tables = self._open()
        self.recently_used = True
        self._check_range(block, count)
        packed = bytes(tables.checksum_bytes[block << 2 : (block + count) << 2])
        if packed.count(0) == len(packed):
            return packed, self._zeros(tables, block, count)
        try:
            data = os.pread(self._fd, count << _BLOCK_SHIFT, self.data_offset + (block << _BLOCK_SHIFT))
        except OSError as error:
            data = self._salvage(block, count, error)
        return packed, self._verified(tables, block, count, packed, data)

    def read_blocks_nowait(self, block: int, count: int) -> tuple[bytes, Data] | None:
        """As read_blocks, from the page cache alone; None: the medium would have to be asked."""
        tables = self.tables
        if tables is None or self._drive.failure is not None:
            return None
        self._check_range(block, count)
        packed = bytes(tables.checksum_bytes[block << 2 : (block + count) << 2])
        if packed.count(0) == len(packed):
            return packed, self._zeros(tables, block, count)
        data = bytearray(count << _BLOCK_SHIFT)
        offset = self.data_offset + (block << _BLOCK_SHIFT)
        try:
            if os.preadv(self._fd, [data], offset, os.RWF_NOWAIT) != len(data):
                return None
        except OSError as error:
            if error.errno in _NOT_NOWAIT:
                return None
            raise self._drive.io_error("read", self.slab, block, error) from None
        return packed, self._verified(tables, block, count, packed, data)

    def _zeros(self, tables: SlotTables, block: int, count: int) -> bytes:
        """What a range without checksums reads as, without asking the medium."""
        if any_bits(tables.written, block, block + count):
            bits = tables.written
            raise self._bad(b for b in range(block, block + count) if bits[b >> 3] >> (b & 7) & 1)
        if not tables.header_holds:
            self._check_header(tables)
        self._drive.counters.reads += 1
        return ZERO_BLOCK if count == 1 else bytes(count << _BLOCK_SHIFT)

    def _verified(self, tables: SlotTables, block: int, count: int, packed: bytes, data: Data) -> Data:
        if len(data) != count << _BLOCK_SHIFT:
            raise self._drive.truncated_error(self.slab, block)
        drive = self._drive
        seed = self.seed
        if count == 1:
            if (crc32c(data, seed ^ block) or 1) != int.from_bytes(packed, "little"):
                raise self._bad((block,))
            drive.counters.reads += 1
            return data
        bad, holes = [], []
        view = memoryview(data)
        for number, checksum in enumerate(memoryview(packed).cast("I"), block):
            start = (number - block) << _BLOCK_SHIFT
            if checksum == NEVER_WRITTEN:
                holes.append(start)
                if tables.written[number >> 3] >> (number & 7) & 1:
                    bad.append(number)
            elif (crc32c(view[start : start + BLOCK_SIZE], seed ^ number) or 1) != checksum:
                bad.append(number)
        if bad:
            raise self._bad(bad)
        if holes:
            self._check_header(tables)
            data = bytearray(data)
            for start in holes:
                data[start : start + BLOCK_SIZE] = ZERO_BLOCK
        drive.counters.reads += 1
        return data

    def _salvage(self, block: int, count: int, error: OSError) -> bytes:
        """After a read error, block by block: one bad sector costs one block, which a heal rewrites."""
        failed = self._drive.io_error("read", self.slab, block, error)
        if error.errno != errno.EIO:
            raise failed from None
        pieces, unreadable = [], []
        for number in range(block, block + count):
            try:
                pieces.append(os.pread(self._fd, BLOCK_SIZE, self.data_offset + (number << _BLOCK_SHIFT)))
            except OSError:
                unreadable.append(number)
        if unreadable:
            raise self._bad(unreadable)
        return b"".join(pieces)

    def _bad(self, blocks: Iterable[int]) -> Corrupt:
        numbers = tuple(blocks)
        self._drive.counters.checksum_errors += len(numbers)
        error = Corrupt(
            f"drive {self._drive.path}: slab {self.slab}: {len(numbers)} blocks do not verify, "
            f"the first is {numbers[0]}; another copy must be read"
        )
        error.bad_blocks = numbers
        return error

    def _checksum(self, data: Data, block: int) -> int:
        return crc32c(data, self.seed ^ block) or 1

    def _is_good(self, tables: SlotTables, block: int) -> bool:
        checksum = tables.checksums[block]
        if checksum == NEVER_WRITTEN:
            self._check_header(tables)
            return not tables.written[block >> 3] >> (block & 7) & 1
        data = self._raw_block(block)
        return len(data) == BLOCK_SIZE and self._checksum(data, block) == checksum

    def _raw_block(self, block: int) -> bytes:
        """As it lies on the medium; empty where the medium gives an error."""
        try:
            return os.pread(self._fd, BLOCK_SIZE, self.data_offset + (block << _BLOCK_SHIFT))
        except OSError as error:
            self._drive.io_error("read", self.slab, block, error)
            return b""

    def warm_blocks(self, block: int, count: int) -> None:
        """Bring blocks and tables into the page cache for read_blocks, which raises what fails here.

        May run in another thread.
        """
        with contextlib.suppress(OSError):
            if self.tables is None:
                layout = self._drive.layout
                os.pread(self._fd, layout.metadata_stride, layout.slot_metadata_offset(self.slot))
            os.pread(self._fd, count << _BLOCK_SHIFT, self.data_offset + (block << _BLOCK_SHIFT))

    def bad_blocks_scan(self, block: int, count: int) -> list[int]:
        """The blocks of a range that do not verify: for scrub and repair. Counts no checksum errors."""
        tables = self._open()
        self._check_header(tables)
        self._check_range(block, count)
        numbers = range(block, block + count)
        sums = tables.checksums[block : block + count].tolist()
        if not any(sums) and not any_bits(tables.written, block, block + count):
            return []
        try:
            data = memoryview(
                os.pread(self._fd, count << _BLOCK_SHIFT, self.data_offset + (block << _BLOCK_SHIFT))
            )
        except OSError:
            return [number for number in numbers if not self._is_good(tables, number)]
        bad = []
        for index, number in enumerate(numbers):
            if sums[index] == NEVER_WRITTEN:
                good = not tables.written[number >> 3] >> (number & 7) & 1
            else:
                piece = data[index << _BLOCK_SHIFT : (index + 1) << _BLOCK_SHIFT]
                good = len(piece) == BLOCK_SIZE and self._checksum(piece, number) == sums[index]
            if not good:
                bad.append(number)
        return bad

    def has_blocks(self, block: int, count: int) -> bool:
        """Whether any block of a range has a checksum: else there is nothing on the medium to read."""
        sums = bytes(self._open().checksum_bytes[block << 2 : (block + count) << 2])
        return sums.count(0) != len(sums)

    def unwritten(self, block: int, count: int) -> int:
        """How many blocks of a range have no content here. Raises BadRequest, Corrupt: the tables are damaged."""
        tables = self._open()
        self._check_header(tables)
        self._check_range(block, count)
        return tables.checksums[block : block + count].tolist().count(NEVER_WRITTEN)

    def scrub_slice(self, block: int, count: int) -> tuple[list[int], int]:
        """The blocks of a range that do not verify, and how many written bits were missing and have been set."""
        bad = self.bad_blocks_scan(block, count)
        tables = self._open()
        repaired = 0
        for number, checksum in enumerate(tables.checksums[block : block + count].tolist(), block):
            if checksum != NEVER_WRITTEN and not tables.written[number >> 3] >> (number & 7) & 1:
                tables.written[number >> 3] |= 1 << (number & 7)
                repaired += number not in bad
        self._drive.counters.checksum_errors += len(bad)
        self._drive.counters.healed += repaired
        return bad, repaired

    def verify_chunk(self, chunk: int) -> list[int]:
        """The blocks of a chunk that do not verify."""
        return self.bad_blocks_scan(chunk << _CHUNK_SHIFT, BLOCKS_PER_CHUNK)

    def adopt_torn_chunk(self, chunk: int) -> int:
        """Give the blocks of an active chunk that do not verify the checksum of what is there; how many were.

        Rule  see Drive.adopt_torn: only for the last in-sync copy after an unclean open.
        """
        tables = self._open()
        adopted = 0
        for block in self.verify_chunk(chunk):
            data = self._raw_block(block)
            if len(data) != BLOCK_SIZE:
                continue  # unreadable: it stays bad, and is reported by whoever reads it
            if tables.checksums[block] == NEVER_WRITTEN and not self._drive.is_file:
                # Below may lie what a trim left: zeros are the older content.
                self._erase(tables, block, block + 1)
            else:
                self._store(tables, block, block + 1, data, self._checksum(data, block).to_bytes(4, "little"))
            adopted += 1
        return adopted

    # Joining: pulled blocks must not overwrite newer ones that a writer sent meanwhile

    def apply_pulled_blocks(self, block: int, data: Data, checksums: Data, epoch: int | None = None) -> int:
        """Take verified blocks of an in-sync copy, except those written here since joining began.

        Args     epoch: for the chunk epochs; None: that of this copy, which is never too low.
        Returns  how many blocks were taken.
        """
        tables = self._open()
        count = len(checksums) >> 2
        self._check_range(block, count)
        marks = self._since_joining
        if marks is None or len(data) != count << _BLOCK_SHIFT:
            raise BadRequest(
                f"slab {self.slab} is not joining, or {len(data)} bytes do not fit {count} checksums"
            )
        view, sums = memoryview(data), memoryview(checksums)
        taken = 0
        for start, end, written in _runs(block, count, marks, sums):
            taken += end - start
            self._mark_pulled(tables, start, end, self.epoch if epoch is None else epoch)
            first, last = start - block, end - block
            if written:
                piece = view[first << _BLOCK_SHIFT : last << _BLOCK_SHIFT]
                self._store(tables, start, end, piece, sums[first << 2 : last << 2])
            else:
                self._erase(tables, start, end)
        return taken

    def take_checksum(self, block: int, checksum: int, epoch: int, *, even_if_lost: bool) -> bool:
        """A block that does not verify on the source of a pull: what lies here is its content iff it verifies by the
        checksum that the source has of it. What was written here since joining began is newer, and stays.

        even_if_lost   take the checksum in any case. Then the block is bad here as well, and never taken for what it
                       was before, until a copy that has it heals it, or it is written.
        Returns        whether the content is here.
        """
        tables = self._open()
        self._check_range(block, 1)
        marks = self._since_joining
        if marks is not None and marks[block >> 3] >> (block & 7) & 1:
            return True
        is_here = checksum != NEVER_WRITTEN and self._checksum(self._raw_block(block), block) == checksum
        if is_here or even_if_lost:
            self._mark_pulled(tables, block, block + 1, epoch)
            tables.checksums[block] = checksum
            set_bits(tables.written, block, block + 1)
        return is_here


def _runs(block: int, count: int, marks: Sequence[int], sums: memoryview) -> list[tuple[int, int, bool]]:
    """(start, end, has checksums) of the longest runs of unmarked blocks alike in having checksums."""
    runs: list[tuple[int, int, bool]] = []
    for number in range(block, block + count):
        if marks[number >> 3] >> (number & 7) & 1:
            continue
        index = (number - block) << 2
        written = sums[index : index + 4] != _NO_CHECKSUM
        if runs and runs[-1][1] == number and runs[-1][2] == written:
            runs[-1] = (runs[-1][0], number + 1, written)
        else:
            runs.append((number, number + 1, written))
    return runs
