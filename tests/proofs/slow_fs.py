"""A file system that is as slow, or as broken, as its control file says: for drive files of a lab.

Place      tests; a process of its own, `python -m tests.proofs.slow_fs SOURCE MOUNT_POINT CONTROL`. Passes what is done to
           the files of the directory SOURCE through to them, after a delay.
Control    a JSON file that is read again when it has changed: `read_ms`, `write_ms`, `fsync_ms` (delays of each
           request, 0), `fail` (a list of "read", "write", "fsync": these get EIO).
Honest     The kernel caches and writes back as for a disk (writeback cache), so a drive server sees what it sees of a
           slow disk: writes are quick until too many pages are dirty, cold reads and flushes are slow.
"""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyfuse3
import trio

ROOT = pyfuse3.ROOT_INODE
CACHE_S = 3600.0  # nobody else changes the files


class Faults:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = 0
        self._values: dict[str, Any] = {}

    async def suffer(self, kind: str) -> None:
        """Wait as long as a request of this kind takes. Raises FUSEError when it fails."""
        changed = self._path.stat().st_mtime_ns
        if changed != self._seen:
            self._values, self._seen = json.loads(self._path.read_text()), changed
        delay_ms = self._values.get(f"{kind}_ms", 0)
        if delay_ms:
            await trio.sleep(delay_ms / 1000)
        if kind in self._values.get("fail", ()):
            raise pyfuse3.FUSEError(errno.EIO)


class SlowFiles(pyfuse3.Operations):
    enable_writeback_cache = True

    def __init__(self, source: Path, faults: Faults) -> None:
        super().__init__()
        self._names = dict(enumerate(sorted(os.listdir(source)), ROOT + 1))
        self._fds = {inode: os.open(source / name, os.O_RDWR) for inode, name in self._names.items()}
        self._source = source
        self._faults = faults

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        status = os.stat(self._source) if inode == ROOT else os.fstat(self._fds[inode])
        entry = pyfuse3.EntryAttributes()
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(entry, name, getattr(status, name))
        entry.st_ino, entry.st_blksize, entry.st_blocks = inode, 4096, status.st_blocks
        entry.entry_timeout = entry.attr_timeout = CACHE_S
        return entry

    async def lookup(self, parent, name, ctx=None):
        for inode, known in self._names.items():
            if os.fsencode(known) == name:
                return self._attributes(inode)
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def getattr(self, inode, ctx=None):
        return self._attributes(inode)

    async def setattr(self, inode, attr, fields, fh, ctx):
        if fields.update_size:
            os.ftruncate(self._fds[inode], attr.st_size)
        return self._attributes(inode)

    async def statfs(self, ctx):
        found, below = pyfuse3.StatvfsData(), os.statvfs(self._source)
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(found, name, getattr(below, name))
        return found

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def opendir(self, inode, ctx):
        return inode

    async def readdir(self, fh, start_id, token):
        for inode, name in self._names.items():
            if inode > start_id and not pyfuse3.readdir_reply(
                token, os.fsencode(name), self._attributes(inode), inode
            ):
                return

    async def read(self, fh, off, size):
        await self._faults.suffer("read")
        return await trio.to_thread.run_sync(os.pread, self._fds[fh], size, off)

    async def write(self, fh, off, buf):
        await self._faults.suffer("write")
        return await trio.to_thread.run_sync(os.pwrite, self._fds[fh], buf, off)

    async def fsync(self, fh, datasync):
        await self._faults.suffer("fsync")
        await trio.to_thread.run_sync(os.fdatasync, self._fds[fh])

    async def flush(self, fh):
        pass

    async def release(self, fh):
        pass


async def serve() -> None:
    await pyfuse3.main()


def main() -> None:
    source, mount_point, control = (Path(argument) for argument in sys.argv[1:4])
    files = SlowFiles(source, Faults(control))
    options = set(pyfuse3.default_options) | {"fsname=slow", "allow_other"}
    options.discard("default_permissions")
    pyfuse3.init(files, str(mount_point), options)
    try:
        trio.run(serve)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
