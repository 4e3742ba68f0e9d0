"""The state of a drive in the words that administrators know, and why.

Place      admin floor. Pure: what the cluster store and the drive server say in, one answer out.
Words      as in S2D. What keeps a drive from being used comes first, then what was decided about it, then what is
           odd about one that works.
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

_OF_FAULT = {
    drive_faults.MISSING: (WARNING, LOST_COMMUNICATION),
    drive_faults.DELETED: (WARNING, LOST_COMMUNICATION),
    drive_faults.IN_USE: (UNHEALTHY, NOT_USABLE),
    drive_faults.READ_ONLY: (UNHEALTHY, NOT_USABLE),
    drive_faults.FULL: (WARNING, IO_ERROR),
    drive_faults.TRUNCATED: (UNHEALTHY, FAILED_MEDIA),
    drive_faults.OVERWRITTEN: (UNHEALTHY, FAILED_MEDIA),
    drive_faults.DAMAGED: (UNHEALTHY, FAILED_MEDIA),
    drive_faults.FOREIGN: (UNHEALTHY, FOREIGN_METADATA),
    drive_faults.SWAPPED: (UNHEALTHY, STALE_METADATA),
    drive_faults.IO_ERROR: (WARNING, IO_ERROR),
    drive_faults.HANGS: (WARNING, IO_ERROR),
    drive_faults.NOT_OPENED: (WARNING, STARTING),
}
assert set(_OF_FAULT) == drive_faults.FAULTS


@dataclass(slots=True, frozen=True)
class DriveCondition:
    health: str
    state: str
    reason: str = ""  # one line; empty: the state says it all

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
    if usage == "maintenance":
        return DriveCondition(WARNING, IN_MAINTENANCE)
    if not node_alive:
        return DriveCondition(WARNING, LOST_COMMUNICATION, f"node {node} is down")
    if not server_runs:
        return DriveCondition(WARNING, LOST_COMMUNICATION, f"node {node} runs no drive server now")
    if not answered:
        return DriveCondition(WARNING, LOST_COMMUNICATION, f"the drive server of {node} does not answer")
    if reported is None:
        return DriveCondition(WARNING, STARTING, "its drive server has not opened it yet")
    state = str(reported.get("state") or "ok")
    if usage == "removed":  # its server has closed it, or is about to
        return DriveCondition(WARNING, REMOVING)
    if state != "ok":
        fault = str(reported.get("fault") or drive_faults.IO_ERROR)
        health, word = _OF_FAULT.get(fault, (UNHEALTHY, NOT_USABLE))
        return DriveCondition(health, word, state)
    decided = {"removing": REMOVING, "retired": RETIRED}.get(usage)
    if decided is not None:
        return DriveCondition(WARNING, decided, str(row.get("why") or ""))
    return _condition_of_serving(reported)


def _condition_of_serving(reported: dict[str, Any]) -> DriveCondition:
    if reported.get("slow"):
        return DriveCondition(WARNING, ABNORMAL_LATENCY, _latency_text(reported.get("latency")))
    quarantined = reported.get("quarantined")
    if isinstance(quarantined, list) and quarantined:
        return DriveCondition(WARNING, PREDICTIVE_FAILURE, f"{len(quarantined)} of its slots are damaged")
    counters = reported.get("counters")
    errors = _count(counters, "io_errors") + _count(counters, "checksum_errors")
    if errors >= ERRORS_PREDICT_FAILURE:
        return DriveCondition(WARNING, PREDICTIVE_FAILURE, f"{errors} errors since it was opened")
    if _count(counters, "io_errors"):
        return DriveCondition(WARNING, TRANSIENT_ERROR, f"{_count(counters, 'io_errors')} I/O errors")
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
