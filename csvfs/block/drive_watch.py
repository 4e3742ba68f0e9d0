"""The watch over a drive server's drives: takes failed ones out, tries them again, tells the cluster.

Place      block floor, between served_drives.py and drive_server.py.
Tasks      watch_forever and one task per drive that is being looked at, which is the only one that closes it;
           retry_forever opens those that are not open.
Rule       A failed drive is closed as after a kill. Its copies are in service no more; when it opens again they
           wait for their coordinators, as after a restart of the drive server, and are resynced.
"""

import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from csvfs.block.block_service import BlockService
from csvfs.block.drive_faults import FULL, NOT_OPENED
from csvfs.block.latency import FLOOR_S, RETIRE_AFTER_S, SLOW_AFTER_S, coarse_ms, slow_drives
from csvfs.block.medium_check import check_medium
from csvfs.block.served_drives import ServedDrive
from csvfs.errors import CsvfsError
from csvfs.units import MIB

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0
RETRY_INTERVAL_S = 1.0
RETRY_S = 2.0
RETRY_S_MAX = 60.0
RAN_WELL_S = 60.0  # a drive that failed later than this after its open is tried again soon
FULL_ROOM_MIN = 64 * MIB  # of a file system that was full: below this it would be full again at once

Publish = Callable[[dict[str, Any]], Awaitable[None]]
Peers = Callable[[], Awaitable[dict[str, list[float]]]]
Retire = Callable[[ServedDrive], Awaitable[None]]


@dataclass(slots=True, frozen=True)
class SlowRules:
    """When a drive counts as slow, and when it shall be retired; `retire_after_s` 0: never."""

    floor_s: float = FLOOR_S
    after_s: float = SLOW_AFTER_S
    retire_after_s: float = RETIRE_AFTER_S


async def no_peers() -> dict[str, list[float]]:
    return {}


async def no_retiring(served: ServedDrive) -> None:
    pass


class DriveWatch:
    """The hooks into the cluster:

    publish   is given what others must know of the drives whenever that has changed.
    peers     latencies of drives of other nodes, by kind, in seconds.
    retire    a drive has been slow for so long that it should take no part any more.
    """

    def __init__(
        self,
        service: BlockService,
        publish: Publish,
        *,
        peers: Peers = no_peers,
        retire: Retire = no_retiring,
        rules: SlowRules = SlowRules(),
    ) -> None:
        self._service = service
        self._publish = publish
        self._peers = peers
        self._retire = retire
        self._in_thread = service.in_thread
        self._rules = rules
        self._retired: set[int] = set()
        self._busy: set[int] = set()  # drives that are being looked at
        self._turn = 0
        self._published: dict[str, Any] | None = None
        self._retry_at: dict[int, float] = {}
        self._delays: dict[int, float] = {}
        self._opened_at: dict[int, float] = {}

    async def watch_forever(self) -> None:
        """Raises nothing that a drive could cause. One that hangs holds up its own task only."""
        async with trio.open_nursery() as nursery:
            await self._watch_in(nursery)

    async def _watch_in(self, nursery: trio.Nursery) -> None:
        while True:
            service = self._service
            with trio.move_on_after(CHECK_INTERVAL_S):
                await service.drive_failed.wait()
            service.drive_failed = trio.Event()
            self._turn += 1
            for served in list(service.drives):
                if served.index not in self._busy:
                    self._busy.add(served.index)
                    nursery.start_soon(self._look_once, served)
            await self._judge_latency()
            await self.tell()

    async def _look_once(self, served: ServedDrive) -> None:
        try:
            await self._look_after(served)
        finally:
            self._busy.discard(served.index)

    async def tell(self) -> None:
        """Publish what has changed; what cannot be told now is told at the next look."""
        known = {served.drive_id.hex(): drive_report(served) for served in self._service.drives}
        if known == self._published:
            return
        try:
            await self._publish(known)
        except CsvfsError as error:
            log.warning("the state of the drives cannot be told: %s", error)
        else:
            self._published = known

    async def _look_after(self, served: ServedDrive) -> None:
        drive = served.drive
        if drive is None:
            return
        self._opened_at.setdefault(served.index, trio.current_time())
        if drive.failure is None:
            report = await self._in_thread(check_medium, drive, self._turn)
            if served.drive is not drive:
                return  # it was released meanwhile
            if report.failure:
                drive.fail(report.failure, report.fault)
            elif report.bad_copies and drive.failure is None:
                names = f"superblock copies {report.bad_copies} were damaged: rewritten"
                log.warning("drive %s: %s", served.path, names)
                drive.repairs.append(names)
                drive.counters.healed += len(report.bad_copies)
                try:
                    await self._in_thread(drive.rewrite_superblocks)
                except CsvfsError as error:
                    log.error("drive %s: %s", served.path, error)
        if drive.failure is None and drive.contents_lost and served.all_judged:
            try:
                await self._in_thread(drive.note_judged)
                log.info("drive %s: all copies have been judged since it lost power", served.path)
            except CsvfsError as error:
                log.error("drive %s: %s", served.path, error)
        if drive.failure is not None and served.drive is drive:
            await self._take_out(served)

    async def _take_out(self, served: ServedDrive) -> None:
        """The drive has failed: nothing of it is in service any more, and it is closed."""
        drive = served.drive
        assert drive is not None and drive.failure is not None
        log.error("drive %s has failed (%s): %s", served.path, drive.fault, drive.failure)
        served.in_service.clear()
        self._service.forget_copies()
        self._service.marks.forget_drive(drive)
        served.state, served.fault = f"failed: {drive.failure}", drive.fault
        self._service.drive_failed.set()  # the cluster is told now, however long closing takes
        await self._in_thread(drive.end_failed)
        self._service.end_flusher(served)
        try:
            drive.close(clean=False)
        except (CsvfsError, OSError) as error:
            log.warning("drive %s: closing it: %s", served.path, error)
        served.drive = None
        now = trio.current_time()
        ran_well = now - self._opened_at.pop(served.index, now) >= RAN_WELL_S
        delay_s = RETRY_S if ran_well else min(2 * self._delays.get(served.index, RETRY_S / 2), RETRY_S_MAX)
        self._delays[served.index] = delay_s
        self._retry_at[served.index] = now + delay_s

    async def retry_forever(self, open_again: Callable[[ServedDrive], None]) -> None:
        """Have drives that are not open tried again; one that was repaired or reset comes back by this."""
        while True:
            await trio.sleep(RETRY_INTERVAL_S)
            for served in list(self._service.drives):
                if served.drive is None and self._may_retry(served):
                    open_again(served)
                    if served.drive is not None:
                        self._service.drive_failed.set()  # the watch tells the cluster that it is open

    def _may_retry(self, served: ServedDrive) -> bool:
        if trio.current_time() < self._retry_at.get(served.index, 0):
            return False
        return served.fault != FULL or room_around(served.path) >= FULL_ROOM_MIN

    async def _judge_latency(self) -> None:
        """Flag drives that are much slower than the others, for long enough; unflag those that recovered."""
        now = trio.current_time()
        open_drives = [served for served in self._service.drives if served.drive is not None]
        for served in open_drives:
            served.latency.count_writes(served.opened().counters.writes, now)
        latencies = {served.index: served.latency for served in open_drives}
        elsewhere: dict[str, list[float]] = {}
        if any(coarse_ms(latency, now, self._rules.floor_s) for latency in latencies.values()):
            elsewhere = await self._peers()
        outliers = slow_drives(latencies, now, elsewhere, self._rules.floor_s)
        for served in open_drives:
            if served.index not in outliers:
                if served.slow:
                    log.warning("drive %s is no longer slow", served.path)
                served.slow_since, served.slow = None, False
                continue
            if served.slow_since is None:
                served.slow_since = now
            since_s = now - served.slow_since
            if not served.slow and since_s >= self._rules.after_s:
                served.slow = True
                log.warning("drive %s: abnormal latency, %s", served.path, served.latency.describe())
            if 0 < self._rules.retire_after_s <= since_s and served.index not in self._retired:
                self._retired.add(served.index)
                await self._retire(served)


def drive_report(served: ServedDrive) -> dict[str, Any]:
    """What `servers/<node>` says of a drive. `opens`: another one means that its copies left service."""
    fault = served.condition[1]
    if served.drive is None and not fault:
        fault = NOT_OPENED
    opens = served.drive.opens if served.drive is not None else 0
    report = {"fault": fault, "opens": opens, "slow": served.slow}
    latency_ms = coarse_ms(served.latency, trio.current_time()) if served.drive is not None else {}
    return {**report, "latency_ms": latency_ms} if latency_ms else report


def room_around(path: str) -> int:
    """Bytes that the file system of a drive file has left; of anything else: plenty."""
    try:
        status = os.statvfs(os.path.dirname(path))
    except OSError:
        return FULL_ROOM_MIN
    return status.f_bavail * status.f_frsize
