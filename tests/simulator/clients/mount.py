"""A simulated mount: the real MountProcess with session, guard, file table, channel and relay, below a model of the
kernel.

Place      simulator. Not real: /dev/fuse (kernel.py), pyfuse3 (names_library.py), the signals and the socket of the
           process.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import trio

from csvfs.cluster.membership import View, keep_view_forever
from csvfs.config import Options
from csvfs.mount.channel import Channel
from csvfs.mount.direct import Direct
from csvfs.mount.file_table import FileTable
from csvfs.mount.guard import Guard
from csvfs.mount.operations import VolumeOperations
from csvfs.mount.process import MountProcess
from csvfs.mount.request_journal import RequestJournal
from csvfs.mount.session import Session
from tests.simulator.clients.kernel import Connection
from tests.simulator.clients.names_library import SimRelay
from tests.simulator.freezing import OWNER
from tests.simulator.process import Process, SimEngine

WRITE_TIMEOUT_MS = 2000
MINOR_WITH_RESEND = 40


class MountEngine(SimEngine):
    """Its only descriptor is that of the FUSE session; the socket pair of the relay is replaced (names_library.py)."""

    def register(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        connection = self.process.world.devices.find(fd)  # type: ignore[attr-defined]
        if connection is not None:
            connection.register(handler)

    def modify(self, fd: int, events: int) -> None:
        self.process.world.devices.connection(fd).modify(events)  # type: ignore[attr-defined]

    def unregister(self, fd: int) -> None:
        connection = self.process.world.devices.find(fd)  # type: ignore[attr-defined]
        if connection is not None:
            connection.unregister(self.process)


class SimMount(MountProcess):
    """As the real one, but for where its configuration, engine and device come from."""

    def __init__(self, process: Process) -> None:
        self.process = process
        world: Any = process.world
        self.world = world
        options = Options(write_timeout_ms=WRITE_TIMEOUT_MS)
        config: Any = SimpleNamespace(node=process.node, options=options)
        liveness: Any = SimpleNamespace(may_serve=process.may_serve)
        self._config = config
        self._volume_name = world.volume_name
        self._incarnation = process.incarnation
        self._liveness = liveness
        self._engine: Any = MountEngine(process)
        self._view = View()
        self._end = trio.Event()
        self.failure = None
        self._serves = False
        self._evicted = trio.Event()
        self.table: FileTable | None = None
        machine: Any = process.machine
        held = None if machine.keeper is None else machine.keeper.held
        self._record = None if held is None else held.record()
        self._takes_over = self._record is not None and self._record.has_served
        self._journal = RequestJournal() if self._record is None else self._record.journal
        self.connection = Connection(world) if held is None else held.connection
        self._fd = self.fd = world.devices.add(self.connection) if held is None else held.fd
        process.on_killed = self.connection.abort if held is None else self.connection.detach
        self.connection.attach(process)

    async def run(self) -> None:
        """Until it has to end: evicted, or killed."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_view_forever, self.process.store, self._view)
            with trio.CancelScope() as serving:
                nursery.start_soon(self._cancel_at_end, serving)
                await self._serve(nursery)
            nursery.cancel_scope.cancel()
        self.world.trace(f"{self.process.name} has ended: {self.failure}")

    def _open_socket(self, nursery: trio.Nursery, why: Callable[[], dict[str, Any]]) -> None:
        return None

    async def _mount_and_serve(self, nursery: trio.Nursery, session: Session, table: FileTable) -> None:
        fd, record = self.fd, self._record
        noted = None if record is None else record.inodes
        operations = VolumeOperations(session, table, first_handle=(self._incarnation << 32) + 1)
        relay = SimRelay(self._engine, fd, table, operations, nursery, self.world.fuse_minor, noted)
        direct = Direct(operations, relay)
        channel = Channel(
            self._engine, fd, table, operations, relay, direct, self._journal, noted, barred=table.barred
        )
        if record is not None:
            table.set_given(lambda ino: ino in relay.lookups)
            table.shedding.lookups = lambda: relay.lookups
        if self._takes_over and record is not None:
            relay.take_over(record.init, {row.ino: row.lookups for row in record.left if row.lookups})
            channel.take_over(nursery, table.inheritance)
            self.world.trace(f"{self.process.name} goes on with {len(record.left)} inodes")
        else:
            channel.start(nursery)
            if record is not None and self.world.fuse_minor >= MINOR_WITH_RESEND:
                record.served(b"INIT")
        self.table = table
        self.world.mounted(self)
        try:
            await channel.ended.wait()
        finally:
            if record is None or (self._end.is_set() and not self._evicted.is_set()):
                self.connection.abort()
            channel.close()


def make_guard(may_serve: Callable[[], bool]) -> Guard:
    """By the clock of its machine."""
    process: Process = may_serve.__self__  # type: ignore[attr-defined]
    return Guard(may_serve, clock=process.machine.clock_ns)


def make_session(**arguments: Any) -> Session:
    process = OWNER.get()
    assert process is not None
    return Session(**arguments, clock=process.machine.clock_ns)


def open_device() -> int:
    """Of the mount that asks: the session is there already."""
    process: Any = OWNER.get()
    return int(process.mount.fd)


def make_notifier(fd: int) -> Connection:
    process: Any = OWNER.get()
    connection: Connection = process.mount.connection
    return connection
