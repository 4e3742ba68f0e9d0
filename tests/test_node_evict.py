"""Evicting a node: what speaks against it, and what is gone afterwards."""

from pathlib import Path

import pytest
import trio

from csvfs.admin import node_evict
from csvfs.admin.cluster_view import ClusterView, Record
from csvfs.admin.evicted_watch import Evicted, raise_when_evicted
from csvfs.admin.node_evict import evict, objections
from csvfs.admin.node_life import VolumeWithout
from csvfs.admin.peers import Peers, open_peers
from csvfs.cluster.membership import View, keep_view_forever
from csvfs.config import load_config
from csvfs.errors import Conflict, TimedOut
from csvfs.store.embedded import EmbeddedStore
from csvfs.store.interface import Put
from csvfs.units import GIB
from csvfs.wire.control import pack_value
from tests.test_cli import Cluster

PATIENCE_S = 60


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """n1, where the commands run, n2 that is up, n3 that is down; each with a drive."""
    cluster = Cluster(tmp_path)
    cluster.run("cluster", "create", "Tower")
    cluster.add_node("n1")
    cluster.add_node("n2")
    cluster.add_node("n3", alive=False)
    return cluster


def view_of(*up: str) -> ClusterView:
    view = ClusterView()
    for node in up:
        view.nodes[node] = view.alive[node] = Record(f"nodes/{node}", {}, 1)
    return view


def test_a_node_with_copies_that_nobody_else_has_is_evicted_only_by_somebody_who_insists() -> None:
    against = objections(view_of("n1", "n2"), "n2", [VolumeWithout("V", 9, stuck=4, joining=4)], "")
    assert against.final == [] and "4 of its slabs have too few copies" in against.losses[0]
    silent = VolumeWithout("V", 0, 0, 0, error="no coordinator")
    assert "cannot be asked" in objections(view_of("n1"), "n2", [silent], "").losses[0]
    assert objections(view_of("n1"), "n2", [VolumeWithout("V", 9, 0, 0)], "").losses == []


def test_the_last_node_that_is_up_and_a_member_the_store_needs_are_evicted_by_nobody() -> None:
    assert "no other node is up" in objections(view_of("n2"), "n2", [], "").final[0]
    assert objections(view_of("n1", "n2"), "n2", [], "without node n2 the store ...").final


def test_a_node_that_is_down_goes_with_its_drives_and_may_not_come_back(cluster: Cluster) -> None:
    cluster.put("standing/n3", running=True, departures=[])
    cluster.put("certificates/n3", serial="ab12", certificate="")
    cluster.put("incarnations/n3", last=7)
    assert "csvfs job watch" in cluster.run("node", "evict", "n3").stdout
    assert [row["name"] for row in cluster.json("node", "list")] == ["n1", "n2"]
    assert {drive["node"] for drive in cluster.json("drive", "list")} == {"n1", "n2"}
    assert cluster.value("revoked/ab12")["node"] == "n3"
    assert cluster.value("evicted/n3")["when"] > 0
    assert cluster.value("certificates/n3") is None and cluster.value("standing/n3") is None
    assert cluster.value("incarnations/n3") == {"last": 7}  # fenced numbers must not come back
    assert cluster.run("node", "evict", "n3").exit_code == 0  # finishes what an earlier try left


def test_unknown_nodes_and_this_one_are_refused(cluster: Cluster) -> None:
    assert "no node 'n9'; there are: n1, n2, n3" in cluster.fails("node", "evict", "n9")
    assert "evict it from another node" in cluster.fails("node", "evict", "n1")
    cluster.add_volume("V")
    assert "volume V cannot be asked" in cluster.fails("node", "evict", "n3")
    assert "volume V cannot be asked" in cluster.run("node", "evict", "n3", "--dry-run").stdout
    assert cluster.value("evicted/n3") is None
    assert cluster.run("node", "evict", "n3", "--yes").exit_code == 0


async def test_a_node_that_may_still_serve_is_waited_for_and_its_lease_is_not_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I5: nobody counts it as gone before it has stopped."""
    config_path = tmp_path / "node.toml"
    config_path.write_text(f'node = "n1"\naddress = "10.0.0.1"\nstore = "embedded:{tmp_path}/store.db"\n')
    config = load_config(config_path)
    store = EmbeddedStore(tmp_path / "store.db")
    lease = await store.grant_lease(60_000)
    drive = Put(f"drives/{'ab' * 16}", pack_value({"node": "n2", "path": "/d", "size": GIB}))
    alive = Put("alive/n2", pack_value({"address": "10.0.0.2"}), lease)
    await store.transact([], [alive, drive, Put("nodes/n2", pack_value({"address": "10.0.0.2"}))])
    monkeypatch.setattr(node_evict, "LEASE_END_S", 0.3)
    with pytest.raises(TimedOut, match="switch it off"):
        async with open_peers() as peers:
            await evict(config, store, peers, "n2", lambda line: None, accept_losses=False)
    assert await store.get("alive/n2") is not None and await store.get("nodes/n2") is not None

    monkeypatch.setattr(node_evict, "LEASE_END_S", PATIENCE_S)
    async with trio.open_nursery() as nursery:
        ended = trio.Event()

        async def end_when_told() -> None:
            view = View()
            nursery.start_soon(keep_view_forever, store, view)
            itself = load_config(config_path)
            object.__setattr__(itself, "node", "n2")
            try:
                await raise_when_evicted(itself, store, view)
            except Evicted as error:
                assert "node n2 was evicted" in str(error)
                ended.set()
                await store.revoke_lease(lease)

        nursery.start_soon(end_when_told)
        with trio.fail_after(PATIENCE_S):
            async with open_peers() as peers:
                assert await evict(config, store, peers, "n2", lambda line: None, accept_losses=False) == 1
        assert ended.is_set()
        assert await store.get("nodes/n2") is None and await store.get(drive.key) is None
        nursery.cancel_scope.cancel()
    await store.close()


async def test_drives_are_kept_where_a_copy_elsewhere_has_dropped_out_since_it_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_path = tmp_path / "node.toml"
    config_path.write_text(f'node = "n1"\naddress = "10.0.0.1"\nstore = "embedded:{tmp_path}/store.db"\n')
    store = EmbeddedStore(tmp_path / "store.db")
    drive = Put(f"drives/{'ab' * 16}", pack_value({"node": "n2", "path": "/d", "size": GIB}))
    alive = Put("alive/n1", pack_value({"address": "10.0.0.1"}))
    await store.transact([], [drive, alive, Put("nodes/n2", pack_value({"address": "10.0.0.2"}))])
    stuck = [1]

    async def ask(view: object, peers: Peers, node: str) -> list[VolumeWithout]:
        return [VolumeWithout("V", 5, stuck[0], 0)]

    monkeypatch.setattr(node_evict, "ask_volumes", ask)
    monkeypatch.setattr(node_evict, "TAKEOVER_S", 0.3)
    config = load_config(config_path)
    async with open_peers() as peers:
        with pytest.raises(Conflict, match="its drives are kept: volume V: 1 of its slabs have too few copies"):
            await evict(config, store, peers, "n2", lambda line: None, accept_losses=False)
        assert await store.get(drive.key) is not None
        stuck[0] = 0
        assert await evict(config, store, peers, "n2", lambda line: None, accept_losses=False) == 1
    assert await store.get(drive.key) is None
    await store.close()


def test_a_witness_is_listed_as_one_and_evicted_like_a_node(cluster: Cluster) -> None:
    cluster.put("witnesses/w1", address="10.0.0.9")
    row = cluster.json("node", "list")[-1]
    assert (row["name"], row["state"], row["witness"]) == ("w1", "witness", True)
    assert cluster.json("node", "evict", "w1") == {"node": "w1", "drives": 0}
    assert cluster.value("witnesses/w1") is None and cluster.value("evicted/w1")["when"] > 0


def test_how_often_a_node_may_go_away_is_said_for_the_whole_cluster(cluster: Cluster) -> None:
    assert cluster.value("cluster")["quarantine"] == 3
    assert cluster.json("cluster", "set", "--quarantine", "5") == {"quarantine": 5}
    assert cluster.value("cluster")["quarantine"] == 5
    assert "no node is quarantined" in cluster.run("cluster", "set", "--quarantine", "0").stdout
    assert cluster.value("cluster")["name"] == "Tower"
    cluster.put("quarantine/n2", since=1, why="it came and went")
    row = next(row for row in cluster.json("node", "list") if row["name"] == "n2")
    assert (row["state"], row["reason"]) == ("quarantined", "it came and went; csvfs node resume n2")
    assert cluster.json("node", "resume", "n2")["resumed"]
    assert cluster.value("quarantine/n2") is None
