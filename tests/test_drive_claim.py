"""Claiming drives: what is taken without a human having named it, and above all what is not."""

import os
from pathlib import Path
from typing import Any

import pytest
import trio

from csvfs.admin import claim_watch, drive_claim
from csvfs.admin.claim_watch import claim_forever, claim_once
from csvfs.admin.cluster_view import read_cluster_view
from csvfs.admin.drive_claim import ClaimCandidate, ClaimRules, Sightings, list_candidates
from csvfs.admin.drive_ops import add_drives
from csvfs.admin.pool_ops import create_cluster, create_pool, set_auto_claim
from csvfs.block import device_facts, whole_disks
from csvfs.block.blankness import ENDS_SIZE, find_data
from csvfs.block.whole_disks import DiskFacts
from csvfs.cluster.membership import View, keep_view_forever
from csvfs.config import NodeConfig, parse_config
from csvfs.errors import DriveRefused
from csvfs.ids import PoolId
from csvfs.store.opening import open_store
from csvfs.units import GIB, MIB
from tests.drive_files import CLUSTER, DRIVE, DRIVE_SIZE, POOL, SLAB_SIZE, blank_file, make_drive, overwrite


@pytest.fixture(autouse=True)
def no_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at the disks of this machine."""
    monkeypatch.setattr(drive_claim, "whole_disks", list)


def rules(*entries: object, **changes: Any) -> ClaimRules:
    values = {
        "entries": tuple(str(entry) for entry in entries), "config_path": Path("/etc/csvfs/node.toml"),
        "cluster_root": Path("/clusterstorage"), "pool_id": POOL, "cluster_id": CLUSTER, "slab_size": SLAB_SIZE,
    }  # fmt: skip
    return ClaimRules(**{**values, **changes})


def reasons(found: list[ClaimCandidate]) -> dict[str, str]:
    return {os.path.basename(candidate.path): candidate.reason for candidate in found}


# What is blank


def test_one_byte_anywhere_in_a_file_is_found(tmp_path: Path) -> None:
    path = blank_file(tmp_path / "f", 8 * GIB)
    with open(path, "r+b") as file:
        assert find_data(file.fileno(), 8 * GIB) is None
        os.pwrite(file.fileno(), b"\1", 5 * GIB + 12_345)
        assert find_data(file.fileno(), 8 * GIB) is not None


def test_allocated_zeros_are_blank_and_more_than_can_be_read_is_not(tmp_path: Path, monkeypatch: Any) -> None:
    path = blank_file(tmp_path / "f")
    overwrite(path, 20 * MIB, bytes(MIB))
    with open(path, "rb") as file:
        assert find_data(file.fileno(), DRIVE_SIZE) is None
        monkeypatch.setattr("csvfs.block.blankness.ALLOCATED_MAX", MIB // 2)
        assert find_data(file.fileno(), DRIVE_SIZE) == 20 * MIB


def test_a_device_is_looked_at_at_its_ends_and_in_many_places_between(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("csvfs.block.blankness.stat.S_ISREG", lambda mode: False)  # as a block device
    size = 256 * MIB
    for offset in (0, ENDS_SIZE - 1, size - 1, size - ENDS_SIZE):
        path = blank_file(tmp_path / f"f{offset}", size)
        overwrite(path, offset, b"\1")
        with open(path, "rb") as file:
            assert find_data(file.fileno(), size) is not None
    path = blank_file(tmp_path / "used", size)
    overwrite(path, 100 * MIB, b"x" * (2 * MIB))  # a disk of which only the beginning was wiped
    with open(path, "rb") as file:
        assert find_data(file.fileno(), size) is not None


# What is eligible


def test_only_what_is_named_and_blank_is_eligible_and_all_else_says_why(tmp_path: Path) -> None:
    blank_file(tmp_path / "blank")
    blank_file(tmp_path / "unnamed-blank")
    blank_file(tmp_path / "small", MIB)
    overwrite(blank_file(tmp_path / "data"), 40 * MIB, b"somebody's")
    overwrite(blank_file(tmp_path / "ext4"), 1080, b"\x53\xef")
    os.chmod(blank_file(tmp_path / "readonly"), 0o400)
    (tmp_path / "folder").mkdir()
    found = reasons(list_candidates(rules(tmp_path / "[!u]*", tmp_path / "absent")))
    assert found["blank"] == "" and "unnamed-blank" not in found
    assert found["small"].startswith("too small") and found["readonly"] == "read-only"
    assert found["data"].startswith(f"not blank: data near byte {40 * MIB}")
    assert found["ext4"] == "not blank: file system ext4"
    assert found["folder"] == "neither a file nor a block device"
    assert found["absent"] == "cannot be looked at: No such file or directory"


def test_drives_of_this_pool_of_another_and_one_that_was_removed_are_told_apart(tmp_path: Path) -> None:
    make_drive(tmp_path / "d")
    known = {DRIVE.hex(): ("n1", str(tmp_path / "d"), "")}
    assert reasons(list_candidates(rules(tmp_path / "d", drives=known)))["d"] == f"in the pool: drive {DRIVE.hex()[:8]}"
    assert reasons(list_candidates(rules(tmp_path / "d")))["d"].startswith("stale metadata: was drive")
    foreign = reasons(list_candidates(rules(tmp_path / "d", pool_id=PoolId(b"q" * 16))))["d"]
    assert foreign.startswith("foreign metadata: a drive of another pool")


def test_a_file_on_a_volume_of_csvfs_is_never_a_drive_of_it(tmp_path: Path) -> None:
    blank_file(tmp_path / "f")
    assert "volume of csvfs" in reasons(list_candidates(rules(tmp_path / "f", cluster_root=tmp_path)))["f"]


def disk(path: str, identity: str = "", unsuitable: str = "") -> DiskFacts:
    return DiskFacts(path, "ssd", DRIVE_SIZE, identity, unsuitable)


def test_a_blank_disk_that_nobody_named_is_shown_and_not_taken(tmp_path: Path, monkeypatch: Any) -> None:
    path = blank_file(tmp_path / "sdb")
    monkeypatch.setattr(drive_claim, "whole_disks", lambda: [disk(path), disk("/dev/loop0", unsuitable="virtual")])
    (found,) = list_candidates(rules())
    assert not found.eligible
    assert found.reason == "eligible, but no entry of [drives] claim in /etc/csvfs/node.toml names it"


def test_what_a_pattern_matches_must_be_a_whole_local_disk_and_what_is_named_in_full_need_not(
    tmp_path: Path, monkeypatch: Any
) -> None:
    path = blank_file(tmp_path / "sdb1")
    partition = disk(path, unsuitable="a partition, not a whole disk")
    monkeypatch.setattr(drive_claim, "disk_facts", lambda number: partition)
    monkeypatch.setattr(drive_claim.stat, "S_ISBLK", lambda mode: True)
    monkeypatch.setattr(drive_claim, "check_drive", lambda *args, **more: None)
    assert reasons(list_candidates(rules(tmp_path / "sd*")))["sdb1"] == "a partition, not a whole disk"
    assert reasons(list_candidates(rules(path)))["sdb1"] == ""
    assert reasons(list_candidates(rules(tmp_path / "sd*", path)))["sdb1"] == "", "the exact entry counts"


def test_a_disk_that_is_there_twice_is_not_taken_twice(tmp_path: Path, monkeypatch: Any) -> None:
    path = blank_file(tmp_path / "sdb")
    here = disk(path, "naa.1")
    monkeypatch.setattr(drive_claim, "disk_facts", lambda number: here)
    monkeypatch.setattr(drive_claim.stat, "S_ISBLK", lambda mode: True)
    monkeypatch.setattr(drive_claim, "check_drive", lambda *args, **more: None)
    monkeypatch.setattr(drive_claim, "whole_disks", lambda: [here, disk("/dev/sdc", "naa.1")])
    found = reasons(list_candidates(rules(path)))
    assert found["sdb"] == "the same disk as /dev/sdc, by another path"
    monkeypatch.setattr(drive_claim, "whole_disks", lambda: [here])
    elsewhere = {"ab" * 16: ("n2", "/dev/sdx", "naa.1")}
    assert "the same disk as drive abababab (/dev/sdx on n2)" in reasons(list_candidates(rules(path, drives=elsewhere)))["sdb"]


def test_what_the_kernel_says_of_a_disk_decides_whether_a_pattern_may_take_it(tmp_path: Path, monkeypatch: Any) -> None:
    devices = {
        "vda": "pci0/virtio1/block/vda", "sdb": "pci0/usb1/1-1/host1/block/sdb", "loop0": "virtual/block/loop0",
        "sdc": "platform/host2/session1/target2/block/sdc", "nvme0n1": "virtual/nvme-subsystem/s0/nvme0n1",
        "sr0": "pci0/host3/block/sr0", "sdd": "pci0/host4/block/sdd",
    }  # fmt: skip
    for name, place in devices.items():
        directory = tmp_path / "devices" / place
        (directory / "queue").mkdir(parents=True)
        (directory / "size").write_text("0\n" if name == "sdd" else "2048\n")
        (directory / "removable").write_text("1\n" if name == "sr0" else "0\n")
        (directory / "queue" / "rotational").write_text("1\n")
        (directory / "wwid").write_text({"vda": "eui.52540012", "nvme0n1": "eui.0025385b"}.get(name, "t10.ATA QM1") + "\n")
        (tmp_path / name).symlink_to(directory)
    (tmp_path / "devices/pci0/virtio1/block/vda/vda1").mkdir()
    (tmp_path / "devices/pci0/virtio1/block/vda/vda1/partition").write_text("1\n")
    monkeypatch.setattr(whole_disks, "SYS_DISKS", tmp_path)
    (tmp_path / "8:1").symlink_to(tmp_path / "devices/pci0/virtio1/block/vda/vda1")
    monkeypatch.setattr(whole_disks, "SYS_BLOCK", tmp_path)
    found = {row.path: row for row in whole_disks.whole_disks() if row.path != "/dev/8:1"}
    assert {path: row.unsuitable for path, row in found.items()} == {
        "/dev/vda": "", "/dev/nvme0n1": "", "/dev/sdb": "removable media", "/dev/sr0": "removable media",
        "/dev/loop0": "a virtual device (loop0)",
        "/dev/sdc": "attached through a network: other machines may use it",
    }  # fmt: skip
    assert found["/dev/nvme0n1"].kind == device_facts.NVME and found["/dev/vda"].kind == device_facts.HDD
    assert found["/dev/nvme0n1"].identity == "eui.0025385b" and found["/dev/vda"].identity == ""
    partition = whole_disks.disk_facts("8:1")
    assert partition is not None and partition.unsuitable == "a partition, not a whole disk"
    assert whole_disks.disk_facts("8:2") is None


# Two looks


def seen(sighting: object, eligible: bool = True) -> ClaimCandidate:
    return ClaimCandidate("/d", "", 0, "file", eligible, "" if eligible else "no", "", sighting=(sighting,))


def test_only_what_was_eligible_and_the_same_at_every_look_for_long_enough_is_ripe() -> None:
    sightings = Sightings(settle_s=10)
    assert sightings.ripe([seen(1)], 0.0) == []
    assert sightings.ripe([seen(1)], 9.0) == []
    assert sightings.ripe([seen(1)], 10.0) == [seen(1)]
    assert sightings.ripe([seen(2)], 20.0) == [], "changed"
    assert sightings.ripe([seen(2, eligible=False)], 40.0) == [], "not blank for a moment"
    assert sightings.ripe([seen(2)], 50.0) == [], "so it begins anew"
    assert sightings.ripe([], 51.0) == []
    assert sightings.ripe([seen(2)], 70.0) == [], "and when it was unplugged"


def test_a_long_pause_does_not_make_one_look_two() -> None:
    assert Sightings(settle_s=10).ripe([seen(1)], 1000.0) == []


def test_what_was_refused_lately_is_not_read_again_unless_it_changed(tmp_path: Path) -> None:
    path = overwritten = blank_file(tmp_path / "f")
    overwrite(overwritten, 40 * MIB, b"x")
    known: dict = {}
    (first,) = list_candidates(rules(path), known)
    assert known == {first.sighting: first.reason}
    known[first.sighting] = "as it was said"
    assert list_candidates(rules(path), known)[0].reason == "as it was said"
    os.truncate(path, 0)
    os.truncate(path, DRIVE_SIZE)
    assert list_candidates(rules(path), known)[0].eligible


# Claiming


@pytest.fixture
async def store(tmp_path: Path) -> Any:
    opened = open_store(f"embedded:{tmp_path}/store.db")
    await create_cluster(opened, "test")
    await create_pool(opened, "pool", SLAB_SIZE)
    yield opened
    await opened.close()


def config_of(tmp_path: Path) -> NodeConfig:
    (tmp_path / "drives").mkdir(exist_ok=True)
    text = (
        f'node = "n1"\naddress = "127.0.0.1"\nstore = "embedded:{tmp_path}/store.db"\n'
        f'[drives]\nclaim = ["{tmp_path}/drives/*"]\n[options]\ndrive_claim_after_s = 1\n'
    )
    return parse_config(text.encode(), tmp_path / "node.toml")


async def test_auto_claim_takes_a_blank_file_that_appears_and_leaves_alone_what_is_not_blank(
    tmp_path: Path, store: Any, nursery: Any
) -> None:
    config, view = config_of(tmp_path), View()
    await nursery.start(keep_view_forever, store, view)
    lease = await store.grant_lease(60_000)
    nursery.start_soon(claim_forever, config, store, view, lease)
    blank_file(tmp_path / "drives" / "before")
    await trio.sleep(3)  # two looks and more
    assert (await read_cluster_view(store)).drives == {}, "off by default"
    overwrite(blank_file(tmp_path / "drives" / "data"), 50 * MIB, b"x")
    await set_auto_claim(store, True)
    blank_file(tmp_path / "drives" / "later")
    with trio.fail_after(60):
        while len((await read_cluster_view(store)).drives) < 2:
            await trio.sleep(0.05)
    await trio.sleep(3)
    drives = (await read_cluster_view(store)).drives.values()
    assert {os.path.basename(drive.text("path")) for drive in drives} == {"before", "later"}
    assert {drive.text("added_by") for drive in drives} == {"auto-claim"}
    nursery.cancel_scope.cancel()


async def test_a_file_that_is_written_to_between_the_looks_is_not_claimed(
    tmp_path: Path, store: Any, monkeypatch: Any
) -> None:
    config = config_of(tmp_path)
    path = blank_file(tmp_path / "drives" / "f")
    looks = []

    async def write_after_the_first_look(*args: Any) -> list[ClaimCandidate]:
        found = list_candidates(drive_claim.claim_rules(config, await read_cluster_view(store)))
        if not looks:
            overwrite(path, 30 * MIB, b"x")
        looks.append(found)
        return found

    monkeypatch.setattr(claim_watch, "candidates_here", write_after_the_first_look)
    await claim_once(config, store, lambda drive: pytest.fail("claimed"))
    assert looks[0][0].eligible and not looks[1][0].eligible
    # And when it is written to after the last look, formatting itself finds out.
    with pytest.raises(DriveRefused, match="data near byte"):
        await claim_watch.claim_drive(config, store, looks[0][0], await store.grant_lease(60_000), "test")
    assert (await read_cluster_view(store)).drives == {}


async def test_of_two_nodes_that_see_one_disk_one_gets_it(tmp_path: Path, store: Any) -> None:
    config = config_of(tmp_path)
    paths = [blank_file(tmp_path / "drives" / name) for name in ("sdb", "sdc")]
    candidates = [ClaimCandidate(path, "ssd", DRIVE_SIZE, "file", True, "", "/d/*", "naa.1", (path,)) for path in paths]
    lease = await store.grant_lease(60_000)
    results: list[Any] = []

    async def claim(candidate: ClaimCandidate) -> None:
        try:
            results.append(await claim_watch.claim_drive(config, store, candidate, lease, "test"))
        except DriveRefused as error:
            results.append(error)

    async with trio.open_nursery() as nursery:
        for candidate in candidates:
            nursery.start_soon(claim, candidate)
    assert sorted(isinstance(result, DriveRefused) for result in results) == [False, True]
    assert len((await read_cluster_view(store)).drives) == 1
    assert [item.key for item in await store.list("claims/")] == []


async def test_a_drive_added_by_hand_says_so_and_a_declared_kind_stands(tmp_path: Path, store: Any) -> None:
    config = config_of(tmp_path)
    added: list[Any] = []
    await add_drives(store, config.node, [blank_file(tmp_path / "f")], added.append, "nvme")
    assert (added[0].value["kind"], added[0].value["declared"], added[0].value["added_by"]) == (
        "nvme", True, "csvfs drive add",
    )  # fmt: skip
