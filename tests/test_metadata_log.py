"""The metadata log: order, barriers, and what counts as durable."""

import pytest
import trio

from coordinator.metadata_log import MetadataLog
from coordinator.slab_image import LogBarrier, LogEntry, LogWrite
from csvfs.errors import CsvfsError, DriveFailed, Fenced
from csvfs.ids import SlabId
from csvfs.units import BLOCK_SIZE

SLABS = [SlabId(100), SlabId(101)]
BLOCKS = 8


def write(block: int, letter: str = "x") -> LogWrite:
    return LogWrite(block, letter.encode() * BLOCK_SIZE)


class FakeBus:
    """Answers writes when told to, in any order."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, bytes]] = []
        self.waiting: list = []
        self.flushes = 0
        self.flush_errors: list[CsvfsError] = []

    def write(self, slab, block, data, done):
        self.sent.append((slab, block, bytes(data)))
        self.waiting.append(done)

    async def flush(self, slabs):
        self.flushes += 1
        await trio.lowlevel.checkpoint()
        if self.flush_errors:
            raise self.flush_errors.pop(0)

    def answer(self, index: int = 0, error: CsvfsError | None = None) -> None:
        self.waiting.pop(index)(error)


class FakeImage:
    def __init__(self) -> None:
        self.on_members: list[LogEntry] = []

    def written(self, entries):
        self.on_members += entries


@pytest.fixture
def bus():
    return FakeBus()


@pytest.fixture
def image():
    return FakeImage()


@pytest.fixture
def log(bus, image):
    return MetadataLog(bus, image, SLABS, BLOCKS)


async def test_blocks_go_to_their_slabs_and_neighbours_go_together(log, bus):
    log.append([write(6), write(7), write(8), write(1)])
    assert [(slab, block, len(data) // BLOCK_SIZE) for slab, block, data in bus.sent] == [
        (100, 6, 2),
        (101, 0, 1),
        (100, 1, 1),
    ]


async def test_a_batch_is_durable_when_it_and_all_before_it_are_answered(log, bus, image):
    first, second = log.append([write(0), write(5)]), log.append([write(2)])
    bus.answer(2)
    assert log.durable == 0
    bus.answer(0)
    assert (log.durable, image.on_members) == (0, [])
    bus.answer(0)
    assert log.durable == second == first + 1
    assert len(image.on_members) == 3


async def test_nothing_passes_a_barrier_before_all_is_flushed(log, bus, nursery):
    nursery.start_soon(log.run_forever)
    position = log.append([write(0), LogBarrier(), write(1)])
    assert len(bus.sent) == 1
    await trio.testing.wait_all_tasks_blocked()
    assert bus.flushes == 0
    bus.answer()
    await trio.testing.wait_all_tasks_blocked()
    assert (bus.flushes, len(bus.sent)) == (1, 2)
    bus.answer()
    await log.wait(position)


async def test_a_flush_that_fails_is_tried_again_and_nothing_passes_meanwhile(
    log, bus, nursery, autojump_clock
):
    nursery.start_soon(log.run_forever)
    bus.flush_errors = [DriveFailed("medium"), DriveFailed("medium")]
    log.append([LogBarrier(), write(1)])
    await trio.sleep(0.1)
    assert (bus.flushes, len(bus.sent)) == (1, 0)
    await trio.sleep(1)
    assert (bus.flushes, len(bus.sent)) == (3, 1)


async def test_waiters_hear_that_the_term_is_over(log, bus):
    position = log.append([write(0)])
    async with trio.open_nursery() as nursery:

        async def wait():
            with pytest.raises(Fenced):
                await log.wait(position)

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        bus.answer(0, Fenced("a later term"))
    with pytest.raises(Fenced):
        await log.wait(position)
    with pytest.raises(Fenced):
        await log.run_forever()


async def test_whoever_asks_is_called_when_a_position_is_durable_and_at_once_when_it_is(log, bus):
    calls: list[tuple[str, CsvfsError | None]] = []
    log.on_room = lambda: calls.append(("room", None))
    first, second = log.append([write(0)]), log.append([write(2)])
    log.when_durable(second, lambda error: calls.append(("second", error)))
    log.when_durable(first, lambda error: calls.append(("first", error)))
    bus.answer(1)
    assert calls == [] and log.batches_in_flight == 2
    bus.answer()
    assert calls == [("first", None), ("second", None), ("room", None)]
    log.when_durable(first, lambda error: calls.append(("again", error)))
    assert calls[-1] == ("again", None)


async def test_whoever_asks_is_told_that_the_log_has_ended(log, bus):
    answers: list[CsvfsError | None] = []
    position = log.append([write(0)])
    log.when_durable(position, answers.append)
    bus.answer(0, Fenced("a later term"))
    log.when_durable(position, answers.append)
    assert [type(answer) for answer in answers] == [Fenced, Fenced]
