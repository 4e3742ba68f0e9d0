"""`tools/fsx`: random reads, writes and changes of size of one file on a mounted volume, against what it must hold.

Place      tests, over hands.py. After the program of that name which file systems have been tested with since 1991.
Oracle     the bytes of the file in memory. Every word of 4 bytes that is written is the number of the operation, so
           a wrong byte says who wrote it, and who should have.
Nodes      each operation is made by one of the nodes, drawn by lot; each has files of its own open, and a mapping.
           `--stay K`: lots are drawn before every K-th operation on the average, so that caches have something to lose.
Files      a run is cut into files of 5,000 operations, each with a seed and a greatest size of its own: `--seed S
           --first-file K` replays from the K-th on.
Failure    prints the last operations, and where the file differs on each node, buffered and direct; the file stays.
"""

from __future__ import annotations

import argparse
import errno
import os
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from csvfs.admin.lab_files import LAB_DIR_DEFAULT
from tests.programs.hand import PAGE
from tests.programs.hands import Call, Hand, HandLost, hands_on

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
BUFFERED, DIRECT, APPEND = 1, 2, 3  # handles that every hand has of the file
SIZES_MAX = (20_000, 64 << 10, 256 << 10, 256 << 10, 1 << 20, 3 << 20)
OPERATIONS_PER_FILE = 5_000
BATCH_MAX = 64  # calls on one node before anything is compared
TOLD = 40  # last operations that a failure prints
SECTOR = 512


class Wrong(Exception):
    """The file is not what it must be."""


def pattern(number: int, offset: int, size: int) -> bytes:
    """What operation `number` writes there: its number in each word of the file."""
    lead = offset % 4
    return (struct.pack("<I", number) * ((lead + size + 3) // 4))[lead : lead + size]


@dataclass(slots=True)
class Expected:
    """A call, where it is made, and what must come of it."""

    number: int
    node: int
    call: Call
    check: Callable[[Any], str]  # what is wrong with the result; empty: nothing
    text: str


def equals(wanted: Any) -> Callable[[Any], str]:
    return lambda got: "" if got == wanted else f"{got!r}, not {wanted!r}"


@dataclass(slots=True)
class Story:
    """Operations on one file as they are drawn, and the bytes that it must have after each."""

    draw: Random
    mode: str
    nodes: int
    size_max: int
    number: int  # of the operation last drawn
    with_copies: bool = False
    stay: int = 1  # operations on the average until lots are drawn for the node
    data: bytearray = field(default_factory=bytearray)
    batch: list[Expected] = field(default_factory=list)
    path: bytes = b""
    _node: int = 0

    def add(self, call: Call, check: Callable[[Any], str] = equals(0)) -> None:
        text = " ".join(f"{len(a)} bytes" if isinstance(a, bytes) else str(a) for a in call)
        self.batch.append(Expected(self.number, self._node, call, check, text))

    def next(self) -> None:
        """Draw one operation and add its calls."""
        self.number += 1
        if self.stay == 1 or self.draw.random() * self.stay < 1:
            self._node = self.draw.randrange(self.nodes)
        kinds, weights = zip(*KINDS[self.mode].items(), strict=True)
        kind = self.draw.choices(kinds, weights)[0]
        getattr(self, "_" + kind)()
        self.add(("fsize", BUFFERED), equals(len(self.data)))

    # -- where ------------------------------------------------------------------------------------

    def _range(self, end: int, unit: int = 1) -> tuple[int, int]:
        """Offset and size of something below `end`; half of them begin or end where blocks do."""
        draw = self.draw
        size = draw.choice((draw.randint(1, 64), draw.randint(1, 9_000), draw.randint(1, 66_000), PAGE))
        offset = draw.randrange(end)
        if draw.random() < 0.5:
            offset &= -PAGE
        if draw.random() < 0.3:
            size = (size + PAGE - 1) & -PAGE
        if self.data and draw.random() < 0.15:
            offset = min(len(self.data), end - 1)
        offset &= -unit
        return offset, max(unit, min(size, end - offset) & -unit)

    def _unit(self) -> int:
        return self.draw.choice((SECTOR, PAGE, PAGE))

    # -- what it must hold then -------------------------------------------------------------------

    def _resize(self, size: int) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))

    def _put(self, offset: int, data: bytes) -> None:
        self._resize(max(len(self.data), offset + len(data)))
        self.data[offset : offset + len(data)] = data

    def _is(self, offset: int, size: int) -> Callable[[Any], str]:
        wanted = bytes(self.data[offset : offset + size])
        return lambda got: "" if got == wanted else explain(offset, wanted, got)

    # -- operations -------------------------------------------------------------------------------

    def _write(self) -> None:
        offset, size = self._range(self.size_max)
        data = pattern(self.number, offset, size)
        self._put(offset, data)
        self.add(("pwrite", BUFFERED, offset, data), equals(size))

    def _read(self) -> None:
        offset, size = self._range(self.size_max)
        self.add(("pread", BUFFERED, offset, size), self._is(offset, size))

    def _write_direct(self) -> None:
        offset, size = self._range(self.size_max, self._unit())
        data = pattern(self.number, offset, size)
        self._put(offset, data)
        self.add(("write_direct", DIRECT, offset, data), equals(size))

    def _read_direct(self) -> None:
        offset, size = self._range(self.size_max, self._unit())
        self.add(("read_direct", DIRECT, offset, size), self._is(offset, size))

    def _append(self) -> None:
        offset = len(self.data)
        size = min(self._range(self.size_max)[1], self.size_max - offset)
        if size > 0:
            data = pattern(self.number, offset, size)
            self._put(offset, data)
            self.add(("write", APPEND, data), equals(size))

    def _learn_size(self) -> None:
        """What another node has added to the file can be reached through a mapping once the size was asked for: the
        kernel does not ask by itself (README, "Limits").
        """
        if self.nodes > 1:
            self.add(("fsize", BUFFERED), equals(len(self.data)))

    def _load(self) -> None:
        if self.data:
            self._learn_size()
            offset, size = self._range(len(self.data))
            end = min(-(-(offset + size) // PAGE) * PAGE, -(-len(self.data) // PAGE) * PAGE)
            wanted = bytes(self.data[offset:end])
            wanted += bytes(end - offset - len(wanted))  # past the end of the file, in its last page: zeros
            check: Callable[[Any], str] = lambda got: "" if got == wanted else explain(offset, wanted, got)  # noqa: E731
            self.add(("load", BUFFERED, offset, end - offset), check)

    def _store(self) -> None:
        if self.draw.random() < 0.2 or not self.data:
            self._truncate()
        if self.data:
            self._learn_size()
            offset, size = self._range(len(self.data))
            data = pattern(self.number, offset, size)
            self._put(offset, data)
            self.add(("store", BUFFERED, offset, data, self.draw.random() < 0.3), equals(size))

    def _truncate(self) -> None:
        size = self.draw.choice((0, self.draw.randrange(self.size_max), self.draw.randrange(self.size_max)))
        if self.draw.random() < 0.4:
            size &= -PAGE
        self._resize(size)
        call = ("ftruncate", BUFFERED, size) if self.draw.random() < 0.7 else ("truncate", self.path, size)
        self.add(call)

    def _fallocate(self) -> None:
        offset, size = self._range(self.size_max)
        keep = self.draw.choice((0, KEEP_SIZE))
        if not keep:
            self._resize(max(len(self.data), offset + size))
        self.add(("fallocate", BUFFERED, keep, offset, size))

    def _punch(self) -> None:
        offset, size = self._range(self.size_max)
        self._zero_bytes(offset, size)
        self.add(("fallocate", BUFFERED, PUNCH_HOLE | KEEP_SIZE, offset, size))

    def _zero(self) -> None:
        offset, size = self._range(self.size_max)
        keep = self.draw.choice((0, KEEP_SIZE))
        if not keep:
            self._resize(max(len(self.data), offset + size))
        self._zero_bytes(offset, size)
        self.add(("fallocate", BUFFERED, ZERO_RANGE | keep, offset, size))

    def _zero_bytes(self, offset: int, size: int) -> None:
        end = min(offset + size, len(self.data))
        self.data[offset:end] = bytes(max(0, end - offset))

    def _copy(self) -> None:
        """copy_file_range within the file; where both overlap it is refused, and left out. Linux cuts it off at the end of
        the file that this node knows, and does not ask whether another one has made it longer: so we ask before."""
        if not self.with_copies or not self.data:
            return
        offset, size = self._range(len(self.data), self.draw.choice((1, PAGE)))
        target = self._range(self.size_max, self.draw.choice((1, PAGE)))[0]
        size = min(size, len(self.data) - offset, self.size_max - target)
        if abs(target - offset) >= size > 0:
            self._put(target, bytes(self.data[offset : offset + size]))
            self.add(("fsize", BUFFERED), lambda got: "")
            self.add(("copy_range", BUFFERED, offset, BUFFERED, target, size), equals(size))

    def _seek(self) -> None:
        """Holes must be zeros, and nothing that was written may be in one."""
        size = len(self.data)
        offset = self.draw.randrange(size + 10)
        whence = self.draw.choice((os.SEEK_DATA, os.SEEK_HOLE))
        data = bytes(self.data)

        def check(got: Any) -> str:
            if offset >= size:
                return equals(("!", errno.ENXIO))(got)
            if whence == os.SEEK_DATA:
                end = size if got == ("!", errno.ENXIO) else got
                if not isinstance(end, int) or not offset <= end <= size:
                    return f"{got!r}, with a size of {size}"
                return "" if not any(data[offset:end]) else f"{got!r}: what was written there is passed over"
            if not isinstance(got, int) or not offset <= got <= size:
                return f"{got!r}, with a size of {size}"
            return "" if got == size or data[got] == 0 else f"{got!r}: that is no hole"

        if self.mode in ("mmap", "mixed"):  # stores that were not written back are not seen: README, "Limits"
            self._everywhere(("fsync", BUFFERED))
        self.add(("seek", BUFFERED, offset, whence), check)

    def _everywhere(self, call: Call) -> None:
        before = self._node
        for node in range(self.nodes):
            self._node = node
            self.add(call)
        self._node = before

    def _fsync(self) -> None:
        self.add((self.draw.choice(("fsync", "fdatasync")), BUFFERED))

    def _drop(self) -> None:
        self.add(("drop", BUFFERED))

    def _reopen(self) -> None:
        for handle in (BUFFERED, DIRECT, APPEND):
            self.add(("close", handle))
        self.open()

    def _whole(self) -> None:
        self.add(("pread", BUFFERED, 0, self.size_max), self._is(0, self.size_max))

    def open(self, flags: int = 0) -> None:
        """The files of one node, and its mapping, longer than the file."""
        extra = {BUFFERED: 0, DIRECT: os.O_DIRECT, APPEND: os.O_APPEND}
        for handle, more in extra.items():
            self.add(("open", handle, self.path, os.O_RDWR | flags | more))
        if self.mode in ("mmap", "mixed"):
            self.add(("map", BUFFERED, -(-self.size_max // PAGE) * PAGE))

    def begin(self) -> None:
        for node in range(self.nodes):
            self._node = node
            self.open(os.O_CREAT | os.O_TRUNC)

    def end(self) -> None:
        """The whole file as all nodes see it; then it goes."""
        self._everywhere(("pread", BUFFERED, 0, self.size_max))
        for expected in self.batch[-self.nodes :]:
            expected.check = self._is(0, self.size_max)
        self._everywhere(("close_all",))
        self.add(("unlink", self.path))


_SIZES = {"truncate": 6, "fallocate": 3, "punch": 5, "zero": 5, "seek": 4, "fsync": 2, "drop": 2, "reopen": 2, "whole": 1}
KINDS = {
    "buffered": _SIZES | {"write": 50, "read": 60, "append": 6, "copy": 5},
    "direct": _SIZES | {"write_direct": 60, "read_direct": 60, "copy": 3},
    "mmap": _SIZES | {"store": 50, "load": 50, "write": 8, "read": 10, "append": 2, "copy": 3},
    "mixed": _SIZES | {"write": 16, "read": 16, "write_direct": 16, "read_direct": 16, "store": 16, "load": 16,
                       "append": 5, "copy": 4},
}  # fmt: skip


def explain(offset: int, wanted: bytes, got: Any) -> str:
    """Where bytes differ first, and whose they are."""
    if not isinstance(got, bytes):
        return f"{got!r} instead of {len(wanted)} bytes"
    if len(got) != len(wanted):
        return f"{len(got)} bytes at {offset}, not {len(wanted)}"
    wrong = [at for at, (one, other) in enumerate(zip(wanted, got, strict=True)) if one != other]
    first = wrong[0] & -4

    def whose(data: bytes) -> str:
        word = data[first - offset % 4 if first >= offset % 4 else 0 :][:4].ljust(4, b"\0")
        return f"{data[wrong[0] : wrong[0] + 8].hex()} (operation {struct.unpack('<I', word)[0]})"

    place = f"{len(wrong)} bytes differ from {offset + wrong[0]} to {offset + wrong[-1]}"
    return f"{place}: there is {whose(got)}, not {whose(wanted)}"


class Run:
    """All files of a run, one after the other."""

    def __init__(
        self, hands: list[Hand], folder: bytes, mode: str, seed: int, *, with_copies: bool = False, stay: int = 1
    ) -> None:
        self._hands = hands
        self._folder, self._mode, self._seed, self._with_copies, self._stay = folder, mode, seed, with_copies, stay
        self.done = 0
        self._told: deque[str] = deque(maxlen=TOLD)

    def file(self, index: int, operations: int) -> None:
        """One file from its beginning to its end. Raises Wrong."""
        draw = Random(f"{self._seed} {index}")
        path = self._folder + f"/fsx-{self._mode}-{self._seed}-{index}".encode()
        first = index * OPERATIONS_PER_FILE
        size_max = draw.choice(SIZES_MAX)
        story = Story(draw, self._mode, len(self._hands), size_max, first, self._with_copies, self._stay, path=path)
        story.begin()
        for number in range(operations):
            story.next()
            if len(story.batch) >= BATCH_MAX or number == operations - 1:
                self._make(story)
        story.end()
        self._make(story)
        self.done += operations

    def _make(self, story: Story) -> None:
        """Make the calls drawn so far, those in a row on one node as one message."""
        calls, story.batch = story.batch, []
        while calls:
            node = calls[0].node
            count = next((at for at, one in enumerate(calls) if one.node != node), len(calls))
            part, calls = calls[:count], calls[count:]
            try:
                results = self._hands[node].do(*(one.call for one in part))
            except HandLost as lost:
                for one in part:
                    self._tell(one)
                raise self._wrong(story, str(lost), part[0].number) from None
            for one, result in zip(part, results, strict=True):
                self._tell(one)
                problem = one.check(result)
                if problem:
                    raise self._wrong(story, f"operation {one.number}, {one.text}, on {self._hands[node].name}: {problem}",
                                      one.number)  # fmt: skip

    def _tell(self, one: Expected) -> None:
        if one.call[0] != "fsize":
            self._told.append(f"{one.number:9} {self._hands[one.node].name} {one.text}")

    def _wrong(self, story: Story, problem: str, number: int) -> Wrong:
        looks = []
        for hand in self._hands:
            for handle, call in ((BUFFERED, "pread"), (DIRECT, "read_direct")):
                try:
                    (got,) = hand.do((call, handle, 0, story.size_max))
                except HandLost as lost:
                    got = str(lost)
                looks.append(f"  {hand.name} {call}: {len(got)} bytes" if isinstance(got, bytes) else f"  {hand.name}: {got}")
        index = (number - 1) // OPERATIONS_PER_FILE
        replay = f"--mode {self._mode} --seed {self._seed} --first-file {index} --operations {OPERATIONS_PER_FILE}"
        replay += f" --stay {self._stay}" if self._stay > 1 else ""
        return Wrong("\n".join([*self._told, *looks, problem, f"the file is {os.fsdecode(story.path)}; replay: {replay}"]))


def run(hands: list[Hand], folder: bytes, mode: str, seed: int, operations: int, *, first_file: int = 0,
        with_copies: bool = False, stay: int = 1, say: Callable[[str], None] = lambda text: None) -> float:  # fmt: skip
    """Returns operations per second. Raises Wrong."""
    began, told = time.monotonic(), time.monotonic()
    one = Run(hands, folder, mode, seed, with_copies=with_copies, stay=stay)
    index = first_file
    while one.done < operations:
        one.file(index, min(OPERATIONS_PER_FILE, operations - one.done))
        index += 1
        if time.monotonic() - told > 10:
            told = time.monotonic()
            say(f"{mode}: {one.done:,} operations, {one.done / (told - began):.0f}/s")
    return one.done / (time.monotonic() - began)


def count(text: str) -> int:
    """1M, 200k or a number."""
    return int(float(text[:-1]) * {"k": 1_000, "M": 1_000_000}[text[-1]]) if text[-1] in "kM" else int(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/fsx", description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=LAB_DIR_DEFAULT, help="which lab")
    parser.add_argument("--node", action="append", metavar="NODE", help="may be repeated: they take turns. Default: n2")
    parser.add_argument("--folder", default="/clusterstorage/Volume1", help="where the file lies")
    parser.add_argument("--local", action="store_true", help="on this machine, in no lab")
    parser.add_argument("--mode", choices=sorted(KINDS), default="buffered")
    parser.add_argument("--operations", type=count, default=100_000, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first-file", type=int, default=0, metavar="K")
    parser.add_argument("--copies", action="store_true", help="copy_file_range, too")
    parser.add_argument("--stay", type=int, default=1, metavar="K", help="lots for the node every K operations or so")
    arguments = parser.parse_args()
    nodes = arguments.node or ["here" if arguments.local else "n2"]
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    with hands_on(None if arguments.local else arguments.dir, nodes) as hands:
        try:
            rate = run(hands, os.fsencode(arguments.folder), arguments.mode, arguments.seed, arguments.operations,
                       first_file=arguments.first_file, with_copies=arguments.copies, stay=max(1, arguments.stay),
                       say=say)  # fmt: skip
        except Wrong as wrong:
            print(wrong)
            return 1
    print(f"{arguments.operations:,} operations ({arguments.mode}, {', '.join(nodes)}, seed {arguments.seed}): "
          f"nothing wrong; {rate:.0f}/s")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
