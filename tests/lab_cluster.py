"""Brings a lab up for tests and takes it away after them. Every lab here has a directory of its own."""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from csvfs.admin import lab
from csvfs.admin.lab_files import LabNode, lab_files
from csvfs.admin.lab_network import TOOLS
from csvfs.admin.lab_processes import run_in_node
from csvfs.admin.lab_store import in_store
from csvfs.store.interface import ClusterStore
from csvfs.units import MIB

T = TypeVar("T")
PROCESSES = ("ps", "-eo", "pid,stat,wchan:32,etimes,args")


def lab_missing() -> str:
    """Why no lab can run here; empty: it can."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.path.exists("/dev/fuse"):
        return "needs /dev/fuse"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"needs {missing[0]}" if missing else ""


def lab_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Those of the command line of a program that works on labs of its own. Exits where there can be none."""
    parser.add_argument("--dir", type=Path, help="where the lab lies (a short path); by default below /var/tmp")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    missing = lab_missing()
    if missing:
        parser.error(f"a lab {missing}")
    return arguments


needs_lab = pytest.mark.skipif(bool(lab_missing()), reason=f"the lab {lab_missing()}")


class LabCluster:
    """A running lab. Its methods are sync: a test that has a trio loop of its own calls them in a thread."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = lab_files(directory)

    def node(self, name: str) -> LabNode:
        return self.files.node_named(name)

    def run(self, node: str, *argv: str, input: bytes = b"", check: bool = True) -> bytes:
        """Run a command on a node; returns its standard output. Raises AssertionError when it fails."""
        result = run_in_node(self.files, self.node(node), list(argv), input=input, capture_output=True)
        if check and result.returncode != 0:
            said = f"{result.stderr.decode(errors='replace')}\n{result.stdout[-2000:].decode(errors='replace')}"
            raise AssertionError(
                f"{' '.join(argv)} on {node}: status {result.returncode}: {said}\n{self.logs()}"
            )
        return bytes(result.stdout)

    def start_command(self, node: str, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command on a node and go on; `options` are those of Popen."""
        command = [sys.executable, "-m", "csvfs.admin.cli", "lab", "exec", "--dir", str(self.directory), node, "--", *argv]
        return subprocess.Popen(command, **options)

    def finish(self, running: subprocess.Popen[bytes], within_s: float = 600) -> str:
        """What a command of `start_command` said until its end. Raises AssertionError, with the nodes' logs, when
        it fails or does not end.
        """
        try:
            said, errors = running.communicate(timeout=within_s)
            problem = f"status {running.returncode}" if running.returncode else ""
        except subprocess.TimeoutExpired:
            waits = subprocess.run(PROCESSES, capture_output=True, text=True, check=False).stdout
            running.kill()
            said, errors = running.communicate(timeout=60)
            problem = f"it did not end within {within_s:g} s:\n{waits}"
        text = (said or b"").decode(errors="replace") + (errors or b"").decode(errors="replace")
        if problem:
            raise AssertionError(f"{problem}\n{text[-8000:]}\n{self.logs()}")
        return text

    def store(self, work: Callable[[ClusterStore], Awaitable[T]]) -> T:
        """Do something with the lab's cluster store, from outside of all nodes."""

        return in_store(self.files, work)

    def kill(self, node: str, role: str = "all") -> None:
        lab.lab_kill(self.directory, node, role)

    def start(self, node: str) -> None:
        lab.lab_start(self.directory, node)

    def partition(self, node: str) -> None:
        lab.lab_partition(self.directory, node)

    def heal(self) -> None:
        lab.lab_heal(self.directory)

    def states(self) -> dict[str, str]:
        return {row["name"]: row["state"] for row in lab.lab_status(self.directory)["nodes"]}

    def pids(self, node: str) -> dict[str, list[int]]:
        """role -> pids."""
        rows = lab.lab_status(self.directory)["nodes"]
        return next(row["processes"] for row in rows if row["name"] == node)

    def logs(self) -> str:
        """All logs, for the message of a test that failed."""
        paths = sorted(self.directory.glob("nodes/*/run/logs/*.log"))
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-4000:]}" for path in paths)


@contextlib.contextmanager
def running_lab(
    nodes: int = 3, drives: int = 1, drive_size: int = 256 * MIB, *, with_pool: bool = True, store: str = "embedded"
) -> Iterator[LabCluster]:
    """A lab that is up inside the `with`, and gone after it."""
    # Not pytest's tmp_path: its names are too long for unix sockets.
    parent = Path(tempfile.mkdtemp(prefix="lab-", dir="/var/tmp"))
    directory = parent / "lab"
    try:
        lab.lab_up(
            directory,
            nodes=nodes,
            drives=drives,
            drive_size=drive_size,
            with_pool=with_pool,
            store=store,
            say=lambda line: None,
        )
        yield LabCluster(directory)
    finally:
        lab.lab_down(directory, say=lambda line: None)
        parent.rmdir()


def wait_for(condition: Callable[[], T], within_s: float = 60, explain: Callable[[], str] = str) -> T:
    """Poll until `condition()` is true; returns what it returned. Raises AssertionError, which says `explain()`."""
    deadline = time.monotonic() + within_s
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {within_s} s\n{explain()}"
        time.sleep(0.02)
    return result
