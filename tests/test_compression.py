"""What is copied between drive servers travels as lz4 where that is faster; what comes out is verified."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfs.block.compression import TRY_OTHER_EVERY, Asking, expand, shrink
from csvfs.errors import ProtocolError
from csvfs.units import MIB


@given(st.binary(min_size=1, max_size=200), st.integers(1, 400))
def test_what_was_shrunk_expands_to_itself_and_any_other_size_is_refused(piece, times):
    data = piece * times
    packed = shrink(data)
    if packed is not None:
        assert len(packed) < 0.75 * len(data)
        assert expand(packed, len(data)) == data
        for wrong in (len(data) - 1, len(data) + 1):
            with pytest.raises(ProtocolError):
                expand(packed, wrong)


@given(st.binary(max_size=300))
def test_random_bytes_are_no_frame(data):
    with pytest.raises(ProtocolError):
        expand(data, 4096)


@given(st.data())
def test_a_flipped_or_missing_byte_is_refused_or_gives_bytes_of_the_right_size(data):
    packed = bytearray(shrink(b"abcdefgh" * 1024) or b"")
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        assert len(expand(packed, 8192)) == 8192  # then the block checksums tell
    except ProtocolError:
        pass
    with pytest.raises(ProtocolError):
        expand(packed[:-1], 8192)


def test_a_frame_that_claims_to_be_huge_is_refused_without_being_expanded():
    packed = shrink(bytes(64 * MIB))
    assert packed is not None
    with pytest.raises(ProtocolError):
        expand(packed, 4096)


def test_what_does_not_shrink_is_sent_as_it_is():
    assert shrink(os.urandom(65_536)) is None


@pytest.mark.parametrize("compression_is_faster", [True, False])
def test_the_faster_way_is_taken_and_the_other_tried_now_and_then(compression_is_faster):
    asking = Asking()
    asked = []
    for _ in range(160):
        ask = asking.next()
        asked.append(ask)
        asking.took(ask, MIB, 0.001 if ask == compression_is_faster else 0.002)
    assert asked.count(not compression_is_faster) <= 160 / TRY_OTHER_EVERY + 1
