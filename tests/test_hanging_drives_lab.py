"""A drive of a real lab that hangs in the kernel under fio: no error, its node's other drive goes on, and it comes back."""

import json
from collections.abc import Iterator

import pytest

from csvfs.units import MIB
from tests.hanging_files import FreezableFs, freezable_fs
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for

pytestmark = [pytest.mark.lab, needs_lab]

VOLUME = "/clusterstorage/Volume1"
FIO = (
    "fio", "--name=t", "--ioengine=psync", "--direct=1", "--bs=4k", "--size=16M", "--rw=randwrite", "--verify=crc32c",
    "--verify_fatal=1", "--do_verify=1", "--fallocate=none", f"--filename={VOLUME}/fio", "--time_based", "--runtime=40",
    "--verify_state_save=0", "--output-format=json",
)  # fmt: skip


@pytest.fixture
def fs(tmp_path) -> Iterator[FreezableFs]:
    with freezable_fs(tmp_path / "fs", size=512 * MIB) as fs:  # before the lab: its nodes must see the mount
        yield fs


@pytest.fixture
def lab(fs) -> Iterator[LabCluster]:
    with running_lab(nodes=3, drives=1, drive_size=256 * MIB) as cluster:
        yield cluster
        fs.thaw()


def drives(cluster: LabCluster) -> dict[str, dict]:
    return {row["path"]: row for row in json.loads(cluster.run("n1", "csvfs", "drive", "list", "--json"))}


def mounted(cluster: LabCluster, node: str) -> bool:
    return b"ok" in cluster.run(node, "sh", "-c", f"mountpoint -q {VOLUME} && echo ok", check=False)


def healthy(cluster: LabCluster) -> bool:
    rows = json.loads(cluster.run("n1", "csvfs", "volume", "list", "--json"))
    return all(row["health"] == "Healthy" for row in rows)


def test_a_drive_that_hangs_costs_no_error_and_its_nodes_other_drive_goes_on(lab, fs):
    path = str(fs.folder / "drive")
    with open(path, "wb") as file:
        file.truncate(384 * MIB)
    (other,) = (name for name, row in drives(lab).items() if row["node"] == "n2")
    lab.run("n2", "csvfs", "drive", "add", path)
    wait_for(lambda: drives(lab)[path]["state"] == "OK", within_s=60)
    lab.run("n1", "csvfs", "drive", "retire", other)  # so all copies of the node are on the one that will hang
    lab.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "3")
    wait_for(lambda: mounted(lab, "n1"), within_s=60)
    fio = lab.start_command("n1", *FIO, stdout=-1, stderr=-1)
    wait_for(lambda: lab.run("n1", "sh", "-c", f"test -s {VOLUME}/fio && echo written", check=False), within_s=60)
    (server,) = lab.pids("n2")["drives"]
    fs.freeze()
    wait_for(lambda: "does not answer" in drives(lab)[path]["reason"], within_s=120)
    wait_for(lambda: drives(lab)[other]["state"] == "Retired", within_s=120)  # that is: it serves
    assert set(lab.pids("n2")["drives"]) - {server}
    fs.thaw()
    output, errors = fio.communicate(timeout=300)
    assert fio.returncode == 0, errors.decode() + output.decode()[-2000:]
    wait_for(lambda: drives(lab)[path]["state"] == "OK", within_s=120)
    wait_for(lambda: healthy(lab), within_s=120)
    wait_for(lambda: len(lab.pids("n2")["drives"]) == 1, within_s=60)  # what was killed is gone
