"""The coordinator as a whole, over real drive servers in one process: names, leases, failures, takeovers."""

from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from coordinator.janitor import DELAY_S
from coordinator.slab_manager import SlabManager
from csvfs.errors import Exists, Fenced, NotCoordinator, NotFound
from csvfs.net.link import connect
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import block_checksum, slab_seed
from csvfs.wire.control import pack_call, pack_value
from csvfs.wire.frames import Frame, Kind
from tests.coordinator_cluster import DRIVE_SIZE, NAME, VOLUME, TestCluster

OPEN, READ, WRITE = 1, 2, 3


@asynccontextmanager
async def cluster_of(path, nodes=3, hosts=("n1",), copies=3, recall_timeout_ms=20_000):
    async with trio.open_nursery() as nursery:
        cluster = TestCluster(path, nursery, nodes)
        cluster.recall_timeout_ms = recall_timeout_ms
        await cluster.start()
        for host in hosts:
            await cluster.start_host(host)
        await cluster.create_volume(copies)
        await cluster.wait_serving()
        yield cluster
        nursery.cancel_scope.cancel()


def block_of(text: str) -> bytes:
    return text.encode().ljust(BLOCK_SIZE, b".")


async def test_a_new_volume_comes_online_and_holds_names(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        assert (await cluster.volume())["state"] == "online"
        assert all(len(slab.in_sync) == 3 for slab in await cluster.metadata_slabs())
        mount = await cluster.mount("n1")
        directory = await mount.make(b"dir", mode=0o040755)
        ino = await mount.make(b"file", parent=directory)
        assert (await mount.call("lookup", parent=directory, name=b"file"))["attr"][0] == ino
        assert (await mount.call("lookup", parent=directory, name=b"other"))["attr"] is None
        with pytest.raises(Exists):
            await mount.make(b"dir")
        entries = (await mount.call("readdir", ino=1, cookie=0, limit=10))["entries"]
        assert [entry[1] for entry in entries] == [b"dir"]
        service = await cluster.wait_serving()
        await cluster.wait(lambda: service.statfs()["free"] > 0)
        assert (await mount.call("volume_status"))["health"] == "Healthy"


async def test_what_one_node_writes_the_other_reads(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, second = await cluster.mount("n1"), await cluster.mount("n2")
        ino = await first.make(b"file")
        data = block_of("one") + block_of("two")
        await first.write(ino, data)
        assert await second.read(ino, 2) == data
        assert [recall["kind"] for recall in first.recalls if recall["ino"] == ino] == [READ]
        assert (await second.call("getattr", ino=ino))["attr"][6] == len(data)


async def test_a_change_in_a_directory_reaches_the_caches_of_others_first(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, second = await cluster.mount("n1"), await cluster.mount("n2")
        assert (await second.call("lookup", parent=1, name=b"file"))["dir_lease"] == READ
        await first.make(b"file")
        assert second.recalls == [{"ino": 1, "kind": 0, "attr": False}]
        assert (await second.call("lookup", parent=1, name=b"file"))["attr"] is not None


async def test_three_nodes_that_want_one_write_lease_all_the_time_all_get_it(tmp_path):
    """Each request is answered with the lease, though others wait for it already: the recall follows the answer."""
    async with cluster_of(tmp_path) as cluster:
        mounts = [await cluster.mount(node) for node in ("n1", "n2", "n3")]
        ino = await mounts[0].make(b"file")
        answers: list[int] = []

        async def ask(mount):
            for _ in range(10):
                reply = await mount.call("acquire", ino=ino, kind=WRITE, block=0, count=0)
                answers.append(reply["lease"])

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for mount in mounts:
                    nursery.start_soon(ask, mount)
        assert answers == [WRITE] * 30


async def test_a_truncation_is_not_undone_by_the_size_that_was_told_just_before_it(tmp_path):
    """A writer that is asked to forget attributes tells its size, and truncates the file in the same breath."""
    async with cluster_of(tmp_path) as cluster:
        first, second = await cluster.mount("n1"), await cluster.mount("n2")
        ino = await first.make(b"file")
        await first.write(ino, block_of("one") + block_of("two"))
        truncated = trio.Event()

        def tell_and_truncate(link, frame):
            link.reply(frame.request_id, {"kind": WRITE, "size": 2 * BLOCK_SIZE, "mtime_ns": 7, "atime_ns": None})
            first.op += 1
            args = {"ino": ino, "size": BLOCK_SIZE, "mtime_ns": 9, "op": first.op, "op_done": first.op}
            link.request(Kind.CALL, pack_call("setattr", args), None, lambda frame, error: truncated.set())

        assert first.link is not None
        first.link.on_frame = tell_and_truncate
        await second.change("setxattr", ino=ino, name=b"user.a", value=b"b", flags=0)
        await truncated.wait()
        first.link.on_frame = first._on_frame
        assert (await second.call("getattr", ino=ino))["attr"][6] == BLOCK_SIZE


async def test_who_opens_a_file_while_its_attributes_are_about_to_change_is_not_told_those_of_before(tmp_path):
    """Its read lease stays and it was asked already: it would believe them for good."""
    async with cluster_of(tmp_path, recall_timeout_ms=2_000) as cluster:
        first, second, third = [await cluster.mount(node) for node in ("n1", "n2", "n3")]
        ino = await third.make(b"file")
        assert (await first.call("acquire", ino=ino, kind=OPEN, block=0, count=0))["lease"] == OPEN  # third writes it
        for mount in (first, second, third):
            assert (await mount.call("acquire", ino=ino, kind=READ, block=0, count=0))["attr"][12] == 0
        second.answers_recalls = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(third.change, "setxattr", ino=ino, name=b"user.a", value=b"b", flags=0))
            while not any(recall["attr"] for recall in first.recalls):
                await trio.sleep(0.001)
            while (opened := await first.call("acquire", ino=ino, kind=OPEN, block=0, count=0))["lease"] < READ:
                await trio.sleep(0.001)  # the coordinator has still to take in the answer to its recall
            assert opened["lease"] == READ and opened.get("attr") is None
            asked = await first.call("getattr", ino=ino)
            assert asked["lease"] < READ and asked["attr"][12] == 0
        assert (await first.call("getattr", ino=ino))["attr"][12] == 1


async def test_a_file_that_is_open_elsewhere_outlives_its_name(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, second = await cluster.mount("n1"), await cluster.mount("n2")
        ino = await first.make(b"file")
        await second.acquire(ino, 1)
        reply = await first.change("unlink", parent=1, name=b"file", directory=False)
        assert reply["nlink"] == 0
        await first.call("release", items=[[ino, 0]])
        assert (await second.call("getattr", ino=ino))["attr"][0] == ino
        await second.call("release", items=[[ino, 0]])
        service = await cluster.wait_serving()
        await cluster.wait(lambda: service.dispatch._metadata.orphans() == [])
        with pytest.raises(NotFound):
            await second.call("getattr", ino=ino)


async def test_T4_a_deleted_file_that_is_open_keeps_its_blocks_until_the_next_coordinator_knows_who_has_it(tmp_path):
    """Before its mount has claimed it, nobody seems to have it open; writes of that mount may be under way to its blocks."""
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        first, second = await cluster.mount("n1"), await cluster.mount("n2")
        ino = await first.make(b"file")
        await first.write(ino, block_of("written"))
        assert (await second.change("unlink", parent=1, name=b"file", directory=False))["nlink"] == 0
        assert (await first.acquire(ino, WRITE))["lease"] == WRITE
        first.may_claim = trio.Event()
        await cluster.kill_host(next(name for name, host in cluster.hosts.items() if NAME in host.owned))
        service = await cluster.wait_serving()
        await cluster.wait(lambda: [session.node for session in service.desk.sessions.unclaimed] == ["n1"])
        await trio.sleep(4 * DELAY_S)  # the janitor would not wait longer
        assert not service.desk.is_open
        first.may_claim.set()
        assert await first.read(ino, 1) == block_of("written")
        assert service.dispatch._metadata.orphans() == [ino]
        await first.call("release", items=[[ino, 0]])
        await cluster.wait(lambda: service.dispatch._metadata.orphans() == [])


async def test_a_member_that_dies_under_writes_drops_out_and_the_writes_complete(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        mount = await cluster.mount("n1")
        ino = await mount.make(b"file")
        await mount.write(ino, block_of("before"))
        await cluster.kill_server("n3", noticed=False)
        with trio.fail_after(60):
            await mount.write(ino, block_of("after"))
            await mount.make(b"another")  # the metadata slabs lost a member too
        assert await mount.read(ino, 1) == block_of("after")
        with trio.fail_after(60):  # all slabs of that server, not just those that were written
            while any(
                {m.node for m in slab.in_sync} != {"n1", "n2"} for slab in await cluster.metadata_slabs()
            ):
                await trio.sleep(0.02)


async def test_a_member_that_returns_is_copied_what_it_missed_and_joins(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        mount = await cluster.mount("n1")
        ino = await mount.make(b"file")
        await mount.write(ino, block_of("before"))
        await cluster.kill_server("n3")
        await mount.write(ino, block_of("after"))
        await cluster.start_server("n3")
        service = await cluster.wait_serving()
        slab = next(iter(service.changes.book.all())).slab
        await cluster.wait(lambda: len(service.changes.book.current(slab).in_sync) == 3)
        with trio.fail_after(60):
            while any(len(descriptor.in_sync) < 3 for descriptor in await cluster.metadata_slabs()):
                await trio.sleep(0.02)
        extent = (await mount.acquire(ino, READ, 1))["extents"][0]
        assert cluster.copy("n3", slab).read_blocks(extent[3], 1)[1] == block_of("after")


async def test_a_drive_that_was_formatted_anew_gets_all_its_copies_again(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        mount = await cluster.mount("n1")
        ino = await mount.make(b"file")
        await mount.write(ino, block_of("kept"))
        service = await cluster.wait_serving()
        await cluster.kill_server("n3")
        await cluster.wait(lambda: all(len(slab.in_sync) == 2 for slab in service.changes.book.all()))
        cluster.format("n3")
        await cluster.start_server("n3")
        await cluster.wait(lambda: all(len(slab.in_sync) == 3 for slab in service.changes.book.all()))
        with trio.fail_after(60):
            while any(len(descriptor.in_sync) < 3 for descriptor in await cluster.metadata_slabs()):
                await trio.sleep(0.02)
        extent = (await mount.acquire(ino, READ, 1))["extents"][0]
        assert cluster.copy("n3", extent[2]).read_blocks(extent[3], 1)[1] == block_of("kept")


async def test_the_last_copy_is_kept_when_all_drive_servers_start_anew(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        mount = await cluster.mount("n1")
        ino = await mount.make(b"file")
        await mount.write(ino, block_of("kept"))
        for node in ("n1", "n2", "n3"):
            await cluster.kill_server(node)
        for node in ("n1", "n2", "n3"):
            await cluster.start_server(node)
        with trio.fail_after(60):
            await mount.write(ino, block_of("kept") + block_of("more"))
        assert (await mount.read(ino, 1)) == block_of("kept")


async def test_a_coordinator_that_dies_is_followed_by_another_that_knows_all(tmp_path):
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        mount = await cluster.mount("n3")
        inos = [await mount.make(b"file%d" % number) for number in range(20)]
        await mount.write(inos[0], block_of("data"))
        owner = next(name for name, host in cluster.hosts.items() if NAME in host.owned)
        await cluster.kill_host(owner)
        with trio.fail_after(60):
            entries = (await mount.call("readdir", ino=1, cookie=0, limit=100))["entries"]
        assert sorted(entry[2][0] for entry in entries) == inos
        assert mount.held[inos[0]] == WRITE, "reclaimed"
        await mount.write(inos[0], block_of("more"))
        assert await mount.read(inos[0], 1) == block_of("more")


async def test_I11_a_change_sent_again_to_the_next_coordinator_gets_its_first_answer(tmp_path):
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        mount = await cluster.mount("n3")
        args = {"parent": 1, "name": b"once", "mode": 0o100644, "uid": 0, "gid": 0, "rdev": 0}
        first = await mount.call("make", op=1, op_done=1, **args)
        assert (await mount.call("make", op=1, op_done=1, **args))["attr"] == first["attr"]
        await cluster.kill_host(next(name for name, host in cluster.hosts.items() if NAME in host.owned))
        again = await mount.call("make", op=1, op_done=1, **args)
        assert again["attr"] == first["attr"] and again["lease"] == 0, "what it says may be history"
        with pytest.raises(Exists):
            await mount.call("make", op=2, op_done=2, **args)


async def test_a_mount_that_gives_no_lease_back_is_evicted_and_its_chunks_are_made_equal(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("coordinator.eviction.CONTACT_S_MAX", 0.1)
    async with cluster_of(tmp_path, recall_timeout_ms=300) as cluster:
        first, second = await cluster.mount("n1"), await cluster.mount("n2")
        ino = await first.make(b"file")
        await first.write(ino, block_of("acknowledged"))
        extent = (await first.acquire(ino, WRITE, 1))["extents"][0]
        slab, block = extent[2], extent[3]
        # A write that reached one member only, as when its writer dies in the middle.
        torn = cluster.copy("n2", slab)
        data = block_of("torn")
        checksum = block_checksum(data, slab_seed(VOLUME, slab), block)
        torn.write_blocks(block, data, checksum.to_bytes(4, "little"))
        first.answers_recalls = False
        with trio.fail_after(60):
            found = await second.read(ino, 1)
        contents = {bytes(cluster.copy(node, slab).read_blocks(block, 1)[1]) for node in ("n1", "n2", "n3")}
        assert contents == {found}, "all members agree"
        with pytest.raises(Fenced):
            await first.call("getattr", ino=ino)
        with pytest.raises(Fenced):
            await first.write_block(slab, block, block_of("too late"))


async def test_a_mount_that_says_it_waits_for_a_slab_is_not_evicted_and_one_that_stops_saying_so_is(
    tmp_path, monkeypatch
):
    """It is healthy: its kernel cannot give pages back that a READ keeps locked."""
    monkeypatch.setattr("coordinator.eviction.CONTACT_S_MAX", 0.1)
    async with cluster_of(tmp_path, recall_timeout_ms=300) as cluster:
        first, second = await cluster.mount("n1"), await cluster.mount("n2")
        ino = await first.make(b"file")
        await first.write(ino, block_of("old"))
        first.answers_recalls = False
        await first.call("slabs", ids=[], mode="paused", why="slab 1", busy=True)
        read = trio.Event()

        async def read_elsewhere() -> None:
            assert await second.read(ino, 1) == block_of("old")
            read.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_elsewhere)
            with trio.fail_after(60):
                while len(first.recalls) < 4:  # sent again each time the time-out is over
                    await first.call("slabs", ids=[], mode="paused", why="slab 1", busy=True)
                    await trio.sleep(0.02)
            service = await cluster.wait_serving()
            assert not any(session.ended for session in service.desk.sessions)
            assert service.waits()["requests"][0]["recalls"][0]["node"] == "n1"
            assert not read.is_set()
            first.answers_recalls = True
            with trio.fail_after(60):
                await read.wait()
        assert not any(session.ended for session in service.desk.sessions)

        await first.acquire(ino, WRITE)
        await first.write(ino, block_of("new"))
        first.answers_recalls = False
        await first.call("slabs", ids=[], mode="direct", why="", busy=False)
        with trio.fail_after(60):
            assert await second.read(ino, 1) == block_of("new")
        assert [session.node for session in service.desk.sessions] == ["n2"]


async def test_an_evicted_mount_stays_evicted_under_the_next_coordinator(tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.eviction.CONTACT_S_MAX", 0.1)
    async with cluster_of(tmp_path, hosts=("n1", "n2"), recall_timeout_ms=300) as cluster:
        first, second = await cluster.mount("n1"), await cluster.mount("n2")
        ino = await first.make(b"file")
        first.answers_recalls = False
        await second.acquire(ino, WRITE)
        await cluster.kill_host(next(name for name, host in cluster.hosts.items() if NAME in host.owned))
        await second.call("getattr", ino=ino)
        with pytest.raises(Fenced):
            await first.connect()
        successor = await cluster.mount("n1", incarnation=2)
        assert (await successor.call("getattr", ino=ino))["attr"][0] == ino


async def test_a_mount_that_starts_anew_replaces_its_earlier_self(tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.eviction.CONTACT_S_MAX", 600)  # this is not waited for
    async with cluster_of(tmp_path) as cluster:
        first, second = await cluster.mount("n1"), await cluster.mount("n2")
        ino = await first.make(b"file")
        first.kill()
        await cluster.mount("n1", incarnation=2)
        with trio.fail_after(60):
            await second.acquire(ino, WRITE)


async def test_a_mount_that_says_goodbye_leaves_nothing_that_anybody_waits_for(tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.eviction.CONTACT_S_MAX", 600)  # this is not waited for
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        first, second = await cluster.mount("n1"), await cluster.mount("n2")
        ino = await first.make(b"file")
        await first.write(ino, block_of("last words"))
        await first.call("goodbye")
        assert await first.call("slabs", ids=[]) == []
        with pytest.raises(Fenced):
            await first.call("lookup", parent=1, name=b"file")
        first.link.close()
        with trio.fail_after(60):
            assert await second.read(ino, 1) == block_of("last words")
        assert [row["node"] for row in (await second.call("volume_status"))["sessions"]] == ["n2"]
        marks = [server.service.marks.of_writer(VOLUME, "mount/n1") for server in cluster.servers.values()]
        assert not any(marks)
        await cluster.kill_host(next(name for name, host in cluster.hosts.items() if NAME in host.owned))
        with pytest.raises(Fenced), trio.fail_after(60):
            await first.connect()
        assert await (await cluster.mount("n1", incarnation=2)).read(ino, 1) == block_of("last words")


async def test_the_sessions_of_a_dead_node_are_evicted_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.eviction.CONTACT_S_MAX", 600)  # this is not waited for
    async with cluster_of(tmp_path) as cluster:
        first, second = await cluster.mount("n3"), await cluster.mount("n2")
        ino = await first.make(b"file")
        await cluster.store.delete("alive/n3")
        await cluster.kill_server("n3")
        with trio.fail_after(60):
            await second.acquire(ino, WRITE)


async def test_too_few_fault_domains_are_said_in_the_volume_key(tmp_path):
    async with trio.open_nursery() as nursery:
        cluster = await TestCluster(tmp_path, nursery, 2).start()
        await cluster.start_host("n1")
        await cluster.create_volume(copies=3)
        with trio.fail_after(60):
            while "error" not in await cluster.volume():
                await trio.sleep(0.02)
        assert "3 copies need 3 fault domains" in (await cluster.volume())["error"]
        nursery.cancel_scope.cancel()


async def test_a_deleted_volume_leaves_nothing_on_the_drives(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        mount = await cluster.mount("n1")
        await mount.write(await mount.make(b"file"), block_of("gone"))
        value = {**(await cluster.volume()), "state": "deleting"}
        await cluster.store.put(f"volumes/{NAME}", pack_value(value))
        with trio.fail_after(60):
            while await cluster.volume():
                await trio.sleep(0.02)
        for server in cluster.servers.values():
            drive = server.service.drives.by_id(server.drive_id).opened()
            assert list(drive.slabs()) == []
        assert [item.key for item in await cluster.store.list("deleted/")] != []


async def test_a_volume_moves_to_the_node_that_is_preferred(tmp_path):
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        mount = await cluster.mount("n3")
        await mount.make(b"file")
        owner = next(name for name, host in cluster.hosts.items() if NAME in host.owned)
        other = {"n1": "n2", "n2": "n1"}[owner]
        await cluster.store.put(
            f"volumes/{NAME}", pack_value({**(await cluster.volume()), "preferred": other})
        )
        await cluster.wait(lambda: NAME in cluster.hosts[other].owned)
        await mount.make(b"another")
        assert len((await mount.call("readdir", ino=1, cookie=0, limit=9))["entries"]) == 2


async def test_a_volume_grows_while_a_node_is_away_and_the_node_gets_its_copies_later(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        mount = await cluster.mount("n1")
        await cluster.kill_server("n3")
        ino = await mount.make(b"file")
        service = await cluster.wait_serving()
        await cluster.wait(lambda: len(service.slabs.pool_spaces) == 2)
        with trio.fail_after(60):
            await mount.write(ino, block_of("two copies"))
        slab = next(iter(service.changes.book.all()))
        assert [member.role for member in slab.members].count(1) == 2 and len(slab.members) == 3
        await cluster.start_server("n3")
        await cluster.wait(lambda: len(service.changes.book.current(slab.slab).in_sync) == 3)
        extent = (await mount.acquire(ino, READ, 1))["extents"][0]
        assert cluster.copy("n3", slab.slab).read_blocks(extent[3], 1)[1] == block_of("two copies")


async def ask_without_hello(cluster, host, call, **args):
    mount = await cluster.mount("n1")
    link = await connect(mount.engine, ("127.0.0.1", cluster.hosts[host]._port), timeout_s=60)
    try:
        return await link.call(call, args, timeout_s=60)
    finally:
        link.close()


async def test_the_first_answer_about_space_counts_the_whole_pool(tmp_path, monkeypatch):
    asked, may_answer, refresh = trio.Event(), trio.Event(), SlabManager.refresh_spaces

    async def slow_refresh(slabs):
        asked.set()
        await may_answer.wait()
        await refresh(slabs)

    monkeypatch.setattr(SlabManager, "refresh_spaces", slow_refresh)
    async with cluster_of(tmp_path) as cluster:
        await asked.wait()
        figures = []

        async def ask():
            figures.append(await ask_without_hello(cluster, "n1", "statfs", volume=NAME))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            mount = await cluster.mount("n2")
            may_answer.set()
            figures.append(await mount.call("statfs"))
        assert figures[0] == figures[1]
        assert figures[0]["size"] > DRIVE_SIZE // 2


@pytest.mark.parametrize("noticed", [True, False])
async def test_the_first_answer_about_space_is_right_while_a_node_is_down(tmp_path, noticed):
    async with cluster_of(tmp_path) as cluster:
        figures = await ask_without_hello(cluster, "n1", "statfs", volume=NAME)
        await cluster.kill_host("n1")
        await cluster.kill_server("n3", noticed=noticed)
        await cluster.start_host("n1")
        await cluster.wait_serving()
        assert await ask_without_hello(cluster, "n1", "statfs", volume=NAME) == figures


class HeldBus:
    """Keeps the metadata log's writes from the members until they are let go."""

    def __init__(self, service) -> None:
        self.bus = service.log._bus
        self.held = []
        service.log._bus = self

    def write(self, *args):
        self.held.append(args)

    async def flush(self, slabs):
        await self.bus.flush(slabs)

    def let_go(self) -> None:
        for args in self.held:
            self.bus.write(*args)
        self.held.clear()
        self.write = self.bus.write


@pytest.mark.parametrize(
    ("call", "args", "want"),
    [
        ("lookup", {"parent": 1, "name": b"file"}, lambda reply: reply["attr"] is not None),
        ("readdir", {"ino": 1, "cookie": 0, "limit": 9}, lambda reply: len(reply["entries"]) == 1),
        ("getattr", {"ino": 2}, lambda reply: reply["attr"][0] == 2),
        ("acquire", {"ino": 2, "kind": 1, "block": 0, "count": 0}, lambda reply: reply["lease"] == 1),
        ("statfs", {}, lambda reply: reply["files"] - reply["files_free"] == 2),
    ],
)
async def test_B1_nobody_is_told_what_could_still_un_happen(tmp_path, call, args, want):
    async with cluster_of(tmp_path) as cluster:
        first, second = await cluster.mount("n1"), await cluster.mount("n2")
        await second.call("statfs")
        bus = HeldBus(await cluster.wait_serving())
        answered, replies = [], []

        async def make():
            await first.make(b"file")
            answered.append("make")

        async def ask():
            replies.append(await second.call(call, **args))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(make)
            await cluster.wait(lambda: bus.held)
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await second.call("slabs", ids=[])  # handled behind the question, answered all the same
            await second.call("release", items=[[99, 0]])
            assert (answered, replies) == ([], [])
            bus.let_go()
        assert answered == ["make"] and want(replies[0])


async def test_B1_errors_wait_too(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, second = await cluster.mount("n1"), await cluster.mount("n2")
        ino = await first.make(b"file")
        bus = HeldBus(await cluster.wait_serving())
        errors = []

        async def ask():
            with pytest.raises(NotFound):
                await second.call("lookup", parent=ino + 1, name=b"x")
            errors.append("told")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(first.change, "unlink", parent=1, name=b"file", directory=False))
            await cluster.wait(lambda: bus.held)
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await second.call("slabs", ids=[])
            assert errors == []
            bus.let_go()
        assert errors == ["told"]


async def test_a_volume_whose_coordinator_fails_is_tried_at_growing_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.host.RETRY_S", 0.02)
    monkeypatch.setattr("coordinator.host.RETRY_S_MAX", 0.1)
    async with cluster_of(tmp_path) as cluster:
        tries = []

        async def fail(*args, **kwargs):
            tries.append(trio.current_time())
            raise TypeError("a bug")

        host = cluster.hosts["n1"]
        host._serve = fail
        host.owned[NAME].scope.cancel()
        await cluster.wait(lambda: len(tries) == 6)
        pauses = [after - before for before, after in pairwise(tries)]
        assert all(pause >= least for pause, least in zip(pauses, (0.02, 0.04, 0.08, 0.1, 0.1), strict=True))


async def test_a_call_that_arrives_when_all_has_ended_but_the_volume_is_not_given_up_yet_is_sent_elsewhere(tmp_path):
    """For a moment a nursery takes no more tasks, and its owner has not heard of it: no call may fail for that."""
    async with cluster_of(tmp_path) as cluster:
        await cluster.mount("n1")
        service = await cluster.wait_serving()
        (session,) = service.desk.sessions
        nursery, answers = service._nursery, []
        link = SimpleNamespace(
            peer="n1", closed=None, reply=lambda number, value: answers.append(value),
            reply_error=lambda number, error: answers.append(error),
        )  # fmt: skip
        frame = Frame(Kind.CALL, 7, memoryview(pack_call("lock", {})), memoryview(b""))

        class LateCaller(trio.abc.Instrument):
            def task_exited(self, task):
                if not nursery.child_tasks:
                    service.on_frame(link, session, frame)

        late = LateCaller()
        trio.lowlevel.add_instrument(late)
        owned = cluster.hosts["n1"].owned[NAME]
        owned.scope.cancel()
        await cluster.wait(lambda: owned.finished)
        trio.lowlevel.remove_instrument(late)
        assert answers
        assert {type(answer) for answer in answers} == {NotCoordinator}


async def test_a_question_whose_volume_moves_away_meanwhile_is_sent_elsewhere(tmp_path, monkeypatch):
    async with cluster_of(tmp_path) as cluster:
        service = await cluster.wait_serving()
        owned = cluster.hosts["n1"].owned[NAME]

        async def look_while_it_moves(node):
            owned.scope.cancel()
            await cluster.wait(lambda: owned.finished)
            return service.volume_status()

        monkeypatch.setattr(service.healing, "without_node", look_while_it_moves)
        with pytest.raises(NotCoordinator):
            await ask_without_hello(cluster, "n1", "without_node", volume=NAME, node="n2")
