"""Lost slabs: those of which no in-sync copy can be had; which files they belong to; and giving up what was lost.

Place      coordinator floor; above restoration.py and slab_changes.py, below service.py.
Online     the volume stays online: only what lies in such slabs cannot be read or written. When a drive with an in-sync
           copy comes back, so does all of it, by itself (restoration.py).
Fails      A slab is *waiting* while a drive with an in-sync copy may come back: reads wait for the io_timeout, a reboot
           takes less. It is *lost* when all of them are known to hold nothing any more (truncated, overwritten,
           another drive in their place, removed): reads fail at once, for waiting would not help.
Blocks     Single blocks that are bad on all copies of a slab that is there (lost_blocks.py) are listed with it, when they are
           bad still. They cannot be read either; a block that is written as a whole is good again, by itself.

Invariants
  I1  The last in-sync copy is given up by `accept_data_loss` alone: asked for by a human, written down in the cluster
      store for ever before it is done.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import trio

from coordinator.cluster_facts import ClusterFacts
from coordinator.copy_verify import CopyVerifier
from coordinator.drive_control import DriveControl
from coordinator.lost_blocks import LostBlocks, Run
from coordinator.metadata import Metadata
from coordinator.paths import directory_path
from coordinator.restoration import Census, take_census
from coordinator.slab_changes import SlabChanges
from csvfs.block import slab_state
from csvfs.block.drive_faults import DAMAGED, FOREIGN, OVERWRITTEN, SWAPPED, TRUNCATED
from csvfs.block.scrub import BLOCKS_PER_CALL_MAX
from csvfs.errors import Conflict, CsvfsError, Fenced, Lost, NoSpace, NotFound
from csvfs.ids import METADATA_SLAB_ID_MIN, DriveId, Epoch, NodeName, SlabId, VolumeId
from csvfs.store.interface import ClusterStore, Compare, Put
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import ROLE_IN_SYNC, SlabDescriptor
from csvfs.wire.control import pack_value

log = logging.getLogger(__name__)

FOR_GOOD = frozenset((TRUNCATED, OVERWRITTEN, DAMAGED, FOREIGN, SWAPPED))
ROWS_PER_SLICE = 5_000  # of a scan, between which others get their turn
FILES_MAX = 2_000  # in one answer, which may have 1 MiB
RANGES_PER_FILE_MAX = 64
ACCEPTED = "accepted_loss/"
CAS_TRIES_MAX = 100
RUNS_LOOKED_AT_MAX = 1024  # of single blocks, for one listing
RATE_MIB_S = 200
WHOLE_SLAB = 1 << 32  # blocks


@dataclass(slots=True)
class LostFile:
    ino: int
    ranges: list[tuple[int, int]] = field(default_factory=list)  # (offset, size) in bytes
    path: bytes = b""


class LostSlabs:
    """Of one volume's data slabs. Without its metadata slabs a volume has no coordinator that could be asked."""

    def __init__(
        self,
        name: str,
        volume: VolumeId,
        metadata: Metadata,
        changes: SlabChanges,
        control: DriveControl,
        facts: ClusterFacts,
        store: ClusterStore,
        lost_blocks: LostBlocks,
        verifier: CopyVerifier,
    ) -> None:
        self._name = name
        self._volume = volume
        self._metadata = metadata
        self._changes = changes
        self._control = control
        self._facts = facts
        self._store = store
        self._lost_blocks = lost_blocks
        self._verifier = verifier
        self.on_accepted: Callable[[Iterable[DriveId]], None] = lambda drives: None

    def check(self, descriptor: SlabDescriptor) -> None:
        """Raises Lost when every in-sync copy is known to be gone for good."""
        faults = [self.fault_of(member.drive) for member in descriptor.in_sync]
        if faults and all(fault in FOR_GOOD for fault in faults):
            drives = ", ".join(f"{m.drive.hex()[:8]} on {m.node}" for m in descriptor.in_sync)
            raise Lost(
                f"slab {descriptor.slab}: its last copies were on {drives} ({', '.join(faults)}); "
                "see csvfs volume status --lost"
            )

    def fault_of(self, drive: DriveId) -> str:
        """Why the drive gives nothing now; empty: it does."""
        node = self._facts.node_of(drive)
        if node is None:
            return FOREIGN  # it was removed from the pool
        if self._facts.server(node) is None:
            return f"node {node} is down"
        return str(self._facts.drive_report(drive).get("fault") or "")

    # -- listing ---------------------------------------------------------------------------------

    async def find(self) -> tuple[list[SlabDescriptor], Census]:
        """Slabs without an in-sync copy that can be reached now. Raises Fenced."""
        census = await take_census(self._control, self._facts, self._volume, self._facts.drive_nodes())
        lost = []
        for descriptor in self._changes.book.all():
            there = census.copies.get(descriptor.slab, {})
            if not any(member.drive in there for member in descriptor.in_sync):
                lost.append(descriptor)
        return lost, census

    async def listing(self) -> dict[str, Any]:
        """For the command line: slabs, why, and the files that lie in them with their ranges in bytes."""
        lost, census = await self.find()
        await self._look_at_blocks()
        blocks = self._lost_blocks.slabs()
        whole: dict[SlabId, list[Run]] = {descriptor.slab: [(0, WHOLE_SLAB)] for descriptor in lost}
        files = await self._files_in(blocks | whole)
        return {
            "slabs": [self._slab_row(descriptor, census) for descriptor in lost],
            "blocks": sum(count for runs in blocks.values() for _, count in runs),
            "files": [[f.ino, f.path, f.ranges[:RANGES_PER_FILE_MAX]] for f in files[:FILES_MAX]],
            "file_count": len(files),
        }

    async def _look_at_blocks(self) -> None:
        """Whether those that were found lost are lost still. Raises Fenced, and what ends the batches."""
        runs = [(slab, *run) for slab, found in self._lost_blocks.slabs().items() for run in found]
        for slab, block, count in runs[:RUNS_LOOKED_AT_MAX]:
            for start in range(block, block + count, BLOCKS_PER_CALL_MAX):
                size = min(BLOCKS_PER_CALL_MAX, block + count - start)
                try:
                    await self._verifier.verify(self._changes, slab, start, size, RATE_MIB_S)
                except NotFound:
                    if slab < METADATA_SLAB_ID_MIN:  # given back to the pool
                        await self._lost_blocks.verified(slab, start, size, ())

    def _slab_row(self, descriptor: SlabDescriptor, census: Census) -> dict[str, Any]:
        members = [
            [m.drive, m.node, self.fault_of(m.drive) or "its copy is not there"] for m in descriptor.in_sync
        ]
        stale = list(census.copies.get(descriptor.slab, {}))
        return {"slab": descriptor.slab, "epoch": descriptor.epoch, "members": members, "stale": stale}

    async def _files_in(self, slabs: dict[SlabId, list[Run]]) -> list[LostFile]:
        """Files with any of these blocks."""
        files: dict[int, LostFile] = {}
        if not slabs:
            return []
        last = (0, -1)
        while True:
            rows = self._metadata.database.rows(
                "SELECT ino, block, slab, slab_block, count FROM extents WHERE (ino, block) > (?, ?) ORDER BY ino, block LIMIT ?",
                (*last, ROWS_PER_SLICE),
            )
            for ino, block, slab, slab_block, count in rows:
                for start, length in slabs.get(slab, ()):
                    first, end = max(start, slab_block), min(start + length, slab_block + count)
                    if first < end:
                        file = files.setdefault(ino, LostFile(ino))
                        _add_range(file, (block + first - slab_block) * BLOCK_SIZE, (end - first) * BLOCK_SIZE)
            if len(rows) < ROWS_PER_SLICE:
                break
            last = (rows[-1][0], rows[-1][1])
            await trio.sleep(0)
        await self._name_files(files)
        return sorted(files.values(), key=lambda file: file.path)

    async def _name_files(self, files: dict[int, LostFile]) -> None:
        """One of the names of each, by a scan of all entries: nobody needs names by inode but this."""
        parents: dict[int, tuple[int, bytes]] = {}
        last = (0, -1)
        while True:
            rows = self._metadata.database.rows(
                "SELECT parent, cookie, name, ino FROM entries WHERE (parent, cookie) > (?, ?) "
                "ORDER BY parent, cookie LIMIT ?",
                (*last, ROWS_PER_SLICE),
            )
            for parent, _, name, ino in rows:
                if ino in files:
                    parents.setdefault(ino, (parent, bytes(name)))
            if len(rows) < ROWS_PER_SLICE:
                break
            last = (rows[-1][0], rows[-1][1])
            await trio.sleep(0)
        directories: dict[int, bytes] = {}
        for ino, (parent, name) in parents.items():
            files[ino].path = directory_path(self._metadata.database, parent, directories) + b"/" + name

    # -- giving up -------------------------------------------------------------------------------

    async def accept_data_loss(self) -> dict[str, Any]:
        """Go on with what is left of every lost slab: its newest stale copy, or zeros. There is no way back.

        Returns  rows of what was taken. Raises Fenced; NoSpace: no drive has room for a new copy.
        """
        lost, census = await self.find()
        rows = []
        for descriptor in lost:
            try:
                rows.append(await self._accept(descriptor, census))
            except Fenced:
                raise
            except CsvfsError as error:
                rows.append({"slab": descriptor.slab, "took": "", "error": str(error)})
        self.on_accepted({member.drive for descriptor in lost for member in descriptor.members})
        return {"slabs": rows}

    async def _accept(self, descriptor: SlabDescriptor, census: Census) -> dict[str, Any]:
        slab = descriptor.slab
        newest = await self._newest_stale(slab, census)
        drive, node, epoch = newest or (*self._place_for_zeros(descriptor, census), Epoch(0))
        took = "stale copy" if newest else "zeros"
        row = {"slab": slab, "took": took, "drive": drive, "node": node, "copy_epoch": epoch}
        await self._write_down({**row, "before": descriptor.to_wire(), "when": time.time_ns()})
        log.error("slab %d: DATA LOSS ACCEPTED: %s on drive %s goes on", slab, took, drive.hex()[:8])
        accepted = slab_state.accept_loss(descriptor, drive, node, epoch)
        if not newest:
            await self._control.create_slab(slab, accepted.epoch, node, drive, ROLE_IN_SYNC)

        def transition(current: SlabDescriptor) -> SlabDescriptor:
            if current != descriptor:
                raise Conflict(f"slab {slab} has changed meanwhile: look again")
            return accepted

        await self._changes.change(slab, transition)
        return row

    async def _newest_stale(self, slab: SlabId, census: Census) -> tuple[DriveId, NodeName, Epoch] | None:
        found = []
        for drive in census.copies.get(slab, {}):
            node = census.node_of[drive]
            for copy in await self._control.copies(node, drive):
                if copy.volume == self._volume and copy.slab == slab:
                    found.append((drive, node, copy.epoch))
        return max(found, key=lambda row: row[2], default=None)

    def _place_for_zeros(self, descriptor: SlabDescriptor, census: Census) -> tuple[DriveId, NodeName]:
        """A member whose drive is there without its copy, else any drive that takes slabs. Raises NoSpace."""
        own = [(m.drive, m.node) for m in descriptor.members if m.drive in census.node_of]
        others = [(d, n) for d, n in sorted(census.node_of.items()) if self._facts.takes_slabs(d)]
        for place in [*own, *others]:
            return place
        raise NoSpace(f"slab {descriptor.slab}: no drive can be reached for a new copy")

    async def _write_down(self, value: dict[str, Any]) -> None:
        """For ever: nothing in csvfs deletes these keys."""
        for number in range(CAS_TRIES_MAX):
            count = len(await self._store.list(f"{ACCEPTED}{self._name}/"))
            key = f"{ACCEPTED}{self._name}/{count + number:06d}"
            if (await self._store.transact([Compare(key, 0)], [Put(key, pack_value(value))])).succeeded:
                return
        raise Conflict(f"{ACCEPTED}{self._name}: others write there all the time")


def _add_range(file: LostFile, offset: int, size: int) -> None:
    if file.ranges and sum(file.ranges[-1]) == offset:
        file.ranges[-1] = (file.ranges[-1][0], file.ranges[-1][1] + size)
    else:
        file.ranges.append((offset, size))
