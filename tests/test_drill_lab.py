"""Drills on a real lab: programs at work, processes killed, and the judgement of what the programs saw."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from csvfs.admin.drill_pauses import MEASURED
from csvfs.units import GIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for

pytestmark = [pytest.mark.lab, needs_lab]

OPTIONS = "[options]\nnode_lease_ms = 12000\nrecall_timeout_ms = 30000\n"
MOUNTED = ("sh", "-c", "mountpoint -q /clusterstorage/Drill && echo yes")


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(drives=1, drive_size=2 * GIB) as cluster:
        for node in cluster.files.nodes():
            # Long leases: what a busy machine makes late here is not what dies in these tests.
            cluster.kill(node.name)
            node.config.write_text(node.config.read_text() + OPTIONS)
            cluster.start(node.name)
        cluster.run("n1", "csvfs", "volume", "create", "Drill", "--resiliency", "mirror", "--copies", "3")
        for node in cluster.files.nodes():
            wait_for(lambda node=node: cluster.run(node.name, *MOUNTED, check=False), within_s=180)  # type: ignore[misc]
        yield cluster


@pytest.mark.parametrize("drill", ["coordinator", "drive", "mount"])
def test_a_process_is_killed_or_stopped_and_nothing_is_lost_and_no_program_sees_an_error(
    lab: LabCluster, tmp_path: Path, drill: str
) -> None:
    drawn = tmp_path / "drill.html"
    options = ("--dir", str(lab.directory), "--json", "--html", str(drawn))
    command = [sys.executable, "-m", "csvfs.admin.cli", "drill", *drill.split(), *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, f"{ran.stdout[-6000:]}\n{ran.stderr[-2000:]}\n{lab.logs()}"
    told = json.loads(ran.stdout)
    (row,) = told["rounds"]
    assert told["held"] and row["violation_count"] == 0 and row["acknowledged"] > row["fsynced"] > 0
    for where in ("elsewhere", "at fault"):  # each kind of program was at work after the fault, on both sides of it
        assert all(row["pauses"][where][group]["answers"] > 0 for group in MEASURED)
    assert "<svg" in drawn.read_text()
