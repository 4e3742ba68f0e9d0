"""What a volume's metadata say of the volume itself: `python -m coordinator.volume_facts`, for `csvfs pool recover`.

Place      coordinator floor; over block/offline.py. Reads drives that nobody serves, changes nothing.
Input      JSON: volume (hex), slab_blocks, slabs: [[slab, [path, ...]], ...] in the order of the address space, the
           copies to be trusted most first.
Output     JSON: description (the value of `volumes/<name>`, bytes as hex under "id"), incarnations by node, files; or
           error, in one line.
"""

import contextlib
import json
import sys
from typing import Any

from coordinator.metadata import Metadata
from coordinator.takeover import open_metadata
from csvfs.block.offline import OfflineDrive
from csvfs.errors import Corrupt, CsvfsError, ProtocolError
from csvfs.ids import SlabId, VolumeId
from csvfs.wire.control import pack_value, unpack_value

DESCRIPTION = (
    "description"  # of the settings: what `volumes/<name>` says, kept up to date by describe_forever
)
_NOT_KEPT = ("state", "error")


def pack_description(value: dict[str, Any]) -> bytes:
    """What is kept of a `volumes/<name>` value."""
    return pack_value({name: value[name] for name in sorted(value) if name not in _NOT_KEPT})


def description_of(metadata: Metadata) -> dict[str, Any]:
    """Empty: none is kept (the volume never had a coordinator since it was made)."""
    rows = metadata.database.rows("SELECT value FROM settings WHERE name = ?", (DESCRIPTION,))
    try:
        value = unpack_value(rows[0][0]) if rows else {}
    except ProtocolError:
        return {}
    return value if isinstance(value, dict) else {}


class OfflineReader:
    """Reads blocks of the metadata's address space: from the first copy of a slab that verifies."""

    def __init__(
        self, volume: VolumeId, slab_blocks: int, slabs: list[tuple[SlabId, list[OfflineDrive]]]
    ) -> None:
        self._volume = volume
        self._slab_blocks = slab_blocks
        self._slabs = slabs

    def read(self, block: int, count: int) -> bytes:
        return b"".join(self._read_block(block + index) for index in range(count))

    def _read_block(self, block: int) -> bytes:
        index, slab_block = divmod(block, self._slab_blocks)
        if index >= len(self._slabs):
            raise Corrupt(f"block {block} lies behind the metadata slabs that were found")
        slab, drives = self._slabs[index]
        error = Corrupt(f"metadata slab {slab} has no copy on the drives given")
        for drive in drives:
            try:
                return drive.read_block(self._volume, slab, slab_block)
            except Corrupt as failure:
                error = failure
        raise error


def read_facts(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to a question as above. Raises CsvfsError."""
    volume, slab_blocks = VolumeId(bytes.fromhex(question["volume"])), int(question["slab_blocks"])
    with contextlib.ExitStack() as stack:
        paths = {path for _, of_slab in question["slabs"] for path in of_slab}
        drives = {path: stack.enter_context(OfflineDrive(path)) for path in sorted(paths)}
        slabs = [(SlabId(slab), [drives[path] for path in of_slab]) for slab, of_slab in question["slabs"]]
        reader = OfflineReader(volume, slab_blocks, slabs)
        metadata = open_metadata(reader.read, len(slabs), slab_blocks, volume)
        try:
            description = description_of(metadata)
            rows = metadata.database.rows("SELECT node, max(incarnation) FROM sessions GROUP BY node")
            return {
                "description": {
                    name: value.hex() if isinstance(value, bytes) else value
                    for name, value in description.items()
                },
                "incarnations": {str(node): int(incarnation) for node, incarnation in rows},
                "files": metadata.statfs().files,
            }
        finally:
            metadata.close()


def main() -> int:
    try:
        answer = read_facts(json.load(sys.stdin))
    except (CsvfsError, KeyError, TypeError, ValueError) as error:
        answer = {"error": str(error) or type(error).__name__}
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
