"""Scrub: reading what lies on a drive to find what has rotted, and healing it from another copy.

Place      block floor, in the drive server. A coordinator says what to scrub, and where to heal from (PROTOCOL.md,
           "scrub", "heal_from", "scrub_tables").
Pace       slices of 1 MiB: dropped from the page cache and read again in a thread, so that the medium is asked;
           verified in the engine's thread, where no write can come in between. After each slice it sleeps as long
           as the given rate asks for.
Found      data or checksums that do not match: told, and healed by `Healer`. A written bit that is missing, a half of a
           slot entry, a superblock: another one on the same drive vouches for it, so they are put right at once.
"""

import logging
import os
from dataclasses import dataclass, field
from typing import Any

import trio

from csvfs.block.bus_reads import read_blocks
from csvfs.block.drive import Drive
from csvfs.block.pull import CONNECT_TIMEOUT_S, Source, connect_source
from csvfs.block.slab_copy import SlabCopy
from csvfs.errors import BadRequest, Corrupt, Fenced, ProtocolError, StaleEpoch
from csvfs.ids import Epoch, Incarnation
from csvfs.net.detours import Paths
from csvfs.net.engine import Engine
from csvfs.units import BLOCK_SIZE, MIB
from csvfs.wire.block_messages import BLOCK_COUNT_MAX

log = logging.getLogger(__name__)

BLOCKS_PER_CALL_MAX = 4096  # 16 MiB: so often a coordinator hears how far it is


@dataclass(slots=True)
class ScrubResult:
    """`bad`: blocks to be healed from another copy. `repaired`: put right here and now."""

    bad: list[int] = field(default_factory=list)
    repaired: int = 0
    verified: int = 0  # bytes

    def to_wire(self) -> dict[str, Any]:
        return {"bad": self.bad, "repaired": self.repaired, "verified": self.verified}


async def scrub_blocks(copy: SlabCopy, block: int, count: int, rate: int) -> ScrubResult:
    """Verify a range of a copy. `rate`: bytes per second at most; 0: as fast as it goes.

    Raises  Corrupt: the copy's tables are damaged as a whole. DriveFailed. BadRequest. Cancel safe.
    """
    if not 0 < count <= BLOCKS_PER_CALL_MAX:
        raise BadRequest(f"a scrub of {count} blocks; at most {BLOCKS_PER_CALL_MAX}")
    result = ScrubResult()
    began = trio.current_time()
    end = min(block + count, copy.block_count)
    for start in range(block, end, BLOCK_COUNT_MAX):
        size = min(BLOCK_COUNT_MAX, end - start)
        if copy.has_blocks(start, size):
            await trio.to_thread.run_sync(_read_anew, copy, start, size)
        bad, repaired = copy.scrub_slice(start, size)
        result.bad += bad
        result.repaired += repaired
        result.verified += size * BLOCK_SIZE
        wait_s = result.verified / rate - (trio.current_time() - began) if rate else 0
        await trio.sleep(max(0.0, wait_s))
    return result


def _read_anew(copy: SlabCopy, block: int, count: int) -> None:
    """Ask the medium, not the page cache. What is dirty stays in memory, and is verified there."""
    offset, size = copy.data_offset + block * BLOCK_SIZE, count * BLOCK_SIZE
    os.posix_fadvise(copy.drive.fd, offset, size, os.POSIX_FADV_DONTNEED)
    copy.warm_blocks(block, count)


def scrub_tables(drive: Drive) -> int:
    """Put right the halves of slot entries that rotted; how many. Raises DriveFailed."""
    repaired = drive.scrub_slot_table()
    if repaired:
        drive.counters.healed += repaired
        drive.repairs.append(f"{repaired} halves of slot entries were damaged: rewritten")
        log.warning("drive %s: %d halves of slot entries were damaged: rewritten", drive.path, repaired)
    return repaired


class Healer:
    """Rewrites bad blocks of a copy with those of an in-sync one.

    Rule  heal_block rewrites only what does not verify at that moment, at an unchanged epoch: what a writer has put
          there meanwhile stays, and what was read from the source is never older than what it replaces.
    """

    def __init__(self, engine: Engine, cluster: bytes, writer: str, paths: Paths | None = None) -> None:
        self._engine = engine
        self._paths = paths
        self._cluster = cluster
        self._writer = writer

    async def heal(self, copy: SlabCopy, source: Source, epoch: Epoch, blocks: list[int]) -> dict[str, Any]:
        """Returns  healed: how many; left: those that the source cannot give either.

        Raises  StaleEpoch: the slab moved on. Unavailable, ProtocolError: the source cannot be asked. BadRequest.
        """
        if not all(isinstance(block, int) and 0 <= block < copy.block_count for block in blocks):
            raise BadRequest(f"blocks out of range for slab {copy.slab}")
        hello = {
            "cluster": self._cluster, "volume": copy.volume, "writer": self._writer,
            "incarnation": Incarnation(epoch),
        }  # fmt: skip
        link = await connect_source(self._engine, source, self._paths)
        healed, left = 0, []
        try:
            answer = await link.call("hello", hello, timeout_s=CONNECT_TIMEOUT_S)
            index = next((row["index"] for row in answer["drives"] if row["id"] == source.drive), None)
            if index is None:
                raise ProtocolError(f"{link.peer} does not serve the source drive of slab {copy.slab}")
            for block in blocks:
                try:
                    packed, data = await read_blocks(link, index, copy.slab, epoch, block, 1, copy.seed)
                except (Corrupt, Fenced) as error:
                    log.error("slab %d block %d: the source cannot give it: %s", copy.slab, block, error)
                    left.append(block)
                    continue
                if copy.epoch != epoch:
                    raise StaleEpoch(f"slab {copy.slab} moved on to epoch {copy.epoch} while it was healed")
                healed += copy.heal_block(block, data, int.from_bytes(packed, "little"))
        finally:
            link.close()
        if healed:
            log.warning("slab %d on drive %s: %d blocks healed", copy.slab, copy.drive.path, healed)
        return {"healed": healed, "left": left}


def rate_of(value: int | None) -> int:
    """Bytes per second from an argument in MiB per second. Raises BadRequest."""
    if value is None or value == 0:
        return 0
    if not 0 < value <= 1 << 20:
        raise BadRequest(f"a rate of {value} MiB/s")
    return value * MIB
