"""/dev/fuse and mount(2): the mount is made by us, not by libfuse, which gets a socket instead (relay.py).

Place      mount floor. Linux only; needs CAP_SYS_ADMIN.
"""

import ctypes
import errno
import os
from pathlib import Path

from csvfs.errors import BadRequest, Unavailable
from csvfs.mount.fuse_abi import IO_SIZE_MAX

FUSE_DEVICE = "/dev/fuse"
FILE_SYSTEM_TYPE = "fuse.csvfs"
MS_NOSUID = 2
MS_NODEV = 4
MNT_FORCE = 1
MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def open_device() -> int:
    """A session that is not mounted yet: its descriptor, non-blocking. Raises Unavailable: no FUSE here."""
    try:
        return os.open(FUSE_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"cannot open {FUSE_DEVICE}: {error.strerror}; load the fuse module, run as root")


def mount(fd: int, mount_point: Path, source: str) -> None:
    """Mount the session at `mount_point`; `source` is what `df` and `mount` show.

    The kernel's INIT request is the first thing to read from `fd` then.
    Raises   BadRequest: the mount point cannot be used.
    """
    if not mount_point.is_dir():
        raise BadRequest(f"mount point {mount_point} is not a directory; create it first")
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
        raise BadRequest(f"cannot mount {source} at {mount_point}: {reason}")


def unmount(mount_point: Path) -> bool:
    """Unmount in order, writing back what is dirty; False: something there is still in use.

    Blocks until the session has answered what this takes, so call it in another thread than the session's.
    """
    return bool(_libc.umount2(os.fsencode(mount_point), 0) == 0 or ctypes.get_errno() != errno.EBUSY)


def abort(mount_point: Path) -> None:
    """End the session now and detach it. What waits for an answer fails with EIO; nothing is written back.

    Also where a thread of a dead session's process still waits in the kernel for a page that nobody will
    fill: detaching alone would leave it there for ever.
    """
    target = os.fsencode(mount_point)
    _libc.umount2(target, MNT_FORCE)  # fails when in use, but has ended the session by then
    _libc.umount2(target, MNT_DETACH)
