"""Control messages: calls, replies and errors as msgpack (PROTOCOL.md, "Kinds").

Place      wire floor. Sans-IO.
"""

from typing import Any

import msgpack

from csvfs.errors import CsvfsError, ProtocolError, error_kinds, wire_kind

_LIMITS = {"max_str_len": 1 << 20, "max_bin_len": 1 << 20, "max_array_len": 1 << 18, "max_map_len": 1 << 16}


def pack_value(value: Any) -> bytes:
    return msgpack.packb(value, use_bin_type=True)


def unpack_value(head: memoryview | bytes) -> Any:
    """Raises ProtocolError on anything but one whole msgpack value within limits."""
    try:
        return msgpack.unpackb(head, raw=False, strict_map_key=False, **_LIMITS)
    except Exception as error:  # msgpack raises a dozen kinds, all of which mean the same here
        raise ProtocolError(f"not a control message: {error}") from None


def pack_call(name: str, args: dict[str, Any]) -> bytes:
    return pack_value([name, args])


def unpack_call(head: memoryview | bytes) -> tuple[str, dict[str, Any]]:
    value = unpack_value(head)
    if not (isinstance(value, list) and len(value) == 2):
        raise ProtocolError("a call is a name and a map of arguments")
    name, args = value
    if not (isinstance(name, str) and isinstance(args, dict)):
        raise ProtocolError("a call is a name and a map of arguments")
    return name, args


def pack_error(error: CsvfsError) -> bytes:
    return pack_value([wire_kind(error), str(error), {}])


def unpack_error(head: memoryview | bytes) -> CsvfsError:
    """The error the peer raised, of the same kind; an unknown kind becomes CsvfsError."""
    value = unpack_value(head)
    if not (isinstance(value, list) and len(value) == 3 and isinstance(value[0], str)):
        raise ProtocolError("an error is a kind, a message and a map")
    return error_kinds().get(value[0], CsvfsError)(str(value[1]))
