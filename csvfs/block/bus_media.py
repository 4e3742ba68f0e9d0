"""What a bus has the drives do with their media: flush, and trim.

Place      block floor, under bus.py.

Invariants
  I8  `flush` returns only when every in-sync and joining member of every slab has flushed, at the epoch that is known:
      so whatever may have lost what was written before is known as well (`SlabDescriptor.lost_epoch`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import trio

from csvfs.block.server_links import ServerLinks, without_excused
from csvfs.errors import CsvfsError, DriveFailed, Fenced, ProtocolError, TimedOut, Unavailable
from csvfs.ids import DriveId, NodeName, SlabId
from csvfs.net.link import Link
from csvfs.wire.block_messages import (
    FLUSH_LATER_EPOCH,
    FLUSH_ROWS_MAX,
    FlushRow,
    pack_flush,
    unpack_flush_refused,
)
from csvfs.wire.frames import Frame, Kind

if TYPE_CHECKING:
    from csvfs.block.bus import Bus, SlabOwner

FLUSH_TIMEOUT_S = 30.0
TRIM_TIMEOUT_S = 10.0

ASK_INTERVAL_S = 0.1  # when the owner has changed nothing
Copy = tuple[DriveId, SlabId]


class _Answers:
    """What has become of the copies in one round: flushed at the epoch we know, or why not."""

    def __init__(self) -> None:
        self.missing = 0  # answers
        self.ended = trio.Event()  # one for all: each costs its waiter a turn
        self.flushed: set[Copy] = set()
        self.passed: set[SlabId] = set()  # a copy is at a later epoch
        self.not_served: set[Copy] = set()
        self.failures: dict[DriveId, CsvfsError] = {}

    def error(self, drive: DriveId, slab: SlabId) -> CsvfsError | None:
        if (drive, slab) in self.not_served:
            return Unavailable(f"slab {slab} on drive {drive.hex()[:8]} is not in service")
        return None if (drive, slab) in self.flushed else self.failures.get(drive)


class _Flush:
    """One FLUSH of one node, with the copies that its rows are of."""

    __slots__ = ("answers", "copies", "error", "is_answered", "link", "refused", "rows")

    def __init__(self, link: Link, copies: list[Copy], rows: list[FlushRow], answers: _Answers) -> None:
        self.link = link
        self.copies = copies
        self.rows = rows
        self.answers = answers
        self.is_answered = False
        self.refused: dict[int, int] = {}
        self.error: CsvfsError | None = None
        answers.missing += 1

    def send(self, completed_below: int) -> None:
        self.link.request(Kind.FLUSH, pack_flush(completed_below, self.rows), None, self._answered)

    def _answered(self, frame: Frame | None, error: CsvfsError | None) -> None:
        self.error = error
        if frame is not None and error is None:
            try:
                self.refused = unpack_flush_refused(frame.head, len(self.rows))
            except ProtocolError as nonsense:
                self.error = nonsense
        self.is_answered = True
        self.answers.missing -= 1
        if not self.answers.missing:
            self.answers.ended.set()

    def judge(self) -> None:
        answers = self.answers
        if not self.is_answered:
            self.error = TimedOut(f"no answer to a flush within {FLUSH_TIMEOUT_S:g} s")
        if not self.refused and self.error is None:
            answers.flushed.update(self.copies)
            return
        for number, (drive, slab) in enumerate(self.copies):
            why = self.refused.get(number)
            if self.error is not None:
                answers.failures[drive] = self.error
            elif why is None:
                answers.flushed.add((drive, slab))
            elif why == FLUSH_LATER_EPOCH:
                answers.passed.add(slab)
            else:
                answers.not_served.add((drive, slab))


class Media:
    def __init__(
        self, bus: Bus, links: ServerLinks, owner: SlabOwner, *, io_timeout_s: float, owner_patience_s: float
    ) -> None:
        """See Bus."""
        self._bus = bus
        self._links = links
        self._owner = owner
        self._io_timeout_s = io_timeout_s
        self._owner_patience_s = owner_patience_s

    async def flush(self, slabs: Iterable[SlabId]) -> None:
        """See Bus.flush."""
        wanted = set(slabs)
        flushed: set[Copy] = set()
        gives_up_at = trio.current_time() + self._io_timeout_s
        while due := self._due(wanted, flushed):
            answers = await self._flush_nodes(due)
            flushed |= answers.flushed
            if answers.failures:
                drives = {node: [drive for drive, _ in copies] for node, copies in due.items()}
                answers.failures = await without_excused(self._links, drives, answers.failures)
            if answers.failures or answers.not_served or answers.passed:
                await self._ask_owner(due, answers, gives_up_at)

    def _due(self, wanted: set[SlabId], flushed: set[Copy]) -> dict[NodeName, list[Copy]]:
        due: dict[NodeName, list[Copy]] = {}
        for slab in wanted:
            for member in self._bus.known(slab).writable:
                if (member.drive, slab) not in flushed:
                    due.setdefault(member.node, []).append((member.drive, slab))
        return due

    async def _flush_nodes(self, due: dict[NodeName, list[Copy]]) -> _Answers:
        """FLUSHes to each node, all at once."""
        answers = _Answers()
        requests: list[_Flush] = []
        for node, copies in due.items():
            requests += await self._requests(node, copies, answers)
        below = self._bus.completed_below()
        self._links.engine.hot()
        for request in requests:
            request.send(below)
        if answers.missing:
            with trio.move_on_after(FLUSH_TIMEOUT_S):
                await answers.ended.wait()
        for request in requests:
            request.judge()
        return answers

    async def _requests(self, node: NodeName, copies: list[Copy], answers: _Answers) -> list[_Flush]:
        try:
            server = self._links.ready(node) or await self._links.connected(node)
            for drive in dict.fromkeys(drive for drive, _ in copies):
                if not server.serves(drive):
                    server = await self._links.serving(node, drive)
        except CsvfsError as error:
            answers.failures.update({drive: error for drive, _ in copies})
            return []
        served: list[tuple[Copy, FlushRow]] = []
        for drive, slab in copies:
            try:
                row = (server.drive_index(drive), self._bus.known(slab).epoch, slab)
                served.append(((drive, slab), row))
            except CsvfsError as error:
                answers.failures[drive] = error
        parts = [served[first : first + FLUSH_ROWS_MAX] for first in range(0, len(served), FLUSH_ROWS_MAX)]
        return [_Flush(server.link, [copy for copy, _ in part], [row for _, row in part], answers) for part in parts]

    async def _ask_owner(self, due: dict[NodeName, list[Copy]], answers: _Answers, gives_up_at: float) -> None:
        """Have the owner say what has become of slabs, and take the failed members out; raises when one of them cannot be
        missed. Not when it does not decide for long: we may have been cut off from what it reaches, and try again.

        due     what this round was to flush: a copy that has flushed before is not asked about because its drive fails now.
        """
        for error in answers.failures.values():
            if isinstance(error, Fenced):
                self._bus.fenced(error)
                raise error
        reason = "the owners of slabs have not decided"
        with trio.move_on_after(self._owner_patience_s):
            for slab, drives in _by_slab(due).items():
                descriptor = self._bus.known(slab)
                members = [member.drive for member in descriptor.writable if member.drive in drives]
                errors = {drive: wrong for drive in members if (wrong := answers.error(drive, slab))}
                if errors:
                    reason = str(next(iter(errors.values())))
                elif slab in answers.passed:
                    reason = f"slab {slab} is not at epoch {descriptor.epoch} any more"
                else:
                    continue
                self._bus.learn(await self._owner.slab_failed(slab, descriptor.epoch, list(errors), reason))
                if self._bus.known(slab).epoch == descriptor.epoch:
                    if any(isinstance(error, DriveFailed) for error in errors.values()):
                        raise DriveFailed(f"flush of slab {slab} failed: {reason}")
                    await trio.sleep(ASK_INTERVAL_S)
        if trio.current_time() >= gives_up_at:
            raise TimedOut(f"not flushed after {self._io_timeout_s:g} s: {reason}")

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


def _by_slab(due: dict[NodeName, list[Copy]]) -> dict[SlabId, set[DriveId]]:
    drives: dict[SlabId, set[DriveId]] = {}
    for copies in due.values():
        for drive, slab in copies:
            drives.setdefault(slab, set()).add(drive)
    return drives
