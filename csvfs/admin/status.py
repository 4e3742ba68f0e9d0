"""`csvfs status`: the state of the whole cluster as far as it can be learned within two seconds.

Place      admin floor. `collect_status` asks, `ClusterStatus` is the answer and the JSON; cli_status.py
           prints it.
Rule       what could not be learned is None or said in a note, never guessed and never waited for.
Words      health as in S2D: Healthy, Degraded (copies missing or stale), No redundancy (only one copy left
           of something that should have more, or none), Unknown.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import trio

from csvfs.admin import drive_state
from csvfs.admin.cluster_view import (
    VOLUME_ONLINE,
    ClusterView,
    Record,
    drive_usage,
    read_cluster_view,
    read_record,
)
from csvfs.admin.drive_space import DriveFill, hot_points, pool_percent
from csvfs.admin.io_modes import IoMode, io_modes, metadata_waits
from csvfs.admin.node_life import node_state, state_reason
from csvfs.admin.peers import Peers, answer_or_error
from csvfs.block.reserve import DriveSlots, percent_used, reserve_slots, warning_of
from csvfs.fault_domains import LEVEL_DEFAULT, Level, counted, verb
from csvfs.store.interface import ClusterStore
from csvfs.units import SLAB_SIZE_DEFAULT

COPIES_USUAL = 3  # while there is no volume yet
HEALTHY, DEGRADED, NO_REDUNDANCY, UNKNOWN = "Healthy", "Degraded", "No redundancy", "Unknown"
# What was decided about a drive: nothing is wrong with it itself.
DECIDED_STATES = (drive_state.RETIRED, drive_state.REMOVING, drive_state.IN_MAINTENANCE)
HEALTH_WORDS = (HEALTHY, DEGRADED, NO_REDUNDANCY, UNKNOWN)


@dataclass(slots=True)
class DriveStatus:
    id: str  # hex
    node: str
    path: str
    state: str  # OK, Lost communication ...: the words of drive_state.py
    size: int  # bytes for slabs
    free: int | None  # bytes; None: its server could not be asked
    counters: dict[str, Any] = field(default_factory=dict)  # since it was opened
    health: str = drive_state.HEALTHY
    reason: str = ""  # of the state
    kind: str = ""  # nvme, ssd, hdd; empty: not known
    usage: str = "auto"  # or retired, removing, removed, maintenance
    latency: dict[str, Any] = field(default_factory=dict)  # milliseconds by kind of operation
    next_step: str = ""  # what an administrator can do about the state
    slots: int = 0
    used_slots: int | None = None
    used: int | None = None  # bytes of the slots in use
    percent_used: float | None = None
    hot_points: float = 0.0  # how many points fuller than the pool, when that makes it a hot spot
    kind_declared: bool = False  # somebody said the kind; else it is as the machine says
    added: int = 0  # seconds since 1970; 0: not known
    added_by: str = ""  # auto-claim, or the command
    failures: int = 0  # since its drive server started
    last_failure: str = ""


@dataclass(slots=True)
class NodeStatus:
    name: str
    state: str  # up, down, isolated, quarantined, draining, paused
    address: str
    drives: int
    drives_bad: list[str]  # paths
    note: str = ""
    refused: dict[str, int] = field(default_factory=dict)  # connections, by net/refusals.Reason, since its processes started


@dataclass(slots=True)
class PoolStatus:
    name: str
    slab_size: int
    size: int  # bytes of all drives whose server answered
    free: int
    nodes_unknown: list[str]  # their drives are not counted
    reserve: int = 0  # bytes of the free ones that are kept for repairs
    percent_used: float = 0.0  # of what may be used
    warning: str = ""


@dataclass(slots=True)
class JobStatus:
    """Something that is being repaired."""

    volume: str
    what: str
    done: int | None = None  # bytes
    total: int | None = None
    rate: float | None = None  # bytes per second that were really copied
    waiting_for: str = ""  # why it does not go on at the moment
    kind: str = "repair"  # repair, evacuate, rebalance, scrub
    paused: bool = False
    copied: int | None = None  # bytes; done and total count whole slabs, of which a resync copies what was missed
    eta_told: float | None = None  # seconds, as the coordinator reckons

    @property
    def left(self) -> int | None:
        """Bytes."""
        return None if self.total is None or self.done is None else max(self.total - self.done, 0)

    @property
    def percent(self) -> float | None:
        if self.total is None or self.done is None:
            return None
        return 100.0 if self.total <= 0 else min(100.0, 100.0 * self.done / self.total)

    @property
    def eta_s(self) -> float | None:
        if self.eta_told is not None:
            return self.eta_told
        if self.total is None or self.done is None or not self.rate or self.rate <= 0:
            return None
        return max(self.total - self.done, 0) / self.rate


@dataclass(slots=True)
class VolumeStatus:
    name: str
    resiliency: str
    copies: int
    state: str
    coordinator: str  # node; empty: none at the moment
    health: str
    size: int | None
    free: int | None
    note: str = ""
    slabs: dict[str, Any] = field(default_factory=dict)  # counts by state, as the coordinator says
    fault_domain: str = LEVEL_DEFAULT  # no two copies in one
    misplaced: int = 0  # slabs that have two copies in one all the same
    slabs_by_copies: dict[str, Any] = field(default_factory=dict)  # of data, by how many copies are in sync
    open_files: dict[str, int] = field(default_factory=dict)  # by node, as its mount said within the last second
    io: dict[str, IoMode] = field(default_factory=dict)  # by node
    preferred: str = ""  # node that coordinates it whenever it can
    min_copies: int = 1
    size_limit: int = 0  # bytes that files may have; 0: as many as the pool gives
    scrub: dict[str, Any] = field(
        default_factory=dict
    )  # the last round; coordinator/scrub.py says what it has


@dataclass(slots=True)
class ClusterStatus:
    cluster: str | None
    nodes: list[NodeStatus]
    drives: list[DriveStatus]
    pool: PoolStatus | None
    volumes: list[VolumeStatus]
    jobs: list[JobStatus]


async def collect_status(
    store: ClusterStore, peers: Peers, *, ask_coordinators: bool = True
) -> ClusterStatus:
    """Ask the store, then all drive servers and coordinators at once.

    Raises  Corrupt, Unavailable: of the cluster store. Cancel safe.
    """
    view = await read_cluster_view(store)
    servers: dict[str, Any] = {}
    server_errors: dict[str, str] = {}
    volumes: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    volume_errors: dict[str, str] = {}
    hosts: dict[str, Any] = {}
    async with trio.open_nursery() as nursery:
        for node in view.servers:
            nursery.start_soon(
                answer_or_error, peers.drive_server(view, node, "status"), node, servers, server_errors
            )
        for node in view.coordinators if ask_coordinators else ():
            nursery.start_soon(answer_or_error, peers.host(view, node, "host_status"), node, hosts, {})
        for name in view.volumes if ask_coordinators else ():
            for call, answers in (("volume_status", volumes), ("statfs", figures)):
                nursery.start_soon(
                    answer_or_error, peers.coordinator(view, name, call), name, answers, volume_errors
                )
    for name in volume_errors.keys() - volumes.keys():
        waits = metadata_waits(view, await read_record(store, f"meta/{name}"))
        volume_errors[name] = "; ".join([volume_errors[name], *waits])
    drives = drive_statuses(view, servers)
    return ClusterStatus(
        cluster=view.cluster.text("name") if view.cluster else None,
        nodes=node_statuses(view, drives, server_errors, [servers, hosts]),
        drives=drives,
        pool=pool_status(view, drives),
        volumes=[
            volume_status(view, record, volumes.get(name), figures.get(name), volume_errors.get(name, ""))
            for name, record in sorted(view.volumes.items())
        ],
        jobs=[
            *(job for name in sorted(volumes) for job in job_statuses(name, volumes[name])),
            *(jobs_not_asked(view, volume_errors.keys() - volumes.keys())),
        ],
    )


def drive_statuses(view: ClusterView, servers: dict[str, Any]) -> list[DriveStatus]:
    """The drives of the store, with what their servers say of them."""
    slab_size = view.pool.number("slab_size", SLAB_SIZE_DEFAULT) if view.pool else SLAB_SIZE_DEFAULT
    found = []
    for hex_id, record in sorted(
        view.drives.items(), key=lambda item: (item[1].text("node"), item[1].text("path"))
    ):
        node = record.text("node")
        reported = _reported_drive(servers.get(node), hex_id)
        free_slots = _number(reported, "free_slots") if node in view.alive else None
        condition = drive_state.condition_of(
            record.value,
            node_alive=node in view.alive,
            server_runs=node in view.servers,
            answered=node in servers,
            reported=reported,
        )
        size = record.number("slots") * slab_size or record.number("size")
        counters = reported.get("counters") if reported is not None else None
        found.append(
            DriveStatus(
                id=hex_id,
                node=node,
                path=record.text("path"),
                state=condition.state,
                size=size,
                free=None if free_slots is None else free_slots * slab_size,
                counters=counters if isinstance(counters, dict) else {},
                health=condition.health,
                reason=condition.reason,
                kind=record.text("kind"),
                usage=drive_state.usage_of(record.value),
                latency=reported.get("latency", {}) if reported is not None else {},
                next_step=condition.next_step,
                slots=record.number("slots"),
                kind_declared=record.value.get("declared") is True,
                added=record.number("added"),
                added_by=record.text("added_by"),
                failures=_number(reported, "failures") or 0,
                last_failure=str((reported or {}).get("last_failure") or ""),
            )
        )
    _add_fill(found, slab_size)
    return found


def _add_fill(drives: list[DriveStatus], slab_size: int) -> None:
    """How full each is, as far as its server was asked, and which are hot spots."""
    fills: list[tuple[DriveStatus, DriveFill]] = []
    for drive in drives:
        if drive.free is not None and drive.slots:
            drive.used_slots = max(0, drive.slots - drive.free // slab_size)
            drive.used = drive.used_slots * slab_size
            fill = DriveFill(drive.slots, drive.used_slots, drive.usage == "auto")
            drive.percent_used = fill.percent
            fills.append((drive, fill))
    pool = pool_percent(fill for _, fill in fills)
    for drive, fill in fills:
        drive.hot_points = hot_points(fill, pool)


def _reported_drive(reply: Any, hex_id: str) -> dict[str, Any] | None:
    for row in _maps(reply, "drives"):
        identity = row.get("id")
        if isinstance(identity, bytes) and identity.hex() == hex_id:
            return row
    return None


def node_statuses(
    view: ClusterView,
    drives: list[DriveStatus],
    server_errors: dict[str, str],
    answers: Iterable[dict[str, Any]] = (),
) -> list[NodeStatus]:
    """`answers`: of the nodes' processes, by node: whom they refused."""
    found = []
    for name in view.node_names:
        own = [drive for drive in drives if drive.node == name]
        up = name in view.alive
        record = view.alive.get(name) or view.nodes.get(name)
        note = ""
        if name in view.maintenance and not up:
            note = "switched off"
        elif up and name not in view.servers:
            note = "drive server is not running"
        elif up and name in server_errors:
            note = f"drive server: {server_errors[name]}"
        found.append(
            NodeStatus(
                name=name,
                state=node_state(view, name),
                address=record.text("address") if record else "",
                drives=len(own),
                drives_bad=[d.path for d in own if up and not note and _is_bad(d)],
                note="; ".join(said for said in (state_reason(view, name), note) if said),
                refused=_refused(answer.get(name) for answer in answers),
            )
        )
    return found


def _refused(replies: Iterable[Any]) -> dict[str, int]:
    total: dict[str, int] = {}
    for reply in replies:
        counts = reply.get("refused") if isinstance(reply, dict) else None
        for reason, count in (counts if isinstance(counts, dict) else {}).items():
            if isinstance(reason, str) and isinstance(count, int):
                total[reason] = total.get(reason, 0) + count
    return total


def _is_bad(drive: DriveStatus) -> bool:
    return drive.health != drive_state.HEALTHY and drive.state not in DECIDED_STATES


def pool_status(view: ClusterView, drives: list[DriveStatus]) -> PoolStatus | None:
    if view.pool is None:
        return None
    known = [drive for drive in drives if drive.free is not None]
    slab_size = view.pool.number("slab_size", SLAB_SIZE_DEFAULT)
    size, free = sum(drive.size for drive in known), sum(drive.free or 0 for drive in known)
    in_use = [drive for drive in known if drive.usage == "auto"]
    kept = (
        reserve_slots(
            [DriveSlots(d.node, view.domain_of(d.node, level), d.size // slab_size) for d in in_use], copies
        )
        for copies, level in _apart(view)
    )
    reserve = min(kept) * slab_size
    percent = percent_used(size, free, reserve)
    return PoolStatus(
        name=view.pool.text("name"),
        slab_size=slab_size,
        size=size,
        free=free,
        reserve=reserve,
        percent_used=percent,
        warning=warning_of(percent),
        nodes_unknown=sorted({drive.node for drive in drives if drive.free is None}),
    )


def _apart(view: ClusterView) -> set[tuple[int, Level]]:
    """How many copies the volumes have, at which level apart: what each keeps free follows from that."""
    found = {(volume.number("copies", 1), view.level_of(name)) for name, volume in view.volumes.items()}
    return found or {(COPIES_USUAL, LEVEL_DEFAULT)}


def volume_status(view: ClusterView, record: Record, reply: Any, figures: Any, error: str) -> VolumeStatus:
    """What the coordinator answered, or why it did not."""
    reply = reply if isinstance(reply, dict) else {}
    owner = view.owners.get(record.name)
    health, note = reply.get("health"), record.text("error") or error
    if health not in HEALTH_WORDS:
        health = UNKNOWN
    if record.text("state") != VOLUME_ONLINE and not record.text("error"):
        note = ""  # being created or deleted: it need not have a coordinator
    if record.text("state") == VOLUME_ONLINE:
        note = "; ".join(filter(None, (note, domains_note(view, record, reply))))
    slabs, by_copies, scrub = reply.get("slabs"), reply.get("slabs_by_copies"), reply.get("scrub")
    return VolumeStatus(
        name=record.name,
        resiliency=record.text("resiliency"),
        copies=record.number("copies", 1),
        state="failed" if record.text("error") else record.text("state"),
        coordinator=owner.text("node") if owner else "",
        health=health,
        size=_number(figures, "size"),
        free=_number(figures, "free"),
        note=note,
        slabs=slabs if isinstance(slabs, dict) else {},
        fault_domain=view.level_of(record.name),
        misplaced=_number(reply, "misplaced") or 0,
        open_files={
            str(row["node"]): row["open_files"]
            for row in _maps(reply, "sessions")
            if "node" in row and _number(row, "open_files") is not None
        },
        slabs_by_copies=by_copies if isinstance(by_copies, dict) else {},
        io=io_modes(view, record, reply if reply else None),
        preferred=record.text("preferred"),
        min_copies=record.number("min_copies", 1),
        size_limit=record.number("size"),
        scrub=scrub if isinstance(scrub, dict) else {},
    )


def domains_note(view: ClusterView, record: Record, reply: Any) -> str:
    """What is wrong with where the volume's copies are; empty: nothing."""
    level, copies = view.level_of(record.name), record.number("copies", 1)
    there_are = len(view.domains_with_drives(level, up=False))
    said = []
    if 0 < there_are < copies:
        said.append(
            f"{copies} copies need {counted(copies, level)} with drives, there {verb(there_are)} "
            f"{there_are}, so it cannot grow; see csvfs domain list"
        )
    misplaced = _number(reply, "misplaced")
    if misplaced:
        waits = [job.waiting_for for job in job_statuses(record.name, reply) if job.kind == "repair"]
        why = next(filter(None, waits), "")
        slabs = "1 slab has" if misplaced == 1 else f"{misplaced} slabs have"
        what = f"waiting for {why}" if why else "they are being moved apart"
        said.append(f"{slabs} two copies in one {level}: {what}")
    return "; ".join(said)


def job_statuses(volume: str, reply: Any) -> list[JobStatus]:
    """The rows `jobs` of a `volume_status` reply."""
    return [
        JobStatus(
            volume=volume,
            what=str(row.get("what") or row.get("kind") or "repair"),
            done=_number(row, "done"),
            total=_number(row, "total"),
            rate=_number(row, "rate"),
            waiting_for=str(row.get("waiting_for") or ""),
            kind=str(row.get("kind") or "repair"),
            paused=bool(row.get("paused")),
            copied=_number(row, "copied"),
            eta_told=_number(row, "eta"),
        )
        for row in _maps(reply, "jobs")
    ]


def jobs_not_asked(view: ClusterView, volumes: Iterable[str]) -> list[JobStatus]:
    """Drives that are to be emptied, and volumes that cannot say what they keep there: these jobs wait."""
    leaving = [drive for drive in view.drives.values() if drive_usage(drive) in ("retired", "removing")]
    return [
        JobStatus(
            volume=volume,
            what=f"evacuation of drive {drive.name[:8]} on {drive.text('node')}",
            waiting_for=f"a coordinator of volume {volume}: csvfs volume status {volume}",
            kind="evacuate",
        )
        for volume in sorted(volumes)
        for drive in leaving
    ]


def _maps(reply: Any, name: str) -> list[dict[str, Any]]:
    rows = reply.get(name) if isinstance(reply, dict) else None
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _number(reply: Any, name: str) -> int | None:
    value = reply.get(name) if isinstance(reply, dict) else None
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
