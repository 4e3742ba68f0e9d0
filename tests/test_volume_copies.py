"""Volumes whose number of copies is changed while they are written to: real drive servers and coordinators."""

from collections import Counter
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio

from csvfs.admin import volume_ops
from csvfs.admin.peers import open_peers
from csvfs.errors import BadRequest, Conflict, NoSpace
from csvfs.ids import DriveId
from csvfs.wire.control import pack_value
from tests.block_cluster import Server
from tests.coordinator_cluster import NAME, Mount, TestCluster
from tests.test_repair import (
    JOINING,
    Witness,
    Writer,
    descriptors,
    equal_copies,
    good,
    pool_of,
    wait_slabs,
    write_file,
)

DATA = 1 << 62  # ids of data slabs are below


async def ask(cluster: TestCluster, **wanted: int) -> dict[str, Any]:
    """As `csvfs volume set` and `resize` do."""
    async with open_peers() as peers:
        return await volume_ops.set_volume(cluster.store, peers, NAME, **wanted)


async def fill(mount: Mount, slabs: int) -> int:
    """A file over so many slabs of 4 MiB, with something written in each."""
    ino = await mount.make(b"large")
    for slab in range(slabs):
        end = (slab + 1) * 1024
        await mount.change("allocate", ino=ino, block=slab * 1024, count=1024, size=end << 12, mtime_ns=0)
    return ino


def has_copies(cluster: TestCluster, copies: int) -> Any:
    """Of data slabs so many, in sync, each on a node of its own; of metadata slabs three."""

    def condition(descriptor: Any) -> bool:
        wanted = copies if descriptor.slab < DATA else min(3, len(cluster.servers))
        nodes = {member.node for member in descriptor.members}
        return len(good(cluster, descriptor)) == len(descriptor.members) == len(nodes) == wanted

    return condition


async def data_slabs(cluster: TestCluster) -> list[Any]:
    return [d for d in await descriptors(cluster) if d.slab < DATA]


async def jobs(cluster: TestCluster) -> list[dict[str, Any]]:
    rows = (await cluster.wait_serving()).volume_status()["jobs"]
    return [row for row in rows if row["kind"] == "copies"]


@asynccontextmanager
async def written_to(cluster: TestCluster, mount: Mount) -> Any:
    """A writer and a witness at work; afterwards the last acknowledged write is there."""
    witness = Witness(cluster)
    writer = Writer(mount, await mount.make(b"busy"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(witness.watch_forever)
        nursery.start_soon(writer.run_forever)
        yield witness
        count = writer.count
        with trio.fail_after(30):
            while writer.count < count + 2:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (1, 2)])
async def test_the_number_of_copies_changes_under_a_writer_and_no_slab_ever_has_fewer_than_the_smaller_number(
    tmp_path, monkeypatch, before, after
):
    async with pool_of(tmp_path, monkeypatch, nodes=4, copies=before) as cluster:
        mount = await cluster.mount("n1")
        ino, data = await write_file(mount, b"file")
        await fill(mount, 6)
        async with written_to(cluster, mount) as witness:
            answer = await ask(cluster, copies=after)
            slabs = len(await data_slabs(cluster))
            moved = slabs * abs(after - before) * (4 << 20)
            key = "to_copy" if after > before else "to_drop"
            assert 0 < answer[key] <= moved and answer["copies"] == after
            await wait_slabs(cluster, has_copies(cluster, after), within_s=60)
            assert (await cluster.volume())["copies"] == after
            assert (await cluster.volume())["resiliency"] == "mirror"
        assert all(least >= min(before, after) for least in witness.least.values())
        assert await mount.read(ino, 24) == data
        await equal_copies(cluster)
        service = await cluster.wait_serving()
        await cluster.wait(lambda: service.volume_status()["jobs"] == [], within_s=30)
        assert service.volume_status()["health"] == "Healthy"


async def test_new_slabs_have_the_new_number_at_once_while_the_job_for_the_others_is_paused(
    tmp_path, monkeypatch
):
    async with pool_of(tmp_path, monkeypatch, nodes=3, copies=2) as cluster:
        mount = await cluster.mount("n1")
        await fill(mount, 4)
        service = await cluster.wait_serving()
        await service.healing.record.control("pause", "copies", None)
        # What is begun with the old number is finished with it, and made whole by the job.
        await wait_none_is_created(cluster)
        old = {d.slab for d in await data_slabs(cluster)}
        await ask(cluster, copies=3)
        other = await mount.make(b"other")
        for slab in range(6):
            await mount.change(
                "allocate", ino=other, block=slab * 1024, count=1024, size=(slab + 1) << 22, mtime_ns=0
            )
        new = [d for d in await data_slabs(cluster) if d.slab not in old]
        assert new and all(len(d.in_sync) == 3 for d in new)

        def is_shown() -> bool:
            rows = [row for row in service.volume_status()["jobs"] if row["kind"] == "copies"]
            return bool(rows) and rows[0]["left"] == len(old) << 22

        await cluster.wait(is_shown, within_s=30)
        (row,) = await jobs(cluster)
        assert row["paused"] and row["waiting_for"] == "csvfs job resume v copies" and row["done"] == 0
        assert service.volume_status()["health"] == "Degraded"
        await cluster.kill_host("n1")
        await cluster.start_host("n1")
        service = await cluster.wait_serving()
        await cluster.wait(is_shown, within_s=30)
        assert all(len(d.members) == 2 for d in await data_slabs(cluster) if d.slab in old), "still paused"
        await service.healing.record.control("resume", None, None)
        await wait_slabs(cluster, has_copies(cluster, 3), within_s=60)


async def wait_none_is_created(cluster: TestCluster) -> None:
    """Until there is enough free space ahead, so that no slab is being made."""
    service = await cluster.wait_serving()
    enough = 2 * service.setup.slab_blocks
    await cluster.wait(
        lambda: not service.slabs.creating and service._metadata.statfs().free_blocks >= enough, within_s=30
    )


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2)])
async def test_a_coordinator_killed_in_the_middle_is_followed_by_one_that_goes_on(
    tmp_path, monkeypatch, before, after
):
    async with pool_of(tmp_path, monkeypatch, nodes=4, copies=before, hosts=("n1", "n2")) as cluster:
        mount = await cluster.mount("n4")
        ino, data = await write_file(mount, b"file")
        await fill(mount, 12)
        witness = Witness(cluster)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(witness.watch_forever)
            await ask(cluster, copies=after)
            interrupted = 0
            for _ in range(4):
                with trio.move_on_after(2):
                    while not _is_under_way(await data_slabs(cluster), before, after):
                        await trio.sleep(0)
                    interrupted += 1
                owner = next(name for name, host in cluster.hosts.items() if NAME in host.owned)
                await cluster.kill_host(owner)
                await cluster.start_host(owner)
                await cluster.wait_serving(within_s=30)
            await wait_slabs(cluster, has_copies(cluster, after), within_s=60)
            nursery.cancel_scope.cancel()
        assert interrupted, "at least once slabs were being changed"
        assert min(witness.least.values()) >= 2
        assert await (await cluster.mount("n4", incarnation=2)).read(ino, 24) == data
        await equal_copies(cluster)


def _is_under_way(slabs: list[Any], before: int, after: int) -> bool:
    if after > before:
        return any(member.role == JOINING for d in slabs for member in d.members)
    return len({len(d.members) for d in slabs}) > 1


async def test_copies_that_are_dropped_leave_the_drives_equally_full(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, copies=3) as cluster:
        # As good as never, as in production: what servers answer while copies go is behind what is known here.
        monkeypatch.setattr("coordinator.slab_manager.SPACE_INTERVAL_S", 60.0)
        await fill(await cluster.mount("n1"), 18)
        await wait_none_is_created(cluster)
        await ask(cluster, copies=2)
        await wait_slabs(cluster, has_copies(cluster, 2), within_s=60)
        held = Counter(m.drive for d in await data_slabs(cluster) for m in d.members)
        assert len(held) == 3 and max(held.values()) - min(held.values()) <= 6, held


async def test_a_change_of_mind_halfway_ends_where_it_began(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, nodes=4, copies=2) as cluster:
        mount = await cluster.mount("n1")
        ino, data = await write_file(mount, b"file")
        await fill(mount, 10)
        async with written_to(cluster, mount) as witness:
            await ask(cluster, copies=3)
            with trio.fail_after(30):
                while not any(len(d.members) > 2 for d in await data_slabs(cluster)):
                    await trio.sleep(0)
            await ask(cluster, copies=2)
            await wait_slabs(cluster, has_copies(cluster, 2), within_s=60)
        assert min(witness.least.values()) >= 2
        assert await mount.read(ino, 24) == data


async def test_a_copy_that_is_away_is_the_one_that_is_given_up(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, copies=3) as cluster:
        mount = await cluster.mount("n1")
        await fill(mount, 6)
        away = cluster.servers["n3"].drive_id
        await cluster.kill_server("n3")
        await wait_slabs(cluster, lambda d: away not in [m.drive for m in d.in_sync], within_s=30)
        await ask(cluster, copies=2)
        with trio.fail_after(60):
            while any(away in [m.drive for m in d.members] for d in await data_slabs(cluster)):
                await trio.sleep(0.02)
        assert all(len(good(cluster, d)) == 2 for d in await data_slabs(cluster))
        assert all(len(d.members) == 3 for d in await descriptors(cluster) if d.slab >= DATA), "metadata wait"


async def test_what_the_pool_cannot_hold_is_refused_with_its_numbers_and_nothing_is_changed(
    tmp_path, monkeypatch
):
    async with pool_of(tmp_path, monkeypatch, nodes=2, copies=2) as cluster:
        await fill(await cluster.mount("n1"), 4)
        with pytest.raises(NoSpace, match=r"need 3 fault domains .* there are 2 \(n1, n2\); add a node"):
            await ask(cluster, copies=3)
        assert (await cluster.volume())["copies"] == 2
    path = tmp_path / "other"
    path.mkdir()
    async with pool_of(path, monkeypatch, nodes=2, copies=2) as cluster:
        await fill(await cluster.mount("n1"), 20)
        await add_node(cluster, "n3", path, size=48 << 20)
        await cluster.wait(lambda: "n3" in cluster.hosts["n1"].facts.drive_nodes(), within_s=30)
        await wait_none_is_created(cluster)
        slabs = len(await data_slabs(cluster))
        with pytest.raises(NoSpace, match=rf"for {slabs} more copies of slabs, and \d+ of them find no place"):
            await ask(cluster, copies=3)
        assert (await cluster.volume())["copies"] == 2 and await jobs(cluster) == []


async def add_node(cluster: TestCluster, name: str, path: Any, size: int) -> None:
    drive = DriveId(name.encode().ljust(16, b"-"))
    cluster.servers[name] = Server(name, path / f"drive-{name}", drive)
    cluster.serving[name] = True
    await cluster.store.put(f"nodes/{name}", pack_value({"address": "127.0.0.1"}))
    await cluster._make_drive(name, drive, cluster.servers[name].path, size)
    await cluster.start_node(name)
    await cluster.start_server(name)


async def test_the_least_number_of_copies_never_exceeds_what_slabs_have_or_shall_have(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, copies=2) as cluster:
        await fill(await cluster.mount("n1"), 3)
        with pytest.raises(BadRequest, match="from 1 to 2"):
            await ask(cluster, min_copies=3)
        with pytest.raises(Conflict, match=r"\d+ of \d+ slabs of volume v have fewer copies in sync now"):
            await ask(cluster, copies=3, min_copies=3)
        assert (await cluster.volume())["copies"] == 2, "all or nothing"
        await ask(cluster, copies=3)
        await wait_slabs(cluster, has_copies(cluster, 3), within_s=60)
        await ask(cluster, min_copies=3)
        with pytest.raises(BadRequest, match="give --min-copies 2 or less with it"):
            await ask(cluster, copies=2)
        answer = await ask(cluster, copies=2, min_copies=2)
        assert (answer["copies"], answer["min_copies"]) == (2, 2)
        with pytest.raises(BadRequest, match="does not become a simple volume"):
            await ask(cluster, copies=1, min_copies=1)


async def test_a_job_for_more_copies_leaves_the_reserve_alone_and_says_what_it_waits_for(
    tmp_path, monkeypatch
):
    async with pool_of(tmp_path, monkeypatch, nodes=4, copies=2) as cluster:
        await fill(await cluster.mount("n1"), 4)
        service = await cluster.wait_serving()
        monkeypatch.setattr(service.slabs, "slots_above_reserve", partial(int, 0))
        await ask(cluster, copies=3)

        def waits() -> bool:
            rows = service.volume_status()["jobs"]
            return any("above the reserve" in row["waiting_for"] for row in rows if row["kind"] == "copies")

        await cluster.wait(waits, within_s=30)
        assert all(len(d.members) == 2 for d in await data_slabs(cluster))
        monkeypatch.undo()
        await wait_slabs(cluster, has_copies(cluster, 3), within_s=60)


async def test_a_repair_that_is_asked_for_looks_at_once_and_says_what_it_waits_for(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, nodes=3, copies=2) as cluster, open_peers() as peers:
        mount = await cluster.mount("n1")
        await fill(mount, 3)
        answer = await volume_ops.repair_now(cluster.store, peers, NAME)
        assert (answer["health"], answer["jobs"]) == ("Healthy", [])
        await cluster.kill_server("n3")
        away = cluster.servers["n3"].drive_id
        await wait_slabs(cluster, lambda d: away not in [m.drive for m in d.in_sync], within_s=30)
        answer = await volume_ops.repair_now(cluster.store, peers, NAME)
        assert any("on n3 to come back" in row["waiting_for"] for row in answer["jobs"])
        with trio.fail_after(30):  # a mount says it once a second; this one when it is told to
            await mount.call("slabs", ids=[], open=4)
        (session,) = answer["sessions"]
        assert session["open_files"] is None
        assert (await cluster.wait_serving()).volume_status()["sessions"][0]["open_files"] == 4
