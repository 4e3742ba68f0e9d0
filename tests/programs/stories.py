"""Random stories of two nodes, played on a volume and in a model; what they answer must be the same.

Place      tests, over hands.py and model.py. A step is a tuple of small numbers, so that hypothesis can make a story
           smaller; step kind 0 does nothing, and is left out of what is told.
By hand    `python -m tests.programs.stories LAB FOLDER STORIES SEED`.
Looks      after half of the changes the other node looks at what was changed. At the end both nodes show everything.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tests.programs.hands import Call, Hand, hands_on
from tests.programs.model import EXCHANGE, NOREPLACE, XATTR_CREATE, XATTR_REPLACE, Model, Refused

Step = tuple[int, int, int, int, int]  # kind, node, two picks, a size or the like

NAMES = (b"a", b"b", b"c")
PATHS = (
    *NAMES, *(one + b"/" + two for one in NAMES for two in NAMES), b"a/b", b"a/c", b"b/a", b"b/c", b"a/a/a", b"b/a/b",
    b"b/" + b"long" * 60,
)  # fmt: skip
TARGETS = (b"a", b"b", b"c/a", b"a/b", b"nowhere/a")
MODES = (0o644, 0o600, 0o755, 0o2755, 0o4755, 0o1755, 0o2644, 0)
OWNERS = (-1, 0, 1000, 4_000_000_000)
ATTRIBUTES = (b"user.a", b"user.b", b"trusted.c")
HANDLES = 3  # per node
SIZES = (0, 1, 100, 4095, 4096, 4097, 10_000, 40_000)
FLAGS = (0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_CREAT | os.O_TRUNC, os.O_CREAT | os.O_APPEND, os.O_NOFOLLOW)
FALLOCATE_MODES = (0, 1, 3, 16, 17)
STEP_BYTES = 5


def steps_of(data: bytes) -> Iterator[Step]:
    for at in range(0, len(data), STEP_BYTES):
        kind, node, one, two, number = data[at : at + STEP_BYTES]
        yield kind, node % 2, one, two, number


def _pick(from_: Sequence[Any], number: int) -> Any:
    return from_[number % len(from_)]


def _show(value: Any) -> str:
    if isinstance(value, tuple) and value[:1] == ("!",):
        return errno.errorcode.get(value[1], str(value[1]))
    if isinstance(value, bytes) and len(value) > 60:
        return f"{value[:20]!r}... of {len(value)} bytes"
    return repr(value)


class Story:
    """One story in a folder of its own. `told`: its steps so far, for who reads of a failure."""

    def __init__(self, hands: Sequence[Hand], folder: bytes) -> None:
        self.hands, self.folder = hands, folder
        self.model = Model()
        self.told: list[str] = []
        self._writes = 0
        hands[0].must("mkdir", folder, 0o755)
        for path in (b"a", b"b"):
            self._make(0, "mkdir", path, 0o755)

    # -- playing ----------------------------------------------------------------------------------

    def play(self, step: Step, kinds: Sequence[str | None]) -> None:
        """Raises AssertionError: the volume answers otherwise than the model."""
        kind, node, one, two, number = step
        tell = kinds[kind % len(kinds)]
        if tell is not None:
            getattr(self, tell)(node, one, two, number)

    def _make(self, node: int, name: str, *arguments: Any, look: bytes | None = None, paths: int = 1, handle: bool = False,
              compare: Callable[[Any], Any] = lambda got: got) -> Any:  # fmt: skip
        """Make a call on a node and in the model. `paths`: so many of the first arguments are paths; of a symlink the
        second alone. `look`: the other node looks there if the call changed something.
        """
        try:
            wanted = getattr(self.model, name)(*arguments)
        except Refused as refused:
            wanted = ("!", refused.code)
        first = 1 if name in ("symlink", "open") else 0
        real = [self._real(a) if first <= at < first + paths and not handle else a for at, a in enumerate(arguments)]
        calls: list[Call] = [(name, *real)]
        (got,) = self.hands[node].do(*calls)
        got = compare(got)
        self.told.append(f"{self.hands[node].name} {name} {' '.join(_show(a) for a in arguments)} = {_show(wanted)}")
        if not agrees(wanted, got):
            again = ", ".join(f"{hand.name} {_show(compare(hand.do(*calls)[0]))}" for hand in self.hands)
            raise AssertionError(f"{self.told[-1]}, but the volume says {_show(got)}; asked again: {again}")
        if look is not None and len(self.told) % 2 and not (isinstance(wanted, tuple) and wanted[:1] == ("!",)):
            self._look(1 - node, look)
        return wanted

    def _real(self, path: bytes) -> bytes:
        return self.folder + b"/" + path

    def _look(self, node: int, path: bytes) -> None:
        self._make(node, "lstat", path, compare=facts)

    # -- names ------------------------------------------------------------------------------------

    def _mkdir(self, node: int, one: int, two: int, number: int) -> None:
        path = _pick(PATHS[:12], one)
        self._make(node, "mkdir", path, _pick((0o755, 0o700, 0o1755), two), look=path)

    def _symlink(self, node: int, one: int, two: int, number: int) -> None:
        path = _pick(PATHS, one)
        self._make(node, "symlink", _pick(TARGETS, two), path, look=path)

    def _readlink(self, node: int, one: int, two: int, number: int) -> None:
        self._make(node, "readlink", _pick(PATHS, one))

    def _link(self, node: int, one: int, two: int, number: int) -> None:
        self._make(node, "link", _pick(PATHS, one), _pick(PATHS, two), paths=2, look=_pick(PATHS, two))

    def _unlink(self, node: int, one: int, two: int, number: int) -> None:
        self._make(node, "unlink", _pick(PATHS, one), look=_pick(PATHS, one))

    def _rmdir(self, node: int, one: int, two: int, number: int) -> None:
        self._make(node, "rmdir", _pick(PATHS[:12], one), look=_pick(PATHS[:12], one))

    def _rename(self, node: int, one: int, two: int, number: int) -> None:
        flags = _pick((0, 0, NOREPLACE, EXCHANGE), number)
        path, new = _pick(PATHS, one), _pick(PATHS, two)
        # Linux cannot find a directory at its new place while it renames: ESTALE (README, "Limits"). So look before.
        self._look(node, path)
        self._look(node, new)
        self._make(node, "rename", path, new, flags, paths=2, look=new)

    def _list(self, node: int, one: int, two: int, number: int) -> None:
        self._make(node, "list", _pick(PATHS[:12], one))

    def _lstat(self, node: int, one: int, two: int, number: int) -> None:
        self._look(node, _pick(PATHS, one))

    # -- attributes -------------------------------------------------------------------------------

    def _chmod(self, node: int, one: int, two: int, number: int) -> None:
        self._make(node, "chmod", _pick(PATHS, one), _pick(MODES, two), look=_pick(PATHS, one))

    def _chown(self, node: int, one: int, two: int, number: int) -> None:
        path = _pick(PATHS, one)
        self._make(node, "chown", path, _pick(OWNERS, two), _pick(OWNERS, number), look=path)

    def _utimens(self, node: int, one: int, two: int, number: int) -> None:
        path = _pick(PATHS, one)
        self._make(node, "utimens", path, 1_000_000_007 * two, 1_000_000_007 * number, look=path)

    def _setxattr(self, node: int, one: int, two: int, number: int) -> None:
        flags = _pick((0, 0, XATTR_CREATE, XATTR_REPLACE), number)
        name = _pick(ATTRIBUTES, two)
        if self._attribute_call(node, "setxattr", _pick(PATHS, one), name, b"%d" % number * 9, flags):
            self._attribute_call(1 - node, "getxattr", _pick(PATHS, one), name)

    def _getxattr(self, node: int, one: int, two: int, number: int) -> None:
        self._attribute_call(node, "getxattr", _pick(PATHS, one), _pick(ATTRIBUTES, two))

    def _removexattr(self, node: int, one: int, two: int, number: int) -> None:
        if self._attribute_call(node, "removexattr", _pick(PATHS, one), _pick(ATTRIBUTES, two)):
            self._attribute_call(1 - node, "getxattr", _pick(PATHS, one), _pick(ATTRIBUTES, two))

    def _attribute_call(self, node: int, name: str, path: bytes, *arguments: Any) -> bool:
        return not isinstance(self._make(node, name, path, *arguments), tuple)

    # -- open files -------------------------------------------------------------------------------

    def _handle(self, node: int, pick: int) -> int | None:
        """An open one of the node; None: it has none."""
        handles = [handle for handle in sorted(self.model.files) if handle // HANDLES == node]
        return _pick(handles, pick) if handles else None

    def _open(self, node: int, one: int, two: int, number: int) -> None:
        handle, path = node * HANDLES + number % HANDLES, _pick(PATHS, one)
        if handle in self.model.files:
            self._make(node, "close", handle, handle=True)
        self._make(node, "open", handle, path, _pick(FLAGS, two) | os.O_RDWR, 0o644, look=path)

    def _on_handle(self, node: int, pick: int, name: str, *arguments: Any, changes: bool = False) -> None:
        handle = self._handle(node, pick)
        if handle is None:
            return
        self._make(node, name, handle, *arguments, handle=True, compare=facts if name == "fstat" else lambda got: got)
        if changes and len(self.told) % 2:
            self._see(1 - node, self.model.files[handle].inode)

    def _see(self, node: int, inode: Any) -> None:
        """The other node looks at a file that was changed, if it has it open."""
        for handle, file in self.model.files.items():
            if handle // HANDLES == node and file.inode is inode:
                self._make(node, "fstat", handle, handle=True, compare=facts)
                return

    def _close(self, node: int, one: int, two: int, number: int) -> None:
        self._on_handle(node, one, "close") if self._handle(node, one) is not None else None

    def _pwrite(self, node: int, one: int, two: int, number: int) -> None:
        self._writes += 1
        data = (b"%07d " % self._writes * 6000)[: _pick(SIZES, number)]
        self._on_handle(node, one, "pwrite", _pick(SIZES, two), data, changes=True)

    def _pread(self, node: int, one: int, two: int, number: int) -> None:
        self._on_handle(node, one, "pread", _pick(SIZES, two), _pick(SIZES, number))

    def _ftruncate(self, node: int, one: int, two: int, number: int) -> None:
        self._on_handle(node, one, "ftruncate", _pick(SIZES, two) + number % 3, changes=True)

    def _truncate(self, node: int, one: int, two: int, number: int) -> None:
        self._make(node, "truncate", _pick(PATHS, one), _pick(SIZES, two), look=_pick(PATHS, one))

    def _fallocate(self, node: int, one: int, two: int, number: int) -> None:
        mode = FALLOCATE_MODES[two % len(FALLOCATE_MODES)]
        size = 1 + _pick(SIZES, number)
        self._on_handle(node, one, "fallocate", mode, _pick(SIZES, two // 5), size, changes=True)

    def _seek(self, node: int, one: int, two: int, number: int) -> None:
        """A hole is as long as the file system says, but what is passed over must be zeros."""
        handle = self._handle(node, one)
        if handle is None:
            return
        data, offset = self.model.files[handle].inode.data, _pick(SIZES, two)
        (got,) = self.hands[node].do(("seek", handle, offset, os.SEEK_DATA))
        self.told.append(f"{self.hands[node].name} seek {handle} {offset} SEEK_DATA")
        if got == ("!", errno.ENXIO):
            assert not any(data[offset:]), f"{self.told[-1]}: no data, but there is"
        else:
            assert isinstance(got, int) and offset <= got < len(data), f"{self.told[-1]}: {got}"
            assert not any(data[offset:got]), f"{self.told[-1]}: {got} passes data over"

    def _fstat(self, node: int, one: int, two: int, number: int) -> None:
        self._on_handle(node, one, "fstat")

    def _fsync(self, node: int, one: int, two: int, number: int) -> None:
        self._on_handle(node, one, "fsync")

    # -- the end ----------------------------------------------------------------------------------

    def end(self) -> None:
        """Everything that is open, and everything that has a name, on both nodes."""
        for handle, file in self.model.files.items():
            (got,) = self.hands[handle // HANDLES].do(("pread", handle, 0, 1 << 20))
            assert got == bytes(file.inode.data), f"open file {handle} on {self.hands[handle // HANDLES].name} differs"
        wanted = list(self.model.tree())
        for hand in self.hands:
            rows = hand.must("tree", self.folder)
            found = [(path[len(self.folder) :], facts(what), held, values) for path, what, held, values in rows]
            for one, other in zip(wanted, found, strict=False):
                same = one[0] == other[0] and agrees(one[1], other[1]) and one[2:] == other[2:]
                assert same, f"on {hand.name} there is {other}, not {one}"
            assert len(wanted) == len(found), f"{hand.name} has {len(found)} names, not {len(wanted)}"

    def close(self) -> None:
        for hand in self.hands:
            hand.do(("close_all",))


KINDS: tuple[str | None, ...] = (
    None, "_mkdir", "_symlink", "_link", "_unlink", "_rmdir", "_rename", "_rename", "_list", "_lstat", "_lstat",
    "_readlink", "_chmod", "_chown", "_utimens", "_setxattr", "_getxattr", "_removexattr", "_open", "_open", "_open",
    "_close", "_pwrite", "_pwrite", "_pwrite", "_pread", "_pread", "_pread", "_ftruncate", "_truncate", "_fallocate",
    "_seek", "_fstat", "_fsync",
)  # fmt: skip


def facts(found: Any) -> Any:
    """As model.Inode.facts, of what `lstat` answers."""
    if not isinstance(found, tuple) or found[:1] == ("!",):
        return found
    mode, links, uid, gid, size, _, modified, _ = found
    return mode, links, uid, gid, None if stat.S_ISDIR(mode) else size, modified


def agrees(wanted: Any, got: Any) -> bool:
    """Of facts: the modification time may be unknown."""
    if isinstance(wanted, tuple) and isinstance(got, tuple) and len(wanted) == len(got) == 6:
        return wanted[:5] == got[:5] and wanted[5] in (None, got[5])
    return bool(wanted == got)


def main(lab: str, folder: str, stories: str, seed: str) -> None:
    with hands_on(Path(lab), ("n1", "n2")) as hands:
        for number in range(int(stories)):
            draw = Random(f"{seed} {number}")
            story = Story(hands, os.fsencode(f"{folder}/{os.getpid()}-{number}"))
            try:
                for step in steps_of(draw.randbytes(200 * STEP_BYTES)):
                    story.play(step, KINDS)
                story.end()
            except AssertionError:
                print("\n".join(story.told))
                raise
            story.close()
    print(f"{stories} stories of 200 steps: nothing wrong")


if __name__ == "__main__":
    main(*sys.argv[1:])
