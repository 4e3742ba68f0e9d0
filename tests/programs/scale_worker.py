"""One step of tools/bench_scale, on a node: system calls by the hundred thousand, and how fast they went from tenth to tenth.

Place      tests, run as a program of its own by scale.py: `scale_worker.py STEP ARGUMENTS` (JSON). Imports nothing of csvfs.
Says       lines of JSON: {"done", "of"} once a second, at the end {"count", "seconds", "tenths": [seconds ...], ...} or
           {"error": ...}. `tenths`: how long each tenth of the operations took, mean of the processes.
Jobs       processes that share a step; each tells how far it is by a page of memory.
"""

import ctypes
import json
import mmap
import os
import random
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

FILES_PER_DIRECTORY = 1000  # of a tree
TENTHS = 10
BLOCK = 4096
LISTED_AT_A_TIME = 64 * 1024  # bytes of one getdents64(2)
_DIRENT = struct.Struct("<QqHB")
_SLOT = struct.Struct("<Q10d")  # done; when each tenth ended

Step = Callable[..., Iterator[Any]]


def path_of(root: str, number: int, tree: bool) -> str:
    if tree:
        return f"{root}/d{number // FILES_PER_DIRECTORY:06d}/f{number % FILES_PER_DIRECTORY:03d}"
    return f"{root}/e{number:07d}"


def numbers(count: int, job: int, jobs: int) -> Iterator[int]:
    """What one of `jobs` processes does: stretches of a directory's size, so that none shares a directory of a tree."""
    for first in range(job * FILES_PER_DIRECTORY, count, jobs * FILES_PER_DIRECTORY):
        yield from range(first, min(first + FILES_PER_DIRECTORY, count))


def sample(count: int, size: int, seed: int) -> list[int]:
    """Entries drawn by lot, each once."""
    return random.Random(seed).sample(range(count), min(size, count))


# -- steps: each yields once per operation ---------------------------------------------------------


def make(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def create(root: str, count: int, tree: bool, job: int, jobs: int) -> Iterator[None]:
    for number in numbers(count, job, jobs):
        if tree and number % FILES_PER_DIRECTORY == 0:
            os.mkdir(os.path.dirname(path_of(root, number, tree)))
        make(path_of(root, number, tree))
        yield


def create_more(root: str, count: int, tree: bool, job: int, jobs: int, size: int, seed: int) -> Iterator[None]:
    """Beside entries drawn by lot: of a tree, in many directories."""
    for number in sample(count, size, seed)[job::jobs]:
        make(path_of(root, number, tree) + "-more")
        yield


def unlink_more(root: str, count: int, tree: bool, job: int, jobs: int, size: int, seed: int) -> Iterator[None]:
    for number in sample(count, size, seed)[job::jobs]:
        os.unlink(path_of(root, number, tree) + "-more")
        yield


def lookup(root: str, count: int, tree: bool, job: int, jobs: int, size: int, seed: int) -> Iterator[None]:
    for number in sample(count, size, seed)[job::jobs]:
        os.stat(path_of(root, number, tree))
        yield


def lookup_absent(root: str, count: int, tree: bool, job: int, jobs: int, size: int, seed: int) -> Iterator[None]:
    for number in sample(count, size, seed)[job::jobs]:
        try:
            os.stat(path_of(root, number, tree) + "-absent")
        except FileNotFoundError:
            yield
            continue
        raise AssertionError(f"{number} with another name is there")


def rename(root: str, count: int, tree: bool, job: int, jobs: int, size: int, seed: int) -> Iterator[None]:
    """Each there and back."""
    for number in sample(count, size, seed)[job::jobs]:
        path = path_of(root, number, tree)
        os.rename(path, path + "-renamed")
        yield
        os.rename(path + "-renamed", path)
        yield


def unlink(root: str, count: int, tree: bool, job: int, jobs: int, size: int) -> Iterator[None]:
    """The first `size`; of a tree also the directories that are empty then."""
    for number in numbers(min(size, count), job, jobs):
        os.unlink(path_of(root, number, tree))
        if tree and (number + 1) % FILES_PER_DIRECTORY == 0:
            os.rmdir(os.path.dirname(path_of(root, number, tree)))
        yield


def listing(root: str, count: int, tree: bool, job: int, jobs: int) -> Iterator[None]:
    """Every entry once, and none that is not there."""
    seen = bytearray(count)
    directories = [""] if not tree else [f"/d{number:06d}" for number in range(-(-count // FILES_PER_DIRECTORY))]
    for index, directory in enumerate(directories):
        with os.scandir(root + directory) as entries:
            for entry in entries:
                if entry.name.endswith("-more"):
                    continue
                number = index * FILES_PER_DIRECTORY + int(entry.name[1:])
                assert not seen[number], f"{entry.name} twice"
                seen[number] = 1
                yield
    assert sum(seen) == count, f"{count - sum(seen)} of {count} entries are missing"


def raw_entries(fd: int) -> Iterator[tuple[str, int]]:
    """(name, where the next one is), as the kernel says, from where `fd` stands."""
    libc = ctypes.CDLL(None, use_errno=True)
    room = ctypes.create_string_buffer(LISTED_AT_A_TIME)
    while size := libc.getdents64(fd, room, len(room)):
        if size < 0:
            raise OSError(ctypes.get_errno(), "getdents64")
        at, data = 0, room.raw[:size]
        while at < size:
            _, following, length, _ = _DIRENT.unpack_from(data, at)
            yield data[at + _DIRENT.size : at + length].split(b"\0")[0].decode(), following
            at += length


def seeking(root: str, count: int, tree: bool, job: int, jobs: int) -> Iterator[None]:
    """List to the middle, remember the place; make names and take others away; go on from there by an open of its own.

    Every entry that is there all the time is seen exactly once.
    """
    seen: set[str] = set()
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    place = 0
    for name, following in raw_entries(fd):
        seen.add(name)
        place = following
        yield
        if len(seen) >= count // 2:
            break
    os.close(fd)
    gone = sample(count, min(100, count // 10), seed=7)
    for number in gone:
        os.unlink(path_of(root, number, tree=False))
        make(f"{root}/e{number:07d}-new")
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    os.lseek(fd, place, os.SEEK_SET)
    for name, _ in raw_entries(fd):
        assert name not in seen, f"{name} twice"
        seen.add(name)
        yield
    os.close(fd)
    missing = sum(f"e{number:07d}" not in seen for number in set(range(count)) - set(gone))
    assert not missing, f"{missing} entries were not seen"
    for number in gone:
        os.rename(f"{root}/e{number:07d}-new", path_of(root, number, tree=False))


# -- a sparse file ---------------------------------------------------------------------------------


def content(place: int) -> bytes:
    return struct.pack("<QQ", place, place ^ 0x9E3779B97F4A7C15) * (BLOCK // 16)


def places(count: int, size: int, seed: int) -> list[int]:
    """Blocks of a file of `size` bytes, in the order in which they are written: at random."""
    return random.Random(seed).sample(range(size // BLOCK), count)


def sparse_write(path: str, count: int, size: int, job: int, jobs: int, seed: int, written: int) -> Iterator[None]:
    """The first `written` of these places."""
    fd = os.open(path, os.O_RDWR)
    for place in places(count, size, seed)[:written][job::jobs]:
        assert os.pwrite(fd, content(place), place * BLOCK) == BLOCK
        yield
    os.fsync(fd)
    os.close(fd)


def sparse_read(path: str, count: int, size: int, job: int, jobs: int, seed: int, written: int) -> Iterator[None]:
    """What was written, and zeros at as many other places."""
    fd = os.open(path, os.O_RDONLY)
    drawn = places(count, size, seed)
    for place in drawn[:written][job::jobs]:
        assert os.pread(fd, BLOCK, place * BLOCK) == content(place), f"block {place} is not what was written there"
        yield
    for place in drawn[written : 2 * written][job::jobs]:
        assert os.pread(fd, BLOCK, place * BLOCK) == bytes(BLOCK), f"block {place} was never written, and is not zeros"
    os.close(fd)


def sparse_walk(path: str, count: int, size: int, job: int, jobs: int, seed: int, written: int) -> Iterator[None]:
    """`written` stretches of data by SEEK_DATA and SEEK_HOLE: each place that has space lies in one, and little else."""
    fd = os.open(path, os.O_RDONLY)
    wanted, at, index, data, turns = sorted(places(count, size, seed)), 0, 0, 0, 0
    while index < len(wanted) and turns < written:
        start = os.lseek(fd, at, os.SEEK_DATA)
        at = os.lseek(fd, start, os.SEEK_HOLE)
        assert start <= wanted[index] * BLOCK < at, f"block {wanted[index]} has space, and is no data"
        data += at - start
        while index < len(wanted) and wanted[index] * BLOCK < at:
            index += 1
        turns += 1
        yield
    assert data <= index * 16 * BLOCK, f"{data} bytes are data"  # chunks at most
    os.close(fd)


# -- programs at work ------------------------------------------------------------------------------


def at_work(root: str, seconds: float, job: int, jobs: int) -> Iterator[float]:
    """Makes, looks up and removes names; yields how long each operation took."""
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        path = f"{root}/w{number}"
        number += 1
        for call in (make, os.stat, os.unlink):
            began = time.monotonic()
            call(path)
            yield time.monotonic() - began


# -- a step in its processes -----------------------------------------------------------------------

STEPS: dict[str, Step] = {
    "create": create, "create more": create_more, "unlink more": unlink_more, "lookup": lookup, "lookup absent": lookup_absent, "rename": rename, "unlink": unlink,
    "list": listing, "seek": seeking,
    "sparse write": sparse_write, "sparse read": sparse_read, "sparse walk": sparse_walk,
}  # fmt: skip


def share_of(name: str, arguments: dict[str, Any], job: int) -> int:
    """How many operations one of the processes makes."""
    jobs, total = arguments["jobs"], min(arguments.get("size", arguments["count"]), arguments["count"])
    if name.startswith("sparse"):
        total = min(total, arguments["written"])
    if name in ("create", "unlink"):
        return sum(1 for _ in numbers(total, job, jobs))
    return len(range(job, total, jobs)) * (2 if name == "rename" else 1)


def run_job(step: Iterable[Any], share: int, slot: memoryview, began: float) -> None:
    """Carry out one job's share, telling how far it is in `slot`."""
    tenth, marks = 1, [0.0] * TENTHS
    for done, _ in enumerate(step, start=1):
        if done % 16 == 0 or done >= tenth * share / TENTHS:
            while tenth <= TENTHS and done >= tenth * share / TENTHS:
                marks[tenth - 1] = time.monotonic() - began
                tenth += 1
            _SLOT.pack_into(slot, 0, done, *marks)


def run_step(name: str, arguments: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Carry out a step by `jobs` processes; what came of it. Raises AssertionError: one of them failed (it said why)."""
    jobs = arguments["jobs"]
    shares = [share_of(name, arguments, job) for job in range(jobs)]
    page = memoryview(mmap.mmap(-1, _SLOT.size * jobs))
    began = time.monotonic()
    running = []
    for job in range(jobs):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                slot = page[job * _SLOT.size : (job + 1) * _SLOT.size]
                run_job(STEPS[name](**{**arguments, "job": job}), shares[job], slot, began)
                status = 0
            except BaseException as error:
                say({"error": f"{type(error).__name__}: {error}"})
            finally:
                os._exit(status)
        running.append(pid)
    failed = _wait(running, page, jobs, sum(shares), say)
    assert not failed, f"{name}: {failed} of {jobs} processes failed"
    slots = [_SLOT.unpack_from(page, job * _SLOT.size) for job in range(jobs) if shares[job]]
    ends = [sum(slot[1 + tenth] for slot in slots) / len(slots) for tenth in range(TENTHS)]
    tenths = [end - before for before, end in zip([0.0, *ends], ends, strict=False)]
    return {"count": sum(slot[0] for slot in slots), "seconds": time.monotonic() - began, "tenths": tenths}


def _wait(running: list[int], page: memoryview, jobs: int, total: int, say: Callable[[dict[str, Any]], None]) -> int:
    """Until all have ended; how many failed."""
    failed, said = 0, time.monotonic()
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            running.remove(pid)
            failed += status != 0
            continue
        time.sleep(0.01)
        if time.monotonic() - said >= 1:
            said = time.monotonic()
            say({"done": sum(_SLOT.unpack_from(page, job * _SLOT.size)[0] for job in range(jobs)), "of": total})
    return failed


def main() -> int:
    name, arguments = sys.argv[1], json.loads(sys.argv[2])

    def say(row: dict[str, Any]) -> None:
        os.write(1, json.dumps(row).encode() + b"\n")

    if name == "at work":
        took = list(at_work(**arguments, job=0, jobs=1))
        say({"count": len(took), "seconds": sum(took), "longest": max(took)})
        return 0
    try:
        say(run_step(name, arguments, say))
    except AssertionError as error:
        say({"error": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
