"""Deliberately broken rules, each with the world in which the state checker has to find a counterexample.

Place      state checker, top. tests/test_states.py runs each; the true code passes the same worlds.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import coordinator.resync
import coordinator.slab_book
import csvfs.block.slab_state
from coordinator.eviction import Eviction
from coordinator.lease_table import LeaseTable
from coordinator.slab_changes import SlabChanges
from csvfs.block.bus import Bus
from csvfs.block.bus_writes import PendingWrite
from csvfs.block.writer_marks import MarkBook
from csvfs.errors import CsvfsError, Fenced, LastCopy
from csvfs.ids import DriveId, Incarnation, SlabId
from csvfs.wire.block_messages import ROLE_ABSENT, ROLE_IN_SYNC, SlabDescriptor
from tests.states.data_world import DataWorld
from tests.states.drive_model import VOLUME, DriveServer, PullModel, ServerEnd
from tests.states.explorer import World
from tests.states.lease_world import LeaseSetup, LeaseWorld
from tests.states.takeover_world import TakeoverWorld
from tests.states.world import Setup

Patch = tuple[Any, str, Any]


@dataclass(slots=True, frozen=True)
class Mutant:
    """`breaks`: which invariants may be found broken first. `walks`: how many are tried to find it; 0: breadth-first."""

    breaks: tuple[str, ...]
    make: Callable[[], World]
    patches: Callable[[], list[Patch]]
    walks: int = 0


def _install_before_commit() -> list[Patch]:
    """The epoch of a change is installed on all members, and then committed."""

    async def mutant(self: SlabChanges, slab: SlabId, epoch: int, drives: Collection[DriveId], reason: str) -> Any:
        known = self.book.current(slab)
        if drives and known.epoch <= epoch:
            changed = csvfs.block.slab_state.drop_members(known, drives)
            await self.control.install([changed], {})
            await self.book.change([slab], lambda descriptor: changed)
        await self.settle([slab])
        return self.book.current(slab)

    return [(SlabChanges, "failed", mutant)]


def _ack_before_all() -> list[Patch]:
    """A write is acknowledged when the first member has it."""

    def mutant(self: Bus, write: PendingWrite, drive: DriveId, error: CsvfsError | None) -> None:
        write.remaining -= 1
        if error is None and not write.complete:
            write.complete = True
            write.finish(None)

    return [(Bus, "_answered", mutant)]


def _drop_last_copy() -> list[Patch]:
    """The last in-sync copy is dropped, and an absent one is called in sync in its place."""
    drop = csvfs.block.slab_state.drop_members

    def mutant(descriptor: SlabDescriptor, drives: Collection[DriveId]) -> SlabDescriptor:
        try:
            return drop(descriptor, drives)
        except LastCopy:
            members = tuple(
                replace(m, role=ROLE_ABSENT if m.drive in drives else ROLE_IN_SYNC) for m in descriptor.members
            )
            return replace(descriptor, epoch=descriptor.epoch + 1, members=members)

    return [(csvfs.block.slab_state, "drop_members", mutant)]


def _complete_without_pull() -> list[Patch]:
    """A joining member is called in sync without being copied anything."""

    async def mutant(changes: Any, target: Any, descriptor: Any) -> int:
        return 0

    return [(coordinator.resync, "_pull_from_any", mutant)]


def _fence_answered_early() -> list[Patch]:
    """A fence is answered, and carried out when the server next starts."""

    def fence(self: DriveServer, args: dict[str, Any]) -> None:
        return None

    return [(DriveServer, "_call_fence", fence)]


def _joining_copies_are_read() -> list[Patch]:
    """A drive server answers reads from copies that are being brought in sync (as it was)."""

    def serves_reads(self: DriveServer, epoch: int) -> bool:
        return self.in_service and epoch <= self.epoch

    return [(DriveServer, "serves_reads", serves_reads)]


def _term_not_checked_by_drives() -> list[Patch]:
    """A drive server takes calls and writes of any term, also by links of earlier ones."""

    def check_term(self: DriveServer, term: int) -> None:
        self.term = max(term, self.term)

    def hello(self: DriveServer, writer: str, incarnation: int) -> ServerEnd:
        end = ServerEnd(writer, incarnation)
        end.marks = self.marks.writer(VOLUME, writer, Incarnation(incarnation))
        self.ends.append(end)
        return end

    return [(DriveServer, "check_term", check_term), (DriveServer, "hello", hello)]


def _term_not_checked_in_the_store() -> list[Patch]:
    """A deposed coordinator goes on changing the metadata slabs' key."""

    def term_of(item: Any) -> Any:
        return _Equal()

    return [(coordinator.slab_book, "_term_of", term_of)]


class _Equal:
    """A term that is never another one."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def _not_made_equal() -> list[Patch]:
    """An evicted writer's chunks are left as they are."""

    async def equalize(self: SlabChanges, chunks: Any, lost: Any = None) -> None:
        return None

    return [(SlabChanges, "equalize", equalize)]


def _passed_on_while_out_of_reach() -> list[Patch]:
    """Leases pass on though no member could be reached to make the copies equal (as it was)."""

    async def check(self: Eviction, slab: SlabId) -> None:
        return None

    return [(Eviction, "_check_out_of_service", check)]


def _pulled_is_settled() -> list[Patch]:
    """What was pulled counts as being on all members (as it was)."""

    def settled(self: PullModel) -> set[int]:
        self.unequal = set()
        return set(self.pulled)

    return [(PullModel, "settled", settled)]


def _marks_go_with_the_writer() -> list[Patch]:
    """An evicted writer's marks are taken away wherever they are (as it was)."""

    def settle(self: MarkBook, volume: bytes, writer: str, min_incarnation: int) -> None:
        for key in [key for key in self._writers if key[:2] == (volume, writer) and key[2] < min_incarnation]:
            self._await_flush(self._writers.pop(key).marks)

    return [(MarkBook, "settle", settle)]


def _fenced_writes_are_complete() -> list[Patch]:
    """A writer that hears that it is over tells that its writes are on all members (as it was)."""

    def fail_parked(self: Bus, state: Any, error: Fenced) -> None:
        for write in state.take_parked():
            write.complete = True
            write.finish(error)

    return [(Bus, "_fail_parked", fail_parked)]


def _recall_answer_believed_late() -> list[Patch]:
    """A reply carries the lease that was held when it was computed, whatever was recalled since."""

    def lease_at_send(self: LeaseTable, session: Any, ino: Any, serial: int | None) -> int:
        return self.held(session, ino)

    return [(LeaseTable, "lease_at_send", lease_at_send)]


def _data(**settings: Any) -> Callable[[], World]:
    return lambda: DataWorld(Setup(**settings))


def _takeover(**settings: Any) -> Callable[[], World]:
    return lambda: TakeoverWorld(Setup(**settings))


MUTANTS: dict[str, Mutant] = {
    "install before commit": Mutant(("I1",), _data(faults=("cut",), faults_max=1), _install_before_commit),
    "acknowledged before all have it": Mutant(("I2", "I3"), _data(faults_max=0), _ack_before_all),
    "the last in-sync copy is dropped": Mutant(
        ("I1",), _data(out=("B",), faults=("cut",), faults_max=1), _drop_last_copy
    ),
    "in sync without a pull": Mutant(
        ("I2", "I3"), _data(out=("B",), faults=(), faults_max=0), _complete_without_pull
    ),
    "a fence is answered early": Mutant(("I5", "I6"), _data(faults=("writer",), faults_max=1), _fence_answered_early),
    "drives do not check the term": Mutant(
        ("I5", "I6", "I2", "I3"), _takeover(dead=True, faults=(), faults_max=0), _term_not_checked_by_drives
    ),
    "the store does not check the term": Mutant(
        ("I1",), _takeover(faults=("writer", "cut"), faults_max=2), _term_not_checked_in_the_store, 1000
    ),
    "joining copies are read": Mutant(
        ("I5",), _data(dead=True, faults=("coordinator", "server"), faults_max=2), _joining_copies_are_read, 2000
    ),
    "copies are not made equal": Mutant(("I5",), _data(dead=True, faults=(), faults_max=0), _not_made_equal),
    "leases pass on while members are out of reach": Mutant(
        ("I5",), _data(dead=True, faults=("cut",), faults_max=2, rests=False), _passed_on_while_out_of_reach
    ),
    "what was pulled counts as settled": Mutant(
        ("I3",), _data(members=3, dead=True, faults=(), faults_max=0), _pulled_is_settled
    ),
    "marks go where nothing was made equal": Mutant(
        ("I3",), _data(out=("B",), ahead=("B",), dead=True, faults=(), faults_max=0), _marks_go_with_the_writer
    ),
    "a fenced writer's writes count as complete": Mutant(
        ("I3",), _data(faults=("writer",), faults_max=1), _fenced_writes_are_complete
    ),
    "leases are granted as they were": Mutant(
        ("T1",), lambda: LeaseWorld(LeaseSetup(requests_max=2)), _recall_answer_believed_late
    ),
}


@contextmanager
def broken(name: str) -> Iterator[None]:
    """Run with one rule broken."""
    with ExitStack() as stack:
        for target, attribute, value in MUTANTS[name].patches():
            stack.enter_context(patch.object(target, attribute, value))
        yield
