"""The coordinator host: `python -m coordinator.host`, one per node; coordinates the volumes it was elected
for.

Place      coordinator floor, the process; started by `csvfs node run` (admin/node_run.py), which also buries
           it.
Tasks      the engine, the membership view, one task per volume owned, one that elects.
Survives   a kill at any instant: what it owned is in the cluster store and on drives; whoever is elected
           takes over.
"""

import gc
import logging
import sys
from collections.abc import Callable
from random import Random
from typing import Any

import trio

from coordinator.cluster_facts import ClusterFacts
from coordinator.front_desk import FrontDesk
from coordinator.moves import Moves
from coordinator.service import Service, VolumeSetup
from coordinator.serving import serve_volume
from coordinator.volume_creation import create_volume, delete_volume, record_error
from csvfs.block.pace import SPEED_DEFAULT
from csvfs.block.tunnel_desk import waypoints_of
from csvfs.clock import monotonic_ns
from csvfs.cluster.election import Attempt, decide, release_ownership, take_ownership
from csvfs.cluster.liveness import Liveness
from csvfs.cluster.membership import View, keep_view_forever
from csvfs.cluster.node_process import ProcessNumbers, run_process, run_until_signalled
from csvfs.config import NodeConfig
from csvfs.errors import (
    BadRequest,
    CsvfsError,
    LeaseLost,
    NoSpace,
    NotCoordinator,
    NotFound,
    Unavailable,
    leaves,
)
from csvfs.ids import Incarnation, NodeName, Term, VolumeId
from csvfs.net.calls import field
from csvfs.net.detours import Paths, Waypoint
from csvfs.net.engine import Engine
from csvfs.net.link import Listener
from csvfs.net.tls import Identity, open_identity
from csvfs.store.interface import ClusterStore
from csvfs.store.opening import open_store
from csvfs.store.revoked import follow_revoked_forever
from csvfs.units import SLAB_SIZE_DEFAULT
from csvfs.wire.control import pack_value, unpack_value

log = logging.getLogger(__name__)

RETRY_S = 0.5
GIVE_UP_S_MAX = 2.0
RETRY_S_MAX = 5.0  # what fails whoever tries it must not make the volume hop between hosts all the time
SOUND_S = 30.0  # a service that ran so long counts as no failure to start
ELECTION_INTERVAL_S = 2.0  # a look without occasion
LIVENESS_INTERVAL_S = 0.1
REMEMBER_MARGIN_S = 15.0  # beyond io_timeout, for as long programs wait


class OwnedVolume:
    """One volume that this host has a term for."""

    def __init__(self, name: str, term: Term) -> None:
        self.name = name
        self.term = term
        self.scope = trio.CancelScope()
        self.service: Service | None = None
        self.taken = trio.Event()  # it is served, or finished
        self.finished = False
        self.taken_at = trio.current_time()


class Host:
    """`lease`: of the node in the cluster store; ownership is attached to it."""

    def __init__(
        self,
        node: NodeName,
        address: str,
        port: int,
        *,
        unix_path: str | None,
        store: ClusterStore,
        cluster: bytes,
        lease: int,
        incarnation: Incarnation,
        may_serve: Callable[[], bool],
        recall_timeout_ms: int,
        reclaim_timeout_ms: int,
        write_timeout_ms: int,
        drive_retire_ms: int = 900_000,
        io_timeout_ms: int = 60_000,
        repair_speed: int = SPEED_DEFAULT,
        serve: Any = serve_volume,
        rng: Random | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.node = node
        self.engine = Engine(identity)
        self.view = View()
        self.facts = ClusterFacts(self.view)
        self.paths = Paths(self.engine, self._waypoints, cluster=cluster, node=node)
        self._address = address
        self._port = port
        self._unix_path = unix_path
        self._store = store
        self._cluster = cluster
        self._lease = lease
        self._incarnation = incarnation
        self._may_serve = may_serve
        self._recall_timeout_ms = recall_timeout_ms
        self._reclaim_timeout_ms = reclaim_timeout_ms
        self._write_timeout_ms = write_timeout_ms
        self._drive_retire_ms = drive_retire_ms
        self._io_timeout_ms = io_timeout_ms
        self._repair_speed = repair_speed
        self._serve = serve
        self._rng = rng or Random()
        self.owned: dict[str, OwnedVolume] = {}
        self._moves = Moves(node, self.view)
        self._retry_s: dict[str, float] = {}  # volume -> the pause after its next failure here

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; then the volumes are given up, so that others take them at once."""
        listeners: list[Listener] = []
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.engine.run_forever)
                desk = FrontDesk(self.node, self._find_service, self._wait_taken, self._may_serve, nursery)
                await nursery.start(keep_view_forever, self._store, self.view)
                if self.engine.identity is not None:
                    await nursery.start(follow_revoked_forever, self._store, self.engine.identity.revoke)
                listeners.append(Listener(self.engine, (self._address, self._port), desk.accept))
                self._port = listeners[0].port
                if self._unix_path is not None:
                    listeners.append(Listener(self.engine, self._unix_path, desk.accept))
                await self._register()
                nursery.start_soon(self._watch_liveness_forever)
                task_status.started()
                await self._elect_forever(nursery)
        finally:
            for listener in listeners:
                listener.close()
            with trio.CancelScope(shield=True), trio.move_on_after(2):
                await self._release_all()

    async def _register(self) -> None:
        value = {"address": self._address, "port": self._port, "incarnation": self._incarnation}
        await self._store.put(f"coordinators/{self.node}", pack_value(value), self._lease)
        log.info("coordinator host of %s listens on port %d", self.node, self._port)

    async def _waypoints(self) -> list[Waypoint]:
        return waypoints_of(self.view.servers)

    async def _release_all(self) -> None:
        for name in list(self.owned):
            try:
                await release_ownership(self._store, name, self.node, self._incarnation)
            except CsvfsError as error:
                log.warning(
                    "volume %s is not given up, its owner key ends with the node's lease: %s", name, error
                )

    async def _watch_liveness_forever(self) -> None:
        while self._may_serve():
            await trio.sleep(LIVENESS_INTERVAL_S)
        raise LeaseLost(f"node {self.node} lost its lease in the cluster store: its volumes move elsewhere")

    # -- election --------------------------------------------------------------------------------

    async def _elect_forever(self, nursery: trio.Nursery) -> None:
        without_owner: dict[str, int] = {}  # since when, in ns
        while True:
            changed = self.view.wait_changed
            now_ns = monotonic_ns()
            wanting = [name for name, value in self.view.volumes.items() if _wants_coordinator(value)]
            for name in wanting:
                if name in self.view.owners:
                    without_owner.pop(name, None)
                else:
                    without_owner.setdefault(name, now_ns)
            without_owner = {name: since for name, since in without_owner.items() if name in wanting}
            next_ns = now_ns + int(ELECTION_INTERVAL_S * 1e9)
            for attempt in self._attempts(wanting, without_owner):
                if attempt.start_ns <= now_ns:
                    await self._try_to_take(attempt.volume, nursery)
                else:
                    next_ns = min(next_ns, attempt.start_ns)
            self._check_owned()
            if any(owned.finished for owned in self.owned.values()):
                next_ns = min(next_ns, now_ns + int(RETRY_S * 1e9))
            with trio.move_on_after(max(0.0, (next_ns - monotonic_ns()) / 1e9)):
                await changed()

    def _attempts(self, wanting: list[str], without_owner: dict[str, int]) -> list[Attempt]:
        owners = {name: NodeName(str(value.get("node"))) for name, value in self.view.owners.items()}
        preferred = {
            name: NodeName(node)
            for name in wanting
            if isinstance(node := self.view.volumes[name].get("preferred"), str)
        }
        attempts = decide(self.node, wanting, owners, self._moves.candidates(), preferred, 0)
        return [
            Attempt(attempt.volume, attempt.start_ns + without_owner.get(attempt.volume, 0))
            for attempt in attempts
            if attempt.volume not in self.owned
        ]

    async def _try_to_take(self, name: str, nursery: trio.Nursery) -> None:
        if name in self.owned or not self._may_serve():
            return
        try:
            term = await take_ownership(
                self._store, name, self.node, self._address, self._port, self._incarnation, self._lease
            )
        except NotFound as error:
            raise LeaseLost(f"the lease of node {self.node} has ended: {error}") from None
        except CsvfsError as error:
            log.warning("volume %s could not be taken: %s", name, error)
            return
        if term is None or name in self.owned:
            return
        log.info("volume %s: taken with term %d", name, term)
        owned = self.owned[name] = OwnedVolume(name, term)
        nursery.start_soon(self._keep, owned)

    def _check_owned(self) -> None:
        """Give up what somebody else has by now, or shall have."""
        self._moves.look()
        for name, owned in self.owned.items():
            term = self.view.terms.get(name)
            if owned.finished:
                continue
            if term is not None and term > owned.term:
                log.warning("volume %s: term %d is at work elsewhere", name, term)
                owned.scope.cancel()
            elif owned.service is not None and (why := self._moves.reason(name, owned.service.is_whole)):
                log.info("volume %s moves away from node %s: %s", name, self.node, why)
                self._moves.moved(name)
                owned.scope.cancel()
            elif owned.service is not None and self.view.volumes.get(name, {}).get("state") == "deleting":
                owned.scope.cancel()  # it is taken again, to be deleted

    # -- one volume ------------------------------------------------------------------------------

    async def _keep(self, owned: OwnedVolume) -> None:
        """Do what the volume's state asks for, until it is somebody else's."""
        has_failed = False
        try:
            with owned.scope:
                await self._work_on(owned)
        except* NotCoordinator as group:
            log.warning("volume %s: %s", owned.name, leaves(group)[0])
        except* LeaseLost:
            raise
        except* CsvfsError as group:
            log.error("volume %s: %s", owned.name, leaves(group)[0])
            has_failed = True
        except* Exception:
            log.exception("volume %s: its coordinator failed in a way nobody planned for", owned.name)
            has_failed = True
        finally:
            owned.service = None
            owned.finished = True
            owned.taken.set()
            given_up = await self._give_up(owned)
            try:
                await trio.sleep(self._pause_s(owned, has_failed))  # what failed would fail at once again
                while not given_up:  # as long as this host lives, nobody takes what the store says it has
                    await trio.sleep(RETRY_S)
                    given_up = await self._give_up(owned)
            finally:
                self.owned.pop(owned.name, None)

    def _pause_s(self, owned: OwnedVolume, has_failed: bool) -> float:
        """Before the volume is taken here again: RETRY_S, doubled with every failure, up to RETRY_S_MAX."""
        if not has_failed or trio.current_time() - owned.taken_at >= SOUND_S:
            self._retry_s.pop(owned.name, None)
            return RETRY_S
        pause_s = self._retry_s.get(owned.name, RETRY_S)
        self._retry_s[owned.name] = min(2 * pause_s, RETRY_S_MAX)
        return pause_s

    async def _give_up(self, owned: OwnedVolume) -> bool:
        """False: the cluster store cannot be reached, or does not answer."""
        with trio.CancelScope(shield=True), trio.move_on_after(GIVE_UP_S_MAX):
            try:
                await release_ownership(self._store, owned.name, self.node, self._incarnation)
                return True
            except CsvfsError as error:
                log.warning("volume %s is not given up yet: %s", owned.name, error)
        return False

    async def _work_on(self, owned: OwnedVolume) -> None:
        while True:
            value = self.view.volumes.get(owned.name)
            if value is None:
                return
            setup = self._setup(owned, value)
            state = value.get("state")
            if state == "creating":
                if not await self._create(setup):
                    await self._wait_state_changes(owned.name, value)
                    continue
            elif state == "deleting":
                await self._delete(setup)
                return
            elif state != "online":
                raise BadRequest(f"volume {owned.name} is in state {state!r}, which this csvfs does not know")
            else:
                await self._serve_online(owned, setup)
                return
            await self._wait_state_changes(owned.name, value)

    async def _wait_state_changes(self, name: str, known: dict[str, Any]) -> None:
        with trio.move_on_after(RETRY_S * 10):
            await self.view.wait_until(lambda: self.view.volumes.get(name) != known)

    async def _serve_online(self, owned: OwnedVolume, setup: VolumeSetup) -> None:
        def serving(service: Service | None) -> None:
            owned.service = service
            if service is not None:
                owned.taken.set()

        await self._serve(
            setup,
            engine=self.engine,
            store=self._store,
            facts=self.facts.of_volume(setup.name),
            cluster=self._cluster,
            may_serve=self._may_serve,
            write_timeout_ms=self._write_timeout_ms,
            serving=serving,
            speed=self._repair_speed,
            paths=self.paths,
        )

    async def _create(self, setup: VolumeSetup) -> bool:
        """False: it cannot be created as things are; tried again when they change."""
        try:
            await create_volume(
                setup,
                engine=self.engine,
                store=self._store,
                facts=self.facts.of_volume(setup.name),
                cluster=self._cluster,
                rng=self._rng,
                paths=self.paths,
            )
        except NoSpace as error:
            log.error("volume %s cannot be created: %s", setup.name, error)
            await record_error(self._store, setup.name, str(error))
            return False
        except Unavailable as error:
            if isinstance(error, NotCoordinator):
                raise
            log.warning("volume %s is not created yet: %s", setup.name, error)
            await trio.sleep(RETRY_S)
            return False
        return True

    async def _delete(self, setup: VolumeSetup) -> None:
        while True:
            try:
                await delete_volume(
                    setup, engine=self.engine, store=self._store, facts=self.facts, cluster=self._cluster,
                    paths=self.paths,
                )  # fmt: skip
                return
            except Unavailable as error:
                log.warning("volume %s is not deleted yet: %s", setup.name, error)
                await trio.sleep(RETRY_S)

    def _setup(self, owned: OwnedVolume, value: dict[str, Any]) -> VolumeSetup:
        pool = self.view.pool or {}
        return VolumeSetup(
            name=owned.name,
            volume=VolumeId(field(value, "id", bytes)),
            copies=field(value, "copies", int),
            size=int(value.get("size") or 0),
            slab_size=int(pool.get("slab_size") or SLAB_SIZE_DEFAULT),
            node=self.node,
            term=owned.term,
            recall_timeout_s=self._recall_timeout_ms / 1000,
            reclaim_timeout_s=self._reclaim_timeout_ms / 1000,
            drive_retire_s=self._drive_retire_ms / 1000,
            remember_s=self._io_timeout_ms / 1000 + REMEMBER_MARGIN_S,
        )

    def _find_service(self, name: str) -> Service:
        """For the front desk. Raises NotCoordinator, Unavailable."""
        owned = self.owned.get(name)
        if owned is None:
            raise NotCoordinator(f"volume {name} is not coordinated by node {self.node}")
        if owned.service is None:
            raise Unavailable(f"volume {name} is being taken over by node {self.node}; try again")
        return owned.service

    async def _wait_taken(self, name: str) -> None:
        """For the front desk."""
        if (owned := self.owned.get(name)) is not None:
            await owned.taken.wait()


def _wants_coordinator(value: dict[str, Any]) -> bool:
    return value.get("state") in ("creating", "online", "deleting")


async def serve(config: NodeConfig) -> int:
    """Run the coordinator host of this node until SIGTERM or SIGINT."""
    numbers = ProcessNumbers.from_environment()
    store = open_store(config.store)
    item = await store.get("cluster")
    if item is None:
        raise Unavailable("the cluster store has no cluster yet; see csvfs cluster create")
    liveness = Liveness(config.liveness_path)
    host = Host(
        config.node,
        config.address,
        config.coordinator_port,
        unix_path=str(config.coordinator_socket),
        store=store,
        cluster=field(unpack_value(item.value), "id", bytes),
        lease=numbers.lease,
        incarnation=numbers.incarnation,
        may_serve=liveness.may_serve,
        recall_timeout_ms=config.options.recall_timeout_ms,
        reclaim_timeout_ms=config.options.reclaim_timeout_ms,
        write_timeout_ms=config.options.write_timeout_ms,
        drive_retire_ms=config.options.drive_retire_ms,
        io_timeout_ms=config.options.io_timeout_ms,
        repair_speed=config.options.repair_speed - 1,
        identity=open_identity(config),
    )
    await run_until_signalled(host.run)
    return 0


def main() -> int:
    # Leases, inodes and replies live long and form no cycles: a look for garbage at every 700th costs 7 %. What 256 changes
    # under way are made of must not bring one about either: some 15,000 objects, and 15 % of the time of making very many files.
    gc.set_threshold(100_000, 20, 50)
    return run_process(serve)


if __name__ == "__main__":
    sys.exit(main())
