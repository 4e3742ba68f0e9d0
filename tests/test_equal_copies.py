"""Copies that a dead writer left unequal: what the state checker found (tools/check_states), each told directly."""

from pathlib import Path
from typing import Any

import pytest
import trio

from coordinator.drive_control import DriveControl
from coordinator.lease_table import WRITE
from csvfs.block import slab_state
from csvfs.block.writer_marks import REST_S, MarkBook
from csvfs.errors import Fenced, StaleEpoch, Unavailable
from csvfs.ids import Incarnation
from csvfs.wire.block_messages import block_checksum, slab_seed
from tests.block_cluster import SLAB, BlockCluster, write
from tests.coordinator_cluster import VOLUME
from tests.drive_files import pattern
from tests.drive_files import write as write_copy
from tests.test_service import block_of, cluster_of


class _Copy:
    def __init__(self, drive: str) -> None:
        self.drive = drive


def test_I3_what_an_evicted_writer_marked_stays_active_where_it_was_not_made_equal() -> None:
    """A copy that had left its slab with a write of its own came back without being copied over it."""
    book, here, out = MarkBook(), _Copy("drive"), _Copy("drive")
    marks = book.writer(b"volume", "mount/n1", Incarnation(1))
    marks.marks.update({(here, 3): 1, (out, 3): 1})
    book.made_equal([(here, 3)], lambda volume, writer, incarnation: incarnation < 2)
    book.settle(b"volume", "mount/n1", Incarnation(2))
    covered = book.begin_flush("drive")
    assert book.flushed("drive", covered, 0.0) == {}, "it rests"
    assert book.rested("drive", REST_S + 1) == {here: [3]}, "and the copy that was out keeps its mark"
    assert book.of_writer(b"volume", None) == set()


def test_I3_a_chunk_made_equal_stays_active_for_a_writer_that_is_not_over() -> None:
    book, copy = MarkBook(), _Copy("drive")
    book.writer(b"volume", "mount/n1", Incarnation(1)).marks[copy, 3] = 1
    living = book.writer(b"volume", "mount/n2", Incarnation(1))
    living.marks[copy, 3] = 7
    book.made_equal([(copy, 3)], lambda volume, writer, incarnation: writer == "mount/n1")
    assert book.flushed("drive", book.begin_flush("drive"), 0.0) == {}
    assert book.rested("drive", REST_S + 1) == {}
    living.below = 8
    book.flushed("drive", book.begin_flush("drive"), 0.0)
    assert book.rested("drive", REST_S + 1) == {copy: [3]}


async def test_I3_a_pulled_chunk_stays_active_until_it_is_known_to_be_on_all_members(
    tmp_path: Path, nursery: Any
) -> None:
    """A member took a write of a dead mount, another was resynced from it, the first died: nobody knew of the third,
    which lacked that write, and the leases passed on."""
    cluster = BlockCluster(tmp_path, nursery)
    await cluster.start()
    first, other, returning = cluster.servers
    bus = cluster.bus()
    await write(bus, 0, pattern(1))
    await returning.kill()
    await write(bus, 16, pattern(2))  # without it
    await bus.flush([SLAB])  # tells the members that all of this is complete
    await returning.start(nursery)
    write_copy(first.copy(), 32, pattern(3))  # of a mount that died before it reached the others
    await cluster.owner.resync(SLAB, returning)

    async def active_on_returning() -> list[int]:
        rows = await cluster.owner.links.call(returning.node, "active", {"writer": "mount/n9"}, timeout_s=60)
        return [chunk for _, _, chunks in rows for chunk in chunks]

    assert bytes(returning.copy().read_blocks(32, 1)[1]) == pattern(3)
    assert 2 in returning.copy().active_chunks() and 2 in await active_on_returning()
    assert 1 not in await active_on_returning(), "what is on all members needs no look"

    assert returning.service is not None
    served = returning.service.drives.by_id(returning.drive_id)
    args = {"drive": returning.drive_id, "slab": SLAB, "epoch": returning.copy().epoch, "chunks": [2]}
    await returning.service.flushes.flush(served)
    assert 2 in await active_on_returning(), "a flush does not make copies equal"
    await cluster.owner.links.call(returning.node, "equal", args, timeout_s=60)
    await returning.service.flushes.flush(served)
    assert 2 not in await active_on_returning()
    assert other.copy().active_chunks() == [0, 1]


@pytest.mark.parametrize("servers_start_anew", [False, True])
async def test_I5_leases_do_not_pass_on_while_two_copies_may_go_on_unequal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servers_start_anew: bool
) -> None:
    """Three faults: a mount died in the middle of a write, and neither member could be reached to make them equal.
    Both went on as they were when they could be reached again."""
    monkeypatch.setattr("coordinator.eviction.CONTACT_S_MAX", 0.1)
    async with cluster_of(tmp_path, nodes=2, copies=2, recall_timeout_ms=300) as cluster:
        first, second = await cluster.mount("n1"), await cluster.mount("n2")
        ino = await first.make(b"file")
        await first.write(ino, block_of("acknowledged"))
        extent = (await first.acquire(ino, WRITE, 1))["extents"][0]
        slab, block = extent[2], extent[3]
        data = block_of("torn")
        checksum = block_checksum(data, slab_seed(VOLUME, slab), block)
        cluster.copy("n2", slab).write_blocks(block, data, checksum.to_bytes(4, "little"))
        first.answers_recalls = False
        call, cut_off, tried = DriveControl.call, [True], trio.Event()

        async def call_unless_cut_off(control: DriveControl, node: Any, name: str, args: Any) -> Any:
            if cut_off[0] and name in ("install", "list_slabs"):
                tried.set()
                raise Unavailable("cut off")
            return await call(control, node, name, args)

        monkeypatch.setattr(DriveControl, "call", call_unless_cut_off)
        found: list[bytes] = []

        async def read() -> None:
            found.append(await second.read(ino, 1))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            with trio.fail_after(60):
                await tried.wait()
            service = await cluster.wait_serving()
            await cluster.wait(lambda: [s.node for s in service.desk.sessions if s.ended] == ["n1"])
            await trio.sleep(1.5)  # longer than it takes to evict; a slow machine only makes the test easier
            if servers_start_anew:
                for node in ("n1", "n2"):
                    await cluster.kill_server(node)
                for node in ("n1", "n2"):
                    await cluster.start_server(node)
            cut_off[0] = False
            with trio.fail_after(60):
                while not found:
                    await trio.sleep(0.01)
        await cluster.wait(lambda: len(service.changes.book.current(slab).in_sync) == 2)
        contents = {bytes(cluster.copy(node, slab).read_blocks(block, 1)[1]) for node in ("n1", "n2")}
        assert contents == {found[0]}, "all members agree, and with what was read"


async def test_I3_writes_of_a_writer_that_is_over_never_count_as_complete(tmp_path: Path, nursery: Any) -> None:
    """It heard of its fence from one member, told the others that all was complete, and they forgot what it had left."""
    cluster = BlockCluster(tmp_path, nursery)
    await cluster.start()
    bus = cluster.bus()
    await write(bus, 0, pattern(1))
    args = {"writer": "mount/n1", "min_incarnation": 2}
    await cluster.owner.links.call(cluster.servers[0].node, "fence", args, timeout_s=60)
    complete = bus.completed_below()
    with trio.fail_after(60), pytest.raises(Fenced):
        await write(bus, 16, pattern(2))  # the other two take it
    assert bus.completed_below() == complete


async def test_I5_a_copy_that_joins_is_not_read(tmp_path: Path, nursery: Any) -> None:
    """Its reader had got its lease after the copy had gone out, by a descriptor in which it was in sync."""
    cluster = BlockCluster(tmp_path, nursery)
    await cluster.start()
    bus = cluster.bus()
    await write(bus, 0, pattern(1))
    joining = cluster.servers[0]  # of the node that the bus is on
    await cluster.owner.commit(slab_state.drop_members(cluster.owner.descriptors[SLAB], [joining.drive_id]))
    await write(bus, 0, pattern(2))
    reader = cluster.bus("mount/n2")
    reader.learn(slab_state.new_slab(SLAB, [(server.drive_id, server.node) for server in cluster.servers]))
    await cluster.owner.commit(slab_state.begin_joining(cluster.owner.descriptors[SLAB], joining.drive_id))
    for _ in range(20):
        assert bytes(await reader.read(SLAB, 0, 1)) == pattern(2)
        reader.learn(cluster.owner.descriptors[SLAB])
    with pytest.raises(StaleEpoch):
        await cluster.owner.links.call(joining.node, "locate", {"drive": joining.drive_id, "slab": SLAB}, timeout_s=60)


async def test_I7_a_resync_copies_what_a_dead_writer_left_on_its_source(tmp_path: Path, nursery: Any) -> None:
    """Both members started anew before its chunks could be made equal. One went on; the other, which had missed nothing
    since, came back without what the first had more."""
    cluster = BlockCluster(tmp_path, nursery)
    await cluster.start()
    bus = cluster.bus()
    await write(bus, 0, pattern(1))
    await bus.flush([SLAB])
    source, target, third = cluster.servers
    write_copy(source.copy(), 16, pattern(2))  # at an epoch before the target goes out
    drop = [target.drive_id, third.drive_id]
    await cluster.owner.commit(slab_state.drop_members(cluster.owner.descriptors[SLAB], drop))
    await cluster.owner.resync(SLAB, target)
    assert bytes(target.copy().read_blocks(16, 1)[1]) == pattern(2)
    assert 1 in target.copy().active_chunks(), "the third may come back without it as well"
    await cluster.owner.resync(SLAB, third)
    assert bytes(third.copy().read_blocks(16, 1)[1]) == pattern(2)
