"""What the parent does with the FUSE session of a mount process that is gone: keep it for the next one, or end it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from csvfs.admin import mount_keeper
from csvfs.admin.child import ChildPlan
from csvfs.admin.mount_keeper import MountKeeper
from csvfs.admin.mount_keepers import MountKeepers

IO_TIMEOUT_S = 60.0


class Session:
    """Of HeldSession: a process serves it unless the test says otherwise; it was last heard of long ago."""

    def __init__(self) -> None:
        self.can_be_taken_over = True
        self.covered_until_ns = 1
        self.is_emptied = True
        self.drops = self.ends = 0
        self.drop_hangs = False
        self.drops_all = True
        self.descriptors = ()

    def environment(self) -> dict[str, str]:
        return {}

    def drop_pages(self, within_s: float) -> bool:
        self.drops += 1
        return self.drops_all

    def drop_pages_and_close(self) -> None:
        self.ends += 1


class Root:
    path = Path("/nowhere")

    def make_point(self, name: str) -> None:
        pass


class Child:
    """Runs until it is stopped or cancelled."""

    def __init__(self) -> None:
        self.stopped = trio.Event()

    async def keep_running(self) -> None:
        await self.stopped.wait()


class World:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.serves = True
        self.keepers = MountKeepers(Root(), IO_TIMEOUT_S, nursery)  # type: ignore[arg-type]
        self.sessions: list[Session] = []
        self.plan: Any = None
        self.keeper: MountKeeper

    async def start(self) -> Session:
        """A process of the mount, under this lease of the node."""
        self.keeper = await self.keepers.keeper("V", b"id")
        self.plan = ChildPlan("mount-V", [], lambda number: {}, None, Path("/nowhere"), 1.0)  # type: ignore[arg-type]
        self.keeper.adapt(self.plan, lambda: self.serves)
        await self.plan.before(1)
        return self.sessions[-1]


@pytest.fixture
async def world(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(nursery)

    def hold() -> Session:
        world.sessions.append(Session())
        return world.sessions[-1]

    async def in_thread(function: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
        """Without a thread, which an autojump clock would overtake."""
        result = function(*arguments)
        if function == world.sessions[-1].drop_pages and world.sessions[-1].drop_hangs:
            await trio.sleep_forever()
        return result

    monkeypatch.setattr(trio.to_thread, "run_sync", in_thread)
    monkeypatch.setattr(mount_keeper, "HeldSession", hold)
    monkeypatch.setattr(mount_keeper, "unmount_lazily", lambda path: 0)
    return world


async def lose_lease(world: World, child: Child) -> None:
    """All that runs under it is killed."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.keeper.look_after, child)
        await trio.testing.wait_all_tasks_blocked()
        world.serves = False
        nursery.cancel_scope.cancel()


async def test_a_session_outlives_the_lease_of_its_node_and_the_next_process_goes_on_with_it(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    session = await world.start()
    await lose_lease(world, Child())
    await trio.sleep(IO_TIMEOUT_S / 2)
    assert not session.ends and not session.drops and world.plan.lingers()
    world.serves = True
    assert await world.start() is session
    session.covered_until_ns = 5  # it was let in
    await trio.sleep(2 * IO_TIMEOUT_S)
    assert not session.ends and not session.drops


async def test_a_session_that_nobody_goes_on_with_ends_when_programs_have_waited_long_enough(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    session = await world.start()
    await lose_lease(world, Child())
    world.serves = True
    await world.start()  # and is never let in
    await world.plan.stopped(1, 1)
    await trio.sleep(IO_TIMEOUT_S - 1)
    assert not session.ends
    await trio.sleep(2)
    assert session.ends == 1
    assert await world.start() is not session


async def test_I5_pages_are_taken_back_where_the_process_had_no_time_for_it(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    session = await world.start()
    session.is_emptied = False
    await lose_lease(world, Child())
    await trio.sleep(1)
    assert session.drops == 1 and not session.ends


@pytest.mark.parametrize("hangs", [False, True])
async def test_I5_a_session_whose_pages_cannot_be_taken_back_ends(
    world: World, autojump_clock: trio.testing.MockClock, hangs: bool
) -> None:
    session = await world.start()
    session.is_emptied, session.drop_hangs, session.drops_all = False, hangs, hangs
    await lose_lease(world, Child())
    await trio.sleep(2 * mount_keeper.TAKE_BACK_TURN_S)
    assert session.ends == 1


async def test_I5_of_a_process_that_was_evicted_nothing_is_shown_while_the_next_one_is_awaited(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    session = await world.start()
    session.is_emptied = False
    await world.plan.stopped(1, 1)
    await trio.sleep(1)
    assert session.drops == 1 and not session.ends


async def test_a_mount_that_is_stopped_ends_its_session(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    session, child = await world.start(), Child()
    child.stopped.set()
    await world.keeper.look_after(child)  # type: ignore[arg-type]
    assert session.ends == 1


@pytest.mark.parametrize("status", [0, 1])
async def test_a_session_that_cannot_be_taken_over_ends(
    world: World, autojump_clock: trio.testing.MockClock, status: int
) -> None:
    session = await world.start()
    session.can_be_taken_over = status == 0
    await world.plan.stopped(1, status)
    assert session.ends == 1


async def test_a_volume_that_was_made_again_under_the_name_gets_a_session_of_its_own(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    session = await world.start()
    await lose_lease(world, Child())
    await world.keepers.keeper("V", b"another")
    assert session.ends == 1


async def test_what_still_waits_when_the_node_stops_ends(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    session = await world.start()
    await lose_lease(world, Child())
    await world.keepers.end_all()
    assert session.ends == 1
