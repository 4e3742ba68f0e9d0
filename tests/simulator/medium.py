"""Simulated drives: files in memory with a page cache that a power cut empties. The code above is the real one.

Place      simulator. `SimOs` and `SimMmap` take the place of `os` and `mmap` in the modules of csvfs.block that
           touch drive files (seams.py).
Model      a page of 4 KiB is written to the medium whole or not at all, at any time after its store, in any
           order; what was there before a flush that was answered is kept. A flush that fails leaves pages clean
           in the cache and old on the medium, as Linux does.
Faults     power cut (a seeded subset of the unflushed pages survives), write-back at odd times, rot, unreadable
           pages, a full file system, a failing flush, death of the process between two stores.
"""

from __future__ import annotations

import errno
import os
import stat
from random import Random
from types import SimpleNamespace
from typing import Any

from csvfs.block.layout import Layout
from csvfs.errors import DriveRefused
from tests.simulator.network import ProcessKilled

PAGE = 4096
_ZERO = bytes(PAGE)
_FD_FIRST = 1 << 20


class Area(bytearray):
    """The metadata of all slots, which production code maps into memory."""

    def close(self) -> None:
        """Unmapped; the pages stay in the cache."""


class Medium:
    """One drive file. All its methods are what the kernel and the device do."""

    def __init__(self, path: str, layout: Layout) -> None:
        self.path = path
        self.size = layout.size
        self.layout = layout
        self.boot = bytes(16)
        self.locked_by: Any = None  # the open descriptor
        self._begin = layout.metadata_offset
        self._end = self._begin + layout.metadata_size
        self.area = Area(layout.metadata_size)
        self.area_durable = bytearray(layout.metadata_size)
        self.pages: dict[int, bytes] = {}
        self.durable: dict[int, bytes] = {}
        self._dirty: set[int] = set()
        self.unreadable: set[int] = set()
        self.full = False
        self.failing_flushes = 0
        self.kill_after_stores: int | None = None
        self.cold = 0.0  # how often a read without waiting is refused
        self.rng = Random(0)

    def copy(self, path: str) -> Medium:
        """An equal medium with everything flushed."""
        other = Medium(path, self.layout)
        other.area[:] = self.area
        other.area_durable[:] = self.area
        other.pages = dict(self.pages)
        other.durable = dict(self.pages)
        return other

    # -- the file --------------------------------------------------------------------------------

    def read(self, size: int, offset: int) -> bytes:
        if offset >= self._begin and offset + size <= self._end:
            start = offset - self._begin
            return bytes(self.area[start : start + size])
        size = max(0, min(size, self.size - offset))
        first, last = offset // PAGE, (offset + size - 1) // PAGE
        if self.unreadable and not self.unreadable.isdisjoint(range(first, last + 1)):
            raise OSError(errno.EIO, "Input/output error")
        get = self.pages.get
        if first == last:
            page = get(first, _ZERO)
            start = offset - first * PAGE
            return page if size == PAGE else page[start : start + size]
        data = b"".join([get(page, _ZERO) for page in range(first, last + 1)])
        start = offset - first * PAGE
        return data[start : start + size]

    def write(self, data: Any, offset: int) -> int:
        view = memoryview(data).cast("B")
        if offset >= self._begin and offset + len(view) <= self._end:
            self.area[offset - self._begin : offset - self._begin + len(view)] = view
            return len(view)
        done = 0
        while done < len(view):
            number, skip = divmod(offset + done, PAGE)
            size = min(PAGE - skip, len(view) - done)
            if self.full and number not in self.pages and offset >= self.layout.data_offset:
                if done:
                    return done
                raise OSError(errno.ENOSPC, "No space left on device")
            self._count_store()
            piece = bytes(view[done : done + size])
            if size != PAGE:
                old = self.pages.get(number, _ZERO)
                piece = old[:skip] + piece + old[skip + size :]
            self.pages[number] = piece
            self._dirty.add(number)
            self.unreadable.discard(number)
            done += size
        return done

    def _count_store(self) -> None:
        if self.kill_after_stores is not None:
            self.kill_after_stores -= 1
            if self.kill_after_stores < 0:
                self.kill_after_stores = None
                raise ProcessKilled

    def punch(self, offset: int, length: int) -> None:
        first, last = -(-offset // PAGE), (offset + length) // PAGE
        if last - first > len(self.pages):
            numbers = [number for number in self.pages if first <= number < last]
        else:
            numbers = [number for number in range(first, last) if number in self.pages]
        for number in numbers:
            del self.pages[number]
            self._dirty.add(number)

    def sync(self) -> None:
        if self.failing_flushes:
            self.failing_flushes -= 1
            self._dirty.clear()
            raise OSError(errno.EIO, "Input/output error")
        for number in self._dirty:
            self._write_back(number)
        self._dirty.clear()
        self.area_durable[:] = self.area

    def _write_back(self, number: int) -> None:
        page = self.pages.get(number)
        if page is None:
            self.durable.pop(number, None)
        else:
            self.durable[number] = page

    # -- what befalls it -------------------------------------------------------------------------

    def write_back_some(self, rng: Random) -> None:
        """The kernel writes some dirty pages to the medium on its own."""
        for number in sorted(self._dirty):
            if rng.random() < 0.5:
                self._write_back(number)
                self._dirty.discard(number)
        for start in self._area_pages_unequal():
            if rng.random() < 0.5:
                self.area_durable[start : start + PAGE] = self.area[start : start + PAGE]

    def _area_pages_unequal(self) -> list[int]:
        area, durable = self.area, self.area_durable
        if area == durable:
            return []
        starts = range(0, len(area), PAGE)
        return [start for start in starts if area[start : start + PAGE] != durable[start : start + PAGE]]

    def power_cut(self, rng: Random) -> int:
        """Lose a seeded subset of what is not on the medium; returns how many pages were lost."""
        keep = rng.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        lost = 0
        for number in sorted(self._dirty):
            if rng.random() < keep:
                self._write_back(number)
        for start in self._area_pages_unequal():
            if rng.random() < keep:
                self.area_durable[start : start + PAGE] = self.area[start : start + PAGE]
            else:
                lost += 1
        # Also what a failed flush has forgotten to be dirty.
        lost += sum(self.pages.get(number) != self.durable.get(number) for number in self.pages.keys() | self.durable)
        self._dirty.clear()
        self.pages = dict(self.durable)
        self.area = Area(self.area_durable)
        self.locked_by = None
        self.kill_after_stores = None
        return lost

    def rot(self, number: int, bit: int) -> None:
        """One bit of a page is another one from now on, on the medium and in the cache."""
        page = bytearray(self.pages.get(number, _ZERO))
        page[bit // 8] ^= 1 << (bit % 8)
        self.pages[number] = bytes(page)
        if number not in self._dirty:
            self.durable[number] = bytes(page)


class SimOs:
    """`os` for modules that use drive files; everything else is the real one's."""

    def __init__(self) -> None:
        self.media: dict[str, Medium] = {}
        self._open: dict[int, Medium] = {}
        self._next = _FD_FIRST
        self.path = SimpleNamespace(samestat=os.path.samestat)
        self.last_opened: Medium | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def medium(self, fd: int) -> Medium:
        medium = self._open.get(fd)
        if medium is None:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return medium

    def open(self, path: str, flags: int = 0) -> int:
        medium = self.media.get(path)
        if medium is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        self._next += 1
        self._open[self._next] = medium
        return self._next

    def open_locked(self, path: str) -> int:
        """Of csvfs.block.in_use."""
        if path not in self.media:
            raise DriveRefused(f"drive {path} is missing; attach it, or remove it from the pool")
        medium = self.media[path]
        if medium.locked_by in self._open:
            raise DriveRefused(f"drive {path} is in use by another process")
        fd = self.open(path)
        medium.locked_by = fd
        self.last_opened = medium
        return fd

    def boot_id(self) -> bytes:
        """Of the machine of the medium opened last: asked for in the same breath."""
        assert self.last_opened is not None
        return self.last_opened.boot

    def close(self, fd: int) -> None:
        medium = self._open.pop(fd, None)
        if medium is None:
            raise OSError(errno.EBADF, "Bad file descriptor")
        if medium.locked_by == fd:
            medium.locked_by = None

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        return self.medium(fd).read(size, offset)

    def preadv(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        medium = self.medium(fd)
        if medium.cold and flags & os.RWF_NOWAIT and medium.rng.random() < medium.cold:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        (buffer,) = buffers
        data = medium.read(len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        return self.medium(fd).write(data, offset)

    def fdatasync(self, fd: int) -> None:
        self.medium(fd).sync()

    fsync = fdatasync

    def lseek(self, fd: int, position: int, how: int) -> int:
        return self.medium(fd).size

    def fstat(self, fd: int) -> Any:
        medium = self.medium(fd)
        return SimpleNamespace(
            st_mode=stat.S_IFREG | 0o600, st_nlink=1, st_size=medium.size, st_dev=1, st_ino=id(medium)
        )

    def stat(self, path: str) -> Any:
        medium = self.media[path]
        return SimpleNamespace(st_mode=stat.S_IFREG | 0o600, st_size=medium.size, st_dev=1, st_ino=id(medium))

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> bool:
        """Of csvfs.block.medium."""
        self.medium(fd).punch(offset, length)
        return True


class SimMmap:
    """`mmap` for open_tables.py."""

    def __init__(self, sim_os: SimOs) -> None:
        self._os = sim_os

    def mmap(self, fd: int, length: int, offset: int = 0) -> Area:
        medium = self._os.medium(fd)
        assert (offset, length) == (medium.layout.metadata_offset, medium.layout.metadata_size)
        return medium.area
