"""Giving leases back: order, page locks, and that no node ever reads an old page."""

import itertools

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from csvfs.mount import recall as recall_module
from csvfs.mount.write_path import FUSE_WRITE_CACHE
from tests.mount_nodes import PAGE, CachingKernel, Cluster, Node, cluster

FILE = 5


async def prepared(c: Cluster, pages: int = 4) -> Node:
    c.coordinator.add_file(FILE)
    node = c.node("n1")
    await node.write(FILE, 0, b"o" * (PAGE * pages))
    return node


async def settle() -> None:
    for _ in range(60):
        await trio.lowlevel.checkpoint()


async def test_a_recall_waits_for_writes_under_way_and_reports_size_and_time() -> None:
    async with cluster() as c:
        node = await prepared(c)
        node.bus.hold()
        result: list = []
        assert node.table.write_nowait(FILE, 0, memoryview(bytes(PAGE)), 0, result.append)
        answers: list = []

        async def recall() -> None:
            answers.append(await node.table.recall(FILE, 0, False))

        c.nursery.start_soon(recall)
        await settle()
        assert answers == [] and node.table.holds(FILE) == 3
        node.bus.let_go()
        await settle()
        (answer,) = answers
        assert result == [None]
        assert answer["kind"] == 0 and answer["size"] == 4 * PAGE and answer["mtime_ns"] > 0


async def test_reads_answered_during_a_pass_are_invalidated_by_the_next() -> None:
    async with cluster() as c:
        node = await prepared(c)

        async def read_behind(ino: int, offset: int, length: int) -> None:
            assert (
                await node.read(FILE, PAGE, PAGE) == b"o" * PAGE
            )  # fills a page the pass has already left behind

        node.kernel.during = [read_behind]
        await node.table.recall(FILE, 0, False)
        pages = [entry for entry in node.kernel.log if entry[0] == "pages"]
        assert pages == [("pages", FILE, 0, 0), ("pages", FILE, PAGE, PAGE)]
        assert node.kernel.log[-1] == ("attr", FILE)


async def test_dirty_mmapped_pages_are_written_while_the_lease_is_still_held() -> None:
    async with cluster() as c:
        node = await prepared(c)

        async def write_back(ino: int, offset: int, length: int) -> None:
            assert node.table.holds(FILE) == 3
            await node.write(FILE, 0, b"m" * PAGE, FUSE_WRITE_CACHE)

        node.kernel.during = [write_back]
        c.coordinator.calls.clear()
        await node.table.recall(FILE, 0, False)
        assert "acquire" not in c.coordinator.names()
        other = c.node("n2")
        assert await other.read(FILE, 0, PAGE) == b"m" * PAGE


async def test_writes_that_come_late_are_parked_and_then_take_the_lease_anew() -> None:
    async with cluster() as c:
        node = await prepared(c)
        order: list[str] = []

        async def late(ino: int, offset: int, length: int) -> None:
            async def write() -> None:
                await node.write(FILE, 0, b"l" * PAGE)
                order.append("written")

            c.nursery.start_soon(write)
            await settle()
            order.append("pass over")

        async def nothing(ino: int, offset: int, length: int) -> None: ...

        async def tainting(ino: int, offset: int, length: int) -> None:
            await node.read(FILE, 0, PAGE)  # so that there is a second pass, with all parked

        node.kernel.during = [tainting, late]
        c.coordinator.calls.clear()
        other = c.node("n2")
        await other.write(FILE, PAGE, b"2" * PAGE)
        await settle()
        assert order == ["pass over", "written"]
        assert [args["kind"] for name, args in c.coordinator.calls if name == "acquire"] == [3, 3]
        assert await other.read(FILE, 0, 2 * PAGE) == b"l" * PAGE + b"2" * PAGE


async def test_a_pass_that_waits_for_a_parked_read_serves_it_and_goes_round_again() -> None:
    """The kernel holds the page's lock until the READ is answered."""
    async with cluster() as c:
        node = await prepared(c)
        node.table._recaller._parked_s_max = 0.01
        locked = trio.Event()

        async def tainting(ino: int, offset: int, length: int) -> None:
            await node.read(FILE, 0, PAGE)

        async def wait_for_page(ino: int, offset: int, length: int) -> None:
            async def read() -> None:
                assert await node.read(FILE, 2 * PAGE, PAGE) == b"o" * PAGE
                locked.set()

            c.nursery.start_soon(read)
            await locked.wait()

        node.kernel.during = [tainting, wait_for_page]
        with trio.fail_after(60):
            await node.table.recall(FILE, 0, False)
        pages = [entry for entry in node.kernel.log if entry[0] == "pages"]
        assert pages[-1] == ("pages", FILE, 2 * PAGE, PAGE)


async def test_a_recall_to_read_lets_pages_be_read_but_nothing_written() -> None:
    async with cluster() as c:
        node = await prepared(c)
        answer = await node.table.recall(FILE, 2, False)
        assert answer["kind"] == 2 and answer["size"] == 4 * PAGE
        assert node.table.read_nowait(FILE, 0, PAGE) == b"o" * PAGE
        assert not node.table.write_nowait(FILE, 0, memoryview(bytes(PAGE)), 0, pytest.fail)


async def test_a_recall_of_attributes_alone_leaves_the_lease() -> None:
    async with cluster() as c:
        node = await prepared(c)
        stamp = node.table.stamp()
        answer = await node.table.recall(FILE, 3, True)
        assert answer["kind"] == 3 and node.table.recalled_since(FILE, stamp)
        assert node.kernel.log == [("attr", FILE)]
        assert node.table.read_nowait(FILE, 0, PAGE) is not None


async def test_I5_a_kernel_that_does_not_know_the_inode_yet_is_told_until_it_does_before_the_answer() -> None:
    """Its program has not had its turn since the reply to its lookup: it would keep the attributes of that for ever."""
    for kind, attr in ((1, False), (3, True)):
        async with cluster() as c:
            node = await prepared(c)
            node.table.set_given(lambda ino: ino == FILE)
            node.kernel.unknown = {FILE: 5}
            await node.table.recall(FILE, kind, attr)
            assert node.kernel.unknown == {FILE: 0} and node.kernel.log[-1] == ("attr", FILE)


async def test_an_inode_that_the_kernel_was_never_given_or_has_given_back_is_not_waited_for() -> None:
    async with cluster() as c:
        node = await prepared(c)
        node.kernel.unknown = {FILE: 1 << 30}
        with trio.fail_after(30):
            await node.table.recall(FILE, 1, False)


async def test_an_open_file_is_kept_as_open() -> None:
    async with cluster() as c:
        node = await prepared(c)
        await node.table.open(FILE, writing=False)
        assert (await node.table.recall(FILE, 0, False))["kind"] == 1
        assert node.table.holds(FILE) == 1


async def test_a_recall_of_what_is_not_known_is_answered_and_remembered() -> None:
    async with cluster() as c:
        node = c.node("n1")
        stamp = node.table.stamp()
        assert (await node.table.recall(99, 0, False))["kind"] == 0
        assert node.table.recalled_since(99, stamp) and not node.table.recalled_since(98, stamp)


async def test_the_same_recall_sent_again_after_a_lost_answer_gets_the_same_report() -> None:
    async with cluster() as c:
        node = await prepared(c)
        await node.write(FILE, 0, b"n" * PAGE)
        first = await node.table.recall(FILE, 0, False)
        assert await node.table.recall(FILE, 0, False) == first


async def test_a_read_that_lacks_layout_does_not_wait_for_a_recall_that_waits_for_its_page() -> None:
    async with cluster() as c:
        node = await prepared(c)
        other = c.node("n2")
        state = node.table.leases.states[FILE]
        state.extents.forget(0)

        async def page_locked(ino: int, offset: int, length: int) -> None:
            state.extents.forget(0)
            assert await node.read(FILE, 0, PAGE) == b"o" * PAGE

        node.kernel.during = [page_locked]
        with trio.fail_after(60):
            await other.write(FILE, 0, b"2" * PAGE)


async def test_two_readers_who_both_begin_to_write_through_their_caches_do_not_hang() -> None:
    """Each one's WRITE keeps its page locked while the other's lease recalls it."""
    async with cluster() as c:
        await prepared(c)
        (_, one), (_, two) = c.caching_node("n2"), c.caching_node("n3")
        for kernel in (one, two):
            for page in range(4):
                await kernel.read_page(FILE, page)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for page in range(4):
                    nursery.start_soon(one.write_page, FILE, page, b"1" * PAGE)
                    nursery.start_soon(two.write_page, FILE, page, b"2" * PAGE)
        await settle()
        for page in range(4):
            assert await one.read_page(FILE, page) == await two.read_page(FILE, page)


async def test_pages_dirtied_by_mmap_under_a_read_lease_do_not_hang_a_recall() -> None:
    async with cluster() as c:
        await prepared(c)
        (_, one), (two, _) = c.caching_node("n2"), c.caching_node("n3")
        await one.map_page(FILE, 1, b"m" * PAGE)
        with trio.fail_after(60):
            await two.write(FILE, 0, b"2" * PAGE)
        await settle()
        assert await two.read(FILE, 0, 2 * PAGE) == b"2" * PAGE + b"m" * PAGE


async def test_a_truncation_that_waits_for_the_coordinator_does_not_hang_a_recall() -> None:
    """During it the kernel writes no dirty page back, and the coordinator wants the recall answered first."""
    async with cluster() as c:
        node = await prepared(c)
        node.table._recaller._parked_s_max = 0.01
        node.kernel.block()
        other = c.node("n2")
        c.coordinator.delay = 20

        async def truncate() -> None:
            await node.table.truncate(FILE, {"size": 3 * PAGE, "mtime_ns": 1})
            node.kernel.unblock()

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other.write, FILE, 0, b"2" * PAGE)
                while not c.coordinator.table.recalls_of(node.session.key):
                    await trio.lowlevel.checkpoint()
                nursery.start_soon(truncate)
        await settle()
        assert len(await node.read(FILE, 0, 1 << 20)) == 3 * PAGE


def test_ranges_are_merged_and_cut() -> None:
    assert recall_module._merged([(10, 5), (0, 4), (4, 2), (12, 1)]) == [(0, 6), (10, 5)]
    assert recall_module.without([(0, 0)], [(4, 6), (10, 12)]) == [(0, 4), (6, 4), (12, 0)]
    assert recall_module.without([(0, 5), (8, 4)], [(4, 9)]) == [(0, 4), (9, 3)]
    assert recall_module.without([(0, 5)], [(0, 9)]) == []


# -- coherence, with all at once


class History:
    """Versions of pages: a read must return the value of a write that no other one had replaced before the
    read."""

    def __init__(self) -> None:
        self.clock = itertools.count(1)
        self.writes: dict[int, list[list]] = {}  # page -> [begin, end or inf, value]

    def begin(self, page: int, value: bytes) -> list:
        entry = [next(self.clock), float("inf"), value]
        self.writes.setdefault(page, []).append(entry)
        return entry

    def end(self, entry: list) -> None:
        entry[1] = next(self.clock)

    def check(self, page: int, value: bytes, began: int, ended: int) -> None:
        for begin, end, written in self.writes[page]:
            if written == value and begin < ended:
                replaced = [w for w in self.writes[page] if w[0] > end and w[1] < began]
                assert not replaced, f"page {page} read {value[:8]!r}, replaced by {replaced} before"
                return
        raise AssertionError(f"page {page}: nobody wrote {value[:8]!r}")


class Programs:
    """What runs on the nodes: reads and writes of whole pages, through the page cache or around it."""

    def __init__(self, nodes: list[tuple[Node, CachingKernel]]) -> None:
        self.nodes = nodes
        self.history = History()
        self.serial = itertools.count(1)

    async def run(self, steps: list[tuple]) -> None:
        for name, who, page in steps:
            node, kernel = self.nodes[who]
            began = next(self.history.clock)
            if name in ("read", "direct read"):
                if name == "read":
                    value = await kernel.read_page(FILE, page)
                else:
                    value = await node.read(FILE, page * PAGE, PAGE)
                self.history.check(page, value, began, next(self.history.clock))
            elif name == "write":
                value = (b"%07d " % next(self.serial)) * (PAGE // 8)
                entry = self.history.begin(page, value)
                await kernel.write_page(FILE, page, value)
                self.history.end(entry)
            elif name == "direct write":
                value = (b"%07d " % next(self.serial)) * (PAGE // 8)
                async with kernel.inode_lock:
                    entry = self.history.begin(page, value)
                    await node.write(FILE, page * PAGE, value)
                    async with kernel._lock(FILE, page):  # as direct I/O does
                        kernel.pages.pop((FILE, page), None)
                self.history.end(entry)
            elif name == "map":
                value = (b"%07d " % next(self.serial)) * (PAGE // 8)
                self.history.begin(page, value)  # and never ends: nobody is told when it is seen where
                await kernel.map_page(FILE, page, value)
            elif name == "sync":
                await kernel.sync_page(FILE, page)
            elif name == "truncate":
                async with kernel.inode_lock:
                    await node.table.truncate(FILE, {"size": 3 * PAGE, "mtime_ns": 1})


steps = st.lists(
    st.tuples(
        st.sampled_from(["read", "read", "direct read", "write", "direct write"]),
        st.integers(0, 1),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, min_size=2, max_size=4), st.integers(0, 3), st.booleans())
def test_I5_no_program_on_any_node_reads_a_page_that_was_replaced_before(
    programs: list, delay: int, local: bool
) -> None:
    async def play() -> None:
        async with cluster() as c:
            c.coordinator.add_file(FILE)
            c.coordinator.delay = delay
            nodes = [c.caching_node("n1"), c.caching_node("n2")]
            nodes[0][0].bus.local = local
            run = Programs(nodes)
            for page in range(3):
                await run.run([("write", 0, page)])
            async with trio.open_nursery() as nursery:
                for program in programs:
                    nursery.start_soon(run.run, program)
            await settle()
            for page in range(3):
                await run.run([("read", 0, page), ("read", 1, page)])
                pages = {await kernel.read_page(FILE, page) for _, kernel in nodes}
                assert len(pages) == 1

    trio.run(play)


mixed_steps = st.lists(
    st.tuples(
        st.sampled_from(["direct write", "write", "map", "map", "sync", "truncate"]),
        st.integers(0, 1),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(mixed_steps, min_size=2, max_size=4), st.integers(0, 3))
def test_mmapped_writes_and_truncations_among_all_others_never_hang(programs: list, delay: int) -> None:
    async def play() -> None:
        async with cluster() as c:
            c.coordinator.add_file(FILE)
            c.coordinator.delay = delay
            nodes = [c.caching_node("n1"), c.caching_node("n2")]
            for node, _ in nodes:
                node.table._recaller._parked_s_max = 0.002
            run = Programs(nodes)
            for page in range(3):
                await run.run([("write", 0, page)])
            async with trio.open_nursery() as nursery:
                for program in programs:
                    nursery.start_soon(run.run, program)
            for page in range(3):
                await run.run([("sync", 0, page), ("sync", 1, page)])
            await settle()
            for page in range(3):
                assert await nodes[0][0].read(FILE, page * PAGE, PAGE) in [
                    w[2] for w in run.history.writes[page]
                ]

    trio.run(play)
