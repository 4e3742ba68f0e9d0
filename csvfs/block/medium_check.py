"""Looking after the medium of an open drive: is its file still the one that was opened, and still ours?

Place      block floor, above drive.py; drive_watch.py calls it every second or so. Blocks: runs in a thread.
Why        A file that somebody deletes, truncates, overwrites or makes read-only gives no error for a while, or
           none at all. Found here the drive fails with its reason; found by a store into a truncated mapping the
           process ends.
"""

import contextlib
import mmap
import os
from dataclasses import dataclass, field

from csvfs.block.drive import Drive
from csvfs.block.drive_faults import DELETED, MISSING, OVERWRITTEN, READ_ONLY, TRUNCATED, fault_of_errno
from csvfs.block.layout import ENTRY_SIZE, SUPERBLOCK_COPIES, SUPERBLOCK_SIZE
from csvfs.block.slot_table import parse_entry
from csvfs.block.superblock import Superblock, parse_superblock
from csvfs.errors import Corrupt


@dataclass(slots=True, frozen=True)
class MediumReport:
    """`failure` and `fault`: why the drive must fail; empty: it need not. `bad_copies`: superblocks to rewrite."""

    failure: str = ""
    fault: str = ""
    bad_copies: list[int] = field(default_factory=list)


def check_medium(drive: Drive, turn: int = 0) -> MediumReport:
    """What the operating system says of the drive's file or device now. Never raises.

    Args  turn: another number at each call, by which another slot's entry is looked at.
    """
    try:
        report = _check_file(drive) or _check_slot(drive, turn % drive.slot_count) or _check_superblocks(drive)
        if report.bad_copies:
            # Cut off since it was looked at? Its end would be missed then, and writing there would make it long again.
            report = _check_file(drive) or report
        return report
    except OSError as error:
        return MediumReport(f"it cannot be looked at: {error.strerror}", fault_of_errno(error.errno))


def ask_medium(drive: Drive) -> None:
    """Returns when the medium itself has answered a read, with an error or not, or cannot be asked past the page
    cache. Never raises."""
    with contextlib.suppress(OSError):
        fd = os.open(f"/proc/self/fd/{drive.fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            with mmap.mmap(-1, SUPERBLOCK_SIZE) as aligned:
                os.preadv(fd, [aligned], drive.layout.superblock_offsets[0])
        finally:
            os.close(fd)


def _check_file(drive: Drive) -> MediumReport | None:
    if not drive.is_file:
        if not os.path.exists(drive.path):
            return MediumReport("its device is gone", MISSING)
        return None
    status = os.fstat(drive.fd)
    if status.st_nlink == 0:
        return MediumReport("its file was deleted", DELETED)
    if status.st_size < drive.superblock.size:
        return MediumReport(
            f"its file was truncated to {status.st_size} of {drive.superblock.size} B", TRUNCATED
        )
    # For root a file without write bits can be written; whoever took them away meant it (eligibility.py).
    if not status.st_mode & 0o222:
        return MediumReport("its file was made read-only", READ_ONLY)
    return None


def _check_slot(drive: Drive, slot: int) -> MediumReport | None:
    """Rot takes one half of an entry; both are taken by somebody who writes where he should not."""
    if slot in drive.quarantined:
        return None
    for half in (0, 1):
        try:
            parse_entry(os.pread(drive.fd, ENTRY_SIZE, drive.layout.entry_offset(slot, half)), slot, drive.id)
            return None
        except Corrupt:
            continue
    return MediumReport("its slot table was overwritten by somebody else", OVERWRITTEN)


def _check_superblocks(drive: Drive) -> MediumReport:
    """Somebody who writes over a drive most often begins at its start, or does all of it."""
    found: list[Superblock | None] = []
    current = drive.superblock
    for copy, offset in enumerate(drive.layout.superblock_offsets):
        try:
            parsed = parse_superblock(os.pread(drive.fd, SUPERBLOCK_SIZE, offset), copy)
        except (Corrupt, OSError):
            found.append(None)
        else:
            found.append(parsed if parsed.drive_id == drive.id else None)
    bad = [copy for copy, parsed in enumerate(found) if parsed is None]
    if len(bad) == SUPERBLOCK_COPIES:
        return MediumReport("all its superblocks were overwritten by somebody else", OVERWRITTEN)
    # What is older than the drive's own knowledge is a write that was lost; newer: it is being written now.
    stale = [c for c, parsed in enumerate(found) if parsed and parsed.sequence < current.sequence]
    return MediumReport(bad_copies=sorted(bad + stale))
