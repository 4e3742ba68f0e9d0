"""Volume control: what an administrator may change of a volume in use, and what is refused with which numbers.

Place      coordinator floor; above volume_settings.py (which commits), slab_manager.py and slab_changes.py, below
           service.py. The work that follows from another number of copies is repair's (repair.py).
Rule       what could lose or block anything is decided here, between awaits, against what is true at that moment:
           the space that files have, the copies that slabs have. Whether the pool has room for more copies can only
           be true as of now, since other volumes take from it too: the job waits where that has changed.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from coordinator import arguments
from coordinator.arguments import Args
from coordinator.cluster_facts import ClusterFacts
from coordinator.metadata import Metadata
from coordinator.slab_changes import SlabChanges
from coordinator.slab_manager import SlabManager
from coordinator.volume_settings import COPIES_MAX, Settings, VolumeSettings
from csvfs.block.capacity import missing_slots
from csvfs.block.reserve import DriveSlots, reserve_slots
from csvfs.errors import BadRequest, Conflict, NoSpace
from csvfs.units import BLOCK_SIZE, MIB, format_size

SIZE_MIN = 64 * MIB
SIZE_MAX = 1 << 62
SLABS_PER_TURN = 256


@dataclass(slots=True)
class Lack:
    """Copies that data slabs lack. `groups`: how many, by the fault domains of the copies they have."""

    slabs: int = 0
    copies: int = 0
    groups: Counter[frozenset[str]] = field(default_factory=Counter)


class VolumeControl:
    """`slab_size`: bytes."""

    def __init__(
        self,
        settings: VolumeSettings,
        metadata: Metadata,
        changes: SlabChanges,
        slabs: SlabManager,
        facts: ClusterFacts,
        slab_size: int,
    ) -> None:
        self._settings = settings
        self._metadata = metadata
        self._changes = changes
        self._slabs = slabs
        self._facts = facts
        self._slab_size = slab_size

    async def change(self, args: Args) -> dict[str, Any]:
        """The call `volume_set`. What is not given stays; all that is given is changed at once, or nothing.

        Returns  size, copies, min_copies as they are now; used (bytes); to_copy, to_drop (bytes): what repair has
                 to do for it.
        Raises   BadRequest: that cannot be. NoSpace: more than that is in use, or the pool has no room. Conflict:
                 writes would wait. And as VolumeSettings.change.
        """
        size = arguments.optional_number(args, "size", 0, SIZE_MAX)
        copies = arguments.optional_number(args, "copies", 1, COPIES_MAX)
        least = arguments.optional_number(args, "min_copies", 1, COPIES_MAX)
        if size is not None and 0 < size < SIZE_MIN:
            raise BadRequest(f"{format_size(size)} is too small: at least {format_size(SIZE_MIN)}, or 0")
        asked = {"size": size, "copies": copies, "min_copies": least}
        given = {name: number for name, number in asked.items() if number is not None}

        def changed(known: Settings) -> Settings:
            wanted = replace(known, **given)
            _check_copies(known, wanted)
            return wanted

        before = self._settings.facts
        await self._check(before, changed(before))

        def committed(known: Settings) -> Settings:
            wanted = changed(known)
            if size:
                self._bound(size)  # no await from here on: nobody takes more meanwhile
            return wanted

        facts = await self._settings.change(committed)
        lack, surplus = await self._lack(facts.copies)
        return {
            "size": facts.size,
            "copies": facts.copies,
            "min_copies": facts.min_copies,
            "used": self._used(),
            "to_copy": lack.copies * self._slab_size,
            "to_drop": surplus * self._slab_size,
        }

    async def _check(self, before: Settings, wanted: Settings) -> None:
        if wanted.copies > before.copies:
            await self._check_room(wanted.copies)
        if wanted.min_copies > before.min_copies:
            await self._check_in_sync(wanted.min_copies)

    def _used(self) -> int:
        return self._metadata.statfs().used_blocks * BLOCK_SIZE

    def _bound(self, size: int) -> None:
        used = self._used()
        if used > size // BLOCK_SIZE * BLOCK_SIZE:
            raise NoSpace(
                f"volume {self._settings.name} cannot be made {format_size(size)} ({size} bytes): its files use "
                f"{format_size(used)} ({used} bytes); delete {format_size(used - size)} first, or ask for more"
            )
        self._settings.bound_size(size)

    async def _check_in_sync(self, least: int) -> None:
        """Raises Conflict: writes to some slabs would wait."""
        slabs = fewer = 0
        for descriptor in self._changes.book.all():
            slabs += 1
            fewer += len(descriptor.in_sync) < least
            if slabs % SLABS_PER_TURN == 0:
                await trio.lowlevel.checkpoint()
        if fewer:
            raise Conflict(
                f"--min-copies {least}: {fewer} of {slabs} slabs of volume {self._settings.name} have fewer copies in "
                "sync now, and writes to them would wait; try again when csvfs job watch has ended"
            )

    async def _check_room(self, copies: int) -> None:
        """Raises NoSpace: too few fault domains, or too little room above the reserve."""
        await self._slabs.refresh_spaces()
        spaces = list(self._slabs.pool_spaces)
        domain_of = self._facts.domain_of
        free: Counter[str] = Counter()
        for space in spaces:
            free[domain_of(space.node)] += space.free_slots
        if len(free) < copies:
            down = [node for node in self._facts.drive_nodes() if self._facts.server(node) is None]
            raise NoSpace(
                f"{copies} copies need {copies} fault domains with drives in order, there are {len(free)} "
                f"({', '.join(sorted(free)) or 'none'}){'; down: ' + ', '.join(down) if down else ''}; add a node"
            )
        lack, _ = await self._lack(copies)
        drives = [DriveSlots(space.node, domain_of(space.node), space.slots) for space in spaces]
        reserve = reserve_slots(drives, copies)
        above = max(0, sum(free.values()) - reserve)
        nowhere = missing_slots(list(lack.groups.items()), free)
        if lack.copies > above or nowhere:
            place = f" and {nowhere} of them find no place in another fault domain," if nowhere else ""
            raise NoSpace(
                f"{copies} copies of volume {self._settings.name} need {self._text(lack.copies)} for "
                f"{lack.copies} more copies of slabs,{place} the pool has {self._text(above)} free above the reserve "
                f"of {self._text(reserve)} that repairs need; add drives, or delete files"
            )

    def _text(self, slots: int) -> str:
        return format_size(slots * self._slab_size)

    async def _lack(self, copies: int) -> tuple[Lack, int]:
        """What data slabs lack of so many copies, and how many copies they have too many."""
        lack, surplus = Lack(), 0
        for number, descriptor in enumerate(self._changes.book.all()):
            if number % SLABS_PER_TURN == 0:
                await trio.lowlevel.checkpoint()
            staying = [member for member in descriptor.members if self._facts.stays(member.drive)]
            domains = frozenset(self._facts.domain_of(member.node) for member in staying)
            missing = copies - len(domains)
            if missing > 0:
                lack.slabs += 1
                lack.copies += missing
                lack.groups[domains] += missing
            surplus += max(0, -missing)
        return lack, surplus


def _check_copies(known: Settings, wanted: Settings) -> None:
    """Raises BadRequest."""
    if wanted.copies == 1 and known.copies != 1:
        raise BadRequest("a mirror has 2 or 3 copies, not 1: it does not become a simple volume")
    if wanted.min_copies > wanted.copies:
        hint = "" if wanted.copies == known.copies else f"; give --min-copies {wanted.copies} or less with it"
        raise BadRequest(
            f"--min-copies {wanted.min_copies} of a volume with {wanted.copies} copies: "
            f"from 1 to {wanted.copies}{hint}"
        )
