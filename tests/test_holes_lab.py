"""Holes on a lab of three nodes: what programs punch is gone on every node and from the drives' files."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from csvfs.units import GIB, MIB
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for
from tests.test_first_cluster import is_mounted

pytestmark = [pytest.mark.lab, needs_lab]

VOLUME = "/clusterstorage/Volume1"


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=3, drives=1, drive_size=2 * GIB) as cluster:
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "3")
        for node in ("n1", "n2"):
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=60)
        yield cluster


def space_of_drives(lab: LabCluster) -> int:
    """Bytes that the drives' files take on the disk of this machine."""
    rows = json.loads(lab.run("n1", "csvfs", "drive", "list", "--json"))
    return sum(os.stat(row["path"]).st_blocks * 512 for row in rows)


def test_what_is_punched_on_one_node_is_zeros_on_the_other_and_leaves_the_drives(lab):
    path = f"{VOLUME}/image"
    lab.run("n1", "sh", "-c", f"head -c 64M /dev/urandom > {path} && sync {path}")
    before = space_of_drives(lab)
    lab.run("n2", "fallocate", "--punch-hole", "--offset", str(MIB), "--length", str(48 * MIB), path)
    assert int(lab.run("n1", "stat", "-c", "%b", path)) * 512 <= 32 * MIB  # some is given ahead
    assert lab.run("n1", "sh", "-c", f"tail -c +{MIB + 1} {path} | head -c 48M | tr -d '\\0' | wc -c").strip() == b"0"
    wait_for(lambda: before - space_of_drives(lab) >= 3 * 47 * MIB, within_s=60)
    lab.run("n1", "cp", "--sparse=auto", path, f"{VOLUME}/copy")
    assert int(lab.run("n2", "stat", "-c", "%b", f"{VOLUME}/copy")) * 512 <= 33 * MIB
    lab.run("n2", "cmp", path, f"{VOLUME}/copy")


def test_a_guest_that_discards_gives_space_back_and_its_image_stays_right(lab):
    path = f"{VOLUME}/guest.raw"
    lab.run("n1", "qemu-img", "create", "-q", "-f", "raw", "-o", "preallocation=falloc", path, "64M")
    assert int(lab.run("n2", "stat", "-c", "%b", path)) * 512 >= 64 * MIB
    commands = ["write -P 7 0 32M", "discard 4M 8M", "write -z -u 16M 4M", "flush"]
    arguments = [argument for command in commands for argument in ("-c", command)]
    lab.run("n1", "qemu-io", "-f", "raw", "-d", "unmap", "-t", "none", *arguments, path)
    reads = ["read -P 7 0 4M", "read -P 0 4M 8M", "read -P 7 12M 4M", "read -P 0 16M 4M", "read -P 7 20M 12M"]
    arguments = [argument for command in reads for argument in ("-c", command)]
    shown = lab.run("n2", "qemu-io", "-f", "raw", *arguments, path).decode()
    assert "verification failed" not in shown and shown.count("read ") == len(reads)
    assert int(lab.run("n2", "stat", "-c", "%b", path)) * 512 <= (64 - 12) * MIB


PROGRAM = '''
import os, random, subprocess, sys
path, oracle, seed, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
draw = random.Random(seed)
files = [os.open(name, os.O_RDWR | os.O_CREAT) for name in (path, oracle)]
libc = __import__("ctypes").CDLL(None, use_errno=True)
libc.fallocate.argtypes = [__import__("ctypes").c_int] * 2 + [__import__("ctypes").c_long] * 2
for step in range(steps):
    kind = draw.choice(("write", "write", "truncate", "punch", "zero", "reserve", "read", "fsync"))
    offset, size = draw.randrange(400_000), draw.randrange(1, 70_000)
    data, length = draw.randbytes(size), draw.randrange(500_000)
    found = []
    for file in files:
        if kind == "write":
            os.pwrite(file, data, offset)
        elif kind == "truncate":
            os.ftruncate(file, length)
        elif kind == "read":
            found.append(os.pread(file, size, offset))
        elif kind == "fsync":
            os.fsync(file)
        else:
            mode = {"punch": 3, "zero": 16 if size % 2 else 17, "reserve": size % 2}[kind]
            if libc.fallocate(file, mode, offset, size):
                sys.exit(f"step {step}: fallocate {mode} failed")
    assert not found or found[0] == found[1], f"step {step}: {offset}+{size} differs"
    assert os.fstat(files[0]).st_size == os.fstat(files[1]).st_size, f"step {step}: {kind}"
'''


def test_random_changes_with_holes_from_two_nodes_in_turns_are_those_of_a_local_file(lab, tmp_path):
    program, oracle = tmp_path / "program.py", tmp_path / "oracle"
    program.write_text(PROGRAM)
    draw = random.Random(20261128)
    for turn in range(8):
        node = ("n1", "n2")[turn % 2]
        seed = str(draw.randrange(1 << 30))
        lab.run(node, sys.executable, str(program), f"{VOLUME}/random", str(oracle), seed, "60")
        content = lab.run(("n2", "n1")[turn % 2], "cat", f"{VOLUME}/random")
        assert content == Path(oracle).read_bytes(), f"after turn {turn} on {node}, seed {seed}"
    subprocess.run(["rm", str(oracle)], check=True)
