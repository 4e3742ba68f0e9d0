"""Reactions to the membership: drive servers that come and go, nodes that die.

Place      coordinator floor; above restoration.py, resync.py, slab_changes.py, session_desk.py, below
           service.py.
Tasks      one that follows the view and one that restores for each book, so that a slow restoration delays no
           reaction, and one of data slabs not that of the metadata slabs, for which it may be waiting.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

import trio

from coordinator.cluster_facts import ClusterFacts
from coordinator.drive_control import DriveControl
from coordinator.restoration import PATIENCE_S, Census, forget_lost_copies, restore, strays, take_census
from coordinator.resync import Resync
from coordinator.session_desk import SessionDesk
from coordinator.slab_changes import SlabChanges
from coordinator.slab_manager import SlabManager
from csvfs.errors import CsvfsError, Fenced, NotFound
from csvfs.ids import METADATA_SLAB_ID_MIN, DriveId, Incarnation, NodeName, SlabId, VolumeId

log = logging.getLogger(__name__)

SETTLE_S = 0.3  # servers that return together are counted together
RETRY_S = 5.0
PERIOD_S = 60.0  # a look without occasion


class MembershipReactions:
    """`books`: the changes of metadata slabs and those of data slabs."""

    def __init__(
        self,
        volume: VolumeId,
        control: DriveControl,
        facts: ClusterFacts,
        books: list[SlabChanges],
        resync: Resync,
        slabs: SlabManager,
        desk: SessionDesk,
    ) -> None:
        self._volume = volume
        self._control = control
        self._facts = facts
        self._books = books
        self._resync = resync
        self._slabs = slabs
        self._desk = desk
        self._known: dict[NodeName, Incarnation] = {}
        self._gone: set[NodeName] = set()
        self._suspects: set[NodeName] = set()
        self._reports: dict[DriveId, tuple[str, int]] = {}  # of drives, as their servers tell
        self._failed: set[DriveId] = set()  # to be dropped
        self._looks = 0  # occasions so far
        self._look_due = trio.Event()  # replaced at each occasion
        self._drop_due = trio.Event()
        self._patience_ends = 0.0
        self._next_slab = 0  # ids from here on were given out by this coordinator

    def look_into(self, drives: Iterable[DriveId]) -> None:
        """A writer got no answer from these: drop them from all slabs if their server is gone; bring them
        back."""
        self._suspects.update(node for node in map(self._facts.node_of, drives) if node is not None)
        self._drop_due.set()
        self._look()

    async def run_forever(self) -> None:
        """Raises Fenced: another coordinator is at work."""
        self._next_slab = self._slabs.next_slab_id
        self._known = self._servers()
        self._patience_ends = trio.current_time() + PATIENCE_S
        self._follow_drives()
        self._look()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_forever)
            nursery.start_soon(self._drop_forever)
            for changes in self._books:
                nursery.start_soon(self._restore_forever, changes)

    def _servers(self) -> dict[NodeName, Incarnation]:
        servers = ((node, self._facts.server(node)) for node in self._facts.drive_nodes())
        return {node: server.incarnation for node, server in servers if server is not None}

    async def _follow_forever(self) -> None:
        while True:
            servers = self._servers()
            gone = [node for node in self._known if self._known[node] != servers.get(node)]
            if gone:
                self._gone.update(gone)
                self._drop_due.set()
            if any(self._known.get(node) != incarnation for node, incarnation in servers.items()):
                self._look()
            if servers != self._known:
                self._slabs.pool_changed()
            self._known = servers
            self._follow_drives()
            self._desk.evict_dead_nodes()
            await self._facts.view.wait_changed()

    def _follow_drives(self) -> None:
        """Drives that fail while their server goes on, and those that are open again."""
        reports = self._facts.drive_reports()
        for drive, (fault, opens) in reports.items():
            before = self._reports.get(drive, ("", 0))
            if fault and fault != before[0]:
                self._failed.add(drive)
                self._drop_due.set()
            elif not fault and (before[0] or (before[1] and opens != before[1])):
                self._look()
        if reports != self._reports:
            self._slabs.pool_changed()
        self._reports = reports

    async def _drop_forever(self) -> None:
        while True:
            await self._drop_due.wait()
            self._drop_due = trio.Event()
            gone, self._gone = self._gone, set()
            failed, self._failed = self._failed, set()
            suspects, self._suspects = self._suspects, set()
            for node in sorted(suspects - gone):
                try:
                    await self._control.register_term(node)
                except Fenced:
                    raise
                except CsvfsError:
                    gone.add(node)
            for node in sorted(gone):
                self._control.links.drop(node, "its drive server is gone")
                self._resync.cancel(self._facts.drives_of(node))
                for changes in self._books:
                    await self._drop(f"node {node}", partial(changes.drop_node, node, "its drive server is gone"))
            for drive in sorted(failed):
                self._resync.cancel([drive])
                fault = self._reports.get(drive, ("gone", 0))[0]
                for changes in self._books:
                    await self._drop(f"drive {drive.hex()[:8]}", partial(changes.drop_drive, drive, fault))

    async def _drop(self, what: str, drop: Callable[[], Awaitable[list[SlabId]]]) -> None:
        try:
            kept = await drop()
            if kept:
                log.warning("%s holds the last copies of %d slabs: they wait for it", what, len(kept))
        except Fenced:
            raise
        except CsvfsError as error:
            log.warning("%s is not dropped yet: %s", what, error)

    def _look(self) -> None:
        self._looks += 1
        due, self._look_due = self._look_due, trio.Event()
        due.set()

    async def _wait_look(self, looked: int, timeout_s: float) -> int:
        """Until there was an occasion after number `looked`, or `timeout_s` later; returns the number by then."""
        with trio.move_on_after(timeout_s):
            while self._looks == looked:
                await self._look_due.wait()
        return self._looks

    async def _restore_forever(self, changes: SlabChanges) -> None:
        """One such task for each book: a change of data slabs waits for as long as a metadata slab has no copy in
        service, and that must be restored meanwhile."""
        looked = 0
        while True:
            looked = await self._wait_look(looked, PERIOD_S)
            await trio.sleep(SETTLE_S)
            looked = self._looks
            again = True
            while again:
                try:
                    again = await self._restore(changes)
                except Fenced:
                    raise
                except CsvfsError as error:
                    log.warning("restoration waits: %s", error)
                if again:
                    looked = await self._wait_look(looked, RETRY_S)
                    await trio.sleep(SETTLE_S)

    async def _restore(self, changes: SlabChanges) -> bool:
        """One census and what follows from it; True: it has to be done again."""
        nodes = self._facts.drive_nodes()
        patience_over = trio.current_time() > self._patience_ends
        since = changes.change_count
        census = await take_census(
            self._control, self._facts, self._volume, nodes, patience_over=patience_over
        )
        unsettled = await restore(changes, census, since)
        await forget_lost_copies(changes, census)
        self._resync.add(changes, census.node_of)
        if changes is self._books[-1]:
            await self._delete_strays(census)
        return bool(unsettled) or any(
            node not in census.nodes for node in nodes if self._facts.server(node) is not None
        )

    async def _delete_strays(self, census: Census) -> None:
        """Only ids that no creation of this coordinator can be at work on."""
        metadata, data = self._books
        old = [slab for slab in census.copies if slab not in self._slabs.creating]
        found = strays(data, census, [slab for slab in old if slab < self._next_slab or _exists(data, slab)])
        found += strays(metadata, census, [slab for slab in old if slab >= METADATA_SLAB_ID_MIN])
        for slab, node, drive in found:
            changes = metadata if slab >= METADATA_SLAB_ID_MIN else data
            if slab in self._slabs.creating or _is_member(changes, slab, drive):
                continue  # it became one since the census
            log.warning("slab %d on node %s belongs to nothing: deleted", slab, node)
            await self._slabs.delete_copy(slab, node, drive)


def _is_member(changes: SlabChanges, slab: SlabId, drive: DriveId) -> bool:
    try:
        return any(member.drive == drive for member in changes.book.current(slab).members)
    except NotFound:
        return False


def _exists(changes: SlabChanges, slab: SlabId) -> bool:
    """Whether its creation is over, also when it was this coordinator's."""
    try:
        changes.book.current(slab)
    except NotFound:
        return False
    return True
