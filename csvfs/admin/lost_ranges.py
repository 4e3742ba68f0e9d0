"""What of a volume is lost, and giving it up: the questions to its coordinator.

Place      admin floor. coordinator/lost.py says what the words mean.
"""

from dataclasses import dataclass, field
from typing import Any

from csvfs.admin.cluster_view import read_cluster_view
from csvfs.admin.peers import Peers
from csvfs.errors import ProtocolError
from csvfs.store.interface import ClusterStore

TIMEOUT_S = 120.0  # all extents of the volume are looked through


@dataclass(slots=True)
class LostSlab:
    slab: int
    epoch: int
    why: list[str]  # of each in-sync member: `ab12cd34 on n2: truncated`
    stale: int  # copies that can be reached, and are not in sync


@dataclass(slots=True)
class LostRanges:
    ino: int
    path: str  # from the volume's root on; empty: it has no name any more
    ranges: list[tuple[int, int]]  # offset and size in bytes


@dataclass(slots=True)
class LostReport:
    slabs: list[LostSlab] = field(default_factory=list)
    files: list[LostRanges] = field(default_factory=list)
    file_count: int = 0
    blocks: int = 0  # single ones that are bad on all copies of their slabs


async def lost_report(store: ClusterStore, peers: Peers, volume: str) -> LostReport:
    """Raises NotFound, Unavailable (no coordinator: then the metadata may be lost), ProtocolError."""
    view = await read_cluster_view(store)
    view.volume(volume)
    answer = await peers.coordinator_slowly(view, volume, "lost", TIMEOUT_S)
    try:
        return LostReport(
            [_slab(row) for row in answer["slabs"]],
            [
                LostRanges(
                    int(ino),
                    bytes(path).decode(errors="backslashreplace"),
                    [(int(a), int(b)) for a, b in rows],
                )
                for ino, path, rows in answer["files"]
            ],
            int(answer["file_count"]),
            int(answer["blocks"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"the coordinator of {volume} answers with nonsense: {error!r}") from None


def _slab(row: dict[str, Any]) -> LostSlab:
    why = [f"{bytes(drive).hex()[:8]} on {node}: {reason}" for drive, node, reason in row["members"]]
    return LostSlab(int(row["slab"]), int(row["epoch"]), why, len(row["stale"]))


async def accept_loss(store: ClusterStore, peers: Peers, volume: str) -> list[dict[str, Any]]:
    """Give up what is lost. Rows of slab, took (`stale copy`, `zeros`), error. Raises as lost_report."""
    view = await read_cluster_view(store)
    view.volume(volume)
    answer = await peers.coordinator_slowly(view, volume, "accept_data_loss", TIMEOUT_S)
    rows = answer.get("slabs") if isinstance(answer, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "slab" in row for row in rows):
        raise ProtocolError(f"the coordinator of {volume} answers with nonsense")
    return rows
