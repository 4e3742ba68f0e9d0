"""The check desk: runs the metadata check of a volume in use when somebody asks, and its repairs.

Place      coordinator floor; the trio shell around metadata_check.py and metadata_repair.py, below service.py.
Turns      A slice of SLICE_S, then a pause of PAUSE_S in which everybody else has the process: a check takes a third of
           one core at most, and a request waits for a slice at most (a step that reads cold pages may take longer).
Limits     one check at a time; what is asked for meanwhile hears of that one. ROUNDS_MAX: a repair may uncover what could
           not be seen before, so a check with repairs is repeated until it finds nothing more to mend.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import trio

from coordinator.batches import Batches
from coordinator.janitor import Janitor
from coordinator.lease_table import Need
from coordinator.leases import Leases
from coordinator.metadata import Metadata
from coordinator.metadata_check import Finding, MetadataCheck
from coordinator.metadata_repair import MetadataRepair
from coordinator.sessions import Session
from csvfs.errors import CsvfsError
from csvfs.ids import Incarnation, InodeNo, NodeName

log = logging.getLogger(__name__)

SLICE_S, PAUSE_S = 0.003, 0.006
ROUNDS_MAX = 4
NONE, RUNNING, DONE, FAILED = "none", "running", "done", "failed"


class CheckDesk:
    def __init__(
        self,
        metadata: Metadata,
        batches: Batches,
        leases: Leases,
        janitor: Janitor,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._metadata = metadata
        self._batches = batches
        self._leases = leases
        self._janitor = janitor
        self._clock_ns = clock_ns
        self._wanted = trio.Event()
        self._repairs = False
        self._state, self._error, self._round = NONE, "", 0
        self._began_s = self._took_s = 0.0
        self._check: MetadataCheck | None = None
        self._mended: list[tuple[Finding, str]] = []

    def ask(self, start: bool, repairs: bool) -> dict[str, Any]:
        """The call `check`: begin one, unless one runs; how it stands."""
        if start and self._state != RUNNING:
            self._state, self._error, self._round, self._repairs = RUNNING, "", 0, repairs
            self._check, self._mended = None, []
            self._began_s = trio.current_time()
            self._wanted.set()
        return self._status()

    def _status(self) -> dict[str, Any]:
        check, running = self._check, self._state == RUNNING
        took_s = trio.current_time() - self._began_s if running else self._took_s
        fraction = 0.0 if check is None else check.fraction
        rows = 0 if check is None else check.rows
        eta_s = took_s / fraction - took_s if running and fraction > 0.02 and self._round == 1 else None
        return {
            "state": self._state,
            "error": self._error,
            "round": self._round,
            "phase": "" if check is None else check.phase,
            "fraction": fraction if running else 1.0,
            "rows": rows,
            "rate": rows / took_s if took_s else 0.0,
            "took_s": took_s,
            "eta_s": eta_s,
            "findings": [] if check is None else [[f.kind, f.text] for f in check.findings],
            "found": 0 if check is None else check.found,
            "unchecked": 0 if check is None else check.unchecked,
            "skipped": [] if check is None else check.skipped,
            "mended": [[finding.kind, finding.text, said] for finding, said in self._mended],
        }

    async def run_forever(self) -> None:
        """Raises what ends the batches."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            try:
                await self._rounds()
                self._state = DONE
            except CsvfsError as error:
                log.warning("the metadata cannot be checked: %s", error)
                self._state, self._error = FAILED, str(error)
            self._took_s = trio.current_time() - self._began_s

    async def _rounds(self) -> None:
        for self._round in range(1, ROUNDS_MAX + 1):
            check = self._check = MetadataCheck(self._metadata, is_forgotten=self._is_forgotten)
            await self._run(check)
            if not self._repairs or not await self._mend(check.findings):
                return

    def _is_forgotten(self, ino: int) -> bool:
        return not self._leases.table.is_held(InodeNo(ino)) and not self._janitor.knows(InodeNo(ino))

    async def _run(self, check: MetadataCheck) -> None:
        steps = check.steps()
        try:
            while True:
                ends = time.perf_counter() + SLICE_S
                while time.perf_counter() < ends:
                    if next(steps, self) is self:
                        return
                await trio.sleep(PAUSE_S)
        finally:
            steps.close()

    async def _mend(self, findings: list[Finding]) -> int:
        """Returns how many were mended."""
        repair, count = MetadataRepair(self._metadata), 0
        nobody = Session(0, (NodeName(""), Incarnation(0)))
        for finding in findings:
            if finding.kind == "forgotten":
                self._janitor.orphaned(InodeNo(finding.about[0]))
                said = "let go"
            elif not repair.can(finding):
                continue
            else:
                needs = dict.fromkeys(repair.inodes_of(finding), Need.ENTRIES)
                ticket = await self._leases.take(nobody, needs)
                try:
                    said = await self._batches.run(lambda: repair.mend(finding, self._clock_ns()))  # noqa: B023 awaited here
                finally:
                    self._leases.finish(ticket)
            if said:
                log.warning("%s: %s", finding.text, said)
                self._mended.append((finding, said))
                count += 1
        for ino in repair.orphans:
            self._janitor.orphaned(InodeNo(ino))
        return count
