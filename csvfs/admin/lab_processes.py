"""The processes of a lab: found without any pid file, entered, killed.

Place      admin floor, below lab.py.
Finding    A process belongs to a node if it is in the node's network namespace, or bears CSVFS_LAB=DIR and
           CSVFS_NODE=<node> in its environment. A child inherits both, so nothing can escape by being
           orphaned, and a pid that was used again by a stranger is never taken for ours.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csvfs.admin.lab_files import LabFiles, LabNode
from csvfs.admin.lab_network import netns_inode
from csvfs.cluster.node_process import ROLE_ENVIRONMENT
from csvfs.config import CONFIG_ENVIRONMENT
from csvfs.errors import CsvfsError, Unavailable

LAB_ENVIRONMENT = "CSVFS_LAB"
NODE_ENVIRONMENT = "CSVFS_NODE"
ROLE_NODE = "node"  # `node run` itself
ROLE_EXEC = "exec"  # started by `lab exec`
ROLES = ("drives", "coordinator", "mount", "store")
KILL_WAIT_S = 10.0


@dataclass(slots=True, frozen=True)
class Process:
    pid: int
    node: str  # "": of the lab, of no node
    role: str


def lab_processes(files: LabFiles, nodes: Iterable[LabNode]) -> list[Process]:
    """All living processes of the lab but this one, by pid."""
    namespaces = {netns_inode(node.netns): node.name for node in nodes} | {netns_inode(files.netns): ""}
    namespaces.pop(None, None)
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            process = _examine(int(entry), str(files.directory), namespaces)
            if process is not None:
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def _examine(pid: int, directory: str, namespaces: dict[int | None, str]) -> Process | None:
    try:
        environment = _environment(pid)
        node = namespaces.get(os.stat(f"/proc/{pid}/ns/net").st_ino)
        is_ours = node is not None or environment.get(LAB_ENVIRONMENT) == directory
        if not is_ours or _is_zombie(pid):
            return None
    except OSError:
        return None  # it ended while we looked
    return Process(pid, node or environment.get(NODE_ENVIRONMENT, ""), environment.get(ROLE_ENVIRONMENT, ""))


def _environment(pid: int) -> dict[str, str]:
    rows = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return {name: value for name, found, value in (row.partition("=") for row in rows) if found}


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "ZX"


def kill_processes(
    files: LabFiles, nodes: list[LabNode], *, node: str | None = None, role: str | None = None
) -> int:
    """kill -9 all processes of the lab, of one node, or of one role of it, and wait until they are gone.

    Returns  how many were killed. Raises Unavailable: some do not die.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + KILL_WAIT_S
    while True:  # again and again: one that forks while we look has children we have not seen
        victims = [
            process
            for process in lab_processes(files, nodes)
            if (node is None or process.node == node) and (role is None or process.role == role)
        ]
        if role is not None and killed:
            victims = [process for process in victims if process.pid in killed]  # not what replaced them
        if not victims:
            return len(killed)
        if time.monotonic() > deadline:
            pids = ", ".join(str(process.pid) for process in victims)
            raise Unavailable(f"processes {pids} were killed but do not die; see `cat /proc/PID/stack`")
        for process in victims:
            killed.add(process.pid)
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.01)


def node_pid(files: LabFiles, node: LabNode) -> int | None:
    """The pid of the node's `node run`; None: the node is down."""
    pids = [p.pid for p in lab_processes(files, [node]) if p.node == node.name and p.role == ROLE_NODE]
    return pids[0] if pids else None


def node_environment(files: LabFiles, node: LabNode, role: str) -> dict[str, str]:
    """The environment inside a node: this one, with the node's configuration, our programs first on PATH."""
    programs = os.path.dirname(sys.executable)
    return os.environ | {
        CONFIG_ENVIRONMENT: str(node.config),
        LAB_ENVIRONMENT: str(files.directory),
        NODE_ENVIRONMENT: node.name,
        ROLE_ENVIRONMENT: role,
        "PATH": f"{programs}:{os.environ.get('PATH', '/usr/sbin:/usr/bin:/sbin:/bin')}",
    }


def start_node(files: LabFiles, node: LabNode, cluster_root: Path) -> None:
    """Start the node's `node run` in its namespaces, its own directory as `cluster_root`; does not wait."""
    script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    argv = [
        "nsenter", f"--net={node.netns}",
        "unshare", "--mount", "--propagation", "private",
        "sh", "-c", script, "sh", str(node.root), str(cluster_root),
        sys.executable, "-m", "csvfs.admin.node_run",
    ]  # fmt: skip
    with node.log.open("ab") as log:
        subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=node_environment(files, node, ROLE_NODE),
            cwd="/",
            start_new_session=True,
        )


def run_in_node(
    files: LabFiles, node: LabNode, argv: list[str], **options: object
) -> subprocess.CompletedProcess:
    """Run a command in the node's namespaces and wait for it; `options` are those of subprocess.run.

    Raises   Unavailable: the node is down.
    """
    keywords: dict[str, Any] = {"env": node_environment(files, node, ROLE_EXEC), "check": False, **options}
    return subprocess.run(_entered(files, node, argv), **keywords)


def start_in_node(files: LabFiles, node: LabNode, argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """As run_in_node, without waiting; the pid is that of the command itself."""
    return subprocess.Popen(
        _entered(files, node, argv), env=node_environment(files, node, ROLE_EXEC), **options
    )


def _entered(files: LabFiles, node: LabNode, argv: list[str]) -> list[str]:
    pid = node_pid(files, node)
    if pid is None:
        raise Unavailable(f"node {node.name} is down; `csvfs lab start {node.name}` starts it")
    if not argv:
        raise CsvfsError("no command given; write: csvfs lab exec n1 -- COMMAND")
    # nsenter leaves us in the root of the namespace; a relative path should mean what it means here.
    script = 'cd "$1" 2>/dev/null || cd /; shift; exec "$@"'
    return ["nsenter", "--target", str(pid), "--net", "--mount", "sh", "-c", script, "sh", os.getcwd(), *argv]
