"""A file that several nodes write at once, over the real coordinator: who has which segment, and how that ends."""

from typing import Any

import pytest
import trio

from coordinator import shared_write
from coordinator.lease_table import NONE, SHARERS
from coordinator.shared_write import MEMBER, MOVES_MIN, SEGMENTS_MAX, key_of, place_of
from csvfs.errors import BadRequest, Fenced, Unavailable
from csvfs.units import BLOCK_SIZE
from tests.coordinator_cluster import Mount, TestCluster
from tests.test_service import cluster_of

OPEN, READ, WRITE = 1, 2, 3
SIZE, MTIME = 6, 9


async def shared_file(cluster: TestCluster, *nodes: str) -> tuple[int, list[Mount]]:
    """A file of 32 blocks that its writers have moved to and fro, so that it is shared now; nobody has a segment."""
    mounts = [await cluster.mount(node) for node in nodes]
    ino = await mounts[0].make(b"disk")
    await mounts[0].acquire(ino, WRITE)
    await mounts[0].write(ino, bytes(32 * BLOCK_SIZE))
    await move_until_shared(ino, mounts[:2])
    return ino, mounts


async def move_until_shared(ino: int, mounts: list[Mount]) -> None:
    for turn in range(MOVES_MIN):
        assert await mounts[(turn + 1) % 2].acquire_direct(ino, WRITE) == (turn + 1 == MOVES_MIN)


async def test_after_a_few_moves_the_writers_share_the_file_and_each_has_the_segments_it_writes(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        ino, (first, second) = await shared_file(cluster, "n1", "n2")
        assert await first.acquire_direct(ino, WRITE)  # at once, and nobody has to give anything back
        assert (await first.ask_segment(ino, 0, WRITE))["held"] == [[MEMBER, READ], [0, WRITE]]
        reply = await second.ask_segment(ino, 1, WRITE)
        assert reply["held"] == [[MEMBER, READ], [1, WRITE]] and reply["size"] == 32 * BLOCK_SIZE
        assert not [args for mount in (first, second) for args in mount.recalls if "segment" in args]
        service = await cluster.wait_serving()
        assert service.leases.table.writer(ino) == SHARERS


async def test_moves_that_are_far_apart_or_not_of_direct_io_do_not_make_a_file_shared(tmp_path, monkeypatch):
    async with cluster_of(tmp_path) as cluster:
        mounts = [await cluster.mount("n1"), await cluster.mount("n2")]
        ino = await mounts[0].make(b"disk")
        await mounts[0].acquire(ino, WRITE)
        for turn in range(3 * MOVES_MIN):
            await mounts[(turn + 1) % 2].acquire(ino, WRITE)
        for turn in range(3 * MOVES_MIN):
            assert not await mounts[(turn + 1) % 2].acquire_direct(ino, WRITE)
            if turn % (MOVES_MIN - 1) == MOVES_MIN - 2:
                await mounts[(turn + 1) % 2].acquire(ino, READ)  # a program with a cache looks at it in between
        monkeypatch.setattr(shared_write, "MOVE_S", 0.0)
        for turn in range(3 * MOVES_MIN):
            assert not await mounts[(turn + 1) % 2].acquire_direct(ino, WRITE)


async def test_T1_a_segment_is_taken_from_one_before_another_writes_it_and_may_be_read_by_many(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        ino, (first, second, third) = await shared_file(cluster, "n1", "n2", "n3")
        await first.ask_segment(ino, 0, WRITE)
        first.recalls.clear()
        first.answers_recalls = False
        told: list[dict[str, Any]] = []

        async def ask() -> None:
            told.append(await second.ask_segment(ino, 0, READ))

        cluster.nursery.start_soon(ask)
        await cluster.wait(lambda: first.recalls)
        await trio.sleep(0.05)
        ((request,),) = [(await cluster.wait_serving()).waits()["requests"]]  # what `csvfs why` says
        assert request["node"] == "n2" and request["inodes"] == [ino]
        assert [(row["node"], row["ino"]) for row in request["recalls"]] == [("n1", ino)]
        assert told == [] and first.recalls == [{"ino": ino, "segment": 0, "kind": READ, "attr": False}]
        first.answers_recalls = True
        first.link.close()  # asked again over the next one
        await cluster.wait(lambda: told)
        assert told[0]["held"] == [[MEMBER, READ], [0, READ]] and first.segments[ino][0] == READ
        second.recalls.clear()
        await third.ask_segment(ino, 0, READ)
        assert second.recalls == []
        await third.ask_segment(ino, 0, WRITE)
        assert {args["segment"] for args in second.recalls} == {0} and second.segments[ino][0] == NONE


@pytest.mark.parametrize("how", ["a cached read", "a truncation", "a lease to grow it"])
async def test_whatever_needs_a_lease_on_the_inode_takes_all_segments_back_first(tmp_path, how):
    async with cluster_of(tmp_path) as cluster:
        ino, (first, second) = await shared_file(cluster, "n1", "n2")
        await first.ask_segment(ino, 0, WRITE)
        await second.ask_segment(ino, 1, WRITE)
        if how == "a cached read":
            await first.acquire(ino, READ)
        elif how == "a truncation":
            await first.change("setattr", ino=ino, mode=None, uid=None, gid=None, size=4096, atime_ns=None, mtime_ns=None)
        else:
            await first.acquire(ino, WRITE)
        for mount in (first, second):
            assert [args["segment"] for args in mount.recalls if "segment" in args] == [MEMBER] and ino not in mount.segments
        assert (await second.ask_segment(ino, 1, WRITE))["over"]
        service = await cluster.wait_serving()
        assert service.leases.table.writer(ino) != SHARERS and not service.shared_write.segments.table.lease_counts().get(second.node)
        await first.acquire(ino, WRITE)
        await move_until_shared(ino, [first, second])
        await second.ask_segment(ino, 1, WRITE)


async def test_who_gives_the_file_back_has_no_segment_any_more_and_the_last_one_ends_it(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        ino, (first, second) = await shared_file(cluster, "n1", "n2")
        await first.ask_segment(ino, 0, WRITE)
        await second.ask_segment(ino, 1, WRITE)
        first.segments.clear()
        await first.call("release", items=[[ino, NONE]])
        first.recalls.clear()
        await second.ask_segment(ino, 0, WRITE)
        assert first.recalls == []
        service = await cluster.wait_serving()
        second.segments.clear()
        await second.call("release", items=[[ino, NONE]])
        assert service.leases.table.writer(ino) is None


async def test_I4_the_next_coordinator_knows_who_has_which_segment(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        ino, (first, second) = await shared_file(cluster, "n2", "n3")
        await first.ask_segment(ino, 0, WRITE)
        await second.ask_segment(ino, 1, WRITE)
        await cluster.kill_host("n1")
        await cluster.start_host("n1")
        await cluster.wait_serving()
        first.recalls.clear()
        assert (await second.ask_segment(ino, 1, WRITE))["held"] == [[MEMBER, READ], [1, WRITE]]
        assert first.recalls == []
        await second.ask_segment(ino, 0, WRITE)
        assert [args["segment"] for args in first.recalls] == [0]


async def test_I4_the_segments_of_an_evicted_mount_pass_on_and_it_counts_as_changed_there(tmp_path):
    async with cluster_of(tmp_path, recall_timeout_ms=300) as cluster:
        ino, (first, second) = await shared_file(cluster, "n2", "n3")
        await first.ask_segment(ino, 0, WRITE)
        await second.ask_segment(ino, 1, WRITE)
        first.answers_recalls = False
        assert (await second.ask_segment(ino, 0, WRITE))["held"] == [[MEMBER, READ], [0, WRITE]]
        service = await cluster.wait_serving()
        departed = service.departures.of_node("n2")
        assert departed is not None and departed.may_be_changed(ino)


async def test_I4_the_next_process_of_a_mount_keeps_what_it_has_and_is_asked_for_it_again(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        ino, (first, second) = await shared_file(cluster, "n2", "n3")
        await first.ask_segment(ino, 0, WRITE)
        first.answers_recalls = False
        told: list[dict[str, Any]] = []

        async def ask() -> None:
            told.append(await second.ask_segment(ino, 0, WRITE))

        cluster.nursery.start_soon(ask)
        await cluster.wait(lambda: [args for args in first.recalls if "segment" in args])
        first.kill()
        heir = Mount(cluster, "n2", 2)
        heir.inherits, heir.answers_recalls = True, False  # it does again first what was begun there
        heir.segments, heir.held = {ino: {0: WRITE}}, {ino: OPEN}
        await heir.start()
        assert heir.claim_reply["without_segments"] == []
        await cluster.wait(lambda: heir.recalls)
        assert (await heir.call("acquire", ino=ino, kind=OPEN, block=0, count=1))["extents"]  # a question, though it is recalled
        await trio.sleep(0.05)
        assert told == []
        heir.answers_recalls = True
        heir.link.close()  # asked again over the next one
        await cluster.wait(lambda: told)
        assert told[0]["held"] == [[MEMBER, READ], [0, WRITE]]


async def test_I4_after_a_takeover_the_next_process_of_a_mount_has_what_it_must_do_again(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        ino, (first, second) = await shared_file(cluster, "n2", "n3")
        await first.ask_segment(ino, 0, WRITE)
        await second.ask_segment(ino, 1, WRITE)
        first.kill()
        second.kill()
        await cluster.kill_host("n1")
        heirs = [Mount(cluster, node, 2) for node in ("n2", "n3")]
        for segment, heir in enumerate(heirs):
            heir.inherits, heir.segments, heir.held = True, {ino: {segment: WRITE}}, {ino: OPEN}
        await cluster.start_host("n1")
        for heir in heirs:
            await heir.start()
            assert heir.claim_reply["without_segments"] == []
        heirs[0].recalls.clear()
        with trio.fail_after(20):
            assert (await heirs[1].ask_segment(ino, 0, WRITE))["held"] == [[MEMBER, READ], [0, WRITE]]
        assert [args["segment"] for args in heirs[0].recalls] == [0]


async def test_the_next_process_of_a_mount_that_needs_none_of_its_segments_keeps_nobody_waiting(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        ino, (first, second) = await shared_file(cluster, "n2", "n3")
        await first.ask_segment(ino, 0, WRITE)
        await second.ask_segment(ino, 1, WRITE)
        first.kill()
        heir = Mount(cluster, "n2", 2)
        heir.inherits, heir.held = True, {ino: OPEN}
        await heir.start()
        with trio.fail_after(20):
            assert (await second.ask_segment(ino, 0, WRITE))["held"] == [[MEMBER, READ], [0, WRITE]]


async def test_I4_the_next_process_of_an_evicted_mount_has_no_segments(tmp_path):
    async with cluster_of(tmp_path, recall_timeout_ms=300) as cluster:
        ino, (first, second) = await shared_file(cluster, "n2", "n3")
        await first.ask_segment(ino, 0, WRITE)
        await second.ask_segment(ino, 1, WRITE)
        first.answers_recalls = False
        await second.ask_segment(ino, 0, WRITE)
        heir = Mount(cluster, "n2", 2)
        heir.inherits, heir.segments, heir.held = True, {ino: {0: WRITE}}, {ino: OPEN}
        await heir.start()
        assert heir.hello["adopted"] and ino in heir.claim_reply["refused"]


async def test_I8_an_fsync_has_those_flush_who_wrote_to_segments_that_others_have_now(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        ino, (first, second, third) = await shared_file(cluster, "n1", "n2", "n3")
        assert not (await first.ask_segment(ino, 0, WRITE))["owed"]
        assert not (await second.ask_segment(ino, 1, WRITE))["owed"]
        await second.call("segments_flush", ino=ino)
        assert first.flushes == 0
        assert (await second.ask_segment(ino, 0, WRITE))["owed"]  # and the first has not flushed it
        assert (await third.ask_segment(ino, 2, WRITE))["owed"]
        await second.call("segments_flush", ino=ino)
        await third.call("segments_flush", ino=ino)
        assert (first.flushes, second.flushes, third.flushes) == (1, 0, 0)


async def test_an_fsync_that_waits_for_an_evicted_mount_does_not_tell_its_caller_that_it_was_evicted(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_write, "FLUSH_S_MAX", 0.3)
    async with cluster_of(tmp_path) as cluster:
        ino, (first, second) = await shared_file(cluster, "n1", "n2")
        await first.ask_segment(ino, 0, WRITE)
        await second.ask_segment(ino, 0, WRITE)
        first.flush_error = Fenced("evicted")
        with pytest.raises(Unavailable, match="has not flushed"):
            await second.link.call("segments_flush", {"ino": ino}, timeout_s=60)


async def test_a_file_of_which_nobody_asked_for_a_segment_is_not_shared_when_all_have_given_it_back(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        ino, mounts = await shared_file(cluster, "n1", "n2")
        service = await cluster.wait_serving()
        assert service.leases.table.writer(ino) == SHARERS
        for mount in mounts:
            await mount.call("release", items=[[ino, NONE]])
        assert service.leases.table.writer(ino) is None and not service.leases.table.is_held(ino)


async def test_the_time_of_the_last_write_is_the_latest_of_all_that_write(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        ino, (first, second, third) = await shared_file(cluster, "n1", "n2", "n3")
        await first.ask_segment(ino, 0, WRITE)
        await second.ask_segment(ino, 1, WRITE)
        now_ns = (await third.call("getattr", ino=ino))["attr"][MTIME]
        first.written_ns, second.written_ns = now_ns + 2_000_000_000, now_ns + 1_000_000_000
        reply = await third.call("getattr", ino=ino)
        assert reply["attr"][MTIME] == first.written_ns and reply["lease"] == 0
        await first.call("segments_written", ino=ino, mtime_ns=first.written_ns)
        await second.call("segments_written", ino=ino, mtime_ns=second.written_ns)
        service = await cluster.wait_serving()
        assert service._metadata.getattr(ino)[MTIME] == first.written_ns


async def test_what_no_segment_can_be_is_refused_and_of_a_file_that_is_not_shared_there_is_none(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        ino, (first, _) = await shared_file(cluster, "n1", "n2")
        for args in (
            {"first": SEGMENTS_MAX, "count": 1, "kind": WRITE}, {"first": -1, "count": 1, "kind": WRITE},
            {"first": 0, "count": 0, "kind": WRITE}, {"first": 0, "count": 1000, "kind": WRITE},
            {"first": 0, "count": 1, "kind": OPEN}, {"first": 0, "count": 1, "kind": 4}, {"first": "0", "count": 1, "kind": READ},
        ):  # fmt: skip
            with pytest.raises(BadRequest):
                await first.link.call("segments", {"ino": ino, **args}, timeout_s=60)
        other = await first.make(b"other")
        assert (await first.ask_segment(other, 0, WRITE)) == {"over": True, "member": False}
        for rows in ([[1, 0]], [[0, 0, []]], [[1, 0, [[0, 1, 9]]]], [[1, 0, [[0, SEGMENTS_MAX + 1, 3]]]], [[1, 0, None]], "x"):
            with pytest.raises(BadRequest):
                shared_write.claims_of({"segments": rows})


def test_a_key_stands_for_one_segment_of_one_inode() -> None:
    for ino in (1, 77, (1 << 62) + 5):
        for segment in (MEMBER, 0, 1, SEGMENTS_MAX - 1):
            assert place_of(key_of(ino, segment)) == (ino, segment)


async def test_I8_who_owed_a_flush_before_a_takeover_is_asked_for_it_after_it_though_it_has_no_segment(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        ino, (first, second) = await shared_file(cluster, "n2", "n3")
        await first.ask_segment(ino, 0, WRITE)
        await second.ask_segment(ino, 0, WRITE)  # the first has not flushed what it wrote there
        first.segments.clear()  # and does not claim anything
        await cluster.kill_host("n1")
        await cluster.start_host("n1")
        await cluster.wait_serving()
        await second.call("segments_flush", ino=ino)
        assert first.flushes == 1
        await second.call("segments_flush", ino=ino)
        assert first.flushes == 1


async def test_a_sharing_ends_though_too_many_requests_wait_for_leases_just_then(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_write, "RETRY_S", 0.01)
    async with cluster_of(tmp_path) as cluster:
        ino, (first, second) = await shared_file(cluster, "n1", "n2")
        await first.ask_segment(ino, 0, WRITE)
        service = await cluster.wait_serving()
        table = service.shared_write.segments.table
        true, refused = type(table).begin, []

        def begin(self: Any, *args: Any) -> Any:
            if self is table and len(refused) < 3:
                refused.append(args)
                raise Unavailable("too many requests wait for leases")
            return true(self, *args)

        monkeypatch.setattr(type(table), "begin", begin)
        with trio.fail_after(60):
            await second.acquire(ino, WRITE)
        assert len(refused) == 3 and service.leases.table.writer(ino) == session_of(service, second).key


def session_of(service: Any, mount: Mount) -> Any:
    return next(session for session in service.desk.sessions if session.writer == f"mount/{mount.node}")


async def test_a_session_that_ends_while_a_sharing_begins_for_it_leaves_no_lease_behind(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        ino, (first, _second) = await shared_file(cluster, "n1", "n2")
        service = await cluster.wait_serving()
        session = session_of(service, first)
        await service.desk.evict(session, "a test")
        with pytest.raises(Fenced, match="evicted"):
            await service.shared_write.share(session, {"ino": ino, "kind": WRITE, "direct": True})
        assert service.leases.table.held(session.key, ino) == NONE
