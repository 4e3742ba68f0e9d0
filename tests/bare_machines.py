"""Machines with nothing of csvfs on them but the command: each a network, mount and host name of its own.

Where real machines have /etc, /var/lib and /run to themselves, so have these; so tests go by README's words.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from csvfs.admin import lab
from csvfs.admin.lab_files import LabFiles, LabNode
from csvfs.admin.lab_network import make_network, netns_inode, remove_netns, set_link
from csvfs.units import MIB
from tests.etcd_server import MEMORY, needs_etcd
from tests.lab_cluster import PROCESSES, needs_lab

T = TypeVar("T")
WAIT_S = 90
DRIVE_SIZE = 256 * MIB
INITIALIZE = """
set -e
hostname "$1"; cd "$2"
for at in etc var/lib run; do mount --bind "$2/$at" "/$at"; done
mount --bind "$2/clusterstorage" /clusterstorage
touch "$2/ready"
exec sleep 100000
"""

needs_machines = [pytest.mark.lab, needs_lab, needs_etcd]


class Machine:
    """One of them. `run` and `start` are what somebody at its console does."""

    def __init__(self, files: LabFiles, node: LabNode, memory: Path) -> None:
        self.name = node.name
        self.address = node.address
        self.directory = node.directory
        self.netns = node.netns
        self._files = files
        self._node = node
        self._service: subprocess.Popen[bytes] | None = None
        for at in ("etc", "var", "run", "clusterstorage"):
            (self.directory / at).mkdir(parents=True)
        # Tests need not survive a power cut, and the machine's disk is everybody's.
        (memory / self.name).mkdir()
        (self.directory / "var/lib").symlink_to(memory / self.name)
        shutil.copytree("/etc", self.directory / "etc", symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(self.directory / "etc/csvfs", ignore_errors=True)
        with (self.directory / "drive").open("xb") as drive:
            drive.truncate(DRIVE_SIZE)
        make_network(files, [node])
        set_link(files, node, up=True)
        namespaces = ["nsenter", f"--net={node.netns}", "unshare", "--mount", "--uts", "--propagation", "private"]
        command = [*namespaces, "sh", "-c", INITIALIZE, "sh", self.name, str(self.directory)]
        self._keeper = subprocess.Popen(command, start_new_session=True)
        wait_for(lambda: (self.directory / "ready").exists(), "its namespaces")

    @property
    def drive(self) -> str:
        return str(self.directory / "drive")

    def _entered(self, argv: tuple[str, ...]) -> list[str]:
        return ["nsenter", "--target", str(self._keeper.pid), "--net", "--mount", "--uts", *argv]

    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CSVFS_")}
        return environment | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}

    def run(self, *argv: str, input: bytes = b"") -> str:
        """What it says. Raises AssertionError when it fails."""
        result = self._run(argv, input)
        assert result.returncode == 0, f"{self.name}: {argv}: {result.stderr.decode()}{self.logs()}"
        return result.stdout.decode()

    def has_mounted(self, path: str) -> bool:
        return self._run(("mountpoint", "--quiet", path), b"").returncode == 0

    def refused(self, *argv: str) -> str:
        """The line that a command ends with that is to fail."""
        result = self._run(argv, b"")
        assert result.returncode == 1, f"{self.name}: {argv}: {result.stdout.decode()}{result.stderr.decode()}"
        return result.stderr.decode().strip().splitlines()[-1]

    def _run(self, argv: tuple[str, ...], input: bytes) -> subprocess.CompletedProcess[bytes]:
        pipe = subprocess.PIPE
        running = subprocess.Popen(
            self._entered(argv), stdin=pipe, stdout=pipe, stderr=pipe, env=self._environment()
        )
        try:
            said, errors = running.communicate(input, timeout=WAIT_S * 2)
        except subprocess.TimeoutExpired:
            waits = subprocess.run(PROCESSES, capture_output=True, text=True, check=False).stdout
            calls = [path.read_text() for path in Path(f"/proc/{running.pid}/task").glob("*/syscall")]
            running.kill()
            running.communicate()
            raise AssertionError(f"{self.name}: {argv} does not end; in calls {calls}:\n{waits}{self.logs()}") from None
        return subprocess.CompletedProcess(argv, running.returncode, said, errors)

    def start(self) -> None:
        """`csvfs node run`, as systemd would."""
        with (self.directory / "node.log").open("ab") as log:
            self._service = subprocess.Popen(
                self._entered(("csvfs", "node", "run")),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(), start_new_session=True,
            )  # fmt: skip

    def stop(self) -> int:
        """As systemd would; returns its exit status."""
        assert self._service is not None
        self._service.terminate()
        return self._service.wait(WAIT_S)

    def wait_end(self) -> int:
        """Until the service has ended by itself."""
        assert self._service is not None
        return self._service.wait(WAIT_S)

    def kill(self) -> None:
        """The plug is pulled: the network goes first."""
        set_link(self._files, self._node, up=False)
        assert self._service is not None
        self._service.kill()
        self._service.wait(WAIT_S)
        wait_for(lambda: not self._others(), "its processes to die")

    def plug_in(self) -> None:
        set_link(self._files, self._node, up=True)

    def _others(self) -> list[int]:
        """Pids in its network, but for the one that keeps its namespaces."""
        inode = netns_inode(self._node.netns)
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "ns/net").stat().st_ino == inode:
                    found.append(int(entry.name))
        return [pid for pid in found if pid != self._keeper.pid]

    def logs(self) -> str:
        paths = [self.directory / "node.log", *sorted(self.directory.glob("run/csvfs/logs/*.log"))]
        return "".join(f"\n== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in paths if path.exists())

    def node_log(self) -> str:
        return (self.directory / "node.log").read_text(errors="replace")

    def remove(self) -> None:
        if self._service is not None and self._service.poll() is None:
            self._service.kill()
            self._service.wait()
        for pid in [*self._others(), self._keeper.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self._keeper.wait()
        remove_netns(self._node.netns)


def wait_for(condition: Callable[[], T], what: str, within_s: float = WAIT_S) -> T:
    """What it returned when it was true."""
    deadline = time.monotonic() + within_s
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {within_s:g} s for {what}"
        time.sleep(0.1)
    return result


@contextlib.contextmanager
def bare_machines(count: int) -> Iterator[list[Machine]]:
    directory = Path(tempfile.mkdtemp(prefix="bare-", dir="/var/tmp"))
    memory = Path(tempfile.mkdtemp(prefix="bare-", dir=MEMORY if MEMORY.is_dir() else None))
    files = LabFiles(directory)
    machines: list[Machine] = []
    lab._make_cluster_root()
    try:
        for index in range(1, count + 1):
            machines.append(Machine(files, files.node(index), memory))
        yield machines
    finally:
        for machine in machines:
            machine.remove()
        remove_netns(files.netns)
        shutil.rmtree(directory)
        shutil.rmtree(memory)
        lab._remove_cluster_root()
