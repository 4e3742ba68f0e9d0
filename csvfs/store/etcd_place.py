"""The directory of a node's etcd: who the members are, with which certificates to speak to them.

Place      store floor, below etcd_client.py.
Layout     DIR/endpoints               host:port of each member's client side, one a line, this node's first
           DIR/ca.crt, node.crt, node.key   present: TLS, each side showing a certificate of the cluster's CA
           DIR/ca.key                  signs the nodes' certificates; on nodes with a member of the store
           DIR/revoked.crl             certificates that the member takes no more; see admin/etcd_member.py
           DIR/member.json             etcd's own configuration, if this node runs a member
           DIR/data/                   that member's data
Writer     the lab, or whoever sets a node up; `csvfs node run` keeps `endpoints` up to date.
"""

import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from csvfs.errors import BadRequest, Unavailable
from csvfs.store.etcd_http import Endpoint

ENDPOINTS_MAX = 16
_FILE_SIZE_MAX = 16_384  # bytes


@dataclass(slots=True, frozen=True)
class EtcdPlace:
    """The files of one directory; reads when asked."""

    directory: Path

    @property
    def endpoints_path(self) -> Path:
        return self.directory / "endpoints"

    @property
    def member_path(self) -> Path:
        return self.directory / "member.json"

    @property
    def data_path(self) -> Path:
        return self.directory / "data"

    @property
    def ca_path(self) -> Path:
        return self.directory / "ca.crt"

    @property
    def ca_key_path(self) -> Path:
        return self.directory / "ca.key"

    @property
    def revoked_path(self) -> Path:
        return self.directory / "revoked.crl"

    @property
    def certificate_path(self) -> Path:
        return self.directory / "node.crt"

    @property
    def key_path(self) -> Path:
        return self.directory / "node.key"

    @property
    def has_tls(self) -> bool:
        return self.ca_path.exists()

    @property
    def scheme(self) -> str:
        return "https" if self.has_tls else "http"

    def endpoints(self) -> list[Endpoint]:
        """Raises Unavailable: this node knows of no cluster yet. BadRequest: the file is damaged."""
        try:
            with self.endpoints_path.open("rb") as file:
                text = file.read(_FILE_SIZE_MAX).decode(errors="replace")
        except OSError as error:
            raise Unavailable(
                f"{self.endpoints_path}: {(error.strerror or str(error)).lower()}; this node does not"
                " know the members of its cluster store; write one host:port a line"
            ) from None
        found = [parse_endpoint(line, self.endpoints_path) for line in text.split()]
        if not 0 < len(found) <= ENDPOINTS_MAX:
            raise BadRequest(f"{self.endpoints_path} names {len(found)} members; 1 to {ENDPOINTS_MAX} are possible")
        return found

    def write_endpoints(self, endpoints: list[Endpoint]) -> None:
        """Replace the list, unless it is this already. Raises OSError."""
        text = "".join(f"{endpoint}\n" for endpoint in endpoints)
        if self.endpoints_path.exists() and self.endpoints_path.read_text() == text:
            return
        staged = self.endpoints_path.with_name("endpoints.new")
        staged.write_text(text)
        os.replace(staged, self.endpoints_path)

    def tls(self) -> ssl.SSLContext | None:
        """How to speak to members; None: without TLS. Raises Unavailable: the certificates do not work."""
        if not self.has_tls:
            return None
        try:
            context = ssl.create_default_context(cafile=os.fspath(self.ca_path))
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(os.fspath(self.certificate_path), os.fspath(self.key_path))
        except (OSError, ssl.SSLError) as error:
            raise Unavailable(f"{self.directory}: its certificates do not work: {error}") from None
        return context


def parse_endpoint(text: str, where: object) -> Endpoint:
    """`10.0.0.1:7003` or `[fd00::1]:7003`. `where`: for the message. Raises BadRequest."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
        raise BadRequest(f"{where}: {text[:80]!r} is no endpoint; write 10.0.0.1:7003")
    return Endpoint(host, int(port))
