"""What a drill runs on: a lab, or the cluster that this node belongs to.

Place      admin floor, below drill.py. Plain functions; they block.
Logs       of a drill's programs lie in a directory of this machine, which is not on the volume: nodes of a lab see it too.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csvfs.admin import lab
from csvfs.admin.drill_history import Operation, parse_log
from csvfs.admin.lab_files import STORE_ETCD, LabFiles, lab_files
from csvfs.admin.lab_processes import run_in_node, start_in_node
from csvfs.config import load_config
from csvfs.errors import BadRequest, CsvfsError, NotFound, TimedOut

WRITER_MODULE = "csvfs.admin.drill_writer"
DRILL_FOLDER = ".csvfs-drill"
VOLUME_MADE = "Drill"  # when a lab has none yet
HEALTHY_WITHIN_S = 180.0
END_WITHIN_S = 120.0  # longer than io_timeout: whoever waits for that long gets an error, and that is what is looked for
READY_WITHIN_S = 60.0
STATUS_TIMEOUT_S = 60.0
POLL_S = 0.25


class Ground(ABC):
    """A cluster with a volume: where commands and programs run, and how it is."""

    volume: str
    cluster_root: Path

    @property
    @abstractmethod
    def nodes(self) -> list[str]:
        """All nodes, by name."""

    @abstractmethod
    def popen(self, node: str, argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command on a node."""

    @abstractmethod
    def run(self, node: str, argv: list[str], timeout_s: float) -> subprocess.CompletedProcess:
        """Run a command on a node; standard output and error are text."""

    @property
    def root(self) -> Path:
        """Of all that drills write."""
        return self.cluster_root / self.volume / DRILL_FOLDER

    def csvfs(self, node: str, *argv: str, timeout_s: float = STATUS_TIMEOUT_S) -> str:
        """What a command of csvfs says. Raises CsvfsError with its message, TimedOut."""
        command = [sys.executable, "-m", "csvfs.admin.cli", *argv]
        try:
            result = self.run(node, command, timeout_s)
        except subprocess.TimeoutExpired:
            raise TimedOut(f"`csvfs {' '.join(argv)}` on {node} does not end within {timeout_s:g} s") from None
        if result.returncode != 0:
            said = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
            raise CsvfsError(f"`csvfs {' '.join(argv)}` on {node}: {said[-1].removeprefix('csvfs: ')}")
        return str(result.stdout)

    def coordinator(self) -> str:
        """The node that coordinates the volume. Raises CsvfsError."""
        for row in json.loads(self.csvfs(self.nodes[0], "volume", "list", "--json")):
            if row["name"] == self.volume and row["coordinator"]:
                return str(row["coordinator"])
        raise NotFound(f"volume {self.volume} has no coordinator now; see csvfs volume list")

    def wait_healthy(self, within_s: float = HEALTHY_WITHIN_S) -> float:
        """Returns after how many seconds all copies are in sync and nothing is repaired. Raises TimedOut."""
        began = time.monotonic()
        while True:
            against = self._not_healthy()
            waited_s = time.monotonic() - began
            if not against:
                return waited_s
            if waited_s > within_s:
                raise TimedOut(f"not healthy within {within_s:g} s: {against}; see csvfs status")
            time.sleep(POLL_S)

    def _not_healthy(self) -> str:
        try:
            status = json.loads(self.csvfs(self.nodes[0], "status", "--json"))
        except (CsvfsError, ValueError) as error:
            return str(error)
        against = [f"node {row['name']} is {row['state']}" for row in status["nodes"] if row["state"] != "up"]
        against += [f"drive {row['path']}: {row['state']}" for row in status["drives"] if row["state"] != "OK"]
        for row in status["volumes"]:
            if row["name"] == self.volume and row["health"] != "Healthy":
                against.append(f"volume {row['name']}: {row['health']}")
        against += [f"job: {job['what']}" for job in status["jobs"] if job["volume"] == self.volume]
        return "; ".join(against[:3]) or self._not_mounted()

    def _not_mounted(self) -> str:
        for node in self.nodes:
            result = self.run(node, ["mountpoint", "-q", str(self.cluster_root / self.volume)], STATUS_TIMEOUT_S)
            if result.returncode != 0:
                return f"volume {self.volume} is not mounted on {node}"
        return ""


class LabGround(Ground):
    """A lab, with a volume in it. Raises NotFound: no such lab, no such volume."""

    def __init__(self, directory: Path, volume: str | None) -> None:
        self.files: LabFiles = lab_files(directory)
        self._nodes = [node.name for node in self.files.nodes()]
        if len(self._nodes) < 2:
            raise BadRequest("a drill needs a lab of at least 2 nodes; csvfs lab up --nodes 3")
        self.cluster_root = lab.CLUSTER_ROOT
        down = [row["name"] for row in lab.lab_status(directory)["nodes"] if row["state"] != "up"]
        if down:
            raise BadRequest(f"node {', '.join(down)} of the lab is not up; see csvfs lab status")
        self.volume = volume or self._some_volume()
        self.cluster_root = lab.CLUSTER_ROOT

    @property
    def directory(self) -> Path:
        return self.files.directory

    @property
    def nodes(self) -> list[str]:
        return self._nodes

    @property
    def has_etcd(self) -> bool:
        return self.files.plan().store == STORE_ETCD

    def popen(self, node: str, argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return start_in_node(self.files, self.files.node_named(node), argv, **options)

    def run(self, node: str, argv: list[str], timeout_s: float) -> subprocess.CompletedProcess:
        return run_in_node(
            self.files, self.files.node_named(node), argv,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip

    def _some_volume(self) -> str:
        rows = json.loads(self.csvfs(self._nodes[0], "volume", "list", "--json"))
        names = sorted(row["name"] for row in rows)
        if names:
            return str(names[0])
        copies = min(3, len(self._nodes))
        create = ("volume", "create", VOLUME_MADE, "--resiliency", "mirror", "--copies", str(copies))
        self.csvfs(self._nodes[0], *create)
        return VOLUME_MADE


class ClusterGround(Ground):
    """The cluster of this node: programs run here, other nodes are reached by csvfs's own commands only."""

    def __init__(self, volume: str | None) -> None:
        config = load_config()
        self.cluster_root = config.cluster_root
        self.here = str(config.node)
        rows = json.loads(self.csvfs(self.here, "node", "list", "--json"))
        self._all = sorted(str(row["name"]) for row in rows)
        names = sorted(str(row["name"]) for row in json.loads(self.csvfs(self.here, "volume", "list", "--json")))
        if volume is None and len(names) != 1:
            raise BadRequest(f"which volume? --volume {' or '.join(names) or '... (there is none yet)'}")
        self.volume = volume or names[0]

    @property
    def nodes(self) -> list[str]:
        return [self.here]

    @property
    def all_nodes(self) -> list[str]:
        return self._all

    def popen(self, node: str, argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(argv, **options)

    def run(self, node: str, argv: list[str], timeout_s: float) -> subprocess.CompletedProcess:
        return subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
        )


class Programs:
    """The programs of one round, and what they have logged."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self.logs = Path(tempfile.mkdtemp(prefix="csvfs-drill-"))
        self.root = ground.root / self.logs.name
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, node: str, kind: str, name: str, *folders: str) -> None:
        """Start a worker or a watcher on a node. Names and folders without dots."""
        argv = [sys.executable, "-m", WRITER_MODULE, kind, str(self.root), name, str(self.logs), *folders]
        with (self.logs / f"{name}.said").open("wb") as said:
            self._running[name] = self._ground.popen(
                node, argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )

    def wait_ready(self, names: list[str]) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        for name in names:
            while not (self.logs / f"{name}.ready").exists():
                if self._running[name].poll() is not None or time.monotonic() > deadline:
                    said = (self.logs / f"{name}.said").read_text(errors="replace").strip().splitlines()
                    raise TimedOut(f"the drill's program {name} did not begin: {said[-1:] or 'it is silent'}")
                time.sleep(0.02)

    def stop(self) -> int:
        """Ask all to end, wait for it, and kill those that do not; returns until when (CLOCK_MONOTONIC, ns) they ran."""
        deadline = time.monotonic() + END_WITHIN_S
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        ended_ns = time.monotonic_ns()
        self.kill()
        return ended_ns

    def kill(self) -> None:
        """One that waits in the kernel ends when its answer comes; it is not waited for."""
        for process in self._running.values():
            if process.poll() is None:
                process.kill()

    def read_back(self, node: str, folders: list[str]) -> None:
        """Everything that workers wrote, from another node."""
        argv = [sys.executable, "-m", WRITER_MODULE, "verify", str(self.root), "verify", str(self.logs), *folders]
        self._ground.run(node, argv, END_WITHIN_S)

    def operations(self) -> list[Operation]:
        found: list[Operation] = []
        for path in sorted(self.logs.glob("*.log")):
            program, folder, thread = path.stem.split(".")
            found += parse_log(path.read_text(), program, folder, thread)
        return found

    def remove(self, node: str) -> None:
        """The files on the volume and the logs."""
        with contextlib.suppress(subprocess.TimeoutExpired, CsvfsError):
            self._ground.run(node, [sys.executable, "-m", WRITER_MODULE, "clean", str(self.root)], END_WITHIN_S)
        shutil.rmtree(self.logs, ignore_errors=True)


def fill_volume(ground: Ground, count: int, say: Callable[[str], None]) -> None:
    """Make the volume hold `count` files, beside those of the drill itself."""
    root = ground.root / "files"
    say(f"the volume shall hold {count:,} files first")
    began = time.monotonic()
    argv = [sys.executable, "-m", WRITER_MODULE, "fill", str(root), str(count)]
    result = ground.run(ground.nodes[0], argv, timeout_s=max(120.0, count / 100))
    if result.returncode != 0:
        raise CsvfsError(f"the files cannot be made: {result.stderr.strip().splitlines()[-1:]}")
    say(f"it does, after {time.monotonic() - began:.0f} s")


def machine_load() -> float:
    return os.getloadavg()[0]
