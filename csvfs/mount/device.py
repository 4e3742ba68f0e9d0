"""/dev/fuse and mount(2): the mount is made by us, not by libfuse, which gets a socket instead (relay.py).

Place      mount floor. Linux only; needs CAP_SYS_ADMIN.
"""

import ctypes
import os
from pathlib import Path

from csvfs.errors import BadRequest, Unavailable
from csvfs.mount.fuse_abi import IO_SIZE_MAX

FUSE_DEVICE = "/dev/fuse"
FILE_SYSTEM_TYPE = "fuse.csvfs"
MS_NOSUID = 2
MS_NODEV = 4
MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def mount_device(mount_point: Path, source: str) -> int:
    """Open /dev/fuse and mount it at `mount_point`; `source` is what `df` and `mount` show.

    Returns  the descriptor, non-blocking. The kernel's INIT request is the first thing to read from it.
    Raises   BadRequest: the mount point cannot be used. Unavailable: no FUSE here.
    """
    if not mount_point.is_dir():
        raise BadRequest(f"mount point {mount_point} is not a directory; create it first")
    try:
        fd = os.open(FUSE_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"cannot open {FUSE_DEVICE}: {error.strerror}; load the fuse module, run as root")
    # default_permissions: the kernel checks modes, as for a local file system; the volume only stores them.
    options = (
        f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read={IO_SIZE_MAX}"
    )
    # Images and files of guests come from anywhere: their set-uid programs and device nodes are data here.
    flags = MS_NOSUID | MS_NODEV
    target = os.fsencode(mount_point)
    result = _libc.mount(os.fsencode(source), target, FILE_SYSTEM_TYPE.encode(), flags, options.encode())
    if result != 0:
        reason = os.strerror(ctypes.get_errno())
        os.close(fd)
        raise BadRequest(f"cannot mount {source} at {mount_point}: {reason}")
    return fd


def unmount(mount_point: Path) -> None:
    """Detach at once; files still open there keep the session alive only until its descriptor is closed."""
    _libc.umount2(os.fsencode(mount_point), MNT_DETACH)
