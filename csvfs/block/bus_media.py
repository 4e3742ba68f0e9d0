"""What a bus has the drives do with their media: flush, and trim.

Place      block floor, under bus.py.

Invariants
  I8  `flush` returns only when every in-sync and joining member of every slab has flushed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

import trio

from csvfs.block.server_links import ServerLinks, without_excused
from csvfs.errors import CsvfsError, DriveFailed, Fenced, TimedOut
from csvfs.ids import DriveId, NodeName, SlabId
from csvfs.wire.block_messages import pack_flush
from csvfs.wire.frames import Frame, Kind

if TYPE_CHECKING:
    from csvfs.block.bus import Bus, SlabOwner

FLUSH_TIMEOUT_S = 30.0
TRIM_TIMEOUT_S = 10.0


class Media:
    def __init__(self, bus: Bus, links: ServerLinks, owner: SlabOwner) -> None:
        self._bus = bus
        self._links = links
        self._owner = owner

    async def flush(self, slabs: Iterable[SlabId]) -> None:
        """See Bus.flush."""
        wanted = set(slabs)
        flushed: set[DriveId] = set()
        while True:
            due: dict[NodeName, dict[DriveId, SlabId]] = {}
            for slab in wanted:
                for member in self._bus.known(slab).writable:
                    if member.drive not in flushed:
                        due.setdefault(member.node, {})[member.drive] = slab
            if not due:
                return
            failures = await without_excused(self._links, due, await self._flush_nodes(due, flushed))
            if failures:
                await self._report_failed_flush(wanted, failures)

    async def _flush_nodes(
        self, due: dict[NodeName, dict[DriveId, SlabId]], flushed: set[DriveId]
    ) -> dict[DriveId, CsvfsError]:
        """One FLUSH to each node, all at once; adds to `flushed`, returns what failed."""
        failures: dict[DriveId, CsvfsError] = {}
        targets = []
        for node, drives in due.items():
            try:
                server = self._links.ready(node) or await self._links.connected(node)
                for drive in drives:
                    if not server.serves(drive):
                        server = await self._links.serving(node, drive)
                targets.append((server, drives, [server.drive_index(drive) for drive in drives]))
            except CsvfsError as error:
                failures.update(dict.fromkeys(drives, error))
        remaining = len(targets)
        done = trio.Event()

        def answer(drives: Iterable[DriveId], frame: Frame | None, error: CsvfsError | None) -> None:
            nonlocal remaining
            remaining -= 1
            if error is None:
                flushed.update(drives)
            else:
                failures.update(dict.fromkeys(drives, error))
            if not remaining:
                done.set()

        below = self._bus.completed_below()
        self._links.engine.hot()
        for server, drives, indexes in targets:
            server.link.request(Kind.FLUSH, pack_flush(below, indexes), None, partial(answer, list(drives)))
        if targets:
            with trio.move_on_after(FLUSH_TIMEOUT_S):
                await done.wait()
        late = TimedOut(f"no answer to a flush within {FLUSH_TIMEOUT_S:g} s")
        for _, drives, _ in targets:
            failures.update(
                {drive: late for drive in drives if drive not in flushed and drive not in failures}
            )
        return failures

    async def _report_failed_flush(self, slabs: set[SlabId], failures: dict[DriveId, CsvfsError]) -> None:
        """Have the owner take the failed members out; raises when one of them cannot be missed."""
        for error in failures.values():
            if isinstance(error, Fenced):
                self._bus.fenced(error)
                raise error
        for slab in slabs:
            descriptor = self._bus.known(slab)
            drives = [member.drive for member in descriptor.writable if member.drive in failures]
            if drives:
                reason = str(failures[drives[0]])
                self._bus.learn(await self._owner.slab_failed(slab, descriptor.epoch, drives, reason))
                if self._bus.known(slab).epoch == descriptor.epoch:
                    raise DriveFailed(f"flush of slab {slab} failed: {reason}")

    async def trim(self, items: list[tuple[SlabId, int, int]]) -> None:
        """See Bus.trim."""
        by_node: dict[NodeName, list] = {}
        for slab, block, count in items:
            descriptor = self._bus.known(slab)
            for member in descriptor.writable:
                server = await self._links.serving(member.node, member.drive)
                row = [server.drive_index(member.drive), slab, descriptor.epoch, block, count]
                by_node.setdefault(member.node, []).append(row)
        errors: list[CsvfsError] = []
        async with trio.open_nursery() as nursery:
            for node, rows in by_node.items():
                nursery.start_soon(self._trim_node, node, rows, errors)
        if errors:
            raise errors[0]

    async def _trim_node(self, node: NodeName, rows: list, errors: list[CsvfsError]) -> None:
        try:
            await self._links.call(node, "trim", {"items": rows}, timeout_s=TRIM_TIMEOUT_S)
        except CsvfsError as error:
            errors.append(error)
