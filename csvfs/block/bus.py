"""The bus: the client of all drive servers, for one volume and one writer (ARCHITECTURE.md, "Write path").

Place      block floor. The mount uses it for data slabs, the coordinator for metadata slabs.
Owns       the slab descriptors it has learned, and every write until it is answered.
Hot path   `write` and `read_local` never await; a write's answers arrive in the engine's task.

Invariants
  I1  An epoch is replaced only by a larger one (`learn`).
  I2  `done(None)` is called only after every in-sync and joining member of one epoch has answered.
  I4  Writes of a slab are sent in the order they were given, to every member over one link; after a failure
      they are sent again in that order, at the new epoch, with their first sequence numbers.
  I8  `flush` returns only when every in-sync and joining member of every slab has flushed.
  I9  What `read` and `read_local` return has verified here.
"""

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Protocol

import trio

from csvfs.block.bus_media import Media
from csvfs.block.bus_reads import Reader
from csvfs.block.bus_writes import PendingWrite, SlabState
from csvfs.block.given_up import GivenUpWrites, MakeEqual
from csvfs.block.local_reader import LocalReader
from csvfs.block.server_links import ServerLinks, without_excused
from csvfs.errors import CsvfsError, Fenced, Lost, StaleEpoch, Unavailable
from csvfs.ids import DriveId, NodeName, SlabId, VolumeId
from csvfs.wire.block_messages import (
    BLOCK_HEAD,
    SlabDescriptor,
    block_checksums,
    pack_checksums,
    slab_seed,
)
from csvfs.wire.frames import Frame, Kind

log = logging.getLogger(__name__)

SILENCE_MS_MAX = 5_000
COMPLETED_INTERVAL_S = 1.0
REPAIR_RETRY_S = 0.05
REPAIR_RETRY_S_MAX = 1.0

WriteDone = Callable[[CsvfsError | None], None]


class SlabOwner(Protocol):
    """Who decides about a slab's members: for a mount its coordinator, for the coordinator itself."""

    def slab_failed(
        self, slab: SlabId, epoch: int, drives: list[DriveId], reason: str
    ) -> Awaitable[SlabDescriptor]:
        """The slab's current descriptor, after `drives` (maybe none: only asking) did not take a request.

        Raises  Unavailable while nothing can be decided (asked again later); Fenced: this writer is out.
        """
        ...


class Bus:
    """Reads, writes, flushes and trims blocks of slabs. Run `run_forever` in a nursery of the process."""

    def __init__(
        self,
        links: ServerLinks,
        owner: SlabOwner,
        *,
        volume: VolumeId,
        local_node: NodeName,
        silence_ms_max: int = SILENCE_MS_MAX,
        io_timeout_s: float = math.inf,
        owner_patience_s: float = math.inf,
        make_equal: MakeEqual | None = None,
    ) -> None:
        """
        silence_ms_max    a server that owes answers and gives none for so long is given up
        io_timeout_s      a write that its slab's members have not taken for so long is given up (given_up.py)
        owner_patience_s  the members are tried again when the owner has not decided for so long: it may be waiting
                          for one that we could not reach. For owners whose decisions go on without us
        """
        self.links = links
        self.min_copies = 1  # writes wait while fewer are in sync
        self._io_timeout_s = io_timeout_s
        self._owner_patience_s = owner_patience_s
        self._given_up = GivenUpWrites(make_equal)
        self._silence_ms_max = silence_ms_max
        self._engine = links.engine
        self.on_fenced: Callable[[Fenced], None] = lambda error: None
        self._owner = owner
        self._volume = volume
        self._slabs: dict[SlabId, SlabState] = {}
        self._incomplete: deque[PendingWrite] = deque()  # in sequence order; complete ones leave at the front
        self._sequence = 0
        self._local = LocalReader(links, volume=volume, local_node=local_node)
        self._reader = Reader(self, links, self._local, local_node=local_node)
        self._media = Media(self, links, owner, io_timeout_s=io_timeout_s, owner_patience_s=owner_patience_s)
        self._repairs: set[SlabId] = set()
        self._repair_queue: deque[SlabId] = deque()
        self._repair_wanted = trio.Event()
        links.on_lost = self._local.node_lost
        links.on_moving = self._forget_targets

    # -- descriptors -----------------------------------------------------------------------------

    def descriptor(self, slab: SlabId) -> SlabDescriptor | None:
        state = self._slabs.get(slab)
        return None if state is None else state.descriptor

    def known(self, slab: SlabId) -> SlabDescriptor:
        """KeyError: never learned."""
        return self._slabs[slab].descriptor

    def learn(self, descriptor: SlabDescriptor) -> None:
        """Keep the descriptor if it is newer than what is known (I1)."""
        state = self._slabs.get(descriptor.slab)
        if state is None:
            seed = slab_seed(self._volume, descriptor.slab)
            self._slabs[descriptor.slab] = SlabState(descriptor, seed)
        elif descriptor.epoch > state.descriptor.epoch:
            state.set_descriptor(descriptor)
            self._take_back(state)
        else:
            return
        self._local.learn(descriptor)

    def _forget_targets(self) -> None:
        for state in self._slabs.values():
            state.targets = None

    def seed(self, slab: SlabId) -> int:
        """Where the checksums of the slab's blocks start from. KeyError: never learned."""
        return self._slabs[slab].seed

    # -- writing ---------------------------------------------------------------------------------

    def write(self, slab: SlabId, block: int, data: memoryview | bytes, done: WriteDone) -> None:
        """Write whole blocks of a slab whose descriptor was learned.

        data   n * 4096 bytes, n from 1 to 256; kept, and must not change, until `done`.
        done   called once: None, or Fenced, or what the owner said last (I2). While members fail it waits.
        """
        state = self._slabs[slab]
        view = memoryview(data)
        checksums = pack_checksums(block_checksums(view, state.seed, block))
        self._sequence += 1
        write = PendingWrite(self._sequence, state, block, view, checksums, done)
        self._incomplete.append(write)
        if state.parked:
            state.park(write)  # behind those that wait already (I4)
        elif state.failing:
            self._park(write)  # behind those that will wait, once their last member has answered (I4)
        else:
            self._send(write)

    def _send(self, write: PendingWrite) -> None:
        """Send to all writable members at the descriptor's epoch, or park it for repair."""
        state = write.state
        targets = state.targets
        if targets is None:
            targets = state.find_targets(self.links, self.min_copies)
            if targets is None:
                self._park(write)
                return
        self._engine.hot()
        write.attempt += 1
        write.remaining = len(targets)
        write.failed = False
        epoch = write.epoch = state.descriptor.epoch
        completed_below = self.completed_below()
        slab = state.descriptor.slab
        for link, index, drive in targets:
            head = BLOCK_HEAD.pack(
                slab, write.sequence, completed_below, epoch, write.block, write.count, index, 0
            )
            link.request(Kind.WRITE, head + write.checksums, write.data, _Answer(self, write, drive))

    def completed_below(self) -> int:
        """All writes with a smaller sequence are complete on all members."""
        incomplete = self._incomplete
        while incomplete and incomplete[0].complete:
            incomplete.popleft()
        return incomplete[0].sequence if incomplete else self._sequence + 1

    def _answered(self, write: PendingWrite, drive: DriveId, error: CsvfsError | None) -> None:
        write.remaining -= 1
        if error is not None:
            write.failed = True
            if isinstance(error, Fenced):
                self.fenced(error)
            write.state.note_failure(drive, error, write.epoch)
        if write.remaining:
            return
        state = write.state
        if write.failed or state.failing or (state.parked and state.parked[0].sequence < write.sequence):
            # Failed, or given after one that did: that one is sent again, and must not land on top of this one (I4).
            self._park(write)
        else:
            write.complete = True
            write.finish(None)

    def _park(self, write: PendingWrite) -> None:
        state = write.state
        state.park(write)
        self._want_repair(state)

    def _take_back(self, state: SlabState) -> None:
        """Park what was sent and is not answered by all: it may still fail, at a member that has left by now.

        What is given after it goes behind it (I4). It would reach fewer members, be answered sooner, and be overwritten
        by the earlier write when that is sent again.
        """
        for write in self._incomplete:
            if write.state is state and write.remaining and not write.complete:
                write.attempt += 1  # whatever is answered to the earlier sending does not count
                write.remaining = 0
                self._park(write)

    def _want_repair(self, state: SlabState) -> None:
        slab = state.descriptor.slab
        if slab not in self._repairs:
            self._repairs.add(slab)
            self._repair_queue.append(slab)
            self._repair_wanted.set()

    def fenced(self, error: Fenced) -> None:
        """A member says that this writer is out."""
        self.on_fenced(error)

    # -- after a failure -------------------------------------------------------------------------

    async def run_forever(self) -> None:
        """Repair slabs whose writes wait, until cancelled; each in a task of its own."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._local.run_forever)
            nursery.start_soon(self.links.watch_forever, self._silence_ms_max)
            nursery.start_soon(self._tell_completed_forever)
            nursery.start_soon(self._given_up.run_forever)
            if self.links.paths is not None:
                nursery.start_soon(partial(self.links.mind_paths_forever, hurry=True))
            while True:
                await self._repair_wanted.wait()
                self._repair_wanted = trio.Event()
                while self._repair_queue:
                    nursery.start_soon(self._repair, self._repair_queue.popleft())

    async def _tell_completed_forever(self) -> None:
        """When writing pauses nothing carries `completed_below`; so say it once, and members unmark (I3)."""
        told = 1
        while True:
            await trio.sleep(COMPLETED_INTERVAL_S)
            below = self.completed_below()
            if below != told:
                told = below
                self.links.tell_all("completed", {"below": below})

    async def _repair(self, slab: SlabId) -> None:
        state = self._slabs[slab]
        delay_s = REPAIR_RETRY_S
        try:
            while state.parked:
                try:
                    await self._make_writable(state)
                except Fenced as error:
                    self.fenced(error)
                    self._fail_parked(state, error)
                    return
                except CsvfsError as error:
                    log.warning("slab %d waits: %s", slab, error)
                    state.trouble, state.in_vain = str(error), isinstance(error, Lost)
                    self._give_up_late(state, error)
                    await trio.sleep(delay_s)
                    delay_s = min(2 * delay_s, REPAIR_RETRY_S_MAX)
                    continue
                state.trouble, state.in_vain = "", False
                self._take_back(state)
                parked = state.take_parked()
                for index, write in enumerate(parked):
                    if state.parked:  # failed again at once; the rest keeps its order behind it
                        for rest in parked[index:]:
                            state.park(rest)
                        break
                    self._send(write)
        finally:
            self._repairs.discard(slab)
            if state.parked:
                self._want_repair(state)

    async def _make_writable(self, state: SlabState) -> None:
        """One round: reach all members, or have the owner change them. Raises while neither works."""
        before = state.descriptor
        failures = state.take_failures(before.epoch)
        reason = "; ".join(sorted({str(error) for error in failures.values()}))
        unreachable: list[DriveId] = []
        for member in before.writable:
            try:
                server = await self.links.serving(member.node, member.drive)
                server.drive_index(member.drive)
            except Fenced:
                raise
            except CsvfsError as error:
                unreachable.append(member.drive)
                reason = reason or str(error)
        failures = await without_excused(self.links, _by_node(before), failures)
        failed = [drive for drive, error in failures.items() if _is_members_fault(error)]
        drives = list(dict.fromkeys(unreachable + failed))
        if not drives and not failures and len(before.in_sync) >= self.min_copies:
            return  # all are reachable (again) and nothing else was wrong: send again
        reason = reason or "no reason known"
        with trio.move_on_after(self._owner_patience_s) as patience:
            self.learn(await self._owner.slab_failed(before.slab, before.epoch, drives, reason))
        if patience.cancelled_caught:
            raise Unavailable(f"slab {before.slab} epoch {before.epoch}: {reason}; its members are not changed yet")
        if len(state.descriptor.in_sync) < self.min_copies:
            count = len(state.descriptor.in_sync)
            raise Unavailable(
                f"slab {before.slab} has {count} copies in sync, writing wants {self.min_copies} (--min-copies)"
            )
        if state.descriptor.epoch == before.epoch and (failures or unreachable):
            raise Unavailable(f"slab {before.slab} is still at epoch {before.epoch}: {reason}")

    def _give_up_late(self, state: SlabState, error: CsvfsError) -> None:
        """Writes that have waited long enough; all of them where waiting is known to be in vain."""
        if isinstance(error, Lost):
            late = state.take_parked()
        else:
            late = state.take_parked_before(trio.current_time() - self._io_timeout_s)
        if late:
            self._given_up.add(state.descriptor.slab, late, error)

    def _fail_parked(self, state: SlabState, error: Fenced) -> None:
        """This writer is over. Its writes are never complete (I3): some members may have taken them, and their marks are
        what tells the owner to make all equal."""
        for write in state.take_parked():
            write.attempt += 1  # late answers of members mean nothing any more
            write.finish(error)

    def waiting(self) -> list[SlabState]:
        """Slabs with writes that their members have not all taken, for people who ask."""
        return [state for slab in list(self._repairs) if (state := self._slabs[slab]).parked]

    # -- reading ---------------------------------------------------------------------------------

    def read_local(self, slab: SlabId, block: int, count: int) -> bytes | bytearray | None:
        """Blocks from this node's in-sync copy, verified, without waiting; None: use `read`."""
        return self._local.read(slab, block, count)

    async def read(self, slab: SlabId, block: int, count: int) -> bytes | bytearray:
        """Blocks from any in-sync member, verified; bad copies found on the way are rewritten (I9).

        Raises  Corrupt: no copy verified. Unavailable: no member could be reached. Fenced: this writer is out. Cancel
                safe.
        """
        try:
            return await self._reader.read(slab, block, count)
        except Fenced as error:
            # Who does not write may hear of it here alone: the coordinator that had it fenced may have ended before it
            # wrote that down, and its successor takes this writer for a good one.
            self.fenced(error)
            raise

    async def ask_owner(self, slab: SlabId, reason: str) -> SlabDescriptor:
        """Fetch the slab's descriptor from its owner, and learn it."""
        known = self.descriptor(slab)
        descriptor = await self._owner.slab_failed(slab, known.epoch if known else 0, [], reason)
        self.learn(descriptor)
        return descriptor

    # -- flush and trim --------------------------------------------------------------------------

    async def flush(self, slabs: Iterable[SlabId]) -> None:
        """Put what was written to `slabs` onto the medium of every in-sync and joining member (I8).

        What was written before `lost_epoch` of the descriptor that is known after it may be lost all the same.
        Raises  DriveFailed, Unavailable, Fenced: then nothing is promised. TimedOut: nor after io_timeout_s. Cancel safe.
        """
        await self._media.flush(slabs)

    async def trim(self, items: list[tuple[SlabId, int, int]]) -> None:
        """Make (slab, block, count) ranges never-written on every in-sync and joining member.

        Raises  Unavailable, DriveFailed, Fenced: some members may have done it; trim again later.
        """
        try:
            await self._media.trim(items)
        except Fenced as error:  # as of reads
            self.fenced(error)
            raise

    def close(self) -> None:
        self._local.close()
        self.links.close()


class _Answer:
    """What a member's answer to one attempt of one write does; cheaper than a closure with defaults."""

    __slots__ = ("attempt", "bus", "drive", "write")

    def __init__(self, bus: Bus, write: PendingWrite, drive: DriveId) -> None:
        self.bus = bus
        self.write = write
        self.drive = drive
        self.attempt = write.attempt

    def __call__(self, frame: Frame | None, error: CsvfsError | None) -> None:
        if self.write.attempt == self.attempt:
            self.bus._answered(self.write, self.drive, error)


def _by_node(descriptor: SlabDescriptor) -> dict[NodeName, list[DriveId]]:
    found: dict[NodeName, list[DriveId]] = {}
    for member in descriptor.writable:
        found.setdefault(member.node, []).append(member.drive)
    return found


def _is_members_fault(error: CsvfsError) -> bool:
    """Whether the member, and not this writer's old epoch, is to blame."""
    return not isinstance(error, StaleEpoch | Fenced)
