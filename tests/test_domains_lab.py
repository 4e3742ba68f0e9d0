"""A lab of four nodes in two racks: racks are changed under fio, and then a whole rack fails and nothing is lost."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from csvfs.units import GIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for
from tests.test_first_cluster import is_healthy, is_mounted

pytestmark = [pytest.mark.lab, needs_lab]

VOLUME = "/clusterstorage/Volume1"
NODES = ("n1", "n2", "n3", "n4")
PAIRS = {"n1": "a", "n2": "a", "n3": "b", "n4": "b"}


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=4, drives=1, drive_size=1 * GIB) as cluster:
        load(cluster, PAIRS)
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "2", "--fault-domain", "rack")
        for node in NODES:
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=60)
        yield cluster


def load(cluster: LabCluster, racks: dict[str, str]) -> Any:
    text = "".join(f'[nodes.{node}]\nrack = "{rack}"\n' for node, rack in racks.items())
    (path := cluster.directory / "domains.toml").write_text(text)
    return json.loads(cluster.run("n1", "csvfs", "domain", "load", str(path), "--json"))


def crossed(cluster: LabCluster) -> dict[str, str]:
    """Other racks, by which both copies of the file's first slab stand in one."""
    found = json.loads(cluster.run("n1", "csvfs", "file", "map", f"{VOLUME}/file", "--json"))
    together = {copy["node"] for copy in found["rows"][0]["copies"]}
    return {node: "a" if node in together else "b" for node in NODES}


def volume(cluster: LabCluster, node: str = "n1") -> dict[str, Any]:
    return dict(json.loads(cluster.run(node, "csvfs", "volume", "status", "Volume1", "--json"))["volume"])


def write_file(cluster: LabCluster, node: str, name: str) -> bytes:
    """32 MiB at random, on all media; returns its sum."""
    path = f"{VOLUME}/{name}"
    return cluster.run(node, "sh", "-c", f"head -c 32M /dev/urandom > {path} && sync {path} && sha256sum < {path}")


def test_racks_are_changed_under_fio_the_copies_follow_and_a_whole_rack_may_fail(lab):
    written = write_file(lab, "n1", "file")
    fio = lab.start_command(
        "n1", "fio", "--name=v", f"--filename={VOLUME}/fio", "--ioengine=psync", "--direct=1", "--bs=4k", "--rw=randrw",
        "--size=32M", "--verify=crc32c", "--verify_backlog=64", "--fallocate=none", "--time_based", "--runtime=8",
        "--verify_state_save=0", stdout=-1, stderr=-1,
    )  # fmt: skip
    racks = crossed(lab)
    (effect,) = load(lab, racks)["volumes"]
    assert effect["misplaced"] > 0 and not effect["without_place"], effect
    wait_for(lambda: volume(lab)["misplaced"] == 0 and is_healthy(lab), within_s=240)
    output, errors = fio.communicate(timeout=300)
    assert fio.returncode == 0, errors.decode() + output.decode() + lab.logs()
    wait_for(lambda: is_healthy(lab), within_s=120)

    for node in NODES:
        if racks[node] != racks["n3"]:
            lab.kill(node)
    assert lab.run("n3", "sh", "-c", f"sha256sum < {VOLUME}/file") == written
    write_file(lab, "n3", "more")
    assert volume(lab, "n3")["health"] == "No redundancy", "two copies of everything, one rack of two"
