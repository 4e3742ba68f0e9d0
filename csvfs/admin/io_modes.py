"""How the I/O of each node to a volume goes, as far as can be told from here; and which metadata slabs wait for drives.

Place      admin floor. Pure: from the cluster store's keys and a coordinator's answer.
"""

from typing import Any, TypedDict

from csvfs.admin.cluster_view import VOLUME_ONLINE, ClusterView, Record
from csvfs.errors import CsvfsError
from csvfs.mount.waits import PAUSED, UNAVAILABLE
from csvfs.wire.block_messages import SlabDescriptor


class IoMode(TypedDict):
    """`mode`: direct, redirected, paused, unavailable (csvfs/mount/waits.py). `why`: empty for direct."""

    mode: str
    why: str


def io_modes(view: ClusterView, volume: Record, reply: Any) -> dict[str, IoMode]:
    """By node. `reply`: of `volume_status`; None: no coordinator answers."""
    if volume.text("state") != VOLUME_ONLINE or volume.text("error"):
        return {}
    sessions = reply.get("sessions") if isinstance(reply, dict) else None
    rows = {str(row.get("node")): row for row in sessions or () if isinstance(row, dict)}
    return {
        node: _mode_of(node in view.alive, rows.get(node), answered=isinstance(reply, dict))
        for node in view.node_names
        if node not in view.witnesses
    }


def _mode_of(alive: bool, row: dict[str, Any] | None, *, answered: bool) -> IoMode:
    if not alive:
        return {"mode": UNAVAILABLE, "why": "the node is down"}
    if not answered:
        return {"mode": PAUSED, "why": "no coordinator answers; what is cached may be used for 4 s"}
    if row is None or not row.get("connected"):
        return {"mode": PAUSED, "why": "its mount has no connection to the coordinator"}
    if not row.get("mode"):
        return {"mode": PAUSED, "why": "its mount has just connected"}
    return {"mode": str(row["mode"]), "why": str(row.get("why") or "")}


def modes_text(modes: dict[str, IoMode]) -> str:
    """`direct on n1, n2; paused on n3: why`."""
    by_mode: dict[tuple[str, str], list[str]] = {}
    for node, found in sorted(modes.items()):
        by_mode.setdefault((found["mode"], found["why"]), []).append(node)
    parts = [
        f"{mode} on {', '.join(nodes)}" + (f": {why}" if why else "") for (mode, why), nodes in sorted(by_mode.items())
    ]
    return "; ".join(parts)


def metadata_waits(view: ClusterView, meta: Record | None) -> list[str]:
    """Metadata slabs of which no in-sync copy is served, and which drives they wait for, in words.

    meta   the key `meta/<volume>`; None: there is none.
    """
    try:
        slabs = [SlabDescriptor.from_wire(row) for row in (meta.value.get("slabs") or ())] if meta else []
    except (CsvfsError, TypeError, ValueError) as error:
        return [f"cluster store key {meta.key if meta else ''} is malformed: {error}"]
    found: dict[tuple[str, ...], list[int]] = {}
    for descriptor in slabs:
        faults = [(member.drive.hex(), member.node, _fault(view, member.drive.hex(), member.node)) for member in descriptor.in_sync]
        if all(fault for _, _, fault in faults):
            waits = tuple(f"drive {drive[:8]} of {node} ({fault})" for drive, node, fault in faults)
            found.setdefault(waits, []).append(descriptor.slab)
    return [
        f"{len(numbers)} of {len(slabs)} metadata slabs wait{'s' if len(numbers) == 1 else ''} for {' or '.join(waits)}"
        for waits, numbers in sorted(found.items())
    ]


def _fault(view: ClusterView, drive: str, node: str) -> str:
    """Why the drive is not served; empty: it is, as far as the store knows."""
    if drive not in view.drives:
        return "it was removed from the pool"
    if node not in view.alive:
        return f"node {node} is down"
    server = view.servers.get(node)
    if server is None:
        return "its drive server does not run"
    reports = server.value.get("drives")
    report = reports.get(drive) if isinstance(reports, dict) else None
    return str(report.get("fault") or "") if isinstance(report, dict) else ""
