"""The mount's side of a file that several nodes write at once: what it does in segments, gives back, and leaves to the lease."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from csvfs.errors import Unavailable
from csvfs.mount import request_journal
from csvfs.mount.file_state import FileState
from csvfs.mount.request_journal import RequestJournal
from csvfs.mount.segments import MEMBER
from tests.mount_nodes import PAGE, Cluster, Node, cluster

FILE = 5
READ, WRITE = 2, 3
PAGES = 6


class Sharing:
    """In front of the fake coordinator: answers the calls about segments as it is told to. `held`: by segment."""

    def __init__(self, c: Cluster, node: Node) -> None:
        self.c, self.node = c, node
        self.true = node.table.leases._coordinator
        self.held: dict[int, int] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answer: trio.Event | None = None  # of `segments`; held up until then
        self.fails: list[Exception] = []
        self.owed = False
        self.over = False
        for part in (node.table.leases, node.table._shared):
            part._coordinator = self

    async def call(self, name: str, args: dict[str, Any], /) -> Any:
        if name == "acquire" and args.get("direct"):
            self.calls.append((name, args))
            return {"lease": 1, "segmented": True, "extents": [], "slabs": []}
        if not name.startswith("segments"):
            return await self.true.call(name, args)
        self.calls.append((name, args))
        await trio.lowlevel.checkpoint()
        if self.fails:
            raise self.fails.pop(0)
        if name != "segments":
            return {}
        if self.answer is not None:
            await self.answer.wait()
        if self.over:
            return {"over": True}
        layout = self.layout(args["block"], args["blocks"])
        return {
            "held": [[MEMBER, READ], *([segment, self.held.get(segment, args["kind"])] for segment in range(args["first"], args["first"] + args["count"]))],
            "size": PAGES * PAGE, "owed": self.owed, **layout,
        }  # fmt: skip

    def layout(self, block: int, count: int) -> dict[str, Any]:
        return self.c.coordinator._layout(self.c.coordinator.files[FILE], block, count)

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@contextlib.asynccontextmanager
async def sharing() -> AsyncIterator[tuple[Node, Sharing, FileState]]:
    """A node with a file of six pages that is shared; nothing of it is held but that it is open."""
    async with cluster() as c:
        c.coordinator.add_file(FILE)
        node = c.node("n1")
        await node.write(FILE, 0, b"o" * (PAGE * PAGES))
        await node.table.open(FILE, True)
        await node.table.recall(FILE, 0, False)
        state = node.table.leases.states[FILE]
        assert state.lease == 1
        yield node, Sharing(c, node), state


async def read(node: Node, page: int, pages: int = 1) -> bytes:
    return b"".join(bytes(part) for part in await node.table.read(FILE, page * PAGE, pages * PAGE, direct=True))


async def write(node: Node, page: int, letter: bytes, size: int = PAGE) -> None:
    await node.table.write(FILE, page * PAGE, memoryview(letter * size), 0, direct=True)


async def test_direct_io_is_done_in_segments_and_asks_once_for_each() -> None:
    async with sharing() as (node, coordinator, state):
        await write(node, 1, b"w")
        assert await read(node, 0, 3) == b"o" * PAGE + b"w" * PAGE + b"o" * PAGE
        assert coordinator.names() == ["acquire", "segments"] and state.lease == 1
        assert await read(node, 5, 3) == b"o" * PAGE  # as far as the file goes
        assert await read(node, 6) == b"" and await read(node, 300) == b""
        assert state.dirty_slabs and state.segments is not None and not state.segments.uses
        done: list[Any] = []
        assert node.table.write_segments(FILE, 2 * PAGE, memoryview(b"n" * PAGE), done.append, 0)
        with trio.fail_after(5):
            while not done:
                await trio.lowlevel.checkpoint()
        assert done == [None] and bytes(node.table.read_segments(FILE, 2 * PAGE + 5, 10) or await read(node, 2)[:10]) == b"n" * 10


@pytest.mark.parametrize("what", ["grows it", "is part of a block", "fills a hole"])
async def test_what_segments_do_not_allow_takes_the_lease_on_the_inode(what: str) -> None:
    async with sharing() as (node, coordinator, state):
        await read(node, 0)
        if what == "fills a hole":
            del coordinator.c.coordinator.files[FILE].blocks[3]
            assert state.segments is not None
            state.segments.extents.clear()
        await node.table.recall_segment(FILE, MEMBER, 0)  # as the real coordinator does for the lease that follows
        coordinator.calls.clear()
        page, size = {"grows it": (PAGES, PAGE), "is part of a block": (1, 100), "fills a hole": (3, PAGE)}[what]
        state.share()
        await write(node, page, b"w", size)
        assert state.lease == WRITE and coordinator.names() in ([], ["segments"])
        assert (await node.read(FILE, page * PAGE, size)) == b"w" * size


async def test_S2_a_recall_waits_for_what_is_under_way_and_nothing_begins_behind_it() -> None:
    async with sharing() as (node, coordinator, _state):
        await read(node, 0)
        await write(node, 0, b"1")
        node.bus.hold()
        done: list[Any] = []
        assert node.table.write_segments(FILE, 0, memoryview(b"2" * PAGE), done.append, 0)
        answers: list[Any] = []

        async def recall() -> None:
            answers.append(await node.table.recall_segment(FILE, 0, READ))

        coordinator.c.nursery.start_soon(recall)
        for _ in range(50):
            await trio.lowlevel.checkpoint()
        assert not answers and not node.table.write_segments(FILE, 0, memoryview(b"3" * PAGE), done.append, 0)
        node.bus.let_go()
        with trio.fail_after(5):
            while not answers:
                await trio.lowlevel.checkpoint()
        assert done == [None] and answers[0]["kind"] == READ and answers[0]["owes"] and answers[0]["mtime_ns"]
        coordinator.answer = trio.Event()
        with trio.move_on_after(0.05):
            await write(node, 0, b"4")  # asks for the segment anew, and waits
        assert coordinator.names()[-1] == "segments" and await read(node, 0) == b"2" * PAGE


async def test_S2_all_is_given_back_when_all_is_asked_for_and_what_was_written_is_on_the_media() -> None:
    async with sharing() as (node, _coordinator, state):
        await write(node, 0, b"1")
        assert state.dirty_slabs
        answer = await node.table.recall_segment(FILE, MEMBER, 0)
        assert answer["kind"] == 0 and answer["mtime_ns"] and not answer["owes"]
        assert state.segments is None and not state.dirty_slabs
        assert (await node.table.recall_segment(FILE, MEMBER, 0))["kind"] == 0  # asked again, or of one that we never had
        assert (await node.table.recall_segment(99, 0, 0))["kind"] == 0


async def test_a_segment_that_was_asked_for_back_before_its_answer_came_is_not_believed() -> None:
    """The coordinator says in the answer what is held as it leaves."""
    async with sharing() as (node, coordinator, state):
        coordinator.held = {0: 0}
        with trio.move_on_after(0.05):
            await read(node, 0)
        assert state.segments is not None and state.segments.kinds == {} and coordinator.names().count("segments") > 1


async def test_I5_a_segment_comes_with_the_present_descriptors_of_its_slabs_also_where_the_layout_is_known() -> None:
    """A slab may have lost a copy since, and that lacks what others have written there."""
    async with sharing() as (node, coordinator, _state):
        await read(node, 0)
        learned: list[Any] = []
        node.bus.learn = learned.append  # type: ignore[method-assign]
        await node.table.recall_segment(FILE, 0, 0)
        await read(node, 0)
        assert [args["blocks"] for name, args in coordinator.calls if name == "segments"] == [256, 256] and learned


async def test_a_file_that_is_shared_no_more_is_read_under_a_lease() -> None:
    async with sharing() as (node, coordinator, state):
        coordinator.over = True

        async def call(name: str, args: dict[str, Any], /) -> Any:
            if name == "acquire" and coordinator.names().count("segments"):
                return await coordinator.true.call(name, {key: value for key, value in args.items() if key != "direct"})
            return await Sharing.call(coordinator, name, args)

        coordinator.call = call  # type: ignore[method-assign]
        assert await read(node, 0) == b"o" * PAGE and state.lease == WRITE  # M4: it is open for writing
        assert state.segments is None


async def test_I8_an_fsync_has_others_flush_what_they_owe_and_says_when_they_could_not() -> None:
    async with sharing() as (node, coordinator, state):
        await write(node, 0, b"1")
        await node.table.fsync(FILE)
        assert "segments_flush" not in coordinator.names() and not state.dirty_slabs
        coordinator.owed = True
        await node.table.recall_segment(FILE, 0, 0)
        await write(node, 0, b"2")
        coordinator.fails = [Unavailable("nobody there")]
        with pytest.raises(Unavailable):
            await node.table.fsync(FILE)
        await node.table.fsync(FILE)
        assert coordinator.names().count("segments_flush") == 2
        await node.table.fsync(FILE)
        assert coordinator.names().count("segments_flush") == 2
        await write(node, 1, b"3")
        await node.table.flush_segments(FILE)  # as others ask us
        assert not state.dirty_slabs


async def test_I4_the_next_process_gives_a_segment_back_when_what_was_begun_there_is_done_again() -> None:
    async with sharing() as (node, coordinator, state):
        inheritance = node.table.inheritance
        inheritance.take([], {10: (FILE, [0]), 12: (FILE, [1]), 14: (99, [0])})  # 12 has its answer: it is not asked anew
        assert state.segments is not None and node.table.claims_of_segments()[0] == [FILE, 0, [[0, 2, WRITE]]]
        inheritance.replay_begins(FILE, 10)
        answers: dict[int, Any] = {}

        async def recall(segment: int) -> None:
            answers[segment] = await node.table.recall_segment(FILE, segment, 0)

        for segment in (0, 1, MEMBER):
            coordinator.c.nursery.start_soon(recall, segment)
        await trio.sleep(0.05)
        assert not answers  # the kernel has not said yet what it asks anew
        inheritance.resent()
        await trio.sleep(0.05)
        assert set(answers) == {1}
        await write(node, 0, b"r")  # without a call that would have to wait for the answer to the recall
        assert "segments" not in coordinator.names()
        await trio.sleep(0.05)
        assert set(answers) == {1}
        inheritance.replay_ends(FILE, 10)
        await trio.sleep(0.05)
        assert set(answers) == {0, 1, MEMBER} and state.segments is None
        assert coordinator.c.coordinator.drives is not None and await node.read(FILE, 0, PAGE) == b"r" * PAGE


async def test_I4_what_was_begun_in_a_segment_that_passed_on_is_refused() -> None:
    async with sharing() as (node, _, state):
        node.table.inheritance.take([], {10: (FILE, [0])})
        node.table.without_segments([FILE])
        assert state.segments is None and node.table.inheritance.refuses(FILE) and not node.table.inheritance.refuses(6)


async def test_I8_an_fsync_by_the_next_process_has_others_flush_once() -> None:
    async with sharing() as (node, coordinator, state):
        node.table.inheritance.take([], {})
        await node.table.fsync(FILE)
        await node.table.fsync(FILE)
        assert coordinator.names().count("segments_flush") == 1 and state.segments is None


async def test_the_time_of_the_last_write_is_told_when_asked_and_now_and_then() -> None:
    async with sharing() as (node, coordinator, state):
        assert node.table.query(FILE) is None
        await write(node, 0, b"1")
        told = node.table.query(FILE)
        assert told is not None and told["mtime_ns"] > 0 and told["size"] is None and state.is_busy()
        await node.table.report_times()
        assert coordinator.calls[-1] == ("segments_written", {"ino": FILE, "mtime_ns": told["mtime_ns"]})
        assert node.table.query(FILE) is None


async def test_claims_name_what_is_held_and_what_is_still_in_use() -> None:
    async with sharing() as (node, _coordinator, state):
        assert node.table.claims_of_segments() == []
        await write(node, 0, b"1")
        segments = state.segments
        assert segments is not None
        segments.kinds |= {1: WRITE, 2: READ, 7: READ}
        ((ino, mtime_ns, runs),) = node.table.claims_of_segments()
        assert ino == FILE and mtime_ns > 0 and runs == [[0, 2, WRITE], [2, 1, READ], [7, 1, READ]]
        node.bus.hold()
        done: list[Any] = []
        assert node.table.write_segments(FILE, 0, memoryview(b"2" * PAGE), done.append, 0)
        del segments.kinds[0]  # asked for back, and not answered yet
        assert node.table.claims_of_segments()[0][2][0] == [0, 2, WRITE]
        node.bus.let_go()
        node.table.without_segments([FILE, 99])
        assert state.segments is None


def test_I4_the_journal_says_where_a_write_was_begun_until_its_request_is_done() -> None:
    words = memoryview(bytearray(8 * request_journal.WORDS)).cast("Q")
    journal = RequestJournal(words)
    for unique in (2, 4, 6):
        journal.begin(unique)
    journal.begins_in(2, 1 << 40, 7, 8)
    journal.begins_in(4, 5, 0, 0)
    journal.begins_in(99, 5, 0, 0)  # of no request: nobody asks for it anew
    number, _ = journal.number("make")
    journal.done(4)
    following = RequestJournal(words)
    assert following.begun_before() == {2: (1 << 40, [7, 8])}
    following.begin(2)
    following.begins_in(2, 1 << 40, 7, 8)  # again
    assert RequestJournal(words).begun_before() == {2: (1 << 40, [7, 8])}
    following.done(2)
    assert RequestJournal(words).begun_before() == {} and following.number("make")[0] == number + 1
    journal.begin(8)
    journal.forget(8)
    journal.begins_in(8, 5, 0, 0)
    assert 8 not in RequestJournal(words).begun_before()


async def test_a_recall_to_read_of_a_segment_that_is_not_held_leaves_nothing_to_claim() -> None:
    async with sharing() as (node, _, state):
        await write(node, 0, b"1")
        await node.table.recall_segment(FILE, 7, READ)
        assert state.segments is not None and node.table.claims_of_segments()[0][2] == [[0, 1, WRITE]]


async def test_nothing_is_claimed_of_a_file_of_which_nothing_is_held_and_the_end_that_was_announced_is_void() -> None:
    async with sharing() as (node, _, state):
        await write(node, 0, b"1")
        segments = state.segments
        assert segments is not None
        segments.ending = True  # its coordinator said so, and died before it asked
        assert node.table.claims_of_segments() != [] and not segments.ending
        await node.table.recall_segment(FILE, 0, 0)
        assert state.segments is segments and node.table.claims_of_segments() == []


async def test_a_direct_read_behind_the_largest_file_finds_nothing() -> None:
    async with sharing() as (node, _, _state):
        await read(node, 0)
        with trio.fail_after(5):
            assert await node.table.read(FILE, 1 << 50, PAGE, direct=True) == []


async def test_I8_an_fsync_behind_the_end_of_the_sharing_still_has_others_flush() -> None:
    async with sharing() as (node, coordinator, state):
        coordinator.owed = True
        await read(node, 0)
        await node.table.recall_segment(FILE, MEMBER, 0)
        assert state.segments is None
        await node.table.fsync(FILE)
        await node.table.fsync(FILE)
        assert coordinator.names().count("segments_flush") == 1


async def test_I8_all_is_given_back_when_a_flush_that_is_under_way_has_ended_and_a_segment_owes_meanwhile() -> None:
    """What is being flushed is not dirty any more, and not on the media yet."""
    async with sharing() as (node, coordinator, state):
        await write(node, 0, b"1")
        begun, goes_on = trio.Event(), trio.Event()
        true = node.bus.flush

        async def flush(slabs: Any) -> None:
            begun.set()
            await goes_on.wait()
            await true(slabs)

        node.bus.flush = flush  # type: ignore[method-assign]
        answers: list[Any] = []

        async def recall(segment: int) -> None:
            answers.append(await node.table.recall_segment(FILE, segment, 0))

        coordinator.c.nursery.start_soon(node.table.fsync, FILE)
        await begun.wait()
        assert not state.dirty_slabs
        await recall(0)
        assert answers.pop()["owes"]
        coordinator.c.nursery.start_soon(recall, MEMBER)
        for _ in range(50):
            await trio.lowlevel.checkpoint()
        assert not answers
        goes_on.set()
        with trio.fail_after(5):
            while not answers:
                await trio.lowlevel.checkpoint()
        assert not answers[0]["owes"]
