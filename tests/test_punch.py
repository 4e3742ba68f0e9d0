"""Holes at the coordinator: blocks of the middle of a file given back, once, in as many transactions as it takes."""

import pytest

from coordinator.consistency import check
from coordinator.lease_table import OPEN, LeaseTable, Need
from coordinator.operations import Operations
from csvfs.errors import Conflict, IsADirectory
from csvfs.ids import Incarnation, InodeNo, NodeName
from csvfs.units import BLOCK_SIZE
from tests.metadata_members import TestVolume
from tests.test_service import cluster_of

READ, WRITE = 2, 3
SIZE, BLOCKS = 6, 7


async def test_punched_blocks_come_back_to_the_volume_and_hold_no_old_bytes(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, second = await cluster.mount("n1"), await cluster.mount("n2")
        service = await cluster.wait_serving()
        ino = await first.make(b"file")
        await first.acquire(ino, WRITE)
        await first.write(ino, b"o" * (64 * BLOCK_SIZE))

        def nothing_is_being_trimmed() -> bool:
            figures = service._metadata.statfs()
            return figures.used_blocks + figures.free_blocks == figures.slab_blocks

        reply = await first.change("punch", ino=ino, block=8, count=16)
        assert (reply["attr"][SIZE], reply["attr"][BLOCKS], reply["reached"]) == (64 * BLOCK_SIZE, 48 * 8, 8)
        assert service._metadata.statfs().used_blocks == 48
        await cluster.wait(nothing_is_being_trimmed)
        want = b"o" * (8 * BLOCK_SIZE) + bytes(16 * BLOCK_SIZE) + b"o" * (40 * BLOCK_SIZE)
        assert await second.read(ino, 64) == want
        assert await second.call("seek", ino=ino, block=3, hole=True) == {"block": 8, "found": True}
        assert await second.call("seek", ino=ino, block=8, hole=False) == {"block": 24, "found": True}


async def test_only_the_holder_of_the_write_lease_punches(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, second = await cluster.mount("n1"), await cluster.mount("n2")
        ino = await first.make(b"file")
        await first.acquire(ino, WRITE)
        await first.write(ino, b"o" * BLOCK_SIZE)
        await second.acquire(ino, READ)
        for mount in (first, second):
            with pytest.raises(Conflict):
                await mount.change("punch", ino=ino, block=0, count=1)
        with pytest.raises(IsADirectory):
            await first.acquire(1, READ)
            await first.call("seek", ino=1, block=0, hole=True)
        assert await second.read(ino, 1) == b"o" * BLOCK_SIZE


def test_a_hole_that_was_asked_for_under_an_earlier_write_lease_is_refused():
    """Its mount gave up waiting, gave the lease back and has written there since: a late hole would take that away."""
    volume, ino = fragmented()
    table, session = LeaseTable(), (NodeName("n1"), Incarnation(1))
    operations = Operations(volume.metadata, table)

    def acquire() -> None:
        ticket, _ = table.begin(session, {InodeNo(ino): Need.WRITE})
        table.finish(ticket)

    acquire()
    late = operations.by_name["punch"](session, {"ino": ino, "block": 0, "count": 100})
    acquire()  # the lease stays the same
    in_time = operations.by_name["punch"](session, {"ino": ino, "block": 0, "count": 2})
    with volume.batch():
        assert in_time.apply()["reached"] == 0
    table.release(session, InodeNo(ino), OPEN)
    acquire()
    before = volume.metadata.layout(ino, 0, 200)
    with volume.batch(), pytest.raises(Conflict, match="under an earlier lease"):
        late.apply()
    assert volume.metadata.layout(ino, 0, 200) == before


def fragmented() -> tuple[TestVolume, int]:
    """A file of 60 extents of one block each, with one-block holes between."""
    volume = TestVolume(data_slabs=1, data_blocks=256)
    with volume.batch() as metadata:
        ino = metadata.make(1, b"f", 0o100644, uid=0, gid=0, rdev=0, target=b"", now_ns=1)[0]
        metadata.allocate(ino, 0, 120, 120 * BLOCK_SIZE, 0, 2)
    for block in range(1, 120, 2):
        with volume.batch() as metadata:
            metadata.punch(ino, block, 1, 3)
    assert len(volume.metadata.layout(ino, 0, 200)) == 60
    return volume, ino


def test_a_hole_over_more_extents_than_one_transaction_may_free_is_made_in_several():
    volume, ino = fragmented()
    volume.metadata.extents.free_extents_max = 7
    rounds, reached = 0, 1
    while reached > 0 or not rounds:
        with volume.batch() as metadata:
            before = metadata.getattr(ino)[BLOCKS]
            attr, reached = metadata.punch(ino, 0, 100, 3)
            assert 0 < before - attr[BLOCKS] <= 7 * 8
        assert check(volume.metadata) == []
        rounds += 1
    assert rounds == 8
    assert [extent.block for extent in volume.metadata.layout(ino, 0, 200)] == list(range(100, 120, 2))


def test_seeking_over_more_extents_than_one_question_looks_at_goes_on_from_there(monkeypatch):
    monkeypatch.setattr("coordinator.extents.SEEK_EXTENTS_MAX", 5)
    volume, ino = fragmented()
    metadata = volume.metadata
    with volume.batch():
        metadata.allocate(ino, 0, 61, 0, 0, 2)  # now 61 extents without a hole between
    assert len(metadata.layout(ino, 0, 61)) == 61
    at, found, questions = 10, False, 0
    while not found:
        at, found = metadata.seek(ino, at, hole=True)
        questions += 1
    assert at == 61 and questions > 5
    assert metadata.seek(ino, 61, hole=False) == (62, True)
    assert metadata.seek(ino, 119, hole=False) == (1 << 32, True)
