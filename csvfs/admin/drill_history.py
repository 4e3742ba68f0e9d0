"""What the programs of a drill did and saw: operations, as they are logged, and the records they write. Pure.

Place      admin floor, below drill_writer.py, which logs, and drill_judge.py, which reads.
Log        one file per thread of a program, on another file system than the volume: two lines for each operation,
           `B number kind ns what` before it is asked for, `D number ns errno seen` when it was answered; `what` is the
           effects `key=value,...` of a change, the key of a look, or `-`. Times are CLOCK_MONOTONIC, which all processes
           of one machine share. A line that a kill cut off does not count.
Keys       of one program's folder: a block `b7` of the file that is overwritten, `a7` of the one that grows, `s0` of the
           one that others read, a name (`f7`, `g7`, `d7`), or `pointer`, a symbolic link. Each has one writer, which waits
           for every answer: so what a key has held is one sequence of values.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

RECORD_SIZE = 4096
RECORD_MAGIC = b"csvfsDRL"
_HEAD = struct.Struct("<8s32s16sQ")  # magic, program, key, value
_TAIL_WORDS = (RECORD_SIZE - _HEAD.size) // 8
assert _HEAD.size + 8 * _TAIL_WORDS == RECORD_SIZE

NOTHING = "0"  # of a block that was never written
ABSENT, PRESENT = "absent", "present"
TORN = "torn"  # a block that is no record of ours, or one of another place
NAMES_OF_LIST = "*"  # the key of a look at a whole folder

READ, WRITE, APPEND, NAMES = "read", "write", "append", "names"  # threads of a worker
SHARED, POINTER = "shared", "pointer"  # and of what others look at
PEEK, LOOK = "peek", "look"  # of one that watches a worker from another node
FINAL = "final"  # of the one that reads everything back


@dataclass(slots=True, frozen=True)
class Operation:
    """`effects`: what a change makes of which key. `key`: what a look looks at, `seen` what it saw."""

    program: str
    folder: str  # whose keys
    thread: str
    number: int
    kind: str
    begin_ns: int
    end_ns: int | None  # None: it was never answered
    errno: int = 0
    effects: tuple[tuple[str, str], ...] = ()
    key: str = ""
    seen: str = ""

    @property
    def is_acknowledged(self) -> bool:
        return self.end_ns is not None and self.errno == 0


def record(program: str, key: str, value: int) -> bytes:
    """A block that says where it belongs and which write made it, from its first byte to its last."""
    head = _HEAD.pack(RECORD_MAGIC, program.encode(), key.encode(), value)
    return head + value.to_bytes(8, "little") * _TAIL_WORDS


def value_of(block: bytes, program: str, key: str) -> str:
    """Which write made the block; NOTHING of zeros and of what lies behind the end; TORN of anything else."""
    if not block.strip(b"\0"):
        return NOTHING
    if len(block) == RECORD_SIZE:
        value = int(_HEAD.unpack_from(block)[3])
        if block == record(program, key, value):
            return str(value)
    return TORN


def begin_line(number: int, kind: str, ns: int, what: str) -> bytes:
    return f"B {number} {kind} {ns} {what or '-'}\n".encode()


def done_line(number: int, ns: int, errno: int, seen: str) -> bytes:
    return f"D {number} {ns} {errno} {seen or '-'}\n".encode()


def parse_log(text: str, program: str, folder: str, thread: str) -> list[Operation]:
    """The operations of one log, in order. ValueError: it is none."""
    lines = text.split("\n")[:-1]  # behind the last line end is nothing, or what a kill cut off
    begun: dict[int, tuple[str, int, str]] = {}
    done: dict[int, tuple[int, int, str]] = {}
    for line in lines:
        fields = line.split(" ", 4)
        if fields[0] == "B" and len(fields) == 5:
            begun[int(fields[1])] = (fields[2], int(fields[3]), fields[4])
        elif fields[0] == "D" and len(fields) == 5:
            done[int(fields[1])] = (int(fields[2]), int(fields[3]), fields[4])
        else:
            raise ValueError(f"log of {program}, {thread}: no line of a drill: {line[:80]!r}")
    return [
        _operation(program, folder, thread, number, begin, done.get(number)) for number, begin in sorted(begun.items())
    ]


def _operation(
    program: str, folder: str, thread: str, number: int, begin: tuple[str, int, str], end: tuple[int, int, str] | None
) -> Operation:
    kind, begin_ns, what = begin
    effects = tuple((key, value) for key, _, value in (part.partition("=") for part in what.split(",") if "=" in part))
    end_ns, errno, seen = end if end is not None else (None, 0, "-")
    return Operation(
        program=program,
        folder=folder,
        thread=thread,
        number=number,
        kind=kind,
        begin_ns=begin_ns,
        end_ns=end_ns,
        errno=errno,
        effects=effects,
        key="" if effects or what == "-" else what,
        seen="" if seen == "-" else seen,
    )


def count_acknowledged(operations: Iterable[Operation]) -> tuple[int, int]:
    """How many changes were acknowledged, and how many of them are behind an fsync that was acknowledged."""
    acknowledged = fsynced = 0
    waiting: dict[tuple[str, str], int] = {}
    for operation in operations:
        where = (operation.program, operation.thread)
        if not operation.is_acknowledged:
            continue
        if operation.effects:
            acknowledged += 1
            waiting[where] = waiting.get(where, 0) + 1
        elif operation.kind == "fsync":
            fsynced += waiting.pop(where, 0)
    return acknowledged, fsynced
