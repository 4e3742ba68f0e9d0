"""Drives retired, removed and lost on a lab of three nodes, under fio that verifies what it reads."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from csvfs.units import GIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for
from tests.test_first_cluster import is_healthy, is_mounted

pytestmark = [pytest.mark.lab, needs_lab]

VOLUME = "/clusterstorage/Volume1"


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=3, drives=2, drive_size=2 * GIB) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--resiliency", "mirror", "--copies", "3")
        for node in ("n1", "n2", "n3"):
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=180)
        yield cluster


def drives(cluster: LabCluster, node: str) -> list[dict[str, Any]]:
    rows = json.loads(cluster.run("n1", "csvfs", "drive", "list", "--json"))
    return [row for row in rows if row["node"] == node]


def used(drive: dict[str, Any]) -> int:
    return drive["size"] - (drive["free"] if drive["free"] is not None else drive["size"])


def jobs(cluster: LabCluster) -> list[dict[str, Any]]:
    return list(json.loads(cluster.run("n1", "csvfs", "job", "list", "--json")))


def fio(cluster: LabCluster, name: str, seconds: int) -> subprocess.Popen[bytes]:
    """Random writes that are read back and verified while they go on."""
    return cluster.start_command(
        "n1", "fio", f"--name={name}", f"--directory={VOLUME}", "--ioengine=psync", "--direct=1", "--bs=4k",
        "--rw=randrw", "--size=48M", "--verify=crc32c", "--verify_backlog=64", "--fallocate=none", "--numjobs=2",
        "--time_based", f"--runtime={seconds}", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_a_drive_is_retired_removed_and_reset_under_fio_and_fio_sees_nothing(lab):
    running = fio(lab, "retire", 25)
    wait_for(lambda: sum(used(row) for row in drives(lab, "n2")) > 0, within_s=180)
    full = max(drives(lab, "n2"), key=used)
    lab.run("n1", "csvfs", "drive", "retire", full["id"][:8])
    assert next(row for row in drives(lab, "n2") if row["id"] == full["id"])["usage"] == "retired"
    lab.run("n1", "csvfs", "job", "watch")

    def is_empty() -> bool:
        return used(next(row for row in drives(lab, "n2") if row["id"] == full["id"])) == 0

    wait_for(is_empty, within_s=180)
    wait_for(lambda: is_healthy(lab), within_s=180)
    lab.run("n2", "csvfs", "drive", "reset", full["path"])
    assert all(row["id"] != full["id"] and row["state"] == "OK" for row in drives(lab, "n2"))
    assert len(drives(lab, "n2")) == 2
    joined = next(row for row in drives(lab, "n2") if row["path"] == full["path"])

    def is_removed() -> bool:
        """Refused for a moment: while slabs are levelled out to the new drive, what it has counts in both places."""
        return b"is out of the pool" in lab.run("n2", "csvfs", "drive", "remove", "--yes", joined["path"], check=False)

    wait_for(is_removed, within_s=180)
    assert [row["path"] for row in drives(lab, "n2")] != [full["path"]]
    lab.finish(running)
    wait_for(lambda: is_healthy(lab), within_s=180)
    wait_for(lambda: jobs(lab) == [], within_s=180)


def test_the_last_drive_of_a_node_cannot_be_removed_and_the_shortage_is_said(lab):
    (left,) = drives(lab, "n2")
    result = lab.run("n2", "sh", "-c", f"csvfs drive remove --yes {left['path']} 2>&1 || true").decode()
    assert "there is no place in another fault domain" in result
    assert drives(lab, "n2")[0]["state"] == "OK"
