"""The simulated clock: time stands still while anything runs, and jumps to whatever comes next.

Place      simulator, lowest. trio asks it how long to sleep; it answers "not at all" and moves on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

START_S = 1000.0
Event = tuple[float, int, Callable[[], None]]


class SimClock(trio.abc.Clock):
    """`next_due` and `wake` are those of the event queue (events.py): it shares the clock with trio's timers."""

    def __init__(self) -> None:
        self.now = START_S
        self.next_due: Callable[[], float] = lambda: math.inf
        self.wake: Callable[[], None] = lambda: None

    def start_clock(self) -> None:
        """Nothing to start."""

    def current_time(self) -> float:
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """No task can run before `deadline`: go there, or to the next event of the queue if that is earlier."""
        if deadline <= self.now:
            return 0
        due = self.next_due()
        if due <= deadline and due < math.inf:
            self.now = max(self.now, due)
            self.wake()
        elif deadline < math.inf:
            self.now = deadline
        return 0
