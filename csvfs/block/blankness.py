"""Whether a file or device holds anything at all: asked before one is claimed without a human having named it.

Place      block floor, lowest. Only reads; blocks. OSError passes through.
Proof      A file is blank when all its allocated extents read as zeros: nothing is left unread. Of a block device
           that would take hours, so its first and last ENDS_SIZE and SAMPLES places between them are read. A disk
           that was in use and of which only the beginning was wiped is found by that; one with a few blocks of data
           somewhere in the middle is not, and that is why csvfs claims by itself only what the node's configuration
           names.
"""

import errno
import os
import stat
from collections.abc import Iterator

from csvfs.units import GIB, KIB, MIB

ENDS_SIZE = 16 * MIB
SAMPLES = 256  # of a hard disk about 3 s
SAMPLE_SIZE = 4 * KIB
ALLOCATED_MAX = 1 * GIB  # of a file: what has more is no blank file, whatever it holds
_PIECE = MIB


def find_data(fd: int, size: int) -> int | None:
    """Where the first byte was found that is not zero (an offset near it); None: blank, as said above.

    A file with more than ALLOCATED_MAX of allocated extents counts as holding data at the first of them.
    """
    if stat.S_ISREG(os.fstat(fd).st_mode):
        extents = list(_extents(fd, size))
        if sum(length for _, length in extents) > ALLOCATED_MAX:
            return extents[0][0]
        return _first_data(fd, extents)
    return _first_data(fd, _samples(size))


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is allocated; all of the file where its file system does not say."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno != errno.EINVAL:
                raise
            start, end = end, size
        yield start, min(end, size) - start


def _samples(size: int) -> Iterator[tuple[int, int]]:
    yield 0, min(ENDS_SIZE, size)
    middle = size - 2 * ENDS_SIZE
    if middle > 0:
        for number in range(SAMPLES):
            offset = ENDS_SIZE + middle * number // SAMPLES
            yield offset - offset % SAMPLE_SIZE, SAMPLE_SIZE
    tail = max(ENDS_SIZE, size - ENDS_SIZE)
    if tail < size:
        yield tail, size - tail


def _first_data(fd: int, ranges: Iterator[tuple[int, int]] | list[tuple[int, int]]) -> int | None:
    for offset, length in ranges:
        end = offset + length
        while offset < end:
            piece = os.pread(fd, min(_PIECE, end - offset), offset)
            if not piece:
                break
            if piece.strip(b"\0"):
                return offset
            offset += len(piece)
    return None
