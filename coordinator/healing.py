"""Healing: all that mends, empties and levels the drives of one volume, put together.

Place      coordinator floor; above repair.py and resync.py, below service.py.
"""

from collections import Counter
from random import Random
from typing import Any

import trio

from coordinator.cluster_facts import ClusterFacts
from coordinator.drive_control import DriveControl
from coordinator.drive_watch import DriveWatch
from coordinator.job_record import JobRecord
from coordinator.misplacement import PlacesAsked, count_misplaced
from coordinator.repair import SLABS_PER_TURN, Repair
from coordinator.resync import Resync
from coordinator.slab_changes import SlabChanges
from coordinator.slab_manager import SlabManager
from coordinator.storage_jobs import StorageJobs
from csvfs.block.placement import DomainOf
from csvfs.ids import METADATA_SLAB_ID_MIN, DriveId, NodeName
from csvfs.wire.block_messages import ROLE_IN_SYNC, ROLE_JOINING, Member, SlabDescriptor

MIN_COPIES = "min_copies"  # of a volume's key: writes wait while fewer are in sync
METADATA_COPIES = 3  # where there are so many fault domains
LOOK_WAIT_S = 3.0
LOOK_POLL_S = 0.05


class Healing:
    """`books`: the changes of metadata slabs and those of data slabs. `copies`: of a data slab, as the volume's settings
    say now."""

    def __init__(
        self,
        volume_name: str,
        books: list[SlabChanges],
        control: DriveControl,
        facts: ClusterFacts,
        slabs: SlabManager,
        record: JobRecord,
        *,
        copies: int,
        slab_size: int,
        drive_retire_s: float,
        rng: Random,
    ) -> None:
        self._volume_name = volume_name
        self._books = books
        self._facts = facts
        self._slabs = slabs
        self.copies = copies
        self.record = record
        self.resync = Resync(volume_name, slab_size, lambda: record.is_paused("repair"), facts.serves)
        self._watch = DriveWatch(facts, lambda: slabs.served_spaces, drive_retire_s)
        self.jobs = StorageJobs(volume_name, slab_size, record)
        self._repair = Repair(
            books, control, facts, slabs, self.resync, self._watch, self.jobs, record, self.wanted, rng
        )
        control.speed = lambda: record.speed

    def wanted(self, descriptor: SlabDescriptor, domain_of: DomainOf | None = None) -> int:
        """How many copies a slab shall have: of metadata one in each fault domain, three at most, but never fewer
        than the data, nor in fewer domains than they are. `domain_of`: as if it were like that."""
        if descriptor.slab < METADATA_SLAB_ID_MIN:
            return self.copies
        domain_of = domain_of or self._facts.domain_of
        has = {domain_of(member.node) for member in descriptor.members}
        there_are = {domain_of(node) for node in self._watch.nodes_that_stay()}
        return min(METADATA_COPIES, max(self.copies, len(has), len(there_are)))

    async def run_forever(self) -> None:
        """Raises Fenced, NotCoordinator: another coordinator is at work."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.resync.run_forever)
            nursery.start_soon(self._repair.run_forever)

    async def look_now(self) -> None:
        """Look at all slabs without an occasion; returns when that is done, or LOOK_WAIT_S later. Cancel safe."""
        looks = self._repair.look_soon()
        with trio.move_on_after(LOOK_WAIT_S):
            while self._repair.looks <= looks:
                await trio.sleep(LOOK_POLL_S)

    def to_status(self) -> list[dict[str, Any]]:
        """Rows of `volume_status`."""
        return [*self.resync.to_status(), *self.jobs.to_status()]

    async def without_node(self, node: NodeName) -> dict[str, Any]:
        """The call `without_node`: what becomes of the volume's slabs while a node is off.

        `slabs`: those with a copy there. `stuck`: of these, those that would wait for it, because too few
        in-sync copies are left on nodes that serve. `joining`: of the stuck ones, those with a copy elsewhere
        that is being brought in sync. `creating`, `revision`: as of drive_members.
        """
        told = self._facts.view.volumes.get(self._volume_name, {}).get(MIN_COPIES)
        min_copies = max(1, told) if isinstance(told, int) else 1
        revision, creating, slabs, stuck, joining = self._facts.view.revision, len(self._slabs.creating), 0, 0, 0
        for changes in self._books:
            for number, descriptor in enumerate(changes.book.all()):
                if number % SLABS_PER_TURN == 0:
                    await trio.lowlevel.checkpoint()
                if all(member.node != node for member in descriptor.members):
                    continue
                slabs += 1
                others = [m for m in descriptor.members if m.node != node and self._serves(m)]
                in_sync = sum(member.role == ROLE_IN_SYNC for member in others)
                if in_sync < (1 if descriptor.slab >= METADATA_SLAB_ID_MIN else min_copies):
                    stuck += 1
                    joining += any(member.role == ROLE_JOINING for member in others)
        return {
            "slabs": slabs, "stuck": stuck, "joining": joining, "creating": creating, "revision": revision
        }  # fmt: skip

    def _serves(self, member: Member) -> bool:
        return self._facts.server(member.node) is not None and not self._facts.in_maintenance(member.node)

    async def drive_members(self, drive: DriveId) -> dict[str, Any]:
        """The call `drive_members`: which slabs have a copy on a drive, and where the others of each are.

        `groups`: [[nodes of the other members], count]. `creating`: slabs being created right now, which are
        not counted yet. `revision`: of the cluster store, as this coordinator knows it.
        """
        groups: Counter[tuple[str, ...]] = Counter()
        revision, creating = self._facts.view.revision, len(self._slabs.creating)
        for changes in self._books:
            for number, descriptor in enumerate(changes.book.all()):
                if number % SLABS_PER_TURN == 0:
                    await trio.lowlevel.checkpoint()
                if any(member.drive == drive for member in descriptor.members):
                    others = (m.node for m in descriptor.members if m.drive != drive)
                    groups[tuple(sorted(set(others)))] += 1
        return {
            "count": sum(groups.values()),
            "groups": [[list(nodes), count] for nodes, count in sorted(groups.items())],
            "creating": creating,
            "revision": revision,
        }

    async def misplaced(self, args: dict[str, Any]) -> dict[str, Any]:
        """The call `misplaced`: see coordinator/misplacement.py. Raises BadRequest."""
        asked = PlacesAsked.from_args(args, self._facts)
        books = [changes.book for changes in self._books]
        return await count_misplaced(books, lambda d: self.wanted(d, asked.domain_of), asked.domain_of)
