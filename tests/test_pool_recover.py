"""The cluster store is lost: pool, drives and volumes are rebuilt from the drives alone."""

import os

import pytest
import trio

from coordinator.volume_facts import description_of
from csvfs.admin import pool_recover
from csvfs.admin.pool_recover import rebuild, scan
from csvfs.block.drive import Drive
from csvfs.block.offline import OfflineDrive
from csvfs.errors import Conflict, DriveRefused, NotEmpty, NotFound
from csvfs.store.embedded import EmbeddedStore
from csvfs.units import BLOCK_SIZE
from csvfs.wire.control import pack_value, unpack_value
from tests.block_cluster import CLUSTER, POOL, SLAB_SIZE
from tests.coordinator_cluster import NAME, VOLUME, TestCluster
from tests.drive_files import make_drive

BLOCKS = 300


@pytest.fixture
async def cluster(tmp_path, nursery):
    cluster = await TestCluster(tmp_path, nursery).start()
    await cluster.create_volume(copies=3, size=64 << 20)
    await cluster.start_host("n1")
    return cluster


async def write_file(cluster, mount, name=b"file"):
    ino = await mount.make(name)
    await mount.acquire(ino, 3)
    data = os.urandom(BLOCKS * BLOCK_SIZE)
    await mount.write(ino, data)
    await mount.call("fsync")
    return ino, data


async def described(service):
    with trio.fail_after(60):
        while not service._metadata.database.rows("SELECT 1 FROM settings WHERE name = 'description'"):
            await trio.sleep(0.01)


async def stop_all(cluster):
    for host in list(cluster.hosts):
        await cluster.kill_host(host)
    for name in cluster.servers:
        await cluster.kill_server(name)


async def test_a_volume_is_found_again_with_its_name_its_size_and_every_byte(cluster, tmp_path):
    service = await cluster.wait_serving()
    mount = await cluster.mount("n2")
    await described(service)
    ino, data = await write_file(cluster, mount)
    old_term = unpack_value((await cluster.store.get(f"term/{NAME}")).value)["term"]
    mount.kill()
    await stop_all(cluster)

    found = await trio.to_thread.run_sync(scan, [str(server.path) for server in cluster.servers.values()])
    assert found.problems == []
    assert (found.cluster, found.pool, found.slab_size) == (CLUSTER, POOL, SLAB_SIZE)
    assert {row["node"] for row in found.drives.values()} == {"n1", "n2", "n3"}
    assert [(volume.name, volume.volume, volume.files) for volume in found.volumes] == [(NAME, VOLUME, 2)]

    cluster.store = EmbeddedStore(tmp_path / "new.db")
    await rebuild(cluster.store, found, "again")
    value = unpack_value((await cluster.store.get(f"volumes/{NAME}")).value)
    assert (value["copies"], value["size"], value["state"]) == (3, 64 << 20, "online")
    assert unpack_value((await cluster.store.get(f"term/{NAME}")).value)["term"] >= old_term
    with pytest.raises(NotEmpty, match="not empty"):
        await rebuild(cluster.store, found)

    cluster.lease = await cluster.store.grant_lease(600_000)
    for name in cluster.servers:
        await cluster.store.put(f"nodes/{name}", pack_value({"address": "127.0.0.1"}))
        await cluster.start_node(name)
        await cluster.start_server(name)
    await cluster.start_host("n3")
    service = await cluster.wait_serving(20)
    incarnation = unpack_value((await cluster.store.get("incarnations/n2")).value)["last"] + 1
    mount = await cluster.mount("n2", incarnation=incarnation)
    assert (await mount.call("lookup", parent=1, name=b"file"))["attr"][0] == ino
    assert await mount.read(ino, BLOCKS) == data
    await write_file(cluster, mount, b"another")


async def test_what_cannot_be_recovered_is_said(cluster, tmp_path):
    service = await cluster.wait_serving()
    value = {**await cluster.volume(), "fault_domain": "rack"}
    await cluster.store.put(f"volumes/{NAME}", pack_value(value))
    with trio.fail_after(30):
        while description_of(service._metadata).get("fault_domain") != "rack":
            await trio.sleep(0.01)
    await service.log.flush()
    await stop_all(cluster)
    broken = tmp_path / "no-drive"
    broken.write_bytes(bytes(1 << 20))
    paths = [str(cluster.servers["n1"].path), str(broken), str(tmp_path / "missing")]
    found = await trio.to_thread.run_sync(scan, paths)
    assert len(found.drives) == 1
    assert len(found.volumes) == 1  # one in-sync copy of everything is enough
    assert any("no-drive" in problem for problem in found.problems)
    assert any("missing" in problem for problem in found.problems)
    assert any("where nodes stand is on no drive" in problem for problem in found.problems)
    assert found.volumes[0].value["fault_domain"] == "rack"


async def test_a_copy_of_an_older_epoch_is_not_taken_for_in_sync(cluster, tmp_path):
    service = await cluster.wait_serving()
    await described(service)
    await cluster.kill_server("n2")
    slabs = await cluster.metadata_slabs()
    with trio.fail_after(60):
        while any(len(slab.in_sync) == 3 for slab in slabs):
            await trio.sleep(0.02)
            slabs = await cluster.metadata_slabs()
    await stop_all(cluster)
    found = await trio.to_thread.run_sync(scan, [str(server.path) for server in cluster.servers.values()])
    (volume,) = found.volumes
    for descriptor in volume.slabs:
        assert {member.node for member in descriptor.in_sync} == {"n1", "n3"}
        assert {member.node for member in descriptor.members} == {"n1", "n2", "n3"}


async def test_a_volume_whose_name_is_not_kept_gets_one_and_that_is_said(cluster, monkeypatch):
    service = await cluster.wait_serving()
    await described(service)
    # As a volume of before descriptions were kept: the service would write it again at the next change of the store.
    monkeypatch.setattr("coordinator.service.pack_description", lambda value: b"")
    await service.batches.run(
        lambda: service._metadata.database.run("DELETE FROM settings WHERE name = 'description'")
    )
    await service.log.flush()
    await stop_all(cluster)
    found = await trio.to_thread.run_sync(scan, [str(server.path) for server in cluster.servers.values()])
    (volume,) = found.volumes
    assert volume.name == f"recovered-{VOLUME.hex()[:8]}"
    assert any("name" in problem for problem in found.problems)


def test_a_drive_in_use_is_refused_and_a_path_without_drive_too(tmp_path):
    path, _ = make_drive(tmp_path / "drive")
    drive = Drive.open(path)
    with pytest.raises(DriveRefused, match="in use"):
        OfflineDrive(path)
    drive.close()
    with OfflineDrive(path) as offline:
        assert offline.entries == {}
    with pytest.raises(NotFound, match="none of the paths"):
        scan([str(tmp_path / "missing")])


def test_drives_of_two_pools_and_one_drive_twice_are_refused(tmp_path):
    path, _ = make_drive(tmp_path / "drive")
    os.link(path, tmp_path / "again")
    with pytest.raises(Conflict, match="same drive"):
        scan([path, str(tmp_path / "again")])
    assert pool_recover.POOL_NAME == "pool"
