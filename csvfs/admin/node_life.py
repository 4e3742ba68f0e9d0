"""Draining a node before it is switched off, and taking it back.

Place      admin floor. The command changes the key `maintenance/<node>`; hosts and coordinators see it: volumes
           are coordinated elsewhere, no new copies come onto the node, and its absence is not repaired.
States     draining, then paused: the node may be switched off. `resume` deletes the key.
Preflight  `objections` is pure: what speaks against switching a node off, one line each.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from csvfs.admin.cluster_view import (
    MAINTENANCE,
    QUARANTINE,
    VOLUME_ONLINE,
    ClusterView,
    Record,
    drive_usage,
    read_cluster_view,
    read_record,
    takes_slabs,
)
from csvfs.admin.drive_life import free_slots
from csvfs.admin.etcd_members import absence_objection, answering_members, list_members
from csvfs.admin.peers import Peers, answer_or_error
from csvfs.block.reserve import DriveSlots, reserve_slots
from csvfs.cluster.reach import Report, why_isolated
from csvfs.config import NodeConfig
from csvfs.errors import Conflict, Corrupt, NotFound, ProtocolError, Unavailable
from csvfs.fault_domains import LEVEL_DEFAULT
from csvfs.store.etcd_client import EtcdClient
from csvfs.store.etcd_place import EtcdPlace
from csvfs.store.interface import ClusterStore, Compare, Delete, Put
from csvfs.store.opening import etcd_place, is_etcd
from csvfs.units import format_size
from csvfs.wire.control import pack_value

DRAINING, PAUSED = "draining", "paused"
ISOLATED, QUARANTINED = "isolated", "quarantined"
CHANGE_ATTEMPTS = 10
POLL_S = 0.5
ANSWER_ATTEMPTS = 2  # a member of the store that was busy for a moment is not away
LEAVING = ("retired", "removing")  # usage of drives that are being emptied
_COUNTS = ("slabs", "stuck", "joining", "creating", "revision")  # of an answer to without_node


@dataclass(slots=True, frozen=True)
class VolumeWithout:
    """What a volume's coordinator says of a node's absence; see coordinator/healing.py, `without_node`."""

    volume: str
    slabs: int  # with a copy on the node
    stuck: int  # of these, with too few in-sync copies elsewhere
    joining: int  # of the stuck ones, with a copy elsewhere that is being brought in sync
    creating: int = 0  # slabs that are being created, which may get a copy on the node yet
    revision: int = 0  # of the cluster store, as the coordinator knew it
    error: str = ""  # why it could not be asked; then all numbers are 0


@dataclass(slots=True, frozen=True)
class Drain:
    """How far a drain is."""

    coordinates: list[str]  # volumes still coordinated on the node
    volumes: list[VolumeWithout] = field(default_factory=list)

    def waits_for(self) -> list[str]:
        """One line for each thing that is still missing; empty: the node may be switched off."""
        lines = [f"volume {name} to be coordinated elsewhere" for name in self.coordinates]
        for volume in self.volumes:
            if volume.error:
                lines.append(f"the coordinator of volume {volume.volume}: {volume.error}")
            elif volume.stuck:
                lines.append(f"{volume.stuck} slabs of volume {volume.volume} to be in sync elsewhere")
            elif volume.creating:
                lines.append(f"{volume.creating} slabs of volume {volume.volume} to be created")
        return lines


def objections(view: ClusterView, node: str, volumes: list[VolumeWithout]) -> list[str]:
    """What speaks against switching `node` off now. What mends itself while one waits is none."""
    found = []
    others = [name for name in view.alive if name != node and name not in view.maintenance]
    if not others:
        found.append("no other node is up and out of maintenance: nobody would serve its volumes")
    for name in sorted(view.maintenance):
        if name != node:
            state = view.maintenance[name].text("state")
            found.append(f"node {name} is {state} already: take it back first (csvfs node resume {name})")
    for name in sorted(view.nodes):
        if name not in view.alive and name not in view.maintenance and view.drives_of(name):
            found.append(f"node {name} is down: bring it back, or remove its drives, before another one goes")
    for drive in view.drives.values():
        if drive_usage(drive) in LEAVING and drive.text("node") != node:
            found.append(
                f"drive {drive.name[:8]} of node {drive.text('node')} is being emptied, and node {node} is one of the places"
                " for what is on it: wait until that is done (csvfs job watch)"
            )
    for volume in volumes:
        for_good = volume.stuck - volume.joining
        if volume.error:
            found.append(f"volume {volume.volume} cannot be asked: {volume.error}")
        elif for_good:
            found.append(
                f"volume {volume.volume}: {for_good} of its slabs would have too few copies in sync without "
                f"node {node}, and no other copy of them is on its way; see csvfs volume status {volume.volume}"
            )
    return found


def space_objection(view: ClusterView, node: str, free: dict[str, int]) -> str:
    """Whether volumes could not grow while `node` is away, as what the others have free is kept for repairs.

    free: slots by node, on drives that take slabs.
    """
    level, copies = LEVEL_DEFAULT, max((record.number("copies") for record in view.volumes.values()), default=0)
    drives = [
        DriveSlots(drive.text("node"), view.domain_of(drive.text("node"), level), drive.number("slots"))
        for drive in view.drives.values()
        if takes_slabs(drive)
    ]
    reserve = reserve_slots(drives, copies)
    left = sum(slots for name, slots in free.items() if name != node)
    if not copies or node not in {drive.node for drive in drives} or left > reserve:
        return ""
    size = view.pool.number("slab_size") if view.pool else 0
    return (
        f"without node {node} the pool has {format_size(left * size)} free and keeps {format_size(reserve * size)} for repairs:"
        " volumes could not grow; add drives, or delete files"
    )


async def ask_volumes(view: ClusterView, peers: Peers, node: str) -> list[VolumeWithout]:
    """Ask all coordinators what becomes of their volumes without `node`. Raises ProtocolError. Cancel safe."""
    answers: dict[str, Any] = {}
    errors: dict[str, str] = {}
    names = sorted(name for name, record in view.volumes.items() if record.text("state") == VOLUME_ONLINE)
    async with trio.open_nursery() as nursery:
        for name in names:
            call = peers.coordinator(view, name, "without_node", node=node)
            nursery.start_soon(answer_or_error, call, name, answers, errors)
    return [_volume_without(name, answers.get(name), errors.get(name, "")) for name in names]


def _volume_without(name: str, answer: Any, error: str) -> VolumeWithout:
    if error:
        return VolumeWithout(name, 0, 0, 0, error=error)
    try:
        slabs, stuck, joining, creating, revision = (int(answer[key]) for key in _COUNTS)
    except (KeyError, TypeError, ValueError) as problem:
        raise ProtocolError(f"the coordinator of volume {name} answered with nonsense: {problem!r}") from None
    return VolumeWithout(name, slabs, stuck, joining, creating, revision)


async def check_drain(config: NodeConfig, store: ClusterStore, peers: Peers, node: str) -> list[str]:
    """The objections to draining `node` now. Raises NotFound; Unavailable: it is down; Conflict: it is paused."""
    view = await read_cluster_view(store)
    if node not in view.node_names:
        raise NotFound(f"no node {node!r}; there are: {', '.join(view.node_names) or 'none'}")
    known = view.maintenance.get(node)
    if known is not None and known.text("state") == PAUSED:
        raise Conflict(f"node {node} is paused already: switch it off, or take it back (csvfs node resume {node})")
    if node not in view.alive:
        raise Unavailable(f"node {node} is down: there is nothing to drain")
    found = objections(view, node, await ask_volumes(view, peers, node))
    crowded = space_objection(view, node, await free_slots(view, peers))
    found += [crowded] if crowded else []
    if is_etcd(config.store):
        says = await _store_objection(etcd_place(config.store), node)
        found += [says] if says else []
    return found


async def _store_objection(place: EtcdPlace, node: str) -> str:
    """Why the cluster store cannot do without the node's member for a while. Raises Unavailable."""
    client = EtcdClient(place)
    try:
        members = await list_members(client)
    finally:
        client.close()
    says = ""
    for _ in range(ANSWER_ATTEMPTS):
        says = absence_objection(members, await answering_members(place, members), node)
        if not says:
            break
    return says


async def drain(store: ClusterStore, peers: Peers, node: str, told: Callable[[Drain], None]) -> None:
    """Put the node into maintenance and wait until it may be switched off; `told(how far)` now and then.

    Raises  NotFound: somebody took it back meanwhile. Unavailable, Conflict.
    Cancel  it stays draining: call again to finish, or `resume`.
    """
    drained = await _set_state(store, node, DRAINING)
    while True:
        view = await read_cluster_view(store)
        if node not in view.maintenance:
            raise NotFound(f"node {node} was taken back (csvfs node resume) before it was drained")
        owned = sorted(name for name, owner in view.owners.items() if owner.text("node") == node)
        volumes = await ask_volumes(view, peers, node)
        progress = Drain(owned, volumes)
        told(progress)
        # A coordinator that has not heard of the drain may be creating a copy on the node this moment.
        heard = all(volume.revision >= drained.revision for volume in volumes)
        if heard and not progress.waits_for():
            await _set_state(store, node, PAUSED, only_from=DRAINING)
            return
        await trio.sleep(POLL_S)


async def _set_state(store: ClusterStore, node: str, state: str, *, only_from: str | None = None) -> Record:
    key = MAINTENANCE + node
    for _ in range(CHANGE_ATTEMPTS):
        known = await read_record(store, key)
        if only_from is not None and (known is None or known.text("state") != only_from):
            raise NotFound(f"node {node} is not {only_from} any more; see csvfs node list")
        value = {"state": state, "since": int(time.time())}
        revision = known.revision if known is not None else 0
        result = await store.transact([Compare(key, revision)], [Put(key, pack_value(value))])
        if result.succeeded:
            return Record(key, value, result.revision)
    raise Conflict(f"{key} is being changed by others all the time; try again")


async def resume(store: ClusterStore, node: str) -> bool:
    """Take a node back, from maintenance or quarantine. False: it was in neither. Raises NotFound, Unavailable, Conflict."""
    view = await read_cluster_view(store)
    if node not in view.node_names:
        raise NotFound(f"no node {node!r}; there are: {', '.join(view.node_names) or 'none'}")
    for _ in range(CHANGE_ATTEMPTS):
        known = [await read_record(store, prefix + node) for prefix in (MAINTENANCE, QUARANTINE)]
        found = [record for record in known if record is not None]
        if not found:
            return False
        compares = [Compare(record.key, record.revision) for record in found]
        if (await store.transact(compares, [Delete(record.key) for record in found])).succeeded:
            return True
    raise Conflict(f"{MAINTENANCE}{node} is being changed by others all the time; try again")


def node_state(view: ClusterView, node: str) -> str:
    """One word of these: draining, paused (also while it is switched off), isolated, quarantined, up, down."""
    known = view.maintenance.get(node)
    if known is not None:
        return known.text("state", DRAINING)
    if isolation(view, node):
        return ISOLATED
    if node not in view.alive:
        return "down"
    return QUARANTINED if node in view.quarantine else "up"


def state_reason(view: ClusterView, node: str) -> str:
    """What there is to say to a state that does not say all; empty: nothing."""
    state = node_state(view, node)
    if state == ISOLATED:
        return isolation(view, node)
    if state == QUARANTINED:
        return f"{view.quarantine[node].text('why')}; csvfs node resume {node}"
    return ""


def isolation(view: ClusterView, node: str) -> str:
    """Why the node is isolated; empty: it is not."""
    return why_isolated(node, view.alive, {name: _report(record) for name, record in view.reach.items()})


def _report(record: Record) -> Report:
    """Raises Corrupt."""
    lists = [record.value.get(name, []) for name in ("unreached", "lingering")]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise Corrupt(f"cluster store key {record.key} holds no lists of nodes")
    return Report(*(frozenset(names) for names in lists))
