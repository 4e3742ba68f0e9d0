"""Where a file's bytes lie: the question to its volume's coordinator, and the rows of the answer.

Place      admin floor. `rows_of` is pure.
"""

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from csvfs.admin.cluster_view import ClusterView, read_cluster_view
from csvfs.admin.peers import Peers
from csvfs.admin.volume_paths import find_in_volume
from csvfs.config import NodeConfig
from csvfs.errors import BadRequest, CsvfsError, ProtocolError
from csvfs.store.interface import ClusterStore
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import ROLE_IN_SYNC, ROLE_JOINING, SlabDescriptor

CALL_TIMEOUT_S = 10.0


@dataclass(slots=True)
class PlaceOfCopy:
    node: str
    drive: str  # id in hex
    path: str  # on that node; empty: not known
    state: str  # in sync, joining, absent


@dataclass(slots=True)
class MapRow:
    """Bytes `offset` to `offset + length` of the file. slab None: a hole, or nothing yet."""

    offset: int
    length: int
    slab: int | None = None
    slab_offset: int = 0  # bytes
    owners: int = 0  # how many extents have these blocks; more than 1: they are shared
    copies: list[PlaceOfCopy] = field(default_factory=list)


@dataclass(slots=True)
class FileMap:
    path: str
    volume: str
    ino: int
    size: int
    rows: list[MapRow]


async def read_map(config: NodeConfig, store: ClusterStore, peers: Peers, text: str) -> FileMap:
    """The map of a file, as its coordinator has it now.

    Raises  BadRequest: no regular file of a volume. NotFound, Unavailable: no answer. ProtocolError. Cancel safe.
    """
    found = await find_in_volume(config, text)
    if not stat.S_ISREG(found.status.st_mode):
        raise BadRequest(f"{found.path} is no regular file: only these have extents")
    volume, ino = found.volume, found.status.st_ino
    view = await read_cluster_view(store)
    size, block = 0, 0
    extents: list[list[int]] = []
    descriptors: dict[int, SlabDescriptor] = {}
    following: int | None = 0
    while following is not None:
        answer = await peers.coordinator_slowly(
            view, volume, "file_map", CALL_TIMEOUT_S, ino=ino, block=following
        )
        try:
            block, following = following, answer["next"]
            size, extents = int(answer["size"]), extents + [row for row in answer["rows"] if row[0] >= block]
            learned = [SlabDescriptor.from_wire(value) for value in answer["slabs"]]
            descriptors |= {descriptor.slab: descriptor for descriptor in learned}
            if following is not None and following <= block:
                raise ValueError("it does not get on")
        except (KeyError, TypeError, ValueError, IndexError, CsvfsError) as error:
            raise ProtocolError(f"the coordinator of {volume} answers with nonsense: {error!r}") from None
    return FileMap(str(found.path), volume, ino, size, list(rows_of(extents, size, descriptors, _paths(view))))


def _paths(view: ClusterView) -> dict[str, str]:
    return {drive: record.text("path") for drive, record in view.drives.items()}


def rows_of(
    extents: Iterable[list[int]], size: int, descriptors: dict[int, SlabDescriptor], paths: dict[str, str]
) -> Iterator[MapRow]:
    """Rows by offset, with the holes between them and up to the end of the file.

    extents: [block, count, slab, slab block, owners]. paths: of drives, by id in hex.
    """
    at = 0
    for block, count, slab, slab_block, owners in extents:
        offset, length = block * BLOCK_SIZE, count * BLOCK_SIZE
        if at < offset:
            yield MapRow(at, offset - at)
        copies = _copies(descriptors.get(slab), paths)
        yield MapRow(offset, length, slab, slab_block * BLOCK_SIZE, owners, copies)
        at = offset + length
    if at < size:
        yield MapRow(at, size - at)


def _copies(descriptor: SlabDescriptor | None, paths: dict[str, str]) -> list[PlaceOfCopy]:
    words = {ROLE_IN_SYNC: "in sync", ROLE_JOINING: "joining"}
    return [
        PlaceOfCopy(member.node, member.drive.hex(), paths.get(member.drive.hex(), ""), words.get(member.role, "absent"))
        for member in (descriptor.members if descriptor is not None else ())
    ]


def copies_text(copies: Iterable[PlaceOfCopy]) -> str:
    """As `n1:ab12cd34 n2:0f1e2d3c(joining)`."""
    return " ".join(
        f"{copy.node}:{copy.drive[:8]}{'' if copy.state == 'in sync' else f'({copy.state})'}" for copy in copies
    )


def summary(found: FileMap) -> dict[str, Any]:
    """Bytes that have space, and of these, what other extents have, too."""
    taken = [row for row in found.rows if row.slab is not None]
    shared = sum(row.length for row in taken if row.owners > 1)
    return {"extents": len(taken), "allocated": sum(row.length for row in taken), "shared": shared}
