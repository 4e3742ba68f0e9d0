"""Quiet: moments in which the layout of a file may change under this mount.

Place      mount floor; above file_state.py, below holes.py, cloning.py, unsharing.py.
Why        Blocks that a file gives up are somebody else's soon. So nothing that was learned of them before may be used
           behind the change: no read of them is under way, and no answer that tells of them.
Caller     is one of `state.writers`, so a recall waits for all of this.
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from csvfs.mount.file_state import FileState

Range = tuple[int, int]  # first block, end


@asynccontextmanager
async def nothing_under_way(state: FileState, *ranges: Range) -> AsyncIterator[None]:
    """No write at all, no read of these blocks, no question about the layout. Their layout is unknown then."""
    state.truncating = True
    state.regate()
    try:
        async with state.mapping:  # reads of these blocks, once they are unknown, wait here
            while state.writes or state.writers > 1 or state.asking:
                await state.wait_change()
            await _no_read(state, ranges)
            yield
    finally:
        state.truncating = False
        state.regate()


@asynccontextmanager
async def none_told(state: FileState, ranges: Iterable[Range]) -> AsyncIterator[None]:
    """No read of these blocks, no question about the layout; the caller has claimed them. Writes elsewhere go on."""
    async with state.mapping:
        state.moving = True
        try:
            while state.fills or state.asking:
                await state.wait_change()
            await _no_read(state, ranges)
            yield
        finally:
            state.moving = False
            state.notify()


async def _no_read(state: FileState, ranges: Iterable[Range]) -> None:
    for first, last in ranges:
        state.extents.forget(first, last)
    reads = dict(state.reads)
    while any(read in state.reads for read in reads):
        await state.wait_change()
