"""A drive that stays slow is retired: a real drive server, its store and its watch; only the disks are made slow."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from csvfs.admin.cluster_view import Record, read_cluster_view
from csvfs.admin.drive_life import set_maintenance
from csvfs.admin.drive_ops import add_drives
from csvfs.admin.pool_ops import create_cluster, create_pool
from csvfs.block.drive import Drive
from csvfs.block.drive_server import DriveServer
from csvfs.clock import monotonic_ns
from csvfs.cluster.liveness import LivenessWriter
from csvfs.cluster.node_process import ProcessNumbers
from csvfs.config import NodeConfig, parse_config
from csvfs.ids import Incarnation
from csvfs.store.opening import open_store
from tests.drive_files import SLAB_SIZE, blank_file

SLOW_S = 2.0  # of a flush: far above ten times what the others take, on any machine


def config_of(tmp_path: Path) -> NodeConfig:
    text = (
        f'node = "n1"\naddress = "127.0.0.1"\nport_base = 1\nstore = "embedded:{tmp_path}/store.db"\n'
        f'run_dir = "{tmp_path}"\n[options]\nslow_drive_after_s = 1\nslow_drive_retire_s = 2\n'
    )
    return parse_config(text.encode(), tmp_path / "node.toml")


@pytest.fixture
async def slow_pool(tmp_path: Path, nursery: Any, monkeypatch: Any) -> Any:
    """A server of three drives that are flushed all the time, the first of which is slow: (store, drives)."""
    config = config_of(tmp_path)
    store = open_store(config.store)
    cluster = await create_cluster(store, "test")
    await create_pool(store, "pool", SLAB_SIZE)
    drives: list[Record] = []
    await add_drives(store, config.node, [blank_file(tmp_path / f"d{n}") for n in range(3)], drives.append, "ssd")
    slow = drives[0].text("path")

    def flush(drive: Drive) -> None:
        if drive.path == slow:
            time.sleep(SLOW_S)

    monkeypatch.setattr(Drive, "flush", flush)
    monkeypatch.setattr(NodeConfig, "drive_server_port", 0)  # any
    page = LivenessWriter(config.liveness_path, Incarnation(1))
    page.serve_until(monotonic_ns() + 600_000_000_000)
    lease = await store.grant_lease(600_000)
    server = DriveServer(config, store, ProcessNumbers(Incarnation(2), Incarnation(1), lease), cluster.id())
    nursery.start_soon(server.run)

    async def flush_forever(number: int) -> None:
        while True:
            served = list(server.service.drives)
            if len(served) == 3:
                await server.service.flushes.flush(served[number])
            await trio.sleep(0.05)

    for number in range(3):
        nursery.start_soon(flush_forever, number)
    yield store, drives
    nursery.cancel_scope.cancel()
    page.close()
    await store.close()


async def usages(store: Any) -> dict[str, str]:
    drives = (await read_cluster_view(store)).drives.values()
    return {os.path.basename(drive.text("path")): drive.text("usage") for drive in drives}


async def test_a_drive_that_stays_slow_is_retired_with_its_latency_as_the_reason(slow_pool: Any) -> None:
    store, drives = slow_pool
    with trio.fail_after(120):
        while not any((await usages(store)).values()):
            await trio.sleep(0.05)
    assert await usages(store) == {"d0": "retired", "d1": "", "d2": ""}
    why = (await read_cluster_view(store)).drives[drives[0].name].text("why")
    assert why.startswith("slow: ") and "flush" in why


async def test_a_slow_drive_that_somebody_is_at_is_not_retired(slow_pool: Any, caplog: Any) -> None:
    store, drives = slow_pool
    await set_maintenance(store, drives[0], True)
    with trio.fail_after(120):
        while "in maintenance: not retired" not in caplog.text:
            await trio.sleep(0.05)
    assert await usages(store) == {"d0": "maintenance", "d1": "", "d2": ""}
