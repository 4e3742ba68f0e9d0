"""Quota desk: setting, removing and listing quotas, and counting what a tree holds already, a step at a time.

Place      coordinator floor; above quota_trees.py and batches.py, below service.py.
Tasks      one, which steps through trees that are not counted or not forgotten yet, also those of the coordinator
           before. A batch of others is never held up by more than INODES_PER_STEP inodes.
"""

import logging
from typing import Any

import trio

from coordinator import arguments
from coordinator.arguments import Args
from coordinator.batches import Batches
from coordinator.metadata import Metadata
from coordinator.paths import directory_path
from coordinator.quotas import COUNTING, REMOVING, Quota
from csvfs.errors import CsvfsError, NotFound
from csvfs.ids import InodeNo
from csvfs.units import BLOCK_SIZE

log = logging.getLogger(__name__)

INODES_PER_STEP = 256  # about 10 ms
PAUSE_S = 0.01  # between two steps
RETRY_S = 1.0
_STATES = {COUNTING: "counting", REMOVING: "removing"}


class QuotaDesk:
    """Of one volume."""

    def __init__(self, metadata: Metadata, batches: Batches) -> None:
        self._metadata = metadata
        self._batches = batches
        self._wanted = trio.Event()
        self._wanted.set()  # there may be work of the coordinator before

    async def set(self, args: Args) -> dict[str, Any]:
        """The call `quota_set`: limits of the tree of directory `ino`; size (bytes) and files, 0: none.

        Raises   NotFound, NotADirectory, Conflict (QuotaTrees.set), BadRequest.
        """
        ino = arguments.inode(args)
        size, files = arguments.number(args, "size"), arguments.number(args, "files")
        blocks = -(-size // BLOCK_SIZE)
        await self._batches.run(lambda: self._metadata.quota_trees.set(ino, blocks, files))
        self._wanted.set()
        return self._row(self._quota(ino))

    async def remove(self, args: Args) -> dict[str, Any]:
        """The call `quota_remove`. Raises NotFound: there is none."""
        ino = arguments.inode(args)
        self._quota(ino)
        await self._batches.run(lambda: self._metadata.quota_trees.remove(ino))
        self._wanted.set()
        return {}

    def listing(self) -> list[dict[str, Any]]:
        """The call `quota_list`: by path."""
        rows = [self._row(quota) for quota in self._metadata.quotas.by_root.values()]
        return sorted(rows, key=lambda row: row["path"])

    def _quota(self, ino: InodeNo) -> Quota:
        quota = self._metadata.quotas.by_root.get(ino)
        if quota is None:
            raise NotFound(f"directory {ino} has no quota; see csvfs quota list")
        return quota

    def _row(self, quota: Quota) -> dict[str, Any]:
        return {
            "ino": quota.root,
            "path": _text(directory_path(self._metadata.database, quota.root)),
            "size": quota.blocks_max * BLOCK_SIZE,
            "used": quota.blocks * BLOCK_SIZE,
            "files_max": quota.files_max,
            "files": quota.files,
            "state": _STATES.get(quota.state, "in force"),
        }

    def statfs(self, ino: int, figures: dict[str, int]) -> dict[str, int]:
        """What `df` says of a directory with a quota: `figures` of the volume, as far as the quota lets them be had."""
        quota = self._metadata.quotas.of(ino)
        if quota is None:
            return figures
        narrowed = dict(figures)
        if quota.blocks_left is not None:
            narrowed["size"] = min(figures["size"], quota.blocks_max * BLOCK_SIZE)
            narrowed["free"] = min(figures["free"], quota.blocks_left * BLOCK_SIZE)
        if quota.files_left is not None:
            narrowed["files"] = min(figures["files"], quota.files_max)
            narrowed["files_free"] = min(figures["files_free"], quota.files_left)
        return narrowed

    async def run_forever(self) -> None:
        """Until cancelled. What cannot be done now is tried again; what ends this coordinator ends it elsewhere."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            for root in self._metadata.quota_trees.unfinished():
                await self._finish(root)

    async def _finish(self, root: int) -> None:
        try:
            while not await self._batches.run(lambda: self._metadata.quota_trees.step(root, INODES_PER_STEP)):
                await trio.sleep(PAUSE_S)
        except CsvfsError as error:
            log.warning("the quota of directory %d is not counted yet: %s", root, error)
            await trio.sleep(RETRY_S)
            self._wanted.set()


def _text(path: bytes) -> str:
    """As UTF-8; what is none is shown as `\\xff`."""
    return path.decode(errors="backslashreplace") or "/"
