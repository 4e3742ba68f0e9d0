"""What a drive lies on, a file or a block device: its size, its space, its machine.

Place      block floor, lowest. Blocks for as long as the file system takes. OSError passes through.
"""

import ctypes
import errno
import os
import stat
from pathlib import Path

_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL)
_ZEROS = bytes(1 << 20)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """False: not supported here. Raises OSError on anything else that fails."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number == errno.EINTR:
            continue
        if number in _UNSUPPORTED:
            return False
        raise OSError(number, os.strerror(number))
    return True


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Make a range read as zeros and give its space back. False: not supported, nothing changed."""
    return _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def write_zeros(fd: int, offset: int, length: int) -> None:
    """Make a range read as zeros with its space reserved, by the fastest way. Raises OSError."""
    if _fallocate(fd, _ZERO_RANGE | _KEEP_SIZE, offset, length):
        return
    end = offset + length
    while offset < end:
        offset += os.pwrite(fd, memoryview(_ZEROS)[: end - offset], offset)


def write_all(fd: int, data: bytes, offset: int) -> None:
    """pwrite until all is written. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def medium_size(fd: int) -> int:
    """Bytes of a file or block device."""
    return os.lseek(fd, 0, os.SEEK_END)


def is_regular_file(fd: int) -> bool:
    return stat.S_ISREG(os.fstat(fd).st_mode)


def machine_boot_id() -> bytes:
    """16 bytes, another one after every boot of this machine: a page cache does not outlive it."""
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))


def disk_sequence(fd: int) -> int:
    """The kernel's number of this appearance of a block device: another one after a replug. Files: 0."""
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return 0
    node = Path(f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}").resolve()
    for place in (node, node.parent):  # a partition has that of its disk
        try:
            return int((place / "diskseq").read_text())
        except (OSError, ValueError):
            continue
    return 0
