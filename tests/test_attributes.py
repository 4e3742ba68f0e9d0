"""Attributes that this mount knows, after changes of its own whose replies do not tell them."""

from typing import Any

import trio

from csvfs.mount.file_state import CTIME, MTIME, NLINK, SIZE
from csvfs.mount.operations import VolumeOperations
from tests.memory_volume import MemoryVolume
from tests.mount_nodes import Cluster, Node, cluster
from tests.test_operations import CONTEXT, ROOT, make_file

FILE = 5


async def known(c: Cluster) -> Node:
    """A node that knows the file's attributes under a read lease."""
    c.coordinator.add_file(FILE)
    node = c.node("n1")
    await node.table.getattr(FILE)
    await node.table.getattr(FILE)
    assert c.coordinator.names() == ["getattr"]
    return node


async def test_after_an_own_change_the_coordinator_is_asked_once() -> None:
    async with cluster() as c:
        node = await known(c)
        c.coordinator.files[FILE].ctime = 7777
        node.table.changed(FILE, node.table.stamp(), None)
        assert (await node.table.getattr(FILE))[CTIME] == 7777
        assert (await node.table.getattr(FILE))[CTIME] == 7777
        assert c.coordinator.names() == ["getattr", "getattr"]


async def test_an_answer_asked_for_before_the_change_does_not_count_as_showing_it() -> None:
    async with cluster() as c:
        node = await known(c)
        before, asked = c.coordinator.files[FILE].attr(), node.table.stamp()
        node.table.changed(FILE, asked, None)
        c.coordinator.files[FILE].ctime = 7777
        node.table.granted(FILE, 2, before, asked)
        assert (await node.table.getattr(FILE))[CTIME] == 7777
        assert node.table.changed_since(FILE, asked) and not node.table.changed_since(
            FILE, node.table.stamp()
        )


async def test_a_change_whose_time_is_known_is_applied_without_asking() -> None:
    async with cluster() as c:
        node = await known(c)
        node.table.changed(FILE, node.table.stamp(), 7777, entries=True, links=1)
        attr = await node.table.getattr(FILE)
        assert (attr[CTIME], attr[MTIME], attr[NLINK]) == (7777, 7777, 2)
        assert c.coordinator.names() == ["getattr"]


async def test_a_change_that_others_may_have_overtaken_is_asked_for() -> None:
    """The attributes came after the call: they may show its change already, which must not count twice."""
    async with cluster() as c:
        node = await known(c)
        asked = node.table.stamp()
        node.table.granted(FILE, 2, c.coordinator.files[FILE].attr(), asked)
        node.table.changed(FILE, asked, 7777, links=1)
        assert (await node.table.getattr(FILE))[NLINK] == 1
        assert c.coordinator.names() == ["getattr", "getattr"]


async def test_a_lookup_answered_behind_the_unlink_of_an_inode_not_known_before_is_stale() -> None:
    async with cluster() as c:
        c.coordinator.add_file(FILE)
        node = c.node("n1")
        before, asked = c.coordinator.files[FILE].attr(), node.table.stamp()
        node.table.changed(FILE, asked, None)
        node.table.granted(FILE, 2, before, asked)
        await node.table.getattr(FILE)
        assert c.coordinator.names() == ["getattr"]


async def test_size_and_time_of_a_file_being_written_stay_ours_when_its_other_attributes_are_asked() -> None:
    async with cluster() as c:
        c.coordinator.add_file(FILE)
        node = c.node("n1")
        await node.write(FILE, 0, b"x" * 5000)
        await node.write(FILE, 0, b"y" * 4096)
        mtime_ns = node.table.leases.states[FILE].mtime_ns
        c.coordinator.files[FILE].size = 1
        c.coordinator._changed(c.coordinator.files[FILE])
        node.table.changed(FILE, node.table.stamp(), None)
        attr = await node.table.getattr(FILE)
        assert (attr[SIZE], attr[MTIME]) == (5000, mtime_ns)
        await trio.lowlevel.checkpoint()


async def told(operations: VolumeOperations, volume: MemoryVolume, call: Any) -> list[tuple]:
    volume.changes.clear()
    await call
    return volume.changes


async def test_every_operation_on_names_tells_which_attributes_it_changed() -> None:
    volume = MemoryVolume()
    operations = VolumeOperations(volume, volume)
    ino = await make_file(operations, b"f")
    time_ns = volume.inodes[ino].ctime_ns
    assert volume.changes == [(ROOT, time_ns, True, 0)]
    directory = (await operations.mkdir(ROOT, b"d", 0o755, CONTEXT)).st_ino
    assert volume.changes[-1] == (ROOT, volume.inodes[directory].ctime_ns, True, 1)
    changes = await told(operations, volume, operations.link(ino, directory, b"l", CONTEXT))
    assert [change[0] for change in changes] == [directory]
    changes = await told(operations, volume, operations.rename(ROOT, b"f", directory, b"l", 0, CONTEXT))
    assert {change[0] for change in changes} == {ino, ROOT, directory}
    changes = await told(operations, volume, operations.unlink(directory, b"l", CONTEXT))
    assert changes == [(ino, None, False, -1), (directory, None, True, 0)]
    changes = await told(operations, volume, operations.rmdir(ROOT, b"d", CONTEXT))
    assert changes == [(directory, None, False, -2), (ROOT, None, True, -1)]


async def test_extended_attributes_change_the_time_of_their_inode() -> None:
    volume = MemoryVolume()
    operations = VolumeOperations(volume, volume)
    ino = await make_file(operations, b"f")
    for call in (
        operations.set_attribute(ino, b"user.a", b"v", 0),
        operations.removexattr(ino, b"user.a", CONTEXT),
    ):
        assert await told(operations, volume, call) == [(ino, None, False, 0)]
