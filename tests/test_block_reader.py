"""The blocking reader of metadata, over real drive servers."""

from types import SimpleNamespace

import pytest
import trio

from coordinator.block_reader import BlockReader, readable
from csvfs.block.slab_state import begin_joining, complete_joining, drop_members, new_slab
from csvfs.ids import DriveId, NodeName
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import SlabDescriptor
from tests.block_cluster import CLUSTER, SLAB, SLAB_SIZE, VOLUME, BlockCluster, write


@pytest.fixture
async def cluster(tmp_path, nursery):
    cluster = BlockCluster(tmp_path, nursery)
    await cluster.start()
    yield cluster
    nursery.cancel_scope.cancel()


async def test_metadata_can_be_read_while_a_change_of_members_is_committed_and_not_installed_yet(cluster):
    """Members refuse the new epoch until then, and a checkpoint that reads in this moment ended the service."""
    bus = cluster.bus()
    await write(bus, 5, b"m" * BLOCK_SIZE)
    before = bus.descriptor(SLAB)
    committed = drop_members(before, [cluster.servers[0].drive_id])
    reader = BlockReader(
        SimpleNamespace(slabs=[SLAB], current=lambda slab: committed),  # type: ignore[arg-type]
        cluster.directory, cluster=CLUSTER, volume=VOLUME, term=1, local_node=NodeName("n1"),
        blocks_per_slab=SLAB_SIZE // BLOCK_SIZE,
    )  # fmt: skip
    reader.settled = bus.descriptor

    async def read() -> bytes:
        return await trio.to_thread.run_sync(reader.read, 5, 1)

    assert await read() == b"m" * BLOCK_SIZE
    await cluster.owner.commit(committed)  # as installed
    assert await read() == b"m" * BLOCK_SIZE  # asked at the old epoch still, which is no lie
    bus.learn(committed)
    assert await read() == b"m" * BLOCK_SIZE
    reader.close()


def test_who_is_asked_for_metadata_is_in_sync_by_what_is_committed_and_by_what_is_installed():
    first = new_slab(SLAB, [(DriveId(bytes([n]) * 16), NodeName(f"n{n}")) for n in (1, 2, 3)])
    one, two, three = (member.drive for member in first.members)

    def asked(committed: SlabDescriptor, settled: SlabDescriptor | None) -> tuple[int, set[bytes]]:
        epoch, members = readable(committed, settled)
        return epoch, {member.drive for member in members}

    dropped = drop_members(first, [three])
    joining = begin_joining(dropped, three)
    back = complete_joining(joining, three)
    assert asked(first, None) == asked(first, first) == (first.epoch, {one, two, three})
    assert asked(dropped, first) == (first.epoch, {one, two})
    assert asked(back, joining) == (joining.epoch, {one, two})  # it refuses reads until it knows that it is back
    assert asked(back, back) == (back.epoch, {one, two, three})
    others = drop_members(back, [one, two])
    assert asked(others, drop_members(back, [three])) == (others.epoch, {three})  # no takeover knows better
