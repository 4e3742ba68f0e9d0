"""The simulated metadata: descriptors of data slabs, sessions and leases, one block per commit.

Place      simulator; takes the place of coordinator/metadata.py (SQLite) over the same metadata slabs, sent by the
           real MetadataLog and committed through the real DataBook.
Layout     block 1 + commit % BLOCKS of the first metadata slab: the whole state and its commit number. Who opens
           it reads all BLOCKS and takes the highest number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from coordinator.slab_image import LogEntry, LogWrite
from csvfs.errors import Conflict, Corrupt, NotFound
from csvfs.ids import SlabId
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import SlabDescriptor
from csvfs.wire.control import pack_value, unpack_value

BLOCKS = 6
SessionKey = tuple[str, int]  # node, incarnation


class Journal:
    """What a coordinator knows; `take_log` after a change has the block to write."""

    def __init__(self, packed: list[bytes]) -> None:
        """Args  packed: the blocks as the members have them. Raises Corrupt."""
        states = [_unpack(block) for block in packed if block.strip(b"\0")]
        if not states:
            raise Corrupt("the journal is empty")
        state = max(states, key=lambda state: state["commit"])
        self.commit: int = state["commit"]
        self._slabs = {
            descriptor.slab: descriptor for descriptor in map(SlabDescriptor.from_wire, state["slabs"])
        }
        self.sessions: set[SessionKey] = {(node, number) for node, number in state["sessions"]}
        self.evicted: dict[str, int] = dict(state["evicted"])
        self.leases: dict[int, SessionKey] = {
            region: (node, number) for region, node, number in state["leases"]
        }

    # As coordinator/metadata.py, for DataBook

    def slab(self, slab: SlabId) -> SlabDescriptor:
        descriptor = self._slabs.get(slab)
        if descriptor is None:
            raise NotFound(f"slab {slab} does not exist")
        return descriptor

    def slabs(self) -> Iterator[SlabDescriptor]:
        return iter(sorted(self._slabs.values(), key=lambda descriptor: descriptor.slab))

    def set_slab(self, descriptor: SlabDescriptor) -> None:
        known = self.slab(descriptor.slab)
        if descriptor.epoch <= known.epoch:
            raise Conflict(f"slab {descriptor.slab} is at epoch {known.epoch}")
        self._slabs[descriptor.slab] = descriptor

    # As coordinator/slab_image.py, for MetadataLog

    def written(self, entries: list[LogEntry]) -> None:
        """Nothing is read back."""

    def take_log(self) -> list[LogEntry]:
        self.commit += 1
        return [LogWrite(1 + self.commit % BLOCKS, self.pack())]

    def pack(self) -> bytes:
        state: dict[str, Any] = {
            "commit": self.commit,
            "slabs": [descriptor.to_wire() for descriptor in self.slabs()],
            "sessions": sorted(self.sessions),
            "evicted": self.evicted,
            "leases": [[region, *key] for region, key in sorted(self.leases.items())],
        }
        packed = pack_value(state)
        assert len(packed) + 4 <= BLOCK_SIZE
        return (len(packed).to_bytes(4, "little") + packed).ljust(BLOCK_SIZE, b"\0")


def first_block(descriptors: list[SlabDescriptor]) -> bytes:
    """The journal of a new volume: block 1 of its first metadata slab."""
    packed = pack_value(
        {
            "commit": 0, "slabs": [descriptor.to_wire() for descriptor in descriptors],
            "sessions": [], "evicted": {}, "leases": [],
        }
    )  # fmt: skip
    return (len(packed).to_bytes(4, "little") + packed).ljust(BLOCK_SIZE, b"\0")


def _unpack(block: bytes) -> dict[str, Any]:
    size = int.from_bytes(block[:4], "little")
    state: dict[str, Any] = unpack_value(bytes(block[4 : 4 + size]))
    return state
