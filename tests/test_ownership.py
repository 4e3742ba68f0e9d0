"""Ownership: coordinators spread evenly by single moves, that end, and not to nodes that come and go."""

from hypothesis import given
from hypothesis import strategies as st

from csvfs.cluster.election import decide
from csvfs.cluster.ownership import FORGIVEN_S, STEADY_S, STEADY_S_MAX, Move, Tenures, next_move
from csvfs.ids import NodeName

N1, N2, N3 = NodeName("n1"), NodeName("n2"), NodeName("n3")
ALL = [N1, N2, N3]


def loads_of(owners: dict[str, NodeName], nodes: list[NodeName]) -> list[int]:
    return [list(owners.values()).count(node) for node in nodes]


def carry_out(owners: dict[str, NodeName], move: Move, volume: str, nodes: list[NodeName]) -> None:
    """The giver gives the volume up, and whoever the election puts first takes it."""
    assert owners.pop(volume) == move.giver
    taker = next(node for node in nodes if any(a.start_ns == 0 for a in decide(node, [volume], owners, nodes, {}, 0)))
    assert taker == move.receiver
    owners[volume] = taker


@given(st.lists(st.integers(0, 5), min_size=0, max_size=24), st.integers(1, 6), st.sets(st.integers(0, 23)))
def test_single_moves_end_in_an_even_spread_of_what_may_move(
    places: list[int], node_count: int, pinned_numbers: set[int]
) -> None:
    nodes = [NodeName(f"n{number}") for number in range(node_count)]
    owners = {f"v{index}": nodes[place % node_count] for index, place in enumerate(places)}
    pinned = {f"v{number}" for number in pinned_numbers}
    was = dict(owners)
    moves = 0
    while (move := next_move(owners, pinned, nodes, nodes)) is not None:
        volume = next(name for name, node in sorted(owners.items()) if node == move.giver and name not in pinned)
        carry_out(owners, move, volume, nodes)
        moves += 1
        assert moves <= len(owners), "each volume moves once at most"
    assert all(owners[name] == node for name, node in was.items() if name in pinned)
    loads = loads_of(owners, nodes)
    free = [node for name, node in owners.items() if name not in pinned]
    assert all(loads[nodes.index(node)] - min(loads) <= 1 for node in free)


def test_a_spread_that_is_as_even_as_it_gets_stays() -> None:
    owners = {"a": N1, "b": N1, "c": N2, "d": N3}
    assert next_move(owners, [], ALL, ALL) is None
    assert next_move({**owners, "e": N1}, [], ALL, ALL) == (N1, N2)
    assert next_move({**owners, "e": N1}, ["a", "b", "e"], ALL, ALL) is None, "they are where they are wanted"


def test_nothing_moves_for_evenness_while_an_owner_is_on_its_way_out_or_the_receiver_is_new() -> None:
    owners = {"a": N1, "b": N1, "c": N1}
    assert next_move(owners, [], [N1, N2], [N1, N2]) == (N1, N2)
    assert next_move({**owners, "d": N3}, [], [N1, N2], [N1, N2]) is None
    assert next_move(owners, [], [N1, N2], [N1]) is None
    assert next_move({}, [], [], []) is None


def test_a_node_must_stay_for_a_while_and_longer_each_time_it_dropped_out() -> None:
    tenures, now_s = Tenures(), 0.0
    wanted = []
    for _ in range(8):
        tenures.follow(ALL, [], now_s)
        came_s = now_s
        while N3 not in tenures.steady(now_s):
            now_s += 1
            tenures.follow(ALL, [], now_s)
        wanted.append(now_s - came_s)
        tenures.follow([N1, N2], [], now_s)
    assert wanted[:4] == [STEADY_S, 2 * STEADY_S, 4 * STEADY_S, 8 * STEADY_S]
    assert wanted[-1] == STEADY_S_MAX
    tenures.follow([N1, N2], [], now_s + FORGIVEN_S)
    tenures.follow(ALL, [], now_s + FORGIVEN_S)
    assert N3 in tenures.steady(now_s + FORGIVEN_S + STEADY_S), "it is forgiven"


def test_a_node_that_was_drained_did_not_drop_out() -> None:
    tenures = Tenures()
    tenures.follow(ALL, [], 0)
    tenures.follow([N1, N2], [N3], 100)
    tenures.follow(ALL, [], 200)
    assert tenures.steady(200) == {N1, N2}
    assert tenures.steady(200 + STEADY_S) == {N1, N2, N3}
