"""Bringing one slab copy up to date from an in-sync one (ARCHITECTURE.md, "Resync"; I7).

Place      block floor, in the drive server of the copy that is brought up to date.
Rule       The coordinator has installed the epoch on all members before it asks for a pull. So every write of
           an earlier epoch is on the source already, and every later one comes here by itself: blocks written
           here since the epoch was installed are skipped (BlockService.install begins to note them).
What       chunks given            these (making members equal after a writer died)
           since > 0               chunks the source stamped with `since` or later, and those active here, and those where the
                                   source may be ahead of other members: of a writer that died before `since`
           since 0                 every chunk that source or target ever wrote
"""

import logging
from array import array
from dataclasses import dataclass
from typing import Any

import trio

from csvfs.block.bus_reads import read_blocks
from csvfs.block.compression import Asking
from csvfs.block.pace import INTERVAL_S, Load, Pacer
from csvfs.block.slab_copy import SlabCopy
from csvfs.block.writer_marks import MarkBook
from csvfs.errors import BadRequest, Corrupt, CsvfsError, ProtocolError, StaleEpoch
from csvfs.ids import DriveId, Epoch, Incarnation, id_bytes
from csvfs.net.detours import DRIVES, Paths
from csvfs.net.engine import Engine
from csvfs.net.link import Link, connect
from csvfs.units import BLOCK_SIZE, BLOCKS_PER_CHUNK, CHUNK_SIZE
from csvfs.wire.block_messages import BLOCK_COUNT_MAX, BLOCK_HEAD
from csvfs.wire.frames import Kind

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
TABLE_TIMEOUT_S = 10.0
READS_IN_FLIGHT = 3
CHUNKS_PER_READ = BLOCK_COUNT_MAX // BLOCKS_PER_CHUNK


@dataclass(slots=True, frozen=True)
class Source:
    """Where the in-sync copy is."""

    address: str
    port: int
    drive: DriveId
    node: str = ""  # whose certificate it must show, where there is TLS

    @staticmethod
    def from_wire(value: dict[str, Any]) -> "Source":
        try:
            return Source(
                str(value["address"]), int(value["port"]), DriveId(id_bytes(value["drive"])),
                str(value.get("node") or ""),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise BadRequest(f"not a source to pull from: {error!r}") from None


async def connect_source(engine: Engine, source: Source, paths: Paths | None) -> Link:
    """A link to where the copy is; `paths` None: by the straight path. Raises Unavailable, TimedOut. Cancel safe."""
    address = (source.address, source.port)
    if paths is None or not source.node:
        return await connect(engine, address, timeout_s=CONNECT_TIMEOUT_S, node=source.node)
    return await paths.connect(address, node=source.node, service=DRIVES, timeout_s=CONNECT_TIMEOUT_S)


class Pull:
    """One pull. `run` copies; afterwards the drive is flushed and `settled_chunks` may be unmarked."""

    def __init__(
        self,
        engine: Engine,
        copy: SlabCopy,
        source: Source,
        *,
        cluster: bytes,
        writer: str,
        epoch: Epoch,
        since: Epoch,
        chunks: list[int] | None,
        marks: MarkBook,
        pacer: Pacer | None = None,
        even_if_lost: bool = False,
        paths: Paths | None = None,
    ) -> None:
        """
        marks          of the drive server: what is pulled is unsettled there until it is known to be on all members
        pacer          None: as fast as it goes, for somebody waits for it
        even_if_lost   go on over blocks that have rotted on the source and are not here either (`lost`)
        """
        if copy.epoch != epoch:
            raise StaleEpoch(f"slab {copy.slab} is at epoch {copy.epoch}, not {epoch}: install first")
        if chunks is not None and not all(
            isinstance(chunk, int) and 0 <= chunk < copy.block_count // BLOCKS_PER_CHUNK for chunk in chunks
        ):
            raise BadRequest(f"chunks out of range for slab {copy.slab}")
        self._engine = engine
        self._paths = paths
        self._copy = copy
        self._source = source
        self._hello = {
            "cluster": cluster,
            "volume": copy.volume,
            "writer": writer,
            "incarnation": Incarnation(epoch),
        }
        self._epoch = epoch
        self._since = since
        self._chunks = chunks
        self._epochs: dict[int, int] = {}  # what the source's chunks are stamped with
        self._active_before = copy.active_chunks()
        self._pulled: list[int] = []
        self._unequal: set[int] = set()  # of those, what other members may lack
        self._marks = marks
        self._pacer = pacer
        self._even_if_lost = even_if_lost
        self._checksums = array("I")  # of the source's blocks
        self.lost: list[int] = []  # blocks of which neither copy has the content
        self._asking = Asking()
        self.source_load = Load(None, 1.0)
        self.bytes_done = 0
        self.bytes_total = 0
        self.chunk_count = 0

    async def run(self) -> None:
        """Copy all stale chunks. Raises StaleEpoch (the slab moved on: start anew), Unavailable, Corrupt."""
        link = await connect_source(self._engine, self._source, self._paths)
        try:
            hello = await link.call("hello", self._hello, timeout_s=CONNECT_TIMEOUT_S)
            index = next((row["index"] for row in hello["drives"] if row["id"] == self._source.drive), None)
            if index is None:
                raise ProtocolError(f"{link.peer} does not serve the source drive of slab {self._copy.slab}")
            args = {"drive": self._source.drive, "slab": self._copy.slab}
            table = await link.call("read_table", args, timeout_s=TABLE_TIMEOUT_S)
            ahead = await self._ask_unequal(link, args) if self._chunks is None else set()
            chunks = self._stale_chunks(table, ahead)
            self.chunk_count = len(chunks)
            self.bytes_total = len(chunks) * CHUNK_SIZE
            failure = None
            async with trio.open_nursery() as nursery:
                if self._pacer is not None:
                    nursery.start_soon(self._watch_source_forever, link)
                try:
                    await self._copy_chunks(link, index, chunks)
                except CsvfsError as error:
                    failure = error  # carried out of the nursery, which would wrap it in a group
                nursery.cancel_scope.cancel()
            if failure is not None:
                raise failure
            # Asked again at the end: what was read before was marked there before, or is on all members by now. Where
            # members are being made equal, others may have to be yet.
            settled = self._chunks is None
            self._unequal = await self._ask_unequal(link, args) if settled else set(self._pulled)
        finally:
            link.close()

    async def _ask_unequal(self, link: Link, args: dict[str, Any]) -> set[int]:
        """Chunks of the source that may have what other members lack."""
        unequal = await link.call("unequal", args, timeout_s=TABLE_TIMEOUT_S)
        if not isinstance(unequal, list):
            raise ProtocolError(f"{link.peer} answered unequal with {type(unequal).__name__}")
        chunk_count = self._copy.block_count // BLOCKS_PER_CHUNK
        return {chunk for chunk in unequal if isinstance(chunk, int) and 0 <= chunk < chunk_count}

    async def _watch_source_forever(self, link: Link) -> None:
        """Learn how much the source's own programs notice."""
        while True:
            try:
                answer = await link.call("load", {}, timeout_s=TABLE_TIMEOUT_S)
                latency_us = answer["latency_us"]
                self.source_load = Load(
                    None if latency_us is None else float(latency_us), float(answer["baseline_us"])
                )
            except (CsvfsError, KeyError, TypeError, ValueError):
                return  # the copying will say what is wrong, if anything is
            await trio.sleep(INTERVAL_S)

    def _stale_chunks(self, table: dict[str, Any], ahead: set[int]) -> list[int]:
        theirs = array("I", table["chunk_epochs"])
        ours = array("I", bytes(self._copy.chunk_epochs()))
        chunk_count = self._copy.block_count // BLOCKS_PER_CHUNK
        if len(theirs) < chunk_count:
            raise ProtocolError(f"{len(theirs)} chunk epochs for a slab of {chunk_count} chunks")
        self._checksums = array("I", table["checksums"])
        self._epochs = {chunk: theirs[chunk] for chunk in range(chunk_count)}
        if self._chunks is not None:
            return sorted(set(self._chunks))
        if self._since:
            stale = {chunk for chunk in range(chunk_count) if theirs[chunk] >= self._since}
            return sorted(stale.union(self._active_before, ahead))
        return [chunk for chunk in range(chunk_count) if theirs[chunk] or ours[chunk]]

    async def _copy_chunks(self, link: Link, index: int, chunks: list[int]) -> None:
        runs = _runs(chunks)
        errors: list[CsvfsError] = []

        async def work() -> None:
            while runs and not errors:
                first, count = runs.pop()
                try:
                    await self._copy_run(link, index, first, count)
                except CsvfsError as error:
                    errors.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(READS_IN_FLIGHT):
                nursery.start_soon(work)
        if errors:
            raise errors[0]

    async def _copy_run(self, link: Link, index: int, first: int, count: int) -> None:
        copy = self._copy
        block, blocks = first * BLOCKS_PER_CHUNK, count * BLOCKS_PER_CHUNK
        self._marks.note_unsettled((copy, chunk) for chunk in range(first, first + count))
        if self._pacer is not None:
            await self._pacer.take(count * CHUNK_SIZE)
        try:
            packed, data = await read_blocks(
                link, index, copy.slab, self._epoch, block, blocks, copy.seed, self._asking
            )
        except Corrupt:
            for number in range(block, block + blocks):
                await self._copy_doubtful(link, index, number)
        else:
            self._check_epoch()
            # Stamped as on the source, not with this epoch: else the next resync from here would copy all of it.
            epoch = max(1, *(self._epochs[chunk] for chunk in range(first, first + count)))
            copy.apply_pulled_blocks(block, data, packed, epoch)
        self._pulled.extend(range(first, first + count))
        self.bytes_done += blocks * BLOCK_SIZE

    async def _copy_doubtful(self, link: Link, index: int, block: int) -> None:
        """One block of a run of which some do not verify on the source."""
        copy, epoch = self._copy, max(1, self._epochs[block // BLOCKS_PER_CHUNK])
        try:
            packed, data = await read_blocks(link, index, copy.slab, self._epoch, block, 1, copy.seed)
        except Corrupt as error:
            self._check_epoch()
            checksum = self._checksums[block]
            if copy.take_checksum(block, checksum, epoch, even_if_lost=self._even_if_lost):
                self._heal_source(link, index, block, checksum)
            elif self._even_if_lost:
                log.error("slab %d block %d: lost: %s", copy.slab, block, error)
                self.lost.append(block)
            else:
                raise
        else:
            self._check_epoch()
            copy.apply_pulled_blocks(block, data, packed, epoch)

    def _check_epoch(self) -> None:
        if self._copy.epoch != self._epoch:
            raise StaleEpoch(
                f"slab {self._copy.slab} moved on to epoch {self._copy.epoch} during its resync"
            )

    def _heal_source(self, link: Link, index: int, block: int, checksum: int) -> None:
        """Give the source what it has lost. It takes that only if its own still does not verify, at this epoch."""
        copy = self._copy
        packed, data = copy.read_blocks(block, 1)
        if packed != checksum.to_bytes(4, "little"):
            return  # it was written meanwhile, there too
        head = BLOCK_HEAD.pack(copy.slab, 0, 0, self._epoch, block, 1, index, 0)
        link.request(Kind.HEAL, head + packed, bytes(data), lambda frame, error: None)

    def settled_chunks(self) -> list[int]:
        """Chunks that are on all members by now: they need not be active any more once the drive was flushed, unless a
        writer marked them since."""
        if self._copy.epoch != self._epoch:
            return []
        settled = set(self._pulled).union(self._active_before if self._chunks is None else ())
        return sorted(settled - self._unequal)


def _runs(chunks: list[int]) -> list[tuple[int, int]]:
    """Consecutive chunks joined to (first, count) of at most CHUNKS_PER_READ, last first."""
    runs: list[tuple[int, int]] = []
    for chunk in chunks:
        if runs and runs[-1][0] + runs[-1][1] == chunk and runs[-1][1] < CHUNKS_PER_READ:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((chunk, 1))
    runs.reverse()
    return runs
