"""What the cluster store says, read once: nodes, drives, pool, volumes and who owns them.

Place      admin floor. Reads only; what changes the store is in drive_ops, pool_ops and volume_ops.
Source     ARCHITECTURE.md, "Cluster store keys". A key of the wrong shape is Corrupt, by its name: an
           administrator must see it, not a listing that silently leaves it out.
"""

from dataclasses import dataclass, field
from typing import Any, TypeVar

from csvfs.errors import Corrupt, NotFound, ProtocolError
from csvfs.fault_domains import Level, Place, domain_at, level_of, place_of
from csvfs.store.interface import ClusterStore, Item
from csvfs.wire.control import pack_value, unpack_value

CLUSTER_KEY = "cluster"
POOL_KEY = "pool"
NODES, ALIVE, SERVERS, COORDINATORS = "nodes/", "alive/", "servers/", "coordinators/"
DRIVES, VOLUMES, OWNERS, TERMS = "drives/", "volumes/", "owner/", "term/"
MAINTENANCE = "maintenance/"
CERTIFICATES, WITNESSES = "certificates/", "witnesses/"  # admin/join_admission.py says what is in them
EVICTED = "evicted/"
QUARANTINE, STANDING, REACH = "quarantine/", "standing/", "reach/"  # admin/node_standing.py

DRIVE_OK = "ok"  # as the drive server says it
USAGE_AUTO = "auto"
VOLUME_CREATING, VOLUME_ONLINE, VOLUME_DELETING = "creating", "online", "deleting"

T = TypeVar("T")


@dataclass(slots=True, frozen=True)
class Record:
    """One key's map, with the revision that a compare needs. Field access checks the type."""

    key: str
    value: dict[str, Any]
    revision: int
    lease: int = 0

    @property
    def name(self) -> str:
        """What follows the last slash of the key."""
        return self.key.rpartition("/")[2]

    def text(self, name: str, default: str = "") -> str:
        value = self.value.get(name)
        return default if value is None else self._of_type(name, value, str)

    def number(self, name: str, default: int = 0) -> int:
        value = self.value.get(name)
        return default if value is None else self._of_type(name, value, int)

    def id(self, name: str = "id") -> bytes:
        """A 16-byte id."""
        value = self._of_type(name, self.value.get(name), bytes)
        if len(value) != 16:
            raise Corrupt(f"cluster store key {self.key}: {name} has {len(value)} bytes, not 16")
        return value

    def _of_type(self, name: str, value: Any, kind: type[T]) -> T:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise Corrupt(f"cluster store key {self.key}: {name} is {value!r}, not {kind.__name__}")
        return value

    def packed_with(self, **changes: Any) -> bytes:
        """The value with some fields replaced, as it goes into the store."""
        return pack_value({**self.value, **changes})


def record_of(item: Item) -> Record:
    """Raises Corrupt when the value is not a msgpack map."""
    try:
        value = unpack_value(item.value)
    except ProtocolError as error:
        raise Corrupt(f"cluster store key {item.key} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise Corrupt(f"cluster store key {item.key} holds {type(value).__name__}, not a map")
    return Record(item.key, value, item.revision, item.lease)


@dataclass(slots=True)
class ClusterView:
    """The keys by name. They were read one prefix after the other: not one instant's picture."""

    cluster: Record | None = None
    pool: Record | None = None
    nodes: dict[str, Record] = field(default_factory=dict)
    alive: dict[str, Record] = field(default_factory=dict)
    servers: dict[str, Record] = field(default_factory=dict)
    coordinators: dict[str, Record] = field(default_factory=dict)
    drives: dict[str, Record] = field(default_factory=dict)  # by drive id in hex
    volumes: dict[str, Record] = field(default_factory=dict)
    owners: dict[str, Record] = field(default_factory=dict)
    maintenance: dict[str, Record] = field(default_factory=dict)  # by node
    witnesses: dict[str, Record] = field(default_factory=dict)
    quarantine: dict[str, Record] = field(default_factory=dict)
    reach: dict[str, Record] = field(default_factory=dict)  # what each node says of the others

    @property
    def node_names(self) -> list[str]:
        """All nodes ever heard of, also those whose own key is missing while a lease or drive names them."""
        by_drives = {drive.text("node") for drive in self.drives.values()}
        return sorted(name for name in {*self.nodes, *self.alive, *by_drives} if name)

    def drives_of(self, node: str) -> list[Record]:
        return [drive for drive in self.drives.values() if drive.text("node") == node]

    def nodes_with_drives(self, *, up: bool = True) -> list[str]:
        """Nodes with a drive that takes slabs. `up`: only those that are up, where copies may be placed now."""
        return [
            node
            for node in self.node_names
            if (node in self.alive or not up) and any(takes_slabs(drive) for drive in self.drives_of(node))
        ]

    def domains_with_drives(self, level: Level, *, up: bool = True) -> set[str]:
        return {self.domain_of(node, level) for node in self.nodes_with_drives(up=up)}

    def domain_of(self, node: str, level: Level) -> str:
        return domain_at(level, node, self.place_of(node))

    def place_of(self, node: str) -> Place:
        record = self.nodes.get(node)
        return place_of(record.value.get("place") if record else None)

    def level_of(self, volume: str) -> Level:
        """At which a volume keeps its copies apart."""
        return level_of(self.volumes[volume].value)

    def volume(self, name: str) -> Record:
        """Raises NotFound, naming the volumes that there are."""
        if name not in self.volumes:
            there_are = ", ".join(sorted(self.volumes)) or "none yet; create one with csvfs volume create"
            raise NotFound(f"no volume {name!r}; there are: {there_are}")
        return self.volumes[name]


def drive_in_order(drive: Record) -> bool:
    return drive.text("state", DRIVE_OK) == DRIVE_OK


def drive_usage(drive: Record) -> str:
    """auto, retired, removing, removed or maintenance."""
    return drive.text("usage") or USAGE_AUTO


def takes_slabs(drive: Record) -> bool:
    """Whether new slabs may be placed on it."""
    return drive_in_order(drive) and drive_usage(drive) == USAGE_AUTO


async def read_record(store: ClusterStore, key: str) -> Record | None:
    """Raises Corrupt, Unavailable. Cancel safe."""
    item = await store.get(key)
    return None if item is None else record_of(item)


async def read_cluster_view(store: ClusterStore) -> ClusterView:
    """Raises Corrupt, Unavailable. Cancel safe."""

    async def by_name(prefix: str) -> dict[str, Record]:
        return {item.key.removeprefix(prefix): record_of(item) for item in await store.list(prefix)}

    return ClusterView(
        cluster=await read_record(store, CLUSTER_KEY),
        pool=await read_record(store, POOL_KEY),
        nodes=await by_name(NODES),
        alive=await by_name(ALIVE),
        servers=await by_name(SERVERS),
        coordinators=await by_name(COORDINATORS),
        drives=await by_name(DRIVES),
        volumes=await by_name(VOLUMES),
        owners=await by_name(OWNERS),
        maintenance=await by_name(MAINTENANCE),
        witnesses=await by_name(WITNESSES),
        quarantine=await by_name(QUARANTINE),
        reach=await by_name(REACH),
    )
