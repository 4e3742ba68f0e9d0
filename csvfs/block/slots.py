"""The slots of an open drive: their entries, which are free, and which are being deleted (FORMAT.md, "Slot table").

Place      block floor, above slot_table.py; a part of drive.py, which says when it has flushed. Synchronous.
Threads    All methods are for the drive's thread, but `before_flush` and `after_flush`: these are for whichever
           thread flushes, one at a time. OSError passes through: the drive makes a DriveFailed of it.

Invariants
  D2  A slot is handed out again only after its old entry says "deleting" durably, its tables are zeros
      durably, and its entry says "free" durably: so a power cut never gives a slab the blocks or the
      checksums of another one.
"""

import heapq
import threading
from dataclasses import dataclass

from csvfs.block.layout import Layout
from csvfs.block.medium import punch_hole, write_all
from csvfs.block.slot_table import STATE_DELETING, STATE_FREE, STATE_IN_USE, SlotEntry, SlotTable, Unsettled
from csvfs.block.slot_tables import pack_slot_header, read_slot_metadata
from csvfs.ids import DriveId, Epoch, SlabId, Term, VolumeId

_STAGE_DELETING, _STAGE_FREED = 1, 2  # what the next flush makes durable of a deleted slot (D2)


@dataclass(slots=True, frozen=True)
class FlushMark:
    """What a flush that begins now makes durable."""

    unsettled: dict[int, Unsettled]
    deleting: dict[int, int]


class Slots:
    """`repairs`: what was found damaged when it was loaded, one line each."""

    def __init__(self, fd: int, layout: Layout, drive_id: DriveId) -> None:
        self._fd = fd
        self._layout = layout
        self._drive_id = drive_id
        self._lock = threading.Lock()  # of all below; never held during a flush
        self._table = SlotTable(fd, layout, drive_id)
        self._free: list[int] = []
        self._deleting: dict[int, int] = {}
        self.repairs = self._table.repairs

    @property
    def free_count(self) -> int:
        """Slots that can be had, after two flushes at most; quarantined ones are not among them."""
        return len(self._free) + len(self._deleting)

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    @property
    def is_deleting(self) -> bool:
        return bool(self._deleting)

    @property
    def quarantined(self) -> list[int]:
        """Slots of which neither half of the entry is valid."""
        return self._table.quarantined

    def find(self) -> list[SlotEntry]:
        """Repair the table, then say which slabs are where; free slots and unfinished deletes are noted. Once."""
        self._table.repair()
        in_use: dict[tuple[VolumeId, SlabId], list[SlotEntry]] = {}
        for slot, entry in enumerate(self._table.entries):
            if entry is None:
                continue
            if entry.state == STATE_FREE:
                self._free.append(slot)
            elif entry.state == STATE_DELETING:
                self._deleting[slot] = _STAGE_DELETING
            else:
                in_use.setdefault((entry.volume, entry.slab), []).append(entry)
        return [self._newest(entries) for entries in in_use.values()]

    def _newest(self, entries: list[SlotEntry]) -> SlotEntry:
        """Of one slab: older ones were deleted and made again, and a power cut lost that they were deleted."""
        newest = max(entries, key=lambda entry: entry.sequence)
        for older in entries:
            if older is not newest:
                self.repairs.append(f"slot {older.slot} holds an older copy of slab {older.slab}: deleted")
                self.delete(older.slot)
        return newest

    def take_free(self) -> int | None:
        """A free slot, which is the caller's from now on. None: there is none now; see `is_deleting`."""
        with self._lock:
            return heapq.heappop(self._free) if self._free else None

    def is_blank(self, slot: int) -> bool:
        """Whether its tables are zeros, as those of a free slot must be. Raises DriveFailed: unreadable."""
        raw = read_slot_metadata(self._fd, self._layout, slot)
        return raw == bytes(len(raw))

    def fill(self, slot: int, volume: VolumeId, slab: SlabId, epoch: Epoch, role: int, term: Term) -> None:
        """Give a taken slot to a slab: header, then entry; durable after the next flush."""
        header = pack_slot_header(self._drive_id, volume, slab, slot)
        write_all(self._fd, header, self._layout.slot_maps_offset(slot))
        with self._lock:
            self._table.put(
                slot, state=STATE_IN_USE, role=role, volume=volume, slab=slab, epoch=epoch, term=term
            )

    def update(self, slot: int, *, role: int, epoch: Epoch, term: Term) -> None:
        """Change the entry of a slot in use; durable after the next flush."""
        with self._lock:
            self._table.update(slot, role=role, epoch=epoch, term=term)

    def delete(self, slot: int) -> None:
        """Begin to free a slot; it can be had again after two more flushes (D2)."""
        with self._lock:
            self._table.put(slot, state=STATE_DELETING)
            self._deleting[slot] = _STAGE_DELETING

    def erase(self, slot: int) -> None:
        """Make tables and blocks of a slot zeros; durable after the next flush."""
        write_all(self._fd, bytes(self._layout.metadata_stride), self._layout.slot_metadata_offset(slot))
        punch_hole(self._fd, self._layout.slot_data_offset(slot), self._layout.slab_size)

    def scrub(self) -> int:
        """Put right the halves of entries that rotted; how many."""
        with self._lock:
            return self._table.scrub()

    # Flushes, which may be another thread's

    def before_flush(self) -> FlushMark:
        """Ask before a flush; hand it to `after_flush`."""
        with self._lock:
            return FlushMark(self._table.unsettled(), dict(self._deleting))

    def after_flush(self, mark: FlushMark) -> None:
        """What `mark` says is durable: go on from there."""
        with self._lock:
            self._table.settle(mark.unsettled)
        for slot, stage in mark.deleting.items():
            self._advance_delete(slot, stage)

    def _advance_delete(self, slot: int, stage: int) -> None:
        """The change that began `stage` is durable: begin the next one (D2)."""
        if stage == _STAGE_DELETING:
            self.erase(slot)
        with self._lock:
            if stage == _STAGE_DELETING:
                self._table.put(slot, state=STATE_FREE)
                self._deleting[slot] = _STAGE_FREED
            else:
                del self._deleting[slot]
                heapq.heappush(self._free, slot)
