"""Set-uid and set-gid bits before writes that may not keep them: when they are looked for, and what becomes of them."""

import stat

import pytest

from csvfs.mount.set_id import mode_after_write
from tests.mount_nodes import cluster

FILE = 5
BLOCK = 4096


@pytest.mark.parametrize(
    ("before", "after"),
    [(0o6755, 0o755), (0o4644, 0o644), (0o2755, 0o755), (0o2744, 0o2744), (0o6644, 0o2644), (0o1777, 0o1777)],
)
def test_set_uid_goes_and_set_gid_where_the_group_may_execute(before: int, after: int) -> None:
    assert mode_after_write(stat.S_IFREG | before) == stat.S_IFREG | after


async def test_a_file_without_such_bits_costs_no_call() -> None:
    async with cluster() as c:
        c.coordinator.add_file(FILE, stat.S_IFREG | 0o2744)
        node = c.node("n1")
        assert node.table.set_id_is_due(FILE)  # nothing is known of it yet
        await node.write(FILE, 0, bytes(BLOCK))
        c.coordinator.calls.clear()
        assert not node.table.set_id_is_due(FILE)
        assert c.coordinator.calls == []


@pytest.mark.parametrize("under_lease", [True, False])
async def test_bits_are_gone_everywhere_once_they_are_cleared(under_lease: bool) -> None:
    async with cluster() as c:
        c.coordinator.add_file(FILE, stat.S_IFREG | 0o6777)
        node, other = c.node("n1"), c.node("n2")
        if under_lease:
            await node.write(FILE, 0, bytes(BLOCK))
        assert node.table.set_id_is_due(FILE)
        await node.table.clear_set_id(FILE)
        assert stat.S_IMODE((await other.table.getattr(FILE))[1]) == 0o777
        assert stat.S_IMODE((await node.table.getattr(FILE))[1]) == 0o777
        assert ("attr", FILE) in node.kernel.log
        await node.write(FILE, 0, bytes(BLOCK))
        assert not node.table.set_id_is_due(FILE)
