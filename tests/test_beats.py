"""Beats: a node that fell silent is counted as gone, whatever the store's leases say; and nobody else ever (I5)."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from csvfs.admin.node_beats import NodeBeats, ServingTime
from csvfs.clock import monotonic_ns
from csvfs.cluster.beats import BEATS, Beats, BeatTimes, beat_times
from csvfs.cluster.liveness import Liveness, LivenessWriter
from csvfs.cluster.membership import View
from csvfs.ids import Incarnation
from csvfs.store.interface import Change, ClusterStore, Item, Put
from csvfs.store.opening import open_store

TIMES = BeatTimes(interval_s=0.5, serve_s=3.2, gone_s=3.7)
QUICK = BeatTimes(interval_s=0.05, serve_s=1.0, gone_s=1.5)
LEASE_MS = 60_000  # of the store: it says nothing within these tests


def beating(beats: Beats, begin_s: float, end_s: float) -> float:
    """Our own beats are taken all the time; returns when the last one was."""
    at_s = begin_s
    while at_s <= end_s:
        beats.committed(at_s)
        at_s += TIMES.interval_s
    return at_s - TIMES.interval_s


def test_a_lease_of_three_seconds_serves_for_3_2_s_of_silence_and_is_gone_after_3_7() -> None:
    assert beat_times(node_lease_ms=3000, heartbeat_ms=500, margin_ms=500) == TIMES


def test_who_is_silent_for_that_long_is_gone_and_who_beats_is_not() -> None:
    beats = Beats(TIMES)
    beating(beats, 0, 20)
    beats.heard("n2", 7, 20.0)
    beats.heard("n3", 8, 23.5)
    beating(beats, 20, 23.6)
    assert beats.silent(23.65) == []
    assert beats.silent(23.75) == [("n2", 7)]
    beats.heard("n2", 7, 23.75)  # no news
    assert beats.silent(23.8) == [("n2", 7)]
    beats.heard("n2", 9, 23.8)
    assert beats.silent(23.9) == []
    beats.forget("n3")
    beating(beats, 23.5, 27.2)
    assert beats.silent(27.45) == []
    assert beats.silent(27.55) == [("n2", 9)]


def test_while_the_store_takes_nothing_nobody_is_gone_and_after_an_election_soon_again() -> None:
    beats = Beats(TIMES)
    last_s = beating(beats, 0, 20)
    beats.heard("n2", 7, last_s)
    beats.heard("n3", 8, last_s)
    assert beats.silent(last_s + 60) == []
    beats.committed(last_s + 2.4)  # elected; n3 is heard again too, n2 led and has no power
    beats.heard("n3", 9, last_s + 2.6)
    beating(beats, last_s + 2.9, last_s + 3.6)
    assert beats.silent(last_s + 3.6) == []
    assert beats.silent(last_s + 3.75) == [("n2", 7)]


def test_after_a_long_outage_of_the_store_everybody_has_the_whole_time_to_be_heard() -> None:
    beats = Beats(TIMES)
    last_s = beating(beats, 0, 20)
    beats.heard("n2", 7, last_s)
    back_s = last_s + 10
    beating(beats, back_s, back_s + 3.6)
    assert beats.silent(back_s + 3.6) == []
    beating(beats, back_s + 3.5, back_s + 4)
    assert beats.silent(back_s + 3.8) == [("n2", 7)]


def test_a_node_that_has_just_begun_waits_before_it_judges() -> None:
    beats = Beats(TIMES)
    beats.heard("n2", 7, 0.0)
    assert beats.silent(100.0) == []
    beating(beats, 100, 103.6)
    assert beats.silent(103.6) == []
    beating(beats, 103.5, 104)
    assert beats.silent(103.8) == [("n2", 7)]


def test_beats_are_no_news_to_those_who_wait_for_changes_of_the_cluster(caplog: pytest.LogCaptureFixture) -> None:
    view, told = View(), []
    view.on_change(lambda: told.append(view.revision))
    view.apply([Change("beats/n1", Item("beats/n1", b"", 5, 1), 5)])
    assert not caplog.records, "a beat has nothing to say, which is no mistake"
    assert told == [] and view.revision == 5
    view.apply([Change("beats/n1", Item("beats/n1", b"", 6, 1), 6), Change("alive/n2", None, 6)])
    assert told == [6]


# The service, with a real store


class Node:
    """What `csvfs node run` has of the beats: a lease, its keys, a page."""

    def __init__(self, store: ClusterStore, name: str, directory: Path) -> None:
        self.store, self.name = store, name
        self.lost = trio.Event()
        path = directory / f"page-{name}"
        self.serving = ServingTime(LivenessWriter(path, Incarnation(1)), has_beats=True)
        self.page = Liveness(path)
        self.lease = self.revision = 0

    async def begin(self) -> NodeBeats:
        self.lease = await self.store.grant_lease(LEASE_MS)
        puts = [Put(key + self.name, b"", self.lease) for key in ("alive/", BEATS, "servers/")]
        self.revision = (await self.store.transact([], puts)).revision
        self.serving.renewed(monotonic_ns() + LEASE_MS * 1_000_000)
        return NodeBeats(self.store, self.name, self.lease, self.revision, QUICK, self.serving, self.lost.set)

    async def run(self, power: trio.CancelScope) -> None:
        beats = await self.begin()
        with power:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(beats.beat_forever)
                nursery.start_soon(beats.watch_forever)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ClusterStore]:
    store = open_store(f"embedded:{tmp_path}/store.db?gate={tmp_path}/gate")
    yield store
    await store.close()


async def serving(*nodes: Node) -> None:
    with trio.fail_after(60):
        while not all(node.page.may_serve() for node in nodes):
            await trio.sleep(0.01)


async def gone(store: ClusterStore, key: str) -> None:
    with trio.fail_after(60):
        while await store.get(key) is not None:
            await trio.sleep(0.02)


async def test_a_silent_node_is_gone_though_the_store_would_keep_its_lease_and_it_had_stopped_serving_before_i5(
    store: ClusterStore, tmp_path: Path, nursery: trio.Nursery
) -> None:
    watcher, silent = Node(store, "n1", tmp_path), Node(store, "n2", tmp_path)
    power = trio.CancelScope()
    nursery.start_soon(watcher.run, trio.CancelScope())
    nursery.start_soon(silent.run, power)
    await serving(silent, watcher)
    await trio.sleep(2 * QUICK.gone_s)  # both are heard
    assert await store.get("alive/n1") and await store.get("alive/n2")
    power.cancel()
    with trio.fail_after(60):
        while await store.get("alive/n2") is not None:
            await trio.sleep(0.005)
    assert not silent.page.may_serve()
    await gone(store, "servers/n2")  # its lease has ended
    await serving(watcher)
    assert await store.get("alive/n1")


async def test_a_node_that_was_counted_as_gone_learns_it_and_never_serves_again_under_that_lease_i5(
    store: ClusterStore, tmp_path: Path, nursery: trio.Nursery
) -> None:
    node = Node(store, "n2", tmp_path)
    nursery.start_soon(node.run, trio.CancelScope())
    await serving(node)
    await store.delete("alive/n2")
    with trio.fail_after(60):
        await node.lost.wait()
    node.serving.renewed(monotonic_ns() + LEASE_MS * 1_000_000)  # its lease is still renewed
    await trio.sleep(QUICK.serve_s)
    assert not node.page.may_serve()


async def test_an_outage_of_the_store_costs_nobody_its_place(
    store: ClusterStore, tmp_path: Path, nursery: trio.Nursery
) -> None:
    nodes = [Node(store, name, tmp_path) for name in ("n1", "n2", "n3")]
    for node in nodes:
        nursery.start_soon(node.run, trio.CancelScope())
    await trio.sleep(2 * QUICK.gone_s)
    (tmp_path / "gate").touch()
    await trio.sleep(2 * QUICK.gone_s)
    assert not any(node.page.may_serve() for node in nodes)
    (tmp_path / "gate").unlink()
    await trio.sleep(2 * QUICK.gone_s)
    await serving(*nodes)
    assert not any(node.lost.is_set() for node in nodes)
