"""A drive's condition, from what the store and its drive server say; and what the machine knows of its device."""

import pytest

from csvfs.admin.drive_space import DriveFill, hot_points, pool_percent
from csvfs.admin.drive_state import (
    ABNORMAL_LATENCY,
    FAILED_MEDIA,
    FOREIGN_METADATA,
    HEALTHY,
    IN_MAINTENANCE,
    IO_ERROR,
    LOST_COMMUNICATION,
    NOT_USABLE,
    OK,
    PREDICTIVE_FAILURE,
    REMOVING,
    RETIRED,
    STALE_METADATA,
    STARTING,
    TRANSIENT_ERROR,
    TRANSIENT_FOR_S,
    condition_of,
)
from csvfs.block import device_facts as facts_module
from csvfs.block import drive_faults
from csvfs.block.device_facts import device_facts

SERVING = {"state": "ok", "counters": {"io_errors": 0, "checksum_errors": 3}, "quarantined": []}


def condition(row=None, reported=SERVING, **changes):
    known = {"node_alive": True, "server_runs": True, "answered": True, **changes}
    return condition_of({"node": "n1", "state": "ok", **(row or {})}, reported=reported, **known)


def test_a_drive_that_serves_is_ok():
    assert (condition().health, condition().state, condition().reason) == (HEALTHY, OK, "")


@pytest.mark.parametrize(
    ("fault", "state"),
    [
        (drive_faults.MISSING, LOST_COMMUNICATION),
        (drive_faults.DELETED, LOST_COMMUNICATION),
        (drive_faults.FULL, IO_ERROR),
        (drive_faults.IO_ERROR, IO_ERROR),
        (drive_faults.TRUNCATED, FAILED_MEDIA),
        (drive_faults.DAMAGED, FAILED_MEDIA),
        (drive_faults.FOREIGN, FOREIGN_METADATA),
        (drive_faults.SWAPPED, STALE_METADATA),
        (drive_faults.READ_ONLY, NOT_USABLE),
        (drive_faults.IN_USE, NOT_USABLE),
        (drive_faults.NOT_OPENED, STARTING),
    ],
)
def test_a_fault_has_its_word_and_keeps_its_reason(fault, state):
    found = condition(reported={"state": "drive /d: why", "fault": fault})
    assert (found.state, found.reason) == (state, "drive /d: why")
    assert found.health != HEALTHY


def test_a_drive_that_cannot_be_asked_has_lost_communication_and_says_at_what():
    assert condition(node_alive=False).state == LOST_COMMUNICATION
    assert "down" in condition(node_alive=False).reason
    assert "runs no drive server" in condition(server_runs=False).reason
    assert "does not answer" in condition(answered=False, reported=None).reason
    assert condition(reported=None).state == STARTING


def test_what_was_decided_is_shown_unless_the_drive_is_broken_too():
    assert condition({"usage": "retired", "why": "slow"}).state == RETIRED
    assert condition({"usage": "removing"}).state == REMOVING
    assert condition({"usage": "maintenance"}, node_alive=False).state == IN_MAINTENANCE
    broken = {"state": "gone", "fault": drive_faults.MISSING}
    assert condition({"usage": "retired"}, reported=broken).state == LOST_COMMUNICATION


def test_what_is_odd_about_a_drive_that_works():
    slow = condition(reported={**SERVING, "slow": True, "latency": {"flush": {"now_ms": 812.4}}})
    assert (slow.state, slow.reason) == (ABNORMAL_LATENCY, "flush 812 ms")
    assert condition(reported={**SERVING, "quarantined": [3]}).state == PREDICTIVE_FAILURE
    assert condition(reported={**SERVING, "counters": {"io_errors": 2}}).state == TRANSIENT_ERROR


def test_a_drive_that_failed_lately_and_serves_again_had_a_transient_error():
    back = {**SERVING, "failures": 2, "last_failure": "cannot write: Input/output error", "failed_ago_s": 120.0}
    found = condition(reported=back)
    assert (found.state, found.reason) == (
        TRANSIENT_ERROR, "failed 2 times, last 2 min ago: cannot write: Input/output error",
    )  # fmt: skip
    assert "retire" in found.next_step
    assert condition(reported={**back, "failed_ago_s": TRANSIENT_FOR_S + 1}).state == OK


def test_copies_that_missed_writes_are_spoken_of_and_make_no_drive_bad():
    found = condition(reported={**SERVING, "stale": 3})
    assert (found.state, found.is_ok) == (OK, True)
    assert found.reason == "3 of its copies are being brought up to date"


def test_a_drive_in_maintenance_says_beside_it_how_it_is():
    found = condition({"usage": "maintenance"}, node_alive=False)
    assert (found.state, found.reason) == (IN_MAINTENANCE, "Lost communication: node n1 is down")
    assert condition({"usage": "maintenance"}).reason == ""
    assert "maintenance off" in condition({"usage": "maintenance"}).next_step


def test_a_drive_that_is_being_emptied_says_what_is_left_and_then_how_to_finish():
    half = condition({"usage": "removing"}, {**SERVING, "slots": 15, "free_slots": 9})
    assert (half.state, half.reason) == (REMOVING, "6 slabs are left on it")
    empty = condition({"usage": "retired", "why": "slow"}, {**SERVING, "slots": 15, "free_slots": 15})
    assert (empty.state, empty.reason) == (RETIRED, "slow; it is empty")
    assert "csvfs drive remove" in empty.next_step and "csvfs drive reset" in empty.next_step


def test_whoever_has_to_act_is_told_what_to_do():
    for fault in drive_faults.FAULTS - {drive_faults.NOT_OPENED}:
        assert condition(reported={"state": "why", "fault": fault}).next_step


def test_a_hot_spot_is_fuller_than_the_pool_and_retired_drives_count_for_nothing():
    fills = [DriveFill(100, 60, True), DriveFill(300, 90, True), DriveFill(100, 100, False)]
    pool = pool_percent(fills)
    assert pool == 37.5
    assert [hot_points(fill, pool) for fill in fills] == [22.5, 0.0, 0.0]
    assert hot_points(DriveFill(100, 42, True), pool) == 0.0, "level enough"
    assert (pool_percent([]), DriveFill(0, 0, True).percent) == (0.0, 0.0)


def test_the_kind_of_a_device_is_that_of_its_disk(tmp_path, monkeypatch):
    """A partition of an SSD, in a /sys of our own."""
    disk = tmp_path / "devices" / "sda"
    (disk / "queue").mkdir(parents=True)
    (disk / "queue" / "rotational").write_text("0\n")
    (disk / "device").mkdir()
    (disk / "device" / "serial").write_text("S123\n")
    (disk / "sda1").mkdir()
    number = (tmp_path / "file").touch() or (tmp_path / "file").stat().st_dev
    sys_block = tmp_path / "sys"
    sys_block.mkdir()
    (sys_block / f"{number >> 8 & 0xFFF}:{number & 0xFF | number >> 12 & 0xFFF00}").symlink_to(disk / "sda1")
    monkeypatch.setattr(facts_module, "SYS_BLOCK", sys_block)
    found = device_facts(str(tmp_path / "file"))
    assert (found.kind, found.device, found.serial) == ("ssd", "/dev/sda1", "S123")


def test_a_device_of_which_nothing_is_known_has_no_kind():
    assert device_facts("/nonexistent").kind == ""
