"""The files of a machine that becomes a node: its configuration, its etcd directory, its systemd unit.

Place      admin floor, below cluster_create.py and cluster_join.py.
Rule       Nothing that is there is overwritten. The etcd directory is made beside its place and renamed to it when it is
           whole, so half of one is never seen; a configuration and a unit that are there are kept as they are.
"""

import ipaddress
import json
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from csvfs.admin.files import write_whole
from csvfs.config import PORT_COUNT, NodeConfig, check_name, config_path, load_config, parse_config
from csvfs.errors import BadRequest, Conflict, NotFound, NotSupported
from csvfs.store.etcd_place import EtcdPlace
from csvfs.store.opening import etcd_place, is_etcd

STATE_DIRECTORY = Path("/var/lib/csvfs")
PORT_BASE_DEFAULT = 7000
UNIT_NAME = "csvfs-node.service"
UNIT_DIRECTORY = Path("/etc/systemd/system")
SYSTEMD_RUNS = Path("/run/systemd/system")
CHECKOUT_IN_EXAMPLE = "/opt/csvfs"  # in examples/csvfs-node.service


@dataclass(slots=True, frozen=True)
class Wish:
    """What the command line says of the node; None: nothing."""

    node: str | None = None
    address: str | None = None
    port_base: int | None = None
    is_witness: bool = False


@dataclass(slots=True, frozen=True)
class NodePlan:
    """The node as it is to be. `text`: of the configuration to write; empty: there is one."""

    config: NodeConfig
    text: str

    @property
    def place(self) -> EtcdPlace:
        return etcd_place(self.config.store)


def plan_node(wish: Wish) -> NodePlan:
    """The configuration that is there, which must be what is wished for, or one for what is wished.

    Raises   Conflict: they differ. BadRequest: not a name, an address; no address was said and there are several.
    """
    path = config_path()
    try:
        config = load_config(path)
    except NotFound:
        if path.exists():
            raise
        return _new_node(wish, path)
    if not is_etcd(config.store):
        raise Conflict(
            f"{path} says store = {config.store!r}, which serves nodes on one machine; write"
            f' store = "etcd:{STATE_DIRECTORY}/etcd", or move the file away'
        )
    there = {"node": config.node, "address": config.address, "port_base": config.port_base}
    wished = {"node": wish.node, "address": wish.address, "port_base": wish.port_base}
    for name, value in wished.items():
        if value is not None and value != there[name]:
            raise Conflict(f"{path} says {name} = {there[name]!r}, not {value!r}; change it there, or leave out the option")
    if config.witness != wish.is_witness:
        how = "add witness = true there" if wish.is_witness else "join with --witness"
        raise Conflict(f"{path} says witness = {str(config.witness).lower()}; {how}, or move the file away")
    return NodePlan(config, "")


def _new_node(wish: Wish, path: Path) -> NodePlan:
    node = wish.node or socket.gethostname().partition(".")[0]
    check_name(node, "node")
    address = wish.address or only_address()
    port_base = PORT_BASE_DEFAULT if wish.port_base is None else wish.port_base
    if not 1 <= port_base <= 65_535 - PORT_COUNT:
        raise BadRequest(f"port_base {port_base} must lie between 1 and {65_535 - PORT_COUNT}")
    text = (
        "# What this node knows about itself; examples/node.toml of csvfs says what else can be said here.\n"
        f'node = "{node}"\n'
        f'address = "{_address(address)}"\n'
        f"port_base = {port_base}\n"
        f'store = "etcd:{STATE_DIRECTORY}/etcd"\n'
    )
    text += "# A member of the cluster store without drives.\nwitness = true\n" if wish.is_witness else ""
    return NodePlan(parse_config(text.encode(), path), text)


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise BadRequest(f"--address {text!r} is not an IP address") from None


def only_address() -> str:
    """The one address of this machine at which others could reach it. Raises BadRequest: there are none or several."""
    argv = ["ip", "-json", "address", "show", "scope", "global", "up"]
    try:
        said = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=10).stdout
        rows = [info for interface in json.loads(said) for info in interface.get("addr_info", [])]
        found = sorted({str(info["local"]) for info in rows if info.get("family") == "inet"})
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError, AttributeError):
        found = []
    if len(found) == 1:
        return found[0]
    raise BadRequest(
        f"which address do the other nodes reach this one at? It has {', '.join(found) or 'none that `ip` shows'};"
        " say --address"
    )


def write_config(plan: NodePlan) -> None:
    """Raises OSError; Conflict: somebody wrote another one meanwhile."""
    if not plan.text:
        return
    plan.config.path.parent.mkdir(parents=True, exist_ok=True)
    if plan.config.path.exists():
        raise Conflict(f"{plan.config.path} appeared meanwhile; look at it, then run this again")
    write_whole(plan.config.path, plan.text)


def put_in_place(staged: EtcdPlace, place: EtcdPlace) -> None:
    """Give a finished directory its name, durably. Raises Conflict: there is one. OSError."""
    for path in staged.directory.iterdir():
        _sync(path)
    _sync(staged.directory)
    try:
        os.rename(staged.directory, place.directory)  # onto an empty directory, or none
    except OSError as error:
        raise Conflict(f"{place.directory}: {error.strerror}; it holds something else already, look at it") from None
    _sync(place.directory.parent)


def new_directory(path: Path) -> EtcdPlace:
    """An empty directory of root alone; one that an earlier try left half-made is removed. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    return EtcdPlace(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unit_text() -> str:
    """The unit for this checkout. Raises NotSupported: csvfs runs from somewhere else."""
    checkout = Path(__file__).resolve().parents[2]
    example = checkout / "examples" / UNIT_NAME
    if not example.exists():
        raise NotSupported(f"no unit is installed: {example} is not there; csvfs runs from a checkout")
    return example.read_text().replace(CHECKOUT_IN_EXAMPLE, str(checkout))


def install_unit(directory: Path = UNIT_DIRECTORY) -> bool:
    """Put the unit where systemd finds it. False: one is there, and is kept. Raises NotSupported, OSError."""
    path = directory / UNIT_NAME
    if path.exists():
        return False
    write_whole(path, unit_text())
    if directory == UNIT_DIRECTORY:
        subprocess.run(["systemctl", "daemon-reload"], check=False, capture_output=True, timeout=60)
    return True


def has_systemd() -> bool:
    return SYSTEMD_RUNS.is_dir()


def start_hint() -> str:
    """How a node that has been set up is started."""
    return f"systemctl enable --now {UNIT_NAME.removesuffix('.service')}" if has_systemd() else "csvfs node run"
