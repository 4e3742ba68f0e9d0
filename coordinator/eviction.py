"""Eviction: a mount is gone, or does not answer; its leases may pass on only when nothing of it can land any
more.

Place      coordinator floor; above slab_changes.py.
Order      refuse its calls; fence its incarnation on every drive server (I6), dropping the copies on those
           that cannot be reached; make the chunks it was writing equal on all members; wait until it cannot
           be serving reads from its own drives any more; forget it. Every step may be done twice: a successor
           begins anew.
"""

import logging
from collections.abc import Callable
from functools import partial

import trio

from coordinator.at_once import ask_all
from coordinator.cluster_facts import ClusterFacts
from coordinator.drive_control import DriveControl
from coordinator.sessions import Session
from coordinator.slab_changes import SlabChanges
from csvfs.errors import CsvfsError, DriveFailed, Fenced, NotFound, Unavailable
from csvfs.ids import METADATA_SLAB_ID_MIN, Incarnation, NodeName, SlabId, VolumeId
from csvfs.wire.block_messages import Member

log = logging.getLogger(__name__)

RETRY_S = 0.3
# A mount stops serving CONTACT_S_MAX (4 s, mount/guard.py) after it sent what was answered last.
CONTACT_S_MAX = 4.5


class Eviction:
    """Makes sure that nothing of a session can land or be served any more."""

    def __init__(
        self, volume: VolumeId, changes: SlabChanges, control: DriveControl, facts: ClusterFacts
    ) -> None:
        self._volume = volume
        self._changes = changes
        self._control = control
        self._facts = facts

    async def fence_out(self, session: Session, *, succeeded: Callable[[], bool]) -> set[SlabId]:
        """Returns when leases of the session may pass on: the slabs that it may have written to without a flush.

        Args     succeeded: whether the process is known to serve nothing any more, and need not be waited
                 for: a later incarnation has introduced itself, or it has said goodbye.
        Raises   Fenced: this coordinator is over. Cancel safe: to be begun anew.
        """
        written: set[SlabId] = set()
        while True:
            try:
                await self._fence_and_equalize(session, written)
                break
            except Fenced:
                raise
            except CsvfsError as error:
                log.warning("eviction of %s waits: %s", session.writer, error)
                await trio.sleep(RETRY_S)
        while self._facts.is_alive(session.node) and not succeeded():
            left_s = session.last_answer + CONTACT_S_MAX - trio.current_time()
            if left_s <= 0:
                break
            await trio.sleep(min(left_s, RETRY_S))
        return written

    async def _fence_and_equalize(self, session: Session, written: set[SlabId]) -> None:
        minimum = Incarnation(session.incarnation + 1)
        nodes = self._facts.drive_nodes()
        fenced = await ask_all(nodes, partial(self._fence, writer=session.writer, minimum=minimum))
        reached = [node for node in nodes if fenced[node]]
        for node in nodes:
            if node not in reached:
                await self._do_without(node)
        chunks: dict[SlabId, set[int]] = {}
        for drive, slab, marked in await self._control.active_on(reached, session.writer):
            if slab < METADATA_SLAB_ID_MIN and self._is_writable_member(slab, drive):
                chunks.setdefault(slab, set()).update(marked)
        written.update(chunks)
        lost: list[SlabId] = []
        if chunks:
            log.info("making %d slabs equal that %s was writing", len(chunks), session.writer)
            await self._changes.equalize(chunks, lost)
        for slab in lost:
            await self._check_out_of_service(slab)
        if lost:
            # Nobody can read them, and whoever brings them back begins at a new epoch, from one copy; until then
            # the chunks stay marked (I3). The leases need not wait for it.
            log.warning(
                "%d slabs that %s was writing have no copy that can be reached", len(lost), session.writer
            )
            return
        await self._control.settle_writer_on(reached, session.writer, minimum)

    async def _fence(self, node: NodeName, writer: str, minimum: Incarnation) -> bool:
        if self._facts.server(node) is None:
            return False  # gone: waiting for a connection to break would only take time
        try:
            await self._control.fence(node, writer, minimum)
        except Fenced:
            raise
        except CsvfsError as error:
            log.warning("%s cannot be fenced on node %s: %s", writer, node, error)
            return False
        return True

    async def _do_without(self, node: NodeName) -> None:
        """A node where the writer cannot be fenced: nothing written there may count any more."""
        kept = await self._changes.drop_node(node, "its drive server cannot be reached")
        if kept and self._facts.is_alive(node):
            # Last copies. Without a lease the node serves nothing, and its copies start over at a new epoch;
            # but one that lives and that we cannot reach may be taking writes.
            raise Unavailable(
                f"node {node} holds the last copies of {len(kept)} slabs, the first is {kept[0]}, "
                "and its drive server cannot be reached"
            )

    async def _check_out_of_service(self, slab: SlabId) -> None:
        """Raises Unavailable while two in-sync copies may be in service: then both go on, unequal, when they can be
        reached again. Those whose server has ended or started anew are judged first, and one of them goes on."""
        descriptor = self._changes.book.current(slab)
        serving = [member.node for member in descriptor.in_sync if await self._may_be_in_service(member, slab)]
        if len(serving) > 1:
            raise Unavailable(
                f"slab {slab} cannot be made equal on nodes {', '.join(serving)}: their drive servers cannot be "
                "reached, and may serve it"
            )

    async def _may_be_in_service(self, member: Member, slab: SlabId) -> bool:
        if self._facts.server(member.node) is None:
            return False  # it has ended, or its node's lease has
        try:
            copies = await self._control.copies(member.node, member.drive)
        except Fenced:
            raise
        except (DriveFailed, NotFound):
            return False  # the server answers: the drive is not open there
        except CsvfsError:
            return True
        ours = (copy for copy in copies if (copy.volume, copy.slab) == (self._volume, slab))
        return any(copy.in_service for copy in ours)

    def _is_writable_member(self, slab: SlabId, drive: bytes) -> bool:
        try:
            return any(member.drive == drive for member in self._changes.book.current(slab).writable)
        except CsvfsError:
            return False  # removed meanwhile
