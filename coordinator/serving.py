"""Serving a volume: from a term to a running service, and everything closed again at the end.

Place      coordinator floor; above takeover.py and service.py, below host.py.
"""

import logging
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Protocol

import trio

from coordinator.block_reader import BlockReader
from coordinator.cluster_facts import ClusterFacts
from coordinator.drive_control import DriveControl
from coordinator.job_record import JobRecord
from coordinator.service import Service, VolumeSetup
from coordinator.slab_book import MetadataBook
from coordinator.slab_changes import SlabChanges
from coordinator.slab_image import ReadBlocks
from coordinator.takeover import WRITER, bring_members_back, open_metadata, secure_metadata_slabs
from coordinator.volume_settings import VolumeSettings
from csvfs.block.bus import Bus
from csvfs.block.pace import SPEED_DEFAULT
from csvfs.block.server_links import ServerLinks
from csvfs.block.tunnel_desk import waypoints_of
from csvfs.errors import Corrupt, UnflushedLost
from csvfs.ids import DriveId, Epoch, Incarnation, SlabId
from csvfs.net.detours import Paths
from csvfs.net.engine import Engine
from csvfs.store.interface import ClusterStore
from csvfs.wire.block_messages import SlabDescriptor

log = logging.getLogger(__name__)

PULL_WRITER = "coordinator-pulls"  # long calls have links of their own, which silence does not break


class Reader(Protocol):
    """Of BlockReader: what tests replace, whose drive servers run in the same thread."""

    def read(self, block: int, count: int) -> bytes: ...
    def close(self) -> None: ...


MakeReader = Callable[[MetadataBook, Bus], Reader]


class MetadataSlabOwner:
    """What the metadata's bus asks when a member fails: the cluster store decides, not the database."""

    def __init__(self, changes: SlabChanges) -> None:
        self._changes = changes

    async def slab_failed(
        self, slab: SlabId, epoch: int, drives: list[DriveId], reason: str
    ) -> SlabDescriptor:
        return await self._changes.failed(slab, Epoch(epoch), drives, reason)


class VolumeLinks:
    """The connections of one volume's coordinator to all drive servers."""

    def __init__(
        self, engine: Engine, facts: ClusterFacts, cluster: bytes, setup: VolumeSetup, paths: Paths | None = None
    ) -> None:
        incarnation = Incarnation(setup.term)
        self.writes = ServerLinks(
            engine, facts.server, cluster=cluster, volume=setup.volume, writer=WRITER,
            incarnation=incarnation, local_node=setup.node, paths=paths,
        )  # fmt: skip
        self.pulls = ServerLinks(
            engine, facts.server, cluster=cluster, volume=setup.volume, writer=PULL_WRITER,
            incarnation=incarnation, local_node=setup.node, paths=paths,
        )  # fmt: skip
        self.control = DriveControl(self.writes, self.pulls, setup.term, facts.source)

    def close(self) -> None:
        self.pulls.close()
        self.writes.close()


def block_reader(engine: Engine, facts: ClusterFacts, cluster: bytes, setup: VolumeSetup) -> MakeReader:
    def make(book: MetadataBook, bus: Bus) -> Reader:
        reader = BlockReader(
            book, facts.server, cluster=cluster, volume=setup.volume, term=setup.term,
            local_node=setup.node, blocks_per_slab=setup.slab_blocks, identity=engine.identity,
            waypoints=lambda: waypoints_of(facts.view.servers),
        )  # fmt: skip
        reader.read_local, reader.settled = bus.read_local, bus.descriptor
        return reader

    return make


def _soon(engine: Engine, function: Callable[[], None]) -> None:
    """When what has arrived together has been handled: a batch of the engine, if there is one."""
    if engine.in_batch:
        engine.at_batch_end(function)
    else:
        function()


async def _end_when_metadata_is_lost(
    changes: SlabChanges, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """The drives may lack what we have written since the last flush, in the midst of what we write from here on.

    Raises  UnflushedLost. Whoever takes the volume over begins with what is there.
    """
    lost: list[SlabDescriptor] = []
    ends = trio.Event()

    def note(descriptor: SlabDescriptor) -> None:
        lost.append(descriptor)
        ends.set()

    changes.on_unflushed_lost = note
    task_status.started()
    await ends.wait()
    raise UnflushedLost(
        f"metadata slab {lost[0].slab}: the drives of all its copies lost power before epoch {lost[0].epoch}: "
        "the metadata is read from them again"
    )


async def serve_volume(
    setup: VolumeSetup,
    *,
    engine: Engine,
    store: ClusterStore,
    facts: ClusterFacts,
    cluster: bytes,
    may_serve: Callable[[], bool],
    write_timeout_ms: int,
    serving: Callable[[Service | None], None],
    make_reader: MakeReader | None = None,
    rng: Random | None = None,
    speed: int = SPEED_DEFAULT,
    paths: Paths | None = None,
) -> None:
    """Take the volume over and serve it until cancelled; `serving(service)` when it is ready, `serving(None)`
    after.

    Raises  Fenced, NotCoordinator: a later term is at work. Corrupt: the metadata cannot be used. LeaseLost.
    """
    links = VolumeLinks(engine, facts, cluster, setup, paths)
    book = MetadataBook(store, setup.name, setup.term)
    changes = SlabChanges(book, links.control)
    bus = Bus(
        links.writes,
        MetadataSlabOwner(changes),
        volume=setup.volume,
        local_node=setup.node,
        silence_ms_max=write_timeout_ms,
    )
    changes.on_settled = bus.learn
    reader = (make_reader or block_reader(engine, facts, cluster, setup))(book, bus)
    metadata = None
    started = trio.current_time()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bus.run_forever)
            nursery.start_soon(links.pulls.follow_servers_forever)
            if paths is not None:
                nursery.start_soon(partial(links.pulls.mind_paths_forever, hurry=False))
            await secure_metadata_slabs(book, changes, links.control, facts, setup.volume)
            await nursery.start(_end_when_metadata_is_lost, changes)
            read: ReadBlocks = reader.read
            try:
                metadata = open_metadata(read, len(book.slabs), setup.slab_blocks, setup.volume)
            except Corrupt as error:
                log.error("volume %s: %s: other copies are asked for it", setup.name, error)
                await bring_members_back(changes)
                metadata = open_metadata(read, len(book.slabs), setup.slab_blocks, setup.volume)
            record = JobRecord(store, setup.name, setup.term, speed)
            await record.load()
            settings = VolumeSettings(store, setup.name, setup.volume, setup.term, facts.view)
            await settings.load()
            service = Service(
                setup, metadata, bus, book, changes, links.control, facts, may_serve, rng or Random(),
                record, settings, partial(_soon, engine),
            )  # fmt: skip
            await nursery.start(service.run)
            log.info(
                "volume %s: term %d serves after %.0f ms",
                setup.name, setup.term, 1000 * (trio.current_time() - started),
            )  # fmt: skip
            serving(service)
    finally:
        serving(None)
        bus.close()
        links.close()
        reader.close()
        if metadata is not None:
            metadata.close()
