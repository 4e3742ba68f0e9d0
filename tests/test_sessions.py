"""Sessions: replies once, links replaced, incarnations in order; and the batches that make it so."""

import pytest
import trio

from coordinator.batches import Batches
from coordinator.metadata_log import MetadataLog
from coordinator.sessions import Outcome, Session, Sessions, once
from csvfs.errors import Conflict, CsvfsError, Exists, Fenced, LeaseLost, Unavailable
from csvfs.ids import Incarnation, NodeName, SlabId
from tests.metadata_members import SLAB_BLOCKS, TestVolume
from tests.test_metadata_log import FakeBus

N1 = NodeName("n1")


class Fixture:
    def __init__(self) -> None:
        self.volume = TestVolume()
        self.metadata = self.volume.metadata
        self.bus = FakeBus()
        slabs = [SlabId((1 << 62) + number) for number in range(4)]
        self.log = MetadataLog(self.bus, self.metadata.image, slabs, SLAB_BLOCKS)
        self.serving = True
        self.batches = Batches(self.metadata, self.log, lambda: self.serving)

    async def answer_forever(self) -> None:
        while True:
            await trio.sleep(0.001)
            while self.bus.waiting:
                self.bus.answer()

    async def session(self) -> Session:
        known = await self.batches.run(lambda: self.metadata.open_session(N1, 1))
        return Session(known.id, (N1, Incarnation(1)))


@pytest.fixture
async def parts(nursery):
    parts = Fixture()
    nursery.start_soon(parts.batches.run_forever)
    nursery.start_soon(parts.log.run_forever)
    nursery.start_soon(parts.answer_forever)
    return parts


def make(parts: Fixture, name: bytes):
    return lambda: {"attr": parts.metadata.make(1, name, 0o100644, 0, 0, 0, b"", 1)}


async def test_I11_a_change_sent_twice_is_done_once_and_gets_its_first_answer(parts):
    session = await parts.session()
    change = once(parts.metadata, session, 1, 1, make(parts, b"a"))
    first = await parts.batches.run(change)
    again = await parts.batches.run(once(parts.metadata, session, 1, 1, make(parts, b"a")))
    assert (first.stored, again.stored) == (False, True)
    assert again.reply == first.reply
    with pytest.raises(Exists):
        await parts.batches.run(once(parts.metadata, session, 2, 1, make(parts, b"a")))


async def test_I11_two_sendings_in_one_batch_are_done_once(parts):
    session = await parts.session()
    outcomes: list[Outcome] = []

    async def send():
        outcomes.append(await parts.batches.run(once(parts.metadata, session, 1, 1, make(parts, b"a"))))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        nursery.start_soon(send)
    assert sorted(outcome.stored for outcome in outcomes) == [False, True]
    assert outcomes[0].reply == outcomes[1].reply


async def test_a_confirmed_answer_cannot_be_asked_for_again(parts):
    session = await parts.session()
    await parts.batches.run(once(parts.metadata, session, 1, 1, make(parts, b"a")))
    await parts.batches.run(once(parts.metadata, session, 2, 2, make(parts, b"b")))
    with pytest.raises(Conflict):
        await parts.batches.run(once(parts.metadata, session, 1, 1, make(parts, b"a")))


async def test_an_evicted_session_changes_nothing_any_more(parts):
    session = await parts.session()
    session.ended = True
    with pytest.raises(Fenced):
        await parts.batches.run(once(parts.metadata, session, 1, 1, make(parts, b"a")))
    assert parts.metadata.lookup(1, b"a") is None


async def test_changes_that_wait_together_share_a_transaction(parts):
    async with trio.open_nursery() as nursery:
        for number in range(40):
            nursery.start_soon(parts.batches.run, make(parts, b"%d" % number))
    assert parts.batches.change_count == 40
    assert parts.batches.batch_count <= 2


async def test_nobody_is_answered_before_the_log_is_on_the_members(nursery):
    parts = Fixture()
    nursery.start_soon(parts.batches.run_forever)
    executed = []
    answered = trio.Event()

    async def change():
        await parts.batches.run(make(parts, b"a"), lambda value, error: executed.append(value))
        answered.set()

    nursery.start_soon(change)
    await trio.testing.wait_all_tasks_blocked()
    assert executed and not answered.is_set()
    while parts.bus.waiting:
        parts.bus.answer()
    await answered.wait()


async def test_a_change_with_a_bug_hurts_nobody_else(parts):
    async def broken():
        def apply():
            parts.metadata.make(1, b"half", 0o100644, 0, 0, 0, b"", 1)
            raise ZeroDivisionError

        with pytest.raises(CsvfsError, match="log of the coordinator"):
            await parts.batches.run(apply)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(parts.batches.run, make(parts, b"good"))
        nursery.start_soon(broken)
    assert parts.metadata.lookup(1, b"good") is not None
    assert parts.metadata.lookup(1, b"half") is None


async def test_I5_a_node_without_lease_answers_nothing(parts):
    parts.serving = False
    with pytest.raises(Unavailable, match="lease"):
        await parts.batches.run(make(parts, b"a"))


async def test_a_session_has_one_link_and_earlier_incarnations_are_told_apart():
    class FakeLink:
        owner = None
        closed = None

        def close(self, error=None):
            self.closed = error

    sessions = Sessions()
    session = sessions.add(Session(1, (N1, Incarnation(3))))
    first, second = FakeLink(), FakeLink()
    session.attach(first)
    session.attach(second)
    assert first.closed is not None and session.link is second
    session.detach(first)
    assert session.link is second
    assert sessions.older_of(N1, Incarnation(4)) == [session]
    with pytest.raises(Fenced):
        sessions.check_newest(N1, Incarnation(2))


async def test_changes_without_a_task_are_told_when_their_log_is_durable_or_that_it_never_will_be(parts):
    told = []

    def done(value, error):
        told.append(error or value)

    parts.batches.submit(lambda: 1, None, done)
    parts.batches.submit(make(parts, b"a"), lambda value, error: told.append("executed"), done)
    await parts.batches.run(lambda: None)
    assert told[0] in (1, "executed") and len(told) == 3 and told[2]["attr"][2] == 1
    parts.serving = False
    parts.batches.submit(lambda: 2, None, done)
    with pytest.raises(LeaseLost):
        await parts.batches.run(lambda: None)
    parts.batches.close(Unavailable("over"))
    parts.batches.submit(lambda: 3, None, done)
    assert [type(answer) for answer in told[3:]] == [LeaseLost, Unavailable]


async def test_a_bug_in_an_answer_ends_the_batches_and_not_their_caller(parts, nursery):
    def done(value, error):
        raise KeyError("a bug")

    fixture = Fixture()
    async with trio.open_nursery() as inner:
        inner.start_soon(fixture.answer_forever)
        fixture.batches.submit(make(fixture, b"a"), None, done)
        with pytest.raises(KeyError):
            await fixture.batches.run_forever()
        assert fixture.batches.has_failed
        inner.cancel_scope.cancel()
