"""Integrity of single files: what their copies say, blocks that no copy has, and verifying all of one file."""

import os

import pytest

from coordinator import file_integrity, lost_blocks
from coordinator.drive_control import DriveControl
from coordinator.lost_blocks import LostBlocks, runs_of
from csvfs.admin.file_integrity import Integrity, Progress, SlabCopies, Unreadable, add_look, add_verified
from csvfs.block import drive_watch
from csvfs.errors import BadRequest, Corrupt, IsADirectory, NotFound, Unavailable
from csvfs.ids import SlabId
from csvfs.units import BLOCK_SIZE, MIB
from tests.coordinator_cluster import DRIVE_SIZE, TestCluster
from tests.drive_files import flip_bit
from tests.metadata_members import TestVolume

NODES = ("n1", "n2", "n3")
WRITE = 3


async def cluster_with(tmp_path, nursery, copies=3):
    cluster = await TestCluster(tmp_path, nursery).start()
    await cluster.create_volume(copies=copies)
    await cluster.start_host("n1")
    service = await cluster.wait_serving()
    return cluster, service, await cluster.mount("n2")


async def make_file(mount, blocks, name=b"file"):
    ino = await mount.make(name)
    await mount.acquire(ino, WRITE)
    data = os.urandom(blocks * BLOCK_SIZE)
    await mount.write(ino, data)
    return ino, data


async def look(service, ino):
    """As csvfs file integrity."""
    return await ask(service.integrity.look, add_look, ino)


async def verify(service, ino):
    return await ask(service.integrity.verify, add_verified, ino)


async def ask(question, add, ino):
    report, block, pages = Integrity("/p", "v", ino), 0, 0
    while block is not None:
        answer = await question({"ino": ino, "block": block})
        add(report, answer)
        pages, before, block = pages + 1, block, answer["next"]
        assert block is None or block > before
    return report, pages


async def places(mount, ino, block):
    """Slab and slab block of a block of the file."""
    for start, count, slab, slab_block in (await mount.acquire(ino, 2, 10_000 if block else 1))["extents"]:
        if start <= block < start + count:
            return slab, slab_block + block - start
    raise AssertionError("it has no space")


async def rot(cluster, mount, ino, block, nodes=NODES):
    slab, slab_block = await places(mount, ino, block)
    for node in nodes:
        copy = cluster.copy(node, slab)
        flip_bit(copy.drive.path, (copy.data_offset + slab_block * BLOCK_SIZE) * 8 + 77)


async def rewrite(mount, ino, block, data):
    slab, slab_block = await places(mount, ino, block)
    await mount.acquire(ino, WRITE)
    await mount.write_block(slab, slab_block, data)


async def test_a_file_says_how_many_of_its_blocks_are_written_and_shared_and_how_many_copies_answer(
    tmp_path, nursery
):
    cluster, service, mount = await cluster_with(tmp_path, nursery)
    ino, _ = await make_file(mount, 100)
    clone = await mount.make(b"clone")
    await mount.acquire(clone, WRITE)
    await mount.change("clone", ino=ino, block=0, count=8, target=clone, target_block=0)
    await mount.change("allocate", ino=ino, block=1000, count=30, size=1030 * BLOCK_SIZE, mtime_ns=0)
    report, _ = await look(service, ino)
    allocated = sum(extent.count for extent in service._metadata.layout(ino, 0, 10_000))
    assert (report.size, report.allocated, report.unwritten) == (1030 * BLOCK_SIZE, allocated, allocated - 100)
    assert (report.shared, report.unreadable, report.is_sound) == (8, [], True)
    assert [(row.in_sync, row.serving) for row in report.slabs] == [(3, 3)] * len(report.slabs)
    assert sum(row.blocks for row in report.slabs) == allocated

    await cluster.kill_server("n3")
    slabs = {row.slab for row in report.slabs}
    await cluster.wait(lambda: all(len(service.changes.book.current(slab).in_sync) == 2 for slab in slabs))
    report, _ = await look(service, ino)
    assert report.by_copies() == {2: len(slabs)} and report.is_readable


async def test_it_is_looked_at_and_verified_in_steps_that_leave_nothing_out(tmp_path, nursery, monkeypatch):
    cluster, service, mount = await cluster_with(tmp_path, nursery)
    ino, data = await make_file(mount, 2500)  # three slabs
    for block in range(20, 2400, 100):
        await mount.change("punch", ino=ino, block=block, count=3)
    whole, _ = await look(service, ino)
    monkeypatch.setattr(file_integrity, "EXTENTS_MAX", 2)
    monkeypatch.setattr(file_integrity, "BLOCKS_PER_CALL_MAX", 50)
    paged, pages = await look(service, ino)
    assert (paged, pages > 10) == (whole, True)
    for block, nodes in ((0, ["n1"]), (1240, ["n2"]), (1241, ["n2", "n3"]), (2499, ["n3"])):
        await rot(cluster, mount, ino, block, nodes)
    report, pages = await verify(service, ino)
    assert pages > 40
    counts = {row.node: (row.verified, row.found, row.healed, row.left, row.skipped) for row in report.verified}
    blocks = whole.allocated
    assert counts == {"n1": (blocks, 1, 1, 0, 0), "n2": (blocks, 2, 2, 0, 0), "n3": (blocks, 2, 2, 0, 0)}
    again, _ = await verify(service, ino)
    assert [row.found for row in again.verified] == [0, 0, 0]
    assert (await mount.read(ino, 20)) == data[: 20 * BLOCK_SIZE]


async def test_a_block_that_no_copy_has_is_named_also_by_the_next_coordinator_and_good_once_it_is_overwritten(
    tmp_path, nursery
):
    cluster, service, mount = await cluster_with(tmp_path, nursery)
    ino, data = await make_file(mount, 60)
    other, _ = await make_file(mount, 5, b"other")
    for block in (7, 8, 30):
        await rot(cluster, mount, ino, block)
    before, _ = await look(service, ino)
    assert before.is_readable  # nobody has read it
    await verify(service, other)
    assert (await service.lost.listing())["file_count"] == 0

    report, _ = await verify(service, ino)
    assert [(row.found, row.healed, row.left) for row in report.verified] == [(3, 0, 3)] * 3
    expected = [[7 * BLOCK_SIZE, 2 * BLOCK_SIZE], [30 * BLOCK_SIZE, BLOCK_SIZE]]
    await cluster.kill_host("n1")
    await cluster.start_host("n3")
    service = await cluster.wait_serving()
    report, _ = await look(service, ino)
    assert report.unreadable == [Unreadable(offset, size, "bad") for offset, size in expected]
    assert not report.is_sound and service.volume_status()["scrub"]["lost_blocks"] == 3
    listed = await service.lost.listing()
    assert (listed["slabs"], listed["blocks"]) == ([], 3)
    assert [[row[0], row[1], [list(part) for part in row[2]]] for row in listed["files"]] == [[ino, b"/file", expected]]
    slab, slab_block = await places(mount, ino, 8)
    with pytest.raises(Corrupt):
        await mount.bus.read(SlabId(slab), slab_block, 1)
    assert await mount.bus.read(SlabId(slab), slab_block + 1, 1) == data[9 * BLOCK_SIZE : 10 * BLOCK_SIZE]

    for block in (7, 8):
        await rewrite(mount, ino, block, bytes(BLOCK_SIZE))
    assert (await service.lost.listing())["blocks"] == 1
    await mount.change("punch", ino=ino, block=30, count=1)
    await cluster.wait(lambda: not service._metadata.database.rows("SELECT 1 FROM trims"))
    listed = await service.lost.listing()
    assert (listed["blocks"], listed["file_count"], service.lost_blocks.count) == (0, 0, 0)
    report, _ = await verify(service, ino)
    assert report.is_sound


async def test_a_block_that_a_copy_out_of_reach_may_have_is_not_called_lost(tmp_path, nursery, monkeypatch):
    cluster, service, mount = await cluster_with(tmp_path, nursery)
    ino, _ = await make_file(mount, 10)
    await rot(cluster, mount, ino, 8)
    await verify(service, ino)
    await rot(cluster, mount, ino, 4, ["n1", "n2"])
    real = DriveControl.scrub

    async def scrub(self, member, *args):
        if member.node == "n3":
            raise Unavailable("n3 does not answer")
        return await real(self, member, *args)

    with monkeypatch.context() as patched:
        patched.setattr(DriveControl, "scrub", scrub)
        patched.setattr(DriveControl, "heal_from", no_heal)
        report, _ = await verify(service, ino)
    n3 = next(row for row in report.verified if row.node == "n3")
    assert (n3.verified, n3.skipped > 0, n3.why) == (0, True, "n3 does not answer")
    assert [row.left for row in report.verified if row.node != "n3"] == [2, 2]
    assert service.lost_blocks.count == 1 and not report.is_sound  # that of before, which n3 has not either
    report, _ = await verify(service, ino)
    assert sum(row.healed for row in report.verified) == 2 and service.lost_blocks.count == 1


async def no_heal(self, target, source, descriptor, blocks):
    raise Unavailable("not now")


async def test_what_lies_on_a_drive_that_was_truncated_is_lost_and_the_rest_is_not(tmp_path, nursery, monkeypatch):
    monkeypatch.setattr(drive_watch, "CHECK_INTERVAL_S", 0.02)
    cluster, service, mount = await cluster_with(tmp_path, nursery, copies=1)
    ino, _ = await make_file(mount, 4000)
    await cluster.wait_grown()
    nodes = {row.slab: service.changes.book.current(row.slab).in_sync[0].node for row in (await look(service, ino))[0].slabs}
    gone = cluster.servers[next(iter(nodes.values()))]
    os.truncate(gone.path, DRIVE_SIZE - 32 * MIB)
    await cluster.wait(lambda: service.lost.fault_of(gone.drive_id) == "truncated")
    report, _ = await look(service, ino)
    for row in report.slabs:
        assert row.serving == (nodes[row.slab] != gone.node) and bool(row.why) == (not row.serving)
    lost = sum(row.blocks for row in report.slabs if not row.serving)
    assert sum(row.size for row in report.unreadable) == lost * BLOCK_SIZE > 0
    assert {row.what for row in report.unreadable} == {"lost"} and report.unwritten is None


async def test_only_regular_files_have_an_integrity(tmp_path, nursery):
    _, service, mount = await cluster_with(tmp_path, nursery)
    for question in (service.integrity.look, service.integrity.verify):
        with pytest.raises(IsADirectory):
            await question({"ino": 1, "block": 0})
        with pytest.raises(NotFound):
            await question({"ino": 999, "block": 0})
        for args in ({"ino": 1}, {"ino": 1, "block": -1}, {"ino": 1, "block": 1 << 40}, {"ino": "x", "block": 0}):
            with pytest.raises(BadRequest):
                await question(args)
    ino = await mount.make(b"empty")
    assert (await look(service, ino))[0] == Integrity("/p", "v", ino)
    assert (await verify(service, ino))[0].verified == []


class Batches:
    """Runs each change at once."""

    def __init__(self, volume):
        self._volume = volume

    async def run(self, change):
        with self._volume.batch():
            change()


async def test_lost_blocks_are_kept_up_to_a_limit_and_come_back_as_they_were(monkeypatch):
    monkeypatch.setattr(lost_blocks, "LOST_BLOCKS_MAX", 10)
    volume = TestVolume()
    known = LostBlocks(volume.metadata, Batches(volume))
    await known.verified(SlabId(5), 0, 100, [3, 4, 5, 90])
    await known.verified(SlabId(6), 0, 100, range(50, 80))
    assert known.slabs() == {5: [(3, 3), (90, 1)], 6: [(50, 6)]} and known.count == 10
    await known.verified(SlabId(5), 4, 50, [4])  # 5 is good again
    assert known.within(SlabId(5), 3, 2) == [(3, 2)]
    again = LostBlocks(volume.reopened(), Batches(volume))
    assert again.slabs() == known.slabs() == {5: [(3, 2), (90, 1)], 6: [(50, 6)]}
    for slab in (5, 6):
        await known.verified(SlabId(slab), 0, 100, ())
    assert LostBlocks(volume.reopened(), Batches(volume)).slabs() == {}
    assert list(runs_of([])) == [] and list(runs_of([2, 1, 4])) == [(1, 2), (4, 1)]


def test_answers_of_a_coordinator_add_up_and_nonsense_is_told_from_them():
    report = Integrity("/p", "v", 5)
    answer = {"size": 9, "allocated": 3, "shared": 1, "slabs": [[7, 3, 1, 3, 0, 2, ["why"]]], "unreadable": [[0, 4096, "bad"]]}
    add_look(report, answer)
    add_look(report, {**answer, "slabs": [[7, 2, None, 2, 1, 2, []]], "unreadable": [[4096, 4096, "bad"]]})
    assert report.slabs == [SlabCopies(7, 5, 2, 1, 2, [])] and report.unwritten is None
    assert report.unreadable == [Unreadable(0, 8192, "bad")]
    verified = {"blocks": 3, "copies": [[b"\1" * 16, "n1", 3, 1, 1, 0, 0, ""]]}
    assert add_verified(report, verified) == 3 and add_verified(report, verified) == 3
    assert [(row.verified, row.healed, row.drive) for row in report.verified or ()] == [(6, 2, "01" * 16)]
    for wrong in ({}, {**answer, "slabs": [[1]]}, {**answer, "unreadable": [5]}, {**answer, "size": None}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            add_look(report, wrong)
    progress = Progress(done=256, total=1024, took_s=2.0)
    assert (progress.rate, progress.eta_s) == (MIB / 2, 6.0)
    assert Progress(0, 10, 0.0).eta_s is None


async def test_blocks_that_no_copy_has_are_named_also_when_a_copy_goes_while_they_are_looked_for(
    tmp_path, nursery, monkeypatch
):
    cluster, service, mount = await cluster_with(tmp_path, nursery)
    ino, _ = await make_file(mount, 20)
    await rot(cluster, mount, ino, 7)
    await rot(cluster, mount, ino, 9, ["n2"])
    slab, _ = await places(mount, ino, 0)
    scrub, going = DriveControl.scrub, ["n3"]

    async def scrub_while_a_copy_goes(self, *args):
        found = await scrub(self, *args)
        while going:
            node = going.pop()
            descriptor = service.changes.book.current(slab)
            drives = [member.drive for member in descriptor.in_sync if member.node == node]
            await service.changes.failed(slab, descriptor.epoch, drives, "its server does not answer")
        return found

    monkeypatch.setattr(DriveControl, "scrub", scrub_while_a_copy_goes)
    report, _ = await verify(service, ino)
    counts = {row.node: (row.found, row.healed, row.left) for row in report.verified}
    assert (counts["n1"], counts["n2"]) == ((1, 0, 1), (2, 1, 1))
    assert (await look(service, ino))[0].unreadable == [Unreadable(7 * BLOCK_SIZE, BLOCK_SIZE, "bad")]
