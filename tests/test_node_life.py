"""What speaks against switching a node off, and what a drain waits for: pure."""

from csvfs.admin.cluster_view import ClusterView, Record
from csvfs.admin.node_life import Drain, VolumeWithout, node_state, objections, space_objection


def cluster(*, up=("n1", "n2", "n3"), down=(), maintenance=()):
    view = ClusterView()
    for name in (*up, *down):
        view.nodes[name] = Record(f"nodes/{name}", {}, 1)
        view.drives[f"drive-of-{name}"] = Record(f"drives/{name}", {"node": name}, 1)
    for name in up:
        view.alive[name] = Record(f"alive/{name}", {}, 1)
    for name in maintenance:
        view.maintenance[name] = Record(f"maintenance/{name}", {"state": "paused"}, 1)
    return view


def test_a_node_whose_slabs_are_all_in_sync_elsewhere_may_go():
    assert objections(cluster(), "n2", [VolumeWithout("V", slabs=40, stuck=0, joining=0)]) == []


def test_a_node_with_the_only_copy_of_something_may_not_go_and_the_numbers_are_said():
    (line,) = objections(cluster(), "n2", [VolumeWithout("V", slabs=40, stuck=3, joining=1)])
    assert "volume V: 2 of its slabs" in line and "without node n2" in line


def test_copies_that_are_on_their_way_are_waited_for_and_no_objection():
    without = VolumeWithout("V", slabs=40, stuck=3, joining=3)
    assert objections(cluster(), "n2", [without]) == []
    assert Drain([], [without]).waits_for() == ["3 slabs of volume V to be in sync elsewhere"]


def test_no_second_node_goes_while_one_is_in_maintenance_or_down():
    (line,) = objections(cluster(maintenance=["n3"]), "n2", [])
    assert line.startswith("node n3 is paused already")
    (line,) = objections(cluster(up=("n1", "n2"), down=("n3",)), "n2", [])
    assert line.startswith("node n3 is down")


def test_no_node_goes_while_a_drive_of_another_one_is_being_emptied():
    view = cluster()
    view.drives["ab"] = Record("drives/ab", {"node": "n1", "usage": "removing"}, 1)
    (line,) = objections(view, "n2", [])
    assert line.startswith("drive ab of node n1 is being emptied")
    assert objections(view, "n1", []) == []


def test_no_node_goes_when_what_the_others_have_free_is_kept_for_repairs():
    view = cluster(up=("n1", "n2", "n3", "n4"))
    for index in range(8):
        node = f"n{index // 2 + 1}"
        view.drives[f"d{index}"] = Record(f"drives/d{index}", {"node": node, "slots": 100}, 1)
    view.drives = {name: drive for name, drive in view.drives.items() if name.startswith("d") and drive.number("slots")}
    view.volumes["V"] = Record("volumes/V", {"copies": 3}, 1)
    view.pool = Record("pool", {"slab_size": 64 << 20}, 1)
    free = {"n1": 60, "n2": 60, "n3": 80, "n4": 200}
    assert space_objection(view, "n1", free) == ""
    line = space_objection(view, "n4", free)  # 200 of 800 are kept
    assert "12.5 GiB free and keeps 12.5 GiB for repairs" in line
    assert space_objection(view, "n9", free) == ""  # it has no drives
    view.volumes.clear()
    assert space_objection(view, "n4", free) == ""


def test_the_last_node_that_serves_may_not_go():
    assert "nobody would serve" in objections(cluster(up=("n1",), down=("n2",)), "n1", [])[0]


def test_a_volume_that_cannot_be_asked_is_an_objection_and_is_waited_for():
    silent = VolumeWithout("V", 0, 0, 0, error="volume V has no coordinator at the moment")
    assert objections(cluster(), "n2", [silent]) == [
        "volume V cannot be asked: volume V has no coordinator at the moment"
    ]
    assert "no coordinator" in Drain([], [silent]).waits_for()[0]


def test_a_drain_waits_for_slabs_that_are_being_created_since_they_may_come_onto_the_node():
    assert Drain([], [VolumeWithout("V", 4, 0, 0, creating=2)]).waits_for() == ["2 slabs of volume V to be created"]


def test_a_drain_waits_for_volumes_to_be_coordinated_elsewhere():
    assert Drain(["V"]).waits_for() == ["volume V to be coordinated elsewhere"]


def test_a_paused_node_is_called_so_whether_it_is_on_or_off():
    assert node_state(cluster(maintenance=["n3"]), "n3") == "paused"
    assert node_state(cluster(up=("n1",), down=("n3",), maintenance=["n3"]), "n3") == "paused"
    assert [node_state(cluster(up=("n1",), down=("n2",)), name) for name in ("n1", "n2")] == ["up", "down"]
