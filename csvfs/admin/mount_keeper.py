"""What `csvfs node run` does around a mount process: its mount point before, and what is left of it afterwards.

Place      admin floor, between node_run.py and child.py.
Order      As soon as the process runs no more: end its session (every request that waits gets an error, also those
           that a thread of the dead process waits for), take back what the kernel has cached of it (I5;
           mount/held_session.py), and only then bury it and start the next one.
"""

import logging

import trio

from csvfs.admin.child import ChildPlan
from csvfs.admin.cluster_root import ClusterRoot
from csvfs.admin.mount_points import unmount_lazily
from csvfs.errors import Unavailable
from csvfs.ids import Incarnation
from csvfs.mount.held_session import HeldSession

logger = logging.getLogger(__name__)


class MountKeeper:
    """Of one volume; all starts of its mount process."""

    def __init__(self, root: ClusterRoot, volume_name: str) -> None:
        self._root = root
        self._volume_name = volume_name
        self._point = root.path / volume_name
        self._session: HeldSession | None = None

    def look_after(self, plan: ChildPlan) -> None:
        """Have the plan's process started and buried as its volume needs it."""
        environment = plan.environment

        def with_session(incarnation: Incarnation) -> dict[str, str]:
            held = {} if self._session is None else self._session.environment()
            return environment(incarnation) | held

        plan.environment = with_session
        plan.keep = lambda: () if self._session is None else self._session.descriptors
        plan.before, plan.stopped, plan.after = self._begin, self._end, self._end

    async def _begin(self, incarnation: Incarnation) -> None:
        await self._end(incarnation)
        self._root.make_point(self._volume_name)
        try:
            self._session = HeldSession()
        except Unavailable as error:  # the mount will say so, too, if it needs one
            logger.warning("volume %s: %s", self._volume_name, error)

    async def _end(self, incarnation: Incarnation) -> None:
        """Cancel: leaves the rest to its thread. Raises Conflict: the kernel does not unmount it."""
        session, self._session = self._session, None
        try:
            unmount_lazily(self._point)
        finally:
            if session is not None:
                await trio.to_thread.run_sync(session.drop_pages_and_close, abandon_on_cancel=True)
