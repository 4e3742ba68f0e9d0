"""The call `via`: a node of the cluster asks this drive server to pass it on to a third one (PROTOCOL.md, "Detours").

Place      block floor, in the drive server, over net/tunnels.py.
Rule       The caller names a node and a service, never an address: where that is, the cluster store says. So nobody gets
           anywhere by it but to the cluster's own processes, which ask for certificates themselves.
"""

import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from csvfs.errors import BadRequest, LeaseLost, NotPermitted, TimedOut, Unavailable
from csvfs.net.calls import Then, field
from csvfs.net.detours import SERVICES, Waypoint
from csvfs.net.link import Link
from csvfs.net.tunnels import Tunnels

log = logging.getLogger(__name__)

REACH_S = 1.5  # to the far end; who asks waits for 2 s in all

# Where a service of a node listens; None: nowhere now.
Find = Callable[[str, str], Awaitable[tuple[str, int] | None]]


def waypoints_of(servers: Mapping[Any, object]) -> list[Waypoint]:
    """Drive servers, or coordinator hosts, by node as the cluster store has them; malformed ones are left out."""
    found = []
    for node, value in servers.items():
        address, port = (value.get("address"), value.get("port")) if isinstance(value, dict) else (None, None)
        if isinstance(address, str) and isinstance(port, int) and 0 < port < 65_536:
            found.append(Waypoint(node, address, port))
    return found


class TunnelDesk:
    """Handler of `via`. `node`: this one; `may_serve`: its lease holds."""

    def __init__(self, tunnels: Tunnels, find: Find, *, cluster: bytes, node: str, may_serve: Callable[[], bool]) -> None:
        self.tunnels = tunnels
        self._find = find
        self._cluster = cluster
        self._node = node
        self._may_serve = may_serve

    async def via(self, link: Link, args: dict[str, Any]) -> Then:
        """From its answer on the connection is the other node's; this node passes bytes on until one side closes.

        Raises   BadRequest, NotPermitted. Unavailable: too many, not reached. LeaseLost. Cancel safe.
        """
        node, service = field(args, "node", str), field(args, "service", str)
        if field(args, "cluster", bytes) != self._cluster:
            raise BadRequest(f"node {self._node} belongs to another cluster")
        if service not in SERVICES:
            raise BadRequest(f"no service {service[:32]!r}; there are {', '.join(SERVICES)}")
        if link.owner is not None:
            raise NotPermitted("a connection that said hello is nobody else's any more")
        if not self._may_serve():
            raise LeaseLost(f"node {self._node} lost its lease in the cluster store and passes nobody on")
        self.tunnels.reserve()
        try:
            far = await self._reach(node, service)
        except BaseException:
            self.tunnels.give_back()
            raise
        return Then(None, lambda: self._begin(link, far, node, service))

    async def _reach(self, node: str, service: str) -> socket.socket:
        address = await self._find(node, service)
        if address is None or node == self._node:
            raise Unavailable(f"node {node[:32]} has no {service} to be passed on to")
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            with trio.move_on_after(REACH_S) as scope:
                try:
                    sock.connect(address)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(sock)
            if scope.cancelled_caught:
                raise TimedOut(f"node {node} does not answer node {self._node} either, for {REACH_S:g} s")
            failure = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if failure:
                raise OSError(failure, os.strerror(failure))
            return sock
        except OSError as error:
            sock.close()
            raise Unavailable(f"node {self._node} does not reach node {node} either: {error.strerror or error}") from None
        except BaseException:
            sock.close()
            raise

    def _begin(self, link: Link, far: socket.socket, node: str, service: str) -> None:
        """The answer has left."""
        who = link.peer
        try:
            near, peer = link.release()
        except Unavailable as error:
            log.info("%s is gone before it was passed on to node %s: %s", who, node, error)
            self.tunnels.give_back()
            far.close()
            return
        self.tunnels.dig(near, far, peer)
        log.warning("%s is passed on to the %s of node %s: it does not get there by itself", who, service, node)
