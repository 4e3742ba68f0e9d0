"""Flushes of one drive, joined: who asks while one is under way shares the next one.

Place      block floor, under the drive server.
"""

from collections.abc import Awaitable, Callable

import trio

from csvfs.errors import CsvfsError


class _Round:
    """One flush to come, and all who wait for it."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: CsvfsError | None = None


class FlushGroup:
    """One drive's flushes. `run` does one: it puts all writes taken before its start on the medium."""

    def __init__(self, nursery: trio.Nursery, run: Callable[[], Awaitable[None]]) -> None:
        self._nursery = nursery
        self._run = run
        self._running = False
        self._next: _Round | None = None

    async def flush(self) -> None:
        """Return after a flush that began after this call. Raises what it raised (I8). Cancel safe."""
        if self._next is None:
            self._next = _Round()
        turn = self._next
        if not self._running:
            self._running = True
            self._nursery.start_soon(self._work)
        await turn.done.wait()
        if turn.error is not None:
            raise turn.error

    async def _work(self) -> None:
        try:
            while self._next is not None:
                turn, self._next = self._next, None
                try:
                    await self._run()
                except CsvfsError as error:
                    turn.error = error
                turn.done.set()
        finally:
            self._running = False
