"""What comes at the end of using a file, as the kernel asks for it: FLUSH, FSYNC, RELEASE, FORGET.

Place      mount floor; a part of channel.py. pyfuse3 gives its handlers of these a handle and no inode.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol

from csvfs.mount import fuse_abi as abi
from csvfs.mount.answers import Answers, Handler
from csvfs.mount.barred import Barred
from csvfs.mount.file_locks import FileLocks


class Files(Protocol):
    """Of the file table."""

    async def fsync(self, ino: int) -> None: ...
    async def flush(self, ino: int) -> None: ...
    def flush_is_due(self, ino: int) -> bool: ...
    def closed(self, ino: int, writing: bool) -> None: ...
    def forget(self, ino: int) -> None: ...


class Directories(Protocol):
    """Of the operations."""

    async def fsync_directory(self) -> None: ...
    def close_directory(self, fh: int) -> None: ...


class Lookups(Protocol):
    """Of the relay."""

    def forget(self, ino: int, lookups: int) -> bool: ...


class Opened(Protocol):
    """See inode_rows.InodeRows."""

    def opened(self, ino: int, writing: bool, count: int = 1) -> None: ...


class ClosingRequests:
    def __init__(
        self,
        answers: Answers,
        files: Files,
        directories: Directories,
        lookups: Lookups,
        barred: Barred,
        noted: Opened | None,
        locks: FileLocks | None,
    ) -> None:
        """noted: is told which files are no longer open; None: nobody. locks: None: there are none."""
        self._answers = answers
        self._files = files
        self._directories = directories
        self._lookups = lookups
        self._barred = barred
        self._noted = noted
        self._locks = locks

    def handlers(self) -> dict[int, Handler]:
        start, then_ok = self._answers.start, self._answers.then_ok
        return {
            abi.FLUSH: self._on_flush,
            abi.FSYNC: lambda unique, node, _: start(unique, then_ok, self._files.fsync, node),
            abi.FSYNCDIR: lambda unique, _n, _: start(unique, then_ok, self._directories.fsync_directory),
            abi.RELEASE: self._on_release,
            abi.RELEASEDIR: self._on_release_directory,
            abi.FORGET: self._on_forget,
            abi.BATCH_FORGET: self._on_batch_forget,
        }

    def _on_flush(self, unique: int, node: int, body: memoryview) -> None:
        answers = self._answers
        if self._locks is not None and self._locks.is_due(node, body):
            answers.start(unique, self._flush_with_locks, self._locks, node, abi.FLUSH_IN.unpack_from(body)[3])
        elif self._files.flush_is_due(node):
            answers.start(unique, answers.then_ok, self._files.flush, node)
        else:
            answers.errno(unique, 0)

    async def _flush_with_locks(self, unique: int, locks: FileLocks, node: int, owner: int) -> None:
        try:
            await self._files.flush(node)
        finally:
            await locks.flush(node, owner)
        self._answers.errno(unique, 0)

    def _on_release(self, unique: int, node: int, body: memoryview) -> None:
        handle, flags, _, _ = abi.RELEASE_IN.unpack_from(body)
        # The flags are those of the open: fcntl(2) does not change the access mode.
        closing = None if self._locks is None else self._locks.closing(node, handle)
        if closing is None:
            self._released(unique, node, handle, abi.may_write(flags))
        else:
            self._answers.start(unique, self._release_with_locks, closing, node, handle, abi.may_write(flags))

    async def _release_with_locks(
        self, unique: int, closing: Callable[[], Awaitable[None]], node: int, handle: int, writing: bool
    ) -> None:
        await closing()
        self._released(unique, node, handle, writing)

    def _released(self, unique: int, node: int, handle: int, writing: bool) -> None:
        self._answers.errno(unique, 0)  # first: one that is asked anew would count twice
        self._barred.released(node, handle)
        self._files.closed(node, writing)
        if self._noted is not None:
            self._noted.opened(node, writing, -1)

    def _on_release_directory(self, unique: int, _node: int, body: memoryview) -> None:
        self._directories.close_directory(abi.RELEASE_IN.unpack_from(body)[0])
        self._answers.errno(unique, 0)

    def _on_forget(self, _unique: int, node: int, body: memoryview) -> None:
        self._forget(node, abi.FORGET_IN.unpack_from(body)[0])  # expects no answer

    def _on_batch_forget(self, _unique: int, _node: int, body: memoryview) -> None:
        count, _ = abi.BATCH_FORGET_IN.unpack_from(body)
        rows = body[abi.BATCH_FORGET_IN.size :]
        if len(rows) < count * abi.FORGET_ONE.size:
            raise ValueError(f"BATCH_FORGET of {count} inodes in {len(rows)} bytes")
        for node, lookups in abi.FORGET_ONE.iter_unpack(rows[: count * abi.FORGET_ONE.size]):
            self._forget(node, lookups)

    def _forget(self, node: int, lookups: int) -> None:
        if self._lookups.forget(node, lookups):
            self._files.forget(node)
