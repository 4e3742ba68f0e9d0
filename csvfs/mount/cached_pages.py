"""Making the kernel forget the pages of a mount whose process is dead or stands still.

Place      mount floor; used by the mount itself at its end, and by its parent (admin/node_run.py).
Why        The kernel answers a read of a page that it has cached without asking anybody, also when the FUSE session is dead.
           A program that has a file open would go on reading, for ever, what was there when the mount died, while other nodes
           have got the leases and write (I5). What was open before is all that matters: nothing new can be opened in a dead
           session, and no page is filled in one that stands still.
How        Everybody's open files of that file system are found by /proc, each is duplicated (pidfd_getfd), and its pages are
           dropped (POSIX_FADV_DONTNEED), which asks the session nothing.
Limits     Pages that are mapped (mmap) stay: only a session that lives can take those back. So do those of a file that a
           process opens or sends away while it is looked at; the look is repeated until it finds nothing new.
"""

import ctypes
import logging
import os
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

SYS_PIDFD_GETFD = 438  # the same number on all architectures
ROUNDS_MAX = 3


def devices_at(point: Path) -> set[str]:
    """`major:minor` of everything that is mounted at `point`, in this process's mount namespace."""
    return {device for _, device, path in _mounts(Path("/proc/self/mountinfo")) if path == str(point)}


def forget_pages(devices: set[str]) -> int:
    """Drop the cached pages of all open files of these file systems; returns of how many. Blocks, for milliseconds.

    Never asks the file system. What cannot be looked at is logged: its program may read old pages.
    """
    seen: set[tuple[int, int]] = set()
    for _ in range(ROUNDS_MAX):
        found = set(_open_files(devices)) - seen if devices else set()
        if not found:
            break
        for pid, number in found:
            _forget(pid, number)
        seen |= found
    return len(seen)


def _mounts(mountinfo: Path) -> Iterator[tuple[str, str, str]]:
    """Number, device, mount point of each."""
    for line in mountinfo.read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if len(fields) > 4:
            yield fields[0], fields[2], fields[4]


def _open_files(devices: set[str]) -> Iterator[tuple[int, int]]:
    """Pid and descriptor of all of them."""
    of_namespace: dict[int, set[str]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        process = Path("/proc", entry)
        try:
            namespace = os.stat(process / "ns/mnt").st_ino
            if namespace not in of_namespace:
                of_namespace[namespace] = {
                    number for number, device, _ in _mounts(process / "mountinfo") if device in devices
                }
            for number in os.listdir(process / "fd") if of_namespace[namespace] else ():
                if _mount_of(process / "fdinfo" / number) in of_namespace[namespace]:
                    yield int(entry), int(number)
        except OSError:
            continue  # it ended while we looked


def _mount_of(fdinfo: Path) -> str:
    try:
        for line in fdinfo.read_text().splitlines():
            if line.startswith("mnt_id:"):
                return line.split()[1]
    except OSError:
        pass  # closed meanwhile
    return ""


def _forget(pid: int, number: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return  # it has ended
    try:
        copy = libc.syscall(SYS_PIDFD_GETFD, process, number, 0)
        if copy < 0:
            reason = os.strerror(ctypes.get_errno())
            log.warning("descriptor %d of process %d cannot be looked at: %s", number, pid, reason)
            return
        try:
            os.posix_fadvise(copy, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            pass  # a folder, or a device: it has no pages
        finally:
            os.close(copy)
    finally:
        os.close(process)
