"""The drive server process: `python -m csvfs.block.drive_server` (ARCHITECTURE.md, "Processes of a node").

Place      block floor; started by `csvfs node run`.
Tasks      the engine; drives_forever opens drives as `drives/` in the cluster store lists them, each in a thread of
           its own; sweep_forever flushes and unmarks when nobody else does; those of drive_watch.py see to drives
           that fail.
Hangs      Writes into the page cache are made in the engine's thread. A drive that hangs in one holds all up, until
           the parent kills this process and starts the next one. What was killed may wait in the kernel for as long
           as the drive hangs, and keep its locks (in_use.py) and its port: then another port is taken, which
           `servers/<node>` tells.
Ends       on SIGTERM: drives are flushed and closed cleanly. On an exception that nobody planned for: at once,
           and its parent starts it again.
"""

import errno
import logging
import sys
from functools import partial
from typing import Any

import msgpack
import trio

from csvfs.block.block_service import BlockService
from csvfs.block.drive_calls import DriveCalls
from csvfs.block.drive_watch import DriveWatch, SlowRules
from csvfs.block.latency import KINDS
from csvfs.block.served_drives import ServedDrive
from csvfs.block.tunnel_desk import TunnelDesk, waypoints_of
from csvfs.cluster.liveness import Liveness
from csvfs.cluster.node_process import ProcessNumbers, beat_forever, run_process, run_until_signalled
from csvfs.config import NodeConfig
from csvfs.errors import CsvfsError, NotFound, Unavailable
from csvfs.ids import DriveId, VolumeId
from csvfs.net.detours import COORDINATOR, Paths, Waypoint
from csvfs.net.engine import Engine
from csvfs.net.link import Link, Listener
from csvfs.net.tls import open_identity
from csvfs.net.tunnels import Tunnels
from csvfs.store.interface import ClusterStore, Compare, Put
from csvfs.store.opening import open_store
from csvfs.store.revoked import follow_revoked_forever
from csvfs.wire.control import unpack_value

log = logging.getLogger(__name__)

SWEEP_INTERVAL_S = 2.0
# Complete writes whose chunks stay active because no program flushes: the server flushes by itself when they are
# this many (256 MiB), or at the latest after SWEEPS_TO_FLUSH sweeps.
MARKS_MAX = 4_096
SWEEPS_TO_FLUSH = 5
USAGE_MAINTENANCE = "maintenance"
OPEN_LOOK_S = 0.01
OPEN_WAIT_S = 5.0  # for the drives, before the server says that it is there
USAGE_REMOVED = "removed"  # of a drive's key: no slab needs it any more, the key is about to go


class DriveServer:
    def __init__(
        self, config: NodeConfig, store: ClusterStore, numbers: ProcessNumbers, cluster: bytes
    ) -> None:
        self.config = config
        self.store = store
        self.engine = Engine(open_identity(config))
        self.liveness = Liveness(config.liveness_path, numbers.node_incarnation)
        self.service = BlockService(self.engine, config.node, cluster, numbers.incarnation, self.liveness.may_serve)
        self.tunnels = Tunnels(self.engine)
        may_serve = self.liveness.may_serve
        desk = TunnelDesk(self.tunnels, self._find, cluster=cluster, node=config.node, may_serve=may_serve)
        paths = Paths(self.engine, self._waypoints, cluster=cluster, node=config.node)
        self.calls = DriveCalls(self.service, self.engine, desk=desk, paths=paths)
        options = config.options
        self.watch = DriveWatch(
            self.service, self._publish, peers=self._peer_latencies, retire=self._retire,
            rules=SlowRules(options.slow_drive_ms / 1000, options.slow_drive_after_s, options.slow_drive_retire_s),
            hang_s=options.hang_ms / 1000,
        )  # fmt: skip
        self._key: dict[str, Any] = {}  # the value of `servers/<node>`, but for the drives
        self._lease = numbers.lease
        self._pool: bytes | None = None
        self._rows: dict[str, dict[str, Any]] = {}

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self.service.nursery = nursery
                nursery.start_soon(self.engine.run_forever)
                nursery.start_soon(beat_forever)
                if self.engine.identity is not None:
                    await nursery.start(follow_revoked_forever, self.store, self.engine.identity.revoke)
                await self._read_drives()
                with trio.move_on_after(OPEN_WAIT_S):
                    while any(served.opening_since is not None for served in self.service.drives):
                        await trio.sleep(OPEN_LOOK_S)
                tcp = self._listen()
                Listener(self.engine, str(self.config.drive_server_socket), self._accept)
                await self._register(tcp.port)
                nursery.start_soon(self._drives_forever)
                nursery.start_soon(self._sweep_forever)
                nursery.start_soon(self.watch.retry_forever, self._open_again)
                nursery.start_soon(self.watch.watch_forever)
        finally:
            self.tunnels.close()
            self.service.close()

    async def _find(self, node: str, service: str) -> tuple[str, int] | None:
        """Of TunnelDesk. Raises Unavailable: the store cannot be asked."""
        kind = "coordinators" if service == COORDINATOR else "servers"
        item = await self.store.get(f"{kind}/{node}")
        found = [] if item is None else waypoints_of({node: unpack_value(item.value)})
        return (found[0].address, found[0].port) if found else None

    async def _waypoints(self) -> list[Waypoint]:
        """Of Paths; none while the store cannot be asked."""
        try:
            items = await self.store.list("servers/")
        except Unavailable:
            return []
        return waypoints_of({item.key.removeprefix("servers/"): unpack_value(item.value) for item in items})

    def _listen(self) -> Listener:
        try:
            return Listener(self.engine, (self.config.address, self.config.drive_server_port), self._accept)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        log.error("port %d is taken, by a killed drive server that hangs in the kernel?", self.config.drive_server_port)
        return Listener(self.engine, (self.config.address, 0), self._accept)

    def _accept(self, link: Link) -> None:
        self.service.accept(link)

    async def _register(self, port: int) -> None:
        self._key = {
            "address": self.config.address,
            "port": port,
            "unix": str(self.config.drive_server_socket),
            "incarnation": self.service.incarnation,
        }
        await self.watch.tell()
        log.info("drive server of %s listens on port %d", self.config.node, port)

    async def _publish(self, drives: dict[str, Any]) -> None:
        value = {**self._key, "drives": drives}
        await self.store.put(f"servers/{self.config.node}", msgpack.packb(value), self._lease)

    async def _peer_latencies(self) -> dict[str, list[float]]:
        """As the other nodes' drive servers tell them; what they do not tell is not known."""
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        try:
            items = await self.store.list("servers/")
        except Unavailable:
            return found
        for item in items:
            if item.key != f"servers/{self.config.node}":
                for report in (unpack_value(item.value).get("drives") or {}).values():
                    if not report.get("fault"):
                        for kind in KINDS:
                            told = (report.get("latency_ms") or {}).get(kind)
                            found[kind] += [told / 1000] if told else []
        return found

    async def _retire(self, served: ServedDrive) -> bool:
        """Set `usage: retired` of a slow drive, unless one is retired already: one at a time, then a human.

        False: not now.
        """
        try:
            items = {item.key: item for item in await self.store.list("drives/")}
            values = {key: unpack_value(item.value) for key, item in items.items()}
            key = f"drives/{served.drive_id.hex()}"
            if key in values and values[key].get("usage") == USAGE_MAINTENANCE:
                log.error("drive %s is slow for long, and in maintenance: not retired", served.path)
                return False
            if key not in values or any(value.get("usage") == "retired" for value in values.values()):
                log.error("drive %s is slow for long, but another one is retired already", served.path)
                return False
            value = {**values[key], "usage": "retired", "why": f"slow: {served.latency.describe()}"}
            put = Put(key, msgpack.packb(value), items[key].lease)
            done = await self.store.transact([Compare(key, items[key].revision)], [put])
            if done.succeeded:
                log.error("drive %s is retired: %s", served.path, value["why"])
            return done.succeeded
        except CsvfsError as error:
            log.error("drive %s is slow for long and cannot be retired: %s", served.path, error)
            return False

    # -- drives ----------------------------------------------------------------------------------

    async def _read_drives(self) -> None:
        pool = await self.store.get("pool")
        self._pool = None if pool is None else msgpack.unpackb(pool.value)["id"]
        for item in await self.store.list("drives/"):
            self._take_row(item.key, msgpack.unpackb(item.value))

    def _take_row(self, key: str, row: dict[str, Any]) -> None:
        if row.get("node") != self.config.node:
            return
        self._rows[key] = row
        if self._pool is not None:
            drive_id = DriveId(bytes.fromhex(key.removeprefix("drives/")))
            if row.get("usage") == USAGE_REMOVED:
                self._release(drive_id)
                return
            served = self.service.drives.expect(drive_id, row["path"])
            if served.drive is None and served.opening_since is None and self.service.nursery is not None:
                served.opening_since = trio.current_time()
                self.service.nursery.start_soon(self._open, served, row["path"], self._pool)

    async def _open(self, served: ServedDrive, path: str, pool: bytes) -> None:
        """In a thread: a drive that hangs holds up no other."""
        drives, cluster = self.service.drives, self.service.cluster
        opening = partial(drives.open, served.drive_id, path, pool_id=pool, cluster_id=cluster)
        try:
            await trio.to_thread.run_sync(opening, abandon_on_cancel=True, limiter=served.threads)
        finally:
            served.opening_since = None
        if served.drive is None:
            return
        if self._rows.get(f"drives/{served.drive_id.hex()}", {}).get("usage") == USAGE_REMOVED:
            self._release(served.drive_id)
            return
        self.service.drive_failed.set()  # the watch tells the cluster that it is open
        await self._remove_deleted_volumes(served)

    def _release(self, drive_id: DriveId) -> None:
        try:
            drive = self.service.drives.by_id(drive_id).drive
        except NotFound:
            return  # it was never served by this process
        if drive is None or drive.failure is None:  # else the watch closes it, however long that takes
            self.service.release_drive(drive_id)

    async def _drives_forever(self) -> None:
        while True:
            try:
                async with self.store.watch("drives/") as changes:
                    await self._read_drives()
                    async for batch in changes:
                        if self._pool is None:
                            await self._read_drives()
                        for change in batch:
                            if change.item is not None:
                                self._take_row(change.key, msgpack.unpackb(change.item.value))
                            else:
                                self._rows.pop(change.key, None)
            except Unavailable as error:
                log.warning("the cluster store cannot be reached: %s", error)
                await trio.sleep(1)

    def _open_again(self, served: ServedDrive) -> None:
        key = f"drives/{served.drive_id.hex()}"
        if key in self._rows:
            self._take_row(key, self._rows[key])

    async def _remove_deleted_volumes(self, served: ServedDrive) -> None:
        """Free slabs of volumes that were deleted while the drive was away: only those with a tombstone."""
        if served.drive is None:
            return
        volumes = {copy.volume for copy in served.drive.slabs()}
        for volume in volumes:
            try:
                tombstone = await self.store.get(f"deleted/{volume.hex()}")
            except Unavailable:
                return
            if tombstone is not None:
                self._remove_volume(served, volume)

    def _remove_volume(self, served: ServedDrive, volume: VolumeId) -> None:
        drive = served.opened()
        for copy in list(drive.slabs()):
            if copy.volume == volume:
                self.service.marks.forget(copy)
                served.in_service.discard(copy)
                drive.delete_slab(volume, copy.slab)
        self.service.forget_copies()
        log.info("removed the slabs of deleted volume %s from %s", volume.hex()[:8], served.path)

    # -- unmarking -------------------------------------------------------------------------------

    async def _sweep_forever(self) -> None:
        """Unmark chunks of complete writes (I3) when no program's flush does."""
        sweeps = 0
        while True:
            await trio.sleep(SWEEP_INTERVAL_S)
            sweeps += 1
            self.service.marks.sweep()
            for served in self.service.drives:
                if served.drive is None:
                    continue
                self.service.flushes.unmark_rested(served)
                waiting = self.service.marks.waiting_count(served.drive)
                if waiting > MARKS_MAX or (waiting and sweeps % SWEEPS_TO_FLUSH == 0):
                    try:
                        await self.service.flushes.flush(served)
                    except CsvfsError as error:
                        log.error("flush of %s failed: %s", served.path, error)


async def serve(config: NodeConfig) -> int:
    """Run the drive server of this node until SIGTERM or SIGINT."""
    numbers = ProcessNumbers.from_environment()
    store = open_store(config.store)
    cluster = await store.get("cluster")
    if cluster is None:
        raise Unavailable("the cluster store has no cluster yet; see csvfs cluster create")
    server = DriveServer(config, store, numbers, msgpack.unpackb(cluster.value)["id"])
    await run_until_signalled(server.run)
    return 0


def main() -> int:
    return run_process(serve)


if __name__ == "__main__":
    sys.exit(main())
