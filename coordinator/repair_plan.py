"""Repair plan: what one slab needs next, as a function of its descriptor and of how its drives stand.

Place      coordinator floor. Pure: no I/O, clock or trio. repair.py carries out what is said here.
Rules      A copy *counts* when it is in sync, on a drive that serves and is to stay, and the only one counted
           of its fault domain. A slab is whole when as many copies count as are wanted.
           A member leaves only when the slab is whole without it; so a copy is made before one is given up,
           and redundancy never falls because of a move.
           A member that is away is waited for: it comes back by a resync, which is cheaper than a new copy.
           Once its drive is lost (away too long), retired or removing, a copy is made elsewhere; should the
           drive come back before that is done, whichever copy is in sync first is kept.
           Two copies in one fault domain (the domains were changed): one is made elsewhere, then one leaves.
"""

from collections.abc import Callable
from dataclasses import dataclass

from csvfs.ids import DriveId, NodeName
from csvfs.wire.block_messages import ROLE_ABSENT, ROLE_IN_SYNC, ROLE_JOINING, Member, SlabDescriptor

STAYS, AWAY_TOO_LONG, RETIRED, REMOVING, UNKNOWN = "", "away", "retired", "removing", "unknown"


@dataclass(slots=True, frozen=True)
class Standing:
    """How a drive stands. `leaving`: STAYS, or why its copies shall be elsewhere."""

    domain: str
    serves: bool  # its drive server is up and has it in order
    leaving: str = STAYS
    fullness: float = 0.0  # 0.0 to 1.0
    lost_in_s: float | None = None  # while it is away: until it is counted as lost

    @property
    def is_wished_away(self) -> bool:
        """Whether an administrator wants its copies elsewhere."""
        return self.leaving in (RETIRED, REMOVING)


StandingOf = Callable[[Member], Standing]


@dataclass(slots=True, frozen=True)
class Remove:
    """Take a member out and delete its copy: the slab is whole by `needs` alone."""

    member: Member
    needs: tuple[DriveId, ...]


@dataclass(slots=True, frozen=True)
class Add:
    """Make a copy on a further drive, none of `drives`, in a fault domain that is none of `taken`."""

    taken: frozenset[str]
    drives: frozenset[DriveId]


@dataclass(slots=True, frozen=True)
class Join:
    """Bring a member that is there in sync: a resync does that."""

    member: Member


@dataclass(slots=True, frozen=True)
class Wait:
    """Nothing can be done before `reason` has come about. `is_last`: the last copies are away."""

    reason: str
    is_last: bool = False


Step = Remove | Add | Join | Wait


def next_steps(descriptor: SlabDescriptor, wanted: int, standing_of: StandingOf) -> list[Step]:
    """What to do next, best first: where the first cannot be done now, the second may. Empty: it is whole."""
    keepers = _keepers(descriptor, standing_of)
    good = [m for m in keepers if m.role == ROLE_IN_SYNC and standing_of(m).serves]
    if len(good) >= wanted:
        return _surplus(descriptor, good[:wanted], standing_of)
    steps: list[Step] = []
    if not any(standing_of(member).serves for member in descriptor.in_sync):
        names = ", ".join(f"drive {m.drive.hex()[:8]} on {m.node}" for m in descriptor.in_sync)
        return [Wait(f"{names} to come back: the last copies are there", is_last=True)]
    if len(keepers) < wanted:
        taken = frozenset(standing_of(member).domain for member in keepers)
        steps.append(Add(taken, frozenset(member.drive for member in descriptor.members)))
    steps += [Join(m) for m in keepers if m.role != ROLE_IN_SYNC and standing_of(m).serves]
    if not steps:
        away = [member for member in keepers if not standing_of(member).serves]
        steps.append(Wait("; ".join(_away(member, standing_of(member)) for member in away)))
    return steps


def _keepers(descriptor: SlabDescriptor, standing_of: StandingOf) -> list[Member]:
    """The best member of each fault domain among those that stay, best first."""

    def rank(member: Member) -> tuple[bool, bool, bool, float, bytes]:
        standing = standing_of(member)
        in_sync = member.role == ROLE_IN_SYNC
        return (
            not (in_sync and standing.serves),
            not standing.serves,
            member.role == ROLE_ABSENT,
            standing.fullness,
            member.drive,
        )

    found: dict[str, Member] = {}
    for member in sorted(descriptor.members, key=rank):
        if standing_of(member).leaving == STAYS:
            found.setdefault(standing_of(member).domain, member)
    return list(found.values())


def _surplus(descriptor: SlabDescriptor, kept: list[Member], standing_of: StandingOf) -> list[Step]:
    """Members that a whole slab does not need; one that joins for a reason of its own may finish first."""
    needs = tuple(member.drive for member in kept)
    others = [member for member in descriptor.members if member.drive not in needs]
    joining = [m for m in others if m.role == ROLE_JOINING and _may_join(standing_of(m))]
    removable = [member for member in others if member not in joining]
    # The least useful first: copies that miss something, then those on drives that are to be emptied.
    removable.sort(key=lambda m: (m.role == ROLE_IN_SYNC, standing_of(m).leaving == STAYS, m.drive))
    steps: list[Step] = [Remove(member, needs) for member in removable[:1]]
    return steps or [Join(member) for member in joining]


def _may_join(standing: Standing) -> bool:
    return standing.serves and standing.leaving == STAYS


def _away(member: Member, standing: Standing) -> str:
    text = f"drive {member.drive.hex()[:8]} on {member.node} to come back"
    return text if standing.lost_in_s is None else f"{text}; rebuilt elsewhere in {standing.lost_in_s:.0f} s"


def blamed(
    descriptor: SlabDescriptor, standing_of: StandingOf
) -> tuple[str, DriveId | None, NodeName | None]:
    """(kind of job, drive, node) that a slab's work is counted under."""
    for member in descriptor.members:
        if standing_of(member).is_wished_away:
            return "evacuate", member.drive, member.node
    for member in descriptor.members:
        if standing_of(member).leaving or not standing_of(member).serves:
            return "repair", member.drive, member.node
    for member in descriptor.members:
        if member.role != ROLE_IN_SYNC:
            return "repair", member.drive, member.node
    return "repair", None, None
