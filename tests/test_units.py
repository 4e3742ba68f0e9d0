"""Sizes as people write and read them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csvfs.errors import BadRequest
from csvfs.units import GIB, KIB, MIB, TIB, format_size, parse_size

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("64k", 64 * KIB),
        ("512MiB", 512 * MIB),
        ("4G", 4 * GIB),
        (" 4 GB ", 4 * GIB),
        ("1.5T", 3 * TIB // 2),
    ],
)
def test_a_size_is_read_as_people_write_it(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "-1G", "4X", "4 G G", "1e9", "0x10", "1,5G", "4G4", "nan", "inf", "½G", "."]
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadRequest, match="write it like 4G"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (64 * MIB, "64.0 MiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (5000 * TIB, "5000.0 TiB"),
        (-2 * MIB, "-2.0 MiB"),
    ],
)
def test_a_size_is_written_with_one_decimal(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(min_value=0, max_value=1 << 50))
def test_a_written_size_is_read_back_within_its_rounding(size: int) -> None:
    # one decimal of the unit: off by at most half a tenth of it, and a little where a value rounds up to 1024.0
    assert abs(parse_size(format_size(size)) - size) <= max(0.051 * size, 0)


@given(st.integers(min_value=0, max_value=1 << 45))
def test_plain_bytes_are_read_exactly(size: int) -> None:
    assert parse_size(str(size)) == size


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_bad_request(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except BadRequest:
        return
