"""Processes that stand still: while one is stopped, no task of it runs, whatever it waits for comes due, and its clock
goes on. When it goes on, all that has come due runs at once, in that order: it still believes what it believed.

Place      simulator, above clock.py. A task belongs to the process of the nursery it was started in.
How        trio puts a task that may run into its run queue in one place; those of a stopped process are put aside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import Context, ContextVar, copy_context
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import trio._core._run as trio_run

if TYPE_CHECKING:
    from tests.simulator.process import Process

OWNER: ContextVar[Process | None] = ContextVar("process", default=None)

_STOPPED: dict[Process, None] = {}  # of the run; empty most of the time, and then nothing is looked up
_reschedule = trio_run.Runner.reschedule
_spawn = trio_run.Runner.spawn_impl


def context_of(process: Process) -> Context:
    """For what the system has a process do outside of its tasks."""
    context = copy_context()
    context.run(OWNER.set, process)
    return context


def stand_still(process: Process) -> None:
    """It is stopped."""
    _STOPPED[process] = None


def go_on(process: Process) -> None:
    """It is not stopped any more: what was put aside may run."""
    _STOPPED.pop(process, None)
    due, process.put_aside = process.put_aside, []
    trio_run.GLOBAL_RUN_CONTEXT.runner.runq.extend(due)


def _put_aside(self: Any, task: Any, *send: Any) -> None:
    _reschedule(self, task, *send)
    if _STOPPED:
        process = task.context.get(OWNER)
        if process in _STOPPED and process.paused and process.alive:
            process.put_aside.append(self.runq.pop())


def _spawn_as_child(self: Any, async_fn: Any, args: Any, nursery: Any, name: Any, **more: Any) -> Any:
    if nursery is not None and more.get("context") is None:  # started by an event, which has no process
        more["context"] = nursery._parent_task.context.copy()
    return _spawn(self, async_fn, args, nursery, name, **more)


@contextmanager
def installed() -> Iterator[None]:
    """Have stopped processes stand still, for a run."""
    _STOPPED.clear()
    with ExitStack() as stack:
        stack.enter_context(patch.object(trio_run.Runner, "reschedule", _put_aside))
        stack.enter_context(patch.object(trio_run.Runner, "spawn_impl", _spawn_as_child))
        yield
