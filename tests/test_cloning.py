"""Clones at the coordinator: who has which block, against a model of one counter per block, over crashes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.consistency import check, has_shared_blocks
from coordinator.metadata import Metadata
from coordinator.quotas import IN_FORCE, Quota
from csvfs.errors import BadRequest, Conflict, Corrupt, QuotaExceeded
from csvfs.units import BLOCK_SIZE
from tests.metadata_members import TestVolume

FILE = 0o100644
BLOCKS, SIZE = 7, 6
SPACE = 24  # blocks of a file

Where = tuple[int, int]  # slab, block


def made(volume: TestVolume, name: bytes, blocks: int) -> int:
    with volume.batch() as metadata:
        ino = metadata.make(1, name, FILE, 0, 0, 0, b"", 1)[0]
        if blocks:
            metadata.allocate(ino, 0, blocks, blocks * BLOCK_SIZE, 0, 2)
    return ino


def layout_of(metadata: Metadata, ino: int) -> dict[int, Where]:
    return {
        extent.block + at: (extent.slab, extent.slab_block + at)
        for extent in metadata.layout(ino, 0, 10_000)
        for at in range(extent.count)
    }


def sound(volume: TestVolume) -> None:
    assert check(volume.metadata) == []
    assert check(volume.reopened()) == []


def test_a_clone_has_the_blocks_of_its_source_and_takes_no_space():
    volume = TestVolume()
    source, target = made(volume, b"a", 40), made(volume, b"b", 0)
    used = volume.metadata.statfs().used_blocks
    with volume.batch() as metadata:
        cloned = metadata.clone(source, 0, 40, target, 0, 3)
    assert cloned.count == 40 and cloned.attr[SIZE : BLOCKS + 1] == [40 * BLOCK_SIZE, 40 * 8]
    assert layout_of(metadata, target) == layout_of(metadata, source)
    assert metadata.statfs().used_blocks == used
    assert metadata.shared_in(metadata.layout(source, 0, 40)) == [[0, 40]]
    sound(volume)
    for ino in (source, target):
        with volume.batch() as metadata:
            metadata.setattr(ino, size=0, now_ns=4)
        sound(volume)
        assert volume.carry_out_trims() == (1 if ino == target else 0)
        assert metadata.shared_in(metadata.layout(target, 0, 40)) == ([[0, 40]] if ino == source else [])
    assert metadata.statfs().used_blocks == 0


def test_holes_of_the_source_are_holes_of_the_clone_and_what_it_had_is_freed():
    volume = TestVolume()
    source, target = made(volume, b"a", 40), made(volume, b"b", 40)
    with volume.batch() as metadata:
        metadata.punch(source, 8, 8, 3)
        metadata.clone(source, 0, 32, target, 4, 4)
    blocks = layout_of(metadata, target)
    assert sorted(blocks) == [*range(12), *range(20, 40)]
    assert {at - 4: where for at, where in blocks.items() if 4 <= at < 36} == {
        at: where for at, where in layout_of(metadata, source).items() if at < 32
    }
    assert metadata.statfs().used_blocks == 32 + 8
    sound(volume)


def test_within_one_file_ranges_may_be_cloned_that_do_not_overlap():
    volume = TestVolume()
    ino = made(volume, b"a", 16)
    with volume.batch() as metadata:
        for block, target, count in ((0, 4, 5), (4, 0, 5), (0, 0, 1)):
            with pytest.raises(BadRequest, match="overlap"):
                metadata.clone(ino, block, count, ino, target, 3)
        with pytest.raises(BadRequest, match="has no blocks"):
            metadata.clone(ino, 12, 5, ino, 0, 3)
        metadata.clone(ino, 0, 4, ino, 4, 3)
        metadata.clone(ino, 4, 4, ino, 8, 3)
    blocks = layout_of(metadata, ino)
    assert [blocks[at] for at in range(4)] == [blocks[at] for at in range(4, 8)] == [blocks[at] for at in range(8, 12)]
    sound(volume)


def test_a_clone_of_very_many_extents_goes_on_from_where_it_got_to_and_never_shows_a_hole(monkeypatch):
    monkeypatch.setattr("coordinator.cloning.CLONE_EXTENTS_MAX", 2)
    volume = TestVolume()
    source, target = made(volume, b"a", 24), made(volume, b"b", 24)
    for ino, first in ((source, 1), (target, 4)):
        with volume.batch() as metadata:
            for block in range(first, 24, 5):
                metadata.punch(ino, block, 1, 3)
    old, want = layout_of(metadata, target), layout_of(metadata, source)
    done = rounds = 0
    while done < 24:
        with volume.batch() as metadata:
            done += metadata.clone(source, done, 24 - done, target, done, 4).count
        rounds += 1
        sound(volume)
        now = layout_of(metadata, target)
        assert all(now.get(at) == (want if at < done else old).get(at) for at in range(24))
    assert rounds >= 3


def test_a_shared_block_is_replaced_only_by_what_was_set_aside_for_it():
    volume = TestVolume()
    source, target = made(volume, b"a", 32), made(volume, b"b", 0)
    with volume.batch() as metadata:
        session = metadata.open_session("n1", 1).id
        assert metadata.unshare(source, 0, 16, session).rows == []
        metadata.clone(source, 0, 32, target, 0, 3)
    before = layout_of(metadata, source)
    with volume.batch() as metadata:
        rows = metadata.unshare(source, 4, 8, session).rows
    assert [row[:2] for row in rows] == [(4, 8)]
    assert layout_of(metadata, source) == before
    sound(volume)
    with volume.batch() as metadata:
        slab, block = rows[0][2:]
        for wrong in ([(4, 8, slab, block + 1)], [(4, 7, slab, block)], [(5, 8, slab, block)], [*rows, (0, 1, 1, 1)]):
            with pytest.raises(Conflict, match="ask anew"):
                metadata.replace(source, session, wrong, 4)
        with pytest.raises(Conflict):
            metadata.replace(source, session + 1, rows, 4)
        metadata.replace(source, session, rows, 4)
        with pytest.raises(Conflict):
            metadata.replace(source, session, rows, 4)
    after = layout_of(metadata, source)
    assert {at: where for at, where in after.items() if not 4 <= at < 12} == {
        at: where for at, where in before.items() if not 4 <= at < 12
    }
    assert [after[at] for at in range(4, 12)] == [(slab, block + at) for at in range(8)]
    assert layout_of(metadata, target) == before
    settle(volume)
    assert metadata.shared_in(metadata.layout(target, 0, 32)) == [[0, 4], [12, 20]]
    sound(volume)


def test_what_was_set_aside_is_freed_with_its_session_its_block_or_the_next_attempt():
    volume = TestVolume()
    source, target = made(volume, b"a", 32), made(volume, b"b", 0)
    with volume.batch() as metadata:
        session, other = metadata.open_session("n1", 1).id, metadata.open_session("n2", 1).id
        metadata.clone(source, 0, 32, target, 0, 3)
    used = volume.metadata.statfs().used_blocks

    def set_aside() -> int:
        sound(volume)
        return volume.metadata.statfs().used_blocks - used

    with volume.batch():
        metadata.unshare(source, 0, 16, session)
        kept = metadata.unshare(target, 0, 16, other).rows
    assert set_aside() == 32
    with volume.batch():
        metadata.unshare(source, 8, 16, other)  # the one before it had begun there
    assert set_aside() == 32
    with volume.batch():
        metadata.end_session(session)
    assert set_aside() == 32
    with volume.batch():
        metadata.setattr(source, size=9 * BLOCK_SIZE, now_ns=4)
    assert set_aside() == 16
    reopened = volume.reopened()
    reopened.begin()
    reopened.replace(target, other, kept, 5)  # a takeover in between
    reopened.commit()
    assert check(reopened) == []
    with volume.batch():
        metadata.end_session(other)
    assert set_aside() == 0
    with volume.batch(), pytest.raises(Conflict):
        metadata.replace(target, other, kept, 5)


def test_a_clone_counts_for_the_quota_of_its_directory_and_is_refused_where_it_does_not_fit():
    volume = TestVolume()
    with volume.batch() as metadata:
        directory = metadata.make(1, b"d", 0o040755, 0, 0, 0, b"", 1)[0]
        quota = Quota(directory, 20, 0, 0, 0, IN_FORCE)
        metadata.quotas.add(quota)
        metadata.quotas.join(quota, directory, 0)
    source = made(volume, b"a", 16)
    with volume.batch() as metadata:
        target = metadata.make(directory, b"b", FILE, 0, 0, 0, b"", 1)[0]
        metadata.clone(source, 0, 16, target, 0, 3)
        assert quota.blocks == 16
        with pytest.raises(QuotaExceeded):
            metadata.clone(source, 0, 16, target, 8, 3)
        metadata.clone(source, 0, 16, target, 4, 3)
        assert quota.blocks == 20
    sound(volume)


def settle(volume: TestVolume) -> int:
    rows = volume.metadata.shared.unsettled(100)
    with volume.batch() as metadata:
        metadata.shared.settle_owners(rows)
    return len(rows)


def test_a_block_that_one_file_is_left_of_may_be_written_once_that_cannot_be_lost_any_more():
    """P3: a power cut that brought the other file back would show it what was written since."""
    volume = TestVolume()
    source, target = made(volume, b"a", 32), made(volume, b"b", 0)
    with volume.batch() as metadata:
        session = metadata.open_session("n1", 1).id
        metadata.clone(source, 0, 32, target, 0, 3)
        metadata.setattr(target, size=0, now_ns=4)
    assert metadata.shared_in(metadata.layout(source, 0, 32)) == [[0, 32]]
    assert volume.reopened().shared_in(metadata.layout(source, 0, 32)) == [[0, 32]]  # the next coordinator knows it
    rows = metadata.shared.unsettled(100)
    with volume.batch():  # meanwhile it is shared and given up anew
        metadata.clone(source, 0, 32, target, 0, 3)
        metadata.setattr(target, size=0, now_ns=4)
    with volume.batch():
        metadata.shared.settle_owners(rows)
    assert metadata.shared_in(metadata.layout(source, 0, 32)) == [[0, 32]]
    with volume.batch():  # who cannot wait for that replaces them as any other
        metadata.replace(source, session, metadata.unshare(source, 8, 8, session).rows, 5)
    sound(volume)
    assert settle(volume) == 2 and settle(volume) == 0
    assert metadata.shared_in(metadata.layout(source, 0, 32)) == []
    sound(volume)


def test_replacing_in_a_full_volume_says_how_much_is_missing_and_takes_nothing():
    volume = TestVolume(data_slabs=1, data_blocks=64)
    source, target = made(volume, b"a", 60), made(volume, b"b", 0)
    with volume.batch() as metadata:
        session = metadata.open_session("n1", 1).id
        metadata.clone(source, 0, 60, target, 0, 3)
        assert metadata.unshare(target, 0, 16, session).missing == 12
    sound(volume)
    assert metadata.statfs().free_blocks == 4


def test_a_volume_without_clones_stays_as_it_was_and_one_with_them_is_not_opened_by_older_versions(monkeypatch):
    volume = TestVolume()
    source, target = made(volume, b"a", 4), made(volume, b"b", 0)
    assert not has_shared_blocks(volume.metadata.database)
    assert volume.metadata.database.rows("PRAGMA user_version") == [(1,)]
    volume.metadata.begin()
    volume.metadata.clone(source, 0, 4, target, 0, 3)
    volume.metadata.rollback()
    assert not has_shared_blocks(volume.metadata.database)
    with volume.batch() as metadata:  # after a rollback the tables are made all the same
        metadata.clone(source, 0, 4, target, 0, 3)
    sound(volume)
    monkeypatch.setattr("coordinator.database.VERSIONS_KNOWN", (1,))
    with pytest.raises(Corrupt, match="upgrade"):
        volume.reopened()


def test_the_check_finds_owners_that_are_counted_wrong():
    volume = TestVolume()
    source, target = made(volume, b"a", 8), made(volume, b"b", 0)
    with volume.batch() as metadata:
        metadata.clone(source, 0, 8, target, 0, 3)
    for wrong in ("UPDATE shared SET owners = 3", "UPDATE shared SET count = 7", "DELETE FROM shared"):
        metadata.begin()
        metadata.database.run(wrong)
        assert any("counted wrong" in problem for problem in check(metadata))
        metadata.rollback()
    assert check(metadata) == []


ranges = st.tuples(st.integers(0, SPACE - 1), st.integers(1, 10)).map(lambda r: (r[0], min(r[1], SPACE - r[0])))
files = st.integers(0, 2)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("clone"), files, ranges, files, st.integers(0, SPACE - 1)),
        st.tuples(st.just("write"), files, ranges),
        st.tuples(st.just("punch"), files, ranges),
        st.tuples(st.just("truncate"), files, st.integers(0, SPACE)),
        st.tuples(st.just("abandon"), files, ranges),
        st.tuples(st.just("end"),),
        st.tuples(st.just("settle"),),
    ),
    min_size=1,
    max_size=20,
)


class Model:
    """Files as dicts of blocks; a block's content is who wrote it."""

    def __init__(self) -> None:
        self.content: dict[Where, int] = {}
        self.files: list[dict[int, int]] = [{at: 100 * n + at + 1 for at in range(SPACE)} for n in range(3)]


@settings(max_examples=150, deadline=None)
@given(steps)
def test_files_that_share_blocks_keep_their_own_content_whatever_is_done_to_the_others(history):
    """As mounts use it: nothing is written where others have the block, too."""
    volume = TestVolume(data_slabs=1)
    inos = [made(volume, b"%d" % n, SPACE) for n in range(3)]
    model = Model()
    metadata = volume.metadata
    for ino, blocks in zip(inos, model.files, strict=True):
        model.content.update({where: blocks[at] for at, where in layout_of(metadata, ino).items() if at in blocks})
    with volume.batch():
        session = metadata.open_session("n", 1).id
    stamp = 1000
    for step in history:
        stamp += 100
        if step[0] == "settle":
            settle(volume)
            continue
        with volume.batch():
            if step[0] == "end":
                metadata.end_session(session)
                session = metadata.open_session("n", stamp).id
            else:
                do(metadata, model, inos, session, step, stamp)
        assert check(metadata) == []
        for ino, blocks in zip(inos, model.files, strict=True):
            found = {at: model.content[where] for at, where in layout_of(metadata, ino).items()}
            assert {at: value for at, value in found.items() if value} == blocks
    assert check(volume.reopened()) == []


def do(metadata: Metadata, model: Model, inos: list[int], session: int, step: tuple, stamp: int) -> None:
    kind, index = step[:2]
    ino, blocks = inos[index], model.files[index]
    if kind == "truncate":
        metadata.setattr(ino, size=step[2] * BLOCK_SIZE, now_ns=1)
        model.files[index] = {at: value for at, value in blocks.items() if at < step[2]}
        return
    block, count = step[2]
    span = range(block, block + count)
    if kind == "punch":
        metadata.punch(ino, block, count, 1)
        model.files[index] = {at: value for at, value in blocks.items() if at not in span}
    elif kind == "abandon":
        metadata.unshare(ino, block, count, session)
    elif kind == "write":
        metadata.allocate(ino, block, count, (block + count) * BLOCK_SIZE, 0, 1)
        for where in layout_of(metadata, ino).values():
            model.content.setdefault(where, 0)
        old = layout_of(metadata, ino)
        rows = metadata.unshare(ino, block, count, session).rows
        for first, size, slab, slab_block in rows:
            for at in range(size):
                model.content[slab, slab_block + at] = model.content[old[first + at]]
        metadata.replace(ino, session, rows, 1)
        for at in span:
            model.content[layout_of(metadata, ino)[at]] = blocks[at] = stamp + at
    else:
        into, target = step[3:]
        count = min(count, SPACE - target)
        try:
            done = metadata.clone(ino, block, count, inos[into], target, 1).count
        except BadRequest:
            return
        assert done == count
        found = {target + at - block: blocks[at] for at in range(block, block + count) if at in blocks}
        kept = {at: v for at, v in model.files[into].items() if not target <= at < target + count}
        model.files[into] = kept | found
