"""`csvfs cluster join` on a new machine: key and request made here, certificate and the rest from a join desk.

Place      admin floor, over node_setup.py and join_client.py.
Steps      1. the node's key, beside the place of its etcd directory: it is kept, so an interrupted join asks again with
              the same one and is let in once (join_admission.py, J1)
           2. the answer; what it says is verified
           3. the etcd directory whole, node.toml if there is none, the systemd unit where systemd runs
Then       `csvfs node run` starts the member, which votes when it has been copied everything.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from csvfs.admin.cluster_ca import (
    Certificate,
    fingerprint,
    is_pair,
    make_request,
    write_certificates,
)
from csvfs.admin.etcd_member import etcd_program, member_configuration, url, write_member, write_revoked
from csvfs.admin.files import write_whole
from csvfs.admin.join_client import ask_to_join
from csvfs.admin.join_messages import JoinAnswer, JoinRequest
from csvfs.admin.join_token import Token, parse_token, proof, verifier_of
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
from csvfs.config import STORE_PEER_PORT, STORE_PORT
from csvfs.errors import Exists, ProtocolError
from csvfs.store.etcd_place import EtcdPlace, parse_endpoint

Say = Callable[[str], None]


@dataclass(slots=True, frozen=True)
class JoinPlan:
    token: Token
    node: NodePlan
    steps: list[str]


def plan_join(token_text: str, wish: Wish) -> JoinPlan:
    """Look, and change nothing. Raises BadRequest, Conflict, NotSupported; Exists: this machine is in a cluster."""
    token = parse_token(token_text)
    etcd_program()  # whether it will run a member is not known before the answer
    node = plan_node(wish)
    place = node.place
    if place.directory.exists() and any(place.directory.iterdir()):
        raise Exists(
            f"{place.directory} is there: this machine is in a cluster, or was; move it away to join another one, or"
            " start the node with csvfs node run"
        )
    steps = [
        f"a key and a certificate request, sent to {', '.join(str(desk) for desk in token.desks)}",
        f"{place.directory}: certificate, CA, the members of the cluster store",
    ]
    if node.text:
        steps.append(f"{node.config.path}: node {node.config.node} at {node.config.address}")
    if has_systemd():
        steps.append("the systemd unit csvfs-node, if there is none")
    return JoinPlan(token, node, steps)


async def join(plan: JoinPlan, say: Say) -> JoinAnswer:
    """Do it. `say` gets a line per step.

    Raises   AccessDenied, Exists, Conflict: refused, with the reason. Unavailable: no desk can decide now. OSError.
    Cancel   run it again, with the same token, to finish.
    """
    config, place = plan.node.config, plan.node.place
    waiting = place.directory.with_name(place.directory.name + ".joining")
    key, request = _request(EtcdPlace(waiting), plan)
    answer = await ask_to_join(plan.token, request)
    _verify(answer, plan.token, key)
    say(f"cluster {answer.cluster} takes node {config.node} at {config.address}")
    staged = new_directory(place.directory.with_name(place.directory.name + ".new"))
    _fill(staged, place, plan, answer, key)
    put_in_place(staged, place)
    say(f"{place.directory}: certificate" + (" and a member of the cluster store" if answer.peers else ""))
    if plan.node.text:
        write_config(plan.node)
        say(f"{config.path} written")
    if has_systemd() and install_unit():
        say("systemd unit csvfs-node installed")
    with contextlib.suppress(FileNotFoundError):
        EtcdPlace(waiting).key_path.unlink()
        waiting.rmdir()
    return answer


def _request(waiting: EtcdPlace, plan: JoinPlan) -> tuple[str, JoinRequest]:
    config = plan.node.config
    if waiting.key_path.exists():
        key, csr = make_request(config.node, waiting.key_path.read_text())
    else:
        key, csr = make_request(config.node)
        new_directory(waiting.directory)
        write_whole(waiting.key_path, key, 0o600)
    request = JoinRequest(plan.token.id, csr, config.node, config.address, config.port_base, config.witness)
    return key, replace(request, mac=proof(verifier_of(plan.token.secret), request.asked()))


def _verify(answer: JoinAnswer, token: Token, key: str) -> None:
    """Raises ProtocolError: the answer is not for this node, or not of this cluster."""
    if fingerprint(answer.ca) != token.fingerprint or not is_pair(answer.ca, answer.certificate, key):
        raise ProtocolError("the join desk's certificate is not of the cluster, or not for this node's key; nothing was kept")
    for endpoint in answer.endpoints:
        parse_endpoint(endpoint, "the join desk's answer")


def _fill(staged: EtcdPlace, place: EtcdPlace, plan: JoinPlan, answer: JoinAnswer, key: str) -> None:
    config = plan.node.config
    write_certificates(staged, Certificate(answer.ca, answer.certificate, key), answer.ca_key)
    write_revoked(staged, list(answer.revoked))
    staged.write_endpoints([parse_endpoint(text, "the join desk's answer") for text in answer.endpoints])
    if answer.peers:
        client_url, peer_url = (
            url(staged.scheme, config.address, config.port_base + port) for port in (STORE_PORT, STORE_PEER_PORT)
        )
        peers, token = list(answer.peers), answer.member_token
        values = member_configuration(
            place, config.node, client_url, peer_url, peers, token=token, is_new=False, has_tls=True
        )
        write_member(staged, values)
