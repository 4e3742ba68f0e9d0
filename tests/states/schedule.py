"""Schedule: the product's own coroutines, run step by step as the explorer says, without trio's loop.

Place      state checker, under the worlds.
How        A coroutine runs until it awaits an `Ask`; the world decides when, and with what, it goes on. The modules
           under test see `SteppedTrio` in place of trio: a sleep or a lock is an Ask like any other.
Left out   Time: sleeping is a step that may happen at any moment. Tasks of one nursery run one after the other.
"""

import dataclasses
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType
from typing import Any
from unittest.mock import patch

import trio

import coordinator.at_once
import coordinator.drive_control
import coordinator.eviction
import coordinator.slab_book
import coordinator.slab_changes
import coordinator.takeover
import csvfs.block.bus
import csvfs.block.bus_media
import csvfs.block.bus_writes
from csvfs.errors import CsvfsError
from csvfs.wire.block_messages import Member, SlabDescriptor

_STEPPED = (
    coordinator.at_once, coordinator.drive_control, coordinator.eviction, coordinator.slab_book, coordinator.slab_changes,
    coordinator.takeover, csvfs.block.bus, csvfs.block.bus_media,
    csvfs.block.bus_writes,
)  # fmt: skip


class Ask:
    """What a coroutine waits for. `what`: in words. `data`: for the world. `ready`: whether it may go on."""

    def __init__(
        self, what: str, data: Any = None, ready: Callable[[], bool] = lambda: True
    ) -> None:
        self.what = what
        self.data = data
        self.ready = ready

    def __await__(self) -> Generator["Ask", Any, Any]:
        return (yield self)


class Task:
    """One coroutine. `owner`: the process that it dies with. `done(result, error)`: called at its end."""

    def __init__(
        self,
        name: str,
        owner: str,
        coroutine: Coroutine[Any, Any, Any],
        done: Callable[[Any, CsvfsError | None], None] = lambda result, error: None,
    ) -> None:
        self.name = name
        self.owner = owner
        self._coroutine = coroutine
        self._done = done
        self.ask: Ask | None = None
        self.ended = False
        self._advance(lambda: coroutine.send(None))

    def answer(self, value: Any = None) -> None:
        self._advance(lambda: self._coroutine.send(value))

    def fail(self, error: CsvfsError) -> None:
        self._advance(lambda: self._coroutine.throw(error))

    def kill(self) -> None:
        """Its process has ended: it does nothing more, and nobody is told."""
        self.ended, self.ask = True, None
        self._coroutine.close()  # its `finally` blocks run; they touch nothing but objects that died with it

    def _advance(self, go: Callable[[], Any]) -> None:
        self.ask = None
        try:
            self.ask = go()
        except StopIteration as stop:
            self.ended = True
            self._done(stop.value, None)
        except CsvfsError as error:
            self.ended = True
            self._done(None, error)

    def fingerprint(self) -> Hashable:
        """Where it stands: every frame of its await chain, with what its variables hold."""
        frames: list[Hashable] = []
        awaited: Any = self._coroutine
        while awaited is not None:
            frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
            if frame is None:
                break
            if frame.f_code is not Ask.__await__.__code__:
                values = tuple((name, freeze(value)) for name, value in sorted(frame.f_locals.items()))
                frames.append((_code_name(frame.f_code), frame.f_lasti, values))
            awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
        what = self.ask.what if self.ask is not None else ""
        return self.name, self.owner, what, tuple(frames)


def _code_name(code: CodeType) -> str:
    return f"{code.co_qualname}:{code.co_firstlineno}"


_PLAIN = frozenset((bool, int, str, bytes, SlabDescriptor, Member))


def freeze(value: Any) -> Hashable:
    """A value by its content: numbers, names and containers of them. Services are all alike; times do not count."""
    if value is None or type(value) in _PLAIN:
        return value  # type: ignore[no-any-return]
    if isinstance(value, float):
        return "time"
    if isinstance(value, tuple | list):
        return tuple(freeze(item) for item in value)
    if isinstance(value, Mapping):
        return tuple(sorted(((repr(freeze(k)), freeze(v)) for k, v in value.items()), key=lambda row: row[0]))
    if isinstance(value, set | frozenset):
        return tuple(sorted(repr(freeze(item)) for item in value))
    if isinstance(value, BaseException):
        return type(value).__name__
    if isinstance(value, FunctionType):
        cells = tuple(freeze(cell.cell_contents) for cell in value.__closure__ or ())
        return _code_name(value.__code__), cells
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, tuple(freeze(getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, Lock):
        return value.held
    return type(value).__name__


class Lock:
    """Of trio.Lock: what the product uses."""

    def __init__(self) -> None:
        self.held = False

    async def __aenter__(self) -> None:
        if self.held:
            await Ask("gets its turn", ready=lambda: not self.held)
        self.held = True

    async def __aexit__(self, *exc: object) -> None:
        self.held = False


class _Nursery:
    """Runs what was started when it ends, one after the other."""

    def __init__(self) -> None:
        self._started: list[Callable[[], Awaitable[Any]]] = []

    def start_soon(self, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        self._started.append(lambda: function(*args))

    async def __aenter__(self) -> "_Nursery":
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        for start in self._started if kind is None else ():
            await start()


class _Patience:
    """Of a wait with a deadline, which never comes: the owner under test answers, or the caller is gone."""

    cancelled_caught = False

    def __enter__(self) -> "_Patience":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class SteppedTrio:
    """In place of the module trio."""

    Lock = Lock
    Event = trio.Event

    @staticmethod
    def open_nursery() -> _Nursery:
        return _Nursery()

    @staticmethod
    async def sleep(seconds: float) -> None:
        await Ask("tries again")

    @staticmethod
    def move_on_after(seconds: float) -> _Patience:
        return _Patience()

    @staticmethod
    def current_time() -> float:
        return 0.0


@contextmanager
def stepped() -> Iterator[None]:
    """The modules under test are run by the explorer."""
    with ExitStack() as stack:
        for module in _STEPPED:
            stack.enter_context(patch.object(module, "trio", SteppedTrio))
        yield
