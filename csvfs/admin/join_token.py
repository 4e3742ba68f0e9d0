"""A join token: what a new machine needs to find a cluster, to know it for the right one, and to be let in once.

Place      admin floor. Pure: text, bytes, no I/O; randomness is an argument.
Text       `csvfs-join-` and base64url of msgpack [1, [[host, port] of a join desk ...], SHA-256 of the CA's certificate,
           id, secret] and a CRC-32 of it, so that half a token is called that and not a wrong one.
Secret     The store keeps the `verifier` alone, a hash of the secret. The new machine does not send the secret: it
           proves the verifier by an HMAC over all that it asks for, so nothing of a request can be exchanged. Whoever
           reads the store has the verifier, and could use the token: those are the nodes, who can make tokens anyway.
"""

import base64
import binascii
import hashlib
import hmac
import zlib
from dataclasses import dataclass
from typing import Any

from csvfs.errors import BadRequest, ProtocolError
from csvfs.store.etcd_http import Endpoint
from csvfs.store.etcd_place import parse_endpoint
from csvfs.wire.control import pack_value, unpack_value

PREFIX = "csvfs-join-"
VERSION = 1
FINGERPRINT_SIZE = 32  # bytes, as all below
ID_SIZE = 8
SECRET_SIZE = 32
TEXT_LENGTH_MAX = 2048
DESKS_MAX = 8
VALID_S = 3600
VALID_S_MAX = 86_400


@dataclass(slots=True, frozen=True)
class Token:
    """`desks`: where to ask; `fingerprint`: of the CA; `id`: under which the store knows it."""

    desks: tuple[Endpoint, ...]
    fingerprint: bytes
    id: bytes
    secret: bytes


def format_token(token: Token) -> str:
    """What is shown to whoever asked for it, once."""
    desks = [[desk.host, desk.port] for desk in token.desks[:DESKS_MAX]]
    packed = pack_value([VERSION, desks, token.fingerprint, token.id, token.secret])
    packed += zlib.crc32(packed).to_bytes(4, "little")
    return PREFIX + _text(packed)


def parse_token(text: str) -> Token:
    """Raises BadRequest: it is none, or not all of one."""
    text = text.strip()
    if not text.startswith(PREFIX) or len(text) > TEXT_LENGTH_MAX or not text.isascii():
        raise BadRequest(f"that is no join token; `csvfs cluster token` on a node prints one, {PREFIX}...")
    body = text.removeprefix(PREFIX)
    try:
        packed = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        packed = b""
    is_all = len(packed) >= 4 and zlib.crc32(packed[:-4]) == int.from_bytes(packed[-4:], "little")
    if not is_all or _text(packed) != body:  # base64 can write some bytes in two ways
        raise BadRequest("the join token is damaged, or not all of it was copied; copy the whole line")
    try:
        version, *rest = unpack_value(packed[:-4])
        if version != VERSION:
            raise BadRequest(f"a join token of version {version!r:.20}; this csvfs knows version {VERSION}: update it")
        desks, fingerprint, token_id, secret = rest
        return Token(
            _desks(desks),
            _bytes(fingerprint, FINGERPRINT_SIZE),
            _bytes(token_id, ID_SIZE),
            _bytes(secret, SECRET_SIZE),
        )
    except (ProtocolError, TypeError, ValueError):
        raise BadRequest("the join token is none that csvfs makes; make a new one with csvfs cluster token") from None


def verifier_of(secret: bytes) -> bytes:
    """What the store keeps of a token's secret."""
    return hashlib.sha256(b"csvfs join token\0" + secret).digest()


def proof(verifier: bytes, asked: bytes) -> bytes:
    """That whoever asks for `asked` knows the token."""
    return hmac.digest(verifier, b"csvfs join request\0" + asked, "sha256")


def is_proof(given: bytes, verifier: bytes, asked: bytes) -> bool:
    """In a time that says nothing of how much is right."""
    return hmac.compare_digest(given, proof(verifier, asked))


def _text(packed: bytes) -> str:
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def _desks(rows: Any) -> tuple[Endpoint, ...]:
    if not isinstance(rows, list) or not 0 < len(rows) <= DESKS_MAX:
        raise ValueError("desks")
    found = []
    for host, port in rows:
        if not isinstance(host, str) or not isinstance(port, int):
            raise ValueError("desk")
        found.append(parse_endpoint(f"{host}:{port}", "the join token"))
    return tuple(found)


def _bytes(value: Any, size: int) -> bytes:
    if not isinstance(value, bytes) or len(value) != size:
        raise ValueError("bytes")
    return value
