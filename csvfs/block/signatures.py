"""Signatures by which we see that a file or device already holds something: one table.

Place      block floor, lowest. Only reads.
Source     the formats' own headers; offsets are those that blkid(8) looks at.
"""

import os
from dataclasses import dataclass

from csvfs.units import KIB, MIB


@dataclass(slots=True, frozen=True)
class Signature:
    """`magic` at `offset` from the start; a negative one is from the end, rounded down to `align`."""

    name: str
    offset: int
    magic: bytes
    align: int = 1


# What stands first is named first: a file system with an MBR-like boot sector is named as a file system.
SIGNATURES = (
    Signature("file system ext4", 1080, b"\x53\xef"),  # ext2 and ext3 too
    Signature("file system xfs", 0, b"XFSB"),
    Signature("file system btrfs", 64 * KIB + 64, b"_BHRfS_M"),
    Signature("file system ntfs", 3, b"NTFS    "),
    Signature("file system exfat", 3, b"EXFAT   "),
    Signature("file system vfat", 82, b"FAT32   "),
    Signature("file system vfat", 54, b"FAT16   "),
    Signature("file system vfat", 54, b"FAT12   "),
    Signature("file system swap", 4096 - 10, b"SWAPSPACE2"),
    Signature("file system swap", 4096 - 10, b"SWAP-SPACE"),
    Signature("file system swap", 16384 - 10, b"SWAPSPACE2"),
    Signature("file system swap", 65536 - 10, b"SWAPSPACE2"),
    Signature("file system iso9660", 32 * KIB + 1, b"CD001"),
    Signature("file system udf", 32 * KIB + 1, b"BEA01"),
    Signature("file system f2fs", 1024, b"\x10\x20\xf5\xf2"),
    Signature("file system erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    Signature("file system squashfs", 0, b"hsqs"),
    Signature("file system reiserfs", 64 * KIB + 52, b"ReIsEr"),
    Signature("file system jfs", 32 * KIB, b"JFS1"),
    Signature("file system nilfs2", 1030, b"\x34\x34"),
    Signature("file system gfs2", 64 * KIB, b"\x01\x16\x19\x70"),
    Signature("file system ocfs2", 8 * KIB, b"OCFSV2"),
    Signature("file system hfs+", 1024, b"H+\0\x04"),
    Signature("file system apfs", 32, b"NXSB"),
    Signature("file system bcachefs", 4096 + 24, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef")),
    Signature("file system vmfs", MIB, b"\x0d\xd0\x01\xc0"),
    Signature("LUKS encryption", 0, b"LUKS\xba\xbe"),
    Signature("LUKS encryption", 16 * KIB, b"SKUL\xba\xbe"),
    Signature("BitLocker encryption", 3, b"-FVE-FS-"),
    Signature("LVM2 physical volume", 536, b"LVM2 001"),
    Signature("LVM2 physical volume", 24, b"LVM2 001"),
    Signature("LVM2 physical volume", 1048, b"LVM2 001"),
    Signature("LVM2 physical volume", 1560, b"LVM2 001"),
    Signature("md RAID member", 0, b"\xfc\x4e\x2b\xa9"),  # version 1.1
    Signature("md RAID member", 4 * KIB, b"\xfc\x4e\x2b\xa9"),  # version 1.2
    Signature("md RAID member", -8 * KIB, b"\xfc\x4e\x2b\xa9", 4 * KIB),  # version 1.0
    Signature("md RAID member", -64 * KIB, b"\xfc\x4e\x2b\xa9", 64 * KIB),  # version 0.90
    Signature("Intel RAID member", -1024, b"Intel Raid ISM Cfg Sig. ", 512),
    Signature("DDF RAID member", -512, b"\xde\x11\xde\x11", 512),
    Signature("bcache device", 4096 + 24, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")),
    Signature("ceph bluestore", 0, b"bluestore block device"),
    Signature("DRBD metadata", -4 * KIB + 60, b"\x83\x74\x02\x6b", 4 * KIB),
    Signature("DRBD metadata", -4 * KIB + 60, b"\x83\x74\x02\x6d", 4 * KIB),
    Signature("disk image qcow2", 0, b"QFI\xfb"),
    Signature("disk image vhdx", 0, b"vhdxfile"),
    Signature("disk image vhd", 0, b"conectix"),
    Signature("disk image vhd", -512, b"conectix"),
    Signature("disk image vmdk", 0, b"KDMV"),
    Signature("partition table GPT", 512, b"EFI PART"),
    Signature("partition table GPT", 4 * KIB, b"EFI PART"),
    Signature("partition table GPT", -512, b"EFI PART", 512),
    Signature("partition table GPT", -4 * KIB, b"EFI PART", 4 * KIB),
    Signature("partition table MBR", 510, b"\x55\xaa"),
)

# ZFS writes its label into four places of 256 KiB, and 128 uberblocks of 1 KiB or more into the second half
# of each.
_ZFS_MAGICS = (b"\x0c\xb1\xba\x00\0\0\0\0", b"\0\0\0\0\x00\xba\xb1\x0c")
_ZFS_LABEL = 256 * KIB
BLANK_SIZE = MIB  # a drive whose first MiB is not all zeros holds something, known or not


def _at(fd: int, offset: int, length: int, size: int, align: int = 1) -> bytes:
    if offset < 0:
        offset += size - size % align
    return os.pread(fd, length, offset) if 0 <= offset < size else b""


def _is_zfs(fd: int, size: int) -> bool:
    for label in (
        0,
        _ZFS_LABEL,
        size - size % _ZFS_LABEL - 2 * _ZFS_LABEL,
        size - size % _ZFS_LABEL - _ZFS_LABEL,
    ):
        if label >= 0:
            ring = _at(fd, label + _ZFS_LABEL // 2, _ZFS_LABEL // 2, size)
            if any(ring[start : start + 8] in _ZFS_MAGICS for start in range(0, len(ring), KIB)):
                return True
    return False


def find_signature(fd: int, size: int) -> str | None:
    """The name of what is on a file or device of `size` bytes; None: nothing we know. Raises OSError."""
    for signature in SIGNATURES:
        if _at(fd, signature.offset, len(signature.magic), size, signature.align) == signature.magic:
            return signature.name
    return "file system zfs" if _is_zfs(fd, size) else None


def is_blank(fd: int, size: int) -> bool:
    """Whether the first MiB is all zeros. Raises OSError."""
    return not os.pread(fd, min(size, BLANK_SIZE), 0).strip(b"\0")
