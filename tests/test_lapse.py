"""A mount that may not serve: the kernel must not show what it has cached, either (I5)."""

import stat

import pytest
import trio

from csvfs.errors import Fenced
from csvfs.mount.file_state import INO, MODE
from csvfs.mount.file_state import LEASE_READ as READ
from tests.mount_nodes import CachingKernel, Cluster, FakeKernel, Node, cluster
from tests.test_file_table import BLOCK, FILE, settle


async def reading(c: Cluster) -> tuple[Node, Node]:
    """A node whose kernel has the first pages of a file cached, and another one."""
    c.coordinator.add_file(FILE)
    other = c.node("n2")
    await other.write(FILE, 0, b"a" * (4 * BLOCK))
    node, kernel = c.caching_node("n1")
    c.nursery.start_soon(node.table.run_forever)
    for page in range(3):
        assert await kernel.read_page(FILE, page) == b"a" * BLOCK
    assert len(kernel.pages) == 3
    await trio.sleep(0.12)  # its guard has been seen serving
    return node, other


async def gone(node: Node) -> None:
    with trio.fail_after(30):
        while node.kernel.pages:
            await trio.sleep(0.01)


async def test_I5_pages_of_a_node_whose_lease_has_run_out_are_dropped_before_it_is_there_again() -> None:
    async with cluster() as c:
        node, _ = await reading(c)
        node.alive = False
        await gone(node)
        assert ("epoch",) in node.kernel.log
        node.alive = True
        assert await node.kernel.read_page(FILE, 0) == b"a" * BLOCK


async def test_I5_pages_of_a_node_that_does_not_hear_its_coordinator_are_dropped_and_it_goes_on() -> None:
    async with cluster() as c:
        node, _ = await reading(c)
        held = node.table.holds(FILE)
        node.guard._contact_until_ns = 0
        await gone(node)
        assert node.table.holds(FILE) == held  # it was not evicted, as far as anybody knows
        node.guard.contact(1 << 62)
        c.coordinator.calls.clear()
        assert await node.kernel.read_page(FILE, 1) == b"a" * BLOCK
        assert c.coordinator.calls == []


async def test_I5_a_page_that_is_being_read_holds_up_no_other_and_goes_behind_its_answer() -> None:
    async with cluster() as c:
        node, _ = await reading(c)
        node.bus.local, node.bus.delay = False, 10_000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.kernel.read_page, FILE, 3)
            await settle()
            assert node.kernel.locks[FILE, 3].locked()
            node.alive = False
            with trio.fail_after(30):
                while {page for _, page in node.kernel.pages} & {0, 1, 2}:
                    await trio.sleep(0.01)
            node.alive = True
        await gone(node)


async def test_I5_nothing_that_was_learned_before_a_lapse_is_cached_by_the_kernel_behind_it() -> None:
    async with cluster() as c:
        node, _ = await reading(c)
        stamp = node.table.stamp()
        node.alive = False
        await gone(node)
        assert node.table.recalled_since(FILE, stamp) and not node.table.may_answer(FILE)


class AskedMeanwhile(CachingKernel):
    """Just as the kernel's caches are emptied, a program asks for a page that is not cached."""

    page: tuple[int, int] | None = None

    async def invalidate_pages(self, ino: int, offset: int, length: int) -> None:
        page, self.page = self.page, None
        if page is not None:
            self.nursery.start_soon(self.read_page, *page)
            await settle()
            assert self.locks[page].locked()
        await super().invalidate_pages(ino, offset, length)

    nursery: trio.Nursery


async def test_I5_a_page_that_is_asked_for_meanwhile_holds_up_no_other_and_then_it_is_said_that_nothing_is_shown() -> None:
    async with cluster() as c:
        c.coordinator.add_file(FILE)
        await c.node("n2").write(FILE, 0, b"a" * (4 * BLOCK))
        kernel, said = AskedMeanwhile(), []
        kernel.nursery = c.nursery
        node = kernel.node = Node("n1", c.coordinator, c.drives, c.nursery, kernel, {"on_emptied": said.append})
        c.nursery.start_soon(node.table.run_forever)
        for page in (1, 2, 3):
            await kernel.read_page(FILE, page)
        await trio.sleep(0.12)  # its guard has been seen serving
        kernel.page = FILE, 0
        node.alive = False
        with trio.fail_after(30):
            while said != [True]:
                await trio.sleep(0.01)
        assert not kernel.pages and kernel.locks[FILE, 0].locked()
        node.alive = True
        with trio.fail_after(30):
            while said != [True, False]:
                await trio.sleep(0.01)


async def test_I5_a_page_whose_read_ends_with_the_eviction_of_the_mount_holds_up_no_other() -> None:
    """Nobody answers it before the next process does, so the kernel keeps it locked."""
    async with cluster() as c:
        node, _ = await reading(c)
        fenced = trio.Event()

        async def evicted(*_: object) -> None:
            fenced.set()
            raise Fenced("evicted")

        async def read() -> None:
            async with node.kernel._lock(FILE, 3):
                with pytest.raises(Fenced):
                    await node.table.read(FILE, 3 * BLOCK, BLOCK)
                await trio.sleep_forever()

        node.bus.local = False
        node.bus.read = evicted  # type: ignore[method-assign,assignment]
        c.nursery.start_soon(read)
        await fenced.wait()
        await settle()
        node.guard.close()
        with trio.fail_after(30):
            await node.table.empty()
        assert not node.kernel.pages
        assert ("pages", FILE, 4 * BLOCK, 0) in node.kernel.log  # behind the one that is locked


async def test_I5_a_symbolic_link_that_is_being_read_holds_up_nothing_when_leases_are_taken_back_or_lost() -> None:
    """The kernel caches where it leads to, and keeps that page locked while nobody answers READLINK."""
    async with cluster() as c:
        node, _ = await reading(c)
        said: list[bool] = []
        node.table._lapse._on_emptied = said.append
        link = FILE + 1
        attr = await node.table.getattr(FILE)
        attr[INO], attr[MODE] = link, stat.S_IFLNK | 0o777
        node.table.granted(link, READ, attr, node.table.stamp())
        async with node.kernel._lock(link, 0):
            node.alive = False
            with trio.fail_after(30):
                while said != [True]:
                    await trio.sleep(0.01)
            assert not node.kernel.pages
            node.alive = True
            with trio.fail_after(30):
                assert (await node.table.recall(link, 0, False))["kind"] == 0
                node.table.granted(link, READ, attr, node.table.stamp())
                assert await node.kernel.read_page(FILE, 0) == b"a" * BLOCK
                node.table.refused([link, FILE])
                await gone(node)


async def test_I5_what_is_emptied_too_late_is_not_said_to_show_nothing() -> None:
    async with cluster() as c:
        node, _ = await reading(c)
        said: list[bool] = []
        node.table._lapse._on_emptied = said.append
        node.kernel.blocked = trio.Event()
        node.kernel.invalidate_pages = FakeKernel.invalidate_pages.__get__(node.kernel)  # type: ignore[method-assign]
        node.guard._contact_until_ns = 0
        await trio.sleep(0.2)
        node.table.serves_again()
        node.guard.contact(1 << 62)
        node.kernel.unblock()
        await trio.sleep(0.2)
        assert said == [False]
