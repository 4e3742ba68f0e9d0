"""Nodes in maintenance, in process: who coordinates, where new copies go, and what is not repaired."""

import trio

from csvfs.store.interface import Delete, Put
from csvfs.units import BLOCK_SIZE
from csvfs.wire.control import pack_value
from tests.coordinator_cluster import NAME
from tests.test_repair import descriptors, pool_of, wait_slabs, whole_without, write_file


async def put_into_maintenance(cluster, node):
    await cluster.store.transact([], [Put(f"maintenance/{node}", pack_value({"state": "draining"}))])
    await cluster.wait(lambda: all(node in host.view.maintenance for host in cluster.hosts.values()))


async def test_a_volume_moves_off_a_node_in_maintenance(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, hosts=("n1", "n2")) as cluster:
        (owner,) = [name for name, host in cluster.hosts.items() if NAME in host.owned]
        other = {"n1": "n2", "n2": "n1"}[owner]
        await put_into_maintenance(cluster, owner)
        await cluster.wait(lambda: NAME in cluster.hosts[other].owned, within_s=30)
        await cluster.wait(lambda: NAME not in cluster.hosts[owner].owned)


async def test_the_only_host_goes_on_coordinating_though_it_is_in_maintenance(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch) as cluster:
        mount = await cluster.mount("n2")
        await put_into_maintenance(cluster, "n1")
        ino, data = await write_file(mount, b"file")
        assert await mount.read(ino, 24) == data
        assert NAME in cluster.hosts["n1"].owned


async def test_a_volume_that_needs_a_node_in_maintenance_has_all_copies_while_that_serves(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch) as cluster:
        await put_into_maintenance(cluster, "n3")
        service = await cluster.wait_serving()
        before = service.slabs.next_slab_id
        mount = await cluster.mount("n1")
        ino = await mount.make(b"large")
        data = bytes(range(256)) * (BLOCK_SIZE // 256) * 1500  # more than a slab of 4 MiB
        await mount.write(ino, data)
        assert service.slabs.next_slab_id > before
        for descriptor in await descriptors(cluster):
            assert {member.node for member in descriptor.in_sync} == {"n1", "n2", "n3"}
        without = await service.healing.without_node("n3")
        assert without["slabs"] > 0 and without["stuck"] == 0


async def test_new_slabs_leave_out_a_node_in_maintenance_where_the_others_suffice(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, copies=2) as cluster:
        await put_into_maintenance(cluster, "n3")
        service = await cluster.wait_serving()
        before = service.slabs.next_slab_id
        mount = await cluster.mount("n1")
        data = bytes(range(256)) * (BLOCK_SIZE // 256) * 1500  # more than a slab of 4 MiB
        await mount.write(await mount.make(b"large"), data)
        new = [d for d in await descriptors(cluster) if before <= d.slab < 1 << 62]
        assert new
        for descriptor in new:
            assert {member.node for member in descriptor.members} == {"n1", "n2"}


async def test_what_a_node_in_maintenance_has_is_not_rebuilt_elsewhere_until_it_is_taken_back(
    tmp_path, monkeypatch
):
    async with pool_of(tmp_path, monkeypatch, nodes=4, retire_ms=300) as cluster:
        mount = await cluster.mount("n1")
        ino, data = await write_file(mount, b"file")
        away = cluster.servers["n3"].drive_id
        await put_into_maintenance(cluster, "n3")
        await cluster.kill_server("n3")
        await trio.sleep(1.5)  # five times as long as a drive may be away
        kept = [d for d in await descriptors(cluster) if away in [member.drive for member in d.members]]
        assert kept and await mount.read(ino, 24) == data
        await cluster.store.transact([], [Delete("maintenance/n3")])
        await wait_slabs(cluster, whole_without(cluster, away), within_s=60)
        assert await mount.read(ino, 24) == data


async def test_slabs_whose_only_good_copy_is_on_a_node_are_counted_as_stuck_without_it(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, copies=2) as cluster:
        await write_file(await cluster.mount("n1"), b"file")
        service = await cluster.wait_grown()
        data = [d for d in await descriptors(cluster) if d.slab < 1 << 62]
        on_both = sum({m.node for m in d.members} == {"n1", "n2"} for d in data)
        await put_into_maintenance(cluster, "n2")
        without = await service.healing.without_node("n1")
        assert without["stuck"] == on_both and without["joining"] == 0


async def test_a_quarantined_node_coordinates_nothing_and_gets_no_new_slabs_where_the_others_suffice(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, hosts=("n1", "n2"), copies=2) as cluster:
        (owner,) = [name for name, host in cluster.hosts.items() if NAME in host.owned]
        quarantined, other = ("n1", "n2") if owner == "n1" else ("n2", "n1")
        await cluster.store.put(f"quarantine/{quarantined}", pack_value({"since": 1, "why": "it comes and goes"}))
        await cluster.wait(lambda: NAME in cluster.hosts[other].owned, within_s=30)
        service = await cluster.wait_serving()
        before = service.slabs.next_slab_id
        mount = await cluster.mount("n3")
        data = bytes(range(256)) * (BLOCK_SIZE // 256) * 1500  # more than a slab of 4 MiB
        await mount.write(await mount.make(b"large"), data)
        new = [d for d in await descriptors(cluster) if before <= d.slab < 1 << 62]
        assert new
        for descriptor in new:
            assert quarantined not in {member.node for member in descriptor.members}
