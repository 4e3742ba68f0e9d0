"""Losing the last copy of something: only that is lost, it is named, it returns with its drive, or is given up."""

import os
from random import Random

import pytest
import trio

from csvfs.block import bus as bus_module
from csvfs.block import drive_watch
from csvfs.block.bus import Bus
from csvfs.block.drive_faults import TRUNCATED
from csvfs.block.slab_state import accept_loss, new_slab
from csvfs.errors import InputOutputError, Lost
from csvfs.ids import DriveId, Epoch, NodeName, SlabId
from csvfs.units import BLOCK_SIZE, MIB
from csvfs.wire.control import unpack_value
from tests.block_cluster import SLAB, VOLUME, BlockCluster, write
from tests.coordinator_cluster import DRIVE_SIZE, NAME, TestCluster
from tests.drive_files import image_of

BLOCKS = 600  # of a file; a slab has 1,024: files share slabs


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(drive_watch, "CHECK_INTERVAL_S", 0.02)
    monkeypatch.setattr(drive_watch, "RETRY_INTERVAL_S", 0.02)
    monkeypatch.setattr(drive_watch, "RETRY_S", 0.05)


async def start_volume(tmp_path, nursery, copies):
    cluster = await TestCluster(tmp_path, nursery).start()
    await cluster.create_volume(copies=copies)
    await cluster.start_host("n1")
    service = await cluster.wait_serving()
    return cluster, service, await cluster.mount("n3")


async def make_files(mount, count):
    contents = {}
    directory = await mount.make(b"d", mode=0o40755)
    for number in range(count):
        ino = await mount.make(f"file{number}".encode(), parent=directory)
        await mount.acquire(ino, 3)
        contents[ino] = os.urandom(BLOCKS * BLOCK_SIZE)
        await mount.write(ino, contents[ino])
    return contents


def slabs_on(service, drive):
    return {d.slab for d in service.changes.book.all() if any(m.drive == drive for m in d.members)}


def victim_of(cluster, service):
    """A node's server that holds some slabs and not all, and these slabs."""
    all_slabs = len(list(service.changes.book.all()))
    for server in cluster.servers.values():
        gone = slabs_on(service, server.drive_id)
        if 0 < len(gone) < all_slabs:
            return server, gone
    raise AssertionError("all slabs are on one drive")


async def ranges_in(mount, ino, slabs):
    reply = await mount.acquire(ino, 2, BLOCKS)
    found = [
        (max(0, block), min(count, BLOCKS - block))
        for block, count, slab, _ in reply["extents"]
        if slab in slabs and block < BLOCKS
    ]
    return sorted(found)


async def read_all(mount, contents):
    """What of each file can be read: a set of good block numbers."""
    good = {}
    for ino, data in contents.items():
        reply = await mount.acquire(ino, 2, BLOCKS)
        good[ino] = set()
        for block, count, slab, slab_block in reply["extents"]:
            for index in range(min(count, BLOCKS - block)):
                number = block + index
                try:
                    got = await mount.bus.read(SlabId(slab), slab_block + index, 1)
                except Lost:
                    break  # the whole slab
                assert got == data[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE]
                good[ino].add(number)
    return good


async def test_only_what_lay_on_a_lost_drive_is_lost_and_it_is_named_and_returns_with_the_drive(
    tmp_path, nursery
):
    cluster, service, mount = await start_volume(tmp_path, nursery, copies=1)
    contents = await make_files(mount, 8)
    await cluster.wait_grown()
    drive, gone = victim_of(cluster, service)
    expected = {ino: await ranges_in(mount, ino, gone) for ino in contents}
    image = image_of(str(drive.path), tmp_path / "image")

    os.truncate(drive.path, DRIVE_SIZE - 32 * MIB)
    await cluster.wait(lambda: service.lost.fault_of(drive.drive_id) == TRUNCATED)
    with trio.fail_after(60):  # reads of lost blocks fail at once
        good = await read_all(mount, contents)
    for ino, ranges in expected.items():
        lost = {block for start, count in ranges for block in range(start, start + count)}
        assert good[ino] == set(range(BLOCKS)) - lost

    slab = min(gone)
    with trio.fail_after(60), pytest.raises(InputOutputError, match="last copies"):
        await mount.write_block(slab, 0, bytes(BLOCK_SIZE))

    listed = await service.lost.listing()
    assert {row["slab"] for row in listed["slabs"]} == gone
    assert all(row["members"] == [[drive.drive_id, drive.node, TRUNCATED]] for row in listed["slabs"])
    by_ino = {ino: (path, ranges) for ino, path, ranges in listed["files"]}
    assert set(by_ino) == {ino for ino, ranges in expected.items() if ranges}
    for ino, (path, ranges) in by_ino.items():
        assert path == f"/d/file{list(contents).index(ino)}".encode()
        blocks = {
            b for start, size in ranges for b in range(start // BLOCK_SIZE, (start + size) // BLOCK_SIZE)
        }
        lost = {block for start, count in expected[ino] for block in range(start, start + count)}
        assert blocks >= lost

    os.replace(image, drive.path)
    await cluster.wait(lambda: service.lost.fault_of(drive.drive_id) == "", within_s=60)
    await cluster.wait(lambda: all(cluster.copy(drive.node, slab) is not None for slab in gone))
    with trio.fail_after(60):
        while (await service.lost.listing())["slabs"] or any(
            cluster.copy(drive.node, slab) not in next(iter(drive.service.drives)).in_service for slab in gone
        ):
            await trio.sleep(0.02)
    good = await read_all(mount, contents)
    assert all(blocks == set(range(BLOCKS)) for blocks in good.values())


async def test_accepting_a_loss_takes_zeros_and_is_written_down_for_ever(tmp_path, nursery):
    cluster, service, mount = await start_volume(tmp_path, nursery, copies=1)
    contents = await make_files(mount, 6)
    await cluster.wait_grown()
    drive, gone = victim_of(cluster, service)
    lost = {ino: await ranges_in(mount, ino, gone) for ino in contents}
    os.truncate(drive.path, 64 * MIB)
    await cluster.wait(lambda: service.lost.fault_of(drive.drive_id) == TRUNCATED)

    answer = await service.lost.accept_data_loss()
    assert {(row["slab"], row["took"]) for row in answer["slabs"]} == {(slab, "zeros") for slab in gone}
    assert (await service.lost.listing())["slabs"] == []
    for ino, data in contents.items():
        expected = bytearray(data)
        for start, count in lost[ino]:
            expected[start * BLOCK_SIZE : (start + count) * BLOCK_SIZE] = bytes(count * BLOCK_SIZE)
        assert await mount.read(ino, BLOCKS) == expected
    written = await cluster.store.list(f"accepted_loss/{NAME}/")
    assert len(written) == len(gone)
    assert {unpack_value(item.value)["took"] for item in written} == {"zeros"}
    assert (await service.lost.accept_data_loss())["slabs"] == []


async def test_accepting_a_loss_takes_the_newest_stale_copy_where_there_is_one(tmp_path, nursery):
    cluster, service, mount = await start_volume(tmp_path, nursery, copies=3)
    (ino, old), *_ = (await make_files(mount, 1)).items()
    await mount.acquire(ino, 3)
    for node in ("n2", "n3"):
        await cluster.kill_server(node)
    new = os.urandom(BLOCKS * BLOCK_SIZE)
    await mount.write(ino, new)  # on n1 alone
    slabs = [d.slab for d in service.changes.book.all()]
    assert all(len(service.changes.book.current(slab).in_sync) == 1 for slab in slabs if slab == slabs[0])

    # The metadata's last copies are on n1, too: only data slabs are given up here.
    image = cluster.servers["n1"].path
    drive = cluster.copy("n1", slabs[0]).drive
    first = slabs[0]
    drive.delete_slab(cluster.copy("n1", first).volume, first)  # n1 has lost this one slab
    cluster.servers["n1"].service.forget_copies()
    for node in ("n2", "n3"):
        await cluster.start_server(node)
    assert image.exists()
    with trio.fail_after(60):
        while first not in {row["slab"] for row in (await service.lost.listing())["slabs"]}:
            await trio.sleep(0.05)
    answer = await service.lost.accept_data_loss()
    assert [(row["slab"], row["took"]) for row in answer["slabs"]] == [(first, "stale copy")]
    await cluster.wait(lambda: len(service.changes.book.current(first).in_sync) == 3, within_s=60)
    got = await mount.read(ino, BLOCKS)
    for block in range(BLOCKS):
        piece = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        assert got[piece] in (old[piece], new[piece])


def test_the_copy_that_goes_on_is_alone_in_sync_at_an_epoch_above_all():
    nodes = [(DriveId(bytes([n]) * 16), NodeName(f"n{n}")) for n in (1, 2, 3)]
    before = new_slab(SlabId(5), nodes)
    after = accept_loss(before, nodes[1][0], nodes[1][1], Epoch(9))
    assert (after.epoch, [m.drive for m in after.in_sync]) == (10, [nodes[1][0]])
    assert len(after.members) == 3
    elsewhere = accept_loss(before, DriveId(b"x" * 16), NodeName("n4"), Epoch(0))
    assert (elsewhere.epoch, len(elsewhere.members)) == (2, 3)


# Writes


@pytest.fixture
async def blocks(tmp_path, nursery):
    cluster = BlockCluster(tmp_path, nursery)
    await cluster.start()
    return cluster


def impatient_bus(blocks, nursery, io_timeout_s=0.3, make_equal=None):
    bus = Bus(
        blocks.links("mount/n1"), blocks.owner, volume=VOLUME, local_node=NodeName("n1"),
        io_timeout_s=io_timeout_s, make_equal=make_equal,
    )  # fmt: skip
    nursery.start_soon(bus.run_forever)
    bus.learn(blocks.owner.descriptors[SLAB])
    return bus


async def test_a_write_that_nobody_takes_fails_after_the_io_timeout_and_counts_as_incomplete_until_made_equal(
    blocks, nursery
):
    torn, may_end = [], trio.Event()

    async def make_equal(slab, chunks):
        torn.append((slab, chunks))
        await may_end.wait()

    bus = impatient_bus(blocks, nursery, make_equal=make_equal)
    await write(bus, 3, os.urandom(BLOCK_SIZE))
    for server in blocks.servers:
        await server.kill()
    began = trio.current_time()
    with trio.fail_after(60), pytest.raises(InputOutputError, match="could not be written"):
        await write(bus, 20, os.urandom(BLOCK_SIZE))
    assert trio.current_time() - began >= 0.3
    while not torn:
        await trio.sleep(0.01)
    assert torn == [(SLAB, [1])]
    assert bus.completed_below() == 2  # the given-up one keeps its chunk marked
    may_end.set()
    while bus.completed_below() == 2:
        await trio.sleep(0.01)


async def test_a_write_given_while_another_one_waits_has_its_own_io_timeout(blocks, nursery):
    bus = impatient_bus(blocks, nursery, io_timeout_s=3600)
    ended = []
    for server in blocks.servers:
        await server.kill()
    for block in (3, 4):
        bus.write(SLAB, block, os.urandom(BLOCK_SIZE), ended.append)
        asked = len(blocks.owner.reports)
        while len(blocks.owner.reports) < asked + 3:  # each time the owner says "not yet", those who waited too long go
            await trio.sleep(0.01)
    assert ended == []


async def test_writes_wait_below_min_copies_and_go_on_when_enough_are_in_sync_again(
    blocks, nursery, monkeypatch
):
    monkeypatch.setattr(bus_module, "REPAIR_RETRY_S_MAX", 0.05)
    bus = impatient_bus(blocks, nursery, io_timeout_s=120)
    bus.min_copies = 3
    data = os.urandom(BLOCK_SIZE)
    await write(bus, 3, data)
    victim = blocks.servers[Random(3).randrange(3)]
    await victim.kill()
    ended = []

    async def write_later():
        await write(bus, 4, data)
        ended.append(trio.current_time())

    nursery.start_soon(write_later)
    await trio.sleep(0.5)
    assert not ended
    assert await bus.read(SLAB, 3, 1) == data  # reads need one copy
    await victim.start(nursery)
    await blocks.owner.resync(SLAB, victim)
    with trio.fail_after(60):
        while not ended:
            await trio.sleep(0.01)
