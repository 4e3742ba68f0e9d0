"""The programs of a drill: `python -m csvfs.admin.drill_writer work|watch|verify|fill|clean ...`.

Place      admin floor, a process of its own inside a node's namespaces; started by drill_ground.py.
Rule       it never stops for an error: the number of the error is logged, and the next operation tried. It knows nothing of
           csvfs but a directory: what it sees is what any program sees.
work       six threads, each with the next operation PERIOD_S after an answer: reads and overwrites of 4 KiB past the page
           cache, appends, names; and, more rarely, a file that others read and a symbolic link that is replaced. An fsync
           after every FSYNC_EVERY changes.
watch      from another node, through its caches: that file and that link.
verify     reads back all that workers have written, past the page cache.
Ends       by SIGTERM, each thread after the operation that it waits for.
"""

import mmap
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from csvfs.admin.drill_history import (
    APPEND,
    FINAL,
    LOOK,
    NAMES,
    NAMES_OF_LIST,
    NOTHING,
    PEEK,
    POINTER,
    READ,
    RECORD_SIZE,
    SHARED,
    WRITE,
    begin_line,
    done_line,
    record,
    value_of,
)

PERIOD_S = 0.005
SHARED_PERIOD_S = 0.02  # each one moves a lease between nodes
ERROR_PAUSE_S = 0.05
FSYNC_EVERY = 16
BLOCKS = 256  # of the file that is overwritten: read and written often enough that an old block is seen
APPEND_BLOCKS_MAX = 16_384  # 64 MiB; then over again from the beginning
KEEP_EVERY = 4  # of the files made, this one stays
FILES_PER_FOLDER = 1000
FILL_THREADS = 8

OVERWRITTEN, GROWING, SHARED_FILE, LINK = "overwritten", "growing", "shared", POINTER


class Log:
    """Of one thread: each line is in the hands of the operating system before the next step."""

    def __init__(self, directory: Path, program: str, folder: str, thread: str) -> None:
        path = directory / f"{program}.{folder}.{thread}.log"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._number = 0

    def run(self, kind: str, what: str, work: Callable[[], str | None]) -> bool:
        """Do one operation and log it; returns whether it succeeded. `work` returns what a look saw."""
        self._number += 1
        os.write(self._fd, begin_line(self._number, kind, time.monotonic_ns(), what))
        seen, number = None, 0
        try:
            seen = work()
        except OSError as error:
            number = error.errno or -1
        os.write(self._fd, done_line(self._number, time.monotonic_ns(), number, seen or ""))
        return not number


class OpenFile:
    """A file that is opened again after an error; what went wrong then is an error of the operation that needs it."""

    def __init__(self, path: Path, flags: int) -> None:
        self._path, self._flags = path, flags
        self._fd = -1
        self._buffer = mmap.mmap(-1, RECORD_SIZE)  # aligned, as O_DIRECT wants it

    def _opened(self) -> int:
        if self._fd < 0:
            self._fd = os.open(self._path, self._flags | os.O_CLOEXEC, 0o644)
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                os.close(fd)
            except OSError:
                pass  # of a write that has been reported already

    def write(self, data: bytes, block: int) -> None:
        self._buffer[:] = data
        written = os.pwritev(self._opened(), [self._buffer], block * RECORD_SIZE)
        if written != RECORD_SIZE:
            raise OSError(-1, f"only {written} bytes")

    def read(self, block: int) -> bytes:
        count = os.preadv(self._opened(), [self._buffer], block * RECORD_SIZE)
        return self._buffer[:count]

    def sync(self) -> None:
        os.fsync(self._opened())


class Program:
    """Where one works, as whom, and whether it shall stop."""

    def __init__(self, root: Path, name: str, logs: Path) -> None:
        self.root, self.name, self.logs = root, name, logs
        self.stop = threading.Event()

    def path(self, *parts: str) -> Path:
        return self.root.joinpath(self.name, *parts)

    def log(self, thread: str, folder: str = "") -> Log:
        return Log(self.logs, self.name, folder or self.name, thread)

    def pace(self, succeeded: bool, period_s: float = PERIOD_S) -> None:
        self.stop.wait(period_s if succeeded else ERROR_PAUSE_S)

    def run(self, threads: list[Callable[[], None]]) -> None:
        """Until SIGTERM; then until each thread has its answer."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of the threads too: it is waited for here
        running = [threading.Thread(target=work) for work in threads]
        for thread in running:
            thread.start()
        (self.logs / f"{self.name}.ready").touch()
        signal.sigwait({signal.SIGTERM})
        self.stop.set()
        for thread in running:
            thread.join()


# Workers


def work(program: Program) -> None:
    program.path("names").mkdir(parents=True, exist_ok=True)
    zeros = bytes(BLOCKS * RECORD_SIZE)
    for name in (OVERWRITTEN, GROWING, SHARED_FILE):
        program.path(name).write_bytes(zeros if name == OVERWRITTEN else b"")
    os.symlink(NOTHING, program.path(LINK))
    threads = (
        read_forever, overwrite_forever, append_forever, change_names_forever, share_forever, point_forever,
    )  # fmt: skip
    program.run([lambda thread=thread: thread(program) for thread in threads])  # type: ignore[misc]


def read_forever(program: Program) -> None:
    log, file, rng = program.log(READ), OpenFile(program.path(OVERWRITTEN), os.O_RDONLY | os.O_DIRECT), Random(1)
    while not program.stop.is_set():
        block = rng.randrange(BLOCKS)
        key = f"b{block}"
        ok = log.run("read", key, lambda: value_of(file.read(block), program.name, key))  # noqa: B023
        if not ok:
            file.close()
        program.pace(ok)


def overwrite_forever(program: Program) -> None:
    file, rng = OpenFile(program.path(OVERWRITTEN), os.O_RDWR | os.O_DIRECT), Random(2)
    _write_forever(program, program.log(WRITE), file, "overwrite", lambda number: f"b{rng.randrange(BLOCKS)}")


def append_forever(program: Program) -> None:
    file = OpenFile(program.path(GROWING), os.O_RDWR | os.O_DIRECT)
    _write_forever(program, program.log(APPEND), file, "append", lambda number: f"a{number % APPEND_BLOCKS_MAX}")


def share_forever(program: Program) -> None:
    file = OpenFile(program.path(SHARED_FILE), os.O_RDWR)
    _write_forever(program, program.log(SHARED), file, "overwrite", lambda number: "s0", SHARED_PERIOD_S)


def _write_forever(
    program: Program,
    log: Log,
    file: OpenFile,
    kind: str,
    key_of: Callable[[int], str],
    period_s: float = PERIOD_S,
) -> None:
    value = 0
    while not program.stop.is_set():
        key = key_of(value)
        value += 1
        data = record(program.name, key, value)
        ok = log.run(kind, f"{key}={value}", lambda: file.write(data, int(key[1:])))  # noqa: B023
        if ok and value % FSYNC_EVERY == 0:
            ok = log.run("fsync", "", file.sync)
        if not ok:
            file.close()
        program.pace(ok, period_s)


def point_forever(program: Program) -> None:
    log, link, fresh, number = program.log(POINTER), program.path(LINK), program.path(f"{LINK}.new"), 0

    def prepare() -> None:
        fresh.unlink(missing_ok=True)  # of an earlier try
        os.symlink(str(number), fresh)

    while not program.stop.is_set():
        number += 1
        ok = log.run("symlink", "", prepare)
        ok = ok and log.run("rename", f"{POINTER}={number}", lambda: os.rename(fresh, link))
        program.pace(ok, SHARED_PERIOD_S)


def change_names_forever(program: Program) -> None:
    log, number = program.log(NAMES), 0
    while not program.stop.is_set():
        number += 1
        ok = True
        for kind, effects, change in _name_changes(program, number):
            ok = log.run(kind, effects, change) and ok
            program.pace(ok)
            if not ok or program.stop.is_set():
                break


def _name_changes(program: Program, number: int) -> list[tuple[str, str, Callable[[], None]]]:
    """Kind, effects, and how to do it: of a file and a folder."""
    first, second, folder = (program.path("names", f"{letter}{number}") for letter in "fgd")

    def create() -> None:
        os.close(os.open(first, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))

    changes: list[tuple[str, str, Callable[[], None]]] = [
        ("create", f"f{number}=present", create),
        ("rename", f"f{number}=absent,g{number}=present", lambda: os.rename(first, second)),
        ("mkdir", f"d{number}=present", lambda: os.mkdir(folder)),
    ]
    if number % KEEP_EVERY:
        changes.append(("unlink", f"g{number}=absent", lambda: os.unlink(second)))
        changes.append(("rmdir", f"d{number}=absent", lambda: os.rmdir(folder)))
    if number % FSYNC_EVERY == 0:
        changes.append(("fsync", "", lambda: _sync_folder(program.path("names"))))
    return changes


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# Watchers


def watch(program: Program, folder: str) -> None:
    program.run([lambda: peek_forever(program, folder), lambda: look_forever(program, folder)])


def peek_forever(program: Program, folder: str) -> None:
    """The shared file, now through a descriptor that stays open, now through a new one."""
    log, path, count = program.log(PEEK, folder), program.root / folder / SHARED_FILE, 0
    kept = OpenFile(path, os.O_RDONLY)
    while not program.stop.is_set():
        count += 1
        file = kept if count % 2 else OpenFile(path, os.O_RDONLY)
        ok = log.run("read", "s0", lambda: value_of(file.read(0), folder, "s0"))  # noqa: B023
        if not ok or file is not kept:
            file.close()
        program.pace(ok, SHARED_PERIOD_S)


def look_forever(program: Program, folder: str) -> None:
    log, path = program.log(LOOK, folder), program.root / folder / LINK
    while not program.stop.is_set():
        ok = log.run("readlink", POINTER, lambda: os.readlink(path))
        program.pace(ok, SHARED_PERIOD_S)


# Reading back


def verify(program: Program, folder: str) -> None:
    log, root = program.log(FINAL, folder), program.root / folder
    for name, letter in ((OVERWRITTEN, "b"), (GROWING, "a"), (SHARED_FILE, "s")):
        _verify_file(log, root / name, folder, letter)
    log.run("readlink", POINTER, lambda: os.readlink(root / LINK))
    log.run("list", NAMES_OF_LIST, lambda: ",".join(sorted(os.listdir(root / "names"))))


def _verify_file(log: Log, path: Path, folder: str, letter: str) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        size = 0  # which the read below reports
    file = OpenFile(path, os.O_RDONLY | os.O_DIRECT)
    for block in range(max(1, -(-size // RECORD_SIZE))):
        key = f"{letter}{block}"
        if not log.run("read", key, lambda: value_of(file.read(block), folder, key)):  # noqa: B023
            file.close()
    # Nothing is behind the end: what was written there would be lost.
    log.run("size", f"{letter}*", lambda: str(-(-size // RECORD_SIZE)))
    file.close()


# Many files


def fill(root: Path, count: int) -> None:
    """Make `count` empty files, in folders of FILES_PER_FOLDER; what is there already is left alone."""
    root.mkdir(parents=True, exist_ok=True)

    def make(first: int) -> None:
        for folder in range(first, -(-count // FILES_PER_FOLDER), FILL_THREADS):
            path = root / f"{folder:05d}"
            path.mkdir(exist_ok=True)
            there = set(os.listdir(path))
            for number in range(min(FILES_PER_FOLDER, count - folder * FILES_PER_FOLDER)):
                if f"{number:03d}" not in there:
                    os.close(os.open(path / f"{number:03d}", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))

    threads = [threading.Thread(target=make, args=(first,)) for first in range(FILL_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    kind, root, *arguments = sys.argv[1:]
    if kind == "fill":
        fill(Path(root), int(arguments[0]))
    elif kind == "clean":
        shutil.rmtree(root, ignore_errors=True)
    else:
        name, logs, *folders = arguments
        run_program(kind, Program(Path(root), name, Path(logs)), folders)


def run_program(kind: str, program: Program, folders: list[str]) -> None:
    if kind == "work":
        work(program)
    elif kind == "watch":
        watch(program, folders[0])
    else:
        for folder in folders:
            verify(program, folder)


if __name__ == "__main__":
    main()
