"""A drive's condition, from what the store and its drive server say; and what the machine knows of its device."""

import pytest

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
