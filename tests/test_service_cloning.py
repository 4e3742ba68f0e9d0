"""Clones over the real coordinator and drive servers: across takeovers, evictions, and for who holds no lease."""

import pytest

from coordinator.consistency import check
from coordinator.lease_table import OPEN, LeaseTable, Need
from coordinator.operations import Operations
from csvfs.errors import Conflict
from csvfs.ids import Incarnation, InodeNo, NodeName
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import SlabDescriptor
from tests.metadata_members import TestVolume
from tests.test_cloning import made
from tests.test_service import block_of, cluster_of

READ, WRITE = 2, 3
SIZE, BLOCKS = 6, 7


async def two_files(cluster, mount, blocks: int = 32) -> tuple[int, int]:
    """A file, written, and its clone; the mount holds the write leases of both."""
    source, clone = await mount.make(b"source"), await mount.make(b"clone")
    for ino in (source, clone):
        await mount.acquire(ino, WRITE)
    await mount.write(source, b"".join(block_of(f"block {at}") for at in range(blocks)))
    reply = await mount.change("clone", ino=source, block=0, count=blocks, target=clone, target_block=0)
    assert reply["attr"][SIZE : BLOCKS + 1] == [blocks * BLOCK_SIZE, blocks * 8] and reply["count"] == blocks
    return source, clone


async def copy_into(mount, rows: list, data: bytes) -> None:
    at = 0
    for _, count, slab, slab_block in rows:
        await mount.write_block(slab, slab_block, data[at : at + count * BLOCK_SIZE])
        at += count * BLOCK_SIZE


def sound(service) -> bool:
    return check(service._metadata) == []


async def test_a_takeover_between_the_steps_leaves_what_was_or_what_is_new_and_no_block_is_lost(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        mount, other = await cluster.mount("n2"), await cluster.mount("n3")
        source, clone = await two_files(cluster, mount)
        old = await other.read(source, 32)
        await mount.acquire(source, WRITE)

        async def take_over():
            await cluster.kill_host("n1")
            await cluster.start_host("n1")
            service = await cluster.wait_serving()
            assert sound(service)
            return service

        await take_over()
        assert await mount.read(clone, 32) == old
        await mount.acquire(clone, WRITE)
        reply = await mount.change("unshare", ino=clone, block=0, count=16)
        for value in reply["slabs"]:
            mount.bus.learn(SlabDescriptor.from_wire(value))
        await copy_into(mount, reply["rows"], b"n" * (16 * BLOCK_SIZE))
        service = await take_over()
        assert await mount.read(clone, 32) == old
        await mount.acquire(clone, WRITE)
        await mount.change("replace", ino=clone, rows=reply["rows"])
        await take_over()
        assert await other.read(clone, 32) == b"n" * (16 * BLOCK_SIZE) + old[16 * BLOCK_SIZE :]
        assert await other.read(source, 32) == old
        with pytest.raises(Conflict):
            await mount.change("replace", ino=clone, rows=reply["rows"])
        service = await cluster.wait_serving()
        metadata = service._metadata
        await cluster.wait(lambda: metadata.shared_in(metadata.layout(source, 0, 32)) == [[16, 16]])  # settled
        assert service._metadata.statfs().used_blocks == 48


async def test_what_a_mount_set_aside_before_it_died_is_free_again_when_it_was_evicted(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        mount = await cluster.mount("n2")
        _, clone = await two_files(cluster, mount)
        await mount.change("unshare", ino=clone, block=0, count=16)
        service = await cluster.wait_serving()
        assert service._metadata.statfs().used_blocks == 48 and sound(service)
        mount.kill()
        again = await cluster.mount("n2", incarnation=2)
        assert service._metadata.statfs().used_blocks == 32 and sound(service)
        for name in (b"source", b"clone"):
            await again.change("unlink", parent=1, name=name, directory=False)
        figures = service._metadata.statfs

        def all_is_free() -> bool:
            return figures().used_blocks == 0 and figures().free_blocks == figures().slab_blocks

        await cluster.wait(all_is_free)
        assert sound(service)


async def test_only_who_holds_the_write_leases_of_both_files_clones_and_only_of_one_unshares(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        mount, other = await cluster.mount("n1"), await cluster.mount("n2")
        source, clone = await two_files(cluster, mount)
        await other.acquire(source, READ)
        for first, second in ((source, clone), (clone, source)):
            for one in (mount, other):
                with pytest.raises(Conflict):
                    await one.change("clone", ino=first, block=0, count=1, target=second, target_block=8)
        for one in (mount, other):
            with pytest.raises(Conflict):
                await one.change("unshare", ino=source, block=0, count=1)
            with pytest.raises(Conflict):
                await one.change("replace", ino=source, rows=[[0, 1, 1, 1]])
        reply = await other.acquire(clone, WRITE, count=32)
        assert reply["shared"] == [[0, 32]] and mount.held[clone] < READ


async def test_a_write_into_a_clone_of_a_full_volume_waits_for_a_new_slab(tmp_path, monkeypatch):
    async with cluster_of(tmp_path) as cluster:
        mount = await cluster.mount("n1")
        _, clone = await two_files(cluster, mount)
        service = await cluster.wait_grown()
        fill = await mount.make(b"fill")
        await mount.acquire(fill, WRITE)
        free = service._metadata.statfs().free_blocks
        monkeypatch.setattr(service.slabs, "note_use", lambda: None)  # it does not grow ahead
        await mount.change("allocate", ino=fill, block=0, count=free, size=0, mtime_ns=0)
        reply = await mount.change("unshare", ino=clone, block=0, count=32)
        assert sum(row[1] for row in reply["rows"]) == 32 and sound(service)


@pytest.mark.parametrize("name", ["clone", "replace"])
def test_what_was_asked_for_under_an_earlier_write_lease_is_refused(name):
    """Its mount gave up waiting, and has written there since under another lease."""
    volume = TestVolume()
    source, target = made(volume, b"a", 32), made(volume, b"b", 0)
    table, session = LeaseTable(), (NodeName("n1"), Incarnation(1))
    operations = Operations(volume.metadata, table)
    with volume.batch() as metadata:
        number = metadata.open_session("n1", 1).id
        metadata.clone(source, 0, 8, target, 0, 3)
        rows = [list(row) for row in metadata.unshare(source, 0, 8, number).rows]

    def acquire() -> None:
        ticket, _ = table.begin(session, {InodeNo(source): Need.WRITE, InodeNo(target): Need.WRITE})
        table.finish(ticket)

    args = {
        "clone": {"ino": source, "block": 8, "count": 8, "target": target, "target_block": 8},
        "replace": {"ino": source, "rows": rows},
    }[name]
    acquire()
    late = operations.by_name[name](session, args)
    acquire()  # the lease stays the same
    in_time = operations.by_name[name](session, args)
    volume.metadata.begin()
    in_time.apply()
    volume.metadata.rollback()
    table.release(session, InodeNo(source), OPEN)
    acquire()
    before = [volume.metadata.layout(ino, 0, 100) for ino in (source, target)]
    with volume.batch(), pytest.raises(Conflict, match="under an earlier lease"):
        late.apply()
    assert [volume.metadata.layout(ino, 0, 100) for ino in (source, target)] == before
