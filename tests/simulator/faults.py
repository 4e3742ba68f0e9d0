"""What goes wrong in a run, and when: drawn from the seed.

Place      simulator.

Injected   kill of a drive server, of a coordinator host, of a writer, also in the middle of the stores of a WRITE;
           clean stop of a drive server; power cut of a node, and of all nodes at once, with any subset of
           unflushed pages kept; write-back of single pages at odd times; a process stopped for a while (SIGSTOP)
           and a whole node; a partition of a node from the others, in both directions or one; a node cut off from
           the cluster store, with transactions whose answer is lost; connections that break at any frame, and
           the resends that follow; slow nodes; clocks that run up to 2 % fast or slow; bit rot in data; unreadable
           pages; a full file system; a flush that fails; reads that find nothing in memory.
Not        lost or forged frames within a connection: TCP and frame checksums (tests of wire/ and net/).
           Rot in checksum tables, slot tables and superblocks, drives that vanish or are swapped (tests of drive).
           Rot together with what takes copies out of the in-sync set: the rotten one may be the last, and
           an unclean last copy cannot tell rot from a torn write (FORMAT.md, "Torn blocks"). Rot of one block
           on two drives, or of what only one drive has: then it is lost.
           A medium that loses what it said is flushed, a cluster store that forgets: nothing holds without these.
           Kills between two stores into the mapped tables: one store each, so a kill lies before or after a pwrite.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from tests.simulator.process import Machine, Process
    from tests.simulator.world import World


# Only these faults, for a mutant that others hardly ever show (mutants.EMPHASIS); empty: all.
EMPHASIS: tuple[str, ...] = ()
READS = "reads"  # in EMPHASIS: programs read much and write little, and give no lease up by themselves


class Faults:
    """The faults of one run. `plan` says which kinds it draws from."""

    def __init__(self, world: World, rng: Random) -> None:
        self._world = world
        self._rng = rng
        kinds: dict[str, Callable[[], None]] = {
            "kill server": self._kill_server,
            "kill mid-store": self._kill_mid_store,
            "stop server": self._stop_server,
            "kill host": lambda: self._kill_role("host"),
            "kill writer": lambda: self._kill_role("writer"),
            "kill mid-write": self._kill_mid_write,
            "power cut": self._power_cut,
            "total power cut": self._total_power_cut,
            "pause": self._pause,
            "pause node": self._pause_node,
            "partition": self._partition,
            "store cut": self._store_cut,
            "break": self._break,
            "slow": self._slow,
            "full": self._full,
            "unreadable": self._unreadable,
            "failing flush": self._failing_flush,
            "rot": self._rot,
        }
        with_rot = rng.random() < 0.15
        harmless = ["rot", "kill host", "kill writer", "break", "slow"]  # no copy leaves for long
        names = harmless if with_rot else sorted(set(kinds) - {"rot"})
        names = [name for name in EMPHASIS if name != READS] or names
        count = rng.choice((1, 2, 2, 3, 3, 4, 6))
        self.plan = [(rng.choice(names), kinds) for _ in range(count)]
        if with_rot and not EMPHASIS:
            self.plan[0] = ("rot", kinds)

    async def run(self) -> None:
        """All of the plan, one after the other, with pauses; some last on while the next begins."""
        for name, kinds in self.plan:
            await trio.sleep(self._rng.choice((0.05, 0.3, 1.0, 3.0)) * self._rng.random())
            kinds[name]()
            await trio.sleep(self._rng.choice((0.0, 0.1, 0.5, 2.0, 6.0)))

    def _later(self, undo: Callable[[], None], *durations: float) -> None:
        """Undo a fault after a while; at the latest when the run calms down."""
        duration = self._rng.choice(durations or (0.2, 1.0, 3.0, 6.0, 12.0))
        self._world.undo(undo, duration)

    def _machine(self) -> Machine:
        return self._rng.choice(list(self._world.machines.values()))

    def _process(self, *roles: str) -> Process | None:
        found = [
            process
            for machine in self._world.machines.values()
            for role, process in machine.processes.items()
            if role in roles and process.alive
        ]
        return self._rng.choice(found) if found else None

    # -- processes -------------------------------------------------------------------------------

    def _kill_role(self, role: str) -> None:
        process = self._process(role)
        if role == "host":  # rather the one that coordinates
            owner = self._world.owner_node()
            if owner is not None and self._rng.random() < 0.8:
                process = self._world.machines[owner].processes.get("host")
        if process is not None:
            process.kill("SIGKILL")

    def _kill_server(self) -> None:
        self._kill_role("server")

    def _kill_mid_store(self) -> None:
        medium = self._rng.choice(self._machine().media)
        medium.kill_after_stores = self._rng.randrange(8)

    def _kill_mid_write(self) -> None:
        self._world.kill_writer_at_write = True

    def _stop_server(self) -> None:
        process = self._process("server")
        if process is not None:
            self._world.trace(f"{process.name} stopped in order")
            process.scope.cancel()

    def _pause(self) -> None:
        process = self._process("server", "writer", "writer", "host")
        if process is not None:
            self._world.pause([process])
            self._later(lambda: self._world.resume([process]))

    def _pause_node(self) -> None:
        processes = list(self._machine().processes.values())
        self._world.pause(processes)
        self._later(lambda: self._world.resume(processes))

    # -- machines --------------------------------------------------------------------------------

    def _power_cut(self) -> None:
        machine = self._machine()
        machine.power_off()
        self._later(machine.power_on)

    def _total_power_cut(self) -> None:
        for machine in self._world.machines.values():
            if machine.up and self._rng.random() < 0.5:
                for medium in machine.media:
                    medium.write_back_some(self._rng)
        for machine in self._world.machines.values():
            machine.power_off()
            self._later(machine.power_on, 0.1, 0.5, 2.0, 5.0)

    # -- the network -----------------------------------------------------------------------------

    def _partition(self) -> None:
        alone = self._machine().name
        others = [name for name in self._world.machines if name != alone]
        pairs = [(alone, other) for other in others] + [(other, alone) for other in others]
        kind = self._rng.random()
        if kind < 0.2:
            pairs = pairs[: len(others)]
        elif kind < 0.4:
            pairs = pairs[len(others) :]
        elif kind < 0.6:
            other = self._rng.choice(others)
            pairs = [(alone, other), (other, alone)]
        self._world.cut(pairs)
        self._later(lambda: self._world.heal(pairs))
        if self._rng.random() < 0.5:
            self._store_cut(alone)

    def _store_cut(self, node: str | None = None) -> None:
        name = node or self._machine().name
        self._world.trace(f"{name} is cut off from the cluster store")
        self._world.store.cut.add(name)
        self._later(lambda: self._world.store.cut.discard(name))

    def _break(self) -> None:
        for _ in range(self._rng.randrange(1, 5)):
            self._world.trace(f"connection breaks: {self._world.network.break_some()}")

    def _slow(self) -> None:
        name = self._machine().name
        self._world.trace(f"{name} is slow")
        self._world.network.slow[name] = self._rng.choice((0.002, 0.02, 0.1))
        self._later(lambda: self._world.network.slow.pop(name, None))

    # -- drives ----------------------------------------------------------------------------------

    def _full(self) -> None:
        medium = self._rng.choice(self._machine().media)
        self._world.trace(f"{medium.path} is full")
        medium.full = True

        def undo() -> None:
            medium.full = False

        self._later(undo)

    def _unreadable(self) -> None:
        medium = self._rng.choice(self._machine().media)
        pages = [page for page in sorted(medium.pages) if page * 4096 >= medium.layout.data_offset]
        if pages:
            page = self._rng.choice(pages)
            self._world.trace(f"{medium.path} page {page} is unreadable")
            medium.unreadable.add(page)
            self._later(lambda: medium.unreadable.discard(page))

    def _failing_flush(self) -> None:
        medium = self._rng.choice(self._machine().media)
        self._world.trace(f"{medium.path} will fail a flush")
        medium.failing_flushes = 1

        def undo() -> None:
            medium.failing_flushes = 0

        self._later(undo)

    def _rot(self) -> None:
        medium = self._rng.choice(self._machine().media)
        rotten = self._world.rotten
        pages = [
            page
            for page in sorted(medium.pages)
            if page * 4096 >= medium.layout.data_offset
            and not rotten & self._world.twins(medium, page)
            and self._world.has_equal(medium, page)
        ]
        for page in self._rng.sample(pages, min(len(pages), self._rng.randrange(1, 4))):
            self._world.trace(f"{medium.path} page {page} rots")
            rotten.add((medium.path, page))
            medium.rot(page, self._rng.randrange(4096 * 8))
