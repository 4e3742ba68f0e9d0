"""Small drive files for tests: 64 MiB with slabs of 4 MiB, sparse."""

import os
from pathlib import Path

from csvfs.block.drive import Drive
from csvfs.block.formatting import format_drive
from csvfs.block.slab_copy import SlabCopy
from csvfs.block.superblock import Superblock
from csvfs.ids import DriveId, Epoch, NodeName, PoolId, SlabId, Term, VolumeId
from csvfs.units import BLOCK_SIZE, MIB
from csvfs.wire.block_messages import ROLE_IN_SYNC, block_checksums, pack_checksums

POOL = PoolId(b"P" * 16)
CLUSTER = b"C" * 16
DRIVE = DriveId(b"D" * 16)
VOLUME = VolumeId(b"V" * 16)
SLAB_SIZE = 4 * MIB
DRIVE_SIZE = 64 * MIB


def blank_file(path: Path, size: int = DRIVE_SIZE) -> str:
    with open(path, "wb") as file:
        file.truncate(size)
    return str(path)


def make_drive(path: Path, size: int = DRIVE_SIZE) -> tuple[str, Superblock]:
    superblock = format_drive(
        blank_file(path, size),
        drive_id=DRIVE,
        pool_id=POOL,
        cluster_id=CLUSTER,
        node=NodeName("n1"),
        slab_size=SLAB_SIZE,
        label="test drive",
    )
    return str(path), superblock


def make_slab(drive: Drive, slab: int = 1, epoch: int = 1) -> SlabCopy:
    return drive.create_slab(VOLUME, SlabId(slab), Epoch(epoch), ROLE_IN_SYNC, Term(1))


def pattern(number: int, count: int = 1) -> bytes:
    """Blocks of recognizable content, another one for every number."""
    return b"".join((f"{number}.{index} ".encode() * 1024)[:BLOCK_SIZE] for index in range(count))


def write(copy: SlabCopy, block: int, data: bytes) -> None:
    copy.write_blocks(block, memoryview(data), sums_of(copy, block, data))


def sums_of(copy: SlabCopy, block: int, data: bytes) -> bytes:
    return pack_checksums(block_checksums(memoryview(data), copy.seed, block))


def read(copy: SlabCopy, block: int, count: int = 1) -> bytes:
    return bytes(copy.read_blocks(block, count)[1])


def image_of(path: str, target: Path) -> str:
    """A copy of a drive file as it is now: what a kill of its process would leave."""
    with open(path, "rb") as source, open(target, "wb") as copy:
        size = os.fstat(source.fileno()).st_size
        copy.truncate(size)
        end = 0
        while end < size:  # only what is there: drive files are sparse
            try:
                start = os.lseek(source.fileno(), end, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(source.fileno(), start, os.SEEK_HOLE)
            source.seek(start)
            copy.seek(start)
            copy.write(source.read(end - start))
    return str(target)


def overwrite(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), data, offset)


def flip_bit(path: str, bit: int) -> None:
    """Bit number `bit` of the file."""
    with open(path, "r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, bit // 8)
        os.pwrite(file.fileno(), bytes([byte ^ 1 << (bit % 8)]), bit // 8)
