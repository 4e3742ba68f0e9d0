"""The network of a lab: a namespace per node, joined by veth pairs to a bridge in a namespace of the lab.

Place      admin floor, below lab.py. Uses `ip` (iproute2), `nsenter`, `unshare` (util-linux).
Rule       every function may be run again after it, or anything else, was killed half-way.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from csvfs.admin.lab_files import LabFiles, LabNode
from csvfs.admin.mount_points import mounted_paths, unmount_lazily
from csvfs.errors import CsvfsError, NotPermitted, NotSupported

BRIDGE = "br0"
NODE_INTERFACE = "eth0"  # the node's end; the bridge's end bears the node's name
PREFIX_LENGTH = 24
NOWHERE = "02:00:00:00:00:01"  # the hardware address of no interface: what is sent there vanishes without a word
LAB_ADDRESS = "10.77.0.254"  # of the bridge: where the lab itself asks its nodes from
TOOLS = {"ip": "iproute2", "nsenter": "util-linux", "unshare": "util-linux", "mount": "mount"}
_CLONE_NEWNET = 0x40000000

T = TypeVar("T")


def require_lab() -> None:
    """Raises NotPermitted or NotSupported, saying what is missing, when no lab can run here."""
    if os.geteuid() != 0:
        raise NotPermitted("csvfs lab makes namespaces and mounts: run it as root")
    if not Path("/dev/fuse").exists():
        raise NotSupported("csvfs lab needs /dev/fuse: `modprobe fuse`, or give the container the device")
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            raise NotSupported(f"csvfs lab needs `{tool}`: apt-get install {package}")
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode != 0:
        raise NotSupported(f"csvfs lab needs network and mount namespaces: {tried.stderr.strip()}")


def netns_inode(path: Path) -> int | None:
    """The inode number of the network namespace kept at `path`; None: none is."""
    if os.fsencode(path) not in mounted_paths():
        return None
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def make_network(files: LabFiles, nodes: list[LabNode]) -> None:
    """Make the lab's bridge and every node's namespace and link, as far as they are missing."""
    _make_netns(files.netns)
    if not _has_interface(files.netns, BRIDGE):
        # Without multicast snooping the first seconds of a bridge are as good as the later ones.
        _ip(files.netns, "link", "add", BRIDGE, "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
    _ip(files.netns, "link", "set", BRIDGE, "up")
    _ip(files.netns, "address", "replace", f"{LAB_ADDRESS}/{PREFIX_LENGTH}", "dev", BRIDGE)
    for node in nodes:
        _make_netns(node.netns)
        if not _has_interface(node.netns, NODE_INTERFACE):
            _ip(
                node.netns, "link", "add", NODE_INTERFACE, "type", "veth",
                "peer", "name", node.name, "netns", str(files.netns),
            )  # fmt: skip
        _ip(node.netns, "link", "set", "lo", "up")
        _ip(node.netns, "address", "replace", f"{node.address}/{PREFIX_LENGTH}", "dev", NODE_INTERFACE)
        _ip(node.netns, "link", "set", NODE_INTERFACE, "up")
        _ip(files.netns, "link", "set", node.name, "up")  # joined to the bridge by set_link


def set_link(files: LabFiles, node: LabNode, *, up: bool) -> None:
    """Join the node to the bridge, or cut it off.

    By leaving the bridge and not by pulling the cable: packets vanish without a word to either side, which is
    the worst a network does, and the kernel's up to 1 s of thinking about a carrier that changed is not
    waited for.
    """
    _ip(files.netns, "link", "set", node.name, *(["master", BRIDGE] if up else ["nomaster"]))


def link_is_up(files: LabFiles, node: LabNode) -> bool:
    """Whether the node is joined to the bridge."""
    if netns_inode(files.netns) is None:
        return False
    result = _run_in(files.netns, "ip", "link", "show", "dev", node.name)
    return result.returncode == 0 and f" master {BRIDGE} " in result.stdout


def set_cut(node: LabNode, other: LabNode, *, cut: bool) -> None:
    """Have what `node` sends to `other` vanish, or arrive again. What `other` sends to `node` is another matter.

    By an entry for `other` in the node's table of neighbours, which names nobody.
    """
    if cut:
        _ip(
            node.netns, "neigh", "replace", other.address, "lladdr", NOWHERE, "dev", NODE_INTERFACE, "nud", "permanent"
        )
    elif other.address in _cut_addresses(node):
        _ip(node.netns, "neigh", "del", other.address, "dev", NODE_INTERFACE)


def cut_from(node: LabNode, others: list[LabNode]) -> list[str]:
    """Names of those of `others` whom nothing reaches that `node` sends."""
    addresses = _cut_addresses(node)
    return [other.name for other in others if other.address in addresses]


def _cut_addresses(node: LabNode) -> set[str]:
    if netns_inode(node.netns) is None:
        return set()
    result = _run_in(node.netns, "ip", "neigh", "show", "dev", NODE_INTERFACE, "nud", "permanent")
    return {line.split()[0] for line in result.stdout.splitlines() if f" {NOWHERE} " in f" {line} "}


def run_in_netns(path: Path, work: Callable[[], T]) -> T:
    """Run `work` in a thread that is in the network namespace kept at `path`: its sockets are made there.

    Raises   CsvfsError: there is no such namespace. What `work` raises.
    """

    def enter_and_work() -> T:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(descriptor, _CLONE_NEWNET) != 0:  # of this thread alone
                raise CsvfsError(f"cannot enter {path}: {os.strerror(ctypes.get_errno())}; see `csvfs lab up`")
        finally:
            os.close(descriptor)
        return work()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(enter_and_work).result()


def remove_netns(path: Path) -> None:
    """Let go of the namespace kept at `path`; it ends, with its interfaces, when no process is in it."""
    unmount_lazily(path)
    path.unlink(missing_ok=True)


def _make_netns(path: Path) -> None:
    if netns_inode(path) is None:
        path.touch()
        _check(
            subprocess.run(["unshare", f"--net={path}", "true"], capture_output=True, text=True, check=False)
        )


def _has_interface(netns: Path, name: str) -> bool:
    return _run_in(netns, "ip", "link", "show", "dev", name).returncode == 0


def _ip(netns: Path, *arguments: str) -> None:
    _check(_run_in(netns, "ip", *arguments))


def _run_in(netns: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["nsenter", f"--net={netns}", *argv], capture_output=True, text=True, check=False)


def _check(result: subprocess.CompletedProcess[str]) -> None:
    if result.returncode != 0:
        command = " ".join(result.args)
        reason = result.stderr.strip().replace("\n", "; ")
        raise CsvfsError(f"`{command}` failed: {reason}; `csvfs lab down` cleans up")
