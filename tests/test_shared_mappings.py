"""Files mapped shared and writable on several nodes: stores that FUSE hears nothing of, until pages come back."""

import errno
import itertools

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from csvfs.errors import CsvfsError
from tests.mount_nodes import PAGE, CachingKernel, Cluster, Node, cluster

FILE = 5
PAGES = 2
HALF = PAGE // 2


async def settle() -> None:
    for _ in range(60):
        await trio.lowlevel.checkpoint()


async def prepared(c: Cluster) -> Node:
    """A node that has written the file and gone."""
    c.coordinator.add_file(FILE)
    node = c.node("n0")
    await node.write(FILE, 0, b"o" * (PAGE * PAGES))
    return node


class Halves:
    """Every half page is a register; a completed store or write must be seen by every later read, anywhere."""

    def __init__(self) -> None:
        self.clock = itertools.count(1)
        self.values = itertools.count(1)
        self.writes: dict[tuple[int, int], list[list]] = {}  # [begin, end or inf, value]

    def begin(self, page: int, half: int) -> list:
        value = (b"%07d " % next(self.values)) * (HALF // 8)
        entry = [next(self.clock), float("inf"), value]
        self.writes.setdefault((page, half), []).append(entry)
        return entry

    def end(self, entry: list) -> None:
        entry[1] = next(self.clock)

    def check(self, page: int, content: bytes, began: int) -> None:
        ended = next(self.clock)
        for half in (0, 1):
            value = content[half * HALF : (half + 1) * HALF]
            writes = self.writes[page, half]
            found = [w for w in writes if w[2] == value and w[0] < ended]
            assert found, f"page {page} half {half}: nobody wrote {value[:8]!r}"
            replaced = [w for w in writes if w[0] > found[0][1] and w[1] < began]
            assert not replaced, (
                f"page {page} half {half} reads {value[:8]!r}, replaced by {replaced[0][2][:8]!r}"
            )


async def run_program(node: Node, kernel: CachingKernel, halves: Halves, sessions: list, told: bool) -> None:
    """Each session opens, does its steps, unmaps and closes. Not `told`: the mount takes all for readers."""
    for writing, steps in sessions:
        await run_session(node, kernel, halves, writing, steps, told)


async def run_session(
    node: Node, kernel: CachingKernel, halves: Halves, writing: bool, steps: list, told: bool
) -> None:
    """What was opened for reading is only read."""
    await node.table.open(FILE, writing and told)
    try:
        for step, page, half in steps:
            if step == "sync":
                await kernel.sync_page(FILE, page)
            elif step == "read" or not writing:
                began = next(halves.clock)
                halves.check(page, await kernel.read_page(FILE, page), began)
            else:
                entry = halves.begin(page, half)
                store = kernel.map_part if step == "map" else kernel.write_part
                await store(FILE, page, half * HALF, entry[2])
                halves.end(entry)
    finally:
        await kernel.close_mapping(FILE)
        node.table.closed(FILE, writing and told)


steps = st.lists(
    st.tuples(
        st.sampled_from(["read", "map", "map", "write", "write", "sync"]),
        st.integers(0, PAGES - 1),
        st.integers(0, 1),
    ),
    min_size=1,
    max_size=6,
)
sessions = st.lists(st.tuples(st.sampled_from([True, True, False]), steps), min_size=1, max_size=3)
programs = st.lists(st.tuples(st.integers(0, 2), sessions), min_size=2, max_size=5)


async def play(programs: list, delay: int, told: bool = True) -> None:
    async with cluster() as c:
        c.coordinator.add_file(FILE)
        c.coordinator.delay = delay
        nodes = [c.caching_node(name) for name in ("n1", "n2", "n3")]
        for node, _ in nodes:
            node.table._recaller._parked_s_max = 0.002
        halves = Halves()
        for page in range(PAGES):
            entries = [halves.begin(page, half) for half in (0, 1)]
            await nodes[2][0].write(FILE, page * PAGE, b"".join(entry[2] for entry in entries))
            for entry in entries:
                halves.end(entry)
        async with trio.open_nursery() as nursery:
            for who, program in programs:
                node, kernel = nodes[who]
                nursery.start_soon(run_program, node, kernel, halves, program, told)
        await settle()
        for (node, kernel), page in itertools.product(nodes, range(PAGES)):
            began = next(halves.clock)
            halves.check(page, await kernel.read_page(FILE, page), began)
            halves.check(page, await node.read(FILE, page * PAGE, PAGE), began)


@settings(max_examples=300, deadline=None)
@given(programs, st.integers(0, 3))
def test_no_write_of_any_node_is_lost_to_a_page_that_was_dirtied_by_mmap(programs: list, delay: int) -> None:
    trio.run(play, programs, delay)


def test_the_history_notices_when_the_mount_is_not_told_that_a_file_is_open_for_writing() -> None:
    """n1 dirties a page that it may only read, n2 writes its other half, n1's page is written back over that."""

    def is_lost(reads: int) -> bool:
        one = [("read", 0, 0), ("read", 0, 0), ("map", 0, 0), *[("read", 1, 0)] * reads]
        two = [*[("read", 0, 0)] * reads, ("write", 0, 1)]
        lost = False
        try:
            trio.run(play, [(0, [(True, one)]), (1, [(True, two)])], 1, False)
        except* AssertionError:
            lost = True
        return lost

    assert any(is_lost(reads) for reads in range(1, 20))


async def test_opening_for_writing_costs_one_call_where_pages_may_be_cached_and_none_for_a_new_file() -> None:
    async with cluster() as c:
        await prepared(c)
        node = c.node("n1")
        assert await node.read(FILE, 0, 4) == b"oooo"
        c.coordinator.calls.clear()
        await node.table.open(FILE, writing=False)
        assert c.coordinator.calls == []
        await node.table.open(FILE, writing=True)
        assert c.coordinator.names() == ["acquire"] and node.table.holds(FILE) == 3
        await node.table.open(FILE, writing=True)
        assert await node.read(FILE, 0, 4) == b"oooo"
        assert c.coordinator.names() == ["acquire"]


async def test_a_file_open_for_writing_is_read_under_the_write_lease_and_given_back_whole() -> None:
    async with cluster() as c:
        await prepared(c)
        node, other = c.node("n1"), c.node("n2")
        await node.table.open(FILE, writing=True)
        assert await node.read(FILE, 0, 4) == b"oooo"
        assert node.table.holds(FILE) == 3
        assert await other.read(FILE, 0, 4) == b"oooo"
        assert node.table.holds(FILE) == 1, "recalled to READ, but its pages may be mapped for writing"
        assert ("pages", FILE, 0, 0) in node.kernel.log
        node.table.closed(FILE, writing=True)
        assert await node.read(FILE, 0, 4) == b"oooo"
        assert node.table.holds(FILE) == 2, "closed: both read"
        assert other.table.holds(FILE) == 2


async def test_a_file_opened_for_writing_during_a_recall_to_read_keeps_no_pages() -> None:
    async with cluster() as c:
        node = await prepared(c)
        other = c.node("n2")

        async def open_meanwhile(ino: int, offset: int, length: int) -> None:
            await node.table.open(FILE, writing=True)

        node.kernel.during = [open_meanwhile]
        assert await other.read(FILE, 0, 4) == b"oooo"
        assert node.table.holds(FILE) == 1
        assert node.kernel.log.count(("pages", FILE, 0, 0)) >= 2


async def test_a_read_that_waits_for_the_write_lease_with_its_page_locked_does_not_hang_a_recall() -> None:
    async with cluster() as c:
        await prepared(c)
        (one, kernel), (two, _) = c.caching_node("n1"), c.caching_node("n2")
        await kernel.read_page(FILE, 0)
        await two.read(FILE, 0, 1)
        c.coordinator.delay = 5
        async with trio.open_nursery() as nursery:  # both hold READ and want WRITE
            nursery.start_soon(two.write, FILE, 0, b"2")
            nursery.start_soon(one.table.open, FILE, True)
            nursery.start_soon(kernel.map_part, FILE, 1, 0, b"1")
        await settle()
        assert await two.read(FILE, 0, 1) == b"2" and await two.read(FILE, PAGE, 1) == b"1"


async def test_a_read_does_not_fill_a_page_with_what_a_write_under_way_replaces() -> None:
    """Its page was dropped meanwhile; with the old bytes it would stay behind the new ones on the drives."""
    async with cluster() as c:
        await prepared(c)
        node = c.node("n1")
        node.bus.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.buffered_write, FILE, 0, b"n" * 100)
            await settle()
            assert node.table.read_nowait(FILE, 0, PAGE) is None
            content: list[bytes] = []

            async def read() -> None:
                content.append(await node.read(FILE, 0, PAGE))

            nursery.start_soon(read)
            assert await node.read(FILE, PAGE, 4) == b"oooo", "others do not wait"
            await settle()
            assert content == []
            node.bus.let_go()
        assert content[0][:101] == b"n" * 100 + b"o"


async def test_a_page_dirtied_under_a_lease_that_was_lost_is_not_written_over_what_others_wrote() -> None:
    """A node that could not serve for a while: its pages are older than what the next holder wrote."""
    async with cluster() as c:
        await prepared(c)
        (one, kernel), (two, _) = c.caching_node("n1"), c.caching_node("n2")
        await one.table.open(FILE, writing=True)
        await kernel.map_part(FILE, 0, 0, b"m" * HALF)
        c.coordinator.perform(c.coordinator.table.end_session(one.session.key)[1])
        await two.write(FILE, HALF, b"2" * HALF)
        refused: list[CsvfsError] = []

        async def write_back(ino: int, page: int) -> None:
            try:
                await one.write(ino, page * PAGE, kernel.dirty.pop((ino, page)), flags=1)
            except CsvfsError as error:
                refused.append(error)

        kernel._write_back = write_back  # type: ignore[method-assign]
        one.table.refused([FILE])
        await settle()
        assert [error.posix_errno for error in refused] == [errno.EIO]
        assert await two.read(FILE, 0, PAGE) == b"o" * HALF + b"2" * HALF
        await kernel.map_part(FILE, 0, 0, b"n" * HALF)
        assert await two.read(FILE, 0, PAGE) == b"n" * HALF + b"2" * HALF
