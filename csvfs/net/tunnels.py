"""Tunnels: this node passes the bytes of others on, who have no path of their own (detours.py, PROTOCOL.md "Detours").

Place      net floor, on the engine; block/tunnel_desk.py says who may have one and where to.
What       two connected sockets. What comes out of one goes into the other, unread and unchanged: with TLS it is the
           conversation of the two ends, and who comes is decided at the far end as if there were nothing in between.
Limits     TUNNELS_MAX at once; of each at most TUNNEL_BUFFER_SIZE bytes wait for each end, and nothing more is taken
           from the other one until they have left.
Ends       both sides together: when one closes or breaks, and when the certificate of who asked is revoked.
"""

import select
import socket
from functools import partial

from csvfs.errors import CsvfsError, Unavailable
from csvfs.net.engine import Engine
from csvfs.net.link import tune
from csvfs.net.tls import Peer
from csvfs.units import KIB

TUNNELS_MAX = 128
TUNNEL_BUFFER_SIZE = 256 * KIB

# Of the process: what is received is sent on at once, in the one thread; only what is not taken is copied.
_received = bytearray(TUNNEL_BUFFER_SIZE)
_received_view = memoryview(_received)


class _End:
    """One socket of a tunnel, and what waits to be sent to it."""

    __slots__ = ("fd", "sock", "unsent")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.unsent = b""


class Tunnel:
    """`near`: of who asked; `far`: where to. Both are owned from here on."""

    def __init__(self, tunnels: "Tunnels", near: socket.socket, far: socket.socket, peer: Peer | None) -> None:
        self._tunnels = tunnels
        self._engine = tunnels.engine
        self._ends = (_End(near), _End(far))
        self.closed = False
        for end, other in (self._ends, self._ends[::-1]):
            tune(end.sock)
            self._engine.register(end.fd, select.EPOLLIN, partial(self._on_events, end, other))
        if peer is not None and self._engine.identity is not None:
            self._engine.identity.opened(self, peer.serial, self.close)

    def _on_events(self, end: _End, other: _End, mask: int) -> None:
        if self.closed:
            return
        self._engine.hot()
        try:
            if mask & select.EPOLLOUT:
                self._send_rest(end, other)
            if mask & ~select.EPOLLOUT and not other.unsent:
                self._carry(end, other)
            elif mask & (select.EPOLLHUP | select.EPOLLERR):
                self.close()  # it is gone, and would be told of for ever
        except BlockingIOError:
            pass
        except OSError:
            self.close()

    def _carry(self, source: _End, target: _End) -> None:
        size = source.sock.recv_into(_received)
        if size == 0:
            self.close()
            return
        try:
            sent = target.sock.send(_received_view[:size])
        except BlockingIOError:
            sent = 0
        if sent < size:
            target.unsent = bytes(_received_view[sent:size])
            self._watch(source, target)

    def _send_rest(self, end: _End, other: _End) -> None:
        end.unsent = end.unsent[end.sock.send(end.unsent) :]
        if not end.unsent:
            self._watch(other, end)

    def _watch(self, source: _End, target: _End) -> None:
        """After `target.unsent` changed: it is waited for, and nothing is taken from `source` meanwhile."""
        for end, other in ((source, target), (target, source)):
            events = (0 if other.unsent else select.EPOLLIN) | (select.EPOLLOUT if end.unsent else 0)
            self._engine.modify(end.fd, events)

    def close(self, error: CsvfsError | None = None) -> None:
        """Now. Twice does no harm."""
        if self.closed:
            return
        self.closed = True
        self._tunnels.forget(self)
        if self._engine.identity is not None:
            self._engine.identity.closed(self)
        for end in self._ends:
            self._engine.unregister(end.fd)
            end.sock.close()


class Tunnels:
    """All of one process. `begun`: tunnels that were ever dug, for people who ask."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.begun = 0
        self._open: set[Tunnel] = set()
        self._reserved = 0

    @property
    def count(self) -> int:
        return len(self._open) + self._reserved

    def reserve(self) -> None:
        """A place for one, until `dig` or `give_back`. Raises Unavailable: there are TUNNELS_MAX."""
        if self.count >= TUNNELS_MAX:
            raise Unavailable(f"{TUNNELS_MAX} connections of other nodes go through this one already")
        self._reserved += 1

    def give_back(self) -> None:
        self._reserved -= 1

    def dig(self, near: socket.socket, far: socket.socket, peer: Peer | None) -> Tunnel:
        """In the place that was reserved. `peer`: who asked, as its certificate says."""
        self._reserved -= 1
        self.begun += 1
        tunnel = Tunnel(self, near, far, peer)
        self._open.add(tunnel)
        return tunnel

    def forget(self, tunnel: Tunnel) -> None:
        self._open.discard(tunnel)

    def close(self) -> None:
        for tunnel in list(self._open):
            tunnel.close()
