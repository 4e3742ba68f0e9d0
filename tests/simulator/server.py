"""A simulated drive server: the real DriveServer, BlockService and Drive in a simulated process.

Place      simulator.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from csvfs.block.block_service import BlockService
from csvfs.block.drive_calls import DriveCalls
from csvfs.block.drive_server import DriveServer
from csvfs.block.served_drives import ServedDrives
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
            process.node, process.world.cluster, process.incarnation, process.may_serve
        )
        self.service.drives = _Drives(process)
        self.calls = DriveCalls(self.service, engine)
        self._pool = None
        self._rows = {}
        process.on_killed = self.service.drives.close
        process.server = self  # type: ignore[attr-defined]


class _Drives(ServedDrives):
    """Closed as a kill closes them."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    def close(self) -> None:
        if self._process.alive:
            super().close()
            return
        for served in self:
            if served.drive is not None:
                served.drive.close(clean=False)
                served.drive = None
                served.state = "closed"
