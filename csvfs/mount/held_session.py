"""A FUSE session held by the parent of the mount process, so that it can clear up behind it.

Place      mount floor; used by admin/mount_keeper.py (the parent) and process.py (the mount).
Why        The kernel goes on showing the pages that it has cached to programs that have their files open, though
           the session is over, for ever, and whatever other nodes write meanwhile (I5). Only somebody with a
           descriptor of the session can take them back, and only if he knows of which inodes.
What       the parent opens /dev/fuse and a table in memory, and hands both on. The mount writes every inode into
           the table before the kernel can cache anything of it, and takes it out when nothing is cached.
Limits     INODES_MAX inodes; when there are more, all caches of the machine are dropped instead.
"""

import errno
import logging
import mmap
import os
from pathlib import Path

from csvfs.errors import BadRequest
from csvfs.mount import device
from csvfs.mount import fuse_abi as abi

log = logging.getLogger(__name__)

SESSION_ENVIRONMENT = "CSVFS_MOUNT_SESSION"  # "descriptor of /dev/fuse,descriptor of the table"
INODES_MAX = 1 << 20
# u64 numbers in the table: 1 when it was too small; where the used part ends; then inodes, 0: none
_OVERFLOWED, _END, _FIRST = 0, 1, 2
_TABLE_SIZE = 8 * (_FIRST + INODES_MAX)  # bytes; pages that nobody writes to take no memory
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class InodeTable:
    """The mount's side: which inodes the kernel may cache something of. Two dictionary steps per change."""

    def __init__(self, fd: int) -> None:
        self._numbers = memoryview(mmap.mmap(fd, _TABLE_SIZE)).cast("Q")
        self._slot_of: dict[int, int] = {}
        self._free: list[int] = []
        self._next = _FIRST

    def add(self, ino: int) -> None:
        """Before anything of `ino` is told to the kernel. Twice does no harm."""
        if ino in self._slot_of:
            return
        if self._free:
            slot = self._free.pop()
        elif self._next < len(self._numbers):
            slot, self._next = self._next, self._next + 1
            self._numbers[_END] = self._next
        else:
            self._numbers[_OVERFLOWED] = 1
            return
        self._slot_of[ino] = slot
        self._numbers[slot] = ino

    def remove(self, ino: int) -> None:
        """Nothing of it is cached any more."""
        slot = self._slot_of.pop(ino, None)
        if slot is not None:
            self._numbers[slot] = 0
            self._free.append(slot)


class HeldSession:
    """The parent's side, of one start of a mount process."""

    def __init__(self) -> None:
        """Raises Unavailable: no FUSE here."""
        self._device = device.open_device()
        self._table = os.memfd_create("csvfs-inodes", os.MFD_CLOEXEC)
        os.ftruncate(self._table, _TABLE_SIZE)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """For the mount process to inherit."""
        return (self._device, self._table)

    def environment(self) -> dict[str, str]:
        return {SESSION_ENVIRONMENT: f"{self._device},{self._table}"}

    def drop_pages_and_close(self) -> None:
        """The process is dead and the session ended (its requests too): take back what the kernel has cached.

        Blocks for microseconds per inode; call it in a thread.
        """
        try:
            with mmap.mmap(self._table, _TABLE_SIZE, access=mmap.ACCESS_READ) as table:
                numbers = memoryview(table).cast("Q")
                inodes, overflowed = _inodes_in(numbers), numbers[_OVERFLOWED]
                numbers.release()
            left = [ino for ino in inodes if self._invalidate(ino)]
            left = [ino for ino in left if self._invalidate(ino)]
            if inodes:
                self._tell(abi.pack_inc_epoch())  # names too, where the kernel caches them
            if left or overflowed:
                log.error("%d inodes of a mount that ended keep pages: all caches of this machine are dropped", len(left))
                os.sync()
                DROP_CACHES.write_text("1\n")
        except OSError as error:
            log.error("cached pages of a mount that ended were not all taken back: %s", error)
        finally:
            os.close(self._device)
            os.close(self._table)

    def _invalidate(self, ino: int) -> bool:
        """Whether something of it may be left. Dirty pages cannot be written any more: a first try makes them clean."""
        # ENOENT: the kernel does not know the inode. EPERM: this was never mounted.
        return self._tell(abi.pack_inval_inode(ino, 0, 0)) not in (0, errno.ENOENT, errno.EPERM)

    def _tell(self, message: bytes) -> int:
        """The errno."""
        try:
            os.write(self._device, message)
        except OSError as error:
            return error.errno or errno.EIO
        return 0


def _inodes_in(numbers: memoryview) -> list[int]:
    end = min(numbers[_END], len(numbers))
    return [ino for ino in numbers[_FIRST:end].tolist() if ino]


def inherited_session() -> tuple[int, InodeTable] | None:
    """In the mount process: the descriptor to mount, and the table; None: it has no parent that holds one.

    Raises BadRequest: the environment is not what a parent sets.
    """
    value = os.environ.pop(SESSION_ENVIRONMENT, "")
    if not value:
        return None
    try:
        fuse, table = (int(number) for number in value.split(","))
        os.set_inheritable(fuse, False)
        os.set_inheritable(table, False)
        return fuse, InodeTable(table)
    except (OSError, ValueError) as error:
        raise BadRequest(f"{SESSION_ENVIRONMENT}={value!r} does not name two descriptors: {error}") from None
