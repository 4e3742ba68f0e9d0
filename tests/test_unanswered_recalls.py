"""How long a mount that does not answer a recall is waited for: leases.py, "Absent"."""

from typing import Any

import pytest
import trio
import trio.testing

from coordinator.lease_table import NONE, Need
from coordinator.leases import ABSENT_TIMES_MAX, Leases
from coordinator.sessions import Session, Sessions
from csvfs.errors import Disconnected, TimedOut
from csvfs.ids import Incarnation, InodeNo, NodeName

TIMEOUT_S = 5.0
INO = InodeNo(7)


class Link:
    """To a mount that answers recalls once it was told to."""

    def __init__(self) -> None:
        self.closed = None
        self.owner: Any = None
        self.asked = 0
        self.answers, self.broken = trio.Event(), trio.Event()

    async def call(self, name: str, args: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        self.asked += 1
        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                for event in (self.answers, self.broken):
                    nursery.start_soon(wait_and_cancel, event, nursery.cancel_scope)
        if self.broken.is_set():
            raise Disconnected("it was killed")
        if not self.answers.is_set():
            raise TimedOut("it does not answer")
        return {"kind": NONE}

    def close(self, error: Any = None) -> None:
        self.broken.set()


async def wait_and_cancel(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


class World:
    """Node `held` has the write lease of an inode that node `asking` wants to read."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.alive = True
        self.evicted_s: list[float] = []
        self.sessions = Sessions()
        self.leases = Leases(
            self.sessions, recall_timeout_s=TIMEOUT_S, report=self._nothing, accessed=lambda ino, atime_ns: None, evict=self._evict,
            lowered=lambda ino: None, is_alive=lambda node: self.alive,
        )  # fmt: skip
        self.holder, self.asking = (
            self.sessions.add(Session(number, (NodeName(name), Incarnation(1))))
            for number, name in enumerate(("held", "asking"), start=1)
        )
        self.link = self.connect()
        nursery.start_soon(self.leases.run_forever)

    def connect(self) -> Link:
        link = Link()
        self.holder.attach(link)
        return link

    def die(self) -> None:
        self.holder.detach(self.link)
        self.link.close()

    def next_process(self) -> Link:
        """As session_desk.py does it."""
        before = self.holder.key
        self.sessions.rename(self.holder, Incarnation(2))
        self.leases.rename(before, self.holder.key)
        return self.connect()

    async def want(self) -> None:
        ticket = await self.leases.take(self.holder, {INO: Need.WRITE})
        self.leases.finish(ticket)
        self.leases.finish(await self.leases.take(self.asking, {INO: Need.READ}))

    async def _evict(self, session: Session, reason: str) -> None:
        self.evicted_s.append(trio.current_time())
        session.ended = True
        self.leases.end_session(session.key)

    async def _nothing(self, *arguments: Any) -> None:
        pass


@pytest.fixture
async def world(nursery: trio.Nursery) -> World:
    return World(nursery)


async def test_the_next_process_of_a_mount_that_died_under_a_recall_has_the_time_that_is_due(
    world: World, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    async with trio.open_nursery() as asking:
        asking.start_soon(world.want)
        await trio.sleep(0.9 * TIMEOUT_S)
        assert world.link.asked == 1
        world.die()
        await trio.sleep((ABSENT_TIMES_MAX - 1.4) * TIMEOUT_S)
        link = world.next_process()
        await trio.sleep(0.9 * TIMEOUT_S)  # longer than the first recall would have been waited for
        assert not world.evicted_s and link.asked == 1
        link.answers.set()
    assert not world.evicted_s


@pytest.mark.parametrize(("alive", "dies", "times"), [(True, True, ABSENT_TIMES_MAX), (False, True, 1), (True, False, 1)])
async def test_a_mount_that_does_not_answer_is_evicted_in_the_end(
    world: World, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, alive: bool, dies: bool, times: int
) -> None:
    world.alive = alive
    began_s = trio.current_time()
    async with trio.open_nursery() as asking:
        asking.start_soon(world.want)
        await trio.sleep(1.0)
        if dies:
            world.die()
    (evicted_s,) = world.evicted_s
    assert evicted_s - began_s == pytest.approx(times * TIMEOUT_S, abs=0.5)  # of a mock clock
