"""`csvfs pool recover`: the cluster store's knowledge of pool, drives and volumes, rebuilt from the drives alone.

Place      admin floor, over block/offline.py. Changes no drive, and only an empty cluster store.
What a drive says   superblock: cluster, pool, node, slab size. Slot table: which slabs of which volumes, at which epoch, in
           which role. The metadata slabs together: the volume's name, size and copies (read by a process of
           coordinator/volume_facts.py, as this package imports nothing of it).
In sync    A metadata slab's copies of its highest epoch that say so: that epoch was installed on every member it has.
           Whether a drive that was not given holds a higher one cannot be known, and is said.
Data slabs have their members in the metadata. Their drives need only be known.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from csvfs.admin.cluster_view import CLUSTER_KEY, DRIVE_OK, DRIVES, POOL_KEY, TERMS, VOLUME_ONLINE, VOLUMES
from csvfs.block.device_facts import device_facts
from csvfs.block.offline import OfflineDrive
from csvfs.errors import Conflict, Corrupt, CsvfsError, NotEmpty, NotFound
from csvfs.fault_domains import LEVEL_DEFAULT, level_of
from csvfs.ids import METADATA_SLAB_ID_MIN, Epoch, NodeName, SlabId, VolumeId
from csvfs.store.interface import ClusterStore, Compare, Delete, Put
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import ROLE_ABSENT, ROLE_IN_SYNC, Member, SlabDescriptor
from csvfs.wire.control import pack_value

META, INCARNATIONS = "meta/", "incarnations/"
MUST_BE_EMPTY = (CLUSTER_KEY, POOL_KEY, DRIVES, VOLUMES, META, "owner/", TERMS)
FACTS_TIMEOUT_S = 600.0
INCARNATIONS_AHEAD = 1000  # of processes that were started after the last session was noted
POOL_NAME, CLUSTER_NAME = "pool", "recovered"


@dataclass(slots=True)
class FoundVolume:
    volume: VolumeId
    slabs: list[SlabDescriptor]  # of its metadata, in the order of their address space
    term: int
    name: str = ""
    value: dict[str, Any] = field(default_factory=dict)
    files: int = 0
    incarnations: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Recovery:
    """What was found, and `problems`: what could not be recovered, one line each."""

    cluster: bytes
    pool: bytes
    slab_size: int
    drives: dict[str, dict[str, Any]] = field(default_factory=dict)  # id in hex -> value
    volumes: list[FoundVolume] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def scan(paths: Iterable[str]) -> Recovery:
    """Look at the drives. Raises NotFound: none of the paths is a drive. Conflict: of several pools."""
    with ExitStack() as stack:
        drives: list[OfflineDrive] = []
        problems: list[str] = []
        for path in dict.fromkeys(paths):
            try:
                drives.append(stack.enter_context(OfflineDrive(path)))
            except CsvfsError as error:
                problems.append(str(error))
        recovery = _of_one_pool(drives, problems)
        for volume in sorted({volume for drive in drives for volume, _ in drive.entries}):
            _find_volume(recovery, VolumeId(volume), drives)
    for found in recovery.volumes:
        _ask_facts(recovery, found)
    recovery.volumes = [found for found in recovery.volumes if found.value]
    return recovery


def _of_one_pool(drives: list[OfflineDrive], problems: list[str]) -> Recovery:
    if not drives:
        raise NotFound(f"none of the paths is a drive of csvfs: {'; '.join(problems) or 'none were given'}")
    kinds = {(d.superblock.cluster_id, d.superblock.pool_id, d.superblock.slab_size) for d in drives}
    if len(kinds) > 1:
        names = ", ".join(f"{d.path}: pool {d.superblock.pool_id.hex()[:8]}" for d in drives)
        raise Conflict(f"these drives are of {len(kinds)} pools, give those of one: {names}")
    (cluster, pool, slab_size) = kinds.pop()
    recovery = Recovery(cluster, pool, slab_size, problems=problems)
    for drive in drives:
        superblock = drive.superblock
        hex_id = superblock.drive_id.hex()
        if hex_id in recovery.drives:
            raise Conflict(
                f"{drive.path} and {recovery.drives[hex_id]['path']} are the same drive: give one of them"
            )
        facts = device_facts(drive.path)
        recovery.drives[hex_id] = {
            "node": superblock.node, "path": drive.path, "size": superblock.size, "kind": facts.kind,
            "state": DRIVE_OK, "slots": superblock.slot_count,
        }  # fmt: skip
        problems += [
            f"{drive.path}: slot {slot} is damaged, what it held is not known" for slot in drive.quarantined
        ]
    return recovery


def _find_volume(recovery: Recovery, volume: VolumeId, drives: list[OfflineDrive]) -> None:
    copies: dict[SlabId, list[tuple[OfflineDrive, int, int, int]]] = {}
    term = 0
    for drive in drives:
        for (of_volume, slab), entry in drive.entries.items():
            if of_volume == volume:
                term = max(term, entry.term)
                if slab >= METADATA_SLAB_ID_MIN:
                    copies.setdefault(slab, []).append((drive, entry.epoch, entry.role, entry.term))
    name = f"volume {volume.hex()[:8]}"
    if not copies:
        recovery.problems.append(
            f"{name}: no metadata slab is on these drives, its data cannot be told apart"
        )
        return
    missing = max(copies) - METADATA_SLAB_ID_MIN + 1 - len(copies)
    if missing:
        recovery.problems.append(f"{name}: {missing} of its metadata slabs are not on these drives")
        return
    descriptors = []
    for slab in sorted(copies):
        descriptor = _descriptor_of(slab, copies[slab])
        if descriptor is None:
            recovery.problems.append(
                f"{name}: no copy of metadata slab {slab} was in sync at its highest epoch"
            )
            return
        descriptors.append(descriptor)
    recovery.volumes.append(FoundVolume(volume, descriptors, term))


def _descriptor_of(slab: SlabId, copies: list[tuple[OfflineDrive, int, int, int]]) -> SlabDescriptor | None:
    highest = max(epoch for _, epoch, _, _ in copies)
    members = tuple(
        Member(
            drive.superblock.drive_id,
            NodeName(drive.superblock.node),
            ROLE_IN_SYNC if (epoch, role) == (highest, ROLE_IN_SYNC) else ROLE_ABSENT,
        )
        for drive, epoch, role, _ in sorted(copies, key=lambda copy: copy[0].path)
    )
    descriptor = SlabDescriptor(slab, Epoch(highest), members)
    return descriptor if descriptor.in_sync else None


def _ask_facts(recovery: Recovery, volume: FoundVolume) -> None:
    """The volume's name and shape, from its own metadata."""
    paths = {bytes.fromhex(hex_id): value["path"] for hex_id, value in recovery.drives.items()}
    question = {
        "volume": volume.volume.hex(),
        "slab_blocks": recovery.slab_size // BLOCK_SIZE,
        "slabs": [[d.slab, [paths[member.drive] for member in d.in_sync]] for d in volume.slabs],
    }
    short = volume.volume.hex()[:8]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "coordinator.volume_facts"],
            input=json.dumps(question).encode(), capture_output=True, timeout=FACTS_TIMEOUT_S, check=True,
        )  # fmt: skip
        answer = json.loads(done.stdout)
        if "error" in answer:
            raise Corrupt(answer["error"])
        description = dict(answer["description"])
        volume.files, volume.incarnations = int(answer["files"]), dict(answer["incarnations"])
    except (subprocess.SubprocessError, CsvfsError, KeyError, TypeError, ValueError) as error:
        recovery.problems.append(f"volume {short}: its metadata cannot be read: {error}")
        return
    if not description.get("name"):
        description = {"name": f"recovered-{short}", "copies": _copies_guessed(volume)}
        recovery.problems.append(
            f"volume {short}: its name and size are not kept; it is called {description['name']}"
        )
    volume.name = str(description["name"])
    description.setdefault("resiliency", "mirror" if description.get("copies", 1) > 1 else "simple")
    volume.value = {**description, "id": volume.volume, "state": VOLUME_ONLINE}
    if (level := level_of(description)) != LEVEL_DEFAULT:
        recovery.problems.append(
            f"volume {volume.name} keeps no two copies in one {level}, but where nodes stand is on no drive: csvfs "
            "domain load FILE, or node.toml, before anything is written"
        )


def _copies_guessed(volume: FoundVolume) -> int:
    return max(len(descriptor.members) for descriptor in volume.slabs)


async def require_empty_store(store: ClusterStore) -> None:
    """Raises NotEmpty: what is there may be the truth; Unavailable."""
    for prefix in MUST_BE_EMPTY:
        items = await store.list(prefix)
        if items:
            raise NotEmpty(
                f"the cluster store is not empty (it has {items[0].key}): recovery makes a new one, give it an empty "
                "store"
            )


async def rebuild(store: ClusterStore, recovery: Recovery, cluster_name: str = CLUSTER_NAME) -> None:
    """Write all keys in one transaction. Raises NotEmpty, Conflict (two volumes of one name), Unavailable."""
    await require_empty_store(store)
    names = [volume.name for volume in recovery.volumes]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise Conflict(f"two volumes are called {sorted(twice)[0]!r}: give the drives of one of them first")
    values: dict[str, dict[str, Any]] = {
        CLUSTER_KEY: {"id": recovery.cluster, "name": cluster_name, "created": 0},
        POOL_KEY: {"id": recovery.pool, "name": POOL_NAME, "slab_size": recovery.slab_size},
    }
    values |= {DRIVES + hex_id: value for hex_id, value in recovery.drives.items()}
    last: dict[str, int] = {}
    for volume in recovery.volumes:
        values[VOLUMES + volume.name] = volume.value
        values[META + volume.name] = {"slabs": [descriptor.to_wire() for descriptor in volume.slabs]}
        values[TERMS + volume.name] = {"term": volume.term}
        for node, incarnation in volume.incarnations.items():
            last[node] = max(last.get(node, 0), incarnation)
    values |= {INCARNATIONS + node: {"last": value + INCARNATIONS_AHEAD} for node, value in last.items()}
    compares = [Compare(key, 0) for key in values if not key.startswith(INCARNATIONS)]
    puts: list[Put | Delete] = [Put(key, pack_value(value)) for key, value in values.items()]
    if not (await store.transact(compares, puts)).succeeded:
        raise NotEmpty("the cluster store was filled by somebody else just now: nothing was changed")
