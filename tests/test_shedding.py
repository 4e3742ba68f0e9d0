"""What nobody uses any more is given back, however fast programs look at more; the file table against fakes."""

import pytest
import trio

from csvfs.errors import DriveFailed, Unavailable
from csvfs.mount import leases, shedding
from csvfs.mount.file_state import LEASE_READ, LEASE_WRITE
from tests.mount_nodes import Cluster, Node, cluster

BLOCK = 4096
FIRST = 100  # inode numbers of files


async def looked_at(c: Cluster, node: Node, count: int) -> list[int]:
    inos = list(range(FIRST, FIRST + count))
    for ino in inos:
        c.coordinator.add_file(ino)
        await node.table.getattr(ino)
    return inos


def held(c: Cluster, node: Node) -> list[int]:
    return sorted(c.coordinator.table.held_by(node.session.key))


async def test_however_many_were_looked_at_no_more_than_the_limit_are_remembered_and_held_afterwards() -> None:
    async with cluster() as c:
        node = c.node("n1", inodes_max=100)
        inos = await looked_at(c, node, 3000)
        await node.table.release_unused()
        assert list(node.table.leases.states) == held(c, node) == inos[-100:]
        assert c.coordinator.names().count("release") <= 3000 / shedding.SHED_BATCH + 1


async def test_all_that_the_kernel_has_forgotten_goes_at_once() -> None:
    async with cluster() as c:
        node = c.node("n1")
        for ino in await looked_at(c, node, 3000):
            node.table.forget(ino)
        await node.table.release_unused()
        assert not node.table.leases.states and not node.table.shedding.forgotten and held(c, node) == []


async def test_a_file_that_is_opened_while_its_pages_are_taken_back_keeps_its_lease() -> None:
    """Also when it is closed again by then: what was read meanwhile may be in the kernel's cache."""
    async with cluster() as c:
        node = c.node("n1", inodes_max=0)
        stays, opened, read, goes = await looked_at(c, node, 4)
        await node.table.open(stays, writing=False)

        async def use(ino: int, offset: int, length: int) -> None:
            await node.table.open(opened, writing=False)
            await node.table.open(read, writing=False)
            await node.read(read, 0, BLOCK)
            node.table.closed(read, writing=False)

        node.kernel.during.append(use)
        node.table.leases.states[read].used = True  # by something before
        await node.table.shedding._shed_surplus()
        for ino in (opened, read):
            assert ("pages", ino, 0, 0) in node.kernel.log
            assert node.table.holds(ino) >= LEASE_READ
        assert goes not in node.table.leases.states and stays in node.table.leases.states
        node.table.closed(opened, writing=False)
        node.table.closed(stays, writing=False)
        await node.table.release_unused()
        assert not node.table.leases.states and held(c, node) == []


async def test_a_symbolic_link_that_is_being_read_does_not_keep_others_from_being_given_back() -> None:
    """The kernel keeps the page of where it leads to locked until READLINK is answered."""
    async with cluster() as c:
        node = c.node("n1", inodes_max=0)
        link, file = await looked_at(c, node, 2)
        node.table.leases.states[link].symlink = True
        await node.table.release_unused()
        assert not node.table.leases.states and held(c, node) == []
        assert [ino for what, ino, *_ in (row for row in node.kernel.log if row[0] == "pages")] == [file]


async def test_I8_a_file_that_is_written_back_while_it_is_given_back_stays_until_that_is_on_the_media() -> None:
    async with cluster() as c:
        node = c.node("n1", inodes_max=0)
        (ino,) = await looked_at(c, node, 1)
        await node.write(ino, 0, b"x")
        await node.table.fsync(ino)

        async def write_back(ino: int, offset: int, length: int) -> None:
            await node.write(ino, 0, b"y", flags=1)

        node.kernel.during.append(write_back)
        flushed = len(node.bus.flushed)
        await node.table.shedding._shed_surplus()
        assert node.table.holds(ino) == LEASE_WRITE and len(node.bus.flushed) == flushed
        await node.table.release_unused()
        assert not node.table.leases.states and len(node.bus.flushed) == flushed + 1


async def test_a_recall_that_comes_while_a_file_is_given_back_is_answered_behind_it() -> None:
    async with cluster() as c:
        node, other = c.node("n1", inodes_max=0), c.node("n2")
        (ino,) = await looked_at(c, node, 1)
        node.kernel.block()
        c.nursery.start_soon(node.table.release_unused)
        while node.table.leases.states[ino].recall is None:
            await trio.lowlevel.checkpoint()
        answers: list[dict] = []

        async def recall() -> None:
            answers.append(await node.table.recall(ino, 0, False))

        c.nursery.start_soon(recall)
        for _ in range(50):
            await trio.lowlevel.checkpoint()
        assert answers == []
        node.kernel.unblock()
        await other.write(ino, 0, b"x")
        assert answers[0]["kind"] == 0 and ino not in node.table.leases.states


async def test_I8_files_that_are_given_back_are_flushed_together_and_an_fsync_meanwhile_waits() -> None:
    async with cluster() as c:
        node = c.node("n1", inodes_max=0)
        inos = list(range(FIRST, FIRST + 50))
        for ino in inos:
            c.coordinator.add_file(ino)
            await node.write(ino, 0, b"x" * BLOCK)
        flushed, go_on = trio.Event(), trio.Event()
        flush = node.bus.flush

        async def slow_flush(slabs: object) -> None:
            flushed.set()
            await go_on.wait()
            await flush(slabs)  # type: ignore[arg-type]

        node.bus.flush = slow_flush  # type: ignore[method-assign]
        c.nursery.start_soon(node.table.release_unused)
        await flushed.wait()
        synced = trio.Event()

        async def sync() -> None:
            await node.table.fsync(inos[0])
            synced.set()

        c.nursery.start_soon(sync)
        for _ in range(50):
            await trio.lowlevel.checkpoint()
        assert not synced.is_set() and node.bus.flushed == []
        go_on.set()
        await synced.wait()
        assert len(node.bus.flushed) == 1
        while held(c, node):
            await node.table.release_unused()
            await trio.lowlevel.checkpoint()
        assert not node.table.leases.states


async def test_I8_files_whose_flush_failed_are_kept_and_their_fsync_says_so() -> None:
    async with cluster() as c:
        node = c.node("n1", inodes_max=0)
        c.coordinator.add_file(FIRST)
        await node.table.open(FIRST, writing=True)
        await node.write(FIRST, 0, b"x" * BLOCK)
        node.table.forget(FIRST)
        node.bus.flush_errors.append(DriveFailed("lost"))
        await node.table.release_unused()
        assert node.table.holds(FIRST) == LEASE_WRITE
        with pytest.raises(DriveFailed):
            await node.table.fsync(FIRST)


async def test_I8_a_flush_that_may_succeed_another_time_is_owed_to_the_next_fsync() -> None:
    async with cluster() as c:
        node = c.node("n1", inodes_max=0)
        c.coordinator.add_file(FIRST)
        await node.write(FIRST, 0, b"x" * BLOCK)
        node.bus.flush_errors.append(Unavailable("not now"))
        await node.table.release_unused()
        assert node.table.holds(FIRST) == LEASE_WRITE and node.bus.flushed == []
        await node.table.fsync(FIRST)
        assert len(node.bus.flushed) == 1


async def test_a_directory_in_which_something_was_found_gets_another_turn_before_the_files_in_it() -> None:
    async with cluster() as c:
        node = c.node("n1", inodes_max=10)
        c.coordinator.add_file(50)
        node.table.granted_directory(50, c.coordinator.lookup(node.session.key, 50)["lease"])
        inos = await looked_at(c, node, 30)
        await node.table.release_unused()
        assert list(node.table.leases.states) == [*inos[-9:], 50]
        await looked_at(c, node, 30)
        await node.table.release_unused()
        assert 50 not in node.table.leases.states  # nobody has found anything there since


async def test_inodes_that_the_kernel_has_known_longest_are_pruned_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shedding, "PRUNE_BATCH", 3)
    async with cluster() as c:
        node = c.node("n1", kernel_inodes_max=4)
        known = dict.fromkeys(range(1, 10), 1)
        node.table.shedding.lookups = lambda: known
        await node.table.release_unused()
        assert [row for row in node.kernel.log if row[0] == "prune"] == [("prune", 1, 2, 3), ("prune", 4, 5)]
        assert list(known) == [6, 7, 8, 9, 1, 2, 3, 4, 5]  # those that stay, for they are in use, are the last to be asked for


async def test_what_is_under_way_is_not_outdated_by_recalls_of_very_many_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "STAMPS_MAX", 100)
    async with cluster() as c:
        node = c.node("n1")
        for ino in range(1000, 1090):
            node.table.leases.mark_recalled(ino)
        asked = node.table.stamp()
        for ino in range(2000, 2040):
            node.table.leases.mark_recalled(ino)
        assert not node.table.recalled_since(5, asked) and node.table.recalled_since(2039, asked)
        for ino in range(3000, 3400):
            node.table.leases.mark_recalled(ino)
        assert node.table.recalled_since(5, asked)  # nobody knows any more
        assert len(node.table.leases._stamps) <= 100
