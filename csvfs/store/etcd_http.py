"""One HTTP/1.1 connection to one etcd member: JSON there and back, or a stream of JSON lines.

Place      store floor, below etcd_client.py. h11 speaks HTTP, trio carries it.
Limits     an answer of ANSWER_SIZE_MAX bytes, a line of a stream likewise; heads as h11 has them (16 KiB).
Deadlines  are the callers'. A connection that was cancelled within `post` is broken: close it.
"""

import json
import ssl
from collections import deque
from dataclasses import dataclass
from typing import Any

import h11
import trio

from csvfs.errors import Disconnected, ProtocolError
from csvfs.store.etcd_messages import parse_object, refusal

ANSWER_SIZE_MAX = 64 << 20  # bytes; a page of a list (etcd_client.py) and a fragment of a watch are far below
_RECEIVE_SIZE = 65_536


@dataclass(slots=True, frozen=True)
class Endpoint:
    """Where a member listens for clients."""

    host: str  # IP address or name
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class HttpConnection:
    """Used by one task at a time."""

    def __init__(self, stream: trio.abc.Stream, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT)
        self._lines: deque[bytes] = deque()  # whole ones of the stream, not yet taken
        self._rest = bytearray()

    @property
    def is_reusable(self) -> bool:
        """Whether the last answer was read to its end and the server will take another request."""
        return self._http.our_state is h11.IDLE

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request, return its answer.

        Raises   Disconnected. ProtocolError. Refused: etcd did not do it.
        Cancel   the request may have reached etcd; close the connection.
        """
        with _transport_errors(self.endpoint):
            status = await self._ask(path, body)
            answer = bytearray()
            while isinstance(event := await self._next_event(), h11.Data):
                answer += event.data
                if len(answer) > ANSWER_SIZE_MAX:
                    raise ProtocolError(f"etcd at {self.endpoint} answers more than {ANSWER_SIZE_MAX} bytes")
            if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
                self._http.start_next_cycle()
        if status != 200:
            raise refusal(status, bytes(answer))
        return parse_object(bytes(answer))

    async def open_stream(self, path: str, body: dict[str, Any]) -> None:
        """Send a request whose answer is a stream; `next_line` reads it. Raises as `post`."""
        with _transport_errors(self.endpoint):
            status = await self._ask(path, body)
            if status == 200:
                return
            event = await self._next_event()
            raise refusal(status, bytes(event.data) if isinstance(event, h11.Data) else b"")

    async def next_line(self) -> dict[str, Any]:
        """The next object of the stream. Raises Disconnected (also at its end), ProtocolError. Cancel: safe."""
        with _transport_errors(self.endpoint):
            while not self._lines:
                event = await self._next_event()
                if not isinstance(event, h11.Data):
                    raise Disconnected(f"etcd at {self.endpoint} ended the stream")
                self._take(bytes(event.data))
            await trio.lowlevel.checkpoint_if_cancelled()
            return parse_object(self._lines.popleft())

    def _take(self, data: bytes) -> None:
        head, found, tail = data.rpartition(b"\n")
        self._rest += head
        if len(self._rest) + len(tail) > ANSWER_SIZE_MAX:
            raise ProtocolError(f"etcd at {self.endpoint} sends a line of more than {ANSWER_SIZE_MAX} bytes")
        if found:
            self._lines.extend(line for line in bytes(self._rest).split(b"\n") if line.strip())
            self._rest.clear()
        self._rest += tail

    async def _ask(self, path: str, body: dict[str, Any]) -> int:
        """Send the request, read the head of the answer, return its status."""
        content = json.dumps(body).encode()
        headers = [
            ("Host", str(self.endpoint)),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(content))),
            # A member that has lost the others says so at once, and ends its watches, instead of waiting.
            ("Grpc-Metadata-hasleader", "true"),
        ]
        request = h11.Request(method="POST", target=path, headers=headers)
        events = (request, h11.Data(data=content), h11.EndOfMessage())
        await self._stream.send_all(b"".join(self._http.send(event) or b"" for event in events))
        while True:
            event = await self._next_event()
            if isinstance(event, h11.Response):
                return event.status_code
            if not isinstance(event, h11.InformationalResponse):
                raise Disconnected(f"etcd at {self.endpoint} closed the connection without an answer")

    async def _next_event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(bytes(await self._stream.receive_some(_RECEIVE_SIZE)))
        return event

    def close(self) -> None:
        """At once, without goodbye."""
        transport = self._stream
        while isinstance(transport, trio.SSLStream):
            transport = transport.transport_stream
        assert isinstance(transport, trio.SocketStream)
        transport.socket.close()


class _transport_errors:
    """What trio, ssl and h11 raise about a connection, as our own errors."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, h11.RemoteProtocolError):
            raise Disconnected(f"etcd at {self._endpoint} broke off or speaks no HTTP: {error}") from None
        if isinstance(error, (trio.BrokenResourceError, trio.ClosedResourceError, OSError)):
            raise Disconnected(f"etcd at {self._endpoint}: {reason_of(error)}") from None


async def connect(endpoint: Endpoint, tls: ssl.SSLContext | None) -> HttpConnection:
    """Raises Disconnected: nobody there, or its certificate is not of our cluster. Cancel: safe."""
    try:
        transport = await trio.open_tcp_stream(endpoint.host, endpoint.port)
        if tls is None:
            return HttpConnection(transport, endpoint)
        stream = trio.SSLStream(transport, tls, server_hostname=endpoint.host, https_compatible=True)
        try:
            await stream.do_handshake()
        except BaseException:
            transport.socket.close()
            raise
        return HttpConnection(stream, endpoint)
    except (OSError, trio.BrokenResourceError) as error:
        raise Disconnected(f"etcd at {endpoint}: {reason_of(error)}") from None


def reason_of(error: BaseException) -> str:
    """Why a connection failed, in a few words: the innermost cause says most."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, BaseExceptionGroup):
        return reason_of(error.exceptions[0])
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {getattr(error, 'verify_message', None) or error.reason or error}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.rpartition(": ")[2].lower()  # trio puts the address before it
    return str(error) or "the connection broke"
