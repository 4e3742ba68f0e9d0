"""The slot table: no torn write and no damage makes a slot hold what it does not hold."""

import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csvfs.block.layout import ENTRY_SIZE, layout_of
from csvfs.block.slot_table import (
    STATE_FREE,
    STATE_IN_USE,
    SlotEntry,
    SlotTable,
    format_slot_table,
    pack_entry,
    parse_entry,
)
from csvfs.errors import Corrupt
from csvfs.ids import Epoch, SlabId, Term
from tests.drive_files import DRIVE, DRIVE_SIZE, SLAB_SIZE, VOLUME

LAYOUT = layout_of(DRIVE_SIZE, SLAB_SIZE)
SAMPLE = SlotEntry(5, 3, STATE_IN_USE, 1, VOLUME, SlabId(1 << 63), Epoch(9), Term(4))
TABLE_END = LAYOUT.metadata_offset


@pytest.fixture
def table_file(tmp_path):
    fd = os.open(tmp_path / "table", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, TABLE_END)
    format_slot_table(fd, LAYOUT, DRIVE)
    yield fd
    os.close(fd)


def load(fd) -> SlotTable:
    return SlotTable(fd, LAYOUT, DRIVE)


def use(table: SlotTable, slot: int, slab: int, epoch: int = 1) -> SlotEntry:
    return table.put(
        slot, state=STATE_IN_USE, role=1, volume=VOLUME, slab=SlabId(slab), epoch=Epoch(epoch), term=Term(1)
    )


def damage(fd, slot: int, half: int) -> None:
    os.pwrite(fd, b"\x5a" * 100, LAYOUT.entry_offset(slot, half) + 30)


def test_an_entry_reads_back_as_packed():
    assert parse_entry(pack_entry(SAMPLE, DRIVE), 3, DRIVE) == SAMPLE


@settings(deadline=None, derandomize=True)
@given(bit=st.integers(0, 8 * ENTRY_SIZE - 1))
def test_any_single_bit_flip_is_detected(bit):
    raw = bytearray(pack_entry(SAMPLE, DRIVE))
    raw[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(Corrupt):
        parse_entry(bytes(raw), 3, DRIVE)


@settings(deadline=None, derandomize=True)
@given(raw=st.binary(max_size=ENTRY_SIZE + 1))
def test_random_bytes_are_never_an_entry(raw):
    with pytest.raises(Corrupt):
        parse_entry(raw, 0, DRIVE)


def test_entries_of_another_slot_or_of_another_drive_are_not_taken():
    raw = pack_entry(SAMPLE, DRIVE)
    with pytest.raises(Corrupt, match="misdirected"):
        parse_entry(raw, 4, DRIVE)
    with pytest.raises(Corrupt, match="misdirected"):
        parse_entry(raw, 3, b"another drive id")


def test_a_formatted_table_is_all_free_and_a_zeroed_entry_is_not(table_file):
    assert [entry.state for entry in load(table_file).entries] == [STATE_FREE] * LAYOUT.slot_count
    for half in (0, 1):
        os.pwrite(table_file, bytes(ENTRY_SIZE), LAYOUT.entry_offset(2, half))
    table = load(table_file)
    assert table.quarantined == [2]
    with pytest.raises(Corrupt, match="quarantined"):
        use(table, 2, 1)


def test_a_half_that_rots_at_rest_does_not_bring_an_older_entry_back(table_file):
    """T2: both halves hold the current entry once it was flushed and mirrored."""
    table = load(table_file)
    use(table, 0, 1, epoch=1)
    table.settle(table.unsettled())
    table.settle(table.unsettled())
    use(table, 0, 1, epoch=2)
    table.settle(table.unsettled())
    for half in (0, 1):
        before = os.pread(table_file, ENTRY_SIZE, LAYOUT.entry_offset(0, half))
        damage(table_file, 0, half)
        found = load(table_file)
        assert found.entry(0).epoch == 2
        assert len(found.repairs) == 1
        os.pwrite(table_file, before, LAYOUT.entry_offset(0, half))


def test_a_damaged_half_is_written_again_after_a_flush(table_file):
    damage(table_file, 1, 0)
    table = load(table_file)
    assert table.repairs == ["slot 1, half A of its entry: wrong checksum"]
    table.repair()
    assert load(table_file).repairs == []
    assert table.unsettled() == {}


def test_a_change_during_a_flush_waits_for_the_next(table_file):
    """T1: the half that the flush did not cover is not taken for durable."""
    table = load(table_file)
    use(table, 0, 1, epoch=1)
    covered = table.unsettled()
    use(table, 0, 1, epoch=2)
    table.settle(covered)
    assert table.unsettled() == {0: replace(covered[0], sequence=covered[0].sequence + 1)}


@settings(
    deadline=None,
    derandomize=True,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_power_cut_at_any_point_leaves_each_slot_its_last_flushed_entry_or_a_newer_one(tmp_path, data):
    """Every 512-byte half that is not flushed may be on the medium as it was, as it is now, or torn."""
    fd = os.open(tmp_path / "cut", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.ftruncate(fd, TABLE_END)
    format_slot_table(fd, LAYOUT, DRIVE)
    durable = os.pread(fd, TABLE_END, 0)
    table = load(fd)
    allowed = {slot: [table.entry(slot)] for slot in (0, 1)}
    for step in data.draw(st.lists(st.sampled_from(["put 0", "put 1", "flush"]), max_size=8)):
        if step == "flush":
            covered = table.unsettled()
            durable = os.pread(fd, TABLE_END, 0)
            table.settle(covered)
            allowed = {slot: [table.entry(slot)] for slot in (0, 1)}
        else:
            slot = int(step[-1])
            allowed[slot].append(use(table, slot, 1, epoch=len(allowed[slot])))
    now = os.pread(fd, TABLE_END, 0)

    for slot in (0, 1):
        for half in (0, 1):
            offset = LAYOUT.entry_offset(slot, half)
            old, new = durable[offset : offset + ENTRY_SIZE], now[offset : offset + ENTRY_SIZE]
            if old != new:
                choice = data.draw(st.sampled_from([old, new, new[:100] + old[100:], b"\xee" * ENTRY_SIZE]))
                os.pwrite(fd, choice, offset)
    found = load(fd)
    for slot in (0, 1):
        assert found.entry(slot) in allowed[slot]
    found.repair()
    for half in (0, 1):
        assert os.pread(fd, ENTRY_SIZE, LAYOUT.entry_offset(0, half)) == pack_entry(found.entry(0), DRIVE)
    os.close(fd)
