"""What a mount has of a file that several nodes write at once: segments of it, each under a lease of its own.

Place      mount floor. Plain state; the rules that change it are in shared_write.py.

Invariants
  S1  The file's size and layout stand still as long as any node has a segment: what is known of them is right.
  S2  I/O is done only in segments that are held, and is noted in `uses` without an await since that was seen; whoever
      answers a recall waits for what is noted. Nothing noted waits for a lease.
  S3  Nothing of the file is in the kernel's cache: it takes a lease on the inode, which ends the sharing.
"""

from typing import TYPE_CHECKING

from csvfs.errors import CsvfsError
from csvfs.units import BLOCK_SIZE
from csvfs.volume.extents import ExtentMap
from csvfs.volume.file_io import Epochs, WriteDone

if TYPE_CHECKING:
    from csvfs.mount.file_state import FileState

SEGMENT_SIZE = 1 << 20
SEGMENT_BLOCKS = SEGMENT_SIZE // BLOCK_SIZE
MEMBER = -1  # in place of a segment's number: all of them


class SegmentedError(Exception):
    """Whoever waited for a lease on an inode hears that its file is shared: segments are to be asked for."""


class Use:
    """I/O under way in segments `first..last`, both included."""

    __slots__ = ("first", "last", "writes")

    def __init__(self, first: int, last: int, writes: bool) -> None:
        self.first = first
        self.last = last
        self.writes = writes


class Segments:
    """Of one inode. `kinds`: the leases held, by segment."""

    __slots__ = ("asking", "ending", "extents", "kinds", "mtime_ns", "owed", "recalled", "settled", "size", "times_dirty", "uses")

    def __init__(self) -> None:
        self.kinds: dict[int, int] = {}
        self.size = -1  # of the file, right as long as a segment is held; -1: not known
        self.extents = ExtentMap()
        self.uses: dict[Use, None] = {}
        self.asking: dict[object, tuple[range, int]] = {}  # segments and kind of calls under way
        self.ending = False  # all is asked for back, or will be: nothing may begin
        self.recalled = False  # it is being given back
        # How often segments came that others may have written to without a flush; how many of these have been flushed since.
        self.owed, self.settled = 0, 0
        self.mtime_ns = 0  # of the last write here
        self.times_dirty = False  # and the coordinator does not know it

    def holds(self, wanted: range, kind: int) -> bool:
        kinds = self.kinds
        return all(kinds.get(segment, 0) >= kind for segment in wanted)

    def is_asked(self, wanted: range, kind: int) -> bool:
        """Whether a call under way asks for some of them already."""
        return any(
            asked >= kind and segments.start < wanted.stop and wanted.start < segments.stop
            for segments, asked in self.asking.values()
        )

    def is_used(self, segment: int, *, by_writes_alone: bool) -> bool:
        """Whether I/O is under way there; MEMBER: anywhere."""
        return any(
            (segment == MEMBER or use.first <= segment <= use.last) and (use.writes or not by_writes_alone)
            for use in self.uses
        )

    def runs(self) -> list[list[int]]:
        """[first, count, kind] of what is held, or is given back and still in use."""
        found: list[list[int]] = []
        for segment, kind in sorted(self.claimed().items()):
            if found and found[-1][2] == kind and found[-1][0] + found[-1][1] == segment:
                found[-1][1] += 1
            else:
                found.append([segment, 1, kind])
        return found

    def claimed(self) -> dict[int, int]:
        """By segment, also those of which a recall is unanswered."""
        kinds = dict(self.kinds)
        for use in self.uses:
            for segment in range(use.first, use.last + 1):
                kinds[segment] = max(kinds.get(segment, 0), 3 if use.writes else 2)
        return kinds


class SegmentWrite:
    """One write taken at once. `done` is called exactly once."""

    __slots__ = ("done", "epochs", "segments", "state", "use")

    def __init__(self, state: "FileState", segments: Segments, use: Use, epochs: Epochs, done: WriteDone) -> None:
        self.state = state
        self.segments = segments
        self.use = use
        self.epochs = epochs
        self.done = done
        segments.uses[use] = None

    def landed(self, error: CsvfsError | None) -> None:
        del self.segments.uses[self.use]
        # Now, not when it was sent: a flush between the two would not have covered it (I8).
        self.state.dirtied(self.epochs)
        self.state.notify()
        self.done(error)


def segments_of(offset: int, end: int) -> range:
    """Those of bytes `offset..end`."""
    return range(offset // SEGMENT_SIZE, -(-end // SEGMENT_SIZE))


