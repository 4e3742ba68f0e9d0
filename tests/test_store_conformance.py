"""What every back end of the cluster store must do (csvfs/store/interface.py).

A new back end adds one opener to OPENERS, and to `kind` what it needs; tests below that name the embedded store
are about it alone, test_store_etcd.py about etcd.
"""

import itertools
import multiprocessing
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio

from csvfs.errors import BadRequest, Corrupt, NotFound, Unavailable
from csvfs.store import embedded
from csvfs.store.embedded import EmbeddedStore
from csvfs.store.embedded_bell import Bell
from csvfs.store.etcd_place import EtcdPlace
from csvfs.store.interface import Change, ClusterStore, Compare, Delete, Put
from csvfs.store.opening import open_store
from tests.etcd_server import EtcdServer, needs_etcd, running_etcd

TTL_MS = 250  # real time: a back end keeps its own clock; etcd makes a second of it, or two
TTL_MS_MAX = 16_000

Opener = Callable[[], ClusterStore]
OPENERS: dict[str, Callable[[Path], ClusterStore]] = {
    "embedded": lambda directory: open_store(f"embedded:{directory}/store.db"),
    "etcd": lambda directory: open_store(f"etcd:{directory}"),
}


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One server for all tests of this file."""
    with running_etcd(tmp_path_factory.mktemp("etcd")) as (server,):
        yield server


@pytest.fixture(params=["embedded", pytest.param("etcd", marks=needs_etcd)])
async def kind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A back end, with an empty store that OPENERS[kind](tmp_path) opens."""
    if request.param == "etcd":
        EtcdPlace(tmp_path).write_endpoints([request.getfixturevalue("etcd").endpoint])
        store = open_store(f"etcd:{tmp_path}")
        await store.transact([], [Delete(item.key) for item in await store.list("")])
        await store.close()
    return str(request.param)


@pytest.fixture
async def open_handle(kind: str, tmp_path: Path) -> AsyncIterator[Opener]:
    """Opens as many handles on one store as the test wants."""
    handles: list[ClusterStore] = []

    def opener() -> ClusterStore:
        handles.append(OPENERS[kind](tmp_path))
        return handles[-1]

    yield opener
    for handle in handles:
        await handle.close()


@pytest.fixture
def store(open_handle: Opener) -> ClusterStore:
    return open_handle()


async def next_changes(changes: AsyncIterator[list[Change]]) -> list[Change]:
    with trio.fail_after(60):
        return await anext(changes)


# Keys and transactions


async def test_a_key_is_absent_then_there_then_gone(store: ClusterStore) -> None:
    assert await store.get("nodes/n1") is None
    revision = await store.put("nodes/n1", b"one")
    item = await store.get("nodes/n1")
    assert item is not None
    assert (item.key, item.value, item.revision, item.lease) == ("nodes/n1", b"one", revision, 0)
    await store.delete("nodes/n1")
    assert await store.get("nodes/n1") is None
    await store.delete("nodes/n1")


async def test_an_empty_value_is_not_an_absent_key(store: ClusterStore) -> None:
    await store.put("empty", b"")
    item = await store.get("empty")
    assert item is not None and item.value == b""


async def test_list_gives_what_starts_with_the_prefix_in_order(store: ClusterStore) -> None:
    for key in ("nodes/n2", "nodes/n10", "nodes/n1", "node", "nodesx", "nodes/", "nodes/é"):
        await store.put(key, key.encode())
    assert [item.key for item in await store.list("nodes/")] == [
        "nodes/", "nodes/n1", "nodes/n10", "nodes/n2", "nodes/é",
    ]  # fmt: skip
    assert len(await store.list("")) == 7
    assert await store.list("absent") == []


async def test_a_transaction_applies_all_or_nothing(store: ClusterStore) -> None:
    revision = await store.put("a", b"1")
    lost = await store.transact(
        [Compare("a", revision), Compare("b", revision)], [Put("a", b"2"), Put("b", b"2")]
    )
    assert (lost.succeeded, lost.revision) == (False, revision)
    won = await store.transact([Compare("a", revision), Compare("b", 0)], [Delete("a"), Put("b", b"2")])
    assert won.succeeded and won.revision > revision
    assert [(item.key, item.value) for item in await store.list("")] == [("b", b"2")]


async def test_a_key_made_again_after_deletion_does_not_satisfy_an_old_compare(store: ClusterStore) -> None:
    revision = await store.put("owner/v", b"n1")
    await store.delete("owner/v")
    assert not (await store.transact([Compare("owner/v", revision)], [Put("owner/v", b"x")])).succeeded
    assert (await store.transact([Compare("owner/v", 0)], [Put("owner/v", b"n2")])).succeeded


async def test_all_keys_of_a_transaction_bear_its_revision(store: ClusterStore) -> None:
    result = await store.transact([], [Put("a", b"1"), Put("b", b"1")])
    assert [item.revision for item in await store.list("")] == [result.revision] * 2


async def test_of_many_rivals_for_one_key_exactly_one_wins(open_handle: Opener) -> None:
    won: list[int] = []

    async def rival(number: int, store: ClusterStore) -> None:
        if (await store.transact([Compare("owner/v", 0)], [Put("owner/v", b"%d" % number)])).succeeded:
            won.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(rival, number, open_handle())
    item = await open_handle().get("owner/v")
    assert item is not None and [int(item.value)] == won


async def test_concurrent_counting_by_compare_and_swap_loses_no_step(open_handle: Opener) -> None:
    async def count(store: ClusterStore) -> None:
        for _ in range(10):
            while True:
                item = await store.get("counter")
                value, revision = (int(item.value), item.revision) if item else (0, 0)
                put = Put("counter", b"%d" % (value + 1))
                if (await store.transact([Compare("counter", revision)], [put])).succeeded:
                    break

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(count, open_handle())
    item = await open_handle().get("counter")
    assert item is not None and item.value == b"30"


@pytest.mark.parametrize(
    "changes",
    [
        [Put("", b"")],
        [Put("x" * 600, b"")],
        [Put("a\0b", b"")],
        [Put("a", b""), Delete("a")],
        [Put("a", bytes(2 << 20))],
    ],
    ids=["no key", "long key", "odd key", "one key twice", "large value"],
)
async def test_an_impossible_change_is_refused_by_name(store: ClusterStore, changes: list) -> None:
    with pytest.raises(BadRequest):
        await store.transact([], changes)
    assert await store.list("") == []


# Leases


async def lease_with_key(store: ClusterStore, key: str) -> tuple[int, int]:
    """A short lease that has a key, and its time in ms: as short as this machine manages to write to it in time."""
    ttl_ms = TTL_MS
    while True:
        lease = await store.grant_lease(ttl_ms)
        try:
            await store.put(key, b"", lease)
            return lease, ttl_ms
        except NotFound:
            ttl_ms *= 2
            assert ttl_ms <= TTL_MS_MAX, "a lease ends before a key can be written"


async def test_keys_of_a_lease_go_when_it_is_not_renewed(store: ClusterStore) -> None:
    await store.put("nodes/n1", b"")
    lease, _ = await lease_with_key(store, "alive/n1")
    with trio.fail_after(60):
        while await store.get("alive/n1"):
            await trio.sleep(0.02)
    assert [item.key for item in await store.list("")] == ["nodes/n1"]
    with pytest.raises(NotFound):
        await store.keep_alive(lease)
    with pytest.raises(NotFound):
        await store.put("alive/n1", b"", lease)
    assert await store.get("alive/n1") is None


async def test_a_renewed_lease_keeps_its_keys(store: ClusterStore) -> None:
    ttl_ms = TTL_MS
    while not await is_kept_alive(store, ttl_ms):
        ttl_ms *= 2  # this machine was busy for longer than the lease
        assert ttl_ms <= TTL_MS_MAX, "a lease ends though it is renewed"


async def is_kept_alive(store: ClusterStore, ttl_ms: int) -> bool:
    """Whether a lease and its key are there after twice its time, when it is renewed four times in that."""
    lease = await store.grant_lease(ttl_ms)
    try:
        await store.put("alive/n1", b"", lease)
        for _ in range(8):
            await trio.sleep(ttl_ms / 4000)
            await store.keep_alive(lease)
    except NotFound:
        return False
    return await store.get("alive/n1") is not None


async def test_revoking_a_lease_deletes_its_keys_at_once(open_handle: Opener) -> None:
    store, other = open_handle(), open_handle()
    lease = await store.grant_lease(60_000)
    await store.transact([], [Put("alive/n1", b"", lease), Put("servers/n1", b"", lease)])
    await other.revoke_lease(lease)
    assert await store.list("") == []
    with pytest.raises(NotFound):
        await store.keep_alive(lease)
    await store.revoke_lease(lease)
    await store.revoke_lease(12345)


async def test_a_key_put_again_without_lease_outlives_it(store: ClusterStore) -> None:
    lease = await store.grant_lease(60_000)
    await store.put("a", b"1", lease)
    await store.put("a", b"2")
    await store.revoke_lease(lease)
    item = await store.get("a")
    assert item is not None and (item.value, item.lease) == (b"2", 0)


async def test_leases_of_two_nodes_do_not_touch_each_other(store: ClusterStore) -> None:
    first, second = await store.grant_lease(60_000), await store.grant_lease(60_000)
    await store.put("alive/n1", b"", first)
    await store.put("alive/n2", b"", second)
    await store.revoke_lease(first)
    assert [item.key for item in await store.list("alive/")] == ["alive/n2"]


# Watches


async def test_a_watch_sees_changes_of_another_handle_in_order(open_handle: Opener) -> None:
    store, other = open_handle(), open_handle()
    await store.put("volumes/old", b"")
    async with store.watch("volumes/") as changes:
        await other.put("volumes/b", b"1")
        await other.put("elsewhere", b"")
        await other.put("volumes/a", b"1")
        await other.delete("volumes/old")
        seen: list[Change] = []
        while len(seen) < 3:
            seen += await next_changes(changes)
    assert [change.key for change in seen] == ["volumes/b", "volumes/a", "volumes/old"]
    assert [change.item is None for change in seen] == [False, False, True]
    assert seen[0].revision < seen[1].revision < seen[2].revision


async def test_a_watch_sees_what_happened_between_entering_and_first_asking(store: ClusterStore) -> None:
    async with store.watch("") as changes:
        await store.put("a", b"1")
        assert [change.key for change in await next_changes(changes)] == ["a"]


async def test_a_watch_sees_a_lease_end(open_handle: Opener) -> None:
    store, other = open_handle(), open_handle()
    seen: list[Change] = []
    async with store.watch("alive/") as changes:
        await lease_with_key(other, "alive/n1")
        while not seen or seen[-1].item is not None:
            seen += await next_changes(changes)
    assert {change.key for change in seen} == {"alive/n1"}


async def test_a_watch_ends_up_with_the_final_state_whatever_the_pace(open_handle: Opener) -> None:
    store, other = open_handle(), open_handle()
    state: dict[str, bytes] = {}
    async with trio.open_nursery() as nursery, store.watch("k/") as changes:

        async def write() -> None:
            for step in range(120):
                key = f"k/{step * 7 % 10}"
                if step % 3:
                    await other.put(key, b"%d" % step)
                else:
                    await other.delete(key)
            await other.put("k/end", b"")

        nursery.start_soon(write)
        last = 0
        while "k/end" not in state:
            for change in await next_changes(changes):
                assert change.revision >= last
                last = change.revision
                if change.item is None:
                    del state[change.key]
                else:
                    state[change.key] = change.item.value
    assert state == {item.key: item.value for item in await store.list("k/")}


async def test_two_watches_of_one_handle_do_not_steal_from_each_other(store: ClusterStore) -> None:
    async with store.watch("a/") as first, store.watch("a/") as second:
        await store.put("a/1", b"")
        assert [c.key for c in await next_changes(first)] == ["a/1"]
        assert [c.key for c in await next_changes(second)] == ["a/1"]


# Cancellation


async def test_a_cancelled_transaction_happened_wholly_or_not_at_all(store: ClusterStore) -> None:
    for number in range(20):
        with trio.move_on_after(number * 0.0002):
            await store.transact([], [Put(f"a/{number}", b""), Put(f"b/{number}", b"")])
    left = [item.key[2:] for item in await store.list("a/")]
    assert left == [item.key[2:] for item in await store.list("b/")]
    await store.put("still", b"works")


async def test_waiting_for_a_change_may_be_cancelled_and_taken_up_again(store: ClusterStore) -> None:
    async with store.watch("") as changes:
        with trio.move_on_after(0.05):
            await anext(changes)
        await store.put("a", b"")
        assert [change.key for change in await next_changes(changes)] == ["a"]


async def test_a_cancelled_watch_leaves_the_store_usable(store: ClusterStore) -> None:
    with trio.move_on_after(0.05):
        async with store.watch("") as changes:
            async for _ in changes:
                pass
    await store.put("a", b"")
    assert await store.get("a") is not None


# Other processes


def _count_in_process(directory: Path, kind: str, step_count: int) -> None:
    async def count() -> None:
        store = OPENERS[kind](directory)
        for step in range(step_count):
            await store.put(f"process/{multiprocessing.current_process().name}/{step}", b"x")
        await store.close()

    trio.run(count)


async def test_processes_see_each_other(kind: str, tmp_path: Path) -> None:
    store = OPENERS[kind](tmp_path)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count_in_process, args=(tmp_path, kind, 20)) for _ in range(2)]
    async with store.watch("process/") as changes:
        for process in processes:
            process.start()
        seen: set[str] = set()
        with trio.fail_after(60):
            while len(seen) < 40:
                seen |= {change.key for change in await anext(changes)}
    for process in processes:
        process.join()
    assert seen == {item.key for item in await store.list("process/")}
    await store.close()


# The embedded store alone


class FakeClock:
    def __init__(self) -> None:
        self.now_ns = 1_000_000_000

    def __call__(self) -> int:
        return self.now_ns


async def test_embedded_lease_ends_exactly_when_its_time_is_over(tmp_path: Path) -> None:
    clock = FakeClock()
    store = EmbeddedStore(tmp_path / "store.db", clock=clock)
    lease = await store.grant_lease(1000)
    await store.put("alive/n1", b"", lease)
    clock.now_ns += 999_999_999
    await store.keep_alive(lease)
    clock.now_ns += 999_999_999
    assert await store.get("alive/n1") is not None
    clock.now_ns += 1
    with pytest.raises(NotFound):
        await store.keep_alive(lease)
    assert await store.get("alive/n1") is None
    await store.close()


async def test_embedded_leases_do_not_survive_a_reboot_and_all_else_does(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path / "store.db", boot="first")
    lease = await store.grant_lease(60_000)
    await store.put("alive/n1", b"", lease)
    revision = await store.put("nodes/n1", b"")
    await store.close()
    store = EmbeddedStore(tmp_path / "store.db", boot="second")
    assert [item.key for item in await store.list("")] == ["nodes/n1"]
    assert await store.put("a", b"") > revision
    with pytest.raises(NotFound):
        await store.keep_alive(lease)
    await store.close()


async def test_embedded_closed_gate_cuts_off_every_operation_and_watches_go_on_after_it(
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"
    store = open_store(f"embedded:{tmp_path}/store.db?gate={gate}")
    other = open_store(f"embedded:{tmp_path}/store.db")
    lease = await store.grant_lease(60_000)
    operations = [
        lambda: store.get("a"), lambda: store.list(""), lambda: store.put("a", b""), lambda:
        store.delete("a"), lambda: store.grant_lease(1000), lambda: store.keep_alive(lease), lambda:
        store.revoke_lease(lease),
    ]  # fmt: skip
    async with store.watch("") as changes:
        gate.touch()
        for operation in operations:
            with pytest.raises(Unavailable):
                await operation()
        await other.put("b", b"")
        with trio.move_on_after(0.1) as waiting:
            await anext(changes)
        assert waiting.cancelled_caught
    async with other.watch("") as changes, trio.open_nursery() as nursery:
        nursery.start_soon(other.put, "c", b"")
        assert await next_changes(changes)
    gate.unlink()
    assert [item.key for item in await store.list("")] == ["b", "c"]
    await store.close()
    await other.close()


async def test_embedded_watch_waits_behind_the_gate_and_then_tells_what_it_missed(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    store = open_store(f"embedded:{tmp_path}/store.db?gate={gate}")
    other = open_store(f"embedded:{tmp_path}/store.db")
    async with store.watch("") as changes, trio.open_nursery() as nursery:
        gate.touch()

        async def open_later() -> None:
            await other.put("missed", b"")
            await trio.sleep(0.05)
            gate.unlink()

        nursery.start_soon(open_later)
        assert [change.key for change in await next_changes(changes)] == ["missed"]
        assert not gate.exists()
    await store.close()
    await other.close()


async def test_embedded_watch_behind_compaction_still_learns_every_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "TOMBSTONES_KEPT", 3)
    store = EmbeddedStore(tmp_path / "store.db")
    for number in range(20):
        await store.put(f"k/{number:02}", b"")
    async with store.watch("k/") as changes:
        for number in range(19):
            await store.delete(f"k/{number:02}")
        await store.put("k/new", b"")
        batch = await next_changes(changes)
    gone = sorted(change.key for change in batch if change.item is None)
    assert gone == [f"k/{number:02}" for number in range(19)]
    assert [change.key for change in batch if change.item] == ["k/new"]
    rows = sqlite3.connect(tmp_path / "store.db").execute("SELECT count(*) FROM items WHERE value IS NULL")
    assert rows.fetchone()[0] <= 6
    await store.close()


@pytest.mark.parametrize("silent", ["writer", "listener"])
async def test_embedded_watch_sees_a_change_though_the_bell_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    """A writer may be killed between commit and ringing; the kernel may have no inotify to give."""
    store = EmbeddedStore(tmp_path / "store.db")
    if silent == "writer":
        monkeypatch.setattr(Bell, "ring", lambda self: None)
    async with store.watch("") as changes:
        if silent == "listener":
            changes.bell.close()  # type: ignore[attr-defined]
        await store.put("a", b"")
        assert [change.key for change in await next_changes(changes)] == ["a"]
    await store.close()


async def test_embedded_keys_of_a_lease_go_even_if_the_one_who_ended_it_died_half_way(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path / "store.db")
    lease = await store.grant_lease(60_000)
    await store.put("alive/n1", b"", lease)
    store._leases.end(lease)  # and here the process dies, before it deletes the keys
    other = EmbeddedStore(tmp_path / "store.db")
    assert await other.get("alive/n1") is None
    await store.close()
    await other.close()


async def test_embedded_operations_after_close_say_so(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path / "store.db")
    await store.close()
    await store.close()
    with pytest.raises(Unavailable, match="closed"):
        await store.get("a")


async def test_embedded_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"precious " * 1000)
    with pytest.raises(Corrupt):
        EmbeddedStore(path)
    assert path.read_bytes() == b"precious " * 1000


@pytest.mark.parametrize(
    "url", ["", "zookeeper:/a", "embedded:relative.db", "embedded://host/a", "embedded:/a/b.db?speed=high",
            "etcd:a", "etcd://host:2379", "etcd:/a?tls=no"]
)
def test_a_store_url_nobody_understands_is_refused(url: str) -> None:
    with pytest.raises(BadRequest):
        open_store(url)


async def test_a_store_in_a_directory_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        open_store(f"embedded:{tmp_path}/absent/store.db")


def test_embedded_lease_renewals_need_no_fsync(tmp_path: Path) -> None:
    """Not a stopwatch: the lease database itself must be in the mode that never flushes."""
    store = EmbeddedStore(tmp_path / "store.db")
    assert store._leases._db.execute("PRAGMA synchronous").fetchone() == (0,)
    assert store._writer.execute("PRAGMA synchronous").fetchone() == (2,)
    ids = {store._leases.grant(1000) for _ in itertools.repeat(None, 50)}
    assert len(ids) == 50
