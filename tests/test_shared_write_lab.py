"""Programs on two nodes write one file past their caches at once, as guests of a cluster with a disk that they share."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csvfs.units import MIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for
from tests.shared_disk_program import BLOCK, BLOCKS, HEAD
from tests.test_first_cluster import is_mounted
from tests.test_mount_handover_lab import kill_mount

pytestmark = [pytest.mark.lab, needs_lab]

DISK = "/clusterstorage/Volume1/disk"
PROGRAM = str(Path(__file__).with_name("shared_disk_program.py"))
NODES = ("n1", "n2")


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=3, drives=1, drive_size=1024 * MIB) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "2")
        for node in ("n1", "n2", "n3"):
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=60)
        yield cluster


def times_shared(lab: LabCluster) -> int:
    """How often coordinators have made a file shared."""
    logs = lab.directory.glob("nodes/*/run/logs/coordinator.log")
    return sum(log.read_text(errors="replace").count(" is shared: nodes") for log in logs)


def work_on_one_disk(lab: LabCluster, meanwhile: Callable[[], None]) -> int:
    """Programs on two nodes, until `meanwhile` has returned; how many calls they made. Every byte must be where it belongs."""
    lab.run("n3", "sh", "-euc", f"rm -f {DISK}; head -c {BLOCK * BLOCKS} /dev/zero >{DISK}; sync {DISK}")
    programs = [
        lab.start_command(
            node, sys.executable, PROGRAM, DISK, str(part), str(len(NODES)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for part, node in enumerate(NODES)
    ]  # fmt: skip
    for program in programs:
        assert program.stdout is not None and program.stdout.readline() == "at work\n"
    shared_before = times_shared(lab)
    wait_for(lambda: times_shared(lab) > shared_before, within_s=60)
    time.sleep(1.0)
    meanwhile()
    time.sleep(2.0)
    told = []
    for program in programs:
        assert program.stdin is not None and program.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says why
            program.stdin.write("\n")
            program.stdin.flush()
        told.append(json.loads(program.stdout.readline() or '{"wrong": ["it ended"]}'))
        program.wait(timeout=60)
    assert [answer["wrong"] for answer in told] == [[], []], f"{told}\n{lab.logs()}"
    content = lab.run("n3", "cat", DISK)
    for part, answer in enumerate(told):
        for block, count in answer["written"]:
            assert HEAD.unpack_from(content, block * BLOCK) == (block, part, count)
    return sum(answer["done"] for answer in told)


def test_two_nodes_write_one_disk_at_once(lab: LabCluster) -> None:
    assert work_on_one_disk(lab, lambda: time.sleep(3.0)) > 100


def test_I4_a_third_node_copies_the_disk_by_its_cache_meanwhile_and_changes_its_time(lab: LabCluster) -> None:
    def look() -> None:
        for _ in range(3):
            lab.run("n3", "sh", "-euc", f"cat {DISK} >/dev/null; touch {DISK}; stat {DISK} >/dev/null")
            time.sleep(0.5)

    work_on_one_disk(lab, look)


def test_I4_a_mount_that_writes_is_killed_again_and_again(lab: LabCluster) -> None:
    def kill() -> None:
        for node in (*NODES, NODES[0]):
            kill_mount(lab, node)
            time.sleep(1.5)

    work_on_one_disk(lab, kill)


def test_I4_the_coordinator_is_killed_and_then_a_mount_together_with_it(lab: LabCluster) -> None:
    def kill() -> None:
        for node in lab.files.nodes():
            lab.kill(node.name, "coordinator")
        time.sleep(3.0)
        for node in lab.files.nodes():
            lab.kill(node.name, "coordinator")
        kill_mount(lab, "n2")
        time.sleep(2.0)

    work_on_one_disk(lab, kill)
