"""File locks on a lab: programs on several nodes, coordinators and nodes that die."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for
from tests.test_first_cluster import is_mounted

pytestmark = [pytest.mark.lab, needs_lab]

VOLUME = "/clusterstorage/Volume1"

# Adds one to a number in a file, under a lock, again and again; says when it had the lock (one clock for all nodes).
COUNT = """
import fcntl, os, sys, time
path, kind, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
fd = os.open(path, os.O_RDWR)
for _ in range(rounds):
    if kind == "flock":
        fcntl.flock(fd, fcntl.LOCK_EX)
    else:
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, 1 << 40)
    began = time.monotonic_ns()
    number = int(os.pread(fd, 100, 0) or b"0")
    os.pwrite(fd, b"%d" % (number + 1), 0)
    print(began, time.monotonic_ns(), flush=True)
    if kind == "flock":
        fcntl.flock(fd, fcntl.LOCK_UN)
    else:
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, 1 << 40)
"""

# Takes a lock, says so, and holds it until its input ends.
HOLD = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(fd, fcntl.LOCK_EX, 0, 0)
print("held", flush=True)
sys.stdin.read()
"""

# Whether the lock is free, without waiting.
TRY = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
try:
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 0)
    print("free")
except BlockingIOError:
    print("taken")
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=3, drives=1) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "3")
        for node in ("n1", "n2", "n3"):
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=60)
        yield cluster


def coordinator_of(lab: LabCluster) -> str:
    rows = json.loads(lab.run("n1", "csvfs", "volume", "list", "--json"))
    return str(next(row["coordinator"] for row in rows if row["name"] == "Volume1"))


def try_lock(lab: LabCluster, node: str, path: str) -> str:
    return lab.run(node, sys.executable, "-c", TRY, path).decode().strip()


def start_holder(lab: LabCluster, node: str, path: str) -> subprocess.Popen[bytes]:
    holder = lab.start_command(
        node, sys.executable, "-c", HOLD, path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    return holder


@pytest.mark.parametrize("kind", ["fcntl", "flock"])
def test_L1_no_two_programs_hold_a_lock_at_once_while_their_coordinator_is_killed(
    lab: LabCluster, tmp_path: Path, kind: str
) -> None:
    path, rounds, programs = f"{VOLUME}/{kind}", 60, ("n1", "n2", "n2")
    lab.run("n1", "sh", "-c", f": > {path}")
    outputs = [tmp_path / f"{index}" for index in range(len(programs))]
    running = []
    for node, output in zip(programs, outputs, strict=True):
        with output.open("wb") as file:
            argv = (sys.executable, "-c", COUNT, path, kind, str(rounds))
            running.append(lab.start_command(node, *argv, stdout=file, stderr=subprocess.PIPE))

    def locked() -> int:
        return sum(len(output.read_bytes().splitlines()) for output in outputs)

    wait_for(lambda: locked() >= rounds // 2, within_s=120, explain=lab.logs)
    killed_after = locked()
    lab.kill(coordinator_of(lab), "coordinator")
    for program in running:
        lab.finish(program)
    assert killed_after < rounds * len(programs), "the coordinator died while they were at it"
    held = sorted(tuple(map(int, line.split())) for output in outputs for line in output.read_text().splitlines())
    assert len(held) == rounds * len(programs)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(held)), "no two at once"
    assert int(lab.run("n3", "cat", path)) == rounds * len(programs)


def test_a_program_that_is_killed_lets_go_of_its_locks_and_one_that_waits_can_be_killed(lab: LabCluster) -> None:
    path = f"{VOLUME}/killed"
    holder = start_holder(lab, "n1", path)
    assert try_lock(lab, "n2", path) == "taken"
    waiter = lab.start_command("n2", sys.executable, "-c", HOLD, path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    # `lab exec` waits for the program; the program itself is the one with our code on its command line.
    wait_for(lambda: len(pids_of(path)) >= 2, within_s=60)
    for pid in pids_of(path):
        subprocess.run(["kill", "-9", str(pid)], check=False)
    for program in (holder, waiter):
        program.communicate(timeout=120)
    assert try_lock(lab, "n2", path) == "free"
    assert try_lock(lab, "n1", path) == "free"


def pids_of(path: str) -> list[int]:
    """Processes that run HOLD on that file."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if path.encode() in words and HOLD.encode() in words and b"exec" not in words:
            found.append(int(entry.parent.name))
    return found


def test_L1_locks_outlive_the_process_of_their_mount(lab: LabCluster) -> None:
    """The next one serves the same programs, and gives their locks up when they close their files."""
    path = f"{VOLUME}/handed"
    holder = start_holder(lab, "n1", path)
    waiting = lab.start_command("n1", sys.executable, "-c", HOLD, path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    lab.kill("n1", "mount")
    assert try_lock(lab, "n1", path) == "taken"
    assert try_lock(lab, "n2", path) == "taken"
    holder.communicate(timeout=120)
    assert waiting.stdout is not None and waiting.stdout.readline() == b"held\n", "it was in line all the time"
    assert try_lock(lab, "n2", path) == "taken"
    waiting.communicate(timeout=120)
    assert try_lock(lab, "n2", path) == "free"


def test_L1_locks_of_a_node_without_power_pass_on_and_not_before(lab: LabCluster) -> None:
    path = f"{VOLUME}/power"
    holder = start_holder(lab, "n3", path)
    assert try_lock(lab, "n1", path) == "taken"
    waiting = lab.start_command(
        "n1", sys.executable, "-c", HOLD, path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    lab.kill("n3")
    assert waiting.stdout is not None and waiting.stdout.readline() == b"held\n"
    assert try_lock(lab, "n2", path) == "taken"
    waiting.communicate(timeout=120)
    assert try_lock(lab, "n2", path) == "free"
    holder.kill()
    holder.communicate(timeout=120)
