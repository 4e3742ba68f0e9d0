"""A whole drive: open, slots, flush, close, kill, power cut, and every kind of damage we could think of."""

import errno
import fcntl
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csvfs.block import drive as drive_module
from csvfs.block import drive_faults, medium_check
from csvfs.block import open_tables as open_tables_module
from csvfs.block.drive import Drive
from csvfs.block.layout import superblock_offsets
from csvfs.errors import (
    BadRequest,
    Corrupt,
    CsvfsError,
    DriveFailed,
    DriveRefused,
    NoSpace,
    NotFound,
    StaleEpoch,
)
from csvfs.ids import Epoch, PoolId, SlabId, Term, VolumeId
from csvfs.units import BLOCK_SIZE, MIB
from csvfs.wire.block_messages import ROLE_ABSENT, ROLE_IN_SYNC, ROLE_JOINING, ZERO_BLOCK
from tests.drive_files import (
    CLUSTER,
    DRIVE,
    DRIVE_SIZE,
    POOL,
    VOLUME,
    flip_bit,
    image_of,
    make_drive,
    make_slab,
    overwrite,
    pattern,
    read,
    write,
)

DUMP = Path(__file__).resolve().parent.parent / "tools" / "dump_drive"
OTHER_BOOT = b"o" * 16


@pytest.fixture
def path(tmp_path):
    return make_drive(tmp_path / "drive")[0]


@pytest.fixture
def drive(path):
    drive = Drive.open(path, pool_id=POOL, cluster_id=CLUSTER)
    yield drive
    drive.close(clean=False)


def reopened(drive: Drive, *, clean: bool = True) -> Drive:
    drive.close(clean=clean)
    return Drive.open(drive.path)


# Open and close


def test_a_formatted_drive_opens_clean_and_empty(drive):
    assert (drive.id, drive.opens, drive.unclean, drive.contents_lost, drive.repairs) == (
        DRIVE,
        1,
        False,
        False,
        [],
    )
    assert drive.slabs() == []
    assert drive.free_slots == drive.slot_count == 15
    assert drive.superblock.label == "test drive"


def test_slabs_and_data_are_there_after_a_clean_close(drive):
    copy = drive.create_slab(VOLUME, SlabId(1 << 62), Epoch(3), ROLE_JOINING, Term(8))
    write(copy, 5, pattern(1))
    drive = reopened(drive)
    assert not drive.unclean
    (copy,) = drive.slabs()
    assert copy is drive.find(VOLUME, SlabId(1 << 62))
    assert (copy.epoch, copy.role, copy.term) == (3, ROLE_JOINING, 8)
    assert read(copy, 5) == pattern(1)
    drive.close()


def test_a_kill_is_seen_at_the_next_open_and_loses_nothing_that_the_operating_system_had(drive):
    write(make_slab(drive), 0, pattern(1))
    drive = reopened(drive, clean=False)
    assert drive.unclean
    assert not drive.contents_lost
    assert read(drive.find(VOLUME, SlabId(1)), 0) == pattern(1)
    drive = reopened(drive)
    assert not drive.unclean
    assert drive.opens == 3
    drive.close()


def test_a_really_killed_process_leaves_its_writes_and_its_active_marks(path):
    """The mapping of a killed process is the page cache's: nothing of it is lost."""
    script = f"""
import os, signal
from csvfs.block.drive import Drive
from tests.drive_files import make_slab, pattern, write
drive = Drive.open({path!r})
copy = make_slab(drive)
write(copy, 40, pattern(7, 3))
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=DUMP.parent.parent, check=False)
    assert ended.returncode == -9
    drive = Drive.open(path)
    copy = drive.find(VOLUME, SlabId(1))
    assert drive.unclean
    assert copy.active_chunks() == [2]
    assert read(copy, 40, 3) == pattern(7, 3)
    drive.close()


def test_a_drive_has_one_opener(drive):
    with pytest.raises(DriveRefused, match="in use by another process"):
        Drive.open(drive.path)
    drive.close()
    Drive.open(drive.path).close()


def test_a_drive_of_another_pool_or_cluster_is_refused_and_not_touched(path):
    before = Path(path).read_bytes()
    with pytest.raises(DriveRefused, match="foreign pool"):
        Drive.open(path, pool_id=PoolId(b"x" * 16))
    with pytest.raises(DriveRefused, match="foreign cluster"):
        Drive.open(path, pool_id=POOL, cluster_id=b"x" * 16)
    assert Path(path).read_bytes() == before


def test_a_missing_drive_is_named(tmp_path):
    with pytest.raises(DriveRefused, match="is missing"):
        Drive.open(str(tmp_path / "gone"))


def test_a_closed_drive_refuses_everything(drive):
    copy = make_slab(drive)
    write(copy, 0, pattern(1))
    drive.close()
    drive.close()
    for call in (
        lambda: write(copy, 0, pattern(2)),
        lambda: read(copy, 0),
        lambda: drive.flush(),
        lambda: make_slab(drive, 2),
        lambda: drive.delete_slab(VOLUME, copy.slab),
        lambda: drive.set_epoch(copy, Epoch(9), ROLE_IN_SYNC, Term(1)),
    ):
        with pytest.raises(DriveFailed, match="closed"):
            call()


# Slots


def test_create_slab_is_idempotent(drive):
    copy = make_slab(drive)
    write(copy, 0, pattern(1))
    assert make_slab(drive) is copy
    assert read(copy, 0) == pattern(1)
    assert drive.free_slots == drive.slot_count - 1


def test_a_full_drive_says_so_and_a_deleted_slab_makes_room(drive):
    for slab in range(drive.slot_count):
        make_slab(drive, slab)
    with pytest.raises(NoSpace, match="all 15 slots"):
        make_slab(drive, 100)
    assert drive.delete_slab(VOLUME, SlabId(4))
    assert drive.free_slots == 1
    make_slab(drive, 100)
    assert drive.free_slots == 0


def test_a_reused_slot_shows_nothing_of_the_slab_before(drive):
    for slab in range(drive.slot_count):
        copy = make_slab(drive, slab)
    write(copy, 0, pattern(1, 16))
    slot = copy.slot
    drive.delete_slab(VOLUME, copy.slab)
    with pytest.raises((NotFound, BadRequest)):
        write(copy, 0, pattern(2))
    new = make_slab(drive, 100)
    assert new.slot == slot
    assert read(new, 0, 16) == 16 * ZERO_BLOCK
    assert (new.active_chunks(), set(new.chunk_epochs()), set(new.checksums())) == ([], {0}, {0})
    with pytest.raises(NotFound):
        read(copy, 0)


def test_a_delete_that_was_cut_short_is_finished_after_the_next_open(drive):
    make_slab(drive)
    drive.flush()
    drive.delete_slab(VOLUME, SlabId(1))
    drive = reopened(drive, clean=False)
    assert drive.find(VOLUME, SlabId(1)) is None
    assert drive.free_slots == drive.slot_count
    drive.flush()
    drive.flush()
    assert not drive.slots.is_deleting
    drive.close()
    drive = Drive.open(drive.path)
    assert drive.free_slots == drive.slot_count
    drive.close()


def test_a_free_slot_with_leftovers_is_erased_before_it_is_used(drive):
    overwrite(drive.path, drive.layout.slot_metadata_offset(0), b"\x11" * 8192)
    copy = make_slab(drive)
    assert "tables were not empty" in drive.repairs[0]
    assert read(copy, 0, 16) == 16 * ZERO_BLOCK


def test_a_delete_during_a_flush_is_not_taken_for_flushed(drive, monkeypatch):
    """D2: flush runs in another thread, so a delete may come while it waits for the medium."""
    copy = make_slab(drive)
    write(copy, 0, pattern(1))
    real = os.fdatasync
    metadata = (drive.layout.metadata_stride, drive.layout.slot_metadata_offset(copy.slot))

    def deleting(fd):
        real(fd)
        drive.delete_slab(VOLUME, SlabId(1))

    monkeypatch.setattr(drive_module.os, "fdatasync", deleting)
    before = os.pread(drive.fd, *metadata)
    drive.flush()
    monkeypatch.undo()
    assert os.pread(drive.fd, *metadata) == before
    drive.flush()
    assert os.pread(drive.fd, *metadata) == bytes(metadata[0])


def test_epochs_only_grow_and_survive(drive):
    copy = make_slab(drive, epoch=3)
    drive.set_epoch(copy, Epoch(5), ROLE_JOINING, Term(2))
    with pytest.raises(StaleEpoch, match="below the installed 5"):
        drive.set_epoch(copy, Epoch(4), ROLE_IN_SYNC, Term(3))
    drive.set_epoch(copy, Epoch(5), ROLE_IN_SYNC, Term(1))
    assert (copy.epoch, copy.role, copy.term) == (5, ROLE_IN_SYNC, 2)
    drive = reopened(drive, clean=False)
    (copy,) = drive.slabs()
    assert (copy.epoch, copy.role, copy.term) == (5, ROLE_IN_SYNC, 2)
    drive.close()


def test_numbers_out_of_range_are_refused(drive):
    with pytest.raises(BadRequest):
        drive.create_slab(VolumeId(b"short"), SlabId(1), Epoch(1), ROLE_ABSENT, Term(1))
    with pytest.raises(BadRequest):
        drive.create_slab(VOLUME, SlabId(1 << 64), Epoch(1), ROLE_ABSENT, Term(1))
    with pytest.raises(BadRequest):
        drive.create_slab(VOLUME, SlabId(1), Epoch(1 << 32), ROLE_ABSENT, Term(1))
    with pytest.raises(BadRequest):
        drive.create_slab(VOLUME, SlabId(1), Epoch(1), 7, Term(1))
    assert drive.free_slots == drive.slot_count


def test_more_slabs_than_tables_may_be_open_are_served(drive, monkeypatch):
    monkeypatch.setattr(open_tables_module, "OPEN_TABLES_MAX", 3)
    copies = [make_slab(drive, slab) for slab in range(10)]
    for number in (0, 1):
        for copy in copies:
            write(copy, number, pattern(copy.slab))
    for copy in copies:
        assert read(copy, 0, 2) == pattern(copy.slab) * 2
        assert sum(other.tables is not None for other in copies) <= 3


# Flush


def test_i8_a_failed_flush_fails_the_drive_for_good(drive, monkeypatch):
    """The kernel has dropped what it could not write: a second flush that succeeds would be a lie."""
    copy = make_slab(drive)
    write(copy, 0, pattern(1))
    real = os.fdatasync

    def fails(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(drive_module.os, "fdatasync", fails)
    with pytest.raises(DriveFailed, match="flush: Input/output error"):
        drive.flush()
    monkeypatch.setattr(drive_module.os, "fdatasync", real)
    with pytest.raises(DriveFailed):
        drive.flush()
    with pytest.raises(DriveFailed):
        write(copy, 0, pattern(2))
    with pytest.raises(DriveFailed):
        read(copy, 0)
    assert copy.read_blocks_nowait(0, 1) is None
    with pytest.raises(DriveFailed):
        drive.close()

    after = Drive.open(drive.path)
    assert after.unclean
    after.close()


def test_after_a_failed_flush_that_the_drive_could_still_note_no_mark_is_trusted(drive, monkeypatch):
    make_slab(drive)
    calls = []
    real = os.fdatasync

    def fails_once(fd):
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(drive_module.os, "fdatasync", fails_once)
    with pytest.raises(DriveFailed):
        drive.flush()
    drive.close(clean=False)
    after = Drive.open(drive.path)
    assert after.contents_lost
    after.close()


def test_a_drive_file_that_was_deleted_under_us_fails_at_the_next_flush(drive):
    make_slab(drive)
    os.unlink(drive.path)
    with pytest.raises(DriveFailed, match="its file was deleted"):
        drive.flush()


def test_a_drive_file_that_was_truncated_under_us_fails_at_the_next_flush_or_read(drive):
    copy = make_slab(drive)
    write(copy, 1000, pattern(1))
    os.truncate(drive.path, copy.data_offset + 100 * BLOCK_SIZE)
    with pytest.raises(DriveFailed, match="truncated"):
        read(copy, 1000)
    with pytest.raises(DriveFailed, match="truncated"):
        drive.flush()
    drive.close(clean=False)
    with pytest.raises(Corrupt, match="truncated"):
        Drive.open(drive.path)


@pytest.mark.parametrize("when", ["while it is looked at", "before its superblocks are rewritten"])
def test_a_drive_file_that_is_truncated_is_never_made_long_again(drive, monkeypatch, when):
    """The superblock at its end was missed, taken for rotten and rewritten: the file had its size again, and zeros."""
    cut = DRIVE_SIZE - MIB
    if when == "while it is looked at":
        monkeypatch.setattr(medium_check, "_check_slot", lambda *_: os.truncate(drive.path, cut))
        report = medium_check.check_medium(drive)
        assert (report.fault, report.bad_copies) == (drive_faults.TRUNCATED, [])
    else:
        os.truncate(drive.path, cut)
        with pytest.raises(DriveFailed, match="truncated"):
            drive.rewrite_superblocks()
        assert drive.fault == drive_faults.TRUNCATED
    assert os.path.getsize(drive.path) == cut


# Power cuts


def test_i3_after_a_power_cut_every_chunk_is_active(drive):
    """Marks that were made since the last flush may not be on the medium; so all chunks count."""
    copy = make_slab(drive)
    write(copy, 0, pattern(1))
    drive.close(clean=False)
    drive = Drive.open(drive.path, boot_id=OTHER_BOOT)
    assert drive.contents_lost
    (copy,) = drive.slabs()
    assert copy.active_chunks() == list(range(64))
    drive.close(clean=False)

    drive = Drive.open(drive.path, boot_id=OTHER_BOOT)
    (copy,) = drive.slabs()
    assert copy.active_chunks() == list(range(64))
    copy.clear_active(range(64))
    drive.close()

    drive = Drive.open(drive.path, boot_id=b"y" * 16)
    assert not drive.contents_lost
    assert drive.slabs()[0].active_chunks() == []
    drive.close()


def test_I1_a_power_cut_is_not_forgotten_by_restarts_until_all_copies_have_been_judged(drive):
    """A copy that may lack what was acknowledged must not be taken for one that kept it (restoration.judge)."""
    copy = make_slab(drive)
    write(copy, 0, pattern(1))
    drive.close(clean=False)
    for _ in range(3):  # the power cut, and two kills within the next boot
        drive = Drive.open(drive.path, boot_id=OTHER_BOOT)
        assert drive.contents_lost
        drive.close(clean=False)
    drive = Drive.open(drive.path, boot_id=OTHER_BOOT)
    drive.slabs()[0].clear_active(range(64))
    drive.note_judged()
    assert not drive.contents_lost
    drive.close(clean=False)
    drive = Drive.open(drive.path, boot_id=OTHER_BOOT)
    assert drive.unclean and not drive.contents_lost
    assert drive.slabs()[0].active_chunks() == [], "nothing was lost since, so nothing is compared as a whole"
    drive.close()


def test_a_power_cut_within_the_open_after_one_is_another_one(drive):
    """The old boot id stays until every chunk is marked, whatever the superblock says of the cut before."""
    write(make_slab(drive), 0, pattern(1))
    drive.close(clean=False)
    Drive.open(drive.path, boot_id=OTHER_BOOT).close(clean=False)
    drive = Drive.open(drive.path, boot_id=b"y" * 16)
    assert drive.contents_lost and drive.slabs()[0].active_chunks() == list(range(64))
    drive.note_judged()
    drive.close()


def test_a_slab_of_which_only_the_entry_reached_the_medium_is_empty(drive):
    make_slab(drive)
    overwrite(drive.path, drive.layout.slot_maps_offset(0), bytes(4096))
    drive.close(clean=False)
    drive = Drive.open(drive.path, boot_id=OTHER_BOOT)
    assert read(drive.slabs()[0], 0, 4) == 4 * ZERO_BLOCK
    drive.close()


def test_a_slab_found_in_two_slots_is_the_newer_one(drive):
    """Deleted and made again; the power went before the delete was on the medium."""
    old = make_slab(drive)
    drive.flush()
    old_entry = os.pread(drive.fd, 512, drive.layout.entry_offset(old.slot, 0))
    drive.delete_slab(VOLUME, SlabId(1))
    new = make_slab(drive)
    write(new, 0, pattern(2))
    drive.close(clean=False)
    for half in (0, 1):
        overwrite(drive.path, drive.layout.entry_offset(old.slot, half), old_entry)
    drive = Drive.open(drive.path)
    (copy,) = drive.slabs()
    assert copy.slot == new.slot
    assert read(copy, 0) == pattern(2)
    assert "older copy of slab 1" in drive.repairs[0]
    drive.close()


def test_the_last_copy_after_a_power_cut_is_adopted_and_resynced_from_as_a_whole(drive):
    """Data reached the medium, checksum and stamp did not: taken, and no returning member misses it."""
    copy = make_slab(drive, epoch=3)
    write(copy, 0, pattern(1))
    write(copy, 20, pattern(2))
    drive.flush()
    drive.close(clean=False)
    overwrite(drive.path, copy.data_offset, pattern(9))
    drive = Drive.open(drive.path, boot_id=OTHER_BOOT)
    (copy,) = drive.slabs()
    assert drive.adopt_torn(copy) == 1
    assert read(copy, 0) == pattern(9)
    assert read(copy, 20) == pattern(2)
    assert set(copy.chunk_epochs()) == {3}
    drive.close()


# Damage


def test_a_slot_whose_entry_is_damaged_in_both_halves_is_quarantined_not_free(drive):
    make_slab(drive, 1)
    make_slab(drive, 2)
    drive.close()
    for half in (0, 1):
        overwrite(drive.path, drive.layout.entry_offset(0, half) + 60, b"\xff" * 8)
    drive = Drive.open(drive.path)
    assert drive.quarantined == [0]
    assert "slot 0 is quarantined" in drive.repairs[-1]
    assert [copy.slab for copy in drive.slabs()] == [2]
    assert drive.free_slots == drive.slot_count - 2
    for slab in range(3, 3 + drive.free_slots):
        assert make_slab(drive, slab).slot != 0
    drive.close()


def test_metadata_of_another_slab_is_not_used(drive):
    first, second = make_slab(drive, 1), make_slab(drive, 2)
    write(first, 0, pattern(1))
    write(second, 0, pattern(2))
    drive.close()
    layout = drive.layout
    with open(drive.path, "rb") as file:
        stolen = os.pread(file.fileno(), layout.metadata_stride, layout.slot_metadata_offset(0))
    overwrite(drive.path, layout.slot_metadata_offset(1), stolen)
    drive = Drive.open(drive.path)
    assert read(drive.find(VOLUME, SlabId(1)), 0) == pattern(1)
    with pytest.raises(Corrupt, match="made anew"):
        read(drive.find(VOLUME, SlabId(2)), 0)
    drive.close()


def test_metadata_that_cannot_be_read_is_a_typed_error(drive, monkeypatch):
    copy = make_slab(drive)

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(drive_module.os, "pread", fails)
        with pytest.raises(DriveFailed, match=r"slab 1.*cannot be read"):
            read(copy, 0)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    seed=st.integers(0, 1 << 32), pieces=st.integers(1, 6), kind=st.sampled_from(["flip", "zeros", "noise"])
)
def test_random_damage_anywhere_is_never_read_as_data(damaged_drives, seed, pieces, kind):
    """Whatever is flipped, zeroed or overwritten: an error that says so, or the bytes that were written."""
    original, target = damaged_drives
    chooser = random.Random(seed)
    path = image_of(original, target)
    end = DRIVE_SIZE if chooser.random() < 0.2 else 3 * MIB  # mostly where the structures are
    for _ in range(pieces):
        offset = chooser.randrange(end)
        if kind == "flip":
            flip_bit(path, 8 * offset + chooser.randrange(8))
        else:
            length = min(chooser.choice([1, 8, 512, 4096, 16384]), DRIVE_SIZE - offset)
            overwrite(path, offset, bytes(length) if kind == "zeros" else chooser.randbytes(length))
    try:
        drive = Drive.open(path)
    except (Corrupt, DriveRefused):
        return
    for copy in drive.slabs():
        assert (copy.volume, copy.slab) in [(VOLUME, 1), (VOLUME, 2)]
        for block in range(16):
            try:
                assert read(copy, block) == (pattern(copy.slab * 100 + block) if block % 3 else ZERO_BLOCK)
            except CsvfsError:
                continue
    drive.close()


@pytest.fixture(scope="module")
def damaged_drives(tmp_path_factory):
    directory = tmp_path_factory.mktemp("damage")
    path, _ = make_drive(directory / "drive")
    drive = Drive.open(path)
    for slab in (1, 2):
        copy = make_slab(drive, slab)
        for block in range(16):
            if block % 3:
                write(copy, block, pattern(slab * 100 + block))
    drive.close()
    return path, directory / "damaged"


# Tools


def dump(path: str, *options: str) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, str(DUMP), path, *options], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stdout


def test_the_dump_shows_every_structure_and_names_what_is_damaged(drive):
    copy = make_slab(drive, 7, epoch=4)
    write(copy, 3, pattern(1))
    drive.close()
    status, text = dump(drive.path, "--json", "--verify")
    result = json.loads(text)
    assert status == 0
    assert [row["copy"] for row in result["superblocks"]] == [0, 1, 2, 3]
    slot = result["slots"][0]
    assert (slot["slab"], slot["epoch"], slot["role"], list(slot["checksums"])) == (7, 4, "in sync", ["3"])
    assert (slot["active_chunks"], slot["chunk_epochs"], slot["bad_blocks"]) == ([0], {"0": 4}, [])

    flip_bit(drive.path, 8 * (copy.data_offset + 3 * BLOCK_SIZE))
    overwrite(drive.path, superblock_offsets(DRIVE_SIZE)[1], b"zap")
    status, text = dump(drive.path, "--verify")
    assert status == 1
    assert "wrong magic" in text
    assert "bad_blocks       [3]" in text


def test_the_dump_of_something_else_says_so(tmp_path):
    (tmp_path / "other").write_bytes(b"hello" * 1000)
    assert dump(str(tmp_path / "other"))[0] == 2


def test_the_lock_is_an_flock_that_ends_with_the_process(drive):
    with open(drive.path, "rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
