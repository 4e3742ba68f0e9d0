"""Heads of the hot messages to drive servers, and the block checksum (PROTOCOL.md, "Kinds").

Place      wire floor. Sans-IO.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from crc32c import crc32c

from csvfs.errors import ProtocolError
from csvfs.ids import DriveId, Epoch, NodeName, SlabId, VolumeId, id_bytes
from csvfs.units import BLOCK_SIZE

BLOCK_HEAD = struct.Struct("<QQQIIIHH")  # slab, sequence, completed_below, epoch, block, count, drive, flags
assert BLOCK_HEAD.size == 40  # PROTOCOL.md
BLOCK_COUNT_MAX = 256  # 1 MiB
FLUSH_HEAD = struct.Struct("<Q")  # completed_below; rows follow
FLUSH_ROW = struct.Struct("<HIQ")  # drive index, epoch, slab
FLUSH_ROWS_MAX = 1_024
FLUSH_REFUSED = struct.Struct("<HB")  # in the answer: number of a row, why
FLUSH_LATER_EPOCH = 1  # the copy is at a later epoch
FLUSH_NOT_SERVED = 2  # the copy is not in service, not there, or at an earlier epoch
_CHECKSUMS = [struct.Struct(f"<{count}I") for count in range(BLOCK_COUNT_MAX + 1)]
_SLAB = struct.Struct("<Q")
NEVER_WRITTEN = 0
READ_COMPRESSED = 1  # flag of a READ: its answer's payload may be an lz4 frame, if that is shorter
ZERO_BLOCK = bytes(BLOCK_SIZE)

EPOCH_UNKNOWN = Epoch(0)

FlushRow = tuple[int, Epoch, SlabId]  # drive index, epoch, slab

ROLE_ABSENT = 0
ROLE_IN_SYNC = 1
ROLE_JOINING = 2


def slab_seed(volume: VolumeId, slab: SlabId) -> int:
    """Where the checksums of a slab's blocks start from, so that a misplaced block does not verify."""
    return int(crc32c(volume + _SLAB.pack(slab)))


def block_checksum(data: memoryview | bytes | bytearray, seed: int, block: int) -> int:
    """Checksum of one block of 4,096 bytes: never 0, which means never written."""
    return crc32c(data, seed ^ block) or 1


def block_checksums(data: memoryview, seed: int, block: int) -> list[int]:
    """Checksums of consecutive blocks that start at block number `block` of their slab."""
    if len(data) == BLOCK_SIZE:
        return [crc32c(data, seed ^ block) or 1]
    return [
        crc32c(data[offset : offset + BLOCK_SIZE], seed ^ (block + index)) or 1
        for index, offset in enumerate(range(0, len(data), BLOCK_SIZE))
    ]


def pack_checksums(checksums: list[int]) -> bytes:
    return _CHECKSUMS[len(checksums)].pack(*checksums)


def unpack_checksums(packed: memoryview | bytes, count: int) -> tuple[int, ...]:
    """Raises ProtocolError when `packed` does not hold exactly `count` checksums."""
    if not 0 < count <= BLOCK_COUNT_MAX or len(packed) != 4 * count:
        raise ProtocolError(f"{len(packed)} bytes of checksums for {count} blocks")
    return _CHECKSUMS[count].unpack(packed)


def pack_flush(completed_below: int, rows: Iterable[FlushRow]) -> bytes:
    """Head of a FLUSH."""
    return FLUSH_HEAD.pack(completed_below) + b"".join(FLUSH_ROW.pack(*row) for row in rows)


def unpack_flush_rows(packed: memoryview | bytes) -> list[FlushRow]:
    """Raises ProtocolError unless there are 1 to FLUSH_ROWS_MAX whole rows."""
    count, rest = divmod(len(packed), FLUSH_ROW.size)
    if rest or not 0 < count <= FLUSH_ROWS_MAX:
        raise ProtocolError(f"{len(packed)} bytes of rows in a FLUSH")
    return [(index, Epoch(epoch), SlabId(slab)) for index, epoch, slab in FLUSH_ROW.iter_unpack(packed)]


def pack_flush_refused(refused: Iterable[tuple[int, int]]) -> bytes:
    """Head of the answer to a FLUSH."""
    return b"".join(FLUSH_REFUSED.pack(number, why) for number, why in refused)


def unpack_flush_refused(packed: memoryview | bytes, row_count: int) -> dict[int, int]:
    """Why, by the number of the row. Raises ProtocolError on anything else."""
    if len(packed) % FLUSH_REFUSED.size:
        raise ProtocolError(f"{len(packed)} bytes of refused rows in the answer to a FLUSH")
    refused = dict(FLUSH_REFUSED.iter_unpack(packed))
    if any(number >= row_count or why not in (FLUSH_LATER_EPOCH, FLUSH_NOT_SERVED) for number, why in refused.items()):
        raise ProtocolError(f"the answer to a FLUSH of {row_count} rows refuses others")
    return refused


@dataclass(slots=True, frozen=True)
class Member:
    """One drive's part in a slab. `since`: for those not in sync, the epoch that took them out (0: unknown)."""

    drive: DriveId
    node: NodeName
    role: int
    since: Epoch = EPOCH_UNKNOWN


@dataclass(slots=True, frozen=True)
class SlabDescriptor:
    """Who holds a slab, as of `epoch`. A larger epoch replaces a smaller one wherever it is seen.

    lost_epoch   the last epoch that began with a copy that may lack what was written before it and not flushed (0: none)
    """

    slab: SlabId
    epoch: Epoch
    members: tuple[Member, ...]
    lost_epoch: Epoch = EPOCH_UNKNOWN

    @property
    def in_sync(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role == ROLE_IN_SYNC)

    @property
    def writable(self) -> tuple[Member, ...]:
        """The members that every write goes to: in sync and joining."""
        return tuple(member for member in self.members if member.role != ROLE_ABSENT)

    def to_wire(self) -> list:
        value = [self.slab, self.epoch, [[m.drive, m.node, m.role, m.since] for m in self.members]]
        return [*value, self.lost_epoch] if self.lost_epoch else value

    @staticmethod
    def from_wire(value: object) -> "SlabDescriptor":
        """Raises ProtocolError on anything but a descriptor (PROTOCOL.md, "Slab descriptor")."""
        try:
            slab, epoch, rows, *rest = cast(Iterable[Any], value)
            (lost_epoch,) = rest or (EPOCH_UNKNOWN,)
            members = tuple(
                Member(DriveId(id_bytes(drive)), NodeName(str(node)), int(role), Epoch(int(since)))
                for drive, node, role, since in rows
            )
            descriptor = SlabDescriptor(SlabId(int(slab)), Epoch(int(epoch)), members, Epoch(int(lost_epoch)))
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"not a slab descriptor: {error}") from None
        roles_known = all(member.role in (ROLE_ABSENT, ROLE_IN_SYNC, ROLE_JOINING) for member in members)
        if not roles_known or descriptor.slab < 0 or not 0 <= descriptor.lost_epoch <= descriptor.epoch:
            raise ProtocolError(f"slab descriptor of slab {slab} has numbers out of range")
        return descriptor
