"""File locks at the coordinator, over real drive servers: who gets them, who waits, and what outlives whom."""

from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio

from coordinator import lock_desk
from csvfs.errors import Deadlock, Disconnected, Fenced, TooManyLocks
from tests.coordinator_cluster import Mount, TestCluster
from tests.test_service import cluster_of as cluster_of_nodes

END = (1 << 63) - 1


@pytest.fixture(autouse=True)
def waits_are_long(monkeypatch):
    """A test that would have to wait for the end of a wait fails."""
    monkeypatch.setattr(lock_desk, "WAIT_S", 600.0)


@asynccontextmanager
async def cluster_of(path, hosts=("n1",)):
    with trio.fail_after(90):
        async with cluster_of_nodes(path, hosts=hosts) as cluster:
            yield cluster


def lock_args(ino: int, owner: int = 1, **changed: Any) -> dict[str, Any]:
    args = {"ino": ino, "owner": owner, "flock": False, "exclusive": True, "first": 0, "last": END, "pid": 7, "opened": 5}
    return {**args, **changed}


async def try_lock(mount: Mount, ino: int, owner: int = 1, **changed: Any) -> bool:
    reply = await mount.call("lock", **lock_args(ino, owner, wait=False, **changed))
    return bool(reply["granted"])


async def wait_lock(mount: Mount, ino: int, owner: int = 1, token: int = 1, **changed: Any) -> bool:
    reply = await mount.call("lock", **lock_args(ino, owner, wait=True, token=token, **changed))
    return bool(reply["granted"])


async def unlock(mount: Mount, ino: int, owner: int = 1, **changed: Any) -> None:
    await mount.call("unlock", **lock_args(ino, owner, **changed))


async def in_line(cluster: TestCluster, ino: int, count: int) -> None:
    """Until so many programs wait for locks of the file."""
    service = await cluster.wait_serving()
    await cluster.wait(lambda: len(service.locks._waiting.get(ino, ())) == count)


async def kill_coordinator(cluster: TestCluster) -> None:
    service = await cluster.wait_serving()
    await cluster.kill_host(service.setup.node)


async def two_mounts(cluster: TestCluster) -> tuple[Mount, Mount, int]:
    first, second = await cluster.mount("n1"), await cluster.mount("n2")
    ino = await first.make(b"file")
    await second.acquire(ino, 1)
    return first, second, ino


async def test_L1_a_lock_of_one_node_keeps_the_other_off_until_it_is_given_up(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, second, ino = await two_mounts(cluster)
        assert await try_lock(first, ino, first=10, last=19)
        assert not await try_lock(second, ino, first=19, last=30)
        assert await try_lock(second, ino, first=20, last=30)
        assert await try_lock(first, ino, first=10, last=19), "one's own is never in the way"
        assert not await try_lock(first, ino, owner=2, first=15, last=15), "another process of the same node"
        assert await try_lock(second, ino, flock=True), "another kind of lock"
        await unlock(first, ino, first=15, last=15)
        assert await try_lock(second, ino, first=15, last=15)
        assert not await try_lock(second, ino, first=16, last=16)


async def test_who_asks_is_told_what_is_in_the_way_and_pids_only_of_its_own_node(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, second, ino = await two_mounts(cluster)
        await try_lock(first, ino, first=5, last=9)
        assert (await first.call("getlock", **lock_args(ino, owner=2)))["lock"] == [True, 5, 9, 7]
        assert (await second.call("getlock", **lock_args(ino, owner=2)))["lock"] == [True, 5, 9, 0]
        assert (await second.call("getlock", **lock_args(ino, owner=2, first=10)))["lock"] is None
        assert (await first.call("getlock", **lock_args(ino)))["lock"] is None


async def test_who_waits_gets_the_lock_when_it_is_given_up_one_after_the_other(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, second, ino = await two_mounts(cluster)
        await try_lock(first, ino)
        got: list[int] = []

        async def wait_and_hold(owner: int) -> None:
            assert await wait_lock(second, ino, owner, token=owner)
            got.append(owner)

        async with trio.open_nursery() as nursery:
            for owner in (2, 3):
                nursery.start_soon(wait_and_hold, owner)
                await in_line(cluster, ino, owner - 1)
            await unlock(first, ino)
            await cluster.wait(lambda: got == [2])
            await in_line(cluster, ino, 1)
            await unlock(second, ino, 2)
        assert got == [2, 3]


async def test_a_wait_ends_after_a_while_and_the_mount_asks_again(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_desk, "WAIT_S", 0.05)
    async with cluster_of(tmp_path) as cluster:
        first, second, ino = await two_mounts(cluster)
        await try_lock(first, ino)
        assert not await wait_lock(second, ino)
        await in_line(cluster, ino, 0)
        await unlock(first, ino)
        assert await try_lock(first, ino), "who gave up waiting has not got it behind its back"


async def test_a_wait_that_is_cancelled_ends_without_the_lock_and_lets_others_through(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, second, ino = await two_mounts(cluster)
        await try_lock(first, ino, exclusive=False)
        ended: list[tuple[str, bool]] = []

        async def wait(name: str, token: int, **changed: Any) -> None:
            ended.append((name, await wait_lock(second, ino, owner=token, token=token, **changed)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, "cancelled", 2)
            await in_line(cluster, ino, 1)
            assert (await second.call("lock_cancel", ino=ino, token=2)) == {"found": True}
            await cluster.wait(lambda: bool(ended))
        assert ended == [("cancelled", False)]
        assert (await second.call("lock_cancel", ino=ino, token=2)) == {"found": False}
        assert await try_lock(second, ino, owner=3, exclusive=False)


async def test_a_circle_of_waits_is_refused_to_whoever_closes_it(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, second, ino = await two_mounts(cluster)
        other = await first.make(b"other")
        await try_lock(first, ino)
        await try_lock(second, other)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_lock, first, other)
            await in_line(cluster, other, 1)
            with pytest.raises(Deadlock):
                await wait_lock(second, ino)
            await in_line(cluster, ino, 0)
            await unlock(second, other)
        assert not await try_lock(second, other), "the other one has it now"


async def test_two_that_make_their_shared_flock_exclusive_do_not_wait_for_each_other(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, second, ino = await two_mounts(cluster)
        whole = {"flock": True, "exclusive": False}
        assert await try_lock(first, ino, **whole) and await try_lock(second, ino, **whole)
        assert not await try_lock(first, ino, flock=True), "its shared one is gone now, as on Linux"
        assert await try_lock(second, ino, flock=True)


async def test_closing_gives_up_what_was_taken_through_the_open_file_and_nothing_else(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, second, ino = await two_mounts(cluster)
        await try_lock(first, ino, owner=1, first=0, last=9, opened=11)
        await try_lock(first, ino, owner=2, first=10, last=19, opened=12)
        await first.call("unlock", ino=ino, handle=11)
        assert await try_lock(second, ino, first=0, last=9)
        assert not await try_lock(second, ino, first=10, last=10)


async def test_locks_of_a_file_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.file_locks.LOCKS_PER_FILE_MAX", 3)
    async with cluster_of(tmp_path) as cluster:
        first, second, ino = await two_mounts(cluster)
        for at in (0, 2, 4):
            assert await try_lock(first, ino, first=at, last=at)
        with pytest.raises(TooManyLocks):
            await try_lock(second, ino, first=6, last=6)
        assert await try_lock(first, ino, first=0, last=4), "one that makes them fewer is none too many"
        assert await try_lock(second, ino, first=6, last=6)


async def test_L1_locks_outlive_their_coordinator_and_waits_go_on_at_the_next_one(tmp_path):
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        first, second, ino = await two_mounts(cluster)
        assert await try_lock(first, ino, first=0, last=9)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_lock, second, ino, 2)
            await in_line(cluster, ino, 1)
            await kill_coordinator(cluster)
            await in_line(cluster, ino, 1)
            assert not await try_lock(second, ino, first=9, last=9)
            await unlock(first, ino)
        assert not await try_lock(first, ino)


async def test_L1_locks_of_an_evicted_mount_pass_on_and_those_of_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.eviction.CONTACT_S_MAX", 0.1)
    async with cluster_of(tmp_path) as cluster:
        first, second, ino = await two_mounts(cluster)
        assert await try_lock(first, ino, first=0, last=9)
        assert await try_lock(second, ino, owner=3, first=20, last=29)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(wait_lock, second, ino, 2, first=0, last=9))
            await in_line(cluster, ino, 1)
            first.kill()
            again = await cluster.mount("n1", incarnation=2)
        assert not await try_lock(again, ino, first=0, last=0), "it went to who waited"
        assert not await try_lock(again, ino, first=20, last=20), "another mount's"


async def test_L1_what_came_by_an_earlier_link_is_not_carried_out_behind_a_later_one(tmp_path):
    """A mount that connects anew sends again what was not answered; the first sending may still be on its way."""
    async with cluster_of(tmp_path) as cluster:
        first, _second, ino = await two_mounts(cluster)
        service = await cluster.wait_serving()
        session = service.desk.sessions.get(("n1", 1))
        earlier = session.link
        assert await try_lock(first, ino)
        first.link.close()
        await cluster.wait(lambda: session.link is not None and session.link is not earlier)
        for name in ("unlock", "lock"):
            with pytest.raises(Disconnected):
                await service.locks.call(session, earlier, name, lock_args(ino))
        assert not await try_lock(first, ino, owner=2), "it holds what it held"
        session.ended = True
        with pytest.raises(Fenced):
            await service.locks.call(session, session.link, "unlock", lock_args(ino))
        session.ended = False


async def test_a_mount_is_told_at_hello_what_its_session_holds(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, _second, ino = await two_mounts(cluster)
        await try_lock(first, ino, owner=-5, first=3, last=4, opened=11)
        service = await cluster.wait_serving()
        session = service.desk.sessions.get(("n1", 1))
        assert service.locks.owners_of(session) == [[ino, -5, 11]]


async def test_a_volume_from_before_there_were_locks_gets_them(tmp_path):
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        first, second, ino = await two_mounts(cluster)
        service = await cluster.wait_serving()
        await service.batches.run(lambda: service._metadata.database.run("DROP TABLE locks"))
        await kill_coordinator(cluster)
        assert await try_lock(first, ino)
        assert not await try_lock(second, ino)
