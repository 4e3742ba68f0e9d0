"""Arguments of calls to a coordinator, checked: what passes here fits the database and the rules of
PROTOCOL.md.

Place      coordinator floor; pure. Everything raises BadRequest.
"""

from typing import Any

from csvfs.errors import BadRequest
from csvfs.ids import InodeNo
from csvfs.net.calls import field, optional_field
from csvfs.units import BLOCKS_PER_CHUNK

I64_MAX = (1 << 63) - 1
U32_MAX = (1 << 32) - 1

Args = dict[str, Any]


def number(args: Args, name: str, low: int = 0, high: int = I64_MAX) -> int:
    value = field(args, name, int)
    if not low <= value <= high:
        raise BadRequest(f"argument {name!r} is {value}; it must lie between {low} and {high}")
    return value


def optional_number(args: Args, name: str, low: int = 0, high: int = I64_MAX) -> int | None:
    """None where it is absent or nil."""
    return None if args.get(name) is None else number(args, name, low, high)


def number_or_zero(args: Args, name: str) -> int:
    return optional_number(args, name) or 0


def inode(args: Args, name: str = "ino") -> InodeNo:
    return InodeNo(number(args, name, 1))


def time_ns(args: Args, name: str) -> int | None:
    """Nanoseconds since the epoch, also before it; None where it is absent or nil."""
    return optional_number(args, name, -I64_MAX)


def flag(args: Args, name: str) -> bool:
    return bool(optional_field(args, name, bool))


def chunk_numbers(value: Any, slab_blocks: int) -> set[int]:
    """Numbers of chunks within a slab. Raises BadRequest."""
    chunk_count = slab_blocks // BLOCKS_PER_CHUNK
    if not isinstance(value, list) or len(value) > chunk_count:
        raise BadRequest("chunks must be a list of numbers, each once")
    if not all(isinstance(chunk, int) and 0 <= chunk < chunk_count for chunk in value):
        raise BadRequest(f"chunks must lie between 0 and {chunk_count - 1}")
    return set(value)


def rows(args: Args, name: str, width: int, count_max: int) -> list[list[Any]]:
    """A list of lists of `width` whole numbers."""
    value = field(args, name, list)
    if len(value) > count_max:
        raise BadRequest(f"argument {name!r} has {len(value)} rows, may have {count_max}")
    for row in value:
        if not isinstance(row, list) or len(row) != width:
            raise BadRequest(f"argument {name!r} must be lists of {width}")
        for item in row:
            if item is not None and (not isinstance(item, int) or not -I64_MAX <= item <= I64_MAX):
                raise BadRequest(f"argument {name!r} holds {item!r}, not a whole number")
    return value
