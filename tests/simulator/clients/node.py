"""A node with programs: its processes are killed with its lease, and a mount that dies is followed by another one.

Place      simulator, above kernel.py and process.py.
Followed   where `world.hands_over`: the FUSE session is held by the real MountKeeper, whose rules say who goes on with it, when
           the kernel's caches are taken back meanwhile, and when it ends. Not real: the kernel's answer to that
           (mount/page_drop.py and its threads); it takes back all there is, after a moment.
"""

from __future__ import annotations

import mmap
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import trio

from csvfs.admin.mount_keeper import MountKeeper
from csvfs.config import Options
from csvfs.ids import Incarnation
from csvfs.mount.held_session import SIZE, HeldSession, Record, rows_of
from tests.simulator.clients.kernel import Connection
from tests.simulator.clients.template import NAME
from tests.simulator.freezing import OWNER
from tests.simulator.process import RESTART_S, Machine, Process

if TYPE_CHECKING:
    from tests.simulator.clients.world import ClientsWorld

DEAD = 1  # the status of a process that did not end by order


class SimHeld(HeldSession):
    """A session of the model of the kernel, and the memory that mount processes leave to each other."""

    def __init__(self, world: ClientsWorld) -> None:
        self.connection = Connection(world)
        self.fd = world.devices.add(self.connection)
        self._words = memoryview(mmap.mmap(-1, SIZE)).cast("Q")

    def record(self) -> Record:
        """For a mount process."""
        return Record(self._words)

    def take_back(self) -> None:
        """All that the kernel has cached of the inodes that the dead process has noted."""
        self.connection.increment_epoch()
        for row in rows_of(self._words):
            self.connection.invalidate_attr(row.ino)
            inode = self.connection.inodes.get(row.ino)
            if inode is not None:
                inode.pages.clear()
                inode.listing = None

    def drop_pages_and_close(self) -> None:
        self.connection.abort()


class SimKeeper(MountKeeper):
    """`process`: what it runs in, as far as clock and standing still go."""

    def __init__(self, node: Node) -> None:
        root: Any = SimpleNamespace(path=Path("/clusterstorage"), make_point=lambda name: None)
        super().__init__(root, NAME, Options().io_timeout_ms / 1000)
        self.process = Process(node, "keeper", 0)
        self._may_serve = self.process.may_serve

    @property
    def held(self) -> SimHeld | None:
        return self._session  # type: ignore[return-value]

    @property
    def is_orphaned(self) -> bool:
        return self._orphaned

    async def watch_forever(self) -> None:
        OWNER.set(self.process)
        await super().watch_forever()

    async def begin(self, incarnation: Incarnation) -> None:
        """A mount process is about to start."""
        if self._session is None:
            world: Any = self.process.world
            self._session = SimHeld(world)
        await self._begin(incarnation)

    async def stopped(self, incarnation: Incarnation) -> None:
        """It has died."""
        await self._stopped(incarnation, DEAD)

    async def lease_over(self) -> None:
        """As look_after when it is cancelled."""
        session = self._session
        if session is not None and session.can_be_taken_over:
            self._orphan(session)
        else:
            with trio.CancelScope(shield=True):
                await self.end("the mount has ended")

    async def end(self, reason: str) -> None:
        """What the real one leaves to its thread where it is cancelled happens at once."""
        if self.held is not None:
            self.held.connection.abort()
        await super().end(reason)

    async def _take_back(self, session: Any) -> None:
        await trio.sleep(0.002)
        if self._session is session:
            session.take_back()
            self._shows_nothing = True

    def power_off(self) -> None:
        """The kernel is gone, and all that it had."""
        self.process.kill("power cut", quietly=True)  # if it was stopped, its tasks end all the same
        held, self._session = self.held, None
        self._orphaned = False
        if held is not None:
            held.connection.abort()


class Node(Machine):
    """Its processes are killed before any of their tasks learns of it."""

    keeper: SimKeeper | None = None

    async def run_forever(self) -> None:
        world: Any = self.world
        if not world.hands_over:
            await super().run_forever()
            return
        self.keeper = SimKeeper(self)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.keeper.watch_forever)
            await super().run_forever()
            nursery.cancel_scope.cancel()

    def power_off(self) -> None:
        if self.keeper is not None:
            self.keeper.power_off()
        super().power_off()

    def _end_lease(self, scope: trio.CancelScope) -> None:
        for process in list(self.processes.values()):
            process.kill("the node lost its lease")
        super()._end_lease(scope)

    async def _keep_running(
        self, agent: Process, role: str, main: Callable[[Process], Awaitable[None]]
    ) -> None:
        keeper = self.keeper
        if role != "mount" or keeper is None:
            await super()._keep_running(agent, role, main)
            return
        try:
            while True:
                incarnation = Incarnation(await self._next_incarnation(agent))
                await keeper.begin(incarnation)
                process = self.processes[role] = Process(self, role, incarnation)
                await process.run(lambda process=process: main(process))  # type: ignore[misc]
                await keeper.stopped(incarnation)
                await trio.sleep(RESTART_S * (1 + self.world.rng.random()))
        finally:
            if self.up:
                await keeper.lease_over()
