"""Lost blocks: those that no in-sync copy has any more, as far as scrubs and verified files have told.

Place      coordinator floor; under copy_verify.py. What is lost as a whole slab is told by lost.py.
Kept       in the volume's settings (`lost_blocks`), so that the next coordinator knows of them.
Ends       a block is good again when it is written as a whole, trimmed, or a copy that has it returns: whoever verifies it
           anew says so. Nothing is decided by this list; drives say themselves what they have.
Limits     LOST_BLOCKS_MAX; more are counted by the scrub, and not named.
"""

import logging
from collections.abc import Iterable, Iterator

from coordinator.batches import Batches
from coordinator.metadata import Metadata
from csvfs.errors import ProtocolError
from csvfs.ids import SlabId
from csvfs.wire.control import pack_value, unpack_value

log = logging.getLogger(__name__)

SETTING = "lost_blocks"
LOST_BLOCKS_MAX = 16_384
_STORE = "INSERT OR REPLACE INTO settings(name, value) VALUES(?,?)"

Run = tuple[int, int]  # block, count


class LostBlocks:
    """Of one volume."""

    def __init__(self, metadata: Metadata, batches: Batches) -> None:
        self._metadata = metadata
        self._batches = batches
        self._by_slab: dict[SlabId, set[int]] = {}
        self._load()

    def _load(self) -> None:
        rows = self._metadata.database.rows("SELECT value FROM settings WHERE name = ?", (SETTING,))
        try:
            for slab, block, count in unpack_value(rows[0][0]) if rows else ():
                if 0 < count <= LOST_BLOCKS_MAX:
                    self._by_slab.setdefault(SlabId(slab), set()).update(range(block, block + count))
        except (ProtocolError, TypeError, ValueError):
            log.error("which blocks were found lost cannot be read: the next scrub finds them again")
            self._by_slab = {}

    @property
    def count(self) -> int:
        return sum(len(blocks) for blocks in self._by_slab.values())

    def slabs(self) -> dict[SlabId, list[Run]]:
        """All of them, in order."""
        return {slab: list(runs_of(blocks)) for slab, blocks in sorted(self._by_slab.items())}

    def within(self, slab: SlabId, block: int, count: int) -> list[Run]:
        """Those of a range."""
        return list(runs_of(known for known in self._by_slab.get(slab, ()) if block <= known < block + count))

    async def verified(self, slab: SlabId, block: int, count: int, lost: Iterable[int]) -> None:
        """Of this range all copies were looked at: these are lost, the others are not. Raises as Batches.run."""
        before = self._by_slab.get(slab, set())
        after = {known for known in before if not block <= known < block + count}
        room = LOST_BLOCKS_MAX - self.count + len(before) - len(after)
        after |= set(sorted(lost)[: max(0, room)])
        if after == before:
            return
        self._by_slab[slab] = after
        if not after:
            del self._by_slab[slab]
        packed = pack_value([[slab, *run] for slab, runs in self.slabs().items() for run in runs])
        await self._batches.run(lambda: self._metadata.database.run(_STORE, (SETTING, packed)))


def runs_of(blocks: Iterable[int]) -> Iterator[Run]:
    """(block, count) of the longest runs of neighbours."""
    start = end = -1
    for block in sorted(blocks):
        if block == end:
            end += 1
            continue
        if start >= 0:
            yield start, end - start
        start, end = block, block + 1
    if start >= 0:
        yield start, end - start
