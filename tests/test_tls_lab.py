"""A lab with TLS: strangers in its network get no byte in or out of a node, are counted, and `csvfs status` shows them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from csvfs.admin.cluster_ca import issue, make_authority, write_certificates
from csvfs.admin.lab_files import PORT_BASE
from csvfs.config import COORDINATOR_PORT, DRIVE_SERVER_PORT
from csvfs.store.etcd_place import EtcdPlace
from tests.lab_cluster import LabCluster, needs_lab, running_lab

pytestmark = [pytest.mark.lab, needs_lab]

# Arguments: address, port, directory of certificates, or nothing for none, or `plain`. Says what it got.
STRANGER = """
import socket, ssl, sys
from csvfs.wire.control import pack_call
from csvfs.wire.frames import Kind, pack_frame
address, port, place = sys.argv[1], int(sys.argv[2]), sys.argv[3]
got = b""
try:
    stream = socket.create_connection((address, port), timeout=120)
    if place != "plain":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if place:
            context.load_cert_chain(place + "/node.crt", place + "/node.key")
        stream = context.wrap_socket(stream)
    stream.sendall(pack_frame(Kind.CALL, 1, pack_call("status", {})))
    while more := stream.recv(65536):
        if not got and place != "plain":
            print("answered", flush=True)
        got += more
except (OSError, ssl.SSLError) as error:
    assert "timed out" not in str(error), error
if place == "plain":
    got = got[7:] if got[:1] == b"\\x15" else got  # TLS's own alert
print(len(got))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LabCluster]:
    with running_lab() as cluster:
        yield cluster


def knock(cluster: LabCluster, node: str, place: str) -> None:
    """At drive server and coordinator host of a node, from n1's network."""
    for port in (DRIVE_SERVER_PORT, COORDINATOR_PORT):
        argv = [sys.executable, "-c", STRANGER, cluster.node(node).address, str(PORT_BASE + port), place]
        assert cluster.run("n1", *argv) == b"0\n"


def refused(cluster: LabCluster, node: str) -> dict[str, int]:
    status = json.loads(cluster.run("n1", "csvfs", "status", "--json"))
    (found,) = [row["refused"] for row in status["nodes"] if row["name"] == node]
    assert isinstance(found, dict)
    return found


def test_strangers_get_nothing_are_counted_and_shown(cluster: LabCluster, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    write_certificates(EtcdPlace(foreign), issue(*make_authority("Others"), "n1", cluster.node("n1").address))
    assert refused(cluster, "n2") == {}
    for place in ("", str(foreign), "plain"):
        knock(cluster, "n2", place)
    assert refused(cluster, "n2") == {"no_certificate": 2, "foreign_certificate": 2, "not_tls": 2}
    shown = cluster.run("n1", "csvfs", "status").decode()
    assert "n2 refused 6 connections: 2 foreign certificate, 2 no certificate, 2 not tls" in shown
    assert refused(cluster, "n3") == {}


def test_an_evicted_nodes_certificate_gets_nothing_any_more(cluster: LabCluster) -> None:
    place = str(cluster.node("n3").tls)
    argv = [sys.executable, "-c", STRANGER, cluster.node("n1").address, str(PORT_BASE + DRIVE_SERVER_PORT), place]
    running = cluster.start_command("n2", *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # it is answered, and waits for more
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == b"answered\n"
        cluster.run("n1", "csvfs", "node", "evict", "n3", "--yes")
        said = cluster.finish(running, within_s=120)  # its connection was closed
    finally:
        running.kill()
    assert int(said) > 0
    before = refused(cluster, "n1").get("revoked_certificate", 0)
    knock(cluster, "n1", place)
    assert refused(cluster, "n1")["revoked_certificate"] == before + 2
