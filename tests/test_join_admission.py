"""Who is let into a cluster: one machine per token, in time, under a name and address of its own; and the desk that says so."""

import ssl
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from csvfs.admin import etcd_members
from csvfs.admin.cluster_ca import is_pair, issue, make_authority, make_request, write_certificates
from csvfs.admin.cluster_view import CERTIFICATES, EVICTED, NODES
from csvfs.admin.etcd_member import write_member
from csvfs.admin.etcd_members import StoreMember, absence_objection, gets_member, removal_objection
from csvfs.admin.join_admission import TOKENS, Admission, evicted_at, make_token
from csvfs.admin.join_client import ask, ask_standing, ask_to_join, tls_for
from csvfs.admin.join_desk import CONNECTIONS_MAX, JoinDesk
from csvfs.admin.join_messages import MESSAGE_SIZE_MAX, SIZE, JoinAnswer, JoinRequest, pack_message
from csvfs.admin.join_token import Token, parse_token, proof, verifier_of
from csvfs.config import parse_config
from csvfs.errors import AccessDenied, BadRequest, Conflict, Exists, ProtocolError
from csvfs.store.etcd import EtcdStore
from csvfs.store.etcd_client import EtcdClient
from csvfs.store.etcd_http import Endpoint
from csvfs.store.etcd_place import EtcdPlace
from csvfs.store.interface import Delete
from csvfs.store.revoked import REVOKED, revoked_serials
from csvfs.wire.control import pack_value, unpack_value
from tests.etcd_server import EtcdServer, free_ports, needs_etcd, running_etcd

PATIENCE_S = 60
CA, CA_KEY = make_authority("Tower")


# Members of the store: pure


def member(number: int, *, votes: bool = True, name: str | None = None) -> StoreMember:
    urls = (f"https://10.0.0.{number}:7004",), (f"https://10.0.0.{number}:7003",)
    return StoreMember(number, f"n{number}" if name is None else name, *urls, not votes)


def test_the_first_three_machines_get_a_member_and_a_witness_only_where_there_is_none_too_many() -> None:
    three = [member(1), member(2), member(3)]
    for count in range(3):
        assert gets_member(three[:count], "https://10.0.0.9:7004", is_witness=False)
    assert not gets_member(three, "https://10.0.0.9:7004", is_witness=False)
    assert gets_member(three[:2], "https://10.0.0.9:7004", is_witness=True)
    with pytest.raises(Conflict, match="a witness is for two nodes"):
        gets_member(three, "https://10.0.0.9:7004", is_witness=True)
    # Who was added by an earlier try, and asks again, is the third and not a fourth.
    assert gets_member(three, "https://10.0.0.3:7004", is_witness=True)


@pytest.mark.parametrize(
    ("members", "up", "may_leave", "may_be_away"),
    [
        ([1], {1}, False, False),
        ([1, 2], {1, 2}, True, False),
        ([1, 2], {2}, True, False),
        ([1, 2, 3], {1, 2, 3}, True, True),
        ([1, 2, 3], {2, 3}, True, True),
        ([1, 2, 3], {1, 2}, False, False),
        ([1, 2, 3, 4], {2, 3}, True, False),
        ([1, 2, 3, 4], {1, 2}, False, False),
    ],
)
def test_a_member_leaves_the_store_only_when_the_others_are_a_majority_by_themselves(
    members: list[int], up: set[int], may_leave: bool, may_be_away: bool
) -> None:
    found = [member(number) for number in members]
    assert (not removal_objection(found, up, found[0])) is may_leave
    assert (not absence_objection(found, up, "n1")) is may_be_away


def test_a_member_that_does_not_vote_is_never_missed() -> None:
    found = [member(1), member(2, votes=False)]
    assert not removal_objection(found, {1}, found[1])
    assert not absence_objection(found, {1}, "n2")
    assert not absence_objection(found, {1}, "n9")
    assert member(2, name="").is_of("n2", "10.0.0.2")
    assert not member(2, name="").is_of("n1", "10.0.0.1")


# Being let in


@dataclass
class Cluster:
    """A store of one member, and what a node that lets others in has."""

    store: EtcdStore
    client: EtcdClient
    place: EtcdPlace

    def admission(self, ahead_s: float = 0) -> Admission:
        return Admission(self.store, self.client, self.place, lambda: time.time() + ahead_s)

    async def token(self) -> Token:
        return parse_token(await make_token(self.store, self.place, "n1", 3600))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with running_etcd(tmp_path_factory.mktemp("etcd")) as servers:
        yield servers[0]


@pytest.fixture
async def cluster(server: EtcdServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(etcd_members, "LEARNER_POLL_S", 0.02)
    store, client = EtcdStore(server.place), EtcdClient(server.place)
    await store.transact([], [Delete(item.key) for item in await store.list("")])
    await store.put("cluster", pack_value({"id": bytes(16), "name": "Tower"}))
    await store.put(NODES + "n1", pack_value({"address": "10.0.0.1"}))
    place = EtcdPlace(tmp_path / "etcd")
    write_certificates(place, issue(CA, CA_KEY, "n1", "127.0.0.1"), CA_KEY)
    place.write_endpoints([Endpoint("10.0.0.1", 7003)])
    write_member(place, {"initial-cluster-token": "csvfs Tower 1"})
    yield Cluster(store, client, place)
    for found in await etcd_members.list_members(client):
        if found.is_learner:
            await etcd_members.remove_member(client, found)
    client.close()
    await store.close()


def request_of(token: Token, node: str, last: int, csr: bytes = b"", *, is_witness: bool = False) -> JoinRequest:
    request = JoinRequest(
        token.id, csr or make_request(node)[1], node, f"10.0.0.{last}", 7000, is_witness
    )
    return replace(request, mac=proof(verifier_of(token.secret), request.asked()))


@needs_etcd
async def test_a_machine_that_lost_the_answer_asks_again_and_is_let_in_once(cluster: Cluster) -> None:
    token = await cluster.token()
    key, csr = make_request("n2")
    answer = await cluster.admission().admit(request_of(token, "n2", 2, csr))
    assert is_pair(answer.ca, answer.certificate, key)
    assert (answer.cluster, answer.ca_key, answer.member_token) == ("Tower", CA_KEY, "csvfs Tower 1")
    assert ("n2", "https://10.0.0.2:7004") in answer.peers
    again = await cluster.admission().admit(request_of(token, "n2", 2, make_request("n2", key)[1]))
    assert again == answer
    with pytest.raises(AccessDenied, match="used already, by node n2"):
        await cluster.admission().admit(request_of(token, "n2", 2))
    with pytest.raises(AccessDenied, match="used already, by node n2"):
        await cluster.admission().admit(request_of(token, "n3", 3))


@needs_etcd
async def test_of_two_machines_with_one_token_exactly_one_is_let_in(cluster: Cluster) -> None:
    token = await cluster.token()
    ends: list[object] = []

    async def try_to_join(last: int) -> None:
        try:
            ends.append(await cluster.admission().admit(request_of(token, f"n{last}", last)))
        except AccessDenied as error:
            ends.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(try_to_join, 2)
        nursery.start_soon(try_to_join, 3)
    assert sorted(type(end).__name__ for end in ends) == ["AccessDenied", "JoinAnswer"]
    assert len(await cluster.store.list(CERTIFICATES)) == 1


@needs_etcd
async def test_a_token_that_is_unknown_guessed_or_too_old_lets_nobody_in(cluster: Cluster) -> None:
    token = await cluster.token()
    with pytest.raises(AccessDenied, match="has expired"):
        await cluster.admission(ahead_s=3601).admit(request_of(token, "n2", 2))
    with pytest.raises(AccessDenied, match="does not prove"):
        await cluster.admission().admit(request_of(replace(token, secret=bytes(32)), "n2", 2))
    with pytest.raises(AccessDenied, match="does not know"):
        await cluster.admission().admit(request_of(replace(token, id=bytes(8)), "n2", 2))
    with pytest.raises(AccessDenied, match="does not prove"):
        await cluster.admission().admit(replace(request_of(token, "n2", 2), address="10.0.0.66"))
    assert not await cluster.store.list(CERTIFICATES)
    item = (await cluster.store.list(TOKENS))[0]
    assert token.secret not in item.value  # a hash of it
    assert item.lease  # and it goes by itself


@needs_etcd
async def test_names_and_addresses_that_are_there_or_impossible_are_refused_and_the_token_stays_good(cluster: Cluster) -> None:
    token = await cluster.token()
    with pytest.raises(Exists, match=r"there is a node n1 already, at 10\.0\.0\.1"):
        await cluster.admission().admit(request_of(token, "n1", 2))
    with pytest.raises(Exists, match=r"node n1 has the address 10\.0\.0\.1 already"):
        await cluster.admission().admit(request_of(token, "n2", 1))
    for changed in ({"node": "../n2"}, {"address": "0.0.0.0"}, {"address": "there"}, {"port_base": 0}, {"csr": b"no"}):
        request = replace(request_of(token, "n2", 2), **changed)  # type: ignore[arg-type]
        if "node" in changed:
            request = replace(request, csr=make_request("../n2")[1])
        request = replace(request, mac=proof(verifier_of(token.secret), request.asked()))
        with pytest.raises(BadRequest):
            await cluster.admission().admit(request)
    assert (await cluster.admission().admit(request_of(token, "n2", 2))).certificate


@needs_etcd
async def test_an_evicted_machine_does_not_come_back_by_the_token_it_has_used(cluster: Cluster) -> None:
    token = await cluster.token()
    key, csr = make_request("n2")
    await cluster.admission().admit(request_of(token, "n2", 2, csr))
    issued = unpack_value((await cluster.store.get(CERTIFICATES + "n2")).value)  # type: ignore[union-attr]
    changes = [Delete(CERTIFICATES + "n2"), Delete(NODES + "n2")]
    await cluster.store.transact([], changes)
    await cluster.store.put(EVICTED + "n2", pack_value({"when": 17}))
    await cluster.store.put(REVOKED + issued["serial"], pack_value({"node": "n2", "when": 17}))
    with pytest.raises(AccessDenied, match="was evicted since"):
        await cluster.admission().admit(request_of(token, "n2", 2, make_request("n2", key)[1]))
    serial = int(issued["serial"], 16)
    assert await revoked_serials(cluster.store) == [serial]
    assert await evicted_at(cluster.store, "n2", serial) == 17
    # With a new token it is a new node, whose new certificate is good.
    await cluster.admission().admit(request_of(await cluster.token(), "n2", 2))
    assert await cluster.store.get(EVICTED + "n2") is None
    assert await evicted_at(cluster.store, "n2", serial + 1) == 0
    assert await evicted_at(cluster.store, "n2", serial) == 17


@needs_etcd
async def test_a_machine_that_joined_and_never_started_holds_up_the_next_one_which_is_told_why(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await cluster.token(), await cluster.token()
    await cluster.admission().admit(request_of(first, "n2", 2))
    csr = make_request("n3")[1]
    with monkeypatch.context() as hurry, pytest.raises(Conflict, match="start that node"):
        hurry.setattr(etcd_members, "LEARNER_WAIT_S", 0)
        await cluster.admission().admit(request_of(second, "n3", 3, csr))
    for found in await etcd_members.list_members(cluster.client):
        if found.is_learner:
            await etcd_members.remove_member(cluster.client, found)
    assert (await cluster.admission().admit(request_of(second, "n3", 3, csr))).peers


@needs_etcd
async def test_a_witness_gets_a_member_and_not_the_key_of_the_authority(cluster: Cluster) -> None:
    answer = await cluster.admission().admit(request_of(await cluster.token(), "w", 9, is_witness=True))
    assert answer.peers and not answer.ca_key
    assert await cluster.store.get(NODES + "w") is None


# The desk


@dataclass
class Desk:
    desk: JoinDesk
    endpoint: Endpoint


@pytest.fixture
async def desk(cluster: Cluster, nursery: trio.Nursery, tmp_path: Path) -> Desk:
    (port,) = free_ports(1)
    text = f'node = "n1"\naddress = "127.0.0.1"\nport_base = {port - 5}\nstore = "etcd:{cluster.place.directory}"\n'
    config = parse_config(text.encode(), tmp_path / "node.toml")
    desk = JoinDesk(config, cluster.store, cluster.place, cluster.admission())
    await nursery.start(desk.serve)
    return Desk(desk, Endpoint("127.0.0.1", config.join_port))


@needs_etcd
async def test_a_machine_joins_at_a_desk_that_shows_the_right_authority_and_at_no_other(cluster: Cluster, desk: Desk) -> None:
    token = replace(await cluster.token(), desks=(desk.endpoint,))
    with trio.fail_after(PATIENCE_S):
        with pytest.raises(AccessDenied, match="its CA is another one"):
            await ask_to_join(replace(token, fingerprint=bytes(32)), request_of(token, "n2", 2))
        with pytest.raises(AccessDenied, match="does not prove"):
            await ask_to_join(token, replace(request_of(token, "n2", 2), mac=bytes(32)))
        answer = await ask_to_join(token, request_of(token, "n2", 2))
        assert isinstance(answer, JoinAnswer) and answer.cluster == "Tower"
        assert await ask_standing(desk.endpoint, CA, "n2", 1) == 0
    assert desk.desk.refused == 1


@needs_etcd
async def test_a_desk_goes_on_whatever_it_is_sent(desk: Desk) -> None:
    """Bytes that are no TLS, messages that are none, too large, of questions that it does not know, and half ones."""
    tls = tls_for(CA)
    packed = [
        SIZE.pack(MESSAGE_SIZE_MAX + 1), SIZE.pack(0), SIZE.pack(3) + b"\xc1\xc1\xc1", SIZE.pack(1) + b"\x90",
        pack_message({"ask": "the way"}), pack_message({"ask": 7}), pack_message({"ask": "join", "node": "n2"}),
        pack_message({"ask": "standing", "node": "n2", "serial": "x"}), pack_message({"ask": "standing"}),
        pack_message({"ask": "standing", "node": "\x00" * 60, "serial": "1"}), SIZE.pack(100) + b"half of",
    ]  # fmt: skip
    with trio.fail_after(PATIENCE_S):
        plain = await trio.open_tcp_stream("127.0.0.1", desk.endpoint.port)
        await plain.send_all(b"GET / HTTP/1.1\r\n\r\n" * 100)
        await plain.aclose()
        for message in packed:
            transport = await trio.open_tcp_stream("127.0.0.1", desk.endpoint.port)
            stream = trio.SSLStream(transport, tls, server_hostname="127.0.0.1")
            await stream.do_handshake()
            await stream.send_all(message)
            if message.endswith(b"half of"):
                await trio.aclose_forcefully(transport)
                continue
            try:
                while await stream.receive_some(4096):
                    pass
            except (trio.BrokenResourceError, ssl.SSLError):
                pass
            await trio.aclose_forcefully(transport)
        while desk.desk.open_count:
            await trio.sleep(0.01)
        assert (await ask(desk.endpoint, tls, {"ask": "ca"}))["ca"] == CA
        with pytest.raises(ProtocolError):
            await ask(desk.endpoint, tls, {"ask": "join"})
    assert desk.desk.refused >= len(packed)


@needs_etcd
async def test_a_desk_takes_only_so_many_at_once_and_closes_on_the_rest(desk: Desk) -> None:
    idle = [await trio.open_tcp_stream("127.0.0.1", desk.endpoint.port) for _ in range(CONNECTIONS_MAX)]
    with trio.fail_after(PATIENCE_S):
        while desk.desk.open_count < CONNECTIONS_MAX:
            await trio.sleep(0.01)
        one_more = await trio.open_tcp_stream("127.0.0.1", desk.endpoint.port)
        assert await one_more.receive_some(1) == b""
        for stream in idle:
            await stream.aclose()
        while desk.desk.open_count:
            await trio.sleep(0.01)
        assert (await ask(desk.endpoint, tls_for(CA), {"ask": "ca"}))["ca"] == CA
