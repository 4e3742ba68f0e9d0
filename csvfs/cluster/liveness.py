"""The liveness page: until when this node may serve, as a number that costs nothing to look at (I5).

Place      cluster floor. `csvfs node run` writes it, every child of it maps and reads it.
Owns       the file `<run_dir>/liveness`, 4,096 bytes, little-endian:

| offset | size | field | meaning and special values |
|---:|---:|---|---|
| 0 | 8 | magic | `CSVFSLV1` |
| 8 | 8 | serve_until_ns | CLOCK_MONOTONIC; 0: must not serve |
| 16 | 8 | incarnation | of the node's lease |

Invariants
  L1  A page belongs to one node lease. A later lease gets a new file by rename, so a process left over from
      an earlier lease keeps looking at the earlier page, which stays expired for ever.
  L2  serve_until_ns is one aligned store and one aligned load of 8 bytes: it is never seen half-written.
"""

import mmap
import os
import struct
from pathlib import Path

from csvfs.clock import MonotonicNs, monotonic_ns
from csvfs.errors import LeaseLost
from csvfs.ids import Incarnation

PAGE_SIZE = 4096
PAGE_MAGIC = b"CSVFSLV1"
_HEADER = struct.Struct("<8sQQ")
_UNTIL = 1  # index of serve_until_ns in the page as u64s; in native order, as both sides are one machine
_INCARNATION = 2


class LivenessWriter:
    """Creates and advances the page of one node lease. One writer per node, `csvfs node run`."""

    def __init__(self, path: Path, incarnation: Incarnation) -> None:
        """Replace whatever page is at `path` by a new one that does not allow serving yet."""
        staged = path.with_name(f"{path.name}.new")
        with staged.open("wb+") as file:
            file.write(_HEADER.pack(PAGE_MAGIC, 0, incarnation).ljust(PAGE_SIZE, b"\0"))
            file.flush()
            self._map = mmap.mmap(file.fileno(), PAGE_SIZE)
        self._words = memoryview(self._map).cast("Q")
        os.replace(staged, path)

    def serve_until(self, until_ns: int) -> None:
        """Allow serving until `until_ns` of CLOCK_MONOTONIC."""
        self._words[_UNTIL] = max(0, until_ns)

    def expire(self) -> None:
        """Stop everybody who looks at this page, now."""
        self._words[_UNTIL] = 0

    def close(self) -> None:
        """Expire the page for good (L1) and unmap it."""
        self.expire()
        self._words.release()
        self._map.close()


class Liveness:
    """A child's view of the page. Keep it for the life of the process: it is bound to one node lease."""

    def __init__(
        self, path: Path, incarnation: Incarnation | None = None, clock: MonotonicNs = monotonic_ns
    ) -> None:
        """Map the page at `path`.

        Args     incarnation: of the node lease this process was started under, where it knows it.
        Raises   LeaseLost: there is no page, or it belongs to another lease than `incarnation`.
        """
        self._clock = clock
        try:
            with path.open("rb") as file:
                header = file.read(_HEADER.size)
                self._map = mmap.mmap(file.fileno(), PAGE_SIZE, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise LeaseLost(f"no liveness page at {path} ({error}); is `csvfs node run` running?") from None
        if len(header) != _HEADER.size or header[:8] != PAGE_MAGIC:
            raise LeaseLost(f"{path} is not a liveness page; restart `csvfs node run`")
        self._words = memoryview(self._map).cast("Q")
        if incarnation is not None and self._words[_INCARNATION] != incarnation:
            found = self._words[_INCARNATION]
            raise LeaseLost(f"{path} belongs to node lease {found}, this process to {incarnation}")

    @property
    def incarnation(self) -> Incarnation:
        """Of the node lease this page belongs to."""
        return Incarnation(self._words[_INCARNATION])

    def may_serve(self) -> bool:
        """Whether an answer given now is covered by the node's lease. Less than 1 us: ask before each
        answer."""
        return self._clock() < self._words[_UNTIL]

    @property
    def remaining_ms(self) -> float:
        """How long this node may still serve; 0 when it may not."""
        return max(0, self._words[_UNTIL] - self._clock()) / 1e6


def serve_until_ns(sent_ns: int, lease_ms: int, margin_ms: int) -> int:
    """Until when a heartbeat that was *sent* at `sent_ns` and answered allows serving (CLOCK_MONOTONIC,
    ns)."""
    return sent_ns + (lease_ms - margin_ms) * 1_000_000
