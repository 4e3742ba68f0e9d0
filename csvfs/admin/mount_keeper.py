"""What `csvfs node run` does around a mount process: its mount point before, its FUSE session when it dies.

Place      admin floor, between node_run.py and child.py.
Goes on    A process that dies leaves its session to the next one (mount/held_session.py): programs wait meanwhile, and see
           no error. So it is when the mount was evicted, or the node has lost its lease: the session outlives the lease,
           and the first mount process under the next one goes on, if the coordinator lets it.
Meanwhile  the kernel shows nothing that it has cached (I5): the process saw to that before it ended (lapse.py), or the
           keeper does, as soon as others may be given its leases.
Ends       Where that cannot be: end the session (every request that waits gets an error, also those that a thread of the
           dead process waits for), take back what the kernel has cached of it (I5), and only then start the next one.
           - The kernel cannot ask anew; or the mount said that nobody can go on: it was unmounted, or not let in.
           - Its pages cannot be taken back within TAKE_BACK_S: too many requests wait (mount/page_drop.py).
           - Nobody has gone on for `io_timeout`.
           - TAKEOVERS_MAX processes have died within TAKEOVERS_S: something that the kernel asks kills them.
"""

import logging
from collections.abc import Callable

import trio

from csvfs.admin.child import Child, ChildPlan
from csvfs.admin.cluster_root import ClusterRoot
from csvfs.admin.mount_points import unmount_lazily
from csvfs.clock import monotonic_ns
from csvfs.errors import CsvfsError, Unavailable
from csvfs.ids import Incarnation
from csvfs.mount.held_session import HeldSession

logger = logging.getLogger(__name__)

TAKEOVERS_MAX = 5
TAKEOVERS_S = 30.0
WATCH_S = 0.05
TAKE_BACK_S = 2.0
TAKE_BACK_TURN_S = 4.0  # on a machine that gives its threads few turns
EMPTIED_POLL_S = 0.02
EMPTIED_WAIT_S = 1.0


class MountKeeper:
    """Of one volume; all starts of its mount process, also under later leases of the node."""

    def __init__(self, root: ClusterRoot, volume_name: str, io_timeout_s: float) -> None:
        """io_timeout_s: how long programs may wait for the next process."""
        self._root = root
        self._volume_name = volume_name
        self._io_timeout_s = io_timeout_s
        self._may_serve: Callable[[], bool] = lambda: False
        self._point = root.path / volume_name
        self._session: HeldSession | None = None
        self._orphaned = False  # the session has no process that serves it
        self._shows_nothing = False  # meanwhile: the kernel's caches are empty
        self._waits_until_s = 0.0
        self._covered_until_ns = 0  # as the last process left it
        self._deaths: list[float] = []

    def adapt(self, plan: ChildPlan, may_serve: Callable[[], bool]) -> None:
        """Have the plan's process started and buried as its volume needs it. may_serve: whether the node's lease holds."""
        self._may_serve = may_serve
        environment = plan.environment

        def with_session(incarnation: Incarnation) -> dict[str, str]:
            held = {} if self._session is None else self._session.environment()
            return environment(incarnation) | held

        plan.environment = with_session
        plan.keep = lambda: () if self._session is None else self._session.descriptors
        plan.before, plan.stopped = self._begin, self._stopped
        plan.ahead_of_kill = self._wait_emptied
        plan.lingers = lambda: self._orphaned or not may_serve()

    async def look_after(self, child: Child) -> None:
        """Run the process of the plan until it is stopped; then nothing is left of its session. Cancel: the process is
        killed, and its session waits for the next one."""
        was_stopped = False
        try:
            await child.keep_running()
            was_stopped = True
        finally:
            session = self._session
            if session is not None and session.can_be_taken_over and not was_stopped:
                self._orphan(session)
            else:
                with trio.CancelScope(shield=True):
                    await self.end("the mount has ended")

    async def _begin(self, incarnation: Incarnation) -> None:
        if self._session is not None:
            return  # the next process goes on with it
        unmount_lazily(self._point)  # of an earlier lease, or an earlier `node run`
        self._root.make_point(self._volume_name)
        try:
            self._session = HeldSession()
        except Unavailable as error:  # the mount will say so, too, if it needs one
            logger.warning("volume %s: %s", self._volume_name, error)

    async def _stopped(self, incarnation: Incarnation, status: int | None) -> None:
        """It has died. Cancel: leaves the rest to its thread. Raises Conflict: the kernel does not unmount it."""
        now_s = trio.current_time()
        self._deaths = [*(death for death in self._deaths if death > now_s - TAKEOVERS_S), now_s]
        session = self._session
        if session is None:
            unmount_lazily(self._point)
        elif status == 0 or not session.can_be_taken_over:
            await self.end("nobody can go on with it")
        elif len(self._deaths) > TAKEOVERS_MAX:
            await self.end(f"its last {TAKEOVERS_MAX} processes died within {TAKEOVERS_S:g} s")
        else:
            self._orphan(session)

    def _orphan(self, session: HeldSession) -> None:
        """No process serves it now."""
        if self._orphaned and session.covered_until_ns == self._covered_until_ns:
            return  # nor has one since it was said last
        self._covered_until_ns = session.covered_until_ns
        self._waits_until_s = trio.current_time() + self._io_timeout_s
        self._shows_nothing = session.is_emptied
        self._orphaned = True

    async def _wait_emptied(self) -> None:
        """The node's lease is over, and the process about to be killed: until it has seen to it that the kernel shows
        nothing of before, EMPTIED_WAIT_S at most."""
        with trio.move_on_after(EMPTIED_WAIT_S):
            while self._session is not None and not self._session.is_emptied and not self._may_serve():
                await trio.sleep(EMPTIED_POLL_S)

    async def watch_forever(self) -> None:
        """See to a session without a process. A task, for as long as the keeper is there."""
        while True:
            if self._orphaned and self._session is not None:
                await self._watch(self._session)
            await trio.sleep(WATCH_S)

    async def _watch(self, session: HeldSession) -> None:
        try:
            if session.covered_until_ns != self._covered_until_ns:
                self._orphaned = False  # the next process has heard from the coordinator: it sees to it itself
            elif trio.current_time() >= self._waits_until_s:
                await self.end(f"nobody has gone on with it for {self._io_timeout_s:g} s: its programs get errors")
            elif not self._shows_nothing and (monotonic_ns() >= self._covered_until_ns or not self._may_serve()):
                await self._take_back(session)
        except CsvfsError as error:
            logger.error("%s", error)

    async def _take_back(self, session: HeldSession) -> None:
        """Others may be given its leases from now on."""
        with trio.move_on_after(TAKE_BACK_TURN_S):
            drop = session.drop_pages
            if await trio.to_thread.run_sync(drop, TAKE_BACK_S, abandon_on_cancel=True):
                self._shows_nothing = True
                return
        if self._session is session and session.covered_until_ns == self._covered_until_ns:
            await self.end("what the kernel has cached of it cannot be taken back while requests wait")

    async def end(self, reason: str) -> None:
        """Cancel: leaves the rest to its thread. Raises Conflict: the kernel does not unmount it."""
        session, self._session = self._session, None
        self._orphaned = False
        if session is None:
            return
        logger.info("the FUSE session of volume %s ends: %s", self._volume_name, reason)
        try:
            unmount_lazily(self._point)
        finally:
            await trio.to_thread.run_sync(session.drop_pages_and_close, abandon_on_cancel=True)
