"""The loop that runs a simulation's tasks: trio's own Runner, without what a simulation has no use for.

Place      simulator, above clock.py. trio's loop asks instruments, the operating system and the signal machinery before
           each batch of tasks; there are some 300 batches in a simulated second, of one task as a rule.
Equal      batches, the order within one, deadlines, cancellation: a run is the same, event for event, with trio's loop.
Not        instruments, guest mode, wait_all_tasks_blocked, descriptors but that by which trio wakes itself.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import trio._core._run as trio_run
from outcome import Error, Outcome, Value
from trio._core._run import GLOBAL_RUN_CONTEXT
from trio._core._traps import CancelShieldedCheckpoint, WaitTaskRescheduled


def run_tasks(
    runner: Any, main: Callable[..., Awaitable[object]], args: tuple[Any, ...], _is_guest: bool = False
) -> Generator[float, Any, None]:
    """In place of trio._core._run.unrolled_run, for the span of a run."""
    tasks, run_queue, deadlines, clock = runner.tasks, runner.runq, runner.deadlines, runner.clock
    stuck = ""
    try:
        clock.start_clock()
        runner.init_task = runner.spawn_impl(runner.init, (main, args), None, "<init>", system_task=True)
        while tasks:
            if not run_queue:
                clock.deadline_to_sleep_time(deadlines.next_deadline())
                if not run_queue and deadlines.next_deadline() == math.inf and not runner.entry_queue.size():
                    stuck = _end_stuck(runner, stuck)
            if runner.entry_queue.size():
                runner.io_manager.process_events((yield 0))
            heap = deadlines._heap
            if heap and heap[0][0] <= clock.now:
                deadlines.expire(clock.now)
            batch = list(run_queue)
            run_queue.clear()
            if len(batch) > 1:  # else nothing is drawn
                batch.sort(key=_number)
                trio_run._r.shuffle(batch)
            while batch:
                _step(runner, batch.pop())
            GLOBAL_RUN_CONTEXT.task = None
            del GLOBAL_RUN_CONTEXT.task
        if stuck:
            raise RuntimeError(stuck)
    finally:
        runner.close()
        GLOBAL_RUN_CONTEXT.__dict__.clear()
        if runner.ki_pending:
            runner.main_task_outcome = Error(KeyboardInterrupt())


def _end_stuck(runner: Any, stuck: str) -> str:
    """Cancel the run, in which no task can go on any more. What is wrong. Raises RuntimeError: that did not help."""
    if stuck:
        raise RuntimeError(stuck)
    runner.main_task.parent_nursery.cancel_scope.cancel()
    return f"nothing will ever wake these: {', '.join(task.name for task in runner.tasks)}"


def _number(task: Any) -> int:
    number: int = task._counter
    return number


def _step(runner: Any, task: Any) -> None:
    """Let a task run to where it waits next, or ends."""
    GLOBAL_RUN_CONTEXT.task = task
    go_on, value = task._next_send_fn, task._next_send
    task._next_send_fn = task._next_send = None
    ended: Outcome[object]
    try:
        trap = task.context.run(go_on, value)
    except StopIteration as stop:
        ended = Value(stop.value)
    except BaseException as error:
        ended = Error(error)
    else:
        if type(trap) is WaitTaskRescheduled:
            task._abort_func = trap.abort_func
            if runner.ki_pending and task is runner.main_task:
                task._attempt_delivery_of_pending_ki()
            if task._cancel_status.effectively_cancelled:
                task._attempt_delivery_of_any_pending_cancel()
        else:
            assert trap is CancelShieldedCheckpoint, trap
            runner.reschedule(task)
        return
    runner.task_exited(task, ended)  # not where it is handled: that would be its context
