"""The members of an etcd cluster as they see themselves: listed, added, promoted, removed.

Place      admin floor. Calls to etcd's cluster API by store/etcd_client.py.
"""

from dataclasses import asdict, dataclass
from typing import Any

from csvfs.errors import CsvfsError, ProtocolError
from csvfs.store.etcd_client import EtcdClient
from csvfs.store.etcd_http import Endpoint, HttpConnection
from csvfs.store.etcd_messages import number, objects
from csvfs.store.etcd_place import EtcdPlace, parse_endpoint


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

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return values | {"id": f"{self.id:x}"}


async def list_members(client: EtcdClient) -> list[StoreMember]:
    """By name. Raises Unavailable."""
    return _parse(await client.call(lambda connection: connection.post("/v3/cluster/member/list", {})))


async def add_learner(client: EtcdClient, peer_url: str) -> list[StoreMember]:
    """Add a member that does not vote yet, unless it is there; returns all.

    Raises   Unavailable. Refused: another one is being added, or the members are not well.
    """
    body = {"peerURLs": [peer_url], "isLearner": True}

    async def add(connection: HttpConnection) -> None:
        found = _parse(await connection.post("/v3/cluster/member/list", {}))
        if not any(peer_url in member.peer_urls for member in found):
            await connection.post("/v3/cluster/member/add", body)

    await client.call(add)
    return await list_members(client)


async def promote(client: EtcdClient, member: StoreMember) -> None:
    """Let a learner vote. Raises Refused: it has not been copied enough yet. Unavailable."""
    await client.call(lambda connection: connection.post("/v3/cluster/member/promote", {"ID": str(member.id)}))


async def remove_member(client: EtcdClient, member: StoreMember) -> None:
    """For ever: its data is worthless afterwards. Raises Unavailable, Refused."""
    await client.call(lambda connection: connection.post("/v3/cluster/member/remove", {"ID": str(member.id)}))


async def ask_status(place: EtcdPlace, member: StoreMember) -> dict[str, Any]:
    """What one member says of itself: `reachable`, `leader` (is it), `size` (bytes), `error`."""
    for endpoint in member.endpoints:
        client = EtcdClient(place, [endpoint])
        try:
            answer = await client.call(lambda c: c.post("/v3/maintenance/status", {}), deadline_s=1.0)
            is_leader = number(answer, "leader") == member.id
            return {"reachable": True, "leader": is_leader, "size": number(answer, "dbSize"), "error": ""}
        except CsvfsError as error:
            return {"reachable": False, "leader": False, "size": 0, "error": str(error)}
        finally:
            client.close()
    return {"reachable": False, "leader": False, "size": 0, "error": "it was never started"}


def _parse(answer: dict[str, Any]) -> list[StoreMember]:
    found = [_parse_one(row) for row in objects(answer, "members")]
    return sorted(found, key=lambda member: (member.name, member.id))


def _parse_one(row: dict[str, Any]) -> StoreMember:
    name, peers, clients = row.get("name", ""), row.get("peerURLs", []), row.get("clientURLs", [])
    if not isinstance(name, str) or not isinstance(peers, list) or not isinstance(clients, list):
        raise ProtocolError("etcd's list of members is not one")
    urls = [tuple(url for url in listed if isinstance(url, str)) for listed in (peers, clients)]
    return StoreMember(number(row, "ID"), name, urls[0], urls[1], row.get("isLearner") is True)
