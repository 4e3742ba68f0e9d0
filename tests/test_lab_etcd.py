"""A cluster with etcd as its store: members die, the majority is lost, and programs go on."""

import json
import subprocess
from collections.abc import Iterator

import pytest
import trio

from csvfs.admin.lab_network import run_in_netns
from csvfs.errors import Unavailable
from csvfs.store.etcd_client import EtcdClient
from csvfs.store.etcd_http import Endpoint
from csvfs.store.etcd_messages import range_request
from csvfs.store.etcd_place import EtcdPlace
from csvfs.units import GIB
from tests.etcd_server import needs_etcd
from tests.lab_cluster import LabCluster, needs_lab, running_lab, wait_for

WAIT_S = 90
NODE_LEASE_MS = 12_000

pytestmark = [pytest.mark.lab, needs_lab, needs_etcd]

# Writes, syncs and reads back until its standard input ends; any error ends it with another status.
WRITER = """
import os, select, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
count = 0
while not select.select([sys.stdin], [], [], 0.02)[0]:
    count += 1
    block = count.to_bytes(8, "big") * 512
    os.pwrite(file, block, count % 64 * 4096)
    os.fsync(file)
    assert os.pread(file, 4096, count % 64 * 4096) == block
    print(count, flush=True)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LabCluster]:
    with running_lab(store="etcd", drive_size=GIB) as cluster:
        for node in cluster.files.nodes():
            # Long leases: what a busy machine makes late here is not what dies in these tests.
            cluster.kill(node.name)
            node.config.write_text(node.config.read_text() + f"[options]\nnode_lease_ms = {NODE_LEASE_MS}\n")
            cluster.start(node.name)
        wait_for(lambda: served(cluster) == 3, within_s=WAIT_S)
        cluster.run("n1", "csvfs", "volume", "create", "V", "--resiliency", "mirror", "--copies", "3")
        for node in cluster.files.nodes():
            wait_for(lambda name=node.name: is_mounted(cluster, name), within_s=WAIT_S)
        yield cluster


def served(cluster: LabCluster) -> int:
    """How many drives serve, as every node sees it."""
    counts = []
    for node in ("n1", "n2", "n3"):
        rows = json.loads(cluster.run(node, "csvfs", "drive", "list", "--json", check=False) or b"[]")
        counts.append(sum(row["state"] == "OK" for row in rows))
    return min(counts)


def is_mounted(cluster: LabCluster, node: str) -> bool:
    found = cluster.run(node, "sh", "-c", "mountpoint -q /clusterstorage/V && echo ok", check=False)
    return b"ok" in found


class Writer:
    """A program on a node, at work while things happen."""

    def __init__(self, cluster: LabCluster, node: str) -> None:
        argv = ("python3", "-u", "-c", WRITER, f"/clusterstorage/V/by-{node}")
        pipe = subprocess.PIPE
        self._cluster = cluster
        self._process = cluster.start_command(node, *argv, stdin=pipe, stdout=pipe, stderr=pipe)
        self.wait_writes(1)

    def wait_writes(self, count: int) -> None:
        assert self._process.stdout is not None
        for _ in range(count):
            if not self._process.stdout.readline():
                said = self._process.communicate()[1].decode()[-2000:]
                raise AssertionError(f"the writer has ended: {said}\n{self._cluster.logs()}")

    def end(self) -> None:
        _, errors = self._process.communicate(timeout=WAIT_S)
        assert self._process.returncode == 0, errors.decode()[-2000:]


def children(cluster: LabCluster) -> dict[str, dict[str, list[int]]]:
    """All of csvfs's own processes: when none of them was replaced, nobody stopped serving."""
    roles = ("node", "drives", "coordinator", "mount")
    return {
        node: {role: cluster.pids(node).get(role, []) for role in roles} for node in ("n1", "n2", "n3")
    }


def store_pid(cluster: LabCluster, node: str) -> int:
    pids = cluster.pids(node).get("store", [])
    return pids[0] if len(pids) == 1 else 0


def test_members_of_the_store_die_one_after_the_other_and_nobody_notices(cluster: LabCluster) -> None:
    before = children(cluster)
    writer = Writer(cluster, "n2")
    for node in ("n1", "n2", "n3"):
        pid = store_pid(cluster, node)
        assert pid
        cluster.kill(node, "store")
        writer.wait_writes(20)
        wait_for(lambda node=node, pid=pid: store_pid(cluster, node) not in (0, pid), WAIT_S)  # type: ignore[misc]
        wait_for(lambda node=node: member_answers(cluster, node), WAIT_S)  # type: ignore[misc]
    writer.wait_writes(20)
    writer.end()
    assert children(cluster) == before, cluster.logs()


def member_answers(cluster: LabCluster, node: str) -> bool:
    """Whether the node's own member takes part again: else the next one killed were the second."""
    place = EtcdPlace(cluster.node(node).etcd)

    async def ask() -> None:
        client = EtcdClient(place, [Endpoint(cluster.node(node).address, 7003)])
        try:
            await client.call(lambda c: c.post("/v3/kv/range", range_request(b"nothing")), deadline_s=1)
        finally:
            client.close()

    try:
        run_in_netns(cluster.files.netns, lambda: trio.run(ask))
    except Unavailable:
        return False
    return True


def test_without_majority_changes_stop_and_say_so_and_all_goes_on_after_it(cluster: LabCluster) -> None:
    writer = Writer(cluster, "n1")
    cluster.partition("n2")
    cluster.partition("n3")
    wait_for(lambda: cluster.states()["n1"] == "no store", WAIT_S)
    creating = ("volume", "create", "W", "--resiliency", "mirror", "--copies", "3")
    refused = cluster.start_command("n1", "csvfs", *creating, stderr=subprocess.PIPE)
    _, said = refused.communicate(timeout=WAIT_S)
    assert refused.returncode == 1
    assert b"no majority" in said and b"10.77.0.1:7003" in said
    cluster.heal()
    wait_for(lambda: set(cluster.states().values()) == {"up"}, WAIT_S)
    writer.wait_writes(20)
    writer.end()
    cluster.run("n1", "csvfs", *creating)


def test_a_node_with_its_member_is_lost_and_comes_back(cluster: LabCluster) -> None:
    writer = Writer(cluster, "n1")
    cluster.kill("n3")
    writer.wait_writes(100)
    cluster.start("n3")
    writer.wait_writes(20)
    writer.end()
    wait_for(lambda: cluster.run("n3", "sh", "-c", "test -e /clusterstorage/V/by-n1 && echo yes", check=False), WAIT_S)
    assert cluster.run("n3", "cat", "/clusterstorage/V/by-n1") == cluster.run("n2", "cat", "/clusterstorage/V/by-n1")


def test_a_stranger_without_certificate_gets_nothing_from_the_store(cluster: LabCluster) -> None:
    program = "import urllib.request, ssl; c = ssl._create_unverified_context(); print(urllib.request.urlopen("
    url = f"https://{cluster.node('n1').address}:7003"
    for path in ("/version", "/v3/kv/range"):
        said = cluster.run("n2", "python3", "-c", f"{program}'{url}{path}', b'{{}}', context=c).read())", check=False)
        assert said == b""
    said = cluster.run("n2", "python3", "-c", f"{program}'{url.replace('https', 'http')}/version').read())", check=False)
    assert said == b""
