"""The watch over a drive server's drives: takes failed ones out, tries them again, tells the cluster.

Place      block floor, between served_drives.py and drive_server.py.
Tasks      watch_forever and one task per drive that is being looked at, which is the only one that closes it;
           retry_forever has those opened that are not open.
Hangs      A drive whose medium has not answered a look for hang_s is given up: it counts as failed, and nobody waits
           for it any more. Its look, which goes on waiting, closes it when it answers; then it is opened anew.
Rule       A failed drive is closed as after a kill. Its copies are in service no more; when it opens again they
           wait for their coordinators, as after a restart of the drive server, and are resynced.
"""

import logging
import math
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from csvfs.block.block_service import BlockService
from csvfs.block.drive import Drive
from csvfs.block.drive_faults import FULL, HANGS, NOT_OPENED
from csvfs.block.latency import FLOOR_S, RETIRE_AFTER_S, SLOW_AFTER_S, above_floor, slow_drives, told_ms
from csvfs.block.medium_check import MediumReport, ask_medium, check_medium
from csvfs.block.served_drives import ServedDrive
from csvfs.errors import CsvfsError
from csvfs.units import MIB

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0
HANG_S = 10.0
RETRY_INTERVAL_S = 1.0
RETRY_S = 2.0
RETRY_S_MAX = 60.0
RAN_WELL_S = 60.0  # a drive that failed later than this after its open is tried again soon
RETIRE_AGAIN_S = 60.0  # another drive was retired, or the cluster store could not be reached
ASK_AFTER_S = 2.0  # of an operation under way: then a look asks the medium itself, past the page cache
FULL_ROOM_MIN = 64 * MIB  # of a file system that was full: below this it would be full again at once

Publish = Callable[[dict[str, Any]], Awaitable[None]]
Peers = Callable[[], Awaitable[dict[str, list[float]]]]
Retire = Callable[[ServedDrive], Awaitable[bool]]


@dataclass(slots=True, frozen=True)
class SlowRules:
    """When a drive counts as slow, and when it shall be retired; `retire_after_s` 0: never."""

    floor_s: float = FLOOR_S
    after_s: float = SLOW_AFTER_S
    retire_after_s: float = RETIRE_AFTER_S


async def no_peers() -> dict[str, list[float]]:
    return {}


async def no_retiring(served: ServedDrive) -> bool:
    return False


class DriveWatch:
    """The hooks into the cluster:

    publish   is given what others must know of the drives whenever that has changed.
    peers     latencies of drives of other nodes, by kind, in seconds.
    retire    a drive has been slow for so long that it should take no part any more. False: not now; it is
              asked again.
    """

    def __init__(
        self,
        service: BlockService,
        publish: Publish,
        *,
        peers: Peers = no_peers,
        retire: Retire = no_retiring,
        rules: SlowRules = SlowRules(),
        hang_s: float = HANG_S,
    ) -> None:
        self._service = service
        self._publish = publish
        self._peers = peers
        self._retire = retire
        self._rules = rules
        self._hang_s = hang_s
        self._retire_at: dict[int, float] = {}  # when to ask next, of drives that are slow for long
        self._busy: dict[int, float] = {}  # drives that are being looked at, since when
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
            now_s = trio.current_time()
            for served in list(service.drives):
                if served.index not in self._busy:
                    self._busy[served.index] = now_s
                    nursery.start_soon(self._look_once, served)
                else:
                    self._give_up_if_it_hangs(served, now_s)
            await self._judge_latency()
            await self.tell()

    async def _look_once(self, served: ServedDrive) -> None:
        try:
            await self._look_after(served)
        finally:
            del self._busy[served.index]

    def _give_up_if_it_hangs(self, served: ServedDrive, now_s: float) -> None:
        drive, waited_s = served.drive, now_s - self._busy[served.index]
        if drive is not None and drive.failure is None and waited_s >= self._hang_s:
            drive.fail(f"it has not answered for {waited_s:.0f} s", HANGS)
            log.error("drive %s is given up: %s", served.path, drive.failure)
            self._service.give_up(served, drive)

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
            asks = served.latency.longest(trio.current_time()) >= ASK_AFTER_S
            report = await self._in_thread(_look_at, drive, self._turn, asks)
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
        self._service.give_up(served, drive)
        served.failures += 1
        served.last_failure, served.last_fault = drive.failure, drive.fault
        served.failed_at = trio.current_time()
        await self._in_thread(drive.end_failed)
        self._service.flushes.end(served)
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
                if served.opening_since is not None:
                    self._note_slow_open(served, trio.current_time() - served.opening_since)
                elif served.drive is None and self._may_retry(served):
                    open_again(served)
                    if served.drive is not None:
                        self._service.drive_failed.set()  # the watch tells the cluster that it is open

    def _note_slow_open(self, served: ServedDrive, waited_s: float) -> None:
        if waited_s >= self._hang_s and served.fault != HANGS:
            served.state, served.fault = f"does not answer: opening it has not ended for {waited_s:.0f} s", HANGS
            log.error("drive %s %s", served.path, served.state)
            self._service.drive_failed.set()  # the watch tells the cluster

    @staticmethod
    async def _in_thread(function: Callable[..., Any], *args: Any) -> Any:
        """A thread that no other drive waits for: one look at a time per drive."""
        return await trio.to_thread.run_sync(
            function, *args, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
        )

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
        if any(above_floor(latency, now, self._rules.floor_s) for latency in latencies.values()):
            elsewhere = await self._peers()
        flagged = {served.index for served in open_drives if served.slow}
        outliers = slow_drives(latencies, now, elsewhere, self._rules.floor_s, flagged)
        lately = slow_drives(latencies, now, elsewhere, self._rules.floor_s)  # no drive is retired by what was
        for served in open_drives:
            if served.index not in outliers:
                if served.slow:
                    log.warning("drive %s is no longer slow", served.path)
                served.slow_since, served.slow = None, False
                self._retire_at.pop(served.index, None)
                continue
            if served.slow_since is None:
                served.slow_since = now
            since_s = now - served.slow_since
            if not served.slow and since_s >= self._rules.after_s:
                served.slow = True
                log.warning("drive %s: abnormal latency, %s", served.path, served.latency.describe())
            is_due = served.index in lately and now >= self._retire_at.get(served.index, 0)
            if 0 < self._rules.retire_after_s <= since_s and is_due:
                done = await self._retire(served)
                self._retire_at[served.index] = math.inf if done else now + RETIRE_AGAIN_S


def _look_at(drive: Drive, turn: int, asks: bool) -> MediumReport:
    if asks:
        ask_medium(drive)
    drive.lock_again()
    return check_medium(drive, turn)


def drive_report(served: ServedDrive) -> dict[str, Any]:
    """What `servers/<node>` says of a drive. `opens`: another one means that its copies left service."""
    fault = served.condition[1]
    if served.drive is None and not fault:
        fault = NOT_OPENED
    opens = served.drive.opens if served.drive is not None else 0
    report = {"fault": fault, "opens": opens, "slow": served.slow}
    told = told_ms(served.latency, trio.current_time(), served.told_ms) if served.drive is not None else {}
    served.told_ms = told
    return {**report, "latency_ms": told} if told else report


def room_around(path: str) -> int:
    """Bytes that the file system of a drive file has left; of anything else: plenty."""
    try:
        status = os.statvfs(os.path.dirname(path))
    except OSError:
        return FULL_ROOM_MIN
    return status.f_bavail * status.f_frsize
