"""Extent maps against a dict of blocks."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfs.errors import ProtocolError
from csvfs.volume.extents import HOLE, ExtentMap

UNKNOWN = None
SPACE = 60


def as_dict(extents: ExtentMap) -> dict[int, tuple[int, int]]:
    blocks: dict[int, tuple[int, int]] = {}
    for start, end, slab, slab_block in extents.runs:
        for block in range(start, end):
            assert block not in blocks
            blocks[block] = (slab, slab_block + block - start if slab >= 0 else 0)
    return blocks


@st.composite
def answers(draw: st.DrawFn) -> tuple[int, int, list[list[int]]]:
    """A covered range and extents, mostly inside of it, that do not overlap."""
    block = draw(st.integers(0, SPACE - 1))
    count = draw(st.integers(0, SPACE - block))
    extents = []
    at = draw(st.integers(0, SPACE))
    for _ in range(draw(st.integers(0, 4))):
        size = draw(st.integers(1, 6))
        slab = draw(st.integers(0, 2))
        extents.append([at, size, slab, draw(st.sampled_from([at, at + 7]))])
        at += size + draw(st.integers(0, 5))
    return block, count, draw(st.permutations(extents))


steps = st.lists(
    st.one_of(
        st.tuples(st.just("learn"), answers()),
        st.tuples(st.just("forget"), st.tuples(st.integers(0, SPACE), st.integers(0, SPACE))),
    ),
    max_size=12,
)


@given(steps)
def test_a_map_knows_what_a_dict_of_blocks_knows(history: list) -> None:
    extents, model = ExtentMap(), {}
    for name, args in history:
        if name == "learn":
            block, count, rows = args
            extents.learn(block, count, rows)
            model.update(dict.fromkeys(range(block, block + count), (HOLE, 0)))
            for first, size, slab, slab_block in rows:
                model.update({first + i: (slab, slab_block + i) for i in range(size)})
        else:
            extents.forget(*args)
            for block in range(*args):
                model.pop(block, None)
        assert as_dict(extents) == model
        assert extents.starts == [run[0] for run in extents.runs] == sorted(extents.starts)
        for before, after in zip(extents.runs, extents.runs[1:], strict=False):
            joins = before[1] == after[0] and before[2] == after[2]
            continues = before[2] == HOLE or before[3] + before[1] - before[0] == after[3]
            assert not (joins and continues), "neighbours that continue each other are one run"
    check_questions(extents, model)


def check_questions(extents: ExtentMap, model: dict[int, tuple[int, int]]) -> None:
    for block in range(SPACE + 10):
        run = extents.find(block)
        assert (run is not None) == (block in model)
        for count in (1, 5, 30):
            span = range(block, block + count)
            known = all(b in model for b in span)
            assert extents.covers(block, count) == known
            assert extents.first_unknown(block, count) == next((b for b in span if b not in model), block)
            pieces = extents.pieces(block, count)
            assert (pieces is not None) == known
            if pieces is not None:
                found = {b + i: (s, sb + i if s >= 0 else 0) for b, n, s, sb in pieces for i in range(n)}
                assert found == {b: model[b] for b in span}
            found = {b + i: (s, sb + i) for b, n, s, sb in extents.allocated(block, count) for i in range(n)}
            assert found == {b: model[b] for b in span if b in model and model[b][0] >= 0}
            holes = [b for b in span if model.get(b) == (HOLE, 0)]
            if known:
                assert extents.first_hole(block, count) == (holes[0] if holes else None)


def test_a_file_written_in_order_is_one_run() -> None:
    extents = ExtentMap()
    for block in range(0, 1000, 10):
        extents.learn(block, 10, [[block, 10, 3, block]])
    assert extents.runs == [(0, 1000, 3, 0)]


@pytest.mark.parametrize(
    "rows", [[[0, 0, 1, 1]], [[-1, 2, 1, 1]], [[0, 1, -5, 0]], [[0, 1]], [None], [[0, 5, 1, 0], [4, 5, 1, 9]]]
)
def test_an_answer_that_cannot_be_is_refused_and_nothing_of_it_taken(rows: list) -> None:
    extents = ExtentMap()
    extents.learn(0, 4, [[0, 4, 9, 9]])
    with pytest.raises(ProtocolError):
        extents.learn(0, 10, rows)
    assert extents.runs == [(0, 4, 9, 9)]


def test_100_000_extents_stay_fast() -> None:
    extents = ExtentMap()
    extents.learn(0, 400_000, [[block, 2, 1, 7 * block] for block in range(0, 400_000, 4)])
    assert len(extents) == 200_000
    began = time.process_time()
    for block in range(0, 400_000, 400):
        assert extents.pieces(block, 2) == [(block, 2, 1, 7 * block)]
        extents.learn(block + 2, 2, [[block + 2, 2, 5, block]])
    assert time.process_time() - began < 1.0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["shared", "own", "forget", "unshare"]), st.integers(0, SPACE - 1), st.integers(1, 20)
        ),
        max_size=20,
    )
)
def test_what_is_shared_is_known_as_a_set_of_blocks_knows_it(history: list) -> None:
    extents, shared = ExtentMap(), set()
    for what, block, count in history:
        span = set(range(block, block + count))
        if what == "shared":
            middle = [block + count // 3, max(1, count // 2)]
            extents.learn(block, count, [[block, count, 1, 7]], [middle])
            shared = shared - span | set(range(middle[0], sum(middle)))
        elif what == "own":
            extents.learn(block, count, [[block, count, 1, 7]])
            shared -= span
        elif what == "forget":
            extents.forget(block, block + count)
            shared -= span
        else:
            extents.unshare(block, count)
            shared -= span
        assert {at for start, end in extents.shared for at in range(start, end)} == shared
        assert all(a[1] < b[0] for a, b in zip(extents.shared, extents.shared[1:], strict=False))
        for at in range(SPACE + 20):
            for size in (1, 4):
                assert extents.is_shared(at, size) == bool(shared & set(range(at, at + size)))
    extents.clear()
    assert not extents.shared and not extents.is_shared(0, SPACE)


@pytest.mark.parametrize("rows", [[[0, 0]], [[-1, 3]], [[1]], [None]])
def test_shared_ranges_that_cannot_be_are_refused_and_nothing_taken(rows: list) -> None:
    extents = ExtentMap()
    with pytest.raises(ProtocolError):
        extents.learn(0, 4, [[0, 4, 1, 1]], rows)
    assert not len(extents) and not extents.shared
