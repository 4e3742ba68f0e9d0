"""I11: an operation is applied exactly once, also when its answer was lost with a coordinator."""

import pytest

from csvfs.errors import BadRequest, Conflict, Fenced, NotFound
from tests.metadata_members import TestVolume

FILE = 0o100644


@pytest.fixture
def volume():
    return TestVolume()


def open_session(volume: TestVolume, node: str = "n1", incarnation: int = 1) -> int:
    with volume.batch() as metadata:
        return metadata.open_session(node, incarnation).id


def test_i11_a_successor_gives_the_first_answer_again(volume):
    session = open_session(volume)
    with volume.batch() as metadata:
        metadata.make(1, b"file", FILE, 0, 0, 0, b"", 1)
        metadata.store_reply(session, 1, b"made it")
    successor = volume.reopened()
    assert successor.reply_of(session, 1) == b"made it"
    assert successor.reply_of(session, 2) is None
    successor.begin()
    assert successor.open_session("n1", 1).id == session
    successor.rollback()


def test_confirmed_replies_are_forgotten_and_cannot_be_asked_for(volume):
    session = open_session(volume)
    for op in range(1, 11):
        with volume.batch() as metadata:
            metadata.op_done(session, op - 3)
            metadata.store_reply(session, op, b"%d" % op)
    for metadata in (volume.metadata, volume.reopened()):
        assert metadata.reply_of(session, 7) == b"7"
        with pytest.raises(Conflict, match="confirmed"):
            metadata.reply_of(session, 6)
        assert metadata.database.rows("SELECT op FROM replies") == [(7,), (8,), (9,), (10,)]


def test_a_reply_stored_and_confirmed_in_one_batch_leaves_no_row(volume):
    session = open_session(volume)
    with volume.batch() as metadata:
        metadata.store_reply(session, 1, b"1")
        metadata.store_reply(session, 2, b"2")
        metadata.op_done(session, 2)
    assert volume.metadata.database.rows("SELECT op FROM replies") == [(2,)]


def test_a_batch_rolled_back_takes_its_replies_with_it(volume):
    session = open_session(volume)
    with volume.batch() as metadata:
        metadata.store_reply(session, 1, b"1")
    metadata.begin()
    metadata.op_done(session, 2)
    metadata.store_reply(session, 2, b"2")
    metadata.open_session("n2", 1)
    metadata.rollback()
    assert metadata.reply_of(session, 1) == b"1" and metadata.reply_of(session, 2) is None
    assert [known.node for known in metadata.sessions.sessions()] == ["n1"]


def test_an_operation_cannot_have_two_replies(volume):
    session = open_session(volume)
    with volume.batch() as metadata:
        metadata.store_reply(session, 1, b"1")
        with pytest.raises(Conflict):
            metadata.store_reply(session, 1, b"other")
        with pytest.raises(BadRequest):
            metadata.reply_of(session, 0)


def test_an_older_incarnation_is_fenced_and_ended_sessions_are_gone(volume):
    old, new = open_session(volume, incarnation=1), open_session(volume, incarnation=2)
    other = open_session(volume, node="n2")
    assert len({old, new, other}) == 3
    with volume.batch() as metadata:
        with pytest.raises(Fenced):
            metadata.open_session("n1", 1)
        metadata.store_reply(old, 1, b"1")
        metadata.end_session(old)
        metadata.end_session(old)
        with pytest.raises(NotFound):
            metadata.reply_of(old, 1)
    successor = volume.reopened()
    assert {(known.node, known.incarnation) for known in successor.sessions.sessions()} == {
        ("n1", 2),
        ("n2", 1),
    }
    assert successor.database.rows("SELECT * FROM replies") == []
