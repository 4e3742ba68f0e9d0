"""The judge of a drill: was anything lost, did anything un-happen, did a program see an error? Pure.

Place      admin floor, over drill_history.py.
Method     A key has one writer, which waits for every answer; so the values it has held are one sequence, its versions. A
           look at a key may have seen version i iff that value was seen, its change had begun before the look ended, and no
           later acknowledged change had been answered before the look began. Of two looks of which one ended before the
           other began, the later never saw an older version: the oldest version that is possible is taken for each, which
           accuses nobody wrongly. A change that failed, or was never answered, may have happened or not.
Finds      lost         read back at the end, something that was acknowledged is not there
           stale        a look saw what had been replaced before it began
           un-happened  a look saw what is older than what an earlier look saw
           invented     a look saw what nobody had begun to write
           torn         a block that is no record: mixed, misplaced, or damaged
           error        an operation failed, where the drill promises that none does
           unanswered   an operation was never answered
           not looked   something that was written was never read back: this judge would have missed its loss
"""

import heapq
import os
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from csvfs.admin.drill_history import ABSENT, FINAL, NAMES_OF_LIST, NOTHING, PRESENT, TORN, Operation

INFINITE_NS = 1 << 62
NAME_LETTERS = "fgd"

LOST, STALE, UNHAPPENED, INVENTED, TORN_BLOCK = "lost", "stale", "un-happened", "invented", "torn"
ERROR, UNANSWERED, NOT_LOOKED = "error", "unanswered", "not looked"

Key = tuple[str, str]  # folder, key


@dataclass(slots=True, frozen=True)
class Violation:
    kind: str
    where: str  # folder/key
    what: str
    at_ns: int

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.what}"


@dataclass(slots=True)
class Verdict:
    violations: list[Violation] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.violations


class _Versions:
    """All values that one key has held, in order; the first is how it was before anybody changed it."""

    def __init__(self, initial: str) -> None:
        self.values = [initial]
        self.begins = [-1]
        self.ends = [-1]  # of one that may not have happened: INFINITE_NS
        self._acknowledged = [0]
        self._acknowledged_ends = [-1]
        self._places: dict[str, list[int]] = {initial: [0]}

    def append(self, value: str, operation: Operation) -> None:
        index = len(self.values)
        self.values.append(value)
        self.begins.append(operation.begin_ns)
        self.ends.append(INFINITE_NS)
        self._places.setdefault(value, []).append(index)
        if operation.is_acknowledged:
            assert operation.end_ns is not None
            self.ends[index] = operation.end_ns
            self._acknowledged.append(index)
            self._acknowledged_ends.append(operation.end_ns)

    def oldest_allowed(self, begin_ns: int) -> int:
        """The last version that was acknowledged before `begin_ns`."""
        return self._acknowledged[bisect_left(self._acknowledged_ends, begin_ns) - 1]

    def newest_allowed(self, end_ns: int) -> int:
        return bisect_left(self.begins, end_ns) - 1

    def first_from(self, value: str, index: int) -> int | None:
        """The oldest version of this value that is not older than `index`."""
        places = self._places.get(value, [])
        at = bisect_left(places, index)
        return places[at] if at < len(places) else None

    def last_until(self, value: str, index: int) -> int | None:
        places = self._places.get(value, [])
        at = bisect_right(places, index)
        return places[at - 1] if at else None


def judge(operations: Iterable[Operation]) -> Verdict:
    """Judge all that the programs of one round logged.

    Returns  violations in the order in which they happened.
    """
    ordered = sorted(operations, key=lambda operation: (operation.begin_ns, operation.number))
    verdict = Verdict()
    _judge_answers(ordered, verdict)
    versions: dict[Key, _Versions] = {}
    for operation in ordered:
        for key, value in operation.effects:
            where = (operation.folder, key)
            if where not in versions:
                versions[where] = _unwritten(key)
            versions[where].append(value, operation)
    looks: dict[Key, list[Operation]] = defaultdict(list)
    for operation in ordered:
        if operation.is_acknowledged and operation.key:
            for look in _expanded(operation, versions):
                looks[operation.folder, look.key].append(look)
    for where, of_key in looks.items():
        verdict.violations += _judge_looks(where, versions.get(where) or _unwritten(where[1]), of_key)
    verdict.violations += _not_looked(versions, looks)
    verdict.violations.sort(key=lambda violation: violation.at_ns)
    return verdict


def _unwritten(key: str) -> _Versions:
    return _Versions(ABSENT if _is_name(key) else NOTHING)


def _judge_answers(ordered: list[Operation], verdict: Verdict) -> None:
    for operation in ordered:
        where = f"{operation.program}/{operation.thread}"
        what = f"{operation.kind} {_named(operation)}"
        if operation.end_ns is None:
            verdict.violations.append(Violation(UNANSWERED, where, what, operation.begin_ns))
        elif operation.errno:
            error = f"{what}: {os.strerror(operation.errno)}"
            verdict.violations.append(Violation(ERROR, where, error, operation.end_ns))


def _named(operation: Operation) -> str:
    return operation.key or ",".join(key for key, _ in operation.effects) or f"number {operation.number}"


def _expanded(operation: Operation, versions: dict[Key, _Versions]) -> Iterator[Operation]:
    """A look at one key as it is; one at a whole folder or at a file's end as looks at all that belongs there."""
    if operation.key == NAMES_OF_LIST:
        there = set(operation.seen.split(",")) - {""}
        keys = {key for folder, key in versions if folder == operation.folder and _is_name(key)}
        for key in keys | there:
            yield replace(operation, key=key, seen=PRESENT if key in there else ABSENT)
    elif operation.key.endswith("*"):
        for folder, key in versions:
            is_of_file = folder == operation.folder and key[0] == operation.key[0] and key[1:].isdecimal()
            if is_of_file and int(key[1:]) >= int(operation.seen):
                yield replace(operation, key=key, seen=NOTHING)
    else:
        yield operation


def _is_name(key: str) -> bool:
    return key[:1] in NAME_LETTERS and key[1:].isdecimal()


def _judge_looks(where: Key, versions: _Versions, looks: list[Operation]) -> Iterator[Violation]:
    """`looks` by when they began, all answered."""
    seen_until: list[tuple[int, int]] = []  # heap of (end, version) of looks that may not have ended yet
    newest_seen = 0
    for look in sorted(looks, key=lambda look: look.begin_ns):
        while seen_until and seen_until[0][0] < look.begin_ns:
            newest_seen = max(newest_seen, heapq.heappop(seen_until)[1])
        assert look.end_ns is not None
        oldest, newest = versions.oldest_allowed(look.begin_ns), versions.newest_allowed(look.end_ns)
        found = versions.first_from(look.seen, max(oldest, newest_seen))
        if found is not None and found <= newest:
            heapq.heappush(seen_until, (look.end_ns, found))
            continue
        yield _accuse(where, versions, look, oldest, newest, newest_seen)


def _accuse(where: Key, versions: _Versions, look: Operation, oldest: int, newest: int, newest_seen: int) -> Violation:
    place = "/".join(where)
    at_ns = look.end_ns or look.begin_ns
    by = f"{look.program}/{look.thread} saw {look.seen}"
    known = versions.last_until(look.seen, newest)
    if look.seen == TORN:
        return Violation(TORN_BLOCK, place, f"{by}, which is no whole record of this place", at_ns)
    if known is None:
        return Violation(INVENTED, place, f"{by}, which nobody had begun to write", at_ns)
    if known < oldest:
        kind = LOST if look.thread == FINAL else STALE
        return Violation(kind, place, f"{by}, but {versions.values[oldest]} had been acknowledged before", at_ns)
    return Violation(UNHAPPENED, place, f"{by}, but {versions.values[newest_seen]} had been seen before", at_ns)


def _not_looked(versions: dict[Key, _Versions], looks: dict[Key, list[Operation]]) -> Iterator[Violation]:
    for where, of_key in versions.items():
        if not any(look.thread == FINAL for look in looks.get(where, ())):
            yield Violation(NOT_LOOKED, "/".join(where), "nobody read it back at the end", max(of_key.begins))
