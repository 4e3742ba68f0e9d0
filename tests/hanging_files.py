"""Files whose writes hang in the kernel, as on a disk that answers nothing: on a file system that is frozen."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FS_SIZE = 256 << 20


class FreezableFs:
    """An ext4 in a loop device. While it is frozen who writes to it, by a call or through a mapping, waits without
    an end, and cannot be killed before it is thawed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.frozen = False

    def freeze(self) -> None:
        os.sync()  # a freeze waits for what is dirty
        subprocess.run(["fsfreeze", "-f", self.folder], check=True, timeout=60)
        self.frozen = True

    def thaw(self) -> None:
        if self.frozen:
            subprocess.run(["fsfreeze", "-u", self.folder], check=True, timeout=60)
            self.frozen = False


@contextmanager
def freezable_fs(folder: Path, size: int = FS_SIZE) -> Iterator[FreezableFs]:
    """Skips the test where there is no loop device to be had."""
    image, mounted = folder / "image", folder / "mounted"
    mounted.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, timeout=60)
    done = subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip(f"no loop device can be mounted here: {done.stderr.strip()}")
    fs = FreezableFs(mounted)
    try:
        yield fs
    finally:
        fs.thaw()
        subprocess.run(["umount", "-l", mounted], check=True, timeout=60)
