"""Notifications to the kernel: take back what it may have cached.

Place      mount floor; used by the recall of leases.
Why two    attributes and names are taken back at once and never block. Pages may have to wait for page locks
           that are held until a READ or WRITE of ours is answered: that wait belongs in a worker thread.
"""

import errno
import logging
import os

import trio

from csvfs.mount import fuse_abi as abi

log = logging.getLogger(__name__)

# As many invalidations may wait for page locks at a time; more wait for a thread.
INVALIDATE_THREADS_MAX = 16
PASSES_MAX = 64  # of many inodes at once
_NOT_KNOWN = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_UNMOUNTED = (errno.ENODEV, errno.ENOTCONN)  # all is gone


class KernelNotifier:
    """Writes notifications to one FUSE device. Inodes that the kernel does not know are ignored."""

    def __init__(self, device_fd: int) -> None:
        # Our own descriptor: a thread that still waits in write(2) must not see the number used for another
        # file.
        self._fd = os.dup(device_fd)
        self._has_epoch = self._has_prune = True
        self._threads = trio.CapacityLimiter(INVALIDATE_THREADS_MAX)
        self._passes = trio.CapacityLimiter(PASSES_MAX)

    def invalidate_attr(self, ino: int) -> bool:
        """Forget the attributes of `ino`. Does not block: an offset below 0 leaves its pages alone. False: the kernel
        does not know the inode."""
        return self._write(abi.pack_inval_inode(ino, -1, 0))

    async def invalidate_pages(self, ino: int, offset: int, length: int) -> None:
        """Write back and drop cached pages from `offset` (bytes) on; length 0: to the end. Forgets attributes
        too.

        Waits for READs and WRITEs in flight on these pages, so those must go on being answered meanwhile.
        Cancel   leaves the invalidation to finish in its thread.
        """
        message = abi.pack_inval_inode(ino, offset, length)
        await trio.to_thread.run_sync(self._write, message, abandon_on_cancel=True, limiter=self._threads)

    async def invalidate_all(self, ranges: list[tuple[int, int, int]]) -> None:
        """As invalidate_pages, of many inodes (ino, offset, length), one after the other in one thread: some 3 us each.
        Of pages that nobody has locked, or that are not dirty; offset below 0: attributes alone. Cancel: as there.
        """
        messages = [abi.pack_inval_inode(*pages) for pages in ranges]

        def write_all() -> None:
            for message in messages:
                self._write(message)

        await trio.to_thread.run_sync(write_all, abandon_on_cancel=True, limiter=self._passes)

    async def prune(self, inos: list[int]) -> None:
        """Have the kernel forget these inodes, but those in use: some 10 us each. Before Linux 6.18 it does not know how.

        In a thread, for an inode that goes waits for its pages as in invalidate_pages. Cancel: as there.
        """
        if self._has_prune:
            message = abi.pack_prune(inos)
            await trio.to_thread.run_sync(self._prune, message, abandon_on_cancel=True, limiter=self._threads)

    def _prune(self, message: bytes) -> None:
        try:
            os.write(self._fd, message)
        except OSError as error:
            if error.errno not in (*_NOT_KNOWN, *_UNMOUNTED):
                raise
            if error.errno in _NOT_KNOWN and self._has_prune:
                self._has_prune = False
                log.info("this kernel cannot be asked to forget inodes (%s): it keeps what its memory has room for", error.strerror)

    def increment_epoch(self) -> None:
        """Have every cached name looked up again before its next use. Takes no lock, does not block.

        Before protocol 7.44 the kernel does not know it, and refuses in one way or another; no names are cached
        then (relay.py), so there is nothing to take back.
        """
        if not self._has_epoch:
            return
        try:
            os.write(self._fd, abi.pack_inc_epoch())
        except OSError as error:
            if error.errno in _UNMOUNTED:
                return
            if error.errno not in _NOT_KNOWN:
                raise  # names may be cached that had to go
            self._has_epoch = False
            log.info("this kernel has no epoch of names (%s): they are not cached", error.strerror)

    def _write(self, message: bytes) -> bool:
        """False: the kernel does not know the inode, so there is nothing to take back, yet (recall.py, "Not heard")."""
        try:
            os.write(self._fd, message)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            if error.errno not in _UNMOUNTED:
                raise
        return True

    def close(self) -> None:
        os.close(self._fd)
