"""Explorer: every state that a small world can reach within so many steps, the nearest first.

Place      state checker, bottom. Knows nothing of slabs: a world offers steps, and says what is wrong with it.
How        Breadth-first over states, told apart by a fingerprint. Coroutines of the product cannot be copied, so a
           state is reached anew by doing the steps that led to it: a world must be a function of its steps.
Shortest   the first trace that shows something wrong has the fewest steps of all.
Walks      go deeper than breadth-first ever gets: one step after the other, drawn by a seed. What they find is made as
           short as leaving out steps can make it.
"""

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from random import Random
from time import monotonic
from typing import Protocol


class Violation(Exception):
    """An invariant does not hold. The message begins with its number."""


class World(Protocol):
    """One state. A new world is in the first one."""

    def steps(self) -> list[str]:
        """What may happen next, in words, always in the same order."""
        ...

    def do(self, step: str) -> None:
        """Let it happen. Raises Violation."""
        ...

    def fingerprint(self) -> Hashable:
        """Equal iff the same may follow."""
        ...

    def check(self) -> None:
        """Raises Violation when an invariant does not hold in this state."""
        ...


@dataclass(slots=True)
class Outcome:
    """`trace`: the steps that lead to a violation, if one was found. `complete`: there is nothing beyond `depth`."""

    states: int = 0
    transitions: int = 0
    depth: int = 0
    seconds: float = 0.0
    complete: bool = False
    violation: str = ""
    trace: tuple[str, ...] = ()


@dataclass(slots=True, frozen=True)
class _Node:
    """How a state was reached: the last step, and the state before."""

    before: "_Node | None"
    step: str
    depth: int

    def trace(self) -> tuple[str, ...]:
        steps: list[str] = []
        node: _Node | None = self
        while node is not None and node.before is not None:
            steps.append(node.step)
            node = node.before
        return tuple(reversed(steps))


def replay(make: Callable[[], World], trace: tuple[str, ...]) -> World:
    """The state at the end of a trace."""
    world = make()
    for step in trace:
        world.do(step)
    return world


def explore(
    make: Callable[[], World],
    *,
    depth_max: int,
    states_max: int | None = None,
    seconds_max: float | None = None,
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Visit states breadth-first until all are known, a limit is reached, or an invariant does not hold."""
    began = monotonic()
    outcome = Outcome(states=1)
    world = make()
    world.check()
    known = {hash(world.fingerprint())}  # 64 bits each: of ten million states two are taken for one with p = 3e-6
    frontier = deque([_Node(None, "", 0)])
    while frontier:
        node = frontier.popleft()
        if node.depth > outcome.depth:
            outcome.depth, outcome.seconds = node.depth, monotonic() - began
            progress(outcome)
        late = seconds_max is not None and monotonic() - began > seconds_max
        if node.depth >= depth_max or late or (states_max is not None and outcome.states >= states_max):
            outcome.seconds = monotonic() - began
            return outcome
        trace = node.trace()
        world = replay(make, trace)
        *steps, last = world.steps() or [""]
        for step in (*steps, last) if last else ():
            child = world if step is last else replay(make, trace)  # the last one may use it up
            outcome.transitions += 1
            try:
                child.do(step)
                child.check()
            except Violation as violation:
                outcome.violation, outcome.trace = str(violation), (*trace, step)
                outcome.depth, outcome.seconds = node.depth + 1, monotonic() - began
                return outcome
            mark = hash(child.fingerprint())
            if mark not in known:
                known.add(mark)
                outcome.states += 1
                frontier.append(_Node(node, step, node.depth + 1))
    outcome.seconds, outcome.complete = monotonic() - began, True
    return outcome


WALK_STEPS_MAX = 140
FAULT_WEIGHT = 0.25  # of other steps: else all faults happen at the beginning


def walk(make: Callable[[], World], walks: int, *, seed: int, is_fault: Callable[[str], bool]) -> Outcome:
    """As many random walks, or until an invariant does not hold. `states` counts what was passed, twice what was met
    twice."""
    began = monotonic()
    outcome = Outcome()
    for number in range(walks):
        rng = Random(seed + number)
        world, trace = make(), list[str]()
        try:
            while len(trace) < WALK_STEPS_MAX and (steps := world.steps()):
                weights = [FAULT_WEIGHT if is_fault(step) else 1.0 for step in steps]
                trace.append(rng.choices(steps, weights)[0])
                world.do(trace[-1])
                world.check()
                outcome.transitions += 1
        except Violation as violation:
            outcome.trace = _shortened(make, tuple(trace), str(violation)[:2])
            outcome.violation = _violation_of(make, outcome.trace) or str(violation)
            break
        finally:
            outcome.depth = max(outcome.depth, len(trace))
    outcome.states, outcome.seconds = outcome.transitions, monotonic() - began
    return outcome


def _violation_of(make: Callable[[], World], trace: tuple[str, ...]) -> str | None:
    """What a trace leads to; None: nothing wrong, or one of its steps cannot happen."""
    world = make()
    try:
        for step in trace:
            if step not in world.steps():
                return None
            world.do(step)
            world.check()
    except Violation as violation:
        return str(violation)
    return None


def _shortened(make: Callable[[], World], trace: tuple[str, ...], number: str) -> tuple[str, ...]:
    """Without the steps that a violation of the same invariant does not need."""
    size = 8
    while size:
        shorter = None
        for start in range(len(trace)):
            tried = trace[:start] + trace[start + size :]
            if (_violation_of(make, tried) or "").startswith(number):
                shorter = tried
                break
        if shorter is None:
            size //= 2
        else:
            trace = shorter
    return trace
