"""Metadata space: adds metadata slabs before the database needs them.

Place      coordinator floor; above slab_manager.py (which places copies) and slab_book.py (which commits
           them).
Order      copies on drives, then the cluster store key, then the image may use it. A kill in between leaves
           strays.
"""

import logging
from typing import Protocol

import trio

from coordinator.metadata import Metadata
from coordinator.metadata_log import MetadataLog
from coordinator.slab_book import MetadataBook
from coordinator.slab_changes import SlabChanges
from coordinator.slab_manager import SlabManager
from csvfs.block import slab_state
from csvfs.errors import CsvfsError, Fenced, NoSpace, NotCoordinator
from csvfs.ids import METADATA_SLAB_ID_MIN, SlabId
from csvfs.wire.block_messages import SlabDescriptor

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.5
RETRY_S = 5.0
COPIES_MAX = 3


class Learner(Protocol):
    def learn(self, descriptor: SlabDescriptor) -> None: ...


class MetadataSpace:
    """Keeps at least half a slab free; a batch writes a few hundred blocks, and there are at most 8 on their
    way."""

    def __init__(
        self,
        metadata: Metadata,
        metadata_log: MetadataLog,
        book: MetadataBook,
        slabs: SlabManager,
        bus: Learner,
        changes: SlabChanges,
    ) -> None:
        self._metadata = metadata
        self._log = metadata_log
        self._book = book
        self._slabs = slabs
        self._bus = bus
        self._changes = changes

    async def grow_forever(self) -> None:
        """Raises Fenced, NotCoordinator: another coordinator is at work."""
        while True:
            await trio.sleep(CHECK_INTERVAL_S)
            free = self._metadata.image.capacity_blocks - self._metadata.used_blocks()
            if free > self._slabs.slab_blocks // 2:
                continue
            try:
                await self._grow()
            except (Fenced, NotCoordinator):
                raise
            except CsvfsError as error:
                log.warning("the metadata cannot grow: %s", error)
                await trio.sleep(RETRY_S)

    async def _grow(self) -> None:
        slab = SlabId(max(self._book.slabs, default=METADATA_SLAB_ID_MIN - 1) + 1)
        self._slabs.creating.add(slab)
        try:
            await self._slabs.refresh_spaces()
            places = await self._create_copies(slab)
            descriptor = slab_state.new_slab(slab, [(place.drive, place.node) for place in places])
            self._changes.note_change(slab)  # a census under way may have missed some of its copies
            await self._book.add(descriptor)
        finally:
            self._slabs.creating.discard(slab)
        self._bus.learn(self._book.current(slab))
        self._log.add_slab(slab)
        self._metadata.image.grow(len(self._book.slabs) * self._slabs.slab_blocks)
        log.info("metadata has %d slabs now", len(self._book.slabs))

    async def _create_copies(self, slab: SlabId) -> list:
        """As many as the first metadata slab has, or as there are fault domains with room: at least one."""
        first = self._book.current(self._book.slabs[0])
        for copies in range(min(COPIES_MAX, len(first.members)), 1, -1):
            try:
                return await self._slabs.create_copies(slab, copies)
            except NoSpace as error:
                log.warning("metadata slab %d gets fewer than %d copies: %s", slab, copies, error)
        return await self._slabs.create_copies(slab, 1)
