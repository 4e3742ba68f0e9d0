"""Slab descriptors: every path through the transitions keeps I1."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfs.block import slab_state
from csvfs.errors import Conflict, CsvfsError, LastCopy
from csvfs.ids import DriveId, Epoch, NodeName, SlabId
from csvfs.wire.block_messages import ROLE_ABSENT, ROLE_IN_SYNC, ROLE_JOINING, SlabDescriptor

DRIVES = [DriveId(bytes([index]) * 16) for index in range(1, 6)]


def three_copies() -> SlabDescriptor:
    places = [(DRIVES[index], NodeName(f"n{index + 1}")) for index in range(3)]
    return slab_state.new_slab(SlabId(7), places)


STEP = st.tuples(
    st.sampled_from(["drop", "begin", "complete", "add", "remove", "bump", "forget"]),
    st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True),
)


def take(descriptor: SlabDescriptor, step: tuple[str, list[int]]) -> SlabDescriptor:
    what, picks = step
    drives = [DRIVES[pick] for pick in picks]
    match what:
        case "drop":
            return slab_state.drop_members(descriptor, drives)
        case "begin":
            return slab_state.begin_joining(descriptor, drives[0])
        case "complete":
            return slab_state.complete_joining(descriptor, drives[0])
        case "add":
            return slab_state.add_member(descriptor, drives[0], NodeName("n9"))
        case "remove":
            return slab_state.remove_member(descriptor, drives[0], needs=drives[1:])
        case "forget":
            return slab_state.forget_history(descriptor, drives[0])
    return slab_state.bump(descriptor)


@given(st.lists(STEP, max_size=40))
def test_I1_epochs_grow_and_successive_in_sync_sets_share_a_member(steps):
    descriptor = three_copies()
    since_first: dict[bytes, int] = {}
    for step in steps:
        try:
            after = take(descriptor, step)
        except CsvfsError:
            continue
        if after is not descriptor:
            assert after.epoch == descriptor.epoch + 1
        before_in_sync = {member.drive for member in descriptor.in_sync}
        after_in_sync = {member.drive for member in after.in_sync}
        assert before_in_sync & after_in_sync
        joining = {member.drive for member in descriptor.members if member.role == ROLE_JOINING}
        assert after_in_sync <= before_in_sync | joining, "only a joining member may become in sync (I7)"
        assert len({member.drive for member in after.members}) == len(after.members)
        before_members = {member.drive for member in descriptor.members}
        for member in after.members:
            if member.drive not in before_members:
                since_first.pop(member.drive, None)
                assert (member.role, member.since) == (ROLE_JOINING, 0), "a new member misses everything"
        for member in after.members:
            if member.role == ROLE_IN_SYNC:
                since_first.pop(member.drive, None)
            else:
                assert member.since <= since_first.setdefault(member.drive, member.since)
        descriptor = after


def test_a_dropped_member_remembers_the_epoch_that_took_it_out():
    dropped = slab_state.drop_members(three_copies(), [DRIVES[1]])
    assert dropped.epoch == 2
    assert dropped.members[1].role == ROLE_ABSENT
    assert dropped.members[1].since == Epoch(2)


def test_a_member_that_fails_while_joining_keeps_the_epoch_of_its_first_outage():
    descriptor = slab_state.drop_members(three_copies(), [DRIVES[1]])
    descriptor = slab_state.begin_joining(slab_state.bump(descriptor), DRIVES[1])
    descriptor = slab_state.drop_members(descriptor, [DRIVES[1]])
    assert descriptor.members[1].since == Epoch(2)


def test_I1_the_last_in_sync_copy_is_never_dropped():
    descriptor = slab_state.drop_members(three_copies(), DRIVES[:2])
    descriptor = slab_state.begin_joining(descriptor, DRIVES[0])
    with pytest.raises(LastCopy, match="slab 7 epoch 3"):
        slab_state.drop_members(descriptor, [DRIVES[2]])
    with pytest.raises(LastCopy):
        slab_state.drop_members(three_copies(), DRIVES)


def test_a_late_report_changes_nothing():
    descriptor = slab_state.drop_members(three_copies(), [DRIVES[0]])
    assert slab_state.drop_members(descriptor, [DRIVES[0], DRIVES[4]]) is descriptor


def test_a_new_drive_joins_by_a_full_copy_and_only_then_may_the_old_one_leave():
    descriptor = slab_state.add_member(three_copies(), DRIVES[3], NodeName("n4"))
    assert (descriptor.members[3].role, descriptor.members[3].since) == (ROLE_JOINING, 0)
    needs = [DRIVES[1], DRIVES[2], DRIVES[3]]
    with pytest.raises(Conflict, match="not in sync"):
        slab_state.remove_member(descriptor, DRIVES[0], needs=needs)
    with pytest.raises(Conflict, match="already"):
        slab_state.add_member(descriptor, DRIVES[3], NodeName("n4"))
    descriptor = slab_state.complete_joining(descriptor, DRIVES[3])
    descriptor = slab_state.remove_member(descriptor, DRIVES[0], needs=needs)
    assert [member.drive for member in descriptor.members] == DRIVES[1:4]
    assert slab_state.remove_member(descriptor, DRIVES[0], needs=needs) is descriptor, "a late try"


def test_I1_the_last_in_sync_copy_is_never_removed():
    descriptor = slab_state.drop_members(three_copies(), DRIVES[:2])
    with pytest.raises(LastCopy):
        slab_state.remove_member(descriptor, DRIVES[2], needs=[])
    assert len(slab_state.remove_member(descriptor, DRIVES[0], needs=[]).members) == 2
