"""A real FUSE mount of a volume in memory: what ordinary programs do, and what the kernel may cache."""

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import stat
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import pyfuse3
import pytest
import trio

from csvfs.errors import Corrupt
from csvfs.mount import device
from csvfs.mount.channel import Channel
from csvfs.mount.direct import Direct
from csvfs.mount.file_locks import FileLocks
from csvfs.mount.holes import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from csvfs.mount.notify import KernelNotifier
from csvfs.mount.operations import VolumeOperations
from csvfs.mount.relay import PYFUSE3_TASKS_MAX, Relay
from csvfs.net.engine import Engine
from tests.memory_volume import MemoryVolume

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"
    ),
]

T = TypeVar("T")
F_OFD_SETLK = 37  # fcntl(2): of an open file, not of a process


class Mount:
    """A mounted volume in memory; `do` runs a program's system calls in a thread beside it."""

    def __init__(self, path: Path, volume: MemoryVolume, channel: Channel, relay: Relay, fd: int) -> None:
        self.path = path
        self.volume = volume
        self.channel = channel
        self.relay = relay
        self.notifier = KernelNotifier(fd)

    async def do(self, function: Callable[[], T]) -> T:
        with trio.fail_after(400):
            return await trio.to_thread.run_sync(function)

    async def run(self, *command: str, user: int = 0) -> str:
        def run() -> str:
            # Not by `cwd=`: between vfork and exec this process cannot answer the child's chdir into the
            # mount.
            there = ["env", "-C", str(self.path)]
            there += ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
            done = subprocess.run([*there, *command], capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
            return done.stdout

        return await self.do(run)


@contextlib.asynccontextmanager
async def mounted(path: Path) -> AsyncIterator[Mount]:
    volume = MemoryVolume()
    engine = Engine()
    fd = device.open_device()
    device.mount(fd, path, "Memory1")
    try:
        operations = VolumeOperations(volume, volume)
        async with trio.open_nursery() as nursery:
            relay = Relay(
                engine, fd, volume, operations, on_failure=lambda _error: nursery.cancel_scope.cancel()
            )
            direct, locks = Direct(operations, relay), FileLocks(volume)
            channel = Channel(engine, fd, volume, operations, relay, direct, locks=locks)
            pyfuse3.init(operations, relay.pyfuse3_mount_point(), set())
            nursery.start_soon(engine.run_forever)
            nursery.start_soon(pyfuse3.main, 1, PYFUSE3_TASKS_MAX)
            channel.start(nursery)
            mount = Mount(path, volume, channel, relay, fd)
            try:
                await mount.do(lambda: os.stat(path))  # INIT is through
                yield mount
            finally:
                with trio.move_on_after(30, shield=True):
                    if await trio.to_thread.run_sync(device.unmount, path):
                        await channel.ended.wait()
                nursery.cancel_scope.cancel()
        mount.notifier.close()
        relay.close()
        pyfuse3.close(unmount=False)
    finally:
        device.abort(path)
        os.close(fd)
        engine.close()


@pytest.fixture
async def mount(tmp_path: Path) -> AsyncIterator[Mount]:
    (tmp_path / "volume").mkdir()
    async with mounted(tmp_path / "volume") as mount:
        yield mount


@pytest.fixture
def path(mount: Mount) -> Path:
    return mount.path


async def test_it_is_mounted_as_csvfs_with_the_volume_as_its_source(mount: Mount) -> None:
    line = next(line for line in Path("/proc/mounts").read_text().splitlines() if str(mount.path) in line)
    assert line.split()[0] == "Memory1"
    assert line.split()[2] == "fuse.csvfs"


async def test_what_is_written_is_read_back_through_the_page_cache_and_around_it(mount: Mount) -> None:
    def program() -> None:
        file = mount.path / "disk"
        content = os.urandom(3_000_000)
        file.write_bytes(content)
        assert file.read_bytes() == content
        assert bytes(mount.volume.inodes[2].data) == content
        buffer = mmap.mmap(-1, 1 << 20)
        direct = os.open(file, os.O_RDWR | os.O_DIRECT)
        assert os.preadv(direct, [buffer], 4096) == 1 << 20
        assert buffer[:] == content[4096 : 4096 + (1 << 20)]
        buffer[:4096] = b"d" * 4096
        assert os.pwritev(direct, [memoryview(buffer)[:4096]], 8192) == 4096
        os.close(direct)
        assert file.read_bytes() == content[:8192] + b"d" * 4096 + content[12288:]

    await mount.do(program)


async def test_slow_reads_and_writes_give_the_same_as_inline_ones(mount: Mount) -> None:
    mount.volume.nowait = False

    def program() -> None:
        content = os.urandom(2_500_001)
        (mount.path / "disk").write_bytes(content)
        assert bytes(mount.volume.inodes[2].data) == content
        direct = os.open(mount.path / "disk", os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, 4 << 20)
        assert os.preadv(direct, [buffer], 0) == len(content)
        assert buffer[: len(content)] == content
        os.close(direct)

    await mount.do(program)
    assert mount.channel.inline_count == 0


async def test_truncate_extends_with_zeros_and_cuts(mount: Mount) -> None:
    def program() -> None:
        file = mount.path / "f"
        file.write_bytes(b"abcdef")
        os.truncate(file, 3)
        os.truncate(file, 10_000)
        assert file.read_bytes() == b"abc" + bytes(9_997)
        file.open("w").close()
        assert file.stat().st_size == 0

    await mount.do(program)


async def test_space_is_reserved_punched_zeroed_and_looked_for(mount: Mount) -> None:
    def program() -> None:
        path = mount.path / "f"
        path.write_bytes(b"x" * 10_000)
        for mode, offset, length in (((0), 9_000, 3_000), (KEEP_SIZE, 0, 99_999), (PUNCH_HOLE | KEEP_SIZE, 100, 200),
                                     (ZERO_RANGE, 11_000, 5_000)):  # fmt: skip
            subprocess.run(["fallocate", "-o", str(offset), "-l", str(length), *_flags(mode), path], check=True)
        want = bytearray(b"x" * 10_000 + bytes(6_000))
        want[100:300] = bytes(200)
        with path.open("rb") as file:
            assert os.lseek(file.fileno(), 5, os.SEEK_DATA) == 5
            assert os.lseek(file.fileno(), 5, os.SEEK_HOLE) == 16_000
            with pytest.raises(OSError, match="No such device or address"):
                os.lseek(file.fileno(), 16_000, os.SEEK_DATA)
        assert path.read_bytes() == want

    await mount.do(program)


def _flags(mode: int) -> list[str]:
    names = {KEEP_SIZE: "--keep-size", PUNCH_HOLE: "--punch-hole", ZERO_RANGE: "--zero-range"}
    return [name for bit, name in names.items() if mode & bit]


async def test_names_are_made_renamed_linked_exchanged_and_removed(mount: Mount) -> None:
    def program() -> None:
        root = mount.path
        (root / "d").mkdir(mode=0o750)
        (root / "d" / "a").write_bytes(b"A")
        os.link(root / "d" / "a", root / "b")
        assert (root / "b").stat().st_nlink == 2
        assert (root / "b").stat().st_ino == (root / "d" / "a").stat().st_ino
        os.symlink("d/a", root / "s")
        assert os.readlink(root / "s") == "d/a"
        assert (root / "s").read_bytes() == b"A"
        os.rename(root / "d" / "a", root / "c")
        assert not (root / "s").exists()
        (root / "e").write_bytes(b"E")
        os.rename(root / "e", root / "c")
        assert (root / "c").read_bytes() == b"E"
        assert (root / "b").stat().st_nlink == 1
        assert sorted(os.listdir(root)) == ["b", "c", "d", "s"]
        with pytest.raises(OSError) as caught:
            os.rmdir(root)
        assert caught.value.errno == errno.EBUSY
        (root / "d" / "x").write_bytes(b"")
        with pytest.raises(OSError) as caught:
            os.rmdir(root / "d")
        assert caught.value.errno == errno.ENOTEMPTY
        (root / "d" / "x").unlink()
        os.rmdir(root / "d")
        with pytest.raises(FileNotFoundError):
            (root / "d").stat()
        (root / "d").write_bytes(b"now a file")  # the cached absence was ours to end
        assert (root / "d").read_bytes() == b"now a file"

    await mount.do(program)


async def test_rename_keeps_its_flags(mount: Mount) -> None:
    import ctypes

    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2

    def program() -> None:
        one, two = (os.fsencode(mount.path / name) for name in ("one", "two"))
        Path(os.fsdecode(one)).write_bytes(b"1")
        Path(os.fsdecode(two)).write_bytes(b"2")
        assert renameat2(-100, one, -100, two, 1) == -1 and ctypes.get_errno() == errno.EEXIST
        assert renameat2(-100, one, -100, two, 2) == 0
        assert Path(os.fsdecode(one)).read_bytes() == b"2"
        assert Path(os.fsdecode(two)).read_bytes() == b"1"

    await mount.do(program)


async def test_an_unlinked_open_file_lives_until_it_is_closed(mount: Mount) -> None:
    def program() -> None:
        fd = os.open(mount.path / "f", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"still here")
        os.unlink(mount.path / "f")
        assert os.pread(fd, 100, 0) == b"still here"
        assert os.fstat(fd).st_nlink == 0
        os.close(fd)

    await mount.do(program)
    await wait_until(lambda: 2 not in mount.volume.inodes)


async def wait_until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.01)


async def test_a_directory_of_5000_names_is_listed_whole_each_time(mount: Mount) -> None:
    def program() -> None:
        names = {f"file-{number:05d}-{'x' * (number % 50)}" for number in range(5000)}
        for name in names:
            mount.volume.call_make(1, name.encode(), stat.S_IFREG | 0o644, 0, 0, 0, None)
        for _ in range(2):
            listed = os.listdir(mount.path)
            assert len(listed) == 5000
            assert set(listed) == names
        dots = subprocess.run(["ls", "-fi", mount.path], capture_output=True, check=True).stdout.split()
        assert dots[1:4:2] == [b".", b".."] and len(dots) == 2 * 5002
        with os.scandir(mount.path) as entries:
            assert all(entry.stat().st_ino == entry.inode() for entry in entries)
        for name in sorted(names)[::2]:
            os.unlink(mount.path / name)
        assert set(os.listdir(mount.path)) == set(sorted(names)[1::2])

    await mount.do(program)


async def test_modes_owners_and_times_are_kept(mount: Mount) -> None:
    def program() -> None:
        file = mount.path / "f"
        file.write_bytes(b"x")
        os.chmod(file, 0o4711)
        os.chown(file, 1234, 5678)
        status = file.stat()
        assert (status.st_uid, status.st_gid) == (1234, 5678)
        assert stat.S_IMODE(status.st_mode) == 0o711  # a change of owner takes the set-uid bit
        os.utime(file, ns=(1_234_567_890_123_456_789, 987_654_321_987_654_321))
        status = file.stat()
        assert (status.st_atime_ns, status.st_mtime_ns) == (
            1_234_567_890_123_456_789,
            987_654_321_987_654_321,
        )
        before = time.time_ns()
        os.utime(file)
        assert before - 10**7 <= file.stat().st_mtime_ns <= time.time_ns()
        old = os.umask(0o027)
        try:
            (mount.path / "g").touch(mode=0o666)
        finally:
            os.umask(old)
        assert stat.S_IMODE((mount.path / "g").stat().st_mode) == 0o640

    await mount.do(program)


async def test_a_write_by_another_user_takes_the_set_uid_bit(mount: Mount) -> None:
    file = mount.path / "f"
    await mount.do(lambda: file.write_bytes(b"x"))
    await mount.do(lambda: os.chmod(file, 0o6777))
    await mount.run("sh", "-c", "echo y >> f", user=1000)
    assert stat.S_IMODE((await mount.do(file.stat)).st_mode) == 0o777


@pytest.mark.parametrize("nowait", [True, False])
async def test_a_direct_write_by_another_user_takes_set_uid_and_set_gid_and_one_by_root_does_not(
    mount: Mount, nowait: bool
) -> None:
    mount.volume.nowait = nowait
    file = mount.path / "f"
    await mount.do(lambda: file.write_bytes(bytes(4096)))
    direct = ("dd", "if=/dev/zero", "of=f", "bs=4096", "count=1", "conv=notrunc", "oflag=direct")
    await mount.do(lambda: os.chmod(file, 0o6777))
    await mount.run(*direct)
    assert stat.S_IMODE((await mount.do(file.stat)).st_mode) == 0o6777
    await mount.run(*direct, user=1000)
    assert stat.S_IMODE((await mount.do(file.stat)).st_mode) == 0o777


async def test_modes_are_enforced_and_new_files_belong_to_their_maker(mount: Mount) -> None:
    await mount.do(lambda: os.chmod(mount.path, 0o777))
    await mount.run("sh", "-c", "touch mine; mkdir closed; chmod 700 closed", user=1000)
    status = await mount.do((mount.path / "mine").stat)
    assert (status.st_uid, status.st_gid) == (1000, 1000)
    with pytest.raises(AssertionError, match="Permission denied"):
        await mount.run("ls", "closed", user=2000)


async def test_a_set_gid_directory_gives_its_group_on(mount: Mount) -> None:
    def program() -> None:
        (mount.path / "d").mkdir()
        os.chown(mount.path / "d", 0, 77)
        os.chmod(mount.path / "d", 0o2775)
        (mount.path / "d" / "sub").mkdir()
        status = (mount.path / "d" / "sub").stat()
        assert status.st_gid == 77
        assert status.st_mode & stat.S_ISGID

    await mount.do(program)


async def test_extended_attributes_follow_create_and_replace(mount: Mount) -> None:
    def program() -> None:
        file = mount.path / "f"
        file.write_bytes(b"")
        os.setxattr(file, "user.a", b"1", os.XATTR_CREATE)
        with pytest.raises(FileExistsError):
            os.setxattr(file, "user.a", b"2", os.XATTR_CREATE)
        os.setxattr(file, "user.a", b"3" * 4000, os.XATTR_REPLACE)
        os.setxattr(file, "user.empty", b"")
        assert os.getxattr(file, "user.a") == b"3" * 4000
        assert os.getxattr(file, "user.empty") == b""
        assert os.listxattr(file) == ["user.a", "user.empty"]
        os.removexattr(file, "user.a")
        for missing in (
            lambda: os.getxattr(file, "user.a"),
            lambda: os.setxattr(file, "user.a", b"4", os.XATTR_REPLACE),
            lambda: os.removexattr(file, "user.a"),
            lambda: os.getxattr(file, "security.capability"),
        ):
            with pytest.raises(OSError) as caught:
                missing()
            assert caught.value.errno == errno.ENODATA
        with pytest.raises(OSError) as caught:
            os.setxattr(file, "security.capability", b"\1\0\0\2" + bytes(16))
        assert caught.value.errno == errno.EOPNOTSUPP

    await mount.do(program)
    assert mount.volume.calls.count("setxattr") == 5


async def test_special_files_are_made(mount: Mount) -> None:
    def program() -> None:
        os.mkfifo(mount.path / "fifo", 0o600)
        os.mknod(mount.path / "disk", stat.S_IFBLK | 0o660, os.makedev(8, 17))
        assert stat.S_ISFIFO((mount.path / "fifo").stat().st_mode)
        status = (mount.path / "disk").stat()
        assert stat.S_ISBLK(status.st_mode)
        assert status.st_rdev == os.makedev(8, 17)

    await mount.do(program)


async def test_free_space_is_that_of_the_volume(mount: Mount) -> None:
    def program() -> None:
        (mount.path / "f").write_bytes(bytes(1 << 20))
        figures = os.statvfs(mount.path)
        assert figures.f_blocks * figures.f_frsize == 8 << 30
        assert figures.f_bavail * figures.f_frsize == (8 << 30) - (1 << 20)
        assert (figures.f_files, figures.f_ffree, figures.f_namemax) == (2, 1000, 255)

    await mount.do(program)


async def test_fsync_of_files_and_directories_is_answered(mount: Mount) -> None:
    def program() -> None:
        fd = os.open(mount.path / "f", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"x")
        os.fsync(fd)
        os.fdatasync(fd)
        os.close(fd)
        directory = os.open(mount.path, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    await mount.do(program)
    assert mount.volume.fsync_count == 1


MAPPING_PROGRAM = """
import mmap, os, pathlib
file = pathlib.Path("f")
file.write_bytes(b"a" * 10_000)
with file.open("r+b") as opened:
    with mmap.mmap(opened.fileno(), 0) as shared:
        shared[5000:5003] = b"mmm"
        shared.flush()
    with mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE) as private:
        private[0:3] = b"ppp"
        assert private[4998:5005] == b"aammmaa"
assert file.read_bytes() == b"a" * 5000 + b"mmm" + b"a" * 4997
direct = os.open(file, os.O_RDWR | os.O_DIRECT)
with mmap.mmap(direct, 0) as shared:
    assert shared[5000:5003] == b"mmm"
os.close(direct)
"""


async def test_mappings_shared_and_private(mount: Mount) -> None:
    # In a process of its own: a page fault holds the interpreter's lock, which we need to answer it.
    await mount.run(sys.executable, "-c", MAPPING_PROGRAM)
    assert mount.volume.inodes[2].data[5000:5003] == b"mmm"


async def test_appends_go_to_the_end(mount: Mount) -> None:
    def program() -> None:
        file = mount.path / "log"
        with file.open("ab") as first, file.open("ab", buffering=0) as second:
            for number in range(100):
                first.write(b"%03d" % number)
                first.flush()
                second.write(b"|")
        assert file.read_bytes() == b"".join(b"%03d|" % number for number in range(100))

    await mount.do(program)


async def test_locks_end_with_the_files_they_were_taken_through(mount: Mount) -> None:
    """fcntl locks at any close of the program, flock and OFD locks at the last close of their open file; read-only too."""
    name = mount.path / "f"

    def try_ofd(fd: int) -> None:
        fcntl.fcntl(fd, F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 1, 0))

    def program() -> None:
        name.write_bytes(b"x")
        one, two = os.open(name, os.O_RDONLY), os.open(name, os.O_RDWR)
        fcntl.lockf(one, fcntl.LOCK_SH, 10, 0)
        probe = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        ask = [sys.executable, "-c", "import fcntl, sys, struct; f = open(sys.argv[1], 'r+'); print(struct.unpack('hhqqi4x',"
               f" fcntl.fcntl(f, fcntl.F_GETLK, {probe!r})))", str(name)]  # fmt: skip

        def seen() -> tuple[int, ...]:
            # close_fds: between vfork and exec this process cannot answer the FLUSH of what the child closes.
            output = subprocess.run(ask, capture_output=True, text=True, timeout=120, check=True, close_fds=False).stdout
            return tuple(int(word) for word in output.strip("()\n").split(","))

        assert seen() == (fcntl.F_RDLCK, os.SEEK_SET, 0, 10, os.getpid())
        os.close(os.open(name, os.O_RDONLY))  # another open file of the same program
        assert seen()[0] == fcntl.F_UNLCK
        fcntl.flock(one, fcntl.LOCK_SH)
        same = os.dup(one)
        os.close(one)
        with pytest.raises(BlockingIOError):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(same)
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        three = os.open(name, os.O_RDWR)
        try_ofd(two)
        with pytest.raises(BlockingIOError):
            try_ofd(three)
        os.close(two)
        try_ofd(three)
        fcntl.flock(three, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(three)

    await mount.do(program)
    with trio.fail_after(60):  # the last close is told behind the program's back
        while any(mount.volume.locks.held.values()):
            await trio.sleep(0.01)


async def test_locks_and_preallocation_behave_as_on_a_file_system_without_the_latter(mount: Mount) -> None:
    def program() -> None:
        with (mount.path / "f").open("wb") as one, (mount.path / "f").open("wb") as two:
            fcntl.flock(one, fcntl.LOCK_EX)
            with pytest.raises(BlockingIOError):
                fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(one.fileno(), 0, 100_000)  # the C library falls back to writing zeros
            assert os.fstat(two.fileno()).st_size == 100_000
            assert os.lseek(two.fileno(), 0, os.SEEK_HOLE) == 100_000
        shutil.copyfile(mount.path / "f", mount.path / "g")
        assert (mount.path / "g").stat().st_size == 100_000
        with (mount.path / "f").open("rb") as source, (mount.path / "h").open("wb") as target:
            assert os.copy_file_range(source.fileno(), target.fileno(), 50_000) == 50_000

    await mount.do(program)


async def test_fio_verifies_what_it_wrote_at_random(mount: Mount) -> None:
    job = (
        "--name=v --filename=disk --size=4M --bs=4k-64k --rw=randwrite --verify=crc32c --output-format=terse"
    )
    await mount.run("fio", *job.split(), "--direct=1", "--ioengine=libaio", "--iodepth=16")
    await mount.run("fio", *job.split(), "--filename=buffered")


async def test_git_makes_a_repository_and_a_commit(mount: Mount) -> None:
    await mount.run("git", "init", "-q", "-b", "main", ".")
    await mount.do(lambda: (mount.path / "file").write_text("hello\n" * 1000))
    await mount.run("git", "add", "file")
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    await mount.run("git", *identity, "commit", "-q", "-m", "first")
    await mount.run("git", "fsck", "--strict")
    assert await mount.run("git", "status", "--porcelain") == ""


async def test_direct_writes_to_one_file_are_in_flight_together(mount: Mount) -> None:
    """Twenty writers of one file: the kernel hands us all twenty before the first is answered."""
    arrived: list[Callable[[Exception | None], None]] = []
    await mount.do(lambda: (mount.path / "f").write_bytes(bytes(20 * 4096)))

    def hold(ino: int, offset: int, data: memoryview, flags: int, done: Callable) -> bool:
        mount.volume._write(ino, offset, data, flags)
        arrived.append(done)
        if len(arrived) == 20:
            for answer in arrived:
                answer(None)
        return True

    mount.volume.write_nowait = hold  # type: ignore[method-assign,assignment]

    def write(number: int) -> None:
        buffer = mmap.mmap(-1, 4096)
        buffer[:] = bytes([number]) * 4096
        fd = os.open(mount.path / "f", os.O_WRONLY | os.O_DIRECT)
        os.pwritev(fd, [buffer], number * 4096)
        os.close(fd)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(trio.to_thread.run_sync, write, number)
    assert bytes(mount.volume.inodes[2].data[::4096]) == bytes(range(20))


async def test_a_typed_error_reaches_the_program_and_a_bug_becomes_eio(
    mount: Mount, caplog: pytest.LogCaptureFixture
) -> None:
    await mount.do(lambda: (mount.path / "f").write_bytes(b"x" * 5000))

    def fail(*_: object) -> bytes:
        raise Corrupt("slab 8: no copy matches its checksum")

    def read_direct() -> None:
        fd = os.open(mount.path / "f", os.O_RDONLY | os.O_DIRECT)
        try:
            os.preadv(fd, [mmap.mmap(-1, 4096)], 0)
        finally:
            os.close(fd)

    mount.volume.read_nowait = fail  # type: ignore[method-assign,assignment]
    with pytest.raises(OSError) as caught:
        await mount.do(read_direct)
    assert caught.value.errno == errno.EIO
    mount.volume.call_make = lambda **_: 1 / 0  # type: ignore[method-assign,assignment]
    with pytest.raises(OSError) as caught:
        await mount.do(lambda: (mount.path / "g").mkdir())
    assert caught.value.errno == errno.EIO
    assert "slab 8" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert await mount.do(lambda: os.listdir(mount.path)) == ["f"]  # the session goes on


async def test_under_leases_the_kernel_answers_names_and_attributes_by_itself(mount: Mount) -> None:
    def program() -> None:
        (mount.path / "d").mkdir()
        (mount.path / "d" / "f").write_bytes(b"x")
        for _ in range(10):
            (mount.path / "d" / "f").stat()
            assert not (mount.path / "d" / "absent").exists()

    await mount.do(program)
    assert mount.relay.can_cache_entries
    lookups_at_first = mount.volume.calls.count("lookup")
    await mount.do(program_stat_again(mount.path))
    assert mount.volume.calls.count("lookup") == lookups_at_first
    assert lookups_at_first <= 4


def program_stat_again(path: Path) -> Callable[[], None]:
    def program() -> None:
        (path / "d" / "f").stat()
        assert not (path / "d" / "absent").exists()

    return program


async def test_a_recall_takes_back_names_absences_attributes_and_pages(mount: Mount) -> None:
    """Another node writes f, makes g and removes h: after the recalls this node sees it at once."""
    volume, root = mount.volume, mount.path
    await mount.do(lambda: [(root / name).write_bytes(b"old") for name in "fh"])
    assert await mount.do(
        lambda: ((root / "f").read_bytes(), (root / "g").exists(), (root / "h").exists())
    ) == (
        b"old",
        False,
        True,
    )
    listed = await mount.do(lambda: os.listdir(root))
    assert listed == ["f", "h"]

    volume._write(2, 0, memoryview(b"newer"), 0)
    volume.call_make(1, b"g", stat.S_IFREG | 0o644, 0, 0, 0, None)
    volume.call_unlink(1, b"h", False)
    for ino in (1, 2):
        volume.recall(ino)
        mount.notifier.invalidate_attr(ino)
    mount.notifier.increment_epoch()
    await mount.notifier.invalidate_pages(2, 0, 0)

    def look() -> None:
        assert (root / "f").stat().st_size == 5
        assert (root / "f").read_bytes() == b"newer"
        assert (root / "g").exists()
        assert not (root / "h").exists()
        assert sorted(os.listdir(root)) == ["f", "g"]

    await mount.do(look)


async def test_what_was_recalled_while_its_answer_was_on_the_way_is_not_cached(mount: Mount) -> None:
    volume, root = mount.volume, mount.path
    await mount.do(lambda: (root / "f").write_bytes(b"x"))
    volume.recall(1)
    mount.notifier.increment_epoch()

    def recall_directory_before_the_reply(name: str, _args: dict) -> None:
        if name == "lookup":
            volume.recall(1)  # and then granted again by this reply, with an answer from before

    volume.before_reply = recall_directory_before_the_reply
    before = volume.calls.count("lookup")
    for _ in range(3):
        await mount.do(lambda: (root / "f").stat())
    assert volume.calls.count("lookup") == before + 3
    volume.before_reply = lambda _name, _args: None
    for _ in range(3):
        await mount.do(lambda: (root / "f").stat())
    assert volume.calls.count("lookup") == before + 4


async def test_a_name_made_by_another_node_meanwhile_is_opened_and_not_overwritten_unseen(
    mount: Mount,
) -> None:
    """Our kernel believes the name absent; open(O_CREAT) finds the other node's file, mode checked."""
    root, volume = mount.path, mount.volume
    await mount.do(lambda: os.chmod(root, 0o777))
    assert not await mount.do((root / "f").exists)
    volume.call_make(1, b"f", stat.S_IFREG | 0o644, 0, 0, 0, None)
    volume._write(2, 0, memoryview(b"theirs"), 0)
    with pytest.raises(AssertionError, match="Permission denied"):
        await mount.run("sh", "-c", "echo ours > f", user=1000)
    assert bytes(volume.inodes[2].data) == b"theirs"
    await mount.run("sh", "-c", "echo ours >> f")
    assert bytes(volume.inodes[2].data) == b"theirsours\n"


async def test_inodes_are_forgotten_when_the_kernel_lets_go_of_them(mount: Mount) -> None:
    def program() -> None:
        for number in range(50):
            (mount.path / f"f{number}").write_bytes(b"")
        with os.scandir(mount.path) as entries:
            assert sum(entry.stat().st_size for entry in entries) == 0
        for number in range(50):
            (mount.path / f"f{number}").unlink()

    await mount.do(program)
    await wait_until(lambda: set(range(2, 52)) <= set(mount.volume.forgotten))
    assert len(mount.volume.forgotten) == 50
    assert set(mount.relay.lookups) <= {1}
    assert list(mount.volume.inodes) == [1]


async def test_the_kernel_forgets_inodes_that_it_is_asked_to_forget_but_those_in_use(mount: Mount, path: Path) -> None:
    if mount.relay.minor < 45:
        pytest.skip("needs FUSE_NOTIFY_PRUNE, Linux 6.18")

    def make() -> int:
        for number in range(300):
            (path / f"f{number}").write_bytes(b"x" * 5000)
        return os.open(path / "f7", os.O_RDONLY)

    fd = await mount.do(make)
    try:
        known = list(mount.relay.lookups)
        assert len(known) == 300
        await mount.notifier.prune(known)
        with trio.fail_after(60):
            while len(mount.relay.lookups) > 1:
                await trio.sleep(0.01)
        assert await mount.do(lambda: os.fstat(fd).st_ino) in mount.relay.lookups
        assert await mount.do(lambda: [(path / f"f{number}").read_bytes() for number in range(300)]) == [b"x" * 5000] * 300
    finally:
        await mount.do(lambda: os.close(fd))
