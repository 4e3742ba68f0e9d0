"""Commands about drives and what is lost: locate, scrub, set, repair, recover."""

from pathlib import Path

import pytest

from csvfs.units import GIB
from tests.drive_files import DRIVE, blank_file, make_drive
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
