"""What programs did and what they were told: recorded as it happens, judged at the end.

Place      simulator, above checker.py and models.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.simulator.clients.checker import Operation, Verdict, judge
from tests.simulator.clients.models import (
    CELL,
    CELLS_PER_PAGE,
    DIRECTORY,
    ROOT,
    file_step,
    files_step,
    names_parts,
    names_step,
    parts,
)
from tests.simulator.history import Violation

_TOKEN = struct.Struct("<QQ")
_MAGIC = 0x5EED_CE11_5EED_CE11
_ZERO = bytes(CELL)
NAMES = 0  # the object that is not a file
READS = frozenset(("lookup", "list", "links", "read", "size"))


def cell(number: int) -> bytes:
    return _TOKEN.pack(_MAGIC, number) * (CELL // _TOKEN.size)


def cells_of(data: bytes, what: str) -> tuple[int, ...]:
    """The numbers in what was read. Raises Violation: it is nothing that was ever written, whole."""
    found = []
    for start in range(0, len(data), CELL):
        piece = data[start : start + CELL]
        if len(piece) != CELL:
            raise Violation(f"{what}: {len(data)} bytes, which is no size that anybody gave the file")
        number = 0 if piece == _ZERO else _TOKEN.unpack_from(piece)[1]
        if piece != (cell(number) if number else _ZERO):
            raise Violation(f"{what}: a third thing: {piece[:32].hex()}")
        found.append(number)
    return tuple(found)


class Recorder:
    """The history of all objects of a run: the names, and each file by its inode."""

    def __init__(self, trace: Callable[[str], None]) -> None:
        self._trace = trace
        self._events = 0
        self._writes = 0
        self.operations: dict[int, list[Operation]] = {NAMES: []}
        self.answered = 0

    def next_write(self) -> int:
        """A number for the content of a cell, never used before."""
        self._writes += 1
        return self._writes

    def begin(self, what: int, who: str, name: str, *args: Any) -> Operation:
        self._events += 1
        operation = Operation(who, name, args, self._events, reads=name in READS, unknown=True, on=what)
        self.operations.setdefault(what, []).append(operation)
        self._trace(f"{who} {name} {_text(what, args)}")
        return operation

    def end(self, operation: Operation, answer: Any) -> None:
        """Its program was told `answer`."""
        self._events += 1
        self.answered += 1
        operation.ended, operation.answer, operation.unknown = self._events, answer, False
        self._trace(f"{operation.who} {operation.name} = {answer!r}")

    def expire(self, node: str) -> None:
        """The mount of a node is out: what its programs have asked of it, and have no answer to, is over (I6)."""
        self._events += 1
        for operation in self._unanswered_by(node):
            operation.expired = operation.expired or self._events

    def evicted(self, node: str) -> None:
        """The mount of a node is out, but the next one may go on with what its programs have asked."""
        for operation in self._unanswered_by(node):
            operation.evicted = True

    def _unanswered_by(self, node: str) -> list[Operation]:
        return [
            operation
            for operations in self.operations.values()
            for operation in operations
            if operation.unknown and _node(operation) == node
        ]

    def judge(self, names: frozenset[Any]) -> int:
        """How many objects are undecided. Args: names: those at the beginning. Raises Violation."""
        undecided = 0
        unanswered = self._unanswered()
        told = frozenset(arg for operation in self.operations[NAMES] for arg in operation.args if isinstance(arg, bytes))
        for group in self._groups():
            known = [
                part
                for what in group
                for operation in self.operations[what]
                if not (operation.reads and (operation.unknown or _is_early(operation, unanswered)))
                for part in (parts(operation) if what != NAMES else names_parts(operation, told))
            ]
            known += [replace(write, name="within") for what in group for write in _seen_to_the_old_end(self.operations[what])]
            first, step = _beginning(group, names, known)
            verdict = judge(known, first, step)
            undecided += verdict.undecided
            if verdict.wrong is not None:
                raise Violation(_explain(group, verdict, known))
        return undecided

    def _groups(self) -> list[list[int]]:
        """The objects, those together that were cloned from each other."""
        group_of = {what: [what] for what in self.operations}
        for target, operations in self.operations.items():
            for source in {operation.args[0] for operation in operations if operation.name == "clone"}:
                if source not in group_of:
                    group_of[source] = [source]
                    self.operations[source] = []
                one, other = group_of[target], group_of[source]
                if one is not other:
                    one += other
                    group_of.update(dict.fromkeys(other, one))
        return list({id(group): group for group in group_of.values()}.values())

    def _unanswered(self) -> dict[int, str]:
        """The numbers of writes that got no answer, with the node of each."""
        return {
            number: _node(operation)
            for operations in self.operations.values()
            for operation in operations
            if operation.unknown and operation.name in ("write", "append")
            for number in operation.args[-1]
        }


def _node(operation: Operation) -> str:
    return operation.who.partition(".")[0]


def _seen_to_the_old_end(operations: list[Operation]) -> list[Operation]:
    """Writes beyond the end of the file, in the midst of a page, beside which a read on the same node got half that page: what
    they wrote before the old end may be seen before the file is longer, as on any file system (ext4 sets the size last)."""
    halves = [read for read in operations if read.name == "read" and not read.unknown and len(read.answer) == 1]
    return [
        write
        for write in operations
        if write.name == "write" and not write.unknown
        and any(
            write.args[0] <= read.args[0] * CELLS_PER_PAGE < write.args[0] + len(write.args[1])
            and read.begun <= write.ended and write.begun <= read.ended and _node(read) == _node(write)
            for read in halves
        )
    ]  # fmt: skip


def _is_early(operation: Operation, unanswered: dict[int, str]) -> bool:
    """A read of what a write of the same node has put on the node's own drive, and maybe nowhere else: that may still be
    undone with the node's mount, as on one machine when it crashes (RELIABILITY.md, "Open")."""
    return operation.name == "read" and any(unanswered.get(number) == _node(operation) for number in operation.answer)


def first_names() -> frozenset[Any]:
    return frozenset({(ROOT, b"d", DIRECTORY, True)})


def _beginning(group: list[int], names: frozenset[Any], operations: list[Operation]) -> tuple[Any, Any]:
    """The first state of a group of objects, and how it goes on."""
    if group == [NAMES]:
        return names, names_step
    if len(group) == 1 and all(operation.name != "clone" for operation in operations):
        return (), file_step
    return ((),) * len(group), files_step(group)


def _text(what: int, args: tuple[Any, ...]) -> str:
    return (f"inode {what} " if what else "") + " ".join(map(str, args))


def _explain(group: list[int], verdict: Verdict, operations: list[Operation]) -> str:
    assert verdict.wrong is not None
    wrong = verdict.wrong
    before = [op for op in operations if op.begun < wrong.ended and op is not wrong]
    near = "; ".join(str(op) for op in before[-6:])
    texts = sorted(str(sorted(state, key=str) if group == [NAMES] else state) for state in verdict.states)
    states = " or ".join(texts[:2])
    name = "names" if group == [NAMES] else f"inode {' and '.join(map(str, group))}"
    return f"{name}: {wrong}: not linearizable; it was {states}; before: {near}"
