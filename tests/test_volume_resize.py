"""Volumes made larger and smaller while they are written to: a size is a bound, and what the store says holds."""

from typing import Any

import pytest
import trio

from coordinator import volume_settings
from coordinator.volume_settings import Settings, VolumeSettings
from csvfs.cluster.membership import View, keep_view_forever
from csvfs.errors import BadRequest, Conflict, Corrupt, CsvfsError, NoSpace, NotCoordinator, Unavailable
from csvfs.ids import Term
from csvfs.store.embedded import EmbeddedStore
from csvfs.units import MIB
from csvfs.wire.control import pack_value, unpack_value
from tests.coordinator_cluster import NAME, VOLUME, Mount, TestCluster
from tests.test_repair import pool_of
from tests.test_volume_copies import ask

BLOCKS = MIB // 4096  # of 1 MiB


async def grow(mount: Mount, ino: int, start: int, count: int) -> None:
    """Give a file `count` MiB from MiB `start` on."""
    end = (start + count) * MIB
    await mount.change(
        "allocate", ino=ino, block=start * BLOCKS, count=count * BLOCKS, size=end, mtime_ns=0
    )


async def figures(cluster: TestCluster) -> tuple[int, int]:
    """size and used in MiB, as statfs has them."""
    service = await cluster.wait_serving()
    statfs = service.statfs()
    return statfs["size"] // MIB, (statfs["size"] - statfs["free"]) // MIB


async def test_a_volume_is_made_smaller_and_larger_in_use_to_the_block(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, copies=2) as cluster:
        mount = await cluster.mount("n1")
        ino = await mount.make(b"file")
        await grow(mount, ino, 0, 70)
        assert (await ask(cluster, size=80 * MIB))["used"] == 70 * MIB
        assert await figures(cluster) == (80, 70)
        assert (await cluster.volume())["size"] == 80 * MIB
        with pytest.raises(NoSpace, match=r"the volume's size of 80\.0 MiB is used up"):
            await grow(mount, ino, 70, 11)
        await grow(mount, ino, 70, 10)
        with pytest.raises(NoSpace, match="used up"):
            await grow(mount, ino, 80, 1)
        await ask(cluster, size=81 * MIB)
        await grow(mount, ino, 80, 1)
        with pytest.raises(NoSpace, match="used up"):
            await grow(mount, ino, 81, 1)
        assert await figures(cluster) == (81, 81)
        await ask(cluster, size=0)
        assert (await figures(cluster))[0] > 81
        await grow(mount, ino, 81, 3)
        await ask(cluster, size=1 << 50)  # larger than the pool: it is thin
        assert (await figures(cluster))[0] < 1000, "statfs does not promise what the pool does not have"


async def test_one_smaller_than_what_is_used_is_refused_with_both_numbers(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, copies=2) as cluster:
        mount = await cluster.mount("n1")
        ino = await mount.make(b"file")
        await grow(mount, ino, 0, 70)
        used = 70 * MIB
        with pytest.raises(NoSpace, match=rf"made 69.0 MiB \({69 * MIB} bytes\): its files use 70.0 MiB \({used} b"):
            await ask(cluster, size=69 * MIB)
        with pytest.raises(NoSpace, match=f"{used} bytes"):
            await ask(cluster, size=used - 1)
        with pytest.raises(BadRequest, match=r"at least 64.0 MiB, or 0"):
            await ask(cluster, size=63 * MIB)
        assert (await cluster.volume())["size"] == 0
        await grow(mount, ino, 70, 5)
        await mount.change("setattr", ino=ino, size=10 * MIB)
        assert (await ask(cluster, size=64 * MIB))["used"] == 10 * MIB, "what was freed does not count"
        await grow(mount, ino, 10, 54)


async def test_files_never_have_more_than_a_size_that_was_agreed_to_while_they_grow(tmp_path, monkeypatch):
    """Whoever is first wins: the file that grows, or the smaller size; never both."""
    async with pool_of(tmp_path, monkeypatch, copies=2) as cluster:
        mount = await cluster.mount("n1")
        ino = await mount.make(b"file")
        await grow(mount, ino, 0, 64)
        service = await cluster.wait_serving()
        stopped = agreed = 0

        def used() -> int:
            return int(service._metadata.statfs().used_blocks) * 4096

        async def grow_forever() -> None:
            nonlocal stopped
            start = 64
            while True:
                try:
                    await grow(mount, ino, start, 1)
                    start += 1
                except NoSpace:
                    stopped += 1
                if start == 96:
                    await mount.change("setattr", ino=ino, size=64 * MIB)
                    start = 64

        async with trio.open_nursery() as nursery:
            nursery.start_soon(grow_forever)
            with trio.fail_after(60):
                while agreed < 10 or not stopped:
                    size = used() + 2 * MIB
                    try:
                        await service.control.change({"size": size})
                    except NoSpace:
                        continue  # the file was faster
                    agreed += 1
                    for _ in range(20):
                        assert used() <= size == (await cluster.volume())["size"]
                        await trio.sleep(0.001)
                    await service.control.change({"size": 0})
            nursery.cancel_scope.cancel()


async def test_the_next_coordinator_keeps_to_the_size_that_was_agreed_to(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, copies=2, hosts=("n1", "n2")) as cluster:
        mount = await cluster.mount("n3")
        ino = await mount.make(b"file")
        await grow(mount, ino, 0, 60)
        await ask(cluster, size=64 * MIB)
        owner = next(name for name, host in cluster.hosts.items() if NAME in host.owned)
        await cluster.kill_host(owner)
        service = await cluster.wait_serving(within_s=30)
        assert service.statfs()["size"] == 64 * MIB
        mount = await cluster.mount("n3", incarnation=2)
        await mount.acquire(ino, 3)
        with pytest.raises(NoSpace, match="used up"):
            await grow(mount, ino, 60, 5)
        await ask(cluster, size=65 * MIB)
        await grow(mount, ino, 60, 5)


async def test_a_size_that_somebody_else_writes_into_the_store_holds_soon(tmp_path, monkeypatch):
    async with pool_of(tmp_path, monkeypatch, copies=2) as cluster:
        service = await cluster.wait_serving()
        value = await cluster.volume()
        await cluster.store.put(f"volumes/{NAME}", pack_value({**value, "size": 100 * MIB}))
        await cluster.wait(lambda: service.statfs()["size"] == 100 * MIB, within_s=30)
        await cluster.store.put(f"volumes/{NAME}", pack_value({**value, "size": "nonsense"}))
        await cluster.store.put(f"volumes/{NAME}", pack_value({**value, "size": 90 * MIB}))
        await cluster.wait(lambda: service.statfs()["size"] == 90 * MIB, within_s=30)


# -- the settings by themselves ------------------------------------------------------------------------


class FailingStore(EmbeddedStore):
    """Loses the answer of a transaction: after it was done, or instead of doing it."""

    loses: str = ""

    async def transact(self, compares: Any, changes: Any) -> Any:
        if not self.loses:
            return await super().transact(compares, changes)
        if self.loses == "answer":
            await super().transact(compares, changes)
        raise Unavailable("the store cannot be reached")


@pytest.fixture
async def store(tmp_path):
    store = FailingStore(tmp_path / "store.db")
    await store.put(f"term/{NAME}", pack_value({"term": 7}))
    value = {"id": VOLUME, "name": NAME, "copies": 3, "size": 0, "state": "online", "resiliency": "mirror"}
    await store.put(f"volumes/{NAME}", pack_value(value))
    yield store
    await store.close()


async def settings_of(store: EmbeddedStore, term: int = 7) -> VolumeSettings:
    settings = VolumeSettings(store, NAME, VOLUME, Term(term), View())
    await settings.load()
    return settings


def smaller(settings: VolumeSettings, size: int) -> Any:
    def change(known: Settings) -> Settings:
        settings.bound_size(size)
        return Settings(size, known.copies, known.min_copies)

    return change


async def test_V1_a_later_change_that_is_refused_does_not_end_a_bound_that_may_be_in_the_store(store):
    settings = await settings_of(store)
    store.loses = "question"
    with pytest.raises(Unavailable):
        await settings.change(smaller(settings, 100 * MIB))
    store.loses = ""

    def refuse(known: Settings) -> Settings:
        raise NoSpace("its files use more")

    with pytest.raises(NoSpace):
        await settings.change(refuse)
    assert settings.size_bound == 100 * MIB
    await settings.load()
    assert settings.size_bound == settings.facts.size


@pytest.mark.parametrize("loses", ["answer", "question"])
async def test_V1_a_smaller_size_of_which_nobody_knows_whether_the_store_has_it_holds_until_that_is_known(
    store, nursery, monkeypatch, loses
):
    monkeypatch.setattr(volume_settings, "LOOK_S", 0.05)
    settings = await settings_of(store)
    store.loses = loses
    with pytest.raises(Unavailable):
        await settings.change(smaller(settings, 100 * MIB))
    assert settings.size_bound == 100 * MIB and settings.facts.size == 0
    store.loses = ""
    nursery.start_soon(settings.follow_forever)
    wanted = 100 * MIB if loses == "answer" else 0
    with trio.fail_after(30):
        while (settings.size_bound, settings.facts.size) != (wanted, wanted):
            await trio.sleep(0.01)


async def test_a_coordinator_whose_term_is_over_changes_nothing(store):
    settings = await settings_of(store, term=6)
    with pytest.raises(NotCoordinator, match="term 6 of volume v is over"):
        await settings.change(smaller(settings, 100 * MIB))
    assert unpack_value((await store.get(f"volumes/{NAME}")).value)["size"] == 0


async def test_what_is_refused_leaves_no_bound_behind(store):
    settings = await settings_of(store)

    def refuse(known: Settings) -> Settings:
        settings.bound_size(64 * MIB)
        raise Conflict("no")

    with pytest.raises(Conflict):
        await settings.change(refuse)
    assert settings.size_bound == 0


async def test_a_volume_that_is_being_deleted_or_is_another_one_is_not_changed(store):
    settings = await settings_of(store)
    value = unpack_value((await store.get(f"volumes/{NAME}")).value)
    await store.put(f"volumes/{NAME}", pack_value({**value, "state": "deleting"}))
    with pytest.raises(Conflict, match="deleting"):
        await settings.change(lambda known: Settings(1, 2, 1))
    await store.put(f"volumes/{NAME}", pack_value({**value, "id": b"x" * 16}))
    with pytest.raises(CsvfsError, match="was deleted"):
        await settings.change(lambda known: Settings(1, 2, 1))


async def test_a_view_that_is_older_than_what_is_known_says_nothing(store, nursery):
    view = View()
    settings = VolumeSettings(store, NAME, VOLUME, Term(7), view)
    await settings.load()
    await nursery.start(keep_view_forever, store, view)
    stale = dict(view.volumes[NAME])
    await settings.change(lambda known: Settings(100 * MIB, 2, 1))
    view.volumes[NAME], view.revision = stale, 1
    settings._look()
    assert settings.facts == Settings(100 * MIB, 2, 1)


def test_values_that_cannot_be_are_named():
    for value in ({"copies": 0}, {"copies": 4}, {"copies": "3"}, {"copies": 3, "size": -1}, {"copies": 2, "size": "x"}):
        with pytest.raises(Corrupt):
            Settings.from_value(value)
    assert Settings.from_value({"copies": 2, "size": None, "min_copies": None}) == Settings(0, 2, 1)
