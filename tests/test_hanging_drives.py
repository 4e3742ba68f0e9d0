"""Drives that hang: nobody waits for them for ever, and the others go on."""

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

from csvfs.block.drive import Drive
from csvfs.block.drive_faults import HANGS, IN_USE
from csvfs.block.formatting import format_drive
from csvfs.errors import DriveFailed, DriveRefused
from csvfs.ids import DriveId, NodeName
from csvfs.units import MIB
from tests.block_cluster import CLUSTER, POOL, SLAB_SIZE
from tests.hanging_files import FreezableFs, freezable_fs

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system and freezes it")

# Opens the drives as a drive server does, then writes to the first one: by a call, or into its mapping.
HOLDER = """
import os, sys
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
        wait_until(lambda: "D" == state_of(holder.pid), "a process that cannot be killed")
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
