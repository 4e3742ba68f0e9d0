"""Integrity of one file: which of its blocks how many copies have, what cannot be read; and verifying every copy of it.

Place      coordinator floor; above copy_verify.py and lost.py, below service.py. For people (`csvfs file integrity`).
Steps      both calls answer for a stretch of the file and say from where to ask on: nothing of it is kept here, so a takeover,
           or whoever stops asking, costs nothing.
Truth      whether a copy gives its blocks is asked of its drive server, by counting what of the range was never written;
           what the descriptor says of it would be no proof.
Limits     EXTENTS_MAX, SLABS_MAX of one answer; ASKED_MAX drive servers' answers awaited at once; VERIFYING_MAX steps.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import trio

from coordinator import arguments
from coordinator.arguments import Args
from coordinator.copy_verify import CopyResult, CopyVerifier
from coordinator.drive_control import DriveControl
from coordinator.extents import FILE_BLOCKS_MAX, Extent
from coordinator.lost import FOR_GOOD, LostSlabs
from coordinator.lost_blocks import LostBlocks, runs_of
from coordinator.metadata import Metadata
from coordinator.slab_changes import SlabChanges
from csvfs.block.scrub import BLOCKS_PER_CALL_MAX
from csvfs.errors import CsvfsError, Fenced, NotFound
from csvfs.ids import DriveId, SlabId
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import ROLE_JOINING, Member

EXTENTS_MAX = 1024  # of one answer
SLABS_MAX = 128
ASKED_MAX = 16
VERIFYING_MAX = 4  # several people, several files: the drives serve programs, too
RATE_MIB_S = 200  # per copy, as of a scrub that was asked for
# Why something cannot be read: no copy of the block matches its checksum; the copies are gone for good; their drives do not
# serve now.
BAD, LOST, WAITING = "bad", "lost", "waiting"


@dataclass(slots=True)
class _Slab:
    """What of one slab belongs to the stretch, and what its copies say."""

    ranges: list[tuple[int, int]] = field(default_factory=list)  # block, count
    unwritten: int | None = None  # None: no copy could be asked
    in_sync: int = 0
    joining: int = 0
    serving: int = 0  # of those in sync: they have answered
    faults: list[str] = field(default_factory=list)
    trouble: str = ""  # LOST, WAITING: no copy gives it

    @property
    def blocks(self) -> int:
        return sum(count for _, count in self.ranges)


@dataclass(slots=True)
class _Tally:
    """Of one copy over the slabs of a step."""

    verified: int = 0
    found: int = 0
    healed: int = 0
    left: int = 0
    skipped: int = 0
    why: str = ""

    def add(self, result: CopyResult) -> None:
        self.verified += result.verified
        self.found += result.found
        self.healed += result.healed
        self.left += len(result.left)
        self.skipped += bool(result.skipped or result.damaged)
        self.why = result.skipped or result.damaged or self.why


class FileIntegrity:
    def __init__(
        self,
        metadata: Metadata,
        changes: SlabChanges,
        control: DriveControl,
        lost: LostSlabs,
        lost_blocks: LostBlocks,
        verifier: CopyVerifier,
    ) -> None:
        self._metadata = metadata
        self._changes = changes
        self._control = control
        self._lost = lost
        self._lost_blocks = lost_blocks
        self._verifier = verifier
        self._verifying = trio.CapacityLimiter(VERIFYING_MAX)

    # -- looking ---------------------------------------------------------------------------------

    async def look(self, args: Args) -> dict[str, Any]:
        """The call `file_integrity` (PROTOCOL.md). Raises NotFound, IsADirectory, Conflict, BadRequest, Fenced."""
        ino, block = arguments.inode(args), arguments.number(args, "block", 0, FILE_BLOCKS_MAX - 1)
        size = self._metadata.getattr(ino)[6]
        extents, following = self._stretch(ino, block, EXTENTS_MAX, FILE_BLOCKS_MAX)
        shared = sum(
            count
            for extent in extents
            for _, count, owners in self._metadata.shared.owners(extent.slab, extent.slab_block, extent.count)
            if owners > 1
        )
        slabs: dict[SlabId, _Slab] = {}
        for extent in extents:
            slabs.setdefault(SlabId(extent.slab), _Slab()).ranges.append((extent.slab_block, extent.count))
        await self._ask_copies(slabs)
        return {
            "size": size,
            "next": following,
            "allocated": sum(extent.count for extent in extents),
            "shared": shared,
            "slabs": [
                [slab, one.blocks, one.unwritten, one.in_sync, one.joining, one.serving, one.faults]
                for slab, one in slabs.items()
            ],
            "unreadable": self._unreadable(extents, slabs),
        }

    def _stretch(self, ino: int, block: int, extents_max: int, blocks_max: int) -> tuple[list[Extent], int | None]:
        """Extents of the file from `block` on, cut off there and where there are too many slabs, or blocks; and from
        where to go on, None: that is all."""
        found = self._metadata.layout(ino, block, FILE_BLOCKS_MAX - block, extents_max)
        taken: list[Extent] = []
        slabs: set[int] = set()
        room = blocks_max
        for extent in found:
            skip = max(0, block - extent.block)
            piece = Extent(extent.block + skip, min(extent.count - skip, room), extent.slab, extent.slab_block + skip)
            if len(slabs | {extent.slab}) > SLABS_MAX or not room:
                return taken, extent.block
            slabs.add(extent.slab)
            taken.append(piece)
            room -= piece.count
            if piece.end < extent.end:
                return taken, piece.end
        more = len(found) == extents_max and found[-1].end < FILE_BLOCKS_MAX
        return taken, found[-1].end if more else None

    async def _ask_copies(self, slabs: dict[SlabId, _Slab]) -> None:
        limiter = trio.CapacityLimiter(ASKED_MAX)
        fenced: list[Fenced] = []
        descriptors = {slab: self._changes.book.current(slab) for slab in slabs}
        async with trio.open_nursery() as nursery:
            for slab, one in slabs.items():
                one.in_sync = len(descriptors[slab].in_sync)
                one.joining = sum(member.role == ROLE_JOINING for member in descriptors[slab].members)
                for member in descriptors[slab].in_sync:
                    nursery.start_soon(self._ask_copy, member, slab, one, limiter, fenced)
        if fenced:
            raise fenced[0]
        for slab, one in slabs.items():
            if not one.serving:
                faults = [self._lost.fault_of(member.drive) for member in descriptors[slab].in_sync]
                one.trouble = LOST if faults and all(fault in FOR_GOOD for fault in faults) else WAITING

    async def _ask_copy(
        self, member: Member, slab: SlabId, one: _Slab, limiter: trio.CapacityLimiter, fenced: list[Fenced]
    ) -> None:
        try:
            async with limiter:
                unwritten = await self._control.unwritten(member, slab, one.ranges)
            one.serving += 1
            one.unwritten = unwritten
        except Fenced as error:
            fenced.append(error)
        except CsvfsError as error:
            one.faults.append(f"{member.drive.hex()[:8]} on {member.node}: {error}"[:300])

    def _unreadable(self, extents: Iterable[Extent], slabs: dict[SlabId, _Slab]) -> list[list[Any]]:
        """[offset, size (bytes), BAD, LOST or WAITING] of what no copy gives, as far as is known."""
        rows: list[list[Any]] = []
        for extent in extents:
            trouble = slabs[SlabId(extent.slab)].trouble
            bad = [(extent.slab_block, extent.count)] if trouble else self._lost_blocks.within(
                SlabId(extent.slab), extent.slab_block, extent.count
            )  # fmt: skip
            for start, count in bad:
                _add(rows, (extent.block + start - extent.slab_block) * BLOCK_SIZE, count * BLOCK_SIZE, trouble or BAD)
        return rows

    # -- verifying -------------------------------------------------------------------------------

    async def verify(self, args: Args) -> dict[str, Any]:
        """The call `file_verify` (PROTOCOL.md): verify and heal some 16 MiB of all copies.

        Raises  NotFound, IsADirectory, Conflict, BadRequest, Fenced; what ends the batches.
        """
        ino, block = arguments.inode(args), arguments.number(args, "block", 0, FILE_BLOCKS_MAX - 1)
        rate = arguments.optional_number(args, "rate_mib_s", 1, 1 << 20) or RATE_MIB_S
        async with self._verifying:
            extents, following = self._stretch(ino, block, EXTENTS_MAX, BLOCKS_PER_CALL_MAX)
            tallies: dict[tuple[DriveId, str], _Tally] = {}
            lost: list[list[Any]] = []
            for extent in extents:
                try:
                    results = await self._verifier.verify(
                        self._changes, SlabId(extent.slab), extent.slab_block, extent.count, rate
                    )
                except NotFound:
                    continue  # the file has given these blocks back meanwhile
                for result in results:
                    key = (result.member.drive, result.member.node)
                    tallies.setdefault(key, _Tally()).add(result)
                left = [set(result.left) for result in results]
                for start, count in runs_of(set.intersection(*left) if left else ()):
                    _add(lost, (extent.block + start - extent.slab_block) * BLOCK_SIZE, count * BLOCK_SIZE, BAD)
        return {
            "next": following,
            "blocks": sum(extent.count for extent in extents),
            "copies": [
                [drive, node, t.verified, t.found, t.healed, t.left, t.skipped, t.why[:300]]
                for (drive, node), t in tallies.items()
            ],
            "lost": [[offset, size] for offset, size, _ in lost],
        }


def _add(rows: list[list[Any]], offset: int, size: int, what: str) -> None:
    if rows and rows[-1][0] + rows[-1][1] == offset and rows[-1][2] == what:
        rows[-1][1] += size
    else:
        rows.append([offset, size, what])
