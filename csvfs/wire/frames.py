"""Frames: the outermost shape of everything on a link (PROTOCOL.md, "Frame").

Place      wire floor. Sans-IO: bytes in, values out.
Rule       nothing of a frame is used before its sizes, version and checksum hold. Payload bytes are vouched
           for by the block checksums in the head, which block/ verifies before it uses them.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from crc32c import crc32c

from csvfs.errors import ProtocolError
from csvfs.units import IO_SIZE_MAX, MIB

FRAME_MAGIC = 0xC5F5
FRAME_VERSION = 1
_FIRST = struct.Struct("<HBBIIQ")  # magic, version, kind, head_size, payload_size, request_id
_SUM = struct.Struct("<I")
FRAME_HEADER_SIZE = 24
assert _FIRST.size + _SUM.size == FRAME_HEADER_SIZE  # PROTOCOL.md, "Frame"

HEAD_SIZE_MAX = MIB
PAYLOAD_SIZE_MAX = IO_SIZE_MAX
FRAME_SIZE_MAX = FRAME_HEADER_SIZE + HEAD_SIZE_MAX + PAYLOAD_SIZE_MAX
ACCEPTING_SIDE_BIT = 1 << 63  # request ids of the accepting side


class Kind(IntEnum):
    REPLY = 1
    ERROR = 2
    CALL = 3
    WRITE = 16
    WRITTEN = 17
    READ = 18
    READ_DATA = 19
    HEAL = 20
    FLUSH = 21


KINDS = frozenset(int(kind) for kind in Kind)


@dataclass(slots=True, frozen=True)
class Frame:
    """One whole frame. `head` and `payload` are views into the receive buffer: copy what must outlive it."""

    kind: int
    request_id: int
    head: memoryview
    payload: memoryview


def pack_frame(kind: int, request_id: int, head: bytes, payload_size: int = 0) -> bytes:
    """Header and head of a frame; the caller sends `payload_size` bytes right behind."""
    first = _FIRST.pack(FRAME_MAGIC, FRAME_VERSION, kind, len(head), payload_size, request_id)
    return b"".join((first, _SUM.pack(crc32c(head, crc32c(first))), head))


def frame_size(buffer: memoryview) -> int:
    """Size in bytes of the frame that starts at `buffer[0]`; 0: the header is not whole yet.

    Raises ProtocolError when the header cannot be one of ours; the stream is lost.
    """
    if len(buffer) < FRAME_HEADER_SIZE:
        return 0
    magic, version, kind, head_size, payload_size, _ = _FIRST.unpack_from(buffer)
    if magic != FRAME_MAGIC or version != FRAME_VERSION:
        raise ProtocolError(f"not a v{FRAME_VERSION} frame: magic {magic:#06x}, version {version}")
    if kind not in KINDS:
        raise ProtocolError(f"frame of unknown kind {kind}")
    if head_size > HEAD_SIZE_MAX or payload_size > PAYLOAD_SIZE_MAX:
        raise ProtocolError(f"frame of kind {kind} too large: head {head_size} B, payload {payload_size} B")
    return int(FRAME_HEADER_SIZE + head_size + payload_size)


def parse_frame(buffer: memoryview) -> Frame:
    """The frame that fills `buffer` exactly (see frame_size). Raises ProtocolError on a wrong checksum."""
    _, _, kind, head_size, _, request_id = _FIRST.unpack_from(buffer)
    head_end = FRAME_HEADER_SIZE + head_size
    head = buffer[FRAME_HEADER_SIZE:head_end]
    (checksum,) = _SUM.unpack_from(buffer, 20)
    if crc32c(head, crc32c(buffer[:20])) != checksum:
        raise ProtocolError(f"frame of kind {kind}: checksum of its head does not match")
    return Frame(kind, request_id, head, buffer[head_end:])
