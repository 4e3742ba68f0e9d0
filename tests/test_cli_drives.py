"""Commands about drives and what is lost: locate, scrub, set, repair, recover."""

import time
from pathlib import Path

import pytest

from csvfs.admin import drive_claim, drive_life
from csvfs.admin.peers import Peers
from csvfs.units import GIB
from tests.drive_files import DRIVE, blank_file, make_drive, overwrite
from tests.test_cli import Cluster


@pytest.fixture
def bare(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.fixture
def cluster(bare: Cluster) -> Cluster:
    assert bare.run("cluster", "create", "test").exit_code == 0
    assert bare.run("pool", "create").exit_code == 0
    return bare


def put_drive(cluster: Cluster, drive: bytes, node: str, path: str) -> None:
    cluster.put(
        f"drives/{drive.hex()}",
        node=node,
        path=path,
        size=GIB,
        kind="hdd",
        state="ok",
        slots=15,
        usage="auto",
    )


def test_a_drive_is_located_by_its_path_or_the_beginning_of_its_id_and_made_to_blink(cluster, tmp_path):
    path = blank_file(tmp_path / "disk")
    put_drive(cluster, b"a" * 16, "n1", path)
    put_drive(cluster, b"b" * 16, "n2", "/elsewhere")
    assert cluster.json("drive", "locate", path)["node"] == "n1"
    found = cluster.json("drive", "locate", "6161", "--blink", "0.05")
    assert (found["path"], found["here"], found["kind"]) == (path, True, "hdd")
    assert "run this there" in cluster.fails("drive", "locate", "6262", "--blink", "1")
    assert "no drive" in cluster.fails("drive", "locate", "ff")
    put_drive(cluster, b"bb" + b"c" * 14, "n3", "/elsewhere")
    assert "on n2" in cluster.fails("drive", "locate", "6262") and "give the id" in cluster.fails("drive", "locate", "6262")


def test_states_and_kinds_are_listed_and_reasons_said_beside(cluster):
    put_drive(cluster, b"a" * 16, "n2", "/dev/sdx")
    (row,) = cluster.json("drive", "list")
    assert (row["state"], row["health"], row["kind"], row["usage"]) == (
        "Lost communication",
        "Warning",
        "hdd",
        "auto",
    )
    assert "node n2 is down" in row["reason"]
    assert "node n2 is down" in cluster.run("drive", "list").stderr


def test_without_a_coordinator_nothing_can_be_said_of_what_is_lost(cluster):
    cluster.put("volumes/v", id=bytes(16), name="v", copies=2, resiliency="mirror", size=0, state="online")
    assert "no coordinator" in cluster.fails("volume", "status", "v", "--lost")
    assert "no coordinator" in cluster.fails("volume", "repair", "v", "--accept-data-loss", "--yes")
    assert "no coordinator" in cluster.fails("volume", "scrub", "v")
    assert "no coordinator" in cluster.fails("volume", "repair", "v")


def test_a_lost_store_is_rebuilt_from_the_drives_and_a_store_that_is_not_empty_refused(bare, tmp_path):
    path, superblock = make_drive(tmp_path / "disk")
    missing = str(tmp_path / "missing")
    shown = bare.json("pool", "recover", "--dry-run", "--drives", path, missing)
    assert list(shown["drives"]) == [DRIVE.hex()]
    assert bare.value("pool") is None

    result = bare.run("pool", "recover", "--drives", path, missing)
    assert result.exit_code == 0, result.output
    assert f"drive {DRIVE.hex()[:8]}: {path}, of node n1" in result.stdout
    assert "not recovered: " in result.stdout and "missing" in result.stdout
    assert bare.value("pool")["id"] == superblock.pool_id
    assert bare.value("cluster")["id"] == superblock.cluster_id
    assert bare.value(f"drives/{DRIVE.hex()}")["slots"] == superblock.slot_count
    assert "not empty" in bare.fails("pool", "recover", "--drives", path)


# What is said of drives


@pytest.fixture
def asked(cluster, monkeypatch):
    """A drive list in which the server of n1 answered."""
    rows: dict[bytes, dict] = {}
    cluster.put("alive/n1", incarnation=1, address="127.0.0.1", started=0)
    cluster.put("servers/n1", address="127.0.0.1", port=1, incarnation=1)

    async def answer(self, view, node, name, **args):
        return {"drives": [{"id": drive, "state": "ok", "slots": 15, **row} for drive, row in rows.items()]}

    monkeypatch.setattr(Peers, "drive_server", answer)
    return rows


def test_the_list_says_how_full_each_drive_is_and_which_are_hot_spots(cluster, asked):
    for drive, free in ((b"a" * 16, 3), (b"b" * 16, 12), (b"c" * 16, 12)):
        put_drive(cluster, drive, "n1", f"/d/{drive[:1].decode()}")
        asked[drive] = {"free_slots": free}
    rows = cluster.json("drive", "list")
    assert [(row["used_slots"], row["slots"], row["percent_used"]) for row in rows] == [
        (12, 15, 80.0), (3, 15, 20.0), (3, 15, 20.0),
    ]  # fmt: skip
    assert [round(row["hot_points"]) for row in rows] == [40, 0, 0]
    shown = cluster.run("drive", "list")
    assert "12/15" in shown.stdout and "80 %" in shown.stdout and "KIND" in shown.stdout
    assert "40 points fuller than the pool; csvfs pool optimize" in shown.stderr


def test_every_reason_comes_with_the_next_step(cluster, asked):
    put_drive(cluster, b"a" * 16, "n1", "/d/a")
    asked[b"a" * 16] = {"free_slots": 15, "state": "failed: gone", "fault": "missing"}
    (row,) = cluster.json("drive", "list")
    assert (row["state"], row["next_step"]) == ("Lost communication", "attach it again; or csvfs drive remove it")
    assert "failed: gone; attach it again" in cluster.run("drive", "list").stderr


def test_a_drive_that_was_claimed_by_itself_is_said_to_be(cluster, asked):
    put_drive(cluster, b"a" * 16, "n1", "/d/a")
    asked[b"a" * 16] = {"free_slots": 15}
    assert "claimed" not in cluster.run("drive", "list").stderr
    value = cluster.value(f"drives/{(b'a' * 16).hex()}")
    cluster.put(f"drives/{(b'a' * 16).hex()}", **{**value, "added_by": "auto-claim", "added": int(time.time())})
    assert "claimed by itself" in cluster.run("drive", "list").stderr
    assert cluster.json("drive", "list")[0]["added_by"] == "auto-claim"


def test_a_drive_is_put_in_maintenance_and_used_again(cluster, asked):
    put_drive(cluster, b"a" * 16, "n1", "/d/a")
    asked[b"a" * 16] = {"free_slots": 15, "state": "gone", "fault": "missing"}
    assert "csvfs drive maintenance off" in cluster.run("drive", "maintenance", "on", "6161").stdout
    (row,) = cluster.json("drive", "list")
    assert (row["state"], row["usage"], row["reason"]) == ("In maintenance", "maintenance", "Lost communication: gone")
    assert cluster.json("drive", "maintenance", "off", "6161")["usage"] == "auto"
    cluster.run("drive", "retire", "6161")
    assert "is retired and being emptied" in cluster.fails("drive", "maintenance", "on", "6161")


def test_a_declared_kind_stands_until_it_shall_be_detected_again(cluster, tmp_path):
    path = blank_file(tmp_path / "disk")
    put_drive(cluster, b"a" * 16, "n1", path)
    put_drive(cluster, b"b" * 16, "n2", "/elsewhere")
    assert cluster.json("drive", "set", "6161", "--kind", "nvme")["kind"] == "nvme"
    rows = {row["id"][:4]: (row["kind"], row["kind_declared"]) for row in cluster.json("drive", "list")}
    assert rows == {"6161": ("nvme", True), "6262": ("hdd", False)}
    assert cluster.json("drive", "set", "6161", "--kind", "detected")["declared"] is False
    assert "run this command there" in cluster.fails("drive", "set", "6262", "--kind", "detected")


def test_emptying_a_drive_says_what_it_waits_for_and_may_be_interrupted(cluster, asked, monkeypatch):
    put_drive(cluster, b"a" * 16, "n1", "/d/a")
    asked[b"a" * 16] = {"free_slots": 10}
    cluster.put("volumes/v", id=bytes(16), name="v", copies=2, resiliency="mirror", size=0, state="online")
    assert "v have no coordinator" in cluster.fails("drive", "remove", "6161", "--yes")

    async def room(*args):
        """There is."""

    async def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(drive_life, "check_room", room)
    monkeypatch.setattr(drive_life.trio, "sleep", interrupted)  # while it waits
    result = cluster.run("drive", "remove", "6161", "--yes")
    assert result.exit_code == 1
    assert "0 slabs left on drive 61616161; waiting for a coordinator of v" in result.stderr
    assert "goes on being emptied" in result.stderr and "csvfs drive retire --undo 61616161" in result.stderr


def test_a_job_that_cannot_be_asked_for_is_listed_with_what_it_waits_for(cluster):
    put_drive(cluster, b"a" * 16, "n1", "/d/a")
    cluster.put("volumes/v", id=bytes(16), name="v", copies=2, resiliency="mirror", size=0, state="online")
    assert cluster.json("job", "list") == []
    cluster.run("drive", "retire", "6161")
    (job,) = cluster.json("job", "list")
    assert (job["volume"], job["kind"], job["what"]) == ("v", "evacuate", "evacuation of drive 61616161 on n1")
    assert job["waiting_for"] == "a coordinator of volume v: csvfs volume status v"


def test_a_pool_is_told_to_claim_and_a_dry_run_says_what_it_would_take_and_why_not(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(drive_claim, "whole_disks", list)
    text = cluster.config.read_text()
    (tmp_path / "disks").mkdir()
    cluster.config.write_text(f'{text}[drives]\nclaim = ["{tmp_path}/disks/*"]\n[options]\ndrive_claim_after_s = 1\n')
    path = blank_file(tmp_path / "disks" / "blank", 2 * GIB)
    overwrite(blank_file(tmp_path / "disks" / "used", 2 * GIB), GIB, b"data")
    shown = cluster.json("drive", "claim", "--dry-run")
    assert shown["auto_claim"] is False
    assert [(row["path"], row["eligible"]) for row in shown["candidates"]] == [
        (path, True), (str(tmp_path / "disks" / "used"), False),
    ]  # fmt: skip
    assert shown["candidates"][1]["reason"].startswith("not blank: data near byte")
    assert cluster.json("drive", "list") == []
    assert cluster.json("pool", "set", "--auto-claim", "on")["auto_claim"] is True
    assert "auto-claim is on" in cluster.run("drive", "claim", "--dry-run").stderr
    (claimed,) = cluster.json("drive", "claim")
    assert (claimed["path"], claimed["added_by"]) == (path, "csvfs drive claim")
    assert "nothing to claim" in cluster.run("drive", "claim").stdout
    reason = cluster.json("drive", "claim", "--dry-run")["candidates"][0]["reason"]
    assert reason.startswith("in the pool: drive")
