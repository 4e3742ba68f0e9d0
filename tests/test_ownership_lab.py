"""A lab of three nodes: coordinators are moved, and spread by themselves, under fio and a storm of changes of names."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from csvfs.units import MIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for
from tests.test_first_cluster import is_mounted

pytestmark = [pytest.mark.lab, needs_lab]

NODES = ("n1", "n2", "n3")
VOLUMES = ("Volume1", "Volume2", "Volume3")

# Ends when the file STOP is there; every error of any call ends it with a traceback.
STORM = """
import json, os, sys, time
home, stop = sys.argv[1:]
os.mkdir(home)
rounds, longest, last = 0, 0.0, time.monotonic()
while not os.path.exists(stop):
    name = f"{home}/{rounds}"
    with open(name, "w") as file:
        file.write(str(rounds))
    os.rename(name, name + "x")
    os.mkdir(name)
    assert sorted(os.listdir(home)) == sorted([f"{rounds}", f"{rounds}x"]), os.listdir(home)
    with open(name + "x") as file:
        assert file.read() == str(rounds)
    os.rmdir(name)
    os.unlink(name + "x")
    rounds += 1
    now = time.monotonic()
    longest, last = max(longest, now - last), now
assert os.listdir(home) == []
print(json.dumps({"rounds": rounds, "longest_s": round(longest, 3)}))
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=3, drives=1, drive_size=1024 * MIB) as cluster:
        for name in VOLUMES:
            cluster.run("n1", "csvfs", "volume", "create", name)
        wait_for(lambda: all(is_mounted(cluster, node) for node in NODES), within_s=60)
        yield cluster


def owners(cluster: LabCluster) -> dict[str, str]:
    rows = json.loads(cluster.run("n1", "csvfs", "volume", "list", "--json"))
    return {row["name"]: row["coordinator"] for row in rows}


def test_volumes_are_moved_and_spread_again_and_neither_fio_nor_a_storm_of_names_sees_an_error(lab, tmp_path):
    """The storm's longest round, of nine calls, is printed: a pause, no error."""
    script = tmp_path / "storm.py"
    script.write_text(textwrap.dedent(STORM))
    stop = Path(tmp_path, "stop")
    storms = [
        lab.start_command(
            node, sys.executable, str(script), f"/clusterstorage/Volume1/storm-{node}", str(stop),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for node in ("n1", "n2")
    ]  # fmt: skip
    fio = lab.start_command(
        "n3", "fio", "--name=moves", "--directory=/clusterstorage/Volume1", "--ioengine=psync", "--bs=4k",
        "--rw=randrw", "--size=16M", "--verify=crc32c", "--verify_backlog=64", "--fallocate=none", "--direct=1",
        "--time_based", "--runtime=8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    for node in ("n2", "n1"):
        lab.run("n1", "csvfs", "volume", "move", "Volume1", node)
        assert owners(lab)["Volume1"] == node
    for name in ("Volume2", "Volume3"):
        lab.run("n2", "csvfs", "volume", "set", name, "--preferred", "n1")
    wait_for(lambda: set(owners(lab).values()) == {"n1"}, within_s=180, explain=lab.logs)
    for name in VOLUMES:
        lab.run("n2", "csvfs", "volume", "set", name, "--preferred", "none")
    wait_for(lambda: sorted(owners(lab).values()) == list(NODES), within_s=180, explain=lab.logs)
    assert lab.finish(fio).count("err= 0") == 1
    stop.touch()
    for storm in storms:
        said = json.loads(lab.finish(storm).splitlines()[-1])
        print(f"storm: {said}")
        assert said["rounds"] > 0


def why(cluster: LabCluster, node: str, what: str) -> dict[str, Any]:
    return dict(json.loads(cluster.run(node, "csvfs", "why", what, "--json")))


def test_a_write_below_min_copies_waits_says_why_and_goes_on_when_the_node_is_back(lab):
    lab.run("n1", "csvfs", "volume", "move", "Volume2", "n1")
    lab.run("n1", "csvfs", "volume", "set", "Volume2", "--min-copies", "3")
    file = "/clusterstorage/Volume2/file"
    lab.run("n1", "sh", "-c", f"echo old > {file} && sync {file}")
    wait_for(lambda: why(lab, "n1", file) == direct("n1"), within_s=60, explain=lambda: str(why(lab, "n1", file)))
    lab.kill("n3")
    append = f"echo new >> {file} && echo written"
    writer = lab.start_command("n1", "sh", "-c", append, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def is_explained() -> bool:
        said = why(lab, "n1", "Volume2")
        return said["mode"] == "paused" and any("(--min-copies)" in row["on"] for row in said["waits"])

    wait_for(is_explained, within_s=50, explain=lambda: f"{why(lab, 'n1', 'Volume2')}\n{lab.logs()}")
    wait_for(lambda: io(lab, "n2")["n3"] == {"mode": "unavailable", "why": "the node is down"}, within_s=30)
    wait_for(lambda: io(lab, "n2")["n1"]["mode"] == "paused", within_s=30)
    wait_for(lambda: io(lab, "n2")["n2"]["mode"] == "direct", within_s=30)
    lab.start("n3")
    assert "written" in lab.finish(writer)
    assert lab.run("n2", "cat", file) == b"old\nnew\n"
    wait_for(lambda: why(lab, "n1", "Volume2")["mode"] == "direct", within_s=60)


def direct(node: str) -> dict[str, Any]:
    return {"volume": "Volume2", "node": node, "mode": "direct", "why": "", "waits": []}


def io(cluster: LabCluster, node: str) -> dict[str, Any]:
    """How the I/O of each node to Volume2 goes, as `csvfs volume status` shows it on `node`."""
    shown = json.loads(cluster.run(node, "csvfs", "volume", "status", "Volume2", "--json"))
    return dict(shown["volume"]["io"])
