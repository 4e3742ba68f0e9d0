"""Drives that hang: nobody waits for them for ever, and the others go on."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from csvfs.admin.child import Child, ChildPlan
from csvfs.block import drive_watch
from csvfs.block.drive import Drive
from csvfs.block.drive_faults import HANGS, IN_USE
from csvfs.block.formatting import format_drive
from csvfs.errors import DriveRefused
from csvfs.ids import DriveId, Incarnation, NodeName
from csvfs.units import BLOCK_SIZE, MIB
from tests.block_cluster import CLUSTER, POOL, SLAB, SLAB_SIZE, BlockCluster, write
from tests.hanging_files import FreezableFs, freezable_fs

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system and freezes it")

# Opens the drives as a drive server does, then writes to the first one: by a call, or into its mapping.
HOLDER = """
import os, sys
from csvfs.admin.child import Child, ChildPlan
from csvfs.block import drive_watch
from csvfs.block.drive import Drive
drives = [Drive.open(path) for path in sys.argv[2:]]
drives[0].flush()
print("open", flush=True)
sys.stdin.readline()
if sys.argv[1] == "call":
    os.pwrite(drives[0].fd, bytes(4096), drives[0].layout.metadata_offset)
else:
    drives[0]._tables._view[0] = 1
"""


def wait_until(condition, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"{what} has not come about"
        time.sleep(0.02)


def make_drive(path: Path, number: int) -> str:
    with path.open("wb") as file:
        file.truncate(96 * MIB)
    drive_id = DriveId(bytes([number]) * 16)
    format_drive(
        str(path), cluster_id=CLUSTER, pool_id=POOL, drive_id=drive_id, slab_size=SLAB_SIZE, node=NodeName("n1")
    )  # fmt: skip
    return str(path)


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return ""


@contextmanager
def killed_while_it_hangs(way: str, fs: FreezableFs, *paths: str) -> Iterator[int]:
    """A process that has the drives open, hangs in a write to the first one, and was killed."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, way, *paths], cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"open\n"
        fs.freeze()
        holder.stdin.write(b"\n")
        holder.stdin.flush()
        wait_until(lambda: state_of(holder.pid) == "D", "a write that hangs")
        for path in paths:
            with pytest.raises(DriveRefused, match="in use by another process") as refused:
                Drive.open(path)
            assert refused.value.fault == IN_USE  # as long as it is not killed, it may still go on
        os.kill(holder.pid, signal.SIGKILL)
        wait_until(lambda: state_of(holder.pid) == "D", "a process that cannot be killed")
        yield holder.pid
    finally:
        fs.thaw()
        holder.kill()
        holder.communicate(timeout=60)


@needs_root
@pytest.mark.parametrize("way", ["call", "mapping"])
def test_drives_of_a_killed_process_that_hangs_in_another_drive_are_taken_over(tmp_path: Path, way: str) -> None:
    with freezable_fs(tmp_path / "fs") as fs:
        hanging, well = make_drive(fs.folder / "a", 1), make_drive(tmp_path / "b", 2)
        with killed_while_it_hangs(way, fs, hanging, well):
            drive = Drive.open(well)
            assert drive.unclean and not drive.is_locked
            drive.flush()
            if way == "call":  # which may still be carried out
                with pytest.raises(DriveRefused, match="was killed, and its call still waits") as refused:
                    Drive.open(hanging)
                assert refused.value.fault == HANGS
            with pytest.raises(DriveRefused, match="in use by another process"):
                Drive.open(well)  # this process is not killed
        drive.lock_again()
        assert drive.is_locked
        drive.close()
        Drive.open(hanging).close()


# -- threads of a drive server that hang in a drive ----------------------------------------------------


class Hang:
    """A drive of which flushes, and reads of the medium itself, do not return."""

    def __init__(self, drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended = threading.Event()
        flush = drive.flush

        def hanging_flush() -> None:
            self.ended.wait()
            flush()

        def hanging_read(asked: Drive) -> None:
            if asked is drive:
                self.ended.wait()

        drive.flush = hanging_flush  # type: ignore[method-assign]
        monkeypatch.setattr(drive_watch, "ask_medium", hanging_read)
        monkeypatch.setattr(drive_watch, "ASK_AFTER_S", 0.0)


@pytest.fixture
async def cluster(tmp_path, nursery, monkeypatch):
    monkeypatch.setattr(drive_watch, "CHECK_INTERVAL_S", 0.02)
    monkeypatch.setattr(drive_watch, "RETRY_INTERVAL_S", 0.02)
    monkeypatch.setattr(drive_watch, "RETRY_S", 0.05)
    cluster = BlockCluster(tmp_path, nursery)
    for server in cluster.servers:
        server.hang_s = 0.5
    await cluster.start()
    yield cluster
    nursery.cancel_scope.cancel()


async def wait(condition) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.01)


async def test_a_drive_that_hangs_in_a_flush_is_given_up_and_comes_back_when_it_answers(cluster, monkeypatch):
    bus = cluster.bus("mount/n1")
    await write(bus, 0, b"1" * BLOCK_SIZE)
    server = cluster.servers[1]
    served = server.service.drives.by_id(server.drive_id)
    drive = served.drive
    hang = Hang(drive, monkeypatch)
    try:
        with trio.fail_after(60):
            await bus.flush([SLAB])  # the drive is dropped, the others have flushed
        assert [member.node for member in cluster.owner.descriptors[SLAB].in_sync] == ["n1", "n3"]
        await wait(lambda: server.reports[server.drive_id.hex()]["fault"] == HANGS)
        assert "has not answered for" in served.state
        await write(bus, 0, b"2" * BLOCK_SIZE)
        assert served.drive is drive  # a thread still waits in it: it is neither closed nor opened again
    finally:
        hang.ended.set()
    await wait(lambda: served.drive is not None and served.drive is not drive)
    await wait(lambda: server.reports[server.drive_id.hex()]["fault"] == "")
    assert await bus.read(SLAB, 0, 1) == b"2" * BLOCK_SIZE


async def test_reads_that_wait_for_a_drive_that_hangs_are_answered_and_take_no_thread_from_another(
    cluster, monkeypatch
):
    server = cluster.servers[1]
    service = server.service
    served = service.drives.by_id(server.drive_id)
    hang = Hang(served.drive, monkeypatch)
    began, ended = [], []

    def read() -> None:
        began.append(None)
        hang.ended.wait()

    async def ask() -> None:
        await service.in_thread_of(served, read)
        ended.append(served.drive.failure)

    token = served.latency.begin("read", trio.current_time())
    try:
        async with trio.open_nursery() as nursery:
            for _ in range(100):  # far more than there are threads
                nursery.start_soon(ask)
            await wait(lambda: len(began) == served.threads.total_tokens)
            assert await trio.to_thread.run_sync(int) == 0  # as another drive's reads would
        assert len(ended) == 100 and all("has not answered" in failure for failure in ended)
    finally:
        hang.ended.set()
    served.latency.end(token, trio.current_time())


# -- processes that hang -------------------------------------------------------------------------------

BEATS = """
import os, signal, sys, time
mode, log = sys.argv[1:]
with open(log, "a") as file:
    file.write(f"{os.getpid()}\\n")
if mode == "beats twice":
    for _ in range(2):
        os.write(int(os.environ["CSVFS_BEAT"]), b".")
        time.sleep(0.1)
if mode == "beats" :
    while True:
        os.write(int(os.environ["CSVFS_BEAT"]), b".")
        time.sleep(0.1)
time.sleep(1000)
"""


@contextmanager
def child(tmp_path: Path, mode: str, hang_s: float) -> Iterator[tuple[Child, Path]]:
    numbers = iter(range(1, 100))
    log = tmp_path / "pids"

    async def incarnation() -> Incarnation:
        return Incarnation(next(numbers))

    argv = [sys.executable, "-c", BEATS, mode, str(log)]
    yield Child(ChildPlan("drives", argv, lambda _: dict(os.environ), incarnation, tmp_path / "log", 0.1, hang_s)), log


def started(log: Path) -> int:
    return len(log.read_text().split()) if log.exists() else 0


async def test_a_process_whose_beats_end_is_killed_and_replaced(tmp_path, nursery):
    with child(tmp_path, "beats twice", hang_s=0.5) as (process, log):
        nursery.start_soon(process.keep_running)
        await wait(lambda: started(log) >= 3)
        await process.stop(grace_s=0)
    assert not any(Path(f"/proc/{pid}").exists() for pid in log.read_text().split())


@pytest.mark.parametrize("mode", ["beats", "never beats"])
async def test_a_process_that_beats_or_that_never_did_is_let_be(tmp_path, nursery, mode):
    with child(tmp_path, mode, hang_s=30) as (process, log):
        nursery.start_soon(process.keep_running)
        await wait(lambda: started(log) == 1)
        await trio.sleep(1.0)
        assert started(log) == 1
        await process.stop(grace_s=0)


WRITER = """
import os, sys, threading, time
target, log = sys.argv[1:]
def write():
    with open(target, "wb") as file:
        file.write(b"x" * 4096)
threading.Thread(target=write).start()
with open(log, "a") as file:
    file.write(f"{os.getpid()}\\n")
time.sleep(1000)
"""


def writer_hangs(pid: int) -> bool:
    """Whether the second thread of a WRITER waits in the kernel, and not only for a moment."""
    for _ in range(10):
        stats = [path / "stat" for path in Path(f"/proc/{pid}/task").glob("*") if path.name != str(pid)]
        if not any(stat.read_text().rpartition(")")[2].split()[0] == "D" for stat in stats):
            return False
        time.sleep(0.02)
    return True


@needs_root
async def test_a_killed_process_is_replaced_while_a_thread_of_it_hangs_in_the_kernel(tmp_path, nursery):
    """As of a mount that is killed while it takes pages back: that thread ends only when the mount does."""
    numbers, log = iter(range(1, 100)), tmp_path / "pids"

    async def incarnation() -> Incarnation:
        return Incarnation(next(numbers))

    with freezable_fs(tmp_path / "fs") as fs:
        fs.freeze()
        argv = [sys.executable, "-c", WRITER, str(fs.folder / "file"), str(log)]
        plan = ChildPlan("mount", argv, lambda _: dict(os.environ), incarnation, tmp_path / "log", 0.1, math.inf)
        process = Child(plan)
        nursery.start_soon(process.keep_running)
        await wait(lambda: started(log) == 1 and writer_hangs(process.pid))
        killed = process.pid
        os.kill(killed, signal.SIGKILL)
        await wait(lambda: started(log) == 2)
        assert process.pid != killed and writer_hangs(killed)
        fs.thaw()
        await process.stop(grace_s=0)
