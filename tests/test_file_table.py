"""The file table against fakes of the coordinator (with the real lease table), the drives and the kernel."""

import stat
import time
from typing import Any

import pytest
import trio

from coordinator.lease_table import Need
from csvfs.errors import (
    Conflict,
    CsvfsError,
    DriveFailed,
    InputOutputError,
    LeaseLost,
    NoSpace,
    NotFound,
    TimedOut,
    Unavailable,
)
from csvfs.mount import write_path
from csvfs.mount.file_state import LEASE_NONE, LEASE_READ
from csvfs.mount.operations import VolumeOperations
from csvfs.mount.request_journal import current_request
from csvfs.mount.write_path import FUSE_WRITE_CACHE, WRITE_APPEND
from csvfs.volume import file_io
from tests.mount_nodes import Cluster, Node, cluster

BLOCK = 4096
FILE = 5


async def prepared(c: Cluster, blocks: int = 4, fill: bytes = b"o") -> Node:
    """A node that holds the write lease of a file of so many blocks, all layout known."""
    c.coordinator.add_file(FILE)
    node = c.node("n1")
    await node.write(FILE, 0, fill * (BLOCK * blocks))
    c.coordinator.calls.clear()
    node.bus.writes.clear()
    return node


def taken_nowait(node: Node, offset: int, data: bytes, flags: int = 0) -> list:
    """Send a write that must be taken at once; the list gets its result."""
    result: list = []
    assert node.table.write_nowait(FILE, offset, memoryview(data), flags, result.append)
    return result


async def settle() -> None:
    for _ in range(50):
        await trio.lowlevel.checkpoint()


# -- reads and writes at once


async def test_reads_and_writes_at_hand_ask_nobody() -> None:
    async with cluster() as c:
        node = await prepared(c)
        result = taken_nowait(node, BLOCK, b"n" * BLOCK)
        await settle()
        assert result == [None]
        assert node.table.read_nowait(FILE, BLOCK, BLOCK) == b"n" * BLOCK
        assert node.table.read_nowait(FILE, BLOCK - 2, 4) == b"oonn"
        assert c.coordinator.calls == []


async def test_a_write_at_once_is_answered_when_it_has_landed_and_not_before() -> None:
    """I2."""
    async with cluster() as c:
        node = await prepared(c)
        node.bus.hold()
        result = taken_nowait(node, 0, b"n" * BLOCK)
        await settle()
        assert result == [] and node.bus.in_flight == 1
        node.bus.let_go()
        await settle()
        assert result == [None]


async def test_a_write_over_two_slabs_is_answered_once_with_the_error_of_either() -> None:
    async with cluster() as c:
        node = await prepared(c, blocks=100)  # slabs of 64 blocks
        node.bus.fail_next = [DriveFailed("drive 1")]
        result = taken_nowait(node, 60 * BLOCK, b"n" * (8 * BLOCK))
        await settle()
        assert len(node.bus.writes) == 2
        assert [type(error) for error in result] == [DriveFailed]


async def test_what_a_write_at_once_cannot_do_it_leaves_to_the_other_way() -> None:
    async with cluster() as c:
        node = await prepared(c)
        table, done = node.table, pytest.fail
        for offset, size, flags in [
            (1, BLOCK, 0),
            (0, 5, 0),
            (4 * BLOCK, BLOCK, 0),
            (0, BLOCK, WRITE_APPEND),
        ]:
            assert not table.write_nowait(FILE, offset, memoryview(bytes(size)), flags, done)
        assert not table.write_nowait(77, 0, memoryview(bytes(BLOCK)), 0, done)


async def test_a_read_stops_at_the_end_of_the_file_and_holes_are_zeros() -> None:
    async with cluster() as c:
        c.coordinator.add_file(FILE)
        node = c.node("n1")
        await node.write(FILE, 10 * BLOCK, b"end")
        assert await node.read(FILE, 0, 4 * BLOCK) == bytes(4 * BLOCK)
        assert await node.read(FILE, 10 * BLOCK - 1, 100) == b"\0end"
        assert await node.read(FILE, 10 * BLOCK + 3, 100) == b""
        node.bus.local = False
        assert await node.read(FILE, 10 * BLOCK - 1, 100) == b"\0end"


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("together", [True, False])
async def test_an_empty_answer_comes_after_that_of_the_read_in_which_the_file_ends(together: bool, at_once: bool) -> None:
    """Linux makes a file that it believes to be longer end where a READ with an empty answer began, and ignores the short
    answer of one that was asked for before: a program read zeros behind the end (fsx on two nodes, seed 612)."""
    async with cluster() as c:
        node = await prepared(c)
        node.bus.local = False
        read, go, answered = node.bus.read, trio.Event(), []

        async def slow(*args: Any) -> Any:
            await go.wait()
            return await read(*args)

        node.bus.read = slow  # type: ignore[method-assign,assignment]

        async def ask(blocks: int, count: int) -> None:
            got = node.table.read_nowait(FILE, blocks * BLOCK, count * BLOCK) if at_once else None
            if got is None:
                got = await node.table.read(FILE, blocks * BLOCK, count * BLOCK)
            answered.append((blocks, sum(map(len, got)) if isinstance(got, list) else len(got)))

        c.nursery.start_soon(ask, 0, 2)  # neither waits for the other
        c.nursery.start_soon(ask, 3, 4)  # the file ends in the middle of it
        if not together:
            await settle()
        c.nursery.start_soon(ask, 7, 4)
        await settle()
        assert answered == []
        go.set()
        await settle()
        assert answered[-1] == (7, 0)
        assert sorted(answered) == [(0, 2 * BLOCK), (3, BLOCK), (7, 0)]
        await ask(7, 4)
        assert answered[-1] == (7, 0)


async def test_an_empty_answer_waits_for_no_read_that_was_asked_for_later_or_is_empty_too() -> None:
    """Else it could wait for ever beside programs that read the end of the file again and again."""
    async with cluster() as c:
        node = await prepared(c)
        node.bus.local = False
        read, going, answered = node.bus.read, [trio.Event(), trio.Event()], []
        waiting = list(going)

        async def slow(*args: Any) -> Any:
            await waiting.pop(0).wait()
            return await read(*args)

        node.bus.read = slow  # type: ignore[method-assign,assignment]

        async def ask(blocks: int) -> None:
            await node.table.read(FILE, blocks * BLOCK, 4 * BLOCK)
            answered.append(blocks)

        for blocks in (3, 7, 11, 3):
            c.nursery.start_soon(ask, blocks)
            await settle()
        assert answered == []
        going[0].set()
        await settle()
        assert answered == [3, 7, 11]
        going[1].set()
        await settle()
        assert answered == [3, 7, 11, 3]


async def test_a_large_read_goes_in_messages_of_one_mib() -> None:
    async with cluster() as c:
        node = await prepared(c, blocks=600)
        assert await node.read(FILE, 1, 599 * BLOCK) == b"o" * (599 * BLOCK)


# -- partial blocks, the end of the file


async def test_partial_writes_keep_what_is_around_them() -> None:
    async with cluster() as c:
        node = await prepared(c)
        await node.write(FILE, BLOCK - 3, b"nnnnnn")
        content = await node.read(FILE, 0, 4 * BLOCK)
        assert content == b"o" * (BLOCK - 3) + b"nnnnnn" + b"o" * (3 * BLOCK - 3)


async def test_I4_partial_writes_to_one_block_at_once_lose_nothing() -> None:
    async with cluster() as c:
        node = await prepared(c)
        async with trio.open_nursery() as nursery:
            for index in range(20):
                nursery.start_soon(node.write, FILE, 100 * index, bytes([index]) * 50)
            nursery.start_soon(node.write, FILE, BLOCK, b"w" * BLOCK)
        content = await node.read(FILE, 0, BLOCK)
        for index in range(20):
            assert content[100 * index : 100 * index + 100] == bytes([index]) * 50 + b"o" * 50


async def test_I4_a_whole_block_written_during_a_partial_write_is_not_undone_by_it() -> None:
    async with cluster() as c:
        node = await prepared(c)
        node.bus.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.write, FILE, 10, b"p")
            await settle()
            nursery.start_soon(
                node.write, FILE, 0, b"w" * BLOCK
            )  # must wait: the block is being read and written
            await settle()
            assert node.bus.in_flight == 1
            node.bus.let_go()
        assert await node.read(FILE, 0, BLOCK) == b"w" * BLOCK


async def test_old_bytes_behind_the_end_never_show_when_the_file_grows_over_them() -> None:
    async with cluster() as c:
        node = await prepared(c)
        await node.table.truncate(
            FILE, {"size": 100, "mtime_ns": 1}
        )  # bytes 100... of block 0 are garbage now
        await node.write(FILE, 3 * BLOCK, b"far")
        assert await node.read(FILE, 0, BLOCK) == b"o" * 100 + bytes(BLOCK - 100)
        await node.table.truncate(FILE, {"size": 50, "mtime_ns": 1})
        await node.table.truncate(FILE, {"size": 200, "mtime_ns": 1})
        assert await node.read(FILE, 0, 200) == b"o" * 50 + bytes(150)


async def test_the_tail_is_zeroed_on_the_drives_before_a_larger_size_is_committed() -> None:
    """A crash between the two must not show old bytes."""
    async with cluster() as c:
        node = await prepared(c)
        await node.table.truncate(FILE, {"size": 100, "mtime_ns": 1})
        c.coordinator.calls.clear()
        node.bus.hold()
        c.nursery.start_soon(node.write, FILE, 3 * BLOCK, b"far")
        await settle()
        assert node.bus.in_flight == 1 and c.coordinator.calls == []
        slab, block = c.coordinator.files[FILE].blocks[0]
        node.bus.let_go()
        await settle()
        assert c.drives.read(slab, block, 1) == b"o" * 100 + bytes(BLOCK - 100)
        assert c.coordinator.files[FILE].size == 3 * BLOCK + 3


async def test_a_reader_sees_the_new_size_only_when_data_and_size_are_both_done() -> None:
    async with cluster() as c:
        node = await prepared(c)
        c.coordinator.ahead = 16
        await node.write(FILE, 4 * BLOCK, b"a" * BLOCK)  # space is given ahead
        assert c.coordinator.names() == ["allocate"]
        node.bus.hold()
        c.nursery.start_soon(node.write, FILE, 5 * BLOCK, b"b" * BLOCK)
        await settle()
        assert c.coordinator.names() == ["allocate", "commit"]  # in parallel with the data
        assert c.coordinator.files[FILE].size == 6 * BLOCK
        assert await node.read(FILE, 5 * BLOCK, BLOCK) == b""
        assert (await node.table.getattr(FILE))[6] == 5 * BLOCK
        node.bus.let_go()
        await settle()
        assert await node.read(FILE, 5 * BLOCK, BLOCK) == b"b" * BLOCK


async def extend_in_vain(c: Any, node: Any, blocks: int = 1) -> None:
    """A write whose size is not committed: its blocks hold bytes behind the end of the file."""
    c.coordinator.ahead = 16
    await node.write(FILE, 4 * BLOCK, b"a" * BLOCK)
    c.coordinator.faults["commit"] = [Unavailable("no log")]
    with pytest.raises(Unavailable):
        await node.write(FILE, 5 * BLOCK, b"b" * blocks * BLOCK)


async def test_I2_an_extending_write_is_not_answered_before_its_size_is_committed() -> None:
    async with cluster() as c:
        node = await prepared(c)
        await extend_in_vain(c, node)
        assert await node.read(FILE, 5 * BLOCK, BLOCK) == b""


@pytest.mark.parametrize("trim_errors", [[], [Unavailable("it has just started")]])
async def test_blocks_of_a_failed_extension_read_as_zeros_when_a_later_write_leaves_a_gap_over_them(
    trim_errors: list[CsvfsError],
) -> None:
    """Also where a drive server cannot trim now: programs see no error for that."""
    async with cluster() as c:
        node = await prepared(c)
        await extend_in_vain(c, node)
        node.bus.trim_errors = trim_errors
        await node.write(FILE, 7 * BLOCK, b"c" * BLOCK)
        assert await node.read(FILE, 5 * BLOCK, 3 * BLOCK) == bytes(2 * BLOCK) + b"c" * BLOCK


async def test_a_gap_is_not_written_over_once_the_lease_was_lost_while_it_was_to_be_trimmed() -> None:
    """Its blocks may be another file's by then."""
    async with cluster() as c:
        node = await prepared(c)
        await extend_in_vain(c, node)
        trim, write, written = node.bus.trim, node.bus.write, []

        async def lose(items: list[tuple[int, int, int]]) -> None:
            node.bus.trim = trim  # type: ignore[method-assign]
            node.table.refused([FILE])
            raise Unavailable("it has just started")

        def note(*args: Any) -> None:
            written.append(node.table.holds(FILE))
            write(*args)

        node.bus.trim, node.bus.write = lose, note  # type: ignore[method-assign,assignment]
        await node.write(FILE, 7 * BLOCK, b"c" * BLOCK)
        assert await node.read(FILE, 5 * BLOCK, 3 * BLOCK) == bytes(2 * BLOCK) + b"c" * BLOCK
        assert written and set(written) == {3}


async def test_of_a_gap_nothing_more_is_written_over_once_the_lease_was_lost_in_the_middle_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(write_path, "BLOCK_COUNT_MAX", 1)
    async with cluster() as c:
        node = await prepared(c)
        await extend_in_vain(c, node, blocks=2)
        node.bus.trim_errors = [Unavailable("it has just started")]
        write, held = node.bus.write, []

        def lose_behind_the_first(*args: Any) -> None:
            held.append(node.table.holds(FILE))
            write(*args)
            if len(held) == 1:
                node.table.refused([FILE])

        node.bus.write = lose_behind_the_first  # type: ignore[method-assign]
        await node.write(FILE, 8 * BLOCK, b"c" * BLOCK)
        assert await node.read(FILE, 5 * BLOCK, 4 * BLOCK) == bytes(3 * BLOCK) + b"c" * BLOCK
        assert set(held) == {3}


async def test_when_the_data_of_an_extension_fails_the_committed_size_is_shown() -> None:
    async with cluster() as c:
        node = await prepared(c)
        node.bus.fail_next = [DriveFailed("drive 1")]
        with pytest.raises(DriveFailed):
            await node.write(FILE, 4 * BLOCK, b"b" * BLOCK)
        assert (await node.table.getattr(FILE))[6] == c.coordinator.files[FILE].size == 5 * BLOCK


async def test_appends_of_two_nodes_all_land_behind_each_other() -> None:
    """O_APPEND: the kernel's idea of the end is old, the lease holder's is right."""
    async with cluster() as c:
        c.coordinator.add_file(FILE)
        nodes = [c.node("n1"), c.node("n2")]
        async with trio.open_nursery() as nursery:
            for index in range(20):
                nursery.start_soon(nodes[index % 2].write, FILE, 0, b"%02d\n" % index, WRITE_APPEND)
        lines = (await nodes[0].read(FILE, 0, 1000)).split()
        assert sorted(lines) == [b"%02d" % index for index in range(20)]
        assert ("pages", FILE, 0, 0) in nodes[0].kernel.log  # the kernel cached them at the wrong place


async def test_write_back_of_mmapped_pages_never_grows_a_file() -> None:
    async with cluster() as c:
        node = await prepared(c, blocks=1)
        await node.table.truncate(FILE, {"size": 100, "mtime_ns": 1})
        await node.write(FILE, 0, b"m" * BLOCK, FUSE_WRITE_CACHE)
        await node.write(FILE, BLOCK, b"m" * BLOCK, FUSE_WRITE_CACHE)
        assert (await node.table.getattr(FILE))[6] == 100
        assert await node.read(FILE, 0, BLOCK) == b"m" * 100
        await node.table.truncate(FILE, {"size": 200, "mtime_ns": 1})
        assert await node.read(FILE, 0, BLOCK) == b"m" * 100 + bytes(100)


async def test_no_space_is_told_and_leaves_the_file_as_it_was() -> None:
    async with cluster() as c:
        node = await prepared(c)
        c.coordinator.faults["allocate"] = [NoSpace("pool full")]
        with pytest.raises(NoSpace):
            await node.write(FILE, 4 * BLOCK, b"b" * BLOCK)
        assert (await node.table.getattr(FILE))[6] == 4 * BLOCK


# -- truncation


async def test_a_truncation_waits_for_writes_and_parks_new_ones() -> None:
    async with cluster() as c:
        node = await prepared(c)
        node.bus.hold()
        early = taken_nowait(node, 3 * BLOCK, b"e" * BLOCK)
        ended = trio.Event()

        async def truncate() -> None:
            await node.table.truncate(FILE, {"size": BLOCK, "mtime_ns": 1})
            ended.set()

        c.nursery.start_soon(truncate)
        await settle()
        assert c.coordinator.calls == [] and early == []
        assert await node.read(FILE, 3 * BLOCK, BLOCK) == b""  # its blocks may be somebody else's soon
        assert not node.table.write_nowait(FILE, 0, memoryview(bytes(BLOCK)), 0, pytest.fail)
        node.bus.let_go()
        await ended.wait()
        assert early == [None] and c.coordinator.names() == ["setattr"]
        assert await node.read(FILE, 0, 4 * BLOCK) == b"o" * BLOCK


async def test_a_refused_truncation_changes_nothing() -> None:
    async with cluster() as c:
        node = await prepared(c)
        c.coordinator.faults["setattr"] = [NoSpace("no")]
        with pytest.raises(NoSpace):
            await node.table.truncate(FILE, {"size": 1, "mtime_ns": 1})
        assert await node.read(FILE, 0, 4 * BLOCK) == b"o" * (4 * BLOCK)


async def test_after_a_truncation_of_unknown_outcome_the_coordinator_is_asked() -> None:
    async with cluster() as c:
        node = await prepared(c)
        c.coordinator.after["setattr"] = [TimedOut("who knows")]
        with pytest.raises(TimedOut):
            await node.table.truncate(FILE, {"size": 10, "mtime_ns": 1})
        await settle()
        assert node.table.holds(FILE) == 0
        assert await node.read(FILE, 0, BLOCK) == b"o" * 10


async def test_two_nodes_truncate_and_write_at_once_without_hanging() -> None:
    async with cluster() as c:
        await prepared(c)
        nodes = [c.node("n1"), c.node("n2")]
        async with trio.open_nursery() as nursery:
            for index in range(6):
                node = nodes[index % 2]
                nursery.start_soon(node.table.truncate, FILE, {"size": 1000 * index, "mtime_ns": 1})
                nursery.start_soon(node.write, FILE, 500 * index, b"x" * 700)
                nursery.start_soon(node.read, FILE, 0, 2 * BLOCK)
        assert await nodes[0].read(FILE, 0, 1 << 20) == await nodes[1].read(FILE, 0, 1 << 20)


# -- fsync, times


async def test_I8_fsync_waits_for_writes_under_way_and_flushes_their_slabs() -> None:
    async with cluster() as c:
        node = await prepared(c, blocks=100)
        await node.table.fsync(FILE)
        assert node.bus.flushed == [{0, 1}] and c.coordinator.names()[-1] == "fsync"
        node.bus.hold()
        taken_nowait(node, 70 * BLOCK, b"n" * BLOCK)
        ended = trio.Event()

        async def fsync() -> None:
            await node.table.fsync(FILE)
            ended.set()

        c.nursery.start_soon(fsync)
        await settle()
        assert not ended.is_set() and len(node.bus.flushed) == 1
        node.bus.let_go()
        await ended.wait()
        assert node.bus.flushed[1:] == [{1}]
        # Only a time has changed: it is reported by and by, and neither committed nor flushed for this.
        assert c.coordinator.names().count("fsync") == 1 and "commit" not in c.coordinator.names()
        await node.table.report_times()
        assert c.coordinator.names()[-1] == "commit"


async def test_fsync_of_a_file_that_did_not_change_asks_nobody() -> None:
    async with cluster() as c:
        node = await prepared(c)
        await node.table.fsync(FILE)
        c.coordinator.calls.clear()
        await node.table.fsync(FILE)
        assert c.coordinator.calls == [] and len(node.bus.flushed) == 1


async def test_a_write_waits_for_blocks_that_it_has_to_keep_and_no_copy_has_now(monkeypatch) -> None:
    """Simulator seed 302623: it got EAGAIN, where a read would have waited."""
    monkeypatch.setattr(file_io, "RETRY_S", 0.001)
    async with cluster() as c:
        node = await prepared(c)
        read, failures = node.bus.read, [Unavailable("no drive server")] * 9

        async def fails_first(slab: int, block: int, count: int) -> bytes:
            if failures:
                raise failures.pop()
            return await read(slab, block, count)

        monkeypatch.setattr(node.bus, "read", fails_first)
        monkeypatch.setattr(node.bus, "local", False)
        await node.write(FILE, 100, b"n" * 10)  # in a block
        assert not failures
        failures = [Unavailable("no drive server")] * 9
        await node.table.truncate(FILE, {"size": 4 * BLOCK - 100, "mtime_ns": 1})
        await node.write(FILE, 4 * BLOCK, b"n" * 10)  # beyond the end, whose last block gets zeros
        assert not failures
        await node.table.truncate(FILE, {"size": 4 * BLOCK + 5, "mtime_ns": 1})
        failures = [Unavailable("no drive server")] * 9
        await node.table.truncate(FILE, {"size": 9 * BLOCK, "mtime_ns": 1})
        assert not failures
        expected = b"o" * 100 + b"n" * 10 + b"o" * (4 * BLOCK - 210) + bytes(100) + b"n" * 5
        assert await node.read(FILE, 0, 9 * BLOCK) == expected.ljust(9 * BLOCK, b"\0")
        monkeypatch.setattr(node.table._writes, "_io_timeout_s", 0.01)
        failures = [Unavailable("no drive server")] * 999
        with pytest.raises(InputOutputError):
            await node.write(FILE, 100, b"n" * 10)


def reads_fail(node: Node, monkeypatch: pytest.MonkeyPatch) -> tuple[trio.Event, trio.Event]:
    """No copy can be read: an event that is set when one is tried, and one to set when they can be again."""
    read, tried, may_read = node.bus.read, trio.Event(), trio.Event()

    async def fails_first(slab: int, block: int, count: int) -> bytes:
        if not may_read.is_set():
            tried.set()
            raise Unavailable("no drive server")
        return await read(slab, block, count)

    monkeypatch.setattr(node.bus, "read", fails_first)
    monkeypatch.setattr(node.bus, "local", False)
    return tried, may_read


@pytest.mark.parametrize("clones", [False, True])
async def test_I5_no_recall_waits_for_the_last_block_that_a_truncation_or_a_clone_has_to_keep(monkeypatch, clones) -> None:
    """They begin anew when it can be read. A node that does not answer a recall for long is evicted."""
    monkeypatch.setattr(file_io, "RETRY_S", 0.001)
    async with cluster() as c:
        node = await prepared(c)
        clone = FILE + 1
        c.coordinator.add_file(clone)
        await node.write(clone, 0, b"c" * 200)
        await node.table.truncate(clone, {"size": 100, "mtime_ns": 1})
        waits, may_read = reads_fail(node, monkeypatch)
        done = trio.Event()

        async def grow() -> None:
            if clones:
                await node.table.copy_range(FILE, 0, clone, 8 * BLOCK, 4 * BLOCK)
            else:
                await node.table.truncate(clone, {"size": 9 * BLOCK, "mtime_ns": 1})
            done.set()

        c.nursery.start_soon(grow)
        await waits.wait()
        with trio.fail_after(5):
            await node.table.recall(clone, LEASE_NONE, False)
        may_read.set()
        with trio.fail_after(30):
            await done.wait()
        expected = (b"c" * 100).ljust(8 * BLOCK, b"\0") + (b"o" * (4 * BLOCK) if clones else bytes(BLOCK))
        assert await c.node("n2").read(clone, 0, 12 * BLOCK) == expected


async def test_I4_an_append_that_waited_goes_behind_what_others_have_appended_meanwhile(monkeypatch) -> None:
    """It cannot read the block that it begins in; its lease moves on, and what its place was is another node's by then."""
    monkeypatch.setattr(file_io, "RETRY_S", 0.001)
    async with cluster() as c:
        one = await prepared(c)
        two = c.node("n2")
        await one.table.truncate(FILE, {"size": BLOCK + 100, "mtime_ns": 1})
        waits, may_read = reads_fail(one, monkeypatch)
        appended = trio.Event()
        journal = one.table._writes._journal
        journal.begin(70)

        async def append() -> None:
            token = current_request.set(70)
            await one.write(FILE, BLOCK + 100, b"1" * 50, WRITE_APPEND)
            current_request.reset(token)
            appended.set()

        c.nursery.start_soon(append)
        await waits.wait()
        await two.write(FILE, BLOCK + 100, b"2" * 50, WRITE_APPEND)
        may_read.set()
        with trio.fail_after(30):
            await appended.wait()
        journal.done(70)
        content = await two.read(FILE, BLOCK, BLOCK)
        assert (content[:100], content[100:]) == (b"o" * 100, b"2" * 50 + b"1" * 50)


async def test_I8_a_failed_flush_is_reported_until_the_file_is_closed() -> None:
    async with cluster() as c:
        node = await prepared(c)
        await node.table.open(FILE, writing=False)
        node.bus.flush_errors = [DriveFailed("medium error")]
        for _ in range(3):
            with pytest.raises(DriveFailed):
                await node.table.fsync(FILE)
        assert node.bus.flushed == []  # not retried into silence
        node.table.closed(FILE, writing=False)
        await node.table.fsync(FILE)


async def test_I8_a_flush_that_could_not_be_done_is_done_by_the_next_fsync() -> None:
    async with cluster() as c:
        node = await prepared(c)
        node.bus.flush_errors = [Unavailable("no drive server")]
        with pytest.raises(Unavailable):
            await node.table.fsync(FILE)
        await node.table.fsync(FILE)
        assert node.bus.flushed == [{0}]


async def test_closing_a_file_that_was_only_read_or_extended_sends_nothing() -> None:
    async with cluster() as c:
        node = await prepared(c)
        await node.read(FILE, 0, BLOCK)
        await node.table.flush(FILE)
        assert c.coordinator.calls == []


async def test_the_time_of_a_write_is_kept_here_and_reported_later() -> None:
    async with cluster() as c:
        node = await prepared(c)
        before = c.coordinator.files[FILE].mtime
        await node.write(FILE, 0, b"n" * BLOCK)
        mtime = (await node.table.getattr(FILE))[9]
        assert mtime > before and c.coordinator.calls == []
        await node.table.report_times()
        assert c.coordinator.files[FILE].mtime == mtime
        c.coordinator.calls.clear()
        await node.table.report_times()
        assert c.coordinator.calls == []


async def test_attributes_told_without_the_lease_are_not_kept_under_it() -> None:
    """Between the recall of attributes and the change that it is for, a lookup tells what they still are."""
    async with cluster() as c:
        node = await prepared(c, blocks=1)
        await c.node("n2").read(FILE, 0, 1)  # so that this one holds it for reading
        attr = await node.table.getattr(FILE)
        assert node.table.getattr_nowait(FILE) == attr and node.table.holds(FILE) == LEASE_READ
        await node.table.recall(FILE, LEASE_READ, True)
        node.table.granted(FILE, LEASE_NONE, attr, node.table.stamp())
        c.coordinator.files[FILE].mode ^= 0o7
        assert node.table.getattr_nowait(FILE) is None
        assert (await node.table.getattr(FILE))[1] == c.coordinator.files[FILE].mode


async def test_attributes_told_without_the_lease_are_not_given_to_the_kernel_to_keep_either() -> None:
    """A getattr is answered while another node's change waits for its turn: with what they still are, and no lease."""
    async with cluster() as c:
        node = await prepared(c, blocks=1)
        await c.node("n2").read(FILE, 0, 1)  # so that this one holds it for reading
        operations = VolumeOperations(node.session, node.table)
        assert (await operations.getattr(FILE, None)).attr_timeout > 0
        await node.table.recall(FILE, LEASE_READ, True)
        c.coordinator.table.begin(("n3", 1), {FILE: Need.ATTRIBUTES})
        assert (await operations.getattr(FILE, None)).attr_timeout == 0 and node.table.holds(FILE) == LEASE_READ


async def test_a_time_reported_during_a_truncation_tells_no_size() -> None:
    """It may be carried out behind the truncation, and a size told there would undo it."""
    async with cluster() as c:
        node = await prepared(c)
        await node.write(FILE, 0, b"n" * BLOCK)
        c.coordinator.delay = 500
        c.nursery.start_soon(node.table.truncate, FILE, {"size": BLOCK, "mtime_ns": 1})
        await settle()
        assert c.coordinator.names() == ["setattr"] and c.coordinator.files[FILE].size == 4 * BLOCK
        await node.table.report_times()
        assert c.coordinator.names() == ["setattr", "commit"]
        assert (await node.table.getattr(FILE))[6] == c.coordinator.files[FILE].size == BLOCK


async def test_a_time_set_by_hand_overrides_that_of_an_earlier_write() -> None:
    async with cluster() as c:
        node = await prepared(c)
        await node.write(FILE, 0, b"n" * BLOCK)
        reply = await node.session.call("setattr", {"ino": FILE, "mtime_ns": 12345})
        node.table.granted(FILE, reply["lease"], reply["attr"], 0)
        assert (await node.table.getattr(FILE))[9] == 12345
        await node.table.fsync(FILE)
        assert c.coordinator.files[FILE].mtime == 12345


async def test_a_time_set_by_another_node_overrides_that_of_an_earlier_write_here() -> None:
    async with cluster() as c:
        c.coordinator.add_file(FILE)
        writer, other = c.node("n1"), c.node("n2")
        await writer.table.open(FILE, True)
        await writer.write(FILE, 0, b"x")
        await other.session.call("setattr", {"ino": FILE, "mtime_ns": 7})
        assert (await writer.table.getattr(FILE))[9] == 7
        await writer.table.flush(FILE)
        await writer.write(FILE, 0, b"y")
        assert (await writer.table.getattr(FILE))[9] > 7
        await other.session.call("setattr", {"ino": FILE, "mtime_ns": 8})
        await writer.table.flush(FILE)  # nobody looked meanwhile
        assert c.coordinator.files[FILE].mtime == 8


async def test_another_node_sees_size_and_time_of_a_file_that_is_being_written() -> None:
    async with cluster() as c:
        node = await prepared(c)
        other = c.node("n2")
        await node.write(FILE, 0, b"n" * BLOCK)
        attr = await other.table.getattr(FILE)
        assert attr[6] == 4 * BLOCK and attr[9] == (await node.table.getattr(FILE))[9]
        assert node.table.holds(FILE) == 3


# -- leases


async def test_a_file_just_made_is_written_without_asking_for_a_lease_or_layout() -> None:
    async with cluster() as c:
        file = c.coordinator.add_file(FILE)
        node = c.node("n1")
        ticket = await c.coordinator.take(node.session.key, FILE, Need.WRITE)
        c.coordinator.perform(c.coordinator.table.finish(ticket))
        node.table.granted(FILE, 3, file.attr(), 0)
        await node.write(FILE, 0, b"x" * BLOCK)
        assert c.coordinator.names() == ["allocate"]


async def test_a_reply_that_says_less_than_is_held_takes_nothing_away() -> None:
    async with cluster() as c:
        node = await prepared(c)
        node.table.granted(FILE, 0, c.coordinator.files[FILE].attr(), 0)
        assert node.table.holds(FILE) == 3


async def test_what_the_kernel_forgot_is_given_back_in_batches() -> None:
    async with cluster() as c:
        node = c.node("n1")
        for ino in range(10, 20):
            c.coordinator.add_file(ino)
            await node.table.getattr(ino)
            node.table.forget(ino)
        await node.table.open(12, writing=False)
        reply = c.coordinator.lookup(node.session.key, 13)
        node.table.granted(13, reply["lease"], reply["attr"], 0)  # looked up again
        await node.table.release_unused()
        assert [name for name in c.coordinator.names() if name == "release"] == ["release"]
        held = [ino for ino in range(10, 20) if c.coordinator.table.held(node.session.key, ino)]
        assert held == [12, 13] == sorted(node.table.leases.states)


async def test_nothing_learned_while_a_release_is_under_way_is_cached() -> None:
    async with cluster() as c:
        node = await prepared(c)
        node.table.forget(FILE)
        c.nursery.start_soon(node.table.release_unused)
        while "release" not in c.coordinator.names():
            await trio.lowlevel.checkpoint()
        stamp = node.table.stamp()
        node.table.granted(FILE, 2, c.coordinator.files[FILE].attr(), 0)
        assert node.table.holds(FILE) == 0 and node.table.recalled_since(FILE, stamp)
        await settle()
        assert await node.read(FILE, 0, 2) == b"oo"


async def test_inodes_beyond_the_limit_are_emptied_and_given_back_the_longest_known_first() -> None:
    async with cluster() as c:
        node = c.node("n1", inodes_max=4)
        for ino in range(10, 20):
            c.coordinator.add_file(ino)
            await node.table.getattr(ino)
        await node.table.open(10, writing=False)
        await node.table.release_unused()
        assert sorted(node.table.leases.states) == [10, 17, 18, 19]
        assert ("pages", 11, 0, 0) in node.kernel.log


async def test_the_last_close_of_a_file_held_only_as_open_gives_it_back() -> None:
    """So that a deleted file goes."""
    async with cluster() as c:
        node = await prepared(c)
        other = c.node("n2")
        await node.table.open(FILE, writing=False)
        await other.write(FILE, 0, b"x")
        assert node.table.holds(FILE) == 1
        node.table.closed(FILE, writing=False)
        await node.table.release_unused()
        assert c.coordinator.table.held(node.session.key, FILE) == 0


async def test_a_file_that_is_open_is_held_at_least_as_open() -> None:
    async with cluster() as c:
        c.coordinator.add_file(FILE)
        node = c.node("n1")
        for _ in range(2):
            await node.table.open(FILE, writing=False)
        assert c.coordinator.names() == ["acquire"]
        assert c.coordinator.table.held(node.session.key, FILE) == 1
        assert node.table.open_files == 2
        for _ in range(3):
            node.table.closed(FILE, writing=False)
        assert node.table.open_files == 0


async def test_a_layout_is_asked_for_in_answers_that_fit_into_a_frame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However large the range: a frame has room for so many slab descriptors only."""
    monkeypatch.setattr("csvfs.mount.leases.LAYOUT_BLOCKS", 4)
    async with cluster() as c:
        writer = await prepared(c, blocks=2)
        for block in range(2, 20):
            c.coordinator.next_block += 1  # no two extents continue each other
            await writer.write(FILE, block * BLOCK, bytes([block]) * BLOCK)
        node = c.node("n2")
        c.coordinator.calls.clear()
        content = await node.read(FILE, 2 * BLOCK, 18 * BLOCK)
        assert content == b"".join(bytes([block]) * BLOCK for block in range(2, 20))
        asked = [(args["block"], args["count"]) for name, args in c.coordinator.calls if name == "acquire"]
        assert asked == [(first, 4) for first in range(0, 20, 4)]


async def test_what_is_not_there_is_not_found() -> None:
    async with cluster() as c:
        node = c.node("n1")
        for operation in (node.read(9, 0, 1), node.write(9, 0, b"x"), node.table.getattr(9)):
            with pytest.raises(NotFound):
                await operation


async def test_a_directory_lease_is_held_and_recalled_inline() -> None:
    async with cluster() as c:
        c.coordinator.add_file(7, stat.S_IFDIR | 0o755)
        node = c.node("n1")
        await node.table.getattr(7)
        node.table.granted_directory(7, 2)
        stamp = node.table.stamp()
        answer = await node.table.recall(7, 0, False)
        assert answer["kind"] == 0 and node.table.recalled_since(7, stamp)
        assert node.kernel.log == [("epoch",), ("attr", 7)]


# -- the right to serve


async def test_I5_a_node_that_may_not_serve_answers_nothing_from_what_it_holds() -> None:
    async with cluster() as c:
        node = await prepared(c)
        node.alive = False
        assert node.table.read_nowait(FILE, 0, BLOCK) is None
        assert not node.table.write_nowait(FILE, 0, memoryview(bytes(BLOCK)), 0, pytest.fail)


async def test_I5_after_a_lapse_nothing_learned_before_is_cached_and_the_leases_stay() -> None:
    async with cluster() as c:
        node = await prepared(c)
        c.nursery.start_soon(node.table.run_forever)
        stamp = node.table.stamp()
        node.alive = False
        assert node.table.read_nowait(FILE, 0, BLOCK) is None
        node.alive = True
        assert node.table.read_nowait(FILE, 0, BLOCK) is None  # a watcher sees to it first
        c.coordinator.calls.clear()
        assert await node.read(FILE, 0, 2) == b"oo"
        assert c.coordinator.names() == []
        assert node.table.recalled_since(FILE, stamp)


async def test_I4_a_write_that_is_under_way_during_a_lapse_has_landed_before_another_node_gets_the_lease() -> None:
    """Nobody counted the node as gone, so nothing fences what it has sent, and will send again."""
    async with cluster() as c:
        node, other = await prepared(c), c.node("n2")
        c.nursery.start_soon(node.table.run_forever)
        await trio.sleep(0.12)  # its guard has been seen serving
        node.bus.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.write, FILE, 0, b"n" * BLOCK)
            await settle()
            assert node.bus.in_flight == 1
            node.alive = False
            await trio.sleep(0.12)
            node.alive = True
            with trio.fail_after(30):
                while not node.guard.serving():
                    await trio.sleep(0.01)
            seen: list[bytes] = []

            async def read() -> None:
                seen.append(await other.read(FILE, 0, BLOCK))

            nursery.start_soon(read)
            await trio.sleep(0.2)
            assert seen == [], "the write may land at any time"
            node.bus.let_go()
        assert seen == [b"n" * BLOCK]


async def test_a_write_whose_lease_was_lost_while_it_asked_for_space_is_tried_again() -> None:
    """Under another coordinator after a lapse: it refuses what was asked under a lease of the one before."""
    async with cluster() as c:
        node = await prepared(c)

        async def refuse_once(session: object, **args: object) -> None:
            del c.coordinator._allocate  # from now on the class's own
            node.table.refused([FILE])
            raise Conflict("lease 0, this needs 3; acquire it first")

        c.coordinator._allocate = refuse_once  # type: ignore[method-assign,assignment]
        await node.write(FILE, BLOCK * 4, b"n" * BLOCK)
        assert await node.read(FILE, BLOCK * 3, 2 * BLOCK) == b"o" * BLOCK + b"n" * BLOCK
        assert c.coordinator.names() == ["allocate", "acquire", "allocate"]


async def test_closing_a_file_whose_lease_was_lost_while_its_time_was_reported_is_no_error() -> None:
    async with cluster() as c:
        node = await prepared(c)
        await node.write(FILE, 0, b"n" * BLOCK)

        async def refuse(session: object, **args: object) -> None:
            node.table.refused([FILE])
            raise Conflict("lease 0, this needs 3; acquire it first")

        c.coordinator._commit = refuse  # type: ignore[method-assign,assignment]
        assert node.table.flush_is_due(FILE)
        await node.table.flush(FILE)
        assert not node.table.flush_is_due(FILE)


async def test_I5_without_contact_to_the_coordinator_nothing_is_served_and_then_it_goes_on() -> None:
    async with cluster() as c:
        node = await prepared(c)
        node.guard._contact_until_ns = 0
        assert node.table.read_nowait(FILE, 0, BLOCK) is None
        node.guard.contact(time.monotonic_ns())
        assert node.table.read_nowait(FILE, 0, BLOCK) == b"o" * BLOCK


async def test_who_waits_too_long_for_the_right_to_serve_gets_an_error() -> None:
    async with cluster() as c:
        node = await prepared(c)
        node.alive = False
        node.table._reads._io_timeout_s = 0.01
        with pytest.raises((LeaseLost, TimedOut)):
            await node.table.read(FILE, 0, BLOCK)


# -- calls that are not made


async def test_an_empty_file_is_truncated_to_nothing_and_written_with_one_call() -> None:
    """open(O_TRUNC) of a file just made, a small write, close."""
    async with cluster() as c:
        file = c.coordinator.add_file(FILE)
        node = c.node("n1")
        c.coordinator.perform(
            c.coordinator.table.finish(await c.coordinator.take(node.session.key, FILE, Need.WRITE))
        )
        node.table.granted(FILE, 3, file.attr(), 0)
        attr = await node.table.truncate(FILE, {"size": 0, "mtime_ns": 5555})
        assert (attr[6], attr[9]) == (0, 5555) and c.coordinator.calls == []
        await node.write(FILE, 0, b"x" * BLOCK)
        assert not node.table.flush_is_due(FILE)
        await node.table.flush(FILE)
        assert c.coordinator.names() == ["allocate"]
        assert file.size == BLOCK and file.mtime > 5555


async def test_a_time_set_by_an_empty_truncation_is_reported() -> None:
    async with cluster() as c:
        node = await prepared(c)
        await node.table.truncate(FILE, {"size": BLOCK * 4, "mtime_ns": 5555})
        assert node.table.flush_is_due(FILE)
        await node.table.flush(FILE)
        assert c.coordinator.names() == ["commit"] and c.coordinator.files[FILE].mtime == 5555


async def test_a_truncation_that_also_changes_other_things_asks_the_coordinator() -> None:
    async with cluster() as c:
        node = await prepared(c)
        await node.table.truncate(FILE, {"size": BLOCK * 4, "mtime_ns": 5555, "mode": 0o600})
        assert c.coordinator.names() == ["setattr"]


async def test_a_file_emptied_is_written_anew_without_asking_where_nothing_lies() -> None:
    async with cluster() as c:
        node = await prepared(c)
        await node.table.truncate(FILE, {"size": 0, "mtime_ns": 1})
        await node.write(FILE, 0, b"x" * BLOCK)
        assert c.coordinator.names() == ["setattr", "allocate"]


async def test_what_nobody_wants_flushed_goes_to_the_drives_alone() -> None:
    async with cluster() as c:
        node = await prepared(c)
        node.table.forget(FILE)
        await node.table.release_unused()
        assert node.bus.flushed and "fsync" not in c.coordinator.names()


async def test_I8_a_write_lease_goes_when_what_was_written_under_it_is_on_the_media() -> None:
    async with cluster() as c:
        node, other = await prepared(c, blocks=10), c.node("n2")
        assert node.bus.flushed == []
        assert await other.read(FILE, 0, 4) is not None  # recalls the write lease
        assert node.bus.flushed == [{0}]
