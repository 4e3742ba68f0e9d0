"""Cluster facts: what a coordinator asks of the membership view, by name instead of by key.

Place      coordinator floor, over cluster/membership.py. Reads only; a fact may be a moment old.
"""

from coordinator.repair_plan import REMOVING, RETIRED
from csvfs.block.server_links import ServerAddress
from csvfs.cluster.membership import View
from csvfs.ids import DriveId, Incarnation, NodeName

_DRIVE_OK = "ok"
_USAGE_AUTO = "auto"


class ClusterFacts:
    """Nodes, drives and drive servers as last heard."""

    def __init__(self, view: View) -> None:
        self.view = view

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
        """Whether new slabs may be placed on it."""
        value = self.view.drives.get(drive)
        in_order = value is not None and (value.get("state") or _DRIVE_OK) == _DRIVE_OK
        return in_order and self.usage(drive) is None

    def usage(self, drive: DriveId) -> str | None:
        """None: it is used as usual; else why its copies shall be elsewhere: `retired` or `removing`."""
        value = self.view.drives.get(drive)
        usage = value.get("usage") if value is not None else None
        return None if usage in (None, _USAGE_AUTO) else RETIRED if usage != REMOVING else REMOVING

    def domain_of(self, node: NodeName) -> str:
        """The fault domain: two copies of a slab never share one."""
        value = self.view.nodes.get(node)
        domain = value.get("domain") if value is not None else None
        return domain if isinstance(domain, str) and domain else node
