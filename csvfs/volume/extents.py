"""Extent map: where the blocks of one file lie, as far as its coordinator has told.

Place      volume floor. Pure: no I/O, clock or trio.
Shape      two parallel lists, the first blocks of runs and the runs, sorted and disjoint. A run is a tuple
           (start, end, slab, slab block of start); slab HOLE: known to be a hole. A block in no run is
           unknown: ask the coordinator. Neighbours that continue each other are one run, so a file written in
           order stays a handful of runs.
Shared     beside them, ranges (start, end) of blocks that other files have, too: nothing may be written there. What is
           learned of a block says whether it is shared, so no range outlives the layout that it was told with.
Cost       find: O(log n). learn, forget: one slice assignment, O(log n + runs replaced) and a memmove of the
           list's rest: 100,000 runs are 800 KB, about 20 us.

`starts`, `runs` and `shared` are public for the hot path, which reads them without a call; only this class changes
them.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

from csvfs.errors import ProtocolError

HOLE = -1
BLOCKS_MAX = 1 << 51  # 2**63 bytes: more than any offset
FILE_BLOCKS_MAX = 1 << 32  # 16 TiB, the largest file

Run = tuple[int, int, int, int]  # start, end (exclusive), slab or HOLE, slab block
Piece = tuple[int, int, int, int]  # block, count, slab or HOLE, slab block
Extent = tuple[int, int, int, int]  # block, count, slab, slab block: as on the wire


class ExtentMap:
    """All numbers are blocks of 4 KiB."""

    __slots__ = ("runs", "shared", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.runs: list[Run] = []
        self.shared: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.starts)

    def find(self, block: int) -> Run | None:
        """The run that holds `block`; None: unknown."""
        index = bisect_right(self.starts, block) - 1
        if index < 0:
            return None
        run = self.runs[index]
        return run if block < run[1] else None

    def covers(self, block: int, count: int) -> bool:
        """Whether all of the range is known, as blocks or as holes."""
        end = block + count
        index = bisect_right(self.starts, block) - 1
        if count <= 0:
            return True
        if index < 0:
            return False
        runs = self.runs
        while block < end:
            if index >= len(runs) or not runs[index][0] <= block < runs[index][1]:
                return False
            block = runs[index][1]
            index += 1
        return True

    def first_unknown(self, block: int, count: int) -> int:
        """The first unknown block of the range; its first one when all are known."""
        at, end = block, block + count
        while at < end:
            run = self.find(at)
            if run is None:
                return at
            at = run[1]
        return block

    def pieces(self, block: int, count: int) -> list[Piece] | None:
        """The range in order, cut where a run ends; None: some of it is unknown."""
        end = block + count
        index = bisect_right(self.starts, block) - 1
        if index < 0:
            return None if count > 0 else []
        runs = self.runs
        pieces = []
        while block < end:
            if index >= len(runs):
                return None
            start, run_end, slab, slab_block = runs[index]
            if not start <= block < run_end:
                return None
            piece_end = run_end if run_end < end else end
            pieces.append((block, piece_end - block, slab, slab_block + block - start if slab >= 0 else 0))
            block = piece_end
            index += 1
        return pieces

    def allocated(self, block: int, count: int) -> list[Piece]:
        """The parts of the range known to lie somewhere; unknown parts and holes are left out."""
        end = block + count
        index = max(0, bisect_right(self.starts, block) - 1)
        pieces = []
        for start, run_end, slab, slab_block in self.runs[index : bisect_left(self.starts, end)]:
            first, last = max(start, block), min(run_end, end)
            if first < last and slab >= 0:
                pieces.append((first, last - first, slab, slab_block + first - start))
        return pieces

    def first_hole(self, block: int, count: int) -> int | None:
        """The first block of a known-to-be hole in the range; None: there is none, or the range is
        unknown."""
        for start, _, slab, _ in self.pieces(block, count) or ():
            if slab < 0:
                return start
        return None

    def is_shared(self, block: int, count: int) -> bool:
        """Whether any block of the range is known to be another file's, too."""
        index = bisect_left(self.shared, (block + count,)) - 1
        return index >= 0 and self.shared[index][1] > block and count > 0

    def slabs(self) -> set[int]:
        """Every slab the map speaks of."""
        return {run[2] for run in self.runs if run[2] >= 0}

    def learn(
        self,
        block: int,
        count: int,
        extents: Iterable[Sequence[int]],
        shared: Iterable[Sequence[int]] = (),
    ) -> None:
        """Take an answer of the coordinator: all extents of `block..block+count`, so the rest of it are
        holes. shared: the (block, count) of these extents that other files have, too.

        Extents outside of the range (given ahead) are taken as they are; what lies between stays as it was.
        Raises  ProtocolError when extents overlap or have numbers out of range; then nothing is taken.
        """
        rows = sorted(_checked(extent) for extent in extents)
        for before, after in pairwise(rows):
            if before[1] > after[0]:
                raise ProtocolError(f"extents of blocks {before[:2]} and {after[:2]} of one file overlap")
        ranges = [_checked_range(row) for row in shared]
        end = block + count
        inside: list[Run] = []
        at = block
        for start, row_end, slab, slab_block in rows:
            if row_end <= block or start >= end:
                self._replace(start, row_end, [(start, row_end, slab, slab_block)])
                continue
            if start > at:
                inside.append((at, start, HOLE, 0))
            inside.append((start, row_end, slab, slab_block))
            at = row_end
        if at < end:
            inside.append((at, end, HOLE, 0))
        if inside:
            self._replace(inside[0][0], inside[-1][1], inside)
        for first, last in ranges:
            self._mark(first, last, is_shared=True)

    def unshare(self, block: int, count: int) -> None:
        """No other file has blocks of the range any more; where they lie stays as it was."""
        self._mark(block, block + count, is_shared=False)

    def _mark(self, first: int, last: int, *, is_shared: bool) -> None:
        """Take blocks `first..last` out of the shared ranges, or make one of them with those that it touches."""
        ranges = self.shared
        low = bisect_left(ranges, (first,))
        if low and ranges[low - 1][1] >= first:
            low -= 1
        high = bisect_right(ranges, (last, BLOCKS_MAX))
        new: list[tuple[int, int]] = []
        if is_shared:
            found = ranges[low:high]
            new = [(min([first, *(r[0] for r in found)]), max([last, *(r[1] for r in found)]))]
        else:
            for start, end in ranges[low:high]:
                new += [part for part in ((start, min(end, first)), (max(start, last), end)) if part[0] < part[1]]
        ranges[low:high] = new

    def forget(self, block: int, end: int = BLOCKS_MAX) -> None:
        """From now on `block..end` is unknown."""
        if block < end:
            self._replace(block, end, [])

    def clear(self) -> None:
        """Everything is unknown. The lists stay the same objects."""
        self.starts.clear()
        self.runs.clear()
        self.shared.clear()

    def _replace(self, block: int, end: int, new: list[Run]) -> None:
        """Put `new`, which lies within `block..end`, in place of whatever is known there."""
        if self.shared:
            self._mark(block, end, is_shared=False)
        starts, runs = self.starts, self.runs
        first = bisect_left(starts, block) - 1
        if first < 0 or runs[first][1] < block:
            first += 1  # the run before does not even touch
        last = bisect_right(starts, end)  # a run that starts at `end` touches: it may merge
        merged: list[Run] = []
        for run in runs[first:last]:
            if run[0] < block:
                _append(merged, (run[0], min(run[1], block), run[2], run[3]))
        for run in new:
            _append(merged, run)
        for start, run_end, slab, slab_block in runs[first:last]:
            if run_end > end:
                cut = max(start, end)
                _append(merged, (cut, run_end, slab, slab_block + cut - start if slab >= 0 else 0))
        runs[first:last] = merged
        starts[first:last] = [run[0] for run in merged]


def _checked(extent: Sequence[int]) -> Run:
    try:
        block, count, slab, slab_block = extent
        if block >= 0 and count > 0 and slab >= 0 and slab_block >= 0 and block + count <= BLOCKS_MAX:
            return block, block + count, slab, slab_block
    except (TypeError, ValueError):
        pass
    raise ProtocolError(f"{extent!r} is not an extent: want [file block, count, slab, slab block]")


def _checked_range(row: Sequence[int]) -> tuple[int, int]:
    try:
        block, count = row
        if block >= 0 and count > 0 and block + count <= BLOCKS_MAX:
            return block, block + count
    except (TypeError, ValueError):
        pass
    raise ProtocolError(f"{row!r} is not a range of shared blocks: want [file block, count]")


def _append(runs: list[Run], run: Run) -> None:
    """Append, joined with the last one where `run` continues it."""
    if runs:
        start, end, slab, slab_block = runs[-1]
        if end == run[0] and slab == run[2] and (slab < 0 or slab_block + end - start == run[3]):
            runs[-1] = (start, run[1], slab, slab_block)
            return
    runs.append(run)
