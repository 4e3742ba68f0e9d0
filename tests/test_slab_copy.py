"""One copy of a slab: what was written is read, or its damage is named; never anything else."""

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csvfs.block import slab_copy as slab_copy_module
from csvfs.block.drive import Drive
from csvfs.errors import BadRequest, Corrupt, DriveFailed
from csvfs.ids import Epoch, Term
from csvfs.units import BLOCK_SIZE, BLOCKS_PER_CHUNK
from csvfs.wire.block_messages import NEVER_WRITTEN, ROLE_IN_SYNC, ZERO_BLOCK, block_checksum
from tests.drive_files import (
    VOLUME,
    flip_bit,
    image_of,
    make_drive,
    make_slab,
    overwrite,
    pattern,
    read,
    sums_of,
    write,
)

BLOCKS = 1024  # of a slab of 4 MiB


@pytest.fixture
def drive(tmp_path):
    path, _ = make_drive(tmp_path / "drive")
    drive = Drive.open(path)
    yield drive
    drive.close(clean=False)


@pytest.fixture
def copy(drive):
    return make_slab(drive)


def set_epoch(drive, copy, epoch):
    drive.set_epoch(copy, Epoch(epoch), ROLE_IN_SYNC, Term(1))


# Reading and writing


def test_what_is_written_is_read_with_its_checksums(copy):
    data = pattern(1, count=3)
    write(copy, 7, data)
    assert copy.read_blocks(7, 3) == (sums_of(copy, 7, data), data)
    assert copy.read_blocks_nowait(7, 3) == (sums_of(copy, 7, data), data)
    assert read(copy, 6, 5) == ZERO_BLOCK + data + ZERO_BLOCK


def test_blocks_never_written_are_zeros_whatever_lies_on_the_medium(drive, copy):
    overwrite(drive.path, copy.data_offset, b"\xff" * 8 * BLOCK_SIZE)
    assert copy.read_blocks(0, 1) == (bytes(4), ZERO_BLOCK)
    assert copy.read_blocks(0, 3) == (bytes(12), 3 * ZERO_BLOCK)
    write(copy, 1, pattern(1))
    assert read(copy, 0, 3) == ZERO_BLOCK + pattern(1) + ZERO_BLOCK
    assert bytes(copy.read_blocks_nowait(0, 3)[1]) == ZERO_BLOCK + pattern(1) + ZERO_BLOCK


def test_a_range_never_written_is_answered_without_asking_the_medium(copy, monkeypatch):
    copy.active_chunks()
    monkeypatch.setattr(slab_copy_module.os, "pread", lambda *_: pytest.fail("the medium was asked"))
    assert read(copy, 0, 256) == bytes(256 * BLOCK_SIZE)


def test_a_read_that_would_block_is_not_done_at_once(copy, monkeypatch):
    write(copy, 0, pattern(1))

    def would_block(*_):
        raise BlockingIOError(errno.EAGAIN, "would block")

    monkeypatch.setattr(slab_copy_module.os, "preadv", would_block)
    assert copy.read_blocks_nowait(0, 1) is None
    copy.warm_blocks(0, 1)
    assert read(copy, 0) == pattern(1)


@pytest.mark.parametrize(("block", "count"), [(-1, 1), (BLOCKS, 1), (BLOCKS - 1, 2), (0, 0), (1 << 40, 1)])
def test_ranges_outside_the_slab_are_refused(copy, block, count):
    data = pattern(1, count=count)
    with pytest.raises(BadRequest):
        copy.write_blocks(block, data, bytes(4 * count))
    with pytest.raises(BadRequest):
        copy.read_blocks(block, count)
    with pytest.raises(BadRequest):
        copy.trim_blocks(block, count)
    assert copy.active_chunks() == []


def test_data_and_checksums_of_different_counts_are_refused(copy):
    with pytest.raises(BadRequest):
        copy.write_blocks(0, pattern(1, count=2), bytes(4))
    with pytest.raises(BadRequest):
        copy.write_blocks(0, pattern(1)[:-1], bytes(4))


def test_an_error_of_the_medium_names_drive_slab_block_and_errno(drive, copy, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(slab_copy_module.os, "pwrite", fails)
    with pytest.raises(DriveFailed, match=rf"{drive.path}.*slab 1 block 5.*errno 5"):
        write(copy, 5, pattern(1))
    assert drive.counters.io_errors == 1
    assert copy.active_chunks() == [0]


def test_a_short_write_goes_on_until_all_is_written(copy, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(
        slab_copy_module.os, "pwrite", lambda fd, data, at: whole(fd, memoryview(data)[:1000], at)
    )
    write(copy, 3, pattern(1, count=2))
    assert read(copy, 3, 2) == pattern(1, count=2)


def test_one_bad_sector_costs_one_block_and_is_healed_by_a_rewrite(drive, copy, monkeypatch):
    write(copy, 0, pattern(1, count=4))
    whole = os.pread
    bad_at = copy.data_offset + 2 * BLOCK_SIZE

    def pread(fd, length, offset):
        if offset <= bad_at < offset + length:
            raise OSError(errno.EIO, "Input/output error")
        return whole(fd, length, offset)

    with monkeypatch.context() as patch:
        patch.setattr(slab_copy_module.os, "pread", pread)
        with pytest.raises(Corrupt) as caught:
            copy.read_blocks(0, 4)
        assert caught.value.bad_blocks == (2,)
        assert copy.verify_chunk(0) == [2]
        block_2 = pattern(1, count=4)[2 * BLOCK_SIZE : 3 * BLOCK_SIZE]
        assert copy.heal_block(2, block_2, block_checksum(block_2, copy.seed, 2))
    assert read(copy, 0, 4) == pattern(1, count=4)


# Damage


def test_a_flipped_bit_of_data_is_named_and_healed(drive, copy):
    write(copy, 4, pattern(1, count=2))
    flip_bit(drive.path, 8 * (copy.data_offset + 5 * BLOCK_SIZE + 77))
    with pytest.raises(Corrupt) as caught:
        copy.read_blocks(3, 4)
    assert caught.value.bad_blocks == (5,)
    with pytest.raises(Corrupt):
        copy.read_blocks_nowait(5, 1)
    assert drive.counters.checksum_errors == 2

    good = pattern(1, count=2)[BLOCK_SIZE:]
    assert copy.heal_block(5, good, block_checksum(good, copy.seed, 5))
    assert read(copy, 4, 2) == pattern(1, count=2)
    assert drive.counters.healed == 1


def test_a_healing_write_never_replaces_what_verifies(copy):
    """A heal that was sent before a newer write must not undo it."""
    write(copy, 0, pattern(2))
    assert not copy.heal_block(0, pattern(1), block_checksum(pattern(1), copy.seed, 0))
    assert not copy.heal_block(1, pattern(1), block_checksum(pattern(1), copy.seed, 1))
    assert read(copy, 0, 2) == pattern(2) + ZERO_BLOCK


def test_a_healing_write_is_itself_verified(drive, copy):
    write(copy, 0, pattern(1))
    flip_bit(drive.path, 8 * copy.data_offset)
    with pytest.raises(BadRequest, match="does not match"):
        copy.heal_block(0, pattern(2), block_checksum(pattern(1), copy.seed, 0))


def test_a_block_that_the_other_copy_never_wrote_is_healed_to_zeros(drive, copy):
    write(copy, 0, pattern(1))
    flip_bit(drive.path, 8 * copy.data_offset)
    assert copy.heal_block(0, b"", NEVER_WRITTEN)
    assert read(copy, 0) == ZERO_BLOCK


@settings(deadline=None, derandomize=True, max_examples=60)
@given(bit=st.integers(0, 4 * 8 * BLOCK_SIZE - 1), where=st.sampled_from(["data", "checksums", "written"]))
def test_any_single_bit_flip_gives_the_right_bytes_or_is_detected(drive_for_flips, bit, where):
    """I9 at its root: of data, checksum table or written map, whichever bit it is."""
    drive, copy, expected = drive_for_flips
    start, length = {
        "data": (copy.data_offset, 4 * BLOCK_SIZE),
        "checksums": (drive.layout.block_checksum_offset(copy.slot, 0), 16),
        "written": (drive.layout.block_written_offset(copy.slot, 0), 1),
    }[where]
    place = 8 * start + bit % (8 * length)
    flip_bit(drive.path, place)
    try:
        assert read(copy, 0, 4) == expected
        # Right bytes in spite of the flip: only of what was not relied on.
        assert where != "checksums"
        assert where == "written" or 2 * BLOCK_SIZE <= bit // 8 < 3 * BLOCK_SIZE
    except Corrupt as error:
        assert error.bad_blocks
    finally:
        flip_bit(drive.path, place)
    assert read(copy, 0, 4) == expected


@pytest.fixture(scope="module")
def drive_for_flips(tmp_path_factory):
    """Blocks 0, 1 and 3 are written, block 2 never."""
    path, _ = make_drive(tmp_path_factory.mktemp("flips") / "drive")
    drive = Drive.open(path)
    copy = make_slab(drive)
    write(copy, 0, pattern(1, count=2))
    write(copy, 3, pattern(3))
    yield drive, copy, pattern(1, count=2) + ZERO_BLOCK + pattern(3)
    drive.close()


def test_a_checksum_table_that_became_zeros_does_not_make_data_read_as_zeros(drive, copy):
    """A lost or zeroed page of the table: the written map remembers that something was there."""
    write(copy, 0, pattern(1, count=3))
    overwrite(drive.path, drive.layout.block_checksum_offset(copy.slot, 0), bytes(4096))
    with pytest.raises(Corrupt) as caught:
        copy.read_blocks(0, 4)
    assert caught.value.bad_blocks == (0, 1, 2)
    with pytest.raises(Corrupt):
        copy.read_blocks(1, 1)
    assert copy.verify_chunk(0) == [0, 1, 2]
    block_1 = pattern(1, count=3)[BLOCK_SIZE : 2 * BLOCK_SIZE]
    assert copy.heal_block(1, block_1, block_checksum(block_1, copy.seed, 1))
    assert read(copy, 1) == block_1


def test_a_block_at_the_place_of_another_does_not_verify(drive, copy):
    write(copy, 0, pattern(1))
    write(copy, 1, pattern(2))
    overwrite(drive.path, copy.data_offset + BLOCK_SIZE, pattern(1))
    with pytest.raises(Corrupt):
        copy.read_blocks(1, 1)


# Trim


def test_trimmed_blocks_are_zeros_and_their_space_is_given_back(drive, copy):
    write(copy, 0, pattern(1, count=64))
    os.fsync(drive.fd)
    used = os.stat(drive.path).st_blocks
    copy.trim_blocks(0, 63)
    assert read(copy, 0, 64) == 63 * ZERO_BLOCK + pattern(1, count=64)[63 * BLOCK_SIZE :]
    assert os.stat(drive.path).st_blocks <= used - 62 * 8
    assert set(copy.checksums()[:63]) == {NEVER_WRITTEN}
    write(copy, 5, pattern(2))
    assert read(copy, 4, 3) == ZERO_BLOCK + pattern(2) + ZERO_BLOCK


# Active chunks and chunk epochs


def test_i3_a_write_marks_its_chunks_active_and_stamps_them_with_its_epoch(drive, copy):
    write(copy, BLOCKS_PER_CHUNK - 1, pattern(1, count=2))
    set_epoch(drive, copy, 5)
    copy.trim_blocks(3 * BLOCKS_PER_CHUNK, 1)
    assert copy.active_chunks() == [0, 1, 3]
    assert list(copy.chunk_epochs()[:5]) == [1, 1, 0, 5, 0]
    copy.clear_active([0, 3])
    assert copy.active_chunks() == [1]


def test_chunk_epochs_only_grow(drive, copy):
    set_epoch(drive, copy, 5)
    write(copy, 0, pattern(1))
    copy.stamp_chunks([0, 1], 3)
    assert list(copy.chunk_epochs()[:2]) == [5, 3]
    copy.stamp_chunks([0, 1], 9)
    write(copy, 0, pattern(2))
    assert list(copy.chunk_epochs()[:2]) == [9, 9]


def test_chunks_outside_the_slab_are_refused(copy):
    for chunk in (-1, BLOCKS // BLOCKS_PER_CHUNK):
        with pytest.raises(BadRequest):
            copy.clear_active([chunk])
        with pytest.raises(BadRequest):
            copy.stamp_chunks([chunk], 1)


# Joining


def test_i7_pulled_blocks_never_replace_what_was_written_since_joining_began(copy):
    write(copy, 0, pattern(1, count=4))
    copy.joining_begin()
    write(copy, 1, pattern(2))
    copy.trim_blocks(2, 1)
    pulled = pattern(9, count=4)
    assert copy.written_since_joining(1)
    assert not copy.written_since_joining(0)
    assert copy.apply_pulled_blocks(0, pulled, sums_of(copy, 0, pulled)) == 2
    assert read(copy, 0, 4) == pulled[:BLOCK_SIZE] + pattern(2) + ZERO_BLOCK + pulled[3 * BLOCK_SIZE :]


def test_pulled_blocks_may_be_pulled_again_and_take_the_sources_epoch(copy):
    copy.joining_begin()
    for number in (1, 2):
        assert copy.apply_pulled_blocks(0, pattern(number), sums_of(copy, 0, pattern(number)), 1) == 1
    assert read(copy, 0) == pattern(2)
    assert copy.chunk_epochs()[0] == 1


def test_pulled_blocks_that_the_source_never_wrote_become_zeros(copy):
    write(copy, 0, pattern(1, count=3))
    copy.joining_begin()
    data = pattern(5, count=3)
    sums = sums_of(copy, 0, data)
    assert copy.apply_pulled_blocks(0, data, sums[:4] + bytes(4) + sums[8:]) == 3
    assert read(copy, 0, 3) == data[:BLOCK_SIZE] + ZERO_BLOCK + data[2 * BLOCK_SIZE :]


def test_without_joining_nothing_is_pulled(copy):
    with pytest.raises(BadRequest, match="not joining"):
        copy.apply_pulled_blocks(0, pattern(1), sums_of(copy, 0, pattern(1)))


# A kill at any point of a write


@pytest.mark.parametrize("old", [b"", pattern(1, count=2)])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_kill_within_a_write_leaves_old_or_new_content_per_block(
    drive, copy, tmp_path, monkeypatch, old, done
):
    """`done` of two blocks reached the page cache, and no checksum did: each is torn, or as it was."""
    if old:
        write(copy, 0, old)
        drive.flush()
        copy.clear_active([0])
    new = pattern(2, count=2)
    whole = os.pwrite

    def pwrite(fd, data, offset):
        whole(fd, memoryview(data)[: done * BLOCK_SIZE], offset)
        image_of(drive.path, tmp_path / "killed")
        return whole(fd, data, offset)

    monkeypatch.setattr(slab_copy_module.os, "pwrite", pwrite)
    write(copy, 0, new)
    monkeypatch.undo()

    after = Drive.open(str(tmp_path / "killed"))
    found = after.find(VOLUME, copy.slab)
    assert after.unclean
    assert not after.contents_lost
    assert found.active_chunks() == [0]
    torn = list(range(done)) if old else []
    assert found.verify_chunk(0) == torn
    assert after.adopt_torn(found) == len(torn) == after.counters.torn_adopted
    assert found.verify_chunk(0) == []
    for block in range(2):
        there = read(found, block)
        start = block * BLOCK_SIZE
        assert there in (old[start : start + BLOCK_SIZE] or ZERO_BLOCK, new[start : start + BLOCK_SIZE])
    after.close()


def test_blocks_of_chunks_that_are_not_active_are_never_adopted(drive, copy):
    """Rot is not a torn write: it stays bad until another copy heals it."""
    write(copy, 0, pattern(1))
    copy.clear_active([0])
    flip_bit(drive.path, 8 * copy.data_offset)
    assert drive.adopt_torn(copy) == 0
    with pytest.raises(Corrupt):
        read(copy, 0)


# Random operations against a model


OPERATION = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 60), st.integers(1, 20), st.integers(0, 9)),
    st.tuples(st.just("trim"), st.integers(0, 60), st.integers(1, 20), st.just(0)),
    st.tuples(st.just("read"), st.integers(0, 60), st.integers(1, 20), st.just(0)),
    st.tuples(st.just("flush and unmark"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("epoch"), st.integers(0, 3), st.just(0), st.just(0)),
    st.tuples(st.just("reopen"), st.booleans(), st.just(0), st.just(0)),
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(operations=st.lists(OPERATION, max_size=25))
def test_any_sequence_of_operations_reads_as_a_plain_array_would(tmp_path_factory, operations):
    path, _ = make_drive(tmp_path_factory.mktemp("model") / "drive")
    drive = Drive.open(path)
    copy = make_slab(drive)
    content, epochs, active, epoch = [ZERO_BLOCK] * 96, [0] * 6, set(), 1
    for name, first, count, number in operations:
        chunks = range(first // BLOCKS_PER_CHUNK, (first + count - 1) // BLOCKS_PER_CHUNK + 1)
        if name in ("write", "trim"):
            data = pattern(number, count) if name == "write" else bytes(count * BLOCK_SIZE)
            write(copy, first, data) if name == "write" else copy.trim_blocks(first, count)
            content[first : first + count] = [
                data[at : at + BLOCK_SIZE] for at in range(0, len(data), BLOCK_SIZE)
            ]
            active |= set(chunks)
            for chunk in chunks:
                epochs[chunk] = max(epochs[chunk], epoch)
        elif name == "read":
            assert read(copy, first, count) == b"".join(content[first : first + count])
        elif name == "flush and unmark":
            drive.flush()
            copy.clear_active(active)
            active = set()
        elif name == "epoch":
            epoch += first
            set_epoch(drive, copy, epoch)
        else:
            drive.close(clean=first)
            drive = Drive.open(path)
            copy = drive.find(VOLUME, copy.slab)
            assert drive.repairs == []
    assert read(copy, 0, 96) == b"".join(content)
    assert list(copy.chunk_epochs()[:6]) == epochs
    assert copy.active_chunks() == sorted(active)
    assert copy.epoch == epoch
    assert copy.bad_blocks_scan(0, 96) == []
    drive.close()
