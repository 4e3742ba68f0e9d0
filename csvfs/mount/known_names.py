"""Directories all of whose names this mount knows, since it made them itself: what is not there needs no question.

Place      mount floor; under operations.py. Before a name is made the kernel asks for it, mostly in vain.
Invariant  While a directory is known here, `names` has every name that is in it, and maybe more: a name is
           added before the call that makes it, and taken out after the answer of the one that removes it. Other
           nodes change the directory only after our lease on it was recalled, which ends this knowledge.
Large      directories are known by a Bloom filter, which takes a name in 500 that is not there for one that may be: that
           one is asked for. What was taken out stays in it.
Limits     NAMES_MAX names and directories in all, FILTERS_MAX large ones; then the longest known directory goes. One in
           which FILTER_NAMES_MAX names were made is not known any more.
"""

from dataclasses import dataclass, field
from typing import Protocol

NAMES_MAX = 262_144  # about 30 MB
NAME_SIZE_MAX = 255  # longer ones are an error, which the coordinator tells
EXACT_NAMES_MAX = 65_536  # of one directory; it is a large one beyond that
FILTERS_MAX = 8
FILTER_NAMES_MAX = 4_000_000  # by then one absent name in seven is asked for
_FILTER_SHIFT = 24
_FILTER_MASK = (1 << _FILTER_SHIFT) - 1  # bits: 2 MiB
_PROBES = 4


class Leases(Protocol):
    """What is asked of the file table."""

    def stamp(self) -> int: ...
    def recalled_since(self, ino: int, stamp: int) -> bool: ...
    def may_answer(self, ino: int) -> bool: ...


class NameFilter:
    """A set of names of which nothing is taken out, and that may seem to have some that it has not."""

    __slots__ = ("_bits", "added")

    def __init__(self, names: set[bytes]) -> None:
        self._bits = bytearray((_FILTER_MASK + 1) // 8)
        self.added = 0
        for name in names:
            self.add(name)

    def add(self, name: bytes) -> None:
        self.added += 1
        bits, number = self._bits, hash(name)
        at, step = number & _FILTER_MASK, number >> _FILTER_SHIFT & _FILTER_MASK | 1
        for _ in range(_PROBES):
            bits[at >> 3] |= 1 << (at & 7)
            at = at + step & _FILTER_MASK

    def __contains__(self, name: bytes) -> bool:
        bits, number = self._bits, hash(name)
        at, step = number & _FILTER_MASK, number >> _FILTER_SHIFT & _FILTER_MASK | 1
        for _ in range(_PROBES):
            if not bits[at >> 3] >> (at & 7) & 1:
                return False
            at = at + step & _FILTER_MASK
        return True


@dataclass(slots=True)
class _Known:
    """`large`: known by it instead of by `names`."""

    stamp: int  # of the file table, before the directory was made, or when it was seen last that nobody recalled it
    names: set[bytes] = field(default_factory=set)
    large: NameFilter | None = None

    def __contains__(self, name: bytes) -> bool:
        return name in (self.names if self.large is None else self.large)


class KnownNames:
    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._directories: dict[int, _Known] = {}
        self._count = 0

    def made(self, directory: int, stamp: int) -> None:
        """An empty directory was made by a call asked at `stamp`."""
        self.forget(directory)
        self._directories[directory] = _Known(stamp)
        self._grow()

    def add(self, directory: int, name: bytes) -> None:
        """A call that may put the name there is about to be sent."""
        known = self._directories.get(directory)
        if known is None or name in known:
            return
        if known.large is None:
            known.names.add(name)
            self._grow()
            if len(known.names) > EXACT_NAMES_MAX:
                self._make_large(known)
            return
        known.large.add(name)
        if known.large.added > FILTER_NAMES_MAX:
            self.forget(directory)

    def _make_large(self, known: _Known) -> None:
        known.large = NameFilter(known.names)
        self._count -= len(known.names)
        known.names.clear()
        large = [ino for ino, other in self._directories.items() if other.large is not None]
        if len(large) > FILTERS_MAX:
            self.forget(large[0])

    def _grow(self) -> None:
        self._count += 1
        while self._count > NAMES_MAX:
            self.forget(next(iter(self._directories)))

    def discard(self, directory: int, name: bytes) -> None:
        """A call has been answered that took the name away."""
        known = self._directories.get(directory)
        if known is not None and name in known.names:
            known.names.remove(name)
            self._count -= 1

    def is_absent(self, directory: int, name: bytes) -> bool:
        """Whether there is surely no such name now; false: nothing is known. To be answered without an await."""
        known = self._directories.get(directory)
        if known is None or name in known or len(name) > NAME_SIZE_MAX:
            return False
        if self._leases.recalled_since(directory, known.stamp):
            self.forget(directory)
            return False
        known.stamp = self._leases.stamp()  # the table remembers recalls for some time only
        return self._leases.may_answer(directory)

    def forget(self, directory: int) -> None:
        known = self._directories.pop(directory, None)
        if known is not None:
            self._count -= 1 + len(known.names)
