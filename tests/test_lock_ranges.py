"""Lock ranges against a model that keeps every byte by itself; and circles of waits."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.lock_ranges import LOCK_END, FileLock, OwnerKey, conflicts, is_deadlock, with_lock, without

BYTES = 12  # of the model; the last one stands for all to the end
OWNERS = 3


def lock(owner: int, first: int, last: int, exclusive: bool = True, flock: bool = False, handle: int = 1) -> FileLock:
    return FileLock(7, flock, owner, first, last, exclusive, 100 + owner, handle)


ranges = st.tuples(st.integers(0, BYTES - 1), st.integers(0, BYTES - 1)).map(sorted)
steps = st.lists(st.tuples(st.integers(0, OWNERS - 1), ranges, st.sampled_from("wru")), max_size=40)


@settings(max_examples=300)
@given(steps)
def test_L1_ranges_are_those_of_a_model_of_single_bytes(steps: list) -> None:
    """Locks are granted iff no byte is held by another against them; a change touches its own bytes alone."""
    held: list[FileLock] = []
    model: list[dict[int, bool]] = [{} for _ in range(BYTES)]  # owner -> exclusive
    for owner, (first, last), kind in steps:
        wanted = lock(owner, first, LOCK_END if last == BYTES - 1 else last, kind == "w")
        bytes_meant = range(first, last + 1)
        own = [known for known in held if known.key == wanted.key]
        others = [known for known in held if known.key != wanted.key]
        if kind == "u":
            held = others + without(own, wanted.first, wanted.last)
            for at in bytes_meant:
                model[at].pop(owner, None)
            continue
        refused = any(
            exclusive or kind == "w" for at in bytes_meant for other, exclusive in model[at].items() if other != owner
        )
        assert bool(conflicts(held, wanted)) == refused
        if refused:
            continue
        held = others + with_lock(own, wanted)
        for at in bytes_meant:
            model[at][owner] = kind == "w"
        for at in range(BYTES):
            found = {known.owner: known.exclusive for known in held if known.first <= at <= known.last}
            assert found == model[at]
    for owner in range(OWNERS):
        mine = sorted((known for known in held if known.owner == owner), key=lambda known: known.first)
        for left, right in pairwise(mine):
            assert left.last < right.first
            assert left.last + 1 < right.first or left.exclusive != right.exclusive, "neighbours became one"


def test_posix_and_flock_locks_do_not_know_each_other() -> None:
    assert conflicts([lock(1, 0, LOCK_END, flock=True)], lock(2, 0, 5)) == []
    assert conflicts([lock(1, 0, LOCK_END, flock=True)], lock(2, 0, LOCK_END, flock=True)) != []


def test_the_same_number_of_another_session_is_another_owner() -> None:
    there = FileLock(8, False, 1, 0, 9, True, 1, 1)
    assert conflicts([there], lock(1, 5, 5)) == [there]


def test_a_circle_of_waits_is_seen_however_long_it_is_and_a_chain_is_none() -> None:
    waits: dict[OwnerKey, list[OwnerKey]] = {(1, False, n): [(1, False, n + 1)] for n in range(500)}
    start: OwnerKey = (1, False, 0)
    assert not is_deadlock(start, waits[start], lambda owner: waits.get(owner, []))
    waits[1, False, 500] = [start]
    assert is_deadlock(start, waits[start], lambda owner: waits.get(owner, []))


def test_a_circle_of_others_is_not_ours() -> None:
    waits: dict[OwnerKey, list[OwnerKey]] = {(1, False, 2): [(1, False, 3)], (1, False, 3): [(1, False, 2)]}
    assert not is_deadlock((1, False, 1), [(1, False, 2)], lambda owner: waits.get(owner, []))
