"""Which drive an administrator means.

Place      admin floor. Pure.
"""

import os

from csvfs.admin.cluster_view import ClusterView, Record
from csvfs.errors import BadRequest, NotFound

ID_PREFIX_MIN = 4  # hex digits


def find_drive(view: ClusterView, text: str, node: str) -> Record:
    """The drive that an administrator means by an id, the beginning of one, or a path.

    Raises  NotFound. BadRequest: several drives are meant; a path on `node` goes before those on others.
    """
    path = os.path.realpath(text)
    by_path = [drive for drive in view.drives.values() if drive.text("path") in (text, path)]
    found = [drive for drive in by_path if drive.text("node") == node] or by_path
    if not found and len(text) >= ID_PREFIX_MIN:
        found = [drive for drive in view.drives.values() if drive.name.startswith(text.lower())]
    if not found:
        raise NotFound(
            f"no drive {text!r} in the pool; see csvfs drive list for paths and ids (at least {ID_PREFIX_MIN} "
            "digits of one)"
        )
    if len(found) > 1:
        names = ", ".join(f"{drive.name[:8]} on {drive.text('node')}" for drive in found)
        raise BadRequest(f"{text!r} may mean {names}: give the id")
    return found[0]
