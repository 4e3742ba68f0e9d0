"""Links on the engine: calls, errors, large frames, broken and hostile peers, over real sockets."""

import socket

import pytest
import trio

from csvfs.errors import BadRequest, Disconnected, NotFound, ResultTooLarge, TimedOut, Unavailable
from csvfs.net.calls import CallTable, field
from csvfs.net.engine import Engine
from csvfs.net.link import Link, Listener, connect
from csvfs.units import MIB
from csvfs.wire.frames import Kind


class Server:
    """Answers `echo`, `fail`, `slow` and READ frames of 1 MiB."""

    def __init__(self, engine: Engine, nursery: trio.Nursery, address=("127.0.0.1", 0)) -> None:
        self.nursery = nursery
        self.links: list[Link] = []
        self.table = CallTable(
            {
                "echo": self.echo,
                "fail": self.fail,
                "slow": self.slow,
                "huge": lambda link, args: b"x" * 2 * MIB,
            }
        )
        self.listener = Listener(engine, address, self.accept)

    def accept(self, link: Link) -> None:
        self.links.append(link)
        link.on_frame = self.on_frame

    def on_frame(self, link, frame) -> None:
        if frame.kind == Kind.READ:
            link.send(Kind.READ_DATA, frame.request_id, b"", bytes(frame.head[:1]) * MIB)
        else:
            self.table.handle(link, frame, self.nursery)

    def echo(self, link, args):
        return field(args, "value", int)

    def fail(self, link, args):
        raise NotFound("slab 7 is not on drive n1-d1")

    async def slow(self, link, args):
        await trio.sleep_forever()


@pytest.fixture
async def server(nursery):
    engine = Engine()
    nursery.start_soon(engine.run_forever)
    server = Server(engine, nursery)
    link = await connect(engine, ("127.0.0.1", server.listener.port), timeout_s=60)
    yield server, link, engine
    nursery.cancel_scope.cancel()


async def test_a_call_is_answered_with_its_value_or_with_the_error_of_the_peer(server):
    _, link, _ = server
    assert await link.call("echo", {"value": 42}, timeout_s=60) == 42
    with pytest.raises(NotFound, match="slab 7"):
        await link.call("fail", {}, timeout_s=60)
    with pytest.raises(BadRequest, match="value"):
        await link.call("echo", {"value": "x"}, timeout_s=60)
    with pytest.raises(ResultTooLarge, match="ask for less"):
        await link.call("huge", {}, timeout_s=60)
    with pytest.raises(BadRequest, match="not served"):
        await link.call("nonsense", {}, timeout_s=60)


async def test_hundreds_of_calls_and_megabyte_frames_on_one_link_keep_their_answers_apart(server):
    _, link, _ = server
    answers = {}
    done = trio.Event()

    def answer(index):
        def take(frame, error):
            answers[index] = (bytes(frame.payload[:1]), bytes(frame.payload[-1:]), len(frame.payload))
            if len(answers) == 40:
                done.set()

        return take

    for index in range(40):
        link.request(Kind.READ, bytes([index]), None, answer(index))
    results = {}

    async def call(value):
        results[value] = await link.call("echo", {"value": value}, timeout_s=60)

    async with trio.open_nursery() as nursery:
        for value in range(200):
            nursery.start_soon(call, value)
    await done.wait()
    assert answers == {index: (bytes([index]), bytes([index]), MIB) for index in range(40)}
    assert results == {value: value for value in range(200)}


async def test_a_peer_that_goes_away_disconnects_every_waiting_call(server):
    served, link, _ = server
    seen = []

    async def wait_for_answer():
        with pytest.raises(Disconnected) as raised:
            await link.call("slow", {}, timeout_s=60)
        seen.append(raised.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_answer)
        nursery.start_soon(wait_for_answer)
        await link.call("echo", {"value": 1}, timeout_s=60)
        served.links[0].close()
    assert len(seen) == 2
    with pytest.raises(Disconnected):
        await link.call("echo", {"value": 1}, timeout_s=60)


async def test_a_call_past_its_deadline_times_out_and_its_late_answer_is_ignored(server):
    _, link, _ = server
    with pytest.raises(TimedOut, match="slow"):
        await link.call("slow", {}, timeout_s=0.01)
    assert await link.call("echo", {"value": 2}, timeout_s=60) == 2


async def test_random_bytes_close_the_connection_and_nothing_else(server):
    served, link, _ = server
    stranger = socket.create_connection(("127.0.0.1", served.listener.port))
    stranger.sendall(b"GET / HTTP/1.0\r\n\r\n" + bytes(range(256)))
    stranger.setblocking(False)
    with trio.fail_after(60):
        while True:
            try:
                assert stranger.recv(100) == b""
                break
            except (BlockingIOError, ConnectionResetError) as error:
                if isinstance(error, ConnectionResetError):
                    break
                await trio.sleep(0.001)
    stranger.close()
    assert await link.call("echo", {"value": 3}, timeout_s=60) == 3


async def test_nobody_listening_is_unavailable_not_a_hang(server):
    _, _, engine = server
    with pytest.raises(Unavailable, match="cannot connect"):
        await connect(engine, ("127.0.0.1", 1), timeout_s=60)


async def test_a_unix_socket_left_by_a_killed_process_is_replaced(server, tmp_path, nursery):
    _, _, engine = server
    path = str(tmp_path / "s.sock")
    old = socket.socket(socket.AF_UNIX)
    old.bind(path)
    old.close()
    Server(engine, nursery, path)
    link = await connect(engine, path, timeout_s=60)
    assert await link.call("echo", {"value": 5}, timeout_s=60) == 5


async def test_an_engine_that_waits_for_hot_io_still_lets_other_tasks_run(server, monkeypatch):
    """While requests are hot the engine waits in its own epoll; timers and tasks must go on meanwhile."""
    _, link, engine = server
    monkeypatch.setattr("csvfs.net.engine.HOT_NS", 2_000_000)
    ticks = 0

    async def tick():
        nonlocal ticks
        for _ in range(20):
            await trio.sleep(0.001)
            ticks += 1

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tick)
            for value in range(200):
                engine.hot()
                assert await link.call("echo", {"value": value}, timeout_s=60) == value
    assert ticks == 20
