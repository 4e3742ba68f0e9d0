"""Names of things, as types. Ground floor."""

from typing import NewType

NodeName = NewType("NodeName", str)
DriveId = NewType("DriveId", bytes)  # 16 random bytes
VolumeId = NewType("VolumeId", bytes)  # 16 random bytes
PoolId = NewType("PoolId", bytes)  # 16 random bytes
SlabId = NewType("SlabId", int)  # u64; unique within its volume, never used again
InodeNo = NewType("InodeNo", int)
Epoch = NewType("Epoch", int)  # u32, from 1
Term = NewType("Term", int)
Incarnation = NewType("Incarnation", int)

ROOT_INODE = InodeNo(1)
ID_SIZE = 16
METADATA_SLAB_ID_MIN = SlabId(1 << 62)  # slab ids from here on are metadata slabs


def id_bytes(value: object) -> bytes:
    """A DriveId, VolumeId ... that somebody sent. Raises ValueError on anything else: bytes(number) would make as
    many zeros."""
    if not isinstance(value, bytes) or len(value) != ID_SIZE:
        raise ValueError(f"{value!r:.80} is no id of {ID_SIZE} bytes")
    return value
