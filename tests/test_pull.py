"""Pulling copies between real drive servers: compressed on the way, verified, paced by those who use them."""

import pytest
import trio

from csvfs.block import block_service
from csvfs.block.pace import SPEEDS, Pacer
from csvfs.errors import BadRequest, StaleEpoch
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
