"""Mount points of a node: what is mounted, and taking away what is left of a dead mount. Admin floor.

os.path.ismount is of no use here: stat on the mount of a dead FUSE server fails, or hangs.
"""

import ctypes
import errno
import os
import re
from pathlib import Path

from csvfs.errors import Conflict

MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
_ESCAPE = re.compile(rb"\\([0-7]{3})")


def mounted_paths(mountinfo: bytes | None = None) -> list[bytes]:
    """Mount points of this process's mount namespace, in mount order: of equal ones the last is on top."""
    text = Path("/proc/self/mountinfo").read_bytes() if mountinfo is None else mountinfo
    fields = (line.split(b" ") for line in text.splitlines())
    return [_ESCAPE.sub(lambda m: bytes([int(m[1], 8)]), row[4]) for row in fields if len(row) > 4]


def unmount_lazily(path: Path) -> int:
    """Detach everything mounted at `path`; returns how many mounts that were.

    Never touches the mount's server, so it works when that is dead. Forced first, which ends every request that waits:
    a thread of the dead server that was itself waiting for a page of the mount would else keep /dev/fuse open for
    ever, and everybody with it. Raises Conflict: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    wanted = os.fsencode(path)
    count = mounted_paths().count(wanted)
    for _ in range(count):
        libc.umount2(wanted, MNT_FORCE | UMOUNT_NOFOLLOW)
        if libc.umount2(wanted, MNT_DETACH | UMOUNT_NOFOLLOW) != 0:
            number = ctypes.get_errno()
            if number not in (errno.EINVAL, errno.ENOENT):  # gone meanwhile
                raise Conflict(f"{path} cannot be unmounted: {os.strerror(number)}; try `umount -l {path}`")
    return count
