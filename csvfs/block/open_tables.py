"""The tables that are open now: views into one mapping of a drive's metadata, and which to close first.

Place      block floor, above slot_tables.py; a part of drive.py. One thread.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from csvfs.block.slot_tables import SlotTables, check_slot_header, pack_slot_header, read_slot_metadata
from csvfs.errors import Corrupt, DriveFailed

if TYPE_CHECKING:
    from csvfs.block.copy_tables import CopyTables
    from csvfs.block.drive import Drive

# Tables of this many slabs are held open: five views each, about 1 KiB of Python objects.
OPEN_TABLES_MAX = 4096


class OpenTables:
    """Sets `copy.tables` of the copies whose tables are open. OSError: the metadata cannot be mapped."""

    def __init__(self, drive: Drive) -> None:
        self._drive = drive
        layout = drive.layout
        self._mapping = mmap.mmap(drive.fd, layout.metadata_size, offset=layout.metadata_offset)
        self._view = memoryview(self._mapping)
        self._copies: dict[int, CopyTables] = {}  # by slot, in the order in which they may be closed

    def open(self, copy: CopyTables) -> SlotTables:
        """The tables of a copy: read by pread, verified, then views. Above OPEN_TABLES_MAX others close.

        Raises  Corrupt: another slab's metadata, or damage. DriveFailed: they cannot be read.
        """
        drive, layout = self._drive, self._drive.layout
        header = pack_slot_header(drive.id, copy.volume, copy.slab, copy.slot)
        try:
            raw = read_slot_metadata(drive.fd, layout, copy.slot)
            check_slot_header(raw, layout, header)
        except DriveFailed as error:
            drive.counters.io_errors += 1
            raise DriveFailed(f"drive {drive.path}: slab {copy.slab}: {error}") from None
        except Corrupt as error:
            copy.damaged = True
            raise Corrupt(f"drive {drive.path}: slab {copy.slab}: {error}") from None
        while len(self._copies) >= OPEN_TABLES_MAX:
            self._close_one_unused()
        copy.tables = SlotTables(self._view, layout, copy.slot, header)
        self._copies[copy.slot] = copy
        return copy.tables

    def _close_one_unused(self) -> None:
        """Second chance: the first in line that was not used since it last stood there."""
        copy = next(iter(self._copies.values()))
        if copy.recently_used:
            copy.recently_used = False
            self._copies[copy.slot] = self._copies.pop(copy.slot)
        else:
            self.close_one(copy)

    def close_one(self, copy: CopyTables) -> None:
        """Close the tables of a copy, if they are open."""
        tables, copy.tables = copy.tables, None
        if tables is not None:
            del self._copies[copy.slot]
            tables.release()

    def close(self) -> None:
        """Close all tables and the mapping."""
        for copy in list(self._copies.values()):
            self.close_one(copy)
        self._view.release()
        self._mapping.close()
