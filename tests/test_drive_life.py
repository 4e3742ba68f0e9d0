"""Retiring, removing and resetting drives, and jobs that say how far they are: what the commands do to a
cluster."""

from itertools import product
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from csvfs.admin import drive_life
from csvfs.admin.cluster_view import ClusterView, Record, read_cluster_view
from csvfs.admin.drive_names import find_drive
from csvfs.admin.job_ops import control_jobs
from csvfs.admin.peers import open_peers
from csvfs.admin.status import collect_status
from csvfs.block.capacity import missing_slots
from csvfs.errors import BadRequest, Conflict, CsvfsError, DriveRefused, NoSpace, NotFound
from csvfs.ids import NodeName
from tests.coordinator_cluster import NAME, TestCluster
from tests.test_repair import descriptors, equal_copies, good, pool_of, wait_slabs, whole_without, write_file

DOMAINS = ["a", "b", "c"]


@settings(deadline=None)  # trying everything takes its time
@given(
    st.lists(st.tuples(st.frozensets(st.sampled_from(DOMAINS), max_size=2), st.integers(0, 3)), max_size=3),
    st.fixed_dictionaries({name: st.integers(0, 4) for name in DOMAINS}),
)
def test_what_finds_no_place_is_counted_as_trying_everything_would(groups, free):
    best = 0
    choices = [
        [split for split in product(range(count + 1), repeat=3) if sum(split) <= count] for _, count in groups
    ]
    for splits in product(*choices):
        used = [sum(split[index] for split in splits) for index in range(3)]
        fits = all(used[index] <= free[name] for index, name in enumerate(DOMAINS))
        allowed = all(
            not split[index] or name not in taken
            for split, (taken, _) in zip(splits, groups, strict=True)
            for index, name in enumerate(DOMAINS)
        )
        if fits and allowed:
            best = max(best, sum(used))
    assert missing_slots(groups, free) == sum(count for _, count in groups) - best


def view_of(*drives: tuple[str, str, str]) -> ClusterView:
    view = ClusterView()
    for name, node, path in drives:
        view.drives[name] = Record(f"drives/{name}", {"node": node, "path": path}, 1)
    return view


def test_a_drive_is_meant_by_its_id_the_beginning_of_it_or_its_path():
    view = view_of(("aabbcc", "n1", "/d/1"), ("aabbdd", "n2", "/d/1"), ("ffeedd", "n2", "/d/2"))
    assert find_drive(view, "ffee", "n1").name == "ffeedd"
    assert find_drive(view, "/d/1", "n2").name == "aabbdd", "the path on this node first"
    assert find_drive(view, "/d/2", "n1").name == "ffeedd"
    with pytest.raises(BadRequest, match="aabbcc on n1, aabbdd on n2"):
        find_drive(view, "/d/1", "n3")
    with pytest.raises(BadRequest, match="give the id"):
        find_drive(view, "aabb", "n1")
    for text in ("ff", "0123", "/d/3"):
        with pytest.raises(NotFound, match="csvfs drive list"):
            find_drive(view, text, "n1")


async def drive_record(cluster: TestCluster, drive_id: bytes) -> Record:
    return (await read_cluster_view(cluster.store)).drives[drive_id.hex()]


async def test_a_drive_is_removed_after_everything_was_moved_off_it(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, nodes=4) as cluster, open_peers() as peers:
        cluster.nursery.start_soon(cluster.release_removed_drives_forever)
        mount = await cluster.mount("n1")
        ino, data = await write_file(mount, b"file")
        drive_id = cluster.servers["n2"].drive_id
        drive = await drive_record(cluster, drive_id)
        view = await read_cluster_view(cluster.store)
        needs = await drive_life.needs_of(view, peers, drive)
        assert (
            needs.count
            == sum(drive_id in [m.drive for m in d.members] for d in await descriptors(cluster))
            > 0
        )
        await drive_life.check_room(view, peers, drive, needs)
        left: list[int] = []
        with trio.fail_after(60):
            emptied = await drive_life.evacuate(
                cluster.store, peers, drive, lambda needs: left.append(needs.count)
            )
            await drive_life.take_out(cluster.store, peers, emptied)
        assert left[-1] == 0 and left[0] > 0
        assert drive_id.hex() not in (await read_cluster_view(cluster.store)).drives
        await wait_slabs(cluster, whole_without(cluster, drive_id))
        assert await mount.read(ino, 24) == data


async def test_a_drive_that_the_rest_cannot_hold_is_not_removed_and_the_shortage_is_said(
    tmp_path, monkeypatch
):
    async with pool_of(tmp_path, monkeypatch) as cluster, open_peers() as peers:
        await write_file(await cluster.mount("n1"), b"file")
        drive = await drive_record(cluster, cluster.servers["n2"].drive_id)
        view = await read_cluster_view(cluster.store)
        needs = await drive_life.needs_of(view, peers, drive)
        with pytest.raises(
            NoSpace, match=rf"{needs.count} slabs are on it, for {needs.count} of them \([\d.]+ MiB\)"
        ):
            await drive_life.check_room(view, peers, drive, needs)


async def test_a_drive_that_nothing_needs_is_wiped_and_joins_as_a_new_one(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, second_drives=("n2",)) as cluster, open_peers() as peers:
        cluster.nursery.start_soon(cluster.release_removed_drives_forever)
        mount = await cluster.mount("n1")
        ino, data = await write_file(mount, b"file")
        drive_id = cluster.servers["n2"].drive_id
        drive = await drive_record(cluster, drive_id)
        with pytest.raises(BadRequest, match="attached to node n2: run this command there"):
            await drive_life.reset_drive(cluster.store, peers, NodeName("n1"), drive)
        if any(drive_id in good(cluster, d) for d in await descriptors(cluster)):
            with pytest.raises(Conflict, match="still have a copy on it"):
                await drive_life.reset_drive(cluster.store, peers, NodeName("n2"), drive)
        await cluster.set_usage(drive_id, "retired")
        await wait_slabs(cluster, whole_without(cluster, drive_id))
        drive = await drive_record(cluster, drive_id)
        with trio.fail_after(60):
            joined = await drive_life.reset_drive(cluster.store, peers, NodeName("n2"), drive)
        drives = (await read_cluster_view(cluster.store)).drives
        assert drive_id.hex() not in drives and drives[joined.name].text("path") == drive.text("path")
        assert await mount.read(ino, 24) == data


async def test_a_reset_refuses_a_path_that_holds_something_else_by_now(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, nodes=4) as cluster, open_peers() as peers:
        drive_id = cluster.servers["n2"].drive_id
        await cluster.set_usage(drive_id, "retired")
        await wait_slabs(cluster, whole_without(cluster, drive_id))
        await cluster.kill_server("n2")
        path = cluster.servers["n2"].path
        with path.open("r+b") as file:
            file.truncate(0)
            file.truncate(256 << 20)
            file.seek(1080)
            file.write(b"\x53\xef")
        drive = await drive_record(cluster, drive_id)
        with pytest.raises(DriveRefused, match="not the drive that was there: file system ext4"):
            await drive_life.reset_drive(cluster.store, peers, NodeName("n2"), drive)


async def test_jobs_pause_and_go_on_also_after_the_coordinator_was_killed(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, nodes=4) as cluster, open_peers() as peers:
        await write_file(await cluster.mount("n1"), b"file")
        answers = await control_jobs(cluster.store, peers, NAME, "pause", kind="evacuate")
        assert answers == {NAME: {"paused": ["evacuate"], "speed": "medium"}}
        drive_id = cluster.servers["n2"].drive_id
        await cluster.set_usage(drive_id, "retired")

        async def evacuation() -> Any:
            jobs = (await collect_status(cluster.store, peers)).jobs
            return next((job for job in jobs if job.kind == "evacuate"), None)

        for _ in range(2):
            with trio.fail_after(60):
                while (job := await evacuation()) is None:
                    await trio.sleep(0.02)
            assert job.paused and job.waiting_for == f"csvfs job resume {NAME} evacuate"
            assert job.done == 0 and job.left == job.total > 0
            await cluster.kill_host("n1")
            await cluster.start_host("n1")
            await cluster.wait_serving()
        assert all(len(good(cluster, d)) == 3 for d in await descriptors(cluster))
        assert sum(drive_id in good(cluster, d) for d in await descriptors(cluster)) * (4 << 20) == job.total
        await control_jobs(cluster.store, peers, NAME, "resume")
        await wait_slabs(cluster, whole_without(cluster, drive_id))
        await equal_copies(cluster)
        with trio.fail_after(60):
            while await evacuation() is not None:
                await trio.sleep(0.02)


async def test_a_speed_is_kept_over_coordinators_and_nonsense_is_refused(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch) as cluster, open_peers() as peers:
        await control_jobs(cluster.store, peers, None, "speed", speed="very low")
        with pytest.raises(CsvfsError, match="is no speed; there are: very low, low"):
            await control_jobs(cluster.store, peers, NAME, "speed", speed="warp")
        with pytest.raises(CsvfsError, match="is no kind of job"):
            await control_jobs(cluster.store, peers, NAME, "pause", kind="lunch")
        with pytest.raises(NotFound):
            await control_jobs(cluster.store, peers, "other", "pause")
        await cluster.kill_host("n1")
        await cluster.start_host("n1")
        service = await cluster.wait_serving()
        assert service.healing.record.speed == 0


async def test_drives_are_levelled_after_one_was_added_and_when_asked_to(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch) as cluster, open_peers() as peers:
        mount = await cluster.mount("n1")
        ino = await mount.make(b"large")
        for slab in range(12):
            end = (slab + 1) * 1024
            await mount.change("allocate", ino=ino, block=slab * 1024, count=1024, size=end << 12, mtime_ns=0)
        service = await cluster.wait_serving()
        await cluster.wait(lambda: service.healing.record.facts.balanced is not None)
        added = await cluster.add_drive("n2")
        old = cluster.servers["n2"].drive_id

        def counts() -> tuple[int, int]:
            drives = cluster.servers["n2"].service.drives
            return tuple(len(drives.by_id(drive).opened().slabs()) for drive in (old, added))

        least: list[int] = []
        with trio.fail_after(60):
            while abs(counts()[0] - counts()[1]) > 4 or added not in service.healing.record.facts.balanced:
                least.append(min(len(good(cluster, d)) for d in await descriptors(cluster)))
                await trio.sleep(0.01)
        assert set(least) == {3}, "no slab had fewer copies on the way"
        await wait_slabs(cluster, lambda d: len(good(cluster, d)) == len(d.members) == 3)
        await control_jobs(cluster.store, peers, None, "optimize")
        assert service.healing.record.facts.balanced == frozenset()
        await cluster.wait(lambda: added in service.healing.record.facts.balanced)
        await equal_copies(cluster)
