"""Drives in a dictionary, shared by the buses of several nodes, with faults at any point.

A write lands and is answered `delay` scheduler turns after it was sent, writes of one bus in order; `hold`
keeps all back until `let_go`. Reads that are not local see what has landed, `delay` turns later.
"""

from collections.abc import Callable, Iterable

import trio

from csvfs.errors import CsvfsError
from csvfs.ids import DriveId, Epoch, NodeName, SlabId
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import Member, SlabDescriptor

Done = Callable[[CsvfsError | None], None]
MEMBERS = tuple(Member(DriveId(bytes([n]) * 16), NodeName(f"n{n}"), 1) for n in (1, 2, 3))


def descriptor(slab: int) -> SlabDescriptor:
    return SlabDescriptor(SlabId(slab), Epoch(1), MEMBERS)


class Drives:
    """Blocks as they are on all members."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[int, int], bytes] = {}
        self.given_away: set[tuple[int, int]] = set()
        self.may_write: Callable[[int, int], bool] = lambda slab, block: True

    def read(self, slab: int, block: int, count: int) -> bytes:
        zeros = bytes(BLOCK_SIZE)
        return b"".join(self.blocks.get((slab, block + i), zeros) for i in range(count))

    def write(self, slab: int, block: int, data: bytes) -> None:
        assert len(data) % BLOCK_SIZE == 0 and data
        for i in range(len(data) // BLOCK_SIZE):
            assert (slab, block + i) not in self.given_away, "a write into another file's block"
            assert self.may_write(slab, block + i), "a write into a block that several files have"
            self.blocks[slab, block + i] = bytes(data[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE])

    def give_away(self, slab: int, block: int) -> None:
        """To another file, which has written there."""
        self.blocks[slab, block] = b"not yours" + bytes(BLOCK_SIZE - 9)
        self.given_away.add((slab, block))

    def trim(self, slab: int, block: int, count: int) -> None:
        for i in range(count):
            self.blocks.pop((slab, block + i), None)


class FakeBus:
    def __init__(self, drives: Drives, nursery: trio.Nursery, *, local: bool = True, delay: int = 1) -> None:
        self.drives = drives
        self.nursery = nursery
        self.local = local
        self.delay = delay
        self.held = False
        self.fail_next: list[CsvfsError] = []  # errors of the next writes
        self.flush_errors: list[CsvfsError] = []
        self.trim_errors: list[CsvfsError] = []
        self.flushed: list[set[int]] = []
        self.trimmed: list[tuple[int, int, int]] = []
        self.writes: list[tuple[int, int, int]] = []  # slab, block, count, as sent
        self.descriptors: dict[int, SlabDescriptor] = {}
        self._queue: list[tuple[int, int, memoryview, Done]] = []
        self._changed = trio.Event()

    async def run_forever(self) -> None:
        while True:
            while self._queue and not self.held:
                for _ in range(self.delay):
                    await trio.lowlevel.checkpoint()
                if not self.held:
                    self.land_one()
            await self._changed.wait()
            self._changed = trio.Event()

    def hold(self) -> None:
        """Nothing lands and nothing is answered from now on."""
        self.held = True

    def let_go(self) -> None:
        self.held = False
        self._changed.set()

    def land_one(self) -> None:
        slab, block, data, done = self._queue.pop(0)
        if self.fail_next:
            done(self.fail_next.pop(0))
            return
        self.drives.write(slab, block, bytes(data))
        done(None)

    @property
    def in_flight(self) -> int:
        return len(self._queue)

    def descriptor(self, slab: int) -> SlabDescriptor | None:
        return self.descriptors.get(slab)

    def learn(self, descriptor: SlabDescriptor) -> None:
        self.descriptors[descriptor.slab] = descriptor

    def write(self, slab: int, block: int, data: memoryview | bytes, done: Done) -> None:
        assert slab in self.descriptors, "layout without a descriptor"
        view = memoryview(data)
        assert 0 < len(view) <= 256 * BLOCK_SIZE and len(view) % BLOCK_SIZE == 0
        self.writes.append((slab, block, len(view) // BLOCK_SIZE))
        self._queue.append((slab, block, view, done))
        self._changed.set()

    async def read(self, slab: int, block: int, count: int) -> bytes:
        assert 0 < count <= 256
        for _ in range(self.delay):
            await trio.lowlevel.checkpoint()
        return self.drives.read(slab, block, count)

    def read_local(self, slab: int, block: int, count: int) -> bytes | None:
        assert 0 < count <= 256
        return self.drives.read(slab, block, count) if self.local else None

    async def flush(self, slabs: Iterable[int]) -> None:
        wanted = set(slabs)
        for _ in range(self.delay):
            await trio.lowlevel.checkpoint()
        if self.flush_errors:
            raise self.flush_errors.pop(0)
        self.flushed.append(wanted)

    async def trim(self, items: list[tuple[int, int, int]]) -> None:
        for _ in range(self.delay):
            await trio.lowlevel.checkpoint()
        if self.trim_errors:
            raise self.trim_errors.pop(0)
        for item in items:
            self.drives.trim(*item)
        self.trimmed += items
