"""The front desk of a coordinator host: who waits for a volume that is being taken over, and who is told so at once."""

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from coordinator import front_desk
from coordinator.front_desk import FrontDesk
from csvfs.errors import CsvfsError, NotCoordinator, Unavailable
from csvfs.ids import NodeName
from csvfs.wire.control import pack_call
from csvfs.wire.frames import Frame, Kind


class Volume:
    """One volume of a host, and its service."""

    is_running = True

    def __init__(self) -> None:
        self.taken = trio.Event()
        self.error: CsvfsError | None = Unavailable("volume Volume1 is being taken over by node n1; try again")
        self.greeted: list[Any] = []

    def find(self, name: str) -> Any:
        if self.error is not None:
            raise self.error
        return self

    async def wait_taken(self, name: str) -> None:
        await self.taken.wait()

    def decide(self, error: CsvfsError | None = None) -> None:
        self.error = error
        self.taken.set()

    async def hello(self, link: Any, args: dict[str, Any]) -> dict[str, Any]:
        self.greeted.append(link)
        return {"term": 7}

    def volume_status(self) -> dict[str, Any]:
        return {"online": True}


class Caller:
    owner = None

    def __init__(self) -> None:
        self.peer = "n2"
        self.closed: CsvfsError | None = None
        self.engine = SimpleNamespace()
        self.answers: list[Any] = []

    def reply(self, request_id: int, value: Any) -> None:
        self.answers.append(value)

    def reply_error(self, request_id: int, error: CsvfsError) -> None:
        self.answers.append(error)

    def call(self, name: str) -> None:
        args = {"volume": "Volume1", "node": "n2", "incarnation": 1}
        self.on_frame(self, Frame(Kind.CALL, 1, pack_call(name, args), None))  # type: ignore[attr-defined]


@pytest.fixture
def volume() -> Volume:
    return Volume()


@pytest.fixture
def desk(nursery: trio.Nursery, volume: Volume) -> FrontDesk:
    return FrontDesk(NodeName("n1"), volume.find, volume.wait_taken, lambda: True, nursery)


def caller(desk: FrontDesk) -> Caller:
    link = Caller()
    desk.accept(link)  # type: ignore[arg-type]
    return link


async def test_a_mount_that_comes_while_a_volume_is_taken_over_is_answered_when_it_is_served(
    desk: FrontDesk, volume: Volume, autojump_clock: trio.abc.Clock
) -> None:
    link, person = caller(desk), caller(desk)
    link.call("hello")
    person.call("volume_status")
    await trio.sleep(1)
    assert link.answers == [] and isinstance(person.answers[0], Unavailable)  # people are told
    volume.decide()
    await trio.sleep(0.01)
    assert link.answers == [{"term": 7}]


async def test_a_mount_is_told_in_the_end_that_a_volume_is_still_not_taken_over_or_by_somebody_else(
    desk: FrontDesk, volume: Volume, autojump_clock: trio.abc.Clock
) -> None:
    first, second = caller(desk), caller(desk)
    first.call("hello")
    await trio.sleep(front_desk.TAKING_S_MAX + 0.1)
    assert isinstance(first.answers[0], Unavailable)
    second.call("hello")
    await trio.sleep(0.1)
    volume.decide(NotCoordinator("volume Volume1 is not coordinated by node n1"))
    await trio.sleep(0.01)
    assert isinstance(second.answers[0], NotCoordinator)


async def test_a_mount_that_has_gone_meanwhile_gets_no_session(
    desk: FrontDesk, volume: Volume, autojump_clock: trio.abc.Clock
) -> None:
    link = caller(desk)
    link.call("hello")
    await trio.sleep(0.1)
    link.closed = Unavailable("gone")
    volume.decide()
    await trio.sleep(0.01)
    assert volume.greeted == [] and link.answers == []
