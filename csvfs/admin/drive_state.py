"""The state of a drive in the words that administrators know, and why.

Place      admin floor. Pure: what the cluster store and the drive server say in, one answer out.
Words      as in S2D. What keeps a drive from being used comes first, then what was decided about it, then what is
           odd about one that works. Only maintenance comes before all: it says that somebody is at it.
Not here   S2D's "Split" (a csvfs drive belongs to one pool by its id; one of another pool is "Unrecognized metadata")
           and "Updating firmware". "Stale metadata" is a drive that is not the one its path should hold; of copies
           that merely missed writes the reason of an "OK" drive speaks.
"""

from dataclasses import dataclass
from typing import Any

from csvfs.block import drive_faults

HEALTHY, WARNING, UNHEALTHY = "Healthy", "Warning", "Unhealthy"

OK = "OK"
LOST_COMMUNICATION = "Lost communication"
IO_ERROR = "IO error"
TRANSIENT_ERROR = "Transient error"
ABNORMAL_LATENCY = "Abnormal latency"
RETIRED = "Retired"
REMOVING = "Removing"
IN_MAINTENANCE = "In maintenance"
STALE_METADATA = "Stale metadata"
FOREIGN_METADATA = "Unrecognized metadata"
FAILED_MEDIA = "Failed media"
PREDICTIVE_FAILURE = "Predictive failure"
STARTING = "Starting"
NOT_USABLE = "Not usable"

# A drive gave so many errors since it was opened that the next ones are to be expected.
ERRORS_PREDICT_FAILURE = 1000
TRANSIENT_FOR_S = 3600  # how long after it failed and came back it is still spoken of

_REPLACE = "csvfs drive retire it, and replace it"
_RESET = "csvfs drive reset makes a new drive of it; its slabs are rebuilt from other copies"

# fault -> health, state, what to do
_OF_FAULT = {
    drive_faults.MISSING: (WARNING, LOST_COMMUNICATION, "attach it again; or csvfs drive remove it"),
    drive_faults.DELETED: (WARNING, LOST_COMMUNICATION, "put its file back; or csvfs drive remove it"),
    drive_faults.IN_USE: (UNHEALTHY, NOT_USABLE, "end the process that uses it"),
    drive_faults.READ_ONLY: (UNHEALTHY, NOT_USABLE, "make it writable; it is tried again by itself"),
    drive_faults.FULL: (WARNING, IO_ERROR, "make room on the file system that its file lies on"),
    drive_faults.TRUNCATED: (UNHEALTHY, FAILED_MEDIA, _RESET),
    drive_faults.OVERWRITTEN: (UNHEALTHY, FAILED_MEDIA, _RESET),
    drive_faults.DAMAGED: (UNHEALTHY, FAILED_MEDIA, _RESET),
    drive_faults.FOREIGN: (UNHEALTHY, FOREIGN_METADATA, "attach the right drive at its path; or csvfs drive remove it"),
    drive_faults.SWAPPED: (UNHEALTHY, STALE_METADATA, "give both drives their own paths (/dev/disk/by-id)"),
    drive_faults.IO_ERROR: (WARNING, IO_ERROR, f"it is tried again by itself; if it keeps failing {_REPLACE}"),
    drive_faults.HANGS: (WARNING, IO_ERROR, f"it is opened again once it answers; if it keeps hanging {_REPLACE}"),
    drive_faults.NOT_OPENED: (WARNING, STARTING, ""),
}
assert set(_OF_FAULT) == drive_faults.FAULTS


@dataclass(slots=True, frozen=True)
class DriveCondition:
    health: str
    state: str
    reason: str = ""  # one line; empty: the state says it all
    next_step: str = ""  # what an administrator can do; empty: nothing needs to be done

    @property
    def is_ok(self) -> bool:
        return self.health == HEALTHY


def usage_of(row: dict[str, Any]) -> str:
    """`auto`, `retired`, `removing`, `removed` or `maintenance`, from a `drives/<id>` value."""
    usage = row.get("usage") or "auto"
    state = row.get("state") or "ok"
    return str(state) if usage == "auto" and state in ("retired", "removing", "maintenance") else str(usage)


def condition_of(
    row: dict[str, Any],
    *,
    node_alive: bool,
    server_runs: bool,
    answered: bool,
    reported: dict[str, Any] | None,
) -> DriveCondition:
    """A drive's condition.

    Args  row: the value of its key in the store. node_alive: its node's lease holds. server_runs: its drive server
          is registered; answered: and answered us. reported: what that said of this drive (PROTOCOL.md, "status").
    """
    usage, node = usage_of(row), row.get("node")
    found = _condition_itself(usage, node, node_alive, server_runs, answered, reported)
    if usage == "maintenance":
        beside = "" if found.is_ok else f"{found.state}: {found.reason}" if found.reason else found.state
        return DriveCondition(WARNING, IN_MAINTENANCE, beside, "when done: csvfs drive maintenance off")
    if found.is_ok and usage in ("removing", "retired"):
        return _decided(usage, str(row.get("why") or ""), reported or {})
    return found


def _condition_itself(
    usage: str, node: Any, node_alive: bool, server_runs: bool, answered: bool, reported: dict[str, Any] | None
) -> DriveCondition:
    """Whatever was decided about it."""
    if not node_alive:
        return DriveCondition(WARNING, LOST_COMMUNICATION, f"node {node} is down", f"start node {node}")
    if not server_runs:
        text = f"node {node} runs no drive server now"
        return DriveCondition(WARNING, LOST_COMMUNICATION, text, f"see logs/drives.log of node {node}")
    if not answered:
        text = f"the drive server of {node} does not answer"
        return DriveCondition(WARNING, LOST_COMMUNICATION, text, f"see logs/drives.log of node {node}")
    if reported is None:
        return DriveCondition(WARNING, STARTING, "its drive server has not opened it yet")
    state = str(reported.get("state") or "ok")
    if usage == "removed":  # its server has closed it, or is about to
        return DriveCondition(WARNING, REMOVING, "nothing is left on it", "csvfs drive remove takes it out")
    if state != "ok":
        fault = str(reported.get("fault") or drive_faults.IO_ERROR)
        health, word, step = _OF_FAULT.get(fault, (UNHEALTHY, NOT_USABLE, ""))
        return DriveCondition(health, word, state, step)
    if usage in ("removing", "retired"):
        return DriveCondition(HEALTHY, OK)  # what was decided is more to the point than what is odd about it
    return _condition_of_serving(reported)


def _decided(usage: str, why: str, reported: dict[str, Any]) -> DriveCondition:
    word = REMOVING if usage == "removing" else RETIRED
    left = _count(reported, "slots") - _count(reported, "free_slots")
    reason = "; ".join(text for text in (why, f"{left} slabs are left on it" if left else "it is empty") if text)
    if left:
        return DriveCondition(WARNING, word, reason, "csvfs job list shows how far it is; csvfs drive retire --undo keeps it")
    step = "csvfs drive remove takes it out" + ("" if usage == "removing" else ", csvfs drive reset makes it new")
    return DriveCondition(WARNING, word, reason, step)


def _condition_of_serving(reported: dict[str, Any]) -> DriveCondition:
    if reported.get("slow"):
        step = "it is retired by itself when it stays so"
        return DriveCondition(WARNING, ABNORMAL_LATENCY, _latency_text(reported.get("latency")), step)
    quarantined = reported.get("quarantined")
    if isinstance(quarantined, list) and quarantined:
        return DriveCondition(WARNING, PREDICTIVE_FAILURE, f"{len(quarantined)} of its slots are damaged", _REPLACE)
    counters = reported.get("counters")
    errors = _count(counters, "io_errors") + _count(counters, "checksum_errors")
    if errors >= ERRORS_PREDICT_FAILURE:
        return DriveCondition(WARNING, PREDICTIVE_FAILURE, f"{errors} errors since it was opened", _REPLACE)
    if _count(counters, "io_errors"):
        text = f"{_count(counters, 'io_errors')} I/O errors since it was opened"
        return DriveCondition(WARNING, TRANSIENT_ERROR, text, f"if it goes on {_REPLACE}")
    ago_s = reported.get("failed_ago_s")
    if isinstance(ago_s, int | float) and ago_s < TRANSIENT_FOR_S:
        text = f"failed {_count(reported, 'failures')} times, last {ago_s / 60:.0f} min ago: {reported.get('last_failure')}"
        return DriveCondition(WARNING, TRANSIENT_ERROR, text, f"if it goes on {_REPLACE}")
    stale = _count(reported, "stale")
    if stale:
        return DriveCondition(HEALTHY, OK, f"{stale} of its copies are being brought up to date")
    return DriveCondition(HEALTHY, OK)


def _count(counters: Any, name: str) -> int:
    value = counters.get(name) if isinstance(counters, dict) else None
    return value if isinstance(value, int) else 0


def _latency_text(latency: Any) -> str:
    if not isinstance(latency, dict):
        return ""
    parts = [
        f"{kind} {row['now_ms']:.0f} ms" for kind, row in latency.items()
        if isinstance(row, dict) and isinstance(row.get("now_ms"), int | float) and row["now_ms"] >= 1
    ]  # fmt: skip
    return ", ".join(parts)
