"""Access times as relatime keeps them: when a read changes one, who is told when, and what wins."""

import pytest
import trio

from csvfs.errors import BadRequest, Unavailable
from csvfs.mount import access_times
from csvfs.mount.access_times import DAY_NS, AccessTimes
from csvfs.mount.file_state import (
    ATIME,
    ATTR_LENGTH,
    CTIME,
    LEASE_OPEN,
    LEASE_READ,
    LEASE_WRITE,
    MTIME,
    FileState,
)
from csvfs.units import BLOCK_SIZE
from tests.coordinator_cluster import TestCluster
from tests.mount_nodes import cluster

FILE = 7
NOW = 1000 * DAY_NS


class Clock:
    def __init__(self, node) -> None:
        self.now_ns = NOW
        node.table.access.clock_ns = lambda: self.now_ns


def known(atime: int, mtime: int, ctime: int, lease: int = LEASE_READ) -> FileState:
    state = FileState(FILE)
    state.lease = lease
    state.attr = [FILE] + [0] * (ATTR_LENGTH - 1)
    state.attr[ATIME], state.attr[MTIME], state.attr[CTIME] = atime, mtime, ctime
    return state


@pytest.mark.parametrize(
    ("atime", "mtime", "ctime", "is_noted"),
    [
        (NOW - 5, NOW - 9, NOW - 9, False),
        (NOW - 9, NOW - 9, NOW - 10, True),  # written since, or never read
        (NOW - 9, NOW - 20, NOW - 8, True),  # renamed since
        (NOW - DAY_NS, NOW - 2 * DAY_NS, NOW - 2 * DAY_NS, True),
        (NOW - DAY_NS + 1, NOW - 2 * DAY_NS, NOW - 2 * DAY_NS, False),
        (NOW + DAY_NS, NOW, NOW, False),  # somebody has set it to tomorrow
    ],
)
def test_a_read_changes_the_time_when_linux_does(atime, mtime, ctime, is_noted):
    access = AccessTimes(None, {}, lambda: NOW)
    state = known(atime, mtime, ctime)
    access.accessed(state)
    assert (state.atime_ns, state.atime_seen) == (NOW if is_noted else 0, True)
    assert state.attributes()[ATIME] == (NOW if is_noted else atime)


def test_nothing_is_noted_without_attributes_or_lease_or_where_it_is_switched_off():
    access = AccessTimes(None, {}, lambda: NOW)
    states = [known(1, 2, 2, LEASE_OPEN), known(1, 2, 2), known(1, 2, 2), known(1, 2, 2)]
    states[1].attr, states[2].stale, access.enabled = None, True, True
    for state in states[:3]:
        access.accessed(state)
    access.enabled = False
    access.accessed(states[3])
    assert [state.atime_ns for state in states] == [0] * 4


async def test_a_read_costs_no_call_and_all_files_read_are_told_in_one():
    async with cluster() as c:
        files = range(10, 30)
        for ino in files:
            c.coordinator.add_file(ino).size = BLOCK_SIZE
        node = c.node("n1")
        clock = Clock(node)
        for _ in range(3):
            for ino in files:
                await node.read(ino, 0, 10)
        assert "accessed" not in c.coordinator.names() and node.table.access.is_noted(10)
        assert (await node.table.getattr(10))[ATIME] == NOW
        clock.now_ns += 5
        await node.table.access.report()
        assert c.coordinator.names().count("accessed") == 1
        assert {c.coordinator.files[ino].atime for ino in files} == {NOW}
        await node.read(10, 0, 10)
        await node.table.report_times()
        assert c.coordinator.names().count("accessed") == 1 and not node.table.access.is_noted(10)
        assert (await node.table.getattr(10))[ATIME] == NOW


async def test_more_than_fit_one_call_are_told_in_several_and_what_failed_stays_noted(monkeypatch):
    monkeypatch.setattr(access_times, "ITEMS_MAX", 3)
    async with cluster() as c:
        node = c.node("n1")
        Clock(node)
        for ino in range(10, 17):
            c.coordinator.add_file(ino).size = BLOCK_SIZE
            await node.read(ino, 0, 10)
        c.coordinator.faults["accessed"] = [Unavailable("not now")]
        await node.table.access.report()
        assert all(node.table.access.is_noted(ino) for ino in range(10, 17))
        await node.table.access.report()
        assert c.coordinator.names().count("accessed") == 1 + 3
        assert [c.coordinator.files[ino].atime for ino in range(10, 17)] == [NOW] * 7


async def test_a_close_tells_it_soon_and_a_quiet_mount_after_its_interval():
    async with cluster() as c:
        c.coordinator.add_file(FILE).size = BLOCK_SIZE
        node = c.node("n1", times_s=3600.0)
        Clock(node)
        c.nursery.start_soon(node.table.run_forever)
        await node.table.open(FILE, False)
        await node.read(FILE, 0, 10)
        node.table.closed(FILE, False)
        with trio.fail_after(60):
            while c.coordinator.files[FILE].atime != NOW:
                await trio.sleep(0.01)


async def test_who_takes_the_lease_gets_the_time_with_it_and_the_writer_tells_whoever_asks():
    async with cluster() as c:
        c.coordinator.add_file(FILE).size = BLOCK_SIZE
        reader, writer = c.node("n1"), c.node("n2")
        Clock(reader)
        clock = Clock(writer)
        await reader.read(FILE, 0, 10)
        await writer.write(FILE, 0, b"x" * BLOCK_SIZE)
        assert c.coordinator.files[FILE].atime == NOW and not reader.table.access.is_noted(FILE)
        assert "accessed" not in c.coordinator.names()
        attr = await writer.table.getattr(FILE)
        assert attr[MTIME] > NOW  # by the true clock
        clock.now_ns = attr[MTIME] + 7
        await writer.read(FILE, 0, 10)
        assert writer.table.holds(FILE) == LEASE_WRITE
        assert (await reader.table.getattr(FILE))[ATIME] == clock.now_ns
        assert "accessed" not in c.coordinator.names()


async def test_a_time_set_by_hand_wins_over_reads_from_before_and_during_it():
    async with cluster() as c:
        c.coordinator.add_file(FILE).size = BLOCK_SIZE
        node = c.node("n1")
        Clock(node)
        access = node.table.access
        await node.read(FILE, 0, 10)
        with access.explicit(FILE):
            assert not access.is_noted(FILE)
        node.table.leases.states[FILE].atime_seen = False
        await node.read(FILE, 0, 10)
        c.coordinator.delay = 30
        c.nursery.start_soon(access.report)
        while not access._sent:
            await trio.sleep(0)
        with access.explicit(FILE):
            await access.answered(FILE)
            assert c.coordinator.files[FILE].atime == NOW  # it was on its way already
            node.table.leases.states[FILE].atime_seen = False
            await node.read(FILE, 0, 10)
            assert not access.is_noted(FILE)
            c.coordinator.files[FILE].atime = 5
            reply = await node.session.call("setattr", {"ino": FILE, "mode": 0o600})
            node.table.granted(FILE, reply["lease"], reply["attr"], node.table.stamp(), True)
        await access.report()
        assert c.coordinator.files[FILE].atime == 5 and not access._explicit


async def test_a_time_set_by_another_node_waits_for_what_is_on_its_way_and_wins_over_reads_from_before():
    async with cluster() as c:
        c.coordinator.add_file(FILE).size = BLOCK_SIZE
        reader, other = c.node("n1"), c.node("n2")
        Clock(reader)
        arrives, is_set = trio.Event(), trio.Event()
        accessed = c.coordinator._accessed

        async def accessed_late(session, items):
            await arrives.wait()
            return await accessed(session, items)

        async def set_time():
            await other.session.call("setattr", {"ino": FILE, "mode": 0o600})
            c.coordinator.files[FILE].atime = 5  # as the setattr would have
            is_set.set()

        c.coordinator._accessed = accessed_late
        await reader.read(FILE, 0, 10)
        c.nursery.start_soon(reader.table.access.report)
        while not reader.table.access._sent:
            await trio.sleep(0)
        c.nursery.start_soon(set_time)
        for _ in range(200):
            await trio.lowlevel.checkpoint()
        assert not is_set.is_set()
        arrives.set()
        await is_set.wait()
        await reader.read(FILE, 0, 10)
        await reader.table.access.report()
        assert c.coordinator.files[FILE].atime == 5


async def test_a_lease_that_was_lost_takes_along_what_was_noted_under_it():
    async with cluster() as c:
        c.coordinator.add_file(FILE).size = BLOCK_SIZE
        node = c.node("n1")
        Clock(node)
        await node.read(FILE, 0, 10)
        node.table.refused([FILE])
        await node.table.access.report()
        assert c.coordinator.files[FILE].atime == 1000 and "accessed" not in c.coordinator.names()


# The coordinator


async def served(tmp_path, nursery, recall_timeout_ms=None):
    """A cluster whose volume is served on n1, and that service."""
    cluster = await TestCluster(tmp_path, nursery).start()
    if recall_timeout_ms is not None:
        cluster.recall_timeout_ms = recall_timeout_ms
    await cluster.create_volume()
    await cluster.start_host("n1")
    return cluster, await cluster.wait_serving()


async def atime(service, ino):
    return service._metadata.getattr(ino)[ATIME]


async def test_only_who_holds_a_lease_may_tell_and_a_time_only_grows(tmp_path, nursery):
    cluster, service = await served(tmp_path, nursery)
    mount, other = await cluster.mount("n2"), await cluster.mount("n3")
    ino, second = await mount.make(b"file"), await mount.make(b"second")
    before = service._metadata.getattr(ino)
    later = before[ATIME] + DAY_NS
    await other.call("accessed", items=[[ino, later + 5]])
    assert await atime(service, ino) == before[ATIME]
    await mount.call("accessed", items=[[ino, later], [second, later], [999, later]])
    await mount.call("accessed", items=[[ino, later - 1]])
    assert [await atime(service, number) for number in (ino, second)] == [later, later]
    assert service._metadata.getattr(ino)[CTIME] == before[CTIME]
    for items in ([[ino, 0]], [[0, 5]], [[ino, None]], [[ino]], 5, [[ino, 1 << 63]]):
        with pytest.raises(BadRequest):
            await mount.call("accessed", items=items)


async def test_others_who_cache_its_attributes_are_to_ask_anew_and_nobody_waits_for_them(tmp_path, nursery):
    cluster, service = await served(tmp_path, nursery, recall_timeout_ms=60_000)
    mounts = [await cluster.mount(node) for node in ("n1", "n2", "n3")]
    ino = await mounts[0].make(b"file")
    for mount in mounts:
        await mount.acquire(ino, 2)
    for mount in mounts:
        mount.recalls.clear()
    mounts[1].answers_recalls = False
    later = (await atime(service, ino)) + 100
    await mounts[0].call("accessed", items=[[ino, later]])
    await cluster.wait(lambda: mounts[1].recalls and mounts[2].recalls)
    assert mounts[1].recalls == mounts[2].recalls == [{"ino": ino, "kind": 3, "attr": True}]
    assert not mounts[0].recalls and [mount.held[ino] for mount in mounts] == [2, 2, 2]
    assert not service.leases.waiting(10)


async def test_an_access_time_that_comes_with_a_recall_is_there_for_who_gets_the_lease(tmp_path, nursery):
    cluster, service = await served(tmp_path, nursery)
    reader, writer = await cluster.mount("n2"), await cluster.mount("n3")
    ino = await reader.make(b"file")
    await reader.acquire(ino, 2)
    reader.accessed_ns = (await atime(service, ino)) + 100
    await writer.acquire(ino, 3)
    await writer.change("setattr", ino=ino, mode=0o600)
    assert await atime(service, ino) == reader.accessed_ns
    await writer.change("setattr", ino=ino, atime_ns=5)
    assert await atime(service, ino) == 5
