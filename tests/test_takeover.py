"""A coordinator is killed after each step of its takeover; the next one finds everything that was
acknowledged."""

import pytest
import trio

from coordinator import host as host_module
from csvfs.block.server_links import ServerLinks
from csvfs.block.slab_state import bump
from csvfs.errors import Unavailable
from csvfs.store.embedded import EmbeddedStore
from tests.coordinator_cluster import NAME, VOLUME
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


async def test_a_volume_that_could_not_be_given_up_is_given_up_when_the_store_can_be_reached_again(
    tmp_path, monkeypatch
):
    """Its key names a host that lives, so nobody else takes it. Simulator seeds 20352, 22173: no coordinator for ever."""
    release, tries = host_module.release_ownership, []

    async def unreachable_at_first(store, name, node, incarnation):
        tries.append(name)
        if len(tries) <= 2:
            raise Unavailable("the cluster store cannot be reached")
        return await release(store, name, node, incarnation)

    async with cluster_of(tmp_path) as cluster:
        first = await cluster.wait_serving()
        monkeypatch.setattr(host_module, "release_ownership", unreachable_at_first)
        owned = next(host.owned[NAME] for host in cluster.hosts.values() if NAME in host.owned)
        owned.scope.cancel()
        with trio.fail_after(60):
            while await cluster.wait_serving() is first:
                await trio.sleep(0.01)
        assert len(tries) >= 3


async def test_I1_a_change_that_was_committed_and_not_installed_is_installed_by_the_next_coordinator(
    tmp_path, monkeypatch
):
    """Simulator seed 128202: a slab whose members stayed at an earlier epoch for ever, until somebody wrote to it."""
    async with cluster_of(tmp_path, hosts=("n1", "n2")) as cluster:
        mount = await cluster.mount("n1")
        ino = await mount.make(b"file")
        await mount.acquire(ino, 3)
        await mount.write(ino, block_of("a"))
        service = await cluster.wait_serving()
        slab = next(iter(service.changes.book.all())).slab
        name = next(name for name, host in cluster.hosts.items() if NAME in host.owned)

        async def never_installed(slabs):
            await trio.sleep_forever()

        monkeypatch.setattr(service.changes, "settle", never_installed)
        cluster.nursery.start_soon(service.changes.change, slab, bump)
        epoch = service.changes.book.current(slab).epoch
        await cluster.wait(lambda: service.changes.book.current(slab).epoch > epoch)
        await service.changes.book.wait_durable()
        await cluster.kill_host(name)
        after = await cluster.wait_serving()

        def installed() -> bool:
            drives = [server.service.drives.by_id(server.drive_id) for server in cluster.servers.values()]
            copies = [drive.opened().find(VOLUME, slab) for drive in drives]
            return all(copy.epoch == after.changes.book.current(slab).epoch > epoch for copy in copies)

        await cluster.wait(installed)
