"""Superblock: who a drive is and how it was last closed, in four copies (FORMAT.md, "Superblock").

Place      block floor, above layout.py.
Writer     formatting.py once, then the Drive that has it open.
Current    the highest sequence that two copies agree on; when no two agree, the highest valid one. A single
           readable copy suffices. Opening writes the current one over all others (after `repairs` has told of
           it).
"""

import os
import struct
from dataclasses import dataclass, field, replace
from functools import lru_cache

from csvfs.block.drive_faults import TRUNCATED, faulty
from csvfs.block.layout import (
    SUPERBLOCK_COPIES,
    SUPERBLOCK_SIZE,
    Layout,
    check_zero,
    layout_of,
    structure_checksum,
    superblock_offsets,
)
from csvfs.errors import BadRequest, Corrupt, DriveFailed
from csvfs.ids import DriveId, NodeName, PoolId
from csvfs.units import BLOCK_SIZE

SUPERBLOCK_MAGIC = b"CSVFSSB1"
FORMAT_VERSION = 1
FLAG_CLEAN = 1
FLAG_FAILED = 2
FLAG_CONTENTS_LOST = 4
_FLAGS_KNOWN = FLAG_CLEAN | FLAG_FAILED | FLAG_CONTENTS_LOST
TEXT_SIZE_MAX = 64  # bytes of UTF-8 of node name and label

_MAGIC_SUM = struct.Struct("<8sQ")
# version, copy, sequence, drive, pool, cluster, size, slab_size, slot_count, flags, table A, table B,
# metadata, metadata stride, data, created, opens, boot id, disk sequence, node, label
_BODY = struct.Struct("<IIQ16s16s16sQQIIQQQQQQQ16sQ64s64s")
_CHECKSUM_START = 16  # the checksum covers what follows magic and checksum
assert _MAGIC_SUM.size == 16
_RESERVED_START = _CHECKSUM_START + _BODY.size
assert _RESERVED_START == 312  # FORMAT.md, "Superblock"


@dataclass(slots=True, frozen=True)
class Superblock:
    """`clean`: closed with all flushed. `failed`: a flush failed. `size` in bytes, as recorded.

    contents_lost  page-cache content may have been lost, and not every copy has been judged since
    """

    sequence: int
    drive_id: DriveId
    pool_id: PoolId
    cluster_id: bytes
    size: int
    slab_size: int
    node: NodeName
    label: str
    created_ns: int  # wall clock, for people
    clean: bool = True
    failed: bool = False
    contents_lost: bool = False
    opens: int = 0
    boot_id: bytes = bytes(16)  # of the machine that last opened it
    disk_sequence: int = 0  # of the kernel, for block devices: another one means it was unplugged since

    @property
    def layout(self) -> Layout:
        return layout_of(self.size, self.slab_size)

    @property
    def slot_count(self) -> int:
        return self.layout.slot_count


@dataclass(slots=True)
class Found:
    """`repairs`: what is wrong with copies that are not the current one, one line each."""

    superblock: Superblock
    repairs: list[str] = field(default_factory=list)


def _text(value: str, what: str) -> bytes:
    raw = value.encode()
    if len(raw) > TEXT_SIZE_MAX or "\0" in value:
        raise BadRequest(f"{what} {value!r} is longer than {TEXT_SIZE_MAX} bytes or has a NUL")
    return raw


def _flags_of(superblock: Superblock) -> int:
    return (
        FLAG_CLEAN * superblock.clean
        | FLAG_FAILED * superblock.failed
        | FLAG_CONTENTS_LOST * superblock.contents_lost
    )


def pack_superblock(superblock: Superblock, copy: int) -> bytes:
    """4,096 bytes. Raises BadRequest when node name or label do not fit."""
    layout = superblock.layout
    body = _BODY.pack(
        FORMAT_VERSION,
        copy,
        superblock.sequence,
        superblock.drive_id,
        superblock.pool_id,
        superblock.cluster_id,
        superblock.size,
        superblock.slab_size,
        layout.slot_count,
        _flags_of(superblock),
        *layout.table_offsets,
        layout.metadata_offset,
        layout.metadata_stride,
        layout.data_offset,
        superblock.created_ns,
        superblock.opens,
        superblock.boot_id,
        superblock.disk_sequence,
        _text(superblock.node, "node name"),
        _text(superblock.label, "label"),
    ).ljust(SUPERBLOCK_SIZE - _CHECKSUM_START, b"\0")
    return _MAGIC_SUM.pack(SUPERBLOCK_MAGIC, structure_checksum(body)) + body


# Every second the copies of every drive are read again, and say what they said: comparing costs a fifth of parsing.
@lru_cache(maxsize=256)
def parse_superblock(raw: bytes, copy: int) -> Superblock:
    """Raises Corrupt, with what is wrong, on anything but a superblock copy of this number."""
    if len(raw) != SUPERBLOCK_SIZE:
        raise Corrupt(f"only {len(raw)} of {SUPERBLOCK_SIZE} bytes are there")
    if not raw.strip(b"\0"):
        raise Corrupt("it is all zeros")
    magic, checksum = _MAGIC_SUM.unpack_from(raw)
    if magic != SUPERBLOCK_MAGIC:
        raise Corrupt("wrong magic")
    computed = structure_checksum(raw[_CHECKSUM_START:])
    if checksum != computed:
        raise Corrupt(f"checksum {checksum:016x}, want {computed:016x}")
    fields = _BODY.unpack_from(raw, _CHECKSUM_START)
    version, found_copy = fields[0], fields[1]
    if version != FORMAT_VERSION:
        raise Corrupt(f"format version {version}, this csvfs reads {FORMAT_VERSION}")
    if found_copy != copy:
        raise Corrupt(f"says it is copy {found_copy}: a misdirected write or read")
    check_zero(raw, _RESERVED_START, "superblock")
    return _from_fields(fields)


def _from_fields(fields: tuple) -> Superblock:
    (_, _, sequence, drive_id, pool_id, cluster_id, size, slab_size, slot_count, flags) = fields[:10]
    (table_a, table_b, metadata, stride, data, created_ns, opens, boot_id, disk_sequence, node, label) = (
        fields[10:]
    )
    try:
        layout = layout_of(size, slab_size)
        node_name, label_text = node.rstrip(b"\0").decode(), label.rstrip(b"\0").decode()
    except (BadRequest, UnicodeDecodeError) as error:
        raise Corrupt(f"impossible content: {error}") from None
    recorded = (slot_count, (table_a, table_b), metadata, stride, data)
    computed = (
        layout.slot_count,
        layout.table_offsets,
        layout.metadata_offset,
        layout.metadata_stride,
        layout.data_offset,
    )
    if recorded != computed or size != layout.size or flags & ~_FLAGS_KNOWN:
        raise Corrupt(f"records a layout or flags this csvfs does not know: {recorded}, flags {flags:#x}")
    return Superblock(
        sequence=sequence,
        drive_id=DriveId(drive_id),
        pool_id=PoolId(pool_id),
        cluster_id=cluster_id,
        size=size,
        slab_size=slab_size,
        node=NodeName(node_name),
        label=label_text,
        created_ns=created_ns,
        clean=bool(flags & FLAG_CLEAN),
        failed=bool(flags & FLAG_FAILED),
        contents_lost=bool(flags & FLAG_CONTENTS_LOST),
        opens=opens,
        boot_id=boot_id,
        disk_sequence=disk_sequence,
    )


def choose_current(copies: list[Superblock]) -> Superblock:
    """The highest sequence two copies agree on; when no two agree, the highest. `copies` is not empty."""
    agreed = [copy for copy in copies if copies.count(copy) >= 2]
    return max(agreed or copies, key=lambda copy: copy.sequence)


def _read_copy(fd: int, offset: int, copy: int) -> Superblock:
    try:
        return parse_superblock(os.pread(fd, SUPERBLOCK_SIZE, offset), copy)
    except OSError as error:
        raise Corrupt(f"cannot be read: {error.strerror}") from None


def read_superblocks(fd: int, size: int) -> tuple[list[Superblock | Corrupt], int]:
    """All four copies, or why they are none, and the recorded size they were looked for by.

    Args  size: bytes that the file or device has now. The copies at the end are found by the size that a copy
          at the start records; when neither of those is readable, by the size it has now.
    """
    size -= size % BLOCK_SIZE
    copies: list[Superblock | Corrupt] = []
    for copy in range(SUPERBLOCK_COPIES):
        offset = superblock_offsets(size)[copy]
        try:
            found = _read_copy(fd, offset, copy) if offset >= 0 else Corrupt("the drive is too short")
        except Corrupt as error:
            copies.append(error)
            continue
        copies.append(found)
        if isinstance(found, Superblock) and copy < SUPERBLOCK_COPIES // 2:
            size = found.size
    return copies, size


def read_superblock(fd: int, size: int) -> Found:
    """The current superblock, and what must be repaired.

    Raises  Corrupt: no copy is readable (with what is wrong with each), or the file is shorter than recorded.
    """
    copies, _ = read_superblocks(fd, size)
    valid = [copy for copy in copies if isinstance(copy, Superblock)]
    if not valid:
        reasons = "; ".join(f"copy {number}: {reason}" for number, reason in enumerate(copies))
        if len({str(reason) for reason in copies}) == 1:
            reasons = f"of all {SUPERBLOCK_COPIES}: {copies[0]}"
        raise Corrupt(f"no superblock is readable ({reasons})")
    current = choose_current(valid)
    if current.size > size:
        raise faulty(Corrupt(f"truncated: {size} B are left of {current.size} B"), TRUNCATED)
    found = Found(current)
    for number, copy in enumerate(copies):
        if isinstance(copy, Corrupt):
            found.repairs.append(f"superblock copy {number}: {copy}")
        elif copy != current:
            found.repairs.append(
                f"superblock copy {number}: sequence {copy.sequence}, current {current.sequence}"
            )
    return found


def highest_sequence(fd: int, size: int) -> int:
    """Of all readable copies: the next update goes above it, so that no sequence has two meanings."""
    return max((c.sequence for c in read_superblocks(fd, size)[0] if isinstance(c, Superblock)), default=0)


def write_superblock(fd: int, superblock: Superblock) -> None:
    """All four copies, one at a time, each flushed before the next: a torn write damages one at most.

    Raises  DriveFailed when fewer than three could be written and flushed.
    """
    failures: list[str] = []
    for copy, offset in enumerate(superblock_offsets(superblock.size)):
        try:
            os.pwrite(fd, pack_superblock(superblock, copy), offset)
            os.fdatasync(fd)
        except OSError as error:
            failures.append(f"copy {copy}: {error.strerror}")
    if len(failures) > 1:
        raise DriveFailed(f"superblock cannot be written ({'; '.join(failures)})")


def next_superblock(superblock: Superblock, sequence: int, **changes: object) -> Superblock:
    """The same drive with a higher sequence and `changes`."""
    assert sequence > superblock.sequence
    return replace(superblock, sequence=sequence, **changes)  # type: ignore[arg-type]
