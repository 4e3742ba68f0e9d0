"""`csvfs cluster create` on a real machine: the cluster's CA, its first node, the first member of its store.

Place      admin floor, over node_setup.py.
Steps      1. the etcd directory with CA, certificate, member.json: made beside its place, renamed when whole
           2. node.toml, if there is none; the systemd unit, where systemd runs
           3. the keys `cluster`, `nodes/<node>`, `certificates/<node>`: by the member that runs, or one that is started
              for this moment
Again      each step that has been done is left as it is, so an interrupted create is finished by running it again.
"""

import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from csvfs.admin.child import spawn, wait_dead
from csvfs.admin.cluster_ca import issue, make_authority, write_certificates
from csvfs.admin.cluster_view import CLUSTER_KEY, NODES, read_record
from csvfs.admin.etcd_member import (
    etcd_program,
    member_argv,
    member_configuration,
    url,
    write_member,
    write_revoked,
)
from csvfs.admin.join_admission import certificate_key
from csvfs.admin.node_setup import (
    NodePlan,
    Wish,
    has_systemd,
    install_unit,
    new_directory,
    plan_node,
    put_in_place,
    write_config,
)
from csvfs.admin.pool_ops import create_cluster
from csvfs.admin.run_lock import run_dir_lock
from csvfs.config import STORE_PEER_PORT, STORE_PORT, check_name
from csvfs.errors import Conflict, Exists, TimedOut, Unavailable
from csvfs.store.etcd import EtcdStore
from csvfs.store.etcd_http import Endpoint
from csvfs.store.etcd_place import EtcdPlace
from csvfs.store.interface import ClusterStore, Compare, Put
from csvfs.wire.control import pack_value

MEMBER_START_S = 60.0
MEMBER_STOP_S = 10.0
LOOK_S = 0.2

Say = Callable[[str], None]


@dataclass(slots=True, frozen=True)
class CreatePlan:
    """What `create` is going to do. `steps`: one line each; what has been done already is not among them."""

    name: str
    node: NodePlan
    makes_directory: bool
    steps: list[str]


def plan_create(name: str, wish: Wish) -> CreatePlan:
    """Look, and change nothing. Raises BadRequest, Conflict, NotSupported: why it cannot be done here."""
    check_name(name, "cluster")
    etcd_program()
    node = plan_node(wish)
    place = node.place
    makes_directory = _makes_directory(place)
    steps = []
    if makes_directory:
        steps.append(f"{place.directory}: the cluster's CA and its key, this node's certificate, a member of the store")
    if node.text:
        steps.append(f"{node.config.path}: node {node.config.node} at {node.config.address}")
    if has_systemd():
        steps.append("the systemd unit csvfs-node, if there is none")
    steps.append(f"the cluster {name} in its store")
    return CreatePlan(name, node, makes_directory, steps)


def _makes_directory(place: EtcdPlace) -> bool:
    if not place.directory.exists() or not any(place.directory.iterdir()):
        return True
    if place.member_path.exists() and place.ca_key_path.exists():
        return False
    raise Conflict(
        f"{place.directory} is there and is not what cluster create makes: this machine has joined a cluster, or was in"
        " one; move the directory away if it is not needed any more"
    )


async def create(plan: CreatePlan, say: Say) -> bytes:
    """Do it; returns the cluster's id. `say` gets a line per step.

    Raises   Exists: the store holds another cluster. TimedOut: the member does not start. Conflict, OSError.
    Cancel   run it again to finish.
    """
    place = plan.node.place
    if plan.makes_directory:
        _make_directory(plan, place)
        say(f"{place.directory}: CA, certificate and the first member of the cluster store")
    if plan.node.text:
        write_config(plan.node)
        say(f"{plan.node.config.path}: node {plan.node.config.node} at {plan.node.config.address}")
    if has_systemd() and install_unit():
        say("systemd unit csvfs-node installed")
    async with _running_member(plan.node, place) as store:
        return await _make_keys(plan, store, place)


def _make_directory(plan: CreatePlan, place: EtcdPlace) -> None:
    config = plan.node.config
    staged = new_directory(place.directory.with_name(place.directory.name + ".new"))
    ca, ca_key = make_authority(plan.name)
    write_certificates(staged, issue(ca, ca_key, config.node, config.address), ca_key)
    write_revoked(staged, [])
    staged.write_endpoints([Endpoint(config.address, config.port_base + STORE_PORT)])
    client_url, peer_url = (
        url(staged.scheme, config.address, config.port_base + port) for port in (STORE_PORT, STORE_PEER_PORT)
    )
    token = f"csvfs {plan.name} {secrets.token_hex(8)}"
    peers = [(str(config.node), peer_url)]
    values = member_configuration(
        place, config.node, client_url, peer_url, peers, token=token, is_new=True, has_tls=True
    )
    write_member(staged, values)
    put_in_place(staged, place)


async def _make_keys(plan: CreatePlan, store: ClusterStore, place: EtcdPlace) -> bytes:
    try:
        cluster = await create_cluster(store, plan.name)
    except Exists:
        found = await read_record(store, CLUSTER_KEY)
        if found is None or found.text("name") != plan.name:
            raise
        cluster = found  # an earlier try got as far as this
    config = plan.node.config
    certificate = place.certificate_path.read_text()
    node = Put(NODES + config.node, pack_value({"address": config.address}))
    for put in (certificate_key(config.node, certificate, is_witness=False), node):
        await store.transact([Compare(put.key, 0)], [put])
    return cluster.id()


@contextlib.asynccontextmanager
async def _running_member(node: NodePlan, place: EtcdPlace) -> AsyncIterator[ClusterStore]:
    """The store, by the member that `csvfs node run` runs, or by one that runs inside the `async with`."""
    store = EtcdStore(place)
    try:
        if await _answers(store):
            yield store
            return
        config = node.config
        config.log_dir.mkdir(parents=True, exist_ok=True)
        log_path = config.log_dir / "store.log"
        with run_dir_lock(config.run_dir):
            process = spawn(list(member_argv(place)), dict(os.environ), log_path)
            try:
                await _wait_answer(store, log_path)
                yield store
            finally:
                process.terminate()
                with trio.CancelScope(shield=True):
                    with trio.move_on_after(MEMBER_STOP_S):
                        await wait_dead(process)
                    process.kill()
                    process.wait()
    finally:
        with trio.CancelScope(shield=True):
            await store.close()


async def _answers(store: ClusterStore) -> bool:
    with trio.move_on_after(1.5), contextlib.suppress(Unavailable):
        await store.get(CLUSTER_KEY)
        return True
    return False


async def _wait_answer(store: ClusterStore, log_path: Path) -> None:
    deadline = time.monotonic() + MEMBER_START_S
    while time.monotonic() < deadline:
        if await _answers(store):
            return
        await trio.sleep(LOOK_S)
    raise TimedOut(f"the member of the cluster store does not answer after {MEMBER_START_S:.0f} s; see {log_path}")
