"""`csvfs domain`: places of nodes by command and by file, as a tree, and what is refused."""

from pathlib import Path

import pytest

from tests.test_cli import Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """Four nodes with a drive each; nobody has said where they stand."""
    cluster = Cluster(tmp_path)
    assert cluster.run("cluster", "create", "test").exit_code == 0
    assert cluster.run("pool", "create", "--slab-size", "64M").exit_code == 0
    for name in ("n1", "n2", "n3", "n4"):
        cluster.add_node(name)
    return cluster


def place(cluster: Cluster, node: str) -> object:
    return cluster.value(f"nodes/{node}").get("place")


def load(cluster: Cluster, text: str, *options: str) -> list[str]:
    (path := cluster.path.with_name("domains.toml")).write_text(text)
    return ["domain", "load", str(path), *options]


TREE = """
[nodes.n1]
site = "dc1"
rack = "r1"
chassis = "c1"
[nodes.n2]
site = "dc1"
rack = "r1"
[nodes.n3]
rack = "r1"
[nodes.n4]
"""


def test_places_are_set_changed_and_taken_back_one_level_at_a_time(cluster):
    assert cluster.run("domain", "set", "n1", "--site", "dc1", "--rack", "r1").exit_code == 0
    assert place(cluster, "n1") == {"site": "dc1", "rack": "r1"}
    out = cluster.run("domain", "set", "n1", "--rack", "r2", "--chassis", "c1").stdout
    assert out == "node n1: site dc1, rack r2, chassis c1\n"
    cluster.run("domain", "set", "n1", "--rack", "", "--dry-run")
    assert place(cluster, "n1") == {"site": "dc1", "rack": "r2", "chassis": "c1"}
    for level in ("--site", "--rack", "--chassis"):
        assert cluster.run("domain", "set", "n1", level, "").exit_code == 0
    assert place(cluster, "n1") == {}, "that is said, too: node.toml does not count any more"
    assert cluster.value("nodes/n1")["address"] == "127.0.0.1"


def test_wrong_places_are_refused_by_name(cluster):
    assert "no node 'n9'; there are: n1, n2, n3, n4" in cluster.fails("domain", "set", "n9", "--rack", "r1")
    assert "rack 'a/b'" in cluster.fails("domain", "set", "n1", "--rack", "a/b")
    assert "--site, --rack, --chassis" in cluster.misused("domain", "set", "n1")


def test_a_file_says_where_all_nodes_stand_and_the_tree_shows_it(cluster):
    assert cluster.run(*load(cluster, TREE)).exit_code == 0
    assert place(cluster, "n1") == {"site": "dc1", "rack": "r1", "chassis": "c1"}
    lines = cluster.run("domain", "list").stdout.splitlines()
    assert [line.split("  up")[0] for line in lines] == [
        "node n4",
        "rack r1",
        "  node n3",
        "site dc1",
        "  rack r1",
        "    node n2",
        "    chassis c1",
        "      node n1",
    ]
    rows = {row["node"]: row for row in cluster.json("domain", "list")["nodes"]}
    assert (rows["n2"]["site"], rows["n2"]["rack"], rows["n2"]["chassis"]) == ("dc1", "r1", "")
    assert cluster.json("node", "list")[0]["place"] == {"site": "dc1", "rack": "r1", "chassis": "c1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[nodes.n1]\n", "nothing is said of n2, n3, n4"),
        (TREE + "[nodes.n5]\n", "no node 'n5'"),
        ("nodes = 3", "write [nodes.n1]"),
        (TREE + "[racks.r1]\n", "write [nodes.n1]"),
        (TREE + 'row = "7"\n', "nodes.n4: unknown name 'row'"),
        (TREE + "rack = 7\n", "nodes.n4: rack is not text"),
        (TREE + 'rack = "a b"\n', "nodes.n4: rack 'a b'"),
        ("[nodes", "is not TOML"),
    ],
)
def test_a_wrong_file_changes_nothing(cluster, text, message):
    assert message in cluster.fails(*load(cluster, text))
    assert [place(cluster, f"n{number}") for number in range(1, 5)] == [None] * 4


def test_what_volumes_need_is_listed_and_what_they_could_not_have_is_refused(cluster):
    cluster.add_volume("v", fault_domain="rack")
    listed = cluster.run("domain", "list").stdout
    assert "volume v: 3 copies, no two in one rack; there are 4 racks with drives\n" in listed
    two_racks = '[nodes.n1]\nrack="a"\n[nodes.n2]\nrack="a"\n[nodes.n3]\nrack="b"\n[nodes.n4]\nrack="b"\n'
    message = cluster.fails(*load(cluster, two_racks))
    assert "volume v keeps 3 copies in 3 racks, and there would be 2 with drives: nothing was changed" in message
    assert "--force" in message
    shown = cluster.run(*load(cluster, two_racks, "--dry-run")).stdout
    assert "would be refused without --force" in shown and place(cluster, "n1") is None

    assert cluster.run(*load(cluster, two_racks, "--force")).exit_code == 0
    assert place(cluster, "n4") == {"rack": "b"}
    assert "2 racks with drives: too few" in cluster.run("domain", "list").stdout
    assert cluster.json("domain", "list")["volumes"][0]["domains"] == ["rack a", "rack b"]
    row = cluster.json("volume", "list")[0]
    assert row["fault_domain"] == "rack" and "3 copies need 3 racks with drives, there are 2" in row["note"]


def test_a_volume_whose_slabs_nobody_can_count_is_not_guessed_about(cluster):
    cluster.add_volume("v", fault_domain="rack")
    message = cluster.fails("domain", "set", "n1", "--rack", "a")
    assert "volume v cannot be asked how many slabs would have to move" in message
    cluster.add_volume("v", state="creating", fault_domain="rack")
    answer = cluster.json("domain", "set", "n1", "--rack", "a")
    assert answer["changed"] and answer["nodes"] == {"n1": {"rack": "a"}}
    assert [(row["volume"], row["domains"], row["objection"]) for row in answer["volumes"]] == [("v", 4, "")]


def test_a_place_that_is_no_matter_to_any_volume_asks_nobody(cluster):
    cluster.add_volume("v")
    assert cluster.json("domain", "set", "n1", "--rack", "a")["volumes"] == []


def test_a_volumes_level_is_changed_alone_and_refused_where_there_are_too_few(cluster):
    cluster.add_volume("v", state="creating")
    assert cluster.run("volume", "set", "v", "--fault-domain", "rack").exit_code == 0, "each node is a rack so far"
    assert cluster.value("volumes/v")["fault_domain"] == "rack"
    for number in range(1, 5):
        cluster.run("domain", "set", f"n{number}", "--site", f"dc{number % 2}", "--force")
    message = cluster.fails("volume", "set", "v", "--fault-domain", "site")
    assert "volume v keeps 3 copies in 3 sites, and there would be 2 with drives" in message
    assert cluster.json("volume", "set", "v", "--fault-domain", "site", "--force")["effects"][0]["domains"] == 2
    assert cluster.value("volumes/v")["fault_domain"] == "site"
    assert "alone" in cluster.misused("volume", "set", "v", "--fault-domain", "rack", "--copies", "2")
    assert "no volume 'w'" in cluster.fails("volume", "set", "w", "--fault-domain", "rack")
