"""The record that outlives a mount process: what its parent reads from it, and the next process."""

import errno
import os
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfs.errors import BadRequest
from csvfs.mount import held_session, inode_rows
from csvfs.mount.held_session import SESSION_ENVIRONMENT, HeldSession, Record, inherited_session, mapped
from csvfs.mount.inode_rows import InodeRows, Row, rows_in


@pytest.fixture
def session(monkeypatch):
    """One whose device is a pipe: what is written to it can be read."""
    told, device = os.pipe()
    monkeypatch.setattr(held_session.device, "open_device", lambda: device)
    yield HeldSession(), told
    os.close(told)


def inodes_of(messages: bytes) -> list[int]:
    *inodes, epoch = [messages[at : at + 40] for at in range(0, len(messages), 40)]
    assert epoch == held_session.abi.pack_inc_epoch()
    return [held_session.abi.NOTIFY_INVAL_INODE_OUT.unpack(message)[3] for message in inodes]


def test_what_the_mount_kept_and_did_not_let_go_is_taken_back(session):
    held, told = session
    table = Record(mapped(held.descriptors[1])).inodes
    for ino in range(1, 1000):
        table.add(ino)
        table.add(ino)
    for ino in range(1, 1000, 2):
        table.remove(ino)
        table.remove(ino)
    table.add(1 << 40)
    held.drop_pages_and_close()
    assert sorted(inodes_of(os.read(told, 1 << 20))) == [*range(2, 1000, 2), 1 << 40]
    with pytest.raises(OSError):
        os.fstat(held.descriptors[0])


@pytest.mark.parametrize(("failures", "drops_all"), [(0, False), (1, False), (2, True)])
def test_dirty_pages_are_taken_back_at_the_second_try_and_what_stays_then_drops_all_caches(
    session, monkeypatch, tmp_path, failures, drops_all
):
    monkeypatch.setattr(held_session, "DROP_CACHES", tmp_path / "drop")
    held, _ = session
    table = Record(mapped(held.descriptors[1])).inodes
    table.add(7)
    table.add(8)
    tries: list[int] = []

    def write(fd, data):
        if len(data) == 40 and (ino := held_session.abi.NOTIFY_INVAL_INODE_OUT.unpack(data)[3]) == 8:
            tries.append(ino)
            if len(tries) <= failures:
                raise OSError(errno.EBUSY, "dirty")
        return len(data)

    monkeypatch.setattr(held_session.os, "write", write)
    held.drop_pages_and_close()
    assert (tmp_path / "drop").exists() == drops_all
    assert len(tries) == min(2, failures + 1)


changes = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "look", "forget", "open", "close", "lease", "lost"]), st.integers(1, 6)),
    max_size=60,
)


@given(changes)
def test_rows_say_what_was_done_and_the_next_process_goes_on_with_them(history):
    words = memoryview(bytearray(8 * inode_rows.WORDS)).cast("Q")
    table = InodeRows(words)
    known, lookups, opens, kinds, lost = set(), Counter(), Counter(), Counter(), set()
    for at, (what, ino) in enumerate(history):
        if at == len(history) // 2:
            table = InodeRows(words)  # another process
        match what:
            case "add":
                table.add(ino)
                known.add(ino)
            case "remove" if ino in known:
                table.remove(ino)
                known.discard(ino)
                kinds[ino] = 0
                lost.discard(ino)
            case "look":
                lookups[ino] += 1
                table.looked_up(ino, lookups[ino])
            case "forget" if lookups[ino]:
                lookups[ino] -= 1
                table.looked_up(ino, lookups[ino])
            case "open":
                opens[ino] += 1
                table.opened(ino, ino % 2 == 0)
            case "close" if opens[ino]:
                opens[ino] -= 1
                table.opened(ino, ino % 2 == 0, -1)
            case "lease" if ino in known:
                kinds[ino] = at % 4
                table.lease(ino, at % 4)
            case "lost" if ino in known:
                (lost.discard if at % 3 == 0 else lost.add)(ino)
                table.lost(ino, at % 3 != 0)
    expected = [
        Row(ino, lookups[ino], opens[ino], opens[ino] * (ino % 2 == 0), kinds[ino], False, ino in lost)
        for ino in range(1, 7)
        if ino in known or lookups[ino] or opens[ino]
    ]
    assert sorted(rows_in(words), key=lambda row: row.ino) == expected


def test_more_inodes_than_there_are_rows_drop_all_caches_and_cannot_be_taken_over(session, monkeypatch, tmp_path):
    monkeypatch.setattr(held_session, "DROP_CACHES", tmp_path / "drop")
    held, _ = session
    record = Record(mapped(held.descriptors[1]))
    record.served(b"init")
    words = record._words[held_session._ROWS :][: 2 + 3 * 4]
    table = InodeRows(words)
    for ino in range(1, 5):
        table.add(ino)
    assert held.can_be_taken_over
    table.add(5)
    assert not held.can_be_taken_over
    held.drop_pages_and_close()
    assert (tmp_path / "drop").read_text() == "1\n"


def test_the_next_process_finds_the_request_that_the_session_began_with(session):
    held, _ = session
    first = Record(mapped(held.descriptors[1]))
    assert not first.has_served and not held.can_be_taken_over
    first.served(b"a request of 23 bytes..")
    first.covered_until(12345)
    assert held.can_be_taken_over and held.covered_until_ns == 12345
    second = Record(mapped(held.descriptors[1]))
    assert second.has_served and second.init == b"a request of 23 bytes.."
    second.over()
    assert not held.can_be_taken_over


def test_a_record_of_another_version_is_not_taken_over(session, monkeypatch):
    held, _ = session
    Record(mapped(held.descriptors[1])).served(b"init")
    monkeypatch.setattr(held_session, "VERSION", held_session.VERSION + 1)
    with pytest.raises(BadRequest, match="version"):
        Record(mapped(held.descriptors[1]))
    assert not held.can_be_taken_over


def test_inodes_that_the_kernel_does_not_know_stop_nobody(monkeypatch, session, tmp_path):
    held, _ = session
    table = Record(mapped(held.descriptors[1])).inodes
    table.add(7)

    def refuse(fd, data):
        raise OSError(errno.ENOENT, "no such inode")

    monkeypatch.setattr(held_session, "DROP_CACHES", tmp_path / "drop")
    monkeypatch.setattr(held_session.os, "write", refuse)
    held.drop_pages_and_close()
    assert not (tmp_path / "drop").exists()


def test_a_mount_without_a_parent_that_holds_it_opens_its_own(monkeypatch):
    monkeypatch.delenv(SESSION_ENVIRONMENT, raising=False)
    assert inherited_session() is None
    for nonsense in ("x", "1", "99999,99998", "1,2,3"):
        monkeypatch.setenv(SESSION_ENVIRONMENT, nonsense)
        with pytest.raises(BadRequest):
            inherited_session()
