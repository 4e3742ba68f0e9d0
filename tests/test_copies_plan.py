"""What slabs need next when the number of copies wanted changes at any moment: redundancy never falls below the
smaller number, and drives stay equally full."""

from collections import Counter
from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from coordinator.repair_plan import Add, Remove, Standing, next_steps
from csvfs.block import slab_state
from csvfs.ids import Epoch, SlabId
from csvfs.wire.block_messages import ROLE_IN_SYNC, Member, SlabDescriptor
from tests.test_repair_plan import DRIVES, NODE_OF, STANDINGS, carry_out, counting, slabs

SLOTS = 60


@given(slabs(), STANDINGS, st.lists(st.tuples(st.integers(1, 3), st.integers(0, 6)), min_size=2, max_size=6))
def test_no_step_leaves_fewer_good_copies_than_the_smallest_number_that_was_wanted(
    descriptor, standings, wishes
):
    """`wishes`: (copies wanted, how many steps are done before somebody changes his mind)."""
    least = min(len(counting(descriptor, standings)), *(wanted for wanted, _ in wishes))
    for wanted, step_count in [*wishes, (wishes[-1][0], 40)]:
        for _ in range(step_count):
            steps = next_steps(descriptor, wanted, lambda member: standings[member.drive])
            after = carry_out(descriptor, steps, standings)
            if after is None:
                break
            had, has = counting(descriptor, standings), counting(after, standings)
            assert len(has) >= min(len(had), wanted), "a copy is given up only where that many stay"
            assert len(has) >= least
            descriptor = after
    assert not next_steps(descriptor, wishes[-1][0], lambda m: standings[m.drive]) or carry_out(
        descriptor, next_steps(descriptor, wishes[-1][0], lambda m: standings[m.drive]), standings
    ) is None, "it comes to an end"


@given(slabs(), STANDINGS, st.integers(1, 2))
def test_no_member_in_sync_is_given_up_while_others_are_still_to_come_in_sync(descriptor, standings, wanted):
    for step in next_steps(descriptor, wanted, lambda member: standings[member.drive]):
        if isinstance(step, Remove) and step.member.role == ROLE_IN_SYNC:
            others = [m for m in descriptor.in_sync if m.drive != step.member.drive]
            assert len({standings[m.drive].domain for m in others if standings[m.drive].serves}) >= wanted


@given(
    st.lists(st.integers(0, 20), min_size=4, max_size=8),
    st.integers(1, 30),
    st.randoms(use_true_random=False),
)
def test_dropping_a_copy_of_every_slab_takes_it_from_the_fullest_drives(ballast, count, rng: Random):
    """Three copies to two, on drives that other volumes fill unequally; then two to three again."""
    used = Counter(dict(zip(DRIVES, ballast, strict=False)))
    drives = DRIVES[: len(ballast)]
    placed: list[SlabDescriptor] = []
    for number in range(count):
        nodes = rng.sample(sorted({NODE_OF[drive] for drive in drives}), min(3, len({*map(NODE_OF.get, drives)})))
        members = tuple(
            Member(rng.choice([d for d in drives if NODE_OF[d] == node]), node, ROLE_IN_SYNC) for node in nodes
        )
        used.update(member.drive for member in members)
        placed.append(SlabDescriptor(SlabId(number + 1), Epoch(1), members))

    def standing_of(member: Member) -> Standing:
        return Standing(str(member.node), True, fullness=used[member.drive] / SLOTS)

    for index, descriptor in enumerate(placed):
        before = {m.drive: used[m.drive] for m in descriptor.members}
        wanted = len(descriptor.members) - 1
        (step,) = next_steps(descriptor, wanted, standing_of)
        assert isinstance(step, Remove)
        assert before[step.member.drive] == max(before.values()), "the fullest of those it lies on"
        placed[index] = slab_state.remove_member(descriptor, step.member.drive, needs=step.needs)
        used[step.member.drive] -= 1
        assert len({m.node for m in placed[index].members}) == wanted
        (more,) = next_steps(placed[index], wanted + 1, standing_of)
        assert isinstance(more, Add)
        assert more.taken == {str(m.node) for m in placed[index].members}


def test_of_two_copies_that_are_wanted_the_one_that_is_away_is_no_longer_waited_for():
    members = tuple(Member(DRIVES[n], NODE_OF[DRIVES[n]], ROLE_IN_SYNC) for n in (0, 2, 4))
    descriptor = slab_state.drop_members(SlabDescriptor(SlabId(1), Epoch(1), members), [DRIVES[4]])
    away = DRIVES[4]

    def standing_of(member: Member) -> Standing:
        standing = Standing(str(member.node), True)
        return replace(standing, serves=False) if member.drive == away else standing

    (step,) = next_steps(descriptor, 2, standing_of)
    assert isinstance(step, Remove) and step.member.drive == away
    assert step.needs == (DRIVES[0], DRIVES[2])
