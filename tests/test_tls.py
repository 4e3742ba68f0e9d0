"""TLS between nodes, over real sockets: who is let in, who is not, and that nothing wrong is ever delivered."""

import contextlib
import logging
import os
import select
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.block_reader import _Connection
from csvfs.admin.cluster_ca import issue, make_authority, serial_of, write_certificates
from csvfs.block.server_links import ServerAddress
from csvfs.config import parse_config
from csvfs.errors import AccessDenied, Disconnected, Unavailable
from csvfs.ids import Incarnation, NodeName
from csvfs.net import handshakes, refusals
from csvfs.net.calls import CallTable, field
from csvfs.net.engine import Engine
from csvfs.net.link import Link, Listener, connect
from csvfs.net.refusals import Reason, Refusals, Refused
from csvfs.net.tls import SEAL_SIZE_MAX, Handshake, Identity, Seal, open_identity
from csvfs.store.embedded import EmbeddedStore
from csvfs.store.etcd_place import EtcdPlace
from csvfs.store.revoked import follow_revoked_forever, revoked_key
from csvfs.units import KIB, MIB
from csvfs.wire import control
from csvfs.wire.frames import Frame, Kind

PATIENCE_S = 60
SIZE = MIB
OURS, THEIRS = make_authority("Tower"), make_authority("Strangers")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Certificates of nodes n1 to n3 of one cluster, and of a node n2 of another."""
    found = {}
    for name, node, authority in (("n1", "n1", OURS), ("n2", "n2", OURS), ("n3", "n3", OURS), ("foreign", "n2", THEIRS)):
        found[name] = tmp_path_factory.mktemp(name)
        write_certificates(EtcdPlace(found[name]), issue(*authority, node, "127.0.0.1"))
    return found


def serial_in(place: Path) -> int:
    return serial_of((place / "node.crt").read_text())


class Server:
    """Node n1: counts its links and the frames it was given; answers `whose`, `hello`, and READ with SIZE bytes."""

    def __init__(self, engine: Engine, nursery: trio.Nursery, address: tuple[str, int] | str) -> None:
        self.engine = engine
        self.links: list[Link] = []
        self.frames = 0
        self.payloads: list[bytes] = []
        self._nursery = nursery
        self._calls = CallTable({"whose": lambda link, args: link.peer_node, "hello": self._hello})
        self.listener = Listener(engine, address, self._accept)
        self.address = ("127.0.0.1", self.listener.port)

    def _accept(self, link: Link) -> None:
        self.links.append(link)
        link.on_frame = self._on_frame

    def _hello(self, link: Link, args: dict[str, object]) -> dict[str, object]:
        link.require_node(field(args, "node", str))
        return {"drives": []}

    def _on_frame(self, link: Link, frame: Frame) -> None:
        self.frames += 1
        if frame.kind == Kind.WRITE:
            self.payloads.append(bytes(frame.payload))
            link.send(Kind.WRITTEN, frame.request_id)
        elif frame.kind == Kind.READ:
            link.send(Kind.READ_DATA, frame.request_id, b"", bytes(frame.head[:1]) * SIZE)
        else:
            self._calls.handle(link, frame, self._nursery)

    async def refused(self, reason: Reason, count: int = 1) -> None:
        await until(lambda: self.engine.refusals.counts.get(reason.value, 0) >= count)
        assert self.engine.refusals.counts == {reason.value: count}
        assert (self.links, self.frames) == ([], 0)


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not condition():
            await trio.sleep(0.005)


@contextlib.asynccontextmanager
async def served(
    places: dict[str, Path], address: tuple[str, int] | str = ("127.0.0.1", 0)
) -> AsyncIterator[tuple[Server, Callable[[str], Awaitable[Link]]]]:
    """A server of node n1, and what connects to it as the node with those certificates."""
    async with trio.open_nursery() as nursery:
        engines = [Engine(Identity("n1", places["n1"]))]
        nursery.start_soon(engines[0].run_forever)
        server = Server(engines[0], nursery, address)

        async def come(place: str, wanted: str = "n1") -> Link:
            engine = Engine(Identity("n2" if place == "foreign" else place, places[place]))
            engines.append(engine)
            nursery.start_soon(engine.run_forever)
            return await connect(engine, server.address, timeout_s=PATIENCE_S, node=wanted)

        try:
            yield server, come
        finally:
            server.listener.close()
            nursery.cancel_scope.cancel()
    for engine in engines:
        engine.close()


async def write(link: Link, payload: bytes) -> None:
    done = trio.Event()
    errors: list[object] = []

    def answer(frame: Frame | None, error: object) -> None:
        errors.append(error)
        done.set()

    link.request(Kind.WRITE, b"head", payload, answer)
    with trio.fail_after(PATIENCE_S):
        await done.wait()
    if isinstance(errors[0], Exception):
        raise errors[0]


async def read(link: Link, letter: bytes) -> bytes:
    done = trio.Event()
    found: list[bytes] = []

    def answer(frame: Frame | None, error: object) -> None:
        found.append(b"" if frame is None else bytes(frame.payload))
        done.set()

    link.request(Kind.READ, letter, None, answer)
    with trio.fail_after(PATIENCE_S):
        await done.wait()
    return found[0]


# Those who belong here


async def test_both_sides_know_the_others_name_and_large_payloads_go_both_ways(places: dict[str, Path]) -> None:
    async with served(places) as (server, come):
        link = await come("n2")
        assert await link.call("whose", {}, timeout_s=PATIENCE_S) == "n2"
        assert (link.peer_node, server.links[0].peer_node) == ("n1", "n2")
        payloads = [os.urandom(size) for size in (1, 4096, 16_384, 16_385, SEAL_SIZE_MAX, SEAL_SIZE_MAX + 1, MIB)]
        for payload in payloads:
            await write(link, payload)
        assert server.payloads == payloads
        for letter in (b"a", b"b"):
            assert await read(link, letter) == letter * SIZE


async def test_many_large_payloads_at_once_both_ways_arrive_whole_and_in_order(places: dict[str, Path]) -> None:
    """More than the sockets' buffers hold, so both sides have to wait for each other."""
    async with served(places) as (server, come):
        link = await come("n2")
        payloads = [bytes([number]) * MIB for number in range(24)]
        answers: list[bytes] = []
        async with trio.open_nursery() as nursery:

            async def read_one(number: int) -> None:
                answers.append(await read(link, bytes([number])))

            for number, payload in enumerate(payloads):
                nursery.start_soon(write, link, payload)
                nursery.start_soon(read_one, number)
        assert sorted(server.payloads) == payloads
        assert sorted(answers) == payloads


async def test_what_was_sealed_and_not_taken_by_a_full_socket_leaves_when_there_is_room(places: dict[str, Path]) -> None:
    async with served(places) as (server, come):
        link = await come("n2")
        await write(link, b"x")
        far, seal = server.links[0], link._seal
        assert seal is not None
        server.engine.modify(far._fd, 0)  # it reads no more
        answered: list[object] = []
        count = 0
        while seal.unsent is None:
            link.request(Kind.WRITE, b"head", bytes(64 * KIB), lambda frame, error: answered.append(error))
            count += 1
        assert not link._outgoing
        server.engine.modify(far._fd, select.EPOLLIN)
        await until(lambda: len(answered) == count)
        assert answered == [None] * count
        assert server.payloads[1:] == [bytes(64 * KIB)] * count


async def test_nobody_can_read_what_goes_over_the_wire(places: dict[str, Path]) -> None:
    async with served(places) as (server, come), tapped(server) as tap:
        link = await come("n2")
        await write(link, b"the secret of the tower" * 1000)
        assert server.payloads == [b"the secret of the tower" * 1000]
        assert len(tap.seen) > 23_000
        assert b"secret" not in tap.seen


async def test_a_hello_in_another_nodes_name_is_refused_and_counted(places: dict[str, Path]) -> None:
    async with served(places) as (server, come):
        link = await come("n2")
        assert await link.call("hello", {"node": "n2"}, timeout_s=PATIENCE_S) == {"drives": []}
        with pytest.raises(AccessDenied, match="says that it is node 'n3'"):
            await link.call("hello", {"node": "n3"}, timeout_s=PATIENCE_S)
        assert server.engine.refusals.counts == {"wrong_node": 1}


async def test_a_client_refuses_a_node_that_is_not_the_one_it_wanted(places: dict[str, Path]) -> None:
    async with served(places) as (server, come):
        for wanted in ("n3", "N1", "n", ""):
            with pytest.raises(Refused, match="was wanted, the certificate is of node n1"):
                await come("n2", wanted)
        await trio.sleep(0.05)
        assert (server.links, server.frames) == ([], 0)


# Strangers


def stranger(places: dict[str, Path], certificate: str | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certificate is not None:
        context.load_cert_chain(places[certificate] / "node.crt", places[certificate] / "node.key")
    return context


async def knock(server: Server, context: ssl.SSLContext) -> None:
    """Speak TLS, send a frame of ours inside, and get nothing."""
    stream = await trio.open_tcp_stream(*server.address)
    tls = trio.SSLStream(stream, context, https_compatible=True)
    with trio.fail_after(PATIENCE_S), pytest.raises((trio.BrokenResourceError, ssl.SSLError)):
        await tls.do_handshake()
        await tls.send_all(bytes(100))
        assert await tls.receive_some(100) == b""
        raise trio.BrokenResourceError
    await trio.aclose_forcefully(stream)


async def test_a_stranger_without_a_certificate_gets_nothing(places: dict[str, Path]) -> None:
    async with served(places) as (server, _):
        await knock(server, stranger(places, None))
        await server.refused(Reason.NO_CERTIFICATE)


async def test_a_node_of_another_cluster_gets_nothing(places: dict[str, Path]) -> None:
    async with served(places) as (server, come):
        await knock(server, stranger(places, "foreign"))
        await server.refused(Reason.FOREIGN)
        with pytest.raises(Refused, match="not one of this cluster's"):
            await come("foreign")


async def test_whoever_speaks_an_older_tls_gets_nothing(places: dict[str, Path]) -> None:
    async with served(places) as (server, _):
        context = stranger(places, "n2")
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        await knock(server, context)
        await server.refused(Reason.NOT_TLS)


async def test_frames_without_tls_get_nothing(places: dict[str, Path]) -> None:
    async with served(places) as (server, _):
        engine = Engine()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.run_forever)
            link = await connect(engine, server.address, timeout_s=PATIENCE_S)
            with pytest.raises((Disconnected, Unavailable)):
                await link.call("whose", {}, timeout_s=PATIENCE_S)
            nursery.cancel_scope.cancel()
        engine.close()
        await server.refused(Reason.NOT_TLS)


async def test_a_server_without_tls_is_refused_by_a_node_with_it(places: dict[str, Path]) -> None:
    plain, engine = Engine(), Engine(Identity("n2", places["n2"]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(plain.run_forever)
        nursery.start_soon(engine.run_forever)
        server = Server(plain, nursery, ("127.0.0.1", 0))
        with pytest.raises(Unavailable):
            await connect(engine, server.address, timeout_s=PATIENCE_S, node="n1")
        assert server.frames == 0
        nursery.cancel_scope.cancel()
    plain.close()
    engine.close()


async def test_a_handshake_that_is_never_finished_is_closed(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "HANDSHAKE_S", 0.05)
    async with served(places) as (server, _):
        stream = await trio.open_tcp_stream(*server.address)
        hello = client_hello(places)
        await stream.send_all(hello[: len(hello) // 2])
        with trio.fail_after(PATIENCE_S):
            assert await ended(stream)
        await server.refused(Reason.SLOW)
        silent = await trio.open_tcp_stream(*server.address)
        with trio.fail_after(PATIENCE_S):
            assert await ended(silent)
        await server.refused(Reason.SLOW, 2)
        assert server.listener._reception.unfinished == 0


async def test_a_handshake_larger_than_any_of_ours_is_closed(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hello that announces more than it may have, record by record; and, with a limit below ours, a real one."""
    async with served(places) as (server, _):
        stream = await trio.open_tcp_stream(*server.address)
        body = b"\x01" + (1 << 23).to_bytes(3, "big") + bytes(16_000)  # a ClientHello of 8 MiB begins
        with contextlib.suppress(trio.BrokenResourceError):
            for _ in range(8):
                await stream.send_all(struct.pack(">BHH", 22, 0x0301, len(body)) + body)
        with trio.fail_after(PATIENCE_S):
            assert await ended(stream)
        await until(lambda: server.engine.refusals.counts)
        assert set(server.engine.refusals.counts) <= {Reason.LONG.value, Reason.NOT_TLS.value}
        assert server.links == []
    monkeypatch.setattr(handshakes, "HANDSHAKE_SIZE_MAX", 100)
    async with served(places) as (server, _):
        stream = await trio.open_tcp_stream(*server.address)
        await stream.send_all(client_hello(places))
        with trio.fail_after(PATIENCE_S):
            assert await ended(stream)
        await server.refused(Reason.LONG)


async def test_unfinished_handshakes_are_few_and_those_who_belong_here_come_through(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "UNFINISHED_MAX", 4)
    async with served(places) as (server, come):
        strangers = [await trio.open_tcp_stream(*server.address) for _ in range(20)]
        link = await come("n2")
        assert await link.call("whose", {}, timeout_s=PATIENCE_S) == "n2"
        assert server.listener._reception.unfinished <= 4
        assert server.engine.refusals.counts[Reason.CROWDED.value] >= 16
        for each in strangers:
            await each.aclose()


async def test_a_stranger_that_goes_in_the_middle_of_its_handshake_leaves_nothing(places: dict[str, Path]) -> None:
    async with served(places) as (server, _):
        stream = await trio.open_tcp_stream(*server.address)
        await stream.send_all(client_hello(places)[:40])
        await stream.aclose()
        await server.refused(Reason.BROKEN_OFF)
        assert server.listener._reception.unfinished == 0


def client_hello(places: dict[str, Path]) -> bytes:
    handshake = Handshake(Identity("n2", places["n2"]), accepting=False)
    assert handshake.advance(b"") is None
    return handshake.to_send()


async def ended(stream: trio.SocketStream) -> bool:
    """Whether the other side closes, whatever alerts it sends first."""
    try:
        while await stream.receive_some(1000):
            pass
    except trio.BrokenResourceError:
        pass
    return True


# Evicted nodes


async def test_a_revoked_certificate_loses_its_links_at_once_and_gets_no_new_ones(
    places: dict[str, Path], tmp_path: Path
) -> None:
    """As `csvfs node evict` writes it into the cluster store: the key is followed."""
    store = EmbeddedStore(tmp_path / "store.db")
    async with served(places) as (server, come):
        identity = server.engine.identity
        assert identity is not None
        evicted, other = await come("n2"), await come("n3")
        for link in (evicted, other):
            await link.call("whose", {}, timeout_s=PATIENCE_S)
        async with trio.open_nursery() as nursery:
            await nursery.start(follow_revoked_forever, store, identity.revoke)
            await store.put("revoked/no-number", b"")
            await store.put(revoked_key(serial_in(places["n2"])), b"")
            await until(lambda: evicted.closed is not None)
            with pytest.raises(Unavailable):
                link = await come("n2")
                await link.call("whose", {}, timeout_s=PATIENCE_S)
            await until(lambda: server.engine.refusals.counts.get(Reason.REVOKED.value))
            assert await other.call("whose", {}, timeout_s=PATIENCE_S) == "n3"
            assert [link.peer_node for link in server.links if link.closed is None] == ["n3"]
            nursery.cancel_scope.cancel()
    await store.close()


async def test_a_node_does_not_connect_to_one_that_was_evicted(places: dict[str, Path]) -> None:
    async with served(places) as (server, _):
        engine = Engine(Identity("n2", places["n2"]))
        assert engine.identity is not None
        engine.identity.revoke([serial_in(places["n1"])])
        with pytest.raises(Refused, match="node n1 is revoked"):
            await connect(engine, server.address, timeout_s=PATIENCE_S, node="n1")
        engine.close()


# Sockets that block

async def test_the_block_reader_of_a_coordinator_shows_and_wants_certificates_too(places: dict[str, Path]) -> None:
    async with served(places) as (server, _):
        identity = Identity("n2", places["n2"])

        def ask(node: str) -> str:
            address = ServerAddress(NodeName(node), *server.address, "", Incarnation(1))
            connection = _Connection(address, {"node": "n2"}, identity, local=False)
            try:
                return str(control.unpack_value(connection.request(Kind.CALL, control.pack_call("whose", {})).head))
            finally:
                connection.close()

        assert await trio.to_thread.run_sync(ask, "n1") == "n2"
        with pytest.raises(Refused, match="node n3 was wanted, the certificate is of node n1"):
            await trio.to_thread.run_sync(ask, "n3")
        identity.revoke([serial_in(places["n1"])])
        with pytest.raises(Refused, match="node n1 is revoked"):
            await trio.to_thread.run_sync(ask, "n1")


# The stream


class Tap:
    """Between two sides: sees all, and may change what goes to the server."""

    def __init__(self) -> None:
        self.seen = bytearray()
        self.change: Callable[[bytearray], None] = lambda data: None
        self.forward = 0


@contextlib.asynccontextmanager
async def tapped(server: Server) -> AsyncIterator[Tap]:
    """`server.address` is that of the tap, until the end."""
    tap, target = Tap(), server.address

    async def carry(source: trio.SocketStream, sink: trio.SocketStream, upwards: bool) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                if upwards:
                    data = bytearray(data)
                    tap.change(data)
                    tap.forward += len(data)
                tap.seen += data
                await sink.send_all(data)
            await sink.send_eof()

    async def join(client: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream(*target)
        async with client, far, trio.open_nursery() as nursery:
            nursery.start_soon(carry, client, far, True)
            nursery.start_soon(carry, far, client, False)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, join, listeners)
        server.address = listeners[0].socket.getsockname()[:2]
        yield tap
        nursery.cancel_scope.cancel()


async def test_a_bit_flipped_anywhere_closes_the_link_and_nothing_wrong_is_delivered(places: dict[str, Path]) -> None:
    payload = os.urandom(100_000)
    async with served(places) as (server, come), tapped(server) as tap:
        for distance in (0, 4, 5, 6, 500, 16_500, 60_001, 99_000):
            link = await come("n2")
            await write(link, payload)
            server.payloads.clear()
            begin = tap.forward

            def flip(data: bytearray, at: int = begin + distance) -> None:
                if 0 <= at - tap.forward < len(data):
                    data[at - tap.forward] ^= 0x10

            tap.change = flip
            with pytest.raises(Disconnected):
                await write(link, payload)
                pytest.fail(f"a flipped bit at {distance} was not noticed")
            tap.change = lambda data: None
            assert server.payloads == []
        await until(lambda: all(link.closed is not None for link in server.links))
        assert all(isinstance(link.closed, Disconnected) for link in server.links)


async def test_a_side_that_sends_no_more_ends_the_link(places: dict[str, Path]) -> None:
    """By the socket alone, as when a process is killed: there is no farewell of TLS."""
    async with served(places) as (server, come):
        link = await come("n2")
        await write(link, b"x" * 4096)
        link._socket.shutdown(socket.SHUT_WR)
        await until(lambda: server.links[0].closed is not None and link.closed is not None)
        assert isinstance(server.links[0].closed, Disconnected)
        assert isinstance(link.closed, Disconnected)


async def test_a_farewell_of_tls_ends_the_link_after_what_came_before_it(places: dict[str, Path]) -> None:
    async with served(places) as (server, come):
        link = await come("n2")
        seal = link._seal
        assert seal is not None
        link.engine.in_batch = True  # so that it collects what is sent
        link.engine.at_batch_end = lambda function: None  # type: ignore[method-assign]
        link.send(Kind.WRITE, 1, b"head", b"y" * 4096)
        seal.send(link._socket, link._outgoing)
        with contextlib.suppress(ssl.SSLError):
            seal._write.__self__.unwrap()  # type: ignore[attr-defined]
        link._socket.send(seal._outgoing.read())
        await until(lambda: server.links and server.links[0].closed is not None)
        assert server.payloads == [b"y" * 4096]


class Wire:
    """A socket without a kernel: what is sent lies in `sent`; what `given` has is received."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.given = bytearray()
        self.takes: int | None = None  # bytes of the next send; None: all

    def send(self, data: memoryview) -> int:
        if self.takes == 0:
            raise BlockingIOError
        count = len(data) if self.takes is None else min(self.takes, len(data))
        self.sent += data[:count]
        return count

    def recv_into(self, buffer: bytearray) -> int:
        if not self.given:
            raise BlockingIOError
        count = min(len(buffer), len(self.given))
        buffer[:count] = self.given[:count]
        del self.given[:count]
        return count


def sealed_pair(places: dict[str, Path]) -> tuple[Seal, Seal]:
    server = Handshake(Identity("n1", places["n1"]), accepting=True)
    client = Handshake(Identity("n2", places["n2"]), accepting=False)
    assert client.advance(b"") is None
    assert server.advance(client.to_send()) is None
    near = client.advance(server.to_send())
    far = server.advance(client.to_send())
    assert near is not None and far is not None
    return near, far


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.integers(1, 300), st.integers(4000, 70_000)), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 40_000), min_size=1, max_size=8),
    room=st.integers(1, 100_000),
    takes=st.one_of(st.none(), st.integers(1, 50_000)),
)
def test_however_the_stream_is_cut_what_comes_out_is_what_went_in(
    places: dict[str, Path], sizes: list[int], cuts: list[int], room: int, takes: int | None
) -> None:
    near, far = sealed_pair(places)
    plain = [os.urandom(size) for size in sizes]
    wire, pieces = Wire(), list(plain)
    wire.takes = takes
    while pieces or near.unsent is not None:
        taken = near.send(wire, pieces)  # type: ignore[arg-type]
        while taken:
            size = len(pieces[0])
            if size <= taken:
                taken -= size
                pieces.pop(0)
            else:
                pieces[0] = pieces[0][taken:]
                taken = 0
    opened, buffer, number = bytearray(), memoryview(bytearray(room)), 0
    while wire.sent:
        count = cuts[number % len(cuts)]
        number += 1
        wire.given += wire.sent[:count]
        del wire.sent[:count]
        while wire.given or far.has_more:
            with contextlib.suppress(BlockingIOError):
                opened += buffer[: far.receive_into(wire, buffer)]  # type: ignore[arg-type]
    assert bytes(opened) == b"".join(plain)


def test_a_socket_that_takes_nothing_is_told_once_what_was_sealed(places: dict[str, Path]) -> None:
    near, _ = sealed_pair(places)
    wire = Wire()
    wire.takes = 0
    assert near.send(wire, [b"first"]) == 5  # type: ignore[arg-type]
    assert near.unsent is not None
    with pytest.raises(BlockingIOError):
        near.send(wire, [b"second"])  # type: ignore[arg-type]
    wire.takes = None
    assert near.send(wire, [b"second"]) == 0  # type: ignore[arg-type]
    assert near.unsent is None
    assert near.send(wire, [b"second"]) == 6  # type: ignore[arg-type]
    assert near.unsent is None


# Certificates and configuration


def test_certificates_that_do_not_work_keep_a_process_from_starting(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"node\.crt is the certificate of node n1, not of n2"):
        Identity("n2", places["n1"])
    with pytest.raises(Unavailable, match="do not work"):
        Identity("n1", tmp_path / "nowhere")
    place = EtcdPlace(tmp_path / "mixed")
    write_certificates(place, issue(*OURS, "n1", "127.0.0.1"))
    place.ca_path.write_text(THEIRS[0])
    with pytest.raises(Unavailable, match="not one of this cluster's"):
        Identity("n1", place.directory)


def test_the_configuration_says_where_the_certificates_are_and_etcds_place_is_the_default(
    places: dict[str, Path],
) -> None:
    def config(store: str, tls: str = ""):  # type: ignore[no-untyped-def]
        text = f'node = "n1"\naddress = "10.0.0.1"\nstore = "{store}"\n{tls}'
        return parse_config(text.encode(), Path("node.toml"))

    assert config("etcd:/var/lib/csvfs/etcd").tls_dir == Path("/var/lib/csvfs/etcd")
    assert config("embedded:/store.db").tls_dir is None
    assert config("etcd:/var/lib/csvfs/etcd", 'tls_dir = "none"').tls_dir is None
    assert open_identity(config("embedded:/store.db")) is None
    there = open_identity(config("embedded:/store.db", f'tls_dir = "{places["n1"]}"'))
    assert there is not None and there.node == "n1"


# Unix sockets


async def test_a_unix_socket_takes_its_own_user_and_root_and_nobody_else(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "s")
    async with served(places, path) as (server, _):
        engine = Engine()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.run_forever)
            link = await connect(engine, path, timeout_s=PATIENCE_S)
            assert await link.call("whose", {}, timeout_s=PATIENCE_S) == "n1"
            monkeypatch.setattr("csvfs.net.link.peer_uid", lambda sock: 1234)
            link = await connect(engine, path, timeout_s=PATIENCE_S)
            with pytest.raises((Disconnected, Unavailable)):
                await link.call("whose", {}, timeout_s=PATIENCE_S)
            nursery.cancel_scope.cancel()
        engine.close()
        assert server.engine.refusals.counts == {Reason.WRONG_USER.value: 1}
        assert len(server.links) == 1


# Counted and told


def test_a_host_that_knocks_all_the_time_is_counted_each_time_and_logged_once_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(refusals.time, "monotonic", lambda: now[0])
    found = Refusals()
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            found.note(Reason.NO_CERTIFICATE, "10.0.0.9", "it shows no certificate")
        found.note(Reason.NOT_TLS, "10.0.0.8", "it does not speak TLS 1.3")
        now[0] += refusals.LOG_INTERVAL_S
        found.note(Reason.NO_CERTIFICATE, "10.0.0.9", "it shows no certificate")
    assert found.counts == {"no_certificate": 51, "not_tls": 1}
    assert [record.args[0] for record in caplog.records if record.args] == ["10.0.0.9", "10.0.0.8", "10.0.0.9"]


def test_many_hosts_fill_neither_the_log_nor_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    found = Refusals()
    for number in range(3 * refusals.HOSTS_MAX):
        found.note(Reason.NOT_TLS, f"10.0.{number >> 8}.{number & 255}", "noise")
    assert found.counts == {"not_tls": 3 * refusals.HOSTS_MAX}
    assert len(caplog.records) == len(found._logged) == refusals.HOSTS_MAX
