"""Placement against brute force: it finds a place iff there is one, never puts two copies in one domain, and
strands no slot that another placement would have used."""

from functools import cache
from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csvfs.block.placement import DriveSpace, choose_drives, slabs_that_fit
from csvfs.errors import NoSpace
from csvfs.fault_domains import LEVELS, Place, domain_at
from csvfs.ids import DriveId, NodeName

NODES = [f"n{number}" for number in range(1, 7)]
NAME = st.sampled_from(["", "a", "b", "c"])
TREES = st.fixed_dictionaries({node: st.builds(Place, NAME, NAME, NAME) for node in NODES})
POOL = st.lists(
    st.builds(
        DriveSpace,
        st.binary(min_size=16, max_size=16).map(DriveId),
        st.sampled_from(NODES).map(NodeName),
        st.integers(0, 3),
    ),
    max_size=10,
    unique_by=lambda space: space.drive,
)


@settings(deadline=None)
@given(POOL, TREES, st.sampled_from(LEVELS), st.integers(1, 4), st.sets(st.sampled_from(NODES), max_size=2),
       st.integers(0, 1000))  # fmt: skip
def test_a_place_is_found_iff_brute_force_finds_one(pool, tree, level, copies, holders, seed):
    """For any tree of sites, racks and chassis, any level, any free slots; `holders` have a copy already."""

    def domain_of(node: NodeName) -> str:
        return domain_at(level, node, tree[node])

    taken = {domain_of(NodeName(node)) for node in holders}
    valid = [
        set(chosen)
        for chosen in combinations([space for space in pool if space.free_slots > 0], copies)
        if len({domain_of(space.node) for space in chosen} - taken) == copies
    ]
    if not valid:
        with pytest.raises(NoSpace, match=f"{copies} copies need {copies} fault domains"):
            choose_drives(pool, copies, Random(seed), domain_of=domain_of, taken=taken)
        return
    chosen = choose_drives(pool, copies, Random(seed), domain_of=domain_of, taken=taken)
    assert set(chosen) in valid
    again = choose_drives(list(reversed(pool)), copies, Random(seed), domain_of=domain_of, taken=taken)
    assert again == chosen


def test_too_few_domains_are_named():
    pool = [DriveSpace(DriveId(bytes([n]) * 16), NodeName(f"n{n}"), 5) for n in range(1, 5)]
    racks = {"n1": "r1", "n2": "r1", "n3": "r2", "n4": "r2"}

    def domain_of(node: NodeName) -> str:
        return domain_at("rack", node, Place(rack=racks[node]))

    with pytest.raises(NoSpace, match=r"3 copies need 3 fault domains .*there are 2 \(rack r1, rack r2\)"):
        choose_drives(pool, 3, Random(1), domain_of=domain_of)


def test_a_domain_that_is_taken_gets_no_second_copy():
    pool = [DriveSpace(DriveId(bytes([n]) * 16), NodeName(f"n{n}"), 5) for n in range(1, 4)]
    chosen = choose_drives(pool, 1, Random(1), taken={"n1", "n3"})
    assert [space.node for space in chosen] == ["n2"]


def test_drives_fill_at_one_rate_whatever_their_size():
    free = {DriveId(bytes([n]) * 16): slots for n, slots in ((1, 100), (2, 300), (3, 200))}
    rng = Random(3)
    for _ in range(300):
        pool = [DriveSpace(drive, NodeName(drive.hex()), slots) for drive, slots in free.items()]
        free[choose_drives(pool, 1, rng)[0].drive] -= 1
    assert [round(slots / 50) for slots in free.values()] == [1, 3, 2]


# -- stranding ---------------------------------------------------------------------------------------


def fill(domains: list[list[int]], copies: int, rng: Random) -> tuple[int, int]:
    """Place slabs until there is no place: how many, and how many slots are left over. `domains`: the slots
    of the drives of each."""
    free = {(d, k): slots for d, drives in enumerate(domains) for k, slots in enumerate(drives)}
    count = 0
    while True:
        pool = [
            DriveSpace(DriveId(bytes(key) * 8), NodeName(f"n{key[0]}"), slots) for key, slots in free.items()
        ]
        try:
            chosen = choose_drives(pool, copies, rng)
        except NoSpace:
            return count, sum(free.values())
        for space in chosen:
            free[space.drive[0], space.drive[1]] -= 1
        count += 1


@cache
def most_slabs(free: tuple[int, ...], copies: int) -> int:
    """By trying every way to place every slab; `free` in order."""
    best = 0
    for chosen in combinations(range(len(free)), copies):
        if all(free[index] for index in chosen):
            left = sorted(slots - (index in chosen) for index, slots in enumerate(free))
            best = max(best, 1 + most_slabs(tuple(left), copies))
    return best


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 1000))
def test_a_pool_takes_as_many_slabs_as_the_best_of_all_placements(free, copies, seed):
    best = most_slabs(tuple(sorted(free)), copies)
    assert slabs_that_fit(free, copies) == best
    assert fill([[slots] for slots in free], copies, Random(seed))[0] == best


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3), min_size=1, max_size=7),
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_domains_of_any_sizes_strand_no_more_than_is_unavoidable(domains, copies, seed):
    fit = slabs_that_fit([sum(drives) for drives in domains], copies)
    assert fill(domains, copies, Random(seed))[0] == fit


@pytest.mark.parametrize(
    ("sizes", "copies", "stranded"),
    [
        ([10, 10, 15], 3, 5),
        ([10, 10, 15], 2, 1),  # 35 slots: one is odd
        ([10, 10, 10, 15], 3, 0),
        ([10, 10, 10, 15], 2, 1),
        ([10, 10, 20], 2, 0),
        ([5, 10, 15, 20], 3, 5),
        ([4, 4, 4, 24], 2, 12),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_uneven_domains_strand_what_is_unavoidable_and_nothing_else(sizes, copies, stranded, seed):
    """The first four are those of Storage Spaces Direct's documentation."""
    assert fill([[size] for size in sizes], copies, Random(seed))[1] == stranded
    in_drives = [[size - size // 3, size // 3] for size in sizes]
    assert fill(in_drives, copies, Random(seed))[1] == stranded
