"""A program on a node that does things to a few files that others do things to as well, and writes down what it saw.

Place      tests; coherence.py starts it: `python -S -m tests.programs.coherence_worker data|names FOLDER LOG SEED
           SECONDS`, and judges its log.
Log        a line of JSON for each call: object, name, arguments, when it was begun and when answered (CLOCK_MONOTONIC,
           ns, the same for all nodes of a lab), the answer. null: it failed in a way that leaves open what it did.
Data       one process on each node: two programs of one node that read and write one page at once may see half of it,
           as on any file system of Linux. The file `registers` has pages: of some the first word and the second half
           are objects of their own, others are whole, and written by O_DIRECT, too. `log` is appended to and emptied.
           `locked` has a counter that is changed under a lock only.
Names      a few names in two directories.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, TextIO

from tests.programs.hand import CALLS

PAGE = 4096
WORD = struct.Struct("<Q")
SHARED_PAGES, WHOLE_PAGES = 2, 2
RECORD = 64  # bytes of the log file for each append
LOG_RECORDS_MAX = 40  # less than a page
NAMES = (b"a", b"b", b"c")
DIRECTORIES = {1: b"", 2: b"d/"}
ANSWERED = (errno.ENOENT, errno.EEXIST)  # what a change of names may be refused with, without having been made
PAUSE_S_MAX = 0.004
BUFFERED, DIRECT, APPEND, LOCKED = range(1, 5)


class Worker:
    def __init__(self, folder: bytes, log: TextIO, seed: str) -> None:
        self.folder, self.log, self.draw = folder, log, Random(seed)
        self._number = 0
        self._who = int(seed.rpartition(" ")[2])

    def next_number(self) -> int:
        """For the content of a write: never used before by anybody."""
        self._number += 1
        return self._who << 32 | self._number

    def record(self, what: str, name: str, arguments: list[Any], call: Callable[[], Any]) -> Any:
        """Make a call and write it down; what it answered, or None."""
        begun = time.monotonic_ns()
        try:
            answer = call()
        except OSError as error:
            answer = -error.errno if error.errno in ANSWERED and what == "names" else None
            if answer is None:
                self.log.write(json.dumps(["error", name, errno.errorcode.get(error.errno or 0), str(error)]) + "\n")
        ended = time.monotonic_ns()
        self.log.write(json.dumps([what, name, arguments, begun, ended, answer]) + "\n")
        return answer

    def run(self, seconds: float) -> None:
        kinds, weights = zip(*self.kinds.items(), strict=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            getattr(self, "_" + self.draw.choices(kinds, weights)[0])()
            if self.draw.random() < 0.5:
                time.sleep(PAUSE_S_MAX * self.draw.random())
        self.log.flush()

    kinds: dict[str, int] = {}


class DataWorker(Worker):
    kinds = {"word": 6, "half": 6, "whole": 6, "append": 4, "log": 4, "size": 2, "empty": 1, "counter": 2, "sync": 1}

    def __init__(self, folder: bytes, log: TextIO, seed: str) -> None:
        super().__init__(folder, log, seed)
        names = {BUFFERED: (b"/registers", 0), DIRECT: (b"/registers", os.O_DIRECT), APPEND: (b"/log", os.O_APPEND),
                 LOCKED: (b"/locked", 0)}  # fmt: skip
        for handle, (name, flags) in names.items():
            CALLS["open"](handle, folder + name, os.O_RDWR | flags)
        CALLS["map"](BUFFERED, (SHARED_PAGES + WHOLE_PAGES) * PAGE)
        self._locked = os.open(folder + b"/locked", os.O_RDWR)

    def _word(self) -> None:
        page = self.draw.randrange(SHARED_PAGES)
        offset, what = page * PAGE, f"word{page}"
        if self.draw.random() < 0.5:
            call = self.draw.choice(
                (lambda: CALLS["pread"](BUFFERED, offset, 8), lambda: CALLS["load"](BUFFERED, offset, 8))
            )
            self.record(what, "read", [], lambda: WORD.unpack(call())[0])
            return
        number = self.next_number()
        how = self.draw.choice(("pwrite", "store"))
        extra = [False] if how == "store" else []
        self.record(what, "write", [number], lambda: CALLS[how](BUFFERED, offset, WORD.pack(number), *extra))

    def _half(self) -> None:
        page = self.draw.randrange(SHARED_PAGES)
        self._area(f"half{page}", page * PAGE + PAGE // 2, PAGE // 2, direct=False)

    def _whole(self) -> None:
        page = SHARED_PAGES + self.draw.randrange(WHOLE_PAGES)
        self._area(f"whole{page}", page * PAGE, PAGE, direct=self.draw.random() < 0.5)

    def _area(self, what: str, offset: int, size: int, *, direct: bool) -> None:
        """Read or write so many bytes, all words of which are one number."""
        if self.draw.random() < 0.5:
            read = "read_direct" if direct else "pread"
            handle = DIRECT if direct else BUFFERED
            self.record(what, "read", [], lambda: whole(CALLS[read](handle, offset, size), size))
            return
        number = self.next_number()
        data = WORD.pack(number) * (size // 8)
        if direct:
            self.record(what, "write", [number], lambda: CALLS["write_direct"](DIRECT, offset, data))
        else:
            self.record(what, "write", [number], lambda: CALLS["pwrite"](BUFFERED, offset, data))

    def _append(self) -> None:
        number = self.next_number()
        data = WORD.pack(number) * (RECORD // 8)
        self.record("log", "append", [number], lambda: CALLS["write"](APPEND, data))

    def _log(self) -> None:
        found = self.record("log", "records", [], lambda: records(CALLS["pread"](APPEND, 0, PAGE)))
        if found is not None and len(found) > LOG_RECORDS_MAX:
            self._empty()

    def _size(self) -> None:
        self.record("log", "size", [], lambda: CALLS["fsize"](APPEND))

    def _empty(self) -> None:
        self.record("log", "empty", [], lambda: CALLS["ftruncate"](APPEND, 0))

    def _sync(self) -> None:
        CALLS["fsync"](BUFFERED)

    def _counter(self) -> None:
        """Add one under a lock. The lock and the counter are objects; so an addition that is lost shows twice."""
        who = self._who
        if self.record("lock", "lock", [who], lambda: fcntl.lockf(self._locked, fcntl.LOCK_EX) or 0) is None:
            return
        count = self.record("counter", "read", [], lambda: WORD.unpack(CALLS["pread"](LOCKED, 0, 8))[0])
        if count is not None:
            data = WORD.pack(count + 1)
            self.record("counter", "write", [count + 1], lambda: CALLS["pwrite"](LOCKED, 0, data))
            self.log.write(json.dumps(["added", count + 1]) + "\n")
        self.record("lock", "unlock", [who], lambda: fcntl.lockf(self._locked, fcntl.LOCK_UN) or 0)


class NamesWorker(Worker):
    kinds = {"look": 8, "make": 4, "unlink": 3, "rename": 4, "link": 2, "list": 3, "links": 2}

    def _place(self) -> tuple[int, bytes, bytes]:
        directory = self.draw.choice((1, 2))
        name = self.draw.choice(NAMES)
        return directory, name, self.folder + b"/names/" + DIRECTORIES[directory] + name

    def _look(self) -> None:
        directory, name, path = self._place()

        def call() -> int | None:
            try:
                return os.stat(path).st_ino
            except FileNotFoundError:
                return 0  # None would be an answer that is not known

        self.record("names", "lookup", [directory, name.decode()], call)

    def _make(self) -> None:
        directory, name, path = self._place()

        def call() -> int:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                return os.fstat(file).st_ino
            finally:
                os.close(file)

        self.record("names", "make", [directory, name.decode(), False], call)

    def _unlink(self) -> None:
        directory, name, path = self._place()
        self.record("names", "unlink", [directory, name.decode(), False], lambda: os.unlink(path) or 0)

    def _own_place(self) -> tuple[int, bytes, bytes]:
        """A name that no other node moves or links anything to. Linux looks both names up before it asks the file
        system, and answers a rename of one file to itself without asking: two nodes that rename one name to one other
        at the same moment may both be told that they did.
        """
        directory, name = self.draw.choice((1, 2)), NAMES[self._who // 2 % len(NAMES)]
        return directory, name, self.folder + b"/names/" + DIRECTORIES[directory] + name

    def _rename(self) -> None:
        directory, name, path = self._place()
        new_directory, new_name, new_path = self._own_place()
        arguments = [directory, name.decode(), new_directory, new_name.decode()]
        self.record("names", "rename", arguments, lambda: CALLS["rename"](path, new_path, 0))

    def _opened(self) -> int | None:
        try:
            return os.open(self._place()[2], os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None

    def _link(self) -> None:
        """Of an inode, and not of a name: what that leads to may change between looking it up and linking."""
        directory, name, path = self._own_place()
        file = self._opened()
        if file is not None:
            try:
                ino = os.fstat(file).st_ino
                self.record("names", "link", [ino, directory, name.decode()], lambda: link_file(file, path))
            finally:
                os.close(file)

    def _links(self) -> None:
        file = self._opened()
        if file is not None:
            try:
                ino = os.fstat(file).st_ino
                self.record("names", "links", [ino], lambda: os.fstat(file).st_nlink)
            finally:
                os.close(file)

    def _list(self) -> None:
        directory = self.draw.choice((1, 2))
        path = self.folder + b"/names/" + DIRECTORIES[directory]
        self.record("names", "list", [directory], lambda: list_at_once(path))


def whole(data: bytes, size: int) -> int | str:
    """The number that all words are; what else there is, as text."""
    number = WORD.unpack_from(data)[0] if len(data) >= 8 else 0
    return number if data == WORD.pack(number) * (size // 8) else f"{len(data)} bytes, mixed: {data[:16].hex()}..{data[-16:].hex()}"


def records(data: bytes) -> list[int | str]:
    return [whole(data[at : at + RECORD], RECORD) for at in range(0, len(data), RECORD)]


def link_file(file: int, path: bytes) -> int:
    """linkat(2) of an open file, whatever its names."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.linkat(file, b"", -100, path, 0x1000) < 0:  # AT_FDCWD, AT_EMPTY_PATH
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return 0


def list_at_once(path: bytes) -> list[tuple[str, int]]:
    """Names and inodes by one getdents64(2): a listing in several calls is none of one moment."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        buffer = ctypes.create_string_buffer(16_384)
        size = libc.syscall(217, folder, buffer, len(buffer))
        if size < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(folder)
    found, at = [], 0
    while at < size:
        ino, _, length = struct.unpack_from("<QqH", buffer, at)
        name = buffer.raw[at + 19 : at + length].split(b"\0", 1)[0]
        if name not in (b".", b"..", b"d"):
            found.append((name.decode(), ino))
        at += length
    return sorted(found)


def prepare(folder: Path) -> None:
    """What the workers find."""
    folder.mkdir()
    (folder / "registers").write_bytes(bytes((SHARED_PAGES + WHOLE_PAGES) * PAGE))
    (folder / "log").write_bytes(b"")
    (folder / "locked").write_bytes(bytes(PAGE))
    (folder / "names").mkdir()
    (folder / "names" / "d").mkdir()


KINDS = {"data": DataWorker, "names": NamesWorker}


def main(kind: str, folder: str, log: str, seed: str, seconds: str) -> None:
    if kind == "prepare":
        prepare(Path(folder))
        return
    with open(log, "w", buffering=1 << 16) as file:
        KINDS[kind](os.fsencode(folder), file, seed).run(float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
