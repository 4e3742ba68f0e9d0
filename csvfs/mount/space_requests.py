"""Where a file has space, as the kernel asks for it: fallocate(2), lseek(2) for data and holes, copy_file_range(2).

Place      mount floor; a part of channel.py. pyfuse3 knows none of these.
"""

import errno
from typing import Protocol

from csvfs.mount import fuse_abi as abi
from csvfs.mount.answers import Answers, Handler


class Space(Protocol):
    """Of the file table."""

    async def fallocate(self, ino: int, offset: int, length: int, mode: int) -> None: ...
    async def seek(self, ino: int, offset: int, whence: int) -> int | None: ...
    async def copy_range(self, ino: int, offset: int, target: int, target_offset: int, length: int) -> int: ...


class SpaceRequests:
    def __init__(self, answers: Answers, files: Space) -> None:
        self._answers = answers
        self._files = files

    def handlers(self) -> dict[int, Handler]:
        return {
            abi.FALLOCATE: self._on_fallocate,
            abi.LSEEK: self._on_lseek,
            abi.COPY_FILE_RANGE: self._on_copy,
        }

    def _on_fallocate(self, unique: int, node: int, body: memoryview) -> None:
        _, offset, length, mode, _ = abi.FALLOCATE_IN.unpack_from(body)
        self._answers.start(unique, self._answers.then_ok, self._files.fallocate, node, offset, length, mode)

    def _on_lseek(self, unique: int, node: int, body: memoryview) -> None:
        _, offset, whence, _ = abi.LSEEK_IN.unpack_from(body)
        self._answers.start(unique, self._seek, node, offset, whence)

    async def _seek(self, unique: int, node: int, offset: int, whence: int) -> None:
        found = await self._files.seek(node, offset, whence)
        if found is None:
            self._answers.errno(unique, errno.ENXIO)
        else:
            self._answers.reply(unique, (abi.pack_lseek_reply(unique, found),))

    def _on_copy(self, unique: int, node: int, body: memoryview) -> None:
        _, offset, target, _, target_offset, length, flags = abi.COPY_FILE_RANGE_IN.unpack_from(body)
        if flags or max(offset, target_offset, length) >= 1 << 63:
            self._answers.errno(unique, errno.EINVAL)
            return
        size = min(length, abi.COPY_SIZE_MAX)
        self._answers.start(unique, self._copy, node, offset, target, target_offset, size)

    async def _copy(self, unique: int, *args: int) -> None:
        self._answers.reply(unique, (abi.pack_write_reply(unique, await self._files.copy_range(*args)),))
