"""Settling: blocks that were shared and have one owner again become blocks as any other.

Place      coordinator floor; above batches.py, metadata_log.py, shared_blocks.py.
Order      As of a trim: first it is on the media of all members that nobody else has them (`log.flush`), then their rows go,
           and only then is their owner told that it may write them.
"""

import logging

import trio

from coordinator.batches import Batches
from coordinator.metadata_log import MetadataLog
from coordinator.shared_blocks import SharedBlocks
from csvfs.errors import CsvfsError, Fenced

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
ROWS_AT_ONCE = 1024


class Settling:
    """Of one volume."""

    def __init__(self, shared: SharedBlocks, batches: Batches, metadata_log: MetadataLog) -> None:
        self._shared = shared
        self._batches = batches
        self._log = metadata_log

    async def run_forever(self) -> None:
        """Raises Fenced, and what ends the batches."""
        while True:
            await trio.sleep(INTERVAL_S)
            try:
                while await self.settle_some():
                    pass
            except Fenced:
                raise
            except CsvfsError as error:
                log.warning("blocks that are not shared any more cannot be settled now: %s", error)

    async def settle_some(self) -> bool:
        """False: there was nothing to settle."""
        rows = self._shared.unsettled(ROWS_AT_ONCE)
        if rows:
            await self._log.flush()
            await self._batches.run(lambda: self._shared.settle_owners(rows))
        return bool(rows)
