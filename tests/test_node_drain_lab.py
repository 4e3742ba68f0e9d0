"""A node is drained, switched off, and taken back, under fio that verifies what it reads."""

import json
import subprocess
from collections.abc import Iterator

import pytest

from csvfs.units import GIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for
from tests.test_first_cluster import is_healthy, is_mounted

pytestmark = [pytest.mark.lab, needs_lab]

VOLUME = "/clusterstorage/Volume1"


@pytest.fixture
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=3, drives=1, drive_size=2 * GIB) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--resiliency", "mirror", "--copies", "3")
        for node in ("n1", "n2", "n3"):
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=30)
        yield cluster


def node_states(cluster: LabCluster) -> dict[str, str]:
    rows = json.loads(cluster.run("n1", "csvfs", "node", "list", "--json"))
    return {row["name"]: row["state"] for row in rows}


def coordinator(cluster: LabCluster) -> str:
    (row,) = json.loads(cluster.run("n1", "csvfs", "volume", "list", "--json"))
    return str(row["coordinator"])


def test_a_node_is_drained_switched_off_and_taken_back_and_fio_sees_nothing(lab):
    lab.run("n1", "csvfs", "volume", "move", "Volume1", "n2")
    running = lab.start_command(
        "n1", "fio", "--name=drain", f"--directory={VOLUME}", "--ioengine=psync", "--direct=1", "--bs=4k",
        "--rw=randrw", "--size=32M", "--verify=crc32c", "--verify_backlog=64", "--fallocate=none",
        "--time_based", "--runtime=20", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert b"can be drained" in lab.run("n1", "csvfs", "node", "drain", "n2", "--dry-run")
    assert node_states(lab)["n2"] == "up"
    lab.run("n1", "csvfs", "node", "drain", "n2")
    assert node_states(lab) == {"n1": "up", "n2": "paused", "n3": "up"}
    assert coordinator(lab) in ("n1", "n3")

    refused = lab.run("n1", "sh", "-c", "csvfs node drain n3 2>&1; echo status $?").decode()
    assert "node n2 is paused already" in refused and refused.rstrip().endswith("status 1")

    lab.kill("n2")
    wait_for(lambda: b"switched off" in lab.run("n1", "csvfs", "status"), within_s=30)
    lab.start("n2")
    wait_for(lambda: is_healthy(lab), within_s=60)
    assert node_states(lab)["n2"] == "paused"
    lab.run("n1", "csvfs", "node", "resume", "n2")
    assert node_states(lab)["n2"] == "up"
    wait_for(lambda: coordinator(lab) == "n2", within_s=60)  # where it was wanted before

    output = running.communicate(timeout=90)[0].decode()
    assert running.returncode == 0, output + lab.logs()
    wait_for(lambda: is_healthy(lab), within_s=60)
