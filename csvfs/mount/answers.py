"""How a part of the channel answers the kernel. Declarations only.

Place      mount floor, below channel.py and its parts.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

Buffer = bytes | bytearray | memoryview
Handler = Callable[[int, int, memoryview], None]  # unique, node, body of the request


class Start(Protocol):
    def __call__(self, unique: int, function: Callable[..., Awaitable[None]], /, *args: object) -> None: ...


@dataclass(slots=True, frozen=True)
class Answers:
    """See the channel's methods of these names."""

    reply: Callable[[int, tuple[Buffer, ...]], None]  # unique, the reply's parts
    errno: Callable[[int, int], None]  # unique, errno; 0: done
    failure: Callable[[int, BaseException], None]  # unique, what went wrong
    start: Start  # function(unique, *args) answers in a task of its own
    then_ok: Callable[..., Awaitable[None]]  # for `start`: unique, function, *args; once that has returned: done
    forward: Callable[[int, int, int, memoryview], None]  # opcode, unique, node, body: to pyfuse3
