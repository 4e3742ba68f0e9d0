"""Request journal: what a mount did for which request of the kernel, kept where the next process of the mount finds it.

Place      mount floor; used by session.py (numbers of calls), write_path.py (where an append went) and channel.py.
Why        A mount process dies, and the kernel asks its successor everything anew that was not answered. A call that
           changes metadata must then have the number it had before, or it is done twice (I11); and an append must go
           where it was going, or its bytes are there twice. And a write that was begun in a segment of a file that several
           nodes write (shared_write.py) must be done again before anybody else gets that segment.
How        A slot of two words, `unique` of the request and (what << 56 | number), is written before the call is sent or
           the append begins, and freed when the kernel has its answer. Words are stored in the order of the program, so
           whatever instant the process is killed at, a slot is there whole or not at all.
Memory     belongs to the parent (held_session.py). Without one a journal is only a counter.
"""

from contextvars import ContextVar

SLOTS = 8192  # requests that wait are at most channel.REQUESTS_WAITING_MAX, with seldom more than one slot each; a write in segments has two or three
WORDS = 2 + 2 * SLOTS
_OVERFLOWED, _LAST, _FIRST = 0, 1, 2
_WHAT_SHIFT = 56
_NUMBER_MASK = (1 << _WHAT_SHIFT) - 1
UNIQUE_RESENT = 1 << 63  # FUSE_UNIQUE_RESEND of <linux/fuse.h>: in the `unique` of a request that comes again
UNIQUE_MASK = UNIQUE_RESENT - 1

# Calls that do harm when a successor makes them anew. Under the write lease, which the successor has without a gap,
# `allocate`, `commit`, `punch`, `clone`, `unshare` and `replace` do not.
_CALLS = {"setattr": 1, "make": 2, "link": 3, "unlink": 4, "rename": 5, "setxattr": 6, "removexattr": 7}
_APPEND, _BEGUN_IN, _SEGMENT = 15, 14, 13  # number: where it goes; the inode; the segment

# The request that the task works for, without UNIQUE_RESENT; 0: none.
current_request: ContextVar[int] = ContextVar("current_request", default=0)

Slot = tuple[int, int, int]  # index of its first word, what, number


def overflowed(words: memoryview) -> bool:
    """More was under way than there are slots: nobody can take over from this process."""
    return bool(words[_OVERFLOWED])


class RequestJournal:
    """Numbers of calls and places of appends. Synchronous; one per mount process."""

    def __init__(self, words: memoryview | None = None) -> None:
        """words: u64, WORDS of them; what an earlier process left there is taken over. None: nothing was, is kept."""
        self._words = memoryview(bytearray(8 * WORDS)).cast("Q") if words is None else words
        uniques = self._words[_FIRST::2].tolist()
        self._free = [at for at in range(WORDS - 2, _FIRST - 2, -2) if not uniques[(at - _FIRST) // 2]]
        self._old: dict[int, list[Slot]] = {}  # by request, of the process before; not asked for again yet
        self._open: dict[int, list[Slot]] = {}  # by request under way
        self._old_places: set[Slot] = set()  # where the process before may have written
        for at, unique in zip(range(_FIRST, WORDS, 2), uniques, strict=True):
            if unique:
                value = self._words[at + 1]
                self._old.setdefault(unique, []).append((at, value >> _WHAT_SHIFT, value & _NUMBER_MASK))
        for slots in self._old.values():
            slots.sort(key=lambda slot: slot[2])
        self._last = self._words[_LAST]
        self._bound = {slot[2] for slots in self._old.values() for slot in slots if slot[1] < _SEGMENT}
        self._ops: dict[int, None] = dict.fromkeys(sorted(self._bound))  # that may be sent (again), in order

    # -- requests --------------------------------------------------------------------------------

    def begin(self, unique: int) -> None:
        """A request is being served; unique: without UNIQUE_RESENT."""
        self._open[unique] = []

    def done(self, unique: int) -> None:
        """The kernel has its answer."""
        for slot in (*self._open.pop(unique, ()), *self._old.pop(unique, ())):
            self._release(slot)

    def forget(self, unique: int) -> None:
        """It is not served yet after all, and nothing of it was noted."""
        self._open.pop(unique, None)

    def drop_old(self) -> None:
        """All that the kernel still wants answered was begun: the rest of what was taken over is history."""
        for unique in [unique for unique in self._old if unique not in self._open]:
            for slot in self._old.pop(unique):
                self._release(slot)

    # -- calls -----------------------------------------------------------------------------------

    def number(self, name: str) -> tuple[int, bool]:
        """The number of a call that the task is about to make, and whether a process before this one may have made it.

        It is not below `lowest` until `answered`, and until the task's request is done, if it works for one.
        """
        what = _CALLS.get(name, 0)
        unique = current_request.get()
        open_slots = self._open.get(unique) if what else None
        if open_slots is not None:
            slot = self._take_old(unique, what)
            if slot is not None:
                open_slots.append(slot)
                return slot[2], True
        self._last = op = self._last + 1
        self._words[_LAST] = op
        self._ops[op] = None
        if open_slots is not None and self._note(open_slots, unique, what, op):
            self._bound.add(op)
        return op, False

    def answered(self, op: int) -> None:
        """The call with this number has its answer, or is given up."""
        if op not in self._bound:
            del self._ops[op]

    @property
    def lowest(self) -> int:
        """No call with a lower number will be sent again. To be asked while one is under way."""
        return next(iter(self._ops))

    # -- appends ---------------------------------------------------------------------------------

    def place(self, end: int) -> int:
        """Where the append goes that the task works for: at `end` of the file, or where it was going before."""
        unique = current_request.get()
        slots = self._open.get(unique)
        if slots is None:
            return end
        known = next((slot for slot in slots if slot[1] == _APPEND), None)
        if known is None:
            known = self._take_old(unique, _APPEND)
            if known is not None:
                slots.append(known)
                self._old_places.add(known)
        if known is not None:
            return known[2]
        self._note(slots, unique, _APPEND, end)
        return end

    def take_place_back(self) -> bool:
        """The append that the task works for has written nothing, and may go elsewhere. False: the process before may have."""
        slots = self._open.get(current_request.get(), [])
        slot = next((slot for slot in slots if slot[1] == _APPEND), None)
        if slot is None:
            return True
        if slot in self._old_places:
            return False
        slots.remove(slot)
        self._release(slot)
        return True

    # -- segments --------------------------------------------------------------------------------

    def begins_in(self, unique: int, ino: int, first: int, last: int) -> None:
        """A write of the request is about to begin in segments `first` to `last` of the inode. Until the request is done."""
        slots = self._open.get(unique)
        if slots is not None:
            self._note(slots, unique, _BEGUN_IN, ino)
            for segment in range(first, last + 1):
                self._note(slots, unique, _SEGMENT, segment)

    def begun_before(self) -> dict[int, tuple[int, list[int]]]:
        """Of the process before: by request, the inode and the segments that it had begun to write to."""
        found = {}
        for unique, slots in self._old.items():
            inos = [number for _, what, number in slots if what == _BEGUN_IN]
            segments = [number for _, what, number in slots if what == _SEGMENT]
            if inos and segments:
                found[unique] = (inos[0], sorted(set(segments)))
        return found

    # -- slots -----------------------------------------------------------------------------------

    def _take_old(self, unique: int, what: int) -> Slot | None:
        old = self._old.get(unique, [])
        slot = next((slot for slot in old if slot[1] == what), None)
        if slot is not None:
            old.remove(slot)
        return slot

    def _note(self, slots: list[Slot], unique: int, what: int, number: int) -> bool:
        if not self._free:
            self._words[_OVERFLOWED] = 1
            return False
        at = self._free.pop()
        self._words[at + 1] = what << _WHAT_SHIFT | number
        self._words[at] = unique  # from here on it counts
        slots.append((at, what, number))
        return True

    def _release(self, slot: Slot) -> None:
        at, what, number = slot
        self._words[at] = 0
        self._free.append(at)
        self._old_places.discard(slot)
        if what < _SEGMENT:
            self._bound.discard(number)
            self._ops.pop(number, None)
