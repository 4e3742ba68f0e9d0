"""The lab: a whole cluster on one machine, to try csvfs and to break it.

Place      admin floor. lab_files.py says what lies where, lab_network.py makes the network, lab_processes.py
           finds and kills. Plain functions; they block, and must not be called from a trio task.
Rule       every function may be run again after it, or anything in the lab, was killed at any moment.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from csvfs.admin.lab_files import (
    LAB_DIR_DEFAULT,
    STORE_EMBEDDED,
    LabFiles,
    LabNode,
    LabPlan,
    lab_files,
    make_files,
)
from csvfs.admin.lab_network import (
    cut_from,
    link_is_up,
    make_network,
    netns_inode,
    remove_netns,
    require_lab,
    set_cut,
    set_link,
)
from csvfs.admin.lab_processes import (
    ROLES,
    kill_processes,
    lab_processes,
    node_pid,
    run_in_node,
    start_node,
)
from csvfs.admin.lab_store import certificate_keys, in_store, make_store_files
from csvfs.admin.mount_points import mounted_paths, unmount_lazily
from csvfs.cluster.membership import item_map
from csvfs.errors import BadRequest, Conflict, CsvfsError, NotFound, TimedOut, Unavailable
from csvfs.store.interface import ClusterStore, Compare, Put
from csvfs.units import GIB, format_size
from csvfs.wire.control import pack_value

__all__ = [
    "LAB_DIR_DEFAULT", "lab_down", "lab_exec", "lab_heal", "lab_kill", "lab_partition", "lab_start",
    "lab_status", "lab_up",
]  # fmt: skip

CLUSTER_ROOT = Path("/clusterstorage")
OURS_MARKER = ".made-by-csvfs-lab"  # in CLUSTER_ROOT, when it was not there before the first lab
START_TIMEOUT_S = 30.0
DRIVE_SERVER_TIMEOUT_S = 30.0

Say = Callable[[str], None]
T = TypeVar("T")


def lab_up(
    directory: Path = LAB_DIR_DEFAULT,
    *,
    nodes: int = 3,
    drives: int = 3,
    drive_size: int = 4 * GIB,
    store: str = "embedded",
    tls: bool = True,
    with_pool: bool = True,
    say: Say = print,
) -> None:
    """Bring a lab up; of one that is there, start what is not running.

    Args     drives, drive_size: per node, and bytes of each (sparse). tls: between nodes. with_pool: format the drives
             and make the pool. say: gets a line per step.
    Raises   NotPermitted, NotSupported: no lab can run here. BadRequest. Conflict: there is one with other
             numbers. TimedOut: a node does not come up; its log is named, and everything is left for you to
             look at.
    """
    plan = LabPlan(nodes, drives, drive_size, store, tls)
    files = lab_files(directory)
    require_lab()
    with contextlib.suppress(NotFound):
        if files.plan() != plan:
            there = files.plan()
            size = format_size(there.drive_size)
            raise Conflict(
                f"{files.directory} holds a lab of {there.nodes} nodes with {there.drives} drives of {size};"
                f" `csvfs lab down --dir {files.directory}` first"
            )
    make_files(files, plan)
    make_store_files(files, plan)
    make_network(files, files.nodes())
    say(f"{nodes} nodes with {drives} drives of {format_size(drive_size)} in {files.directory}")
    if plan.store == STORE_EMBEDDED:
        in_store(files, partial(_create_cluster, files))
    for node in files.nodes():
        _start(files, node)
    if plan.store != STORE_EMBEDDED:  # now its members are being started
        _wait_store(files, lambda: in_store(files, partial(_create_cluster, files)))
    for node in files.nodes():
        _wait_alive(files, node)
        say(f"{node.name} is alive at {node.address}")
    if with_pool:
        _make_pool(files, plan, say)


def lab_exec(directory: Path, node_name: str, argv: list[str]) -> int:
    """Run a command inside a node, with our standard input and outputs; returns its exit status.

    A command killed by signal N gives 128 + N. Raises NotFound, Unavailable: the node is down.
    """
    files = lab_files(directory)
    code = run_in_node(files, files.node_named(node_name), argv).returncode
    return code if code >= 0 else 128 - code


def lab_kill(directory: Path, node_name: str, role: str = "all") -> None:
    """kill -9 one role of a node; `all`: the whole node, as a power cut would: the network goes first.

    Raises   NotFound. BadRequest: no such role. Unavailable: it is not running.
    """
    files = lab_files(directory)
    node = files.node_named(node_name)
    if role == "all":
        if netns_inode(files.netns) is not None:
            set_link(files, node, up=False)  # or the kernel would say goodbye for the dead by TCP
        kill_processes(files, [node], node=node.name)
        return
    if role not in ROLES:
        raise BadRequest(f"no role {role!r}; there are {', '.join(ROLES)} and all")
    if not kill_processes(files, [node], node=node.name, role=role):
        raise Unavailable(f"node {node.name} runs no {role} at the moment; see `csvfs lab status`")


def lab_start(directory: Path, node_name: str) -> None:
    """Start a node that was killed, and wait until it is alive. A node that runs is left alone."""
    files = lab_files(directory)
    require_lab()
    node = files.node_named(node_name)
    make_network(files, files.nodes())
    _start(files, node)
    if not node.gate.exists():
        _wait_alive(files, node)


def lab_partition(directory: Path, node_name: str, other_name: str | None = None, *, one_way: bool = False) -> None:
    """Cut a node off from the others and from the cluster store, in both directions.

    Args     other_name: cut only what goes between these two; both reach all others, and an embedded store.
             one_way: only what the first one sends to the other vanishes.
    Raises   NotFound. BadRequest: one_way of a single node, or a node from itself.
    """
    files = lab_files(directory)
    node = files.node_named(node_name)
    if other_name is not None:
        other = files.node_named(other_name)
        if other.name == node.name:
            raise BadRequest(f"a link has two ends: {node.name} cannot be cut off from itself")
        set_cut(node, other, cut=True)
        if not one_way:
            set_cut(other, node, cut=True)
        return
    if one_way:
        raise BadRequest("--one-way is of the link between two nodes: name both")
    set_link(files, node, up=False)
    node.gate.touch()


def lab_heal(directory: Path) -> None:
    """End all partitions. A node that is down joins the network again when it is started."""
    files = lab_files(directory)
    for node in files.nodes():
        for other in files.nodes():
            set_cut(node, other, cut=False)
        node.gate.unlink(missing_ok=True)
        if node_pid(files, node) is not None:
            set_link(files, node, up=True)


def lab_status(directory: Path) -> dict[str, Any]:
    """The lab as it is now: `directory`, `store`, and `nodes`, each a map of

    name, address, state (`up`, `starting`, `partitioned`, `down`; `no store`: it runs, and the cluster store has
    no majority), processes (role -> pids), cut_from (names of nodes that nothing reaches which it sends).
    """
    files = lab_files(directory)
    nodes = files.nodes()
    processes = lab_processes(files, nodes)
    alive_names = _alive_names(files)
    rows = []
    for node in nodes:
        by_role: dict[str, list[int]] = {}
        for process in processes:
            if process.node == node.name:
                by_role.setdefault(process.role or "other", []).append(process.pid)
        state = "up" if node.name in (alive_names or ()) else "starting"
        if alive_names is None:
            state = "no store"
        if "node" not in by_role:
            state = "down"
        elif node.gate.exists() or not link_is_up(files, node):
            state = "partitioned"
        rows.append(
            {
                "name": node.name, "address": node.address, "state": state, "processes": by_role,
                "cut_from": cut_from(node, nodes),
            }
        )  # fmt: skip
    return {"directory": str(files.directory), "store": files.plan().store, "nodes": rows}


def _alive_names(files: LabFiles) -> set[str] | None:
    """None: nobody can say."""
    if not files.store.parent.exists():
        return set()
    try:
        return {item.key.removeprefix("alive/") for item in in_store(files, lambda store: store.list("alive/"))}
    except Unavailable:
        return None


def lab_down(directory: Path = LAB_DIR_DEFAULT, *, say: Say = print) -> None:
    """Take a lab away: its processes, namespaces, mounts and files, also if it is half-made or half-gone.

    Raises   BadRequest: the directory is not a lab's. Unavailable: a process does not die.
    """
    files = lab_files(directory)
    require_lab()
    # All that could be nodes, whatever lab.json says, if it is there at all.
    paths = sorted((files.directory / "nodes").glob("n*")) if files.directory.exists() else []
    nodes = [LabNode(path.name, 0, path) for path in paths]
    is_lab = files.marker.exists() or nodes or netns_inode(files.netns) is not None
    if files.directory.exists() and not is_lab and any(files.directory.iterdir()):
        raise BadRequest(f"{files.directory} is not empty and holds no lab; nothing was removed")
    if os.stat("/proc/self/ns/net").st_ino in {netns_inode(node.netns) for node in nodes}:
        raise BadRequest("this runs inside the lab; run `csvfs lab down` outside of it")
    killed = kill_processes(files, nodes)
    for node in nodes:
        remove_netns(node.netns)
    if files.directory.exists():
        remove_netns(files.netns)
        _remove_directory(files)
    _remove_cluster_root()
    say(f"lab {files.directory} is gone ({killed} processes)")


# Parts


def _start(files: LabFiles, node: LabNode) -> None:
    if not node.gate.exists():  # a partition outlasts a restart
        set_link(files, node, up=True)
    if node_pid(files, node) is None:
        # What its processes left behind when they were killed together (an orphan of `exec`, say) goes first.
        kill_processes(files, [node], node=node.name)
        (node.run_dir / "liveness").unlink(missing_ok=True)  # so that _wait_alive sees the new one only
        _make_cluster_root()
        start_node(files, node, CLUSTER_ROOT)


def _wait_store(files: LabFiles, work: Callable[[], T]) -> T:
    """Do `work` as soon as the store has a majority."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return work()
        except Unavailable as error:
            if time.monotonic() > deadline:
                logs = files.node(1).log.with_name("store.log")
                raise TimedOut(f"no cluster store after {START_TIMEOUT_S:.0f} s: {error}; see {logs}") from None


def _wait_alive(files: LabFiles, node: LabNode) -> None:
    """Wait until the node has a lease of its present `node run`."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        item = _wait_store(files, lambda: in_store(files, lambda store: store.get(f"alive/{node.name}")))
        # A lease that a killed `node run` left behind does not count: its liveness page is gone.
        if (
            item is not None
            and node_pid(files, node) is not None
            and _is_of_present_run(node, item_map(item))
        ):
            return
        time.sleep(0.05)
    raise TimedOut(
        f"node {node.name} did not come up in {START_TIMEOUT_S:.0f} s: {_last_line(node)}; see {node.log}"
    )


def _is_of_present_run(node: LabNode, alive: dict[str, Any]) -> bool:
    page = node.run_dir / "liveness"
    try:
        return int.from_bytes(page.read_bytes()[16:24], sys.byteorder) == alive.get("incarnation")
    except OSError:
        return False


def _last_line(node: LabNode) -> str:
    with contextlib.suppress(OSError):
        lines = node.log.read_text(errors="replace").splitlines()
        return lines[-1][:200] if lines else "its log is empty"
    return "it has no log"


def _make_pool(files: LabFiles, plan: LabPlan, say: Say) -> None:
    """Make the pool and give it each node's drives, as far as that has not been done."""
    nodes = files.nodes()
    _wait_servers(files, nodes)
    if in_store(files, lambda store: store.get("pool")) is None:
        _run_checked(files, nodes[0], ["csvfs", "pool", "create"])
        say("pool created")
    rows = [item_map(item) for item in in_store(files, lambda store: store.list("drives/"))]
    known = {(row.get("node"), row.get("path")) for row in rows}
    for node in nodes:
        paths = [str(path) for path in node.drive_paths(plan.drives) if (node.name, str(path)) not in known]
        if paths:
            _run_checked(files, node, ["csvfs", "drive", "add", *paths])
            say(f"{node.name}: {len(paths)} drives added")


def _wait_servers(files: LabFiles, nodes: list[LabNode]) -> None:
    deadline = time.monotonic() + DRIVE_SERVER_TIMEOUT_S
    names = {node.name for node in nodes}
    while names:
        if time.monotonic() > deadline:
            log = files.node_named(min(names)).log.with_name("drives.log")
            raise TimedOut(f"no drive server on {', '.join(sorted(names))}; see {log}")
        items = in_store(files, lambda store: store.list("servers/"))
        names -= {item.key.removeprefix("servers/") for item in items}
        time.sleep(0.05 if names else 0)


def _run_checked(files: LabFiles, node: LabNode, argv: list[str]) -> None:
    result = run_in_node(files, node, argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise CsvfsError(f"`{' '.join(argv)}` on {node.name} ended with {result.returncode}: {reason[-1]}")


async def _create_cluster(files: LabFiles, store: ClusterStore) -> None:
    cluster = {"id": secrets.token_bytes(16), "name": "lab", "created": int(time.time())}
    await store.transact([Compare("cluster", 0)], [Put("cluster", pack_value(cluster))])  # else it is there
    for put in certificate_keys(files):
        await store.transact([Compare(put.key, 0), Compare(f"evicted/{put.key.rpartition('/')[2]}", 0)], [put])


def _make_cluster_root() -> None:
    """The directory on the host that each node mounts its own over."""
    try:
        CLUSTER_ROOT.mkdir()
    except FileExistsError:
        return
    (CLUSTER_ROOT / OURS_MARKER).touch()


def _remove_cluster_root() -> None:
    """Remove it if a lab made it, nothing else is in it, and no other lab has it mounted over.

    The last is more than politeness: removing a directory takes away mounts on it in all other namespaces.
    """
    try:
        is_ours = os.listdir(CLUSTER_ROOT) == [OURS_MARKER]
    except FileNotFoundError:
        return
    if not is_ours or _is_mounted_anywhere(CLUSTER_ROOT):
        return
    (CLUSTER_ROOT / OURS_MARKER).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        CLUSTER_ROOT.rmdir()


def _is_mounted_anywhere(path: Path) -> bool:
    seen: set[int] = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            namespace = (entry / "ns/mnt").stat().st_ino if entry.name.isdigit() else 0
            if namespace and namespace not in seen:
                seen.add(namespace)
                if os.fsencode(path) in mounted_paths((entry / "mountinfo").read_bytes()):
                    return True
    return False


def _remove_directory(files: LabFiles) -> None:
    """Remove DIR, lab.json last, so that an interrupted removal is still known as a lab's."""
    below = os.fsencode(files.directory) + b"/"
    for point in reversed(mounted_paths()):
        if point.startswith(below):  # a mount would be emptied along with DIR, and it may be anybody's
            unmount_lazily(Path(os.fsdecode(point)))
    for path in files.directory.iterdir():
        if path != files.marker:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(files.directory)
