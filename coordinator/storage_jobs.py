"""Storage jobs: how far repair, evacuation, rebalance and changes of the number of copies are, for people.

Place      coordinator floor; under repair.py, over job_record.py. What there is to do is counted from the
           slabs; here it is only summed up. Synchronous.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import trio

from coordinator.job_record import JobRecord
from coordinator.repair_plan import Wait
from csvfs.ids import DriveId, NodeName

COPIES = "copies"  # the kind of job that follows a change of the volume's number of copies


@dataclass(slots=True, frozen=True)
class JobKey:
    """A job: its kind, and the drive that is mended or emptied (None: all of them)."""

    kind: str
    drive: DriveId | None = None
    node: NodeName | None = None

    @property
    def text(self) -> str:
        """As it stands in the record."""
        return self.kind if self.drive is None else f"{self.kind} {self.drive.hex()}"

    @property
    def what(self) -> str:
        if self.drive is None:
            whole = {"rebalance": "rebalance of the drives", COPIES: "change of the number of copies"}
            return whole.get(self.kind, f"{self.kind} of the volume")
        verb = {"repair": "rebuild", "evacuate": "evacuation"}.get(self.kind, self.kind)
        return f"{verb} of drive {self.drive.hex()[:8]} on {self.node}"


@dataclass(slots=True)
class Job:
    """Counted in slabs; `copied`: bytes, by this coordinator."""

    left: int = 0
    total: int = 0
    done_here: int = 0  # by this coordinator
    copied: int = 0
    started: float = field(default_factory=trio.current_time)
    waiting_for: str = ""
    waits_for_last: bool = False


class StorageJobs:
    """`slab_size`: bytes."""

    def __init__(self, volume_name: str, slab_size: int, record: JobRecord) -> None:
        self._volume = volume_name
        self._slab_size = slab_size
        self._record = record
        self._jobs: dict[JobKey, Job] = {}

    def counted(self, counts: Counter[JobKey], waiting: dict[JobKey, Wait]) -> None:
        """What a look at all slabs has found to do, and what some of them wait for."""
        for key in [key for key in self._jobs if not counts.get(key)]:
            del self._jobs[key]
        for key, left in counts.items():
            job = self._jobs.get(key)
            if job is None:
                job = self._jobs[key] = Job(
                    total=self._record.facts.totals.get(key.text, 0) // self._slab_size
                )
            job.left = left
            job.total = max(job.total, left)
            wait = waiting.get(key, Wait(""))
            job.waiting_for, job.waits_for_last = wait.reason, wait.is_last

    def totals(self) -> dict[str, int]:
        """For the record: bytes, by job."""
        return {key.text: job.total * self._slab_size for key, job in self._jobs.items()}

    def done(self, key: JobKey) -> None:
        """One slab."""
        job = self._jobs.get(key)
        if job is not None:
            job.left = max(0, job.left - 1)
            job.done_here += 1
            if not job.waits_for_last:
                job.waiting_for = ""
            if not job.left:
                del self._jobs[key]

    def copied(self, key: JobKey, size: int) -> None:
        """`size` bytes were copied for it."""
        job = self._jobs.get(key)
        if job is not None:
            job.copied += size

    def waits(self, key: JobKey, reason: str) -> None:
        job = self._jobs.get(key)
        if job is not None and not job.waits_for_last:  # nothing is more important to know
            job.waiting_for = reason

    def has(self, kinds: Iterable[str]) -> bool:
        wanted = set(kinds)
        return any(key.kind in wanted for key in self._jobs)

    def to_status(self) -> list[dict[str, Any]]:
        """Rows of `volume_status`: done, left and total count whole slabs; copied and rate what was really copied;
        eta in seconds."""
        return [self._row(key, job) for key, job in self._jobs.items()]

    def _row(self, key: JobKey, job: Job) -> dict[str, Any]:
        elapsed_s = max(trio.current_time() - job.started, 0.001)
        slabs_rate = job.done_here * self._slab_size / elapsed_s
        left, total = job.left * self._slab_size, job.total * self._slab_size
        waiting_for = job.waiting_for
        if self._record.is_paused(key.kind):
            waiting_for = f"csvfs job resume {self._volume} {key.kind}"
        return {
            "kind": key.kind,
            "what": key.what,
            "drive": key.drive,
            "node": key.node,
            "done": total - left,
            "left": left,
            "total": total,
            "copied": job.copied,
            "rate": job.copied / elapsed_s,
            "eta": left / slabs_rate if slabs_rate else None,
            "waiting_for": waiting_for,
            "paused": self._record.is_paused(key.kind),
        }
