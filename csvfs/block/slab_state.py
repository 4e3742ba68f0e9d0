"""Transitions of a slab descriptor: who is in sync, who joins, who is out, and the epoch of each change.

Place      block floor. Pure: descriptors in, descriptors out; whoever owns the descriptor commits the result
           (the coordinator: a row of its database for data slabs, a CAS in the cluster store for metadata).

Invariants
  I1  Every transition raises the epoch by one, two successive in-sync sets share a member, and no in-sync
      set is empty. `since` of a member out of sync never grows: a second outage starts from the first.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from csvfs.errors import Conflict, LastCopy
from csvfs.ids import DriveId, Epoch, NodeName, SlabId
from csvfs.wire.block_messages import ROLE_ABSENT, ROLE_IN_SYNC, ROLE_JOINING, Member, SlabDescriptor

EPOCH_FIRST = Epoch(1)
EPOCH_MAX = (1 << 32) - 1
SINCE_UNKNOWN = Epoch(0)  # a full copy


def new_slab(
    slab: SlabId,
    places: Sequence[tuple[DriveId, NodeName]],
    later: Sequence[tuple[DriveId, NodeName]] = (),
) -> SlabDescriptor:
    """A slab nobody has written to, at the first epoch: the members on `places` are in sync.

    later   members that are away: they get their copies, in full, when they are back.
    """
    assert places and len({drive for drive, _ in [*places, *later]}) == len(places) + len(later)
    members = [Member(drive, node, ROLE_IN_SYNC, SINCE_UNKNOWN) for drive, node in places]
    members += [Member(drive, node, ROLE_ABSENT, SINCE_UNKNOWN) for drive, node in later]
    return SlabDescriptor(slab, EPOCH_FIRST, tuple(members))


def bump(descriptor: SlabDescriptor) -> SlabDescriptor:
    """The same members at the next epoch: writes of the epoch before are refused once it is installed."""
    return _next(descriptor, descriptor.members)


def drop_members(descriptor: SlabDescriptor, drives: Collection[DriveId]) -> SlabDescriptor:
    """Take `drives` out of the slab's in-sync and joining sets.

    Returns  the descriptor itself when none of them was in: the report was late, and nothing changes.
    Raises   LastCopy: no in-sync member would be left; nothing of the request is done.
    """
    leaving = {member.drive for member in descriptor.writable if member.drive in drives}
    if not leaving:
        return descriptor
    if all(member.drive in leaving for member in descriptor.in_sync):
        names = ", ".join(f"{m.drive.hex()[:8]} on {m.node}" for m in descriptor.in_sync)
        raise LastCopy(
            f"slab {descriptor.slab} epoch {descriptor.epoch}: drives {names} hold its last in-sync copies; "
            "bring one of them back"
        )
    # The epoch that the commit of this change makes: what is written from it on is what the member misses.
    since = Epoch(descriptor.epoch + 1)
    members = tuple(
        _absent(member, since) if member.drive in leaving else member for member in descriptor.members
    )
    return _next(descriptor, members)


def begin_joining(descriptor: SlabDescriptor, drive: DriveId) -> SlabDescriptor:
    """An absent member takes writes from now on, while it is copied what it missed. Raises Conflict."""
    member = member_of(descriptor, drive, ROLE_ABSENT)
    return _with(descriptor, replace(member, role=ROLE_JOINING))


def complete_joining(descriptor: SlabDescriptor, drive: DriveId) -> SlabDescriptor:
    """A joining member that misses nothing becomes in sync (I7: nothing else makes it so). Raises
    Conflict."""
    member = member_of(descriptor, drive, ROLE_JOINING)
    return _with(descriptor, replace(member, role=ROLE_IN_SYNC, since=SINCE_UNKNOWN))


def add_member(descriptor: SlabDescriptor, drive: DriveId, node: NodeName) -> SlabDescriptor:
    """A drive that holds nothing of the slab becomes a further member and joins, by a full copy.

    Raises  Conflict when the drive is a member already.
    """
    if any(member.drive == drive for member in descriptor.members):
        raise Conflict(f"slab {descriptor.slab}: drive {drive.hex()[:8]} is a member already")
    joining = Member(drive, node, ROLE_JOINING, SINCE_UNKNOWN)
    return _next(descriptor, (*descriptor.members, joining))


def remove_member(
    descriptor: SlabDescriptor, drive: DriveId, *, needs: Collection[DriveId]
) -> SlabDescriptor:
    """A member leaves for good: its copy may be deleted once the result is installed on the others.

    Args    needs: drives that must be in sync for this to lose nothing; whoever decided counted on them.
    Returns the descriptor itself when the drive is no member any more.
    Raises  LastCopy: no in-sync member would be left. Conflict: one of `needs` is not in sync any more.
    """
    if all(member.drive != drive for member in descriptor.members):
        return descriptor
    staying = {member.drive for member in descriptor.in_sync} - {drive}
    if not staying:
        raise LastCopy(
            f"slab {descriptor.slab} epoch {descriptor.epoch}: drive {drive.hex()[:8]} holds its last in-sync copy"
        )
    lacking = set(needs) - staying
    if lacking:
        names = ", ".join(sorted(needed.hex()[:8] for needed in lacking))
        raise Conflict(f"slab {descriptor.slab} epoch {descriptor.epoch}: drives {names} are not in sync")
    return _next(descriptor, tuple(member for member in descriptor.members if member.drive != drive))


def forget_history(descriptor: SlabDescriptor, drive: DriveId) -> SlabDescriptor:
    """An absent member's content is not what we left there: it will be copied in full. Raises Conflict."""
    member = member_of(descriptor, drive, ROLE_ABSENT)
    return _with(descriptor, replace(member, since=SINCE_UNKNOWN))


def accept_loss(descriptor: SlabDescriptor, drive: DriveId, node: NodeName, epoch: Epoch) -> SlabDescriptor:
    """A human has given up the last in-sync copies: `drive` alone goes on, with a copy of `epoch`.

    All others have a history that is not ours any more: they are copied in full. The one exception to I1.
    """
    others = tuple(
        Member(m.drive, m.node, ROLE_ABSENT, SINCE_UNKNOWN) for m in descriptor.members if m.drive != drive
    )
    survivor = Member(drive, node, ROLE_IN_SYNC, SINCE_UNKNOWN)
    if len(others) == len(descriptor.members):
        others = others[:-1]  # on another drive than any before: as many copies as there were
    begun = Epoch(max(descriptor.epoch, epoch) + 1)
    return SlabDescriptor(descriptor.slab, begun, (survivor, *others), begun)


def accept_unflushed_loss(descriptor: SlabDescriptor) -> SlabDescriptor:
    """The one in-sync copy goes on though its drive may have lost what it had not flushed."""
    changed = bump(descriptor)
    return replace(changed, lost_epoch=changed.epoch)


def member_of(descriptor: SlabDescriptor, drive: DriveId, role: int) -> Member:
    """The member on `drive`. Raises Conflict when there is none, or it is in another role."""
    for member in descriptor.members:
        if member.drive == drive:
            if member.role == role:
                return member
            raise Conflict(
                f"slab {descriptor.slab} epoch {descriptor.epoch}: drive {drive.hex()[:8]} "
                f"has role {member.role}, not {role}"
            )
    raise Conflict(f"slab {descriptor.slab} epoch {descriptor.epoch}: no member on drive {drive.hex()[:8]}")


def _absent(member: Member, since: Epoch) -> Member:
    if member.role == ROLE_IN_SYNC:
        return replace(member, role=ROLE_ABSENT, since=since)
    return replace(
        member, role=ROLE_ABSENT
    )  # It was joining: what it missed since its first outage is still missed.


def _with(descriptor: SlabDescriptor, changed: Member) -> SlabDescriptor:
    members = tuple(changed if m.drive == changed.drive else m for m in descriptor.members)
    return _next(descriptor, members)


def _next(descriptor: SlabDescriptor, members: tuple[Member, ...]) -> SlabDescriptor:
    assert descriptor.epoch < EPOCH_MAX  # 4 billion changes of one slab: one a second for 136 years
    changed = replace(descriptor, epoch=Epoch(descriptor.epoch + 1), members=members)
    before = {member.drive for member in descriptor.in_sync}
    assert before & {member.drive for member in changed.in_sync}  # I1
    return changed
