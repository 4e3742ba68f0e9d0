"""Calls served by name: the accepting side of CALL frames.

Place      net floor. A handler is a plain function (answered at once) or a coroutine function (run as a task).
Errors     A CsvfsError of a handler travels to the caller. Missing or wrongly typed arguments are BadRequest.
           Anything else is a bug: it is logged with its traceback and the caller gets a CsvfsError.
"""

import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import trio

from csvfs.errors import BadRequest, CsvfsError, Unavailable
from csvfs.net.link import Link
from csvfs.wire.control import unpack_call
from csvfs.wire.frames import Frame, Kind

log = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class Then:
    """A handler's value, and what to do as soon as it has been sent, or could not be. Of coroutine functions only."""

    value: Any
    after: Callable[[], None]


Handler = Callable[[Link, dict[str, Any]], Any | Awaitable[Any]]
TASKS_MAX = 4_096  # calls of all links being worked on; more are refused with Unavailable

T = TypeVar("T")


def field(args: dict[str, Any], name: str, kind: type[T]) -> T:
    """The argument `name`, which must be a `kind`. Raises BadRequest."""
    value = args.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise BadRequest(f"argument {name!r} must be {kind.__name__}, got {type(value).__name__}")
    return value


def optional_field(args: dict[str, Any], name: str, kind: type[T]) -> T | None:
    """Like field, but None where the argument is absent or nil."""
    return None if args.get(name) is None else field(args, name, kind)


class CallTable:
    """Names to handlers. Tasks run in the nursery given at `handle`."""

    def __init__(self, handlers: dict[str, Handler]) -> None:
        self._handlers = {
            name: (function, inspect.iscoroutinefunction(function)) for name, function in handlers.items()
        }
        self._running = 0

    def handle(self, link: Link, frame: Frame, nursery: trio.Nursery) -> None:
        """Serve one CALL frame. Raises ProtocolError (from the wire) when it is none."""
        if frame.kind != Kind.CALL:
            link.reply_error(frame.request_id, BadRequest(f"frames of kind {frame.kind} are not served here"))
            return
        name, args = unpack_call(frame.head)
        handler, is_async = self._handlers.get(name, (None, False))
        if handler is None:
            link.reply_error(frame.request_id, BadRequest(f"call {name!r} is not served here"))
        elif is_async:
            if self._running >= TASKS_MAX:
                link.reply_error(
                    frame.request_id, Unavailable(f"{self._running} calls are under way; try again")
                )
                return
            self._running += 1
            nursery.start_soon(self._run, handler, link, frame.request_id, name, args)
        else:
            try:
                link.reply(frame.request_id, handler(link, args))
            except CsvfsError as error:
                link.reply_error(frame.request_id, error)
            except Exception:
                self._report_bug(link, frame.request_id, name)

    async def _run(
        self, handler: Handler, link: Link, request_id: int, name: str, args: dict[str, Any]
    ) -> None:
        try:
            value = await handler(link, args)
            if isinstance(value, Then):
                link.reply(request_id, value.value)
                value.after()
            else:
                link.reply(request_id, value)
        except CsvfsError as error:
            link.reply_error(request_id, error)
        except Exception:
            self._report_bug(link, request_id, name)
        finally:
            self._running -= 1

    def _report_bug(self, link: Link, request_id: int, name: str) -> None:
        log.exception("call %r of %s failed in a way nobody planned for", name, link.peer)
        link.reply_error(
            request_id, CsvfsError(f"call {name!r} failed; the log of the serving process says how")
        )
