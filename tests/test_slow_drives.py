"""Slow drives: who is an outlier, who is read around, and what is decided about one that stays slow."""

import os
from itertools import pairwise

import pytest
import trio

from csvfs.block import bus_reads, drive_watch
from csvfs.block.bus import Bus
from csvfs.block.drive_watch import DriveWatch, SlowRules
from csvfs.block.latency import FLUSH, READ, WRITE, DriveLatency, is_outlier, slow_drives, told_ms
from csvfs.block.member_latency import HEDGE_S_MIN, HEDGE_S_UNKNOWN, MemberLatencies
from csvfs.ids import NodeName
from csvfs.units import BLOCK_SIZE
from tests.block_cluster import SLAB, VOLUME, BlockCluster, write


def latency(kind, seconds, now=0.0, times=20):
    found = DriveLatency()
    for _ in range(times):
        found.record(kind, seconds, now)
    return found


def test_an_outlier_is_ten_times_its_peers_and_above_the_floor():
    assert is_outlier(0.2, [0.01, 0.012])
    assert not is_outlier(0.04, [0.0001, 0.0001])  # below the floor: quick enough
    assert not is_outlier(0.2, [0.1, 0.15])  # so are its peers
    assert not is_outlier(5.0, [])  # alone


def test_only_the_slow_drive_of_four_is_slow():
    drives = {number: latency(FLUSH, 0.010) for number in range(3)} | {3: latency(FLUSH, 0.8)}
    assert slow_drives(drives, now=1.0) == {3}
    assert slow_drives(drives, now=100.0) == set()  # nothing measured for long: nothing known


def test_one_slow_flush_makes_no_slow_drive_and_one_that_is_slow_stays_so_until_it_is_measured_again():
    drives = {number: latency(FLUSH, 0.004) for number in range(3)} | {3: latency(FLUSH, 0.8, times=1)}
    assert slow_drives(drives, now=5.0) == {3}
    assert slow_drives(drives, now=20.0) == set()  # nothing of it for 20 s: too little to go by
    assert slow_drives(drives, now=20.0, flagged={3}) == {3}


def test_a_hang_of_ten_seconds_is_forgotten_after_a_few_operations_however_rare_they_are():
    drive = latency(FLUSH, 10.0, times=1)
    for now in (10.0, 20.0, 30.0):
        drive.record(FLUSH, 0.004, now)
    assert drive.current(FLUSH, 30.0) < 0.05


def test_an_operation_that_hangs_counts_before_it_ends():
    hanging = latency(READ, 0.001)
    hanging.begin(READ, now=1.0)
    drives = {0: latency(READ, 0.001), 1: hanging}
    assert slow_drives(drives, now=1.01) == set()
    assert slow_drives(drives, now=3.0) == {1}


def test_drives_of_other_nodes_are_peers_too():
    alone = {0: latency(FLUSH, 0.9)}
    assert slow_drives(alone, 1.0) == set()
    assert slow_drives(alone, 1.0, {FLUSH: [0.05, 0.05]}) == {0}
    assert slow_drives(alone, 1.0, {FLUSH: [0.256, 0.256]}) == set()


def test_what_others_are_told_of_a_latency_is_coarse_and_changes_only_when_it_is_clearly_wrong():
    assert told_ms(latency(FLUSH, 0.9), 1.0, {}) == {FLUSH: 1280}
    assert told_ms(latency(FLUSH, 0.0001), 1.0, {}) == {FLUSH: 5}
    assert told_ms(latency(FLUSH, 0.0001), 100.0, {FLUSH: 5}) == {}  # nothing is known any more
    told: dict[str, int] = {}
    for average_s, said in ((0.004, 5), (0.0055, 5), (0.007, 10), (0.0115, 10), (0.004, 10), (0.003, 5)):
        told = told_ms(latency(FLUSH, average_s), 1.0, told)
        assert told == {FLUSH: said}


def test_a_drive_is_no_outlier_among_drives_of_which_nothing_is_known():
    assert slow_drives({0: latency(FLUSH, 0.2)}, 1.0, {FLUSH: []}) == set()
    assert slow_drives({0: latency(FLUSH, 0.2)}, 1.0, {FLUSH: [0.005, 0.005]}) == {0}


def test_one_slow_write_among_thousands_is_no_slow_drive():
    found = DriveLatency()
    found.record_slow_write(0.9, 0.0)
    assert found.current(WRITE, 0.0) == pytest.approx(0.9)
    found.count_writes(2000, 1.0)
    assert found.current(WRITE, 1.0) < 0.001


def test_a_reader_waits_twice_as_long_as_the_peers_take_before_it_asks_another_one():
    members = MemberLatencies()
    assert members.hedge_after_s([b"a"]) == HEDGE_S_UNKNOWN
    for _ in range(5):
        members.record(b"a", 0.04)
        members.record(b"b", 0.00001)
        members.record(b"c", 0.00001)
        members.record(b"d", 0.9)
    assert members.hedge_after_s([b"a"]) == pytest.approx(0.08)
    assert members.hedge_after_s([b"b"]) == HEDGE_S_MIN
    assert members.slow([b"a", b"b", b"c", b"d"]) == {b"d"}


class Hole:
    """Takes requests to one node's link and never sends them."""

    def __init__(self, link):
        self.requests = []
        link.request = lambda kind, head, payload, answer: self.requests.append(answer)


@pytest.fixture
async def cluster(tmp_path, nursery):
    cluster = BlockCluster(tmp_path, nursery)
    await cluster.start()
    return cluster


def make_bus(cluster, nursery):
    """Of a node without drives: all its reads go over the network."""
    bus = Bus(cluster.links("mount/n9"), cluster.owner, volume=VOLUME, local_node=NodeName("n9"))
    nursery.start_soon(bus.run_forever)
    bus.learn(cluster.owner.descriptors[SLAB])
    return bus


async def test_a_read_that_hangs_is_answered_by_another_member_and_the_slow_one_is_asked_last(
    cluster, nursery, monkeypatch
):
    monkeypatch.setattr(bus_reads, "READ_TIMEOUT_S", 600)  # this is not waited for
    bus = make_bus(cluster, nursery)
    data = os.urandom(BLOCK_SIZE)
    await write(bus, 3, data)
    first = bus.descriptor(SLAB).in_sync[0]
    for member in bus.descriptor(SLAB).in_sync:
        await bus.links.connected(member.node)
    hole = Hole(bus.links.ready(first.node).link)
    with trio.fail_after(60):
        assert await bus.read(SLAB, 3, 1) == data
        assert len(hole.requests) == 1
        for _ in range(20):
            bus._reader.latencies.record(first.drive, 0.5)
        assert await bus.read(SLAB, 3, 1) == data
    assert len(hole.requests) == 1  # not asked again: the others are quicker


async def test_a_read_is_given_up_when_nobody_answers(cluster, nursery, monkeypatch):
    monkeypatch.setattr(bus_reads, "READ_TIMEOUT_S", 0.1)
    bus = make_bus(cluster, nursery)
    await write(bus, 3, os.urandom(BLOCK_SIZE))
    for member in bus.descriptor(SLAB).in_sync:
        Hole((await bus.links.connected(member.node)).link)
    with trio.fail_after(60), pytest.raises(Exception, match="did not answer"):
        await bus.read(SLAB, 3, 1)


async def test_a_drive_that_stays_slow_is_flagged_then_retired_and_forgiven_when_it_recovers(
    cluster, monkeypatch
):
    """The clock of the watch is ours: it is asked for its judgement by hand."""
    service = cluster.servers[0].service
    served = next(iter(service.drives))
    told, retired = [], []
    clock = [1000.0]

    async def publish(reports):
        told.append(reports)

    async def retire(slow):
        retired.append(clock[0])
        return len(retired) > 2  # the first two times another drive is retired

    async def peers():
        return {WRITE: [], READ: [], FLUSH: [0.02, 0.02]}

    watch = DriveWatch(service, publish, peers=peers, retire=retire, rules=SlowRules(0.05, 30, 300))
    monkeypatch.setattr(drive_watch.trio, "current_time", lambda: clock[0])
    for _ in range(60):
        clock[0] += 10
        served.latency.record(FLUSH, 1.5, clock[0])
        await watch._judge_latency()
        if clock[0] < 1035:
            assert not served.slow
    assert served.slow
    assert len(retired) == 3 and [b - a for a, b in pairwise(retired)] == [60, 60]
    for _ in range(50):
        served.latency.record(FLUSH, 0.001, clock[0])
    await watch._judge_latency()
    assert not served.slow
