"""Copies that come back, and copies that are made equal: what the simulator found, each told directly."""

import errno
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import trio

from coordinator.restoration import judge
from coordinator.slab_changes import SlabChanges
from csvfs.block import slab_state
from csvfs.block.drive import Drive
from csvfs.block.drive_calls import DriveCalls
from csvfs.block.drive_faults import IO_ERROR
from csvfs.block.drive_watch import drive_report
from csvfs.block.served_drives import ServedDrives
from csvfs.errors import Corrupt, CsvfsError, DriveFailed, LeaseLost
from csvfs.ids import DriveId, Epoch, NodeName, SlabId
from csvfs.wire.block_messages import ROLE_IN_SYNC, SlabDescriptor
from tests.block_cluster import SLAB, BlockCluster, write
from tests.drive_files import CLUSTER, DRIVE, POOL, make_drive, make_slab, sums_of
from tests.drive_files import write as write_copy

BLOCK = bytes(range(256)) * 16


async def test_I7_a_copy_whose_server_started_anew_is_not_put_back_in_service_beside_others(
    tmp_path: Path, nursery: Any
) -> None:
    """Simulator seed 164: an eviction bumped the epoch before the restarted copy was judged, and read from it."""
    cluster = BlockCluster(tmp_path, nursery)
    await cluster.start()
    await write(cluster.bus("mount/n2"), 0, BLOCK)
    victim = cluster.servers[0]
    await victim.kill()
    await victim.start(nursery)
    links = cluster.links("coordinator", incarnation=2)
    items = [[victim.drive_id, SLAB, 2, ROLE_IN_SYNC]]
    answer = await links.call("n1", "install", {"term": 2, "items": items, "alone": []}, timeout_s=60)
    assert "started anew" in answer["refused"][0][2]
    answer = await links.call("n1", "install", {"term": 2, "items": items, "alone": [0]}, timeout_s=60)
    assert answer["refused"] == []


async def test_I7_a_copy_that_was_joining_when_its_server_restarted_can_be_pulled_at_the_same_epoch(
    tmp_path: Path, nursery: Any
) -> None:
    """Simulator seed 404: it was installed again at an epoch it knew, and refused every pull from then on."""
    cluster = BlockCluster(tmp_path, nursery)
    await cluster.start()
    bus = cluster.bus("mount/n2")
    await write(bus, 0, BLOCK)
    victim = cluster.servers[0]
    await cluster.owner.commit(slab_state.drop_members(cluster.owner.descriptors[SLAB], [victim.drive_id]))
    joining = slab_state.begin_joining(cluster.owner.descriptors[SLAB], victim.drive_id)
    await cluster.owner.commit(joining)
    await victim.kill()
    await victim.start(nursery)
    await cluster.owner.commit(joining)
    source = cluster.servers[1]
    args = {
        "drive": victim.drive_id, "slab": SLAB, "epoch": joining.epoch, "since": 0, "chunks": None, "term": 1,
        "source": {"address": "127.0.0.1", "port": source.port, "drive": source.drive_id},
    }  # fmt: skip
    pulled = await cluster.owner.links.call("n1", "pull", args, timeout_s=60)
    assert pulled["chunks"] == 1


class _Book:
    def __init__(self, descriptor: SlabDescriptor) -> None:
        self.descriptor = descriptor

    def current(self, slab: SlabId) -> SlabDescriptor:
        return self.descriptor

    async def change(self, slabs: Any, transition: Any) -> dict[SlabId, SlabDescriptor | CsvfsError]:
        self.descriptor = transition(self.descriptor)
        return dict.fromkeys(slabs, self.descriptor)

    async def wait_durable(self) -> None:
        """Always."""


class _Control:
    """Everything works, but pulls from one node."""

    def __init__(self, node: str, error: CsvfsError) -> None:
        self._node = node
        self._error = error

    async def install(self, descriptors: Any, accepted: Any) -> dict:
        return {}

    async def stamp(self, *args: Any) -> None:
        """Done."""

    async def equal(self, *args: Any) -> None:
        """Heard."""

    async def register_term(self, node: str) -> None:
        """Every node can be reached."""

    async def pull(self, target: Any, source: Any, descriptor: Any, chunks: Any) -> int:
        if source.node == self._node:
            raise self._error
        return 1


@pytest.mark.parametrize("error", [Corrupt("a block does not verify"), LeaseLost("no lease")])
async def test_I1_a_source_that_cannot_be_read_costs_itself_and_not_the_good_copies(error: CsvfsError) -> None:
    """Simulator seed 80: one rotten block on the first member, and a takeover dropped all the others."""
    places = [(DriveId(bytes([number]) * 16), NodeName(f"n{number}")) for number in (1, 2, 3)]
    book = _Book(slab_state.new_slab(SlabId(7), places))
    control: Any = _Control("n1", error)
    changes = SlabChanges(book, control)  # type: ignore[arg-type]
    await changes.equalize({SlabId(7): {0}})
    assert [member.node for member in book.descriptor.in_sync] == ["n2", "n3"]
    assert book.descriptor.epoch > Epoch(1)


def test_a_drive_stopped_before_its_torn_copies_were_judged_is_still_known_to_be_unclean(
    tmp_path: Path,
) -> None:
    """Simulator seed 181: power cut, start, orderly stop, start: torn blocks were never made good."""
    path, _ = make_drive(tmp_path / "d")
    drives = ServedDrives()
    served = drives.open(DRIVE, path, pool_id=POOL, cluster_id=CLUSTER)
    write_copy(make_slab(served.opened()), 3, BLOCK)
    drives.close(clean=False)

    for in_service in (False, True):
        drives = ServedDrives()
        served = drives.open(DRIVE, path, pool_id=POOL, cluster_id=CLUSTER)
        assert served.opened().unclean
        if in_service:
            served.in_service.update(served.opened().slabs())
        drives.close()

    drives = ServedDrives()
    assert not drives.open(DRIVE, path, pool_id=POOL, cluster_id=CLUSTER).opened().unclean
    drives.close()


async def test_I4_a_write_does_not_overtake_an_earlier_one_that_fails_slowly(
    tmp_path: Path, nursery: Any
) -> None:
    """Simulator seed 4037: the first was still unanswered on one member when the second was sent again."""
    cluster = BlockCluster(tmp_path, nursery)
    await cluster.start()
    bus = cluster.bus("mount/n2")
    await write(bus, 0, BLOCK)
    landed: list[int] = []
    good = cluster.servers[1].copy()
    store = type(good).write_blocks

    def note(self: Any, block: int, data: Any, checksums: Any) -> None:
        if self is good:
            landed.append(bytes(data)[0])
        store(self, block, data, checksums)

    (await bus.links.connected(NodeName("n1"))).link.close()
    answers: list[int] = []
    with patch.object(type(good), "write_blocks", note):
        for number in (1, 2):
            bus.write(SLAB, 0, bytes([number]) * 4096, lambda error, number=number: answers.append(number))
        with trio.fail_after(60):
            while len(answers) < 2:
                await trio.sleep(0.005)
    assert answers == [1, 2]
    assert landed[-1] == 2
    assert all(bytes(server.copy().read_blocks(0, 1)[1])[0] == 2 for server in cluster.servers[1:])


def test_I7_a_write_that_failed_on_a_joining_copy_does_not_keep_the_pull_from_its_blocks(
    tmp_path: Path,
) -> None:
    """Simulator seed 119: a full drive joined, and held zeros where an acknowledged write was missing."""
    path, _ = make_drive(tmp_path / "d")
    drive = Drive.open(path)
    copy = make_slab(drive)
    copy.joining_begin()
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch("csvfs.block.slab_copy.os.pwrite", side_effect=full), pytest.raises(DriveFailed):
        write_copy(copy, 3, BLOCK)
    assert not copy.written_since_joining(3)
    drive.failure = None  # a write fails its drive; this rule holds for the copy by itself
    assert copy.apply_pulled_blocks(3, BLOCK, sums_of(copy, 3, BLOCK)) == 1
    assert bytes(copy.read_blocks(3, 1)[1]) == BLOCK
    drive.close()


async def test_I1_a_copy_that_lost_power_is_known_by_it_through_further_restarts_until_it_is_judged(
    tmp_path: Path, nursery: Any
) -> None:
    """Power cut, start, kill, start: the copy was preferred to one that kept all that was acknowledged."""
    cluster = BlockCluster(tmp_path, nursery)
    await cluster.start()
    await write(cluster.bus("mount/n2"), 0, BLOCK)
    victim = cluster.servers[0]
    links = cluster.links("coordinator", incarnation=2)

    async def lost() -> bool:
        (row,) = await links.call("n1", "list_slabs", {"drive": victim.drive_id}, timeout_s=30)
        return bool(row[5])

    with patch("csvfs.block.drive.machine_boot_id", return_value=b"another boot    "):
        for _ in range(2):
            await victim.kill()
            await victim.start(nursery)
            assert await lost()
        descriptor = cluster.owner.descriptors[SLAB]
        kept_all = cluster.servers[2].drive_id  # it starts later than the one that lost power
        verdict = judge(descriptor, (), (victim.drive_id, kept_all), (victim.drive_id,))
        assert verdict.kept == kept_all and victim.drive_id in verdict.drops
        items = [[victim.drive_id, SLAB, 2, ROLE_IN_SYNC]]
        args = {"term": 2, "items": items, "alone": [0]}
        answer = await links.call("n1", "install", args, timeout_s=30)
        ((*which, _, opens),) = answer["lost"]
        assert which == [victim.drive_id, SLAB] and await lost()  # to be written down first
        answer = await links.call("n1", "install", {**args, "accepted": [[0, opens - 1]]}, timeout_s=30)
        assert answer["lost"], "what was accepted was an earlier loss"
        answer = await links.call("n1", "install", {**args, "accepted": [[0, opens]]}, timeout_s=30)
        assert answer == {"refused": [], "lost": []}
        with trio.fail_after(60):
            while await lost():
                await trio.sleep(0.01)
        await victim.kill()
        await victim.start(nursery)
        assert not await lost()


async def test_I8_a_drive_whose_flush_failed_says_so_in_the_very_next_hello(tmp_path: Path, nursery: Any) -> None:
    """It said "ok" until the watch had taken it out, and got new slabs and writers meanwhile."""
    cluster = BlockCluster(tmp_path, nursery)
    await cluster.start()
    victim = cluster.servers[0]
    assert victim.service is not None
    served = victim.service.drives.by_id(victim.drive_id)
    served.opened().fail("flush: Input/output error", IO_ERROR)
    rows = DriveCalls(victim.service, victim.service.engine).drives(None, {})  # type: ignore[arg-type]
    assert rows[0]["state"] == "failed: flush: Input/output error"
    assert drive_report(served)["fault"] == IO_ERROR
