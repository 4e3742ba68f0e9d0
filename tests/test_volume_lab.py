"""Volumes resized, and their copies changed, on a lab of three nodes under fio that verifies what it reads."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from csvfs.units import GIB, MIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for
from tests.test_first_cluster import is_mounted

pytestmark = [pytest.mark.lab, needs_lab]

VOLUME = "/clusterstorage/Volume1"
NODES = ("n1", "n2", "n3")


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=3, drives=2, drive_size=2 * GIB) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "2")
        for node in NODES:
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=60)
        yield cluster


def status(cluster: LabCluster, node: str = "n2") -> dict[str, Any]:
    return dict(json.loads(cluster.run(node, "csvfs", "volume", "status", "Volume1", "--json")))


def has_copies(cluster: LabCluster, copies: int) -> bool:
    """All data slabs have so many copies in sync, and nothing is left to do."""
    shown = status(cluster)
    volume = shown["volume"]
    is_whole = volume["copies"] == copies and set(volume["slabs_by_copies"]) == {str(copies)}
    return is_whole and volume["health"] == "Healthy" and not shown["jobs"]


def test_copies_go_from_two_to_three_and_back_under_fio_and_fio_sees_nothing(lab):
    fio = lab.start_command(
        "n1", "fio", "--name=copies", f"--directory={VOLUME}", "--ioengine=psync", "--direct=1", "--bs=4k",
        "--rw=randrw", "--size=48M", "--verify=crc32c", "--verify_backlog=64", "--fallocate=none", "--numjobs=2",
        "--time_based", "--runtime=15", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for(lambda: status(lab)["volume"]["slabs_by_copies"].get("2"), within_s=60)
    lab.run("n3", "csvfs", "volume", "set", "Volume1", "--copies", "3")
    lab.run("n2", "csvfs", "job", "watch", "--volume", "Volume1")
    wait_for(lambda: has_copies(lab, 3), within_s=90)
    lab.run("n2", "csvfs", "volume", "set", "Volume1", "--copies", "2")
    wait_for(lambda: has_copies(lab, 2), within_s=90)
    output = fio.communicate(timeout=120)[0].decode()
    assert fio.returncode == 0, output + lab.logs()


def test_a_volume_in_use_is_deleted_only_by_force_and_then_its_programs_get_errors(lab):
    lab.run("n1", "csvfs", "volume", "create", "Other", "--copies", "2")
    path = "/clusterstorage/Other"
    wait_for(lambda: lab.run("n2", "sh", "-c", f"mountpoint -q {path} && echo ok || true"), within_s=60)
    loop = f"exec 3>{path}/vm; while echo x >&3; do sleep 0.1; done; sleep 1; exit 7"
    program = lab.start_command("n2", "sh", "-c", loop, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    delete = "csvfs volume delete Other --yes"

    def opened() -> bool:
        sessions = json.loads(lab.run("n1", "csvfs", "volume", "status", "Other", "--json"))["volume"]["open_files"]
        return bool(sessions.get("n2") == 1)

    wait_for(opened, within_s=60)
    refused = lab.run("n3", "sh", "-c", f"{delete} 2>&1 || true").decode()
    assert "volume Other is in use, files are open: 1 on n2" in refused
    assert "is deleted" in lab.run("n3", "sh", "-c", f"{delete} --force").decode()
    assert program.communicate(timeout=60) and program.returncode == 7
    names = {row["name"] for row in json.loads(lab.run("n1", "csvfs", "volume", "list", "--json"))}
    assert names == {"Volume1"}
    for node in NODES:
        wait_for(lambda node=node: b"gone" in lab.run(node, "sh", "-c", f"mountpoint -q {path} || echo gone"), within_s=60)


def test_a_new_size_is_what_every_node_sees_and_a_write_beyond_it_is_refused(lab):
    lab.run("n1", "csvfs", "volume", "resize", "Volume1", "--size", "256M")

    def size_on(node: str) -> int:
        return int(lab.run(node, "stat", "-f", "-c", "%b", VOLUME)) * 4096

    for node in NODES:
        wait_for(lambda node=node: size_on(node) == 256 * MIB, within_s=30)
    fill = f"dd if=/dev/zero of={VOLUME}/fill bs=1M count=300 conv=fsync 2>&1 || true"
    assert b"No space left on device" in lab.run("n2", "sh", "-c", fill)
    refused = lab.run("n3", "sh", "-c", "csvfs volume resize Volume1 --size 128M 2>&1 || true").decode()
    assert "cannot be made 128.0 MiB" in refused and "its files use 25" in refused, refused
    lab.run("n3", "csvfs", "volume", "resize", "Volume1", "--size", "0")
    wait_for(lambda: size_on("n1") > GIB, within_s=30)
    lab.run("n2", "sh", "-c", f"dd if=/dev/zero of={VOLUME}/fill bs=1M count=300 conv=fsync && rm {VOLUME}/fill")
