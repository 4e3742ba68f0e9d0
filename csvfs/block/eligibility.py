"""Whether a file or block device may become a drive; if not, why, by name. Nothing is ever written here.

Place      block floor, above superblock.py, signatures.py and in_use.py. It reads the medium, /proc, /sys.
Order      what it is, whether somebody uses it, whether it can be written, what it holds, how large it is.
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from csvfs.block.in_use import describe_users, holders, loop_devices, mounted_at, swapped_on
from csvfs.block.layout import size_needed
from csvfs.block.medium import medium_size
from csvfs.block.signatures import find_signature, is_blank
from csvfs.block.superblock import SUPERBLOCK_MAGIC, Superblock, read_superblock, read_superblocks
from csvfs.errors import Corrupt, DriveRefused
from csvfs.ids import PoolId
from csvfs.units import SLAB_SIZE_DEFAULT

_BLKROGET = 0x125E


@dataclass(slots=True, frozen=True)
class DriveInspection:
    """For listings. `refused`: why it may not be added; None: it may. `superblock`: if it is a drive."""

    path: str
    kind: str  # "file", "block device" or "other"
    size: int  # bytes; 0: unknown
    refused: str | None
    superblock: Superblock | None


def check_drive(
    path: str, *, pool_id: PoolId | None, cluster_id: bytes | None, slab_size: int = SLAB_SIZE_DEFAULT
) -> None:
    """Return iff the path is a blank, unused file or block device, large enough for one slab.

    Args    pool_id, cluster_id: ours, to tell a drive of this pool from a foreign one; None: all are foreign.
    Raises  DriveRefused with the reason by name; nothing was written. BadRequest: not a slab size.
    """
    needed = size_needed(slab_size)
    with _opened(path) as fd:
        _check_unused(path, fd)
        _check_writable(path, fd)
        try:
            size = medium_size(fd)
            check_content(path, fd, size, pool_id, cluster_id)
        except OSError as error:
            raise DriveRefused(f"{path}: cannot be read: {error.strerror}") from None
        if size < needed:
            raise DriveRefused(f"{path}: too small ({size} B, needs at least {needed} B)")


def inspect_drive(
    path: str, *, pool_id: PoolId | None, cluster_id: bytes | None, slab_size: int = SLAB_SIZE_DEFAULT
) -> DriveInspection:
    """The same for a listing: never raises DriveRefused."""
    refused = None
    try:
        check_drive(path, pool_id=pool_id, cluster_id=cluster_id, slab_size=slab_size)
    except DriveRefused as error:
        refused = str(error).removeprefix(f"{path}: ")
    kind, size, superblock = "other", 0, None
    with contextlib.suppress(OSError):
        mode = os.stat(path).st_mode
        kind = "file" if stat.S_ISREG(mode) else "block device" if stat.S_ISBLK(mode) else "other"
        if kind != "other":
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = medium_size(fd)
                with contextlib.suppress(Corrupt):
                    superblock = read_superblock(fd, size).superblock
            finally:
                os.close(fd)
    return DriveInspection(path, kind, size, refused, superblock)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    """A read-only descriptor; of a block device an exclusive one, which a mount or RAID on it refuses."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise DriveRefused(f"{path}: cannot be looked at: {error.strerror}") from None
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise DriveRefused(f"{path}: not a file or block device")
    if stat.S_ISBLK(mode):
        _check_mounts(path)
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_EXCL if stat.S_ISBLK(mode) else 0)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DriveRefused(f"{path}: in use by another process{describe_users(path)}") from None
        raise DriveRefused(f"{path}: cannot be opened: {error.strerror}") from None
    try:
        yield fd
    finally:
        os.close(fd)


def _check_mounts(path: str) -> None:
    place = mounted_at(path)
    if place is not None:
        raise DriveRefused(f"{path}: mounted at {place}")
    built = holders(path)
    if built:
        raise DriveRefused(f"{path}: in use by {', '.join(built)}")


def _check_unused(path: str, fd: int) -> None:
    if swapped_on(path):
        raise DriveRefused(f"{path}: in use as swap")
    loops = loop_devices(path)
    for loop in loops:
        with contextlib.suppress(OSError):
            place = mounted_at(loop)
            if place is not None:
                raise DriveRefused(f"{path}: mounted at {place} (through {loop})")
    if loops:
        raise DriveRefused(f"{path}: in use by {', '.join(loops)}")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise DriveRefused(
            f"{path}: in use by another process{describe_users(path) or ' (locked)'}"
        ) from None
    who = describe_users(path)
    if who:
        raise DriveRefused(f"{path}: in use by another process{who}")


def _check_writable(path: str, fd: int) -> None:
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        (read_only,) = struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))
    else:
        # For root access(2) passes on a file without write bits; whoever took them away meant it.
        read_only = not status.st_mode & 0o222 or os.fstatvfs(fd).f_flag & os.ST_RDONLY
    if read_only or not os.access(path, os.W_OK):
        raise DriveRefused(f"{path}: read-only")


def check_content(path: str, fd: int, size: int, pool_id: PoolId | None, cluster_id: bytes | None) -> None:
    """The part of check_drive that looks at what is there. Raises DriveRefused, OSError."""
    try:
        found = read_superblock(fd, size).superblock
    except Corrupt as error:
        copies, _ = read_superblocks(fd, size)
        if any(isinstance(copy, Superblock) for copy in copies) or os.pread(fd, 8, 0) == SUPERBLOCK_MAGIC:
            raise DriveRefused(f"{path}: not blank: a damaged csvfs drive ({error})") from None
    else:
        if found.pool_id == pool_id and found.cluster_id == cluster_id:
            raise DriveRefused(f"{path}: already in this pool (drive {found.drive_id.hex()})")
        raise DriveRefused(f"{path}: in a foreign pool ({found.pool_id.hex()})")
    signature = find_signature(fd, size)
    if signature is not None:
        raise DriveRefused(f"{path}: not blank: {signature}")
    if not is_blank(fd, size):
        raise DriveRefused(f"{path}: not blank: unknown data")
