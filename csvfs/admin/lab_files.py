"""The files of a lab: where everything lies below its directory, and what it was made with.

Place      admin floor, below lab.py.
Layout     DIR/lab.json                what it was made with; written first, removed last
           DIR/store/store.db          the embedded cluster store; of etcd: who its members are, its authority
           DIR/netns                   the lab's own network namespace, with the bridge in it
           DIR/nodes/n1/node.toml, netns, gate, run/ (sockets, logs), root/ (its /clusterstorage), drives/,
                        etcd/ (store/etcd_place.py), or tls/ with the certificates alone, as there
           DIR/ca/                      the authority of a lab without etcd
Names      A namespace is kept by a bind mount inside DIR, and all interfaces live in namespaces: nothing of a
           lab has a name outside DIR, so labs never collide.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from csvfs.admin.files import write_whole
from csvfs.config import TLS_NONE
from csvfs.errors import BadRequest, Corrupt, NotFound

LAB_DIR_DEFAULT = Path("/var/tmp/csvfs-lab")
# DIR/nodes/n16/run/coordinator.sock must fit into a unix socket's 107 bytes.
DIRECTORY_LENGTH_MAX = 60
NODES_MAX = 16
DRIVES_MAX = 64
PORT_BASE = 7000
STORE_EMBEDDED, STORE_ETCD = STORES = ("embedded", "etcd")


@dataclass(slots=True, frozen=True)
class LabPlan:
    """What a lab is made with."""

    nodes: int
    drives: int  # per node
    drive_size: int  # bytes
    store: str
    tls: bool = True  # between nodes; etcd itself always has it

    def __post_init__(self) -> None:
        for name, value, most in (("nodes", self.nodes, NODES_MAX), ("drives", self.drives, DRIVES_MAX)):
            if not 1 <= value <= most:
                raise BadRequest(f"a lab has 1 to {most} {name}, not {value}")
        if self.drive_size < 1:
            raise BadRequest(f"drives of {self.drive_size} bytes; say --drive-size 4G")
        if self.store not in STORES:
            raise BadRequest(f"the store kind {self.store!r} is none of {', '.join(STORES)}")


@dataclass(slots=True, frozen=True)
class LabNode:
    """One node's files and address."""

    name: str
    index: int  # from 1
    directory: Path

    @property
    def address(self) -> str:
        return f"10.77.0.{self.index}"

    @property
    def config(self) -> Path:
        return self.directory / "node.toml"

    @property
    def netns(self) -> Path:
        return self.directory / "netns"

    @property
    def gate(self) -> Path:
        return self.directory / "gate"

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def etcd(self) -> Path:
        return self.directory / "etcd"

    @property
    def tls(self) -> Path:
        return self.directory / "tls"

    @property
    def root(self) -> Path:
        return self.directory / "root"

    @property
    def log(self) -> Path:
        return self.run_dir / "logs" / "node.log"

    def drive_paths(self, count: int) -> list[Path]:
        return [self.directory / "drives" / f"d{index}" for index in range(1, count + 1)]


@dataclass(slots=True, frozen=True)
class LabFiles:
    """A lab's directory."""

    directory: Path

    @property
    def marker(self) -> Path:
        return self.directory / "lab.json"

    @property
    def netns(self) -> Path:
        return self.directory / "netns"

    @property
    def store(self) -> Path:
        return self.directory / "store" / "store.db"

    @property
    def authority(self) -> Path:
        return self.store.parent if self.plan().store == STORE_ETCD else self.directory / "ca"

    @property
    def store_url(self) -> str:
        """The cluster store as seen from outside of all nodes; etcd's only within `netns`."""
        return f"etcd:{self.store.parent}" if self.plan().store == STORE_ETCD else f"embedded:{self.store}"

    def node(self, index: int) -> LabNode:
        return LabNode(f"n{index}", index, self.directory / "nodes" / f"n{index}")

    def plan(self) -> LabPlan:
        """What the lab was made with. Raises NotFound: there is no lab here. Corrupt: its note is damaged."""
        try:
            values = json.loads(self.marker.read_text())
            return LabPlan(**values)
        except OSError:
            raise NotFound(f"there is no lab in {self.directory}; make one with `csvfs lab up`") from None
        except (ValueError, TypeError, BadRequest):
            raise Corrupt(f"{self.marker} is damaged; `csvfs lab down` takes the lab away") from None

    def nodes(self) -> list[LabNode]:
        return [self.node(index) for index in range(1, self.plan().nodes + 1)]

    def node_named(self, name: str) -> LabNode:
        """Raises NotFound, and says which nodes there are."""
        nodes = self.nodes()
        for node in nodes:
            if node.name == name:
                return node
        raise NotFound(f"the lab has no node {name!r}; it has {nodes[0].name} to {nodes[-1].name}")


def lab_files(directory: Path) -> LabFiles:
    """The files of the lab in `directory`. Raises BadRequest when a lab cannot lie there."""
    path = Path(os.path.realpath(directory))
    if len(os.fsencode(path)) > DIRECTORY_LENGTH_MAX:
        raise BadRequest(f"{path} is longer than {DIRECTORY_LENGTH_MAX} bytes; sockets need a shorter --dir")
    if any(not character.isprintable() or character in ' "\\?&#%' for character in str(path)):
        raise BadRequest(f"{str(path)!r}: use a --dir without spaces and special characters")
    if len(path.parts) < 3:
        raise BadRequest(
            f"{path} is no place for a lab: `down` removes the whole directory; use {LAB_DIR_DEFAULT}"
        )
    return LabFiles(path)


def make_files(files: LabFiles, plan: LabPlan) -> None:
    """Make what is missing; an existing drive is left as it is.

    Raises   BadRequest: DIR holds something else. OSError.
    """
    if not files.marker.exists():
        if files.directory.exists() and any(files.directory.iterdir()):
            raise BadRequest(f"{files.directory} is not empty and holds no lab; use another --dir")
        files.directory.mkdir(parents=True, exist_ok=True)
        write_whole(files.marker, json.dumps(asdict(plan)) + "\n")
    files.store.parent.mkdir(exist_ok=True)
    for index in range(1, plan.nodes + 1):
        node = files.node(index)
        for directory in (node.log.parent, node.root, node.directory / "drives"):
            directory.mkdir(parents=True, exist_ok=True)
        write_whole(node.config, _node_toml(plan, files, node))
        for path in node.drive_paths(plan.drives):
            if not path.exists():
                with path.open("xb") as drive:
                    drive.truncate(plan.drive_size)


def _node_toml(plan: LabPlan, files: LabFiles, node: LabNode) -> str:
    store = f"etcd:{node.etcd}" if plan.store == STORE_ETCD else f"{files.store_url}?gate={node.gate}"
    tls_dir: Path | str = node.etcd if plan.store == STORE_ETCD else node.tls
    tls_dir = tls_dir if plan.tls else TLS_NONE
    return (
        f'node = "{node.name}"\n'
        f'address = "{node.address}"\n'
        f"port_base = {PORT_BASE}\n"
        f'store = "{store}"\n'
        f'run_dir = "{node.run_dir}"\n'
        f'tls_dir = "{tls_dir}"\n'
        f'[drives]\nclaim = ["{node.directory}/drives/*"]\n'  # never the disks of this machine
    )
