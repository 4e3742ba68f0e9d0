"""Pulling copies between real drive servers: compressed on the way, verified, paced by those who use them."""

import pytest
import trio

from csvfs.block import block_service
from csvfs.block.pace import SPEEDS, Pacer
from csvfs.errors import BadRequest, Corrupt, StaleEpoch
from csvfs.units import BLOCK_SIZE
from tests.block_cluster import SLAB, BlockCluster, write


async def test_a_resync_is_compressed_on_the_way_and_what_arrives_is_what_was_there(tmp_path, monkeypatch):
    shrunk = []

    def counting_shrink(data):
        packed = shrink(data)
        shrunk.append(packed is not None)
        return packed

    shrink = block_service.shrink
    monkeypatch.setattr(block_service, "shrink", counting_shrink)
    async with trio.open_nursery() as nursery:
        cluster = BlockCluster(tmp_path, nursery)
        await cluster.start()
        bus = cluster.bus()
        await cluster.servers[2].kill()
        for block in range(0, 1024, 16):
            await write(bus, block, bytes([block % 251 + 1]) * BLOCK_SIZE * 16)
        await cluster.servers[2].start(nursery)
        pulled = await cluster.owner.resync(SLAB, cluster.servers[2])
        assert pulled["bytes"] == 1024 * BLOCK_SIZE
        assert any(shrunk)
        contents = {bytes(server.copy().read_blocks(0, 1024)[1]) for server in cluster.servers}
        assert len(contents) == 1
        nursery.cancel_scope.cancel()


async def test_a_pull_goes_on_at_the_floor_while_programs_are_slowed_down(tmp_path, monkeypatch):
    monkeypatch.setattr("csvfs.block.pace.RATE_MIN", 64 << 20)  # the test's patience is shorter than ours
    async with trio.open_nursery() as nursery:
        cluster = BlockCluster(tmp_path, nursery)
        await cluster.start()
        bus = cluster.bus()
        target = cluster.servers[2]
        await target.kill()
        await write(bus, 0, b"x" * BLOCK_SIZE * 256)
        await target.start(nursery)
        source = cluster.servers[0].service
        source.foreground.note(1000)  # one microsecond was once enough: now everything is too slow
        source.foreground.load(trio.current_time(), pulling=False)

        async def work_forever() -> None:
            while True:
                await write(bus, 512, b"y" * BLOCK_SIZE)
                await trio.sleep(0.005)

        nursery.start_soon(work_forever)
        with trio.fail_after(60):
            await cluster.owner.resync(SLAB, target)
        nursery.cancel_scope.cancel()


async def test_a_pull_that_is_overtaken_by_another_epoch_says_so_by_its_kind(tmp_path, monkeypatch):
    async with trio.open_nursery() as nursery:
        cluster = BlockCluster(tmp_path, nursery)
        await cluster.start()
        bus = cluster.bus()
        target = cluster.servers[2]
        await target.kill()
        await write(bus, 0, b"x" * BLOCK_SIZE * 256)
        await target.start(nursery)
        take = Pacer.take

        async def take_and_move_on(pacer: Pacer, size: int) -> None:
            await take(pacer, size)
            copy = target.copy()
            copy.drive.set_epoch(copy, copy.epoch + 1, copy.role, copy.term)

        monkeypatch.setattr(Pacer, "take", take_and_move_on)
        with pytest.raises(StaleEpoch, match="during its resync"):
            await cluster.owner.resync(SLAB, target)
        nursery.cancel_scope.cancel()


async def test_a_speed_that_does_not_exist_is_refused(tmp_path):
    async with trio.open_nursery() as nursery:
        cluster = BlockCluster(tmp_path, nursery)
        await cluster.start()
        args = {"drive": cluster.servers[0].drive_id, "slab": SLAB, "epoch": 1, "since": 0, "term": 1}
        args |= {"source": {"address": "127.0.0.1", "port": 1, "drive": b"x" * 16}, "speed": len(SPEEDS)}
        try:
            await cluster.owner.links.call("n1", "pull", args, timeout_s=60)
        except BadRequest as error:
            assert "speed 5" in str(error)
        else:
            raise AssertionError("it was taken")
        nursery.cancel_scope.cancel()


def rot(server, block: int) -> None:
    """Its data are others from now on, and its checksum is not."""
    with server.path.open("r+b") as file:
        file.seek(server.copy().data_offset + block * BLOCK_SIZE)
        file.write(b"rotten")


def block_of(server, block: int) -> bytes:
    return bytes(server.copy().read_blocks(block, 1)[1])


async def test_I9_a_block_that_rotted_on_the_source_is_given_back_by_the_copy_that_is_brought_in_sync(tmp_path):
    """It had the content when it left; its checksum there, and what it has here, vouch for each other."""
    async with trio.open_nursery() as nursery:
        cluster = BlockCluster(tmp_path, nursery)
        await cluster.start()
        bus = cluster.bus()
        source, target = cluster.servers[0], cluster.servers[2]
        await write(bus, 0, b"x" * BLOCK_SIZE * 16)
        await target.kill()
        await write(bus, 3, b"y" * BLOCK_SIZE)  # so all of the chunk is copied
        rot(source, 5)
        await target.start(nursery)
        pulled = await cluster.owner.resync(SLAB, target)
        assert pulled["lost"] == []
        assert [block_of(target, block)[:1] for block in (3, 5)] == [b"y", b"x"]
        with trio.fail_after(30):
            while source.copy().bad_blocks_scan(0, 16):
                await trio.sleep(0.01)
        assert block_of(source, 5) == b"x" * BLOCK_SIZE
        nursery.cancel_scope.cancel()


async def test_I9_a_block_that_no_copy_has_is_lost_alone_and_nothing_older_is_taken_for_it(tmp_path):
    """The resync goes on without it if it is told to. What is in its place is not read; a copy that has it heals it."""
    async with trio.open_nursery() as nursery:
        cluster = BlockCluster(tmp_path, nursery)
        await cluster.start()
        bus = cluster.bus()
        source, other, target = cluster.servers
        await write(bus, 0, b"x" * BLOCK_SIZE * 16)
        await target.kill()
        await write(bus, 3, b"y" * BLOCK_SIZE * 2)
        rot(source, 3)
        await target.start(nursery)
        with pytest.raises(Corrupt):
            await cluster.owner.resync(SLAB, target)
        await target.kill()
        await write(bus, 15, b"z" * BLOCK_SIZE)
        await target.start(nursery)
        pulled = await cluster.owner.resync(SLAB, target, even_if_lost=True)
        assert pulled["lost"] == [3]
        assert [block_of(target, block)[:1] for block in (2, 4, 15)] == [b"x", b"y", b"z"]
        with pytest.raises(Corrupt):
            block_of(target, 3)
        args = {
            "drive": target.drive_id, "slab": SLAB, "epoch": target.copy().epoch, "blocks": [3], "term": 1,
            "source": {"address": "127.0.0.1", "port": other.port, "drive": other.drive_id},
        }  # fmt: skip
        assert (await cluster.owner.links.call(target.node, "heal_from", args, timeout_s=30)) == {
            "healed": 1, "left": [],
        }  # fmt: skip
        assert block_of(target, 3) == b"y" * BLOCK_SIZE
        nursery.cancel_scope.cancel()


async def test_a_write_puts_right_a_block_that_was_lost(tmp_path):
    async with trio.open_nursery() as nursery:
        cluster = BlockCluster(tmp_path, nursery)
        await cluster.start()
        bus = cluster.bus("mount/n2")
        source, target = cluster.servers[0], cluster.servers[2]
        await target.kill()
        await write(bus, 3, b"y" * BLOCK_SIZE)
        rot(source, 3)
        await target.start(nursery)
        assert (await cluster.owner.resync(SLAB, target, even_if_lost=True))["lost"] == [3]
        await write(bus, 3, b"z" * BLOCK_SIZE)
        assert [block_of(server, 3)[:1] for server in cluster.servers] == [b"z"] * 3
        nursery.cancel_scope.cancel()
