"""Who uses a file or block device: mounts, swap, loop devices, processes; and how to be its one user.

Place      block floor, lowest. Only reads /proc and /sys, and locks.
Rule       what cannot be looked at (a process that ended, another's namespace) counts as not using it; the
           kernel's own O_EXCL and our flock are the last word.
Killed     A process that was killed while a drive hung waits in the kernel, and keeps all that it had open, locks
           included, also on drives that are well. It never runs again, so a drive may be taken over from it, unless
           it waits in a call on that very drive: this may still be carried out some day.
"""

import fcntl
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

from csvfs.block.drive_faults import HANGS, IN_USE, MISSING, fault_of_errno, faulty
from csvfs.errors import DriveRefused


def _same(a: os.stat_result, b: os.stat_result) -> bool:
    if stat.S_ISBLK(a.st_mode) and stat.S_ISBLK(b.st_mode):
        return a.st_rdev == b.st_rdev
    return stat.S_IFMT(a.st_mode) == stat.S_IFMT(b.st_mode) and (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


def _is(path: str, status: os.stat_result) -> bool:
    try:
        return _same(os.stat(path), status)
    except OSError:
        return False


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _unescape(text: str) -> str:
    """Of /proc/self/mountinfo and /proc/swaps: blanks and backslashes are octal."""
    return text.encode("latin-1", "replace").decode("unicode_escape") if "\\" in text else text


def device_numbers(status: os.stat_result) -> set[str]:
    """`major:minor` of a block device and of its partitions."""
    if not stat.S_ISBLK(status.st_mode):
        return set()
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    partitions = Path(f"/sys/dev/block/{number}").glob("*/partition")
    return {number} | {_read(partition.parent / "dev").strip() for partition in partitions}


def mounted_at(path: str) -> str | None:
    """Where a block device, or a partition of it, is mounted; for files ask their loop devices."""
    numbers = device_numbers(os.stat(path))
    for line in _read("/proc/self/mountinfo").splitlines():
        fields = line.split()
        if len(fields) > 4 and fields[2] in numbers:
            return _unescape(fields[4])
    return None


def swapped_on(path: str) -> bool:
    """Whether it is an active swap area."""
    status = os.stat(path)
    names = (_unescape(line.split()[0]) for line in _read("/proc/swaps").splitlines()[1:] if line.strip())
    return any(_is(name, status) for name in names)


def loop_devices(path: str) -> list[str]:
    """Loop devices that a file backs, e.g. `/dev/loop0`."""
    status = os.stat(path)
    found = []
    for backing in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        if _is(_read(backing).rstrip("\n"), status):
            found.append(f"/dev/{backing.parts[3]}")
    return found


def holders(path: str) -> list[str]:
    """Devices built on a block device or its partitions: RAID, LVM, LUKS, multipath."""
    found = set()
    for number in device_numbers(os.stat(path)):
        found |= {holder.name for holder in Path(f"/sys/dev/block/{number}/holders").glob("*")}
    return sorted(found)


def _processes() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def users(path: str) -> list[tuple[int, str]]:
    """(pid, name) of the other processes that have it open."""
    status = os.stat(path)
    found = []
    for pid in _processes():
        if pid == os.getpid():
            continue
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        mounts = _mounts_of(pid, status)
        if any(
            _may_be(pid, descriptor, status, mounts) and _is(f"/proc/{pid}/fd/{descriptor}", status)
            for descriptor in descriptors
        ):
            found.append((pid, _read(f"/proc/{pid}/comm").strip()))
    return found


def _mounts_of(pid: int, status: os.stat_result) -> dict[str, bool]:
    """The mounts that the process sees, by id, and whether they may hold the file; other FUSE mounts cannot: a look at
    what is open there asks whoever serves it, who may stand still for ever."""
    own = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    found = {}
    for line in _read(f"/proc/{pid}/mountinfo").splitlines():
        mount, _, source = line.partition(" - ")
        fields = mount.split()
        if len(fields) > 2:
            is_fuse = source.startswith("fuse")
            found[fields[0]] = not is_fuse or (fields[2] == own and not stat.S_ISBLK(status.st_mode))
    return found


def _may_be(pid: int, descriptor: str, status: os.stat_result, mounts: dict[str, bool]) -> bool:
    """Whether an open file may be the one of `status`, as far as can be said without asking who serves it."""
    fields = dict(line.split(":", 1) for line in _read(f"/proc/{pid}/fdinfo/{descriptor}").splitlines() if ":" in line)
    mount = fields.get("mnt_id", "").strip()
    if not mount or mount in mounts:
        return mounts.get(mount, True)
    # Its mount is unmounted already, and may be of a FUSE file system that stands still; a number tells files apart.
    return stat.S_ISBLK(status.st_mode) or fields.get("ino", "").strip() in ("", str(status.st_ino))


def describe_users(path: str) -> str:
    """` (pid 71, qemu)` for an error message; empty when nobody is found."""
    try:
        found = users(path)
    except OSError:
        return ""
    return f" ({', '.join(f'pid {pid}, {name}' for pid, name in found)})" if found else ""


def open_locked(path: str) -> int:
    """The one descriptor for reading and writing; the lock ends with it.

    Without a lock when only killed processes have it, that may not do anything to it any more: see try_lock.

    Raises   DriveRefused.
    """
    try:
        return _open_exclusively(path)
    except DriveRefused as refused:
        found = [] if refused.fault != IN_USE else threads_with(path)
        if not found or not all(is_killed(pid, thread) for pid, thread in found):
            raise
        for pid, thread in found:
            if waits_in_call_on(pid, thread, path):
                hanging = DriveRefused(
                    f"drive {path} does not answer: pid {pid} was killed, and its call still waits for it in the kernel"
                )
                raise faulty(hanging, HANGS) from None
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def try_lock(fd: int) -> bool:
    """Lock the file behind `fd` for its one user; True when it is locked by it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def threads_with(path: str) -> list[tuple[int, int]]:
    """(process, thread) of all that have it open, also those of a process whose main thread has ended. Looks at names
    alone: a look at a file that hangs would hang too."""
    wanted = os.path.realpath(path)
    found = []
    for pid in _processes():
        for thread in _numbers(f"/proc/{pid}/task"):
            if any(link == wanted for _, link in _links(pid, thread)):
                found.append((pid, thread))
    return found


def _numbers(folder: str) -> list[int]:
    try:
        return [int(name) for name in os.listdir(folder) if name.isdigit()]
    except OSError:
        return []


def _links(pid: int, thread: int) -> Iterator[tuple[int, str]]:
    """(descriptor, path) of all that a thread has open."""
    folder = f"/proc/{pid}/task/{thread}/fd"
    for descriptor in _numbers(folder):
        try:
            yield descriptor, os.readlink(f"{folder}/{descriptor}")
        except OSError:
            continue


def is_killed(pid: int, thread: int) -> bool:
    """Whether SIGKILL is on its way to it: it runs no instruction of its program any more."""
    for line in _read(f"/proc/{pid}/task/{thread}/status").splitlines():
        name, _, value = line.partition(":")
        if name in ("SigPnd", "ShdPnd") and int(value, 16) >> (signal.SIGKILL - 1) & 1:
            return True
    return False


def waits_in_call_on(pid: int, thread: int, path: str) -> bool:
    """Whether a thread waits in a system call on the file, or may: what cannot be looked at may.

    A page fault (-1) is none: the store behind it will not be done.
    """
    fields = _read(f"/proc/{pid}/task/{thread}/syscall").split()
    if len(fields) < 2:
        return True  # running, or not to be seen
    if fields[0] == "-1":
        return False
    number, wanted = int(fields[1], 16), os.path.realpath(path)
    return any(descriptor == number and link == wanted for descriptor, link in _links(pid, thread))


def _open_exclusively(path: str) -> int:
    try:
        exclusive = os.O_EXCL if is_block_device(path) else 0
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | exclusive)
    except FileNotFoundError:
        refused = DriveRefused(f"drive {path} is missing; attach it, or remove it from the pool")
        raise faulty(refused, MISSING) from None
    except OSError as error:
        refused = DriveRefused(f"drive {path} cannot be opened: {error.strerror}{describe_users(path)}")
        raise faulty(refused, fault_of_errno(error.errno)) from None
    if not try_lock(fd):
        os.close(fd)
        refused = DriveRefused(f"drive {path} is in use by another process{describe_users(path)}")
        raise faulty(refused, IN_USE) from None
    return fd


def is_block_device(path: str) -> bool:
    return stat.S_ISBLK(os.stat(path).st_mode)
