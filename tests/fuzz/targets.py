"""What is fuzzed: a parser each, with messages that it takes, to begin from.

Rule       `run` may raise CsvfsError, and what its caller in the product catches (`also`). Anything else is a
           finding: it would end a task, or a process.
Bounds     an input has at most SIZE_MAX bytes, may take SECONDS_MAX, and the process MEMORY_MIB_MAX.
"""

import logging
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator.job_record import JobFacts
from csvfs import config, units
from csvfs.block import compression, signatures, slot_table, superblock
from csvfs.block.layout import Layout, structure_checksum
from csvfs.cluster.membership import View
from csvfs.errors import CsvfsError
from csvfs.fault_domains import level_of, place_of
from csvfs.ids import DriveId, Epoch, NodeName, PoolId, SlabId, VolumeId
from csvfs.mount import fuse_abi
from csvfs.store import etcd_messages, etcd_place
from csvfs.store.interface import Change, Item
from csvfs.units import GIB, MIB
from csvfs.wire import block_messages, control, frames
from csvfs.wire.block_messages import ROLE_IN_SYNC, Member, SlabDescriptor

SIZE_MAX = 4096
SECONDS_MAX = 5
MEMORY_MIB_MAX = 1024

DRIVE = DriveId(b"d" * 16)


@dataclass(slots=True, frozen=True)
class Target:
    name: str
    run: Callable[[bytes], object]
    examples: tuple[bytes, ...]
    also: tuple[type[Exception], ...] = field(default=())

    def try_input(self, data: bytes) -> None:
        """Raises what is a finding."""
        try:
            self.run(data)
        except (CsvfsError, *self.also):
            pass


# -- the network


def _stream(data: bytes) -> None:
    """As Link does with what it has received."""
    view = memoryview(data)
    at = 0
    while True:
        size = frames.frame_size(view[at:])
        if size == 0 or len(view) - at < size:
            return
        _message(frames.parse_frame(view[at : at + size]))
        at += size


def _message(frame: frames.Frame) -> None:
    if frame.kind == frames.Kind.CALL:
        control.unpack_call(frame.head)
    elif frame.kind == frames.Kind.ERROR:
        control.unpack_error(frame.head)
    elif frame.kind == frames.Kind.REPLY:
        control.unpack_value(frame.head)
    elif frame.kind in (frames.Kind.WRITE, frames.Kind.HEAL):
        block_messages.unpack_checksums(frame.head, len(frame.payload) // 4096)
    elif frame.kind == frames.Kind.FLUSH:
        block_messages.unpack_flush_rows(frame.head)
    elif frame.kind == frames.Kind.WRITTEN:
        block_messages.unpack_flush_refused(frame.head, 7)


def _frame(data: bytes) -> None:
    """A frame whose checksum holds: kind, then its head."""
    kind = list(frames.Kind)[data[0] % len(frames.Kind)] if data else frames.Kind.CALL
    _stream(frames.pack_frame(kind, 1, data[1:]))


def _descriptor(data: bytes) -> None:
    descriptor = SlabDescriptor.from_wire(control.unpack_value(data))
    assert SlabDescriptor.from_wire(descriptor.to_wire()) == descriptor
    _ = descriptor.in_sync, descriptor.writable


def _lz4(data: bytes) -> None:
    size = int.from_bytes(data[:3], "little") % (MIB + 1)
    assert len(compression.expand(data[3:], size)) == size


# -- drives


def _superblock(data: bytes) -> None:
    superblock.parse_superblock(data, 0)


def _sealed(example: bytes, data: bytes) -> bytes:
    """An on-disk structure that begins as `data`, with a checksum that holds (FORMAT.md: behind the magic)."""
    body = (data + example[16 + len(data) :])[: len(example) - 16]
    return example[:8] + struct.pack("<Q", structure_checksum(body)) + body


def _sealed_superblock(data: bytes) -> None:
    superblock.parse_superblock(_sealed(SUPERBLOCK, data), 0)


def _sealed_entry(data: bytes) -> None:
    slot_table.parse_entry(_sealed(ENTRY, data), 1, DRIVE)


def _entry(data: bytes) -> None:
    slot_table.parse_entry(data, 1, DRIVE)


def _layout(data: bytes) -> None:
    Layout.from_map(control.unpack_value(data))


def _signature(data: bytes) -> None:
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, data)
        os.ftruncate(fd, MIB)
        signatures.find_signature(fd, MIB)
        signatures.is_blank(fd, MIB)
    finally:
        os.close(fd)


# -- the cluster store


def _view(data: bytes) -> None:
    """A key and a value, as a watch tells them."""
    name, _, value = data.partition(b"\0")
    key = name.decode("utf-8", "replace")
    View().apply([Change(key, Item(key, value, 1, 0), 1)])


def _jobs(data: bytes) -> None:
    JobFacts.from_value(control.unpack_value(data))


def _places(data: bytes) -> None:
    value = control.unpack_value(data)
    place_of(value)
    level_of(value)


def _etcd(data: bytes) -> None:
    answer = etcd_messages.parse_object(data)
    etcd_messages.stream_refusal(answer.get("error"), answer)
    etcd_messages.header_of(answer)
    for row in etcd_messages.objects(answer, "kvs"):
        etcd_messages.parse_item(row)
    for event in etcd_messages.objects(answer, "events"):
        etcd_messages.parse_change(event)


def _etcd_refusal(data: bytes) -> None:
    str(etcd_messages.refusal(500, data))


# -- this machine


def _config(data: bytes) -> None:
    config.parse_config(data, config.config_path())


def _words(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    if text[:1] == "s":
        units.parse_size(text[1:])
    elif text[:1] == "n":
        config.check_name(text[1:], "a name")
    else:
        etcd_place.parse_endpoint(text[1:], "a test")


def _fuse(data: bytes) -> None:
    view = memoryview(data)
    fuse_abi.unpack_init(view)
    fuse_abi.without_attributes(view)


# -- all of them

SUPERBLOCK = superblock.pack_superblock(
    superblock.Superblock(
        sequence=3, drive_id=DRIVE, pool_id=PoolId(b"p" * 16), cluster_id=b"c" * 16, size=GIB, slab_size=64 * MIB,
        node=NodeName("n1"), label="left", created_ns=1,
    ),
    0,
)  # fmt: skip
ENTRY = slot_table.pack_entry(
    slot_table.SlotEntry(
        9, 1, slot_table.STATE_IN_USE, ROLE_IN_SYNC, VolumeId(b"v" * 16), SlabId(7), Epoch(2)
    ),
    DRIVE,
)
DESCRIPTOR = SlabDescriptor(SlabId(7), Epoch(2), (Member(DRIVE, NodeName("n1"), ROLE_IN_SYNC),))
CALL = control.pack_call("hello", {"cluster": b"c" * 16, "volume": None, "writer": "mount/n1", "incarnation": 1})
NODE_TOML = b'node = "n1"\naddress = "10.0.0.1"\nstore = "embedded:/x"\n[options]\nlease_ms = 3000\n[place]\nrack = "r1"\n'
ETCD = (
    b'{"header":{"cluster_id":"1","member_id":"2","revision":"3","raft_term":"4"},"kvs":[{"key":"L2NzdmZzL2E=",'
    b'"value":"eA==","mod_revision":"3","version":"1"}],"events":[{"type":"DELETE","kv":{"key":"L2E=","mod_revision":"4"}}]}'
)


def _packed(*values: object) -> tuple[bytes, ...]:
    return tuple(control.pack_value(value) for value in values)


TARGETS = {
    target.name: target
    for target in (
        Target("stream", _stream, (frames.pack_frame(frames.Kind.CALL, 1, CALL),)),
        Target("frame", _frame, (b"\2" + CALL, b"\1" + control.pack_error(CsvfsError("x")), b"\x08" + bytes(12))),
        Target("descriptor", _descriptor, _packed(DESCRIPTOR.to_wire(), [1, 1, [[1 << 40, "n", 1, 0]]])),
        Target("lz4", _lz4, ((4096).to_bytes(3, "little") + (compression.shrink(bytes(4096)) or b""),)),
        Target("superblock", _superblock, (SUPERBLOCK,)),
        Target("sealed-superblock", _sealed_superblock, (SUPERBLOCK[16:400],)),
        Target("slot-entry", _entry, (ENTRY,)),
        Target("sealed-slot-entry", _sealed_entry, (ENTRY[16:],)),
        Target("layout", _layout, _packed({"size": GIB, "slab_size": 64 * MIB})),
        Target("signature", _signature, (b"LABELONE", bytes(510) + b"\x55\xaa", b"XFSB", b"LUKS\xba\xbe")),
        Target(
            "store",
            _view,
            tuple(
                key + b"\0" + value
                for key in (b"term/v", b"volumes/v", b"nodes/n1", b"drives/" + b"64" * 16, b"cluster", b"owner/v")
                for value in _packed({"term": 3, "node": "n1", "slabs": [DESCRIPTOR.to_wire()], "drives": {}})
            ),
        ),
        Target("jobs", _jobs, _packed({"paused": ["repair"], "speed": 2, "totals": {"a": 1}, "away_ms": {"b": 2}})),
        Target("places", _places, _packed({"site": "s", "rack": "r", "chassis": "c"}, "rack")),
        Target("etcd", _etcd, (ETCD,)),
        Target("etcd-refusal", _etcd_refusal, (b'{"error":{"code":5,"message":"x"}}', b"<html>")),
        Target("config", _config, (NODE_TOML,)),
        Target("words", _words, (b"s64MiB", b"nnode-1", b"ehttps://10.0.0.1:2379")),
        # The channel answers a malformed request of the kernel with EIO.
        Target("fuse", _fuse, (bytes(80),), (ValueError, struct.error)),
    )
}


def quiet() -> None:
    """What parsers log of what they refuse would be all that is seen."""
    logging.disable(logging.CRITICAL)
