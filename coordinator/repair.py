"""Repair: brings every slab to its wanted number of copies, on drives that are to stay, without a human.

Place      coordinator floor; above repair_plan.py and rebalance.py (which decide), resync.py and
           slab_changes.py (which do), below service.py.
Tasks      one looks at all slabs when something has changed and sorts what there is to do, those with the
           fewest copies first; WORKERS carry it out, one slab each; one keeps the record.
Survives   everything: what is to be done is in the descriptors. A coordinator that takes over finds joining
           members, which it brings in sync, and members too many, which it takes out.

Invariants
  I1   A copy is made and in sync before another is given up (repair_plan.py); and only by committed changes.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import trio

from coordinator.cluster_facts import ClusterFacts
from coordinator.drive_control import DriveControl
from coordinator.drive_watch import DriveWatch
from coordinator.job_record import JobRecord
from coordinator.rebalance import Move, plan_moves
from coordinator.repair_plan import Add, Join, Remove, Wait, blamed, next_steps
from coordinator.resync import Resync, bring_in_sync
from coordinator.slab_changes import SlabChanges
from coordinator.slab_manager import SlabManager
from coordinator.storage_jobs import COPIES, JobKey, StorageJobs
from csvfs.block import slab_state
from csvfs.block.placement import DriveSpace, choose_drives
from csvfs.errors import Conflict, CsvfsError, Fenced, NoSpace, NotCoordinator, NotFound
from csvfs.ids import DriveId, NodeName, SlabId
from csvfs.wire.block_messages import ROLE_IN_SYNC, ROLE_JOINING, Member, SlabDescriptor

log = logging.getLogger(__name__)

WORKERS = 4
COPIES_PER_DRIVE = 2  # made on one drive at once: more would only queue there
STEPS_MAX = 16  # of one slab in a row
TICK_S = 0.5
LOOK_S = 60.0  # a look without occasion
RETRY_S = 2.0
RECORD_S_MAX = 60.0
LOOK_SHARE = 10  # at most every tenth second is spent looking
SLABS_PER_TURN = 256
MOVES_MAX = 64  # planned at once: then spaces are asked for anew
WANTS_SPACE = "space above the reserve that repairs need: delete files, or see csvfs drive add"

Wanted = Callable[[SlabDescriptor], int]


@dataclass(slots=True, frozen=True)
class Task:
    """Work on one slab; `move`: to level the drives, else whatever its plan says."""

    changes: SlabChanges
    slab: SlabId
    key: JobKey
    move: Move | None = None


class Repair:
    """`books`: the changes of metadata slabs and those of data slabs. `wanted`: copies of a slab."""

    def __init__(
        self,
        books: list[SlabChanges],
        control: DriveControl,
        facts: ClusterFacts,
        slabs: SlabManager,
        resync: Resync,
        watch: DriveWatch,
        jobs: StorageJobs,
        record: JobRecord,
        wanted: Wanted,
        rng: Random,
    ) -> None:
        self._books = books
        self._control = control
        self._facts = facts
        self._slabs = slabs
        self._resync = resync
        self._watch = watch
        self._jobs = jobs
        self._record = record
        self._wanted = wanted
        self._rng = rng
        self._todo: list[Task] = []  # most urgent last
        self._busy: dict[SlabId, JobKey] = {}
        self._onto: Counter[DriveId] = Counter()  # copies being made, by target
        self._changed = trio.Event()
        self._retry_at = 0.0
        self.looks = 0  # at all slabs, so far
        record.on_change = self._wake

    # -- looking ---------------------------------------------------------------------------------

    async def run_forever(self) -> None:
        """Raises Fenced, NotCoordinator: another coordinator is at work."""
        await self._slabs.wait_spaces()
        self._watch.load(self._record.facts.away_ms, trio.current_time())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_forever)
            nursery.start_soon(self._record_forever)
            for _ in range(WORKERS):
                nursery.start_soon(self._work_forever)

    async def _look_forever(self) -> None:
        seen: object = None
        seen_at = not_before = trio.current_time()
        while True:
            now_s = trio.current_time()
            self._watch.update(now_s)
            sign = self._signature()
            due = bool(self._retry_at) and now_s >= self._retry_at
            idle = not self._todo and not self._busy
            news = sign != seen and (idle or self._drives_changed(sign, seen))
            if (news or due or now_s - seen_at >= LOOK_S) and now_s >= not_before:
                seen, seen_at, self._retry_at = sign, now_s, 0.0
                await self._look()
                took_s = trio.current_time() - now_s
                not_before = now_s + LOOK_SHARE * took_s  # reading 40,000 descriptors takes a while
            wait_s = min(TICK_S, self._watch.next_loss_s() or TICK_S)
            changed = self._facts.view.wait_changed
            with trio.move_on_after(wait_s + 0.001):
                await changed()

    def look_soon(self) -> int:
        """Look at all slabs without waiting for an occasion; returns `looks`, which grows when that is done."""
        self._retry_at = trio.current_time()
        return self.looks

    def _signature(self) -> tuple[object, ...]:
        """Equal as long as a look would find the same."""
        return (
            (self._watch.signature(), self._slabs.copies, self._slabs.outdated_count),
            self._record.facts,
            *(changes.settled_count for changes in self._books),
        )

    @staticmethod
    def _drives_changed(sign: object, seen: object) -> bool:
        return not isinstance(seen, tuple) or not isinstance(sign, tuple) or sign[:2] != seen[:2]

    async def _look(self) -> None:
        """Look at all slabs; others run in between."""
        counts: Counter[JobKey] = Counter()
        waiting: dict[JobKey, Wait] = {}
        found: list[tuple[int, Task]] = []
        whole: list[SlabDescriptor] = []
        for changes in self._books:
            for number, descriptor in enumerate(changes.book.all()):
                if number % SLABS_PER_TURN == 0:
                    await trio.lowlevel.checkpoint()
                if descriptor.slab in self._busy:
                    counts[self._busy[descriptor.slab]] += 1
                    continue
                steps = next_steps(descriptor, self._wanted(descriptor), self._watch.standing)
                if not steps:
                    if changes is self._books[-1]:
                        whole.append(descriptor)
                    continue
                key = self._key_of(changes, descriptor)
                if isinstance(steps[0], Join):
                    self._resync.add_one(changes, descriptor, steps[0].member)
                    continue
                counts[key] += 1
                if isinstance(steps[0], Wait):
                    waiting[key] = max(waiting.get(key, steps[0]), steps[0], key=lambda wait: wait.is_last)
                else:
                    found.append((len(descriptor.in_sync), Task(changes, descriptor.slab, key)))
        if not counts:
            await self._look_for_moves(whole, counts, found)
        # Last, hence first to be done: those with the fewest copies, and of them those that lack one.
        found.sort(key=lambda item: (-item[0], item[1].key.kind != COPIES))
        self._todo = [task for _, task in found]
        self._jobs.counted(counts, waiting)
        self.looks += 1
        self._wake()

    def _key_of(self, changes: SlabChanges, descriptor: SlabDescriptor) -> JobKey:
        key = JobKey(*blamed(descriptor, self._watch.standing))
        domains = {self._facts.domain_of(member.node) for member in descriptor.members}
        is_sound = key.drive is None and len(domains) == len(descriptor.members)
        return JobKey(COPIES) if is_sound and changes is self._books[-1] else key

    async def _look_for_moves(
        self, whole: list[SlabDescriptor], counts: Counter[JobKey], found: list[tuple[int, Task]]
    ) -> None:
        """Only when no slab lacks anything."""
        drives = frozenset(space.drive for space in self._watch.candidates())
        balanced = self._record.facts.balanced
        if balanced is not None and drives <= balanced:
            return
        moves: list[Move] = []
        if balanced is not None and not self._resync.jobs_waiting:
            await self._slabs.refresh_spaces()
            self._watch.update(trio.current_time())
            movable = [d for d in whole if d.slab not in self._busy]
            moves = plan_moves(self._watch.candidates(), movable, self._facts.domain_of, MOVES_MAX)
            share = -(-len(moves) // max(1, len(self._facts.view.volumes)))  # the others see the same need
            moves = moves[:share]
        key = JobKey("rebalance")
        for move in moves:
            counts[key] += 1
            found.append((1 << 30, Task(self._books[-1], move.slab, key, move)))
        if not moves and not self._busy and not (balanced is not None and self._resync.jobs_waiting):
            await self._change_record(lambda facts: replace(facts, balanced=drives))

    # -- working ---------------------------------------------------------------------------------

    def _wake(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def _work_forever(self) -> None:
        while True:
            changed = self._changed
            index = next(
                (i for i in range(len(self._todo) - 1, -1, -1) if self._may_begin(self._todo[i])), None
            )
            if index is None:
                await changed.wait()
                continue
            task = self._todo.pop(index)
            self._busy[task.slab] = task.key
            try:
                await self._work_on(task)
            finally:
                self._busy.pop(task.slab, None)
                self._wake()

    def _may_begin(self, task: Task) -> bool:
        return task.slab not in self._busy and not self._record.is_paused(task.key.kind)

    async def _work_on(self, task: Task) -> None:
        try:
            done = await (self._move(task) if task.move is not None else self._mend(task))
        except (Fenced, NotCoordinator):
            raise
        except (NotFound, Conflict) as error:
            log.info("slab %d: %s", task.slab, error)
            done = True  # it is another slab than was looked at, or none any more
        except CsvfsError as error:
            log.warning("%s: slab %d waits: %s", task.key.what, task.slab, error)
            self._jobs.waits(task.key, str(error))
            done = False
        if done:
            self._jobs.done(task.key)
        else:
            self._retry_at = self._retry_at or trio.current_time() + RETRY_S

    async def _mend(self, task: Task) -> bool:
        """Step by step until the slab is whole; False: not now."""
        for _ in range(STEPS_MAX):
            descriptor = task.changes.book.current(task.slab)
            steps = next_steps(descriptor, self._wanted(descriptor), self._watch.standing)
            if not steps:
                return True
            for step in steps:
                if isinstance(step, Wait):
                    self._jobs.waits(task.key, step.reason)
                elif isinstance(step, Join):
                    self._resync.add_one(task.changes, descriptor, step.member)
                    return len(steps) == 1  # the rest of its way is another job's
                elif isinstance(step, Remove):
                    await self._remove(task.changes, descriptor, step)
                    break
                elif await self._add(task, descriptor, step):
                    break
            else:
                return False
        return False

    async def _remove(self, changes: SlabChanges, descriptor: SlabDescriptor, step: Remove) -> None:
        slab, member = descriptor.slab, step.member
        self._note_copy(member.drive, -1)  # no await since it was chosen: slabs changed at once see each other
        try:
            await changes.change(slab, lambda d: slab_state.remove_member(d, member.drive, needs=step.needs))
        except CsvfsError:
            self._note_copy(member.drive, 1)
            raise
        # Installed on all others: no write can complete with it any more, and readers find the others.
        if self._facts.server(member.node) is not None:
            await self._slabs.delete_copy(slab, member.node, member.drive)

    def _note_copy(self, drive: DriveId, change: int) -> None:
        """So that the next slab sees how full the drives are now: the servers are asked only now and then."""
        self._slabs.note_copy(drive, change)
        self._watch.update(trio.current_time())

    async def _add(self, task: Task, descriptor: SlabDescriptor, step: Add) -> bool:
        """Make a further copy. False: there is no place for it, which the job says."""
        try:
            while (place := self._choose(step)) is None:
                await self._changed.wait()  # all that may take it have enough to do
            if task.key.kind == COPIES and not self._slabs.slots_above_reserve():
                self._jobs.waits(task.key, WANTS_SPACE)
                return False
        except NoSpace:
            domains = ", ".join(sorted(step.taken)) or "any"
            reason = f"a drive with room in another fault domain than {domains}; see csvfs drive add, domain list"
            self._jobs.waits(task.key, reason)
            return False
        await self._make_copy(task, descriptor, place.drive, place.node)
        return True

    def _choose(self, step: Add) -> DriveSpace | None:
        """None: later, when one of those that may take it has less to do. Raises NoSpace."""
        able = [space for space in self._watch.candidates() if space.drive not in step.drives]
        choose = partial(
            choose_drives, copies=1, rng=self._rng, domain_of=self._facts.domain_of, taken=step.taken
        )
        choose(able)  # NoSpace where there is none at all
        for limit in range(1, COPIES_PER_DRIVE + 1):
            idle = [space for space in able if self._onto[space.drive] < limit]
            try:
                return choose(idle)[0]
            except NoSpace:
                continue
        return None

    async def _make_copy(self, task: Task, descriptor: SlabDescriptor, drive: DriveId, node: NodeName) -> None:
        slab = task.slab
        self._onto[drive] += 1
        self._resync.claimed.add((slab, drive))
        try:
            await self._add_member(task.changes, descriptor, drive, node)
            self._note_copy(drive, 1)
            self._jobs.copied(task.key, await bring_in_sync(task.changes, slab, drive))
        finally:
            self._resync.claimed.discard((slab, drive))
            self._onto[drive] -= 1
            self._wake()

    async def _add_member(
        self, changes: SlabChanges, descriptor: SlabDescriptor, drive: DriveId, node: NodeName
    ) -> None:
        slab = descriptor.slab
        self._slabs.creating.add(slab)  # a copy that no descriptor names yet is not a stray
        try:
            await self._control.create_slab(slab, descriptor.epoch, node, drive, ROLE_JOINING)
            await changes.change(slab, lambda d: slab_state.add_member(d, drive, node))
        except (NotFound, Conflict):
            await self._slabs.delete_copy(slab, node, drive)
            raise
        finally:
            self._slabs.creating.discard(slab)

    async def _move(self, task: Task) -> bool:
        """One copy, from a fuller to an emptier drive; given up when the slab is not as it was."""
        move = task.move
        assert move is not None
        changes, slab = task.changes, task.slab
        descriptor = changes.book.current(slab)
        if next_steps(descriptor, self._wanted(descriptor), self._watch.standing):
            return True  # it has something more urgent to do
        others = [m for m in descriptor.members if m.drive != move.source]
        domain = self._facts.domain_of(move.target_node)
        if any(m.drive == move.target or self._facts.domain_of(m.node) == domain for m in others):
            return True
        await self._make_copy(task, descriptor, move.target, move.target_node)
        descriptor = changes.book.current(slab)
        source = _member_on(descriptor, move.source)
        needs = tuple(m.drive for m in descriptor.in_sync if m.drive != move.source)
        standing = self._watch.standing
        wanted = self._wanted(descriptor)
        serving = {standing(m).domain for m in descriptor.in_sync if m is not source and standing(m).serves}
        if source is not None and len(serving) >= wanted:
            await self._remove(changes, descriptor, Remove(source, needs))
        return True

    # -- the record ------------------------------------------------------------------------------

    async def _record_forever(self) -> None:
        """What a successor should go on from: not needed for anything but speed, so failures only wait."""
        written_at = trio.current_time()
        while True:
            await trio.sleep(TICK_S)
            facts, away_ms, totals = self._record.facts, self._watch.away_ms(), self._jobs.totals()
            # Often enough that a takeover adds little to the time that drives may be away.
            due_s = min(RECORD_S_MAX, (self._watch.next_loss_s() or RECORD_S_MAX) / 4)
            known = set(away_ms) == set(facts.away_ms) and totals == facts.totals
            if not known or (away_ms != facts.away_ms and trio.current_time() - written_at >= due_s):
                written_at = trio.current_time()
                await self._change_record(partial(replace, away_ms=away_ms, totals=totals))

    async def _change_record(self, change: Callable[..., object]) -> None:
        try:
            await self._record.change(change)  # type: ignore[arg-type]
        except NotCoordinator:
            raise
        except CsvfsError as error:
            log.warning("the record of the jobs is not up to date: %s", error)


def _member_on(descriptor: SlabDescriptor, drive: DriveId) -> Member | None:
    found = (m for m in descriptor.members if m.drive == drive and m.role == ROLE_IN_SYNC)
    return next(found, None)
