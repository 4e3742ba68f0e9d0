"""A coordinator is killed after each step of its takeover; the next one finds everything that was
acknowledged."""

import pytest
import trio

from csvfs.block.server_links import ServerLinks
from csvfs.store.embedded import EmbeddedStore
from tests.coordinator_cluster import NAME
from tests.test_service import block_of, cluster_of

STEPS_MAX = 120


class Executioner:
    """Lets the given number of calls to drive servers and changes of the store happen, then kills the
    host."""

    def __init__(self, monkeypatch) -> None:
        self.left: int | None = None
        self.died = trio.Event()
        call, transact = ServerLinks.call, EmbeddedStore.transact

        async def counted_call(links, node, name, args, *, timeout_s):
            if links._hello["writer"].startswith("coordinator"):
                await self.step()
            return await call(links, node, name, args, timeout_s=timeout_s)

        async def counted_transact(store, compares, changes):
            if any(change.key.startswith("meta/") for change in changes):
                await self.step()
            return await transact(store, compares, changes)

        monkeypatch.setattr(ServerLinks, "call", counted_call)
        monkeypatch.setattr(EmbeddedStore, "transact", counted_transact)

    async def step(self) -> None:
        if self.left is None:
            return
        if self.left == 0:
            self.died.set()
            await trio.sleep_forever()  # it never gets to the next step
        self.left -= 1


@pytest.mark.parametrize("loses_a_member", [False, True])
async def test_a_kill_at_any_step_of_a_takeover_loses_nothing(tmp_path, monkeypatch, loses_a_member):
    async with cluster_of(tmp_path) as cluster:
        mount = await cluster.mount("n3")
        ino = await mount.make(b"file")
        await mount.write(ino, block_of("data"))
        executioner = Executioner(monkeypatch)
        names = {b"file"}
        steps = 0
        while True:
            if loses_a_member and steps == 4:
                await cluster.kill_server("n2")
            if loses_a_member and steps == 12:
                await cluster.start_server("n2")
            await cluster.kill_host("n1")
            executioner.left, executioner.died = steps, trio.Event()
            await cluster.start_host("n1")
            finished = await _first(executioner.died, cluster)
            executioner.left = None
            if finished:
                break
            steps += 1
            assert steps < STEPS_MAX
            if steps % 5 == 0:  # now and then one takes over in peace, and work goes on
                await cluster.kill_host("n1")
                await cluster.start_host("n1")
                await mount.make(b"after %d" % steps)
                names.add(b"after %d" % steps)
        with trio.fail_after(60):
            entries = (await mount.call("readdir", ino=1, cookie=0, limit=200))["entries"]
            assert {entry[1] for entry in entries} == names
            assert await mount.read(ino, 1) == block_of("data")
        assert steps > 5, "the takeover has steps at which it was killed"


async def _first(died: trio.Event, cluster) -> bool:
    """Whether the takeover was finished before the kill."""
    with trio.fail_after(60):
        while not died.is_set():
            owned = cluster.hosts["n1"].owned.get(NAME)
            if owned is not None and owned.service is not None:
                return True
            await trio.sleep(0.002)
    return False
