"""One run of programs on three nodes: real mounts and coordinators, the block layer below, faults, and the proof that
what programs were told is what one machine that never breaks might have told them.

Place      simulator, top; beside tests/simulator/world.py, which looks at the block layer alone.
Run        a volume that is there; programs work while faults happen; calm: everything is mended, another coordinator
           opens the metadata, programs end; every node looks at everything; the metadata must be consistent and the
           history linearizable.
"""

from __future__ import annotations

import errno
import gc
import hashlib
from random import Random
from typing import TYPE_CHECKING, Any

import trio

from coordinator.consistency import check
from csvfs.ids import NodeName
from csvfs.store.interface import Put
from tests.simulator import freezing
from tests.simulator.clients import seams
from tests.simulator.clients.faults import ClientFaults
from tests.simulator.clients.host import make_host
from tests.simulator.clients.kernel import Connection, Devices
from tests.simulator.clients.mount import SimMount
from tests.simulator.clients.node import Node, SimKeeper
from tests.simulator.clients.programs import Program, Watcher
from tests.simulator.clients.recorder import Recorder, first_names
from tests.simulator.clients.template import CLUSTER, NAME, SLAB_SIZE, VOLUME, template
from tests.simulator.history import Unhealed, Violation
from tests.simulator.process import Process
from tests.simulator.server import SimDriveServer
from tests.simulator.world import COLLECT_EVERY, Outcome, World, _first_failure, _has

if TYPE_CHECKING:
    from coordinator.service import Service

BEGIN_S = 0.8
WORK_S_MAX = 60.0
END_S_MAX = 150.0
FIRST_SEED_WITH_HAND_OVER = 200_000  # below, a mount that dies takes its FUSE session with it
FIRST_SEED_WITH_SHARED_WRITE = 300_000  # below, a file is never written by several nodes at once
CACHE_TRUSTED_S = 2.0  # of a mount that stands still: its page of liveness is good for so long


class ClientsWorld(World):
    """All that exists in a run."""

    freezes = True
    looks_direct = 0.25  # of the looks of watchers: past the cache, so they may have to wait for the coordinator

    def __init__(self, seed: int, operations: int, *, verbose: bool = False) -> None:
        self.devices = Devices()
        self.connections: dict[str, Connection] = {}
        self.kernel_rng = Random(f"{seed}/kernel")
        super().__init__(seed, operations, verbose=verbose)
        self.cluster, self.volume, self.volume_name, self.slab_size = CLUSTER, VOLUME, NAME, SLAB_SIZE
        self.record = Recorder(self.trace)
        self.errors: dict[str, int] = {}
        self.evicted: set[str] = set()  # nodes whose mounts lost their leases to others
        self.undecided = 0

    def _draw(self) -> None:
        rng = self.rng
        self.network.scale = rng.choice((1.0, 1.0, 1.0, 10.0, 40.0))
        self.copies = rng.choice((2, 3, 3))
        self.fuse_minor = rng.choice((45, 45, 38))
        self._programs_per_node = rng.choice(((1, 1, 1), (2, 1, 1), (2, 2, 0), (1, 1, 0)))
        self.rest_s = 0.0
        self.hands_over = self.seed >= FIRST_SEED_WITH_HAND_OVER
        self.shares_writes = self.seed >= FIRST_SEED_WITH_SHARED_WRITE
        if self.shares_writes:
            self._programs_per_node = Random(f"{self.seed}/programs").choice(((2, 2, 2), (3, 3, 0), (2, 1, 1), (4, 1, 1)))
            self.looks_direct = 0.97
        self.moves_min = Random(f"{self.seed}/moves").choice((1, 1, 2)) if self.shares_writes else 1 << 60

    # -- set-up ----------------------------------------------------------------------------------

    def set_up(self) -> None:
        made = template(self.copies)
        rng = Random(f"{self.seed}/clocks")
        for node, medium in made.media.items():
            copied = medium.copy(medium.path)
            copied.rng = Random(f"{self.seed}/{medium.path}")
            self.os.media[copied.path] = copied
            machine = Node(self, NodeName(node), [copied], 1.0 + rng.choice((0.0, 1e-3, -1e-3, 0.02, -0.02)))
            machine.clock_offset_ns = rng.randrange(10**15)
            machine.wall_offset_ns = rng.choice((0, 0, 1, -1)) * rng.randrange(60 * 10**9)
            machine.roles = {"server": _run_server, "host": _run_host, "mount": _run_mount}
            self.machines[node] = machine
        self.store.transact([], [Put(key, value) for key, value in made.items.items()])
        self.store.transact([], [Put(f"meta/{NAME}", made.meta)])

    def mounted(self, mount: SimMount) -> None:
        """A node has another mount."""
        self.connections[mount.process.node] = mount.connection
        self.trace(f"{mount.process.name} is mounted")

    # -- faults ----------------------------------------------------------------------------------

    def pause(self, processes: list[Process]) -> None:
        super().pause([process for process in processes if not process.paused])
        for process in self._with_keepers(processes):
            process.paused = True
            freezing.stand_still(process)
            self.events_queue.after(CACHE_TRUSTED_S, lambda process=process: self._doubt(process))  # type: ignore[misc]

    def _doubt(self, process: Process) -> None:
        """Who has to see to what the kernel has cached has stood still for long."""
        mount: SimMount | None = process.mount
        connection = None if mount is None or not process.alive else mount.connection
        keeper = self._keeper(process.node)
        if keeper is not None and keeper.process is process and keeper.is_orphaned and keeper.held is not None:
            connection = keeper.held.connection
        if process.paused and connection is not None:
            connection.doubted = True

    def resume(self, processes: list[Process]) -> None:
        super().resume(processes)
        for process in self._with_keepers(processes):
            process.paused = False
            freezing.go_on(process)
            mount: SimMount | None = process.mount
            if mount is not None:
                mount.connection.wake()

    def _keeper(self, node: str) -> SimKeeper | None:
        machine: Any = self.machines[node]
        keeper: SimKeeper | None = machine.keeper
        return keeper

    def _with_keepers(self, processes: list[Process]) -> list[Process]:
        """`csvfs node run` keeps the node's lease and its FUSE session."""
        keepers = [self._keeper(process.node) for process in processes if process.role == "agent"]
        return [*processes, *(keeper.process for keeper in keepers if keeper is not None)]

    def may_be_followed(self, node: str) -> bool:
        """Whether the mount of a node may go on, by its next process, though others were given its leases."""
        keeper = self._keeper(node)
        return keeper is not None and keeper.held is not None and keeper.held.can_be_taken_over

    def mend(self) -> None:
        super().mend()
        self.network.let_all_go()

    # -- programs --------------------------------------------------------------------------------

    def has_work(self) -> bool:
        return not self.calm

    def refused(self, program: Program, connection: Connection, error: OSError) -> None:
        """A program saw an error that is no answer. Raises Violation: nothing explains it."""
        name = error.strerror or str(error)
        self.trace(f"{program.who}: {name}")
        key = f"{name}{'' if connection.alive else ', its mount is gone'}"
        self.errors[key] = self.errors.get(key, 0) + 1
        if error.errno == errno.ESTALE:
            return  # on which the real kernel looks the name up again
        if self.hands_over and connection.alive and program.node not in self.evicted:
            raise Violation(f"{program.who}: {name}, and its mount was never evicted")

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            nursery.start_soon(self.events_queue.run_forever)
            for machine in self.machines.values():
                nursery.start_soon(machine.run_forever)
            faults = ClientFaults(self, Random(f"{self.seed}/faults"))
            self.trace("plan: " + ", ".join(name for name, _ in faults.plan))
            programs = [
                Program(self, node, number)
                for node, count in zip(self.machines, self._programs_per_node, strict=True)
                for number in range(count)
            ]
            programs += [Watcher(self, node, 9) for node in self.machines]
            await self._work(programs, faults)
            await self._look(programs)
            nursery.cancel_scope.cancel()
        self.undecided = self.record.judge(first_names())

    async def _work(self, programs: list[Program], faults: ClientFaults) -> None:
        async with trio.open_nursery() as working:
            for program in programs:
                working.start_soon(program.run)
            with trio.move_on_after(WORK_S_MAX):
                await trio.sleep(BEGIN_S)
                await faults.run()
                while self._operations > 0:
                    await trio.sleep(0.2)
            self.calm = True
            self.trace("calm")
            self.mend()
            self._replace_coordinator()
            self.nursery.start_soon(self._deadline, "programs have not ended", working.cancel_scope)

    def _replace_coordinator(self) -> None:
        """What the drives hold is what counts in the end, not what the last coordinator has in memory."""
        owner = self.owner_node()
        host = None if owner is None else self.machines[owner].processes.get("host")
        if host is not None:
            host.kill("to have another one open the metadata")

    async def _deadline(self, what: str, scope: trio.CancelScope) -> None:
        with trio.move_on_after(END_S_MAX):
            await trio.sleep_forever()
        if not scope.cancel_called and not self.looked:
            raise Unhealed(f"after {END_S_MAX:g} s of calm {what}: {self._why()}")

    looked = False
    trouble = ""  # what keeps it from that

    async def _look(self, programs: list[Program]) -> None:
        for program in {program.node: program for program in programs}.values():
            while True:
                try:
                    await program.look_at_all()
                    break
                except OSError as error:
                    self.trouble = f"{program.who} cannot look: {error.strerror}"
                    self.trace(self.trouble)
                    await trio.sleep(0.2)
        service = self.service()
        while service is None:
            await trio.sleep(0.2)
            service = self.service()
        problems = check(service._metadata)
        if problems:
            raise Violation(f"metadata: {'; '.join(problems[:3])}")
        self.looked = True

    def service(self) -> Service | None:
        """The one that coordinates."""
        owner = self.owner_node()
        process: Any = None if owner is None else self.machines[owner].processes.get("host")
        host = getattr(process, "host", None)
        owned = None if host is None else host.owned.get(NAME)
        return None if owned is None or not process.alive else owned.service

    def _why(self) -> str:
        service = self.service()
        if service is None:
            return f"there is no coordinator; the owner is {self.owner_node()}"
        if not service.desk.is_open:
            return "not all mounts have reclaimed"
        waiting = [f"{node}: {connection.waiting()}" for node, connection in self.connections.items()]
        return "; ".join([self.trouble, *waiting] if self.trouble else waiting)


async def _run_server(process: Process) -> None:
    await SimDriveServer(process).run()


async def _run_host(process: Process) -> None:
    process.host = make_host(process)
    await process.host.run()


async def _run_mount(process: Process) -> None:
    process.mount = SimMount(process)
    await process.mount.run()


def run_seed(seed: int, operations: int = 120, *, verbose: bool = False) -> Outcome:
    """One run, from nothing but its seed."""
    template(2), template(3)  # made outside of any run
    outcome = Outcome(seed)
    world = ClientsWorld(seed, operations, verbose=verbose)
    collecting = gc.isenabled()
    gc.disable()  # collections would come at other places in a replay
    try:
        with seams.installed(world):
            world.set_up()
            try:
                trio.run(world.run, clock=world.clock)
            except BaseException as error:
                outcome.failure = _first_failure(error)
                outcome.lied, outcome.unhealed = _has(error, Violation, but=Unhealed), _has(error, Unhealed)
                if outcome.failure is None:
                    raise
    finally:
        if collecting:
            gc.enable()
    if seed % COLLECT_EVERY == 0:
        gc.collect()
    outcome.events = world.events
    outcome.digest = hashlib.sha256("\n".join(world.events).encode()).hexdigest()[:16]
    outcome.calls, outcome.undecided = world.record.answered, world.undecided
    outcome.errors = world.errors
    outcome.simulated_s = world.clock.now - 1000.0
    return outcome
