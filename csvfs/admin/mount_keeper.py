"""What `csvfs node run` does around a mount process: its mount point before, its FUSE session when it dies.

Place      admin floor, between node_run.py and child.py.
Goes on    A process that dies leaves its session to the next one (mount/held_session.py): programs wait meanwhile, and see
           no error.
Ends       Where that cannot be: end the session (every request that waits gets an error, also those that a thread of the
           dead process waits for), take back what the kernel has cached of it (I5), and only then start the next one.
           - The kernel cannot ask anew; or the mount said that nobody can go on, for it was evicted or unmounted.
           - Nobody has gone on before others may be given its leases (`_watch_forever`).
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


class MountKeeper:
    """Of one volume; all starts of its mount process under one lease of the node."""

    def __init__(self, root: ClusterRoot, volume_name: str, may_serve: Callable[[], bool]) -> None:
        """may_serve: whether the node's lease holds."""
        self._root = root
        self._volume_name = volume_name
        self._may_serve = may_serve
        self._point = root.path / volume_name
        self._session: HeldSession | None = None
        self._orphaned = False  # the session has no process that serves it
        self._death = trio.Event()  # set when that begins
        self._covered_until_ns = 0  # as the last process left it
        self._deaths: list[float] = []

    def adapt(self, plan: ChildPlan) -> None:
        """Have the plan's process started and buried as its volume needs it."""
        environment = plan.environment

        def with_session(incarnation: Incarnation) -> dict[str, str]:
            held = {} if self._session is None else self._session.environment()
            return environment(incarnation) | held

        plan.environment = with_session
        plan.keep = lambda: () if self._session is None else self._session.descriptors
        plan.before, plan.stopped, plan.after = self._begin, self._stopped, self._after
        plan.lingers = lambda: self._orphaned

    async def look_after(self, child: Child) -> None:
        """Run the process of the plan until it is stopped; then nothing is left of its session. Cancel: likewise."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_forever)
                await child.keep_running()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._end("the mount has ended")

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
            await self._end("nobody can go on with it")
        elif len(self._deaths) > TAKEOVERS_MAX:
            await self._end(f"its last {TAKEOVERS_MAX} processes died within {TAKEOVERS_S:g} s")
        elif not self._orphaned:
            self._covered_until_ns = session.covered_until_ns
            self._orphaned = True
            self._death.set()

    async def _after(self, incarnation: Incarnation) -> None:
        if not self._orphaned:  # it was asked to end, or has been seen to above
            await self._end("its process has ended")

    async def _watch_forever(self) -> None:
        while True:
            await self._death.wait()
            self._death = trio.Event()
            while self._orphaned and self._session is not None:
                await self._watch(self._session)
                await trio.sleep(WATCH_S)

    async def _watch(self, session: HeldSession) -> None:
        if session.covered_until_ns != self._covered_until_ns:
            self._orphaned = False  # the next process has heard from the coordinator: it sees to it itself
        elif monotonic_ns() >= self._covered_until_ns or not self._may_serve():
            try:
                await self._end("nobody has gone on with it in time")
            except CsvfsError as error:
                logger.error("%s", error)

    async def _end(self, reason: str) -> None:
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
