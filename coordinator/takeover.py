"""Takeover: from a term in the cluster store to an open metadata database that nobody else can write.

Place      coordinator floor; above slab_changes.py and restoration.py, below service.py.
Order      register the term on the metadata drives, so that older coordinators are refused there (I6); drop
           the members where that fails, never the last (I1); make the chunks that were being written equal,
           under new epochs; open the database. A kill after any step costs nothing: the next coordinator
           begins anew, with a higher term.
"""

import logging

import trio

from coordinator.cluster_facts import ClusterFacts
from coordinator.drive_control import DriveControl
from coordinator.metadata import Metadata
from coordinator.restoration import PATIENCE_S, Census, restore, take_census
from coordinator.resync import bring_in_sync
from coordinator.slab_book import MetadataBook
from coordinator.slab_changes import SlabChanges
from coordinator.slab_image import ReadBlocks, SlabImage
from csvfs.errors import CsvfsError, Fenced, NotCoordinator, Unavailable
from csvfs.ids import Incarnation, NodeName, SlabId, VolumeId
from csvfs.wire.block_messages import ROLE_IN_SYNC

log = logging.getLogger(__name__)

RETRY_S = 0.1
RETRY_S_MAX = 2.0
WRITER = "coordinator"  # as drive servers know it; its incarnation is the term


async def secure_metadata_slabs(
    book: MetadataBook, changes: SlabChanges, control: DriveControl, facts: ClusterFacts, volume: VolumeId
) -> None:
    """Returns when every in-sync member of every metadata slab is fenced, equal to the others and at a new
    epoch.

    Waits    while a metadata slab has no member that can be reached.
    Raises   Fenced, NotCoordinator: a later term is at work.
    """
    delay_s = RETRY_S
    patience_ends = trio.current_time() + PATIENCE_S
    while True:
        try:
            patience_over = trio.current_time() > patience_ends
            await _secure_once(book, changes, control, facts, volume, patience_over)
            return
        except (Fenced, NotCoordinator):
            raise
        except CsvfsError as error:
            log.warning("takeover waits: %s", error)
        await trio.sleep(delay_s)
        delay_s = min(2 * delay_s, RETRY_S_MAX)


async def _secure_once(
    book: MetadataBook,
    changes: SlabChanges,
    control: DriveControl,
    facts: ClusterFacts,
    volume: VolumeId,
    patience_over: bool,
) -> None:
    await book.load()
    nodes = sorted({member.node for descriptor in book.all() for member in descriptor.members})
    since = changes.change_count
    # Registers the term.
    census = await take_census(control, facts, volume, nodes, patience_over=patience_over)
    await restore(changes, census, since)
    _check_fenced(book, census)
    chunks: dict[SlabId, set[int]] = {slab: set() for slab in book.slabs}
    writable = {(d.slab, member.drive) for d in book.all() for member in d.writable}
    for drive, slab, marked in await control.active_on(census.nodes, None):
        if (slab, drive) in writable:
            chunks[slab].update(marked)
    await changes.equalize(chunks)
    await control.settle_writer_on(census.nodes, WRITER, Incarnation(control.term))


def _check_fenced(book: MetadataBook, census: Census) -> None:
    """Raises Unavailable when a member that counts is on a server that does not know our term."""
    for descriptor in book.all():
        unfenced: set[NodeName] = {m.node for m in descriptor.writable if m.node not in census.nodes}
        if unfenced:
            raise Unavailable(
                f"metadata slab {descriptor.slab} needs the drive server of node "
                f"{', '.join(sorted(unfenced))}, which cannot be reached; see csvfs node list"
            )


async def bring_members_back(changes: SlabChanges) -> None:
    """Bring what members can be reached in sync: when a block of the metadata has rotted on all that are.

    One that was out may have it still: it is in sync with it, or gives it back, if it verifies by the checksum that
    the copies in sync have of it. Raises Fenced.
    """
    for descriptor in changes.book.all():
        for member in descriptor.members:
            if member.role != ROLE_IN_SYNC:
                try:
                    await bring_in_sync(changes, descriptor.slab, member.drive)
                except Fenced:
                    raise
                except CsvfsError as error:
                    log.warning("slab %d on node %s stays out: %s", descriptor.slab, member.node, error)


def open_metadata(read_blocks: ReadBlocks, slab_count: int, slab_blocks: int, volume: VolumeId) -> Metadata:
    """The database as the members hold it. Raises Corrupt, Unavailable."""
    image = SlabImage.open(read_blocks, slab_count * slab_blocks, volume)
    return Metadata.open(image, volume)
