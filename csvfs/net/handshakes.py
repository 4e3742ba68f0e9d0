"""Handshakes under way: who comes is a stranger, and gets little, until it has shown who it is.

Place      net floor, below link.py. `Reception` is the accepting side, on the engine; `shake_hands` the connecting one.
Limits     of a listener: UNFINISHED_MAX handshakes at once, beyond which the oldest has to go (an honest one takes
           milliseconds); HANDSHAKE_S and HANDSHAKE_SIZE_MAX bytes for each.
Refused    the connection is closed and counted; all that is ever sent back is TLS's own alert.
"""

import contextlib
import select
import socket
import time
from collections.abc import Callable

import trio

from csvfs.net.engine import Engine
from csvfs.net.refusals import Reason, Refused
from csvfs.net.tls import Handshake, Identity, Seal
from csvfs.units import KIB

UNFINISHED_MAX = 64
HANDSHAKE_S = 5.0
HANDSHAKE_SIZE_MAX = 32 * KIB  # bytes received; ours have about 1,500
READ_SIZE = 16 * KIB

PeerAddress = tuple[str, int]
Welcome = Callable[[socket.socket, PeerAddress, Seal], None]


class _Guest:
    """One connection that has not shown who it is."""

    __slots__ = ("address", "due", "handshake", "received", "sock")

    def __init__(self, sock: socket.socket, address: PeerAddress, handshake: Handshake) -> None:
        self.due = time.monotonic() + HANDSHAKE_S
        self.sock = sock
        self.address = address
        self.handshake = handshake
        self.received = 0


class Reception:
    """Where connections of one listener wait. `welcome`: gets each whose handshake went well."""

    def __init__(self, engine: Engine, welcome: Welcome) -> None:
        self._engine = engine
        self._welcome = welcome
        self._guests: dict[int, _Guest] = {}  # by descriptor, the oldest first
        self._looking = False  # an alarm is set: one for all, or who comes and goes would leave heaps of them

    @property
    def unfinished(self) -> int:
        return len(self._guests)

    def receive(self, sock: socket.socket, address: tuple[str, int]) -> None:
        """A connection was accepted. The engine has an identity."""
        identity = self._engine.identity
        assert identity is not None
        if len(self._guests) >= UNFINISHED_MAX:
            oldest = next(iter(self._guests.values()))
            self._refuse(oldest, Reason.CROWDED, f"{UNFINISHED_MAX} handshakes are unfinished, and this is the oldest")
        sock.setblocking(False)
        guest = _Guest(sock, address, Handshake(identity, accepting=True))
        self._guests[sock.fileno()] = guest
        self._engine.register(sock.fileno(), select.EPOLLIN, lambda mask: self._on_events(guest))
        self._look_later(guest)

    def _look_later(self, oldest: _Guest) -> None:
        if not self._looking:
            self._looking = True
            self._engine.after(oldest.due - time.monotonic(), self._look)

    def _look(self) -> None:
        self._looking = False
        now_s = time.monotonic()
        for guest in [guest for guest in self._guests.values() if guest.due <= now_s]:
            self._refuse(guest, Reason.SLOW, f"it did not finish its handshake within {HANDSHAKE_S:g} s")
        if self._guests:
            self._look_later(next(iter(self._guests.values())))

    def _on_events(self, guest: _Guest) -> None:
        try:
            received = guest.sock.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._refuse(guest, Reason.BROKEN_OFF, error.strerror or str(error))
            return
        self._take(guest, received)

    def _take(self, guest: _Guest, received: bytes) -> None:
        try:
            if not received:
                raise Refused(Reason.BROKEN_OFF, "it closed the connection in the middle of the handshake")
            guest.received += len(received)
            seal = guest.handshake.advance(received)
            self._send(guest)
            if seal is None and guest.received > HANDSHAKE_SIZE_MAX:
                raise Refused(Reason.LONG, f"more than {HANDSHAKE_SIZE_MAX} B and still no end of its handshake")
        except Refused as error:
            self._refuse(guest, error.reason, str(error))
            return
        except OSError as error:
            self._refuse(guest, Reason.BROKEN_OFF, error.strerror or str(error))
            return
        if seal is not None:
            self._forget(guest)
            self._welcome(guest.sock, guest.address, seal)

    def _send(self, guest: _Guest) -> None:
        answer = guest.handshake.to_send()
        if answer and guest.sock.send(answer) < len(answer):  # a few KiB always fit into an empty socket buffer
            raise Refused(Reason.BROKEN_OFF, "it takes nothing in the middle of the handshake")

    def _forget(self, guest: _Guest) -> None:
        del self._guests[guest.sock.fileno()]
        self._engine.unregister(guest.sock.fileno())

    def _refuse(self, guest: _Guest, reason: Reason, text: str) -> None:
        self._forget(guest)
        with contextlib.suppress(OSError):  # BlockingIOError too: it need not hear why
            guest.sock.send(guest.handshake.to_send())
        guest.sock.close()
        self._engine.refusals.note(reason, guest.address[0], text)

    def close(self) -> None:
        for guest in list(self._guests.values()):
            self._forget(guest)
            guest.sock.close()


async def shake_hands(sock: socket.socket, identity: Identity, node: str) -> Seal:
    """As the side that connected; `sock` does not block. The caller has a deadline.

    Raises   Refused: it is not `node`, or none of ours. OSError. Cancel safe; the socket is of no use then.
    """
    handshake = Handshake(identity, accepting=False)
    received = b""
    while True:
        try:
            seal = handshake.advance(received)
        except Refused:
            with contextlib.suppress(OSError):
                sock.send(handshake.to_send())  # an alert
            raise
        if seal is not None:
            identity.require(seal.peer, node)
        await _send_all(sock, handshake.to_send())
        if seal is not None:
            return seal
        await trio.lowlevel.wait_readable(sock)
        with contextlib.suppress(BlockingIOError):
            received = sock.recv(READ_SIZE)
            if not received:
                raise Refused(Reason.BROKEN_OFF, "it closed the connection in the middle of the handshake")
            continue
        received = b""


async def _send_all(sock: socket.socket, data: bytes) -> None:
    while data:
        try:
            data = data[sock.send(data) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
