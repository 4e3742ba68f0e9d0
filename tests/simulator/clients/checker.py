"""Is a history linearizable? An own small search, for one object at a time.

Place      simulator; knows nothing of the system. What programs did to one object, and what they were told; a model
           says what the object would have answered.
How        Just in time: while operations return, in their order, all states are kept that the object may be in, each
           with the operations under way that have taken effect in it. An operation that returns must have taken
           effect by then, with the answer that was given. No state left: nobody can have seen what was seen.
           A history is linearizable iff that of each object is, so objects are looked at one by one.
Unknown    An operation whose program got no answer (its node lost power, its mount was evicted) may take effect at any
           time until it `expires`, or never.
Limit      NODES_MAX states looked at for one answer; beyond it the history is *undecided*, which is counted and said.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

NODES_MAX = 60_000

State = Hashable
# (state, operation) -> the state after it; None: it cannot have been answered so in that state.
Step = Callable[[Any, "Operation"], Any]


class UndecidedError(Exception):
    """The search was given up."""


@dataclass(slots=True, eq=False)
class Operation:
    """`answer`: what the program was told. `unknown`: it was told nothing. Numbers: of all events, in their order.
    `expired`: since then nothing of it may take effect any more (I6); 0: never. `on`: the object. `evicted`: its mount
    was, before it was answered."""

    who: str
    name: str
    args: tuple[Any, ...]
    begun: int
    ended: int = 0
    answer: Any = None
    unknown: bool = False
    reads: bool = False  # it changes nothing
    expired: int = 0
    on: int = 0
    evicted: bool = False

    def __str__(self) -> str:
        answer = "?" if self.unknown else repr(self.answer)
        end = "" if self.unknown else str(self.ended)
        on = f" {self.on}" if self.on else ""
        return f"{self.begun}-{end} {self.who}{on} {self.name}{self.args!r} = {answer}"


@dataclass(slots=True)
class Verdict:
    """`wrong`: the first operation whose answer nothing explains. `undecided`: the search was given up before."""

    wrong: Operation | None = None
    undecided: bool = False
    states: frozenset[Any] = field(default_factory=frozenset)  # before the wrong answer


def judge(operations: Iterable[Operation], first: State, step: Step) -> Verdict:
    """Of the operations on one object, which began as `first`."""
    events: list[tuple[int, bool, Operation]] = []
    for operation in operations:
        events.append((operation.begun, False, operation))
        if not operation.unknown or operation.expired:
            events.append((operation.expired if operation.unknown else operation.ended, True, operation))
    events.sort(key=lambda event: event[0])
    under_way: dict[Operation, None] = {}
    # (state, those under way that have taken effect in it)
    configurations: set[tuple[Any, frozenset[Operation]]] = {(first, frozenset())}
    for _, is_end, operation in events:
        if not is_end:
            under_way[operation] = None
            continue
        try:
            after = _answered(configurations, list(under_way), operation, step)
        except UndecidedError:
            return Verdict(undecided=True)
        if operation.unknown:  # or it never took effect
            after |= {(state, done) for state, done in configurations if operation not in done}
        if not after:
            return Verdict(wrong=operation, states=frozenset(state for state, _ in configurations))
        del under_way[operation]
        configurations = after
    return Verdict()


def _answered(
    configurations: set[tuple[Any, frozenset[Operation]]],
    under_way: list[Operation],
    operation: Operation,
    step: Step,
) -> set[tuple[Any, frozenset[Operation]]]:
    """What may be the case once `operation` has been answered."""
    found: set[tuple[Any, frozenset[Operation]]] = set()
    seen = {(state, _with_reads(state, done, under_way, step)) for state, done in configurations}
    waiting = list(seen)
    while waiting:
        if len(seen) > NODES_MAX:
            raise UndecidedError
        state, done = waiting.pop()
        if operation in done:
            found.add((state, done - {operation}))
            continue
        after = step(state, operation)
        if after is not None:
            found.add((after, done))
            if operation.reads and after == state:
                # Whatever else takes effect may as well do so later.
                continue
        for other in under_way:
            if other is operation or other in done:
                continue
            changed = step(state, other)
            if changed is None or (changed == state and (other.unknown or other.reads)):
                continue
            next_one = (changed, _with_reads(changed, done | {other}, under_way, step))
            if next_one not in seen:
                seen.add(next_one)
                waiting.append(next_one)
    return found


def _with_reads(
    state: Any, done: frozenset[Operation], under_way: list[Operation], step: Step
) -> frozenset[Operation]:
    """A read under way that this very state explains has taken effect: it stands in nobody's way."""
    explained = [
        other for other in under_way if other.reads and other not in done and step(state, other) == state
    ]
    return done.union(explained) if explained else done
