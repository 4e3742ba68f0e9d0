"""A mount process is killed under programs that do everything with files: they see a pause, and nothing else."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from csvfs.units import MIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for
from tests.test_first_cluster import is_mounted

pytestmark = [pytest.mark.lab, needs_lab]

VOLUME = "/clusterstorage/Volume1"
PROGRAM = str(Path(__file__).with_name("busy_program.py"))
LATE = """
import mmap, os, sys, threading
MIB = 1 << 20
read = os.open(f"{sys.argv[1]}/read", os.O_RDONLY)
os.posix_fadvise(read, 0, 0, os.POSIX_FADV_RANDOM)
before = os.pread(read, 1, 3 * MIB)
written = os.open(f"{sys.argv[1]}/written", os.O_RDWR)
pages = mmap.mmap(written, MIB)
pages[:] = b"m" * MIB
print("ready", flush=True)
sys.stdin.readline()
waiting = []
thread = threading.Thread(target=lambda: waiting.append(os.pread(read, 1, 2 * MIB)))
thread.start()
sys.stdin.readline()
seen = os.pread(read, 1, 3 * MIB)
thread.join()
pages.flush()
print(before, *waiting, seen, flush=True)
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=3, drives=1, drive_size=1024 * MIB) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "2")
        for node in ("n1", "n2"):
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=60)
        yield cluster


@contextlib.contextmanager
def busy(lab: LabCluster, node: str, name: str) -> Iterator[None]:
    """A program at work on all kinds of files; at the end it must have seen nothing wrong."""
    program = lab.start_command(
        node, sys.executable, PROGRAM, f"{VOLUME}/{name}", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert program.stdin is not None and program.stdout is not None
    assert program.stdout.readline() == "at work\n"
    time.sleep(1.0)
    yield
    time.sleep(2.0)  # so that there is work after the last fault
    program.stdin.write("\n")
    program.stdin.flush()
    told = json.loads(program.stdout.readline() or '{"wrong": ["it ended"]}')
    assert told["wrong"] == [] and all(told["done"].values()), f"{told}\n{lab.logs()}"
    program.wait(timeout=60)


def kill_mount(lab: LabCluster, node: str) -> None:
    """Returns when the next process is there. The FUSE session is still the one of before."""
    device = lab.run(node, "stat", "-c", "%d", VOLUME)
    before = lab.pids(node)["mount"]
    lab.kill(node, "mount")
    wait_for(lambda: lab.pids(node).get("mount", before) != before, within_s=60)
    assert lab.run(node, "stat", "-c", "%d", VOLUME) == device


def test_I11_a_mount_is_killed_again_and_again_and_programs_notice_nothing_but_a_pause(lab: LabCluster) -> None:
    with busy(lab, "n2", "mount"):
        for _ in range(3):
            kill_mount(lab, "n2")
            time.sleep(2.0)


def test_a_mount_in_use_gets_a_new_process_when_it_is_asked_for(lab: LabCluster) -> None:
    with busy(lab, "n2", "remount"):
        before = lab.pids("n2")["mount"]
        told = json.loads(lab.run("n2", "csvfs", "volume", "remount", "Volume1", "--json"))
        assert told["pause_ms"] > 0 and lab.pids("n2")["mount"] != before


def test_a_mount_and_its_coordinator_are_killed_together_and_programs_notice_nothing_but_a_pause(lab: LabCluster) -> None:
    with busy(lab, "n1", "both"):
        for node in lab.files.nodes():
            lab.kill(node.name, "coordinator")
            kill_mount(lab, "n1")
            time.sleep(2.0)


def test_I5_a_mount_that_is_followed_late_costs_its_programs_no_error_though_they_wait_for_pages(lab: LabCluster) -> None:
    """Longer than others wait for its leases: pages must be gone by then, but some are locked, and some are dirty."""
    wait_for(lambda: is_mounted(lab, "n3"), within_s=60)  # a node of its own: five deaths in 30 s end a session
    lab.run("n1", "sh", "-euc", f"cd {VOLUME}; head -c 4M /dev/zero | tr '\\0' a >read; truncate -s 1M written")
    program = lab.start_command(
        "n3", sys.executable, "-c", LATE, VOLUME, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert program.stdin is not None and program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    device, before = lab.run("n3", "stat", "-c", "%d", VOLUME), lab.pids("n3")["mount"]
    lab.kill("n3", "mount")
    program.stdin.write("\n")
    program.stdin.flush()
    change = f"printf b | dd of={VOLUME}/read bs=1 seek=3M conv=notrunc status=none"
    writer = lab.start_command("n1", "sh", "-c", change)
    for _ in range(4):
        wait_for(lambda before=before: lab.pids("n3").get("mount", before) != before, within_s=60)
        before = lab.pids("n3").get("mount", before)
        with contextlib.suppress(ProcessLookupError):
            os.kill(before[0], signal.SIGSTOP)  # its parent kills it after 1.5 s
    lab.finish(writer)
    program.stdin.write("\n")
    program.stdin.flush()
    assert program.stdout.readline() == "b'a' b'a' b'b'\n", lab.logs()
    assert program.wait(timeout=60) == 0 and lab.run("n3", "stat", "-c", "%d", VOLUME) == device
    assert lab.run("n1", "tr", "-d", "m", input=lab.run("n1", "cat", f"{VOLUME}/written")) == b""
