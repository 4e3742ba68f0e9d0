"""I8: all copies of something lose power at once. What was not flushed may be gone, and whoever flushes it is told."""

from unittest.mock import patch

import pytest
import trio

from csvfs.block import drive_watch
from csvfs.errors import Fenced, UnflushedLost
from csvfs.ids import Epoch, Incarnation, NodeName, SlabId
from csvfs.units import BLOCK_SIZE
from csvfs.volume import file_io
from tests.coordinator_cluster import NAME, TestCluster
from tests.fake_bus import descriptor
from tests.test_file_table import BLOCK, FILE, cluster, prepared

CONTENT = b"before" * 683  # of one block, nearly


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(drive_watch, "CHECK_INTERVAL_S", 0.02)


async def start_volume(tmp_path, nursery, copies=2):
    nodes = await TestCluster(tmp_path, nursery).start()
    await nodes.create_volume(copies=copies)
    await nodes.start_host("n1")
    await nodes.wait_serving()
    mount = await nodes.mount("n3")
    ino = await mount.make(b"file")
    await mount.acquire(ino, 3)
    await mount.write(ino, CONTENT.ljust(BLOCK_SIZE, b"."))
    reply = await mount.acquire(ino, 3, 1)
    written = file_io.epochs(mount.bus, [(0, 1, row[2], row[3]) for row in reply["extents"][:1]])
    return nodes, mount, ino, written


async def restart(nodes, names, *, boot=b""):
    """Kill the drive servers, all before the first starts again; `boot`: their machines, too."""
    for name in names:
        await nodes.kill_server(name)
    if boot:
        with patch("csvfs.block.drive.machine_boot_id", return_value=boot.ljust(16)):
            for name in names:
                await nodes.start_server(name)
    else:
        for name in names:
            await nodes.start_server(name)


def members(mount, written):
    (slab,) = written
    return [member.node for member in mount.bus.known(SlabId(slab)).members]


async def test_I8_whoever_flushes_what_all_copies_lost_with_their_power_is_told(tmp_path, nursery):
    nodes, mount, ino, written = await start_volume(tmp_path, nursery)
    await restart(nodes, members(mount, written), boot=b"another")  # the metadata is on the third as well
    with trio.fail_after(120):
        await mount.bus.flush(written)
    lost = file_io.lost_before_flush(mount.bus, written)
    assert isinstance(lost, UnflushedLost) and f"slab {next(iter(written))}" in str(lost)
    # What is written from now on is not.
    now = {slab: file_io.epoch_of(mount.bus, slab) for slab in written}
    await mount.write(ino, CONTENT.ljust(BLOCK_SIZE, b"."))
    await mount.bus.flush(written)
    assert file_io.lost_before_flush(mount.bus, now) is None


async def test_I8_servers_that_were_killed_have_lost_nothing(tmp_path, nursery):
    nodes, mount, _, written = await start_volume(tmp_path, nursery)
    await restart(nodes, ["n1", "n2", "n3"])
    with trio.fail_after(120):
        await mount.bus.flush(written)
    assert file_io.lost_before_flush(mount.bus, written) is None


async def test_I8_nothing_is_lost_while_one_copy_keeps_its_power(tmp_path, nursery):
    nodes, mount, _, written = await start_volume(tmp_path, nursery)
    first, second = members(mount, written)
    await restart(nodes, [first], boot=b"another")
    with trio.fail_after(120):
        await mount.bus.flush(written)
        service = await nodes.wait_serving()
        await nodes.wait(lambda: len(service.changes.book.current(next(iter(written))).in_sync) == 2)
        # It has it from the other one, on its medium, so that one may fail as well.
        await restart(nodes, [second], boot=b"yet another")
        await mount.bus.flush(written)
    assert file_io.lost_before_flush(mount.bus, written) is None


async def test_a_coordinator_ends_when_the_drives_lack_what_it_wrote_and_the_next_reads_them_again(tmp_path, nursery):
    """Its next commits would stand behind a gap in the log."""
    nodes, _, _, _ = await start_volume(tmp_path, nursery)
    term = (await nodes.wait_serving()).setup.term
    await restart(nodes, ["n1", "n2", "n3"], boot=b"another")
    with trio.fail_after(120):
        while nodes.hosts["n1"].owned.get(NAME) is None or nodes.hosts["n1"].owned[NAME].term == term:
            await trio.sleep(0.01)
        await nodes.wait_serving()
        await (await nodes.mount("n2")).make(b"another")


async def test_I4_nobody_is_believed_to_hold_what_the_metadata_may_have_lost(tmp_path, nursery):
    """What a mount was given since the last flush may be free there, and be given to another file."""
    nodes, mount, ino, _ = await start_volume(tmp_path, nursery)
    term = (await nodes.wait_serving()).setup.term
    nodes.reclaim_timeout_ms = 500
    mount.may_claim = trio.Event()  # it would claim what it has
    await restart(nodes, ["n1", "n2", "n3"], boot=b"another")
    with trio.fail_after(120):
        while mount.link is not None and mount.link.closed is None:
            await trio.sleep(0.01)
        for _ in range(2):  # the next coordinator knows it as well
            while (await nodes.wait_serving()).setup.term == term:
                await trio.sleep(0.01)
            service = await nodes.wait_serving()
            await service.desk.wait_open()
            with pytest.raises(Fenced):
                await service.desk.welcome(NodeName("n3"), Incarnation(1), term=term)
            with pytest.raises(Fenced):  # nor of a mount of which the metadata does not know any more
                await service.desk.welcome(NodeName("n2"), Incarnation(7), term=term)
            assert not list(service.desk.sessions) and service.leases.table.writer(ino) is None
            term_before = service.setup.term
            await nodes.kill_host("n1")
            await nodes.start_host("n1")
            while (await nodes.wait_serving()).setup.term == term_before:
                await trio.sleep(0.01)
        assert (await (await nodes.wait_serving()).desk.welcome(NodeName("n2"), Incarnation(7), term=term_before)).reclaimed


async def test_I4_a_loss_of_one_metadata_slab_counts_though_another_lost_at_a_later_epoch(tmp_path, nursery):
    nodes = await TestCluster(tmp_path, nursery).start()
    await nodes.create_volume(copies=2)
    await nodes.start_host("n1")
    desk = (await nodes.wait_serving()).desk
    first, second = SlabId(1), SlabId(2)
    for term, epochs, whole_since in (
        (5, {first: Epoch(9)}, 5),
        (6, {first: Epoch(9), second: Epoch(0)}, 5),  # nothing new
        (7, {first: Epoch(9), second: Epoch(3)}, 7),
        (8, {first: Epoch(9), second: Epoch(3)}, 7),
    ):
        desk.load(term, epochs)
        assert desk._whole_since == whole_since


async def test_I8_an_fsync_of_a_file_that_was_lost_unflushed_fails_until_it_is_closed_and_written_again():
    async with cluster() as c:
        node = await prepared(c)
        await node.table.open(FILE, writing=True)
        await node.write(FILE, 0, b"n" * BLOCK)
        (slab,) = node.table.leases.state(FILE).dirty_slabs
        node.bus.learn(_without_unflushed(slab))
        for _ in range(2):
            with pytest.raises(UnflushedLost, match=f"slab {slab}"):
                await node.table.fsync(FILE)
        node.table.closed(FILE, writing=True)
        await node.table.open(FILE, writing=True)
        await node.write(FILE, 0, b"m" * BLOCK)
        await node.table.fsync(FILE)


def _without_unflushed(slab):
    known = descriptor(slab)
    return type(known)(known.slab, Epoch(known.epoch + 1), known.members, Epoch(known.epoch + 1))
