"""Nodes for tests of the file table: fake bus, fake coordinator, and a kernel that caches pages as the real
one does."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import trio

from csvfs.mount.file_table import FileTable
from csvfs.mount.guard import Guard
from tests.fake_bus import Drives, FakeBus
from tests.fake_coordinator import FakeCoordinator

PAGE = 4096


class FakeKernel:
    """Notifications, recorded. `block`: invalidations of pages wait until `unblock`, as for a locked page."""

    def __init__(self) -> None:
        self.log: list[tuple] = []
        self.blocked: trio.Event | None = None
        self.unknown: dict[int, int] = {}
        self.during: list = []  # async functions of (ino, offset, length), each run once in an invalidation

    def invalidate_attr(self, ino: int) -> bool:
        """An inode in `unknown` is not known yet, so many times."""
        if self.unknown.get(ino):
            self.unknown[ino] -= 1
            return False
        self.log.append(("attr", ino))
        return True

    async def invalidate_pages(self, ino: int, offset: int, length: int) -> None:
        self.log.append(("pages", ino, offset, length))
        if self.during:
            await self.during.pop(0)(ino, offset, length)
        if self.blocked is not None:
            await self.blocked.wait()
        await trio.lowlevel.checkpoint()

    async def invalidate_all(self, ranges: list[tuple[int, int, int]]) -> None:
        for ino, offset, length in ranges:
            if offset < 0:
                self.invalidate_attr(ino)
            else:
                await self.invalidate_pages(ino, offset, length)

    async def prune(self, inos: list[int]) -> None:
        self.log.append(("prune", *inos))

    def increment_epoch(self) -> None:
        self.log.append(("epoch",))

    def block(self) -> None:
        self.blocked = trio.Event()

    def unblock(self) -> None:
        assert self.blocked is not None
        self.blocked.set()
        self.blocked = None


class CachingKernel(FakeKernel):
    """A page cache with page locks: a page is locked while a READ or WRITE of it is unanswered, and an
    invalidation waits for that. Pages stay until they are invalidated. One program's write at a time (inode
    lock)."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: dict[tuple[int, int], bytes] = {}
        self.dirty: dict[tuple[int, int], bytes] = {}  # by mmap
        self.locks: dict[tuple[int, int], trio.Lock] = {}
        self.inode_lock = trio.Lock()
        self.node: Node  # set by whoever makes it

    def _lock(self, ino: int, page: int) -> trio.Lock:
        return self.locks.setdefault((ino, page), trio.Lock())

    async def invalidate_pages(self, ino: int, offset: int, length: int) -> None:
        self.log.append(("pages", ino, offset, length))
        last = (offset + length - 1) // PAGE if length else 1 << 60
        for page in sorted(p for i, p in self.locks if i == ino and offset // PAGE <= p <= last):
            async with self._lock(ino, page):
                if (ino, page) in self.dirty:
                    await self._write_back(ino, page)
                self.pages.pop((ino, page), None)
            await trio.lowlevel.checkpoint()

    async def _write_back(self, ino: int, page: int) -> None:
        await self.node.write(ino, page * PAGE, self.dirty.pop((ino, page)), flags=1)

    async def read_page(self, ino: int, page: int) -> bytes:
        """read(2) through the cache; an uptodate page is read without its lock."""
        if (ino, page) not in self.pages:
            async with self._lock(ino, page):
                if (ino, page) not in self.pages:
                    self.pages[ino, page] = (await self.node.read(ino, page * PAGE, PAGE)).ljust(PAGE, b"\0")
        return self.pages[ino, page]

    async def write_page(self, ino: int, page: int, data: bytes) -> None:
        """write(2) through the cache (written through, the page stays)."""
        async with self.inode_lock, self._lock(ino, page):
            self.pages[ino, page] = data
            if (ino, page) in self.dirty:
                self.dirty[ino, page] = data
            await self.node.buffered_write(ino, page * PAGE, data)

    async def map_page(self, ino: int, page: int, data: bytes) -> None:
        """A store through mmap: the page becomes dirty; msync or an invalidation writes it."""
        while True:
            await self.read_page(ino, page)
            async with self._lock(ino, page):
                if (ino, page) in self.pages:  # else taken back meanwhile: another fault
                    self.pages[ino, page] = self.dirty[ino, page] = data
                    return

    async def write_part(self, ino: int, page: int, at: int, data: bytes) -> None:
        """write(2) of less than a page: a page that is there is unlocked before the WRITE, one that is not is
        kept locked and does not become uptodate."""
        async with self.inode_lock:
            async with self._lock(ino, page):
                cached = self._store(ino, page, at, data)
                if not cached:
                    await self.node.buffered_write(ino, page * PAGE + at, data)
            if cached:
                await self.node.buffered_write(ino, page * PAGE + at, data)

    async def map_part(self, ino: int, page: int, at: int, data: bytes) -> None:
        """As map_page, of some bytes of it."""
        while True:
            await self.read_page(ino, page)
            async with self._lock(ino, page):
                if self._store(ino, page, at, data):
                    self.dirty[ino, page] = self.pages[ino, page]
                    return

    def _store(self, ino: int, page: int, at: int, data: bytes) -> bool:
        old = self.pages.get((ino, page))
        if old is None:
            return False
        self.pages[ino, page] = old[:at] + data + old[at + len(data) :]
        if (ino, page) in self.dirty:
            self.dirty[ino, page] = self.pages[ino, page]
        return True

    async def close_mapping(self, ino: int) -> None:
        """munmap(2) or the end of a program: all dirty pages are written, then the file is closed."""
        for _, page in [key for key in self.dirty if key[0] == ino]:
            await self.sync_page(ino, page)

    async def sync_page(self, ino: int, page: int) -> None:
        async with self._lock(ino, page):
            if (ino, page) in self.dirty:
                await self._write_back(ino, page)


class Node:
    def __init__(
        self,
        name: str,
        coordinator: FakeCoordinator,
        drives: Drives,
        nursery: trio.Nursery,
        kernel: FakeKernel,
        options: dict,
    ):
        self.name = name
        self.coordinator = coordinator
        self.alive = True
        self.guard = Guard(lambda: self.alive)
        self.guard.contact(1 << 62)
        self.bus = FakeBus(drives, nursery)
        self.kernel = kernel
        self.session = coordinator.session(name)
        self.table = FileTable(
            coordinator=self.session,
            bus=self.bus,
            notifier=self.kernel,
            guard=self.guard,
            nursery=nursery,
            io_timeout_s=60,
            **options,
        )
        coordinator.holders[self.session.key] = self.table
        nursery.start_soon(self.bus.run_forever)

    async def buffered_write(self, ino: int, offset: int, data: bytes) -> None:
        """As the channel does with a WRITE of the page cache."""
        write = self.table.buffered_write(ino, offset, len(data))
        try:
            await self.write(ino, offset, data)
        finally:
            write.ended()

    async def write(self, ino: int, offset: int, data: bytes, flags: int = 0) -> None:
        """As the channel does it: at once if it can be, else with waiting."""
        event = trio.Event()
        errors = []

        def done(error: Exception | None) -> None:
            errors.append(error)
            event.set()

        view = memoryview(data)
        if self.table.write_nowait(ino, offset, view, flags, done):
            await event.wait()
            assert len(errors) == 1
            if errors[0] is not None:
                raise errors[0]
        else:
            await self.table.write(ino, offset, view, flags)

    async def read(self, ino: int, offset: int, size: int) -> bytes:
        data = self.table.read_nowait(ino, offset, size)
        if data is None:
            data = await self.table.read(ino, offset, size)
        return bytes(data) if isinstance(data, bytes | memoryview) else b"".join(data)


class Cluster:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.drives = Drives()
        self.nursery = nursery
        self.coordinator = FakeCoordinator(self.drives, nursery)

    def node(self, name: str, **options: Any) -> Node:
        return Node(name, self.coordinator, self.drives, self.nursery, FakeKernel(), options)

    def caching_node(self, name: str, **options: Any) -> tuple[Node, CachingKernel]:
        kernel = CachingKernel()
        kernel.node = Node(name, self.coordinator, self.drives, self.nursery, kernel, options)
        return kernel.node, kernel


@contextlib.asynccontextmanager
async def cluster(timeout_s: float = 120) -> AsyncIterator[Cluster]:
    with trio.fail_after(timeout_s):
        async with trio.open_nursery() as nursery:
            yield Cluster(nursery)
            nursery.cancel_scope.cancel()
