"""The coordinator's side of a mount process that goes on for one that died: session_desk.py, "inherit"."""

import pytest
import trio

from csvfs.errors import Fenced
from tests.coordinator_cluster import Mount
from tests.test_service import READ, WRITE, block_of, cluster_of


async def next_process(cluster, before: Mount, *, inherit: bool = True) -> Mount:
    mount = Mount(cluster, before.node, before.incarnation + 1)
    mount.inherits = inherit
    if inherit:
        mount.held, mount.op = dict(before.held), before.op
    await mount.start()
    return mount


async def test_I5_nobody_gets_a_lease_between_a_process_and_the_next(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, other = await cluster.mount("n1"), await cluster.mount("n2")
        ino = await first.make(b"file")
        await first.write(ino, block_of("one"))
        first.answers_recalls = False
        read: list[bytes] = []

        async def read_elsewhere() -> None:
            read.append(await other.read(ino, 1))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_elsewhere)
            await cluster.wait(lambda: first.recalls)
            first.kill()
            second = Mount(cluster, "n1", 2)
            second.inherits, second.held, second.op = True, dict(first.held), first.op
            second.answers_recalls = False
            await second.start()
            await cluster.wait(lambda: second.recalls)  # what was not answered is asked again
            assert not read and second.hello["inherited"]
            await second.write(ino, block_of("two"))
            second.answers_recalls = True
            second.link.close()  # the recall comes once more
        assert read == [block_of("two")]


async def test_I4_what_a_process_gave_back_and_was_killed_before_it_noted_that_is_not_the_next_ones(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first, other = await cluster.mount("n1"), await cluster.mount("n2")
        given_back, held = await first.make(b"a"), await first.make(b"b")
        for ino in (given_back, held):
            await first.write(ino, block_of("one"))
        noted = dict(first.held)
        await first.call("release", items=[[given_back, 0]])
        first.kill()
        first.held = noted
        second = await next_process(cluster, first)
        assert second.hello["claimed"] and second.claim_reply["lowered"] == [given_back] and second.claim_reply["refused"] == []
        assert (second.held[given_back], second.held[held]) == (1, WRITE)
        await other.acquire(given_back, WRITE)
        await other.write(given_back, block_of("two"))
        assert await second.read(given_back, 1) == block_of("two")


async def test_I6_nothing_of_the_dead_process_lands_once_the_next_one_serves(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first = await cluster.mount("n1")
        ino = await first.make(b"file")
        await first.write(ino, block_of("one"))
        reply = await first.acquire(ino, WRITE, 1)
        _, _, slab, block = reply["extents"][0]
        second = await next_process(cluster, first)  # the first one lives, and does not know
        with pytest.raises(Fenced):
            await first.write_block(slab, block, block_of("late"))
        with pytest.raises(Fenced):
            await first.change("unlink", parent=1, name=b"file", directory=False)
        assert await second.read(ino, 1) == block_of("one")
        first.kill()


async def test_I8_the_next_process_hears_which_drives_it_has_to_flush(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first = await cluster.mount("n1")
        ino = await first.make(b"file")
        await first.write(ino, block_of("one"))
        first.kill()
        second = await next_process(cluster, first)
        assert len(second.hello["unflushed"]) == 1
        slab, _, members = second.hello["unflushed"][0][:3]
        assert slab == (await second.acquire(ino, READ, 1))["extents"][0][2] and members


async def test_I11_a_call_that_the_next_process_makes_again_gets_the_first_answer(tmp_path):
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        first = await cluster.mount("n1")
        ino = await first.make(b"file")
        op = first.op
        first.kill()
        second = await next_process(cluster, first)
        args = {"parent": 1, "name": b"file", "mode": 0o100644, "uid": 0, "gid": 0, "rdev": 0}
        again = await second.call("make", op=op, op_done=op, **args)
        assert again["attr"][0] == ino and again["lease"] == 0  # what was true then, without a lease
        await cluster.kill_host("n1")  # and the same from the next coordinator
        again = await second.call("make", op=op, op_done=op, **args)
        assert again["attr"][0] == ino
        assert (await second.call("readdir", ino=1, cookie=0, limit=10))["entries"][0][1] == b"file"


async def test_a_process_that_goes_on_while_the_coordinator_changes_keeps_its_leases(tmp_path):
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        first, other = await cluster.mount("n1"), await cluster.mount("n3")
        ino = await first.make(b"file")
        await first.write(ino, block_of("one"))
        first.kill()
        await cluster.kill_host("n1")
        second = await next_process(cluster, first)
        assert second.hello["inherited"] and second.held[ino] == WRITE
        assert await other.read(ino, 1) == block_of("one")
        assert [recall["ino"] for recall in second.recalls if recall["ino"] == ino] == [ino]


async def test_one_that_does_not_ask_for_it_inherits_nothing(tmp_path):
    async with cluster_of(tmp_path) as cluster:
        first = await cluster.mount("n1")
        ino = await first.make(b"file")
        first.kill()
        second = await next_process(cluster, first, inherit=False)
        assert second.hello["inherited"] is False
        other = await cluster.mount("n2")
        assert (await other.acquire(ino, WRITE, 0))["lease"] == WRITE and not second.recalls


