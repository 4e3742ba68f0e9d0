"""What this mount waits for, in words: for `csvfs why`, and the mode of its I/O for `csvfs volume status`.

Place      mount floor. Pure: from facts and now to rows.
Modes      direct: reads and writes go to the drive servers. redirected: to some only through another node, for want of a
           path, or to the coordinator; slower, and nothing else changes. paused: something waits, and goes on by itself within the
           io_timeout. unavailable: it has waited longer, so programs get errors, or is known to be in vain.
"""

from dataclasses import dataclass, field
from typing import Any

DIRECT, REDIRECTED, PAUSED, UNAVAILABLE = "direct", "redirected", "paused", "unavailable"
CALL_S_MIN = 1.0  # a shorter call is work, not waiting; eviction of a dead mount takes longer
SLAB_S_MIN = 0.5
ROWS_MAX = 200
WORDS_MAX = 300


@dataclass(slots=True, frozen=True)
class CallWait:
    """A call to the coordinator without an answer."""

    name: str
    args: dict[str, Any]
    since_s: float  # seconds of the trio clock
    error: str = ""  # of the last try


@dataclass(slots=True, frozen=True)
class SlabWait:
    """Writes to a slab that its members have not all taken."""

    slab: int
    writes: int
    since_s: float
    reason: str
    in_vain: bool = False


@dataclass(slots=True, frozen=True)
class Detour:
    """What is reached through another node only."""

    what: str
    via: str
    why: str  # the straight path is not taken


@dataclass(slots=True, frozen=True)
class Facts:
    """`contact_s`, `unlinked_s`: seconds of the trio clock, since when; None: never, or not so."""

    now_s: float
    io_timeout_s: float
    lapsed: bool = False  # the node's lease ended
    serving: bool = True
    has_owner: bool = True
    unlinked_s: float | None = None  # since when there is no link to a coordinator
    calls: list[CallWait] = field(default_factory=list)
    slabs: list[SlabWait] = field(default_factory=list)
    detours: list[Detour] = field(default_factory=list)


def rows(facts: Facts) -> list[dict[str, Any]]:
    """What waits, the longest first: maps with what, since_s (how long), on, next; slab or ino where known."""
    found = [row for row in (_without_coordinator(facts), _without_lease(facts)) if row is not None]
    for wait in facts.slabs:
        if facts.now_s - wait.since_s >= SLAB_S_MIN:
            what = f"{_counted(wait.writes, 'write')} to slab {wait.slab}"
            found.append(_row(facts, what, wait.since_s, wait.reason or "its drives", slab=wait.slab))
    for call in facts.calls:
        if facts.now_s - call.since_s >= CALL_S_MIN:
            found.append(_call_row(facts, call))
    return sorted(found, key=lambda row: -row["since_s"])[:ROWS_MAX]


def mode(facts: Facts) -> tuple[str, str]:
    """The mode, and why; the reason of `direct` is empty."""
    for row in (_without_lease(facts), _without_coordinator(facts)):
        if row is not None:
            is_over = row["since_s"] > facts.io_timeout_s
            return (UNAVAILABLE if is_over else PAUSED), str(row["on"])
    if not facts.serving:
        return PAUSED, "the coordinator has not been heard for 4 s"
    stuck = [row for row in rows(facts) if "slab" in row]
    in_vain = {wait.slab for wait in facts.slabs if wait.in_vain}
    if not stuck:
        return _unstuck(facts)
    slabs = {row["slab"] for row in stuck}
    words = f"slab {stuck[0]['slab']}" if len(slabs) == 1 else f"{len(slabs)} slabs"
    return (UNAVAILABLE if slabs <= in_vain else PAUSED), f"{words}: {stuck[0]['on']}"[:WORDS_MAX]


def _unstuck(facts: Facts) -> tuple[str, str]:
    if not facts.detours:
        return DIRECT, ""
    ways = "; ".join(f"{detour.what} through {detour.via}" for detour in facts.detours)
    reasons = "; ".join(dict.fromkeys(detour.why for detour in facts.detours if detour.why))
    return REDIRECTED, (f"{ways} ({reasons})" if reasons else ways)[:WORDS_MAX]


def news(facts: Facts) -> dict[str, Any]:
    """What is told to the coordinator: mode, why, and whether I/O waits for a slab, so that recalls may take long."""
    found, why = mode(facts)
    return {"mode": found, "why": why, "busy": any("slab" in row for row in rows(facts))}


def _without_coordinator(facts: Facts) -> dict[str, Any] | None:
    if facts.unlinked_s is None:
        return None
    if facts.has_owner:
        on = "no connection to the coordinator"
        next_step = "it is connected to again all the time; the cluster gives the volume another one if it is gone"
    else:
        on = "no coordinator is elected"
        next_step = "a node takes the volume as soon as the cluster store and its metadata slabs can be reached"
    return {**_row(facts, "everything but what is cached here", facts.unlinked_s, on), "next": next_step}


def _without_lease(facts: Facts) -> dict[str, Any] | None:
    if not facts.lapsed:
        return None
    on = "this node's lease in the cluster store has ended"
    return {
        **_row(facts, "all reads and writes", facts.now_s, on),
        "next": "its processes start anew under the next lease, once the store can be reached",
    }


def _call_row(facts: Facts, call: CallWait) -> dict[str, Any]:
    slab, ino = call.args.get("slab"), call.args.get("ino")
    if call.name == "slab_failed" and isinstance(slab, int):
        on = call.error or "its coordinator changes its members"
        return _row(facts, f"reads or writes of slab {slab}", call.since_s, on, slab=slab)
    if call.name == "lock" and isinstance(ino, int):
        row = _row(facts, f"a file lock of inode {ino}", call.since_s, call.error or "another program's lock", ino=ino)
        return {**row, "next": "it goes on when that program gives its lock up, or ends"}
    what = f"{call.name} of inode {ino}" if isinstance(ino, int) else call.name
    on = call.error or "the coordinator's answer: it recalls leases, takes space, or writes its log"
    return _row(facts, what, call.since_s, on, **({"ino": ino} if isinstance(ino, int) else {}))


def _row(facts: Facts, what: str, since_s: float, on: str, **more: Any) -> dict[str, Any]:
    waited_s = max(0.0, facts.now_s - since_s)
    left_s = facts.io_timeout_s - waited_s
    if left_s > 0:
        next_step = f"it is tried all the time; after another {left_s:.0f} s (io_timeout_ms) programs get an error"
    else:
        next_step = "programs get errors; it is tried all the time"
    return {"what": what, "since_s": round(waited_s, 1), "on": on[:WORDS_MAX], "next": next_step, **more}


def _counted(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count} {what}s"
