"""Shedding: what nobody uses any more is given back, so that what a mount and its kernel remember stays bounded.

Place      mount floor; under file_table.py, over leases.py, reports.py and recall.py.
Forgotten  inodes that the kernel knows no more, or of which it caches nothing: dropped at once, however many they are.
Surplus    beyond `inodes_max` the longest known go, a batch at a time: what the kernel caches of them is taken back, then
           their leases are given back. A directory in which something was found since gets another turn, for all below
           it comes through it.
Kernel     beyond `kernel_inodes_max` it is asked to forget those that it has known longest (FUSE_NOTIFY_PRUNE, Linux
           6.18; before that it forgets when it needs the memory). It tells by FORGETs which it did.
Limits     both may be exceeded by what is open, and for a second or two by what programs look at meanwhile.
"""

import logging
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Protocol

import trio

from csvfs.errors import CsvfsError
from csvfs.mount.file_state import LEASE_NONE, FileState
from csvfs.mount.leases import Leases
from csvfs.mount.recall import Recaller
from csvfs.mount.reports import Reports
from csvfs.volume import file_io
from csvfs.volume.file_io import BlockBus

log = logging.getLogger(__name__)

INODES_MAX = 65_536  # under leases; about 2 KiB each
KERNEL_INODES_MAX = 262_144  # known to the kernel; about 0.2 KiB each here, and 1 KiB there
# At a time: between two batches whoever waits has a turn, and one of these takes about a millisecond.
SHED_BATCH = 128
PRUNE_BATCH = 1024
PRUNED_AT_ONCE_MAX = 65_536  # where nothing helps since all is in use, it is not tried for ever


class Pruner(Protocol):
    """Of notify.KernelNotifier."""

    async def prune(self, inos: list[int]) -> None: ...


class Shedding:
    """`forgotten`: inodes of which the kernel caches nothing. `lookups()`: those it knows, the longest known first."""

    def __init__(
        self,
        leases: Leases,
        bus: BlockBus,
        reports: Reports,
        recaller: Recaller,
        notifier: Pruner,
        timed: dict[FileState, None],
        inodes_max: int = INODES_MAX,
        kernel_inodes_max: int = KERNEL_INODES_MAX,
    ) -> None:
        self._leases = leases
        self._bus = bus
        self._reports = reports
        self._recaller = recaller
        self._notifier = notifier
        self._timed = timed
        self._inodes_max = inodes_max
        self._kernel_inodes_max = kernel_inodes_max
        self.forgotten: dict[int, None] = {}
        self.lookups: Callable[[], dict[int, int]] = dict
        self.report_accesses: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint

    async def shed(self) -> None:
        """Come down to the limits, as far as that is possible now. To be called again and again. Cancel safe."""
        await self._shed_forgotten()
        await self._shed_surplus()
        await self._prune()

    async def _shed_forgotten(self) -> None:
        states = self._leases.states
        pending = list(self.forgotten)
        for first in range(0, len(pending), SHED_BATCH):
            batch = [states[ino] for ino in pending[first : first + SHED_BATCH] if ino in states]
            await self._settle(batch)
            # Else it was looked up again meanwhile.
            batch = [state for state in batch if state.ino in self.forgotten and _is_idle(state)]
            await self._give_back(batch, [state.ino for state in batch if state.lease > LEASE_NONE])

    async def _shed_surplus(self) -> None:
        states = self._leases.states
        turns = len(states)
        while turns > 0 and (surplus := len(states) - self._inodes_max) > 0:
            batch = self._longest_known(min(surplus, SHED_BATCH))
            turns -= SHED_BATCH
            await self._restore(batch)
            await self._settle(batch)
            batch = [state for state in batch if _is_idle(state) and not state.inherited]
            batch = await self._recaller.take_back_idle(batch)
            await self._give_back(batch, [state.ino for state in batch])
            await trio.lowlevel.checkpoint()

    def _longest_known(self, count: int) -> list[FileState]:
        """Of the first some, those that are not in use; the others come to the end."""
        states = self._leases.states
        found: list[FileState] = []
        for ino in list(islice(states, count + SHED_BATCH)):
            state = states[ino]
            if state.is_busy() or (state.directory and state.used):
                state.used = False
                states[ino] = states.pop(ino)
            else:
                found.append(state)
        return found[:count]

    async def _restore(self, states: list[FileState]) -> None:
        for state in states:
            if state.inherited:
                try:
                    await self._leases.restore(state)
                except CsvfsError as error:
                    log.info("inode %d, as the mount before left it: %s", state.ino, error)

    async def _settle(self, states: list[FileState]) -> None:
        """Times that the coordinator does not know yet, and data that is not on the media: one flush for all."""
        if any(state.atime_ns for state in states):
            await self.report_accesses()
        for state in states:
            if state.times_dirty:
                try:
                    await self._reports.commit_times(state)
                except CsvfsError as error:
                    log.info("time of inode %d not reported: %s", state.ino, error)
        dirty = [state for state in states if state.dirty_slabs and state.failure is None and not state.flushing.locked()]
        if dirty:
            await self._flush(dirty)

    async def _flush(self, states: list[FileState]) -> None:
        """An fsync of one of them waits meanwhile, for what is being flushed counts as flushed (I8)."""
        taken = [(state, state.dirty_slabs) for state in states]
        for state, _ in taken:
            state.flushing.acquire_nowait()
            state.dirty_slabs = {}
        try:
            await self._bus.flush({slab for _, slabs in taken for slab in slabs})
            for state, slabs in taken:
                if (lost := file_io.lost_before_flush(self._bus, slabs)) is not None:
                    log.error("inode %d: %s", state.ino, lost)
                    state.failure = lost
        except BaseException as error:
            for state, slabs in taken:
                state.dirtied(slabs)
                if isinstance(error, CsvfsError) and not error.retryable:
                    state.failure = error
            if not isinstance(error, CsvfsError):
                raise
            log.warning("flush of %d files behind their last use: %s", len(taken), error)
        finally:
            for state, _ in taken:
                state.flushing.release()

    async def _give_back(self, states: list[FileState], held: list[int]) -> None:
        """Drop what is not cached any more, with no await since that was seen; tell the coordinator of those it knows."""
        for state in states:
            self.forgotten.pop(state.ino, None)
            self._timed.pop(state, None)
            self._leases.drop(state)
        try:
            await self._leases.release(held)
        except CsvfsError as error:
            log.info("%d leases not given back, they will be recalled: %s", len(held), error)

    async def _prune(self) -> None:
        known = self.lookups()
        surplus = min(len(known) - self._kernel_inodes_max, PRUNED_AT_ONCE_MAX)
        for first in range(0, surplus, PRUNE_BATCH):
            known = self.lookups()
            batch = list(islice(known, min(PRUNE_BATCH, surplus - first)))
            for ino in batch:
                known[ino] = known.pop(ino)  # to the end: what is in use is not asked for again at once
            await self._notifier.prune(batch)


def _is_idle(state: FileState) -> bool:
    """Nobody has it open or asks for it, and what was written to it is on the media."""
    return not (state.is_busy() or state.dirty_slabs or state.asking or state.reads or state.writers)
