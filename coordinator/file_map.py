"""File map: where a file's blocks lie, for people (`csvfs file map`).

Place      coordinator floor; above metadata.py. Synchronous, between batches.
"""

from typing import Any

from coordinator import arguments
from coordinator.arguments import Args
from coordinator.extents import FILE_BLOCKS_MAX
from coordinator.metadata import Metadata

EXTENTS_MAX = 2048  # of one answer, with their slabs' descriptors; each may be cut into pieces of as many owners
ROWS_MAX = 8192


def file_map(metadata: Metadata, args: Args) -> dict[str, Any]:
    """Extents of inode `ino` from `block` on: rows [block, count, slab, slab block, owners], slabs [descriptor], size
    (bytes); next: from where to ask on, nil: that is all. Raises NotFound, IsADirectory, Conflict, BadRequest."""
    ino, block = arguments.inode(args), arguments.number(args, "block", 0, FILE_BLOCKS_MAX - 1)
    size = metadata.getattr(ino)[6]
    extents = metadata.layout(ino, block, FILE_BLOCKS_MAX - block, EXTENTS_MAX)
    rows: list[list[int]] = []
    following = extents[-1].end if len(extents) == EXTENTS_MAX else None
    for extent in extents:
        if len(rows) >= ROWS_MAX:
            following = extent.block
            break
        for at, count, owners in metadata.shared.owners(extent.slab, extent.slab_block, extent.count):
            rows.append([extent.block + at - extent.slab_block, count, extent.slab, at, max(1, owners)])
    slabs = [metadata.slab(slab).to_wire() for slab in sorted({row[2] for row in rows})]
    return {"size": size, "rows": rows, "slabs": slabs, "next": following}
