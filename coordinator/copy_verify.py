"""Verifying a range of a slab on all its in-sync copies, and healing what is bad from the others.

Place      coordinator floor; above slab_changes.py and lost_blocks.py, below scrub.py and file_integrity.py.
How        the drive servers read and verify (block/scrub.py), side by side, at the rate given. Blocks that do not verify are
           rewritten by their drive server from another in-sync copy. A copy that is damaged as a whole leaves the in-sync
           set, and is made anew.
Lost       blocks that are bad on every in-sync copy; told to lost_blocks.py where all copies could be asked.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import trio

from coordinator.drive_control import DriveControl
from coordinator.lost_blocks import LostBlocks
from coordinator.slab_changes import SlabChanges
from csvfs.errors import Corrupt, CsvfsError, Fenced, StaleEpoch
from csvfs.ids import DriveId, SlabId
from csvfs.wire.block_messages import Member, SlabDescriptor

log = logging.getLogger(__name__)

TRIES_MAX = 3  # while copies of the slab come and go


@dataclass(slots=True)
class CopyResult:
    """What became of one copy. Counts are of blocks and of table entries."""

    member: Member
    verified: int = 0  # blocks
    found: int = 0
    healed: int = 0
    left: list[int] = field(default_factory=list)  # blocks that no other copy could give
    damaged: str = ""  # as a whole
    is_made_anew: bool = False  # of a damaged one
    skipped: str = ""  # why it could not be asked


class CopyVerifier:
    """`look_into(drives)`: copies there are damaged as a whole, and have to be made anew."""

    def __init__(
        self, control: DriveControl, lost_blocks: LostBlocks, look_into: Callable[[Iterable[DriveId]], None]
    ) -> None:
        self._control = control
        self._lost_blocks = lost_blocks
        self._look_into = look_into

    async def verify(
        self, changes: SlabChanges, slab: SlabId, block: int, count: int, rate_mib_s: int
    ) -> list[CopyResult]:
        """Verify and heal blocks of a slab, of each copy at most `rate_mib_s`.

        Raises  NotFound: there is no such slab any more. Fenced. What ends the batches. Cancel safe.
        """
        results: list[CopyResult] = []
        for _ in range(TRIES_MAX):
            descriptor = changes.book.current(slab)
            before, results = results, await self._verify_once(changes, descriptor, block, count, rate_mib_s)
            _carry_over(before, results)
            if changes.book.current(slab).epoch == descriptor.epoch or any(result.damaged for result in results):
                break
            # Copies came or went meanwhile: what all of these lack, another one may have.
        await self._note_lost(changes, descriptor, results, block, count)
        return results

    async def _verify_once(
        self, changes: SlabChanges, descriptor: SlabDescriptor, block: int, count: int, rate_mib_s: int
    ) -> list[CopyResult]:
        results = [CopyResult(member) for member in descriptor.in_sync]
        fenced: list[Fenced] = []

        async def look(result: CopyResult) -> None:
            try:
                await self._verify_copy(changes, descriptor, result, block, count, rate_mib_s)
            except Fenced as error:
                fenced.append(error)

        async with trio.open_nursery() as nursery:
            for result in results:
                nursery.start_soon(look, result)
        if fenced:
            raise fenced[0]
        return results

    async def _note_lost(
        self, changes: SlabChanges, descriptor: SlabDescriptor, results: list[CopyResult], block: int, count: int
    ) -> None:
        if any(result.skipped or result.damaged for result in results):
            return  # that copy may have them
        if changes.book.current(descriptor.slab).epoch != descriptor.epoch:
            return
        lost = set.intersection(*(set(result.left) for result in results)) if results else set()
        await self._lost_blocks.verified(descriptor.slab, block, count, lost)

    async def _verify_copy(
        self,
        changes: SlabChanges,
        descriptor: SlabDescriptor,
        result: CopyResult,
        block: int,
        count: int,
        rate_mib_s: int,
    ) -> None:
        member, slab = result.member, descriptor.slab
        try:
            bad, repaired = await self._control.scrub(member, slab, block, count, rate_mib_s)
            result.verified = count
            result.found, result.healed = len(bad) + repaired, repaired
            if bad:
                await self._heal(changes, descriptor, result, bad)
        except Fenced:
            raise
        except Corrupt as error:
            log.error("scrub: %s", error)
            result.found, result.damaged = 1, str(error)
            await self._make_anew(changes, descriptor, result)
        except CsvfsError as error:
            result.skipped = str(error)
            log.info("scrub: slab %d on node %s is skipped: %s", slab, member.node, error)

    async def _make_anew(self, changes: SlabChanges, descriptor: SlabDescriptor, result: CopyResult) -> None:
        """A copy that is damaged as a whole leaves the in-sync set; the next census finds that it is none."""
        drive = result.member.drive
        try:
            await changes.failed(descriptor.slab, descriptor.epoch, [drive], result.damaged)
            result.healed, result.is_made_anew = 1, True
        except Fenced:
            raise
        except CsvfsError as error:
            log.error("scrub: slab %d: %s", descriptor.slab, error)
        self._look_into([drive])

    async def _heal(
        self, changes: SlabChanges, descriptor: SlabDescriptor, result: CopyResult, bad: list[int]
    ) -> None:
        member = result.member
        log.warning(
            "scrub: slab %d on drive %s of node %s: %d blocks do not verify, the first is %d",
            descriptor.slab, member.drive.hex()[:8], member.node, len(bad), bad[0],
        )  # fmt: skip
        left = bad
        for source in descriptor.in_sync:
            if source.drive == member.drive or not left:
                continue
            try:
                _, still = await self._control.heal_from(member, source, descriptor, left)
                result.healed += len(left) - len(still)  # also those that a writer has replaced meanwhile
                left = still
            except StaleEpoch:
                descriptor = changes.book.current(descriptor.slab)
                if member.drive not in {m.drive for m in descriptor.in_sync}:
                    return  # it is resynced anyway
            except Fenced:
                raise
            except CsvfsError as error:
                log.info(
                    "scrub: slab %d cannot be healed from node %s: %s", descriptor.slab, source.node, error
                )
        result.left = left
        if left:
            log.error("scrub: slab %d on node %s: no copy has blocks %s", descriptor.slab, member.node, left[:16])


def _carry_over(before: list[CopyResult], results: list[CopyResult]) -> None:
    """What was healed in the try before counts, too."""
    healed = {result.member.drive: result.healed for result in before}
    for result in results:
        already = healed.get(result.member.drive, 0)
        result.found += already
        result.healed += already
