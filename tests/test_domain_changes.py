"""Fault domains are changed while a volume is in use: real drive servers and coordinators, four nodes with two drives
each. What a change would mean is said before it; then slabs are moved apart, and none ever has fewer good copies."""

from collections.abc import AsyncIterator

import pytest
import trio

from csvfs.admin import domain_ops
from csvfs.admin.cluster_view import read_cluster_view
from csvfs.admin.domain_ops import Change, Effect
from csvfs.admin.peers import open_peers
from csvfs.admin.status import VolumeStatus, collect_status
from csvfs.errors import Conflict
from csvfs.fault_domains import Level, Place
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import SlabDescriptor
from csvfs.wire.control import pack_value
from tests.coordinator_cluster import NAME, VOLUME, TestCluster
from tests.test_repair import Witness, descriptors, good, pool_of, write_file

NODES = ("n1", "n2", "n3", "n4")
PATIENCE_S = 60


def racks(**nodes: str) -> dict[str, Place]:
    return {node: Place(rack=rack) for node, rack in nodes.items()}


PAIRS = racks(n1="a", n2="a", n3="b", n4="b")
CROSSED = racks(n1="a", n2="b", n3="a", n4="b")
THREE = racks(n1="a", n2="a", n3="b", n4="c")


async def volume_of(cluster: TestCluster, copies: int, level: Level) -> None:
    value = {"id": VOLUME, "name": NAME, "copies": copies, "size": 0, "state": "creating", "resiliency": "mirror"}
    await cluster.store.put(f"volumes/{NAME}", pack_value({**value, "fault_domain": level}))


@pytest.fixture
async def cluster(tmp_path, monkeypatch) -> AsyncIterator[TestCluster]:
    """Without places; n1 coordinates."""
    async with pool_of(tmp_path, monkeypatch, nodes=4, second_drives=NODES, create=False) as cluster:
        yield cluster


async def change(
    cluster: TestCluster, places: dict[str, Place], level: Level | None = None, *, force: bool = False, dry_run: bool = False
) -> list[Effect]:  # fmt: skip
    asked = Change(places, {NAME: level} if level else {})
    async with open_peers() as peers:
        return await domain_ops.apply(cluster.store, peers, asked, force=force, dry_run=dry_run)


async def status(cluster: TestCluster) -> VolumeStatus:
    async with open_peers() as peers:
        (volume,) = (await collect_status(cluster.store, peers)).volumes
        return volume


async def shared(
    cluster: TestCluster, level: Level, places: dict[str, Place] | None = None
) -> list[SlabDescriptor]:
    """Slabs that have two copies in one domain, as the cluster store says it now or with other places."""
    view = await read_cluster_view(cluster.store)
    domains = Change(places or {}, {}).domains_of(view, level)
    return [d for d in await descriptors(cluster) if len({domains[m.node] for m in d.members}) < len(d.members)]


async def until_apart(cluster: TestCluster, level: Level, copies: int) -> None:
    def is_apart(descriptor: SlabDescriptor) -> bool:
        return len(descriptor.in_sync) >= copies

    with trio.move_on_after(PATIENCE_S):
        while await shared(cluster, level) or not all(map(is_apart, await descriptors(cluster))):
            await trio.sleep(0.02)
        return
    rows = [[(m.node, m.role) for m in d.members] for d in await descriptors(cluster)]
    raise AssertionError(f"{await shared(cluster, level)} of {rows}; {await status(cluster)}")


async def test_no_two_copies_of_anything_are_placed_in_one_rack(cluster):
    await change(cluster, PAIRS)
    await volume_of(cluster, 2, "rack")
    mount = await cluster.mount("n1")
    for number in range(6):
        await write_file(mount, f"file{number}".encode(), blocks=900)
    found = await descriptors(cluster)
    assert len(found) >= 10 and not await shared(cluster, "rack"), "data and metadata"
    answer = await status(cluster)
    assert (answer.fault_domain, answer.misplaced, answer.health, answer.note) == ("rack", 0, "Healthy", "")


async def test_slabs_follow_when_racks_are_changed_and_none_ever_has_fewer_good_copies(cluster, nursery):
    await change(cluster, PAIRS)
    await volume_of(cluster, 2, "rack")
    mount = await cluster.mount("n1")
    files = [await write_file(mount, f"file{number}".encode(), blocks=900) for number in range(4)]
    (said,) = await change(cluster, CROSSED, dry_run=True)
    assert said.misplaced == len(await shared(cluster, "rack", CROSSED)) > 0
    assert said.slabs == len(await descriptors(cluster))
    assert not await shared(cluster, "rack"), "nothing was changed"
    witness = Witness(cluster)
    nursery.start_soon(witness.watch_forever)

    (effect,) = await change(cluster, CROSSED)
    assert effect == said and effect.objection == "" and effect.domains == 2
    await until_apart(cluster, "rack", 2)
    assert min(witness.least.values()) >= 2, "a copy is made before one is given up"
    for ino, data in files:
        assert await mount.read(ino, len(data) // BLOCK_SIZE) == data
    with trio.fail_after(PATIENCE_S):
        while (answer := await status(cluster)).misplaced or answer.health != "Healthy":
            await trio.sleep(0.02)


async def test_a_level_is_raised_in_use_and_what_cannot_be_is_refused_with_numbers(cluster):
    await volume_of(cluster, 3, "node")
    mount = await cluster.mount("n1")
    ino, data = await write_file(mount, b"file", blocks=3000)
    await change(cluster, PAIRS)  # that is no matter for a volume that only keeps nodes apart
    assert (await status(cluster)).misplaced == 0

    with pytest.raises(Conflict, match=r"keeps 3 copies in 3 racks, and there would be 2 with drives: nothing was"):
        await change(cluster, {}, "rack")
    assert (await cluster.volume()).get("fault_domain") == "node"
    await change(cluster, THREE)
    (effect,) = await change(cluster, {}, "rack")
    assert effect.misplaced > 0 and effect.to_move > 0 and not effect.without_place
    await until_apart(cluster, "rack", 3)
    assert await mount.read(ino, len(data) // BLOCK_SIZE) == data


async def test_where_there_is_no_place_the_copies_stay_and_it_is_said_why(cluster, nursery):
    await change(cluster, THREE)
    await volume_of(cluster, 3, "rack")
    mount = await cluster.mount("n1")
    await write_file(mount, b"file", blocks=3000)
    with pytest.raises(Conflict, match="keeps 3 copies in 3 racks, and there would be 2 with drives"):
        await change(cluster, PAIRS)
    witness = Witness(cluster)
    nursery.start_soon(witness.watch_forever)
    (effect,) = await change(cluster, PAIRS, force=True)
    with trio.fail_after(PATIENCE_S):
        while "waiting for a drive with room in another fault domain than rack a, rack b" not in (
            answer := await status(cluster)
        ).note:
            await trio.sleep(0.02)
    assert answer.misplaced == effect.misplaced == len(await descriptors(cluster)), "of data and metadata"
    assert f"{answer.misplaced} slabs have two copies in one rack" in answer.note
    assert "3 copies need 3 racks with drives, there are 2, so it cannot grow" in answer.note
    assert answer.health == "Degraded"
    assert all(len(good(cluster, d)) == 3 for d in await descriptors(cluster)), "nothing was given up for it"
    assert min(witness.least.values()) == 3

    assert await change(cluster, THREE), "it only becomes better: nobody has to force that"
    await until_apart(cluster, "rack", 3)
