"""What of coordinator and mount the machine's place is taken of, beyond the seams of the block layer.

Place      simulator. The list is complete: what is named neither here nor in tests/simulator/seams.py is the code that
           runs in production.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from select import EPOLLIN, POLLIN
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pyfuse3
import trio

import coordinator.host
import coordinator.lost
import coordinator.operations
import coordinator.scrub
import coordinator.session_desk
import coordinator.shared_write
import csvfs.admin.mount_keeper
import csvfs.mount.channel
import csvfs.mount.cloning
import csvfs.mount.file_table
import csvfs.mount.holes
import csvfs.mount.operations
import csvfs.mount.process
import csvfs.mount.read_path
import csvfs.mount.relay
import csvfs.mount.segments
import csvfs.mount.shared_write
import csvfs.mount.truncation
import csvfs.mount.write_path
import csvfs.net.detours
import csvfs.volume.file_io
from coordinator.lease_table import SessionKey
from coordinator.leases import Leases
from tests.simulator import freezing, seams
from tests.simulator.clients import mount, names_library
from tests.simulator.freezing import OWNER
from tests.simulator.network import SimListener

if TYPE_CHECKING:
    from tests.simulator.clients.world import ClientsWorld

# A look every so often costs more than all else in a run; nothing is decided between two looks.
GUARD_S = 0.1
LIVENESS_INTERVAL_S = 0.2
MOVE_S = 10.0  # programs here take their time
SEGMENT_SIZE = 4096  # and their files are small
_TIMED_MODULES = (
    coordinator.lost, coordinator.scrub, coordinator.session_desk, coordinator.shared_write, csvfs.mount.cloning, csvfs.mount.holes,
    csvfs.mount.operations, csvfs.mount.read_path, csvfs.mount.shared_write, csvfs.mount.truncation, csvfs.mount.write_path,
    csvfs.volume.file_io,
)  # fmt: skip


async def _connect(engine: Any, address: Any, *, timeout_s: float, node: str = "") -> Any:
    return await engine.network.connect(engine, address, timeout_s=timeout_s)


def _engine(_identity: Any) -> Any:
    process = OWNER.get()
    assert process is not None
    return process.engine


def _clock_ns() -> int:
    process = OWNER.get()
    assert process is not None
    return process.machine.clock_ns()


@contextmanager
def installed(world: ClientsWorld) -> Iterator[None]:
    """Run with simulated files, sockets, time and kernels; stopped processes stand still."""

    def monotonic_ns() -> int:
        return int(world.clock.now * 1e9)

    def time_ns() -> int:
        process = OWNER.get()
        return monotonic_ns() + (process.machine.wall_offset_ns if process is not None else 0)

    true_end = Leases.end_session

    def end_session(leases: Leases, key: SessionKey) -> None:
        """Its leases pass on: nothing that its programs were not told of may take effect any more (I6), but where the next
        process is let in again, and carries out what it is asked anew."""
        world.evicted.add(key[0])
        if world.may_be_followed(key[0]):
            world.record.evicted(key[0])
        else:
            world.record.expire(key[0])
        true_end(leases, key)

    time = SimpleNamespace(time_ns=time_ns, monotonic=lambda: world.clock.now, monotonic_ns=monotonic_ns)
    device = SimpleNamespace(open_device=mount.open_device, abort=lambda path: None, mount=lambda *args: None)
    operations_init: Any = coordinator.operations.Operations.__init__
    with ExitStack() as stack:

        def put(target: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(target, name, value))

        stack.enter_context(seams.installed(world.clock, world.os, world.seed, world.slow_call))
        stack.enter_context(freezing.installed())
        for module in _TIMED_MODULES:
            put(module, "time", time)
        put(csvfs.mount.write_path, "_time_ns", time_ns)
        put(csvfs.mount.shared_write, "_time_ns", time_ns)
        put(coordinator.shared_write, "MOVES_MIN", world.moves_min)
        put(coordinator.shared_write, "MOVE_S", MOVE_S)
        put(csvfs.mount.segments, "SEGMENT_SIZE", SEGMENT_SIZE)
        put(csvfs.mount.shared_write, "_SEGMENT_SHIFT", SEGMENT_SIZE.bit_length() - 1)
        put(operations_init, "__defaults__", (time_ns,))
        put(coordinator.host, "monotonic_ns", monotonic_ns)
        put(coordinator.host, "Engine", _engine)
        put(coordinator.host, "Listener", SimListener)
        put(coordinator.host, "LIVENESS_INTERVAL_S", LIVENESS_INTERVAL_S)
        put(csvfs.mount.file_table, "GUARD_S", GUARD_S)
        put(csvfs.mount.process, "Guard", mount.make_guard)
        put(csvfs.mount.process, "Session", mount.make_session)
        put(csvfs.mount.process, "KernelNotifier", mount.make_notifier)
        put(csvfs.mount.process, "device", device)
        put(csvfs.net.detours, "connect", _connect)
        put(Leases, "end_session", end_session)
        put(csvfs.mount.channel, "os", world.devices)
        put(csvfs.mount.channel, "select", SimpleNamespace(EPOLLIN=EPOLLIN, POLLIN=POLLIN, poll=world.devices.poll))
        put(csvfs.admin.mount_keeper, "monotonic_ns", _clock_ns)
        put(csvfs.admin.mount_keeper, "unmount_lazily", lambda point: None)
        put(csvfs.mount.relay, "os", world.devices)
        put(trio, "sleep", world.events_queue.sleep)  # most of what a run does is to sleep a little
        put(pyfuse3, "readdir_reply", names_library.readdir_reply)
        yield
