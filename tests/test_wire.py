"""What comes off a wire: whole, in pieces, with a tail, and damaged in every way. Never a wrong frame."""

import random
import struct

import crcmod
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csvfs.errors import CsvfsError, NotFound, ProtocolError, StaleEpoch, error_kinds
from csvfs.ids import DriveId, Epoch, NodeName, SlabId, VolumeId
from csvfs.units import BLOCK_SIZE
from csvfs.wire import block_messages as blocks
from csvfs.wire import control
from csvfs.wire.frames import (
    FRAME_HEADER_SIZE,
    HEAD_SIZE_MAX,
    KINDS,
    PAYLOAD_SIZE_MAX,
    Frame,
    Kind,
    frame_size,
    pack_frame,
    parse_frame,
)

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

VOLUME = VolumeId(bytes(range(16)))
SLAB = SlabId(812)

# An independent second opinion on CRC-32C (Castagnoli), table-driven and slow.
second_opinion = crcmod.mkCrcFun(0x11EDC6F41, initCrc=0, xorOut=0xFFFFFFFF)


def write_frame() -> bytes:
    """A WRITE of one block, as a mount sends it."""
    data = bytes(range(256)) * 16
    head = blocks.BLOCK_HEAD.pack(SLAB, 7, 3, 5, 1, 0, 0, 0)
    head += blocks.pack_checksums(blocks.block_checksums(memoryview(data), blocks.slab_seed(VOLUME, SLAB), 5))
    return pack_frame(Kind.WRITE, 41, head, len(data)) + data


def take(buffer: bytes) -> Frame | None:
    """The first frame of `buffer` as a link takes it; None: feed more."""
    size = frame_size(memoryview(buffer))
    if size == 0 or len(buffer) < size:
        return None
    return parse_frame(memoryview(buffer)[:size])


# ---------------------------------------------------------------- frames


@given(
    kind=st.sampled_from(sorted(KINDS)),
    request_id=st.integers(0, (1 << 64) - 1),
    head=st.binary(max_size=300),
    payload=st.binary(max_size=300),
)
def test_a_frame_comes_out_as_it_went_in(kind: int, request_id: int, head: bytes, payload: bytes) -> None:
    frame = take(pack_frame(kind, request_id, head, len(payload)) + payload)
    assert frame is not None
    assert (frame.kind, frame.request_id) == (kind, request_id)
    assert (bytes(frame.head), bytes(frame.payload)) == (head, payload)


def test_a_frame_fed_byte_by_byte_appears_with_its_last_byte_and_not_before() -> None:
    packed = write_frame()
    for size in range(len(packed)):
        assert take(packed[:size]) is None
    assert take(packed) is not None


def test_a_tail_behind_a_frame_is_left_untouched() -> None:
    packed = write_frame()
    for tail in (b"\0", b"garbage that is no frame", packed, packed[:30]):
        buffer = packed + tail
        size = frame_size(memoryview(buffer))
        assert size == len(packed)
        assert buffer[size:] == tail
        frame = parse_frame(memoryview(buffer)[:size])
        assert len(frame.payload) == BLOCK_SIZE


def test_several_frames_in_one_buffer_come_out_in_order() -> None:
    buffer = b"".join(pack_frame(Kind.WRITTEN, request_id, b"") for request_id in range(1, 6))
    seen = []
    while buffer:
        frame = take(buffer)
        assert frame is not None
        seen.append(frame.request_id)
        buffer = buffer[frame_size(memoryview(buffer)) :]
    assert seen == [1, 2, 3, 4, 5]


def test_any_byte_of_header_or_head_flipped_is_never_taken_for_a_frame() -> None:
    packed = write_frame()
    covered = len(packed) - BLOCK_SIZE
    for offset in range(covered):
        for bit in (0x01, 0x80):
            damaged = bytearray(packed)
            damaged[offset] ^= bit
            try:
                frame = take(bytes(damaged))
            except ProtocolError:
                continue
            assert frame is None, f"byte {offset} flipped by {bit:#x} gave a frame"


def test_any_byte_of_a_payload_flipped_is_found_by_its_block_checksum() -> None:
    packed = write_frame()
    chooser = random.Random(812)
    seed = blocks.slab_seed(VOLUME, SLAB)
    for offset in chooser.sample(range(len(packed) - BLOCK_SIZE, len(packed)), 300):
        damaged = bytearray(packed)
        damaged[offset] ^= 1 << chooser.randrange(8)
        frame = take(bytes(damaged))
        assert frame is not None
        (wanted,) = blocks.unpack_checksums(frame.head[blocks.BLOCK_HEAD.size :], 1)
        assert blocks.block_checksum(frame.payload, seed, 5) != wanted


@given(st.binary(max_size=200))
def test_random_bytes_are_never_a_frame(noise: bytes) -> None:
    try:
        frame = take(noise)
    except ProtocolError:
        return
    assert frame is None


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (struct.pack("<HBBIIQI", 0xC5F6, 1, 3, 0, 0, 1, 0), "magic"),
        (struct.pack("<HBBIIQI", 0xC5F5, 2, 3, 0, 0, 1, 0), "version 2"),
        (struct.pack("<HBBIIQI", 0xC5F5, 1, 99, 0, 0, 1, 0), "unknown kind 99"),
        (struct.pack("<HBBIIQI", 0xC5F5, 1, 3, HEAD_SIZE_MAX + 1, 0, 1, 0), "too large"),
        (struct.pack("<HBBIIQI", 0xC5F5, 1, 16, 0, PAYLOAD_SIZE_MAX + 1, 1, 0), "too large"),
    ],
)
def test_a_foreign_or_oversized_header_is_refused_before_its_body_arrives(header: bytes, reason: str) -> None:
    assert len(header) == FRAME_HEADER_SIZE
    with pytest.raises(ProtocolError, match=reason):
        frame_size(memoryview(header))


def test_the_largest_frame_allowed_is_taken() -> None:
    packed = pack_frame(Kind.WRITE, 1, bytes(HEAD_SIZE_MAX), PAYLOAD_SIZE_MAX)
    assert frame_size(memoryview(packed)) == FRAME_HEADER_SIZE + HEAD_SIZE_MAX + PAYLOAD_SIZE_MAX


# ---------------------------------------------------------------- control messages

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(values)
def test_a_value_comes_out_as_it_went_in(value: object) -> None:
    assert control.unpack_value(control.pack_value(value)) == value


@given(st.text(max_size=12), st.dictionaries(st.text(max_size=6), values, max_size=4))
def test_a_call_comes_out_as_it_went_in(name: str, args: dict[str, object]) -> None:
    assert control.unpack_call(control.pack_call(name, args)) == (name, args)


@given(st.binary(max_size=120))
def test_random_bytes_are_a_message_or_a_protocol_error(noise: bytes) -> None:
    for unpack in (control.unpack_value, control.unpack_call, control.unpack_error):
        try:
            unpack(noise)
        except ProtocolError:
            continue


def test_a_control_message_cut_short_or_with_a_tail_is_refused() -> None:
    packed = control.pack_call("create_slab", {"slab": 812, "drive": bytes(16)})
    for size in range(len(packed)):
        with pytest.raises(ProtocolError):
            control.unpack_call(packed[:size])
    with pytest.raises(ProtocolError):
        control.unpack_call(packed + b"\0")


@pytest.mark.parametrize(
    "value", [None, 5, "fence", [], ["fence"], ["fence", {}, 1], [1, {}], ["fence", []], {"fence": {}}]
)
def test_what_is_no_call_is_refused(value: object) -> None:
    with pytest.raises(ProtocolError, match="a call is"):
        control.unpack_call(control.pack_value(value))


def test_a_deeply_nested_message_is_refused_and_does_no_harm() -> None:
    with pytest.raises(ProtocolError):
        control.unpack_value(b"\x91" * 200_000 + b"\xc0")


def test_a_message_that_announces_more_than_it_holds_is_refused() -> None:
    for bomb in (
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
    ):
        with pytest.raises(ProtocolError):
            control.unpack_value(bomb)


@pytest.mark.parametrize("kind", sorted(error_kinds()))
def test_every_kind_of_error_arrives_as_the_same_kind(kind: str) -> None:
    sent = error_kinds()[kind]("slab 812 has epoch 4, the write has 3")
    received = control.unpack_error(control.pack_error(sent))
    assert type(received) is type(sent)
    assert str(received) == str(sent)


def test_an_error_that_only_one_room_knows_travels_as_the_kind_above_it() -> None:
    class TooFew(NotFound):
        def __init__(self, count: int) -> None:
            super().__init__(f"{count} are missing")

    received = control.unpack_error(control.pack_error(TooFew(3)))
    assert type(received) is NotFound
    assert str(received) == "3 are missing"


def test_an_error_of_an_unknown_kind_keeps_its_message() -> None:
    received = control.unpack_error(control.pack_value(["FromTheFuture", "what happened", {"slab": 1}]))
    assert type(received) is CsvfsError
    assert str(received) == "what happened"


@pytest.mark.parametrize(
    "value", [None, [], ["NotFound"], ["NotFound", "m"], [1, "m", {}], {"NotFound": "m"}]
)
def test_what_is_no_error_is_refused(value: object) -> None:
    with pytest.raises(ProtocolError, match="an error is"):
        control.unpack_error(control.pack_value(value))


def test_kinds_of_errors_are_told_apart_by_the_receiver() -> None:
    assert isinstance(control.unpack_error(control.pack_error(StaleEpoch("x"))), StaleEpoch)
    assert not isinstance(control.unpack_error(control.pack_error(NotFound("x"))), StaleEpoch)


# ---------------------------------------------------------------- block checksums


@given(
    volume=st.binary(min_size=16, max_size=16),
    slab=st.integers(0, (1 << 64) - 1),
    block=st.integers(0, 65_535),
    filler=st.binary(min_size=1, max_size=64),
)
def test_a_block_checksum_agrees_with_an_independent_crc(
    volume: bytes, slab: int, block: int, filler: bytes
) -> None:
    data = (filler * BLOCK_SIZE)[:BLOCK_SIZE]
    seed = second_opinion(volume + struct.pack("<Q", slab))
    wanted = second_opinion(data, seed ^ block) or 1
    assert blocks.slab_seed(VolumeId(volume), SlabId(slab)) == seed
    assert blocks.block_checksum(data, seed, block) == wanted


def test_checksums_of_many_blocks_are_those_of_each_block_alone() -> None:
    data = random.Random(1).randbytes(7 * BLOCK_SIZE)
    seed = blocks.slab_seed(VOLUME, SLAB)
    together = blocks.block_checksums(memoryview(data), seed, 100)
    alone = [
        blocks.block_checksum(data[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE], seed, 100 + index)
        for index in range(7)
    ]
    assert together == alone
    assert blocks.block_checksums(memoryview(data)[:BLOCK_SIZE], seed, 100) == alone[:1]


def test_a_misplaced_block_does_not_verify() -> None:
    data = bytes(BLOCK_SIZE)
    seed = blocks.slab_seed(VOLUME, SLAB)
    right = blocks.block_checksum(data, seed, 5)
    assert right != blocks.block_checksum(data, seed, 6)
    assert right != blocks.block_checksum(data, blocks.slab_seed(VOLUME, SlabId(SLAB + 1)), 5)
    assert right != blocks.block_checksum(data, blocks.slab_seed(VolumeId(bytes(16)), SLAB), 5)


def test_a_checksum_is_never_the_mark_of_a_block_never_written() -> None:
    """Find a block whose plain CRC-32C is 0: its checksum must be 1."""
    data = bytearray(BLOCK_SIZE)
    seed = blocks.slab_seed(VOLUME, SLAB)
    # CRC is affine in each bit: solve for 32 bits of the last 4 bytes that cancel the CRC of the rest.
    base = second_opinion(bytes(data), seed)
    columns = []
    for bit in range(32):
        flipped = bytearray(data)
        flipped[BLOCK_SIZE - 4 + bit // 8] ^= 1 << (bit % 8)
        columns.append((second_opinion(bytes(flipped), seed) ^ base, 1 << bit))
    solution = solve_over_bits(columns, base)
    data[BLOCK_SIZE - 4 :] = solution.to_bytes(4, "little")
    assert second_opinion(bytes(data), seed) == 0
    assert blocks.block_checksum(bytes(data), seed, 0) == 1
    assert blocks.block_checksums(memoryview(data), seed, 0) == [1]


def solve_over_bits(columns: list[tuple[int, int]], target: int) -> int:
    """The set of columns (as a mask) whose XOR is `target`: Gaussian elimination over GF(2)."""
    pivots: dict[int, tuple[int, int]] = {}
    for value, mask in columns:
        while value and value.bit_length() in pivots:
            other_value, other_mask = pivots[value.bit_length()]
            value, mask = value ^ other_value, mask ^ other_mask
        if value:
            pivots[value.bit_length()] = (value, mask)
    solution = 0
    while target:
        value, mask = pivots[target.bit_length()]
        target, solution = target ^ value, solution ^ mask
    return solution


@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=blocks.BLOCK_COUNT_MAX))
def test_checksums_come_out_as_they_went_in(checksums: list[int]) -> None:
    packed = blocks.pack_checksums(checksums)
    assert list(blocks.unpack_checksums(packed, len(checksums))) == checksums


@pytest.mark.parametrize(
    ("size", "count"), [(0, 0), (4, 0), (3, 1), (5, 1), (8, 1), (4, 2), (4 * 257, 257), (4, -1)]
)
def test_checksums_of_the_wrong_number_are_refused(size: int, count: int) -> None:
    with pytest.raises(ProtocolError, match="checksums"):
        blocks.unpack_checksums(bytes(size), count)


# ---------------------------------------------------------------- slab descriptors

members = st.builds(
    blocks.Member,
    drive=st.binary(min_size=16, max_size=16).map(DriveId),
    node=st.text(min_size=1, max_size=8).map(NodeName),
    role=st.sampled_from([blocks.ROLE_ABSENT, blocks.ROLE_IN_SYNC, blocks.ROLE_JOINING]),
    since=st.integers(0, (1 << 32) - 1).map(Epoch),
)
descriptors = st.builds(
    blocks.SlabDescriptor,
    slab=st.integers(0, (1 << 64) - 1).map(SlabId),
    epoch=st.integers(0, (1 << 32) - 1).map(Epoch),
    members=st.lists(members, max_size=4).map(tuple),
)


@given(descriptors)
def test_a_descriptor_comes_out_as_it_went_in(descriptor: blocks.SlabDescriptor) -> None:
    value = control.unpack_value(control.pack_value(descriptor.to_wire()))
    assert blocks.SlabDescriptor.from_wire(value) == descriptor


def test_writes_go_to_members_in_sync_and_joining_reads_to_those_in_sync() -> None:
    roles = (blocks.ROLE_IN_SYNC, blocks.ROLE_JOINING, blocks.ROLE_ABSENT)
    rows = tuple(blocks.Member(DriveId(bytes([role]) * 16), NodeName(f"n{role}"), role) for role in roles)
    descriptor = blocks.SlabDescriptor(SLAB, Epoch(3), rows)
    assert [member.role for member in descriptor.in_sync] == [blocks.ROLE_IN_SYNC]
    assert [member.role for member in descriptor.writable] == [blocks.ROLE_IN_SYNC, blocks.ROLE_JOINING]


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        "slab",
        [],
        [1, 2],
        [1, 2, 3],
        [1, 2, [], 4],
        [1, 2, [[bytes(16), "n1", 1]]],
        [1, 2, [[bytes(16), "n1", 3, 0]]],
        [1, 2, [["not bytes", "n1", 1, 0]]],
        [1, 2, [[bytes(16), "n1", "in sync", 0]]],
        [-1, 2, []],
        [1, -2, []],
        ["one", 2, []],
        {"slab": 1},
    ],
)
def test_what_is_no_descriptor_is_refused(value: object) -> None:
    with pytest.raises(ProtocolError):
        blocks.SlabDescriptor.from_wire(value)
