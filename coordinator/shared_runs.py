"""Shared runs: how many owners the blocks of one slab have, as runs of blocks that are shared, or were just now.

Place      coordinator floor. Pure: runs in, runs out. shared_blocks.py keeps them in the database.
Shape      runs (block, count, owners) with owners >= 1, sorted, disjoint; neighbours with the same number of owners are
           one run. A block in no run has one owner, or none: who asks knows that it has one. A run of one owner: it had
           more, and it is not known yet that this can never come back (shared_blocks.py, P3).
Range      `runs` are those that overlap or touch the range asked about; what is returned takes their place.
"""

from collections.abc import Iterable, Iterator

Run = tuple[int, int, int]  # block, count, owners
Blocks = tuple[int, int]  # block, count


def owners_of(runs: Iterable[Run], block: int, count: int) -> list[Run]:
    """The range in order, in pieces of as many owners each; 0 where no run is."""
    pieces: list[Run] = []
    at, end = block, block + count
    for start, size, owners in runs:
        first, last = max(start, at), min(start + size, end)
        if first >= last:
            continue
        if at < first:
            pieces.append((at, first - at, 0))
        pieces.append((first, last - first, owners))
        at = last
    if at < end:
        pieces.append((at, end - at, 0))
    return pieces


def with_owner(runs: list[Run], block: int, count: int) -> list[Run]:
    """One owner more for each block of the range."""
    inside = [(at, size, max(owners, 1) + 1) for at, size, owners in owners_of(runs, block, count)]
    return list(_joined([*_before(runs, block), *inside, *_behind(runs, block + count)]))


def without_owner(runs: list[Run], block: int, count: int) -> tuple[list[Run], list[Blocks]]:
    """One owner less for each block of the range; also the blocks that have none any more."""
    pieces = owners_of(runs, block, count)
    inside = [(at, size, owners - 1) for at, size, owners in pieces if owners > 1]
    left = list(_joined([*_before(runs, block), *inside, *_behind(runs, block + count)]))
    return left, [(at, size) for at, size, owners in pieces if owners <= 1]


def _before(runs: Iterable[Run], block: int) -> Iterator[Run]:
    for start, size, owners in runs:
        if start < block:
            yield start, min(size, block - start), owners


def _behind(runs: Iterable[Run], end: int) -> Iterator[Run]:
    for start, size, owners in runs:
        if start + size > end:
            first = max(start, end)
            yield first, start + size - first, owners


def _joined(runs: Iterable[Run]) -> Iterator[Run]:
    last: Run | None = None
    for run in runs:
        if last is not None and last[0] + last[1] == run[0] and last[2] == run[2]:
            last = (last[0], last[1] + run[1], last[2])
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last
