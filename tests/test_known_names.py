"""Directories made here: what is not in them is known without asking."""

import errno
import os
import stat
from typing import Any

import pytest
from pyfuse3 import FUSEError

from csvfs.errors import TimedOut
from csvfs.mount import known_names
from csvfs.mount.known_names import KnownNames
from csvfs.mount.operations import VolumeOperations
from tests.memory_volume import MemoryVolume
from tests.test_operations import CONTEXT, ROOT


@pytest.fixture
def volume() -> MemoryVolume:
    return MemoryVolume()


@pytest.fixture
def operations(volume: MemoryVolume) -> VolumeOperations:
    return VolumeOperations(volume, volume)


async def make_directory(operations: VolumeOperations) -> int:
    return int((await operations.mkdir(ROOT, b"d", 0o755, CONTEXT)).st_ino)


async def finds(operations: VolumeOperations, directory: int, name: bytes) -> int:
    return int((await operations.lookup(directory, name, CONTEXT)).st_ino)


async def test_names_that_are_not_in_a_directory_made_here_are_answered_without_a_call(
    operations: VolumeOperations, volume: MemoryVolume
) -> None:
    directory = await make_directory(operations)
    volume.calls.clear()
    entry = await operations.lookup(directory, b"f", CONTEXT)
    assert (entry.st_ino, entry.entry_timeout, volume.calls) == (0, 1, [])
    _, made = await operations.create(directory, b"f", 0o600, os.O_RDWR, CONTEXT)
    assert await finds(operations, directory, b"f") == made.st_ino
    assert volume.calls == ["make", "lookup"]


async def test_every_way_a_name_comes_and_goes_is_followed(
    operations: VolumeOperations, volume: MemoryVolume
) -> None:
    directory = await make_directory(operations)
    _, file = await operations.create(directory, b"a", 0o600, os.O_RDWR, CONTEXT)
    await operations.rename(directory, b"a", directory, b"b", 0, CONTEXT)
    await operations.link(file.st_ino, directory, b"c", CONTEXT)
    await operations.symlink(directory, b"s", b"target", CONTEXT)
    await operations.mkdir(directory, b"e", 0o700, CONTEXT)
    await operations.rename(directory, b"c", directory, b"s", 2, CONTEXT)
    for name in (b"b", b"c", b"s", b"e"):
        assert await finds(operations, directory, name) == volume.inodes[directory].entries[name]
    await operations.unlink(directory, b"b", CONTEXT)
    await operations.rmdir(directory, b"e", CONTEXT)
    volume.calls.clear()
    for name in (b"a", b"b", b"e"):
        assert await finds(operations, directory, name) == 0
    assert volume.calls == []


async def test_after_a_recall_the_coordinator_is_asked(
    operations: VolumeOperations, volume: MemoryVolume
) -> None:
    """Another node has made a file there."""
    directory = await make_directory(operations)
    volume.recall(directory)
    ino = volume.call_make(directory, b"theirs", 0o100644, 0, 0, 0, None)["attr"][0]
    volume.granted_directory(directory, 2)
    assert await finds(operations, directory, b"theirs") == ino


async def test_a_file_whose_making_was_not_answered_is_asked_for(
    operations: VolumeOperations, volume: MemoryVolume
) -> None:
    directory = await make_directory(operations)

    def lose_answer(name: str, args: dict) -> None:
        if name == "make":
            raise TimedOut("no answer")

    volume.before_reply = lose_answer
    with pytest.raises(FUSEError) as caught:
        await operations.create(directory, b"f", 0o600, os.O_RDWR, CONTEXT)
    assert caught.value.errno == errno.ETIMEDOUT
    assert await finds(operations, directory, b"f") == volume.inodes[directory].entries[b"f"]


async def test_a_node_that_may_not_serve_asks(operations: VolumeOperations, volume: MemoryVolume) -> None:
    directory = await make_directory(operations)
    volume.may_answer = lambda ino: False  # type: ignore[method-assign]
    volume.calls.clear()
    assert await finds(operations, directory, b"f") == 0
    assert volume.calls == ["lookup"]


async def test_a_name_that_is_too_long_is_left_to_the_coordinator(
    operations: VolumeOperations, volume: MemoryVolume
) -> None:
    directory = await make_directory(operations)
    volume.calls.clear()
    await finds(operations, directory, b"x" * 256)
    assert volume.calls == ["lookup"]


def test_knowledge_is_bounded_and_the_oldest_directory_goes_first(
    volume: MemoryVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_names, "NAMES_MAX", 10)
    known = KnownNames(volume)
    for directory in (5, 6):
        volume.granted_directory(directory, 2)
        known.made(directory, 0)
    for number in range(8):
        known.add(6, b"%d" % number)
    assert known.is_absent(5, b"x") and known.is_absent(6, b"x")
    known.add(6, b"one more")
    assert not known.is_absent(5, b"x") and known.is_absent(6, b"x")
    known.discard(6, b"one more")
    assert known.is_absent(6, b"one more") and known._count == 9


def test_a_large_directory_is_known_by_a_filter_that_never_says_absent_of_a_name_that_is_there(
    volume: MemoryVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_names, "EXACT_NAMES_MAX", 1000)
    known = KnownNames(volume)
    volume.granted_directory(5, 2)
    known.made(5, 0)
    for number in range(20_000):
        known.add(5, b"%d" % number)
    assert not any(known.is_absent(5, b"%d" % number) for number in range(20_000))
    assert sum(known.is_absent(5, b"x%d" % number) for number in range(20_000)) > 19_900
    assert known._count == 1  # the names are kept no more
    known.discard(5, b"7")
    assert not known.is_absent(5, b"7")  # it may be there, for all that is known


def test_large_directories_are_bounded_too_and_one_with_too_many_names_is_asked_for(
    volume: MemoryVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("EXACT_NAMES_MAX", 3), ("FILTERS_MAX", 2), ("FILTER_NAMES_MAX", 50)):
        monkeypatch.setattr(known_names, name, value)
    known = KnownNames(volume)
    for directory in (5, 6, 7):
        volume.granted_directory(directory, 2)
        known.made(directory, 0)
        for number in range(10):
            known.add(directory, b"%d" % number)
    assert [known.is_absent(directory, b"x") for directory in (5, 6, 7)] == [False, True, True]
    for number in range(50):
        known.add(7, b"more %d" % number)
    assert not known.is_absent(7, b"x") and known._count == 1


def test_a_directory_in_use_stays_known_while_very_many_other_inodes_are_recalled(volume: MemoryVolume) -> None:
    """Of which the file table remembers the last ones only: what it has forgotten counts as recalled."""
    known = KnownNames(volume)
    volume.granted_directory(5, 2)
    known.made(5, volume.stamp())
    floor = 0
    volume.recalled_since = lambda ino, stamp: stamp < floor  # type: ignore[method-assign]
    stamps = iter(range(1, 100))
    volume.stamp = lambda: next(stamps)  # type: ignore[method-assign]
    for _ in range(10):
        assert known.is_absent(5, b"x")
        floor += 1
    floor += 2
    assert not known.is_absent(5, b"x")


@pytest.mark.parametrize("is_history", [False, True])
async def test_I11_a_directory_that_the_process_before_made_may_have_names_by_now(
    volume: MemoryVolume, is_history: bool
) -> None:
    """Its answer comes late: the lease is given anew, and another node may have made names there since."""
    operations = VolumeOperations(volume, volume)
    made = volume.call_make

    def answer_late(**args: Any) -> Any:
        reply = made(**args)
        if is_history:
            made(parent=reply["attr"][0], name=b"f", mode=stat.S_IFREG | 0o644, uid=0, gid=0, umask=0, rdev=0, target=None)
            return {**reply, "lease": 0, "history": True}
        return reply

    volume.call_make = answer_late  # type: ignore[method-assign,assignment]
    volume.call_getattr = lambda ino: volume._entry(volume._inode(ino))  # type: ignore[attr-defined]
    entry = await operations.mkdir(ROOT, b"d", 0o755, CONTEXT)
    assert entry.attr_timeout
    assert operations.is_absent(entry.st_ino, b"f") is not is_history
