"""Evicting a node: it is not part of the cluster any more, and what it had is made elsewhere.

Place      admin floor. Any other node runs it; whatever was interrupted is finished by running it again.
Order      1. `evicted/<node>`: a node that runs sees it, kills its processes and ends; its lease runs out. Nobody takes
              the lease away from a node that may still serve (I5), so this is waited for
           2. `revoked/<serial>` of its certificate; its member of the store is removed
           3. the keys of its drives go, and with them `nodes/<node>`: coordinators make their copies elsewhere, as of
              drives that are gone for good
Refused    when slabs would be left with too few in-sync copies elsewhere (--yes: all the same), looked at before 1 and
           again before 3, and, always, when the cluster store would be without a majority.
Kept       `incarnations/<node>`: numbers that were fenced must not come back.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import trio

from csvfs.admin.cluster_view import (
    ALIVE,
    CERTIFICATES,
    EVICTED,
    MAINTENANCE,
    NODES,
    QUARANTINE,
    REACH,
    STANDING,
    WITNESSES,
    ClusterView,
    read_cluster_view,
    read_record,
)
from csvfs.admin.etcd_members import (
    StoreMember,
    answering_members,
    list_members,
    removal_objection,
    remove_member,
)
from csvfs.admin.node_life import ANSWER_ATTEMPTS, VolumeWithout, ask_volumes
from csvfs.admin.peers import Peers
from csvfs.config import NodeConfig
from csvfs.errors import BadRequest, Conflict, NotFound, TimedOut, Unavailable
from csvfs.store.etcd_client import EtcdClient
from csvfs.store.etcd_place import EtcdPlace
from csvfs.store.interface import ClusterStore, Compare, Delete, Put
from csvfs.store.opening import etcd_place, is_etcd
from csvfs.store.revoked import REVOKED
from csvfs.wire.control import pack_value

LEASE_END_S = 60.0  # a node's lease is at most that long; etcd counts it anew when it elects a leader
TAKEOVER_S = 60.0
POLL_S = 0.2
CHANGE_ATTEMPTS = 10

Say = Callable[[str], None]


@dataclass(slots=True, frozen=True)
class Objections:
    """What speaks against evicting a node, one line each. `final`: cannot be overridden."""

    final: list[str]
    losses: list[str]


def objections(view: ClusterView, node: str, volumes: list[VolumeWithout], store_says: str) -> Objections:
    """Pure. `store_says`: why the cluster store cannot do without it, or nothing."""
    final = [store_says] if store_says else []
    if node not in view.witnesses and not any(name != node for name in view.alive):
        final.append("no other node is up: nobody would serve its volumes")
    losses = []
    for volume in volumes:
        if volume.error:
            losses.append(f"volume {volume.volume} cannot be asked what it keeps on node {node}: {volume.error}")
        elif volume.stuck:
            losses.append(
                f"volume {volume.volume}: {volume.stuck} of its slabs have too few copies in sync elsewhere; drain the"
                f" node (csvfs node drain {node}), or wait: csvfs job watch"
            )
    return Objections(final, losses)


async def check_evict(config: NodeConfig, store: ClusterStore, peers: Peers, node: str) -> Objections:
    """Raises NotFound: no such node. BadRequest: it is this one. Unavailable."""
    view = await read_cluster_view(store)
    if node == config.node:
        raise BadRequest(f"this is node {node} itself: evict it from another node")
    await _require_known(store, view, node)
    says = ""
    if is_etcd(config.store):
        place = etcd_place(config.store)
        says = await store_objection(place, node, _address(view, node))
    volumes = [] if node in view.witnesses else await ask_volumes(view, peers, node)
    return objections(view, node, volumes, says)


async def _require_known(store: ClusterStore, view: ClusterView, node: str) -> None:
    if node in view.node_names or node in view.witnesses:
        return
    if await read_record(store, EVICTED + node) is not None:
        return  # by an earlier try, of which something may be left to do
    names = ", ".join([*view.node_names, *sorted(view.witnesses)]) or "none"
    raise NotFound(f"no node {node!r}; there are: {names}")


async def store_objection(place: EtcdPlace, node: str, address: str) -> str:
    """Why the cluster store cannot do without the node's member; empty: it can. Raises Unavailable."""
    client = EtcdClient(place)
    try:
        members = await list_members(client)
    finally:
        client.close()
    own = _member_of(members, node, address)
    return "" if own is None else await _why_needed(place, members, own)


async def _why_needed(place: EtcdPlace, members: list[StoreMember], own: StoreMember) -> str:
    says = ""
    for _ in range(ANSWER_ATTEMPTS):
        says = removal_objection(members, await answering_members(place, members), own)
        if not says:
            break
    return says


async def evict(
    config: NodeConfig, store: ClusterStore, peers: Peers, node: str, say: Say, *, accept_losses: bool
) -> int:
    """Do it; returns how many drives went with it. `check_evict` was asked before.

    accept_losses   also where slabs are left with too few copies, which nobody can bring back afterwards
    Raises   TimedOut: it still runs. Conflict, Unavailable: run it again.
    Cancel   run it again to finish.
    """
    view = await read_cluster_view(store)
    address = _address(view, node)
    await _mark(store, node)
    if node in view.alive:
        say(f"node {node} is up: waiting until it has stopped")
        await _wait_gone(store, node)
    await _revoke(store, node)
    say(f"node {node} is out: its certificate is revoked")
    if is_etcd(config.store) and await _remove_member(etcd_place(config.store), node, address):
        say("its member of the cluster store is removed")
    if not accept_losses and node not in view.witnesses:
        await _wait_dispensable(store, peers, node)
    return await _forget(store, node)


async def _wait_dispensable(store: ClusterStore, peers: Peers, node: str) -> None:
    """Its drives go for good now, and since it was asked copies elsewhere may have dropped out. Volumes that it
    coordinated are being taken over."""
    losses: list[str] = []
    with trio.move_on_after(TAKEOVER_S):
        while True:
            view = await read_cluster_view(store)
            losses = objections(view, node, await ask_volumes(view, peers, node), "").losses
            if not losses:
                return
            await trio.sleep(POLL_S)
    raise Conflict(
        f"node {node} is out, but its drives are kept: {'; '.join(losses)}; run this again later, or with --yes"
    )


def _address(view: ClusterView, node: str) -> str:
    record = view.nodes.get(node) or view.witnesses.get(node)
    return record.text("address") if record else ""


def _member_of(members: list[StoreMember], node: str, address: str) -> StoreMember | None:
    return next((member for member in members if member.is_of(node, address)), None)


async def _mark(store: ClusterStore, node: str) -> None:
    value = {"when": int(time.time()), "why": "csvfs node evict"}
    await store.transact([Compare(EVICTED + node, 0)], [Put(EVICTED + node, pack_value(value))])


async def _wait_gone(store: ClusterStore, node: str) -> None:
    with trio.move_on_after(LEASE_END_S):
        while await store.get(ALIVE + node) is not None:
            await trio.sleep(POLL_S)
        return
    raise TimedOut(
        f"node {node} still renews its lease after {LEASE_END_S:.0f} s: switch it off, then run this again"
    )


async def _revoke(store: ClusterStore, node: str) -> None:
    for _ in range(CHANGE_ATTEMPTS):
        issued = await read_record(store, CERTIFICATES + node)
        if issued is None:
            return
        revoked = Put(REVOKED + issued.text("serial"), pack_value({"node": node, "when": int(time.time())}))
        if (await store.transact([Compare(issued.key, issued.revision)], [revoked, Delete(issued.key)])).succeeded:
            return
    raise Conflict(f"{CERTIFICATES}{node} is being changed by others all the time; try again")


async def _remove_member(place: EtcdPlace, node: str, address: str) -> bool:
    client = EtcdClient(place)
    try:
        members = await list_members(client)
        own = _member_of(members, node, address)
        if own is None:
            return False
        says = await _why_needed(place, members, own)
        if says:  # it has become so since it was asked
            raise Unavailable(says)
        await remove_member(client, own)
        place.write_endpoints([end for member in members if member is not own for end in member.endpoints])
        return True
    finally:
        client.close()


async def _forget(store: ClusterStore, node: str) -> int:
    for _ in range(CHANGE_ATTEMPTS):
        view = await read_cluster_view(store)
        drives = view.drives_of(node)
        compares = [Compare(ALIVE + node, 0), *(Compare(drive.key, drive.revision) for drive in drives)]
        changes: list[Put | Delete] = [Delete(drive.key) for drive in drives]
        changes += [
            Delete(prefix + node) for prefix in (NODES, WITNESSES, MAINTENANCE, QUARANTINE, STANDING, REACH)
        ]
        if (await store.transact(compares, changes)).succeeded:
            return len(drives)
    raise Conflict(f"the drives of node {node} are being changed by others all the time; try again")
