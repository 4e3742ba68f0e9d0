"""Frozen: processes that are stopped are replaced; those that are late, or whose parent slept too, are let be."""

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from csvfs.admin.child import Child, ChildPlan
from csvfs.admin.frozen import LOOK_S, STEP_S_MAX, Look, Stillness, look_at
from csvfs.ids import Incarnation

STARTED = """
import os, sys, time
with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()}\\n")
while True:
    time.sleep(0.01)
"""


def stopped_for(looks: list[Look]) -> float:
    stillness = Stillness()
    return [stillness.add(look) for look in looks][-1]


def every(step_s: float, count: int, *, stopped: bool = True, ran_ns: int = 7, first_s: float = 0.0) -> list[Look]:
    return [Look(first_s + number * step_s, stopped, ran_ns) for number in range(count)]


def test_a_process_that_is_stopped_at_every_look_has_been_so_since_the_first_of_them():
    assert stopped_for(every(LOOK_S, 11)) == pytest.approx(10 * LOOK_S)


@given(st.lists(st.tuples(st.floats(0.0, 10.0), st.booleans(), st.integers(0, 2)), min_size=1, max_size=40))
def test_only_steps_between_two_looks_at_a_process_that_did_not_run_in_between_count(steps):
    """Whatever was seen: what counts is at most the time since it last ran or was seen to be able to."""
    now_s, ran_ns, looks = 0.0, 0, []
    for step_s, stopped, more_ns in steps:
        now_s, ran_ns = now_s + step_s, ran_ns + more_ns
        looks.append(Look(now_s, stopped, ran_ns))
    still = 0
    for before, after in itertools.pairwise(looks):
        still = still + 1 if before.stopped and after.stopped and before.ran_ns == after.ran_ns else 0
    seen = looks[len(looks) - 1 - still :]
    assert stopped_for(looks) <= min(seen[-1].now_s - seen[0].now_s, still * STEP_S_MAX) + 1e-9


def test_a_process_that_ran_for_a_nanosecond_between_two_looks_begins_anew():
    """As one under a tracer, which is stopped at most looks and gets on all the same."""
    assert stopped_for([*every(LOOK_S, 50), *every(LOOK_S, 1, ran_ns=8, first_s=50 * LOOK_S)]) == 0.0


def test_a_process_without_a_turn_is_not_stopped_however_long_it_waits():
    assert stopped_for(every(LOOK_S, 1000, stopped=False)) == 0.0


def test_a_parent_that_stood_still_itself_takes_nobody_for_frozen():
    """It was stopped with its children, which go on a moment after it."""
    assert stopped_for([Look(0.0, True, 7), Look(3600.0, True, 7)]) <= STEP_S_MAX


async def wait(condition: Callable[[], object]) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.02)


def started(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def child(tmp_path: Path, frozen_s: float) -> tuple[Child, Path]:
    numbers = iter(range(1, 100))

    async def incarnation() -> Incarnation:
        return Incarnation(next(numbers))

    pids = tmp_path / "pids"
    argv = [sys.executable, "-S", "-c", STARTED, str(pids)]
    plan = ChildPlan("mount", argv, lambda _: dict(os.environ), incarnation, tmp_path / "log", 0.1, frozen_s=frozen_s)
    return Child(plan), pids


async def test_a_child_that_is_stopped_is_killed_and_replaced(tmp_path, nursery):
    process, pids = child(tmp_path, frozen_s=0.5)
    nursery.start_soon(process.keep_running)
    await wait(lambda: len(started(pids)) == 1)
    (first,) = started(pids)
    os.kill(first, signal.SIGSTOP)
    await wait(lambda: len(started(pids)) == 2)
    assert not Path(f"/proc/{first}").exists()
    await process.stop(grace_s=0)


async def test_a_child_that_is_stopped_for_a_moment_or_not_at_all_is_let_be(tmp_path, nursery):
    process, pids = child(tmp_path, frozen_s=3600)
    nursery.start_soon(process.keep_running)
    await wait(lambda: len(started(pids)) == 1)
    (pid,) = started(pids)
    assert not look_at(pid, 0.0).stopped
    os.kill(pid, signal.SIGSTOP)
    await wait(lambda: look_at(pid, 0.0).stopped)
    first = look_at(pid, 0.0)
    assert look_at(pid, 1.0) == Look(1.0, True, first.ran_ns)  # it stands still
    os.kill(pid, signal.SIGCONT)
    await wait(lambda: not look_at(pid, 0.0).stopped)
    os.kill(pid, signal.SIGSTOP)
    await wait(lambda: look_at(pid, 0.0).stopped and look_at(pid, 0.0).ran_ns > first.ran_ns)  # and has run meanwhile
    os.kill(pid, signal.SIGCONT)
    assert started(pids) == [pid]
    await process.stop(grace_s=0)


def test_a_process_that_has_ended_is_not_stopped():
    assert look_at(2**22 + 1, 0.0) == Look(0.0, False, 0)
