"""Directories all of whose names this mount knows, since it made them itself: what is not there needs no question.

Place      mount floor; under operations.py. Before a name is made the kernel asks for it, mostly in vain.
Invariant  While a directory is known here, `names` has every name that is in it, and maybe more: a name is
           added before the call that makes it, and taken out after the answer of the one that removes it. Other
           nodes change the directory only after our lease on it was recalled, which ends this knowledge.
Limits     NAMES_MAX names and directories in all; then the longest known directory goes.
"""

from dataclasses import dataclass, field
from typing import Protocol

NAMES_MAX = 262_144  # about 30 MB
NAME_SIZE_MAX = 255  # longer ones are an error, which the coordinator tells


class Leases(Protocol):
    """What is asked of the file table."""

    def recalled_since(self, ino: int, stamp: int) -> bool: ...
    def may_answer(self, ino: int) -> bool: ...


@dataclass(slots=True)
class _Known:
    stamp: int  # of the file table, before the directory was made
    names: set[bytes] = field(default_factory=set)


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
        if known is not None and name not in known.names:
            known.names.add(name)
            self._grow()

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
        if known is None or name in known.names or len(name) > NAME_SIZE_MAX:
            return False
        if self._leases.recalled_since(directory, known.stamp):
            self.forget(directory)
            return False
        return self._leases.may_answer(directory)

    def forget(self, directory: int) -> None:
        known = self._directories.pop(directory, None)
        if known is not None:
            self._count -= 1 + len(known.names)
