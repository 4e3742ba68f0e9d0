"""Inode rows: of which inodes the kernel may have something, kept where the parent and the next process find it.

Place      mount floor; written by leases.py, relay.py, channel.py; read by held_session.py and inheritance.py.
Row        three words: the inode; how often the kernel was given it; opens, lease and marks (`Row`).
Order      What is raised is raised before the kernel or the coordinator hears of it, what is lowered afterwards: a
           process that is killed in between leaves a row that says too much, never one that says too little.
Limit      ROWS_MAX rows; when there are more, nobody can take over, and the parent drops all caches of the machine.
"""

from dataclasses import dataclass

ROWS_MAX = 1 << 20
_OVERFLOWED, _END, _FIRST = 0, 1, 2
_ROW = 3
WORDS = _FIRST + _ROW * ROWS_MAX  # pages that nobody writes to take no memory

_OPENS_MASK = (1 << 24) - 1
_WRITING_SHIFT = 24
_KIND_SHIFT = 48
_KIND_MASK = 7 << _KIND_SHIFT
_TIMED = 1 << 52
_KNOWN = 1 << 53
_LOST = 1 << 54
_BARRED = 1 << 55


@dataclass(slots=True, frozen=True)
class Row:
    """lookups: how often the kernel was given the inode. opens, writing: how often it is open, and for writing. kind: the
    lease under which the kernel may cache. timed: it was written to, and the coordinator does not know when. lost: pages
    of it may still be cached under a lease that is held no more. barred: what is open of it can only be closed (barred.py)."""

    ino: int
    lookups: int
    opens: int
    writing: int
    kind: int
    timed: bool
    lost: bool
    barred: bool = False


def rows_in(words: memoryview) -> list[Row]:
    """All rows, as an earlier process left them."""
    end = min(words[_END], len(words))
    numbers = words[_FIRST:end].tolist()
    return [
        Row(
            ino,
            lookups,
            state & _OPENS_MASK,
            state >> _WRITING_SHIFT & _OPENS_MASK,
            (state & _KIND_MASK) >> _KIND_SHIFT,
            bool(state & _TIMED),
            bool(state & _LOST),
            bool(state & _BARRED),
        )
        for ino, lookups, state in zip(numbers[0::_ROW], numbers[1::_ROW], numbers[2::_ROW], strict=False)
        if ino
    ]


def inodes_in(words: memoryview) -> list[int]:
    """The inodes alone."""
    end = min(words[_END], len(words))
    return [ino for ino in words[_FIRST:end:_ROW].tolist() if ino]


def overflowed(words: memoryview) -> bool:
    return bool(words[_OVERFLOWED])


class InodeRows:
    """The mount's side. Some dictionary steps and stores per change."""

    def __init__(self, words: memoryview) -> None:
        """words: u64; rows that an earlier process left there stay."""
        self._words = words
        self._at: dict[int, int] = {}  # inode -> index of its row
        self._free: list[int] = []
        end = min(words[_END], len(words)) or _FIRST
        for at in range(_FIRST, end, _ROW):
            if words[at]:
                self._at[words[at]] = at
            else:
                self._free.append(at)
        self._next = end

    def add(self, ino: int) -> None:
        """Before anything of `ino` is told to the kernel. Twice does no harm."""
        at = self._row(ino)
        if at:
            self._words[at + 2] |= _KNOWN

    def remove(self, ino: int) -> None:
        """Nothing of it is cached, and no lease held any more."""
        at = self._at.get(ino)
        if at is not None:
            self._words[at + 2] &= ~(_KNOWN | _KIND_MASK | _TIMED | _LOST)
            self._drop_if_unused(ino, at)

    def lease(self, ino: int, kind: int) -> None:
        """The lease held now, before the kernel caches by it, or after it caches nothing by a higher one."""
        at = self._row(ino) if kind else self._at.get(ino, 0)
        if at:
            state = self._words[at + 2] & ~_KIND_MASK
            self._words[at + 2] = state | kind << _KIND_SHIFT

    def timed(self, ino: int, is_timed: bool) -> None:
        """Whether the coordinator has still to hear when it was written to."""
        self._mark(ino, _TIMED, is_timed)

    def lost(self, ino: int, is_lost: bool) -> None:
        """Whether pages of it may still be cached under a lease that is held no more."""
        self._mark(ino, _LOST, is_lost)

    def barred(self, ino: int, is_barred: bool) -> None:
        """Whether what is open of it can only be closed."""
        at = self._mark(ino, _BARRED, is_barred)
        if at and not is_barred:
            self._drop_if_unused(ino, at)

    def _mark(self, ino: int, mark: int, is_set: bool) -> int:
        at = self._row(ino) if is_set else self._at.get(ino, 0)
        if at:
            state = self._words[at + 2]
            self._words[at + 2] = state | mark if is_set else state & ~mark
        return at

    def looked_up(self, ino: int, lookups: int) -> None:
        """How often the kernel has been given it, and has not forgotten it."""
        at = self._row(ino)
        if at:
            self._words[at + 1] = lookups
            if not lookups:
                self._drop_if_unused(ino, at)

    def opened(self, ino: int, writing: bool, count: int = 1) -> None:
        """Just before the kernel hears that it is open; count -1: just after it heard that it is closed."""
        at = self._row(ino)
        if at:
            state = self._words[at + 2]
            if state & _OPENS_MASK or count > 0:
                state += count
            if writing and (state >> _WRITING_SHIFT & _OPENS_MASK or count > 0):
                state += count << _WRITING_SHIFT
            self._words[at + 2] = state
            if count < 0:
                self._drop_if_unused(ino, at)

    def _row(self, ino: int) -> int:
        """0: there is no place."""
        at = self._at.get(ino)
        if at is not None:
            return at
        if self._free:
            at = self._free.pop()
        elif self._next + _ROW <= len(self._words):
            at, self._next = self._next, self._next + _ROW
            self._words[_END] = self._next
        else:
            self._words[_OVERFLOWED] = 1
            return 0
        self._at[ino] = at
        self._words[at + 1] = self._words[at + 2] = 0
        self._words[at] = ino
        return at

    def _drop_if_unused(self, ino: int, at: int) -> None:
        if not self._words[at + 1] and not self._words[at + 2]:
            del self._at[ino]
            self._words[at] = 0
            self._free.append(at)
