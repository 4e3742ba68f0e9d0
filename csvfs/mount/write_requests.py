"""WRITE, as the kernel asks for it: taken at once where the file table can, else by a task; answered when it is done.

Place      mount floor; a part of channel.py.
Buffers    a large WRITE keeps the buffer that it was read into until it is done, and requests are read into another one:
           its data is not copied. LARGE_BUFFERS_MAX of them are out at most; then data is copied.
"""

import errno
import os
from collections.abc import Callable
from typing import Protocol

from csvfs.errors import Fenced
from csvfs.mount import fuse_abi as abi
from csvfs.mount.answers import Answers, Handler
from csvfs.mount.request_journal import UNIQUE_MASK, RequestJournal
from csvfs.mount.write_path import WRITE_APPEND
from csvfs.units import KIB

COPY_SIZE_MAX = 64 * KIB  # data up to here is copied; larger data keeps the request's buffer
LARGE_BUFFERS_MAX = 32  # of 1 MiB each

Done = Callable[[Exception | None], None]


class Ending(Protocol):
    def ended(self) -> None: ...


class Writes(Protocol):
    """Of the file table."""

    def write_nowait(self, ino: int, offset: int, data: memoryview, write_flags: int, done: Done) -> bool: ...
    async def write(self, ino: int, offset: int, data: memoryview, write_flags: int, *, direct: bool = False) -> None: ...
    def buffered_write(self, ino: int, offset: int, size: int) -> Ending: ...
    def write_segments(self, ino: int, offset: int, data: memoryview, done: Done, request: int) -> bool: ...
    def set_id_is_due(self, ino: int) -> bool: ...
    async def clear_set_id(self, ino: int) -> None: ...


class _Write:
    """A WRITE under way; called with its outcome. Its first outcome counts."""

    __slots__ = ("buffered", "lent", "requests", "size", "unique")

    def __init__(
        self, requests: "WriteRequests", unique: int, size: int, lent: memoryview | None, buffered: Ending | None
    ) -> None:
        self.requests: WriteRequests | None = requests
        self.unique = unique
        self.size = size
        self.lent = lent
        self.buffered = buffered

    def __call__(self, error: Exception | None) -> None:
        requests, self.requests = self.requests, None
        if requests is not None:
            requests.written(self, error)


class WriteRequests:
    """buffer: what the channel reads the next request into."""

    def __init__(
        self, answers: Answers, files: Writes, replayed: Callable[[int], None], journal: RequestJournal
    ) -> None:
        """replayed: is told the unique of each WRITE that has ended, also of one that was not asked for anew."""
        self._answers = answers
        self._files = files
        self._replayed = replayed
        self._journal = journal
        self.buffer = memoryview(bytearray(abi.REQUEST_SIZE_MAX))
        self._spare_buffers: list[memoryview] = []
        self._buffers_out = 0
        self.inline_count = 0  # taken at once

    def handlers(self) -> dict[int, Handler]:
        return {abi.WRITE: self._on_write}

    def _on_write(self, unique: int, node: int, body: memoryview) -> None:
        _, offset, size, write_flags, _, flags, _ = abi.WRITE_IN.unpack_from(body)
        data = body[abi.WRITE_IN.size :]
        if len(data) != size or size > abi.IO_SIZE_MAX:
            self._answers.errno(unique, errno.EINVAL)
            return
        clears = write_flags & abi.WRITE_KILL_SUIDGID and self._files.set_id_is_due(node)
        write_flags &= ~abi.WRITE_KILL_SUIDGID
        if flags & os.O_APPEND:
            write_flags |= WRITE_APPEND
        keeps_buffer = size > COPY_SIZE_MAX and self._hand_out_buffer()
        if not keeps_buffer:
            data = memoryview(bytes(data))
        buffered = None
        if not (flags & os.O_DIRECT or write_flags & abi.WRITE_CACHE):
            buffered = self._files.buffered_write(node, offset, size)
        done = _Write(self, unique, size, data if keeps_buffer else None, buffered)
        try:
            direct = bool(flags & os.O_DIRECT) and not write_flags & (abi.WRITE_CACHE | WRITE_APPEND)
            taken = not clears and (
                self._files.write_nowait(node, offset, data, write_flags, done)
                or (direct and self._write_segments(unique, node, offset, data, done))
            )
        except Exception as error:
            done(error)
            return
        if taken:
            self.inline_count += 1
        else:
            self._answers.start(unique, self._write, node, offset, data, write_flags, direct, done, clears)

    def _write_segments(self, unique: int, node: int, offset: int, data: memoryview, done: Done) -> bool:
        """Of a file that several nodes write: noted, so that the next process knows what was begun."""
        request = unique & UNIQUE_MASK

        def ended(error: Exception | None) -> None:
            done(error)
            if not isinstance(error, Fenced):
                self._journal.done(request)

        self._journal.begin(request)
        taken = self._files.write_segments(node, offset, data, ended, request)
        if not taken:
            self._journal.forget(request)
        return taken

    async def _write(
        self,
        unique: int,
        node: int,
        offset: int,
        data: memoryview,
        write_flags: int,
        direct: bool,
        done: Done,
        clears: bool,
    ) -> None:
        # Cancelled: no answer. The next process is asked anew, or the unmount answers.
        outcome: Exception | None = None
        try:
            if clears:
                await self._files.clear_set_id(node)
            await self._files.write(node, offset, data, write_flags, direct=direct)
        except Fenced:
            raise
        except Exception as error:
            outcome = error
        done(outcome)

    def written(self, write: _Write, error: Exception | None) -> None:
        """The end of a WRITE, once each: its buffer comes back and the kernel gets its answer."""
        if isinstance(error, Fenced):
            return  # no answer (errno_border.py): the kernel keeps its pages locked until the next process answers
        if write.buffered is not None:
            write.buffered.ended()
        self._replayed(write.unique)
        if write.lent is not None:
            self._buffers_out -= 1
        if error is not None:
            # Whatever still holds on to the data of a failed write: its buffer is not used for another
            # request.
            self._answers.failure(write.unique, error)
            return
        if write.lent is not None:
            self._spare_buffers.append(memoryview(write.lent.obj))
        self._answers.reply(write.unique, (abi.pack_write_reply(write.unique, write.size),))

    def _hand_out_buffer(self) -> bool:
        """Leave the current request's buffer to its WRITE and read on into another; False: all are out."""
        if self._buffers_out >= LARGE_BUFFERS_MAX:
            return False
        self._buffers_out += 1
        spare = self._spare_buffers
        self.buffer = spare.pop() if spare else memoryview(bytearray(abi.REQUEST_SIZE_MAX))
        return True
