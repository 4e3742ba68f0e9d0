"""A cluster made on bare machines by the words of README, "Three real machines": and who is not let in."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import trio

from csvfs.admin.etcd_members import StoreMember, list_members
from csvfs.admin.join_token import format_token, parse_token
from csvfs.admin.lab_network import run_in_netns
from csvfs.errors import Unavailable
from csvfs.store.etcd_client import EtcdClient
from csvfs.store.etcd_place import EtcdPlace
from tests.bare_machines import WAIT_S, Machine, bare_machines, needs_machines, wait_for

pytestmark = needs_machines


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Machine]]:
    with bare_machines(4) as machines:
        yield machines


def members_of(machine: Machine, within_s: float = WAIT_S) -> list[StoreMember]:
    """The members of the cluster store, as it lets this machine know."""

    async def ask() -> list[StoreMember]:
        deadline = trio.current_time() + within_s
        client = EtcdClient(EtcdPlace(machine.directory / "var/lib/csvfs/etcd"))
        try:
            while True:
                try:
                    return await list_members(client)
                except Unavailable:
                    if trio.current_time() > deadline:
                        raise
        finally:
            client.close()

    return run_in_netns(machine.netns, lambda: trio.run(ask))


def refusal_by_store(machine: Machine) -> str:
    """What the store says to this machine, which it must not let know anything; a busy one says it later."""
    with pytest.raises(Unavailable) as refused:
        members_of(machine, within_s=0)
    return str(refused.value)


def evict(machine: Machine, node: str) -> str:
    """As soon as nothing speaks against it: volumes may be between two coordinators."""
    wait_for(lambda: "can be evicted" in machine.run("csvfs", "node", "evict", node, "--dry-run"), f"{node} to be free")
    return machine.run("csvfs", "node", "evict", node)


def states(machine: Machine) -> dict[str, str]:
    return {row["name"]: row["state"] for row in json.loads(machine.run("csvfs", "node", "list", "--json"))}


def up_nodes(machine: Machine) -> set[str]:
    return {node for node, state in states(machine).items() if state == "up"}


def test_three_machines_become_a_cluster_by_the_steps_of_the_readme(machines: list[Machine]) -> None:
    first, *others = machines[:3]
    assert "n1" in first.run("csvfs", "cluster", "create", "Tower")
    first.start()
    wait_for(lambda: up_nodes(first), "the first node")
    for machine in others:
        token = first.run("csvfs", "cluster", "token").strip()
        machine.run("csvfs", "cluster", "join", token)
        machine.start()
    wait_for(lambda: up_nodes(first) == {"n1", "n2", "n3"}, "all nodes up")
    first.run("csvfs", "pool", "create")
    for machine in machines[:3]:
        machine.run("csvfs", "drive", "add", machine.drive)
    others[1].run("csvfs", "volume", "create", "Volume1", "--resiliency", "mirror", "--copies", "3")
    for machine in machines[:3]:  # it is there on the node that asked for it, and on the others soon
        wait_for(lambda machine=machine: machine.has_mounted("/clusterstorage/Volume1"), f"the volume on {machine.name}")
    first.run("dd", "of=/clusterstorage/Volume1/guest", "conv=fsync", "status=none", input=b"written on n1" * 1000)
    assert others[0].run("cat", "/clusterstorage/Volume1/guest") == "written on n1" * 1000


def test_a_token_lets_one_machine_in_once_for_an_hour_and_into_its_own_cluster(machines: list[Machine]) -> None:
    first, _, third, stranger = machines
    used = first.run("csvfs", "cluster", "token").strip()
    taken = stranger.refused("csvfs", "cluster", "join", used, "--node", "n2")
    assert "there is a node n2 already, at 10.77.0.2" in taken
    taken = stranger.refused("csvfs", "cluster", "join", used, "--address", third.address)
    assert "node n3 has the address 10.77.0.3 already" in taken
    assert "this machine is in a cluster" in third.refused("csvfs", "cluster", "join", used)

    late = first.run("csvfs", "cluster", "token", "--valid", "1").strip()
    time.sleep(1.5)
    assert "expired" in stranger.refused("csvfs", "cluster", "join", late)
    token = parse_token(first.run("csvfs", "cluster", "token"))
    of_others = format_token(replace(token, fingerprint=bytes(32)))
    assert "its CA is another one" in stranger.refused("csvfs", "cluster", "join", of_others)
    guessed = format_token(replace(token, secret=bytes(32)))
    assert "does not prove its token" in stranger.refused("csvfs", "cluster", "join", guessed)

    assert "n4 has joined cluster Tower" in stranger.run("csvfs", "cluster", "join", used)
    other = 'node = "n5"\naddress = "10.77.0.5"\nstore = "etcd:/var/lib/other/etcd"\n'
    stranger.run("tee", "/etc/other.toml", input=other.encode())
    again = stranger.refused("env", "CSVFS_CONFIG=/etc/other.toml", "csvfs", "cluster", "join", used)
    assert "the join token was used already, by node n4" in again


def test_the_first_three_machines_run_the_store_and_the_fourth_does_not(machines: list[Machine]) -> None:
    places = [EtcdPlace(machine.directory / "var/lib/csvfs/etcd") for machine in machines]
    assert [place.member_path.exists() for place in places] == [True, True, True, False]
    assert [place.ca_key_path.exists() for place in places] == [True, True, True, False]
    members = members_of(machines[0])
    assert [member.name for member in members] == ["n1", "n2", "n3"]
    wait_for(lambda: not any(member.is_learner for member in members_of(machines[0])), "all members to vote")


def test_an_evicted_node_is_told_so_and_gets_nothing(machines: list[Machine]) -> None:
    first, second, third, fourth = machines
    fourth.start()
    wait_for(lambda: "n4" in up_nodes(first), "n4")
    assert "evict it from another node" in fourth.refused("csvfs", "node", "evict", "n4")
    assert "node n4 is evicted" in evict(first, "n4")
    assert fourth.wait_end() == 78
    assert "node n4 was evicted from the cluster" in fourth.node_log()
    assert "n4" not in first.run("csvfs", "node", "list")

    wait_for(lambda: "broke off" in refusal_by_store(fourth), "the store to close on n4's certificate")

    # A node with a member of the store, which is switched off.
    third.kill()
    wait_for(lambda: "n3" not in up_nodes(first), "n3 to be gone")
    evict(first, "n3")
    assert [member.name for member in members_of(first)] == ["n1", "n2"]
    assert second.run("cat", "/clusterstorage/Volume1/guest") == "written on n1" * 1000
    assert "without a majority" in first.refused("csvfs", "node", "drain", "n2")

    # It comes back and believes that it still is one.
    third.plug_in()
    third.start()
    assert third.wait_end() == 78
    assert "node n3 was evicted from the cluster" in third.node_log()



def test_a_witness_lets_one_of_two_nodes_die(machines: list[Machine]) -> None:
    """What was n4 is let in again, as a new one: it gets the place in the store that is free now."""
    first, second, _, fourth = machines
    fourth.run("mv", "/var/lib/csvfs/etcd", "/var/lib/csvfs/before")
    fourth.run("rm", "/etc/csvfs/node.toml")
    token = first.run("csvfs", "cluster", "token").strip()
    fourth.run("csvfs", "cluster", "join", token, "--witness")
    fourth.start()
    wait_for(lambda: [(one.name, one.is_learner) for one in members_of(first)][2:] == [("n4", False)], "its vote")
    assert not EtcdPlace(fourth.directory / "var/lib/csvfs/etcd").ca_key_path.exists()
    second.kill()
    first.run("dd", "of=/clusterstorage/Volume1/later", "conv=fsync", "status=none", input=b"without n2")
    assert first.run("cat", "/clusterstorage/Volume1/later") == "without n2"
    wait_for(lambda: states(first) == {"n1": "up", "n2": "down", "n4": "witness"}, "n2 to be gone")
    assert fourth.stop() == 0
