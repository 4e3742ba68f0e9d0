"""A volume as it was made: its drives and what the cluster store says of it, made once and copied for each run.

Place      simulator. Metadata and slabs are written by the production code, but not through a coordinator.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import combinations
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import coordinator.metadata
from coordinator.metadata import Metadata
from coordinator.slab_book import pack_descriptors
from coordinator.slab_image import LogWrite, SlabImage
from csvfs.block.drive import Drive
from csvfs.block.layout import layout_of
from csvfs.block.slab_state import new_slab
from csvfs.block.slot_table import format_slot_table
from csvfs.block.superblock import Superblock, write_superblock
from csvfs.ids import METADATA_SLAB_ID_MIN, DriveId, Epoch, InodeNo, NodeName, PoolId, SlabId, Term, VolumeId
from csvfs.units import MIB
from csvfs.wire.block_messages import ROLE_IN_SYNC, SlabDescriptor, block_checksums, pack_checksums
from csvfs.wire.control import pack_value
from tests.simulator import seams
from tests.simulator.clients.models import DIRECTORY, ROOT
from tests.simulator.clock import SimClock
from tests.simulator.medium import Medium, SimOs

SLAB_SIZE = 4 * MIB
SLAB_BLOCKS = SLAB_SIZE // 4096
DRIVE_SIZE = 40 * MIB
DATA_SLABS = 3  # one in use and those that are kept ahead
CLUSTER, POOL, VOLUME = b"c" * 16, PoolId(b"p" * 16), VolumeId(b"v" * 16)
NAME = "v"
NODES = ("n1", "n2", "n3")


@dataclass(frozen=True, slots=True)
class Template:
    """`items`: of the cluster store, but `meta`, which comes last."""

    media: dict[str, Medium]  # by node
    items: dict[str, bytes]
    meta: bytes


def drive_of(node: str) -> DriveId:
    return DriveId(node.encode().ljust(16, b"-"))


@lru_cache
def template(copies: int) -> Template:
    """Three nodes with a drive each. Data has `copies`, metadata three."""
    media = {node: _blank(node) for node in NODES}
    sim_os = SimOs()
    sim_os.media = {medium.path: medium for medium in media.values()}
    key = SimpleNamespace(token_bytes=lambda size: bytes(range(size)))
    with seams.installed(SimClock(), sim_os, 0, _no_slow_call), patch.object(coordinator.metadata, "secrets", key):
        metadata_slab = _new_slab(int(METADATA_SLAB_ID_MIN), NODES)
        image = SlabImage.create(_zeros, SLAB_BLOCKS, SLAB_BLOCKS)
        metadata = Metadata.create(image, VOLUME, 0)
        slabs = _fill(metadata, copies)
        log = image.take_log()
        metadata.close()
        for node, medium in media.items():
            drive = Drive.open(medium.path)
            for descriptor in (metadata_slab, *slabs):
                if any(member.node == node for member in descriptor.members):
                    copy = drive.create_slab(VOLUME, descriptor.slab, Epoch(1), ROLE_IN_SYNC, Term(0))
                    if descriptor is metadata_slab:
                        for entry in log:
                            if isinstance(entry, LogWrite):
                                sums = block_checksums(memoryview(entry.data), copy.seed, entry.block)
                                copy.write_blocks(entry.block, entry.data, pack_checksums(sums))
                        copy.clear_active(copy.active_chunks())
            drive.close()
    return Template(media, _items(media, copies), pack_descriptors([metadata_slab]))


def _fill(metadata: Metadata, copies: int) -> list[SlabDescriptor]:
    places = list(combinations(NODES, copies))
    metadata.begin()
    made = metadata.make(InodeNo(ROOT), b"d", stat.S_IFDIR | 0o755, 0, 0, 0, b"", 0)
    assert made[0] == DIRECTORY, made
    slabs = []
    for number in range(DATA_SLABS):
        descriptor = _new_slab(metadata.new_slab_id(), places[number % len(places)])
        metadata.add_slab(descriptor, SLAB_BLOCKS)
        slabs.append(descriptor)
    metadata.commit()
    return slabs


def _new_slab(slab: int, nodes: tuple[str, ...]) -> SlabDescriptor:
    return new_slab(SlabId(slab), [(drive_of(node), NodeName(node)) for node in nodes])


def _items(media: dict[str, Medium], copies: int) -> dict[str, bytes]:
    volume = {"id": VOLUME, "name": NAME, "copies": copies, "size": 0, "state": "online", "resiliency": "mirror"}
    values: dict[str, Any] = {
        "cluster": {"id": CLUSTER, "name": "simulated", "created": 0},
        "pool": {"id": POOL, "name": "pool", "slab_size": SLAB_SIZE},
        f"volumes/{NAME}": volume,
    }
    for node, medium in media.items():
        values[f"nodes/{node}"] = {"address": node}
        values[f"drives/{drive_of(node).hex()}"] = {
            "node": node, "path": medium.path, "size": DRIVE_SIZE, "kind": "file", "state": "ok",
            "slots": DRIVE_SIZE // SLAB_SIZE,
        }  # fmt: skip
    return {key: pack_value(value) for key, value in values.items()}


def _blank(node: str) -> Medium:
    layout = layout_of(DRIVE_SIZE, SLAB_SIZE)
    medium = Medium(f"drive of {node}", layout)
    sim_os = SimOs()
    sim_os.media[medium.path] = medium
    with seams.installed(SimClock(), sim_os, 0, _no_slow_call):
        fd = sim_os.open(medium.path)
        superblock = Superblock(
            sequence=1, drive_id=drive_of(node), pool_id=POOL, cluster_id=CLUSTER, size=layout.size,
            slab_size=SLAB_SIZE, node=NodeName(node), label="", created_ns=0,
        )  # fmt: skip
        format_slot_table(fd, layout, superblock.drive_id)
        write_superblock(fd, superblock)
    return medium


def _zeros(block: int, count: int) -> bytes:
    return bytes(count * 4096)


async def _no_slow_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return partial(function, *args)()
