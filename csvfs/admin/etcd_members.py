"""The members of an etcd cluster as they see themselves: listed, promoted.

Place      admin floor. Calls to etcd's cluster API by store/etcd_client.py.
"""

from dataclasses import dataclass
from typing import Any

from csvfs.errors import ProtocolError
from csvfs.store.etcd_client import EtcdClient
from csvfs.store.etcd_http import Endpoint
from csvfs.store.etcd_messages import number, objects
from csvfs.store.etcd_place import parse_endpoint


@dataclass(slots=True, frozen=True)
class StoreMember:
    """One member. `name` empty: it has been added and never started."""

    id: int
    name: str
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...]
    is_learner: bool  # it is copied everything and does not vote yet

    @property
    def endpoints(self) -> list[Endpoint]:
        """Raises BadRequest: etcd says nonsense."""
        return [parse_endpoint(url.rpartition("://")[2], "etcd's list of members") for url in self.client_urls]


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
