"""The drives a drive server serves, by index and id, and which of their copies are in service.

Place      block floor, under drive_server.py. Synchronous.
Threads    What may wait for a drive's medium runs in threads of that drive alone (`threads`): so a drive that hangs
           takes none from the others.
Rule       After a start of this process no copy is in service until a coordinator has installed it (PROTOCOL.md,
           "Kinds"): it alone knows whether the copy is still in sync.
"""

import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

import trio

from csvfs.block.drive import Drive
from csvfs.block.drive_faults import NOT_OPENED, READ_ONLY, SWAPPED, fault_of, faulty
from csvfs.block.latency import DriveLatency
from csvfs.block.slab_copy import SlabCopy
from csvfs.errors import CsvfsError, DriveFailed, DriveRefused, NotFound, Unavailable
from csvfs.ids import DriveId, PoolId, SlabId, VolumeId
from csvfs.wire.block_messages import ROLE_IN_SYNC

log = logging.getLogger(__name__)

THREADS_MAX = 16  # per drive: deep enough a queue for flash, and a node of 24 drives that all hang has 384


@dataclass(slots=True)
class ServedDrive:
    """`drive` None: it could not be opened, or has failed: `state` says why in one line, `fault` in one word.

    told_ms what the others were told of its latency, by kind.
    slow    its latency is an outlier (latency.py), and has been for long enough.
    failures, last_failure, last_fault, failed_at   how often it failed in the life of this process, why last, and when
    waits   of those who wait for its medium in a thread: cancelled when it is given up.
    """

    index: int
    drive_id: DriveId
    path: str
    drive: Drive | None
    state: str
    in_service: set[SlabCopy] = field(default_factory=set)
    fault: str = NOT_OPENED
    latency: DriveLatency = field(default_factory=DriveLatency)
    told_ms: dict[str, int] = field(default_factory=dict)
    slow: bool = False
    slow_since: float | None = None  # seconds of the trio clock; since when it is an outlier
    failures: int = 0
    last_failure: str = ""
    last_fault: str = ""
    failed_at: float | None = None  # seconds of the trio clock
    opening_since: float | None = None  # likewise, while a thread opens it
    threads: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(THREADS_MAX))
    waits: set[trio.CancelScope] = field(default_factory=set)

    @property
    def condition(self) -> tuple[str, str]:
        """`state` and `fault` as of now: an open drive that has failed is not "ok" until the watch takes it out."""
        if self.drive is not None and self.drive.failure is not None:
            return f"failed: {self.drive.failure}", self.drive.fault
        return self.state, self.fault

    @property
    def stale_count(self) -> int:
        """Copies that are being resynced, or wait for their coordinator to say whether they are in sync."""
        copies = self.drive.slabs() if self.drive is not None else []
        return sum(copy not in self.in_service or copy.role != ROLE_IN_SYNC for copy in copies)

    @property
    def all_judged(self) -> bool:
        """Whether a coordinator has put every copy in service that can be; the others are made anew."""
        return self.drive is not None and all(
            copy in self.in_service or copy.damaged for copy in self.drive.slabs()
        )

    def opened(self) -> Drive:
        """Raises DriveFailed when the drive is not open."""
        if self.drive is None:
            raise DriveFailed(f"drive {self.drive_id.hex()[:8]} at {self.path}: {self.state}")
        return self.drive


def check_writable(path: str) -> None:
    """Raises DriveRefused for a file whose write permission was taken away: root could write it all the same."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # whoever opens it says why
    if stat.S_ISREG(mode) and not mode & 0o222:
        refused = DriveRefused(f"drive {path} is read-only: its write permission was taken away; chmod u+w it")
        raise faulty(refused, READ_ONLY)


class ServedDrives:
    """Indexes are given once per drive id and process, so a link may keep using them."""

    def __init__(self) -> None:
        self._by_index: list[ServedDrive] = []
        self._by_id: dict[DriveId, ServedDrive] = {}

    def of_drive(self, drive: Drive) -> ServedDrive | None:
        """Who serves an open drive; None: it was taken out."""
        return next((served for served in self._by_index if served.drive is drive), None)

    def __iter__(self) -> Iterator[ServedDrive]:
        return iter(self._by_index)

    def expect(self, drive_id: DriveId, path: str) -> ServedDrive:
        """The drive's place, made when it has none: it is to be opened."""
        served = self._by_id.get(drive_id)
        if served is None:
            served = ServedDrive(len(self._by_index), drive_id, path, None, "not opened yet")
            self._by_index.append(served)
            self._by_id[drive_id] = served
        return served

    def open(self, drive_id: DriveId, path: str, *, pool_id: bytes, cluster_id: bytes) -> ServedDrive:
        """Open the drive, or note why it cannot be; asked again for one that is open, does nothing.

        May run in another thread after `expect`, once at a time per drive.
        """
        served = self.expect(drive_id, path)
        if served.drive is not None:
            return served
        served.path = path
        try:
            check_writable(path)
            drive = Drive.open(path, pool_id=PoolId(pool_id), cluster_id=cluster_id)
            if drive.id != drive_id:
                found = drive.id.hex()[:8]
                drive.close()
                swapped = DriveFailed(
                    f"{path} holds drive {found}, not {drive_id.hex()[:8]}: the paths were swapped"
                )
                raise faulty(swapped, SWAPPED)
        except (CsvfsError, OSError) as error:
            if served.state != str(error):
                log.error("drive %s at %s is not served: %s", drive_id.hex()[:8], path, error)
            served.state, served.fault = str(error), fault_of(error)
        else:
            served.latency, served.slow, served.slow_since = DriveLatency(), False, None
            served.state, served.fault, served.drive = "ok", "", drive  # last: from here on it is used
            log.info("serving drive %s at %s: %d slabs", drive_id.hex()[:8], path, len(list(drive.slabs())))
        return served

    def release(self, drive_id: DriveId) -> ServedDrive | None:
        """Close a drive that is taken out of the pool; None: it is not open. Its index is never used again."""
        served = self._by_id.get(drive_id)
        if served is None or served.drive is None:
            return None
        drive, served.drive, served.state = served.drive, None, "removed from the pool"
        served.in_service.clear()
        try:
            drive.close(clean=True)
        except (CsvfsError, OSError) as error:
            log.error("drive %s was not closed cleanly: %s", served.path, error)
        log.info("drive %s at %s is released", drive_id.hex()[:8], served.path)
        return served

    def by_index(self, index: int) -> ServedDrive:
        """Raises NotFound."""
        if not 0 <= index < len(self._by_index):
            raise NotFound(f"drive index {index} is not served here")
        return self._by_index[index]

    def by_id(self, drive_id: DriveId) -> ServedDrive:
        """Raises NotFound."""
        served = self._by_id.get(drive_id)
        if served is None:
            raise NotFound(f"drive {drive_id.hex()[:8]} is not served here; see csvfs drive list")
        return served

    def copy(self, served: ServedDrive, volume: VolumeId, slab: SlabId) -> SlabCopy:
        """The slab's copy on the drive. Raises NotFound, DriveFailed."""
        copy = served.opened().find(volume, slab)
        if copy is None:
            raise NotFound(f"slab {slab} has no copy on drive {served.drive_id.hex()[:8]}")
        return copy

    def copy_in_service(self, served: ServedDrive, volume: VolumeId, slab: SlabId) -> SlabCopy:
        """Like copy; Unavailable until a coordinator has installed it since this process started."""
        copy = self.copy(served, volume, slab)
        if copy not in served.in_service:
            raise Unavailable(
                f"slab {slab} on drive {served.drive_id.hex()[:8]} waits for its coordinator since the drive server started"
            )
        return copy

    def close(self, *, clean: bool = True) -> None:
        """Flush and close every drive cleanly; one that fails is logged and stays marked as not clean.

        A drive found unclean stays so until all its copies have been put in service: what is torn in the others
        is made good only then, and only of a drive that is known to be unclean (BlockService.install).
        """
        for served in self._by_index:
            if served.drive is not None:
                drive = served.drive
                try:
                    if clean and drive.unclean and not served.in_service.issuperset(drive.slabs()):
                        drive.flush()
                        drive.close(clean=False)
                    else:
                        drive.close(clean=clean)
                except (CsvfsError, OSError) as error:
                    log.error("drive %s was not closed cleanly: %s", served.path, error)
                served.drive = None
                served.state, served.fault = "closed", NOT_OPENED
