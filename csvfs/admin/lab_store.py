"""The cluster store of a lab: its files, and how the lab itself, outside of all nodes, speaks to it.

Place      admin floor, below lab.py.
etcd       a member on each of the first MEMBERS nodes (on one, where there are fewer), with TLS as on real
           machines. They listen in the nodes' network namespaces only; so whoever asks from outside does it in a
           thread that has entered the lab's own (lab_network.py).
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from csvfs.admin.cluster_ca import issue, make_authority, read_authority, write_certificates
from csvfs.admin.etcd_member import member_configuration, url, write_member
from csvfs.admin.etcd_members import MEMBERS
from csvfs.admin.join_admission import certificate_key
from csvfs.admin.lab_files import PORT_BASE, STORE_ETCD, LabFiles, LabNode, LabPlan
from csvfs.admin.lab_network import LAB_ADDRESS, netns_inode, run_in_netns
from csvfs.config import STORE_PEER_PORT, STORE_PORT
from csvfs.errors import Unavailable
from csvfs.store.etcd_http import Endpoint
from csvfs.store.etcd_place import EtcdPlace
from csvfs.store.interface import ClusterStore, Put
from csvfs.store.opening import open_store

T = TypeVar("T")


def in_store(files: LabFiles, work: Callable[[ClusterStore], Awaitable[T]]) -> T:
    """Do something with the lab's cluster store. Raises Unavailable, and what `work` does."""

    async def main() -> T:
        store = open_store(files.store_url)
        try:
            return await work(store)
        finally:
            with trio.CancelScope(shield=True):
                await store.close()

    if files.plan().store != STORE_ETCD:
        return trio.run(main)
    if netns_inode(files.netns) is None:
        raise Unavailable(f"the lab in {files.directory} has no network; `csvfs lab up` makes it")
    return run_in_netns(files.netns, lambda: trio.run(main))


def make_store_files(files: LabFiles, plan: LabPlan) -> None:
    """Make the authority, the nodes' certificates, and what etcd's members need, as far as it is missing."""
    nodes = [files.node(index) for index in range(1, plan.nodes + 1)]
    if plan.store != STORE_ETCD:
        if plan.tls:
            _make_certificates(EtcdPlace(files.authority), [(node, EtcdPlace(node.tls)) for node in nodes])
        return
    hosts = member_hosts(nodes)
    lab_place = EtcdPlace(files.authority)
    _make_certificates(lab_place, [(node, EtcdPlace(node.etcd)) for node in nodes])
    lab_place.write_endpoints([_endpoint(host) for host in hosts])
    for node in nodes:
        place = EtcdPlace(node.etcd)
        if not place.endpoints_path.exists():  # `node run` keeps it
            own_first = sorted(hosts, key=lambda host, node=node: (host is not node, host.index))  # type: ignore[misc]
            place.write_endpoints([_endpoint(host) for host in own_first])
        if node in hosts and not place.member_path.exists():
            _configure(files, place, node, hosts)


def _make_certificates(lab_place: EtcdPlace, nodes: list[tuple[LabNode, EtcdPlace]]) -> None:
    if not lab_place.has_tls:
        ca, ca_key = make_authority("lab")
        write_certificates(lab_place, issue(ca, ca_key, "lab", LAB_ADDRESS), ca_key)
    for node, place in nodes:
        if not place.has_tls:
            write_certificates(place, issue(*read_authority(lab_place), node.name, node.address))


def certificate_keys(files: LabFiles) -> list[Put]:
    """What the cluster store knows of a node's certificate, so that `csvfs node evict` can revoke it."""
    plan, found = files.plan(), []
    for node in files.nodes():
        place = EtcdPlace(node.etcd if plan.store == STORE_ETCD else node.tls)
        if place.has_tls:
            certificate = place.certificate_path.read_text()
            found.append(certificate_key(node.name, certificate, is_witness=False))
    return found


def member_hosts(nodes: list[LabNode]) -> list[LabNode]:
    """The nodes that have a member."""
    return nodes[:MEMBERS] if len(nodes) >= MEMBERS else nodes[:1]


def _configure(files: LabFiles, place: EtcdPlace, node: LabNode, hosts: list[LabNode]) -> None:
    client_url, peer_url = (
        url(place.scheme, node.address, PORT_BASE + port) for port in (STORE_PORT, STORE_PEER_PORT)
    )
    peers = [(host.name, url(place.scheme, host.address, PORT_BASE + STORE_PEER_PORT)) for host in hosts]
    token = f"csvfs-lab {files.directory}"
    values = member_configuration(place, node.name, client_url, peer_url, peers, token=token, is_new=True)
    write_member(place, values)


def _endpoint(node: LabNode) -> Endpoint:
    return Endpoint(node.address, PORT_BASE + STORE_PORT)
