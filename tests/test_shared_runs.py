"""Runs of shared blocks against a counter for each block."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from coordinator.shared_runs import Run, owners_of, with_owner, without_owner

SPACE = 40

ranges = st.tuples(st.integers(0, SPACE - 1), st.integers(1, 12)).map(lambda r: (r[0], min(r[1], SPACE - r[0])))
steps = st.lists(st.tuples(st.booleans(), ranges), max_size=40)


def touching(runs: list[Run], block: int, count: int) -> list[Run]:
    """What the database shows of the range: the runs that overlap or touch it."""
    return [run for run in runs if run[0] <= block + count and run[0] + run[1] >= block]


@given(steps)
def test_runs_count_the_owners_of_every_block_as_a_counter_for_each_does(history: list) -> None:
    """P3: what a step drops is what nobody has any more, and nothing else."""
    owners = dict.fromkeys(range(SPACE), 1)  # of blocks that anybody has
    ever: set[int] = set()  # were shared since anybody got them
    runs: list[Run] = []
    for adds, (block, count) in history:
        count = min(count, next((at for at in range(count) if block + at not in owners), count))
        if not count:
            continue
        near = touching(runs, block, count)
        if adds:
            left, dropped = with_owner(near, block, count), []
        else:
            left, dropped = without_owner(near, block, count)
        runs = sorted([*(run for run in runs if run not in near), *left])
        want_dropped = []
        for at in range(block, block + count):
            owners[at] += 1 if adds else -1
            if adds:
                ever.add(at)
            if not owners[at]:
                del owners[at]
                ever.discard(at)
                want_dropped.append(at)
        assert [at for first, size in dropped for at in range(first, first + size)] == want_dropped
        shown = {at: n for first, size, n in runs for at in range(first, first + size)}
        assert shown == {at: n for at, n in owners.items() if at in ever}
        assert sum(size for _, size, _ in runs) == len(shown)
        for before, after in pairwise(runs):
            assert before[0] + before[1] < after[0] or before[2] != after[2], "neighbours alike are one run"
        pieces = owners_of(touching(runs, block, count), block, count)
        assert {at: n for first, size, n in pieces for at in range(first, first + size)} == {
            at: shown.get(at, 0) for at in range(block, block + count)
        }
