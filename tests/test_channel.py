"""Channel and relay between a kernel and a pyfuse3 that are both played by the test, over sockets."""

import errno
import fcntl
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio

from csvfs.errors import CsvfsError, Fenced, NoSpace
from csvfs.mount import channel as channel_module
from csvfs.mount import fuse_abi as abi
from csvfs.mount import request_journal, write_requests
from csvfs.mount.channel import Channel
from csvfs.mount.file_locks import FileLocks
from csvfs.mount.relay import CACHE_VALID_S, Relay
from csvfs.mount.request_journal import UNIQUE_RESENT, RequestJournal, current_request
from csvfs.mount.write_path import WRITE_APPEND
from csvfs.net.engine import Engine
from tests.memory_volume import READ_LEASE, MemoryVolume

FILE, DIRECTORY = 2, 1
ATTR = abi.ATTR.pack(FILE, 5, 8, *(0,) * 13)


class Names:
    def __init__(self, volume: MemoryVolume) -> None:
        self.volume = volume
        self.closed_directories: list[int] = []
        self.set: list[tuple[int, bytes, bytes, int]] = []
        self.leased = True
        self.absent: set[tuple[int, bytes]] = set()

    def is_absent(self, parent: int, name: bytes) -> bool:
        return (parent, name) in self.absent

    def adopt_listing(self, fh: int, ino: int) -> None:
        pass

    async def fsync_directory(self) -> None:
        await self.volume.call("fsync", {})

    async def set_attribute(
        self, ino: int, name: bytes, value: bytes, flags: int, drops_set_gid: bool = False
    ) -> None:
        self.set.append((ino, name, value, flags))
        self.drops_set_gid = drops_set_gid

    def close_directory(self, fh: int) -> None:
        self.closed_directories.append(fh)

    def listing_was_leased(self, fh: int) -> bool:
        return self.leased


class Setting:
    """`kernel` and `pyfuse3` are the test's ends of what channel and relay talk to."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.engine = Engine()
        self.kernel, self._device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.kernel, self._device):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.volume = MemoryVolume()
        self.volume.call_make(DIRECTORY, b"file", stat.S_IFREG | 0o644, 0, 0, 0, None)
        self.volume.inodes[FILE].data[:] = b"hello"
        self.names = Names(self.volume)
        self.failures: list[Exception] = []
        fd = self._device.fileno()
        self.relay = Relay(self.engine, fd, self.volume, self.names, self.failures.append)
        self.pyfuse3 = self.relay._pyfuse3_socket
        self.pyfuse3.setblocking(False)
        self.channel = Channel(self.engine, fd, self.volume, self.names, self.relay)
        nursery.start_soon(self.engine.run_forever)
        self.channel.start(nursery)

    def close(self) -> None:
        self.channel.close()
        self.relay.close()
        self.kernel.close()
        self._device.close()
        self.engine.close()

    def send(self, opcode: int, unique: int, node: int, body: bytes = b"") -> None:
        header = abi.IN_HEADER.pack(abi.IN_HEADER.size + len(body), opcode, unique, node, 0, 0, 0, 0, 0)
        self.kernel.send(header + body)

    async def receive(self, end: socket.socket | None = None) -> bytes:
        end = end or self.kernel
        with trio.fail_after(60):
            while True:
                try:
                    return end.recv(2 << 20)
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(end)

    async def receive_error(self) -> tuple[int, int]:
        """(unique, errno) of a reply without a body."""
        reply = await self.receive()
        size, error, unique = abi.OUT_HEADER.unpack(reply)
        assert size == 16
        return unique, -error

    async def ask(self, opcode: int, node: int, body: bytes = b"") -> int:
        self.send(opcode, 7, node, body)
        unique, error = await self.receive_error()
        assert unique == 7
        return error

    async def pass_through(
        self, opcode: int, node: int, body: bytes, reply_body: bytes, error: int = 0
    ) -> bytes:
        """A request that pyfuse3 answers with `reply_body`; the reply as the kernel gets it."""
        self.send(opcode, 8, node, body)
        request = await self.receive(self.pyfuse3)
        assert abi.IN_HEADER.unpack_from(request)[2] == 8
        self.answer(8, reply_body, error)
        return await self.receive()

    def answer(self, unique: int, body: bytes, error: int = 0) -> None:
        self.pyfuse3.send(abi.OUT_HEADER.pack(16 + len(body), -error, unique) + body)

    async def negotiate(self, minor: int = 45) -> bytes:
        flags = 0xFFFF_FFFF
        body = abi.INIT_IN.pack(7, minor, 1 << 17, flags) + abi.U32.pack(0xFFFF) + bytes(44)
        return await self.pass_through(abi.INIT, 0, body, bytes(64))


@pytest.fixture
async def setting(nursery: trio.Nursery) -> AsyncIterator[Setting]:
    setting = Setting(nursery)
    yield setting
    setting.close()
    nursery.cancel_scope.cancel()


def read_body(offset: int, size: int) -> bytes:
    return abi.READ_IN.pack(0, offset, size, 0, 0, 0, 0)


def write_body(offset: int, data: bytes, flags: int = 0) -> bytes:
    return abi.WRITE_IN.pack(0, offset, len(data), 0, 0, flags, 0) + data


# -- READ and WRITE


async def test_reads_at_hand_are_answered_at_once_and_others_later(setting: Setting) -> None:
    setting.send(abi.READ, 1, FILE, read_body(1, 100))
    assert await setting.receive() == abi.OUT_HEADER.pack(20, 0, 1) + b"ello"
    assert (setting.channel.inline_count, setting.channel.waited_count) == (1, 0)
    setting.volume.nowait = False
    setting.send(abi.READ, 2, FILE, read_body(0, 3))
    assert await setting.receive() == abi.OUT_HEADER.pack(19, 0, 2) + b"hel"
    assert (setting.channel.inline_count, setting.channel.waited_count) == (1, 1)


async def test_a_read_may_come_as_any_kind_of_buffer(setting: Setting) -> None:
    for data in (b"abc", bytearray(b"abc"), memoryview(b"abc"), [b"a", memoryview(b"bc")]):
        setting.volume.read_nowait = lambda *_, data=data: data  # type: ignore[method-assign,assignment]
        setting.send(abi.READ, 1, FILE, read_body(0, 3))
        assert await setting.receive() == abi.OUT_HEADER.pack(19, 0, 1) + b"abc"


async def test_errors_of_reads_are_answered_whether_at_once_or_later(setting: Setting) -> None:
    assert await setting.ask(abi.READ, 99, read_body(0, 1)) == errno.ENOENT
    setting.volume.nowait = False
    assert await setting.ask(abi.READ, 99, read_body(0, 1)) == errno.ENOENT


async def test_a_write_is_answered_when_it_is_done_and_with_its_error(setting: Setting) -> None:
    done: list[Callable[[CsvfsError | None], None]] = []
    taken: list[tuple[int, int, bytes, int]] = []

    def take(ino: int, offset: int, data: memoryview, flags: int, when_done: Callable) -> bool:
        taken.append((ino, offset, bytes(data), flags))
        done.append(when_done)
        return True

    setting.volume.write_nowait = take  # type: ignore[method-assign,assignment]
    setting.send(abi.WRITE, 1, FILE, write_body(10, b"one"))
    setting.send(abi.WRITE, 2, FILE, write_body(20, b"two", os.O_APPEND))
    while len(done) < 2:
        await trio.lowlevel.checkpoint()
    assert taken == [(FILE, 10, b"one", 0), (FILE, 20, b"two", WRITE_APPEND)]
    with pytest.raises(BlockingIOError):
        setting.kernel.recv(100)
    done[1](None)
    assert await setting.receive() == abi.pack_write_reply(2, 3)
    done[0](NoSpace("pool full"))
    assert await setting.receive_error() == (1, errno.ENOSPC)


async def test_a_write_whose_size_is_not_that_of_its_data_is_refused(setting: Setting) -> None:
    body = abi.WRITE_IN.pack(0, 0, 100, 0, 0, 0, 0) + b"x" * 99
    assert await setting.ask(abi.WRITE, FILE, body) == errno.EINVAL
    assert await setting.ask(abi.WRITE, FILE, body[:20]) == errno.EIO
    assert setting.volume.inodes[FILE].data == b"hello"


async def test_data_of_waiting_large_writes_is_never_overwritten_by_later_requests(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five large writes in flight, more than there are buffers to lend; their data stays as it is."""
    held: list[tuple[memoryview, Callable[[CsvfsError | None], None]]] = []

    def hold(ino: int, offset: int, data: memoryview, flags: int, done: Callable) -> bool:
        held.append((data, done))
        return True

    setting.volume.write_nowait = hold  # type: ignore[method-assign,assignment]
    monkeypatch.setattr(write_requests, "LARGE_BUFFERS_MAX", 2)
    for round_number in range(2):
        for number in range(5):
            setting.send(abi.WRITE, number, FILE, write_body(0, bytes([number + 1]) * 300_000))
            while len(held) <= number:
                await trio.lowlevel.checkpoint()
        setting.send(abi.READ, 50, FILE, read_body(0, 5))
        assert (await setting.receive())[16:] == b"hello"
        for number, (data, done) in enumerate(held):
            assert data == bytes([number + 1]) * 300_000
            # Of the second round: one fails, whose buffer is not used again.
            done(NoSpace("full") if round_number and number == 0 else None)
            await setting.receive()
        held.clear()
    assert setting.channel._writes._buffers_out == 0
    assert len(setting.channel._writes._spare_buffers) == 1


@pytest.mark.parametrize("failing", ["write_nowait", "write", "write after done"])
async def test_a_lent_buffer_comes_back_however_its_write_ends(setting: Setting, failing: str) -> None:
    def take(ino: int, offset: int, data: memoryview, flags: int, done: Callable) -> bool:
        if failing == "write":
            return False
        if failing == "write after done":
            done(NoSpace("full"))
        raise RuntimeError("a bug")

    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    setting.volume.write_nowait = take  # type: ignore[method-assign,assignment]
    setting.volume.write = fail  # type: ignore[method-assign,assignment]
    for _ in range(3):
        error = await setting.ask(abi.WRITE, FILE, write_body(0, bytes(300_000)))
        assert error == (errno.ENOSPC if failing == "write after done" else errno.EIO)
        assert setting.channel._writes._buffers_out == 0
    with pytest.raises(BlockingIOError):
        setting.kernel.recv(100)  # one answer each


async def test_a_write_that_is_cancelled_is_not_answered_so_that_the_next_process_is_asked_for_it(setting: Setting) -> None:
    setting.volume.write_nowait = lambda *_: False  # type: ignore[method-assign]
    setting.volume.write = lambda *_, **__: trio.sleep_forever()  # type: ignore[method-assign,assignment]
    async with trio.open_nursery() as nursery:
        setting.channel._nursery = nursery
        setting.send(abi.WRITE, 1, FILE, write_body(0, bytes(300_000)))
        while not setting.channel._writes._buffers_out:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    setting.send(abi.IOCTL, 2, FILE, bytes(32))
    assert await setting.receive_error() == (2, errno.ENOTTY)  # the first answer of all


async def test_when_too_many_requests_wait_the_kernels_queue_waits(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "REQUESTS_WAITING_MAX", 3)
    monkeypatch.setattr(channel_module, "REQUESTS_PER_TURN", 1)
    going = trio.Event()
    reading = 0

    async def read(ino: int, offset: int, size: int, *, direct: bool) -> bytes:
        nonlocal reading
        reading += 1
        await going.wait()
        return b"x"

    setting.volume.nowait = False
    setting.volume.read = read  # type: ignore[method-assign,assignment]
    for unique in range(10):
        setting.send(abi.READ, unique, FILE, read_body(0, 1))
    while reading < 3:
        await trio.lowlevel.checkpoint()
    for _ in range(20):
        await trio.lowlevel.checkpoint()
    assert reading == 3
    going.set()
    answered = {abi.OUT_HEADER.unpack_from(await setting.receive())[2] for _ in range(10)}
    assert answered == set(range(10))


# -- what the channel answers by itself


async def test_a_range_is_copied_from_the_inode_of_the_header_to_that_of_the_body(setting: Setting) -> None:
    files = setting.volume
    other = files.call_make(1, b"other", 0o100644, 0, 0, 0, None)["attr"][0]
    files.inodes[FILE].data[:] = b"0123456789"
    body = (2, other, 0, 1, 5)  # off_in, nodeid_out, fh_out, off_out, len
    setting.send(abi.COPY_FILE_RANGE, 7, FILE, abi.COPY_FILE_RANGE_IN.pack(0, *body, 0))
    assert await setting.receive() == abi.pack_write_reply(7, 5)
    assert bytes(files.inodes[other].data) == b"\x0023456"
    assert abi.copy_target(memoryview(bytes(40) + abi.COPY_FILE_RANGE_IN.pack(0, *body, 0))) == other
    for wrong in ((0, *body, 1), (0, 1 << 63, *body[1:], 0), (0, *body[:4], 1 << 63, 0)):
        assert await setting.ask(abi.COPY_FILE_RANGE, FILE, abi.COPY_FILE_RANGE_IN.pack(*wrong)) == errno.EINVAL
    assert await setting.ask(abi.COPY_FILE_RANGE, FILE, bytes(55)) == errno.EIO


async def test_what_the_file_system_has_not_is_refused_in_the_kernels_words(setting: Setting) -> None:
    unknown_mode = abi.FALLOCATE_IN.pack(0, 0, 4096, 0x40, 0)
    assert await setting.ask(abi.FALLOCATE, FILE, unknown_mode) == errno.EOPNOTSUPP
    assert await setting.ask(abi.FALLOCATE, FILE, bytes(31)) == errno.EIO
    assert await setting.ask(abi.LSEEK, FILE, bytes(23)) == errno.EIO
    assert await setting.ask(abi.LSEEK, FILE, abi.LSEEK_IN.pack(0, 1 << 40, os.SEEK_DATA, 0)) == errno.ENXIO
    assert await setting.ask(abi.IOCTL, FILE, bytes(32)) == errno.ENOTTY
    for opcode in (
        abi.POLL,
        abi.GETLK,
        abi.INTERRUPT,
        abi.READDIRPLUS,
        52,
        53,
    ):
        assert await setting.ask(opcode, FILE, bytes(64)) == errno.ENOSYS


async def test_syncs_statfs_and_releases_are_answered_here(setting: Setting) -> None:
    for writing in (False, True):
        await setting.volume.open(FILE, writing)
    for opcode in (abi.FLUSH, abi.FSYNC, abi.FSYNCDIR):
        assert await setting.ask(opcode, FILE, bytes(24)) == 0
    assert setting.volume.fsync_count == 1
    file = setting.volume.inodes[FILE]
    assert await setting.ask(abi.RELEASE, FILE, abi.RELEASE_IN.pack(0, os.O_RDWR | os.O_APPEND, 0, 0)) == 0
    assert (file.opens, file.write_opens) == (1, 0)
    assert await setting.ask(abi.RELEASE, FILE, abi.RELEASE_IN.pack(0, os.O_RDONLY | os.O_DIRECT, 0, 0)) == 0
    assert (file.opens, file.write_opens) == (0, 0)
    assert await setting.ask(abi.RELEASEDIR, DIRECTORY, abi.RELEASE_IN.pack(33, 0, 0, 0)) == 0
    assert setting.names.closed_directories == [33]
    setting.send(abi.STATFS, 1, DIRECTORY)
    assert len(await setting.receive()) == 96


async def test_setxattr_keeps_its_flags_and_malformed_ones_are_refused(setting: Setting) -> None:
    body = abi.SETXATTR_IN.pack(3, os.XATTR_CREATE) + b"user.a\0" + b"v\0w"
    assert await setting.ask(abi.SETXATTR, FILE, body) == 0
    assert setting.names.set == [(FILE, b"user.a", b"v\0w", os.XATTR_CREATE)]
    for wrong in (body[:-1], abi.SETXATTR_IN.pack(0, 0) + b"\0", abi.SETXATTR_IN.pack(0, 0) + b"no-end"):
        assert await setting.ask(abi.SETXATTR, FILE, wrong) == errno.EINVAL
    assert await setting.ask(abi.GETXATTR, FILE, bytes(8) + b"security.capability\0") == errno.ENODATA
    assert len(setting.names.set) == 1


async def test_with_setxattr_ext_the_kernel_says_whether_an_acl_takes_the_set_gid_bit(setting: Setting) -> None:
    await setting.negotiate()
    for kills in (abi.SETXATTR_ACL_KILL_SGID, 0):
        body = abi.SETXATTR_EXT_IN.pack(3, 0, kills, 0) + b"system.posix_acl_access\0" + b"v\0w"
        assert await setting.ask(abi.SETXATTR, FILE, body) == 0
        assert setting.names.set.pop() == (FILE, b"system.posix_acl_access", b"v\0w", 0)
        assert setting.names.drops_set_gid is bool(kills)

async def test_the_next_process_reads_requests_as_agreed_on_before_pyfuse3_has_heard_of_it(setting: Setting) -> None:
    """Resent by the kernel at once: an attribute that is set must not be taken for one of the shorter form."""
    body = abi.INIT_IN.pack(7, 45, 1 << 17, 0xFFFF_FFFF) + abi.U32.pack(0xFFFF) + bytes(44)
    init = abi.IN_HEADER.pack(abi.IN_HEADER.size + len(body), abi.INIT, 1, 0, 0, 0, 0, 0, 0) + body
    setting.relay.take_over(init, {})
    body = abi.SETXATTR_EXT_IN.pack(3, os.XATTR_CREATE, 0, 0) + b"user.a\0" + b"v\0w"
    assert await setting.ask(abi.SETXATTR, FILE, body) == 0
    assert setting.relay.can_cache_entries


async def test_that_an_inode_has_no_attributes_is_answered_here_while_its_lease_says_so(setting: Setting) -> None:
    volume, name = setting.volume, abi.GETXATTR_IN.pack(100, 0) + b"system.posix_acl_access\0"
    volume.attributes_at_hand, volume.leases = True, {FILE: READ_LEASE}
    assert await setting.ask(abi.GETXATTR, FILE, name) == errno.ENODATA
    assert await setting.ask(abi.LISTXATTR, FILE, abi.GETXATTR_IN.pack(100, 0)) == 0
    setting.send(abi.LISTXATTR, 7, FILE, abi.GETXATTR_IN.pack(0, 0))
    assert (await setting.receive())[abi.OUT_HEADER.size :] == abi.GETXATTR_IN.pack(0, 0)
    volume.inodes[FILE].xattrs[b"user.a"] = b"1"
    assert (await setting.pass_through(abi.GETXATTR, FILE, name, b"v"))[-1:] == b"v"
    volume.inodes[FILE].xattrs.clear()
    volume.recall(FILE)
    assert (await setting.pass_through(abi.GETXATTR, FILE, name, b"v"))[-1:] == b"v"


async def test_rubbish_from_the_device_ends_nothing(setting: Setting) -> None:
    setting.kernel.send(b"short")
    for opcode in range(64):
        setting.send(opcode, 1000 + opcode, FILE)  # every request without its body
    setting.send(abi.READ, 5, FILE, read_body(0, 5))
    while True:
        reply = await setting.receive()
        if abi.OUT_HEADER.unpack_from(reply)[2] == 5:
            break
    assert reply[16:] == b"hello"
    assert not setting.failures


# -- through pyfuse3


async def test_init_offers_our_flags_and_nothing_the_kernel_has_not(setting: Setting) -> None:
    reply = await setting.negotiate(minor=44)
    major, minor, readahead, low, _, _, max_write, gran, pages, _, high = abi.INIT_OUT.unpack_from(reply, 16)[
        :11
    ]
    flags = low | high << 32
    assert (major, minor, readahead, max_write, gran, pages) == (7, 44, 1 << 17, 1 << 20, 1, 256)
    for wanted in (
        abi.FLAG_PARALLEL_DIROPS,
        abi.FLAG_EXPLICIT_INVAL_DATA,
        abi.FLAG_DIRECT_IO_ALLOW_MMAP,
        abi.FLAG_POSIX_LOCKS,
        abi.FLAG_FLOCK_LOCKS,
    ):
        assert flags & wanted
    for unwanted in (abi.FLAG_WRITEBACK_CACHE, abi.FLAG_AUTO_INVAL_DATA):
        assert not flags & unwanted
    assert setting.relay.can_cache_entries


async def test_a_kernel_that_is_too_old_is_refused(setting: Setting) -> None:
    body = abi.INIT_IN.pack(7, 30, 1 << 17, 0xFFFF_FFFF) + bytes(48)
    reply = await setting.pass_through(abi.INIT, 0, body, bytes(64))
    assert abi.OUT_HEADER.unpack(reply) == (16, -errno.EPROTO, 8)
    assert "too old" in str(setting.failures[0])


def entry(ino: int, leased: bool = True, name_leased: bool = True) -> bytes:
    return abi.NODEID.pack(ino) + bytes(8) + abi.ENTRY_VALID.pack(name_leased, leased, 0, 0) + ATTR


def valid_s(reply: bytes) -> tuple[int, float]:
    """Of name and attributes."""
    name_s, attr_s, name_ns, attr_ns = abi.ENTRY_VALID.unpack_from(reply, 16 + abi.ENTRY_VALID_OFFSET)
    assert name_ns == 0
    return name_s, attr_s + attr_ns / 1e9


@pytest.mark.parametrize("opcode", [abi.LOOKUP, abi.MKNOD, abi.MKDIR, abi.SYMLINK, abi.LINK])
async def test_k1_names_and_attributes_are_cached_iff_leased_and_not_recalled(
    setting: Setting, opcode: int
) -> None:
    """Attributes of what is made or linked never: the kernel takes them in though a notification has overtaken them. Those
    that come with a name for one stat(2): there may be no inode yet that a notification would find."""
    await setting.negotiate()
    volume = setting.volume
    once = 0.004 if opcode == abi.LOOKUP else 0

    async def reply_to(answer: bytes) -> tuple[int, float]:
        return valid_s(await setting.pass_through(opcode, DIRECTORY, b"file\0", answer))

    assert await reply_to(entry(FILE)) == (0, 0)
    volume.leases = {DIRECTORY: READ_LEASE}
    assert await reply_to(entry(FILE)) == (CACHE_VALID_S, 0)
    volume.leases = {FILE: READ_LEASE}
    assert await reply_to(entry(FILE)) == (0, once)
    volume.leases = {FILE: READ_LEASE, DIRECTORY: READ_LEASE}
    assert await reply_to(entry(FILE)) == (CACHE_VALID_S, once)
    # Learned without a lease, although one was got meanwhile.
    assert await reply_to(entry(FILE, leased=False, name_leased=False)) == (0, 0)
    # Recalled between request and reply, although held again.
    setting.send(opcode, 8, DIRECTORY, b"file\0")
    await setting.receive(setting.pyfuse3)
    volume.recall(DIRECTORY)
    volume.recall(FILE)
    volume.leases = {FILE: READ_LEASE, DIRECTORY: READ_LEASE}
    setting.answer(8, entry(FILE))
    assert valid_s(await setting.receive()) == (0, 0)
    assert setting.relay.lookups == {FILE: 6}


async def test_k1_absence_is_cached_under_the_directorys_lease(setting: Setting) -> None:
    await setting.negotiate()
    setting.volume.leases = {DIRECTORY: READ_LEASE}
    reply = await setting.pass_through(abi.LOOKUP, DIRECTORY, b"none\0", entry(0, leased=False))
    assert valid_s(reply) == (CACHE_VALID_S, 0)
    assert setting.relay.lookups == {}


async def test_names_are_not_cached_by_kernels_that_cannot_take_them_back(setting: Setting) -> None:
    await setting.negotiate(minor=43)
    setting.volume.leases = {DIRECTORY: READ_LEASE, FILE: READ_LEASE}
    reply = await setting.pass_through(abi.LOOKUP, DIRECTORY, b"file\0", entry(FILE))
    assert valid_s(reply) == (0, 0.004)


@pytest.mark.parametrize("opcode", [abi.GETATTR, abi.SETATTR])
async def test_k1_attributes_are_cached_iff_leased(setting: Setting, opcode: int) -> None:
    """Those of SETATTR never: the kernel takes them in though a notification has overtaken them."""
    for held, leased, expected in [
        (0, 1, 0),
        (1, 1, 0),
        (2, 1, CACHE_VALID_S),
        (3, 1, CACHE_VALID_S),
        (3, 0, 0),
    ]:
        setting.volume.leases = {FILE: held}
        answer = abi.ATTR_VALID.pack(leased, 0) + bytes(4) + ATTR
        reply = await setting.pass_through(opcode, FILE, bytes(88), answer)
        assert abi.ATTR_VALID.unpack_from(reply, 16)[0] == (expected if opcode == abi.GETATTR else 0)
        assert reply[32:] == ATTR


async def test_attributes_known_under_a_lease_are_answered_here(setting: Setting) -> None:
    setting.volume.attributes_at_hand = True
    setting.volume.leases = {FILE: READ_LEASE}
    file = setting.volume.inodes[FILE]
    file.mtime_ns, file.uid, file.rdev = -1_500_000_000, 1000, 0x103
    setting.send(abi.GETATTR, 9, FILE, bytes(16))
    reply = await setting.receive()
    assert abi.OUT_HEADER.unpack_from(reply) == (len(reply), 0, 9)
    assert abi.ATTR_VALID.unpack_from(reply, 16)[0] == CACHE_VALID_S
    row = abi.ATTR.unpack_from(reply, 32)
    assert row[:3] == (FILE, 5, 8) and row[9:] == (file.mode, 1, 1000, 0, 0x103, 4096, 0)
    assert (row[4], row[7]) == ((1 << 64) - 2, 500_000_000)
    setting.volume.leases = {}
    answer = abi.ATTR_VALID.pack(0, 0) + bytes(4) + ATTR
    assert (await setting.pass_through(abi.GETATTR, FILE, bytes(16), answer))[32:] == ATTR


@pytest.mark.parametrize(("minor", "valid"), [(45, CACHE_VALID_S), (43, 0)])
async def test_names_known_to_be_absent_are_answered_here(setting: Setting, minor: int, valid: int) -> None:
    await setting.negotiate(minor)
    setting.names.absent = {(DIRECTORY, b"none")}
    setting.send(abi.LOOKUP, 9, DIRECTORY, b"none\0")
    reply = await setting.receive()
    assert abi.OUT_HEADER.unpack_from(reply) == (16 + abi.ENTRY_OUT_SIZE, 0, 9)
    assert valid_s(reply) == (valid, 0) and abi.NODEID.unpack_from(reply, 16) == (0,)
    assert setting.relay.lookups == {}


async def test_k1_attributes_that_we_changed_meanwhile_are_not_cached(setting: Setting) -> None:
    await setting.negotiate()
    setting.volume.leases = {FILE: READ_LEASE, DIRECTORY: READ_LEASE}
    setting.volume.changed_inodes = {FILE}
    answer = abi.ATTR_VALID.pack(1, 0) + bytes(4) + ATTR
    reply = await setting.pass_through(abi.GETATTR, FILE, bytes(88), answer)
    assert abi.ATTR_VALID.unpack_from(reply, 16)[0] == 0
    reply = await setting.pass_through(abi.LOOKUP, DIRECTORY, b"file\0", entry(FILE))
    assert valid_s(reply) == (CACHE_VALID_S, 0), "the name still leads to it"


async def test_opens_keep_pages_and_direct_ones_go_past_them(setting: Setting) -> None:
    always = abi.FOPEN_KEEP_CACHE | abi.FOPEN_PARALLEL_DIRECT_WRITES
    handles = []
    for flags, expected in [
        (os.O_RDWR, always),
        (os.O_RDONLY, always),
        (os.O_RDWR | os.O_DIRECT, always | abi.FOPEN_DIRECT_IO),
        (os.O_RDWR | os.O_APPEND, always | abi.FOPEN_DIRECT_IO),
    ]:
        reply = await setting.pass_through(
            abi.OPEN, FILE, abi.OPEN_IN.pack(flags, 0), abi.OPEN_OUT.pack(9, 0, 0)
        )
        handle, *rest = abi.OPEN_OUT.unpack_from(reply, 16)
        assert rest == [expected, 0]
        handles.append(handle)
    created = entry(FILE) + abi.OPEN_OUT.pack(9, 0, 0)
    reply = await setting.pass_through(abi.CREATE, DIRECTORY, abi.OPEN_IN.pack(os.O_RDWR, 0), created)
    handle, *rest = abi.OPEN_OUT.unpack_from(reply, 16 + abi.ENTRY_OUT_SIZE)
    assert rest == [always, 0]
    assert len({*handles, handle}) == len(handles) + 1, "each open file has its own"


async def test_the_kernel_keeps_a_listing_over_opens_until_its_lease_is_recalled(setting: Setting) -> None:
    async def open_flags() -> int:
        reply = await setting.pass_through(abi.OPENDIR, DIRECTORY, bytes(8), abi.OPEN_OUT.pack(4, 0, 0))
        return int(abi.OPEN_OUT.unpack_from(reply, 16)[1])

    async def list_it() -> None:
        await setting.pass_through(abi.READDIR, DIRECTORY, read_body(0, 4096), b"")

    keep = abi.FOPEN_CACHE_DIR | abi.FOPEN_KEEP_CACHE
    assert await open_flags() == 0
    setting.volume.leases = {DIRECTORY: READ_LEASE}
    assert await open_flags() == abi.FOPEN_CACHE_DIR
    await list_it()
    assert await open_flags() == keep
    setting.volume.recall(DIRECTORY)
    setting.volume.leases = {DIRECTORY: READ_LEASE}
    assert await open_flags() == abi.FOPEN_CACHE_DIR
    assert await open_flags() == keep
    setting.names.leased = False
    await list_it()
    assert await open_flags() == abi.FOPEN_CACHE_DIR


async def test_pyfuse3_is_asked_for_attributes_that_the_kernel_does_not_get(setting: Setting) -> None:
    setting.send(abi.READDIR, 3, DIRECTORY, read_body(0, 1 << 20))
    request = await setting.receive(setting.pyfuse3)
    assert abi.IN_HEADER.unpack_from(request)[1] == abi.READDIRPLUS
    assert abi.READ_IN.unpack_from(request, 40)[2] == 128 * 1024
    dirent = abi.DIRENT.pack(FILE, 1, 4, 8) + b"file" + bytes(4)
    setting.answer(3, entry(FILE) + dirent)
    assert await setting.receive() == abi.OUT_HEADER.pack(16 + len(dirent), 0, 3) + dirent
    assert setting.relay.lookups == {}


async def test_forgets_reach_the_table_when_the_last_lookup_is_gone(setting: Setting) -> None:
    for _ in range(3):
        await setting.pass_through(abi.LOOKUP, DIRECTORY, b"file\0", entry(FILE))
    setting.send(abi.FORGET, 0, FILE, abi.FORGET_IN.pack(2))
    rows = abi.FORGET_ONE.pack(FILE, 1) + abi.FORGET_ONE.pack(77, 1)
    setting.send(abi.BATCH_FORGET, 0, 0, abi.BATCH_FORGET_IN.pack(2, 0) + rows)
    assert await setting.ask(abi.FLUSH, FILE) == 0
    assert setting.volume.forgotten == [FILE]
    assert setting.relay.lookups == {}


async def test_errors_pass_and_malformed_replies_become_eio(setting: Setting) -> None:
    reply = await setting.pass_through(abi.LOOKUP, DIRECTORY, b"x\0", b"", errno.EACCES)
    assert abi.OUT_HEADER.unpack(reply) == (16, -errno.EACCES, 8)
    for opcode in (abi.LOOKUP, abi.GETATTR, abi.OPEN, abi.OPENDIR, abi.CREATE):
        reply = await setting.pass_through(opcode, FILE, b"file\0\0\0\0", b"abc")
        assert abi.OUT_HEADER.unpack(reply) == (16, -errno.EIO, 8)
    reply = await setting.pass_through(abi.READDIR, DIRECTORY, read_body(0, 4096), bytes(100))
    assert abi.OUT_HEADER.unpack(reply) == (16, -errno.EIO, 8)
    assert setting.relay.lookups == {}


async def test_requests_wait_in_order_while_pyfuse3_takes_none(setting: Setting) -> None:
    setting.relay._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    for unique in range(200):
        setting.send(abi.LOOKUP, unique, DIRECTORY, b"n" * 200 + b"\0")
    while not setting.relay._unsent:
        await trio.lowlevel.checkpoint()
    for unique in range(200):
        assert abi.IN_HEADER.unpack_from(await setting.receive(setting.pyfuse3))[2] == unique


async def test_the_end_of_pyfuse3_is_reported(setting: Setting) -> None:
    setting.pyfuse3.close()
    while not setting.failures:
        await trio.lowlevel.checkpoint()
    assert "pyfuse3" in str(setting.failures[0])


async def test_an_unmounted_device_ends_the_session(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unmounted(*_: object) -> int:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(os, "readv", unmounted)
    setting.send(abi.READ, 1, FILE, read_body(0, 1))
    with trio.fail_after(60):
        await setting.channel.ended.wait()


class Replays:
    def __init__(self) -> None:
        self.under_way: list[int] = []
        self.all_resent = False
        self.refused: list[int] = []

    def refuses(self, ino: int) -> bool:
        return ino in self.refused

    def replay_begins(self, ino: int, unique: int) -> None:
        self.under_way.append(ino)

    def replay_ends(self, ino: int, unique: int) -> None:
        self.under_way.remove(ino)

    def resent(self) -> None:
        self.all_resent = True


async def test_what_the_kernel_asks_anew_comes_first_and_is_counted_until_it_is_answered(
    setting: Setting, nursery: trio.Nursery
) -> None:
    going = trio.Event()

    async def write(*_: object, **__: object) -> None:
        await going.wait()

    setting.volume.write_nowait = lambda *_: False  # type: ignore[method-assign]
    setting.volume.write = write  # type: ignore[method-assign,assignment]
    setting.engine.unregister(setting.channel._fd)
    replays = Replays()
    setting.send(abi.WRITE, UNIQUE_RESENT | 10, FILE, write_body(0, b"again"))
    setting.send(abi.READ, UNIQUE_RESENT | 12, FILE, read_body(0, 5))
    setting.channel.take_over(nursery, replays)
    assert await setting.receive() == abi.pack_resend()
    reply = await setting.receive()
    assert abi.OUT_HEADER.unpack_from(reply)[2] == UNIQUE_RESENT | 12 and reply[16:] == b"hello"
    with trio.fail_after(60):
        while not replays.all_resent:
            await trio.sleep(0.01)
    assert replays.under_way == [FILE]
    going.set()
    reply = await setting.receive()
    assert abi.WRITE_REPLY.unpack(reply)[2:4] == (UNIQUE_RESENT | 10, 5)
    assert not replays.under_way
    assert await setting.ask(abi.IOCTL, FILE, bytes(32)) == errno.ENOTTY  # and everything goes on


async def test_a_write_that_comes_again_is_not_repeated_where_another_node_has_written_since(
    setting: Setting, nursery: trio.Nursery
) -> None:
    setting.engine.unregister(setting.channel._fd)
    replays = Replays()
    replays.refused = [FILE]
    setting.send(abi.WRITE, UNIQUE_RESENT | 10, FILE, write_body(0, b"again"))
    setting.send(abi.READ, UNIQUE_RESENT | 12, FILE, read_body(0, 5))
    setting.channel.take_over(nursery, replays)
    assert await setting.receive() == abi.pack_resend()
    assert await setting.receive_error() == (UNIQUE_RESENT | 10, errno.EIO)
    assert (await setting.receive())[16:] == b"hello"
    setting.send(abi.WRITE, 14, FILE, write_body(0, b"fresh"))
    assert abi.WRITE_REPLY.unpack(await setting.receive())[2:4] == (14, 5)


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_mount_that_was_evicted_answers_nothing_and_leaves_all_to_the_next(setting: Setting, at_once: bool) -> None:
    """An error would reach the program; and what was noted of an append must be found by the next process."""

    async def write(*_: object, **__: object) -> None:
        setting.channel._journal.place(5)
        raise Fenced("evicted")

    def write_nowait(ino: int, offset: int, data: memoryview, flags: int, done: Callable) -> bool:
        if at_once:
            done(Fenced("evicted"))
        return at_once

    async def statfs(ino: int) -> dict[str, int]:
        raise Fenced("evicted")

    answered: list[str] = []
    setting.volume.ended = lambda: answered.append("write")  # type: ignore[method-assign]
    setting.volume.write, setting.volume.write_nowait = write, write_nowait  # type: ignore[method-assign,assignment]
    setting.volume.statfs = statfs  # type: ignore[method-assign]
    setting.send(abi.WRITE, 10, FILE, write_body(0, b"never"))
    setting.send(abi.STATFS, 12, DIRECTORY)
    setting.send(abi.READ, 14, FILE, read_body(0, 5))
    reply = await setting.receive()
    assert abi.OUT_HEADER.unpack_from(reply)[2] == 14
    for _ in range(50):
        await trio.lowlevel.checkpoint()
    with pytest.raises(BlockingIOError):
        setting.kernel.recv(100)
    assert answered == [], "the kernel keeps the pages of the WRITE locked"
    assert at_once or RequestJournal(setting.channel._journal._words)._old  # the next process finds where it was going


async def test_an_open_file_that_is_barred_answers_estale_until_it_is_closed(setting: Setting) -> None:
    barred, new = setting.channel._barred, 100
    barred.bar(FILE, 2, first_new=new)

    def through(handle: int, body: bytes) -> bytes:
        return abi.NODEID.pack(handle) + body[8:]

    requests = {
        abi.READ: read_body(0, 5),
        abi.WRITE: write_body(0, b"later"),
        abi.FSYNC: abi.FSYNC_IN.pack(0, 0, 0),
        abi.FALLOCATE: abi.FALLOCATE_IN.pack(0, 0, 4096, 0, 0),
        abi.SETLK: abi.LK_IN.pack(0, 1, 0, 9, 1, 7, 0, 0),
    }
    for opcode, body in requests.items():
        assert await setting.ask(opcode, FILE, through(7, body)) == errno.ESTALE, opcode
    truncate = bytearray(abi.SETATTR_IN.size)
    truncate[0:4], truncate[8:16] = abi.U32.pack(1 << 3 | 1 << 6), abi.NODEID.pack(7)
    assert await setting.ask(abi.SETATTR, FILE, bytes(truncate)) == errno.ESTALE
    mapped = abi.WRITE_IN.pack(new, 0, 5, abi.WRITE_CACHE, 0, 0, 0) + b"later"
    assert await setting.ask(abi.WRITE, FILE, mapped) == errno.ESTALE  # nobody knows who dirtied it
    setting.send(abi.READ, 8, FILE, through(new, read_body(0, 5)))
    assert (await setting.receive())[16:] == b"hello"  # opened since
    assert bytes(setting.volume.inodes[FILE].data) == b"hello"
    for left in (1, 0):
        assert await setting.ask(abi.RELEASE, FILE, abi.RELEASE_IN.pack(7, os.O_RDWR, 0, 0)) == 0
        assert barred.opens.get(FILE, 0) == left
    setting.send(abi.WRITE, 9, FILE, mapped)
    assert abi.WRITE_REPLY.unpack(await setting.receive())[2:4] == (9, 5)


async def test_a_new_request_says_that_the_kernel_has_asked_all_anew(setting: Setting, nursery: trio.Nursery) -> None:
    setting.engine.unregister(setting.channel._fd)
    replays = Replays()
    setting.send(abi.READ, 14, FILE, read_body(0, 5))
    setting.channel.take_over(nursery, replays)
    await setting.receive()
    assert (await setting.receive())[16:] == b"hello" and replays.all_resent


async def test_where_nothing_was_unanswered_nobody_waits_for_it(setting: Setting, nursery: trio.Nursery) -> None:
    setting.engine.unregister(setting.channel._fd)
    replays = Replays()
    setting.channel.take_over(nursery, replays)
    assert replays.all_resent


class Locker:
    """A coordinator with whom another program has the lock: who asks waits until that is broken off."""

    def __init__(self) -> None:
        self.asked, self.cancelled = trio.Event(), trio.Event()

    async def call(self, name: str, args: dict[str, Any]) -> Any:
        if name == "lock_cancel":
            self.cancelled.set()
        else:
            self.asked.set()
            await self.cancelled.wait()
        return {"granted": False}


async def test_a_program_that_waits_for_a_lock_is_interrupted_by_a_signal_also_where_the_mount_was_taken_over(
    setting: Setting, nursery: trio.Nursery
) -> None:
    setting.engine.unregister(setting.channel._fd)
    locker = Locker()
    setting.channel._locks = FileLocks(locker)
    setting.channel._handlers = setting.channel._make_handlers()
    setting.channel.take_over(nursery, Replays())
    assert await setting.receive() == abi.pack_resend()
    setting.send(abi.SETLKW, 20, FILE, abi.LK_IN.pack(1, 2, 0, 9, fcntl.F_WRLCK, 42, 0, 0))
    await locker.asked.wait()
    setting.send(abi.INTERRUPT, 21, 0, abi.INTERRUPT_IN.pack(20))
    with trio.fail_after(60):
        assert await setting.receive_error() == (20, errno.EINTR)


async def test_I11_a_name_that_is_made_again_for_the_next_process_is_a_call_of_the_same_number(
    setting: Setting, nursery: trio.Nursery
) -> None:
    """The numbers are asked for by the session; here: that each request knows its own while it is served."""
    seen: list[int] = []

    async def fsync(ino: int) -> None:
        seen.append(current_request.get())

    setting.volume.fsync = fsync  # type: ignore[method-assign]
    assert await setting.ask(abi.FSYNC, FILE, bytes(16)) == 0
    setting.send(abi.FSYNC, UNIQUE_RESENT | 7, FILE, bytes(16))
    await setting.receive_error()
    assert seen == [7, 7]


async def test_I11_a_request_that_is_cancelled_is_found_by_the_next_process_and_an_answered_one_is_not(
    setting: Setting,
) -> None:
    """A bug in one task ends a mount by cancelling all others: the kernel asks the next process for what they did."""
    words = memoryview(bytearray(8 * request_journal.WORDS)).cast("Q")
    journal = setting.channel._journal = RequestJournal(words)
    numbered: list[int] = []

    async def fsync(ino: int) -> None:
        numbered.append(journal.number("unlink")[0])
        if len(numbered) == 2:
            await trio.sleep_forever()

    setting.volume.fsync = fsync  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        setting.channel._nursery = nursery
        setting.send(abi.FSYNC, 10, FILE, bytes(16))
        assert await setting.receive_error() == (10, 0)
        setting.send(abi.FSYNC, 12, FILE, bytes(16))
        with trio.fail_after(60):
            while len(numbered) < 2:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    successor = RequestJournal(words)
    for request, was_asked in ((10, False), (12, True)):
        successor.begin(request)
        token = current_request.set(request)
        op, again = successor.number("unlink")
        current_request.reset(token)
        assert again == was_asked and (op == numbered[1]) == was_asked
