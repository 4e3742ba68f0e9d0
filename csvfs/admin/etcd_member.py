"""The etcd member of a node: its configuration file, and the process.

Place      admin floor, below store_member.py and lab_store.py.
File       `member.json` (store/etcd_place.py) is in the words of etcd's own configuration file. Where it
           is there, `csvfs node run` runs the member; nowhere else is written whether a node has one.
Command    The same words as options of the command, because one thing cannot be said in the file: the list of
           certificates that are not taken any more (`revoked.crl`; etcd reads it anew for each connection).
Why so     heartbeat and election: a leader that dies is replaced within 1.2 s, while the nodes' liveness
           pages are good for 2 to 2.5 s, so losing one member stops nobody. Not shorter: a vote is flushed before it is
           given, so where flushes take longer than an election may, none ever ends (RELIABILITY.md, "Open").
           compaction: csvfs never asks for the past but to go on with a watch.
           the gateway: with a configuration file etcd leaves it out unless told.
"""

import ipaddress
import json
import shutil
from typing import Any

from csvfs.admin.cluster_ca import revocation_list
from csvfs.admin.files import write_whole
from csvfs.errors import Corrupt, NotFound, NotSupported
from csvfs.store.etcd_place import EtcdPlace

HEARTBEAT_MS = 60
ELECTION_MS = 600
REVISIONS_KEPT = 10_000
QUOTA = 2 << 30  # bytes; the store itself has a few hundred KiB
REQUEST_SIZE_MAX = 8 << 20  # bytes; `pool recover` writes everything in one transaction
TRANSACTION_CHANGES_MAX = 8192
# What the tables of the configuration file are called among the options.
_SECURITY = {"client-transport-security": "", "peer-transport-security": "peer-"}
_REVOKED = {"client-transport-security": "client-crl-file", "peer-transport-security": "peer-crl-file"}


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
    has_tls: bool | None = None,
) -> dict[str, Any]:
    """What goes into `member.json`.

    Args     peers: (name, peer URL) of all members, this one included. token: of the cluster, so that members
             of two never mistake each other. is_new: the cluster begins with these members. has_tls: None: as
             `place`, which may not be there yet, says.
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
    if place.has_tls if has_tls is None else has_tls:
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


def write_revoked(place: EtcdPlace, serials: list[int]) -> None:
    """The certificates that the member is not to take any more. Raises OSError."""
    write_whole(place.revoked_path, revocation_list(serials).decode())


def member_argv(place: EtcdPlace) -> tuple[str, ...]:
    """The command that runs the member. Raises NotSupported; Corrupt: `member.json` is damaged. OSError."""
    try:
        values = json.loads(place.member_path.read_text())
        options = [_option(name, value) for name, value in values.items() if not isinstance(value, dict)]
        for table, prefix in _SECURITY.items():
            options += [_option(prefix + name, value) for name, value in values.get(table, {}).items()]
            if table in values and place.revoked_path.exists():
                options.append(_option(_REVOKED[table], str(place.revoked_path)))
    except (ValueError, AttributeError):
        raise Corrupt(f"{place.member_path} is damaged; see ARCHITECTURE.md, Cluster store") from None
    return (etcd_program(), *options)


def member_token(place: EtcdPlace) -> str:
    """By which members of this cluster know each other, from this node's `member.json`. Raises NotFound, Corrupt."""
    try:
        values = json.loads(place.member_path.read_text())
        return str(values["initial-cluster-token"])
    except OSError:
        raise NotFound(f"{place.member_path} is not here: this node has no member of the cluster store") from None
    except (ValueError, KeyError, TypeError):
        raise Corrupt(f"{place.member_path} is damaged; see ARCHITECTURE.md, Cluster store") from None


def _option(name: str, value: object) -> str:
    return f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
