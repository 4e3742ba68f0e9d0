"""Take back all pages that the kernel has cached of many inodes, while nobody answers what it asks.

Place      mount floor; used by held_session.py, in the parent of a mount that died and is not followed yet.
Why        An invalidation goes through the pages of a file in order, and waits at each that is locked: a READ of it is
           unanswered. What is cached behind that page would stay, and go on being shown (I5). The page itself is shown to
           nobody: it has no content yet. Which pages these are nobody knows: the kernel may have asked since the death.
How        Each file is taken back as a whole, in one thread after the other; an invalidation that is held up for STUCK_S
           is left to its thread, and the range is cut into pieces, each tried in a thread of its own, down to single
           pages. A thread that was left ends when its page is answered, or the session is ended.
Dirty      Pages that programs dirtied through mmap are held up likewise, for they must be written first, and may be very
           many. They are only in files that the mount held for writing: what cannot be taken back of these stays, as it
           does while a node is cut off (lapse.py).
Limits     THREADS_MAX invalidations at once; `within_s`.
"""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from csvfs.units import BLOCK_SIZE

PAGES_MAX = 1 << 51  # of a file of the greatest size there is
STUCK_S = 0.03
LOCKED_S = 0.25  # a single page that is held up for so long is locked, however few turns this machine gives us
POLL_S = 0.002
PARTS = 16
THREADS_MAX = 1000
SWEEPERS_MAX = 16
_FIRST_CUTS = (1 << 4, 1 << 8, 1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 32)  # pages: most files are small

Invalidate = Callable[[int, int, int], Any]  # inode, offset and length in bytes; length 0: to the end


@dataclass(slots=True, eq=False)
class _Piece:
    """Pages `first` to `end` of an inode, and the greater piece that it was cut from."""

    ino: int
    first: int
    end: int
    whole: "_Piece | None" = None
    begun_s: float = 0.0
    done: bool = False

    @property
    def settled(self) -> bool:
        """It was taken back, alone or as a part of what did get through after all."""
        piece: _Piece | None = self
        while piece is not None:
            if piece.done:
                return True
            piece = piece.whole
        return False

    def parts(self) -> list["_Piece"]:
        if self.first == 0 and self.end > PARTS:
            cuts = [cut for cut in _FIRST_CUTS if cut < self.end]
        else:
            step = -(-(self.end - self.first) // PARTS)
            cuts = list(range(self.first + step, self.end, step))
        return [_Piece(self.ino, *bounds, whole=self) for bounds in pairwise([self.first, *cuts, self.end])]


class PageDrop:
    """One time that it is done."""

    def __init__(self, invalidate: Invalidate, inos: Iterable[int], written: frozenset[int]) -> None:
        """invalidate: blocks while a page there is locked. written: inodes that may have dirty pages."""
        self._invalidate = invalidate
        self._left = sorted(inos, key=lambda ino: ino not in written)  # the last is the first to be taken
        self._written = written
        self._under_way: set[_Piece] = set()
        self._sweepers = 0
        self._threads = 0
        self._over = False
        self._lock = threading.Lock()  # of all the above

    def run(self, within_s: float) -> bool:
        """Whether nothing is left that somebody could be shown; but of files that were held for writing.

        Blocks: `within_s`, or as long as it has no turn.
        """
        deadline = time.monotonic() + within_s
        try:
            with self._lock:
                self._start_sweepers(1)
            while True:
                with self._lock:
                    for piece in list(self._under_way):
                        self._look(piece)
                    if self._threads > THREADS_MAX or time.monotonic() >= deadline:
                        return self._only_written()
                    if not self._under_way and not self._sweepers:
                        return True
                time.sleep(POLL_S)
        finally:
            self._over = True

    def _only_written(self) -> bool:
        return self._written.issuperset({piece.ino for piece in self._under_way} | set(self._left))

    def _look(self, piece: _Piece) -> None:
        """Cut it into parts if it is held up."""
        is_page = piece.end - piece.first == 1
        if piece.settled:
            if piece.whole is not None:
                self._under_way.discard(piece)
        elif time.monotonic() - piece.begun_s >= (LOCKED_S if is_page else STUCK_S):
            self._under_way.discard(piece)
            if piece.whole is None:
                self._sweepers -= 1  # this thread waits
                self._start_sweepers(2)
            for part in [] if is_page else piece.parts():
                self._begin(part)
                self._start(self._take_back, part)

    def _start_sweepers(self, count: int) -> None:
        for _ in range(min(count, SWEEPERS_MAX - self._sweepers, len(self._left))):
            self._sweepers += 1
            self._start(self._sweep)

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        def thread() -> None:
            try:
                work(*arguments)
            finally:
                with self._lock:
                    self._threads -= 1

        self._threads += 1
        threading.Thread(target=thread, daemon=True).start()

    def _begin(self, piece: _Piece) -> None:
        piece.begun_s = time.monotonic()
        self._under_way.add(piece)

    # -- threads ---------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """One file after the other, until one holds it up."""
        while True:
            with self._lock:
                if self._over or not self._left:
                    self._sweepers -= 1
                    return
                piece = _Piece(self._left.pop(), 0, PAGES_MAX)
                self._begin(piece)
            self._take_back(piece)
            with self._lock:
                if piece not in self._under_way:
                    return  # others go on instead
                self._under_way.discard(piece)

    def _take_back(self, piece: _Piece) -> None:
        length = 0 if piece.end == PAGES_MAX else (piece.end - piece.first) * BLOCK_SIZE
        if not (self._over or piece.settled):
            self._invalidate(piece.ino, piece.first * BLOCK_SIZE, length)
            piece.done = True
