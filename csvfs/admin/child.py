"""A child process of `csvfs node run`: started, seen dying at once, buried, started again.

Place      admin floor, below node_run.py.
Limits     A child that dies is started again at once, then after 100, 200, 400 ms ... up to
           restart_backoff_max_ms; not if it ran for longer than that by RAN_LONGER_S. One that ran for RAN_WELL_S starts
           from the beginning again.
Why Popen  `trio.run_process` forks in a worker thread, and PR_SET_PDEATHSIG fires when the *thread* that
           forked ends; so children are forked here, in the main thread, and waited for by pidfd.
Hangs      A child that has begun to beat (cluster/node_process.py) and has not for `hang_s` is killed: its thread hangs
           in the kernel, most likely because a drive does. It may be there for as long as the drive hangs; its
           successor is started all the same, and copes with what it holds (block/in_use.py, block/drive_server.py).
Frozen     A child that has been stopped (SIGSTOP, a debugger) for `frozen_s` is killed: frozen.py.
"""

import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from csvfs.admin import child_exec
from csvfs.admin.frozen import kill_when_frozen
from csvfs.cluster.node_process import BEAT_ENVIRONMENT
from csvfs.errors import CsvfsError
from csvfs.ids import Incarnation

logger = logging.getLogger(__name__)
RAN_WELL_S = 10.0
RAN_LONGER_S = 1.0
BACKOFF_FIRST_S = 0.1
HANG_S = 10.0
FROZEN_S = 1.5
STOPPED_POLL_S = 0.25
KILL_WAIT_S = 5.0  # a killed process that is still there after this long hangs in the kernel


async def _nothing(incarnation: Incarnation) -> None:
    pass


async def _no_wait() -> None:
    pass


async def _nothing_yet(incarnation: Incarnation, status: int | None) -> None:
    pass


@dataclass(slots=True)
class ChildPlan:
    """What to start, and what to do around it."""

    role: str  # `drives`, `coordinator`, `mount-<Volume>`: names the log
    argv: list[str]  # argv[0] is an absolute path
    environment: Callable[[Incarnation], dict[str, str]]
    next_incarnation: Callable[[], Awaitable[Incarnation]]
    log_path: Path
    backoff_max_s: float
    hang_s: float = HANG_S
    frozen_s: float = FROZEN_S
    keep: Callable[[], tuple[int, ...]] = tuple  # descriptors that it inherits, asked for at each start
    before: Callable[[Incarnation], Awaitable[None]] = _nothing  # ahead of each start
    # It runs no more, and was not asked to end: its status, below 0 for a signal; None: a thread hangs in the kernel.
    stopped: Callable[[Incarnation, int | None], Awaitable[None]] = _nothing_yet
    ahead_of_kill: Callable[[], Awaitable[None]] = _no_wait  # what a child that was not asked to end is waited for
    lingers: Callable[[], bool] = lambda: False  # whether what hangs in the kernel waits for the next process to serve
    after: Callable[[Incarnation], Awaitable[None]] = _nothing  # as soon as it is dead, before the next start


class Child:
    """One role of a node. `keep_running` is its task."""

    def __init__(self, plan: ChildPlan) -> None:
        self.plan = plan
        self.pid = 0  # 0: not running now
        self._process: subprocess.Popen[bytes] | None = None
        self._scope = trio.CancelScope()
        self._grace_s = 0.0
        self._ended = trio.Event()

    async def keep_running(self) -> None:
        """Run until `stop` or cancelled; when cancelled the process is killed first."""
        try:
            with self._scope:
                await self._run_forever()
        finally:
            self._ended.set()

    async def stop(self, grace_s: float) -> None:
        """Ask it to end (SIGTERM), kill it after `grace_s`, and wait until it is dead and buried."""
        self._grace_s = grace_s
        self._scope.cancel()
        await self._ended.wait()

    async def _run_forever(self) -> None:
        backoff_s = 0.0
        while True:
            incarnation = await self.plan.next_incarnation()
            started = trio.current_time()
            try:
                await self.plan.before(incarnation)
                reason = await self._run_once(incarnation)
            except (OSError, CsvfsError) as error:
                reason = f"failed: {error}"
            ran_s = trio.current_time() - started
            if ran_s >= RAN_WELL_S:
                backoff_s = 0.0
            wait_s = backoff_s if ran_s < backoff_s + RAN_LONGER_S else 0.0
            logger.warning("%s %s; starting it again in %.0f ms", self.plan.role, reason, wait_s * 1000)
            await trio.sleep(wait_s)
            backoff_s = min(max(BACKOFF_FIRST_S, 2 * backoff_s), self.plan.backoff_max_s)

    async def _run_once(self, incarnation: Incarnation) -> str:
        """Start it and wait for its death, see to its burial; returns how it ended, in words."""
        beats, process = self._spawn(incarnation)
        self._process, self.pid = process, process.pid
        logger.info("%s started, pid %d, incarnation %d", self.plan.role, process.pid, incarnation)
        failure: OSError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_when_it_hangs, beats, nursery.cancel_scope)
                nursery.start_soon(self._kill_when_frozen)
                try:
                    await wait_stopped(process)
                except OSError as error:
                    failure = error  # carried out of the nursery, which would wrap it in a group
                nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True), trio.move_on_after(KILL_WAIT_S):
                await self.plan.stopped(incarnation, process.returncode)
        finally:
            os.close(beats)
            with trio.CancelScope(shield=True):
                await self._end(process)
            self._process, self.pid = None, 0
            with trio.CancelScope(shield=True), trio.move_on_after(KILL_WAIT_S):
                await self.plan.after(incarnation)
        if failure is not None:
            raise failure
        code = process.returncode
        if code is None:
            return f"(pid {process.pid}) hangs in the kernel"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return f"(pid {process.pid}) {how}"

    def _spawn(self, incarnation: Incarnation) -> tuple[int, subprocess.Popen[bytes]]:
        """The end of a pipe that its beats come out of, and the process."""
        beats, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            environment = self.plan.environment(incarnation) | {BEAT_ENVIRONMENT: str(theirs)}
            return beats, spawn(self.plan.argv, environment, self.plan.log_path, keep=(theirs, *self.plan.keep()))
        except BaseException:
            os.close(beats)
            raise
        finally:
            os.close(theirs)

    async def _end_when_it_hangs(self, beats: int, scope: trio.CancelScope) -> None:
        """Cancel `scope` when no beat has come for hang_s since the last one. One that never beats is let be."""
        patience_s = math.inf
        while True:
            with trio.move_on_after(patience_s):
                await trio.lowlevel.wait_readable(beats)
            try:
                if not os.read(beats, 4096):
                    return  # it has ended, or closed the pipe
            except BlockingIOError:
                logger.error("%s (pid %d) hangs: no beat for %.0f s", self.plan.role, self.pid, patience_s)
                scope.cancel()
                return
            patience_s = self.plan.hang_s

    async def _kill_when_frozen(self) -> None:
        stopped_s = await kill_when_frozen(self.pid, self.plan.frozen_s)
        logger.error("%s (pid %d) was stopped for %.1f s: it is killed", self.plan.role, self.pid, stopped_s)

    async def _end(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None and self._grace_s > 0:
            process.terminate()
            with trio.move_on_after(self._grace_s):
                await wait_dead(process)
        elif process.poll() is None:
            await self.plan.ahead_of_kill()
        # The whole process group, also when the child itself is dead: what it started must not outlive it.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        lingers = self.plan.lingers()
        with trio.move_on_after(KILL_WAIT_S) as waiting:
            await (wait_stopped(process) if lingers else wait_dead(process))
        if waiting.cancelled_caught and not lingers:
            logger.error("%s (pid %d) was killed but does not die", self.plan.role, process.pid)


def spawn(
    argv: list[str], environment: dict[str, str], log_path: Path, *, keep: tuple[int, ...] = ()
) -> subprocess.Popen[bytes]:
    """Start a process of its own session that dies with this one; both its outputs go to `log_path`.

    Args     keep: descriptors that it inherits.
    Raises   OSError. Call it from the main thread.
    """
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", child_exec.__file__, str(os.getpid()), *argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd="/",
            start_new_session=True,
            pass_fds=keep,
        )
    finally:
        os.close(log)


async def wait_dead(process: subprocess.Popen[bytes]) -> None:
    """Wait until the process has ended, and reap it. Cancel: safe."""
    await trio.lowlevel.checkpoint()
    if process.poll() is not None:
        return
    descriptor = os.pidfd_open(process.pid)  # ours and not reaped, so the pid is still its own
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)
    process.poll()


async def wait_stopped(process: subprocess.Popen[bytes]) -> None:
    """Wait until the process has ended, or runs no more while a thread of it hangs in the kernel. Cancel: safe.

    A mount that is killed while it takes pages back from the kernel is such a one: that thread waits for a page which
    only an answer of this same mount would unlock, so it ends when somebody ends the mount, and not before. A pidfd
    says nothing until all threads are gone (not even one of the first thread alone, since Linux 6.15), so we look.
    """
    while not _is_zombie(process.pid):
        with trio.move_on_after(STOPPED_POLL_S):
            await wait_dead(process)
            return
    process.poll()


def _is_zombie(pid: int) -> bool:
    """Whether the first thread of our child, which is not reaped yet, has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False  # reaped: wait_dead sees it
    return stat.rpartition(")")[2].split()[0] == "Z"


def bound_log(path: Path, size_max: int) -> None:
    """Roll a log over to `<name>.1` when it is larger than `size_max` bytes.

    By copy and truncation: the writer keeps its descriptor, and O_APPEND makes it go on at the new end. What
    it writes between the two is lost.
    """
    try:
        if path.stat().st_size <= size_max:
            return
        with path.open("rb") as source, path.with_name(path.name + ".1").open("wb") as target:
            source.seek(-size_max, os.SEEK_END)
            target.write(source.read(size_max))
        os.truncate(path, 0)
    except FileNotFoundError:
        pass
