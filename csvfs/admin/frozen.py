"""Frozen: whether a process has been stopped for too long (SIGSTOP, SIGTSTP, a debugger), and what is done about it.

Place      admin floor, below child.py: of each child of `csvfs node run`.
Why        A process that is stopped holds what it has: a coordinator host its volumes, a mount its leases, while the
           kernel goes on showing programs of its node what it has cached of that mount (I5). No connection breaks, and
           the node's lease goes on. So its parent replaces it. A mount has to be gone before its leases can have passed
           on, CONTACT_S_MAX of coordinator/eviction.py after the last answer.
Evidence   The kernel says `stopped` or `traced`, at each look, and the process has not run for a nanosecond since the
           look before. Neither a missing heartbeat nor CPU time says so: on a busy machine a healthy process may get no
           turn for seconds.
Own sleep  A parent that was stopped itself, or had no turn, has not seen what was in between: a step from look to look
           counts STEP_S_MAX at most. So children that were stopped and continued together with it are let be.
Not seen   what stands still without being stopped: a frozen cgroup, a suspended machine, one that waits in the kernel
           (child.py, "Hangs").
"""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import trio

LOOK_S = 0.2
STEP_S_MAX = 2 * LOOK_S
_STOPPED = ("T", "t")  # stopped by a signal, by a tracer


@dataclass(slots=True, frozen=True)
class Look:
    """What was seen of a process. `ran_ns`: how long its first thread has run in all."""

    now_s: float
    stopped: bool
    ran_ns: int


class Stillness:
    """For how long a process has been stopped. Pure."""

    def __init__(self) -> None:
        self._last: Look | None = None
        self.stopped_s = 0.0

    def add(self, look: Look) -> float:
        """For how long, as of this look."""
        last, self._last = self._last, look
        if last is not None and last.stopped and look.stopped and last.ran_ns == look.ran_ns:
            self.stopped_s += min(look.now_s - last.now_s, STEP_S_MAX)
        else:
            self.stopped_s = 0.0
        return self.stopped_s


def look_at(pid: int, now_s: float) -> Look:
    """Look at a child of ours. One that has ended is not stopped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        if state not in _STOPPED:
            return Look(now_s, False, 0)
        return Look(now_s, True, int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]))
    except OSError:
        return Look(now_s, False, 0)


async def kill_when_frozen(pid: int, limit_s: float) -> float:
    """Kill our child `pid` when it has been stopped for `limit_s`; returns for how long it had been.

    It must not be reaped while this runs. Cancel: safe.
    """
    stillness = Stillness()
    while (stopped_s := stillness.add(look_at(pid, trio.current_time()))) < limit_s:
        await trio.sleep(LOOK_S)
    os.kill(pid, signal.SIGKILL)
    return stopped_s
