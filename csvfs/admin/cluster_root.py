"""The directory under which a node's volumes are mounted: a small file system that is read-only.

Place      admin floor, owned by `csvfs node run`.
Why        While a volume is not mounted, its mount point is an ordinary directory: a program that writes there would
           fill the node's own disk, and its files would vanish under the mount that comes back. On a read-only
           tmpfs it gets EROFS, at once.
"""

import contextlib
import ctypes
import logging
import os
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE = b"csvfs-root"
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_REMOUNT = 32
MNT_DETACH = 2
_OPTIONS = b"size=256k,mode=755"  # directories only


class ClusterRoot:
    """Make mount points by `make_point`. Where tmpfs cannot be mounted (no root), plain directories serve."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._guarded = False

    def open(self) -> None:
        """Mount it, or take over what an earlier `node run` left mounted."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self._is_ours():
            self._guarded = True
            return
        try:
            _mount(SOURCE, self.path, b"tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, _OPTIONS)
            self._guarded = True
        except OSError as error:
            log.warning("%s is not guarded against writes beside its volumes: %s", self.path, error.strerror)

    def _is_ours(self) -> bool:
        """Whether the topmost mount at the path is our tmpfs."""
        wanted = os.fsencode(self.path)
        topmost = b""
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            fields, _, rest = line.partition(b" - ")
            if fields.split(b" ")[4] == wanted:
                topmost = rest
        return topmost.split(b" ")[:2] == [b"tmpfs", SOURCE]

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        if not self._guarded:
            yield
            return
        flags = MS_REMOUNT | MS_NOSUID | MS_NODEV
        _mount(SOURCE, self.path, b"tmpfs", flags, _OPTIONS)
        try:
            yield
        finally:
            _mount(SOURCE, self.path, b"tmpfs", flags | MS_RDONLY, _OPTIONS)

    def make_point(self, name: str) -> Path:
        """The directory for a volume's mount. Raises OSError."""
        point = self.path / name
        if name not in os.listdir(self.path):  # not Path.exists: stat of a dead mount fails or hangs
            with self._writable():
                point.mkdir()
        return point

    def remove_point(self, name: str) -> None:
        """Take the directory of an unmounted volume away; one that is not empty is somebody's, and stays."""
        with contextlib.suppress(OSError), self._writable():
            (self.path / name).rmdir()

    def close(self) -> None:
        """Detach it; programs that have it as working directory keep it until they leave."""
        if self._guarded:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.umount2(os.fsencode(self.path), MNT_DETACH) != 0:
                log.warning("%s stays mounted: %s", self.path, os.strerror(ctypes.get_errno()))
            self._guarded = False


def _mount(source: bytes, target: Path, fstype: bytes, flags: int, options: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source, os.fsencode(target), fstype, ctypes.c_ulong(flags), options) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
