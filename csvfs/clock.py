"""Monotonic time, as a value that can be replaced in tests. Ground floor.

No decision of csvfs uses the wall clock (I5); it appears only in time stamps of files and in messages.
"""

import time
from collections.abc import Callable

MonotonicNs = Callable[[], int]


def monotonic_ns() -> int:
    """CLOCK_MONOTONIC: the same for all processes of one machine."""
    return time.monotonic_ns()
