"""The etcd member of a node: its configuration file, and the process.

Place      admin floor, below store_member.py and lab_store.py.
File       `member.json` (store/etcd_place.py) is etcd's own configuration file, in etcd's own words. Where it
           is there, `csvfs node run` runs the member; nowhere else is written whether a node has one.
Why so     heartbeat and election: a leader that dies is replaced after about a second, while the nodes' liveness
           pages are good for 2 to 2.5 s, so losing one member stops nobody.
           compaction: csvfs never asks for the past but to go on with a watch.
           the gateway: with a configuration file etcd leaves it out unless told.
"""

import ipaddress
import json
import shutil
from typing import Any

from csvfs.admin.files import write_whole
from csvfs.errors import NotSupported
from csvfs.store.etcd_place import EtcdPlace

HEARTBEAT_MS = 60
ELECTION_MS = 600
REVISIONS_KEPT = 10_000
QUOTA = 2 << 30  # bytes; the store itself has a few hundred KiB
REQUEST_SIZE_MAX = 8 << 20  # bytes; `pool recover` writes everything in one transaction
TRANSACTION_CHANGES_MAX = 8192


def etcd_program() -> str:
    """Raises NotSupported: etcd is not installed."""
    found = shutil.which("etcd")
    if found is None:
        raise NotSupported("there is no etcd on this machine: apt-get install etcd-server")
    return found


def url(scheme: str, address: str, port: int) -> str:
    """`https://10.0.0.1:7003`, or with brackets around an IPv6 address."""
    host = f"[{address}]" if ipaddress.ip_address(address).version == 6 else address
    return f"{scheme}://{host}:{port}"


def member_configuration(
    place: EtcdPlace,
    name: str,
    client_url: str,
    peer_url: str,
    peers: list[tuple[str, str]],
    *,
    token: str,
    is_new: bool,
) -> dict[str, Any]:
    """What goes into `member.json`.

    Args     peers: (name, peer URL) of all members, this one included. token: of the cluster, so that members
             of two never mistake each other. is_new: the cluster begins with these members.
    """
    values: dict[str, Any] = {
        "name": name,
        "data-dir": str(place.data_path),
        "listen-client-urls": client_url,
        "advertise-client-urls": client_url,
        "listen-peer-urls": peer_url,
        "initial-advertise-peer-urls": peer_url,
        "initial-cluster": ",".join(f"{peer}={peer_at}" for peer, peer_at in peers),
        "initial-cluster-token": token,
        "initial-cluster-state": "new" if is_new else "existing",
        "heartbeat-interval": HEARTBEAT_MS,
        "election-timeout": ELECTION_MS,
        "pre-vote": True,
        "strict-reconfig-check": True,
        "auto-compaction-mode": "revision",
        "auto-compaction-retention": str(REVISIONS_KEPT),
        "quota-backend-bytes": QUOTA,
        "max-request-bytes": REQUEST_SIZE_MAX,
        "max-txn-ops": TRANSACTION_CHANGES_MAX,
        "enable-grpc-gateway": True,
        "logger": "zap",
        "log-level": "warn",
    }
    if place.has_tls:
        security = {
            "cert-file": str(place.certificate_path),
            "key-file": str(place.key_path),
            "trusted-ca-file": str(place.ca_path),
            "client-cert-auth": True,
        }
        values |= {"client-transport-security": security, "peer-transport-security": security}
    return values


def write_member(place: EtcdPlace, values: dict[str, Any]) -> None:
    """Raises OSError."""
    write_whole(place.member_path, json.dumps(values, indent=1) + "\n")


def member_argv(place: EtcdPlace) -> tuple[str, ...]:
    """The command that runs the member. Raises NotSupported."""
    return (etcd_program(), "--config-file", str(place.member_path))
