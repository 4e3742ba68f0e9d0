"""How long a drive may be away: while somebody is at it, for ever."""

from coordinator.cluster_facts import ClusterFacts
from coordinator.drive_watch import DriveWatch
from coordinator.repair_plan import AWAY_TOO_LONG, STAYS
from csvfs.cluster.membership import View
from csvfs.ids import DriveId, NodeName
from csvfs.wire.block_messages import ROLE_IN_SYNC, Member

DRIVE = DriveId(b"d" * 16)
MEMBER = Member(DRIVE, NodeName("n1"), ROLE_IN_SYNC)
RETIRE_AFTER_S = 900.0


def watch_of(view: View) -> DriveWatch:
    """Of a pool whose one drive is away."""
    return DriveWatch(ClusterFacts(view), list, RETIRE_AFTER_S)


def view_with(usage: str) -> View:
    view = View()
    view.drives[DRIVE] = {"node": "n1", "usage": usage}
    return view


def test_a_drive_in_maintenance_is_never_counted_as_lost_and_takes_no_new_slabs() -> None:
    view = view_with("maintenance")
    watch = watch_of(view)
    for now_s in (0.0, 1_000.0, 100_000.0):
        watch.update(now_s)
        assert watch.standing(MEMBER).leaving == STAYS
    assert watch.away_ms() == {DRIVE: 0}
    assert not ClusterFacts(view).takes_slabs(DRIVE)


def test_when_it_is_over_the_time_away_counts_from_then_on() -> None:
    view = view_with("maintenance")
    watch = watch_of(view)
    watch.update(0.0)
    watch.update(5_000.0)
    view.drives[DRIVE] = {"node": "n1", "usage": "auto"}
    watch.update(5_000.0 + RETIRE_AFTER_S - 1)
    assert watch.standing(MEMBER).leaving == STAYS
    watch.update(5_000.0 + RETIRE_AFTER_S)
    assert watch.standing(MEMBER).leaving == AWAY_TOO_LONG
