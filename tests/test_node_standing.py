"""Nodes that come and go are quarantined, and nodes that are only half there are called isolated."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfs.admin.cluster_view import ClusterView, Record, read_cluster_view
from csvfs.admin.node_life import node_state, resume, state_reason
from csvfs.admin.node_standing import note_orderly_end, read_standing
from csvfs.admin.reach_watch import Sightings
from csvfs.cluster.departures import QUARANTINE_S, WINDOW_S, Verdict, note_departure
from csvfs.cluster.membership import item_map
from csvfs.cluster.reach import UNREACHED_AFTER_S, Report, why_isolated
from csvfs.store.embedded import EmbeddedStore
from csvfs.wire.control import pack_value

NOW = 1_000_000


# Quarantine


def test_the_third_departure_within_an_hour_begins_a_quarantine_and_the_count_anew() -> None:
    verdict = Verdict((), False)
    for when in (NOW, NOW + 1000):
        verdict = note_departure(verdict.departures, when, 3)
        assert not verdict.is_quarantined
    assert note_departure(verdict.departures, NOW + WINDOW_S - 1, 3) == Verdict((), True)
    assert note_departure(verdict.departures, NOW + WINDOW_S, 3) == Verdict((NOW + 1000, NOW + WINDOW_S), False)


def test_a_clock_that_was_set_back_and_a_limit_of_nought_quarantine_nobody() -> None:
    assert not note_departure((NOW + 10, NOW + 20), NOW, 3).is_quarantined
    assert not note_departure((NOW - 2, NOW - 1), NOW, 0).is_quarantined


@given(st.lists(st.integers(0, 3 * WINDOW_S)), st.integers(1, 5))
def test_a_quarantine_begins_exactly_when_an_hour_has_held_that_many_departures_since_the_last_one(
    times: list[int], limit: int
) -> None:
    counted: tuple[int, ...] = ()
    since_last: list[int] = []
    for when in sorted(times):
        verdict = note_departure(counted, NOW + when, limit)
        counted = verdict.departures
        since_last = [*since_last, when]
        assert verdict.is_quarantined is (sum(when - WINDOW_S < each for each in since_last) >= limit)
        if verdict.is_quarantined:
            since_last = []


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    store = EmbeddedStore(tmp_path / "store.db")
    yield store
    await store.close()


async def begin(store: EmbeddedStore, *, limit: int = 3, is_attended: bool = False) -> bool:
    """A lease begins; returns whether the node is quarantined from then on."""
    standing = await read_standing(store, "n1", limit, is_attended=is_attended)
    assert (await store.transact(standing.compares(), standing.changes())).succeeded
    return await store.get("quarantine/n1") is not None


async def test_a_node_that_was_killed_three_times_is_quarantined_until_it_is_resumed(store: EmbeddedStore) -> None:
    await store.put("nodes/n1", pack_value({"address": "10.0.0.1"}))
    await store.put("alive/n1", pack_value({"address": "10.0.0.1"}))
    assert [await begin(store) for _ in range(4)] == [False, False, False, True]
    item = await store.get("quarantine/n1")
    assert item is not None and item.lease  # it ends by itself
    view = await read_cluster_view(store)
    assert node_state(view, "n1") == "quarantined"
    assert "csvfs node resume n1" in state_reason(view, "n1")
    assert await resume(store, "n1")
    assert await store.get("quarantine/n1") is None
    assert not await resume(store, "n1")
    assert not await begin(store)  # the count began anew
    assert QUARANTINE_S * 1000 <= 86_400_000  # as long as a lease of the store may last


async def test_a_node_that_is_stopped_in_order_or_is_in_maintenance_departs_never(store: EmbeddedStore) -> None:
    for _ in range(5):
        assert not await begin(store)
        await note_orderly_end(store, "n1")
    assert not await begin(store)
    for _ in range(5):
        assert not await begin(store, is_attended=True)
    assert item_map(await store.get("standing/n1")) == {"running": True, "departures": []}


async def test_a_cluster_that_says_nothing_of_quarantine_has_none(store: EmbeddedStore) -> None:
    assert not any([await begin(store, limit=0) for _ in range(10)])


async def test_nonsense_under_the_key_is_as_good_as_nothing(store: EmbeddedStore) -> None:
    await store.put("standing/n1", pack_value({"running": 7, "departures": {"a": 1}}))
    assert not await begin(store)


# Isolated


def reports(**unreached: str) -> dict[str, Report]:
    return {node: Report(frozenset(names.split())) for node, names in unreached.items()}


def test_a_node_that_most_others_do_not_reach_is_isolated_and_one_that_one_does_not_reach_is_not() -> None:
    alive = {"n1", "n2", "n3"}
    cut_off = reports(n1="n3", n2="n3", n3="n1 n2")
    assert why_isolated("n3", alive, cut_off) == "reaches the cluster store, but is not reached by n1, n2"
    assert [why_isolated(node, alive, cut_off) for node in ("n1", "n2")] == ["", ""]
    assert why_isolated("n3", alive, reports(n1="n3", n2="", n3="")) == ""
    assert why_isolated("n3", alive, {}) == ""
    assert why_isolated("n3", {"n3"}, reports(n3="")) == ""


def test_reports_of_nodes_that_are_gone_do_not_count() -> None:
    assert why_isolated("n3", {"n2", "n3"}, reports(n1="n3", n2="", n3="")) == ""
    assert why_isolated("n3", {"n2", "n3"}, reports(n1="", n2="n3", n3=""))


def test_a_node_without_a_lease_whose_drive_server_still_answers_is_isolated_and_else_down() -> None:
    seen = {"n1": Report(lingering=frozenset({"n3"})), "n2": Report()}
    assert why_isolated("n3", {"n1", "n2"}, seen) == "does not reach the cluster store, but answers n1"
    assert why_isolated("n3", {"n2"}, seen) == ""
    assert why_isolated("n3", {"n1", "n2"}, {"n1": Report(), "n2": Report()}) == ""


def test_the_words_of_the_node_list_come_in_order() -> None:
    view = ClusterView()
    for node in ("n1", "n2", "n3", "n4", "n5"):
        view.nodes[node] = Record(f"nodes/{node}", {}, 1)
    for node in ("n1", "n2", "n3", "n4"):
        view.alive[node] = Record(f"alive/{node}", {}, 1)
    for node in ("n1", "n2", "n4"):
        value = {"unreached": [] if node == "n4" else ["n4"], "lingering": []}
        view.reach[node] = Record(f"reach/{node}", value, 1)
    view.quarantine["n2"] = Record("quarantine/n2", {"why": "it came and went"}, 1)
    view.maintenance["n3"] = Record("maintenance/n3", {"state": "paused"}, 1)
    states = {node: node_state(view, node) for node in view.node_names}
    assert states == {"n1": "up", "n2": "quarantined", "n3": "paused", "n4": "isolated", "n5": "down"}
    assert "is not reached by n1, n2" in state_reason(view, "n4")


def test_a_drive_server_is_called_unreached_after_a_while_and_not_while_it_starts_anew() -> None:
    seen = Sightings()
    servers = {"n1": {"address": "10.0.0.1", "port": 7001}, "n2": {"address": "10.0.0.2", "port": 7001}}
    nodes = alive = {"n1": {}, "n2": {}}
    assert seen.targets("n1", servers, nodes) == {"n2": ("10.0.0.2", 7001)}
    seen.note("n2", False, 100)
    assert seen.report(servers, alive, 100) == Report()
    assert seen.report(servers, alive, 100 + UNREACHED_AFTER_S) == Report(frozenset({"n2"}))
    assert seen.report({"n1": servers["n1"]}, alive, 200) == Report()  # it has no drive server at the moment
    seen.note("n2", True, 201)
    assert seen.report(servers, alive, 300) == Report()
    # Its lease ends, and it answers all the same; then it is evicted.
    assert seen.report({}, {"n1": {}}, 300) == Report(lingering=frozenset({"n2"}))
    assert seen.targets("n1", {}, {"n1": {}}) == {}
    assert seen.report({}, {"n1": {}}, 300) == Report()
