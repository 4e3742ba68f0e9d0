"""Writers of the state checker: the product's Bus, with what it was given to write and what it acknowledged.

Place      state checker, above links.py.
"""

from collections.abc import Hashable
from typing import Any

from csvfs.block.bus import Bus
from csvfs.errors import CsvfsError, Fenced
from csvfs.ids import NodeName
from csvfs.units import BLOCK_SIZE, BLOCKS_PER_CHUNK
from csvfs.wire.block_messages import SlabDescriptor
from tests.states.drive_model import SLAB, VOLUME
from tests.states.links import Ground, Links
from tests.states.schedule import Task


class Writer:
    """One incarnation of one writer: a mount, or the coordinator of a term (for its metadata)."""

    def __init__(self, ground: Ground, name: str, writer: str, incarnation: int, owner: Any) -> None:
        self.name = name
        self.writer = writer
        self.incarnation = incarnation
        self.alive = True
        self.fenced = False  # it has heard that it is over
        self.sent: list[tuple[int, int]] = []  # (block, value)
        self.acked: list[int] = []
        self.links = Links(ground, name, writer, incarnation)
        links: Any = self.links
        self.bus = Bus(links, owner, volume=VOLUME, local_node=NodeName(name))
        self.bus.on_fenced = self._on_fenced

    def _on_fenced(self, error: Fenced) -> None:
        self.fenced = True

    def connect(self, descriptor: SlabDescriptor) -> None:
        """To all servers that can be reached."""
        self.bus.learn(descriptor)
        for node, server in self.links.ground.servers.items():
            if self.links.ground.reaches(self.name, node):
                self.links.open(server)

    def write(self, block: int, value: int) -> None:
        self.sent.append((block, value))

        def done(error: CsvfsError | None) -> None:
            if error is None:
                self.acked.append(value)

        self.bus.write(SLAB, block * BLOCKS_PER_CHUNK, bytes([value]) * BLOCK_SIZE, done)

    def repairs(self) -> list[Task]:
        """As Bus.run_forever: tasks for slabs whose writes wait."""
        self.links.lose_closed()
        tasks = []
        while self.bus._repair_queue:
            slab = self.bus._repair_queue.popleft()
            tasks.append(Task(f"repair by {self.name}", self.name, self.bus._repair(slab)))
        return tasks

    def fingerprint(self) -> Hashable:
        bus = self.bus
        state = bus._slabs.get(SLAB)
        parked = [] if state is None else state.parked
        writes = tuple((w.sequence, w.epoch, w.remaining, w.failed, w.complete, w in parked) for w in bus._incomplete)
        known = () if state is None else (state.descriptor.epoch, tuple(sorted(state._failures)), state.targets is None)
        return (
            self.name, self.incarnation, self.alive, self.fenced, tuple(self.acked), tuple(self.sent), writes, known,
            self.links.fingerprint(), tuple(sorted(bus._repairs)), len(bus._repair_queue),
        )  # fmt: skip
