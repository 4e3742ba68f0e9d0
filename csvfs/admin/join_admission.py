"""Who is let into the cluster: tokens made, and used once each.

Place      admin floor. The store's side of joining; join_desk.py is its listener.
Keys       `tokens/<id hex>`          verifier, expires (wall clock, s), made_by; used {node, key: SHA-256 of its public
                                      key}. Its store lease ends with it
           `certificates/<node>`      serial (hex), certificate (PEM), key (SHA-256 of the public one), witness
           `witnesses/<node>`         address: a member of the store without drives
           `evicted/<node>`           when (s), why: it must not start; ends when the node joins anew
           `revoked/<serial hex>`     node, when: of a node that was evicted
CA's key   The nodes that are given a member of the store get it too, in the answer, inside the TLS session: a node can
           join as long as any of them is up. Others, and witnesses, never see it.

Invariants
  J1  A token lets in one key. Taking it, and making the node known, is one transaction that compares the token; who lost
      the answer asks again with the same key, and gets the same certificate.
  J2  The store's members are added one at a time, each as a learner: no majority grows before it is there to be counted.
"""

import hashlib
import ipaddress
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from csvfs.admin import join_token
from csvfs.admin.cluster_ca import (
    fingerprint,
    key_digest,
    key_digest_of,
    read_authority,
    requested_key,
    serial_of,
    sign_request,
)
from csvfs.admin.cluster_view import (
    ALIVE,
    CERTIFICATES,
    CLUSTER_KEY,
    EVICTED,
    NODES,
    WITNESSES,
    Record,
    read_record,
    record_of,
)
from csvfs.admin.etcd_member import member_token, url
from csvfs.admin.etcd_members import StoreMember, add_learner, gets_member, list_members
from csvfs.admin.join_messages import JoinAnswer, JoinRequest
from csvfs.config import JOIN_PORT, PORT_COUNT, STORE_PEER_PORT, STORE_PORT, check_name
from csvfs.errors import AccessDenied, BadRequest, Conflict, Exists, NotFound
from csvfs.store.etcd_client import EtcdClient
from csvfs.store.etcd_http import Endpoint
from csvfs.store.etcd_place import EtcdPlace
from csvfs.store.interface import ClusterStore, Compare, Delete, Put
from csvfs.store.revoked import revoked_key, revoked_serials
from csvfs.wire.control import pack_value

TOKENS = "tokens/"
ADMIT_ATTEMPTS = 10


def desk_of(store_endpoint: Endpoint) -> Endpoint:
    """Where a node with that member of the store has its join desk, if it has one."""
    return Endpoint(store_endpoint.host, store_endpoint.port - STORE_PORT + JOIN_PORT)


async def make_token(store: ClusterStore, place: EtcdPlace, node: str, valid_s: int) -> str:
    """A token that lets one machine in. Raises BadRequest, NotFound: no cluster. Unavailable."""
    if not 1 <= valid_s <= join_token.VALID_S_MAX:
        raise BadRequest(f"a token is valid for 1 to {join_token.VALID_S_MAX} seconds, not for {valid_s}")
    if await read_record(store, CLUSTER_KEY) is None:
        raise NotFound("there is no cluster in this cluster store yet: csvfs cluster create NAME")
    desks = tuple(desk_of(endpoint) for endpoint in place.endpoints()[: join_token.DESKS_MAX])
    token = join_token.Token(
        desks,
        fingerprint(place.ca_path.read_text()),
        secrets.token_bytes(join_token.ID_SIZE),
        secrets.token_bytes(join_token.SECRET_SIZE),
    )
    value = {
        "verifier": join_token.verifier_of(token.secret),
        "expires": int(time.time()) + valid_s,
        "made_by": node,
    }
    lease = await store.grant_lease(valid_s * 1000)
    await store.put(TOKENS + token.id.hex(), pack_value(value), lease)
    return join_token.format_token(token)


@dataclass(slots=True, frozen=True)
class _Known:
    """What the store says of names and addresses, with what a decision upon it has to compare."""

    by_name: dict[str, Record]
    evicted: Record | None
    addresses: dict[str, str]  # address -> node


class Admission:
    """Of one node that has the CA's key. `now_s`: the wall clock; replaced in tests."""

    def __init__(
        self, store: ClusterStore, client: EtcdClient, place: EtcdPlace, now_s: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._client = client
        self._place = place
        self._now_s = now_s

    async def admit(self, request: JoinRequest) -> JoinAnswer:
        """Let a machine in, or refuse it with a reason.

        Raises   AccessDenied: its token. Exists: its name or address. BadRequest, Conflict, Unavailable.
        Cancel   it may have been let in; it asks again.
        """
        token = await self._token(request)
        digest = key_digest(requested_key(request.csr, request.node))
        address = _checked_place(request)
        members = await list_members(self._client)
        peer_url = url(self._place.scheme, address, request.port_base + STORE_PEER_PORT)
        has_member = gets_member(members, peer_url, is_witness=request.is_witness)
        certificate = await self._let_in(token, request, address, digest)
        if has_member:
            await add_learner(self._client, peer_url)
            members = await list_members(self._client)
        return await self._answer(request, certificate, members, peer_url, has_member)

    async def _token(self, request: JoinRequest) -> Record:
        record = await read_record(self._store, TOKENS + request.token.hex())
        if record is None:
            raise AccessDenied(
                "this cluster does not know the join token: it has expired, or is another cluster's; make a new one with"
                " csvfs cluster token"
            )
        verifier = record.value.get("verifier")
        if not isinstance(verifier, bytes) or not join_token.is_proof(request.mac, verifier, request.asked()):
            raise AccessDenied("the join request does not prove its token; nothing was done")
        if record.number("expires") <= self._now_s():
            raise AccessDenied("the join token has expired; make a new one with csvfs cluster token")
        return record

    async def _let_in(self, token: Record, request: JoinRequest, address: str, digest: bytes) -> str:
        """J1. Returns the certificate."""
        claim = {"node": request.node, "key": digest}
        for _ in range(ADMIT_ATTEMPTS):
            used = token.value.get("used")
            if used is not None and used != claim:
                by = used.get("node") if isinstance(used, dict) else "somebody"
                raise AccessDenied(
                    f"the join token was used already, by node {by}; make a new one with csvfs cluster token"
                )
            if used is not None:
                issued = await read_record(self._store, CERTIFICATES + request.node)
                if issued is None or issued.value.get("key") != digest:
                    raise AccessDenied(f"node {request.node} was evicted since it used this join token; make a new one")
                return issued.text("certificate")
            known = await self._known(request.node)
            _refuse_known(known, request.node, address)
            certificate = sign_request(*read_authority(self._place), request.csr, request.node, address)
            if await self._commit(token, claim, known, request, address, certificate):
                return certificate
            token = await self._token(request)
        raise Conflict("the cluster store is being changed by others all the time; try again")

    async def _commit(
        self, token: Record, claim: dict[str, Any], known: _Known, request: JoinRequest, address: str, certificate: str
    ) -> bool:
        at = (WITNESSES if request.is_witness else NODES) + request.node
        compares = [Compare(token.key, token.revision)]
        compares += [Compare(prefix + request.node, 0) for prefix in (NODES, WITNESSES, CERTIFICATES)]
        changes: list[Put | Delete] = [
            Put(token.key, token.packed_with(used=claim), token.lease),
            Put(at, pack_value({"address": address})),
            certificate_key(request.node, certificate, is_witness=request.is_witness),
        ]
        if known.evicted is not None:
            compares.append(Compare(known.evicted.key, known.evicted.revision))
            changes.append(Delete(known.evicted.key))
        return (await self._store.transact(compares, changes)).succeeded

    async def _known(self, node: str) -> _Known:
        by_name: dict[str, Record] = {}
        for prefix in (NODES, ALIVE, WITNESSES):
            for item in await self._store.list(prefix):
                by_name.setdefault(item.key.removeprefix(prefix), record_of(item))
        addresses = {record.text("address"): name for name, record in by_name.items()}
        return _Known(by_name, await read_record(self._store, EVICTED + node), addresses)

    async def _answer(
        self, request: JoinRequest, certificate: str, members: list[StoreMember], peer_url: str, has_member: bool
    ) -> JoinAnswer:
        ca, ca_key = read_authority(self._place)
        cluster = await read_record(self._store, CLUSTER_KEY)
        endpoints = [str(endpoint) for member in members if not member.is_learner for endpoint in member.endpoints]
        peers = [
            (request.node if at == peer_url else member.name, at) for member in members for at in member.peer_urls
        ]
        return JoinAnswer(
            cluster=cluster.text("name") if cluster else "",
            certificate=certificate,
            ca=ca,
            ca_key=ca_key if has_member and not request.is_witness else "",
            endpoints=tuple(endpoints),
            peers=tuple(peers) if has_member else (),
            member_token=member_token(self._place),
            revoked=tuple(await revoked_serials(self._store)),
        )


def certificate_key(node: str, certificate: str, *, is_witness: bool) -> Put:
    """What the store keeps of a certificate (PEM) that was issued."""
    value = {
        "serial": f"{serial_of(certificate):x}", "certificate": certificate, "key": key_digest_of(certificate),
        "witness": is_witness,
    }  # fmt: skip
    return Put(CERTIFICATES + node, pack_value(value))


async def evicted_at(store: ClusterStore, node: str, serial: int) -> int:
    """When (s since 1970) the node with that certificate was evicted; 0: it was not."""
    for key in (revoked_key(serial), EVICTED + node):
        record = await read_record(store, key)
        if record is not None and record.text("node", node) == node:
            return max(record.number("when"), 1)
    return 0


def token_digest(token_id: bytes) -> str:
    """A token in a log: enough to tell two apart."""
    return hashlib.sha256(token_id).hexdigest()[:8]


def _checked_place(request: JoinRequest) -> str:
    """The address as all write it. Raises BadRequest."""
    check_name(request.node, "node")
    if not 1 <= request.port_base <= 65_535 - PORT_COUNT:
        raise BadRequest(f"port_base {request.port_base} must lie between 1 and {65_535 - PORT_COUNT}")
    try:
        address = ipaddress.ip_address(request.address)
    except ValueError:
        raise BadRequest(f"address {request.address!r} is not an IP address") from None
    if address.is_unspecified or address.is_multicast:
        raise BadRequest(f"address {address} is none at which others could reach the node")
    return str(address)


def _refuse_known(known: _Known, node: str, address: str) -> None:
    if node in known.by_name:
        raise Exists(
            f"there is a node {node} already, at {known.by_name[node].text('address')}; give this one another name"
            f" (--node), or csvfs node evict {node} first"
        )
    if address in known.addresses:
        other = known.addresses[address]
        raise Exists(f"node {other} has the address {address} already; give this one another, or evict {other} first")
