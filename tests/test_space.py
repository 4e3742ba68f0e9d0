"""Space: where extents come from, and that freed blocks are trimmed before anybody gets them again."""

import random

import pytest

from coordinator.consistency import check
from coordinator.extents import AHEAD_BLOCKS_MAX, AHEAD_BLOCKS_MIN, Extent
from coordinator.metadata import Metadata
from coordinator.space import _Bitmap, _pack_bits, _unpack_bits
from csvfs.errors import BadRequest, Conflict, Corrupt, Exists, IsADirectory, NotFound
from tests.metadata_members import TestVolume, descriptor

FILE, DIRECTORY = 0o100644, 0o040755
SIZE, BLOCKS = 6, 7


@pytest.fixture
def volume():
    volume = TestVolume(data_slabs=2, data_blocks=1024)
    yield volume
    assert check(volume.metadata) == []
    assert check(volume.reopened()) == []


def make(metadata: Metadata, name: bytes = b"file") -> int:
    return metadata.make(1, name, FILE, 0, 0, 0, b"", 1)[0]


def grow(metadata: Metadata, ino: int, block: int, count: int) -> list[Extent]:
    given = metadata.allocate(ino, block, count, (block + count) * 4096, 0, 1)
    assert given.missing == 0 and given.reached == block + count
    return given.extents


def test_a_small_new_file_gets_no_block_more_than_it_has(volume):
    with volume.batch() as metadata:
        ino = make(metadata)
        extents = grow(metadata, ino, 0, 1)
    assert extents == [Extent(0, 1, 1, 0)]
    assert metadata.getattr(ino)[SIZE : BLOCKS + 1] == [4096, 8]


def test_a_growing_file_is_given_as_much_ahead_as_it_has(volume):
    with volume.batch() as metadata:
        ino = make(metadata)
        grow(metadata, ino, 0, 1)
        assert grow(metadata, ino, 1, 1)[-1].end == 2 + AHEAD_BLOCKS_MIN
        grow(metadata, ino, 18, 1)
        assert metadata.getattr(ino)[BLOCKS] == (19 + 18) * 8
        assert metadata.layout(ino, 0, 1000) == [Extent(0, 37, 1, 0)]  # one extent, however often it grew
        assert metadata.trim_allocation_ahead(ino)
        assert metadata.layout(ino, 0, 1000) == [Extent(0, 19, 1, 0)]
    assert AHEAD_BLOCKS_MAX * 4096 == 16 << 20


def test_holes_of_a_sparse_file_are_filled_by_whole_chunks(volume):
    with volume.batch() as metadata:
        ino = make(metadata)
        metadata.setattr(ino, size=1 << 20, now_ns=1)
        assert [e.to_wire()[:2] for e in metadata.allocate(ino, 37, 1, 0, 0, 1).extents] == [[32, 16]]
        assert [e.to_wire()[:2] for e in metadata.allocate(ino, 255, 1, 0, 0, 1).extents] == [[240, 16]]
        metadata.setattr(ino, size=4096 * 250, now_ns=1)
        metadata.allocate(ino, 248, 1, 0, 0, 1)
    assert metadata.getattr(ino)[BLOCKS] == 26 * 8


def test_a_range_with_several_holes_is_filled_and_what_was_there_stays(volume):
    with volume.batch() as metadata:
        ino = make(metadata)
        metadata.setattr(ino, size=200 * 4096, now_ns=1)
        for block in (16, 48, 80):
            metadata.allocate(ino, block, 1, 0, 0, 1)
        before = metadata.layout(ino, 0, 200)
        metadata.allocate(ino, 0, 200, 0, 0, 1)
        after = metadata.layout(ino, 0, 200)
    cover = {e.block + i: (e.slab, e.slab_block + i) for e in after for i in range(e.count)}
    assert sorted(cover) == list(range(200))
    assert all(cover[e.block + i] == (e.slab, e.slab_block + i) for e in before for i in range(e.count))


def test_layouts_show_whole_extents_that_overlap_the_range_up_to_a_limit(volume):
    with volume.batch() as metadata:
        ino = make(metadata)
        metadata.setattr(ino, size=400 * 4096, now_ns=1)
        for block in (0, 32, 64):
            metadata.allocate(ino, block, 1, 0, 0, 1)
    assert [e.block for e in metadata.layout(ino, 10, 30)] == [0, 32]
    assert [e.block for e in metadata.layout(ino, 16, 16)] == []
    assert [e.block for e in metadata.layout(ino, 0, 400, limit=2)] == [0, 32]


def test_ranges_that_cannot_be_are_refused(volume):
    with volume.batch() as metadata:
        ino = make(metadata)
        for block, count in ((-1, 1), (0, 0), (5, -5)):
            with pytest.raises(BadRequest):
                metadata.allocate(ino, block, count, 0, 0, 1)
            with pytest.raises(BadRequest):
                metadata.layout(ino, block, count)
        with pytest.raises(IsADirectory):
            metadata.allocate(1, 0, 1, 0, 0, 1)
        with pytest.raises(NotFound):
            metadata.allocate(99, 0, 1, 0, 0, 1)
        pipe = metadata.make(1, b"pipe", 0o010644, 0, 0, 0, b"", 1)[0]
        with pytest.raises(Conflict):
            metadata.allocate(pipe, 0, 1, 0, 0, 1)


def test_missing_space_is_named_and_nothing_changes_until_a_slab_is_added(volume):
    with volume.batch() as metadata:
        ino = make(metadata)
        grow(metadata, ino, 0, 2000)
        before = metadata.getattr(ino), metadata.statfs()
        given = metadata.allocate(ino, 1990, 100, 1 << 30, 5, 5)
        assert given.missing == 90 - 48
        assert (metadata.getattr(ino), metadata.statfs()) == before
    volume.add_data_slab()
    with volume.batch():
        assert grow(metadata, ino, 2000, 90)[-1].slab == 3


def test_little_room_is_given_as_asked_without_more_ahead(volume):
    with volume.batch() as metadata:
        ino = make(metadata)
        grow(metadata, ino, 0, 2040)
        assert grow(metadata, ino, 2040, 8)[-1].end == 2048
    assert metadata.statfs().free_blocks == 0


def test_freed_blocks_are_granted_again_only_after_their_trim(volume):
    """P2: a trim that came late would wipe out the next owner's bytes."""
    with volume.batch() as metadata:
        ino, other = make(metadata), make(metadata, b"other")
        grow(metadata, ino, 0, 2048)
        metadata.setattr(ino, size=0, now_ns=2)
        assert metadata.allocate(other, 0, 1, 0, 0, 1).missing == 1
    assert metadata.statfs().free_blocks == 0 and metadata.statfs().used_blocks == 0
    trims = metadata.take_trims(100, metadata.trim_mark())
    assert sum(trim.count for trim in trims) == 2048
    assert metadata.take_trims(100, metadata.trim_mark()) == []
    with volume.batch():
        assert metadata.allocate(other, 0, 1, 0, 0, 1).missing == 1
    metadata.trims_done(trims)
    with volume.batch():
        pass
    with volume.batch():
        assert metadata.statfs().free_blocks == 2048
        assert metadata.allocate(other, 0, 1, 0, 0, 1).missing == 0


def test_trims_are_handed_out_only_up_to_the_mark_that_was_flushed(volume):
    with volume.batch() as metadata:
        ino = make(metadata)
        grow(metadata, ino, 0, 100)
        metadata.setattr(ino, size=50 * 4096, now_ns=1)
    mark = metadata.trim_mark()
    with volume.batch():
        metadata.setattr(ino, size=0, now_ns=1)
    assert sum(trim.count for trim in metadata.take_trims(10, mark)) == 50
    assert sum(trim.count for trim in metadata.take_trims(10, metadata.trim_mark())) == 50


def test_failed_trims_come_again_and_a_successor_does_all_that_are_left(volume):
    with volume.batch() as metadata:
        ino = make(metadata)
        grow(metadata, ino, 0, 100)
        metadata.setattr(ino, size=0, now_ns=1)
    trims = metadata.take_trims(10, metadata.trim_mark())
    metadata.trims_failed(trims)
    assert metadata.take_trims(10, metadata.trim_mark()) == trims
    successor = volume.reopened()
    assert successor.take_trims(10, successor.trim_mark()) == trims


def test_trims_done_in_a_batch_that_is_rolled_back_are_freed_by_the_next(volume):
    with volume.batch() as metadata:
        ino = make(metadata)
        grow(metadata, ino, 0, 100)
        metadata.setattr(ino, size=0, now_ns=1)
    free = metadata.statfs().free_blocks
    metadata.trims_done(metadata.take_trims(10, metadata.trim_mark()))
    metadata.begin()
    metadata.database.flush()
    metadata.rollback()
    assert metadata.statfs().free_blocks == free
    with volume.batch():
        pass
    assert metadata.statfs().free_blocks == free + 100


def test_unlinking_frees_everything_of_a_file(volume):
    with volume.batch() as metadata:
        ino = make(metadata)
        grow(metadata, ino, 0, 500)
        metadata.setxattr(ino, b"user.a", b"value", 0, 1)
        metadata.unlink(1, b"file", False, 2)
        assert metadata.drop_orphan(ino)
    volume.carry_out_trims()
    assert metadata.statfs().free_blocks == 2048 and metadata.statfs().files == 1


def test_a_file_of_very_many_extents_is_freed_in_several_batches(volume):
    volume.metadata.extents.free_extents_max = 10
    with volume.batch() as metadata:
        files = [make(metadata, b"file-%d" % number) for number in range(2)]
        for block in range(35):
            for ino in files:
                metadata.allocate(ino, block * 2, 1, (block * 2 + 1) * 4096, 0, 1)
    sizes = []
    while not sizes or sizes[-1] > 4096:
        with volume.batch():
            sizes.append(metadata.setattr(files[0], size=4096, now_ns=1)[SIZE])
        assert check(metadata) == []
    assert len(sizes) == 4 and sizes == sorted(sizes, reverse=True)
    with volume.batch():
        metadata.unlink(1, b"file-1", False, 1)
    rounds = 1
    with volume.batch():
        done = metadata.drop_orphan(files[1])
    while not done:
        rounds += 1
        with volume.batch():
            done = metadata.drop_orphan(files[1])
    assert rounds == 4


def test_a_large_range_of_scattered_space_is_filled_in_several_calls(volume, monkeypatch):
    monkeypatch.setattr("coordinator.extents.PIECES_PER_CALL_MAX", 8)
    with volume.batch() as metadata:
        ino = make(metadata)
        metadata.setattr(ino, size=1000 * 4096, now_ns=1)
        for block in range(0, 1000, 40):
            metadata.allocate(ino, block, 1, 0, 0, 1)
    block, calls = 0, 0
    while block < 1000:
        with volume.batch():
            given = metadata.allocate(ino, block, 1000 - block, 0, 0, 1)
        assert given.missing == 0 and given.reached > block
        block, calls = given.reached, calls + 1
    assert calls > 2
    assert sum(extent.count for extent in metadata.layout(ino, 0, 1000)) == 1000


def test_slabs_are_numbered_once_and_their_members_change_by_growing_epochs(volume):
    with volume.batch() as metadata:
        slab = metadata.new_slab_id()
        with pytest.raises(Conflict, match="not planned"):
            metadata.add_slab(descriptor(slab + 1), 1024)
        metadata.add_slab(descriptor(slab), 1024)
        with pytest.raises(Exists):
            metadata.add_slab(descriptor(slab), 1024)
        metadata.set_slab(descriptor(slab, epoch=4))
        with pytest.raises(Conflict, match="epoch"):
            metadata.set_slab(descriptor(slab, epoch=4))
        with pytest.raises(NotFound):
            metadata.set_slab(descriptor(99, epoch=4))
    assert volume.reopened().slab(slab) == descriptor(slab, epoch=4)
    assert [d.slab for d in metadata.slabs()] == [1, 2, 3]


def test_only_empty_slabs_can_be_given_up_and_their_numbers_never_come_again(volume):
    with volume.batch() as metadata:
        ino = make(metadata)
        grow(metadata, ino, 0, 1)
        assert metadata.empty_slabs(10) == [2]
        with pytest.raises(Conflict, match="in use"):
            metadata.remove_slab(1)
        metadata.remove_slab(2)
        assert metadata.new_slab_id() == 3
        with pytest.raises(NotFound):
            metadata.slab(2)
    assert metadata.statfs().slab_blocks == 1024


def test_a_planned_slab_number_is_not_planned_twice_after_a_failover(volume):
    with volume.batch() as metadata:
        slab = metadata.new_slab_id()
    successor = volume.reopened()
    successor.begin()
    assert successor.new_slab_id() == slab + 1
    successor.rollback()


def test_bitmaps_survive_packing_and_damage_is_seen():
    generator = random.Random(1)
    for blocks in (1, 7, 8, 1024, 16_384):
        taken = bytearray(generator.randrange(2) for _ in range(blocks))
        assert _unpack_bits(_pack_bits(taken), blocks) == taken
    with pytest.raises(Corrupt):
        _Bitmap(16, 15, b"\0\0")
    with pytest.raises(Corrupt):
        _Bitmap(16, 16, b"\0\0\1")


def test_one_full_slab_leads_to_the_next_with_room(volume):
    with volume.batch() as metadata:
        files = [make(metadata, b"file-%d" % number) for number in range(64)]
        for ino in files:
            grow(metadata, ino, 0, 32)
        for ino in files[::2]:
            metadata.setattr(ino, size=0, now_ns=1)
    assert metadata.statfs().free_blocks == 0
    volume.carry_out_trims()
    with volume.batch():
        ino = make(metadata, b"large")
        extents = grow(metadata, ino, 0, 1024)
    assert len(extents) == 32 and {extent.slab for extent in extents} == {1, 2}


def test_a_damaged_bitmap_dooms_the_batch_that_met_it(volume):
    volume.metadata.begin()
    volume.metadata.database.run("UPDATE slabs SET free = 5 WHERE id = 1")
    ino = make(volume.metadata)
    with pytest.raises(Corrupt, match="slab 1"):
        volume.metadata.allocate(ino, 0, 1, 0, 0, 1)
    with pytest.raises(Corrupt, match="slab 1"):
        volume.metadata.commit()
    assert volume.metadata.lookup(1, b"file") is None


def test_holes_and_data_are_found_however_many_extents_lie_before_them(volume, monkeypatch):
    """A hole is most often near: few extents are looked at first, and never more than a question may take."""
    monkeypatch.setattr("coordinator.extents.SEEK_EXTENTS_FIRST", 2)
    monkeypatch.setattr("coordinator.extents.SEEK_EXTENTS_MAX", 16)
    with volume.batch() as metadata:
        ino = make(metadata)
        metadata.setattr(ino, size=1 << 30, now_ns=1)
        for chunk in reversed(range(60)):  # so that no two extents are one
            if chunk % 23:
                metadata.allocate(ino, 16 * chunk, 16, 0, 0, 1)
    assert len(metadata.layout(ino, 0, 1000)) > 50
    taken = {e.block + i for e in metadata.layout(ino, 0, 2000) for i in range(e.count)}
    for block in range(980):
        hole, turns = False, 0
        at = block
        while not hole:
            at, hole = metadata.seek(ino, at, hole=True)
            turns += 1
        assert at == min(b for b in range(block, 2000) if b not in taken)
        assert turns <= 1 + 60 // 14
        data = min((b for b in taken if b >= block), default=None)
        assert metadata.seek(ino, block, hole=False) == ((1 << 32) if data is None else data, True)


def test_a_question_for_a_hole_that_is_near_reads_few_of_very_many_extents(volume, monkeypatch):
    with volume.batch() as metadata:
        ino = make(metadata)
        metadata.setattr(ino, size=1 << 30, now_ns=1)
        for chunk in range(0, 120, 2):
            metadata.allocate(ino, 16 * chunk, 1, 0, 0, 1)
    limits = []
    read = metadata.extents._read
    monkeypatch.setattr(metadata.extents, "_read", lambda ino, block, end, limit: limits.append(limit) or read(ino, block, end, limit))
    assert metadata.seek(ino, 64, hole=True) == (80, True)
    assert max(limits) < 60
