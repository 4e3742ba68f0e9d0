"""What waits, and on what: the mount's words, its socket, and `csvfs why` putting everybody's answers together."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from csvfs.admin.cluster_view import ClusterView, Record
from csvfs.admin.io_modes import io_modes, metadata_waits, modes_text
from csvfs.admin.peers import open_peers
from csvfs.admin.volume_paths import volume_of
from csvfs.admin.why import Heard, explain, listen
from csvfs.config import NodeConfig, load_config
from csvfs.errors import BadRequest, CsvfsError, Disconnected, NotFound, TimedOut
from csvfs.mount import waits
from csvfs.mount.admin_socket import AdminSocket
from csvfs.mount.waits import DIRECT, PAUSED, UNAVAILABLE, CallWait, Facts, SlabWait, mode, rows
from csvfs.net.engine import Engine
from csvfs.net.link import Link, connect
from csvfs.store.opening import open_store
from csvfs.wire.control import pack_value

D1, D2 = b"1" * 16, b"2" * 16


def facts(**more: Any) -> Facts:
    return Facts(now_s=100.0, io_timeout_s=60.0, **more)


# -- the mount ---------------------------------------------------------------------------------------


def test_a_mount_that_waits_for_nothing_is_direct() -> None:
    busy = facts(calls=[CallWait("lookup", {"parent": 1}, 99.9)], slabs=[SlabWait(3, 1, 99.9, "")])
    assert mode(busy) == (DIRECT, "")
    assert rows(busy) == []


def test_writes_to_a_slab_without_a_copy_pause_the_mount_and_say_for_how_long() -> None:
    stuck = facts(slabs=[SlabWait(7, 3, 90.0, "drive abc of n2 is down")])
    assert mode(stuck) == (PAUSED, "slab 7: drive abc of n2 is down")
    (row,) = rows(stuck)
    assert row["what"] == "3 writes to slab 7" and row["since_s"] == 10.0 and row["slab"] == 7
    assert "after another 50 s" in row["next"]
    assert mode(facts(slabs=[SlabWait(7, 3, 90.0, "lost", in_vain=True)]))[0] == UNAVAILABLE


def test_reads_that_ask_for_a_slab_count_too_and_name_the_last_refusal() -> None:
    call = CallWait("slab_failed", {"slab": 9}, 95.0, "slab 9: the last copy is on n3")
    assert mode(facts(calls=[call])) == (PAUSED, "slab 9: slab 9: the last copy is on n3")
    waiting = rows(facts(calls=[CallWait("acquire", {"ino": 12}, 98.0)]))
    assert waiting[0]["what"] == "acquire of inode 12" and waiting[0]["ino"] == 12


def test_without_coordinator_a_mount_is_paused_and_after_the_io_timeout_unavailable() -> None:
    assert mode(facts(unlinked_s=95.0)) == (PAUSED, "no connection to the coordinator")
    assert mode(facts(unlinked_s=95.0, has_owner=False)) == (PAUSED, "no coordinator is elected")
    assert mode(facts(unlinked_s=30.0, has_owner=False))[0] == UNAVAILABLE
    assert mode(facts(lapsed=True))[0] == PAUSED
    assert mode(facts(serving=False)) == (PAUSED, "the coordinator has not been heard for 4 s")


def test_a_program_that_waits_for_a_lock_is_told_of_and_pauses_nothing() -> None:
    waiting = facts(calls=[CallWait("lock", {"ino": 9}, 95.0)])
    assert mode(waiting) == (DIRECT, "")
    (row,) = rows(waiting)
    assert (row["what"], row["on"], row["ino"]) == ("a file lock of inode 9", "another program's lock", 9)
    assert "error" not in row["next"]


def test_the_coordinator_is_told_when_recalls_may_take_long() -> None:
    assert waits.news(facts()) == {"mode": DIRECT, "why": "", "busy": False}
    assert waits.news(facts(slabs=[SlabWait(7, 3, 90.0, "")]))["busy"]
    assert waits.news(facts(calls=[CallWait("slab_failed", {"slab": 9}, 95.0)]))["busy"]
    assert not waits.news(facts(calls=[CallWait("acquire", {"ino": 9}, 95.0)]))["busy"]


async def test_the_mounts_socket_answers_its_own_user_and_root_only(tmp_path: Path, monkeypatch: Any) -> None:
    engine, path = Engine(), tmp_path / "mount-v.sock"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run_forever)
        socket = AdminSocket(engine, path, nursery, lambda: {"mode": DIRECT, "waits": []})
        assert path.stat().st_mode & 0o777 == 0o600
        async with open_peers() as peers:
            assert (await peers.local(str(path), "why", 30))["mode"] == DIRECT
            with pytest.raises(BadRequest):
                await peers.local(str(path), "evict", 30)
        monkeypatch.setattr(Link, "peer_uid", property(lambda link: os.geteuid() + 1))
        link = await connect(engine, str(path), timeout_s=30)
        with pytest.raises(Disconnected):
            await link.call("why", {}, timeout_s=30)
        socket.close()
        nursery.cancel_scope.cancel()
    engine.close()


# -- what the store alone can tell -------------------------------------------------------------------


def record(key: str, **value: Any) -> Record:
    return Record(key, value, 0)


def view_of_two(*alive: str) -> ClusterView:
    return ClusterView(
        nodes={node: record(f"nodes/{node}") for node in ("n1", "n2")},
        alive={node: record(f"alive/{node}") for node in alive},
        servers={node: record(f"servers/{node}", drives={}) for node in alive},
        drives={D1.hex(): record("drives/1", node="n1"), D2.hex(): record("drives/2", node="n2")},
        volumes={"v": record("volumes/v", state="online")},
    )


def meta(*in_sync: tuple[bytes, str]) -> Record:
    return record("meta/v", slabs=[[1 << 62, 5, [[drive, node, 1, 0] for drive, node in in_sync]]])


def test_metadata_slabs_say_from_the_store_which_drives_they_wait_for() -> None:
    both = meta((D1, "n1"), (D2, "n2"))
    assert metadata_waits(view_of_two("n1"), both) == []
    (said,) = metadata_waits(view_of_two(), both)
    assert said == (
        f"1 of 1 metadata slabs waits for drive {D1.hex()[:8]} of n1 (node n1 is down) "
        f"or drive {D2.hex()[:8]} of n2 (node n2 is down)"
    )
    view = view_of_two("n1")
    view.servers["n1"].value["drives"] = {D1.hex(): {"fault": "truncated"}}
    assert "(truncated)" in metadata_waits(view, meta((D1, "n1")))[0]
    assert metadata_waits(view, None) == []
    assert "malformed" in metadata_waits(view, record("meta/v", slabs=[["nonsense"]]))[0]


def test_modes_by_node_are_told_by_the_mounts_or_follow_from_their_silence() -> None:
    view = view_of_two("n1")
    volume = view.volumes["v"]
    reply = {"sessions": [{"node": "n1", "connected": True, "mode": DIRECT, "why": ""}]}
    modes = io_modes(view, volume, reply)
    assert modes_text(modes) == "direct on n1; unavailable on n2: the node is down"
    assert io_modes(view, volume, {"sessions": []})["n1"]["why"] == "its mount has no connection to the coordinator"
    assert io_modes(view, volume, None)["n1"]["mode"] == PAUSED
    assert io_modes(view, record("volumes/v", state="creating"), reply) == {}


# -- all together ------------------------------------------------------------------------------------


def test_a_path_is_of_a_volume_without_being_touched() -> None:
    root = Path("/clusterstorage")
    assert volume_of("v", root) == ("v", None)
    assert volume_of("/clusterstorage/v/a/b", root) == ("v", root / "v/a/b")
    for outside in ("/tmp/x", "/clusterstorage", "/clusterstorage/../v/x"):
        with pytest.raises(BadRequest):
            volume_of(outside, root)


def test_a_request_that_waits_for_a_recall_names_who_holds_the_lease_and_when_he_is_evicted() -> None:
    request = {"node": "n2", "inodes": [5], "since_s": 2.5, "recalls": [{"node": "n1", "ino": 5, "left_s": 2.4}]}
    heard = Heard("v", "n2", coordinator={"requests": [request]})
    (row,) = explain(heard)
    assert row["on"] == "n1, which is asked to give back inode 5" and row["since_s"] == 2.5
    assert row["next"] == "who has not answered in 2.4 s is evicted, and its lease passes on"
    heard.ino = 6
    assert explain(heard) == [], "another file"


def test_a_slab_without_a_copy_names_its_drives_and_whether_waiting_helps() -> None:
    copies = [{"drive": D1, "node": "n1", "fault": "node n1 is down", "for_good": False}]
    heard = Heard("v", "n2", coordinator={"slabs": [{"slab": 8, "copies": copies}]})
    assert "goes on when one of these is back" in explain(heard)[0]["next"]
    copies[0]["for_good"] = True
    assert "errors at once" in explain(heard)[0]["next"]


def config_of(tmp_path: Path) -> NodeConfig:
    path = tmp_path / "node.toml"
    path.write_text(f'node = "n1"\naddress = "127.0.0.1"\nstore = "embedded:{tmp_path}/store.db"\n')
    return replace(load_config(path), run_dir=tmp_path)


async def test_silence_of_everybody_is_the_answer(tmp_path: Path, monkeypatch: Any) -> None:
    """A store that hangs, and no mount: `why` says so instead of hanging or failing."""
    store = open_store(f"embedded:{tmp_path}/store.db")

    async def hang(*args: Any) -> Any:
        await trio.sleep_forever()

    monkeypatch.setattr("csvfs.admin.why.read_cluster_view", hang)
    with trio.fail_after(30):
        async with open_peers() as peers:
            heard = await listen(config_of(tmp_path), store, peers, "v")
    assert heard.errors["store"] == str(TimedOut("no answer within 1.4 s"))
    assert [row["what"] for row in explain(heard)] == ["changes of owners, nodes and drives", "all that is done here"]
    await store.close()


async def test_why_of_a_volume_that_there_is_not_is_refused_and_one_without_coordinator_says_so(tmp_path: Path) -> None:
    store = open_store(f"embedded:{tmp_path}/store.db")
    await store.put("volumes/v", pack_value({"id": bytes(16), "name": "v", "state": "online"}))
    config = config_of(tmp_path)
    async with open_peers() as peers:
        heard = await listen(config, store, peers, "v")
        assert any("no coordinator at the moment" in row["on"] for row in explain(heard))
        refused: CsvfsError | None = None
        try:
            await listen(config, store, peers, "w")
        except NotFound as error:
            refused = error
    assert "no volume 'w'; there are: v" in str(refused)
    await store.close()
