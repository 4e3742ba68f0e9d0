"""Cluster facts: what a coordinator asks of the membership view, by name instead of by key.

Place      coordinator floor, over cluster/membership.py. Reads only; a fact may be a moment old.
Domains    are those of a volume's level, as the store says it now: what is changed there counts at once.
"""

from typing import Any

from coordinator.repair_plan import REMOVING, RETIRED
from csvfs.block.server_links import ServerAddress
from csvfs.cluster.membership import View
from csvfs.fault_domains import Level, Place, domain_at, level_of, place_of
from csvfs.ids import DriveId, Incarnation, NodeName

_DRIVE_OK = "ok"
USAGE_AUTO = "auto"  # of `drives/<id>`: slabs are placed there; others: retired, removing, removed, maintenance
_USAGE_MAINTENANCE = "maintenance"  # takes no new slabs, but is not emptied either


class ClusterFacts:
    """Nodes, drives and drive servers as last heard. `volume`: whose fault domains are meant; empty: nodes."""

    def __init__(self, view: View, volume: str = "") -> None:
        self.view = view
        self._volume = volume
        self._domains: dict[NodeName, tuple[object, Level, str]] = {}  # with what they follow from

    def of_volume(self, volume: str) -> "ClusterFacts":
        """The same, with the fault domains of this volume's level."""
        return ClusterFacts(self.view, volume)

    def server(self, node: NodeName) -> ServerAddress | None:
        """Where the node's drive server listens; None: it runs none now."""
        value = self.view.servers.get(node)
        if value is None or node not in self.view.alive:
            return None
        try:
            return ServerAddress(
                node,
                str(value["address"]),
                int(value["port"]),
                str(value.get("unix") or ""),
                Incarnation(int(value["incarnation"])),
            )
        except (KeyError, TypeError, ValueError):
            return None  # malformed: as good as none

    def source(self, node: NodeName) -> tuple[str, int] | None:
        """As another drive server reaches it."""
        server = self.server(node)
        return None if server is None else (server.address, server.port)

    def is_alive(self, node: NodeName) -> bool:
        """Whether the node's lease holds. When it does not, nothing on that node serves any more (I5)."""
        return node in self.view.alive

    def is_evicted(self, node: NodeName) -> bool:
        """Whether the node has gone for good."""
        return node in self.view.evicted

    def in_maintenance(self, node: NodeName) -> bool:
        """Whether the node is drained or paused: it serves while it is up, but nothing new is put onto it."""
        return node in self.view.maintenance

    def is_aside(self, node: NodeName) -> bool:
        """Whether nothing new is put onto the node while others suffice: it is in maintenance, or quarantined."""
        return self.in_maintenance(node) or node in self.view.quarantine

    def drive_nodes(self) -> list[NodeName]:
        """Nodes with a drive in the pool, up or down."""
        return sorted({node for node in map(self.node_of, self.view.drives) if node is not None})

    def node_of(self, drive: DriveId) -> NodeName | None:
        value = self.view.drives.get(drive)
        node = value.get("node") if value is not None else None
        return NodeName(node) if isinstance(node, str) else None

    def drives_of(self, node: NodeName) -> list[DriveId]:
        return sorted(drive for drive in self.view.drives if self.node_of(drive) == node)

    def takes_slabs(self, drive: DriveId) -> bool:
        """Whether new slabs may be placed on it: it is in order, not retired, and not slow."""
        value = self.view.drives.get(drive)
        if value is None or not self.stays(drive) or (value.get("usage") or USAGE_AUTO) != USAGE_AUTO:
            return False
        report = self.drive_report(drive)
        return not (report.get("fault") or report.get("slow"))

    def stays(self, drive: DriveId) -> bool:
        """Whether copies on it are to stay there, be it up or down, fast or slow."""
        value = self.view.drives.get(drive)
        in_order = value is not None and (value.get("state") or _DRIVE_OK) == _DRIVE_OK
        return in_order and self.usage(drive) is None

    def is_attended(self, drive: DriveId) -> bool:
        """Somebody is at it: it is not counted as lost, however long it is away."""
        value = self.view.drives.get(drive)
        return value is not None and value.get("usage") == _USAGE_MAINTENANCE

    def usage(self, drive: DriveId) -> str | None:
        """None: its copies may stay; else why they shall be elsewhere: `retired` or `removing`."""
        value = self.view.drives.get(drive)
        usage = value.get("usage") if value is not None else None
        if usage in (None, "", USAGE_AUTO, _USAGE_MAINTENANCE):
            return None
        return RETIRED if usage != REMOVING else REMOVING

    def serves(self, drive: DriveId) -> bool:
        """Whether its server runs, and says of no fault of the drive."""
        node = self.node_of(drive)
        return node is not None and self.server(node) is not None and not self.drive_report(drive).get("fault")

    def is_slow(self, drive: DriveId) -> bool:
        return bool(self.drive_report(drive).get("slow"))

    def drive_reports(self) -> dict[DriveId, tuple[str, int]]:
        """Of drives whose server runs: (fault or empty, how often it was opened), as the server tells."""
        found = {}
        for drive in self.view.drives:
            report = self.drive_report(drive)
            if report:
                found[drive] = (str(report.get("fault") or ""), int(report.get("opens") or 0))
        return found

    def drive_report(self, drive: DriveId) -> dict[str, Any]:
        """What its server tells of the drive (block/drive_watch.py); empty: nothing."""
        node = self.node_of(drive)
        server = self.view.servers.get(node) if node is not None else None
        drives = server.get("drives") if server is not None else None
        report = drives.get(drive.hex()) if isinstance(drives, dict) else None
        return report if isinstance(report, dict) else {}

    def domain_of(self, node: NodeName) -> str:
        """The fault domain: two copies of a slab never share one."""
        value, level = self.view.nodes.get(node), self.level
        known = self._domains.get(node)  # a look at all slabs asks for every member
        if known is None or known[0] is not value or known[1] != level:
            known = value, level, domain_at(level, node, self.place_of(node))
            self._domains[node] = known
        return known[2]

    @property
    def level(self) -> Level:
        """At which the volume keeps its copies apart."""
        return level_of(self.view.volumes.get(self._volume))

    def place_of(self, node: NodeName) -> Place:
        return place_of((self.view.nodes.get(node) or {}).get("place"))
