"""Deliberately broken rules of membership, fencing, leases and sessions, for a run: the history has to give them away.

Place      simulator, top; as tests/simulator/mutants.py does for the block layer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any
from unittest.mock import patch

import coordinator.dispatch
import coordinator.shared_write
import csvfs.block.slab_state
import csvfs.mount.cloning
import csvfs.mount.operations
import csvfs.mount.shared_write
from coordinator.eviction import Eviction
from coordinator.lease_table import LeaseTable
from coordinator.replies import Replies
from coordinator.service import Service
from coordinator.sessions import Outcome
from coordinator.shared_write import SharedWrite
from csvfs.block.block_service import BlockService
from csvfs.mount.guard import Guard
from csvfs.mount.inheritance import Inheritance
from csvfs.mount.lapse import Lapse
from csvfs.mount.leases import Leases
from csvfs.mount.recall import Recaller
from csvfs.mount.relay import Relay
from csvfs.mount.request_journal import RequestJournal
from csvfs.mount.segments import Segments
from csvfs.volume.extents import ExtentMap
from tests.simulator.clients import faults, programs
from tests.simulator.clients.node import SimKeeper
from tests.simulator.clients.programs import FIRST_SEED_WITH_CLONES
from tests.simulator.clients.world import FIRST_SEED_WITH_HAND_OVER, FIRST_SEED_WITH_SHARED_WRITE
from tests.simulator.process import Process

Patch = tuple[Any, str, Any]


def _I5_mount_serves_when_cut_off() -> list[Patch]:
    """A mount answers from what it holds, whatever became of its node's lease and its coordinator."""

    def serving(self: Guard) -> bool:
        return True

    return [(Guard, "serving", serving)]


def _I5_contact_not_asked() -> list[Patch]:
    """A mount answers from what it holds while its node has a lease, whether its coordinator has heard of it or not."""

    def serving(self: Guard) -> bool:
        if not self.lapsed and not self._may_serve():
            self.lapsed = True
        return not self.lapsed

    return [(Guard, "serving", serving)]


def _I5_caches_outlive_lapse() -> list[Patch]:
    """What the kernel has cached stays when its mount may not serve any more."""

    def begin(self: Lapse) -> None:
        """Nothing is taken back."""

    return [(Lapse, "begin", begin)]


def _I5_recall_leaves_pages() -> list[Patch]:
    """A recall is answered, and pages stay."""

    async def empty(self: Recaller, state: Any, recall: Any, held: Any) -> None:
        held.hold_all()
        while state.reads or state.writers or state.writes:
            await state.wait_change()

    return [(Recaller, "_empty", empty)]


def _I5_coordinator_serves_when_cut_off() -> list[Patch]:
    """A coordinator answers though its node's lease has run out, and the host goes on."""

    def check(self: Service) -> None:
        """Whatever the liveness page says."""

    def may_serve(self: Process) -> bool:
        return self.role == "host" or self.machine.clock_ns() < self.machine.serve_until

    return [(Service, "_check_serving", check), (Process, "may_serve", may_serve)]


def _I6_fenced_too_late() -> list[Patch]:
    """Leases pass on at once; the fence is set some time."""

    async def fence_out(self: Eviction, session: Any, *, succeeded: Callable[[], bool]) -> None:
        """Nobody is asked."""

    return [(Eviction, "fence_out", fence_out)]


def _I6_answered_before_in_force() -> list[Patch]:
    """A drive server answers a fence, and carries it out eight seconds later."""
    true = BlockService.fence

    def fence(self: BlockService, volume: Any, writer: str, min_incarnation: Any) -> None:
        process: Any = self.engine.process  # type: ignore[attr-defined]
        process.network.events.after(8.0, lambda: process.alive and true(self, volume, writer, min_incarnation))

    return [(BlockService, "fence", fence), (csvfs.block.slab_state, "bump", _same_epoch)]


def _I6_term_not_checked() -> list[Patch]:
    """A drive server takes note of a new term, and goes on to take what coordinators of earlier ones send.

    Three rules refuse that, each of them alone: the term, the epoch (a successor begins a new one of each metadata slab),
    and that links of an earlier incarnation end when a later one introduces itself. So all three are broken.
    """
    true = BlockService.hello

    def check_term(self: BlockService, volume: Any, term: int) -> None:
        self._terms[volume] = max(term, self._terms.get(volume, 0))

    def hello(self: BlockService, link: Any, volume: Any, writer: str, incarnation: Any) -> None:
        earlier = {client for client in self.clients if client.writer.startswith("coordinator")}
        self.clients -= earlier
        true(self, link, volume, writer, incarnation)
        self.clients |= earlier

    broken = [(BlockService, "check_term", check_term), (BlockService, "hello", hello)]
    return [*broken, (csvfs.block.slab_state, "bump", _same_epoch)]


def _same_epoch(descriptor: Any) -> Any:
    """Epochs refuse late writes, too, as those of a new one are equal on all members: without that, nothing does."""
    return descriptor


def _I11_reply_not_stored() -> list[Patch]:
    """An operation that is sent again is done again."""

    def store_reply(self: Replies, session: int, op: int, reply: bytes) -> None:
        """Nothing is kept."""

    return [(Replies, "store_reply", store_reply)]


def _I11_op_ignored() -> list[Patch]:
    """A change is carried out whenever it is sent, whatever its number."""

    def once(store: Any, session: Any, op: int, op_done: int, apply: Callable[[], Any]) -> Callable[[], Outcome]:
        return lambda: Outcome(apply())

    return [(coordinator.dispatch, "once", once)]


def _lease_given_twice() -> list[Patch]:
    """The write lease of one session does not keep others from getting theirs."""

    def recall_others(self: LeaseTable, *args: Any) -> bool:
        return False

    return [(LeaseTable, "_recall_others", recall_others)]


def _K1_cached_without_lease() -> list[Patch]:
    """The kernel may keep whatever it is told."""
    true = csvfs.mount.operations.entry_attributes

    def entry_attributes(attr: Any, leased: bool, name_leased: bool = False) -> Any:
        return true(attr, True, True)

    def valid_s(self: Relay, ino: int, stamp: int) -> int:
        return 1 << 24

    return [
        (csvfs.mount.operations, "entry_attributes", entry_attributes),
        (Relay, "_valid_s", valid_s),
        (Relay, "_attr_valid_s", valid_s),
    ]


def _clones_written() -> list[Patch]:
    """Blocks that several files have are written as any others."""
    return [(ExtentMap, "is_shared", lambda self, block, count: False)]


def _cloned_beside_writes() -> list[Patch]:
    """A clone does not wait for reads and writes of its files that are under way."""

    @asynccontextmanager
    async def nothing_under_way(state: Any, *ranges: Any) -> AsyncIterator[None]:
        yield

    return [(csvfs.mount.cloning, "nothing_under_way", nothing_under_way)]


def _I11_successor_numbers_anew() -> list[Patch]:
    """The next process of a mount does what it is asked anew as if the one before had never begun with it."""
    return [(RequestJournal, "_take_old", lambda self, unique, what: None)]


def _I5_dead_mount_shows_on() -> list[Patch]:
    """What the kernel has cached of a mount that died stays until the next process sees to it."""

    async def take_back(self: SimKeeper, session: Any) -> None:
        self._shows_nothing = True

    return [(SimKeeper, "_take_back", take_back)]


def _I4_replays_after_recall() -> list[Patch]:
    """A recall does not wait for what the kernel asks anew."""

    async def ready(self: Inheritance, state: Any) -> None:
        await self._leases.restore(state)

    return [(Inheritance, "ready", ready)]


def _shared_recall_beside_io() -> list[Patch]:
    """A segment is given back while reads and writes are under way in it."""
    return [(Segments, "is_used", lambda self, segment, by_writes_alone: False)]


def _shared_end_at_once() -> list[Patch]:
    """Nobody is asked to give his segments back before others get the lease on the inode."""

    async def end(self: SharedWrite, ino: Any) -> None:
        shared = self._files.pop(ino, None)
        if shared is not None:
            shared.ending = True
            for session in list(shared.held):
                for segment in (-1, *shared.held[session]):
                    self.segments.table.release(session, coordinator.shared_write.key_of(ino, segment), 0)

    return [(coordinator.shared_write.SharedWrite, "_end", end)]


def _shared_not_reclaimed() -> list[Patch]:
    """The next coordinator does not hear who has which segment."""

    def claims(self: Leases) -> list[list[Any]]:
        return []

    return [(Leases, "claims_of_segments", claims)]


def _shared_read_segments_written() -> list[Patch]:
    """Whoever writes is content with a segment that he may read."""
    return [(Segments, "holds", lambda self, wanted, kind: all(self.kinds.get(segment, 0) for segment in wanted))]


MUTANTS: dict[str, Callable[[], list[Patch]]] = {
    "I5 a mount that is cut off goes on serving": _I5_mount_serves_when_cut_off,
    "I5 a mount goes on serving without its coordinator": _I5_contact_not_asked,
    "I5 the kernel's caches outlive the lapse": _I5_caches_outlive_lapse,
    "I5 a recall leaves pages": _I5_recall_leaves_pages,
    "I5 a coordinator that is cut off goes on serving": _I5_coordinator_serves_when_cut_off,
    "I6 leases pass on before the fence": _I6_fenced_too_late,
    "I6 a fence is answered before it is in force": _I6_answered_before_in_force,
    "I6 a deposed coordinator goes on writing": _I6_term_not_checked,
    "I11 replies are not stored": _I11_reply_not_stored,
    "I11 operation numbers are ignored": _I11_op_ignored,
    "lease given twice": _lease_given_twice,
    "K1 cached without a lease": _K1_cached_without_lease,
    "hand-over I11 the next process numbers calls anew": _I11_successor_numbers_anew,
    "hand-over I5 a dead mount shows what it had": _I5_dead_mount_shows_on,
    "hand-over I4 a recall does not wait for replays": _I4_replays_after_recall,
    "shared write: a segment is given back beside I/O": _shared_recall_beside_io,
    "shared write: it ends at once": _shared_end_at_once,
    "shared write: segments are not reclaimed": _shared_not_reclaimed,
    "shared write: a segment that may be read is written": _shared_read_segments_written,
    "clones are written": _clones_written,
    "clones are made beside writes": _cloned_beside_writes,
}
_CUTS = ("partition", "store cut")
EMPHASIS = {
    "I5 a mount that is cut off goes on serving": _CUTS,
    "I5 a mount goes on serving without its coordinator": ("isolate",),
    "I5 the kernel's caches outlive the lapse": _CUTS,
    "I5 a coordinator that is cut off goes on serving": _CUTS,
    "I6 leases pass on before the fence": ("hold mount",),
    "I6 a fence is answered before it is in force": ("hold mount",),
    "I6 a deposed coordinator goes on writing": ("orphan",),
    "I11 replies are not stored": ("kill host", "break", "hold"),
    "I11 operation numbers are ignored": ("kill host", "break", "hold"),
    "hand-over I11 the next process numbers calls anew": ("kill mount",),
    "hand-over I5 a dead mount shows what it had": ("kill mount",),
    "hand-over I4 a recall does not wait for replays": ("kill mount",),
    "shared write: segments are not reclaimed": ("kill host",),
}


# Tried first.
CATCHING_SEEDS = {
    "I5 a mount goes on serving without its coordinator": (2,),
    "I6 leases pass on before the fence": (18,),
    "I6 a fence is answered before it is in force": (17,),
    "I5 a mount that is cut off goes on serving": (3,),
    "I5 the kernel's caches outlive the lapse": (3,),
    "I5 a coordinator that is cut off goes on serving": (64,),
    "K1 cached without a lease": (3,),
    "hand-over I5 a dead mount shows what it had": (200037,),
    "hand-over I11 the next process numbers calls anew": (200064, 200070),
    "hand-over I4 a recall does not wait for replays": (200116,),
    "shared write: a segment is given back beside I/O": (300072, 300091, 300094),
    "shared write: it ends at once": (300003, 300004, 300005),
    "shared write: segments are not reclaimed": (300019, 300025, 300049),
    "shared write: a segment that may be read is written": (300003, 300010, 300011),
}


def seeds_of(name: str, count: int) -> list[int]:
    """Which to try, in this order: at most so many."""
    first = FIRST_SEED_WITH_HAND_OVER if name.startswith("hand-over") else 0
    first = FIRST_SEED_WITH_SHARED_WRITE if name.startswith("shared write") else first
    first = FIRST_SEED_WITH_CLONES if name.startswith("clones") else first
    return [*CATCHING_SEEDS.get(name, ()), *range(first + 1, first + count + 1)][:count]


# Of programs that show a write which comes too late: they hardly ever write to other places.
_FEW_PLACES = {"FILES": ((b"", b"f0"),), "CELLS_MAX": 2, "PACES_S": (0.0, 0.05, 0.3)}


@contextmanager
def emphasis_of(name: str) -> Iterator[None]:
    """Run with the faults and programs that show this mutant best."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(faults, "EMPHASIS", EMPHASIS.get(name, ())))
        if "I4" in name or name.startswith("shared write") or (name.startswith("I6") and "coordinator" not in name):
            for attribute, value in _FEW_PLACES.items():
                stack.enter_context(patch.object(programs, attribute, value))
        yield


@contextmanager
def broken(name: str) -> Iterator[None]:
    """Run with one rule broken."""
    with ExitStack() as stack:
        for target, attribute, value in MUTANTS[name]():
            stack.enter_context(patch.object(target, attribute, value))
        yield
