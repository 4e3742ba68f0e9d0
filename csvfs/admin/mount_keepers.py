"""The keepers of a node's mounts: one for each volume, for as long as `csvfs node run` runs.

Place      admin floor; above mount_keeper.py, below node_run.py. They outlive the node's leases: what programs wait for
           when the node was cut off is answered under the next lease.
"""

import trio

from csvfs.admin.cluster_root import ClusterRoot
from csvfs.admin.mount_keeper import MountKeeper


class MountKeepers:
    def __init__(self, root: ClusterRoot, io_timeout_s: float, nursery: trio.Nursery) -> None:
        """nursery: outlives them."""
        self._root = root
        self._io_timeout_s = io_timeout_s
        self._nursery = nursery
        self._keepers: dict[str, tuple[object, MountKeeper]] = {}  # volume name -> volume id, its keeper

    async def keeper(self, volume_name: str, volume_id: object) -> MountKeeper:
        """Of a volume; one that was made again under its name gets a new one. Raises Conflict: it is still mounted."""
        known_id, keeper = self._keepers.get(volume_name, (None, None))
        if keeper is not None and known_id == volume_id:
            return keeper
        if keeper is not None:
            await keeper.end("its volume is gone")
        keeper = keeper or MountKeeper(self._root, volume_name, self._io_timeout_s)
        if volume_name not in self._keepers:
            self._nursery.start_soon(keeper.watch_forever)
        self._keepers[volume_name] = volume_id, keeper
        return keeper

    async def end_all(self) -> None:
        """Nothing is left of any session."""
        for _, keeper in self._keepers.values():
            await keeper.end("the node stops")
