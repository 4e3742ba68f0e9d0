"""The life of a drive in the pool: retiring, removing and resetting it.

Place      admin floor. The command changes the key `drives/<id>`; the coordinators see it and make the copies
           elsewhere, whatever becomes of the command.
Usage      auto (or absent), retired (takes no new slabs, its copies move away), removing (as retired, on its
           way out), removed (no slab needs it: its server closes it, then the key goes), maintenance (takes no new
           slabs, keeps what it has, and may be away).
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from csvfs.admin.cluster_view import (
    DRIVES,
    USAGE_AUTO,
    ClusterView,
    Record,
    drive_usage,
    read_cluster_view,
    takes_slabs,
)
from csvfs.admin.drive_ops import DriveCandidate, label_of, put_drive, slab_size_of
from csvfs.admin.peers import Peers, answer_or_error
from csvfs.admin.pool_ops import require_cluster, require_pool
from csvfs.block.capacity import missing_slots
from csvfs.block.device_facts import device_facts
from csvfs.block.formatting import reformat_drive
from csvfs.errors import (
    BadRequest,
    Conflict,
    CsvfsError,
    NoSpace,
    NotFound,
    ProtocolError,
    TimedOut,
    Unavailable,
)
from csvfs.ids import DriveId, NodeName, PoolId
from csvfs.store.interface import ClusterStore, Compare, Delete, Put
from csvfs.units import format_size

RETIRED, REMOVING, REMOVED, MAINTENANCE = "retired", "removing", "removed", "maintenance"
CHANGE_ATTEMPTS = 10
POLL_S = 0.5
RELEASE_TIMEOUT_S = 30.0


@dataclass(slots=True, frozen=True)
class Needs:
    """What slabs need of one drive. `groups`: copies, with the nodes where there is no place for them. `unknown`:
    volumes that could not be asked; `settled`: nothing is on its way."""

    count: int
    groups: list[tuple[frozenset[str], int]]
    unknown: list[str]
    settled: bool


async def set_usage(store: ClusterStore, drive: Record, usage: str) -> Record:
    """Raises NotFound: the drive was removed meanwhile. Conflict, Unavailable."""
    return await change_drive(store, drive, usage=usage)


async def change_drive(store: ClusterStore, drive: Record, **changes: Any) -> Record:
    """Change fields of a drive's key, whatever else was changed meanwhile. Raises as set_usage."""
    for _ in range(CHANGE_ATTEMPTS):
        view = await read_cluster_view(store)
        known = view.drives.get(drive.name)
        if known is None:
            raise NotFound(f"drive {drive.name[:8]} is not in the pool any more")
        value = known.packed_with(**changes)
        result = await store.transact(
            [Compare(known.key, known.revision)], [Put(known.key, value, known.lease)]
        )
        if result.succeeded:
            return Record(known.key, {**known.value, **changes}, result.revision, known.lease)
    raise Conflict(f"{DRIVES}{drive.name} is being changed by others all the time; try again")


async def set_kind(store: ClusterStore, node: NodeName, drive: Record, kind: str | None) -> Record:
    """Declare a drive's kind; None: as the machine says. Raises BadRequest: that is known on its own node only."""
    if kind is None and drive.text("node") != node:
        raise BadRequest(f"drive {drive.name[:8]} is attached to node {drive.text('node')}: run this command there")
    known = kind or device_facts(drive.text("path")).kind
    return await change_drive(store, drive, kind=known, declared=kind is not None)


async def set_maintenance(store: ClusterStore, drive: Record, on: bool) -> Record:
    """Say that somebody is at a drive: it takes no new slabs, and is neither retired for being slow nor counted as
    lost for being away.

    Raises  Conflict: it is being emptied. NotFound, Unavailable.
    """
    usage = drive_usage(drive)
    if usage not in (USAGE_AUTO, MAINTENANCE):
        raise Conflict(
            f"drive {drive.name[:8]} is {usage} and being emptied; csvfs drive retire --undo it first, if it is to stay"
        )
    return await set_usage(store, drive, MAINTENANCE if on else USAGE_AUTO)


async def needs_of(view: ClusterView, peers: Peers, drive: Record, revision: int = 0) -> Needs:
    """Ask all coordinators. `revision`: of the store, which they must have seen for the answer to be
    settled."""
    answers: dict[str, Any] = {}
    errors: dict[str, str] = {}
    async with trio.open_nursery() as nursery:
        for name in view.volumes:
            call = peers.coordinator(view, name, "drive_members", drive=bytes.fromhex(drive.name))
            nursery.start_soon(answer_or_error, call, name, answers, errors)
    count, groups, settled = 0, [], not errors
    try:
        for name, answer in answers.items():
            count += int(answer["count"])
            groups += [(_ruled_out(view, name, nodes), int(number)) for nodes, number in answer["groups"]]
            settled = settled and not answer["creating"] and int(answer["revision"]) >= revision
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"a coordinator answered drive_members with nonsense: {error!r}") from None
    return Needs(count, groups, sorted(errors), settled)


def _ruled_out(view: ClusterView, volume: str, nodes: list[Any]) -> frozenset[str]:
    """The nodes that share a fault domain of the volume's level with one of `nodes`, which have a copy."""
    level = view.level_of(volume)
    taken = {view.domain_of(str(node), level) for node in nodes}
    return frozenset(node for node in view.node_names if view.domain_of(node, level) in taken)


async def check_room(view: ClusterView, peers: Peers, drive: Record, needs: Needs) -> None:
    """Raises NoSpace: the other drives cannot hold what is on this one. Unavailable: that cannot be found
    out."""
    if needs.unknown:
        raise Unavailable(
            f"volumes {', '.join(needs.unknown)} have no coordinator at the moment, so it is not known what "
            f"they keep on drive {drive.name[:8]}; try again, see csvfs volume list"
        )
    free = await free_slots(view, peers, besides=drive.name)
    missing = missing_slots(needs.groups, free)
    if missing:
        size = slab_size_of(view.pool) if view.pool else 0
        raise NoSpace(
            f"the rest of the pool cannot hold drive {drive.name[:8]}: {needs.count} slabs are on it, for "
            f"{missing} of them ({format_size(missing * size)}) there is no place in another fault domain; "
            "add drives, or delete something"
        )


async def free_slots(view: ClusterView, peers: Peers, *, besides: str = "") -> dict[str, int]:
    """By node, on drives that take slabs; the drive `besides` (id in hex) does not count."""
    answers: dict[str, Any] = {}
    async with trio.open_nursery() as nursery:
        for node in view.servers:
            nursery.start_soon(answer_or_error, peers.drive_server(view, node, "status"), node, answers, {})
    free: dict[str, int] = {}
    for node, answer in answers.items():
        rows = answer.get("drives", []) if isinstance(answer, dict) else []
        for row in rows:
            record = view.drives.get(bytes(row.get("id") or b"").hex())
            if record is not None and record.name != besides and takes_slabs(record):
                free[node] = free.get(node, 0) + int(row.get("free_slots") or 0)
    return free


async def evacuate(store: ClusterStore, peers: Peers, drive: Record, left: Callable[[Needs], None]) -> Record:
    """Mark the drive `removing` and wait until no slab needs it; `left(needs)` is called now and then.

    Cancel  the drive stays `removing` and goes on being emptied: call again to finish, or set it `auto`.
    """
    drive = await set_usage(store, drive, REMOVING)
    while True:
        view = await read_cluster_view(store)
        needs = await needs_of(view, peers, drive, drive.revision)
        left(needs)
        if not needs.count and needs.settled:
            return drive
        await trio.sleep(POLL_S)


def left_text(drive: Record, needs: Needs) -> str:
    """One line: what is left on a drive that is being emptied, and what emptying it waits for."""
    text = f"{needs.count} slabs left on drive {drive.name[:8]}"
    if needs.unknown:
        names = ", ".join(needs.unknown)
        text += f"; waiting for a coordinator of {names}, to hear what they keep there: csvfs volume status"
    elif not needs.count and not needs.settled:
        text += "; waiting for slabs that are just being created"
    return text


async def take_out(store: ClusterStore, peers: Peers, drive: Record) -> None:
    """Have the server of a drive that no slab needs close it, and take its key away.

    Raises  TimedOut: its drive server does not close it. Conflict, Unavailable.
    """
    drive = await set_usage(store, drive, REMOVED)
    with trio.move_on_after(RELEASE_TIMEOUT_S) as scope:
        while await _is_served(store, peers, drive):
            await trio.sleep(POLL_S / 5)
    if scope.cancelled_caught:
        raise TimedOut(
            f"the drive server of node {drive.text('node')} still has drive {drive.name[:8]} open after "
            f"{RELEASE_TIMEOUT_S:g} s; see its log"
        )
    if not (await store.transact([Compare(drive.key, drive.revision)], [Delete(drive.key)])).succeeded:
        raise Conflict(f"drive {drive.name[:8]} was changed while it was being removed; see csvfs drive list")


async def _is_served(store: ClusterStore, peers: Peers, drive: Record) -> bool:
    """Whether its node's server has it open; a node that is down has not, nor will it open it again."""
    view = await read_cluster_view(store)
    node = drive.text("node")
    if node not in view.alive or node not in view.servers:
        return False
    try:
        answer = await peers.drive_server(view, node, "status")
    except CsvfsError:
        return True
    rows = answer.get("drives", []) if isinstance(answer, dict) else []
    return any(row.get("id") == bytes.fromhex(drive.name) and row.get("state") == "ok" for row in rows)


async def reset_drive(store: ClusterStore, peers: Peers, node: NodeName, drive: Record) -> Record:
    """Wipe a drive of this node that no slab needs any more, and let it join as a new one.

    Raises  BadRequest: it is another node's. Conflict: slabs need it. DriveRefused: something else lies at
            its path.
    """
    if drive.text("node") != node:
        raise BadRequest(
            f"drive {drive.name[:8]} is attached to node {drive.text('node')}: run this command there"
        )
    view = await read_cluster_view(store)
    if drive_usage(drive) == USAGE_AUTO:
        drive = await set_usage(store, drive, RETIRED)  # nothing new comes onto it from here on
        view = await read_cluster_view(store)
    needs = await _settled_needs(store, peers, view, drive)
    if needs.count or needs.unknown:
        why = f"{needs.count} slabs still have a copy on it"
        if needs.unknown:
            why = f"volumes {', '.join(needs.unknown)} cannot be asked"
        raise Conflict(
            f"drive {drive.name[:8]} cannot be reset: {why}; it is {drive_usage(drive)} and being emptied: "
            "see csvfs job list, then try again"
        )
    await take_out(store, peers, drive)
    return await _rejoin(store, node, drive)


async def _settled_needs(store: ClusterStore, peers: Peers, view: ClusterView, drive: Record) -> Needs:
    with trio.move_on_after(10.0):
        while True:
            needs = await needs_of(view, peers, drive, drive.revision)
            if needs.settled or needs.count:
                return needs
            await trio.sleep(POLL_S)
            view = await read_cluster_view(store)
    raise Unavailable(
        f"the coordinators do not say what they keep on drive {drive.name[:8]}; see csvfs volume list"
    )


async def _rejoin(store: ClusterStore, node: NodeName, drive: Record) -> Record:
    cluster, pool = await require_cluster(store), await require_pool(store)
    new_id, path = DriveId(secrets.token_bytes(16)), drive.text("path")
    make = partial(
        reformat_drive,
        path,
        old_id=DriveId(bytes.fromhex(drive.name)),
        drive_id=new_id,
        pool_id=PoolId(pool.id()),
        cluster_id=cluster.id(),
        node=node,
        slab_size=slab_size_of(pool),
        label=label_of(path),
    )
    superblock = await trio.to_thread.run_sync(make)
    as_before = DriveCandidate(
        path, superblock.size, drive.text("backing"), drive.text("kind"),
        declared=bool(drive.value.get("declared")), identity=drive.text("identity"), by="csvfs drive reset",
    )  # fmt: skip
    return await put_drive(store, node, as_before, new_id, superblock.layout.slot_count)
