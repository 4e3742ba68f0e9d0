"""The jobs of a resync: which are tried when, and what is said of them. The copying itself: test_bus, test_repair."""

from typing import Any

import pytest
import trio

from coordinator import resync as resync_module
from coordinator.resync import Resync
from csvfs.errors import DriveFailed
from csvfs.ids import DriveId, Epoch, NodeName, SlabId
from csvfs.units import MIB
from csvfs.wire.block_messages import ROLE_ABSENT, Member, SlabDescriptor

SLAB_SIZE = 64 * MIB


class Copying:
    """Stands in for `bring_in_sync`: fails on some drives, copies 64 KiB of each slab on the others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing: set[DriveId] = set()
        self.tried: list[tuple[SlabId, DriveId]] = []
        monkeypatch.setattr(resync_module, "bring_in_sync", self)

    async def __call__(self, changes: Any, slab: SlabId, drive: DriveId) -> int:
        self.tried.append((slab, drive))
        await trio.sleep(0.1)
        if drive in self.failing:
            raise DriveFailed(f"drive {drive!r} has failed")
        return 64 * 1024


def drive(number: int) -> DriveId:
    return DriveId(bytes([number]) * 16)


def add(resync: Resync, slab: int, number: int) -> None:
    member = Member(drive(number), NodeName(f"n{number}"), ROLE_ABSENT, Epoch(1))
    resync.add_one(None, SlabDescriptor(SlabId(slab), Epoch(2), (member,)), member)  # type: ignore[arg-type]


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Copying:
    return Copying(monkeypatch)


async def test_a_drive_that_does_not_serve_is_neither_tried_nor_shown_and_gone_on_with_when_it_does(
    copying: Copying, nursery: trio.Nursery, autojump_clock: trio.abc.Clock
) -> None:
    serving: set[DriveId] = set()
    resync = Resync("v", SLAB_SIZE, lambda: False, serving.__contains__)
    nursery.start_soon(resync.run_forever)
    for slab in range(3):
        add(resync, slab, 1)
    await trio.sleep(300)
    assert copying.tried == [] and resync.to_status() == []
    serving.add(drive(1))
    (row,) = resync.to_status()
    assert (row["done"], row["total"], row["copied"]) == (0, 3 * SLAB_SIZE, 0)
    await trio.sleep(2)
    assert [slab for slab, _ in copying.tried] == [0, 1, 2] and resync.is_idle


async def test_drives_that_fail_again_and_again_hold_up_no_other(
    copying: Copying, nursery: trio.Nursery, autojump_clock: trio.abc.Clock
) -> None:
    resync = Resync("v", SLAB_SIZE, lambda: False)
    nursery.start_soon(resync.run_forever)
    copying.failing = {drive(number) for number in range(10, 10 + 2 * resync_module.WORKERS)}
    for number in range(10, 10 + 2 * resync_module.WORKERS):
        add(resync, number, number)
    await trio.sleep(100)
    tries = len(copying.tried)
    assert tries < 2 * resync_module.WORKERS * 12  # less and less often
    add(resync, 1, 1)
    await trio.sleep(0.5)
    assert (SlabId(1), drive(1)) in copying.tried
    assert all(row["waiting_for"] for row in resync.to_status())


async def test_what_was_copied_is_said_beside_the_slabs_that_are_done(
    copying: Copying, nursery: trio.Nursery, autojump_clock: trio.abc.Clock
) -> None:
    resync = Resync("v", SLAB_SIZE, lambda: False)
    nursery.start_soon(resync.run_forever)
    for slab in range(10):
        add(resync, slab, 1)
    await trio.sleep(0.55)
    (row,) = resync.to_status()
    assert row["done"] == 5 * SLAB_SIZE and row["copied"] == 5 * 64 * 1024
    assert row["rate"] < MIB  # what the network and the drives see, not whole slabs
    assert row["eta"] == pytest.approx(0.55)
    await trio.sleep(1)
    assert resync.to_status() == []


async def test_a_drive_that_was_away_is_tried_at_once_when_it_is_back(
    copying: Copying, nursery: trio.Nursery, autojump_clock: trio.abc.Clock
) -> None:
    """However often it had failed before."""
    resync = Resync("v", SLAB_SIZE, lambda: False)
    nursery.start_soon(resync.run_forever)
    copying.failing = {drive(1)}
    add(resync, 1, 1)
    await trio.sleep(200)
    resync.cancel([drive(1)])  # its server has said that it is gone
    copying.failing, copying.tried = set(), []
    add(resync, 1, 1)
    await trio.sleep(0.5)
    assert copying.tried == [(SlabId(1), drive(1))] and resync.is_idle
