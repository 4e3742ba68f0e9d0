"""Scrub: every copy of every slab is verified every few weeks, or when somebody asks; what rotted is healed.

Place      coordinator floor; above copy_verify.py, which verifies and heals, below service.py.
Task       run_forever, one slab after the other: its copies side by side, each at a low rate.
Round      goes through the slabs by number. How far it is stands in the volume's settings (`scrub`), so a round that
           was begun here is gone on with by the next coordinator. A slab made after its number was passed waits for
           the next round.
Clock      the wall clock says when a round is due: nothing is decided by it that could lose data.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import trio

from coordinator.batches import Batches
from coordinator.cluster_facts import ClusterFacts
from coordinator.copy_verify import CopyResult, CopyVerifier
from coordinator.drive_control import DriveControl
from coordinator.metadata import Metadata
from coordinator.slab_changes import SlabChanges
from csvfs.block.scrub import BLOCKS_PER_CALL_MAX
from csvfs.errors import CsvfsError, Fenced, NotFound, ProtocolError
from csvfs.ids import SlabId
from csvfs.units import BLOCK_SIZE
from csvfs.wire.control import pack_value, unpack_value

log = logging.getLogger(__name__)

INTERVAL_S = 28 * 24 * 3600.0
RATE_MIB_S = 20  # per copy: a hard disk does not notice
RATE_ASKED_MIB_S = 200  # somebody waits for it
LOOK_INTERVAL_S = 600.0
RETRY_S = 1.0
SETTING = "scrub"
SAVED_EVERY_S = 5.0


@dataclass(slots=True)
class ScrubRound:
    """How far a round is. Times in ns since the epoch; 0: not yet. Counts are of blocks and table entries."""

    started: int = 0
    finished: int = 0  # of the last round that went through
    next_slab: int = 0
    found: int = 0
    healed: int = 0
    lost: int = 0  # no copy has them
    skipped: int = 0  # copies that could not be asked

    @property
    def is_under_way(self) -> bool:
        return self.started > self.finished


class Scrub:
    """All slabs of one volume."""

    def __init__(
        self,
        volume_name: str,
        metadata: Metadata,
        batches: Batches,
        books: Iterable[SlabChanges],
        control: DriveControl,
        facts: ClusterFacts,
        verifier: CopyVerifier,
        *,
        slab_blocks: int,
        is_paused: Callable[[], bool],
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._volume_name = volume_name
        self._metadata = metadata
        self._batches = batches
        self._books = list(books)
        self._control = control
        self._facts = facts
        self._verifier = verifier
        self._slab_blocks = slab_blocks
        self._is_paused = is_paused
        self._interval_s = interval_s
        self._asked = False
        self._wanted = trio.Event()
        self._began_at = 0.0
        self._bytes_done = 0
        self._bytes_total = 0
        self._saved_at = 0.0
        self.round = self._load()

    def _load(self) -> ScrubRound:
        rows = self._metadata.database.rows("SELECT value FROM settings WHERE name = ?", (SETTING,))
        try:
            value = unpack_value(rows[0][0]) if rows else {}
            return ScrubRound(**{row.name: int(value.get(row.name, 0)) for row in fields(ScrubRound)})
        except (ProtocolError, AttributeError, TypeError, ValueError):
            log.error("how far the last scrub was cannot be read: a new round begins")
            return ScrubRound()

    async def _save(self) -> None:
        packed = pack_value(asdict(self.round))

        def store() -> None:
            self._metadata.database.run(
                "INSERT OR REPLACE INTO settings(name, value) VALUES(?,?)", (SETTING, packed)
            )

        await self._batches.run(store)
        self._saved_at = trio.current_time()

    # -- asking ----------------------------------------------------------------------------------

    def start(self) -> dict[str, Any]:
        """Begin a round now, at a higher rate; one that is under way is gone on with, at that rate."""
        self._asked = True
        self._wanted.set()
        return self.to_status()

    def to_status(self) -> dict[str, Any]:
        return {**asdict(self.round), "under_way": self.round.is_under_way or self._asked}

    def job_rows(self) -> list[dict[str, Any]]:
        """As Resync.to_status: sizes in bytes, rate in bytes per second, eta in seconds."""
        if not self.round.is_under_way:
            return []
        rate = self._bytes_done / max(trio.current_time() - self._began_at, 0.001)
        left = max(0, self._bytes_total - self._bytes_done)
        healed = f", {self.round.healed} of {self.round.found} errors healed" if self.round.found else ""
        paused = self._is_paused()
        return [
            {
                "kind": "scrub", "what": f"scrub{healed}", "drive": None, "node": "",
                "done": self._bytes_done, "left": left, "total": self._bytes_total,
                "rate": rate, "eta": left / rate if rate else None,
                "waiting_for": f"csvfs job resume {self._volume_name} scrub" if paused else "", "paused": paused,
            }
        ]  # fmt: skip

    # -- scrubbing -------------------------------------------------------------------------------

    async def run_forever(self) -> None:
        """Raises Fenced, and what ends the batches."""
        while True:
            if not (self.round.is_under_way or self._asked or self._is_due()):
                with trio.move_on_after(LOOK_INTERVAL_S):
                    await self._wanted.wait()
                continue
            self._wanted = trio.Event()
            await self._run_round()

    def _is_due(self) -> bool:
        since_s = (time.time_ns() - max(self.round.finished, self._metadata.created_ns())) / 1e9
        return since_s >= self._interval_s

    async def _run_round(self) -> None:
        if not self.round.is_under_way:
            self.round = ScrubRound(started=time.time_ns(), finished=self.round.finished)
            await self._save()
        log.info("scrub: from slab %d on", self.round.next_slab)
        self._began_at, self._bytes_done = trio.current_time(), 0
        await self._scrub_tables()
        for changes in self._books:
            slabs = sorted(d.slab for d in changes.book.all() if d.slab >= self.round.next_slab)
            self._bytes_total = self._bytes_done + self._bytes_of(changes, slabs)
            for slab in slabs:
                while self._is_paused():
                    await trio.sleep(RETRY_S)
                await self._scrub_slab(changes, slab)
                self.round.next_slab = slab + 1
                if trio.current_time() - self._saved_at >= SAVED_EVERY_S:
                    await self._save()
        self.round.finished, self.round.next_slab = time.time_ns(), 0
        self._asked = False
        await self._save()
        log.info("scrub: done, %d errors found, %d healed, %d lost, %d copies skipped",
                 self.round.found, self.round.healed, self.round.lost, self.round.skipped)  # fmt: skip

    def _bytes_of(self, changes: SlabChanges, slabs: list[SlabId]) -> int:
        copies = sum(len(changes.book.current(slab).in_sync) for slab in slabs)
        return copies * self._slab_blocks * BLOCK_SIZE

    async def _scrub_tables(self) -> None:
        """Superblocks and slot tables of all drives, whichever volume's slabs are there: it is little."""
        for node in self._facts.drive_nodes():
            for drive in self._facts.drives_of(node) if self._facts.server(node) is not None else ():
                try:
                    repaired = await self._control.scrub_tables(node, drive)
                except Fenced:
                    raise
                except CsvfsError as error:
                    log.info("scrub: drive %s of node %s is left out: %s", drive.hex()[:8], node, error)
                    continue
                self.round.found += repaired
                self.round.healed += repaired

    async def _scrub_slab(self, changes: SlabChanges, slab: SlabId) -> None:
        for block in range(0, self._slab_blocks, BLOCKS_PER_CALL_MAX):
            count = min(BLOCKS_PER_CALL_MAX, self._slab_blocks - block)
            rate = RATE_ASKED_MIB_S if self._asked else RATE_MIB_S
            try:
                results = await self._verifier.verify(changes, slab, block, count, rate)
            except NotFound:
                return  # removed meanwhile
            for result in results:
                self._count(result)

    def _count(self, result: CopyResult) -> None:
        self._bytes_done += result.verified * BLOCK_SIZE
        self.round.found += result.found
        self.round.healed += result.healed
        self.round.lost += len(result.left) + (bool(result.damaged) and not result.is_made_anew)
        self.round.skipped += bool(result.skipped)
