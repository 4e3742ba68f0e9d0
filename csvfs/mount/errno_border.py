"""The errno border: the only place where an error of csvfs becomes an answer to a system call.

Place      mount floor, under channel.py and operations.py.
Rule       a CsvfsError is answered with its errno; anything else is a bug of ours: logged with its traceback,
           answered with EIO, and the session goes on. Fenced is no answer: this process ends, and whoever goes on for
           it is asked anew by the kernel, or the end of the session answers.
"""

import contextlib
import errno
import functools
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, ParamSpec, TypeVar

import pyfuse3
import trio

from csvfs.errors import Conflict, CsvfsError, Fenced, NotFound

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)


def errno_of(error: BaseException) -> int:
    """The positive errno that an application sees for `error`; never raises."""
    if isinstance(error, CsvfsError):
        # EIO means damage or a broken drive: worth a line. The others are answers.
        if error.posix_errno == errno.EIO:
            log.error("answered EIO: %s", error)
        elif isinstance(error, Conflict):  # between processes of ours; no program should hear of one
            log.error("answered EBUSY: %s", error)
        return error.posix_errno
    if isinstance(error, pyfuse3.FUSEError):
        return error.errno
    log.error("bug: unexpected %s, answered EIO", type(error).__name__, exc_info=error)
    return errno.EIO


def fuse_errors(handler: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Wrap a pyfuse3 handler: pyfuse3 takes FUSEError only, anything else would end its session."""

    @functools.wraps(handler)
    async def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Fenced:
            await trio.sleep_forever()
            raise
        except Exception as error:
            raise pyfuse3.FUSEError(errno_of(error)) from error

    return guarded


@contextlib.contextmanager
def stale_when_gone() -> Iterator[None]:
    """Around what is asked about an inode by its number: NotFound becomes ESTALE, on which the kernel looks the name up
    again. It had the number from a name that has been given to another file since (a rename); ENOENT would tell the
    program that the name is not there, which was never so."""
    try:
        yield
    except NotFound as error:
        raise pyfuse3.FUSEError(errno.ESTALE) from error
