"""`python busy_program.py DIRECTORY`: what programs do to files, at once, until standard input ends; then a line of JSON.

Each worker knows what its files must look like, and says what differs, and each system call that failed.
"""

import json
import mmap
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

over = threading.Event()
wrong: list[str] = []
done: dict[str, int] = {}
BLOCKS = 500
LISTED = 200
MAP_SIZE = 1 << 18


def goes_on(count: int) -> bool:
    """Each worker does its work once, however few turns it has."""
    return not (over.is_set() and count)


def append(base: Path) -> int:
    """Each record is there once."""
    file = os.open(base / "appended", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    count = 0
    while goes_on(count):
        os.write(file, b"%09d\n" % count)
        count += 1
    os.close(file)
    if (base / "appended").read_bytes() != b"".join(b"%09d\n" % number for number in range(count)):
        wrong.append(f"appended: not the {count} records, each once")
    return count


def names(base: Path) -> int:
    """Calls that fail when they are carried out twice, or not at all."""
    count = 0
    while goes_on(count):
        name = base / f"name{count % 50}"
        other, third = base / f"{name.name}-a", base / f"{name.name}-b"
        file = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        os.write(file, b"%d" % count)
        os.rename(name, other)
        os.link(other, third)
        assert os.fstat(file).st_nlink == 2
        os.unlink(other)
        os.chmod(third, 0o600)
        os.setxattr(third, "user.count", b"%d" % count, os.XATTR_CREATE)
        os.removexattr(third, "user.count")
        os.symlink("somewhere", other)
        os.unlink(other)
        os.mkdir(other)
        os.rmdir(other)
        os.mkfifo(other)
        os.unlink(other)
        os.unlink(third)
        assert os.fstat(file).st_nlink == 0
        assert os.pread(file, 100, 0) == b"%d" % count  # without a name, and open
        os.close(file)
        count += 1
    return count


def mapped(base: Path) -> int:
    file = os.open(base / "mapped", os.O_CREAT | os.O_RDWR)
    os.ftruncate(file, MAP_SIZE)
    memory, model, count, chance = mmap.mmap(file, MAP_SIZE), bytearray(MAP_SIZE), 0, random.Random(1)
    while goes_on(count):
        at = chance.randrange(0, MAP_SIZE - 8)
        memory[at : at + 8] = model[at : at + 8] = b"%08d" % (count % 10**8)
        count += 1
        if count % 500 == 0:
            memory.flush()
        over.wait(0.0005)
    memory.flush()
    os.fsync(file)
    if os.pread(file, MAP_SIZE, 0) != bytes(model):
        wrong.append("mapped: other bytes than were stored")
    return count


def direct(base: Path) -> int:
    """As a virtual machine's disk."""
    file = os.open(base / "direct", os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    block, model, count, chance = mmap.mmap(-1, 4096), {}, 0, random.Random(2)

    def check(at: int) -> None:
        os.preadv(file, [block], at * 4096)
        if block[:] != (b"%08d" % model[at]) * 512:
            wrong.append(f"direct: block {at} holds {block[:8]!r}, written was {model[at]:08}")

    while goes_on(count):
        at = chance.randrange(BLOCKS)
        block[:] = (b"%08d" % count) * 512
        os.pwritev(file, [block], at * 4096)
        model[at] = count
        count += 1
        if count % 20 == 0:
            check(chance.choice(list(model)))
        if count % 100 == 0:
            os.fsync(file)
    for at in model:
        check(at)
    return count


def sizes(base: Path) -> int:
    """The end of a file, moved in all ways."""
    file = os.open(base / "sizes", os.O_CREAT | os.O_RDWR)
    model, count, chance = bytearray(), 0, random.Random(3)
    while goes_on(count):
        at, length, kind = chance.randrange(200_000), chance.randrange(1, 9000), chance.random()
        if kind < 0.3:
            os.ftruncate(file, at)
            model = model[:at] + bytes(max(0, at - len(model)))
        elif kind < 0.4:
            os.posix_fallocate(file, at, length)
            model += bytes(max(0, at + length - len(model)))
        elif kind < 0.8:
            os.pwrite(file, bytes([count % 255 + 1]) * length, at)
            model += bytes(max(0, at - len(model)))
            model[at : at + length] = bytes([count % 255 + 1]) * length
        elif (found := os.pread(file, 400_000, 0)) != bytes(model):
            wrong.append(f"sizes: {len(found)} bytes, or others, than the {len(model)} of step {count}")
            break
        count += 1
    return count


def listed(base: Path) -> int:
    directory, count = base / "listed", 0
    directory.mkdir()
    for number in range(LISTED):
        (directory / f"f{number}").touch()
    while goes_on(count):
        if len(found := set(os.listdir(directory))) != LISTED:
            wrong.append(f"listed: {len(found)} names")
        count += 1
    return count


def run(worker: Callable[[Path], int], base: Path) -> None:
    try:
        done[worker.__name__] = worker(base)
    except Exception:
        wrong.append(f"{worker.__name__}: {traceback.format_exc()}")


def main() -> None:
    base = Path(sys.argv[1])
    base.mkdir()
    threads = [threading.Thread(target=run, args=(work, base)) for work in (append, names, mapped, direct, sizes, listed)]
    for thread in threads:
        thread.start()
    print("at work", flush=True)
    sys.stdin.readline()
    over.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"wrong": wrong, "done": done}), flush=True)


if __name__ == "__main__":
    main()
