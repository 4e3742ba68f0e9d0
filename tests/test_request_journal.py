"""The journal of requests that outlives a mount process (I11): what the next one finds, whenever the first was killed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfs.mount import request_journal
from csvfs.mount.request_journal import SLOTS, WORDS, RequestJournal, current_request, overflowed


def fresh() -> memoryview:
    return memoryview(bytearray(8 * WORDS)).cast("Q")


def asks(journal: RequestJournal, unique: int, name: str) -> tuple[int, bool]:
    """A call that is made for a request."""
    token = current_request.set(unique)
    try:
        return journal.number(name)
    finally:
        current_request.reset(token)


def test_I11_a_call_that_is_made_again_for_the_same_request_by_the_next_process_has_its_number():
    words = fresh()
    first = RequestJournal(words)
    first.begin(70)
    first.begin(72)
    assert asks(first, 70, "unlink") == (1, False)
    assert asks(first, 72, "make") == (2, False)
    second = RequestJournal(words)
    second.begin(72)
    second.begin(70)
    assert asks(second, 72, "make") == (2, True)
    assert asks(second, 70, "unlink") == (1, True)
    assert asks(second, 70, "unlink") == (3, False)  # a second one of the same request, which the first had not made
    assert second.lowest == 1


def test_I11_no_number_is_given_up_before_the_kernel_has_its_answer():
    """The coordinator keeps an answer until it hears that no lower number comes again."""
    journal = RequestJournal(fresh())
    journal.begin(70)
    op, _ = asks(journal, 70, "make")
    journal.answered(op)
    later, _ = asks(journal, 0, "make")
    assert journal.lowest == op
    journal.done(70)
    assert journal.lowest == later
    journal.answered(later)


def test_I11_calls_that_may_be_made_anew_are_given_up_as_soon_as_they_are_answered():
    journal = RequestJournal(fresh())
    journal.begin(70)
    op, _ = asks(journal, 70, "allocate")
    journal.answered(op)
    assert asks(journal, 70, "commit")[0] == journal.lowest == op + 1


def test_what_the_kernel_does_not_ask_again_is_given_up():
    words = fresh()
    first = RequestJournal(words)
    for unique in (70, 72, 74):
        first.begin(unique)
        asks(first, unique, "rename")
    second = RequestJournal(words)
    second.begin(72)
    second.drop_old()
    assert asks(second, 72, "rename") == (2, True)
    assert second.lowest == 2
    second.done(72)
    third = RequestJournal(words)
    third.begin(70)
    assert asks(third, 70, "rename") == (4, False)


def test_an_append_goes_where_it_was_going_and_one_that_had_not_begun_goes_to_the_end():
    words = fresh()
    first = RequestJournal(words)
    token = current_request.set(70)
    try:
        first.begin(70)
        assert first.place(1000) == 1000
        assert first.place(5000) == 1000  # the same request
        second = RequestJournal(words)
        second.begin(70)
        assert second.place(2000) == 1000
        second.done(70)
        second.begin(70)  # the kernel never uses a number twice; the slot is free all the same
        assert second.place(2000) == 2000
    finally:
        current_request.reset(token)


def test_more_requests_than_there_are_slots_are_served_but_cannot_be_taken_over():
    words = fresh()
    journal = RequestJournal(words)
    for unique in range(1, SLOTS + 1):
        journal.begin(unique)
        asks(journal, unique, "unlink")
    assert not overflowed(words)
    journal.begin(SLOTS + 1)
    op, _ = asks(journal, SLOTS + 1, "unlink")
    assert overflowed(words)
    journal.answered(op)
    journal.done(SLOTS + 1)


class Killed(Exception):
    pass


class Memory:
    """Words whose process is killed before the store with number `left`."""

    def __init__(self, words: memoryview, left: int) -> None:
        self.words, self.left = words, left

    def __getitem__(self, at: int) -> int:
        return self.words[at]

    def __setitem__(self, at: int, value: int) -> None:
        if not self.left:
            raise Killed
        self.left -= 1
        self.words[at] = value


@given(
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["make", "unlink", "done"])), max_size=12),
    st.integers(0, 40),
)
def test_I11_killed_at_any_instant_no_two_calls_ever_have_one_number(history, left):
    original = request_journal.WORDS
    request_journal.WORDS = 2 + 2 * 8
    try:
        words = memoryview(bytearray(8 * request_journal.WORDS)).cast("Q")
        told: dict[int, tuple[int, str]] = {}  # what the coordinator was asked: number -> request, name
        open_requests: dict[int, list[str]] = {}
        try:
            journal = RequestJournal(Memory(words, left))  # type: ignore[arg-type]
            for unique, what in history:
                if what == "done":
                    if open_requests.pop(unique, None) is not None:
                        journal.done(unique)
                elif all(unique != asked for asked, _ in told.values()):  # the kernel never uses a number twice
                    open_requests[unique] = [what]
                    journal.begin(unique)
                    op, _ = asks(journal, unique, what)
                    assert op not in told
                    told[op] = (unique, what)
        except Killed:
            pass
        successor = RequestJournal(words)
        for unique, names in open_requests.items():
            successor.begin(unique)
            for name in names:
                op, again = asks(successor, unique, name)
                asked = [number for number, call in told.items() if call == (unique, name)]
                assert (op == asked[-1] and again) if asked and again else op not in told
                if asked and not again:
                    raise AssertionError(f"request {unique} had asked {name} as {asked}, and asks anew as {op}")
    finally:
        request_journal.WORDS = original


@pytest.mark.parametrize("name", ["setattr", "make", "link", "unlink", "rename", "setxattr", "removexattr"])
def test_I11_every_call_that_does_harm_twice_is_noted(name):
    words = fresh()
    first = RequestJournal(words)
    first.begin(70)
    op, _ = asks(first, 70, name)
    second = RequestJournal(words)
    second.begin(70)
    assert asks(second, 70, name) == (op, True)
