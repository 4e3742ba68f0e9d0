"""A link: one connection, frames in and out, requests matched with their answers.

Place      net floor, on the engine. Synchronous but for `call` and `connect`.
Owns       its socket and buffers. Its owner sets `on_frame` (requests of the peer) and `on_close`.
Limits     one receive buffer of RECEIVE_BUFFER_SIZE; at most OUTGOING_SIZE_MAX bytes wait for a slow peer, then
           the link is closed.
Errors     ProtocolError or a broken socket closes the link: every waiting request is answered with Disconnected.
Peers      A TCP connection of a process with an identity is TLS, and no link before its handshake is over
           (handshakes.py): no byte of a stranger reaches the parser of frames. A unix socket takes root and the user of
           this process.
"""

import contextlib
import logging
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import trio

from csvfs.errors import (
    AccessDenied,
    CsvfsError,
    Disconnected,
    ProtocolError,
    ResultTooLarge,
    TimedOut,
    Unavailable,
)
from csvfs.net.engine import Engine
from csvfs.net.handshakes import Reception, shake_hands
from csvfs.net.refusals import Reason, Refused
from csvfs.net.tls import Peer, Seal
from csvfs.units import MIB
from csvfs.wire import control
from csvfs.wire.frames import (
    ACCEPTING_SIDE_BIT,
    FRAME_SIZE_MAX,
    HEAD_SIZE_MAX,
    Frame,
    Kind,
    frame_size,
    pack_frame,
    parse_frame,
)

log = logging.getLogger(__name__)

RECEIVE_BUFFER_SIZE = 2 * FRAME_SIZE_MAX  # a whole frame always fits behind the rest of the one before
OUTGOING_SIZE_MAX = 256 * MIB
SOCKET_BUFFER_SIZE = 4 * MIB
IOVECS_MAX = 512  # below IOV_MAX (1,024)
ACCEPTED_AT_ONCE_MAX = 64  # then whoever is connected has its turn
PEER_SILENT_MS_MAX = 8_000  # TCP gives a peer up that acknowledges nothing for this long

_ANSWERS = frozenset((int(Kind.REPLY), int(Kind.ERROR), int(Kind.WRITTEN), int(Kind.READ_DATA)))
_PEER_CREDENTIALS = struct.Struct("=iII")  # pid, uid, gid
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33

Address = tuple[str, int] | str  # (host, port), or the path of a unix socket
Payload = memoryview | bytes | bytearray
Answer = Callable[[Frame | None, CsvfsError | None], None]  # exactly one of both


def _ignore_frame(link: "Link", frame: Frame) -> None:
    raise ProtocolError(f"{link.peer} sent a request of kind {frame.kind} where none is served")


class Link:
    """One connection. All methods run in the engine's thread; none but `call` awaits."""

    peer_node: str | None = None  # whose certificate was verified, or by a unix socket our own; None: nobody knows
    via = ""  # the node in between, where there is one (detours.py)
    _seal: Seal | None = None

    def __init__(
        self, engine: Engine, sock: socket.socket, peer: str, *, accepting: bool, seal: Seal | None = None
    ) -> None:
        self.engine = engine
        self.peer = peer
        self.closed: CsvfsError | None = None
        self.on_frame: Callable[[Link, Frame], None] = _ignore_frame
        self.on_close: Callable[[Link, CsvfsError], None] = lambda link, error: None
        self.owner: Any = None  # whatever the accepting side knows of the peer
        self.progress_ns = time.monotonic_ns()  # last answer, or when requests began to wait
        self._socket = sock
        self._fd = sock.fileno()
        self._request_id = ACCEPTING_SIDE_BIT if accepting else 0
        self._waiting: dict[int, Answer] = {}
        self._buffer = bytearray(RECEIVE_BUFFER_SIZE)
        self._view = memoryview(self._buffer)
        self._begin = 0  # of the first frame not yet handled
        self._end = 0  # of what was received
        self._outgoing: deque[Payload] = deque()
        self._outgoing_size = 0
        self._flush_due = False
        self._blocked = False
        identity = engine.identity
        if identity is not None and seal is not None:
            self._seal, self.peer_node = seal, seal.peer.node
            identity.opened(self, seal.peer.serial, self.close)
        elif identity is not None and sock.family == socket.AF_UNIX:
            self.peer_node = identity.node
        tune(sock)
        engine.register(self._fd, select.EPOLLIN, self._on_events)

    # -- sending ---------------------------------------------------------------------------------

    def send(self, kind: int, request_id: int, head: bytes = b"", payload: Payload | None = None) -> None:
        """Queue one frame; `payload` must not change until it has left. A closed link drops it."""
        if self.closed is not None:
            return
        outgoing = self._outgoing
        if payload is None or len(payload) == 0:  # nothing of length 0 is ever queued: it would never leave
            frame = pack_frame(kind, request_id, head)
            outgoing.append(frame)
            self._outgoing_size += len(frame)
        else:
            frame = pack_frame(kind, request_id, head, len(payload))
            outgoing.append(frame)
            outgoing.append(payload)
            self._outgoing_size += len(frame) + len(payload)
        if self.engine.in_batch:
            if not self._flush_due:
                self._flush_due = True
                self.engine.at_batch_end(self._flush)
        elif not self._blocked:
            self._flush()

    def _flush(self) -> None:
        self._flush_due = False
        outgoing, seal = self._outgoing, self._seal
        while (outgoing or (seal is not None and seal.unsent is not None)) and self.closed is None:
            try:
                if seal is not None:
                    sent = seal.send(self._socket, outgoing)
                elif len(outgoing) == 1:
                    sent = self._socket.send(outgoing[0])
                else:
                    sent = self._socket.sendmsg([outgoing[i] for i in range(min(len(outgoing), IOVECS_MAX))])
            except BlockingIOError:
                self._wait_writable()
                return
            except OSError as error:
                self.close(Disconnected(f"connection to {self.peer} broke: {error}"))
                return
            self._drop_sent(sent)
        if self._blocked and self.closed is None:
            self._blocked = False
            self.engine.modify(self._fd, select.EPOLLIN)

    def _drop_sent(self, sent: int) -> None:
        outgoing = self._outgoing
        self._outgoing_size -= sent
        while sent:
            size = len(outgoing[0])
            if size <= sent:
                sent -= size
                outgoing.popleft()
            else:
                outgoing[0] = memoryview(outgoing[0])[sent:]
                return

    def _wait_writable(self) -> None:
        if self._outgoing_size > OUTGOING_SIZE_MAX:
            self.close(Disconnected(f"{self.peer} takes nothing: {self._outgoing_size} B wait for it"))
        elif not self._blocked:
            self._blocked = True
            self.engine.modify(self._fd, select.EPOLLIN | select.EPOLLOUT)

    # -- requests and answers --------------------------------------------------------------------

    @property
    def peer_uid(self) -> int | None:
        """The user of the process at the other end of a unix socket, as the kernel says; None: of another machine."""
        if self.closed is not None or self._socket.family != socket.AF_UNIX:
            return None
        return peer_uid(self._socket)

    def require_node(self, node: str) -> None:
        """The peer says that it is of `node`. Raises AccessDenied: its certificate is another node's."""
        if self.peer_node is not None and self.peer_node != node:
            text = f"{self.peer} says that it is node {node[:32]!r}"
            self.engine.refusals.note(Reason.WRONG_NODE, self.host, text)
            raise AccessDenied(f"{text}, which its certificate does not")

    @property
    def host(self) -> str:
        """The peer without its port."""
        return self.peer.rpartition(":")[0] or self.peer

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    def request(self, kind: int, head: bytes, payload: Payload | None, answer: Answer) -> int:
        """Send a request; `answer(frame, error)` is called once, in the engine's task or on close.

        Returns the request id. `frame` views the receive buffer and is valid only during the call.
        """
        if self.closed is not None:
            answer(None, Disconnected(f"no connection to {self.peer}: {self.closed}"))
            return 0
        self._request_id += 1
        request_id = self._request_id
        if not self._waiting:
            self.progress_ns = time.monotonic_ns()
        self._waiting[request_id] = answer
        self.send(kind, request_id, head, payload)
        return request_id

    @property
    def next_request_id(self) -> int:
        """The id that the next request will get."""
        return self._request_id + 1

    async def call(self, name: str, args: dict[str, Any], *, timeout_s: float) -> Any:
        """One CALL and its REPLY's value.

        Raises  the error the peer answered with; Disconnected; TimedOut (the call may still be carried out).
        Cancel  safe; the answer is then ignored.
        """
        done = trio.Event()
        result: list[Any] = []

        def answer(frame: Frame | None, error: CsvfsError | None) -> None:
            if frame is None:
                result.append(error)
            else:
                try:
                    result.append(control.unpack_value(frame.head))
                except ProtocolError as malformed:
                    result.append(malformed)
            done.set()

        request_id = self.request(Kind.CALL, control.pack_call(name, args), None, answer)
        try:
            await self._wait(done, timeout_s)
        finally:
            self._waiting.pop(request_id, None)
        if not result:
            raise TimedOut(f"{self.peer} did not answer {name!r} within {timeout_s:g} s")
        if isinstance(result[0], CsvfsError):
            raise result[0]
        return result[0]

    async def _wait(self, done: trio.Event, timeout_s: float) -> None:
        """Until `done`, or for `timeout_s`."""
        with trio.move_on_after(timeout_s):
            await done.wait()

    def reply(self, request_id: int, value: Any) -> None:
        packed = control.pack_value(value)
        if len(packed) <= HEAD_SIZE_MAX:
            self.send(Kind.REPLY, request_id, packed)
        else:  # the peer would close the link on it, and ask again
            self.reply_error(
                request_id, ResultTooLarge(f"the answer has {len(packed)} B: ask for less at once")
            )

    def reply_error(self, request_id: int, error: CsvfsError) -> None:
        self.send(Kind.ERROR, request_id, control.pack_error(error))

    # -- receiving -------------------------------------------------------------------------------

    def _on_events(self, mask: int) -> None:
        if mask & select.EPOLLOUT:
            self._flush()
        if mask & ~select.EPOLLOUT and self.closed is None:
            self._receive()
            if self._seal is not None:
                self.take_opened()

    def take_opened(self) -> None:
        """Handle what the socket has given already and the seal still has: no event tells of it."""
        while self._seal is not None and self.closed is None and self._seal.has_more:
            self._receive()

    def _receive(self) -> None:
        try:
            if self._seal is not None:
                received = self._seal.receive_into(self._socket, self._view[self._end :])
            else:
                received = self._socket.recv_into(self._view[self._end :])
        except BlockingIOError:
            return
        except OSError as error:
            self.close(Disconnected(f"connection to {self.peer} broke: {error}"))
            return
        if received == 0:
            self.close(Disconnected(f"{self.peer} closed the connection"))
            return
        self._end += received
        try:
            self._handle_frames()
        except ProtocolError as error:
            self.engine.refusals.note(Reason.MALFORMED, self.host, str(error))
            self.close(error)

    def _handle_frames(self) -> None:
        view = self._view
        size = 0
        while self.closed is None:
            size = frame_size(view[self._begin : self._end])
            if size == 0 or self._end - self._begin < size:
                break
            frame = parse_frame(view[self._begin : self._begin + size])
            self._begin += size
            if frame.kind in _ANSWERS:
                self._take_answer(frame)
            else:
                self.on_frame(self, frame)
        if self._begin == self._end:
            self._begin = self._end = 0
        elif self._begin + (size or FRAME_SIZE_MAX) > RECEIVE_BUFFER_SIZE:
            rest = self._end - self._begin
            view[:rest] = bytes(view[self._begin : self._end])
            self._begin, self._end = 0, rest

    def _take_answer(self, frame: Frame) -> None:
        answer = self._waiting.pop(frame.request_id, None)
        if answer is None:
            return  # its caller gave up
        self.progress_ns = time.monotonic_ns()
        if frame.kind == Kind.ERROR:
            answer(None, control.unpack_error(frame.head))
        else:
            answer(frame, None)

    # -- the end ---------------------------------------------------------------------------------

    def close(self, error: CsvfsError | None = None) -> None:
        """Close now; waiting requests get Disconnected. Twice does no harm."""
        if self.closed is None:
            self._finish(error or Disconnected(f"connection to {self.peer} was closed here"), keep_socket=False)

    def release(self) -> tuple[socket.socket, Peer | None]:
        """Give the socket away, without the seal: this link is closed, the connection is not. And who the peer was.

        Raises   Disconnected: it is closed already, or something is still on its way; then it is closed now.
        """
        self._flush()
        seal = self._seal
        is_resting = not self._waiting and not self._outgoing and self._begin == self._end
        if seal is not None and (seal.unsent is not None or seal.has_more):
            is_resting = False
        if self.closed is not None or not is_resting:
            self.close()
            raise Disconnected(f"the connection to {self.peer} cannot be passed on: {self.closed}")
        self._finish(Disconnected(f"the connection to {self.peer} was passed on"), keep_socket=True)
        return self._socket, None if seal is None else seal.peer

    def _finish(self, error: CsvfsError, *, keep_socket: bool) -> None:
        self.closed = error
        self.engine.unregister(self._fd)
        if self._seal is not None and self.engine.identity is not None:
            self.engine.identity.closed(self)
        if not keep_socket:
            self._socket.close()
        self._outgoing.clear()
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer(None, Disconnected(f"connection to {self.peer} was lost: {error}"))
        self.on_close(self, error)


def tune(sock: socket.socket) -> None:
    """As all connections between processes of csvfs are."""
    sock.setblocking(False)
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
        with contextlib.suppress(OSError):  # needs CAP_NET_ADMIN; the default size works, more slowly
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_SIZE)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, PEER_SILENT_MS_MAX)


def peer_uid(sock: socket.socket) -> int:
    """The user at the other end of a unix socket."""
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return int(_PEER_CREDENTIALS.unpack(packed)[1])


def describe_address(address: Address) -> str:
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


async def connect(engine: Engine, address: Address, *, timeout_s: float, node: str = "") -> Link:
    """Open a link. `node`: whose certificate a process at a TCP address must show, where there is TLS.

    Raises Unavailable (refused, unreachable; as Refused: it is somebody else) or TimedOut. Cancel safe.
    """
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    seal = None
    try:
        sock.setblocking(False)
        with trio.move_on_after(timeout_s) as scope:
            try:
                sock.connect(address)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(sock)
            failure = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if failure:
                raise OSError(failure, os.strerror(failure))
            if engine.identity is not None and family != socket.AF_UNIX:
                seal = await shake_hands(sock, engine.identity, node)
        if scope.cancelled_caught:
            raise TimedOut(f"{describe_address(address)} did not accept a connection within {timeout_s:g} s")
        return Link(engine, sock, describe_address(address), accepting=False, seal=seal)
    except (OSError, Refused) as error:
        sock.close()
        reason = f"cannot connect to {describe_address(address)}: {getattr(error, 'strerror', None) or error}"
        raise (Refused(error.reason, reason) if isinstance(error, Refused) else Unavailable(reason)) from None
    except BaseException:
        sock.close()
        raise


class Listener:
    """Accepts links on one address until closed; `on_link` sets each new link's handlers."""

    def __init__(self, engine: Engine, address: Address, on_link: Callable[[Link], None]) -> None:
        """Binds and listens. Port 0: any free one, see `port`. Raises OSError when the address is taken."""
        self._engine = engine
        self._on_link = on_link
        self._reception = Reception(engine, self._welcome)
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        if isinstance(address, str):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address)  # left by a process that was killed
        else:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(address)
        self._socket.listen(128)
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1] if family == socket.AF_INET else 0
        engine.register(self._socket.fileno(), select.EPOLLIN, self._on_events)

    def _on_events(self, mask: int) -> None:
        for _ in range(ACCEPTED_AT_ONCE_MAX):
            try:
                sock, peer = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("cannot accept a connection: %s", error)
                return
            if not isinstance(peer, tuple):
                self._accept_local(sock)
            elif self._engine.identity is None:
                self._on_link(Link(self._engine, sock, f"{peer[0]}:{peer[1]}", accepting=True))
            else:
                self._reception.receive(sock, peer)

    def _accept_local(self, sock: socket.socket) -> None:
        uid = peer_uid(sock)
        if uid in (0, os.geteuid()):
            self._on_link(Link(self._engine, sock, "a process of this node", accepting=True))
        else:
            sock.close()
            self._engine.refusals.note(Reason.WRONG_USER, f"user {uid}", "it is neither root nor the user of this process")

    def _welcome(self, sock: socket.socket, peer: tuple[str, int], seal: Seal) -> None:
        name = f"node {seal.peer.node} at {peer[0]}:{peer[1]}"
        link = Link(self._engine, sock, name, accepting=True, seal=seal)
        self._on_link(link)
        link.take_opened()  # it may have sent its first frame with the end of the handshake

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            self._engine.unregister(self._socket.fileno())
            self._socket.close()
            self._reception.close()
