"""The table of inodes that outlives a mount process, and what its parent reads from it."""

import errno
import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfs.errors import BadRequest
from csvfs.mount import held_session
from csvfs.mount.held_session import SESSION_ENVIRONMENT, HeldSession, InodeTable, inherited_session


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
    table = InodeTable(held.descriptors[1])
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
    table = InodeTable(held.descriptors[1])
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


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=80))
def test_the_table_is_a_set(history):
    fd = os.memfd_create("test")
    try:
        os.ftruncate(fd, held_session._TABLE_SIZE)
        table, model = InodeTable(fd), set()
        for adding, ino in history:
            (table.add if adding else table.remove)(ino)
            (model.add if adding else model.discard)(ino)
        with mmap.mmap(fd, held_session._TABLE_SIZE) as memory:
            numbers = memoryview(memory).cast("Q")
            assert sorted(held_session._inodes_in(numbers)) == sorted(model)
            numbers.release()
    finally:
        os.close(fd)


def test_more_inodes_than_the_table_holds_drop_all_caches(session, monkeypatch, tmp_path):
    monkeypatch.setattr(held_session, "INODES_MAX", 4)
    monkeypatch.setattr(held_session, "_TABLE_SIZE", mmap.PAGESIZE)
    monkeypatch.setattr(held_session, "DROP_CACHES", tmp_path / "drop")
    held, _ = session
    table = InodeTable(held.descriptors[1])
    for ino in range(1, mmap.PAGESIZE // 8 + 2):
        table.add(ino)
    held.drop_pages_and_close()
    assert (tmp_path / "drop").read_text() == "1\n"


def test_inodes_that_the_kernel_does_not_know_stop_nobody(monkeypatch, session, tmp_path):
    held, _ = session
    table = InodeTable(held.descriptors[1])
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
