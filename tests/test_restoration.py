"""What becomes of copies whose drive server has started anew: judged for every combination (I1)."""

from itertools import product

from coordinator.restoration import Judgement, judge
from csvfs.block.slab_state import drop_members
from csvfs.ids import DriveId, Epoch, NodeName, SlabId
from csvfs.wire.block_messages import ROLE_ABSENT, ROLE_IN_SYNC, ROLE_JOINING, Member, SlabDescriptor

DRIVES = [DriveId(bytes([number]) * 16) for number in range(3)]
STATES = ("serving", "returned", "unreachable")


def test_I1_a_copy_that_lost_power_is_not_preferred_to_one_that_kept_all_it_acknowledged() -> None:
    members = tuple(
        Member(drive, NodeName(f"n{index}"), ROLE_IN_SYNC) for index, drive in enumerate(DRIVES)
    )
    descriptor = SlabDescriptor(SlabId(1), Epoch(5), members)
    first, second, third = DRIVES
    # Two are back, the first without what it had not flushed: the second goes on.
    assert judge(descriptor, (), (first, second), (first,)).kept == second
    # Only copies that lost power are back, and one is away that may have kept everything: wait for it ...
    assert judge(descriptor, (), (first, second), (first, second), patience_over=False) == Judgement()
    # ... but not for ever, and not when all are back: what was flushed is on each of them.
    assert judge(descriptor, (), (first, second), (first, second), patience_over=True).kept == first
    assert judge(descriptor, (), DRIVES, DRIVES, patience_over=False).kept == first
    # One that is in service has all, whatever the others lost.
    assert judge(descriptor, (third,), (first, second), (first, second)).drops == {first, second}


def test_I1_judgements_keep_a_member_that_counts_and_prefer_those_in_service():
    for roles in product((ROLE_ABSENT, ROLE_IN_SYNC, ROLE_JOINING), repeat=3):
        if ROLE_IN_SYNC not in roles:
            continue
        members = tuple(
            Member(drive, NodeName(f"n{index}"), role)
            for index, (drive, role) in enumerate(zip(DRIVES, roles, strict=True))
        )
        descriptor = SlabDescriptor(SlabId(1), Epoch(5), members)
        for states in product(STATES, repeat=3):
            serving = {drive for drive, state in zip(DRIVES, states, strict=True) if state == "serving"}
            returned = {drive for drive, state in zip(DRIVES, states, strict=True) if state == "returned"}
            judgement = judge(descriptor, serving, returned)
            in_sync = {member.drive for member in descriptor.in_sync}
            after = drop_members(descriptor, judgement.drops)  # never raises LastCopy
            left = {member.drive for member in after.in_sync}
            if in_sync & serving:
                assert left == in_sync & serving and judgement.kept is None
            elif in_sync & returned:
                assert left == {judgement.kept} <= in_sync & returned
            else:
                assert judgement == Judgement()
            if judgement != Judgement():
                assert {member.drive for member in after.writable} <= serving | {judgement.kept}
