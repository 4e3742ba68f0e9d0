"""Places and fault domains: what they are called, and that they nest."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csvfs.fault_domains import (
    LEVELS,
    NOWHERE,
    Place,
    counted,
    domain_at,
    level_of,
    misplaced_copies,
    place_of,
)

NAME = st.sampled_from(["", "a", "b"])
NODES = st.dictionaries(st.sampled_from("abcdef"), st.builds(Place, NAME, NAME, NAME), min_size=2)


@pytest.mark.parametrize(
    ("place", "domains"),
    [
        (Place("dc1", "r1", "c1"), ["n1", "chassis dc1/r1/c1", "rack dc1/r1", "site dc1"]),
        (NOWHERE, ["n1", "n1", "n1", "n1"]),
        (Place(rack="r1"), ["n1", "n1", "rack r1", "rack r1"]),
        (Place(site="dc1", chassis="c1"), ["n1", "chassis dc1/-/c1", "chassis dc1/-/c1", "site dc1"]),
        (Place(site="dc1"), ["n1", "n1", "n1", "site dc1"]),
    ],
)
def test_a_domain_is_named_with_all_levels_above_it_and_a_level_left_out_is_that_below(place, domains):
    assert [domain_at(level, "n1", place) for level in LEVELS] == domains


def test_racks_of_one_name_in_two_sites_are_two_racks():
    assert domain_at("rack", "n1", Place("dc1", "r1")) != domain_at("rack", "n2", Place("dc2", "r1"))
    assert domain_at("rack", "n1", Place("dc1", "r1")) == domain_at("rack", "n2", Place("dc1", "r1", "c2"))


@settings(deadline=None)
@given(NODES)
def test_who_shares_a_domain_shares_those_of_all_higher_levels(nodes):
    for node, place in nodes.items():
        for other, elsewhere in nodes.items():
            shared = [domain_at(level, node, place) == domain_at(level, other, elsewhere) for level in LEVELS]
            assert shared == sorted(shared), "once they share one, they go on sharing"
            assert shared[0] == (node == other)


@settings(deadline=None)
@given(NODES)
def test_a_place_survives_the_store_and_nonsense_there_is_no_place(nodes):
    for place in nodes.values():
        assert place_of(place.to_map()) == place
    for nonsense in (None, [], {"rack": 5}, {"rack": None}, "rack"):
        assert place_of(nonsense) == NOWHERE


def test_a_volume_without_a_level_or_with_an_unknown_one_keeps_its_copies_on_different_nodes():
    assert [level_of(v) for v in ({}, {"fault_domain": "rack"}, {"fault_domain": "planet"}, None)] == [
        "node", "rack", "node", "node",
    ]  # fmt: skip
    assert [counted(1, "rack"), counted(2, "rack")] == ["1 rack", "2 racks"]
    assert counted(2, "chassis") == "2 chassis"


def test_copies_are_misplaced_as_far_as_there_are_fewer_domains_than_copies_wanted():
    assert misplaced_copies(["a", "b", "c"], 3) == 0
    assert misplaced_copies(["a", "a", "b"], 3) == 1
    assert misplaced_copies(["a", "a", "a"], 3) == 2
    assert misplaced_copies(["a", "b"], 3) == 0, "one is missing, none is misplaced"
    assert misplaced_copies(["a", "a"], 3) == 1
    assert misplaced_copies(["a", "a", "b"], 2) == 0, "a third copy is more than was asked for"
