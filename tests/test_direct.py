"""Requests about names that do not go through pyfuse3: the same answers, completed by the relay as its own."""

import errno
import os
import stat
from collections.abc import AsyncIterator

import pytest
import trio

from csvfs.mount import fuse_abi as abi
from csvfs.mount.channel import Channel
from csvfs.mount.direct import Direct
from csvfs.mount.operations import VolumeOperations
from csvfs.mount.relay import CACHE_VALID_S
from tests.test_channel import DIRECTORY, FILE, Setting, valid_s


@pytest.fixture
async def setting(nursery: trio.Nursery) -> AsyncIterator[Setting]:
    setting = Setting(nursery)
    operations = VolumeOperations(setting.volume, setting.volume)
    setting.channel._direct = Direct(operations, setting.relay)
    setting.channel._handlers = setting.channel._make_handlers()
    assert isinstance(setting.channel, Channel)
    await setting.negotiate()
    yield setting
    setting.close()
    nursery.cancel_scope.cancel()


async def ask(setting: Setting, opcode: int, body: bytes, node: int = DIRECTORY) -> bytes:
    setting.send(opcode, 9, node, body)
    reply = await setting.receive()
    size, error, unique = abi.OUT_HEADER.unpack_from(reply)
    assert (size, error, unique) == (len(reply), 0, 9)
    return reply


async def test_a_file_is_created_looked_up_once_and_open(setting: Setting) -> None:
    body = abi.CREATE_IN.pack(os.O_RDWR | os.O_DIRECT, stat.S_IFREG | 0o640, 0o22, 0) + b"new\0"
    reply = await ask(setting, abi.CREATE, body)
    (ino,) = abi.NODEID.unpack_from(reply, 16)
    assert setting.volume.inodes[DIRECTORY].entries[b"new"] == ino
    assert valid_s(reply) == (CACHE_VALID_S, 0) and setting.relay.lookups == {ino: 1}
    row = abi.ATTR.unpack_from(reply, 16 + 40)
    assert row[0] == ino and row[9] == stat.S_IFREG | 0o640
    _, flags, _ = abi.OPEN_OUT.unpack_from(reply, 16 + abi.ENTRY_OUT_SIZE)
    assert flags & abi.FOPEN_DIRECT_IO and flags & abi.FOPEN_KEEP_CACHE
    file = setting.volume.inodes[ino]
    assert (file.opens, file.write_opens) == (1, 1)


async def test_a_recall_between_request_and_answer_leaves_nothing_cached(setting: Setting) -> None:
    volume = setting.volume

    def recall(name: str, args: dict) -> None:
        volume.recall(DIRECTORY)

    volume.before_reply = recall
    reply = await ask(setting, abi.MKDIR, abi.MKDIR_IN.pack(0o755, 0) + b"d\0")
    assert valid_s(reply)[0] == 0


async def test_names_are_moved_and_removed(setting: Setting) -> None:
    entries = setting.volume.inodes[DIRECTORY].entries
    await ask(setting, abi.RENAME, abi.RENAME_IN.pack(DIRECTORY) + b"file\0moved\0")
    assert entries == {b"moved": FILE}
    await ask(setting, abi.MKDIR, abi.MKDIR_IN.pack(0o755, 0) + b"d\0")
    await ask(setting, abi.RENAME2, abi.RENAME2_IN.pack(DIRECTORY, 2, 0) + b"d\0moved\0")
    assert entries[b"d"] == FILE
    await ask(setting, abi.RMDIR, b"moved\0")
    await ask(setting, abi.UNLINK, b"d\0")
    assert entries == {}


async def test_opens_tell_whether_they_may_write(setting: Setting) -> None:
    file = setting.volume.inodes[FILE]
    handles = set()
    for flags, expected in ((os.O_RDONLY, (1, 0)), (os.O_WRONLY, (2, 1))):
        reply = await ask(setting, abi.OPEN, abi.OPEN_IN.pack(flags, 0), FILE)
        handles.add(abi.OPEN_OUT.unpack_from(reply, 16)[0])
        assert (file.opens, file.write_opens) == expected
    assert len(handles) == 2, "each open file has its own"


@pytest.mark.parametrize(
    ("opcode", "body", "expected"),
    [
        (abi.UNLINK, b"none\0", errno.ENOENT),
        (abi.RMDIR, b"file\0", errno.ENOTDIR),
        (abi.MKDIR, abi.MKDIR_IN.pack(0o755, 0) + b"file\0", errno.EEXIST),
        (abi.CREATE, abi.CREATE_IN.pack(os.O_EXCL, 0o600, 0, 0) + b"file\0", errno.EEXIST),
        (abi.UNLINK, b"no end", errno.EIO),
        (abi.CREATE, b"short", errno.EIO),
        (abi.RENAME2, abi.RENAME2_IN.pack(1, 0, 0) + b"one name\0", errno.EIO),
    ],
)
async def test_errors_and_rubbish_are_answered(
    setting: Setting, opcode: int, body: bytes, expected: int
) -> None:
    assert await setting.ask(opcode, DIRECTORY, body) == expected
