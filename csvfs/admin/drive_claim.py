"""What of this node may become a drive without anybody adding it by name, and why the rest may not.

Place      admin floor, over block/eligibility.py, blankness.py and whole_disks.py. Reads only, and blocks;
           claim_watch.py claims what is found here.
Rules      C1  Only what an entry of `[drives] claim` in the node's configuration names: that a disk is blank does
               not say that it is ours to take. None are named by default.
           C2  What a pattern matches must be a file or a whole local disk; an entry without wildcards may also be
               a partition, a loop device or the like.
           C3  It must pass all that `csvfs drive add` asks, and besides hold no data anywhere we look.
           C4  It must have looked the same at two looks, some seconds apart: a disk that somebody is just about
               to partition, a file that is being copied, is not blank the second time.
"""

import glob
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from csvfs.admin.cluster_view import ClusterView
from csvfs.admin.drive_ops import slab_size_of
from csvfs.block.blankness import find_data
from csvfs.block.device_facts import device_facts
from csvfs.block.eligibility import check_drive
from csvfs.block.medium import disk_sequence, medium_size
from csvfs.block.superblock import Superblock, read_superblock
from csvfs.block.whole_disks import DiskFacts, disk_facts, same_disk, whole_disks
from csvfs.config import NodeConfig
from csvfs.errors import Corrupt, DriveRefused, NotFound
from csvfs.ids import PoolId

PATHS_MAX = 1024  # looked at in one go; what a pattern matches beyond is left out

Sighting = tuple[object, ...]  # equal: nothing was exchanged or changed between two looks


@dataclass(slots=True, frozen=True)
class ClaimCandidate:
    """A file or disk of this node. `reason`: why it is not claimed; empty iff it is eligible."""

    path: str  # links resolved
    kind: str  # nvme, ssd, hdd; empty: not known
    size: int  # bytes; 0: not known
    backing: str  # file, block, other
    eligible: bool
    reason: str
    named_by: str  # the entry of the configuration that names it; empty: none does
    identity: str = ""
    sighting: Sighting = ()


@dataclass(slots=True, frozen=True)
class ClaimRules:
    """What decides. `drives`: of the pool, by id in hex: (node, path, identity)."""

    entries: tuple[str, ...]
    config_path: Path
    cluster_root: Path
    pool_id: PoolId
    cluster_id: bytes
    slab_size: int
    drives: dict[str, tuple[str, str, str]] = field(default_factory=dict)


def claim_rules(config: NodeConfig, view: ClusterView) -> ClaimRules:
    """Raises NotFound: there is no cluster or pool yet."""
    if view.cluster is None or view.pool is None:
        raise NotFound("there is no pool yet: csvfs pool create")
    drives = {
        name: (drive.text("node"), drive.text("path"), drive.text("identity"))
        for name, drive in view.drives.items()
    }
    return ClaimRules(
        config.claim, config.path, config.cluster_root, PoolId(view.pool.id()), view.cluster.id(),
        slab_size_of(view.pool), drives,
    )  # fmt: skip


def list_candidates(rules: ClaimRules, known: dict[Sighting, str] | None = None) -> list[ClaimCandidate]:
    """All that is named, and all disks of the machine that could be. Never raises OSError.

    Args  known: reasons for which some were refused lately: they are not read again; what is refused is added.
    """
    disks = whole_disks()
    named = _named_paths(rules.entries)
    paths = sorted({*named, *(disk.path for disk in disks if not disk.unsuitable)})[:PATHS_MAX]
    return [_look_at(path, named.get(path, ""), rules, disks, {} if known is None else known) for path in paths]


def _named_paths(entries: Iterable[str]) -> dict[str, str]:
    """Real path -> the entry that names it; one without wildcards goes before a pattern (C2)."""
    found: dict[str, str] = {}
    for entry in sorted(entries, key=glob.has_magic, reverse=True):
        matches = glob.glob(entry) if glob.has_magic(entry) else [entry]
        found |= {os.path.realpath(path): entry for path in sorted(matches)[:PATHS_MAX]}
    return found


def _look_at(
    path: str, named_by: str, rules: ClaimRules, disks: list[DiskFacts], known: dict[Sighting, str]
) -> ClaimCandidate:
    facts = None
    size, backing, kind = 0, "other", ""
    sighting: Sighting = ()
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
            backing = "block" if stat.S_ISBLK(status.st_mode) else "file"
            kind = device_facts(path).kind
            size, sighting = _measure(path, status)
            if backing == "block":
                facts = disk_facts(f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
        reason = known.get(sighting) if sighting else None
        if reason is None:
            reason = _refusal(path, backing, size, facts, named_by, rules, disks)
    except OSError as error:
        reason = f"cannot be looked at: {error.strerror}"
    if reason and sighting:
        known[sighting] = reason
    if not reason and not named_by:
        reason = f"eligible, but no entry of [drives] claim in {rules.config_path} names it"
    identity = facts.identity if facts is not None else ""
    return ClaimCandidate(path, kind, size, backing, not reason, reason, named_by, identity, sighting)


def _measure(path: str, status: os.stat_result) -> tuple[int, Sighting]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        size, sequence = medium_size(fd), disk_sequence(fd)
    finally:
        os.close(fd)
    changed_ns = status.st_mtime_ns if stat.S_ISREG(status.st_mode) else 0
    return size, (path, status.st_dev, status.st_ino, status.st_rdev, size, sequence, changed_ns)


def _refusal(
    path: str, backing: str, size: int, facts: DiskFacts | None, named_by: str, rules: ClaimRules,
    disks: list[DiskFacts],
) -> str:  # fmt: skip
    """Why it may not be claimed; empty: it may. Raises OSError."""
    if backing == "other":
        return "neither a file nor a block device"
    ours = _superblock_of(path, size)
    if ours is not None:
        return _of_superblock(ours, rules)
    if facts is not None and facts.unsuitable and (glob.has_magic(named_by) or not named_by):
        return facts.unsuitable
    if Path(path).is_relative_to(os.path.realpath(rules.cluster_root)):
        return "it lies on a volume of csvfs itself"
    twin = _twin(path, facts, rules, disks)
    if twin:
        return twin
    try:
        check_drive(path, pool_id=rules.pool_id, cluster_id=rules.cluster_id, slab_size=rules.slab_size)
    except DriveRefused as error:
        return str(error).removeprefix(f"{path}: ")
    return refusal_of_data(path) or ""


def refusal_of_data(path: str) -> str | None:
    """C3, beyond check_drive: what is said of a path that holds something somewhere. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        offset = find_data(fd, medium_size(fd))
    finally:
        os.close(fd)
    if offset is None:
        return None
    return f"not blank: data near byte {offset}; if nobody needs it: csvfs drive add {path}"


def _superblock_of(path: str, size: int) -> Superblock | None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_superblock(fd, size).superblock
    except Corrupt:
        return None
    finally:
        os.close(fd)


def _of_superblock(found: Superblock, rules: ClaimRules) -> str:
    name = found.drive_id.hex()
    if (found.pool_id, found.cluster_id) != (rules.pool_id, rules.cluster_id):
        return f"foreign metadata: a drive of another pool ({found.pool_id.hex()}); wipefs -a it if nobody needs it"
    if name in rules.drives:
        return f"in the pool: drive {name[:8]}"
    return f"stale metadata: was drive {name[:8]} of this pool and is in it no more; wipefs -a it to use it again"


def _twin(path: str, facts: DiskFacts | None, rules: ClaimRules, disks: list[DiskFacts]) -> str:
    """Whether the disk is there twice: by two paths, or at two nodes."""
    if facts is None or not facts.identity:
        return ""
    other = same_disk(facts.identity, path, disks)
    if other is not None:
        return f"the same disk as {other}, by another path"
    for name, (node, place, identity) in rules.drives.items():
        if identity == facts.identity:
            return f"the same disk as drive {name[:8]} ({place} on {node})"
    return ""


class Sightings:
    """C4. Pure: `now_s` is of one monotonic clock."""

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._first_s: dict[Sighting, float] = {}

    def ripe(self, candidates: Iterable[ClaimCandidate], now_s: float) -> list[ClaimCandidate]:
        """Those that were eligible and the same at every look for `settle_s`, and at two looks at least."""
        eligible = [candidate for candidate in candidates if candidate.eligible]
        before = self._first_s
        self._first_s = {c.sighting: before.get(c.sighting, now_s) for c in eligible}
        return [c for c in eligible if c.sighting in before and now_s - before[c.sighting] >= self._settle_s]
