"""Adding drives of this node to the pool.

Place      admin floor, over block/eligibility.py (may it be used?) and block/formatting.py (make it ours).
Order      first every path is checked, then each is formatted and made known. One refusal: nothing is
           written.
"""

import os
import secrets
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from csvfs.admin.cluster_view import DRIVE_OK, DRIVES, Record
from csvfs.admin.pool_ops import require_cluster, require_pool
from csvfs.block.device_facts import device_facts
from csvfs.block.eligibility import check_drive
from csvfs.block.formatting import format_drive
from csvfs.block.whole_disks import disk_facts
from csvfs.errors import BadRequest, CsvfsError, NotFound
from csvfs.ids import DriveId, NodeName, PoolId
from csvfs.store.interface import ClusterStore, Compare, Put
from csvfs.units import SLAB_SIZE_DEFAULT
from csvfs.wire.control import pack_value

BY_HAND = "csvfs drive add"
LABEL_SIZE_MAX = 64  # bytes; FORMAT.md, "Superblock"


@dataclass(slots=True, frozen=True)
class DriveCandidate:
    """A path that passed every check and may become a drive."""

    path: str  # absolute, links resolved: what the drive server will open
    size: int  # bytes
    backing: str  # file or block
    kind: str  # nvme, ssd, hdd; empty: not known
    declared: bool = False  # somebody said the kind: it stands against what the machine says
    identity: str = ""  # block/whole_disks.py
    by: str = BY_HAND


async def check_candidates(
    store: ClusterStore, paths: Sequence[str], kind: str | None = None
) -> list[DriveCandidate]:
    """Look at every path, write nothing. `kind`: of all; None: as the machine says.

    Raises  DriveRefused with the reason by name, BadRequest (one path twice), NotFound (no cluster, no pool,
            no such file), OSError (it cannot be opened).
    """
    cluster = await require_cluster(store)
    pool = await require_pool(store)
    candidates: list[DriveCandidate] = []
    for given in paths:
        candidate = _look_at(given, kind)
        if any(other.path == candidate.path for other in candidates):
            raise BadRequest(f"{given} is given twice; name every drive once")
        check = partial(
            check_drive,
            candidate.path,
            pool_id=PoolId(pool.id()),
            cluster_id=cluster.id(),
            slab_size=slab_size_of(pool),
        )
        await trio.to_thread.run_sync(check)
        candidates.append(candidate)
    return candidates


def slab_size_of(pool: Record) -> int:
    return pool.number("slab_size", SLAB_SIZE_DEFAULT)


def label_of(path: str) -> str:
    """The file's name, cut to what a superblock holds."""
    return os.path.basename(path).encode()[:LABEL_SIZE_MAX].decode(errors="ignore")


def _look_at(given: str, kind: str | None) -> DriveCandidate:
    path = os.path.realpath(given)
    try:
        path.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{path!r} is not UTF-8: rename it") from None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"{given}: no such file or device; truncate -s 4G {given} would make a file") from None
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise BadRequest(f"{given} is neither a file nor a block device")
        backing = "block" if stat.S_ISBLK(mode) else "file"
        status = os.fstat(fd)
        facts = disk_facts(f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}") if backing == "block" else None
        return DriveCandidate(
            path, os.lseek(fd, 0, os.SEEK_END), backing, kind or device_facts(path).kind,
            declared=kind is not None, identity=facts.identity if facts is not None else "",
        )  # fmt: skip
    finally:
        os.close(fd)


async def add_drives(
    store: ClusterStore,
    node: NodeName,
    paths: Sequence[str],
    announce: Callable[[Record], None],
    kind: str | None = None,
) -> None:
    """Check all, then format each and put its key; the node's drive server sees the key and opens the drive.

    Raises  as check_candidates; CsvfsError naming the drive that was formatted but not made known.
    Cancel  a drive that is being formatted is finished and stays unknown; it can be blanked and added again.
    """
    for candidate in await check_candidates(store, paths, kind):
        announce(await make_drive(store, node, candidate))


async def make_drive(
    store: ClusterStore, node: NodeName, candidate: DriveCandidate, *, must_be_empty: bool = False
) -> Record:
    """Format and make known. Raises DriveRefused, DriveFailed; CsvfsError: formatted, but not made known."""
    cluster = await require_cluster(store)
    pool = await require_pool(store)
    drive = DriveId(secrets.token_bytes(16))
    make = partial(
        format_drive,
        candidate.path,
        drive_id=drive,
        pool_id=PoolId(pool.id()),
        cluster_id=cluster.id(),
        node=node,
        slab_size=slab_size_of(pool),
        label=label_of(candidate.path),
        must_be_empty=must_be_empty,
    )
    superblock = await trio.to_thread.run_sync(make)
    return await put_drive(store, node, candidate, drive, superblock.layout.slot_count)


async def put_drive(
    store: ClusterStore, node: NodeName, candidate: DriveCandidate, drive: DriveId, slots: int
) -> Record:
    """Make a drive that was just formatted known to the cluster. Raises CsvfsError, saying what to do."""
    value = {
        "node": node,
        "path": candidate.path,
        "size": candidate.size,
        "kind": candidate.kind,
        "backing": candidate.backing,
        "state": DRIVE_OK,
        "slots": slots,
        "declared": candidate.declared,
        "identity": candidate.identity,
        "added_by": candidate.by,
        "added": int(time.time()),  # for people
    }
    key = DRIVES + drive.hex()
    try:
        known = await store.transact([Compare(key, 0)], [Put(key, pack_value(value))])
    except CsvfsError as error:
        raise CsvfsError(
            f"{candidate.path} was formatted as drive {drive.hex()[:8]} but not made known to the cluster: "
            f"{error}; blank it (wipefs -a, or a new file) and add it again"
        ) from None
    assert known.succeeded, "16 random bytes name one drive"
    return Record(key, value, known.revision)
