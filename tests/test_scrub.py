"""Scrub: whatever rots on a drive is found and healed, and nobody ever reads a wrong byte."""

import os
from random import Random

import pytest
import trio

from coordinator import scrub as scrub_module
from csvfs.block.layout import ENTRY_SIZE
from csvfs.ids import METADATA_SLAB_ID_MIN
from csvfs.units import BLOCK_SIZE
from tests.coordinator_cluster import TestCluster
from tests.drive_files import flip_bit

BLOCKS = 700
FLIPS = 1000


@pytest.fixture
async def cluster(tmp_path, nursery):
    cluster = await TestCluster(tmp_path, nursery).start()
    await cluster.create_volume(copies=3)
    await cluster.start_host("n1")
    return cluster


@pytest.fixture
async def service(cluster):
    return await cluster.wait_serving()


@pytest.fixture
async def mount(cluster, service):
    return await cluster.mount("n2")


async def make_file(mount, blocks=BLOCKS):
    ino = await mount.make(b"file")
    await mount.acquire(ino, 3)
    data = os.urandom(blocks * BLOCK_SIZE)
    await mount.write(ino, data)
    await mount.bus.flush(set(mount.bus._slabs))
    return ino, data


async def scrub(cluster, service, within_s=60):
    before = service.scrub.round.finished
    service.scrub.start()
    await cluster.wait(lambda: service.scrub.round.finished > before, within_s)
    return service.scrub.round


def drive_of(cluster, node="n2"):
    server = cluster.servers[node]
    return server.service.drives.by_id(server.drive_id).opened()


def rot(drive, random: Random, data: int, sums: int, entries: int, superblocks: int, metadata=False) -> int:
    """Flip single bits, each in another block, checksum, half of a slot entry or superblock; how many."""
    layout, path = drive.layout, drive.path
    for _ in range(2):
        drive.flush()  # every entry is at rest: in both halves
    # Metadata slabs are written all the time, and what is overwritten is healed without being found.
    copies = [copy for copy in drive.slabs() if (copy.slab >= METADATA_SLAB_ID_MIN) == metadata]
    written = [
        (copy, block) for copy in copies for block, checksum in enumerate(copy.checksums()) if checksum
    ]  # fmt: skip
    holes = [
        (copy, block) for copy in copies for block, checksum in enumerate(copy.checksums()) if not checksum
    ]  # fmt: skip
    chosen = random.sample(written, data + sums // 3)
    offsets = [layout.block_data_offset(copy.slot, block) for copy, block in chosen[:data]]
    of_sums = chosen[data:] + random.sample(holes, sums - sums // 3)
    spots = [(offset, BLOCK_SIZE) for offset in offsets]
    spots += [(layout.block_checksum_offset(copy.slot, block), 4) for copy, block in of_sums]
    slots = random.sample(range(layout.slot_count), entries)
    spots += [(layout.entry_offset(slot, random.randrange(2)), ENTRY_SIZE) for slot in slots]
    spots += [(offset, 312) for offset in layout.superblock_offsets[:superblocks]]
    for offset, size in spots:
        flip_bit(path, offset * 8 + random.randrange(size * 8))
    return len(spots)


async def test_a_thousand_flipped_bits_of_one_node_are_found_and_healed_and_no_wrong_byte_is_read(
    cluster, service, mount
):
    ino, data = await make_file(mount)
    drive = drive_of(cluster)
    healed_before = drive.counters.healed
    random = Random(7)
    assert rot(drive, random, data=520, sums=420, entries=57, superblocks=3) == FLIPS

    assert await mount.read(ino, BLOCKS) == data  # heals what it reads, too
    healed_by_reads = drive.counters.healed - healed_before
    result = await scrub(cluster, service)
    assert (result.lost, result.skipped) == (0, 0)
    healed = drive.counters.healed - healed_before
    assert (healed, result.found == result.healed) == (FLIPS, True)
    assert result.found >= FLIPS - healed_by_reads - 3
    assert await mount.read(ino, BLOCKS) == data

    assert (await scrub(cluster, service)).found == 0
    for copy in drive.slabs():
        assert copy.bad_blocks_scan(0, copy.block_count) == []
    await cluster.kill_server("n2")
    await cluster.start_server("n2")
    assert drive_of(cluster).repairs == []


async def test_scrub_alone_finds_every_flipped_bit(cluster, service, mount):
    """Nobody reads anything meanwhile; the superblocks are left out, as the watch may be quicker."""
    await make_file(mount, 300)
    drive = drive_of(cluster)
    count = rot(drive, Random(8), data=100, sums=100, entries=40, superblocks=0)
    result = await scrub(cluster, service)
    assert (result.found, result.healed, result.lost) == (count, count, 0)


async def test_metadata_that_rots_on_one_node_is_healed_too(cluster, service, mount):
    await make_file(mount, 50)
    drive = drive_of(cluster)
    rot(drive, Random(9), data=2, sums=24, entries=0, superblocks=0, metadata=True)
    result = await scrub(cluster, service)
    assert (result.found > 15, result.lost) == (True, 0)
    assert (await scrub(cluster, service)).found == 0


async def test_a_block_that_no_copy_has_is_counted_as_lost_and_the_others_are_healed(cluster, service, mount):
    ino, _ = await make_file(mount, 20)
    slab = (await mount.acquire(ino, 2, 20))["extents"][0][2]
    for node in ("n1", "n2", "n3"):
        copy = cluster.copy(node, slab)
        flip_bit(drive_of(cluster, node).path, copy.data_offset * 8 + 5)
    flip_bit(drive_of(cluster).path, (cluster.copy("n2", slab).data_offset + BLOCK_SIZE) * 8)
    result = await scrub(cluster, service)
    assert (result.found, result.healed, result.lost) == (4, 1, 3)


async def test_a_copy_whose_header_rotted_is_made_anew(cluster, service, mount):
    ino, data = await make_file(mount, 20)
    slab = (await mount.acquire(ino, 2, 20))["extents"][0][2]
    copy = cluster.copy("n2", slab)
    flip_bit(drive_of(cluster).path, drive_of(cluster).layout.slot_header_offset(copy.slot) * 8 + 100)
    result = await scrub(cluster, service)
    assert (result.found, result.lost) == (1, 0)
    await cluster.wait(lambda: len(service.changes.book.current(slab).in_sync) == 3)
    assert cluster.copy("n2", slab) is not copy
    assert await mount.read(ino, 20) == data


async def test_writers_and_a_scrub_do_not_get_in_each_others_way(cluster, service, mount, monkeypatch):
    monkeypatch.setattr(scrub_module, "RATE_ASKED_MIB_S", 40)
    ino, _ = await make_file(mount, 200)
    scrubbing = service.scrub.round.finished
    service.scrub.start()
    rounds = 0
    while service.scrub.round.finished == scrubbing:
        data = os.urandom(200 * BLOCK_SIZE)
        await mount.write(ino, data)
        rounds += 1
        await trio.sleep(0)
    assert rounds > 1
    assert (service.scrub.round.found, service.scrub.round.skipped) == (0, 0)
    assert await mount.read(ino, 200) == data


async def test_a_round_is_gone_on_with_by_the_next_coordinator(cluster, service, mount, monkeypatch):
    monkeypatch.setattr(scrub_module, "SAVED_EVERY_S", 0.0)
    await make_file(mount, 2500)  # three slabs
    slabs, hanging = [], trio.Event()
    real = scrub_module.Scrub._scrub_slab

    async def scrub_slab(self, changes, slab):
        if len(slabs) == 2:
            hanging.set()
            await trio.sleep_forever()
        slabs.append(slab)
        await real(self, changes, slab)

    monkeypatch.setattr(scrub_module.Scrub, "_scrub_slab", scrub_slab)
    service.scrub.start()
    await hanging.wait()
    assert service.volume_status()["jobs"][0]["kind"] == "scrub"
    await cluster.kill_host("n1")
    slabs.append(None)
    await cluster.start_host("n3")
    successor = await cluster.wait_serving()
    await cluster.wait(lambda: successor.scrub.round.finished > 0)
    assert set(slabs[:2]).isdisjoint(slabs[3:])


async def test_a_volume_is_scrubbed_by_itself_after_four_weeks(cluster, service):
    assert not service.scrub._is_due()
    weeks = 4 * 7 * 24 * 3600
    service.scrub._interval_s = 0
    assert service.scrub._is_due()
    assert weeks == scrub_module.INTERVAL_S
