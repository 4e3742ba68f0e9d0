"""fsx itself: what it says of a file system that is right, and of one that is not."""

import os
from pathlib import Path

import pytest

from tests.programs import fsx
from tests.programs.hand import CALLS
from tests.programs.hands import Hand, hands_on
from tests.programs.model import Model, Refused


class Liar(Hand):
    """A hand behind which the last bit of a file changes by itself now and then, once so many writes have been made."""

    def __init__(self, hand: Hand, path: Path, after: int) -> None:
        self._hand, self._path, self._left = hand, path, after
        self.name = hand.name

    def do(self, *calls):
        results = self._hand.do(*calls)
        self._left -= sum(call[0] == "pwrite" for call in calls)
        if self._left < 0 and self._path.exists() and self._path.stat().st_size:
            with self._path.open("r+b") as file:
                last = file.read()[-1]
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last ^ 1]))
        return results


@pytest.mark.parametrize("mode", sorted(fsx.KINDS))
def test_nothing_is_wrong_with_a_local_file_system(tmp_path, mode):
    with hands_on(None, ["here"]) as hands:
        fsx.run(hands, os.fsencode(tmp_path), mode, seed=3, operations=300)


def test_a_single_flipped_bit_is_found_and_said_who_wrote_there(tmp_path):
    with hands_on(None, ["here"]) as hands:
        liar = Liar(hands[0], tmp_path / "fsx-buffered-1-0", after=20)
        with pytest.raises(fsx.Wrong, match=r"bytes differ.*\(operation \d+\)"):
            fsx.run([liar], os.fsencode(tmp_path), "buffered", seed=1, operations=3000)


def test_the_model_refuses_as_linux_does(tmp_path):
    """Every errno of the model that this machine's own file system can be asked for."""
    model = Model()
    for path in (b"d", b"d/e"):
        model.mkdir(path, 0o755)
        os.mkdir(os.fsencode(tmp_path) + b"/" + path)
    model.symlink(b"loop", b"loop")
    os.symlink(b"loop", os.fsencode(tmp_path) + b"/loop")
    asked = [
        ("mkdir", b"d", 0o755), ("mkdir", b"x/y", 0o755), ("rmdir", b"d"), ("rmdir", b"loop"), ("unlink", b"d"),
        ("unlink", b"x"), ("rename", b"d", b"d/e/f", 0), ("rename", b"d/e", b"d", 0), ("rename", b"d", b"d/e", 2),
        ("rename", b"d/e", b"loop", 1), ("rename", b"d/e", b"x", 2), ("rename", b"loop", b"d", 0),
        ("rename", b"d", b"loop", 0), ("list", b"loop"), ("list", b"loop/x"), ("link", b"d", b"x"), ("readlink", b"d"),
        ("truncate", b"d", 0), ("getxattr", b"d", b"user.no"),
    ]  # fmt: skip
    for name, *arguments in asked:
        with pytest.raises(Refused) as refused:
            getattr(model, name)(*arguments)
        paths = 2 if name in ("rename", "link") else 1
        real = [os.fsencode(tmp_path) + b"/" + a if at < paths else a for at, a in enumerate(arguments)]
        with pytest.raises(OSError) as error:
            CALLS[name](*real)
        assert error.value.errno == refused.value.code, (name, arguments, error.value)
