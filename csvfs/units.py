"""Sizes: constants that several floors share, and how people write and read them. Ground floor."""

import re

from csvfs.errors import BadRequest

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

BLOCK_SIZE = 4 * KIB  # unit of checksum
CHUNK_SIZE = 64 * KIB  # unit of resync
BLOCKS_PER_CHUNK = CHUNK_SIZE // BLOCK_SIZE
SLAB_SIZE_DEFAULT = 64 * MIB
SLAB_SIZE_MIN = 4 * MIB
SLAB_SIZE_MAX = 256 * MIB
IO_SIZE_MAX = MIB  # one READ or WRITE message carries at most this much data

_SUFFIXES = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes from `4G`, `512MiB`, `1.5T`, `4096`. Raises BadRequest."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BadRequest(f"{text!r} is not a size; write it like 4G, 512M or 1.5T")
    return int(float(match[1]) * _SUFFIXES[match[2].upper()])


def format_size(size: int) -> str:
    """`1.5 GiB` from bytes, one decimal."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")
