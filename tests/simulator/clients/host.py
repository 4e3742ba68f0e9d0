"""A simulated coordinator host: the real Host with election, takeover, service, sessions, leases, metadata.

Place      simulator. Not real: the blocking reader of metadata blocks, whose drive servers run in this very thread.
"""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

from coordinator.block_reader import readable
from coordinator.host import Host
from coordinator.serving import serve_volume
from coordinator.slab_book import MetadataBook
from csvfs.block.bus import Bus
from csvfs.errors import CsvfsError, Unavailable
from csvfs.ids import Epoch, SlabId
from csvfs.wire.block_messages import Member
from tests.simulator.process import Process

RECALL_TIMEOUT_MS = 5000
RECLAIM_TIMEOUT_MS = 2000
WRITE_TIMEOUT_MS = 2000


class SimReader:
    """As coordinator/block_reader.py, in no time: from in-sync members that can be reached and serve."""

    def __init__(self, process: Process, book: MetadataBook, bus: Bus) -> None:
        self._process = process
        self._book = book
        self._settled = bus.descriptor
        self._blocks_per_slab = process.world.slab_size // 4096

    def read(self, block: int, count: int) -> bytes:
        return b"".join(self._read_block(block + index) for index in range(count))

    def _read_block(self, block: int) -> bytes:
        index, slab_block = divmod(block, self._blocks_per_slab)
        slab = self._book.slabs[index]
        epoch, in_sync = readable(self._book.current(slab), self._settled(slab))
        failures = []
        for member in in_sync:
            try:
                return self._read_member(slab, epoch, member, slab_block)
            except CsvfsError as error:
                failures.append(str(error))
        raise Unavailable(f"metadata slab {slab} block {slab_block}: {'; '.join(failures)}")

    def _read_member(self, slab: SlabId, epoch: Epoch, member: Member, block: int) -> bytes:
        world: Any = self._process.world
        server = world.machines[member.node].processes.get("server")
        running = getattr(server, "server", None)
        if running is None or not server.alive or server.paused or not world.network.reaches(self._process, server):
            raise Unavailable(f"node {member.node} cannot be reached")
        if not server.may_serve():
            raise Unavailable(f"node {member.node} may not serve")
        drives = running.service.drives
        served = drives.by_id(member.drive)
        copy = drives.copy_in_service(served, world.volume, slab)
        if epoch > copy.epoch:
            raise Unavailable(f"node {member.node} is at epoch {copy.epoch}")
        return bytes(copy.read_blocks(block, 1)[1])

    def close(self) -> None:
        """Nothing to close."""


def make_host(process: Process) -> Host:
    """The host of a process; its engine is the process's."""
    seed = f"{process.world.seed}/{process.name}"

    def make_reader(book: MetadataBook, bus: Bus) -> SimReader:
        return SimReader(process, book, bus)

    serve = partial(serve_volume, make_reader=make_reader, rng=Random(seed))
    store: Any = process.store
    return Host(
        process.node, process.node, 0,
        unix_path=None, store=store, cluster=process.world.cluster, lease=process.machine.lease,
        incarnation=process.incarnation, may_serve=process.may_serve, recall_timeout_ms=RECALL_TIMEOUT_MS,
        reclaim_timeout_ms=RECLAIM_TIMEOUT_MS, write_timeout_ms=WRITE_TIMEOUT_MS, serve=serve, rng=Random(seed),
    )  # fmt: skip
