"""Why a drive cannot be used, as one word each: what a drive server reports, and others decide upon.

Place      block floor, lowest. Constants, and what an errno or an error of opening a drive means.
Words      travel in `status` and in the cluster store key `servers/<node>`; admin/drive_state.py says them
           in the words that administrators know.
"""

import errno

from csvfs.errors import CsvfsError

MISSING = "missing"  # no file or device at its path
DELETED = "deleted"  # its file was deleted while it was open
IN_USE = "in use"  # by another process
READ_ONLY = "read-only"
FULL = "full"  # the file system that its file lies on
TRUNCATED = "truncated"
OVERWRITTEN = "overwritten"  # somebody else wrote to it while it was open
DAMAGED = "damaged"  # no superblock is readable
FOREIGN = "foreign"  # of another pool or cluster
SWAPPED = "swapped"  # another drive of this pool lies at its path
IO_ERROR = "io error"
HANGS = "hangs"  # it does not answer, nor give an error
NOT_OPENED = "not opened"  # the drive server has just started

FAULTS = frozenset(
    (MISSING, DELETED, IN_USE, READ_ONLY, FULL, TRUNCATED, OVERWRITTEN, DAMAGED, FOREIGN, SWAPPED, IO_ERROR, HANGS,
     NOT_OPENED)
)  # fmt: skip

_OF_ERRNO = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EROFS: READ_ONLY,
    errno.EPERM: READ_ONLY,  # an immutable file
    errno.EACCES: READ_ONLY,
    errno.ENOENT: MISSING,
    errno.ENXIO: MISSING,
    errno.ENODEV: MISSING,
    errno.EBUSY: IN_USE,
    errno.EAGAIN: IN_USE,
}


def fault_of_errno(number: int | None) -> str:
    """What a failed call of the operating system on a drive's descriptor means."""
    return _OF_ERRNO.get(number or 0, IO_ERROR)


def fault_of(error: BaseException) -> str:
    """What an error of opening a drive means: what it says itself, or an errno."""
    if isinstance(error, CsvfsError):
        return error.fault or IO_ERROR
    return fault_of_errno(error.errno) if isinstance(error, OSError) else IO_ERROR


def faulty(error: CsvfsError, fault: str) -> CsvfsError:
    """The error, saying which fault of a drive it is."""
    error.fault = fault
    return error
