"""Making a drive of a blank file or block device (FORMAT.md).

Place      block floor, above eligibility.py. Blocks while the metadata are zeroed.
Order      check, lock, check the content again; erase; tables; flush; superblock last: a format that was cut
           short leaves no drive.
"""

import fcntl
import os
import stat
import time

from csvfs.block.blankness import find_data
from csvfs.block.eligibility import check_content, check_drive
from csvfs.block.in_use import open_locked
from csvfs.block.layout import TAIL_SIZE, Layout, layout_of
from csvfs.block.medium import is_regular_file, medium_size, punch_hole, write_zeros
from csvfs.block.signatures import find_signature
from csvfs.block.slot_table import format_slot_table
from csvfs.block.superblock import Superblock, pack_superblock, read_superblock, write_superblock
from csvfs.errors import BadRequest, Corrupt, DriveFailed, DriveRefused
from csvfs.ids import DriveId, NodeName, PoolId
from csvfs.units import SLAB_SIZE_DEFAULT, format_size


def format_drive(
    path: str,
    *,
    drive_id: DriveId,
    pool_id: PoolId,
    cluster_id: bytes,
    node: NodeName,
    slab_size: int = SLAB_SIZE_DEFAULT,
    label: str = "",
    must_be_empty: bool = False,
) -> Superblock:
    """Make `path` an empty, cleanly closed drive.

    Args    drive_id, pool_id, cluster_id: 16 bytes each. slab_size: bytes. label: for people, at most 64
            bytes. must_be_empty: refuse data anywhere that blankness.py looks, not only at the beginning.
    Raises  DriveRefused: see check_drive; nothing was written. BadRequest: odd ids, texts or slab size;
            nothing was written. DriveFailed: I/O error, or no room for the metadata; the path is no drive,
            and may not be blank.
    """
    for name, value in (("drive id", drive_id), ("pool id", pool_id), ("cluster id", cluster_id)):
        if len(value) != 16:
            raise BadRequest(f"{name} of {len(value)} bytes; it has 16")
    check_drive(path, pool_id=pool_id, cluster_id=cluster_id, slab_size=slab_size)
    try:
        exclusive = os.O_EXCL if stat.S_ISBLK(os.stat(path).st_mode) else 0
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | exclusive)
    except OSError as error:
        raise DriveRefused(f"{path}: cannot be opened for writing: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        check_content(path, fd, medium_size(fd), pool_id, cluster_id)  # another format may have been quicker
        if must_be_empty and (offset := find_data(fd, medium_size(fd))) is not None:
            raise DriveRefused(f"{path}: not blank: data near byte {offset}")
        return _make_drive(path, fd, drive_id, pool_id, cluster_id, node, slab_size, label)
    except BlockingIOError:
        raise DriveRefused(f"{path}: in use by another process") from None
    finally:
        os.close(fd)


def reformat_drive(
    path: str,
    *,
    old_id: DriveId,
    drive_id: DriveId,
    pool_id: PoolId,
    cluster_id: bytes,
    node: NodeName,
    slab_size: int = SLAB_SIZE_DEFAULT,
    label: str = "",
) -> Superblock:
    """Make a drive of this pool that nothing needs any more an empty one, with another id. What it held is
    gone.

    Mounts may still have it open for reading: what they find there does not verify as what they look for.
    Args    as format_drive. old_id: of the drive that is meant.
    Raises  DriveRefused: the path holds something else, or is in use; nothing was written. DriveFailed.
    """
    fd = open_locked(path)
    try:
        size = medium_size(fd)
        _check_ours(path, fd, size, old_id, pool_id)
        return _make_drive(path, fd, drive_id, pool_id, cluster_id, node, slab_size, label)
    finally:
        os.close(fd)


def _check_ours(path: str, fd: int, size: int, old_id: DriveId, pool_id: PoolId) -> None:
    """That the path holds that drive, or the ruins of one, or nothing. Raises DriveRefused."""
    try:
        found = read_superblock(fd, size).superblock
    except Corrupt:
        signature = find_signature(fd, size)
        if signature is not None:
            raise DriveRefused(f"{path}: not the drive that was there: {signature}") from None
        return
    if found.pool_id != pool_id:
        raise DriveRefused(f"{path}: in a foreign pool ({found.pool_id.hex()})")
    if found.drive_id != old_id:
        raise DriveRefused(f"{path}: holds drive {found.drive_id.hex()[:8]}, not {old_id.hex()[:8]}")


def _make_drive(
    path: str,
    fd: int,
    drive_id: DriveId,
    pool_id: PoolId,
    cluster_id: bytes,
    node: NodeName,
    slab_size: int,
    label: str,
) -> Superblock:
    layout = layout_of(medium_size(fd), slab_size)
    superblock = Superblock(
        sequence=1,
        drive_id=drive_id,
        pool_id=pool_id,
        cluster_id=cluster_id,
        size=layout.size,
        slab_size=slab_size,
        node=node,
        label=label,
        created_ns=time.time_ns(),
    )
    pack_superblock(superblock, 0)  # BadRequest for what does not fit, before anything is written
    try:
        _erase(fd, layout)
        format_slot_table(fd, layout, drive_id)
        os.fsync(fd)
        write_superblock(fd, superblock)
        os.fsync(fd)
    except OSError as error:
        need = format_size(layout.data_offset)
        raise DriveFailed(f"{path}: cannot be formatted ({need} of metadata): {error.strerror}") from None
    return superblock


def _erase(fd: int, layout: Layout) -> None:
    """Head, tables, metadata and tail become zeros with space reserved, the rest holes if possible."""
    data_end = layout.size - TAIL_SIZE
    if is_regular_file(fd):
        os.ftruncate(fd, max(layout.size, medium_size(fd)))
    punch_hole(fd, layout.data_offset, data_end - layout.data_offset)
    # Reserved, too: a store into the mapped metadata must never find the file system full.
    write_zeros(fd, 0, layout.data_offset)
    write_zeros(fd, data_end, TAIL_SIZE)
