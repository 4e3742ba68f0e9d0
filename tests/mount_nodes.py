"""Nodes for tests of the file table: fake bus, fake coordinator, and a kernel that caches pages as the real one does."""

import contextlib
from collections.abc import AsyncIterator

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
        self.during: list = []  # async functions of (ino, offset, length), each run once in an invalidation

    def invalidate_attr(self, ino: int) -> None:
        self.log.append(("attr", ino))

    async def invalidate_pages(self, ino: int, offset: int, length: int) -> None:
        self.log.append(("pages", ino, offset, length))
        if self.during:
            await self.during.pop(0)(ino, offset, length)
        if self.blocked is not None:
            await self.blocked.wait()
        await trio.lowlevel.checkpoint()

    def increment_epoch(self) -> None:
        self.log.append(("epoch",))

    def block(self) -> None:
        self.blocked = trio.Event()

    def unblock(self) -> None:
        assert self.blocked is not None
        self.blocked.set()
        self.blocked = None


class Node:
    def __init__(self, name: str, coordinator: FakeCoordinator, drives: Drives, nursery: trio.Nursery, **options: int):
        self.name = name
        self.coordinator = coordinator
        self.alive = True
        self.guard = Guard(lambda: self.alive)
        self.guard.contact(1 << 62)
        self.bus = FakeBus(drives, nursery)
        self.kernel = FakeKernel()
        self.session = coordinator.session(name)
        self.table = FileTable(
            coordinator=self.session,
            bus=self.bus,
            notifier=self.kernel,
            guard=self.guard,
            nursery=nursery,
            io_timeout_s=20,
            **options,  # type: ignore[arg-type]
        )
        coordinator.holders[self.session.key] = self.table
        nursery.start_soon(self.bus.run_forever)

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

    def node(self, name: str, **options: int) -> Node:
        return Node(name, self.coordinator, self.drives, self.nursery, **options)


@contextlib.asynccontextmanager
async def cluster(timeout_s: float = 10) -> AsyncIterator[Cluster]:
    with trio.fail_after(timeout_s):
        async with trio.open_nursery() as nursery:
            yield Cluster(nursery)
            nursery.cancel_scope.cancel()
