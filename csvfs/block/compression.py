"""Compression of what is copied between drive servers (PROTOCOL.md, "READ_DATA"): lz4 frames, where that
helps.

Place      block floor. Pure. Checksums are those of the blocks, and are checked after `expand`.
"""

from lz4 import frame as lz4

from csvfs.errors import ProtocolError

SHRINKS_TO_MAX = 0.75  # of the size: else it is sent as it is
TRY_OTHER_EVERY = 16


def shrink(data: bytes | bytearray | memoryview) -> bytes | None:
    """`data` as an lz4 frame; None: it would not help. May run in another thread."""
    packed: bytes = lz4.compress(data, compression_level=0, store_size=False)
    return packed if len(packed) < len(data) * SHRINKS_TO_MAX else None


def expand(packed: bytes | bytearray, size: int) -> bytearray:
    """The `size` bytes that an lz4 frame holds. Raises ProtocolError on anything else, however large it
    claims to be. May run in another thread."""
    try:
        expander = lz4.LZ4FrameDecompressor()
        data = bytearray(expander.decompress(packed, max_length=size + 1))
        while len(data) <= size and not expander.eof and not expander.needs_input:
            data += expander.decompress(b"", max_length=size + 1 - len(data))
    except (RuntimeError, EOFError, ValueError) as error:
        raise ProtocolError(f"{len(packed)} bytes that are no lz4 frame: {error}") from None
    if len(data) != size or not expander.eof or expander.unused_data:
        raise ProtocolError(f"an lz4 frame of {len(packed)} bytes does not hold {size} bytes")
    return data


class Asking:
    """Whether to ask for compression: whichever way has been the faster one lately; the other now and then.

    So it is used where the network is the narrow place, and not where processors are.
    """

    def __init__(self) -> None:
        self._pace: dict[bool, float] = {}  # asked for or not: seconds per byte, lately
        self._count = 0

    def next(self) -> bool:
        self._count += 1
        if len(self._pace) < 2:
            return True not in self._pace
        faster = self._pace[True] < self._pace[False]
        return faster if self._count % TRY_OTHER_EVERY else not faster

    def took(self, asked: bool, size: int, seconds: float) -> None:
        """A read of `size` bytes, as they were before, was answered after `seconds`."""
        pace = seconds / size
        self._pace[asked] = pace if asked not in self._pace else 0.75 * self._pace[asked] + 0.25 * pace
