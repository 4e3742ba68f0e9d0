"""What a new machine and the join desk say to each other.

Place      admin floor. Sans-IO: values to bytes and back. The desk's side is join_desk.py, the other join_client.py.
Wire       TLS; a message is its size (u32, little-endian) and a msgpack map. One question and one answer per connection:
             {ask: "ca"}                    the CA's certificate, which the asker compares with its token's fingerprint
             {ask: "join", ...}             JoinRequest -> JoinAnswer
             {ask: "standing", node, serial}   -> {evicted: when, or 0}
           An answer with `error` is a refusal: [kind, message] as in wire/control.py.
Limits     MESSAGE_SIZE_MAX. Every field is checked before it is used; what is wrong raises ProtocolError.
"""

import struct
from dataclasses import dataclass
from typing import Any

from csvfs.admin import join_token
from csvfs.errors import ProtocolError
from csvfs.wire.control import pack_value, unpack_value

SIZE = struct.Struct("<I")
MESSAGE_SIZE_MAX = 64 * 1024  # bytes; a join's answer has 4,000
TEXT_SIZE_MAX = 16 * 1024  # of one certificate or key
LIST_LENGTH_MAX = 1024

ASK_CA, ASK_JOIN, ASK_STANDING = "ca", "join", "standing"


@dataclass(slots=True, frozen=True)
class JoinRequest:
    """`csr`: DER. `mac`: the proof of the token, over all the rest."""

    token: bytes
    csr: bytes
    node: str
    address: str
    port_base: int
    is_witness: bool
    mac: bytes = b""

    def asked(self) -> bytes:
        """What the proof covers."""
        return pack_value([self.token, self.csr, self.node, self.address, self.port_base, self.is_witness])

    def to_map(self) -> dict[str, Any]:
        return {
            "ask": ASK_JOIN, "token": self.token, "csr": self.csr, "node": self.node, "address": self.address,
            "port_base": self.port_base, "witness": self.is_witness, "mac": self.mac,
        }  # fmt: skip

    @classmethod
    def of(cls, value: dict[str, Any]) -> "JoinRequest":
        port_base, is_witness = value.get("port_base"), value.get("witness")
        if not isinstance(port_base, int) or isinstance(port_base, bool) or not isinstance(is_witness, bool):
            raise ProtocolError("a join request without port_base or witness")
        return cls(
            data_of(value, "token", join_token.ID_SIZE),
            data_of(value, "csr", TEXT_SIZE_MAX),
            text_of(value, "node", 64),
            text_of(value, "address", 64),
            port_base,
            is_witness,
            data_of(value, "mac", 64),
        )


@dataclass(slots=True, frozen=True)
class JoinAnswer:
    """What a node needs to be one. Certificates and key as PEM.

    `endpoints`: of the store's members, host:port. `peers`: name and peer URL of every member, the new one's included;
    empty: it gets none. `ca_key`: empty for those without a member, and for witnesses. `revoked`: serial numbers.
    """

    cluster: str
    certificate: str
    ca: str
    ca_key: str
    endpoints: tuple[str, ...]
    peers: tuple[tuple[str, str], ...]
    member_token: str  # of etcd's cluster
    revoked: tuple[int, ...]

    def to_map(self) -> dict[str, Any]:
        return {
            "cluster": self.cluster, "certificate": self.certificate, "ca": self.ca, "ca_key": self.ca_key,
            "endpoints": list(self.endpoints), "peers": [list(peer) for peer in self.peers],
            "member_token": self.member_token, "revoked": [f"{serial:x}" for serial in self.revoked],
        }  # fmt: skip

    @classmethod
    def of(cls, value: dict[str, Any]) -> "JoinAnswer":
        peers = []
        for row in list_of(value, "peers"):
            if not isinstance(row, list) or len(row) != 2 or not all(isinstance(text, str) for text in row):
                raise ProtocolError("the join desk names a member of the store that is none")
            peers.append((row[0], row[1]))
        try:
            revoked = tuple(int(text, 16) for text in list_of(value, "revoked"))
        except (TypeError, ValueError):
            raise ProtocolError("the join desk names a serial number that is none") from None
        endpoints = list_of(value, "endpoints")
        if not endpoints or not all(isinstance(text, str) for text in endpoints):
            raise ProtocolError("the join desk names no members of the store")
        cluster, certificate, ca, ca_key, member_token = (
            text_of(value, name, TEXT_SIZE_MAX) for name in ("cluster", "certificate", "ca", "ca_key", "member_token")
        )
        return cls(cluster, certificate, ca, ca_key, tuple(endpoints), tuple(peers), member_token, revoked)


def pack_message(value: dict[str, Any]) -> bytes:
    """Raises ProtocolError: it is larger than a reader takes."""
    packed = pack_value(value)
    message_size(SIZE.pack(len(packed)))
    return SIZE.pack(len(packed)) + packed


def message_size(head: bytes) -> int:
    """Of the message that follows these SIZE.size bytes. Raises ProtocolError."""
    (size,) = SIZE.unpack(head)
    if not 0 < size <= MESSAGE_SIZE_MAX:
        raise ProtocolError(f"a message of {size} bytes; at most {MESSAGE_SIZE_MAX} are taken")
    return int(size)


def unpack_message(packed: bytes) -> dict[str, Any]:
    """Raises ProtocolError: it is no map with text as names."""
    value = unpack_value(packed)
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ProtocolError("a message that is no map")
    return value


def text_of(value: dict[str, Any], name: str, length_max: int) -> str:
    found = value.get(name)
    if not isinstance(found, str) or len(found) > length_max:
        raise ProtocolError(f"a message without {name}")
    return found


def data_of(value: dict[str, Any], name: str, size_max: int) -> bytes:
    found = value.get(name)
    if not isinstance(found, bytes) or len(found) > size_max:
        raise ProtocolError(f"a message without {name}")
    return found


def list_of(value: dict[str, Any], name: str) -> list[Any]:
    found = value.get(name)
    if not isinstance(found, list) or len(found) > LIST_LENGTH_MAX:
        raise ProtocolError(f"a message without {name}")
    return found
