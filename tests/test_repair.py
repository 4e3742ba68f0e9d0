"""Pools that heal themselves: real drive servers and coordinators, drives that go, come and are emptied."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from coordinator import membership_reactions
from csvfs.errors import Unavailable
from csvfs.ids import DriveId
from csvfs.wire.block_messages import SlabDescriptor
from tests.coordinator_cluster import NAME, Mount, TestCluster
from tests.test_service import block_of

JOINING = 2  # a member's role


class Witness:
    """Sees every change of every slab, and that no change makes fewer good copies where nothing failed."""

    def __init__(self, cluster: TestCluster) -> None:
        self.cluster = cluster
        self.least: dict[int, int] = {}
        self.words: set[str] = set()  # of health

    async def watch_forever(self) -> None:
        while True:
            for service in [o.service for h in self.cluster.hosts.values() for o in h.owned.values()]:
                if service is not None:
                    self.words.add(service.volume_status()["health"])
                    for changes in service.healing._books:
                        for descriptor in changes.book.all():
                            count = len(good(self.cluster, descriptor))
                            known = self.least.get(descriptor.slab, count)
                            self.least[descriptor.slab] = min(known, count)
            await trio.sleep(0.002)


def good(cluster: TestCluster, descriptor: SlabDescriptor) -> list[DriveId]:
    """Drives of in-sync members that are there."""
    return [m.drive for m in descriptor.in_sync if cluster.copy_on(m.drive, descriptor.slab) is not None]


@asynccontextmanager
async def pool_of(
    path: Path, monkeypatch: Any, *, nodes: int = 3, hosts: tuple[str, ...] = ("n1",), retire_ms: int = 900_000,
    copies: int = 3, second_drives: tuple[str, ...] = (), create: bool = True,
) -> AsyncIterator[TestCluster]:  # fmt: skip
    """A volume on a cluster; `second_drives`: nodes with two drives. `create` False: without the volume."""
    monkeypatch.setattr("coordinator.repair.TICK_S", 0.05)
    monkeypatch.setattr("coordinator.repair.RETRY_S", 0.2)
    monkeypatch.setattr("coordinator.health.CACHED_S", 0.0)
    monkeypatch.setattr("coordinator.slab_manager.SPACE_INTERVAL_S", 0.1)
    async with trio.open_nursery() as nursery:
        cluster = TestCluster(path, nursery, nodes)
        cluster.drive_retire_ms = retire_ms
        await cluster.start()
        for node in second_drives:
            await cluster.add_drive(node)
        for host in hosts:
            await cluster.start_host(host)
        if create:
            await cluster.create_volume(copies)
            await cluster.wait_serving()
        yield cluster
        nursery.cancel_scope.cancel()


async def descriptors(cluster: TestCluster) -> list[SlabDescriptor]:
    service = await cluster.wait_serving()
    return [d for changes in service.healing._books for d in changes.book.all()]


async def wait_slabs(cluster: TestCluster, condition: Any, within_s: float = 60) -> None:
    """Until all slabs, of data and metadata, are as they should be."""
    with trio.move_on_after(within_s):
        while not all(condition(d) for d in await descriptors(cluster)):
            await trio.sleep(0.02)
        return
    service = await cluster.wait_serving()
    rows = [[(m.drive, m.role) for m in d.members] for d in await descriptors(cluster) if not condition(d)]
    raise AssertionError(f"{len(rows)} slabs are not, such as {rows[:2]}; jobs {service.healing.to_status()}")


def whole_without(cluster: TestCluster, *drives: DriveId, copies: int = 3) -> Any:
    def condition(descriptor: SlabDescriptor) -> bool:
        members = [member.drive for member in descriptor.members]
        nodes = {member.node for member in descriptor.members}
        return len(good(cluster, descriptor)) == len(members) == len(nodes) == copies and not set(
            drives
        ) & set(members)

    return condition


async def write_file(mount: Mount, name: bytes, blocks: int = 24) -> tuple[int, bytes]:
    ino = await mount.make(name)
    data = b"".join(block_of(f"{name.decode()} {index}") for index in range(blocks))
    await mount.write(ino, data)
    return ino, data


class Writer:
    """Writes one file over and over, and remembers what was acknowledged."""

    def __init__(self, mount: Mount, ino: int) -> None:
        self.mount = mount
        self.ino = ino
        self.acknowledged = b""
        self.count = 0

    async def run_forever(self) -> None:
        while True:
            data = block_of(f"round {self.count}") * 4
            await self.mount.write(self.ino, data)
            self.acknowledged = data
            self.count += 1
            await trio.sleep(0.005)


async def test_a_drive_that_is_lost_for_good_is_rebuilt_elsewhere_while_writes_go_on(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, nodes=4, retire_ms=300) as cluster:
        mount = await cluster.mount("n1")
        ino, data = await write_file(mount, b"file")
        writer = Writer(mount, await mount.make(b"busy"))
        lost = cluster.servers["n3"].drive_id
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run_forever)
            await cluster.kill_server("n3")
            await wait_slabs(cluster, whole_without(cluster, lost))
            count = writer.count
            with trio.fail_after(60):
                while writer.count < count + 3:
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert await mount.read(ino, 24) == data
        await equal_copies(cluster)
        service = await cluster.wait_serving()
        await cluster.wait(lambda: service.volume_status()["jobs"] == [])
        assert service.volume_status()["health"] == "Healthy"


async def equal_copies(cluster: TestCluster) -> None:
    """Every in-sync copy of every slab has the same content, once no write is under way."""
    for descriptor in await descriptors(cluster):
        copies = [cluster.copy_on(drive, descriptor.slab) for drive in good(cluster, descriptor)]
        with trio.fail_after(60):
            while len({bytes(copy.checksums()) for copy in copies}) > 1:
                await trio.sleep(0.02)  # the metadata is written to now and then
        for copy in copies:
            for block in range(0, copy.block_count, 256):
                copy.read_blocks(block, 256)


async def test_a_retired_drive_is_emptied_and_no_slab_ever_has_fewer_copies(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, nodes=4) as cluster:
        mount = await cluster.mount("n1")
        ino, data = await write_file(mount, b"file")
        retired = cluster.servers["n2"].drive_id
        witness = Witness(cluster)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(witness.watch_forever)
            nursery.start_soon(Writer(mount, await mount.make(b"busy")).run_forever)
            await cluster.set_usage(retired, "retired")
            await wait_slabs(cluster, whole_without(cluster, retired))
            nursery.cancel_scope.cancel()
        assert set(witness.least.values()) == {3} and witness.words == {"Healthy"}
        assert await mount.read(ino, 24) == data
        drive = cluster.servers["n2"].service.drives.by_id(retired).opened()
        await cluster.wait(lambda: not drive.slabs())
        members = await (await cluster.wait_serving()).healing.drive_members(retired)
        assert members["count"] == 0


async def test_a_retired_drive_with_no_place_to_go_keeps_its_copies_and_the_job_says_what_it_waits_for(
    tmp_path, monkeypatch
):
    async with pool_of(tmp_path, monkeypatch) as cluster:
        mount = await cluster.mount("n1")
        await write_file(mount, b"file")
        retired = cluster.servers["n2"].drive_id
        await cluster.set_usage(retired, "retired")
        service = await cluster.wait_serving()

        def waits() -> bool:
            rows = service.volume_status()["jobs"]
            return any(row["kind"] == "evacuate" and "n1, n3" in row["waiting_for"] for row in rows)

        await cluster.wait(waits)
        assert all(len(good(cluster, d)) == 3 for d in await descriptors(cluster))
        added = await cluster.add_drive("n2")
        await wait_slabs(cluster, whole_without(cluster, retired))
        assert all(added in good(cluster, d) for d in await descriptors(cluster))


async def test_a_node_that_is_back_before_the_delay_is_only_resynced(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, nodes=4, retire_ms=60_000) as cluster:
        mount = await cluster.mount("n1")
        ino, _ = await write_file(mount, b"file")
        await cluster.wait_grown()
        before = {d.slab: {m.drive for m in d.members} for d in await descriptors(cluster)}
        await cluster.kill_server("n3")
        await mount.write(ino, block_of("meanwhile") * 24)
        service = await cluster.wait_serving()

        def waits() -> bool:
            rows = service.volume_status()["jobs"]
            return any("on n3 to come back; rebuilt elsewhere in" in row["waiting_for"] for row in rows)

        await cluster.wait(waits)
        assert service.volume_status()["health"] == "Degraded"
        await cluster.start_server("n3")
        await wait_slabs(cluster, lambda d: len(good(cluster, d)) == len(d.members) == 3)
        after = {d.slab: {m.drive for m in d.members} for d in await descriptors(cluster)}
        assert {slab: after[slab] for slab in before} == before  # others were made ahead meanwhile
        await equal_copies(cluster)


async def test_a_drive_that_comes_back_after_its_slabs_were_rebuilt_is_emptied_and_used_again(
    tmp_path, monkeypatch
):
    async with pool_of(tmp_path, monkeypatch, nodes=4, retire_ms=200) as cluster:
        mount = await cluster.mount("n1")
        ino, data = await write_file(mount, b"file")
        lost = cluster.servers["n3"].drive_id
        await cluster.kill_server("n3")
        await wait_slabs(cluster, whole_without(cluster, lost))
        await cluster.start_server("n3")
        drive = cluster.servers["n3"].service.drives.by_id(lost).opened()
        await cluster.wait(lambda: not drive.slabs(), within_s=60)
        assert await mount.read(ino, 24) == data
        await equal_copies(cluster)


@pytest.mark.parametrize("is_lost", [False, True])
async def test_a_coordinator_that_is_killed_in_the_middle_of_a_repair_is_followed_by_one_that_goes_on(
    tmp_path, monkeypatch, is_lost
):
    retire_ms = 200 if is_lost else 900_000
    async with pool_of(tmp_path, monkeypatch, nodes=4, hosts=("n1", "n2"), retire_ms=retire_ms) as cluster:
        mount = await cluster.mount("n4")
        ino, data = await write_file(mount, b"file")
        left = cluster.servers["n3"].drive_id
        if is_lost:
            await cluster.kill_server("n3")
            await wait_slabs(cluster, lambda d: left not in [m.drive for m in d.in_sync])
        witness = Witness(cluster)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(witness.watch_forever)
            if not is_lost:
                await cluster.set_usage(left, "retired")
            interrupted = 0
            for _ in range(4):
                with trio.move_on_after(1):
                    while not any(m.role == JOINING for d in await descriptors(cluster) for m in d.members):
                        await trio.sleep(0)
                    interrupted += 1
                owner = next(name for name, host in cluster.hosts.items() if NAME in host.owned)
                await cluster.kill_host(owner)
                await cluster.start_host(owner)
                await cluster.wait_serving()
            await wait_slabs(cluster, whole_without(cluster, left))
            nursery.cancel_scope.cancel()
        assert interrupted, "at least once a copy was being made"
        assert min(witness.least.values()) == (2 if is_lost else 3)
        assert await (await cluster.mount("n4", incarnation=2)).read(ino, 24) == data
        await equal_copies(cluster)


async def test_a_census_that_began_before_a_copy_was_made_takes_nothing_from_it(tmp_path, monkeypatch):
    """What it counted is judged after all copies have moved: those that it has not seen are as good as the
    others."""
    monkeypatch.setattr("coordinator.membership_reactions.SETTLE_S", 0.0)
    async with pool_of(tmp_path, monkeypatch, nodes=4) as cluster:
        await write_file(await cluster.mount("n1"), b"file")
        retired = cluster.servers["n2"].drive_id
        service = await cluster.wait_serving()
        take = membership_reactions.take_census
        taken, may_be_judged, judged = trio.Event(), trio.Event(), trio.Event()

        async def slow_census(*args, **options):
            if taken.is_set():
                judged.set()  # the first one is over
                return await take(*args, **options)
            census = await take(*args, **options)
            taken.set()
            await may_be_judged.wait()
            return census

        monkeypatch.setattr(membership_reactions, "take_census", slow_census)
        service.members._look()
        await taken.wait()
        await cluster.set_usage(retired, "retired")
        await wait_slabs(cluster, whole_without(cluster, retired))
        before = await descriptors(cluster)
        may_be_judged.set()
        service.members._look()
        with trio.fail_after(60):
            await judged.wait()
        assert await descriptors(cluster) == before, "nobody was dropped"


async def test_the_only_copy_of_a_simple_volume_moves_off_a_retired_drive(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, nodes=2, copies=1) as cluster:
        mount = await cluster.mount("n1")
        ino, data = await write_file(mount, b"file")
        slab = next(d for d in await descriptors(cluster) if d.slab < (1 << 62))
        retired, node = slab.members[0].drive, slab.members[0].node
        await cluster.add_drive(node)
        writer = Writer(mount, await mount.make(b"busy"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run_forever)
            await cluster.set_usage(retired, "retired")
            await wait_slabs(cluster, lambda d: retired not in [m.drive for m in d.members])
            nursery.cancel_scope.cancel()
        assert await mount.read(ino, 24) == data
        counts = {d.slab < (1 << 62): len(d.members) for d in await descriptors(cluster)}
        assert counts == {True: 1, False: 2}, "one copy of data, two of metadata: there are two nodes"
        found = await mount.read(writer.ino, 1)
        assert found in (writer.acknowledged[:4096], block_of(f"round {writer.count}")), (
            "or what was under way"
        )


async def test_the_last_copies_on_a_lost_drive_are_waited_for_and_never_given_up(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, nodes=3, copies=1, retire_ms=200) as cluster:
        mount = await cluster.mount("n1")
        ino, data = await write_file(mount, b"file")
        slab = next(d for d in await descriptors(cluster) if d.slab < (1 << 62))
        node = slab.members[0].node
        service = await cluster.wait_serving()
        await cluster.kill_server(node)

        def waits() -> bool:
            rows = service.volume_status()["jobs"]
            return any("to come back: the last copies are there" in row["waiting_for"] for row in rows)

        await cluster.wait(waits)
        assert service.changes.book.current(slab.slab).members[0].drive == slab.members[0].drive
        await cluster.start_server(node)
        with trio.fail_after(60):
            assert await read_when_possible(mount, ino) == data


async def read_when_possible(mount: Mount, ino: int) -> bytes:
    while True:
        try:
            return await mount.read(ino, 24)
        except Unavailable:
            await trio.sleep(0.05)


async def test_the_time_a_drive_has_been_away_outlives_the_coordinator(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, nodes=4, retire_ms=1500) as cluster:
        mount = await cluster.mount("n1")
        await write_file(mount, b"file")
        lost = cluster.servers["n3"].drive_id
        await cluster.kill_server("n3")
        service = await cluster.wait_serving()
        await cluster.wait(lambda: service.healing.record.facts.away_ms.get(lost, 0) > 300)
        await cluster.kill_host("n1")
        cluster.drive_retire_ms = 3_600_000
        await cluster.start_host("n1")
        service = await cluster.wait_serving()
        await cluster.wait(lambda: service.healing._watch.away_ms().get(lost, 0) > 300)
        cluster.drive_retire_ms = 400
        await cluster.kill_host("n1")
        await cluster.start_host("n1")
        await wait_slabs(cluster, whole_without(cluster, lost))


async def test_a_drive_that_fails_under_a_server_that_lives_is_rebuilt_elsewhere(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, retire_ms=300, second_drives=("n2",)) as cluster:
        mount = await cluster.mount("n1")
        ino, data = await write_file(mount, b"file")
        held = {m.drive for d in await descriptors(cluster) for m in d.members if m.node == "n2"}
        failed = sorted(held)[0]
        cluster.servers["n2"].service.drives.by_id(failed).drive.failure = "it died"
        await wait_slabs(cluster, lambda d: failed not in [m.drive for m in d.members])
        await wait_slabs(cluster, whole_without(cluster, failed))
        assert await mount.read(ino, 24) == data


async def test_a_coordinator_that_is_killed_while_drives_are_levelled_is_followed_by_one_that_goes_on(
    tmp_path, monkeypatch
):
    async with pool_of(tmp_path, monkeypatch, hosts=("n1", "n2")) as cluster:
        mount = await cluster.mount("n3")
        ino, data = await write_file(mount, b"file")
        large = await mount.make(b"large")
        for slab in range(10):
            end = (slab + 1) * 1024
            await mount.change(
                "allocate", ino=large, block=slab * 1024, count=1024, size=end << 12, mtime_ns=0
            )
        service = await cluster.wait_serving()
        await cluster.wait(lambda: service.healing.record.facts.balanced is not None)
        witness = Witness(cluster)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(witness.watch_forever)
            added = await cluster.add_drive("n2")
            for _ in range(3):
                with trio.move_on_after(2):
                    while not any(len(d.members) > 3 for d in await descriptors(cluster)):
                        await trio.sleep(0.001)
                owner = next(name for name, host in cluster.hosts.items() if NAME in host.owned)
                await cluster.kill_host(owner)
                await cluster.start_host(owner)
                await cluster.wait_serving()
            with trio.fail_after(60):
                while added not in ((await cluster.wait_serving()).healing.record.facts.balanced or ()):
                    await trio.sleep(0.02)
            await wait_slabs(cluster, lambda d: len(good(cluster, d)) == len(d.members) == 3)
            nursery.cancel_scope.cancel()
        assert set(witness.least.values()) == {3}
        drives = cluster.servers["n2"].service.drives
        counts = [
            len(drives.by_id(drive).opened().slabs()) for drive in (cluster.servers["n2"].drive_id, added)
        ]
        assert abs(counts[0] - counts[1]) <= 4
        assert await (await cluster.mount("n3", incarnation=2)).read(ino, 24) == data
        await equal_copies(cluster)
