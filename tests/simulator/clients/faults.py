"""What goes wrong while programs use a volume, and when: drawn from the seed.

Place      simulator.

Injected   kill of a mount (from seed 200,000 on another process goes on with its FUSE session), of a coordinator
           host, of a drive server; power cut of a node; a process that stands
           still for 0.2 to 12 s and wakes up believing what it believed before (a mount, a coordinator, a drive
           server; all of a node), while its clock and everybody else go on; partitions of a node from the
           others, in both directions or one, or of two nodes, also of a node that keeps its lease meanwhile; a node,
           or all nodes, cut off from the cluster store, with transactions whose answer is lost; connections that break at any frame; one direction of
           one connection that delivers nothing for a while, so that what was sent on it arrives after its
           sender has connected anew and sent it again; all that one mount sends to others, or a coordinator
           whose node loses its lease, arrives late: when it has been evicted or replaced; or that coordinator
           stands still and wakes up then; or it is killed in the middle of a batch, and what it had sent arrives when
           another one is at work; a mount that dies while its node does not reach the store; slow nodes; monotonic clocks that run up to 2 % fast or slow and
           begin anywhere; wall clocks that differ by up to a minute; kernels with and without epochs of names.
Not        what the block world injects (tests/simulator/faults.py): faults of drives, what a power cut takes
           from page caches (it may take the only copy, so programs may lose what they did not flush). A
           suspended machine (its clock stands still, too): ARCHITECTURE.md, "Limits of the design". What the
           kernel of a node keeps while its mount stands still for more than 2 s (RELIABILITY.md, "Open"): it is
           not asked. mmap, locks, extended attributes, joining and leaving nodes, more than one volume.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from tests.simulator.faults import Faults

if TYPE_CHECKING:
    from tests.simulator.clients.world import ClientsWorld
    from tests.simulator.process import Process

# Only these faults, for a mutant that others hardly ever show (mutants.EMPHASIS); empty: all.
EMPHASIS: tuple[str, ...] = ()
_DEPOSED_S = (3.2, 4.0, 5.0, 8.0)  # leases last 3 s


class ClientFaults(Faults):
    """The faults of one run."""

    def __init__(self, world: ClientsWorld, rng: Random) -> None:
        self._world = self._clients = world
        self._rng = rng
        kinds: dict[str, Callable[[], None]] = {
            "kill mount": lambda: self._kill_role("mount"),
            "kill host": lambda: self._kill_role("host"),
            "kill server": lambda: self._kill_role("server"),
            "power cut": self._power_cut,
            "stop mount": lambda: self._stop("mount"),
            "stop host": lambda: self._stop("host"),
            "stop server": lambda: self._stop("server"),
            "stop node": self._pause_node,
            "partition": self._partition,
            "store cut": self._store_cut,
            "store outage": self._store_outage,
            "break": self._break,
            "hold": self._hold,
            "hold mount": self._hold_mount,
            "depose": self._depose,
            "slow": self._slow,
        }
        names = sorted(EMPHASIS or kinds)
        count = rng.choice((1, 2, 2, 3, 3, 4))
        self.plan = [(rng.choice(names), kinds) for _ in range(count)]
        self._add_late(Random(f"{world.seed}/late"), kinds)
        if world.hands_over:
            self._add_deaths(Random(f"{world.seed}/deaths"), kinds)

    def _add_deaths(self, rng: Random, kinds: dict[str, Callable[[], None]]) -> None:
        """Of mounts that are followed, alone and just before or after something else."""
        kinds["bereave"] = self._bereave
        for _ in range(rng.choice((0, 1, 1, 2))):
            name = rng.choice(("kill mount", "kill mount", "bereave"))
            self.plan.insert(rng.randrange(len(self.plan) + 1), (name, kinds))

    def _add_late(self, rng: Random, kinds: dict[str, Callable[[], None]]) -> None:
        """Kinds that came later are drawn apart: so all other runs are what they were."""
        late: dict[str, Callable[[], None]] = {"orphan": self._orphan, "isolate": self._isolate}
        kinds.update(late)
        wanted = sorted(set(late) & set(EMPHASIS))
        if wanted:
            self.plan = [(rng.choice(wanted), kinds) for _ in self.plan]
        elif not EMPHASIS and rng.random() < 0.15:
            self.plan.insert(rng.randrange(len(self.plan) + 1), (rng.choice(sorted(late)), kinds))
        if any(name == "isolate" for name, _ in self.plan):
            self._clients.looks_direct = 0.0  # who watches there shall not wait for the coordinator

    def _later(self, undo: Callable[[], None], *durations: float) -> None:
        # Leases last 3 s, a mount that is not heard is evicted after 5 to 10 s.
        super()._later(undo, *(durations or (0.3, 1.0, 3.5, 6.0, 9.0, 12.0)))

    def _power_cut(self) -> None:
        machine = self._machine()
        for medium in machine.media:
            medium.sync()  # see "Not"
        machine.power_off()
        self._later(machine.power_on)

    def _stop(self, role: str) -> None:
        process = self._process(role)
        if role == "host":  # rather the one that coordinates
            owner = self._world.owner_node()
            if owner is not None and self._rng.random() < 0.8:
                process = self._world.machines[owner].processes.get("host")
        if process is not None and process.alive:
            stopped = [process]
            self._world.pause(stopped)
            self._later(lambda: self._world.resume(stopped))

    def _store_outage(self) -> None:
        names = list(self._world.machines)
        self._world.trace("nobody reaches the cluster store")
        self._world.store.cut.update(names)
        self._later(lambda: self._world.store.cut.difference_update(names), 0.3, 1.0, 2.0, 4.0)

    def _hold_out(self, process: Process, *durations: float) -> None:
        """What it sends to other processes arrives late."""
        network = self._world.network
        self._world.trace(f"what {process.name} sends is held")
        network.held_senders.add(process)
        self._later(lambda: network.let_sender_go(process), *durations)

    def _hold_some(self, process: Process, *durations: float) -> None:
        """As _hold_out, of some of its connections."""
        network = self._world.network
        self._world.trace(f"some of what {process.name} sends is held")
        for link in list(process.links):
            if self._rng.random() < 0.5:
                network.held.add(link.out)
                self._later(lambda pipe=link.out: network.let_go(pipe), *durations)  # type: ignore[misc]

    def _hold_mount(self) -> None:
        durations = (3.0, 7.0, 10.0, 14.0)
        if self._rng.random() < 0.7:
            self._world.network.before_write["mount"] = lambda process: self._hold_out(process, *durations)
            return
        process = self._process("mount")
        if process is not None:
            self._hold_some(process, *durations)

    def _depose(self) -> None:
        """Its node's lease ends, and it does not know, or what it has sent is still under way."""
        owner = self._world.owner_node()
        host = None if owner is None else self._world.machines[owner].processes.get("host")
        if owner is None or host is None or not host.alive:
            return
        if self._rng.random() < 0.3:
            self._world.pause([host])
            self._later(lambda: self._world.resume([host]), *_DEPOSED_S)
            self._cut_from_store(owner)
        else:
            self._world.network.before_write["host"] = self._hold_deposed

    def _hold_deposed(self, host: Process) -> None:
        self._hold_out(host, *_DEPOSED_S)
        self._cut_from_store(host.node)

    def _isolate(self) -> None:
        """A node that reaches the store and no other node, for longer than its mount is waited for (5 s for a recall, and
        as long for its fence): its lease goes on. Not at once: it shall hold something by then."""
        self._world.events_queue.after(self._rng.choice((0.5, 3.0, 5.0)), self._cut_alone)

    def _cut_alone(self) -> None:
        if self._world.calm:
            return
        owner = self._world.owner_node()
        alone = self._rng.choice([name for name in self._world.machines if name != owner])  # alone it evicts nobody
        others = [name for name in self._world.machines if name != alone]
        pairs = [pair for name in others for pair in ((alone, name), (name, alone))]
        self._world.cut(pairs)
        self._later(lambda: self._world.heal(pairs), 12.0, 15.0)

    def _bereave(self) -> None:
        """A mount dies, and no other one can be started, as its node does not reach the store: others get its leases."""
        owner = self._world.owner_node()
        node = self._rng.choice([name for name in self._world.machines if name != owner])
        process = self._world.machines[node].processes.get("mount")
        if process is not None and process.alive:
            self._world.trace(f"{node} is cut off from the cluster store")
            self._world.store.cut.add(node)
            self._later(lambda: self._world.store.cut.discard(node), 3.5, 9.0, 12.0)
            process.kill("SIGKILL")

    def _orphan(self) -> None:
        """The coordinator is killed while it writes, and what it sent is under way longer than its successor takes to
        begin. Only the host dies: no drive server leaves with it, no slab has to get another epoch for that."""
        self._world.network.before_write["host"] = self._kill_orphaning

    def _kill_orphaning(self, host: Process) -> None:
        self._hold_out(host, 0.8, 1.5, 2.5, 4.0)
        delay_s = self._rng.choice((0.0, 0.002, 0.02))
        self._world.events_queue.after(delay_s, lambda: host.kill("SIGKILL in the middle of a batch"))

    def _cut_from_store(self, node: str) -> None:
        self._world.trace(f"{node} is cut off from the cluster store")
        self._world.store.cut.add(node)
        self._later(lambda: self._world.store.cut.discard(node), *_DEPOSED_S)

    def _hold(self) -> None:
        for _ in range(self._rng.randrange(1, 4)):
            pipe = self._world.network.hold_some()
            if pipe is not None:
                self._world.trace(f"held: {pipe.sender.process.name} to {pipe.receiver.process.name}")
                self._later(lambda pipe=pipe: self._world.network.let_go(pipe), 0.2, 1.0, 3.0, 6.0)  # type: ignore[misc]
