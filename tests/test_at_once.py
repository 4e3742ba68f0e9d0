"""Asking several at once: who has answered counts, whoever else fails; a Fenced of one ends it, when all have ended."""

import pytest
import trio

from coordinator.at_once import ask_all, ask_each
from csvfs.errors import CsvfsError, Fenced, Unavailable


def answering(after_s: dict[str, float], errors: dict[str, CsvfsError], asked: list[str]):
    async def ask(node: str) -> str:
        asked.append(node)
        await trio.sleep(after_s[node])
        asked.append(f"{node} ended")
        if node in errors:
            raise errors[node]
        return node.upper()

    return ask


async def test_all_are_asked_at_once_and_answers_and_errors_come_in_the_order_of_the_question(
    autojump_clock: trio.abc.Clock,
) -> None:
    down = Unavailable("n2 is down")
    ask = answering({"n1": 3, "n2": 1, "n3": 2}, {"n2": down}, [])
    before = trio.current_time()
    answers, errors = await ask_each(["n1", "n2", "n3"], ask)
    assert trio.current_time() - before == pytest.approx(3)
    assert list(answers.items()) == [("n1", "N1"), ("n3", "N3")] and errors == {"n2": down}


async def test_I6_a_fenced_of_one_is_raised_when_nothing_is_under_way_any_more(autojump_clock: trio.abc.Clock) -> None:
    asked: list[str] = []
    ask = answering({"n1": 1, "n2": 2}, {"n1": Fenced("a higher term"), "n2": Unavailable("down")}, asked)
    for question in (ask_each, ask_all):
        asked.clear()
        with pytest.raises(Fenced):
            await question(["n2", "n1"], ask)
        assert sorted(asked[:2]) == ["n1", "n2"] and asked[2:] == ["n1 ended", "n2 ended"]


async def test_asking_all_wants_an_answer_of_each(autojump_clock: trio.abc.Clock) -> None:
    with pytest.raises(Unavailable):
        await ask_all(["n1", "n2"], answering({"n1": 1, "n2": 1}, {"n2": Unavailable("down")}, []))
    assert await ask_all(["n1"], answering({"n1": 1}, {}, [])) == {"n1": "N1"}
    assert await ask_all([], answering({}, {}, [])) == {}
