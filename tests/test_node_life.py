"""What speaks against switching a node off, and what a drain waits for: pure."""

from csvfs.admin.cluster_view import ClusterView, Record
from csvfs.admin.node_life import Drain, VolumeWithout, node_state, objections


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
