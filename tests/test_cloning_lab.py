"""Clones on a lab of three nodes: cp --reflink, fio and a random program, while processes are killed."""

import json
import random
import sys
import threading
from collections.abc import Iterator

import pytest

from csvfs.units import GIB, MIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for
from tests.test_first_cluster import is_mounted, owner

pytestmark = [pytest.mark.lab, needs_lab]

VOLUME = "/clusterstorage/Volume1"
FIO = (
    "fio", "--ioengine=libaio", "--direct=1", "--bs=4k", "--size=6M", "--rw=randwrite", "--iodepth=8", "--fallocate=none",
    "--overwrite=1", "--verify=crc32c", "--verify_fatal=1", "--output-format=json",
)  # fmt: skip


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=3, drives=1, drive_size=2 * GIB) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "3")
        for node in ("n1", "n2", "n3"):
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=60)
        yield cluster


def used(lab: LabCluster) -> int:
    blocks, free, size = (int(n) for n in lab.run("n1", "stat", "-f", "-c", "%b %f %S", VOLUME).split())
    return (blocks - free) * size


def map_of(lab: LabCluster, path: str) -> dict:
    return json.loads(lab.run("n2", "csvfs", "file", "map", path, "--json"))


def tail_of(lab: LabCluster, path: str) -> bytes:
    return lab.run("n3", "sh", "-c", f"tail -c +{6 * MIB + 1} {path} | sha256sum")


def test_a_clone_takes_no_space_and_both_files_keep_their_own_writes_and_the_other_is_deleted(lab):
    image, clone = f"{VOLUME}/image", f"{VOLUME}/clone"
    lab.run("n1", "sh", "-c", f"head -c 24M /dev/urandom > {image} && sync {image}")
    before, tail = used(lab), tail_of(lab, image)
    lab.run("n1", "cp", "--reflink=auto", image, clone)
    assert used(lab) <= before
    lab.run("n2", "cmp", image, clone)
    found = map_of(lab, clone)
    assert found["shared"] == found["size"] == 24 * MIB
    assert {len(row["copies"]) for row in found["rows"]} == {3} and {row["owners"] for row in found["rows"]} <= {1, 2}
    assert "n3:" in lab.run("n2", "csvfs", "file", "map", image).decode()
    results = {}

    def write(node: str, path: str) -> None:
        results[node] = json.loads(lab.run(node, *FIO, f"--name={node}", f"--filename={path}"))

    threads = [threading.Thread(target=write, args=pair) for pair in (("n1", image), ("n2", clone))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {node: result["jobs"][0]["error"] for node, result in results.items()} == {"n1": 0, "n2": 0}
    assert tail_of(lab, image) == tail_of(lab, clone) == tail
    assert map_of(lab, clone)["shared"] == 18 * MIB
    first = lab.run("n2", "sha256sum", clone).split()[0]
    lab.run("n1", "rm", image)
    wait_for(lambda: map_of(lab, clone)["shared"] == 0, within_s=60)
    assert lab.run("n3", "sha256sum", clone).split()[0] == first
    lab.run("n3", "rm", clone)
    wait_for(lambda: used(lab) == 0, within_s=60)


PROGRAM = '''
import os, random, sys
where, oracle, seed, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
draw = random.Random(seed)
pairs = [[os.open(f"{top}/{name}", os.O_RDWR | os.O_CREAT) for top in (where, oracle)] for name in "abc"]

def copy(source, offset, target, target_offset, size):
    while size > 0:
        count = os.copy_file_range(source, target, size, offset, target_offset)
        if not count:
            return
        offset, target_offset, size = offset + count, target_offset + count, size - count

for step in range(steps):
    kind = draw.choice(("write", "write", "write", "clone", "clone", "truncate", "read", "fsync"))
    files, others = draw.choice(pairs), draw.choice(pairs)
    offset, size, length = draw.randrange(600_000), draw.randrange(1, 60_000), draw.randrange(700_000)
    data = draw.randbytes(size)
    if kind == "write":
        for file in files:
            os.pwrite(file, data, offset)
    elif kind == "truncate":
        for file in files:
            os.ftruncate(file, length)
    elif kind == "read":
        found = [os.pread(file, size, offset) for file in files]
        assert found[0] == found[1], f"step {step}: {offset}+{size} differs"
    elif kind == "fsync":
        os.fsync(files[0])
    elif files is not others:
        target = draw.randrange(150) * 4096 + (offset % 4096 if draw.random() < 0.9 else 1)
        size = draw.randrange(1, 300_000)
        copy(files[0], offset, others[0], target, size)
        data = os.pread(files[1], size, offset)
        if data:
            os.pwrite(others[1], data, target)
    assert os.fstat(files[0]).st_size == os.fstat(files[1]).st_size, f"step {step}: {kind}"
'''


def test_random_clones_and_writes_from_two_nodes_in_turns_are_those_of_local_files_over_kills(lab, tmp_path):
    """Coordinator and mount are killed while the program runs: it sees a pause, and never a wrong byte."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    lab.run("n1", "mkdir", f"{VOLUME}/random")
    draw = random.Random(20261129)
    for turn in range(6):
        node, other = ("n1", "n2") if turn % 2 else ("n2", "n1")
        seed = str(draw.randrange(1 << 30))
        killer = None
        if turn in (1, 3):
            killer = threading.Timer(0.7, lambda: lab.kill(owner(lab), "coordinator"))
        elif turn == 4:
            killer = threading.Timer(0.7, lambda node=node: lab.kill(node, "mount"))
        if killer is not None:
            killer.start()
        lab.run(node, sys.executable, str(program), f"{VOLUME}/random", str(tmp_path), seed, "80")
        if killer is not None:
            killer.join()
        for name in "abc":
            content = lab.run(other, "cat", f"{VOLUME}/random/{name}")
            assert content == (tmp_path / name).read_bytes(), f"{name} after turn {turn} on {node}, seed {seed}"
