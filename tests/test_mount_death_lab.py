"""A mount dies, or its node is cut off, while programs have its files open: they may get errors, and never bytes of
before (I5)."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from csvfs.units import MIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for
from tests.test_first_cluster import is_mounted

pytestmark = [pytest.mark.lab, needs_lab]

VOLUME = "/clusterstorage/Volume1"
FILES = 20
READER = """
import mmap, os, sys
files = [os.open(f"{sys.argv[1]}/f{number}", os.O_RDONLY) for number in range(int(sys.argv[2]))]
maps = [mmap.mmap(file, 0, access=mmap.ACCESS_READ) for file in files] if sys.argv[3] == "map" else []
def seen():
    for number, file in enumerate(files):
        try:
            yield chr(maps[number][70_000]) if maps else os.pread(file, 1, 70_000).decode()
        except OSError as error:
            yield f"E{error.errno}"
print(" ".join(seen()), flush=True)
sys.stdin.readline()
print(" ".join(seen()), flush=True)
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=3, drives=1, drive_size=512 * MIB) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "3")
        for node in ("n1", "n2"):
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=60)
        yield cluster


def write_all(lab: LabCluster, node: str, letter: str) -> None:
    command = f"for n in $(seq 0 {FILES - 1}); do head -c 100000 /dev/zero | tr '\\0' {letter} > {VOLUME}/f$n; done"
    lab.run(node, "sh", "-c", command)


@contextlib.contextmanager
def reader_on(lab: LabCluster, node: str, way: str) -> Iterator[Callable[[], list[str]]]:
    """A program that has the files open, all of them read once; called, it reads again and says what it saw."""
    wait_for(lambda: is_mounted(lab, node), within_s=60)
    reader = lab.start_command(
        node, sys.executable, "-c", READER, VOLUME, str(FILES), way,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert reader.stdout is not None and reader.stdin is not None
    stdin, stdout = reader.stdin, reader.stdout
    assert set(stdout.readline().split()) == {"a"}

    def read_again() -> list[str]:
        stdin.write("\n")
        stdin.flush()
        return stdout.readline().split()

    yield read_again
    stdin.close()
    ended_well = reader.wait(timeout=60) == 0
    assert ended_well or way == "map"  # the page is gone: SIGBUS


@pytest.mark.parametrize("way", ["read", "map"])
@pytest.mark.parametrize("frozen_first", [False, True])
def test_I5_programs_with_open_files_see_no_page_of_a_mount_that_was_killed(lab, way, frozen_first):
    write_all(lab, "n1", "a")
    with reader_on(lab, "n2", way) as read_again:
        before = lab.pids("n2")["mount"]
        if frozen_first:
            os.kill(before[0], signal.SIGSTOP)
        lab.kill("n2", "mount")
        wait_for(lambda: lab.pids("n2").get("mount", before) != before and is_mounted(lab, "n2"), within_s=60)
        write_all(lab, "n1", "b")
        seen = read_again()
    assert "a" not in seen and len(seen) in (FILES, 0), seen
    assert lab.run("n2", "head", "-c", "1", f"{VOLUME}/f3") == b"b"


def test_I5_programs_with_open_files_see_no_page_of_a_mount_that_stands_still(lab):
    """Others get what it held; when it is stopped for good, and nobody kills it but its parent."""
    write_all(lab, "n1", "a")
    with reader_on(lab, "n2", "read") as read_again:
        os.kill(lab.pids("n2")["mount"][0], signal.SIGSTOP)
        write_all(lab, "n1", "b")  # its leases have passed on
        seen = read_again()
    assert "a" not in seen and len(seen) == FILES, seen
    wait_for(lambda: is_mounted(lab, "n2"), within_s=60)
    assert lab.run("n2", "head", "-c", "1", f"{VOLUME}/f3") == b"b"


@pytest.mark.parametrize("way", ["read", "map"])
def test_I5_programs_with_open_files_see_no_page_of_before_on_a_node_that_is_cut_off(lab, way):
    """Others write as soon as it is evicted; it is still cut off when the program looks again."""
    write_all(lab, "n1", "a")
    with reader_on(lab, "n2", way) as read_again:
        lab.partition("n2")
        write_all(lab, "n1", "b")
        heal = threading.Timer(3.0, lab.heal)  # until then the program waits
        heal.start()
        seen = read_again()
        heal.join()
    assert "a" not in seen and len(seen) in (FILES, 0), seen
    wait_for(lambda: is_mounted(lab, "n2"), within_s=60)
    assert lab.run("n2", "head", "-c", "1", f"{VOLUME}/f3") == b"b"
