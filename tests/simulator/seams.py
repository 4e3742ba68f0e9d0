"""Where the simulation takes the place of the machine: names of production modules, replaced for a run.

Place      simulator. The list is complete: what is not named here is the code that runs in production.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import trio
import trio._core._run as trio_run
from trio._core._io_epoll import EpollIOManager

import csvfs.block.block_service
import csvfs.block.bus_reads
import csvfs.block.drive
import csvfs.block.drive_server
import csvfs.block.flushes
import csvfs.block.local_reader
import csvfs.block.medium
import csvfs.block.medium_check
import csvfs.block.member_latency
import csvfs.block.open_tables
import csvfs.block.pull
import csvfs.block.served_drives
import csvfs.block.server_links
import csvfs.block.slab_copy
import csvfs.block.slot_table
import csvfs.block.slot_tables
import csvfs.block.superblock
import csvfs.block.writer_marks
import csvfs.net.link
from csvfs.block.writer_marks import REST_S
from tests.simulator.clock import SimClock
from tests.simulator.loop import run_tasks
from tests.simulator.medium import SimMmap, SimOs
from tests.simulator.network import SimListener
from tests.simulator.server import SimFlusher

_OS_MODULES = (
    csvfs.block.drive,
    csvfs.block.slab_copy,
    csvfs.block.slot_table,
    csvfs.block.slot_tables,
    csvfs.block.superblock,
    csvfs.block.medium,
    csvfs.block.local_reader,
    csvfs.block.medium_check,
    csvfs.block.served_drives,
)


class _Time:
    def __init__(self, clock: SimClock) -> None:
        self._clock = clock

    def monotonic_ns(self) -> int:
        return int(self._clock.now * 1e9)

    def monotonic(self) -> float:
        return self._clock.now


async def _connect(engine: Any, address: Any, *, timeout_s: float, node: str = "") -> Any:
    return await engine.network.connect(engine, address, timeout_s=timeout_s)


_poll = EpollIOManager.get_events


def _events(manager: Any, timeout: float) -> Any:
    """No descriptor is waited for but that by which trio wakes itself."""
    return _poll(manager, timeout) if trio_run.GLOBAL_RUN_CONTEXT.runner.entry_queue.size() else []


@contextmanager
def installed(
    clock: SimClock, sim_os: SimOs, seed: int, slow_call: Callable[..., Any], *, rest_s: float = REST_S
) -> Iterator[None]:
    """Run with simulated files, sockets and time. `slow_call`: in place of trio.to_thread.run_sync. `rest_s`: as
    REST_S of writer_marks.py, which is longer than most runs."""
    time = _Time(clock)
    with ExitStack() as stack:

        def put(module: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(module, name, value))

        for module in _OS_MODULES:
            put(module, "os", sim_os)
        put(csvfs.block.medium, "_fallocate", sim_os.fallocate)
        put(csvfs.block.open_tables, "mmap", SimMmap(sim_os))
        put(csvfs.block.drive, "open_locked", sim_os.open_locked)
        put(csvfs.block.drive, "try_lock", lambda fd: True)
        put(csvfs.block.drive, "machine_boot_id", sim_os.boot_id)
        put(csvfs.block.server_links, "connect", _connect)
        put(csvfs.block.pull, "connect", _connect)
        put(csvfs.block.flushes, "Flusher", SimFlusher)
        put(csvfs.block.drive_server, "Listener", SimListener)
        put(csvfs.block.server_links, "monotonic_ns", time.monotonic_ns)
        put(csvfs.block.bus_reads, "monotonic", time.monotonic)
        put(csvfs.block.member_latency, "monotonic", time.monotonic)
        put(csvfs.block.block_service, "perf_counter", time.monotonic)
        put(csvfs.block.block_service, "perf_counter_ns", time.monotonic_ns)
        put(csvfs.net.link, "time", time)
        put(csvfs.block.writer_marks, "REST_S", rest_s)
        put(trio.to_thread, "run_sync", slow_call)
        put(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        put(trio_run, "_r", random.Random(seed))
        put(EpollIOManager, "get_events", _events)
        put(trio_run, "unrolled_run", run_tasks)
        yield
