"""The event queue: what happens at which simulated instant outside of trio's tasks.

Place      simulator, above clock.py. Frames on their way are events: a task and a timer for each would cost ten
           times as much.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

import trio

from tests.simulator.clock import Event, SimClock


class EventQueue:
    """Run `run_forever` as a task: events are carried out in it, in the order of their times."""

    def __init__(self, clock: SimClock) -> None:
        self._clock = clock
        self._heap: list[Event] = []
        self._number = 0
        self._task: trio.lowlevel.Task | None = None
        clock.next_due = self.next_due
        clock.wake = self.wake

    def at(self, due: float, action: Callable[[], None]) -> None:
        """Have `action()` carried out at `due`; events of one instant in the order of these calls."""
        self._number += 1
        heapq.heappush(self._heap, (due, self._number, action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self._clock.now + delay_s, action)

    async def sleep(self, delay_s: float) -> None:
        """As trio.sleep, at a third of its cost: no scope, no cancellation."""
        task = trio.lowlevel.current_task()
        waiting = True

        def go_on() -> None:
            if waiting:
                trio.lowlevel.reschedule(task)

        def abort(raise_cancel: object) -> trio.lowlevel.Abort:
            nonlocal waiting
            waiting = False
            return trio.lowlevel.Abort.SUCCEEDED

        self.after(delay_s, go_on)
        await trio.lowlevel.wait_task_rescheduled(abort)
        waiting = False

    def next_due(self) -> float:
        # Without its task (the run is over) nothing of it will happen any more.
        return self._heap[0][0] if self._heap and self._task is not None else math.inf

    def wake(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    async def run_forever(self) -> None:
        heap = self._heap
        while True:
            while heap and heap[0][0] <= self._clock.now:
                heapq.heappop(heap)[2]()
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, raise_cancel: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
