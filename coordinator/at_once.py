"""Asking several nodes, or members of a slab, the same thing at once: a takeover does not take longer with more of them.

Place      coordinator floor, below all that asks drive servers.
"""

from collections.abc import Awaitable, Callable, Hashable, Iterable
from typing import TypeVar

import trio

from csvfs.errors import CsvfsError, Fenced

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


async def ask_each(keys: Iterable[K], ask: Callable[[K], Awaitable[T]]) -> tuple[dict[K, T], dict[K, CsvfsError]]:
    """Ask all of them; what they answered, and what went wrong, each in the order of `keys`, when the last has answered.

    Raises  Fenced: one of them said so.
    """
    wanted = list(keys)
    answers: dict[K, T] = {}
    errors: dict[K, CsvfsError] = {}

    async def ask_one(key: K) -> None:
        try:
            answers[key] = await ask(key)
        except CsvfsError as error:
            errors[key] = error

    async with trio.open_nursery() as nursery:
        for key in wanted:
            nursery.start_soon(ask_one, key)
    for error in errors.values():
        if isinstance(error, Fenced):
            raise error
    return {key: answers[key] for key in wanted if key in answers}, {key: errors[key] for key in wanted if key in errors}


async def ask_all(keys: Iterable[K], ask: Callable[[K], Awaitable[T]]) -> dict[K, T]:
    """As `ask_each`; raises the first error, Fenced before others."""
    answers, errors = await ask_each(keys, ask)
    for error in errors.values():
        raise error
    return answers
