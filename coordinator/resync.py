"""Resync: members that were out come back, copied what they missed (I7: from in-sync to joining only).

Place      coordinator floor; above slab_changes.py.
Tasks      WORKERS tasks take jobs; at most one per target drive at a time.
Order      begin_joining (commit, install on all): from here the member gets every write. Pull what it missed
           before. complete_joining (commit, install). A step that fails is tried again later; a coordinator
           that dies leaves a joining member, for which its successor begins with the pull.
"""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import trio

from coordinator.slab_changes import SlabChanges
from csvfs.block import slab_state
from csvfs.errors import Conflict, Corrupt, CsvfsError, Fenced, NotFound, StaleEpoch, Unavailable
from csvfs.ids import DriveId, NodeName, SlabId
from csvfs.wire.block_messages import ROLE_ABSENT, ROLE_JOINING, Member, SlabDescriptor

log = logging.getLogger(__name__)

WORKERS = 4
RETRY_S = 1.0
RETRY_S_MAX = 30.0
LOOK_S = 0.5  # whether a pause is over, a drive serves again, or its delay is over
PULL_TRIES = 8  # with the slab's epoch moving on in between


@dataclass(slots=True)
class DriveProgress:
    """Slabs of one target drive; `bytes_copied` for them."""

    node: NodeName
    slabs_total: int = 0
    slabs_done: int = 0
    bytes_copied: int = 0
    started: float = field(default_factory=trio.current_time)
    waiting_for: str = ""


class Resync:
    """Jobs (slab, drive) for data slabs and metadata slabs alike.

    serves   whether a drive can be worked on at all. Jobs of one that cannot are neither tried nor shown: a try
             would only begin another epoch of the slab, and `repair` says what is waited for.
    """

    def __init__(
        self,
        volume_name: str,
        slab_size: int,
        is_paused: Callable[[], bool],
        serves: Callable[[DriveId], bool] = lambda drive: True,
    ) -> None:
        self._volume = volume_name
        self._slab_size = slab_size
        self._is_paused = is_paused
        self._serves = serves
        self.claimed: set[tuple[SlabId, DriveId]] = set()  # somebody else brings these in sync
        self._jobs: dict[DriveId, dict[SlabId, SlabChanges]] = {}  # waiting, per target drive
        self._busy: set[DriveId] = set()
        self._changed = trio.Event()
        self._progress: dict[DriveId, DriveProgress] = {}
        self._delays: dict[DriveId, float] = {}  # seconds, of drives whose last try failed
        self._not_before: dict[DriveId, float] = {}  # on trio's clock, likewise

    def add(self, changes: SlabChanges, drives: Iterable[DriveId]) -> None:
        """Bring every member on `drives` that is absent or joining back in sync. Twice does no harm."""
        wanted = set(drives)
        found = [
            (len(descriptor.in_sync), descriptor.slab, member)
            for descriptor in changes.book.all()
            for member in descriptor.members
            if member.drive in wanted and member.role in (ROLE_ABSENT, ROLE_JOINING)
        ]
        for _, slab, member in sorted(found, key=lambda row: row[0]):  # those with the fewest good copies first
            self._add(changes, slab, member)
        self._wake()

    def add_one(self, changes: SlabChanges, descriptor: SlabDescriptor, member: Member) -> None:
        """As `add`, for one slab."""
        self._add(changes, descriptor.slab, member)
        self._wake()

    def _add(self, changes: SlabChanges, slab: SlabId, member: Member) -> None:
        if (slab, member.drive) in self.claimed:
            return
        jobs = self._jobs.setdefault(member.drive, {})
        if slab not in jobs:
            jobs[slab] = changes
            progress = self._progress.setdefault(member.drive, DriveProgress(member.node))
            progress.slabs_total += 1

    def cancel(self, drives: Iterable[DriveId]) -> None:
        """These drives are gone: their jobs come again when they are back."""
        for drive in drives:
            self._jobs.pop(drive, None)
            if drive not in self._busy:
                self._progress.pop(drive, None)
            self._forget_delay(drive)

    def _wake(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def run_forever(self) -> None:
        """Raises Fenced: another coordinator is at work."""
        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(self._work_forever)

    async def _work_forever(self) -> None:
        while True:
            changed = self._changed
            drive = self._next_drive()
            if drive is None:
                with trio.move_on_after(LOOK_S if self._jobs else math.inf):
                    await changed.wait()
                continue
            self._busy.add(drive)
            try:
                await self._work_on(drive)
            finally:
                self._busy.discard(drive)
                if drive not in self._jobs:
                    self._progress.pop(drive, None)
                self._wake()

    def _next_drive(self) -> DriveId | None:
        if self._is_paused():
            return None
        now_s = trio.current_time()
        for drive in self._jobs:
            if drive not in self._busy and now_s >= self._not_before.get(drive, 0) and self._serves(drive):
                return drive
        return None

    def _forget_delay(self, drive: DriveId) -> None:
        self._delays.pop(drive, None)
        self._not_before.pop(drive, None)

    async def _work_on(self, drive: DriveId) -> None:
        """One job of a drive."""
        jobs = self._jobs[drive]
        slab, changes = next(iter(jobs.items()))
        progress = self._progress[drive]
        try:
            progress.bytes_copied += await bring_in_sync(changes, slab, drive)
        except Fenced:
            raise
        except (NotFound, Conflict) as error:
            log.info("resync of slab %d on drive %s is over: %s", slab, drive.hex()[:8], error)
        except CsvfsError as error:
            log.warning("resync of slab %d on drive %s waits: %s", slab, drive.hex()[:8], error)
            if self._jobs.get(drive) is jobs and slab in jobs:  # else they were cancelled meanwhile
                progress.waiting_for = str(error)
                delay_s = self._delays.get(drive, RETRY_S)
                self._delays[drive] = min(2 * delay_s, RETRY_S_MAX)
                self._not_before[drive] = trio.current_time() + delay_s
                jobs[slab] = jobs.pop(slab)  # others first
            return
        self._forget_delay(drive)
        progress.waiting_for = ""
        progress.slabs_done += 1
        jobs.pop(slab, None)
        if not jobs and self._jobs.get(drive) is jobs:
            del self._jobs[drive]
            log.info("drive %s on node %s is in sync: %d slabs, %d bytes copied",
                     drive.hex()[:8], progress.node, progress.slabs_done, progress.bytes_copied)  # fmt: skip

    @property
    def jobs_waiting(self) -> bool:
        return bool(self._jobs)

    @property
    def is_idle(self) -> bool:
        return not self._jobs and not self._busy

    def to_status(self) -> list[dict[str, Any]]:
        """Rows of `volume_status`: done, left and total count whole slabs; copied and rate what was really copied;
        eta in seconds."""
        rows = []
        for drive, progress in self._progress.items():
            if not self._serves(drive):
                continue
            done, total = progress.slabs_done * self._slab_size, progress.slabs_total * self._slab_size
            elapsed = max(trio.current_time() - progress.started, 0.001)
            waiting_for = progress.waiting_for
            if self._is_paused():
                waiting_for = f"csvfs job resume {self._volume} repair"
            rows.append(
                {
                    "kind": "repair",
                    "what": f"resync of drive {drive.hex()[:8]} on {progress.node}",
                    "drive": drive,
                    "node": progress.node,
                    "done": done,
                    "left": total - done,
                    "total": total,
                    "copied": progress.bytes_copied,
                    "rate": progress.bytes_copied / elapsed,
                    "eta": (total - done) / (done / elapsed) if done else None,
                    "waiting_for": waiting_for,
                    "paused": self._is_paused(),
                }
            )
        return rows


async def bring_in_sync(changes: SlabChanges, slab: SlabId, drive: DriveId) -> int:
    """One member from absent or joining to in sync; returns the bytes copied.

    Raises  Unavailable, DriveFailed ...: not now. NotFound, Conflict: there is nothing to do (any more).
            Fenced.
    Cancel  safe: the member stays absent or joining.
    """
    descriptor = changes.book.current(slab)
    member = _member(descriptor, drive)
    if member.role == ROLE_ABSENT:
        if member.since == slab_state.SINCE_UNKNOWN:  # it may never have had a copy
            control = changes.control
            await control.create_slab(slab, descriptor.epoch, member.node, drive, ROLE_JOINING)
        descriptor = await changes.change(slab, lambda d: slab_state.begin_joining(d, drive))
    elif member.role != ROLE_JOINING:
        return 0
    copied = 0
    for _ in range(PULL_TRIES):
        error = (await changes.settle([slab])).get(slab)
        if error is not None:
            raise error
        descriptor = changes.book.current(slab)
        target = _member(descriptor, drive)
        if target.role != ROLE_JOINING:
            raise Unavailable(f"slab {slab}: drive {drive.hex()[:8]} dropped out while it was joining")
        try:
            copied += await _pull_from_any(changes, target, descriptor)
        except StaleEpoch:
            continue  # the slab changed meanwhile: what is stale is asked for anew
        await changes.change(slab, lambda d: slab_state.complete_joining(d, drive))
        return copied
    raise Unavailable(f"slab {slab} changed {PULL_TRIES} times while it was being copied")


async def _pull_from_any(changes: SlabChanges, target: Member, descriptor: SlabDescriptor) -> int:
    failures: list[CsvfsError] = [Unavailable(f"slab {descriptor.slab} has no in-sync member")]
    for source in descriptor.in_sync:
        try:
            return await changes.control.pull(target, source, descriptor, None)
        except (Fenced, StaleEpoch):
            raise
        except CsvfsError as error:
            failures.append(error)
    if len(failures) > 1 and all(isinstance(error, Corrupt) for error in failures[1:]):
        return await _pull_what_is_left(changes, target, descriptor)
    raise failures[-1]


async def _pull_what_is_left(changes: SlabChanges, target: Member, descriptor: SlabDescriptor) -> int:
    """Every in-sync copy has blocks that rotted and that `target` does not have: take from each what it has.

    A block that nobody has is lost: reads of it fail until a copy that has it returns, or it is written. To wait
    with the rest would leave that to as few copies as now.
    """
    first, *others = descriptor.in_sync
    copied, lost = await changes.control.pull_what_is_left(target, first, descriptor)
    for other in others if lost else ():
        _, lost = await changes.control.heal_from(target, other, descriptor, lost)
    if lost:
        log.error("slab %d: blocks %s have rotted on every copy in sync: lost until they are written, or a copy that "
                  "has them returns", descriptor.slab, ", ".join(map(str, lost)))  # fmt: skip
    return copied


def _member(descriptor: SlabDescriptor, drive: DriveId) -> Member:
    for member in descriptor.members:
        if member.drive == drive:
            return member
    raise NotFound(f"slab {descriptor.slab} has no member on drive {drive.hex()[:8]}")
