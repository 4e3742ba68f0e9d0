"""Deliberately broken rules: each of I1 to I9, for a run, in a way that the history checker has to notice.

Place      simulator, top. tests/test_mutants.py runs each until it is caught; the true code passes the same seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import csvfs.block.block_service
import csvfs.block.slab_copy
import csvfs.block.slab_state
from csvfs.block.block_service import BlockService
from csvfs.block.bus import Bus
from csvfs.block.bus_writes import PendingWrite, SlabState
from csvfs.block.flushes import Flushes
from csvfs.block.pull import Pull
from csvfs.block.served_drives import ServedDrives
from csvfs.block.slab_copy import SlabCopy
from csvfs.block.writer_marks import MarkBook
from csvfs.errors import LastCopy
from csvfs.ids import Epoch
from csvfs.mount.guard import Guard
from csvfs.wire.block_messages import ROLE_ABSENT, ROLE_IN_SYNC, SlabDescriptor
from tests.simulator import faults
from tests.simulator.process import Process

Patch = tuple[Any, str, Any]


class _Equal(int):
    """An epoch that is never unequal to another one."""

    def __ne__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return int.__hash__(self)


def _I1_last_copy_dropped() -> list[Patch]:
    """The last in-sync copy is dropped like any other: an absent one is called in sync in its place."""
    drop = csvfs.block.slab_state.drop_members

    def mutant(descriptor: SlabDescriptor, drives: Any) -> SlabDescriptor:
        try:
            return drop(descriptor, drives)
        except LastCopy:
            others = [m for m in descriptor.members if m.drive not in drives]
            if not others:
                raise
            members = tuple(
                replace(m, role=ROLE_ABSENT, since=descriptor.epoch + 1)
                if m.drive in drives
                else replace(m, role=ROLE_IN_SYNC)
                for m in descriptor.members
            )
            return replace(descriptor, epoch=descriptor.epoch + 1, members=members)

    return [(csvfs.block.slab_state, "drop_members", mutant)]


def _I2_answered_before_all() -> list[Patch]:
    """A write is answered when the first member has it, and forgotten."""

    def mutant(self: Bus, write: PendingWrite, drive: Any, error: Any) -> None:
        write.remaining -= 1
        if error is None and not write.complete:
            write.complete = True
            write.finish(None)
        elif not write.remaining and not write.complete:
            write.state.note_failure(drive, error, write.epoch)
            self._park(write)

    return [(Bus, "_answered", mutant)]


def _I2_epoch_not_checked() -> list[Patch]:
    """A member takes writes of any epoch, so a writer completes them on members that are out."""
    head = csvfs.block.block_service.BLOCK_HEAD

    class Head:
        size = head.size

        @staticmethod
        def unpack_from(buffer: Any) -> tuple[int, ...]:
            slab, sequence, below, epoch, *rest = head.unpack_from(buffer)
            return (slab, sequence, below, _Equal(epoch), *rest)

        unpack = staticmethod(head.unpack)

    return [(csvfs.block.block_service, "BLOCK_HEAD", Head)]


def _I3_active_map_cleared_early() -> list[Patch]:
    """A flush unmarks every chunk of the drive, also those with writes not complete on all members."""
    true = Flushes._after

    def mutant(self: Flushes, served: Any, drive: Any, began: Any, error: Any) -> None:
        true(self, served, drive, began, error)
        if error is not None or served.drive is not drive:
            return
        for copy in drive.slabs():
            copy.clear_active(copy.active_chunks())
        self._marks.forget_drive(drive)

    return [(Flushes, "_after", mutant)]


def _I3_never_marked() -> list[Patch]:
    """Chunks are stamped, but not marked active."""

    def mutant(self: SlabCopy, tables: Any, block: int, end: int, epoch: int) -> None:
        for chunk in range(block >> 4, ((end - 1) >> 4) + 1):
            tables.epochs[chunk] = max(tables.epochs[chunk], epoch)
        if self._since_joining is not None:
            csvfs.block.slab_copy.set_bits(self._since_joining, block, end)

    def no_marks(self: Any, volume: bytes, writer: Any) -> set:
        return set()

    return [(SlabCopy, "_mark", mutant), (MarkBook, "of_writer", no_marks)]


def _I4_sent_again_out_of_order() -> list[Patch]:
    """Writes that failed are sent again last first."""
    true = SlabState.take_parked

    def mutant(self: SlabState) -> list[PendingWrite]:
        return list(reversed(true(self)))

    return [(SlabState, "take_parked", mutant)]


def _I5_served_before_judged() -> list[Patch]:
    """A copy whose drive server has started anew is served whatever it is worth."""
    install = BlockService.install

    def in_service(self: ServedDrives, served: Any, volume: Any, slab: Any) -> SlabCopy:
        return self.copy(served, volume, slab)

    async def mutant(self: BlockService, *args: Any, alone: bool) -> None:
        await install(self, *args, alone=True)

    return [(ServedDrives, "copy_in_service", in_service), (BlockService, "install", mutant)]


def _I5_serves_when_cut_off() -> list[Patch]:
    """A node that has lost its lease, or a mount its coordinator, goes on reading from its own drives."""

    def serving(self: Any) -> bool:
        return True

    return [(Guard, "serving", serving), (Process, "may_serve", serving)]


def _I6_fence_without_effect() -> list[Patch]:
    """A fence is noted and nothing is closed: what the evicted writer sends on its link still lands."""

    def mutant(self: BlockService, volume: Any, writer: str, min_incarnation: Any) -> None:
        key = (volume, writer)
        self._fences[key] = max(min_incarnation, self._fences.get(key, min_incarnation))

    def no_bump(descriptor: SlabDescriptor) -> SlabDescriptor:
        return descriptor

    def with_bump(descriptor: SlabDescriptor) -> SlabDescriptor:
        """A loss is no fence: that still takes a new epoch."""
        return replace(descriptor, epoch=Epoch(descriptor.epoch + 1), lost_epoch=Epoch(descriptor.epoch + 1))

    state = csvfs.block.slab_state
    return [(BlockService, "fence", mutant), (state, "bump", no_bump), (state, "accept_unflushed_loss", with_bump)]


def _I7_resync_skips() -> list[Patch]:
    """A member that returns is called in sync without being copied anything."""

    async def mutant(self: Pull) -> None:
        return None

    return [(Pull, "run", mutant)]


def _I7_pull_overwrites() -> list[Patch]:
    """Pulled blocks replace what was written here since joining began."""
    true = SlabCopy.apply_pulled_blocks

    def mutant(self: SlabCopy, block: int, data: Any, checksums: Any, epoch: int | None = None) -> int:
        marks, self._since_joining = self._since_joining, bytearray(self.block_count // 8)
        try:
            return true(self, block, data, checksums, epoch)
        finally:
            self._since_joining = marks

    return [(SlabCopy, "apply_pulled_blocks", mutant)]


def _I8_flush_answers_early() -> list[Patch]:
    """A flush is answered without being done."""

    def mutant(self: Flushes, served: Any, flushed: Callable[[Any], None]) -> None:
        flushed(None)

    return [(Flushes, "request", mutant)]


def _I8_lost_power_without_a_word() -> list[Patch]:
    """A copy whose drive lost what it had not flushed goes on as if nothing had been."""
    true = BlockService.install

    async def mutant(self: BlockService, *args: Any, **options: Any) -> None:
        await true(self, *args, **{**options, "accepts_loss": args[0].opened().superblock.opens})

    return [(BlockService, "install", mutant)]


def _I9_not_verified() -> list[Patch]:
    """Blocks are returned as they lie on the drive; their checksums are made up to match."""

    def verified(self: SlabCopy, tables: Any, block: int, count: int, packed: bytes, data: Any) -> Any:
        for index in range(count):
            if tables.checksums[block + index]:
                piece = bytes(data[4096 * index : 4096 * (index + 1)])
                tables.checksums[block + index] = self._checksum(piece, block + index)
        return data

    return [(SlabCopy, "_verified", verified)]


MUTANTS: dict[str, Callable[[], list[Patch]]] = {
    "I1 the last copy is dropped": _I1_last_copy_dropped,
    "I2 answered before all members have it": _I2_answered_before_all,
    "I2 the epoch is not checked": _I2_epoch_not_checked,
    "I3 the active map is cleared early": _I3_active_map_cleared_early,
    "I3 chunks are never marked active": _I3_never_marked,
    "I4 sent again out of order": _I4_sent_again_out_of_order,
    "I5 a node that is cut off goes on serving": _I5_serves_when_cut_off,
    "I5 served before it is judged": _I5_served_before_judged,
    "I6 a fence closes nothing": _I6_fence_without_effect,
    "I7 in sync without a resync": _I7_resync_skips,
    "I7 pulled blocks overwrite newer ones": _I7_pull_overwrites,
    "I8 a flush is answered early": _I8_flush_answers_early,
    "I8 lost power without a word": _I8_lost_power_without_a_word,
    "I9 blocks are not verified": _I9_not_verified,
}
# Its copies do not become equal, or the volume cannot be read: seen before anybody is told something wrong.
SEEN_AS_UNHEALED = {"I5 served before it is judged"}
# Faults without which nobody notices: the mutant, and the true code beside it, are shown these alone.
EMPHASIS = {
    "I3 chunks are never marked active": ("kill mid-write", "break"),
    "I5 a node that is cut off goes on serving": ("partition", "store cut", faults.READS),
    "I6 a fence closes nothing": ("pause",),
}
# Seeds that caught a mutant which few do (these: 1 of 100). They are tried first.
CATCHING_SEEDS = {"I5 a node that is cut off goes on serving": (154, 166), "I6 a fence closes nothing": (13,)}


@contextmanager
def emphasis_of(name: str) -> Iterator[None]:
    """Run with the faults that show this mutant best."""
    with patch.object(faults, "EMPHASIS", EMPHASIS.get(name, ())):
        yield


@contextmanager
def broken(name: str) -> Iterator[None]:
    """Run with one rule broken."""
    with ExitStack() as stack:
        for target, attribute, value in MUTANTS[name]():
            stack.enter_context(patch.object(target, attribute, value))
        yield
