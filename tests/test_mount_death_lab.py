"""A mount process dies while programs have its files open: they may get errors, and never bytes of before (I5)."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

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


@pytest.mark.parametrize("way", ["read", "map"])
@pytest.mark.parametrize("frozen_first", [False, True])
def test_I5_programs_with_open_files_see_no_page_of_a_mount_that_was_killed(lab, way, frozen_first):
    write_all(lab, "n1", "a")
    wait_for(lambda: is_mounted(lab, "n2"), within_s=60)
    reader = lab.start_command(
        "n2", sys.executable, "-c", READER, VOLUME, str(FILES), way,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert reader.stdout is not None and reader.stdin is not None
    assert set(reader.stdout.readline().split()) == {"a"}
    if frozen_first:
        os.kill(lab.pids("n2")["mount"][0], signal.SIGSTOP)
    before = lab.pids("n2")["mount"]
    lab.kill("n2", "mount")
    wait_for(lambda: lab.pids("n2").get("mount", before) != before and is_mounted(lab, "n2"), within_s=60)
    write_all(lab, "n1", "b")
    reader.stdin.write("\n")
    reader.stdin.flush()
    seen = reader.stdout.readline().split()
    reader.stdin.close()
    assert "a" not in seen, seen
    if way == "read":
        assert len(seen) == FILES
        assert reader.wait(timeout=60) == 0
    else:  # the page is gone: SIGBUS, as `lab exec` passes it on
        assert reader.wait(timeout=60) != 0 or "b" in seen
    assert lab.run("n2", "head", "-c", "1", f"{VOLUME}/f3") == b"b"
