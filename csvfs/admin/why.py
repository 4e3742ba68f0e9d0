"""`csvfs why`: on what a volume, or a file of it, waits; since when; what comes next.

Place      admin floor. Asks this node's mount, the cluster store and the coordinator, each with a deadline: who does
           not answer is an answer, too. Everything together takes less than 3 s.
"""

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypedDict

import trio

from csvfs.admin.cluster_view import VOLUME_ONLINE, ClusterView, Record, read_cluster_view, read_record
from csvfs.admin.io_modes import metadata_waits
from csvfs.admin.peers import Peers
from csvfs.admin.volume_paths import volume_of
from csvfs.config import NodeConfig
from csvfs.errors import CsvfsError, NotFound, TimedOut
from csvfs.store.interface import ClusterStore

STORE_S, MOUNT_S, COORDINATOR_S, PATH_S = 1.4, 1.0, 1.2, 0.5
META = "meta/"


class WhyRow(TypedDict):
    """`since_s`: how long it has waited; None: not known."""

    what: str
    on: str
    since_s: float | None
    next: str


@dataclass(slots=True)
class Heard:
    """What was answered within the deadlines; an error where nothing was."""

    volume: str
    node: str
    ino: int | None = None
    view: ClusterView | None = None
    meta: Record | None = None
    mount: dict[str, Any] = field(default_factory=dict)
    coordinator: dict[str, Any] = field(default_factory=dict)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)  # by who: store, mount, coordinator


async def listen(config: NodeConfig, store: ClusterStore, peers: Peers, text: str) -> Heard:
    """Ask everybody. Raises BadRequest, NotFound: no such volume; nothing else. Cancel safe."""
    name, path = volume_of(text, config.cluster_root)
    heard = Heard(name, config.node)

    async def ask_mount() -> None:
        answer = await peers.local(str(config.mount_socket(name)), "why", MOUNT_S)
        heard.mount = answer if isinstance(answer, dict) else {}

    async def ask_store() -> None:
        heard.view = await read_cluster_view(store)
        heard.meta = await read_record(store, META + name)

    async def ask_coordinator() -> None:
        assert heard.view is not None
        answer = await peers.coordinator(heard.view, name, "waits")
        heard.coordinator = answer if isinstance(answer, dict) else {}
        status = await peers.coordinator(heard.view, name, "volume_status")
        heard.jobs = [row for row in status.get("jobs", ()) if isinstance(row, dict)]

    async def find_inode() -> None:
        if path is not None and path != config.cluster_root / name:
            heard.ino = (await trio.to_thread.run_sync(os.stat, path, abandon_on_cancel=True)).st_ino

    async def ask_cluster() -> None:
        await _within(STORE_S, "store", ask_store, heard)
        if heard.view is not None and name in heard.view.volumes:
            await _within(COORDINATOR_S, "coordinator", ask_coordinator, heard)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_within, MOUNT_S, "mount", ask_mount, heard)
        nursery.start_soon(_within, PATH_S, "path", find_inode, heard)
        nursery.start_soon(ask_cluster)
    if heard.view is not None and name not in heard.view.volumes:
        there_are = ", ".join(sorted(heard.view.volumes)) or "none"
        raise NotFound(f"no volume {name!r}; there are: {there_are}")
    return heard


async def _within(seconds: float, who: str, ask: Callable[[], Awaitable[None]], heard: Heard) -> None:
    try:
        with trio.move_on_after(seconds) as scope:
            await ask()
        if scope.cancelled_caught:
            raise TimedOut(f"no answer within {seconds:g} s")
    except (CsvfsError, OSError) as error:
        heard.errors[who] = str(error)


# -- what it means -----------------------------------------------------------------------------------


def explain(heard: Heard) -> list[WhyRow]:
    """What waits, of what was heard; nothing: nothing waits. Pure."""
    rows = [*_silent(heard), *_metadata(heard), *_of_mount(heard)]
    rows += [*_requests(heard), *_slabs(heard), *_reclaiming(heard)]
    for job in heard.jobs:
        if job.get("waiting_for"):
            what = f"repair: {job.get('what') or job.get('kind')}"
            rows.append(_row(what, str(job["waiting_for"]), None, "it goes on by itself; see csvfs job list"))
    return rows


def _row(what: str, on: str, since_s: Any, next_step: str) -> WhyRow:
    known = float(since_s) if isinstance(since_s, int | float) and since_s > 0 else None
    return {"what": what, "on": on, "since_s": known, "next": next_step}


def _silent(heard: Heard) -> list[WhyRow]:
    rows = []
    if "store" in heard.errors:
        rows.append(_row(
            "changes of owners, nodes and drives", f"the cluster store: {heard.errors['store']}", None,
            "reads and writes go on while leases hold; a node that cannot renew its own within 3 s stops serving",
        ))  # fmt: skip
    if "mount" in heard.errors:
        path = f"the mount of {heard.volume} on {heard.node}: {heard.errors['mount']}"
        rows.append(_row("all that is done here", path, None, "csvfs node run starts a mount that died anew"))
    if "coordinator" in heard.errors:
        rows.append(_row(
            "names, sizes, space, new leases", f"the coordinator: {heard.errors['coordinator']}", None,
            "mounts wait for it, up to io_timeout_ms; when its host dies another node takes the volume",
        ))  # fmt: skip
    volume = heard.view.volumes.get(heard.volume) if heard.view is not None else None
    if volume is not None and volume.text("state") != VOLUME_ONLINE:
        why = volume.text("error") or "the coordinator is at it"
        rows.append(_row(f"the volume is {volume.text('state')}", why, None, f"see csvfs volume status {heard.volume}"))
    return rows


def _metadata(heard: Heard) -> list[WhyRow]:
    if heard.view is None:
        return []
    next_step = "the volume goes on when one of these drives is back; nothing else can make it"
    return [_row("names, sizes, space", wait, None, next_step) for wait in metadata_waits(heard.view, heard.meta)]


def _of_mount(heard: Heard) -> list[WhyRow]:
    found = heard.mount.get("waits")
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    return [
        _row(f"{row.get('what')} on {heard.node}", str(row.get("on")), row.get("since_s"), str(row.get("next")))
        for row in rows
        if heard.ino is None or row.get("ino") in (None, heard.ino)
    ]


def _requests(heard: Heard) -> list[WhyRow]:
    rows = []
    for request in _maps(heard.coordinator, "requests"):
        inodes = request.get("inodes") or []
        if heard.ino is not None and heard.ino not in inodes:
            continue
        recalls = _maps(request, "recalls")
        on = " and ".join(f"{recall.get('node')}, which is asked to give back inode {recall.get('ino')}" for recall in recalls)
        left_s = max((float(recall.get("left_s") or 0) for recall in recalls), default=0.0)
        next_step = f"who has not answered in {left_s:.1f} s is evicted, and its lease passes on"
        if not recalls:
            on, next_step = "elder requests for the same inodes", "they are carried out in order"
        elif not left_s:
            next_step = "who has not answered is being evicted, and its lease passes on"
        rows.append(_row(f"a request of {request.get('node')} for inodes {inodes}", on, request.get("since_s"), next_step))
    return rows


def _slabs(heard: Heard) -> list[WhyRow]:
    rows = []
    for slab in _maps(heard.coordinator, "slabs"):
        copies = _maps(slab, "copies")
        on = " or ".join(f"drive {_hex(copy.get('drive'))} of {copy.get('node')} ({copy.get('fault')})" for copy in copies)
        if all(copy.get("for_good") for copy in copies):
            next_step = f"programs get errors at once; see csvfs volume status {heard.volume} --lost"
        else:
            next_step = "it goes on when one of these is back; until then programs wait for io_timeout_ms, then get errors"
        rows.append(_row(f"what lies in slab {slab.get('slab')}", on or "a copy", None, next_step))
    return rows


def _reclaiming(heard: Heard) -> list[WhyRow]:
    nodes = heard.coordinator.get("reclaiming") or []
    if not nodes:
        return []
    on = f"{', '.join(map(str, nodes))}: to say which leases it holds, after a takeover"
    return [_row("new leases", on, None, "who does not say so is evicted, after 1 to 15 times reclaim_timeout_ms")]


def _maps(value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    rows = value.get(name)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _hex(drive: Any) -> str:
    return drive.hex()[:8] if isinstance(drive, bytes) else "?"
