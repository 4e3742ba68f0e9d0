"""The superblock: whatever happens to some of its copies, the drive is known or refused, never mistaken."""

import os
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csvfs.block.drive import Drive
from csvfs.block.layout import SUPERBLOCK_SIZE, layout_of, superblock_offsets
from csvfs.block.superblock import (
    Superblock,
    choose_current,
    pack_superblock,
    parse_superblock,
    read_superblock,
    write_superblock,
)
from csvfs.errors import BadRequest, Corrupt
from csvfs.ids import NodeName
from csvfs.units import GIB, MIB
from tests.drive_files import CLUSTER, DRIVE, DRIVE_SIZE, POOL, SLAB_SIZE, make_drive, overwrite

SAMPLE = Superblock(
    sequence=7,
    drive_id=DRIVE,
    pool_id=POOL,
    cluster_id=CLUSTER,
    size=DRIVE_SIZE,
    slab_size=SLAB_SIZE,
    node=NodeName("nöde-1"),
    label="slot 3",
    created_ns=1_700_000_000_000_000_000,
    clean=False,
    opens=12,
    boot_id=b"b" * 16,
)


def current_of(path: str):
    with open(path, "rb") as file:
        return read_superblock(file.fileno(), os.path.getsize(path))


@pytest.mark.parametrize("copy", range(4))
def test_every_copy_reads_back_what_was_packed(copy):
    assert parse_superblock(pack_superblock(SAMPLE, copy), copy) == SAMPLE


@settings(deadline=None, derandomize=True)
@given(bit=st.integers(0, 8 * SUPERBLOCK_SIZE - 1))
def test_any_single_bit_flip_is_detected(bit):
    raw = bytearray(pack_superblock(SAMPLE, 0))
    raw[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(Corrupt):
        parse_superblock(bytes(raw), 0)


@settings(deadline=None, derandomize=True)
@given(raw=st.binary(max_size=SUPERBLOCK_SIZE + 1))
def test_random_bytes_are_never_a_superblock(raw):
    with pytest.raises(Corrupt):
        parse_superblock(raw, 0)


def test_a_copy_at_the_place_of_another_is_a_misdirected_write():
    with pytest.raises(Corrupt, match="misdirected"):
        parse_superblock(pack_superblock(SAMPLE, 1), 2)


def test_the_current_one_is_the_highest_that_two_agree_on():
    """A copy that alone is newer was being written when the power went: the update did not happen."""
    newer = replace(SAMPLE, sequence=8)
    assert choose_current([newer, SAMPLE, SAMPLE, SAMPLE]) == SAMPLE
    assert choose_current([newer, newer, SAMPLE, SAMPLE]) == newer
    assert choose_current([newer, SAMPLE]) == newer
    assert choose_current([SAMPLE]) == SAMPLE


@pytest.mark.parametrize("damaged", [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 1, 2), (1, 2, 3), (0, 1, 3)])
def test_damaged_copies_are_reported_and_repaired_from_the_others(tmp_path, damaged):
    path, superblock = make_drive(tmp_path / "drive")
    for copy in damaged:
        overwrite(path, superblock_offsets(superblock.size)[copy], b"\xa5" * SUPERBLOCK_SIZE)

    drive = Drive.open(path)
    assert [f"superblock copy {copy}: wrong magic" for copy in damaged] == drive.repairs
    assert drive.id == DRIVE
    drive.close()
    assert current_of(path).repairs == []


def test_a_wiped_start_is_found_again_from_the_end(tmp_path):
    path, superblock = make_drive(tmp_path / "drive")
    overwrite(path, 0, bytes(128 * 1024))
    found = current_of(path)
    assert found.superblock == superblock
    assert len(found.repairs) == 2


def test_a_drive_that_grew_is_read_as_it_was(tmp_path):
    path, superblock = make_drive(tmp_path / "drive")
    os.truncate(path, DRIVE_SIZE + 5 * MIB)
    assert current_of(path).superblock == superblock


def test_a_truncated_drive_says_how_much_is_left(tmp_path):
    path, _ = make_drive(tmp_path / "drive")
    os.truncate(path, DRIVE_SIZE - MIB)
    with pytest.raises(Corrupt, match=f"truncated: {DRIVE_SIZE - MIB} B are left of {DRIVE_SIZE} B"):
        Drive.open(path)


@pytest.mark.parametrize("size", [0, 1, 4096, 200_000, DRIVE_SIZE])
def test_a_zeroed_file_of_any_size_is_no_drive(tmp_path, size):
    path = tmp_path / "drive"
    path.write_bytes(b"")
    os.truncate(path, size)
    with pytest.raises(Corrupt, match="no superblock is readable"):
        Drive.open(str(path))


def test_an_update_that_was_cut_short_leaves_the_old_one_and_its_number_is_not_used_again(tmp_path):
    path, superblock = make_drive(tmp_path / "drive")
    torn = replace(superblock, sequence=2, opens=99)
    overwrite(path, 0, pack_superblock(torn, 0))
    drive = Drive.open(path)
    assert drive.opens == 1
    assert drive.superblock.sequence == 3
    drive.close()


def test_a_write_survives_the_loss_of_one_place(tmp_path, monkeypatch):
    path, superblock = make_drive(tmp_path / "drive")
    with open(path, "r+b") as file:
        write_superblock(file.fileno(), replace(superblock, sequence=2, opens=5))
    overwrite(path, 65536, bytes(4096))
    assert current_of(path).superblock.opens == 5


@pytest.mark.parametrize("label", ["x" * 65, "nul\0inside"])
def test_a_label_that_does_not_fit_is_refused(label):
    with pytest.raises(BadRequest, match="label"):
        pack_superblock(replace(SAMPLE, label=label), 0)


@settings(deadline=None, derandomize=True)
@given(size=st.integers(6 * MIB, 64 * GIB), shift=st.integers(0, 6))
def test_no_two_structures_of_any_layout_overlap(size, shift):
    slab_size = 4 * MIB << shift
    try:
        layout = layout_of(size, slab_size)
    except BadRequest as error:
        assert "too small" in str(error)
        return
    table_size = layout.slot_count * 512
    places = [(offset, 4096) for offset in layout.superblock_offsets]
    places += [(offset, table_size) for offset in layout.table_offsets]
    places += [(layout.metadata_offset, layout.metadata_size)]
    places += [(layout.slot_data_offset(0), layout.slot_count * slab_size)]
    places.sort()
    for (start, length), (following, _) in pairwise(places):
        assert start + length <= following
    assert sum(places[-1]) <= size
    assert layout.data_offset % MIB == 0
    assert layout.metadata_offset % 4096 == 0
    assert layout.metadata_stride % 4096 == 0
    one_more = size - layout.slot_data_offset(layout.slot_count) - 128 * 1024
    assert one_more < slab_size + 3 * MIB  # no room for a slot is wasted


def test_the_layout_travels_to_the_mount_and_hostile_ones_are_refused():
    layout = layout_of(DRIVE_SIZE, SLAB_SIZE)
    assert layout.from_map(layout.to_map()) == layout
    for value in (
        None,
        {},
        {"size": "1", "slab_size": 1},
        {"size": -1, "slab_size": SLAB_SIZE},
        {"size": 1, "slab_size": 3},
    ):
        with pytest.raises(BadRequest):
            layout.from_map(value)


def test_the_format_of_a_known_drive_never_changes():
    """A change of any offset or size is a change of the format: it needs another version number."""
    layout = layout_of(4 * GIB, 64 * MIB)
    assert layout.slot_count == 63
    assert layout.table_offsets == (131072, 163840)
    assert layout.metadata_offset == 196608
    assert layout.data_offset == 5 * MIB
    assert layout.block_checksum_offset(1, 2) == 196608 + 72 * 1024 + 8
    assert layout.block_written_offset(0, 17) == 196608 + 68 * 1024 + 2048 + 2
    assert layout.block_data_offset(2, 3) == 5 * MIB + 128 * MIB + 3 * 4096
