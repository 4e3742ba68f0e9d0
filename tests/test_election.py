"""Election and membership: one owner per volume, terms that only grow, views that follow the store."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from csvfs.cluster.election import (
    RANK_DELAY_NS,
    decide,
    release_host,
    release_ownership,
    take_ownership,
)
from csvfs.cluster.membership import View, keep_view_forever
from csvfs.errors import Conflict, NotFound
from csvfs.ids import Incarnation, NodeName
from csvfs.store.interface import Change, ClusterStore, Item
from csvfs.store.opening import open_store
from csvfs.wire.control import pack_value, unpack_value

N1, N2, N3 = NodeName("n1"), NodeName("n2"), NodeName("n3")
ONE, TWO = Incarnation(1), Incarnation(2)
NOW = 10_000


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ClusterStore]:
    store = open_store(f"embedded:{tmp_path}/store.db")
    yield store
    await store.close()


def ranks(volume: str, **arguments) -> dict[NodeName, int]:  # type: ignore[no-untyped-def]
    """node -> its place in the queue for `volume`."""
    places = {}
    for node in arguments["alive"]:
        for attempt in decide(node, now_ns=NOW, **arguments):
            if attempt.volume == volume:
                places[node] = (attempt.start_ns - NOW) // RANK_DELAY_NS
    return places


def test_the_node_with_the_fewest_volumes_goes_first() -> None:
    owners = {"a": N1, "b": N1, "c": N2}
    places = ranks("d", volumes=["a", "b", "c", "d"], owners=owners, alive=[N1, N2, N3], preferred={})
    assert places == {N3: 0, N2: 1, N1: 2}


def test_the_preferred_node_goes_before_all() -> None:
    places = ranks("d", volumes=["d"], owners={"a": N1, "b": N1}, alive=[N1, N2, N3], preferred={"d": N1})
    assert places == {N1: 0, N2: 1, N3: 2}


def test_a_preferred_node_that_is_dead_is_not_waited_for() -> None:
    assert ranks("d", volumes=["d"], owners={}, alive=[N2, N3], preferred={"d": N1}) == {N2: 0, N3: 1}


def test_a_volume_with_owner_is_left_alone_and_a_node_that_is_not_alive_tries_nothing() -> None:
    assert decide(N1, ["a"], {"a": N2}, [N1, N2], {}, NOW) == []
    assert decide(N3, ["a"], {}, [N1, N2], {}, NOW) == []


@given(st.integers(1, 12), st.sets(st.sampled_from([f"n{i}" for i in range(6)]), min_size=1))
def test_each_volume_has_exactly_one_first_candidate_and_they_are_spread_evenly(
    count: int, alive: set[str]
) -> None:
    nodes = [NodeName(name) for name in alive]
    volumes = [f"v{index}" for index in range(count)]
    first: dict[str, NodeName] = {}
    for node in nodes:
        for attempt in decide(node, volumes, {}, nodes, {}, NOW):
            if attempt.start_ns == NOW:
                assert attempt.volume not in first
                first[attempt.volume] = node
    assert sorted(first) == sorted(volumes)
    loads = [list(first.values()).count(node) for node in nodes]
    assert max(loads) - min(loads) <= 1


async def take(store: ClusterStore, node: NodeName, host: Incarnation = ONE, lease: int = 0) -> int | None:
    return await take_ownership(store, "v", node, "10.77.0.1", 7002, host, lease)


async def test_i1_of_all_who_try_at_once_one_gets_the_volume(store: ClusterStore) -> None:
    terms = []

    async def try_it(node: NodeName) -> None:
        terms.append(await take(store, node))

    async with trio.open_nursery() as nursery:
        for node in (N1, N2, N3):
            nursery.start_soon(try_it, node)
    assert sorted(term for term in terms if term is not None) == [1]


async def test_i1_each_takeover_has_a_higher_term(store: ClusterStore) -> None:
    assert await take(store, N1) == 1
    assert await take(store, N2) is None
    assert await release_ownership(store, "v", N1, ONE)
    assert await take(store, N2) == 2
    assert not await release_ownership(store, "v", N1, ONE)
    item = await store.get("owner/v")
    assert item is not None and unpack_value(item.value) == {
        "node": "n2", "address": "10.77.0.1", "port": 7002, "incarnation": 1,
    }  # fmt: skip


async def test_i1_a_host_that_takes_what_it_has_gets_a_fresh_term(store: ClusterStore) -> None:
    assert await take(store, N1) == 1
    assert await take(store, N1) == 2
    assert await take(store, N1, TWO) is None


async def test_ownership_ends_with_the_lease_and_the_term_stays(store: ClusterStore) -> None:
    lease = await store.grant_lease(60_000)
    assert await take(store, N1, lease=lease) == 1
    await store.revoke_lease(lease)
    assert await take(store, N2) == 2
    await release_ownership(store, "v", N2, ONE)
    with pytest.raises(NotFound):
        await take(store, N1, lease=lease)


async def test_a_dead_host_gives_up_its_own_volumes_only(store: ClusterStore) -> None:
    await take_ownership(store, "a", N1, "10.77.0.1", 7002, ONE, 0)
    await take_ownership(store, "b", N1, "10.77.0.1", 7002, TWO, 0)
    await take_ownership(store, "c", N2, "10.77.0.2", 7002, ONE, 0)
    assert await release_host(store, N1, ONE) == ["a"]
    assert [item.key for item in await store.list("owner/")] == ["owner/b", "owner/c"]


async def test_i1_a_ruined_term_is_never_taken_for_zero(store: ClusterStore) -> None:
    await store.put("term/v", b"\xc1 nonsense")
    with pytest.raises(Conflict, match="term/v"):
        await take(store, N1)
    assert await store.get("owner/v") is None


# Membership


async def test_a_view_starts_from_what_is_there_and_follows_what_changes(store: ClusterStore) -> None:
    drive = bytes(range(16))
    await store.put("nodes/n1", pack_value({"address": "10.77.0.1", "place": {"rack": "r1"}}))
    await store.put("pool", pack_value({"name": "p"}))
    view = View()
    calls = []
    view.on_change(lambda: calls.append(view.revision))
    async with trio.open_nursery() as nursery:
        await nursery.start(keep_view_forever, store, view)
        assert view.nodes[N1]["place"] == {"rack": "r1"} and view.pool == {"name": "p"}
        await store.put(f"drives/{drive.hex()}", pack_value({"node": "n1"}))
        await take(store, N1)
        await view.wait_until(lambda: "v" in view.owners and drive in view.drives, timeout_s=60)
        assert view.terms == {"v": 1}
        await store.delete("owner/v")
        await store.delete("nodes/n1")
        await view.wait_until(lambda: not view.owners and not view.nodes, timeout_s=60)
        nursery.cancel_scope.cancel()
    assert len(calls) >= 3 and calls == sorted(calls)


def test_nonsense_under_one_key_does_not_hurt_the_others() -> None:
    view = View()
    rows = [
        ("nodes/n1", b"\xc1"), ("drives/xyz", pack_value({})), ("drives/00", pack_value({})), ("pool",
        pack_value(3)), ("term/v", pack_value({"term": "x"})), ("unknown", b"?"), ("nodes/n2",
        pack_value({"address": "a"})),
    ]  # fmt: skip
    view.apply([Change(key, Item(key, value, 1, 0), 1) for key, value in rows])
    assert view.nodes == {"n2": {"address": "a"}}
    assert (view.drives, view.terms, view.pool) == ({}, {}, None)
