"""The way from a mount to its volume's coordinator: straight, or by a detour (net/detours.py).

Place      mount floor, under session.py, which opens its links here and knows nothing of ways.
Return     The session's link is closed when the straight path works again and no call is under way on it: the session
           opens the next one at once. Where calls are under way all the time, HURRY_S later all the same: they are sent
           again with their numbers, as after every loss of a link (I11).
"""

import logging

import trio

from csvfs.errors import CsvfsError, Disconnected
from csvfs.mount.owner import VolumeOwner
from csvfs.net.detours import COORDINATOR, Paths
from csvfs.net.link import Address, Link

log = logging.getLogger(__name__)

RETURN_INTERVAL_S = 2.0
REST_LOOKS = 50  # for a moment without calls, REST_LOOK_S apart
REST_LOOK_S = 0.01
HURRY_S = 30.0


class CoordinatorPath:
    """`connect_timeout_s`: by whatever path."""

    def __init__(self, paths: Paths, owner: VolumeOwner, *, connect_timeout_s: float) -> None:
        self._paths = paths
        self._owner = owner
        self._connect_timeout_s = connect_timeout_s
        self._link: Link | None = None

    async def connect(self, address: Address) -> Link:
        """Of Session. Raises as net.link.connect. Cancel safe."""
        link = await self._paths.connect(
            address, node=self._owner.node, service=COORDINATOR, timeout_s=self._connect_timeout_s
        )
        if link.via:
            log.warning("the coordinator on node %s is reached through node %s only", self._owner.node, link.via)
        self._link = link
        return link

    def detour(self) -> tuple[str, str, str] | None:
        """The coordinator's node, the one in between, and why; None: the straight path is used, or none."""
        link = self._link
        if link is None or link.closed is not None or not link.via:
            return None
        return self._owner.node, link.via, self._paths.why(self._owner.node)

    async def return_forever(self) -> None:
        """Back to the straight path when it works again, until cancelled."""
        works_s = None  # since when it works, and calls were under way
        while True:
            await trio.sleep(RETURN_INTERVAL_S)
            link = self._link
            if link is None or self.detour() is None or not await self._straight_works():
                works_s = None
                continue
            if works_s is None:
                works_s = trio.current_time()
            is_hurried = trio.current_time() - works_s > HURRY_S
            if await _rests(link) or is_hurried:
                link.close(Disconnected("the coordinator is reached by the straight path again"))
                works_s = None

    async def _straight_works(self) -> bool:
        address = self._owner.address()
        if address is None:
            return False
        try:
            link = await self._paths.connect_straight(
                address, node=self._owner.node, timeout_s=self._connect_timeout_s
            )
        except CsvfsError:
            return False
        link.close()
        return True


async def _rests(link: Link) -> bool:
    for _ in range(REST_LOOKS):
        if not link.waiting_count:
            return True
        await trio.sleep(REST_LOOK_S)
    return False
