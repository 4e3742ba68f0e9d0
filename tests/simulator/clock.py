"""The simulated clock: time stands still while anything runs, and jumps to whatever comes next.

Place      simulator, lowest. trio asks it how long to sleep; it answers "not at all" and moves on.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

START_S = 1000.0
Event = tuple[float, int, Callable[[], None]]


class SimClock(trio.abc.Clock):
    """`advance(deadline)` is that of the event queue (events.py): it shares the clock with trio's timers."""

    def __init__(self) -> None:
        self.now = START_S
        self.advance: Callable[[float], None] = self._jump

    def start_clock(self) -> None:
        """Nothing to start."""

    def current_time(self) -> float:
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """No task can run before `deadline`: go there, or to events of the queue that come earlier."""
        if deadline > self.now:
            self.advance(deadline)
        return 0

    def _jump(self, deadline: float) -> None:
        self.now = deadline
