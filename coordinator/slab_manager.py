"""Slab manager: gives the volume slabs from the pool, trims what was freed, gives empty slabs back.

Place      coordinator floor; above metadata.py, batches.py, slab_changes.py.
Tasks      grow_forever (the only one that creates data slabs), trim_forever.

Order of a creation: take a number (durable), create the copies, add the slab (durable). A kill in between
leaves copies that no descriptor names; the next coordinator finds and deletes them (restoration.strays).
Order of a trim: the freeing is on the media of all members (`log.flush`), then trim on all members, then
free.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from random import Random

import trio

from coordinator.batches import Batches
from coordinator.cluster_facts import ClusterFacts
from coordinator.drive_control import DriveControl
from coordinator.metadata import Metadata
from coordinator.metadata_log import MetadataLog
from coordinator.slab_changes import SlabChanges
from coordinator.space import Trim
from csvfs.block import slab_state
from csvfs.block.placement import DriveSpace, choose_drives, slabs_that_fit
from csvfs.block.reserve import DriveSlots, reserve_slots
from csvfs.errors import Conflict, CsvfsError, Fenced, LastCopy, NoSpace, NotFound, StaleEpoch
from csvfs.ids import DriveId, NodeName, SlabId
from csvfs.units import BLOCK_SIZE, format_size
from csvfs.wire.block_messages import SlabDescriptor

log = logging.getLogger(__name__)

AHEAD_SLABS = 2  # so much free space is kept, so that no write waits for a slab
SLABS_AT_ONCE = 8  # created in parallel when a writer needs much
TRIMS_AT_ONCE = 512
TRIM_INTERVAL_S = 0.5
# A writer waits so long at most for space that was freed and is not trimmed yet, and for drive servers that did not
# say how much they have. Slow drives take seconds for a round of trims; a call to a drive server has five.
TRIM_WAIT_S = 15.0
TRIM_POLL_S = 0.05
SPACE_INTERVAL_S = 5.0
EMPTY_SLABS_KEPT = 4
SPACES_WAIT_S_MAX = 1.0  # the first question for space waits so long for drive servers that hang
RETRY_S = 1.0
CREATE_TRIES = 4


class SlabManager:
    """Data slabs of one volume.

    copies   that a new slab gets: set anew whenever the volume's settings change.
    """

    def __init__(
        self,
        metadata: Metadata,
        batches: Batches,
        metadata_log: MetadataLog,
        changes: SlabChanges,
        control: DriveControl,
        facts: ClusterFacts,
        *,
        copies: int,
        slab_blocks: int,
        rng: Random,
    ) -> None:
        self._metadata = metadata
        self._batches = batches
        self._log = metadata_log
        self._changes = changes
        self._control = control
        self._facts = facts
        self.copies = copies
        self.outdated_count = 0  # grows when a slab was made with another number of copies than is wanted by now
        self.slab_blocks = slab_blocks
        self._rng = rng
        self._wanted_blocks = 0
        self._grow_due = trio.Event()
        self._grown = trio.Event()  # replaced at the end of every round
        self._rounds_begun = 0  # of growing
        self._growing = False  # such a round is under way
        self._gains = 0  # grows whenever space came free: in the volume, or in the pool by an empty slab
        self._giving_back = 0  # blocks of slabs that are on their way back to the pool
        self._shortage: NoSpace | None = None  # why the last round could not give more
        self.pool_spaces: list[DriveSpace] = []
        self.served_spaces: list[DriveSpace] = []  # also of drives that take no new slabs
        self._silent: set[NodeName] = set()  # did not answer when last asked
        self._spaces_known = trio.Event()  # every drive server was asked once
        self._asked = self._told = 0  # questions for the space of all drive servers: begun, newest that was answered
        self.creating: set[SlabId] = set()
        self.on_trimmed: Callable[[], None] = lambda: None

    @property
    def next_slab_id(self) -> int:
        """No id from here on was given out yet."""
        return self._metadata.database.counters.next_slab

    # -- space -----------------------------------------------------------------------------------

    async def ensure_free(self, blocks: int) -> None:
        """Have at least `blocks` free blocks in slabs, waiting for new slabs if need be.

        Raises  NoSpace: neither the pool nor, once trimmed, the volume itself has so many.
        """
        gains, deadline = self._gains, trio.current_time() + TRIM_WAIT_S
        while not await self._has_after_growing(blocks):
            if self._shortage is None or await self._trim_once():
                continue
            if self._metadata.space.available_blocks >= blocks:
                continue  # trimmed by another task, whose batch is through and which has not come to count it as a gain
            if gains != self._gains:  # since the round looked, or it looked too early
                gains, deadline = self._gains, trio.current_time() + TRIM_WAIT_S
            elif not (self._freed_blocks() or self._silent) or trio.current_time() >= deadline:
                raise NoSpace(str(self._shortage))
            else:  # what was deleted is being trimmed by another task, or a drive server will say what it has
                await trio.sleep(TRIM_POLL_S)

    async def _has_after_growing(self, blocks: int) -> bool:
        """Whether so many are free now, or after a round of growing that began after this call."""
        begun = self._rounds_begun
        while self._metadata.space.available_blocks < blocks:
            if self._rounds_begun > begun and not self._growing:
                return False
            self._wanted_blocks = max(self._wanted_blocks, blocks)
            grown = self._grown
            self._grow_due.set()
            await grown.wait()
        return True

    def _freed_blocks(self) -> int:
        """Blocks that no file has any more, and that are free neither in the volume nor in the pool yet."""
        statistics = self._metadata.statfs()
        return statistics.slab_blocks - statistics.used_blocks - statistics.free_blocks + self._giving_back

    def pool_changed(self) -> None:
        """Drive servers came or went."""
        self._grow_due.set()

    def note_use(self) -> None:
        """Space was taken: grow ahead if it has become little."""
        ahead = min(AHEAD_SLABS * self.slab_blocks, self._metadata.space.left_blocks)
        if self._metadata.statfs().free_blocks < ahead:
            self._grow_due.set()

    async def grow_forever(self) -> None:
        """Raises Fenced, and what ends the batches."""
        while True:
            self._grow_due = trio.Event()
            self._rounds_begun += 1
            self._growing = True
            try:
                await self.refresh_spaces()
                await self._grow()
            finally:
                self._growing = False
                grown, self._grown = self._grown, trio.Event()
                grown.set()
            if not self._wanted_blocks:
                with trio.move_on_after(SPACE_INTERVAL_S):
                    await self._grow_due.wait()

    async def _grow(self) -> None:
        self._shortage = None
        wanted, self._wanted_blocks = self._wanted_blocks, 0
        # An empty volume takes nothing from the pool until somebody writes.
        used = self._metadata.statfs().slab_blocks > 0
        ahead = AHEAD_SLABS * self.slab_blocks if used else 0
        left = self._metadata.space.left_blocks
        missing = min(left, max(wanted, ahead)) - self._metadata.statfs().free_blocks
        count = -(-missing // self.slab_blocks)
        while count > 0 and self._shortage is None:
            room = self._slabs_allowed()
            if room <= 0:
                self._shortage = self._size_used_up()
                return
            batch = min(count, SLABS_AT_ONCE, room)
            count -= batch
            async with trio.open_nursery() as nursery:
                for _ in range(batch):
                    nursery.start_soon(self._create_or_note)
        if self._shortage is None and wanted > self._metadata.space.left_blocks:
            self._shortage = self._size_used_up()

    def _size_used_up(self) -> NoSpace:
        size = self._metadata.space.limit_blocks * BLOCK_SIZE
        return NoSpace(
            f"the volume's size of {format_size(size)} is used up: delete files, or see csvfs volume resize"
        )

    def _slabs_allowed(self) -> int:
        limit = self._metadata.space.limit_blocks
        if not limit:
            return 1 << 40
        return -(-(limit - self._metadata.statfs().slab_blocks) // self.slab_blocks)

    async def _create_or_note(self) -> None:
        try:
            await self._create_slab()
        except NoSpace as error:
            self._shortage = error
        except Fenced:
            raise
        except CsvfsError as error:
            log.warning("a data slab could not be created: %s", error)
            self._shortage = NoSpace(f"no slab could be created: {error}")

    def slots_above_reserve(self) -> int:
        """Free slots that data slabs may take; the rest is for repairs (block/reserve.py)."""
        free = sum(space.free_slots for space in self.pool_spaces)
        domain_of = self._facts.domain_of
        drives = [DriveSlots(space.node, domain_of(space.node), space.slots) for space in self.pool_spaces]
        return max(0, free - reserve_slots(drives, self.copies))

    async def _create_slab(self) -> SlabDescriptor:
        """Raises NoSpace, Fenced, and what the last try raised."""
        self._check_reserve()
        slab = await self._batches.run(self._metadata.new_slab_id)
        self.creating.add(slab)
        try:
            self._check_reserve()  # others took theirs meanwhile; no await from here until this one has
            wanted = self.copies  # it may be changed meanwhile
            places = await self.create_copies(slab, self._copies_now())
            later = self._places_later(places, wanted)
            descriptor = slab_state.new_slab(slab, [(place.drive, place.node) for place in places], later)
            self._changes.note_change(slab)  # a census under way may have missed some of its copies
            await self._batches.run(lambda: self._metadata.add_slab(descriptor, self.slab_blocks))
            self.outdated_count += wanted != self.copies
            return descriptor
        finally:
            self.creating.discard(slab)

    def _check_reserve(self) -> None:
        """Raises NoSpace: a further slab would take what repairs need."""
        if self.slots_above_reserve() < self._copies_now():
            raise NoSpace("the pool is full but for the reserve that repairs need; delete files or add drives")

    def _nodes_away(self) -> list[NodeName]:
        """Nodes that cannot be given copies now."""
        nodes = self._facts.drive_nodes()
        return [node for node in nodes if self._facts.server(node) is None or node in self._silent]

    def _live_domains(self) -> set[str]:
        return {self._facts.domain_of(space.node) for space in self.pool_spaces if space.free_slots > 0}

    def _copies_now(self) -> int:
        """How many copies a new slab begins with: all, or one less while a fault domain is down.

        Its place is kept (`_places_later`); else a volume with as many copies as there are nodes could not
        grow for as long as one of them is away.
        """
        live = self._live_domains()
        away = {self._facts.domain_of(node) for node in self._nodes_away()}
        lacking = len(live) < self.copies <= len(live | away)
        return max(1, self.copies - 1) if lacking else self.copies

    def _places_later(self, places: list[DriveSpace], wanted: int) -> list[tuple[DriveId, NodeName]]:
        """For the copies that `places` lack: drives of other fault domains, which are down now.

        Raises  NoSpace: the pool has too few fault domains, up and down together.
        """
        if len(places) == wanted:
            return []
        taken = {self._facts.domain_of(place.node) for place in places}
        drives = [
            DriveSpace(drive, node, 1)
            for node in self._nodes_away()
            for drive in self._facts.drives_of(node)
            if self._facts.takes_slabs(drive)
        ]
        count = wanted - len(places)
        chosen = choose_drives(drives, count, self._rng, domain_of=self._facts.domain_of, taken=taken)
        return [(space.drive, space.node) for space in chosen]

    async def create_copies(self, slab: SlabId, copies: int) -> list[DriveSpace]:
        """Create the copies of a new slab in different fault domains, on other drives where one fails."""
        failed: set[DriveId] = set()
        error: CsvfsError = NoSpace("no drive has room")
        for _ in range(CREATE_TRIES):
            usable = self._placeable(self.pool_spaces, copies)  # some may be retired since
            candidates = [space for space in usable if space.drive not in failed]
            places = choose_drives(candidates, copies, self._rng, domain_of=self._facts.domain_of)
            for place in places:  # no await since the choice: slabs made at once see each other
                self.note_copy(place.drive, 1)
            done: list[DriveSpace] = []
            try:
                for place in places:
                    await self._control.create_slab(slab, slab_state.EPOCH_FIRST, place.node, place.drive)
                    done.append(place)
                return places
            except Fenced:
                raise
            except CsvfsError as failure:
                error = failure
                for place in places:
                    self.note_copy(place.drive, -1)
                failed.add(places[len(done)].drive)
                log.warning("slab %d cannot be created on node %s: %s", slab, places[len(done)].node, failure)
                for place in [*done, places[len(done)]]:
                    await self.delete_copy(slab, place.node, place.drive)
        raise error

    def note_copy(self, drive: DriveId, change: int) -> None:
        """A drive has gained (1) or lost (-1) a copy since its server told how many slots it has free."""
        for spaces in (self.pool_spaces, self.served_spaces):
            for index, space in enumerate(spaces):
                if space.drive == drive:
                    spaces[index] = replace(space, free_slots=max(0, space.free_slots - change))

    def _placeable(self, spaces: list[DriveSpace], copies: int) -> list[DriveSpace]:
        """Those that the copies of a new slab may be put onto: of nodes in maintenance or quarantine only where the
        others do not suffice.

        Such a node is about to be switched off, or may go away; but as long as it serves, its copy is one more than none.
        """
        taking = [space for space in spaces if self._facts.takes_slabs(space.drive)]
        staying = [space for space in taking if not self._facts.is_aside(space.node)]
        domains = {self._facts.domain_of(space.node) for space in staying if space.free_slots > 0}
        return staying if len(domains) >= copies else taking

    async def delete_copy(self, slab: SlabId, node: NodeName, drive: DriveId) -> None:
        """As far as it can be reached: what stays is found as a stray later. Raises Fenced."""
        try:
            await self._control.delete_slab(slab, node, drive)
        except Fenced:
            raise
        except CsvfsError as error:
            log.info("the copy of slab %d on node %s stays for now: %s", slab, node, error)

    async def refresh_spaces(self) -> None:
        """Ask every drive server for its free slots. Of several questions at once the newest counts."""
        self._asked += 1
        number = self._asked
        spaces: list[DriveSpace] = []
        served: list[DriveSpace] = []
        silent: set[NodeName] = set()

        async def ask(node: NodeName) -> None:
            try:
                found = await self._control.spaces(node)
            except CsvfsError as error:
                log.info("node %s is not asked for space: %s", node, error)
                silent.add(node)
                return
            served.extend(found)
            spaces.extend(space for space in found if self._facts.takes_slabs(space.drive))

        async with trio.open_nursery() as nursery:
            for node in self._facts.drive_nodes():
                if self._facts.server(node) is not None:
                    nursery.start_soon(ask, node)
            if not self._spaces_known.is_set():
                # Growing as they answer: who has waited long enough sees what there is.
                self.pool_spaces, self._silent = spaces, silent
        if number > self._told:
            self._told = number
            spaces = self._placeable(spaces, self.copies)
            self.pool_spaces, self.served_spaces, self._silent = spaces, served, silent
        self._spaces_known.set()

    @property
    def spaces_known(self) -> bool:
        """False: `free_slabs_in_pool` does not count all yet; see wait_spaces."""
        return self._spaces_known.is_set()

    async def wait_spaces(self) -> None:
        """Until the drive servers were asked for their space once, or long enough. Cancel safe."""
        with trio.move_on_after(SPACES_WAIT_S_MAX):
            await self._spaces_known.wait()

    def free_slabs_in_pool(self) -> int:
        """How many slabs of this volume the pool has room for, by the free slots of each fault domain."""
        by_domain: dict[str, int] = {}
        for space in self.pool_spaces:
            domain = self._facts.domain_of(space.node)
            by_domain[domain] = by_domain.get(domain, 0) + space.free_slots
        copies = self._copies_now()
        return min(slabs_that_fit(by_domain.values(), copies), self.slots_above_reserve() // copies)

    # -- trims -----------------------------------------------------------------------------------

    async def trim_forever(self) -> None:
        """Raises Fenced, and what ends the batches."""
        while True:
            await trio.sleep(TRIM_INTERVAL_S)
            try:
                while await self._trim_once():
                    pass
                await self._give_back_empty_slabs()
            except Fenced:
                raise
            except CsvfsError as error:
                log.warning("trimming waits: %s", error)
                await trio.sleep(RETRY_S)

    async def _trim_once(self) -> bool:
        """One round; False: nothing was there to trim."""
        mark = self._metadata.trim_mark()
        if not self._metadata.database.rows("SELECT 1 FROM trims WHERE id <= ? LIMIT 1", (mark,)):
            return False
        await self._log.flush()
        trims = self._metadata.take_trims(TRIMS_AT_ONCE, mark)
        if not trims:
            return False
        by_slab: dict[int, list[Trim]] = {}
        for trim in trims:
            by_slab.setdefault(trim.slab, []).append(trim)
        done: list[Trim] = []
        try:
            for slab, of_slab in by_slab.items():
                if await self._trim_slab(SlabId(slab), of_slab):
                    done += of_slab
        finally:
            failed = [trim for trim in trims if trim not in done]
            self._metadata.trims_failed(failed)
        self._metadata.trims_done(done)
        await self._batches.run(lambda: None)  # the batch that makes them free
        self._gains += 1
        self.on_trimmed()
        return bool(done)

    async def _trim_slab(self, slab: SlabId, trims: Iterable[Trim]) -> bool:
        """On all in-sync and joining members. False: try again later, maybe at another epoch."""
        try:
            descriptor = self._changes.book.current(slab)
        except NotFound:
            return True
        ranges = [(trim.block, trim.count) for trim in trims]
        for member in descriptor.writable:
            try:
                await self._control.trim(member, descriptor, ranges)
            except Fenced:
                raise
            except CsvfsError as error:
                drives = [] if isinstance(error, StaleEpoch) else [member.drive]
                try:
                    await self._changes.failed(slab, descriptor.epoch, drives, f"a trim failed: {error}")
                except LastCopy as last:  # other slabs shall not wait for this one
                    log.info("slab %d is not trimmed now: %s", slab, last)
                return False
        # A member that joined meanwhile copied from one that was trimmed already, or not yet: only an
        # unchanged epoch says that all have it.
        return self._changes.book.current(slab).epoch == descriptor.epoch

    async def _give_back_empty_slabs(self) -> None:
        surplus = self._metadata.statfs().free_blocks - EMPTY_SLABS_KEPT * self.slab_blocks
        if surplus < self.slab_blocks:
            return
        for slab in self._metadata.empty_slabs(min(SLABS_AT_ONCE, surplus // self.slab_blocks)):
            descriptor = self._changes.book.current(slab)
            self._giving_back += self.slab_blocks
            try:
                await self._batches.run(partial(self._metadata.remove_slab, slab))
                self._changes.forget(slab)
                for member in descriptor.members:
                    await self.delete_copy(slab, member.node, member.drive)
            except Conflict:
                continue  # somebody took blocks of it just now
            finally:
                self._giving_back -= self.slab_blocks
                self._gains += 1
