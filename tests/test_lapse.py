"""A mount that may not serve: the kernel must not show what it has cached, either (I5)."""

import trio

from tests.mount_nodes import Cluster, Node, cluster
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
