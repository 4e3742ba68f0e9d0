"""The one error tree: what went wrong, its errno, whether to try again, and what the human does next.

Place      ground floor. No I/O.
Rule       only mount/errno_border.py turns these into FUSE replies; only wire/control.py puts them on a wire.
"""

import errno
from typing import ClassVar


class CsvfsError(Exception):
    """Base of all errors that csvfs raises on purpose.

    A message names the thing, the numbers and the next step, in one line.
    `fault`: of a drive that cannot be used, a word of block/drive_faults.py (does not go over a wire).
    """

    posix_errno: ClassVar[int] = errno.EIO
    retryable: ClassVar[bool] = False
    fault: str = ""


class BadRequest(CsvfsError):
    """The caller asked for something that can never work: wrong size, unknown option, bad name."""

    posix_errno = errno.EINVAL


class NotFound(CsvfsError):
    """The named thing does not exist."""

    posix_errno = errno.ENOENT


class Exists(CsvfsError):
    """The named thing exists already."""

    posix_errno = errno.EEXIST


class NotADirectory(CsvfsError):
    posix_errno = errno.ENOTDIR


class IsADirectory(CsvfsError):
    posix_errno = errno.EISDIR


class NotEmpty(CsvfsError):
    """A directory, or a volume, that still holds something."""

    posix_errno = errno.ENOTEMPTY


class NameTooLong(CsvfsError):
    posix_errno = errno.ENAMETOOLONG


class TooManyLinks(CsvfsError):
    posix_errno = errno.EMLINK


class FileTooBig(CsvfsError):
    posix_errno = errno.EFBIG


class NotPermitted(CsvfsError):
    posix_errno = errno.EPERM


class AccessDenied(CsvfsError):
    posix_errno = errno.EACCES


class NoAttribute(CsvfsError):
    """The extended attribute does not exist."""

    posix_errno = errno.ENODATA


class ResultTooLarge(CsvfsError):
    """An extended attribute exceeds the caller's buffer or our limit."""

    posix_errno = errno.ERANGE


class NotSupported(CsvfsError):
    posix_errno = errno.ENOTSUP


class TooManyLocks(CsvfsError):
    """A file, or a volume, has as many file locks or waits for them as there may be."""

    posix_errno = errno.ENOLCK


class Deadlock(CsvfsError):
    """Whoever holds the file lock waits for one that the caller holds."""

    posix_errno = errno.EDEADLK


class NoSpace(CsvfsError):
    """Pool, drive or volume has no room left."""

    posix_errno = errno.ENOSPC


class QuotaExceeded(CsvfsError):
    """The quota of a directory's tree has no room left."""

    posix_errno = errno.EDQUOT


class CrossesQuota(CsvfsError):
    """A name, or a directory, would come into the tree of another quota; programs copy instead."""

    posix_errno = errno.EXDEV


class Conflict(CsvfsError):
    """A compare-and-swap lost, or a thing is in the wrong state for the request."""

    posix_errno = errno.EBUSY


class Unavailable(CsvfsError):
    """Nobody can serve this now; trying again later may work."""

    posix_errno = errno.EAGAIN
    retryable = True


class LastCopy(Unavailable):
    """Doing this would drop the last in-sync copy of a slab (I1); wait until one of its drives is back."""


class NotCoordinator(Unavailable):
    """This host does not coordinate the volume (any more); find its owner in the cluster store."""


class LeaseLost(Unavailable):
    """This node may not serve any more: its lease in the cluster store has run out."""


class StaleEpoch(CsvfsError):
    """The slab has moved on to another epoch; fetch its descriptor and send again."""

    posix_errno = errno.ESTALE
    retryable = True


class Fenced(CsvfsError):
    """This incarnation was evicted; nothing it sends is taken any more."""

    posix_errno = errno.ESTALE


class Corrupt(CsvfsError):
    """No copy matched its checksum, or a structure on a drive is damaged.

    `bad_blocks`: of a read of a slab, the numbers of the blocks that do not verify (does not go over a wire).
    """

    bad_blocks: tuple[int, ...] = ()


class InputOutputError(CsvfsError):
    """Reading or writing did not succeed within the volume's io_timeout: EIO, as of a broken disk."""


class Lost(CsvfsError):
    """All in-sync copies of a slab were on drives that have lost them: waiting would not help."""


class UnflushedLost(CsvfsError):
    """All copies in sync may have lost what was written and not flushed: their machines lost power.

    `opens`: of a drive that refuses to go on without a word, how often it has been opened (does not go over a wire).
    """

    opens: int = 0


class DriveFailed(CsvfsError):
    """The drive gave an I/O error."""


class DriveRefused(CsvfsError):
    """The drive may not be used; the message says why by name. Nothing was written."""

    posix_errno = errno.EBUSY


class ProtocolError(CsvfsError):
    """The peer sent bytes that are not of the protocol; its connection is closed."""

    posix_errno = errno.EPROTO


class Disconnected(Unavailable):
    """The connection broke before an answer came."""


class TimedOut(Unavailable):
    """No answer within the deadline."""

    posix_errno = errno.ETIMEDOUT


def error_kinds() -> dict[str, type[CsvfsError]]:
    """All kinds of this module by class name: what travels on a wire as the kind of an error."""
    kinds: dict[str, type[CsvfsError]] = {}
    waiting: list[type[CsvfsError]] = [CsvfsError]
    while waiting:
        kind = waiting.pop()
        if kind.__module__ == __name__:  # others are a room's own affair, and travel as the kind above them
            kinds[kind.__name__] = kind
        waiting.extend(kind.__subclasses__())
    return kinds


def wire_kind(error: CsvfsError) -> str:
    """The name under which `error` travels: its class, or the nearest above it that is of this module."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == __name__)


def leaves(group: BaseException) -> list[BaseException]:
    """The errors of a group of groups."""
    if not isinstance(group, BaseExceptionGroup):
        return [group]
    return [leaf for member in group.exceptions for leaf in leaves(member)]
