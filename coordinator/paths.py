"""Paths of inodes, for people: by what the tables say between two batches.

Place      coordinator floor; on database.py alone.
Cost       one scan of the parent's entries per directory on the way: nobody needs names by inode but this.
"""

from coordinator.database import Database
from csvfs.ids import ROOT_INODE

DEPTH_MAX = 4096  # a damaged table may lead in circles


def directory_path(database: Database, directory: int, known: dict[int, bytes] | None = None) -> bytes:
    """From the volume's root, which is empty; `?` for what has no name. `known`: paths found before; filled."""
    paths = known if known is not None else {}
    names: list[bytes] = []
    inos: list[int] = []
    at = directory
    while at != ROOT_INODE and at not in paths and len(names) < DEPTH_MAX:
        rows = database.rows("SELECT parent FROM inodes WHERE ino = ?", (at,))
        parent = rows[0][0] if rows else 0
        found = database.rows("SELECT name FROM entries WHERE parent = ? AND ino = ?", (parent, at)) if rows else []
        names.append(bytes(found[0][0]) if found else b"?")
        inos.append(at)
        if not rows:
            break
        at = parent
    path = paths.get(at, b"")
    for ino, name in zip(reversed(inos), reversed(names), strict=True):
        path = paths[ino] = path + b"/" + name
    return path
