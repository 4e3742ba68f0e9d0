"""Simulated processes and machines: what is started, stopped, killed and powered off.

Place      simulator, above network.py, medium.py and store.py. `Machine` does what `csvfs node run` does: it keeps
           the node's lease, says until when the node may serve, starts its processes again and buries them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import trio

from csvfs.cluster.election import release_host
from csvfs.cluster.liveness import serve_until_ns
from csvfs.cluster.membership import item_map
from csvfs.errors import CsvfsError, leaves
from csvfs.ids import Incarnation, NodeName
from csvfs.net.refusals import Refusals
from csvfs.store.interface import Compare, Delete, Put
from csvfs.wire.control import pack_value
from tests.simulator import freezing
from tests.simulator.freezing import OWNER
from tests.simulator.medium import Medium
from tests.simulator.network import Network, ProcessKilled, SimLink
from tests.simulator.store import StoreHandle

if TYPE_CHECKING:
    from tests.simulator.world import World

NODE_LEASE_MS, MARGIN_MS, HEARTBEAT_S = 3000, 500, 0.5
RESTART_S = 0.3
GATE_S = 0.05  # what is stopped finds out so long after it goes on


class SimEngine:
    """Of csvfs.net.engine.Engine: what is left of it where no descriptor is waited for."""

    in_batch = False
    trio_due = False

    def __init__(self, process: Process) -> None:
        self.trio_awaited = 0
        self.process = process
        self.network = process.network
        self.identity = None  # simulated connections are not encrypted
        self.refusals = Refusals()

    async def run_forever(self) -> None:
        await trio.sleep_forever()

    def hot(self) -> None:
        """Everything is."""

    def close(self) -> None:
        """Nothing to close."""


class Process:
    """One process: its links, its tasks, and whether it lives or is stopped."""

    def __init__(self, machine: Machine, role: str, incarnation: int) -> None:
        self.machine = machine
        self.world = machine.world
        self.network: Network = machine.world.network
        self.node = machine.name
        self.role = role
        self.incarnation = Incarnation(incarnation)
        self.name = f"{machine.name}/{role}/{incarnation}"
        self.alive = True
        self.paused = False
        self.links: dict[SimLink, None] = {}
        self.engine = SimEngine(self)
        self.store = StoreHandle(machine.world.store, self)
        self.scope = trio.CancelScope()
        self.on_killed: Callable[[], None] = lambda: None
        self.put_aside: list[Any] = []  # tasks that have come due while it stands still (freezing.py)
        self.host: Any = None  # what it is, by its role
        self.mount: Any = None

    async def run(self, main: Callable[[], Awaitable[None]]) -> None:
        """Until it ends or is killed. What it raises on purpose ends it, anything else ends the simulation."""
        OWNER.set(self)
        try:
            with self.scope:
                await main()
        except* ProcessKilled:
            self.world.trace(f"{self.name} killed in the middle of a store")
        except* CsvfsError as group:
            self.world.trace(f"{self.name} ends: {leaves(group)[0]}")
        finally:
            self._bury(quietly=False)

    def kill(self, why: str, *, quietly: bool = False) -> None:
        """As SIGKILL; `quietly`: with its machine, so that nobody is told."""
        if self.alive:
            self.world.trace(f"{self.name} killed: {why}")
            self._bury(quietly=quietly)
            self.scope.cancel()
            freezing.go_on(self)

    def _bury(self, *, quietly: bool) -> None:
        if not self.alive:
            return
        self.alive = False
        self.on_killed()
        if self.role == "server":
            for medium in self.machine.media:
                medium.locked_by = None  # the kernel closes what a dead process had open
        links, self.links = list(self.links), {}
        for link in links:
            link.die(quietly=quietly)

    def may_serve(self) -> bool:
        """What the liveness page says to this process."""
        return self.machine.clock_ns() < self.machine.serve_until

    async def gate(self) -> None:
        """Wait while stopped: for what a process does by its own timers."""
        while self.paused:
            await trio.sleep(GATE_S)


class Machine:
    """One node: its clock, its drives, its processes."""

    def __init__(self, world: World, name: str, media: list[Medium], rate: float) -> None:
        self.world = world
        self.name = NodeName(name)
        self.media = media
        self.rate = rate  # of its clock; 1.0 is exact
        self.clock_offset_ns = 0  # of its monotonic clock
        self.wall_offset_ns = 0
        self.up = True
        self.serve_until = 0
        self.boots = 0
        self.lease = 0
        self.processes: dict[str, Process] = {}
        self.roles: dict[str, Callable[[Process], Awaitable[None]]] = {}
        self._scope = trio.CancelScope()
        self._lease_scope = self._scope  # of the time for which the node has its present lease
        self._boot()

    def _boot(self) -> None:
        self.boots += 1
        boot = f"{self.name}:{self.boots}".encode().ljust(16, b".")
        for medium in self.media:
            medium.boot = boot

    def clock_ns(self) -> int:
        return int(self.world.clock.now * self.rate * 1e9) + self.clock_offset_ns

    # -- power -----------------------------------------------------------------------------------

    def power_off(self) -> None:
        """At once; what the page cache holds is lost."""
        if not self.up:
            return
        self.up = False
        self.serve_until = 0
        for process in list(self.processes.values()):
            process.kill("power cut", quietly=True)
        self._scope.cancel()
        lost = [medium.power_cut(self.world.rng) for medium in self.media]
        self.world.trace(f"{self.name} lost power and {sum(lost)} unflushed pages")
        self.world.power_lost([medium for medium, pages in zip(self.media, lost, strict=True) if pages])

    def power_on(self) -> None:
        if not self.up:
            self.up = True
            self._boot()
            self.world.trace(f"{self.name} boots")
            self.world.nursery.start_soon(self.run_forever)

    # -- node run --------------------------------------------------------------------------------

    async def run_forever(self) -> None:
        """As csvfs node run, until the machine is powered off."""
        with trio.CancelScope() as self._scope:
            while True:
                agent = Process(self, "agent", 0)
                self.processes["agent"] = agent
                with trio.CancelScope() as scope:
                    self._lease_scope = scope
                    sent = await self._take_lease(agent)
                    self.serve_until = serve_until_ns(sent, NODE_LEASE_MS, MARGIN_MS)
                    async with trio.open_nursery() as nursery:
                        self._heartbeat(agent, scope)
                        for role, main in self.roles.items():
                            nursery.start_soon(self._keep_running, agent, role, main)
                for process in list(self.processes.values()):
                    process.kill("the node lost its lease")
                await trio.sleep(RESTART_S)

    async def _take_lease(self, agent: Process) -> int:
        key = f"alive/{self.name}"
        while True:
            try:
                item = await agent.store.get(key)
                if item is not None:
                    await agent.store.revoke_lease(item.lease)
                    continue
                sent = self.clock_ns()
                self.lease = await agent.store.grant_lease(NODE_LEASE_MS)
                value = pack_value({"incarnation": self.lease, "address": self.name})
                put = Put(key, value, self.lease)
                if (await agent.store.transact([Compare(key, 0)], [put])).succeeded:
                    return sent
            except CsvfsError:
                await trio.sleep(RESTART_S)

    def _heartbeat(self, agent: Process, scope: trio.CancelScope) -> None:
        """Renew the lease twice a second; events and no task, for there are more of these than of anything else."""
        if not agent.alive or scope.cancel_called or scope is not self._lease_scope:
            return
        events = self.world.events_queue
        if agent.paused:
            events.after(GATE_S, lambda: self._heartbeat(agent, scope))
            return
        sent = self.clock_ns()
        agent.store.keep_alive_soon(self.lease, lambda renewed: self._heard(agent, scope, sent, renewed))

    def _heard(self, agent: Process, scope: trio.CancelScope, sent: int, renewed: bool | None) -> None:
        """renewed: None: the store cannot be reached."""
        if not agent.alive or scope is not self._lease_scope:
            return
        if renewed is False:
            self.serve_until = 0
            self.world.trace(f"{self.name} lost its lease")
            self._end_lease(scope)
            return
        if renewed:
            self.serve_until = max(self.serve_until, serve_until_ns(sent, NODE_LEASE_MS, MARGIN_MS))
        self.world.events_queue.after(HEARTBEAT_S, lambda: self._heartbeat(agent, scope))

    def _end_lease(self, scope: trio.CancelScope) -> None:
        """Kill all processes; a new lease follows."""
        scope.cancel()

    async def _keep_running(
        self, agent: Process, role: str, main: Callable[[Process], Awaitable[None]]
    ) -> None:
        while True:
            incarnation = await self._next_incarnation(agent)
            process = self.processes[role] = Process(self, role, incarnation)
            await process.run(lambda process=process: main(process))  # type: ignore[misc]
            await self._until_done(agent, role, Incarnation(incarnation))
            await trio.sleep(RESTART_S * (1 + self.world.rng.random()))

    async def _next_incarnation(self, agent: Process) -> int:
        key = f"incarnations/{self.name}"
        while True:
            try:
                item = await agent.store.get(key)
                last = int(item_map(item).get("last", 0)) + 1
                put = Put(key, pack_value({"last": last}))
                compare = Compare(key, item.revision if item else 0)
                if (await agent.store.transact([compare], [put])).succeeded:
                    return last
            except CsvfsError:
                await trio.sleep(RESTART_S)

    async def _until_done(self, agent: Process, role: str, incarnation: Incarnation) -> None:
        """What the node does when one of its processes has died: nobody shall look for it any more."""
        while True:
            try:
                if role == "server":
                    await self._delete_own(agent, f"servers/{self.name}", incarnation)
                elif role == "host":
                    await release_host(agent.store, self.name, incarnation)
                    await self._delete_own(agent, f"coordinators/{self.name}", incarnation)
                return
            except CsvfsError:
                await trio.sleep(RESTART_S)

    async def _delete_own(self, agent: Process, key: str, incarnation: Incarnation) -> None:
        item = await agent.store.get(key)
        if item is not None and item_map(item).get("incarnation") == incarnation:
            await agent.store.transact([Compare(key, item.revision)], [Delete(key)])
