"""The etcd store when answers are lost, members die, hang, and forget their past."""

import json
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from csvfs.errors import BadRequest, CsvfsError, Disconnected, NotFound, ProtocolError, Unavailable
from csvfs.store import etcd, etcd_client, etcd_messages
from csvfs.store.etcd import EtcdStore
from csvfs.store.etcd_http import Endpoint, HttpConnection
from csvfs.store.etcd_place import EtcdPlace, parse_endpoint
from csvfs.store.etcd_watch import EtcdWatch
from csvfs.store.interface import Change, Compare, Delete, Put
from tests.etcd_proxy import LossyProxy
from tests.etcd_server import EtcdServer, needs_etcd, running_etcd

PATIENCE_S = 60


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take long over an election; what is tested is that it ends well."""
    monkeypatch.setattr(etcd_client, "OPERATION_S", PATIENCE_S)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[EtcdServer]]:
    """Three members; a test that harms one mends it again."""
    with running_etcd(tmp_path_factory.mktemp("etcd"), count=3, **{"max-request-bytes": 1_572_864}) as servers:
        yield servers


@pytest.fixture
async def store(servers: list[EtcdServer]) -> AsyncIterator[EtcdStore]:
    """An empty store, through the first member at first."""
    store = EtcdStore(servers[0].place)
    await until_done(lambda: clear(store))
    yield store
    await store.close()


async def clear(store: EtcdStore) -> None:
    await store.transact([], [Delete(item.key) for item in await store.list("")])


async def until_done(work):  # type: ignore[no-untyped-def]
    """Again until the store has a majority: members that were started again need a moment."""
    with trio.fail_after(PATIENCE_S):
        while True:
            try:
                return await work()
            except Unavailable:
                await trio.sleep(0.1)


async def next_changes(changes: AsyncIterator[list[Change]]) -> list[Change]:
    with trio.fail_after(PATIENCE_S):
        return await anext(changes)


# Lost answers


@needs_etcd
async def test_a_transaction_whose_answer_is_lost_recognises_its_own_success(
    store: EtcdStore, servers: list[EtcdServer], tmp_path: Path
) -> None:
    async with trio.open_nursery() as nursery:
        proxy = LossyProxy(servers[0].endpoint)
        await nursery.start(proxy.serve)
        EtcdPlace(tmp_path).write_endpoints([proxy.endpoint])
        lossy = EtcdStore(EtcdPlace(tmp_path))
        revision = await lossy.put("a", b"1")
        for number in range(5):
            proxy.lose_next = 1
            result = await lossy.transact([Compare("a", revision)], [Put("a", b"%d" % number)])
            assert result.succeeded
            item = await store.get("a")
            assert item is not None and item.value == b"%d" % number
            assert item.revision == result.revision
            revision = result.revision
        proxy.lose_next = 1
        assert not (await lossy.transact([Compare("a", 1)], [Put("a", b"wrong")])).succeeded
        await lossy.close()
        nursery.cancel_scope.cancel()
    assert proxy.lost_count == 6


@needs_etcd
@pytest.mark.parametrize("seed", range(3))
async def test_counting_through_connections_that_break_at_random_counts_every_step_once(
    store: EtcdStore, servers: list[EtcdServer], tmp_path: Path, seed: int
) -> None:
    async def count(number: int, done: list[int]) -> None:
        proxy = LossyProxy(servers[number % 3].endpoint)
        proxy.chaos = random.Random(seed * 10 + number)
        await nursery.start(proxy.serve)
        place = EtcdPlace(tmp_path / str(number))
        place.directory.mkdir()
        place.write_endpoints([proxy.endpoint])
        lossy = EtcdStore(place)
        for _ in range(10):
            while True:
                item = await lossy.get("counter")
                value, revision = (int(item.value), item.revision) if item else (0, 0)
                put = Put("counter", b"%d" % (value + 1))
                if (await lossy.transact([Compare("counter", revision)], [put])).succeeded:
                    break
        await lossy.close()
        done.append(proxy.lost_count)

    async with trio.open_nursery() as nursery:
        done: list[int] = []
        for number in range(3):
            nursery.start_soon(count, number, done)
        with trio.fail_after(PATIENCE_S):
            while len(done) < 3:
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    item = await store.get("counter")
    assert item is not None and item.value == b"30"
    assert sum(done) > 0


@needs_etcd
async def test_a_handle_that_stood_still_for_longer_than_its_token_goes_on(
    store: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = await store.put("a", b"1")
    assert store._token is not None
    await store.revoke_lease(store._token.lease)  # as if two minutes had passed
    result = await store.transact([Compare("a", revision)], [Put("a", b"2")])
    assert result.succeeded
    assert store._token is not None
    await store.revoke_lease(store._token.lease)
    assert not (await store.transact([Compare("a", revision)], [Put("a", b"3")])).succeeded
    with pytest.raises(NotFound, match="lease has ended"):
        await store.put("a", b"4", lease=12345)
    item = await store.get("a")
    assert item is not None and item.value == b"2"


# Members that die and hang


@needs_etcd
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_losing_any_one_member_is_not_noticed_and_losing_two_says_so(
    store: EtcdStore, servers: list[EtcdServer], how: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = await store.grant_lease(60_000)
    for victim in servers:
        await until_all_answer(servers)
        victim.signal(how)
        try:
            async with store.watch("") as changes:
                await store.put("a", victim.name.encode(), lease)
                assert [change.key for change in await next_changes(changes)] == ["a"]
            await store.keep_alive(lease)
        finally:
            mend(victim, how)
    await until_done(lambda: store.keep_alive(lease))
    with monkeypatch.context() as patch:
        patch.setattr(etcd_client, "OPERATION_S", 1.5)
        await lose_two(store, servers, how)
    await until_done(lambda: store.put("a", b"back"))
    await store.revoke_lease(lease)


async def until_all_answer(servers: list[EtcdServer]) -> None:
    """Each on its own, so that the next test finds the member that it asks first."""
    for server in servers:
        client = etcd_client.EtcdClient(server.place)
        await until_done(lambda server=server, client=client: client.call(ask_through(server)))
        client.close()


def ask_through(server: EtcdServer):  # type: ignore[no-untyped-def]
    async def work(connection: HttpConnection) -> dict:
        if connection.endpoint != server.endpoint:
            raise Disconnected("another member")
        return await connection.post("/v3/kv/range", etcd_messages.range_request(b"none"))

    return work


def mend(server: EtcdServer, how: int) -> None:
    if how == signal.SIGSTOP:
        server.signal(signal.SIGCONT)
    else:
        server.stop()
        server.start()


async def lose_two(store: EtcdStore, servers: list[EtcdServer], how: int) -> None:
    for victim in servers[:2]:
        victim.signal(how)
    try:
        for work in (lambda: store.get("a"), lambda: store.put("a", b"lost")):
            with pytest.raises(Unavailable, match="majority"), trio.fail_after(PATIENCE_S):
                await work()
    finally:
        for victim in servers[:2]:
            mend(victim, how)


@needs_etcd
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_watch_outlives_its_member_and_leaves_nothing_out(
    store: EtcdStore, servers: list[EtcdServer], how: int
) -> None:
    await until_all_answer(servers)
    watching, other = EtcdStore(servers[0].place), EtcdStore(servers[1].place)
    seen: list[bytes] = []
    async with watching.watch("k") as changes:
        assert isinstance(changes, EtcdWatch)
        await other.put("k", b"first")
        assert await next_changes(changes)
        assert changes._stream is not None and changes._stream.endpoint == servers[0].endpoint
        servers[0].signal(how)
        try:
            for number in range(20):
                await until_done(lambda number=number: other.put(f"k{number:02}", b"%d" % number))
            while len(seen) < 20:
                seen += [change.item.value for change in await next_changes(changes) if change.item]
        finally:
            mend(servers[0], how)
    assert seen == [b"%d" % number for number in range(20)]
    await other.close()
    await watching.close()


@needs_etcd
async def test_a_watch_behind_compaction_still_learns_every_deletion(
    store: EtcdStore, servers: list[EtcdServer]
) -> None:
    for number in range(20):
        await store.put(f"k/{number:02}", b"")
    async with store.watch("k/") as changes:
        for number in range(19):
            await store.delete(f"k/{number:02}")
        revision = await store.put("k/new", b"")
        await store._ask("/v3/kv/compaction", {"revision": str(revision), "physical": True})
        batch = await next_changes(changes)
        assert sorted(c.key for c in batch if c.item is None) == [f"k/{number:02}" for number in range(19)]
        assert [c.key for c in batch if c.item] == ["k/new"]
        await store.put("k/after", b"")
        assert [c.key for c in await next_changes(changes)] == ["k/after"]


@needs_etcd
async def test_many_and_large_values_are_read_in_pages_and_watched_in_fragments(
    store: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd, "PAGE_ITEMS", 7)
    many = [Put(f"many/{number:03}", b"%d" % number) for number in range(200)]
    large = [Put(f"large/{number}", bytes([number]) * (1 << 20)) for number in range(5)]
    async with store.watch("") as changes:
        await store.transact([], [*many])
        for put_one in large:  # more than etcd sends in one message, since the watch has not begun to read
            await store.transact([], [put_one])
        seen: dict[str, bytes] = {}
        while len(seen) < 205:
            for change in await next_changes(changes):
                assert change.item is not None and change.key not in seen
                seen[change.key] = change.item.value
    put = {change.key: change.value for change in [*many, *large]}
    assert seen == put
    assert {item.key: item.value for item in await store.list("")} == put


@needs_etcd
async def test_a_renewal_passed_on_by_a_deposed_leader_does_not_count(
    store: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T2. The member's term at the renewal is made to be an earlier one than at the read behind it."""
    lease = await store.grant_lease(60_000)
    real_post, paths = HttpConnection.post, []

    async def post(self: HttpConnection, path: str, body: dict) -> dict:
        answer = await real_post(self, path, body)
        paths.append(path)
        if path == "/v3/lease/keepalive":
            header = answer["result"]["header"]
            header["raft_term"] = str(int(header["raft_term"]) - 1)
        return answer

    monkeypatch.setattr(HttpConnection, "post", post)
    with pytest.raises(Unavailable, match="elects"):
        await store.keep_alive(lease)
    assert paths == ["/v3/lease/keepalive", "/v3/kv/range"] * etcd.KEEP_ALIVE_TRIES_MAX
    monkeypatch.undo()
    await store.keep_alive(lease)


# Places and answers


async def test_a_node_that_has_no_cluster_yet_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="one host:port a line"):
        EtcdStore(EtcdPlace(tmp_path))
    (tmp_path / "endpoints").write_text("10.0.0.1\n")
    with pytest.raises(BadRequest, match=r"write 10\.0\.0\.1:7003"):
        EtcdStore(EtcdPlace(tmp_path))


async def test_nobody_there_is_unavailable_and_names_who_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_client, "OPERATION_S", 0.3)
    EtcdPlace(tmp_path).write_endpoints([Endpoint("127.0.0.1", 9), Endpoint("::1", 9)])
    store = EtcdStore(EtcdPlace(tmp_path))
    with pytest.raises(Unavailable, match=r"no majority.*127.0.0.1:9: connection refused.*\[::1\]:9"):
        await store.get("a")
    await store.close()
    with pytest.raises(Unavailable, match="closed"):
        await store.get("a")


@pytest.mark.parametrize("text", ["10.0.0.1:7003", "[fd00::1]:7003", "host.example:1"])
def test_endpoints_are_read_as_they_are_written(text: str) -> None:
    assert str(parse_endpoint(text, "here")) == text


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[1]", b"\0" * 100_000,
                                    b"HTTP/1.1 200 OK\r\n\r\n{}", b"HTTP/1.1 500 No\r\n\r\nx"])  # fmt: skip
async def test_a_server_that_is_no_etcd_is_a_member_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr(etcd_client, "OPERATION_S", 0.2)

    async def serve(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):  # who is answered nonsense hangs up
            await stream.receive_some(65_536)
            await stream.send_all(answer)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        place = EtcdPlace(tmp_path)
        place.write_endpoints([Endpoint("127.0.0.1", listener.socket.getsockname()[1])])
        store = EtcdStore(place)
        with pytest.raises((Unavailable, ProtocolError)):
            await store.transact([], [Put("a", b"")])
        await store.close()
        nursery.cancel_scope.cancel()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["header", "kvs", "kv", "key", "value", "mod_revision", "revision", "lease", "error",
                         "events", "code", "message", "type"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(JSON)
def test_whatever_an_answer_holds_it_is_understood_or_refused(value: object) -> None:
    text = json.dumps(value).encode()
    for parse in (etcd_messages.header_of, etcd_messages.parse_item, etcd_messages.parse_change,
                  lambda answer: etcd_messages.objects(answer, "kvs")):  # fmt: skip
        try:
            parse(etcd_messages.parse_object(text))
        except CsvfsError:
            pass
    etcd_messages.refusal(503, text)
