"""Processes on the nodes of a lab that make system calls at our word: thousands a second, one at a time.

Place      tests, over lab_cluster.py; the other end: hand.py.
"""

import contextlib
import errno
import marshal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from csvfs.admin.lab_files import lab_files
from csvfs.admin.lab_processes import start_in_node
from tests.programs.hand import SIZE

Call = tuple[Any, ...]
_PROGRAM = str(Path(__file__).with_name("hand.py"))


class HandLost(Exception):
    """The process is gone: a signal (SIGBUS: a mapped page could not be had), or its node."""


class Hand:
    """One process. `do` blocks until the calls are made, however long they take."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self._process = process
        self.name = name

    def send(self, calls: Sequence[Call]) -> None:
        """Begin; `receive` is to follow."""
        message = marshal.dumps(list(calls))
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(SIZE.pack(len(message)) + message)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._lost() from None

    def receive(self) -> list[Any]:
        assert self._process.stdout is not None
        head = self._process.stdout.read(SIZE.size)
        body = self._process.stdout.read(SIZE.unpack(head)[0]) if len(head) == SIZE.size else b""
        if not body:
            raise self._lost()
        return list(marshal.loads(body))

    def do(self, *calls: Call) -> list[Any]:
        """Their results in order; an error is ("!", errno). Raises HandLost."""
        self.send(calls)
        return self.receive()

    def must(self, *call: Any) -> Any:
        """The result of one call that has to succeed. Raises OSError."""
        (result,) = self.do(call)
        if isinstance(result, tuple) and result[:1] == ("!",):
            raise OSError(result[1], f"{call[0]} on {self.name}: {errno.errorcode.get(result[1], result[1])}")
        return result

    def end(self) -> None:
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=30)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _lost(self) -> HandLost:
        return HandLost(f"the process on {self.name} ended with status {self._process.wait(timeout=30)}")


def start_hand(lab_directory: Path | None, node: str) -> Hand:
    """On a node of a lab; without a lab, on this machine."""
    argv = [sys.executable, "-S", _PROGRAM]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    if lab_directory is None:
        return Hand(subprocess.Popen(argv, **pipes), node)
    files = lab_files(lab_directory)
    return Hand(start_in_node(files, files.node_named(node), argv, **pipes), node)


@contextlib.contextmanager
def hands_on(lab_directory: Path | None, nodes: Sequence[str]) -> Iterator[list[Hand]]:
    """A process on each of the nodes, ended afterwards."""
    with contextlib.ExitStack() as stack:
        hands = []
        for node in nodes:
            hands.append(start_hand(lab_directory, node))
            stack.callback(hands[-1].end)
        yield hands
