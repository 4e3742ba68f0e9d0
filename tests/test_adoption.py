"""A mount process goes on for one that was evicted: what its kernel may still show, what it may write, what it may hold."""

import trio

from csvfs.errors import CsvfsError
from csvfs.mount import inode_rows
from csvfs.mount.inode_rows import InodeRows, Row, rows_in
from tests.mount_nodes import PAGE, CachingKernel, Cluster, Node, cluster

FILE, OTHER, DIRECTORY = 7, 8, 9
OPEN, READ, WRITE = 1, 2, 3


class Kernel(CachingKernel):
    """Write-back that fails is told to whoever syncs."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    async def _write_back(self, ino: int, page: int) -> None:
        try:
            await super()._write_back(ino, page)
        except CsvfsError as error:
            self.errors.append(str(error))


def row(ino: int, kind: int, opens: int = 1, *, barred: bool = False) -> Row:
    return Row(ino, 1, opens, opens, kind, False, False, barred)


def node_of(c: Cluster, name: str, kernel: CachingKernel) -> Node:
    kernel.node = Node(name, c.coordinator, c.drives, c.nursery, kernel, {})
    return kernel.node


async def evicted(c: Cluster) -> Kernel:
    """The kernel of a mount that held FILE for writing, with a page that a program has dirtied, and was evicted."""
    kernel = Kernel()
    c.coordinator.add_file(FILE)
    node = node_of(c, "n1", kernel)
    await node.table.open(FILE, True)
    await node.write(FILE, 0, b"a" * (2 * PAGE))
    await kernel.map_page(FILE, 0, b"m" * PAGE)
    c.coordinator.perform(c.coordinator.table.end_session(node.session.key)[1])
    return kernel


def adopt(c: Cluster, kernel: Kernel, *rows: Row, refused: tuple[int, ...] = ()) -> Node:
    """The next process; the coordinator gives it what it claims, but for `refused`."""
    node = node_of(c, "n1", kernel)
    node.table.take_over(list(rows))
    node.table.adopted([])
    for ino, kind, _, _ in node.table.claims():
        c.coordinator.table.reclaim(node.session.key, ino, OPEN if ino in refused else kind)
    node.table.refused(list(refused), are_open=True)
    node.table.inheritance.resent()
    return node


async def until(condition) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.001)


async def test_pages_dirtied_before_are_not_written_over_what_another_node_has_written_since():
    async with cluster() as c:
        kernel = await evicted(c)
        other = c.node("n2")
        await other.write(FILE, 0, b"b" * (2 * PAGE))
        node = adopt(c, kernel, row(FILE, WRITE), refused=(FILE,))
        await until(lambda: not kernel.dirty and not node.table.leases.states[FILE].lost)
        assert kernel.errors and await kernel.read_page(FILE, 0) == b"b" * PAGE
        assert await other.read(FILE, 0, 2 * PAGE) == b"b" * (2 * PAGE)
        assert node.table.inheritance.refuses(FILE)
        await kernel.map_page(FILE, 1, b"n" * PAGE)  # what is stored from now on is as ever
        await kernel.sync_page(FILE, 1)
        assert await other.read(FILE, 0, 2 * PAGE) == b"b" * PAGE + b"n" * PAGE


async def test_pages_dirtied_before_are_written_where_nobody_else_has_written():
    async with cluster() as c:
        kernel = await evicted(c)
        node = adopt(c, kernel, row(FILE, WRITE))
        assert not node.table.inheritance.refuses(FILE)
        await kernel.sync_page(FILE, 0)
        assert not kernel.errors
        assert await c.node("n2").read(FILE, 0, 2 * PAGE) == b"m" * PAGE + b"a" * PAGE


async def test_I5_nothing_that_was_cached_under_a_read_lease_is_kept():
    async with cluster() as c:
        c.coordinator.add_file(FILE)
        await c.node("n2").write(FILE, 0, b"a" * PAGE)
        kernel = Kernel()
        first = node_of(c, "n1", kernel)
        assert await kernel.read_page(FILE, 0) == b"a" * PAGE
        c.coordinator.perform(c.coordinator.table.end_session(first.session.key)[1])
        node = adopt(c, kernel, row(FILE, READ), row(OTHER, READ, opens=0), row(DIRECTORY, READ, opens=0))
        assert ("epoch",) in kernel.log
        assert [claim[:2] for claim in node.table.claims()] == [[FILE, OPEN]]  # what is open stays so
        await until(lambda: not kernel.pages)
        assert {("attr", ino) for ino in (FILE, OTHER, DIRECTORY)} <= set(kernel.log)


async def test_a_file_that_was_open_without_a_lease_is_claimed_as_open():
    async with cluster() as c:
        node = adopt(c, Kernel(), row(FILE, 0))
        assert [claim[:2] for claim in node.table.claims()] == [[FILE, OPEN]]


async def test_what_is_refused_and_not_open_is_given_back():
    async with cluster() as c:
        c.coordinator.add_file(FILE)
        node = adopt(c, Kernel(), row(FILE, WRITE, opens=0), refused=(FILE,))
        await until(lambda: not node.table.leases.states[FILE].lost)
        await node.table.release_unused()
        assert not c.coordinator.table.is_held(FILE)


async def test_what_is_open_of_an_inode_whose_locks_are_lost_is_barred_and_nothing_else():
    async with cluster() as c:
        node = node_of(c, "n1", Kernel())
        node.table.take_over([row(FILE, WRITE, opens=2), row(OTHER, WRITE)])
        node.table.adopted([FILE, DIRECTORY])
        assert node.table.barred.opens == {FILE: 2}


async def test_where_nobody_knows_which_locks_are_lost_all_that_is_open_is_barred():
    async with cluster() as c:
        node = node_of(c, "n1", Kernel())
        node.table.take_over([row(FILE, WRITE, opens=2), row(OTHER, WRITE), row(DIRECTORY, READ, opens=0)])
        node.table.adopted(None)
        assert node.table.barred.opens == {FILE: 2, OTHER: 1}


async def test_what_is_barred_stays_so_when_this_process_is_followed_by_another():
    async with cluster() as c:
        node = node_of(c, "n1", Kernel())
        node.table.take_over([row(FILE, WRITE, opens=2, barred=True), row(OTHER, WRITE)])
        assert node.table.barred.opens == {FILE: 2}


def test_the_record_says_what_is_barred_until_it_is_closed():
    words = memoryview(bytearray(8 * inode_rows.WORDS)).cast("Q")
    table = InodeRows(words)
    table.opened(FILE, True)
    table.barred(FILE, True)
    table.remove(FILE)
    assert [one.barred for one in rows_in(words)] == [True]
    table.barred(FILE, False)
    assert [one.barred for one in rows_in(words)] == [False]
    table.opened(FILE, True, -1)
    assert rows_in(words) == []
