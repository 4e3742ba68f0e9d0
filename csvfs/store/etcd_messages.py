"""etcd's v3 API as JSON: requests as Python values, answers as items and changes. No I/O.

Place      store floor, below etcd_client.py.
Names      Our keys lie under `csvfs/` in etcd; what csvfs needs for itself there, under `csvfs-tokens/`. Keys
           and values travel in base64, numbers as text, and what is zero or empty is left out.
"""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from csvfs.errors import CsvfsError, ProtocolError
from csvfs.store.interface import Change, Compare, Delete, Item, Put

ROOT = b"csvfs/"
TOKEN_ROOT = b"csvfs-tokens/"

# gRPC's codes, as far as they decide anything here.
CODE_NOT_FOUND = 5
CODE_RESOURCE_EXHAUSTED = 8
CODE_OUT_OF_RANGE = 11
_CODES_OF_THE_REQUEST = frozenset({3, CODE_NOT_FOUND, 9, CODE_OUT_OF_RANGE})
_NOT_HERE = "rpc not supported for learner"  # code 14 in this version, 9 in others


class Refused(CsvfsError):
    """etcd understood the request and did not do it. `code`: gRPC's."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def is_of_the_request(self) -> bool:
        """Another member would say the same."""
        return self.code in _CODES_OF_THE_REQUEST and _NOT_HERE not in str(self)


@dataclass(slots=True, frozen=True)
class Header:
    """Who answered. `revision`: of the store; `term`: of the election that the member knows of."""

    member: int
    revision: int
    term: int


# Requests


def range_request(key: bytes, *, end: bytes = b"", limit: int = 0, revision: int = 0) -> dict[str, Any]:
    """Of one key, or of all from `key` up to `end`. revision 0: as of now, which asks a majority."""
    body: dict[str, Any] = {"key": _text(key)}
    if end:
        body |= {"range_end": _text(end), "limit": str(limit), "revision": str(revision)}
    return body


def prefix_end(prefix: bytes) -> bytes:
    """The first key behind all that start with `prefix`, which is not empty and of UTF-8."""
    return prefix[:-1] + bytes((prefix[-1] + 1,))  # a byte of UTF-8 is never 255


def compare_request(key: bytes, revision: int) -> dict[str, Any]:
    return {"key": _text(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}


def put_request(key: bytes, value: bytes, lease: int = 0) -> dict[str, Any]:
    return {"request_put": {"key": _text(key), "value": _text(value), "lease": str(lease)}}


def transaction_request(
    compares: list[Compare], changes: list[Put | Delete]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a transaction compares and what it does, each in etcd's words."""
    compared = [compare_request(full_key(compare.key), compare.revision) for compare in compares]
    done = []
    for change in changes:
        if isinstance(change, Put):
            done.append(put_request(full_key(change.key), change.value, change.lease))
        else:
            done.append({"request_delete_range": {"key": _text(full_key(change.key))}})
    return compared, done


def watch_request(prefix: bytes, start_revision: int) -> dict[str, Any]:
    create = {
        "key": _text(prefix),
        "range_end": _text(prefix_end(prefix)),
        "start_revision": str(start_revision),
        "fragment": True,  # or one message would hold all that a watch missed
    }
    return {"create_request": create}


def full_key(key: str) -> bytes:
    return ROOT + key.encode()


# Answers. All raise ProtocolError when the answer is not of etcd's making.


def parse_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolError(f"etcd answered {text[:80]!r}, which is not JSON") from None
    if not isinstance(value, dict):
        raise ProtocolError(f"etcd answered {text[:80]!r}, which is not a JSON object")
    return value


def refusal(status: int, body: bytes) -> Refused:
    """The error that an answer with a status other than 200 carries."""
    try:
        value = parse_object(body)
    except ProtocolError:
        return Refused(0, f"HTTP status {status}: {body[:80]!r}")
    return stream_refusal(value.get("error"), value) or Refused(0, f"HTTP status {status}")


def stream_refusal(error: Any, whole: dict[str, Any] | None = None) -> Refused | None:
    """The error of an answer: text with its code beside it, or in a stream an object with both."""
    if isinstance(error, dict):
        code, message = error.get("grpc_code", error.get("code")), error.get("message")
    else:
        code, message = (whole or {}).get("code"), error
    if not message:
        return None
    return Refused(code if isinstance(code, int) else 0, str(message)[:200])


def header_of(answer: dict[str, Any]) -> Header:
    header = answer.get("header")
    if not isinstance(header, dict):
        raise ProtocolError("etcd's answer has no header")
    return Header(number(header, "member_id"), number(header, "revision"), number(header, "raft_term"))


def number(values: dict[str, Any], name: str) -> int:
    try:
        return int(values.get(name, 0))
    except (ValueError, TypeError):
        raise ProtocolError(f"etcd's {name} is {values.get(name)!r:.40}, which is no number") from None


def objects(values: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The list of objects under `name`; none: an empty one."""
    found = values.get(name, [])
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ProtocolError(f"etcd's {name} is no list of objects")
    return found


def parse_item(row: dict[str, Any]) -> Item:
    return Item(_key(row), _bytes(row, "value"), number(row, "mod_revision"), number(row, "lease"))


def parse_change(event: dict[str, Any]) -> Change:
    row = event.get("kv")
    if not isinstance(row, dict):
        raise ProtocolError("etcd tells of a change without a key")
    if event.get("type") == "DELETE":
        return Change(_key(row), None, number(row, "mod_revision"))
    item = parse_item(row)
    return Change(item.key, item, item.revision)


def raw_value(row: dict[str, Any]) -> bytes:
    return _bytes(row, "value")


def _key(row: dict[str, Any]) -> str:
    key = _bytes(row, "key")
    if not key.startswith(ROOT):
        raise ProtocolError(f"etcd tells of the key {key[:80]!r}, which was not asked for")
    try:
        return key[len(ROOT) :].decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"etcd's key {key[:80]!r} is not UTF-8; remove it with etcdctl") from None


def _bytes(row: dict[str, Any], name: str) -> bytes:
    try:
        return base64.b64decode(row.get(name, ""), validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise ProtocolError(f"etcd's {name} is not base64") from None


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()
