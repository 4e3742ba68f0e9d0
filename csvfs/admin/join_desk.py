"""The join desk: where a new machine gets its certificate. A process of a node that has the CA's key.

Place      admin floor. Run by `csvfs node run` (ROLE_DESK) where `ca.key` is; listens on port_base + 5 with the node's
           certificate and asks for none: who comes here has only a token. join_admission.py decides.
Why apart  It parses bytes of anybody who reaches its port. It holds no lease, and the node run does not wait for it.
Limits     CONNECTIONS_MAX at once, what is more is closed; TALK_S for handshake and question, ANSWER_S for the answer;
           one question per connection. Machines are let in one at a time.
Refusals   are logged and counted with who asked; nothing of a refused request is used.
"""

import logging
import ssl
import sys
from typing import Any

import trio

from csvfs.admin.join_admission import Admission, evicted_at, token_digest
from csvfs.admin.join_messages import (
    ASK_CA,
    ASK_JOIN,
    ASK_STANDING,
    SIZE,
    JoinRequest,
    message_size,
    pack_message,
    text_of,
    unpack_message,
)
from csvfs.cluster.node_process import run_process, run_until_signalled
from csvfs.config import NodeConfig
from csvfs.errors import CsvfsError, Disconnected, ProtocolError, Unavailable, wire_kind
from csvfs.store.etcd_client import EtcdClient
from csvfs.store.etcd_place import EtcdPlace
from csvfs.store.interface import ClusterStore
from csvfs.store.opening import etcd_place, open_store

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 16
TALK_S = 10.0
ANSWER_S = 60.0  # another member of the store may have to be waited for


class JoinDesk:
    """Answers questions one connection each, until cancelled."""

    def __init__(self, config: NodeConfig, store: ClusterStore, place: EtcdPlace, admission: Admission) -> None:
        self._config = config
        self._store = store
        self._place = place
        self._admission = admission
        self._one_at_a_time = trio.Lock()
        self._tls = desk_tls(place)
        self.open_count = 0
        self.refused = 0

    async def serve(self, *, task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED) -> None:
        """Raises OSError: the port is taken. Cancel: closes all connections."""
        port = self._config.join_port
        listeners = await trio.open_tcp_listeners(port, host=self._config.address, backlog=CONNECTIONS_MAX)
        log.info("join desk at %s port %d", self._config.address, port)
        await trio.serve_listeners(self._serve_one, listeners, task_status=task_status)

    async def _serve_one(self, transport: trio.SocketStream) -> None:
        if self.open_count >= CONNECTIONS_MAX:
            return
        self.open_count += 1
        who = "a connection"
        try:
            who = transport.socket.getpeername()[0]
            await self._talk(trio.SSLStream(transport, self._tls, server_side=True), who)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError, CsvfsError) as error:
            self._note_refusal(who, error)
        finally:
            self.open_count -= 1
            await trio.aclose_forcefully(transport)

    async def _talk(self, stream: trio.SSLStream[trio.SocketStream], who: str) -> None:
        with trio.move_on_after(TALK_S) as talking:
            await stream.do_handshake()
            question = await receive_message(stream)
        if talking.cancelled_caught:
            raise ProtocolError(f"it asked nothing within {TALK_S:.0f} s")
        with trio.move_on_after(ANSWER_S):
            try:
                answer = await self._answer(question, who)
            except CsvfsError as error:
                self._note_refusal(who, error)
                answer = {"error": [wire_kind(error), str(error)]}
            await stream.send_all(pack_message(answer))
            await stream.aclose()

    async def _answer(self, question: dict[str, Any], who: str) -> dict[str, Any]:
        asked = text_of(question, "ask", 16)
        if asked == ASK_CA:
            return {"ca": self._place.ca_path.read_text()}
        if asked == ASK_STANDING:
            serial = int_of_hex(text_of(question, "serial", 64))
            return {"evicted": await evicted_at(self._store, text_of(question, "node", 64), serial)}
        if asked != ASK_JOIN:
            raise ProtocolError(f"the join desk does not know the question {asked!r}")
        request = JoinRequest.of(question)
        async with self._one_at_a_time:
            answer = await self._admission.admit(request)
        log.info("node %s at %s joined with token %s", request.node, who, token_digest(request.token))
        return answer.to_map()

    def _note_refusal(self, who: str, error: BaseException) -> None:
        self.refused += 1
        log.warning("refused (%d so far) %s: %s", self.refused, who, str(error) or "it speaks no TLS of ours")


def desk_tls(place: EtcdPlace) -> ssl.SSLContext:
    """Raises Unavailable: the certificates do not work."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(place.certificate_path, place.key_path)
    except (OSError, ssl.SSLError) as error:
        raise Unavailable(f"{place.directory}: its certificates do not work: {error}") from None
    return context


async def receive_message(stream: trio.abc.Stream) -> dict[str, Any]:
    """One message. Raises ProtocolError, Disconnected. The caller has a deadline."""
    size = message_size(await _receive_exactly(stream, SIZE.size))
    return unpack_message(await _receive_exactly(stream, size))


async def _receive_exactly(stream: trio.abc.Stream, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        more = await stream.receive_some(size - len(found))
        if not more:
            raise Disconnected("the connection broke in the middle of a message")
        found += more
    return bytes(found)


def int_of_hex(text: str) -> int:
    """Raises ProtocolError."""
    if not text or any(letter not in "0123456789abcdef" for letter in text):
        raise ProtocolError(f"{text[:40]!r} is no serial number")
    return int(text, 16)


async def serve(config: NodeConfig) -> int:
    """Run the desk of this node until SIGTERM or SIGINT."""
    place = etcd_place(config.store)
    store = open_store(config.store)
    client = EtcdClient(place)
    try:
        await run_until_signalled(JoinDesk(config, store, place, Admission(store, client, place)).serve)
    finally:
        client.close()
        with trio.CancelScope(shield=True):
            await store.close()
    return 0


def main() -> int:
    return run_process(serve)


if __name__ == "__main__":
    sys.exit(main())
