"""What tools/bench_scale does, with a few hundred entries and extents on a lab of two nodes: that each step finds what it is to
find, on the node that made it and on the other one."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from csvfs.units import MIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for
from tests.programs.scale import WORKER
from tests.test_first_cluster import is_mounted

pytestmark = [pytest.mark.lab, needs_lab]

VOLUME = "/clusterstorage/Volume1"
NAMES = 300
EXTENTS = 200


@pytest.fixture(scope="module")
def two() -> Iterator[LabCluster]:
    with running_lab(nodes=2) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--resiliency", "mirror", "--copies", "2")
        for node in ("n1", "n2"):
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=120, explain=cluster.logs)  # type: ignore[misc]
        yield cluster


def step(cluster: LabCluster, node: str, name: str, *, jobs: int = 1, **arguments: Any) -> int:
    """Run it; how many operations it made. Raises AssertionError: something was not as it should be."""
    said = cluster.run(node, sys.executable, WORKER, name, json.dumps({**arguments, "jobs": jobs}))
    return int(json.loads(said.splitlines()[-1])["count"])


@pytest.mark.parametrize("tree", [False, True])
def test_names_are_made_found_listed_renamed_and_removed_on_two_nodes(two: LabCluster, tree: bool) -> None:
    root = f"{VOLUME}/names-{tree}"
    two.run("n1", "mkdir", root)
    base = {"root": root, "count": NAMES, "tree": tree}
    drawn = {**base, "size": 60, "seed": 3}
    assert step(two, "n1", "create", **base) == NAMES
    assert step(two, "n2", "lookup", jobs=2, **drawn) == 60
    assert step(two, "n2", "lookup absent", **drawn) == 60
    for node in ("n1", "n2"):
        assert step(two, node, "list", **base) == NAMES
    assert step(two, "n2", "rename", **drawn) == 120
    assert step(two, "n1", "list", **base) == NAMES
    if not tree:
        assert step(two, "n1", "seek", **base) >= NAMES
    assert step(two, "n2", "unlink", jobs=2, **{**base, "size": NAMES}) == NAMES
    assert two.run("n1", "ls", "-A", root).split() == ([b"d000000"] if tree else [])


def test_a_sparse_file_of_a_tebibyte_reads_back_and_gives_its_space_back(two: LabCluster) -> None:
    path, size = f"{VOLUME}/sparse", 1 << 40
    used = used_bytes(two)
    two.run("n1", "truncate", "-s", str(size), path)
    base = {"path": path, "count": EXTENTS, "size": size, "seed": 5, "written": EXTENTS}
    assert step(two, "n1", "sparse write", jobs=4, **base) == EXTENTS
    for name in ("sparse read", "sparse walk"):
        assert step(two, "n2", name, **base) == EXTENTS
    found = json.loads(two.run("n2", "csvfs", "file", "map", path, "--json"))
    assert found["extents"] == EXTENTS and found["size"] == size
    two.run("n2", "truncate", "-s", str(size // 2), path)
    left = json.loads(two.run("n1", "csvfs", "file", "map", path, "--json"))
    assert 0 < left["extents"] < EXTENTS and left["size"] == size // 2
    two.run("n2", "rm", path)
    wait_for(lambda: used_bytes(two) <= used + MIB, within_s=120)


def used_bytes(cluster: LabCluster) -> int:
    size, free, unit = (int(word) for word in cluster.run("n2", "stat", "-f", "-c", "%b %f %S", VOLUME).split())
    return (size - free) * unit
