"""Slot table: which slab of which volume lies in which slot of a drive (FORMAT.md, "Slot table").

Place      block floor, above layout.py; used by drive.py, which holds its lock around every change.
Owns       the entries in memory, and both halves of each on the medium.

Invariants
  T1  A half is overwritten only while the other one is known durable: so a torn write keeps the older entry.
  T2  At rest both halves hold the same entry: so a half that rots does not bring an older entry back.
  T3  A slot of which neither half is valid is quarantined: reported, never handed out, never taken for free.
"""

import os
import struct
from dataclasses import dataclass, replace

from csvfs.block.layout import ENTRY_SIZE, Layout, check_zero, structure_checksum
from csvfs.block.medium import write_all
from csvfs.errors import Corrupt
from csvfs.ids import DriveId, Epoch, SlabId, Term, VolumeId
from csvfs.wire.block_messages import ROLE_ABSENT, ROLE_IN_SYNC, ROLE_JOINING

ENTRY_MAGIC = b"CSVFSSL1"
_MAGIC_SUM = struct.Struct("<8sQ")
# sequence, slot, state, role, 0, drive, volume, slab, epoch, 0, term
_BODY = struct.Struct("<QIBBH16s16sQIIQ")
_CHECKSUM_START = 16
_RESERVED_START = _CHECKSUM_START + _BODY.size
assert _RESERVED_START == 88  # FORMAT.md, "Slot table"

STATE_FREE = 0
STATE_IN_USE = 1
STATE_DELETING = 2  # its tables are still those of the slab, and not to be handed out
_STATES = (STATE_FREE, STATE_IN_USE, STATE_DELETING)
_ROLES = (ROLE_ABSENT, ROLE_IN_SYNC, ROLE_JOINING)
_NO_VOLUME = VolumeId(bytes(16))
_NO_SLAB = SlabId(0)
_NO_EPOCH = Epoch(0)
_NO_TERM = Term(0)


@dataclass(slots=True, frozen=True)
class SlotEntry:
    sequence: int  # grows by one with every change of any slot of the drive
    slot: int
    state: int = STATE_FREE
    role: int = ROLE_ABSENT
    volume: VolumeId = _NO_VOLUME
    slab: SlabId = _NO_SLAB
    epoch: Epoch = _NO_EPOCH
    term: Term = _NO_TERM


@dataclass(slots=True, frozen=True)
class Unsettled:
    """`half`, of `sequence`, is not known durable. `mirrored`: the other half has the same, durably."""

    half: int
    mirrored: bool
    sequence: int


def pack_entry(entry: SlotEntry, drive_id: DriveId) -> bytes:
    body = _BODY.pack(
        entry.sequence,
        entry.slot,
        entry.state,
        entry.role,
        0,
        drive_id,
        entry.volume,
        entry.slab,
        entry.epoch,
        0,
        entry.term,
    ).ljust(ENTRY_SIZE - _CHECKSUM_START, b"\0")
    return _MAGIC_SUM.pack(ENTRY_MAGIC, structure_checksum(body)) + body


def parse_entry(raw: bytes, slot: int, drive_id: DriveId) -> SlotEntry:
    """Raises Corrupt, with what is wrong, on anything but a half of this slot of this drive."""
    if len(raw) != ENTRY_SIZE:
        raise Corrupt(f"only {len(raw)} of {ENTRY_SIZE} bytes are there")
    magic, checksum = _MAGIC_SUM.unpack_from(raw)
    if magic != ENTRY_MAGIC:
        raise Corrupt("wrong magic")
    if checksum != structure_checksum(raw[_CHECKSUM_START:]):
        raise Corrupt("wrong checksum")
    (sequence, found_slot, state, role, zero, drive, volume, slab, epoch, zero_too, term) = _BODY.unpack_from(
        raw, _CHECKSUM_START
    )
    if found_slot != slot or drive != drive_id:
        raise Corrupt(f"is of slot {found_slot} of drive {drive.hex()}: a misdirected write or read")
    if state not in _STATES or role not in _ROLES or zero or zero_too:
        raise Corrupt(f"state {state} or role {role} is unknown")
    check_zero(raw, _RESERVED_START, "slot entry")
    return SlotEntry(sequence, slot, state, role, VolumeId(volume), SlabId(slab), Epoch(epoch), Term(term))


def format_slot_table(fd: int, layout: Layout, drive_id: DriveId) -> None:
    """Write both halves of every slot as free: an entry of zeros is a damaged one, never a free one."""
    raw = b"".join(pack_entry(SlotEntry(1, slot), drive_id) for slot in range(layout.slot_count))
    for offset in layout.table_offsets:
        write_all(fd, raw, offset)


def _read_half(fd: int, layout: Layout, half: int) -> bytes:
    """All entries of one half; what the medium does not give is zeros, that is damaged entries."""
    size = layout.slot_count * ENTRY_SIZE
    try:
        return os.pread(fd, size, layout.table_offsets[half]).ljust(size, b"\0")
    except OSError:
        pieces = []
        for offset in range(0, size, 4096):
            length = min(4096, size - offset)
            try:
                piece = os.pread(fd, length, layout.table_offsets[half] + offset)
            except OSError:
                piece = b""
            pieces.append(piece.ljust(length, b"\0"))
        return b"".join(pieces)


def _parse_or_none(raw: bytes, slot: int, drive_id: DriveId) -> SlotEntry | Corrupt:
    try:
        return parse_entry(raw[slot * ENTRY_SIZE : (slot + 1) * ENTRY_SIZE], slot, drive_id)
    except Corrupt as error:
        return error


class SlotTable:
    """The entries of an open drive. `repairs`: what was found damaged, one line each.

    `put` writes into the page cache; an entry is durable after the next flush of the drive, and in both
    halves after the one that follows (T1, T2). OSError passes through: the drive makes a DriveFailed of it.
    """

    def __init__(self, fd: int, layout: Layout, drive_id: DriveId) -> None:
        self._fd = fd
        self._layout = layout
        self._drive_id = drive_id
        self._unsettled: dict[int, Unsettled] = {}
        self._sequence = 0
        self.entries: list[SlotEntry | None] = []  # None: quarantined
        self.repairs: list[str] = []
        self._load()

    @property
    def quarantined(self) -> list[int]:
        return [slot for slot, entry in enumerate(self.entries) if entry is None]

    def _load(self) -> None:
        halves = [_read_half(self._fd, self._layout, half) for half in (0, 1)]
        for slot in range(self._layout.slot_count):
            pair = [_parse_or_none(raw, slot, self._drive_id) for raw in halves]
            valid = [entry for entry in pair if isinstance(entry, SlotEntry)]
            for half, entry in enumerate(pair):
                if isinstance(entry, Corrupt):
                    self.repairs.append(f"slot {slot}, half {'AB'[half]} of its entry: {entry}")
            if not valid:
                self.repairs.append(f"slot {slot} is quarantined: neither half of its entry is valid")
                self.entries.append(None)
                continue
            current = max(valid, key=lambda entry: entry.sequence)
            self.entries.append(current)
            self._sequence = max(self._sequence, current.sequence)
            if pair[0] != pair[1]:
                # After a kill the newer half may be in the page cache only: T1 has it flushed before the
                # other.
                self._unsettled[slot] = Unsettled(pair.index(current), False, current.sequence)

    def repair(self) -> None:
        """Make both halves of every entry equal and durable (T2), before the first `put` (T1).

        Raises OSError.
        """
        for _ in range(2):  # what is current, then the halves that lag behind
            if self._unsettled:
                os.fdatasync(self._fd)
                self.settle(self.unsettled())

    def scrub(self) -> int:
        """Rewrite halves at rest that are not what they were written as; how many. Both are durable after the next
        two flushes (T1: one is overwritten while the other holds, or both do not). Raises OSError."""
        repaired = 0
        halves = [_read_half(self._fd, self._layout, half) for half in (0, 1)]
        for slot, entry in enumerate(self.entries):
            if entry is None or slot in self._unsettled:
                continue
            start = slot * ENTRY_SIZE
            wanted = pack_entry(entry, self._drive_id)
            bad = [half for half in (0, 1) if halves[half][start : start + ENTRY_SIZE] != wanted]
            if bad:
                self._write(bad[0], entry)
                self._unsettled[slot] = Unsettled(bad[0], len(bad) == 1, entry.sequence)
                repaired += len(bad)
        return repaired

    def entry(self, slot: int) -> SlotEntry:
        """Raises Corrupt when the slot is quarantined."""
        entry = self.entries[slot]
        if entry is None:
            raise Corrupt(f"slot {slot} is quarantined: neither half of its entry is valid")
        return entry

    def put(
        self,
        slot: int,
        *,
        state: int,
        role: int = ROLE_ABSENT,
        volume: VolumeId = _NO_VOLUME,
        slab: SlabId = _NO_SLAB,
        epoch: Epoch = _NO_EPOCH,
        term: Term = _NO_TERM,
    ) -> SlotEntry:
        """Change a slot's entry. Raises Corrupt (quarantined), OSError."""
        self.entry(slot)
        self._sequence += 1
        entry = SlotEntry(self._sequence, slot, state, role, volume, slab, epoch, term)
        unsettled = self._unsettled.get(slot)
        half = self._sequence & 1 if unsettled is None else unsettled.half
        self._write(half, entry)
        self.entries[slot] = entry
        self._unsettled[slot] = Unsettled(half, False, entry.sequence)
        return entry

    def update(self, slot: int, *, role: int, epoch: Epoch, term: Term) -> SlotEntry:
        """Change epoch, role and term of a slot. Raises Corrupt (quarantined), OSError."""
        new = replace(self.entry(slot), role=role, epoch=epoch, term=term)
        return self.put(
            slot, state=new.state, role=role, volume=new.volume, slab=new.slab, epoch=epoch, term=term
        )

    def _write(self, half: int, entry: SlotEntry) -> None:
        write_all(self._fd, pack_entry(entry, self._drive_id), self._layout.entry_offset(entry.slot, half))

    def unsettled(self) -> dict[int, Unsettled]:
        """What a flush that starts now makes durable; hand it to `settle` after the flush."""
        return dict(self._unsettled)

    def settle(self, flushed: dict[int, Unsettled]) -> None:
        """After a flush, write the halves that lag. What changed since `unsettled()` waits for the next."""
        for slot, state in flushed.items():
            if self._unsettled.get(slot) != state:
                continue
            if state.mirrored:
                del self._unsettled[slot]
            else:
                half = 1 - state.half
                self._write(half, self.entry(slot))
                self._unsettled[slot] = Unsettled(half, True, state.sequence)
