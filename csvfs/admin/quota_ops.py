"""What `csvfs quota` asks of coordinators.

Place      admin floor. A directory is named by its path on this node; the coordinator is told its inode number.
"""

import stat
from dataclasses import dataclass
from typing import Any

from csvfs.admin.cluster_view import ClusterView, read_cluster_view
from csvfs.admin.peers import Peers
from csvfs.admin.volume_paths import find_in_volume
from csvfs.config import NodeConfig
from csvfs.errors import NotADirectory, NotFound, ProtocolError
from csvfs.store.interface import ClusterStore


@dataclass(slots=True, frozen=True)
class Place:
    """A directory of a volume."""

    volume: str
    ino: int


async def find_directory(config: NodeConfig, text: str) -> Place:
    """Raises NotADirectory, and as find_in_volume."""
    found = await find_in_volume(config, text)
    if not stat.S_ISDIR(found.status.st_mode):
        raise NotADirectory(f"{found.path} is not a directory: quotas are of directories and all below them")
    return Place(found.volume, found.status.st_ino)


async def set_quota(
    config: NodeConfig, store: ClusterStore, peers: Peers, text: str, size: int, files: int
) -> dict[str, Any]:
    """Limits of 0: none. Returns the row of `list_quotas`. Raises what find_directory and the coordinator do."""
    place = await find_directory(config, text)
    view = await read_cluster_view(store)
    return _row(await peers.coordinator(view, place.volume, "quota_set", ino=place.ino, size=size, files=files))


async def remove_quota(config: NodeConfig, store: ClusterStore, peers: Peers, text: str) -> None:
    """Raises what find_directory and the coordinator do."""
    place = await find_directory(config, text)
    view = await read_cluster_view(store)
    await peers.coordinator(view, place.volume, "quota_remove", ino=place.ino)


async def list_quotas(store: ClusterStore, peers: Peers, volume: str | None) -> list[dict[str, Any]]:
    """Of a volume, or of all: {volume, path, ino, size, used, files_max, files, state}; bytes; limits of 0: none.

    Raises  NotFound: no such volume. Unavailable: one has no coordinator at the moment.
    """
    view = await read_cluster_view(store)
    if volume is not None and volume not in view.volumes:
        raise NotFound(f"no volume {volume!r}: see csvfs volume list")
    names = sorted(view.volumes) if volume is None else [volume]
    return [row for name in names for row in await _quotas_of(view, peers, name)]


async def _quotas_of(view: ClusterView, peers: Peers, name: str) -> list[dict[str, Any]]:
    answer = await peers.coordinator(view, name, "quota_list")
    if not isinstance(answer, list):
        raise ProtocolError(f"the coordinator of {name} answers quota_list with {type(answer).__name__}")
    return [{"volume": name, **_row(row)} for row in answer]


def _row(answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise ProtocolError(f"a quota is told as {type(answer).__name__}, not as a map")
    return answer
