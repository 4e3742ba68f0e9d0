"""Metadata slabs are brought to full copies and fault domains as data slabs are, whatever the cluster was when they were made."""

from csvfs.ids import METADATA_SLAB_ID_MIN
from csvfs.store.interface import Item
from csvfs.wire.block_messages import SlabDescriptor
from csvfs.wire.control import pack_value
from tests.coordinator_cluster import NAME, TestCluster
from tests.test_repair import good, pool_of, wait_slabs, write_file


def is_metadata(descriptor: SlabDescriptor) -> bool:
    return descriptor.slab >= METADATA_SLAB_ID_MIN


async def nodes_of_metadata(cluster: TestCluster) -> set[tuple[str, ...]]:
    return {tuple(sorted(m.node for m in d.in_sync)) for d in await cluster.metadata_slabs()}


async def take_away(cluster: TestCluster, node: str) -> Item:
    """The node's drive is not in the pool, and its server is not there."""
    item = await cluster.store.get(f"drives/{cluster.servers[node].drive_id.hex()}")
    assert item is not None
    await cluster.store.delete(item.key)
    await cluster.store.delete(f"alive/{node}")
    await cluster.store.delete(f"nodes/{node}")
    await cluster.kill_server(node)
    return item


async def bring(cluster: TestCluster, node: str, item: Item) -> None:
    await cluster.store.put(item.key, item.value)
    await cluster.store.put(f"nodes/{node}", pack_value({"address": "127.0.0.1"}))
    await cluster.start_node(node)
    await cluster.start_server(node)


async def test_metadata_made_on_two_nodes_gets_its_third_copy_when_a_third_node_comes(tmp_path, monkeypatch):
    kept: list[Item] = []
    create = TestCluster.create_volume

    async def create_on_two(cluster: TestCluster, copies: int) -> None:
        kept.append(await take_away(cluster, "n3"))
        await create(cluster, copies)

    monkeypatch.setattr(TestCluster, "create_volume", create_on_two)
    async with pool_of(tmp_path, monkeypatch, copies=2) as cluster:
        assert await nodes_of_metadata(cluster) == {("n1", "n2")}
        await write_file(await cluster.mount("n1"), b"file")
        await bring(cluster, "n3", kept[0])
        await wait_slabs(cluster, lambda d: len(good(cluster, d)) == (3 if is_metadata(d) else 2))
        assert await nodes_of_metadata(cluster) == {("n1", "n2", "n3")}
        await cluster.kill_host("n1")
        await cluster.kill_server("n1")
        await cluster.kill_server("n2")  # all that the metadata was made on
        await cluster.start_host("n3")
        await cluster.wait_serving()
        assert await (await cluster.mount("n3")).call("lookup", parent=1, name=b"file")


async def test_metadata_in_fault_domains_that_became_one_moves_apart(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, nodes=4, copies=2) as cluster:
        await wait_slabs(cluster, lambda d: not is_metadata(d) or len(good(cluster, d)) == 3)
        together = sorted(m.node for m in (await cluster.metadata_slabs())[0].members)[:2]
        volume = {**await cluster.volume(), "fault_domain": "rack"}
        await cluster.store.put(f"volumes/{NAME}", pack_value(volume))
        for node in together:
            value = {"address": "127.0.0.1", "place": {"rack": "one"}}
            await cluster.store.put(f"nodes/{node}", pack_value(value))

        def is_apart(descriptor: SlabDescriptor) -> bool:
            where = {member.node for member in descriptor.members}
            return len(where) == len(good(cluster, descriptor)) == 3 and not set(together) <= where

        await wait_slabs(cluster, lambda d: not is_metadata(d) or is_apart(d))
