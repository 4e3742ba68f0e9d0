"""Claims: what mounts say after a takeover that they hold. However much it is, they are not evicted for saying it, and
what is known already is not written down again."""

from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from coordinator.lease_table import READ, WRITE
from coordinator.session_desk import ABSENT_TIMES_MAX, CLAIMING_TIMES_MAX, SessionDesk
from coordinator.sessions import Session
from csvfs.ids import Incarnation, NodeName
from csvfs.units import BLOCK_SIZE
from tests.coordinator_cluster import NAME
from tests.test_service import block_of, cluster_of

TIMEOUT_S = 2.0
SLOW, SILENT = NodeName("slow"), NodeName("silent")


class Desk(SessionDesk):
    """Evictions are noted and succeed at once."""

    def __init__(self) -> None:
        nothing: Any = SimpleNamespace()
        self.alive = True
        facts: Any = SimpleNamespace(is_alive=lambda node: self.alive)
        super().__init__(nothing, nothing, nothing, facts, nothing, reclaim_timeout_s=TIMEOUT_S)
        self.evicted: list[NodeName] = []

    def expect(self, node: NodeName, *, connected: bool = True) -> Session:
        link: Any = SimpleNamespace() if connected else None
        return self.sessions.add(Session(len(list(self.sessions)), (node, Incarnation(1)), link))

    def evict_dead_nodes(self) -> None:
        pass

    async def evict(self, session: Session, reason: str) -> None:
        self.evicted.append(session.node)
        self.sessions.remove(session)


@pytest.fixture
async def desk(nursery: trio.Nursery) -> Desk:
    return Desk()


async def test_a_mount_that_takes_long_to_say_what_it_holds_is_waited_for_and_a_silent_one_is_not(
    desk: Desk, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    slow, _ = desk.expect(SLOW), desk.expect(SILENT)
    nursery.start_soon(desk.run_forever)
    for _ in range(6):
        await trio.sleep(0.75 * TIMEOUT_S)
        desk.claiming(slow)
        assert not desk.is_open
    desk.claimed(slow)
    await desk.wait_open()
    assert desk.evicted == [SILENT]


async def test_a_mount_that_never_says_all_it_holds_is_evicted_in_the_end(
    desk: Desk, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    endless = desk.expect(SLOW)
    nursery.start_soon(desk.run_forever)
    began_s = trio.current_time()
    with trio.fail_after(10 * CLAIMING_TIMES_MAX * TIMEOUT_S):
        while not desk.is_open:
            desk.claiming(endless)
            await trio.sleep(0.1)
    assert desk.evicted == [SLOW]
    assert trio.current_time() - began_s == pytest.approx(CLAIMING_TIMES_MAX * TIMEOUT_S, abs=0.5)  # of a mock clock


async def test_a_mount_that_died_with_the_coordinator_is_waited_for_while_its_node_is_alive(
    desk: Desk, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    late = desk.expect(SLOW, connected=False)
    nursery.start_soon(desk.run_forever)
    await trio.sleep((ABSENT_TIMES_MAX - 0.5) * TIMEOUT_S)
    assert not desk.is_open and not desk.evicted
    desk.claimed(late)
    await desk.wait_open()
    assert not desk.evicted


@pytest.mark.parametrize(("alive", "times"), [(True, ABSENT_TIMES_MAX), (False, 1)])
async def test_a_mount_that_does_not_come_holds_up_the_others_for_a_bounded_time(
    desk: Desk, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, alive: bool, times: int
) -> None:
    desk.alive = alive
    desk.expect(SLOW, connected=False)
    nursery.start_soon(desk.run_forever)
    began_s = trio.current_time()
    await desk.wait_open()
    assert desk.evicted == [SLOW]
    assert trio.current_time() - began_s == pytest.approx(times * TIMEOUT_S, abs=0.5)  # of a mock clock


async def test_claims_that_say_what_is_committed_write_nothing_and_others_are_written_or_refused(tmp_path: Any) -> None:
    async with cluster_of(tmp_path, hosts=("n1",)) as cluster:
        mount = await cluster.mount("n3")
        known, grown, touched = [await mount.make(b"file%d" % number) for number in range(3)]
        for ino in (known, grown, touched):
            await mount.write(ino, block_of("data"))
        service = cluster.hosts["n1"].owned[NAME].service
        assert service is not None
        (session,) = service.desk.sessions
        absent, size = touched + 1000, BLOCK_SIZE
        refused, reports = service.dispatch.reclaim(
            session,
            {
                "leases": [
                    [known, WRITE, size, 0], [grown, WRITE, size + 1, 0], [touched, WRITE, size, 7],
                    [1, READ, None, None], [absent, READ, 0, 0],
                ]
            },
        )  # fmt: skip
        assert refused == [absent]
        assert reports == [(grown, size + 1, None), (touched, size, 7)]
