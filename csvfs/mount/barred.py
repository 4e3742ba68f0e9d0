"""Barred: open files whose locks were given to somebody else while this mount was cut off. They can only be closed.

Place      mount floor; filled by file_table.py, asked by channel.py for every request that comes through an open file.
Why        A lock is a promise: who holds one on a virtual machine's image writes to it, and may not when another node has
           taken it meanwhile and runs that machine. Its node was evicted, and its mount goes on for the programs; so
           what a program holds open on such an inode answers ESTALE until it is closed. Who opens it anew has it anew.
Handles    are numbers that grow (relay.py): those of before are smaller than `first_new`. The next process of this mount
           bars all that is open on the inode then, as a row says no more (inode_rows.py).
Mappings   Write-back of mapped pages does not say through which open file they were dirtied. It is refused as long as a
           barred one is open.
"""

import errno
import logging
from typing import Protocol

from csvfs.mount import fuse_abi as abi

log = logging.getLogger(__name__)

# Requests that begin with the handle of an open file.
_BY_HANDLE = frozenset((abi.READ, abi.WRITE, abi.FALLOCATE, abi.FSYNC, abi.LSEEK, abi.GETLK, abi.SETLK, abi.SETLKW))
_SETATTR_WITH_HANDLE = 1 << 6  # FATTR_FH
_SETATTR_HANDLE_OFFSET = 8
ERRNO = errno.ESTALE


class Kept(Protocol):
    """See inode_rows.InodeRows."""

    def barred(self, ino: int, is_barred: bool) -> None: ...


class Barred:
    """`opens`: inode -> how many of its open files are barred. Empty nearly always, which costs a look per request."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._first_new = 0
        self.opens: dict[int, int] = {}

    def bar(self, ino: int, opens: int, first_new: int) -> None:
        """The `opens` open files of the inode, all with handles below `first_new`."""
        if not opens:
            return
        self._first_new = first_new
        self.opens[ino] = opens
        self._kept.barred(ino, True)
        log.error(
            "inode %d is open %d times with locks that passed on while this node was cut off: these answer ESTALE",
            ino, opens,
        )  # fmt: skip

    def refuses(self, opcode: int, ino: int, body: memoryview) -> bool:
        """Whether the request, without its header, must not be carried out."""
        if opcode == abi.COPY_FILE_RANGE and len(body) >= abi.COPY_FILE_RANGE_IN.size:
            source, _, target, into, _, _, _ = abi.COPY_FILE_RANGE_IN.unpack_from(body)
            return (ino in self.opens and source < self._first_new) or (target in self.opens and into < self._first_new)
        if ino not in self.opens:
            return False
        if opcode == abi.WRITE and len(body) >= abi.WRITE_IN.size:
            handle, _, _, write_flags, _, _, _ = abi.WRITE_IN.unpack_from(body)
            return bool(handle < self._first_new or write_flags & abi.WRITE_CACHE)
        if opcode == abi.SETATTR and len(body) >= _SETATTR_HANDLE_OFFSET + 8:
            has_handle = abi.U32.unpack_from(body)[0] & _SETATTR_WITH_HANDLE
            return bool(has_handle and abi.NODEID.unpack_from(body, _SETATTR_HANDLE_OFFSET)[0] < self._first_new)
        return opcode in _BY_HANDLE and len(body) >= 8 and abi.NODEID.unpack_from(body)[0] < self._first_new

    def released(self, ino: int, handle: int) -> None:
        """An open file was closed for the last time."""
        left = self.opens.get(ino)
        if left is None or handle >= self._first_new:
            return
        if left > 1:
            self.opens[ino] = left - 1
        else:
            del self.opens[ino]
            self._kept.barred(ino, False)
