"""The reserve, and a pool that runs full: nothing is lost, everything can be read, deleting makes room."""

import os
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import trio

from coordinator import slab_manager
from csvfs.block.reserve import DriveSlots, percent_used, reserve_slots, warning_of
from csvfs.errors import NoSpace, Unavailable
from csvfs.units import BLOCK_SIZE, MIB
from tests.coordinator_cluster import TestCluster


def drives(*nodes):
    return [
        DriveSlots(f"n{number}", f"n{number}", slots) for number, sizes in enumerate(nodes) for slots in sizes
    ]


def test_the_reserve_is_the_largest_drive_of_each_node_and_of_four_at_most():
    assert reserve_slots(drives(*[[100] * 10] * 3), copies=3) == 300
    assert reserve_slots(drives(*[[100] * 10] * 6), copies=3) == 400
    assert reserve_slots(drives([100] * 12, [100] * 10 + [200], [50] * 24), copies=3) == 100 + 200 + 50


def test_the_reserve_is_never_more_than_a_quarter_of_the_pool():
    assert reserve_slots(drives([100, 100], [100, 100], [100, 100]), copies=3) == 150
    assert reserve_slots(drives([3, 3], [3, 3]), copies=2) == 3


def test_nothing_is_kept_where_nothing_could_be_rebuilt():
    assert reserve_slots(drives([3], [3], [3]), copies=3) == 0
    assert reserve_slots(drives([30], [30], [30]), copies=2) == 22  # the third node could take it
    assert reserve_slots([], copies=3) == 0


def test_warnings_at_70_80_and_90_percent_of_what_may_be_used():
    assert percent_used(size=1000, free=480, reserve=200) == 65
    assert [warning_of(percent) != "" for percent in (69.9, 70, 80, 90)] == [False, True, True, True]
    assert len({warning_of(percent) for percent in (70, 80, 90, 100)}) == 4
    assert "writes fail" in warning_of(percent_used(1000, 200, 200))


def test_in_racks_of_two_nodes_a_lost_drive_can_be_rebuilt_beside_it():
    in_racks = [DriveSlots(f"n{number}", f"rack r{number // 2}", 30) for number in range(6)]
    assert reserve_slots(in_racks, copies=3) == 45, "at the level of nodes as well as of racks"
    assert reserve_slots(in_racks[::2], copies=3) == 0


@pytest.fixture
async def cluster(tmp_path, nursery, monkeypatch):
    monkeypatch.setattr(slab_manager, "TRIM_INTERVAL_S", 0.02)
    monkeypatch.setattr(slab_manager, "EMPTY_SLABS_KEPT", 0)
    cluster = TestCluster(tmp_path, nursery)
    cluster.drive_size = 48 * MIB  # 11 slabs of 4 MiB each
    await cluster.start()
    await cluster.create_volume(copies=2)
    await cluster.start_host("n1")
    return cluster


async def fill(mount):
    """Files of 1 MiB until there is no more room; their contents by inode number."""
    contents, number = {}, 0
    while True:
        number += 1
        ino = await mount.make(f"file{number}".encode())
        await mount.acquire(ino, 3)
        data = os.urandom(256 * BLOCK_SIZE)
        try:
            await mount.write(ino, data)
        except NoSpace:
            return contents
        contents[ino] = data


async def test_a_full_pool_loses_nothing_keeps_its_reserve_and_takes_writes_again_after_a_delete(cluster):
    service = await cluster.wait_serving()
    mount = await cluster.mount("n2")
    with trio.fail_after(120):
        contents = await fill(mount)
    assert len(contents) > 10
    await service.slabs.refresh_spaces()
    free = sum(space.free_slots for space in service.slabs.pool_spaces)
    slots = sum(space.slots for space in service.slabs.pool_spaces)
    assert free >= slots // 4
    assert service.statfs()["free"] < MIB
    for ino, data in contents.items():
        assert await mount.read(ino, 256) == data

    for number in range(1, 6):
        await mount.change("unlink", parent=1, name=f"file{number}".encode(), directory=False)
        await mount.call("release", items=[[list(contents)[number - 1], 0]])
    survivors = dict(list(contents.items())[5:])
    await cluster.wait(lambda: service.statfs()["free"] >= 4 * MIB)
    ino = await mount.make(b"again")
    await mount.acquire(ino, 3)
    data = os.urandom(512 * BLOCK_SIZE)
    await mount.write(ino, data)
    assert await mount.read(ino, 512) == data
    for ino, data in survivors.items():
        assert await mount.read(ino, 256) == data


async def test_slabs_that_are_made_at_once_leave_the_reserve_alone(cluster):
    """Room for one more above it, and two that ask for it side by side."""
    slabs = (await cluster.wait_serving()).slabs
    await slabs.wait_spaces()
    while slabs.slots_above_reserve() >= 4:
        fullest = max(slabs.pool_spaces, key=lambda space: space.free_slots)
        slabs.pool_spaces[slabs.pool_spaces.index(fullest)] = replace(fullest, free_slots=fullest.free_slots - 1)
    made = []

    async def make() -> None:
        with suppress(NoSpace):
            made.append(await slabs._create_slab())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(make)
        nursery.start_soon(make)
    assert len(made) == 1


async def test_the_metadata_may_grow_into_the_reserve(cluster):
    service = await cluster.wait_serving()
    mount = await cluster.mount("n2")
    await fill(mount)
    await service._metadata_space._grow()
    assert len(await cluster.metadata_slabs()) == 5


async def test_a_writer_hears_that_the_pool_is_full_only_when_all_drive_servers_have_said_so(cluster, monkeypatch):
    service = await cluster.wait_serving()
    mount = await cluster.mount("n2")
    ino = await mount.make(b"file")
    await mount.acquire(ino, 3)
    control = service.slabs._control
    ask, refused = control.spaces, []

    async def spaces(node):
        if len(refused) < 9:  # three questions to three nodes
            refused.append(node)
            raise Unavailable(f"node {node} is busy")
        return await ask(node)

    monkeypatch.setattr(control, "spaces", spaces)
    count = 2 * service.slabs.slab_blocks
    reply = await mount.change("allocate", ino=ino, block=0, count=count, size=count * BLOCK_SIZE, mtime_ns=0)
    assert reply["extents"] and len(refused) == 9


async def test_of_two_questions_for_space_at_once_the_newer_counts(cluster, monkeypatch):
    service = await cluster.wait_serving()
    await service.slabs.wait_spaces()
    control = service.slabs._control
    ask = control.spaces
    asked, may_answer = trio.Event(), trio.Event()

    async def late(node):
        """What was true when it was asked, told much later: a pool without room."""
        found = [replace(space, free_slots=0) for space in await ask(node)]
        asked.set()
        await may_answer.wait()
        return found

    async with trio.open_nursery() as nursery:
        monkeypatch.setattr(control, "spaces", late)
        nursery.start_soon(service.slabs.refresh_spaces)
        await asked.wait()
        monkeypatch.setattr(control, "spaces", ask)
        await service.slabs.refresh_spaces()
        may_answer.set()
    assert all(space.free_slots for space in service.slabs.pool_spaces)


async def test_space_that_another_task_made_free_during_the_last_look_is_taken():
    """Its batch is through, it has not counted the gain yet, and nothing is left to be trimmed."""
    free = [0]

    class Space:
        @property
        def available_blocks(self):
            return free[0]

    metadata = SimpleNamespace(
        statfs=lambda: SimpleNamespace(free_blocks=free[0], slab_blocks=2048, used_blocks=2048 - 1280), space=Space()
    )
    slabs = slab_manager.SlabManager(
        metadata, None, None, None, None, None, copies=2, slab_blocks=1024, rng=None
    )
    slabs._shortage = NoSpace("full")

    async def has_after_growing(blocks):
        return free[0] >= blocks

    async def trim_once():
        free[0] = 1280
        return False

    slabs._has_after_growing, slabs._trim_once = has_after_growing, trim_once
    await slabs.ensure_free(512)
