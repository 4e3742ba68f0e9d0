"""How long programs waited in a drill: from operations to pauses, and over repeats to figures. Pure.

Place      admin floor, over drill_history.py.
A pause    is the longest time from asking to answer, of operations that were under way at the fault or asked for after it. An
           error is no answer: the wait goes on until the next success of that thread. Nor does it end without one before the
           programs do. `gap` is the longest time between two answers of one
           thread, which also sees a program that was not even able to ask.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from csvfs.admin.drill_history import APPEND, LOOK, NAMES, PEEK, POINTER, READ, SHARED, WRITE, Operation

# What a report has columns for, and which threads are in each. Overwrites go to space that is there; appends need the
# coordinator too, so both are writes.
GROUPS = {
    "reads": (READ,),
    "writes": (WRITE, APPEND),
    "metadata": (NAMES,),
    "shared": (SHARED, POINTER, PEEK, LOOK),  # a file that one node writes and another reads
}
MEASURED = ("reads", "writes", "metadata")  # what the goals are about


@dataclass(slots=True)
class Pause:
    """Milliseconds."""

    longest: float = 0.0
    gap: float = 0.0
    before: float = 0.0  # the longest before the fault: what this machine does by itself
    answers: int = 0


def pauses_of(operations: Iterable[Operation], fault_ns: int, end_ns: int) -> dict[str, Pause]:
    """One Pause for each of GROUPS."""
    by_thread: dict[str, list[Operation]] = {}
    for operation in operations:
        by_thread.setdefault(f"{operation.program}/{operation.thread}", []).append(operation)
    pauses = {group: Pause() for group in GROUPS}
    for of_thread in by_thread.values():
        group = group_of(of_thread[0].thread)
        if group is not None:
            _add_thread(pauses[group], of_thread, fault_ns, end_ns)
    return pauses


def group_of(thread: str) -> str | None:
    return next((group for group, threads in GROUPS.items() if thread in threads), None)


def _add_thread(pause: Pause, operations: list[Operation], fault_ns: int, end_ns: int) -> None:
    answered_ns: int | None = None
    asked_ns: int | None = None  # of the first of those that failed, as long as none has succeeded
    for operation in sorted(operations, key=lambda operation: operation.begin_ns):
        began_ns = operation.begin_ns if asked_ns is None else asked_ns
        if not operation.is_acknowledged:
            asked_ns = began_ns
            continue
        assert operation.end_ns is not None
        asked_ns = None
        if operation.end_ns < fault_ns:
            pause.before = max(pause.before, (operation.end_ns - began_ns) / 1e6)
        else:
            pause.longest = max(pause.longest, (operation.end_ns - began_ns) / 1e6)
            pause.answers += 1
            if answered_ns is not None:
                pause.gap = max(pause.gap, (operation.end_ns - answered_ns) / 1e6)
        answered_ns = operation.end_ns
    if asked_ns is not None:
        pause.longest = max(pause.longest, (max(end_ns, asked_ns) - asked_ns) / 1e6)


@dataclass(slots=True, frozen=True)
class Figure:
    """Of one column over all repeats: milliseconds."""

    median: float
    worst: float


def figure_of(values: Sequence[float]) -> Figure:
    return Figure(median(values), max(values)) if values else Figure(0.0, 0.0)


@dataclass(slots=True)
class Point:
    """For a picture: when (seconds from the fault), how long it took (ms), whether it failed."""

    at_s: float
    took_ms: float
    failed: bool = False


@dataclass(slots=True)
class Timeline:
    """The longest waits of every BIN_S of time, by group."""

    points: dict[str, list[Point]] = field(default_factory=dict)
    marks: list[tuple[float, str]] = field(default_factory=list)  # seconds from the fault, what was done


BIN_S = 0.02
POINTS_MAX = 4000  # in one group


def timeline_of(operations: Iterable[Operation], marks: Sequence[tuple[int, str]], end_ns: int) -> Timeline:
    """The picture of one round; `marks` are (ns, what was done), the first is the fault."""
    zero_ns = marks[0][0]
    worst: dict[tuple[str, int], Point] = {}
    for operation in operations:
        group = group_of(operation.thread)
        if group is None:
            continue
        ended_ns = operation.end_ns if operation.end_ns is not None else max(end_ns, operation.begin_ns)
        point = Point(
            (operation.begin_ns - zero_ns) / 1e9,
            (ended_ns - operation.begin_ns) / 1e6,
            operation.errno != 0 or operation.end_ns is None,
        )
        where = (group, int(point.at_s / BIN_S))
        known = worst.get(where)
        if known is None or (point.failed, point.took_ms) > (known.failed, known.took_ms):
            worst[where] = point
    timeline = Timeline(marks=[((ns - zero_ns) / 1e9, what) for ns, what in marks])
    for group, _ in sorted(worst):
        timeline.points.setdefault(group, [])
    for (group, _), point in sorted(worst.items(), key=lambda item: item[0]):
        if len(timeline.points[group]) < POINTS_MAX:
            timeline.points[group].append(point)
    return timeline
