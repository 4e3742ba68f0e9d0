"""The link between two nodes is cut in a lab, while both reach everybody else: programs wait a moment and go on."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from csvfs.admin import lab as lab_commands
from csvfs.errors import BadRequest, NotFound
from csvfs.units import MIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for
from tests.test_first_cluster import is_mounted

pytestmark = [pytest.mark.lab, needs_lab]

VOLUME = "/clusterstorage/Volume1"
PATIENCE_S = 120
# Writes blocks in turn, fsyncs, makes and renames a file; until a line comes. Says the number of the last round.
PROGRAM = """
import os, select, sys
volume = sys.argv[1]
file = os.open(f"{volume}/blocks", os.O_RDWR | os.O_CREAT, 0o644)
number = 0
while not select.select([sys.stdin], [], [], 0.005)[0]:
    number += 1
    os.pwrite(file, number.to_bytes(8, "little") * 512, number % 64 * 4096)
    if number % 8 == 0:
        os.fsync(file)
        with open(f"{volume}/name.new", "w") as named:
            named.write(str(number))
        os.rename(f"{volume}/name.new", f"{volume}/name")
    if number % 50 == 0:
        print(number, flush=True)
os.fsync(file)
print(number, flush=True)
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=3, drives=1, drive_size=512 * MIB) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "3")
        cluster.run("n1", "csvfs", "volume", "move", "Volume1", "n2")
        for node in ("n1", "n3"):
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=60)
        yield cluster
        cluster.heal()


def status(lab: LabCluster) -> dict[str, Any]:
    """As a command on n3 sees it, which reaches both."""
    said = lab.run("n3", "csvfs", "volume", "status", "Volume1", "--json", check=False)
    try:
        found: dict[str, Any] = json.loads(said)["volume"]
    except ValueError:
        return {}
    return found


def io_mode(lab: LabCluster, node: str) -> tuple[str, str]:
    row = status(lab).get("io", {}).get(node, {})
    return row.get("mode", ""), row.get("why", "")


def test_a_program_without_a_path_to_a_copy_and_to_its_coordinator_goes_on_by_a_third_node(lab: LabCluster) -> None:
    program = lab.start_command(
        "n1", sys.executable, "-c", PROGRAM, VOLUME, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert program.stdin is not None and program.stdout is not None
    assert int(program.stdout.readline()) > 0

    lab_commands.lab_partition(lab.directory, "n1", "n2")
    wait_for(lambda: io_mode(lab, "n1")[0] == "redirected", within_s=PATIENCE_S)
    assert "through n3" in io_mode(lab, "n1")[1]
    for _ in range(3):
        assert int(program.stdout.readline()) > 0  # it goes on meanwhile
    why = json.loads(lab.run("n1", "csvfs", "why", "Volume1", "--json"))
    assert why["mode"] == "redirected" and "the coordinator on n2 through n3" in why["why"]

    lab.heal()
    wait_for(lambda: io_mode(lab, "n1") == ("direct", ""), within_s=PATIENCE_S)
    assert int(program.stdout.readline()) > 0
    program.stdin.write("\n")
    program.stdin.flush()
    last = int(program.stdout.read().split()[-1])
    assert program.wait(timeout=PATIENCE_S) == 0

    wait_for(lambda: {"1", "2"}.isdisjoint(status(lab)["slabs_by_copies"]), within_s=PATIENCE_S)
    for node in ("n1", "n3"):
        blocks = lab.run(node, "cat", f"{VOLUME}/blocks")
        numbers = [int.from_bytes(blocks[at : at + 8], "little") for at in range(0, len(blocks), 4096)]
        assert sorted(numbers) == list(range(last - 63, last + 1))
        assert int(lab.run(node, "cat", f"{VOLUME}/name")) == last - last % 8


def test_a_link_that_is_cut_one_way_says_so_and_healing_ends_it(lab: LabCluster) -> None:
    def cuts() -> dict[str, list[str]]:
        return {row["name"]: row["cut_from"] for row in lab_commands.lab_status(lab.directory)["nodes"]}

    lab_commands.lab_partition(lab.directory, "n3", "n1", one_way=True)
    assert cuts() == {"n1": [], "n2": [], "n3": ["n1"]}
    lab_commands.lab_partition(lab.directory, "n3", "n1")
    assert cuts() == {"n1": ["n3"], "n2": [], "n3": ["n1"]}
    lab.heal()
    lab.heal()
    assert cuts() == {"n1": [], "n2": [], "n3": []}
    with pytest.raises(NotFound):
        lab_commands.lab_partition(lab.directory, "n1", "n9")
    with pytest.raises(BadRequest, match="itself"):
        lab_commands.lab_partition(lab.directory, "n1", "n1")
    with pytest.raises(BadRequest, match="name both"):
        lab_commands.lab_partition(lab.directory, "n1", one_way=True)
