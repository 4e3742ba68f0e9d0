"""A mount that was evicted, and whose next process comes to go on: what it gets back, and what others have taken meanwhile
(coordinator/departures.py, adoption.py)."""

import contextlib

import pytest
import trio

from coordinator import departures, janitor
from csvfs.errors import Conflict, Fenced, NotFound
from tests.coordinator_cluster import Mount, TestCluster
from tests.test_lock_desk import lock_args, try_lock, wait_lock
from tests.test_service import READ, WRITE, block_of, cluster_of

OPEN = 1
OLD, NEW, NEWER = block_of("old"), block_of("new"), block_of("newer")
MAKE = {"parent": 1, "mode": 0o100644, "uid": 0, "gid": 0, "rdev": 0}


@pytest.fixture(autouse=True)
def killed_mounts_serve_nothing(monkeypatch):
    """An eviction waits until its mount cannot serve any more; these are dead."""
    monkeypatch.setattr("coordinator.eviction.CONTACT_S_MAX", 0.0)


async def evict(cluster: TestCluster, mount: Mount) -> None:
    """As one that did not answer. Its process does not know, and is then killed."""
    service = await cluster.wait_serving()
    session = service.desk.sessions.get((mount.node, mount.incarnation))
    mount.kill()
    await service.desk.evict(session, "the test says so")


async def go_on(cluster: TestCluster, before: Mount, *, claims_all: bool = True) -> Mount:
    """The next process of the same FUSE session."""
    mount = Mount(cluster, before.node, before.incarnation + 1)
    mount.inherits, mount.held, mount.op, mount.claims_all = True, dict(before.held), before.op, claims_all
    await mount.start()
    return mount


async def two_mounts(cluster: TestCluster) -> tuple[Mount, Mount, int]:
    """The first one holds a file for writing."""
    first, other = await cluster.mount("n1"), await cluster.mount("n2")
    ino = await first.make(b"file")
    await first.write(ino, OLD)
    return first, other, ino


async def test_what_nobody_has_written_since_is_held_for_writing_again(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, other, ino = await two_mounts(cluster)
        await evict(cluster, first)
        assert await other.read(ino, 1) == OLD  # reading takes nothing away
        second = await go_on(cluster, first)
        assert second.hello["inherited"] and second.hello["adopted"] and second.held[ino] == WRITE
        assert [recall["ino"] for recall in other.recalls] == [ino]  # who reads gives way, as ever
        await second.write(ino, NEW)
        assert await other.read(ino, 1) == NEW


async def test_what_somebody_has_written_since_does_not_come_back_though_nobody_holds_it_any_more(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, other, ino = await two_mounts(cluster)
        await evict(cluster, first)
        await other.acquire(ino, WRITE)
        await other.write(ino, NEW)
        await other.call("release", items=[[ino, 0]])
        second = await go_on(cluster, first)
        assert second.hello["adopted"] and second.held[ino] == OPEN
        assert await second.read(ino, 1) == NEW


async def test_I4_who_follows_one_that_was_killed_before_it_noted_what_was_refused_hears_it_again(tmp_path):
    """What the dead one has noted says that it holds the write lease."""
    async with cluster_of(tmp_path) as cluster:
        first, other, ino = await two_mounts(cluster)
        kept = await first.make(b"kept")
        await first.write(kept, OLD)
        noted = dict(first.held)
        await evict(cluster, first)
        await other.acquire(ino, WRITE)
        await other.write(ino, NEW)
        second = await go_on(cluster, first)
        assert second.held[ino] == OPEN
        second.kill()
        second.held = noted
        third = await go_on(cluster, second)
        assert third.hello["claimed"] and not third.hello.get("adopted")
        assert {name: third.claim_reply[name] for name in ("lowered", "refused")} == {"lowered": [ino], "refused": [ino]}  # nor does it do again what was begun there
        assert third.held[ino] == OPEN and third.held[kept] == WRITE
        await third.write(kept, NEW)
        await other.write(ino, OLD)
        assert await third.read(ino, 1) == OLD


async def test_a_truncation_by_another_counts_as_a_write(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, other, ino = await two_mounts(cluster)
        await evict(cluster, first)
        await other.change("setattr", ino=ino, size=0)
        second = await go_on(cluster, first)
        assert second.held[ino] == OPEN


async def test_who_asked_to_write_before_goes_first_and_then_it_does_not_come_back(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, other, ino = await two_mounts(cluster)
        third = await cluster.mount("n3")
        await evict(cluster, first)
        await other.acquire(ino, READ)
        other.answers_recalls = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(third.acquire, ino, WRITE)
            await cluster.wait(lambda: other.recalls)
            nursery.start_soon(answer_later, cluster, other)
            second = await go_on(cluster, first)
        assert second.held[ino] == OPEN


async def answer_later(cluster: TestCluster, mount: Mount) -> None:
    """As soon as somebody else waits behind the recall."""
    service = await cluster.wait_serving()
    await cluster.wait(lambda: len(service.leases.waiting(10)) > 1)
    mount.answers_recalls = True
    assert mount.link is not None
    mount.link.close()  # the recall comes once more


async def test_a_reader_that_does_not_answer_costs_the_lease_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.adoption.WAIT_S", 0.2)
    async with cluster_of(tmp_path) as cluster:
        first, other, ino = await two_mounts(cluster)
        await evict(cluster, first)
        await other.acquire(ino, READ)
        other.answers_recalls = False
        second = await go_on(cluster, first)
        assert second.held[ino] == OPEN and other.recalls


async def test_I11_a_call_made_again_gets_the_answer_of_before_the_eviction_from_the_next_coordinator_too(tmp_path):
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        first, _, ino = await two_mounts(cluster)
        ino = await first.make(b"another")
        op = first.op
        await evict(cluster, first)
        await cluster.kill_host("n1")
        second = await go_on(cluster, first)
        again = await second.call("make", op=op, op_done=op, name=b"another", **MAKE)
        assert again["attr"][0] == ino and again["lease"] == 0


async def test_the_next_coordinator_does_not_know_what_was_written_and_gives_no_write_lease_back(tmp_path):
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        first, _, ino = await two_mounts(cluster)
        await evict(cluster, first)
        await cluster.kill_host("n1")
        second = await go_on(cluster, first)
        assert second.hello["adopted"] and second.held[ino] == OPEN
        await second.acquire(ino, WRITE)
        await second.write(ino, NEW)


async def test_a_coordinator_that_evicts_it_itself_after_a_takeover_knows(tmp_path):
    """The coordinator was on the node that was cut off."""
    async with cluster_of(tmp_path) as cluster:
        first, other, ino = await two_mounts(cluster)
        written = await first.make(b"other")
        await cluster.start_host("n2")
        first.kill()
        await cluster.store.delete("alive/n1")
        await cluster.kill_host("n1")
        await other.acquire(written, WRITE)
        await cluster.start_node("n1")
        second = await go_on(cluster, first)
        assert second.hello["adopted"] and second.held[ino] == WRITE and second.held[written] == OPEN


async def test_one_that_has_not_said_all_it_holds_when_the_coordinator_changes_begins_anew(tmp_path):
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        first, _, ino = await two_mounts(cluster)
        await evict(cluster, first)
        second = await go_on(cluster, first, claims_all=False)
        assert second.held[ino] == WRITE
        second.kill()
        await cluster.kill_host("n1")
        third = await go_on(cluster, second)
        assert third.hello["adopted"] and third.held[ino] == OPEN


async def test_one_that_dies_before_it_has_said_all_is_followed_and_what_was_written_since_is_still_known(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, other, ino = await two_mounts(cluster)
        kept = await first.make(b"kept")
        await evict(cluster, first)
        second = await go_on(cluster, first, claims_all=False)
        await evict(cluster, second)
        await other.acquire(ino, WRITE)
        second.held = dict(first.held)
        third = await go_on(cluster, second)
        assert third.hello["adopted"] and third.held[ino] == OPEN and third.held[kept] == WRITE
        assert not (await cluster.wait_serving()).departures.marks()


async def test_once_it_has_said_all_it_is_a_session_as_any_other(tmp_path):
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        first, _, ino = await two_mounts(cluster)
        await evict(cluster, first)
        second = await go_on(cluster, first)
        await cluster.kill_host("n1")
        await second.write(ino, NEW)
        assert second.held[ino] == WRITE and not second.hello.get("adopted")


async def test_a_file_that_it_had_open_and_that_has_lost_its_name_is_still_there(tmp_path):
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        first, other, ino = await two_mounts(cluster)
        own = await first.make(b"temporary")
        await first.change("unlink", parent=1, name=b"temporary", directory=False)
        await evict(cluster, first)
        await other.change("unlink", parent=1, name=b"file", directory=False)
        gone = await other.make(b"another")
        await other.change("unlink", parent=1, name=b"another", directory=False)
        await other.call("release", items=[[gone, 0]])
        await until_gone(cluster, other, gone)  # the janitor has been there
        await cluster.kill_host("n1")
        second = await go_on(cluster, first)
        for held in (ino, own):
            assert (await second.call("getattr", ino=held))["attr"][0] == held
        await second.call("release", items=[[ino, 0], [own, 0]])
        for held in (ino, own):
            await until_gone(cluster, second, held)


async def test_a_file_without_a_name_outlives_a_takeover_however_long_its_mount_takes_to_say_that_it_has_it(tmp_path):
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        first, _, ino = await two_mounts(cluster)
        await first.change("unlink", parent=1, name=b"file", directory=False)
        async with first._connecting:
            await cluster.kill_host("n1")
            await cluster.wait_serving()
            await trio.sleep(10 * janitor.DELAY_S)
        assert await first.read(ino, 1) == OLD


async def until_gone(cluster: TestCluster, mount: Mount, ino: int) -> None:
    with trio.fail_after(60), contextlib.suppress(NotFound):
        while True:
            await mount.call("getattr", ino=ino)
            await mount.call("release", items=[[ino, 0]])  # asking gave it a lease
            await trio.sleep(0.02)


async def test_L1_locks_that_nobody_wanted_come_back(tmp_path):
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        first, other, ino = await two_mounts(cluster)
        assert await try_lock(first, ino, first=0, last=9)
        await evict(cluster, first)
        assert await try_lock(other, ino, first=10, last=19), "beside it"
        await cluster.kill_host("n1")
        second = await go_on(cluster, first)
        assert second.hello["lost_locks"] == [] and [row[0] for row in second.hello["locks"]] == [ino]
        assert not await try_lock(other, ino, first=9, last=9)


@pytest.mark.parametrize("how", ["lock", "wait", "test"])
async def test_L1_who_asks_for_a_lock_of_a_departed_mount_has_it_and_that_mount_hears_of_it(tmp_path, how):
    """F_GETLK counts: qemu holds locks for reading, and looks whether there are others."""
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        first, other, ino = await two_mounts(cluster)
        kept = await first.make(b"kept")
        for locked in (ino, kept):
            assert await try_lock(first, locked, first=0, last=9) and await try_lock(first, locked, first=20, last=29)
        async with trio.open_nursery() as nursery:
            if how == "wait":
                nursery.start_soon(wait_lock, other, ino)
                service = await cluster.wait_serving()
                await cluster.wait(lambda: service.locks._waiting.get(ino))
            await evict(cluster, first)
            if how == "lock":
                assert await try_lock(other, ino, first=0, last=0)
            elif how == "test":
                assert (await other.call("getlock", **lock_args(ino, owner=2, first=0, last=0)))["lock"] is None
        await cluster.kill_host("n1")  # the next coordinator knows
        second = await go_on(cluster, first)
        assert second.hello["lost_locks"] == [ino] and {row[0] for row in second.hello["locks"]} == {kept}
        assert await try_lock(other, ino, first=20, last=29) and not await try_lock(other, kept, first=5, last=5)


async def test_a_mount_that_begins_anew_ends_what_was_kept_of_the_one_before(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, other, ino = await two_mounts(cluster)
        assert await try_lock(first, ino)
        await evict(cluster, first)
        fresh = Mount(cluster, "n1", 2)
        await fresh.start()
        assert not fresh.hello["inherited"] and not (await cluster.wait_serving()).departures.marks()
        assert await try_lock(other, ino)
        fresh.kill()


async def test_one_that_said_goodbye_is_not_gone_on_for(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, _, _ = await two_mounts(cluster)
        await first.call("goodbye")
        first.kill()
        second = await go_on(cluster, first)
        assert not second.hello["inherited"]


async def test_one_of_a_node_that_was_evicted_for_good_is_not_gone_on_for(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, _, _ = await two_mounts(cluster)
        await cluster.store.put("evicted/n1", b"\x80")
        service = await cluster.wait_serving()
        await cluster.wait(lambda: service._facts.is_evicted("n1"))
        await evict(cluster, first)
        assert service.departures.of_node("n1") is None and not service.departures.marks()


async def test_after_a_while_it_is_forgotten_with_all_that_was_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(departures, "EXPIRY_LOOK_S", 0.05)
    async with cluster_of(tmp_path) as cluster:
        first, other, ino = await two_mounts(cluster)
        assert await try_lock(first, ino)
        service = await cluster.wait_serving()
        service.departures._remember_s = 0.1
        await evict(cluster, first)
        await other.change("unlink", parent=1, name=b"file", directory=False)
        await cluster.wait(lambda: not service.departures.marks() and service.departures.of_node("n1") is None)
        await until_gone(cluster, other, ino)
        assert not service._metadata.locks.of_file(ino)
        second = await go_on(cluster, first)
        assert not second.hello["inherited"]


async def test_the_process_that_was_evicted_itself_is_not_let_in_again(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, _, ino = await two_mounts(cluster)
        service = await cluster.wait_serving()
        await service.desk.evict(service.desk.sessions.get(("n1", 1)), "the test says so")
        with pytest.raises((Fenced, Conflict)):
            await first.write(ino, NEWER)
        first.kill()
