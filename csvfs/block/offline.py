"""Reading a drive that nobody serves, without changing a byte of it: for recovery.

Place      block floor, above superblock.py and slot_table.py. Blocks.
Rule       The drive is locked (shared) while it is open, so that no drive server opens it meanwhile.
"""

import fcntl
import os

from csvfs.block.medium import medium_size
from csvfs.block.slot_table import STATE_IN_USE, SlotEntry, SlotTable
from csvfs.block.superblock import Superblock, read_superblock
from csvfs.errors import Corrupt, DriveRefused
from csvfs.ids import SlabId, VolumeId
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import NEVER_WRITTEN, ZERO_BLOCK, block_checksum, slab_seed


class OfflineDrive:
    """Use `with`. `repairs`: what is damaged, one line each; nothing is put right here."""

    def __init__(self, path: str) -> None:
        """Raises DriveRefused (missing, in use), Corrupt (no drive of ours, truncated)."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DriveRefused(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                raise DriveRefused(
                    f"{path}: in use, most likely by a drive server; stop its node first"
                ) from None
            try:
                found = read_superblock(self._fd, medium_size(self._fd))
            except Corrupt as error:
                raise Corrupt(f"{path}: {error}") from None
            self.superblock: Superblock = found.superblock
            self.layout = found.superblock.layout
            table = SlotTable(self._fd, self.layout, found.superblock.drive_id)
        except BaseException:
            os.close(self._fd)
            raise
        self.repairs = [*found.repairs, *table.repairs]
        self.quarantined = table.quarantined
        self.entries: dict[tuple[VolumeId, SlabId], SlotEntry] = {}
        for entry in table.entries:
            if entry is not None and entry.state == STATE_IN_USE:
                known = self.entries.get((entry.volume, entry.slab))
                if known is None or known.sequence < entry.sequence:
                    self.entries[entry.volume, entry.slab] = entry

    def __enter__(self) -> "OfflineDrive":
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def read_block(self, volume: VolumeId, slab: SlabId, block: int) -> bytes:
        """One block of a slab, verified. Raises Corrupt: it is not here, or does not verify."""
        entry = self.entries.get((volume, slab))
        if entry is None:
            raise Corrupt(f"{self.path} has no copy of slab {slab}")
        try:
            packed = os.pread(self._fd, 4, self.layout.block_checksum_offset(entry.slot, block))
            checksum = int.from_bytes(packed, "little")
            if checksum == NEVER_WRITTEN:
                bits = os.pread(self._fd, 1, self.layout.block_written_offset(entry.slot, block))
                if bits and not bits[0] >> (block & 7) & 1:
                    return ZERO_BLOCK
            else:
                data = os.pread(self._fd, BLOCK_SIZE, self.layout.block_data_offset(entry.slot, block))
                if (
                    len(data) == BLOCK_SIZE
                    and block_checksum(data, slab_seed(volume, slab), block) == checksum
                ):
                    return data
        except OSError as error:
            raise Corrupt(f"{self.path}: slab {slab} block {block}: {error.strerror}") from None
        raise Corrupt(f"{self.path}: slab {slab} block {block} does not verify")
