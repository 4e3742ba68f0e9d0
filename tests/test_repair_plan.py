"""What a slab needs next: for every state of its drives, redundancy never falls and the plan comes to an
end."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from coordinator.rebalance import TOLERANCE, plan_moves
from coordinator.repair_plan import (
    AWAY_TOO_LONG,
    REMOVING,
    RETIRED,
    STAYS,
    UNKNOWN,
    Add,
    Join,
    Remove,
    Standing,
    Wait,
    blamed,
    next_steps,
)
from csvfs.block import slab_state
from csvfs.block.placement import DriveSpace
from csvfs.ids import DriveId, Epoch, NodeName, SlabId
from csvfs.wire.block_messages import ROLE_ABSENT, ROLE_IN_SYNC, ROLE_JOINING, Member, SlabDescriptor

DRIVES = [DriveId(bytes([number]) * 16) for number in range(8)]
NODE_OF = {drive: NodeName(f"n{number // 2}") for number, drive in enumerate(DRIVES)}

STANDINGS = st.fixed_dictionaries(
    {
        drive: st.builds(
            Standing,
            st.just(NODE_OF[drive]),
            st.booleans(),
            st.sampled_from([STAYS, STAYS, STAYS, AWAY_TOO_LONG, RETIRED, REMOVING, UNKNOWN]),
            st.floats(0, 1),
        )
        for drive in DRIVES
    }
)


@st.composite
def slabs(draw: st.DrawFn) -> SlabDescriptor:
    drives = draw(st.lists(st.sampled_from(DRIVES), min_size=1, max_size=6, unique=True))
    roles = draw(
        st.lists(
            st.sampled_from([ROLE_ABSENT, ROLE_IN_SYNC, ROLE_IN_SYNC, ROLE_JOINING]),
            min_size=len(drives),
            max_size=len(drives),
        )
    )
    roles[0] = ROLE_IN_SYNC  # I1: there always is one
    members = (Member(drive, NODE_OF[drive], role) for drive, role in zip(drives, roles, strict=True))
    return SlabDescriptor(SlabId(1), Epoch(9), tuple(members))


def counting(descriptor: SlabDescriptor, standings: dict[DriveId, Standing]) -> set[str]:
    """Fault domains with an in-sync copy that serves."""
    return {standings[m.drive].domain for m in descriptor.in_sync if standings[m.drive].serves}


@given(slabs(), STANDINGS, st.integers(1, 3))
def test_a_slab_becomes_whole_step_by_step_and_no_step_lowers_its_redundancy(descriptor, standings, wanted):
    """All that is asked for succeeds here: then the plan ends, with as many copies as the domains allow."""
    for _ in range(40):
        steps = next_steps(descriptor, wanted, lambda member: standings[member.drive])
        if not steps:
            break
        after = carry_out(descriptor, steps, standings)
        if after is None:
            break
        had, has = counting(descriptor, standings), counting(after, standings)
        assert len(has) >= min(len(had), wanted)
        assert {m.drive for m in descriptor.in_sync} & {m.drive for m in after.in_sync}, "I1"
        descriptor = after
    else:
        raise AssertionError(f"no end: {descriptor}")
    if not steps:
        drives = [standings[member.drive] for member in descriptor.members]
        assert len(descriptor.members) == wanted == len({standing.domain for standing in drives})
        assert all(standing.serves and not standing.leaving for standing in drives)
    kind, drive, _ = blamed(descriptor, lambda member: standings[member.drive])
    assert kind in ("repair", "evacuate") and (drive is None or drive in DRIVES)


def carry_out(descriptor, steps, standings):
    """The first step that can be done; None: all wait."""
    for step in steps:
        if isinstance(step, Remove):
            return slab_state.remove_member(descriptor, step.member.drive, needs=step.needs)
        if isinstance(step, Join):
            drive = step.member.drive
            assert standings[drive].serves
            if step.member.role == ROLE_ABSENT:
                descriptor = slab_state.begin_joining(descriptor, drive)
            return slab_state.complete_joining(descriptor, drive)
        if isinstance(step, Add):
            for drive, standing in standings.items():
                may = standing.serves and not standing.leaving and drive not in step.drives
                if may and standing.domain not in step.taken:
                    return slab_state.add_member(descriptor, drive, NODE_OF[drive])
        if isinstance(step, Wait):
            assert step.reason
    return None


@given(slabs(), STANDINGS, st.integers(1, 3))
def test_a_copy_that_is_given_up_is_never_among_those_that_count(descriptor, standings, wanted):
    for step in next_steps(descriptor, wanted, lambda member: standings[member.drive]):
        if isinstance(step, Remove):
            assert step.member.drive not in step.needs and len(step.needs) == wanted
            kept = [standings[drive] for drive in step.needs]
            assert all(standing.serves and standing.leaving == STAYS for standing in kept)
            assert len({standing.domain for standing in kept}) == wanted
        if isinstance(step, Add):
            assert not any(
                standings[m.drive].domain not in step.taken and not standings[m.drive].leaving
                for m in descriptor.members
            ), "a member that stays takes its domain"


def test_a_drive_that_is_away_for_a_moment_is_waited_for():
    standings = {d: Standing(NODE_OF[d], True) for d in DRIVES}
    standings[DRIVES[4]] = Standing(NODE_OF[DRIVES[4]], False, lost_in_s=840)
    members = [Member(DRIVES[n], NODE_OF[DRIVES[n]], ROLE_IN_SYNC) for n in (0, 2)]
    away = Member(DRIVES[4], NODE_OF[DRIVES[4]], ROLE_ABSENT, Epoch(3))
    descriptor = SlabDescriptor(SlabId(1), Epoch(3), (*members, away))
    (step,) = next_steps(descriptor, 3, lambda member: standings[member.drive])
    assert step == Wait("drive 04040404 on n2 to come back; rebuilt elsewhere in 840 s")
    standings[DRIVES[4]] = replace(standings[DRIVES[4]], leaving=AWAY_TOO_LONG)
    (step,) = next_steps(descriptor, 3, lambda member: standings[member.drive])
    assert step == Add(frozenset({"n0", "n1"}), frozenset({DRIVES[0], DRIVES[2], DRIVES[4]}))


# -- rebalance -----------------------------------------------------------------------------------------

POOLS = st.lists(st.tuples(st.integers(4, 60), st.integers(0, 3)), min_size=1, max_size=6)


@given(POOLS, st.integers(1, 3), st.integers(0, 40), st.randoms(use_true_random=False))
def test_moves_level_the_drives_and_never_put_two_copies_in_one_domain(pool, copies, count, rng):
    nodes = {DRIVES[i]: NodeName(f"n{node}") for i, (_, node) in enumerate(pool)}
    slots = {DRIVES[i]: size for i, (size, _) in enumerate(pool)}
    used = dict.fromkeys(slots, 0)
    placed: dict[SlabId, list[DriveId]] = {}
    for number in range(count):
        drives = [d for d in slots if used[d] < slots[d]]
        rng.shuffle(drives)
        chosen = list({nodes[drive]: drive for drive in drives}.values())[:copies]
        if len(chosen) == copies:
            placed[SlabId(number)] = chosen
            for drive in chosen:
                used[drive] += 1
    spaces = [DriveSpace(d, nodes[d], slots[d] - used[d], slots[d]) for d in slots]
    slabs = [
        SlabDescriptor(slab, Epoch(1), tuple(Member(d, nodes[d], ROLE_IN_SYNC) for d in drives))
        for slab, drives in placed.items()
    ]
    moves = plan_moves(spaces, slabs, str, 1000)

    def spread() -> float:
        return max(used[d] / slots[d] for d in slots) - min(used[d] / slots[d] for d in slots)

    before = spread()
    for move in moves:
        drives = placed[move.slab]
        assert move.source in drives and move.target not in drives
        drives[drives.index(move.source)] = move.target
        used[move.source] -= 1
        used[move.target] += 1
        assert used[move.target] <= slots[move.target]
    assert spread() <= before + 1e-9
    assert all(len({nodes[d] for d in drives}) == copies for drives in placed.values())
    assert len({move.slab for move in moves}) == len(moves)


def test_an_empty_drive_beside_full_ones_is_filled_until_all_are_within_tolerance():
    nodes = {DRIVES[n]: NodeName(f"n{n}") for n in range(4)}
    used = {DRIVES[0]: 60, DRIVES[1]: 60, DRIVES[2]: 60, DRIVES[3]: 0}
    slabs = [
        SlabDescriptor(
            SlabId(number),
            Epoch(1),
            tuple(Member(DRIVES[n], nodes[DRIVES[n]], ROLE_IN_SYNC) for n in range(3)),
        )
        for number in range(60)
    ]
    spaces = [DriveSpace(d, nodes[d], 100 - used[d], 100) for d in used]
    for move in plan_moves(spaces, slabs, str, 1000):
        used[move.source] -= 1
        used[move.target] += 1
    assert max(used.values()) - min(used.values()) <= 100 * TOLERANCE
    assert plan_moves(spaces[:3], slabs, str, 1000) == [], "level already"


def test_levelling_ends_also_where_one_slab_is_more_than_the_tolerance_of_a_drive():
    """A slab that went to and fro between two small drives was a job without an end."""
    nodes = {DRIVES[0]: NodeName("n0"), DRIVES[1]: NodeName("n0"), DRIVES[2]: NodeName("n1")}
    slots = {DRIVES[0]: 15, DRIVES[1]: 15, DRIVES[2]: 8}
    assert TOLERANCE < 1 / 15
    place = [DRIVES[0]] * 7
    for _ in range(20):
        used = {drive: place.count(drive) for drive in slots}
        spaces = [DriveSpace(d, nodes[d], slots[d] - used[d], slots[d]) for d in slots]
        slabs = [
            SlabDescriptor(SlabId(n), Epoch(1), (Member(d, nodes[d], ROLE_IN_SYNC),)) for n, d in enumerate(place)
        ]
        moves = plan_moves(spaces, slabs, str, 64)
        if not moves:
            break
        for move in moves:
            place[move.slab] = move.target
    assert not moves
    assert place.count(DRIVES[0]) <= 4
