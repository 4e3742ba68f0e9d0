"""Paths below the cluster root: which volume they are of, and what lies there.

Place      admin floor, below why.py, file_map.py, quota_ops.py.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import trio

from csvfs.config import NodeConfig, check_name
from csvfs.errors import BadRequest, NotFound, Unavailable

PATH_S = 5.0  # for a path to be found: the mount may be waiting for its coordinator


@dataclass(slots=True, frozen=True)
class InVolume:
    volume: str
    path: Path
    status: os.stat_result  # st_ino: the coordinator's inode number


def volume_of(text: str, root: Path) -> tuple[str, Path | None]:
    """The volume that a name or path is of, and the path. Raises BadRequest. Touches no file."""
    if "/" not in text:
        check_name(text, "volume")
        return text, None
    path = Path(os.path.abspath(text))
    if root not in path.parents:
        raise BadRequest(f"{path} is not below {root}: give a volume's name, or a path in one")
    return path.relative_to(root).parts[0], path


async def find_in_volume(config: NodeConfig, text: str) -> InVolume:
    """What lies at a path, which may be relative. Raises BadRequest: not below the cluster root. NotFound: nothing, or the
    volume is not mounted here. Unavailable: the mount does not answer within PATH_S. Cancel safe."""
    volume, path = volume_of(os.path.abspath(text), config.cluster_root)
    assert path is not None, "it is absolute"
    with trio.move_on_after(PATH_S):
        try:
            status = await trio.to_thread.run_sync(os.stat, path, abandon_on_cancel=True)
            point = await trio.to_thread.run_sync(os.stat, config.cluster_root / volume, abandon_on_cancel=True)
        except OSError as error:
            raise NotFound(f"{path}: {error.strerror}") from None
        # Else it lies in the empty directory below a volume that is not mounted, or beyond another mount.
        if point.st_dev == os.stat(config.cluster_root).st_dev or status.st_dev != point.st_dev:
            raise NotFound(f"{config.cluster_root / volume} is not mounted, or {path} is of another file system")
        return InVolume(volume, path, status)
    raise Unavailable(f"{path} is not found within {PATH_S:g} s; csvfs why {volume} says what it waits for")
