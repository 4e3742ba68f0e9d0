"""The members of an etcd cluster as they see themselves: listed, added, promoted, removed.

Place      admin floor. Calls to etcd's cluster API by store/etcd_client.py; the rules are pure.
Growth     The first MEMBERS machines get one. One is added as a learner, which does not vote, so while it is added, and
           for as long as it takes to start it, no majority becomes larger. When it has been copied everything it
           is promoted, by itself (store_member.py) or by whoever wants to add the next one: 1, 2, 3 votes.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import trio

from csvfs.errors import Conflict, CsvfsError, ProtocolError
from csvfs.store.etcd_client import AnswerLost, EtcdClient
from csvfs.store.etcd_http import Endpoint
from csvfs.store.etcd_messages import CODE_NOT_FOUND, Refused, number, objects
from csvfs.store.etcd_place import EtcdPlace, parse_endpoint

MEMBERS = 3  # more make every change slower; three survive the loss of any one
ANSWER_S = 2.0
LEARNER_POLL_S = 0.2
LEARNER_WAIT_S = 20.0  # for an earlier learner to be copied everything; the store has a few hundred KiB


@dataclass(slots=True, frozen=True)
class StoreMember:
    """One member. `name` empty: it has been added and never started."""

    id: int
    name: str
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...]
    is_learner: bool  # it is copied everything and does not vote yet

    def is_of(self, node: str, address: str) -> bool:
        """Whether it is that node's; one that was never started has no name yet."""
        hosts = [parse_endpoint(url.rpartition("://")[2], "etcd's list of members").host for url in self.peer_urls]
        return self.name == node or (not self.name and address in hosts)

    @property
    def endpoints(self) -> list[Endpoint]:
        """Raises BadRequest: etcd says nonsense."""
        return [parse_endpoint(url.rpartition("://")[2], "etcd's list of members") for url in self.client_urls]


def gets_member(members: list[StoreMember], peer_url: str, *, is_witness: bool) -> bool:
    """Whether a new machine is to run a member. Raises Conflict: a witness, where nobody needs one."""
    if any(peer_url in member.peer_urls for member in members):
        return True  # it has been added by an earlier try
    if len(members) < MEMBERS:
        return True
    if is_witness:
        raise Conflict(f"the cluster store has {len(members)} members already; a witness is for two nodes")
    return False


def removal_objection(members: list[StoreMember], answering: set[int], leaving: StoreMember) -> str:
    """Why the store cannot do without `leaving`; empty: it can.

    answering: ids of the members that serve at the moment.
    """
    if leaving.is_learner:
        return ""
    voting = [member for member in members if not member.is_learner and member is not leaving]
    up = [member for member in voting if member.id in answering]
    needed = len(voting) // 2 + 1
    if not voting:
        return f"node {leaving.name} runs the only member of the cluster store: nothing would be left of it"
    if len(up) < needed:
        away = ", ".join(member.name for member in voting if member.id not in answering)
        return (
            f"without node {leaving.name} the cluster store would have {len(up)} of {len(voting)} members up, and needs"
            f" {needed}: bring {away} back first"
        )
    return ""


def absence_objection(members: list[StoreMember], answering: set[int], node: str) -> str:
    """Why `node` cannot be switched off for a while, as its member still counts meanwhile; empty: it can."""
    voting = [member for member in members if not member.is_learner]
    if node not in {member.name for member in voting}:
        return ""
    up = [member for member in voting if member.id in answering and member.name != node]
    needed = len(voting) // 2 + 1
    if len(up) >= needed:
        return ""
    how = "bring the others back, or add a third node or a witness (csvfs cluster token)"
    return (
        f"the cluster store would be without a majority: {len(voting)} members, {len(up)} up without node {node},"
        f" {needed} needed; {how}"
    )


async def answering_members(place: EtcdPlace, members: list[StoreMember]) -> set[int]:
    """Ids of the members that say that they have a leader. Cancel safe."""
    found: set[int] = set()

    async def ask(member: StoreMember) -> None:
        for endpoint in member.endpoints[:1]:
            client = EtcdClient(place, [endpoint])
            try:
                status = await client.call(
                    lambda connection: connection.post("/v3/maintenance/status", {}), deadline_s=ANSWER_S
                )
                if number(status, "leader"):
                    found.add(member.id)
            except CsvfsError:
                pass  # it does not answer: that is what is asked
            finally:
                client.close()

    async with trio.open_nursery() as nursery:
        for member in members:
            nursery.start_soon(ask, member)
    return found


async def add_learner(client: EtcdClient, peer_url: str) -> None:
    """Add a member that does not vote yet; one with that URL that is there already stays as it is.

    Raises   Conflict: the one added before it has not been copied everything yet. Refused, Unavailable.
    """
    deadline = trio.current_time() + LEARNER_WAIT_S
    while True:
        members = await list_members(client)
        if any(peer_url in member.peer_urls for member in members):
            return
        learner = next((member for member in members if member.is_learner), None)
        try:
            if learner is not None:
                await promote(client, learner)
            else:
                await _add(client, peer_url)
        except Refused as error:
            if trio.current_time() > deadline:
                raise (_held_up(learner) if learner is not None else error) from None
        await trio.sleep(LEARNER_POLL_S)


async def _add(client: EtcdClient, peer_url: str) -> None:
    """Raises Refused, also for a second after a member with that URL was removed: etcd makes the same id again."""
    request = {"peerURLs": [peer_url], "isLearner": True}
    with contextlib.suppress(AnswerLost):  # then the next look says whether it was done
        await client.call(lambda connection: connection.post("/v3/cluster/member/add", request), once=True)


def _held_up(learner: StoreMember) -> Conflict:
    name = learner.name or " ".join(learner.peer_urls)
    return Conflict(
        f"the cluster store's member on {name} was added before and has not caught up; start that node, or"
        " csvfs node evict it, then join again with the same token"
    )


async def remove_member(client: EtcdClient, member: StoreMember) -> None:
    """Raises Refused: the others would lose their majority. Unavailable."""
    try:
        await client.call(lambda connection: connection.post("/v3/cluster/member/remove", {"ID": str(member.id)}))
    except Refused as error:
        if error.code != CODE_NOT_FOUND:  # it has been removed by an earlier try, whose answer was lost
            raise


async def list_members(client: EtcdClient) -> list[StoreMember]:
    """By name. Raises Unavailable."""
    return _parse(await client.call(lambda connection: connection.post("/v3/cluster/member/list", {})))


async def promote(client: EtcdClient, member: StoreMember) -> None:
    """Let a learner vote. Raises Refused: it has not been copied enough yet. Unavailable."""
    await client.call(lambda connection: connection.post("/v3/cluster/member/promote", {"ID": str(member.id)}))


def _parse(answer: dict[str, Any]) -> list[StoreMember]:
    found = [_parse_one(row) for row in objects(answer, "members")]
    return sorted(found, key=lambda member: (member.name, member.id))


def _parse_one(row: dict[str, Any]) -> StoreMember:
    name, peers, clients = row.get("name", ""), row.get("peerURLs", []), row.get("clientURLs", [])
    if not isinstance(name, str) or not isinstance(peers, list) or not isinstance(clients, list):
        raise ProtocolError("etcd's list of members is not one")
    urls = [tuple(url for url in listed if isinstance(url, str)) for listed in (peers, clients)]
    return StoreMember(number(row, "ID"), name, urls[0], urls[1], row.get("isLearner") is True)
