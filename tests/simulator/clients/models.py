"""What a volume would answer if there were one node and nothing ever broke: names, and the bytes of one file.

Place      simulator; pure, for checker.py.
Names      state: a frozenset of (directory, name, inode, is a directory). Directories 1 and 2 are always there.
File       state: its cells, in order. A cell is half a block, filled with the number of the write that made it; 0:
           zeros. Sizes are whole cells.
Files      state: those of files that were cloned from each other, in a fixed order. What a clone takes of a page is what the
           source has at that moment, for each page at another one. A last page of one cell is not shared but read
           and written, so that something else may be there in between: that cell counts as ANY.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.simulator.clients.checker import Operation

ROOT, DIRECTORY = 1, 2
CELL = 2048
CELLS_PER_PAGE = 2
PIECEMEAL = "list in pieces"
ANY = -1  # a cell of which nothing is known

Names = frozenset[tuple[int, bytes, Any, bool]]
Cells = tuple[int, ...]
Files = tuple[Cells, ...]


def names_step(state: Names, operation: Operation) -> Names | None:
    """See checker.Step. Of an inode that nobody was told of (its maker got no answer) the number is a pair."""
    return _NAMES[operation.name](state, operation)


def _find(state: Names, directory: int, name: bytes) -> tuple[int, bytes, Any, bool] | None:
    return next((entry for entry in state if entry[0] == directory and entry[1] == name), None)


def _is_there(state: Names, directory: int) -> bool:
    return directory in (ROOT, DIRECTORY) or any(entry[2] == directory for entry in state)


def _learned(state: Names, unknown: Any, ino: int) -> Names | None:
    """The inode `unknown` turns out to be `ino`; None: that is another one."""
    if not isinstance(unknown, tuple) or any(entry[2] == ino or entry[0] == ino for entry in state):
        return None
    return frozenset((d, n, ino if i == unknown else i, k) for d, n, i, k in state)


def _lookup(state: Names, operation: Operation) -> Names | None:
    directory, name = operation.args
    entry = _find(state, directory, name)
    if operation.answer is None:
        return state if entry is None else None
    if entry is None:
        return None
    return state if entry[2] == operation.answer else _learned(state, entry[2], operation.answer)


def _make(state: Names, operation: Operation) -> Names | None:
    directory, name, is_directory = operation.args
    entry = _find(state, directory, name)
    is_free = entry is None and _is_there(state, directory)
    if operation.unknown:
        return state | {(directory, name, ("?", operation.begun), is_directory)} if is_free else state
    if isinstance(operation.answer, int) and operation.answer > 0:
        return state | {(directory, name, operation.answer, is_directory)} if is_free else None
    return _refused(state, operation, {-errno.EEXIST: entry is not None, -errno.ENOENT: not _is_there(state, directory)})


def _refused(state: Names, operation: Operation, reasons: dict[int, bool]) -> Names | None:
    """An error is right where its reason holds."""
    return state if reasons.get(operation.answer, False) else None


def _unlink(state: Names, operation: Operation) -> Names | None:
    directory, name, is_directory = operation.args
    entry = _find(state, directory, name)
    is_empty = entry is None or not any(other[0] == entry[2] for other in state)
    if operation.unknown:
        return state - {entry} if entry is not None and is_empty and entry[3] == is_directory else state
    if operation.answer == 0:
        return state - {entry} if entry is not None and is_empty and entry[3] == is_directory else None
    return _refused(state, operation, {-errno.ENOENT: entry is None, -errno.ENOTEMPTY: not is_empty})


def _link(state: Names, operation: Operation) -> Names | None:
    ino, directory, name = operation.args
    entry = _find(state, directory, name)
    is_named = any(other[2] == ino for other in state)
    is_free = entry is None and is_named and _is_there(state, directory)
    if operation.unknown:
        return state | {(directory, name, ino, False)} if is_free else state
    if operation.answer == 0:
        return state | {(directory, name, ino, False)} if is_free else None
    is_gone = not is_named or not _is_there(state, directory)
    return _refused(state, operation, {-errno.EEXIST: entry is not None, -errno.ENOENT: is_gone})


def _rename(state: Names, operation: Operation) -> Names | None:
    directory, name, new_directory, new_name = operation.args
    entry, other = _find(state, directory, name), _find(state, new_directory, new_name)
    is_there = entry is not None and _is_there(state, new_directory)
    if is_there and (operation.unknown or operation.answer == 0):
        assert entry is not None
        if other is not None and other[2] == entry[2]:
            return state  # two names of one file: nothing happens
        return state - {entry, other} | {(new_directory, new_name, entry[2], entry[3])}  # type: ignore[arg-type]
    if operation.unknown:
        return state
    return _refused(state, operation, {-errno.ENOENT: not is_there})


def _list(state: Names, operation: Operation) -> Names | None:
    (directory,) = operation.args
    names = {(name, ino) for parent, name, ino, _ in state if parent == directory}
    if sorted(name for name, _ in names) != [name for name, _ in operation.answer]:
        return None  # also when one is told twice
    known = dict(operation.answer)
    after: Names | None = state
    for name, ino in names:  # in any order
        if ino != known[name]:
            after = None if after is None else _learned(after, ino, known[name])
    return after


def _links(state: Names, operation: Operation) -> Names | None:
    (ino,) = operation.args
    return state if sum(entry[2] == ino for entry in state) == operation.answer else None


_NAMES = {
    "lookup": _lookup,
    "make": _make,
    "unlink": _unlink,
    "link": _link,
    "rename": _rename,
    "list": _list,
    "links": _links,
}


def file_step(state: Cells, operation: Operation) -> Cells | None:
    """See checker.Step."""
    return _FILE[operation.name](state, operation)


def _put(state: Cells, first: int, cells: tuple[int, ...]) -> Cells:
    padded = state + (0,) * (first - len(state))
    return padded[:first] + cells + padded[first + len(cells) :]


def _write(state: Cells, operation: Operation) -> Cells | None:
    first, cells = operation.args
    return _put(state, first, cells)


def _within(state: Cells, operation: Operation) -> Cells | None:
    """As far as the file goes."""
    first, cells = operation.args
    return _put(state, first, cells)[: len(state)]


def _append(state: Cells, operation: Operation) -> Cells | None:
    return state + operation.args[0]


def _truncate(state: Cells, operation: Operation) -> Cells | None:
    (count,) = operation.args
    return state[:count] + (0,) * (count - len(state))


def _read(state: Cells, operation: Operation) -> Cells | None:
    (page,) = operation.args
    first = page * CELLS_PER_PAGE
    page_cells = state[first : first + CELLS_PER_PAGE]
    if page_cells == operation.answer:
        return state
    if ANY not in page_cells or len(page_cells) != len(operation.answer):
        return None
    return state if all(a in (b, ANY) for a, b in zip(page_cells, operation.answer, strict=True)) else None


def _size(state: Cells, operation: Operation) -> Cells | None:
    return state if len(state) == operation.answer else None


def _grow(state: Cells, operation: Operation) -> Cells | None:
    (count,) = operation.args
    return state + (0,) * (count - len(state))


def files_step(inos: list[int]) -> Callable[[Files, Operation], Files | None]:
    """The step of files that were cloned from each other: see checker.Step."""
    places = {ino: place for place, ino in enumerate(inos)}

    def step(state: Files, operation: Operation) -> Files | None:
        place = places[operation.on]
        if operation.name == "clone":
            after = _clone(state[places[operation.args[0]]], state[place], operation)
        else:
            after = file_step(state[place], operation)
        return None if after is None else (*state[:place], after, *state[place + 1 :])

    return step


def _clone(source: Cells, target: Cells, operation: Operation) -> Cells | None:
    """Of one page."""
    _, page, to = operation.args
    first = page * CELLS_PER_PAGE
    count = min(CELLS_PER_PAGE, max(0, len(source) - first))
    if not operation.unknown:
        if count < operation.answer:
            return None
        count = operation.answer
    if not count:
        return target
    copied = source[first : first + count] if count == CELLS_PER_PAGE else (ANY,)
    return _put(target, to * CELLS_PER_PAGE, copied)


def _clone_parts(operation: Operation) -> list[Operation]:
    source, page, to, count = operation.args
    pages = []
    for index in range(count):
        answer = None
        if not operation.unknown:  # how many cells of this page
            answer = min(CELLS_PER_PAGE, max(0, operation.answer - index * CELLS_PER_PAGE))
        pages.append(replace(operation, args=(source, page + index, to + index), answer=answer))
    return [part for part in pages if part.answer != 0]


def _again_parts(operation: Operation) -> list[Operation]:
    """Its mount was evicted, and the next one carried it out again: before that others may have seen what they see of
    one that fails. Of an append that is not known to have gone to the end then: it goes where it was going."""
    first_time = parts(replace(operation, unknown=True, expired=operation.ended, evicted=False))
    if operation.name == "write":
        return [*first_time, operation]
    return [*first_time, replace(operation, name="refill", unknown=True, expired=operation.ended)]


def _refill(state: Cells, operation: Operation) -> Cells | None:
    """An append that made the file longer gets its bytes."""
    (cells,) = operation.args
    tail = state[-len(cells) :]
    if len(tail) < len(cells) or any(had not in (0, cell) for had, cell in zip(tail, cells, strict=True)):
        return state
    return state[: -len(cells)] + cells


def _punch_parts(operation: Operation) -> list[Operation]:
    first, count = operation.args
    return [
        replace(operation, name="within", args=(cell, (0,) * CELLS_PER_PAGE))
        for cell in range(first, first + count, CELLS_PER_PAGE)
    ]


_FILE = {
    "write": _write,
    "within": _within,
    "append": _append,
    "refill": _refill,
    "truncate": _truncate,
    "grow": _grow,
    "read": _read,
    "size": _size,
}


def names_parts(operation: Operation, names: frozenset[bytes]) -> list[Operation]:
    """A listing that came in several replies: each name was there at some moment of it, and each other of `names` was away
    at one (readdir(3) of POSIX leaves open what of a change in the middle is seen)."""
    if operation.name != PIECEMEAL or operation.unknown:
        return [operation]
    told = [*operation.answer, *((name, None) for name in sorted(names - {name for name, _ in operation.answer}))]
    return [
        Operation(operation.who, "lookup", (*operation.args, name), operation.begun, operation.ended, ino, reads=True)
        for name, ino in told
    ]


def parts(operation: Operation) -> list[Operation]:
    """What takes effect at once, each for itself. Of an operation without an answer all or some may have. Of a write that fails any block may be
    old or new, and the file may have grown without its bytes, or not to them (as with any file system)."""

    def part(name: str, *args: Any) -> Operation:
        return replace(operation, name=name, args=args)

    if operation.evicted and not operation.unknown and operation.name in ("write", "append"):
        return _again_parts(operation)
    if operation.name == "clone":
        return _clone_parts(operation)
    if operation.name == "punch":
        return _punch_parts(operation)
    if operation.unknown and operation.name == "write":
        first, cells = operation.args
        pages: dict[int, list[tuple[int, int]]] = {}
        for index, number in enumerate(cells, first):
            pages.setdefault(index // CELLS_PER_PAGE, []).append((index, number))
        writes = [part("within", page[0][0], tuple(number for _, number in page)) for page in pages.values()]
        return [part("grow", first + len(cells)), *writes]
    if operation.unknown and operation.name == "append":
        (cells,) = operation.args
        variants = {cells, tuple(0 for _ in cells), (cells[0], *(0 for _ in cells[1:])), (0, *cells[1:])}
        return [part("append", variant) for variant in sorted(variants)]
    return [operation]
