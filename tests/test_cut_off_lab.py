"""A node is cut off for longer than its lease and comes back: its programs wait, and go on; but not over what others did."""

import contextlib
import json
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
# Long leases: what a busy machine makes late here is not what is cut off in these tests.
OPTIONS = "[options]\nnode_lease_ms = 8000\nrecall_timeout_ms = 30000\n"
CUT_S = 11.0

# Holds a lock on a file as qemu does, and has a temporary file without a name. At each line: another write to both.
HOLDER = """
import fcntl, os, struct, sys
image = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0)
fcntl.fcntl(image, fcntl.F_OFD_SETLK, lock)
own = os.open(sys.argv[1] + ".own", os.O_CREAT | os.O_RDWR)
os.unlink(sys.argv[1] + ".own")
os.write(own, b"own")
def write(at):
    try:
        return str(os.pwrite(image, b"held", at))
    except OSError as error:
        return f"E{error.errno}"
print(write(0), flush=True)
for at, line in enumerate(sys.stdin, 1):
    print(write(4 * at), os.pread(own, 10, 0).decode(), flush=True)
"""
PROBE = """
import fcntl, os, struct, sys
image = os.open(sys.argv[1], os.O_RDWR)
seen = fcntl.fcntl(image, fcntl.F_OFD_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
print(struct.unpack_from("h", seen)[0] == fcntl.F_UNLCK)
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[LabCluster]:
    with running_lab(nodes=3, drives=1, drive_size=1024 * MIB) as cluster:
        for one in cluster.files.nodes():
            cluster.kill(one.name)
            one.config.write_text(one.config.read_text() + OPTIONS)
            cluster.start(one.name)
        cluster.run("n1", "csvfs", "volume", "create", "Volume1", "--copies", "2")
        for node in ("n1", "n2", "n3"):
            wait_for(lambda node=node: is_mounted(cluster, node), within_s=180)
        yield cluster


@contextlib.contextmanager
def busy(lab: LabCluster, node: str, name: str) -> Iterator[None]:
    """A program at work on all kinds of files; at the end it must have seen nothing wrong."""
    program = lab.start_command(
        node, sys.executable, PROGRAM, f"{VOLUME}/{name}", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert program.stdin is not None and program.stdout is not None
    assert program.stdout.readline() == "at work\n"

    def wait_at_work() -> None:
        """Until it has appended something, from now on."""
        path = f"{VOLUME}/{name}/appended"
        before = lab.run(node, "stat", "-c", "%s", path, check=False)
        wait_for(lambda: lab.run(node, "stat", "-c", "%s", path, check=False) != before, within_s=60)

    wait_at_work()
    yield
    wait_at_work()
    program.stdin.write("\n")
    program.stdin.flush()
    told = json.loads(program.stdout.readline() or '{"wrong": ["it ended"]}')
    assert told["wrong"] == [], f"{told}\n{lab.logs()}"
    program.wait(timeout=60)


class Holder:
    def __init__(self, lab: LabCluster, node: str, name: str) -> None:
        self.process = lab.start_command(
            node, sys.executable, "-c", HOLDER, f"{VOLUME}/{name}", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "4"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def write(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._line()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


def mount_device(lab: LabCluster, node: str) -> bytes:
    return lab.run(node, "stat", "-c", "%d", VOLUME)


@pytest.mark.parametrize("victim", ["other", "coordinator"])
def test_programs_on_a_node_that_was_cut_off_wait_and_go_on_but_not_over_a_lock_that_another_has(
    lab: LabCluster, victim: str
) -> None:
    (row,) = json.loads(lab.run("n1", "csvfs", "volume", "list", "--json"))
    coordinator = row["coordinator"]
    node = coordinator if victim == "coordinator" else next(name for name in ("n3", "n2") if name != coordinator)
    other = next(name for name in ("n1", "n2") if name != node)
    before = mount_device(lab, node)
    holders = {name: Holder(lab, node, f"{victim}-{name}") for name in ("taken", "kept")}
    with busy(lab, other, f"{victim}-there"), busy(lab, node, f"{victim}-here"):
        lab.partition(node)
        time.sleep(CUT_S)
        # Its virtual machine is started here now.
        assert lab.run(other, sys.executable, "-c", PROBE, f"{VOLUME}/{victim}-taken") == b"True\n"
        lab.run(other, "sh", "-c", f"printf mine > {VOLUME}/{victim}-taken")
        lab.heal()
        assert holders["taken"].write() == "E116 own"  # ESTALE
        assert holders["kept"].write() == "4 own"
    assert mount_device(lab, node) == before  # the same FUSE session
    assert holders["taken"].write() == "E116 own"
    assert lab.run(other, "cat", f"{VOLUME}/{victim}-taken") == b"mine"
    assert lab.run(other, "cat", f"{VOLUME}/{victim}-kept") == b"heldheld"
    lab.run(node, "sh", "-c", f"printf new >> {VOLUME}/{victim}-taken")  # who opens it anew has it anew
    assert lab.run(other, "cat", f"{VOLUME}/{victim}-taken") == b"minenew"
    for holder in holders.values():
        holder.end()
