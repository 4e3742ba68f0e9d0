"""Paths to processes of other nodes: straight, or by a detour through another node's drive server.

Place      net floor, over link.py; the other side is tunnels.py. PROTOCOL.md, "Detours".
Who knows  the node in between that a node of the cluster asks for it; the node at the end who comes, by the same
           handshake as on the straight path: it is TLS from end to end, and the tunnel carries what it cannot read.
When       the straight path has given no connection for DETOUR_AFTER_S, counted from its first failure in a row. One
           that is refused at once breaks nothing off: somebody is there to refuse, so the process is gone, not the path.
Limits     all within the caller's time-out; at most WAYPOINTS_TRIED_MAX nodes are asked, DETOUR_AFTER_S apart.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from csvfs.errors import CsvfsError, Disconnected, TimedOut, Unavailable
from csvfs.net.engine import Engine
from csvfs.net.handshakes import shake_hands
from csvfs.net.link import Address, Link, connect
from csvfs.net.refusals import Refused

log = logging.getLogger(__name__)

DETOUR_AFTER_S = 0.5
FORGET_S = 30.0  # a failure of the straight path longer ago says nothing about now
WAYPOINTS_TRIED_MAX = 3
DRIVES = "drives"  # services of a node, as the call `via` names them
COORDINATOR = "coordinator"
SERVICES = (DRIVES, COORDINATOR)


@dataclass(slots=True, frozen=True)
class Waypoint:
    """A drive server that may pass on to others."""

    node: str
    address: str
    port: int


# Those there are now, as the cluster store says.
Waypoints = Callable[[], Awaitable[Sequence[Waypoint]]]
Attempt = Callable[[], Awaitable[Link]]


class Straight:
    """What is known of the straight path to one node. Pure: seconds of any one clock.

    since_s    of the first failure in a row; None: the last try went well, or there was none.
    """

    __slots__ = ("failed_s", "since_s", "why")

    def __init__(self) -> None:
        self.since_s: float | None = None
        self.failed_s = 0.0
        self.why = ""

    def failed(self, began_s: float, now_s: float, why: str) -> None:
        """A try that began at `began_s` came to nothing."""
        if self.since_s is None or now_s - self.failed_s > FORGET_S:
            self.since_s = began_s
        self.failed_s, self.why = now_s, why

    def works(self) -> None:
        self.since_s, self.why = None, ""

    def patience_s(self, now_s: float) -> float:
        """How long a try that begins now is waited for before a detour is begun beside it."""
        if self.since_s is None or now_s - self.failed_s > FORGET_S:
            return DETOUR_AFTER_S
        return max(0.0, self.since_s + DETOUR_AFTER_S - now_s)


class Paths:
    """How this process reaches the others. One per process: what one link found out, the next one knows."""

    def __init__(self, engine: Engine, waypoints: Waypoints, *, cluster: bytes, node: str) -> None:
        """`node`: this one, which is no detour to anywhere."""
        self._engine = engine
        self._waypoints = waypoints
        self._cluster = cluster
        self._node = node
        self._straight: dict[str, Straight] = {}
        self._last_waypoint: dict[str, str] = {}

    def why(self, node: str) -> str:
        """Why the straight path to `node` was given up; empty: it works, as far as is known."""
        known = self._straight.get(node)
        return known.why if known is not None else ""

    async def connect(self, address: Address, *, node: str, service: str, timeout_s: float) -> Link:
        """A link to a service of `node`, which listens at `address`; `via` of the link says by which path.

        Raises   as net.link.connect. Cancel safe.
        """
        if node == self._node:
            return await self.connect_straight(address, node=node, timeout_s=timeout_s)
        known = self._straight.setdefault(node, Straight())
        patience_s = known.patience_s(trio.current_time())

        async def go_straight() -> Link:
            return await self.connect_straight(address, node=node, timeout_s=timeout_s)

        async def find_detours() -> list[Attempt]:
            waypoints = [waypoint for waypoint in await self._waypoints() if waypoint.node not in (node, self._node)]
            waypoints.sort(key=lambda waypoint: (waypoint.node != self._last_waypoint.get(node), waypoint.node))
            return [self._detour(waypoint, node, service, timeout_s) for waypoint in waypoints[:WAYPOINTS_TRIED_MAX]]

        link = await _first(go_straight, find_detours, patience_s, timeout_s)
        if link.via:
            self._last_waypoint[node] = link.via
            log.info("node %s is reached through node %s: %s", node, link.via, known.why or "no answer by the straight path so far")
            if known.since_s is None:  # it has not failed, it is just not there yet
                now_s = trio.current_time()
                known.failed(now_s - patience_s, now_s, f"no connection within {patience_s:g} s")
        return link

    async def connect_straight(self, address: Address, *, node: str, timeout_s: float) -> Link:
        """The straight path and no other. Raises as net.link.connect. Cancel safe."""
        known, began_s = self._straight.setdefault(node, Straight()), trio.current_time()
        try:
            link = await connect(self._engine, address, timeout_s=timeout_s, node=node)
        except CsvfsError as error:
            known.failed(began_s, trio.current_time(), str(error))
            raise
        known.works()
        return link

    def _detour(self, waypoint: Waypoint, node: str, service: str, timeout_s: float) -> Attempt:
        async def attempt() -> Link:
            ask: dict[str, object] = {"cluster": self._cluster, "node": node, "service": service}
            return await connect_through(self._engine, waypoint, ask, node=node, timeout_s=timeout_s)

        return attempt


async def connect_through(engine: Engine, waypoint: Waypoint, ask: dict[str, object], *, node: str, timeout_s: float) -> Link:
    """A link to `node` by a tunnel of the drive server `waypoint`. `ask`: arguments of the call `via`.

    Raises   Unavailable (as Refused: somebody is not who they should be), Disconnected, TimedOut. Cancel safe.
    """
    with trio.move_on_after(timeout_s):
        asking = await connect(engine, (waypoint.address, waypoint.port), timeout_s=timeout_s, node=waypoint.node)
        try:
            await asking.call("via", ask, timeout_s=timeout_s)
            sock, _ = asking.release()
        except BaseException:
            asking.close()
            raise
        try:
            seal = None if engine.identity is None else await shake_hands(sock, engine.identity, node)
            link = Link(engine, sock, f"node {node} through node {waypoint.node}", accepting=False, seal=seal)
        except OSError as error:
            sock.close()
            raise Unavailable(f"cannot reach node {node} through node {waypoint.node}: {error.strerror or error}") from None
        except BaseException:
            sock.close()
            raise
        link.via = waypoint.node
        return link
    raise TimedOut(f"node {node} was not reached through node {waypoint.node} within {timeout_s:g} s")


async def _first(
    straight: Attempt, find_detours: Callable[[], Awaitable[list[Attempt]]], patience_s: float, timeout_s: float
) -> Link:
    """The link of the first attempt that succeeds; the straight one where both do at once. `find_detours` is asked when
    one is due.

    Raises   what the straight attempt raised, or TimedOut. Cancel safe: links that nobody gets are closed.
    """
    found: list[Link] = []
    errors: list[CsvfsError] = []  # of the straight attempt

    async def make(attempt: Attempt, ended: trio.Event, nursery: trio.Nursery) -> None:
        try:
            found.append(await attempt())
            nursery.cancel_scope.cancel()  # no await since the line above: no second one can be found later
        except CsvfsError as error:
            if attempt is straight:
                errors.append(error)
            else:
                log.info("no detour: %s", error)
        finally:
            ended.set()

    async def begin(attempt: Attempt, wait_s: float, nursery: trio.Nursery) -> None:
        """And wait for its end, but not for long."""
        ended = trio.Event()
        nursery.start_soon(make, attempt, ended, nursery)
        with trio.move_on_after(wait_s):
            await ended.wait()

    try:
        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                await begin(straight, patience_s, nursery)
                if not errors or (patience_s == 0 and not isinstance(errors[0], Refused)):  # else: before one was due
                    for attempt in await find_detours():
                        await begin(attempt, DETOUR_AFTER_S, nursery)
    except BaseException:
        for link in found:
            link.close()
        raise
    if not found:
        raise errors[0] if errors else TimedOut(f"no connection within {timeout_s:g} s, by any path")
    found.sort(key=lambda link: bool(link.via))
    for link in found[1:]:
        link.close(Disconnected("another path was faster"))
    return found[0]
