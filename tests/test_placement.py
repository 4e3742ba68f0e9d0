"""Placement against brute force: it finds a place iff there is one, and never two copies in one domain."""

from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfs.block.placement import DriveSpace, choose_drives
from csvfs.errors import NoSpace
from csvfs.ids import DriveId, NodeName

POOL = st.lists(
    st.builds(
        DriveSpace,
        st.binary(min_size=16, max_size=16).map(DriveId),
        st.sampled_from(["n1", "n2", "n3", "n4"]).map(NodeName),
        st.integers(0, 3),
    ),
    max_size=8,
    unique_by=lambda space: space.drive,
)
RACKS = {"n1": "r1", "n2": "r1", "n3": "r2", "n4": "r3"}


@given(POOL, st.integers(1, 4), st.integers(0, 1000), st.booleans())
def test_a_place_is_found_iff_brute_force_finds_one(pool, copies, seed, in_racks):
    def domain_of(node: NodeName) -> str:
        return RACKS[node] if in_racks else node

    valid = [
        set(chosen)
        for chosen in combinations([space for space in pool if space.free_slots > 0], copies)
        if len({domain_of(space.node) for space in chosen}) == copies
    ]
    if not valid:
        with pytest.raises(NoSpace, match=f"{copies} copies need {copies} fault domains"):
            choose_drives(pool, copies, Random(seed), domain_of=domain_of)
        return
    chosen = choose_drives(pool, copies, Random(seed), domain_of=domain_of)
    assert set(chosen) in valid
    assert choose_drives(list(reversed(pool)), copies, Random(seed), domain_of=domain_of) == chosen


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
