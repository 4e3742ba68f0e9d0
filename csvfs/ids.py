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
METADATA_SLAB_ID_MIN = SlabId(1 << 62)  # slab ids from here on are metadata slabs
