"""The judge of drills: it acquits what happened, and finds every kind of thing that must not happen."""

import errno
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csvfs.admin import drill_judge as judging
from csvfs.admin.drill_history import (
    FINAL,
    NOTHING,
    RECORD_SIZE,
    TORN,
    Operation,
    begin_line,
    count_acknowledged,
    done_line,
    parse_log,
    record,
    value_of,
)
from csvfs.admin.drill_judge import judge

MS = 1_000_000


def change(effects: dict[str, str], begin: int, end: int | None, error: int = 0, thread: str = "write") -> Operation:
    ends = None if end is None else end * MS
    return Operation("w", "w", thread, begin, "change", begin * MS, ends, error, tuple(effects.items()))


def look(key: str, seen: str, begin: int, end: int, thread: str = "read", program: str = "w") -> Operation:
    return Operation(program, "w", thread, begin, "look", begin * MS, end * MS, 0, (), key, seen)


def final(key: str, seen: str) -> Operation:
    return look(key, seen, 9000, 9001, FINAL, "verify")


def kinds(*operations: Operation) -> list[str]:
    return [violation.kind for violation in judge(operations).violations]


WRITES = (change({"b1": "1"}, 10, 12), change({"b1": "2"}, 20, 25))


def test_what_really_happened_is_acquitted():
    looks = (look("b1", NOTHING, 1, 2), look("b1", "1", 13, 14), look("b1", "1", 21, 24), look("b1", "2", 22, 24))
    assert kinds(*WRITES, *looks, look("b1", "2", 26, 27), final("b1", "2")) == []


def test_an_acknowledged_write_that_is_not_there_at_the_end_is_lost():
    assert kinds(*WRITES, final("b1", "1")) == [judging.LOST]
    assert kinds(*WRITES, final("b1", NOTHING)) == [judging.LOST]


def test_a_write_that_failed_or_was_not_answered_may_be_there_or_not():
    for last, said in (
        (change({"b1": "2"}, 20, 25, errno.EIO), judging.ERROR),
        (change({"b1": "2"}, 20, None), judging.UNANSWERED),
    ):
        for seen in ("1", "2"):
            assert kinds(WRITES[0], last, final("b1", seen)) == [said]
        # But once it was seen it stays.
        looks = look("b1", "2", 30, 31), final("b1", "1")
        assert sorted(kinds(WRITES[0], last, *looks)) == sorted([said, judging.UNHAPPENED])


def test_a_look_that_sees_what_was_replaced_before_it_began_is_stale():
    assert kinds(*WRITES, look("b1", "1", 26, 27, "peek", "watch"), final("b1", "2")) == [judging.STALE]


def test_a_look_that_sees_less_than_an_earlier_one_of_another_program_shows_that_something_unhappened():
    new, old = look("b1", "2", 21, 22, "peek", "a"), look("b1", "1", 23, 24, "peek", "b")
    assert kinds(*WRITES, new, old, final("b1", "2")) == [judging.UNHAPPENED]
    side_by_side = replace(old, begin_ns=new.begin_ns)
    assert kinds(*WRITES, new, side_by_side, final("b1", "2")) == []


def test_what_nobody_wrote_or_nobody_had_begun_to_write_is_invented():
    assert kinds(*WRITES, look("b1", "7", 13, 14), final("b1", "2")) == [judging.INVENTED]
    assert kinds(*WRITES, look("b1", "2", 13, 14), final("b1", "2")) == [judging.INVENTED]


def test_a_torn_block_is_found():
    assert kinds(*WRITES, look("b1", TORN, 22, 23), final("b1", "2")) == [judging.TORN_BLOCK]


def test_errors_and_operations_without_answer_count():
    failed = change({"b1": "2"}, 20, 25, errno.EIO)
    open_end = change({"b1": "3"}, 30, None)
    assert kinds(WRITES[0], failed, open_end, final("b1", "1")) == [judging.ERROR, judging.UNANSWERED]


def test_what_nobody_read_back_is_no_proof_of_anything():
    assert kinds(*WRITES) == [judging.NOT_LOOKED]


CREATED = change({"f1": "present"}, 10, 12, thread="names")
RENAMED = change({"f1": "absent", "g1": "present"}, 20, 22, thread="names")
REMOVED = change({"g1": "absent"}, 30, 32, thread="names")


def test_a_removed_file_that_reappears_is_found():
    assert kinds(CREATED, RENAMED, REMOVED, final("*", "")) == []
    assert kinds(CREATED, RENAMED, REMOVED, final("*", "g1")) == [judging.LOST]
    assert kinds(CREATED, RENAMED, REMOVED, look("g1", "absent", 31, 32), look("g1", "present", 33, 34), final("*", "")) == [
        judging.STALE
    ]


def test_a_created_file_that_vanishes_and_a_half_rename_are_found():
    assert kinds(CREATED, final("*", "f1")) == []
    assert kinds(CREATED, final("*", "")) == [judging.LOST]
    assert kinds(CREATED, RENAMED, final("*", "g1")) == []
    assert kinds(CREATED, RENAMED, final("*", "f1,g1")) == [judging.LOST]
    assert sorted(kinds(CREATED, RENAMED, final("*", ""))) == [judging.LOST]
    assert kinds(CREATED, final("*", "f1,f9")) == [judging.INVENTED]


def test_an_append_that_is_behind_the_end_of_the_file_is_lost():
    appends = (change({"a0": "1"}, 10, 12), change({"a1": "2"}, 20, 22))
    whole = (final("a0", "1"), final("a1", "2"), final("a*", "2"))
    assert kinds(*appends, *whole) == []
    assert kinds(*appends, final("a0", "1"), final("a*", "1")) == [judging.LOST]


# Histories


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """What one writer and three readers of one register may see, from a register that is right."""
    now = 0
    steps: list[tuple[int, str]] = [(-1, NOTHING)]  # when the register changed
    operations = []
    for value in range(1, draw(st.integers(2, 8))):
        begin = now + draw(st.integers(1, 5))
        moment = begin + draw(st.integers(0, 5))
        end = moment + draw(st.integers(0, 5))
        operations.append(change({"b1": str(value)}, begin, end))
        steps.append((moment, str(value)))
        now = end
    for _ in range(draw(st.integers(0, 12))):
        begin = draw(st.integers(0, now + 5))
        moment = begin + draw(st.integers(0, 5))
        seen = [value for at, value in steps if at <= moment][-1]
        operations.append(look("b1", seen, begin, moment + draw(st.integers(1, 5)), "peek", draw(st.sampled_from("abc"))))
    return [*operations, final("b1", steps[-1][1])]


@given(histories())
def test_the_judge_accuses_no_history_of_a_register_that_is_right(history):
    assert kinds(*history) == []


@settings(max_examples=200)
@given(histories(), st.data())
def test_the_judge_finds_what_was_changed_in_a_history_so_that_nothing_explains_it(history, data):
    """One look is made to see what was replaced before it began, or what was written after it ended."""
    writes = [operation for operation in history if operation.effects]
    index = data.draw(st.integers(len(writes), len(history) - 1))
    looked = history[index]
    gone = [w.effects[0][1] for w, after in pairwise(writes) if after.end_ns < looked.begin_ns]
    to_come = [w.effects[0][1] for w in writes if w.begin_ns >= looked.end_ns]
    candidates = gone + to_come + ["77", TORN]
    history[index] = replace(looked, seen=data.draw(st.sampled_from(candidates)))
    assert kinds(*history)


@settings(max_examples=200)
@given(histories(), st.data())
def test_the_judge_finds_a_write_that_was_never_done(history, data):
    """The writer was answered; what it wrote is nowhere: somebody must see the one before it later, or the end does."""
    assert kinds(*history[:-1], replace(history[-1], seen=str(int(history[-1].seen) - 1))) == [judging.LOST]


# Logs and records


def test_a_log_says_what_was_done_and_a_line_that_was_cut_off_does_not_count():
    lines = begin_line(1, "overwrite", 5, "b1=1") + done_line(1, 7, 0, "") + begin_line(2, "read", 8, "b1")
    lines += done_line(2, 9, 0, "1") + begin_line(3, "fsync", 10, "") + done_line(3, 11, 0, "")
    lines += begin_line(4, "overwrite", 12, "b2=2") + b"D 4 13"
    written, read, synced, cut = parse_log(lines.decode(), "w", "w", "write")
    assert (written.effects, written.begin_ns, written.end_ns, written.key) == ((("b1", "1"),), 5, 7, "")
    assert (read.key, read.seen, read.effects) == ("b1", "1", ())
    assert synced.is_acknowledged and not cut.is_acknowledged and cut.end_ns is None
    assert count_acknowledged([written, read, synced, cut]) == (1, 1)
    with pytest.raises(ValueError, match="no line of a drill"):
        parse_log("hello\n", "w", "w", "write")


@given(st.integers(0, RECORD_SIZE - 1), st.integers(1, 255))
def test_a_record_with_any_byte_changed_is_torn_and_so_is_one_of_another_place(place, mask):
    block = bytearray(record("w", "b1", 7))
    assert value_of(bytes(block), "w", "b1") == "7"
    assert value_of(bytes(block), "w", "b2") == value_of(bytes(block), "v", "b1") == TORN
    assert value_of(bytes(block[:100]), "w", "b1") == TORN
    block[place] ^= mask
    assert value_of(bytes(block), "w", "b1") != "7"
    assert value_of(bytes(RECORD_SIZE), "w", "b1") == value_of(b"", "w", "b1") == NOTHING
