"""The janitor looks at the orphans that somebody let go of, and not at all there are, each time."""

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import trio
import trio.testing

from coordinator import janitor
from coordinator.janitor import Janitor
from csvfs.ids import InodeNo


class World:
    """Inodes without a name, of which some are held. `asked`: of which it was asked whether they are."""

    def __init__(self, count: int) -> None:
        self.held = set(range(1, count + 1))
        self.asked: list[int] = []
        self.gone: list[int] = []
        nothing: Any = SimpleNamespace(holds_data=lambda ino: True, table=SimpleNamespace(is_held=self.is_held))
        metadata: Any = SimpleNamespace(drop_orphan=self.drop_orphan)
        batches: Any = SimpleNamespace(run=self.run)
        self.janitor = Janitor(metadata, batches, nothing, trio.lowlevel.checkpoint)
        for ino in self.held:
            self.janitor.orphaned(InodeNo(ino))

    def is_held(self, ino: int) -> bool:
        self.asked.append(ino)
        return ino in self.held

    def drop_orphan(self, ino: int) -> bool:
        self.gone.append(ino)
        return True

    async def run(self, change: Callable[[], Any]) -> Any:
        await trio.lowlevel.checkpoint()
        return change()

    def let_go(self, ino: int) -> None:
        self.held.remove(ino)
        self.janitor.lowered(InodeNo(ino))


async def settled(condition: Callable[[], bool]) -> None:
    with trio.fail_after(300):
        while not condition():
            await trio.sleep(janitor.DELAY_S)


async def with_janitor(world: World, story: Callable[[], Awaitable[None]]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.janitor.run_forever)
        await story()
        nursery.cancel_scope.cancel()


async def test_of_very_many_deleted_files_that_are_open_only_those_are_looked_at_that_somebody_closed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World(1000)

    async def story() -> None:
        await settled(lambda: len(world.asked) >= 1000)
        world.asked.clear()
        for ino in range(1, 11):
            world.let_go(ino)
            await settled(lambda ino=ino: ino in world.gone)  # type: ignore[misc]
        assert set(world.asked) == set(range(1, 11))

    await with_janitor(world, story)


async def test_a_deleted_file_goes_in_the_end_though_nobody_was_heard_to_let_go_of_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A request for it was under way, and ended."""
    world = World(3)

    async def story() -> None:
        await settled(lambda: len(world.asked) >= 3)
        world.held.remove(2)
        await settled(lambda: world.gone == [2])

    await with_janitor(world, story)
