"""A simulated drive server: the real DriveServer, BlockService and Drive in a simulated process.

Place      simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from csvfs.block.block_service import BlockService
from csvfs.block.drive_calls import DriveCalls
from csvfs.block.drive_server import DriveServer
from csvfs.block.drive_watch import DriveWatch
from csvfs.block.flusher import Flushed, Flusher
from csvfs.errors import CsvfsError, DriveFailed
from csvfs.net.tunnels import Tunnels
from tests.simulator.network import ProcessKilled
from tests.simulator.process import Process


class SimDriveServer(DriveServer):
    """As the real one, but for where its configuration, engine and liveness come from."""

    def __init__(self, process: Process) -> None:
        self.process = process
        config: Any = SimpleNamespace(
            node=process.node, address=process.node, drive_server_port=0,
            drive_server_socket=f"socket of {process.node}",
        )  # fmt: skip
        engine: Any = process.engine
        self.config = config
        self.store = process.store
        self.engine = engine
        self.service = BlockService(
            engine, process.node, process.world.cluster, process.incarnation, process.may_serve
        )
        self.calls = DriveCalls(self.service, engine)  # nobody is passed on here: there are straight paths only
        self.tunnels = Tunnels(engine)
        self.watch = DriveWatch(self.service, self._publish)
        self._key = {}
        self._lease = process.machine.lease
        self._pool = None
        self._rows = {}
        process.on_killed = lambda: self.service.close(clean=False)
        process.server = self  # type: ignore[attr-defined]


class SimFlusher(Flusher):
    """Flushes without a thread: one happens at one instant between its order and its answer."""

    def __init__(
        self,
        engine: Any,
        name: str,
        begin: Callable[[], object],
        flush: Callable[[], None],
        end: Callable[[object, CsvfsError | None], None],
    ) -> None:
        self._process: Process = engine.process
        self._begin, self._flush, self._end = begin, flush, end
        self._waiting: list[Flushed] = []
        self._told: list[Flushed] = []
        self._running = False
        self._orders: Any = SimpleNamespace(put=self._later)

    def _later(self, order: bool) -> None:
        self._process.network.events.after(self._duration(), self._flush_now)

    def _duration(self) -> float:
        return 0.004 * self._process.network.rng.random()

    def _flush_now(self) -> None:
        if not self._process.alive:
            return
        self._error = None
        try:
            self._flush()
        except CsvfsError as error:
            self._error = error
        except ProcessKilled:
            self._process.kill("in the middle of a flush")
            return
        self._process.network.events.after(self._duration(), self._answer)

    def _answer(self) -> None:
        if not self._process.alive or not self._running:
            return
        told, self._told = self._told, []
        error = self._error
        self._running = False
        self._end(self._token, error)
        if self._waiting:
            self._start()
        for flushed in told:
            flushed(error)

    def close(self) -> None:
        self._running = False
        if self._process.alive:
            for flushed in [*self._told, *self._waiting]:
                flushed(DriveFailed("the drive was closed"))
