"""A mount process takes over from one that died: what it may answer, when it gives leases back, what it flushes."""

import pytest
import trio
import trio.testing

from csvfs.errors import DriveFailed
from csvfs.mount.inode_rows import Row
from tests.mount_nodes import cluster

FILE, DIRECTORY = 7, 1
OPEN, READ, WRITE = 1, 2, 3


def row(ino: int = FILE, kind: int = WRITE, *, opens: int = 1, timed: bool = False, lost: bool = False) -> Row:
    return Row(ino, 1, opens, opens, kind, timed, lost)


async def successor(c, *rows: Row, name: str = "n1"):
    """The node's next process; the coordinator has given it the leases of the one before already."""
    for one in rows:
        c.coordinator.table.reclaim(c.coordinator.session(name).key, one.ino, one.kind)
    node = c.node(name)
    node.table.take_over(list(rows))
    return node


async def written_by_n1(c, data: bytes) -> None:
    """A file that another process of n1 has written to and holds."""
    c.coordinator.add_file(FILE)
    before = c.node("n1")
    await before.write(FILE, 0, data)
    await before.table.fsync(FILE)


async def test_I5_what_the_kernel_has_cached_for_the_process_before_is_taken_back_when_its_lease_is_recalled():
    async with cluster() as c:
        await written_by_n1(c, b"a" * 8192)
        node = await successor(c, row())
        node.table.inheritance.resent()
        other = c.node("n2")
        await other.write(FILE, 0, b"b" * 4096)
        assert ("pages", FILE, 0, 0) in node.kernel.log
        assert await node.read(FILE, 0, 8192) == b"b" * 4096 + b"a" * 4096


async def test_the_size_and_the_layout_are_asked_for_when_they_are_first_needed():
    async with cluster() as c:
        await written_by_n1(c, b"a" * 5000)
        node = await successor(c, row())
        node.table.inheritance.resent()
        c.coordinator.calls.clear()
        assert (await node.table.getattr(FILE))[6] == 5000
        await node.write(FILE, 5000, b"b" * 5000)
        assert await node.read(FILE, 0, 20_000) == b"a" * 5000 + b"b" * 5000
        assert c.coordinator.names().count("getattr") == 1


async def test_no_write_of_another_node_comes_between_a_write_and_its_repetition():
    """n1's write had landed when its process died. Were n2's let in before n1 repeats it, that would be undone."""
    async with cluster() as c:
        await written_by_n1(c, b"1" * 4096)
        node = await successor(c, row())
        other = c.node("n2")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.write, FILE, 0, b"2" * 4096)
            await trio.testing.wait_all_tasks_blocked(0.05)
            node.table.inheritance.replay_begins(FILE, 10)
            node.table.inheritance.resent()
            await trio.testing.wait_all_tasks_blocked(0.05)
            await node.write(FILE, 0, b"1" * 4096)
            node.table.inheritance.replay_ends(FILE, 10)
        assert await other.read(FILE, 0, 4096) == b"2" * 4096
        assert await node.read(FILE, 0, 4096) == b"2" * 4096


async def test_until_the_kernel_has_asked_all_anew_no_lease_is_given_back():
    async with cluster() as c:
        await written_by_n1(c, b"1" * 4096)
        node = await successor(c, row())
        other = c.node("n2")
        with trio.move_on_after(0.2):
            await other.read(FILE, 0, 4096)
            raise AssertionError("a lease was given back while a write may come again")
        node.table.inheritance.resent()
        assert await other.read(FILE, 0, 4096) == b"1" * 4096


async def test_I8_an_fsync_flushes_what_the_process_before_wrote_and_tells_a_failure_to_everybody():
    async with cluster() as c:
        await written_by_n1(c, b"1" * 4096)
        node = await successor(c, row())
        node.table.inheritance.resent()
        slab = next(iter(c.coordinator.files[FILE].blocks.values()))[0]
        flushes: list[list[int]] = []
        failure: list[DriveFailed] = []

        async def flush(slabs) -> None:
            flushes.append(list(slabs))
            if failure:
                raise failure[0]

        node.bus.flush = flush  # type: ignore[method-assign]
        node.table.inheritance._unflushed = dict.fromkeys([slab], 1)
        failure.append(DriveFailed("the drive could not flush"))
        for _ in range(2):
            with pytest.raises(DriveFailed):
                await node.table.fsync(FILE)
        assert flushes == [[slab]]  # another flush would say nothing of what was lost

    async with cluster() as c:
        await written_by_n1(c, b"1" * 4096)
        node = await successor(c, row())
        node.table.inheritance.resent()
        flushes.clear()
        failure.clear()
        node.bus.flush = flush  # type: ignore[method-assign]
        node.table.inheritance._unflushed = dict.fromkeys([slab], 1)
        await node.table.fsync(FILE)
        await node.table.fsync(FILE)
        assert flushes == [[slab]]


async def test_a_time_of_writing_that_nobody_else_has_heard_of_does_not_go_back():
    async with cluster() as c:
        await written_by_n1(c, b"1" * 4096)
        before = c.coordinator.files[FILE].mtime
        node = await successor(c, row(timed=True))
        node.table.inheritance.resent()
        assert (await node.table.getattr(FILE))[9] > before
        await node.table.report_times()
        assert c.coordinator.files[FILE].mtime > before


async def test_pages_without_a_lease_are_dropped_at_once():
    async with cluster() as c:
        c.coordinator.add_file(FILE)
        node = await successor(c, row(kind=OPEN, lost=True))
        node.table.inheritance.resent()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert ("pages", FILE, 0, 0) in node.kernel.log


async def test_a_new_coordinator_hears_what_is_inherited():
    async with cluster() as c:
        c.coordinator.add_file(FILE)
        node = await successor(c, row(kind=WRITE), row(9, OPEN))
        assert sorted(claim[:2] for claim in node.table.claims()) == [[FILE, WRITE], [9, OPEN]]


async def test_a_file_that_was_open_stays_open_until_it_is_closed_as_often():
    async with cluster() as c:
        c.coordinator.add_file(FILE)
        node = await successor(c, row(kind=OPEN, opens=2))
        node.table.inheritance.resent()
        assert node.table.open_files == 2
        node.table.closed(FILE, True)
        await node.table.release_unused()
        assert node.table.holds(FILE) == OPEN
        node.table.closed(FILE, True)
        await node.table.release_unused()
        assert node.table.holds(FILE) == 0


