"""Background tasks for the time of a block. Coordinator floor; on trio alone."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from csvfs.errors import CsvfsError, leaves


@asynccontextmanager
async def running(*tasks: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Run `tasks` until the block ends. A CsvfsError of one of them, or of the block, comes out as itself."""
    try:
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(task)
            yield
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        errors = leaves(group)
        if all(isinstance(error, CsvfsError | trio.Cancelled) for error in errors):
            for error in errors:
                if isinstance(error, CsvfsError):
                    raise error from None
        raise
