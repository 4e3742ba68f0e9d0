"""The event queue: what happens at which simulated instant outside of trio's tasks.

Place      simulator, above clock.py. Frames on their way are events, and events are carried out by the clock, when
           trio has nothing to run: a task, a timer and a turn of trio's loop for each would cost ten times as much.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any

import trio
from trio._core._run import GLOBAL_RUN_CONTEXT

from tests.simulator.clock import Event, SimClock

_sleep = trio.sleep


class _Sleeper:
    """A task in EventQueue.sleep."""

    __slots__ = ("task",)

    def __init__(self, task: trio.lowlevel.Task) -> None:
        self.task: trio.lowlevel.Task | None = task

    def go_on(self) -> None:
        if self.task is not None:
            trio.lowlevel.reschedule(self.task)

    def abort(self, raise_cancel: object) -> trio.lowlevel.Abort:
        self.task = None
        return trio.lowlevel.Abort.SUCCEEDED


class EventQueue:
    """Events are carried out while `run_forever` runs, in the order of their times; it raises what they raise."""

    def __init__(self, clock: SimClock) -> None:
        self._clock = clock
        self._heap: list[Event] = []
        self._number = 0
        self._task: trio.lowlevel.Task | None = None
        self._error: BaseException | None = None
        clock.advance = self.advance

    def at(self, due: float, action: Callable[[], None]) -> None:
        """Have `action()` carried out at `due`; events of one instant in the order of these calls."""
        self._number += 1
        heapq.heappush(self._heap, (due, self._number, action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._heap, (self._clock.now + delay_s, self._number, action))

    async def sleep(self, delay_s: float) -> None:
        """As trio.sleep, at a third of its cost: no scope, no deadline."""
        if self._task is None:  # the run is over, or has not begun
            await _sleep(delay_s)
            return
        sleeper = _Sleeper(trio.lowlevel.current_task())
        self._number += 1
        heapq.heappush(self._heap, (self._clock.now + delay_s, self._number, sleeper.go_on))
        await trio.lowlevel.wait_task_rescheduled(sleeper.abort)
        sleeper.task = None

    def advance(self, deadline: float) -> None:
        """Go to `deadline`, trio's next timer, or as far as to an event that gives a task something to do."""
        clock, heap = self._clock, self._heap
        runner: Any = GLOBAL_RUN_CONTEXT.runner
        while heap and heap[0][0] <= deadline:
            due, _, action = heapq.heappop(heap)
            if self._task is None and not isinstance(getattr(action, "__self__", None), _Sleeper):
                continue  # The run is over: nothing of it will happen any more, but that its tasks end.
            if due > clock.now:
                clock.now = due
            try:
                action()
            except BaseException as error:
                self._error = error
                trio.lowlevel.reschedule(self._task)
                self._task = None
            if runner.runq:
                return
            deadline = runner.deadlines.next_deadline()  # the event may have set an earlier one
        if deadline < math.inf:
            clock.now = max(clock.now, deadline)

    async def run_forever(self) -> None:
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort)
        assert self._error is not None
        raise self._error

    def _abort(self, raise_cancel: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
