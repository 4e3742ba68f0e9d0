"""The coherence checker itself: what it takes for right, and what it finds."""

import json

import pytest

from tests.programs.coherence import Figures, NotCoherent, judge_round


def lines(*rows: tuple) -> list[str]:
    return [json.dumps(row) for row in rows]


def test_calls_side_by_side_may_take_effect_in_any_order():
    writer = lines(("word0", "write", [7], 0, 100, 8))
    reader = lines(("word0", "read", [], 10, 20, 7), ("word0", "read", [], 30, 40, 7))
    figures = Figures()
    judge_round([("a", writer), ("b", reader)], figures)
    assert (figures.operations, figures.histories, figures.undecided) == (3, 1, 0)


STALE = {
    "a page of before": lines(("word0", "write", [7], 0, 10, 8), ("word0", "read", [], 20, 30, 0)),
    "a page that came back": lines(
        ("half0", "write", [7], 0, 100, 8), ("half0", "read", [], 10, 20, 7), ("half0", "read", [], 30, 40, 0)
    ),
    "half a page": lines(("whole2", "write", [7], 0, 10, 4096), ("whole2", "read", [], 20, 30, "4096 bytes, mixed")),
    "an append over another": lines(
        ("log", "append", [1], 0, 10, 64), ("log", "append", [2], 20, 30, 64), ("log", "records", [], 40, 50, [2])
    ),
    "a lock that two have": lines(("lock", "lock", [1], 0, 10, 0), ("lock", "lock", [2], 20, 30, 0)),
    "an addition that got lost": lines(("added", 1), ("added", 1)),
    "a name that came back": lines(
        ("names", "make", [1, "a", False], 0, 10, 5), ("names", "unlink", [1, "a", False], 20, 30, 0),
        ("names", "lookup", [1, "a"], 40, 50, 5),
    ),
    "a count of links of before": lines(
        ("names", "make", [1, "a", False], 0, 10, 5), ("names", "link", [5, 1, "b"], 20, 30, 0),
        ("names", "links", [5], 40, 50, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", STALE)
def test_what_one_machine_would_not_have_shown_is_found(what):
    with pytest.raises(NotCoherent):
        judge_round([("a", STALE[what])], Figures())


def test_a_call_without_an_answer_may_have_been_carried_out_or_not():
    unanswered = ("word0", "write", [7], 0, 10, None)
    for value in (0, 7):
        judge_round([("a", lines(unanswered, ("word0", "read", [], 20, 30, value)))], Figures())
    with pytest.raises(NotCoherent):
        judge_round([("a", lines(unanswered, ("word0", "read", [], 20, 30, 8)))], Figures())
