"""Changes of slabs' members, in the only order that loses nothing: commit, install, then tell.

Place      coordinator floor; above slab_book.py and drive_control.py. The same for data and metadata slabs.

Invariants
  I1  commit before install: a drive never has an epoch that could un-happen.
  I2  A descriptor is told to writers only when its epoch is installed on all its writable members; a member
      where that fails is dropped first. So a writer with an older epoch can never complete a write.
"""

import logging
from collections.abc import Callable, Collection, Iterable

import trio

from coordinator.at_once import ask_each
from coordinator.drive_control import DriveControl
from coordinator.slab_book import SlabBook
from csvfs.block import slab_state
from csvfs.errors import Corrupt, CsvfsError, Fenced, LastCopy, LeaseLost, Unavailable, UnflushedLost
from csvfs.ids import DriveId, Epoch, NodeName, SlabId
from csvfs.wire.block_messages import Member, SlabDescriptor

log = logging.getLogger(__name__)

SLABS_PER_CHANGE_MAX = 512  # in one transaction
SETTLE_ROUNDS_MAX = 16  # each drops a member or follows another task's change


class SlabChanges:
    """Commits transitions of slabs and installs them."""

    def __init__(self, book: SlabBook, control: DriveControl) -> None:
        self.book = book
        self.control = control
        self._settled: dict[SlabId, Epoch] = {}  # installed on all writable members
        self.settled_count = 0  # grows with every change of a slab's members
        self.change_count = 0  # grows with every `note_change`
        self._changed_at: dict[SlabId, int] = {}
        self.on_settled: Callable[[SlabDescriptor], None] = lambda descriptor: None
        # What was written to the slab before and not flushed may be lost. It is committed, and not in service yet.
        self.on_unflushed_lost: Callable[[SlabDescriptor], None] = lambda descriptor: None
        self._accepted: dict[SlabId, int] = {}  # losses that are committed: of which opening of the drive
        self._equalizing = trio.Lock()

    async def failed(
        self, slab: SlabId, epoch: Epoch, drives: Collection[DriveId], reason: str
    ) -> SlabDescriptor:
        """A writer at `epoch` got no good answer from `drives` (none: it only asks). Returns what it shall
        use.

        Idempotent: a report of an epoch that is over drops nobody.
        Raises  LastCopy, Unavailable: nothing can be decided now; the writer waits and asks again. NotFound.
        """
        if drives and self.book.current(slab).epoch <= epoch:

            def drop(descriptor: SlabDescriptor) -> SlabDescriptor:
                return descriptor if descriptor.epoch > epoch else slab_state.drop_members(descriptor, drives)

            outcome = (await self.book.change([slab], drop))[slab]
            if isinstance(outcome, CsvfsError):
                raise outcome
            if outcome.epoch > epoch:
                names = ", ".join(drive.hex()[:8] for drive in drives)
                log.warning("slab %d: drives %s dropped at epoch %d: %s", slab, names, outcome.epoch, reason)
        error = (await self.settle([slab])).get(slab)
        if error is not None:
            raise error
        return self.book.current(slab)

    async def change(
        self, slab: SlabId, transition: Callable[[SlabDescriptor], SlabDescriptor]
    ) -> SlabDescriptor:
        """Commit one transition and install it. Raises what the transition raises, and as `settle`
        reports."""
        self.note_change(slab)
        outcome = (await self.book.change([slab], transition))[slab]
        self.note_change(slab)
        if isinstance(outcome, CsvfsError):
            raise outcome
        error = (await self.settle([slab])).get(slab)
        if error is not None:
            raise error
        return self.book.current(slab)

    def note_change(self, slab: SlabId) -> None:
        """Its members are being changed, or it is new: a census that began earlier knows less of it."""
        self.change_count += 1
        self._changed_at[slab] = self.change_count

    def has_changed(self, slab: SlabId, since: int) -> bool:
        """Whether the slab got members or lost some after `change_count` was `since`: what was counted then may
        miss a copy made meanwhile."""
        return self._changed_at.get(slab, 0) > since

    async def settle(self, slabs: Iterable[SlabId]) -> dict[SlabId, CsvfsError]:
        """Install the committed epochs of `slabs` on all their writable members, dropping those where it
        fails.

        Returns  the slabs that could not be settled, and why. Raises Fenced: another coordinator is at work.
        """
        failures: dict[SlabId, CsvfsError] = {}
        pending = [slab for slab in dict.fromkeys(slabs) if not self._is_settled(slab, failures)]
        for _ in range(SETTLE_ROUNDS_MAX):
            if not pending:
                return failures
            descriptors = {slab: self.book.current(slab) for slab in pending}
            await self.book.wait_durable()  # another task's change may be executed, and not committed yet
            refused = await self.control.install(descriptors.values(), self._accepted)
            drops: dict[SlabId, dict[DriveId, CsvfsError]] = {}
            for (slab, drive), error in refused.items():
                drops.setdefault(slab, {})[drive] = error
            for slab, descriptor in descriptors.items():
                if slab not in drops:
                    self._note_settled(descriptor)
            if drops:
                await self._drop_refusing(descriptors, drops, failures)
            pending = [
                slab for slab in pending if slab not in failures and not self._is_settled(slab, failures)
            ]
        for slab in pending:
            failures[slab] = Unavailable(f"slab {slab} changes faster than it can be installed; asking again")
        return failures

    async def _drop_refusing(
        self,
        installed: dict[SlabId, SlabDescriptor],
        drops: dict[SlabId, dict[DriveId, CsvfsError]],
        failures: dict[SlabId, CsvfsError],
    ) -> None:
        accepted: dict[SlabId, int] = {}

        def drop(descriptor: SlabDescriptor) -> SlabDescriptor:
            accepted.pop(descriptor.slab, None)  # of an earlier try
            if descriptor.epoch != installed[descriptor.slab].epoch:
                return descriptor  # It changed meanwhile: a refusal of the older epoch says nothing.
            errors = drops[descriptor.slab]
            for error in errors.values():
                if isinstance(error, UnflushedLost):
                    accepted[descriptor.slab] = error.opens
                    return slab_state.accept_unflushed_loss(descriptor)
            return slab_state.drop_members(descriptor, errors)

        for slab, outcome in (await self.book.change(drops, drop)).items():
            reasons = "; ".join(sorted({str(error) for error in drops[slab].values()}))
            if isinstance(outcome, LastCopy):
                failures[slab] = LastCopy(f"{outcome} ({reasons})")
            elif isinstance(outcome, CsvfsError):
                failures[slab] = outcome
            elif slab in accepted:
                self._accepted[slab] = accepted[slab]
                log.error("slab %d goes on at epoch %d without what was not flushed: %s", slab, outcome.epoch, reasons)
                self.on_unflushed_lost(outcome)
            else:
                log.warning("slab %d epoch %d: members dropped: %s", slab, outcome.epoch, reasons)

    def _is_settled(self, slab: SlabId, failures: dict[SlabId, CsvfsError]) -> bool:
        try:
            return self._settled.get(slab) == self.book.current(slab).epoch
        except CsvfsError as error:
            failures[slab] = error
            return True

    def _note_settled(self, descriptor: SlabDescriptor) -> None:
        if self._settled.get(descriptor.slab, 0) < descriptor.epoch:
            self._settled[descriptor.slab] = descriptor.epoch
            self._accepted.pop(descriptor.slab, None)
            self.settled_count += 1
            self.on_settled(descriptor)

    def unsettle(self, slabs: Iterable[SlabId]) -> None:
        """A drive server has started anew: what was installed there is not in service any more."""
        for slab in slabs:
            self._settled.pop(slab, None)

    def forget(self, slab: SlabId) -> None:
        """The slab was removed."""
        self._changed_at.pop(slab, None)
        self._settled.pop(slab, None)
        self._accepted.pop(slab, None)

    async def drop_node(self, node: NodeName, reason: str) -> list[SlabId]:
        """Take all copies on a node that cannot be reached out of their slabs.

        Returns  the slabs whose last in-sync copies it holds: those stay. Raises Fenced.
        """
        return await self.drop_where(lambda member: member.node == node, f"node {node}", reason)

    async def drop_drive(self, drive: DriveId, reason: str) -> list[SlabId]:
        """As drop_node, for one drive that has failed while its server goes on."""
        return await self.drop_where(lambda m: m.drive == drive, f"drive {drive.hex()[:8]}", reason)

    async def drop_where(self, leaves: Callable[[Member], bool], what: str, reason: str) -> list[SlabId]:
        kept: list[SlabId] = []
        part: list[SlabId] = []
        dropped = 0
        for descriptor in self.book.all():
            if any(leaves(member) for member in descriptor.writable):
                part.append(descriptor.slab)
            if len(part) >= SLABS_PER_CHANGE_MAX:
                dropped += await self._drop_from(part, leaves, kept)
                part = []
        if part:
            dropped += await self._drop_from(part, leaves, kept)
        if dropped:
            log.warning("%s dropped from %d slabs: %s", what, dropped, reason)
        return kept

    async def _drop_from(
        self, slabs: list[SlabId], leaves: Callable[[Member], bool], kept: list[SlabId]
    ) -> int:
        def drop(descriptor: SlabDescriptor) -> SlabDescriptor:
            drives = [member.drive for member in descriptor.writable if leaves(member)]
            return slab_state.drop_members(descriptor, drives)

        changed = []
        for slab, outcome in (await self.book.change(slabs, drop)).items():
            if isinstance(outcome, LastCopy):
                kept.append(slab)
            elif not isinstance(outcome, CsvfsError):
                changed.append(slab)
        await self.settle(changed)
        return len(changed)

    # -- making members equal --------------------------------------------------------------------

    async def equalize(self, chunks: dict[SlabId, set[int]], lost: list[SlabId] | None = None) -> None:
        """Make `chunks` of each slab the same on all its writable members, as one in-sync member has them.

        Their writer is fenced everywhere. What it was told is complete is on every in-sync member, so
        whichever is the source, nothing acknowledged is lost; what it was not told may go either way, but the
        same way.
        Args    lost: slabs of which no in-sync copy can be reached are added here, and left as they are.
        Raises  LastCopy (without `lost`), Unavailable: not now; call again. Fenced.
        """
        # One at a time: each begins a new epoch, at which the pulls of the other are over; two sessions evicted at
        # once kept each other from ending.
        async with self._equalizing:
            await self._equalize(chunks, lost)

    async def _equalize(self, chunks: dict[SlabId, set[int]], lost: list[SlabId] | None) -> None:
        pending = list(chunks)
        while pending:
            part, pending = pending[:SLABS_PER_CHANGE_MAX], pending[SLABS_PER_CHANGE_MAX:]
            outcome = await self.book.change(part, slab_state.bump)
            alive = [slab for slab, changed in outcome.items() if not isinstance(changed, CsvfsError)]
            failures = await self.settle(alive)
            for slab in alive:
                if slab in failures:
                    if lost is None or not isinstance(failures[slab], LastCopy):
                        raise failures[slab]
                    lost.append(slab)
                elif not await self._equalize_slab(slab, sorted(chunks[slab])):
                    pending.append(slab)

    async def _equalize_slab(self, slab: SlabId, chunks: list[int]) -> bool:
        """False: a member failed and was dropped: the slab has to be stamped again, at an epoch that it will
        miss."""
        if not chunks:
            return True  # the new epoch was all it took
        descriptor, control = self.book.current(slab), self.control
        source = descriptor.in_sync[0]
        others = [member for member in descriptor.writable if member is not source]
        _, errors = await ask_each(
            descriptor.in_sync, lambda member: control.stamp(member, slab, descriptor.epoch, chunks)
        )
        if not errors:
            _, errors = await ask_each(others, lambda member: control.pull(member, source, descriptor, chunks))
        for failing, error in errors.items():
            if failing is not source and await self._is_sources_fault(error, descriptor):
                failing = source
            await self.failed(slab, descriptor.epoch, [failing.drive], f"cannot be made equal: {error}")
            return False
        await ask_each(descriptor.writable, lambda member: self._tell_equal(member, descriptor, chunks))
        return True

    async def _tell_equal(self, member: Member, descriptor: SlabDescriptor, chunks: list[int]) -> None:
        """I3: until a member has heard it, it lists the chunks as active; one that never does costs a copy of them."""
        try:
            await self.control.equal(member, descriptor.slab, descriptor.epoch, chunks)
        except Fenced:
            raise
        except CsvfsError as error:
            log.info("chunks of slab %d stay active on node %s: %s", descriptor.slab, member.node, error)

    async def _is_sources_fault(self, error: CsvfsError, descriptor: SlabDescriptor) -> bool:
        """Whether a pull failed because of the first in-sync member, which it reads from.

        A block of it that rotted, or a node without its lease, must not cost the good copies one after the other.
        """
        if isinstance(error, Corrupt | LeaseLost):
            return len(descriptor.in_sync) > 1
        return not await self._is_reachable(descriptor.in_sync[0].node)

    async def _is_reachable(self, node: NodeName) -> bool:
        try:
            await self.control.register_term(node)
        except Fenced:
            raise
        except CsvfsError:
            return False
        return True
