"""TLS 1.3 between nodes: who this node is, whom it believes, and the seal of one connection.

Place      net floor, below link.py. No socket is opened or waited for here, and nothing is read but certificates.
Identity   one per process, at its engine (`Engine.identity`); None: connections between nodes are not encrypted.
           Certificates are of the cluster's CA and bear the node's name as common name; both sides show one.
Seal       one per link, once its handshake is over (handshakes.py). Bytes go through two memory buffers of OpenSSL and
           not through an SSLSocket: that would cost two system calls per record of 16 KiB, this costs one per batch.
Limits     Each way at most SEAL_SIZE_MAX bytes and a record are between the link and its socket.
Not here   Tickets: each connection is made with certificates, so that a revoked one is never taken again by one.
           Change of keys: a link that carried more than 2^38 bytes is beyond RFC 8446's bound for AES-GCM (5.5), whose
           margin is then smaller than 2^-57; nothing breaks.
"""

import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from socket import socket as Socket

from csvfs.config import NodeConfig
from csvfs.errors import Unavailable
from csvfs.net.refusals import Reason, Refused
from csvfs.units import KIB

SEAL_SIZE_MAX = 256 * KIB  # stays in the processor's cache on its way through OpenSSL
JOINED_SIZE_MAX = 16 * KIB  # a record; pieces below this are joined, as each record costs a microsecond
CONTROL_SIZE_MAX = 64 * KIB  # what OpenSSL wants to answer by itself and nobody has sent yet

Bytes = memoryview | bytes | bytearray
# Of the process: a link reads from it at once, in the one thread, so that the rest of an event never lies here.
_received = bytearray(SEAL_SIZE_MAX)
_received_view = memoryview(_received)


@dataclass(slots=True, frozen=True)
class Peer:
    """What a verified certificate says."""

    node: str
    serial: int


class Handshake:
    """One side of a handshake, without I/O: what came goes into `advance`, what `to_send` returns goes out."""

    def __init__(self, identity: "Identity", *, accepting: bool) -> None:
        self._identity = identity
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = identity.accepting if accepting else identity.connecting
        self._session = context.wrap_bio(self._incoming, self._outgoing, server_side=accepting)

    def advance(self, received: Bytes) -> "Seal | None":
        """None: more must be sent and received.

        Raises   Refused: the other side is none of ours. `to_send` may have an alert that tells it so.
        """
        self._incoming.write(received)
        try:
            self._session.do_handshake()
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLError as error:
            raise Refused(*_explain(error)) from None
        peer = self._identity.check(self._session.getpeercert())
        return Seal(self._session, self._incoming, self._outgoing, peer)

    def to_send(self) -> bytes:
        return self._outgoing.read()


class Seal:
    """Encrypts and decrypts for one link.

    Errors   OSError, as of a socket: a record that does not verify, or an alert. Nothing of that record is returned.
    """

    __slots__ = ("_ended", "_full", "_incoming", "_outgoing", "_read", "_write", "peer", "unsent")

    def __init__(self, session: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, peer: Peer) -> None:
        self.peer = peer
        self.unsent: memoryview | None = None  # sealed, and not taken by the socket yet
        self._read = session.read
        self._write = session.write
        self._incoming = incoming
        self._outgoing = outgoing
        self._full = False  # the last receive filled its buffer, so there may be more
        self._ended = False  # the other side says that it sends no more

    def send(self, sock: Socket, pieces: Iterable[Bytes]) -> int:
        """Seal the first of `pieces` and send them; returns how many of their bytes were sealed.

        Those need not be kept: what the socket does not take at once is `unsent`, and leaves before anything else.
        Raises   BlockingIOError: the socket takes nothing, and nothing was sealed. OSError.
        """
        if self.unsent is not None:
            sent = sock.send(self.unsent)
            self.unsent = self.unsent[sent:] if sent < len(self.unsent) else None
            return 0
        taken = self._seal(pieces)
        sealed = self._outgoing.read()
        try:
            sent = sock.send(sealed)
        except BlockingIOError:  # the caller hears it when it comes again
            sent = 0
        if sent < len(sealed):
            self.unsent = memoryview(sealed)[sent:]
        return taken

    def _seal(self, pieces: Iterable[Bytes]) -> int:
        """SEAL_SIZE_MAX bytes and a little, or all: small ones joined to one record, large ones from where they lie."""
        write = self._write
        taken = sealed = 0
        room = JOINED_SIZE_MAX
        small: list[Bytes] = []
        for piece in pieces:
            size = len(piece)
            if size > room:
                if small:
                    sealed += write(b"".join(small))
                    small, room = [], JOINED_SIZE_MAX
                if taken >= SEAL_SIZE_MAX:
                    break
                if size > JOINED_SIZE_MAX:
                    part = memoryview(piece)[: SEAL_SIZE_MAX - taken]
                    sealed += write(part)
                    taken += len(part)
                    if len(part) < size:
                        break
                    continue
            small.append(piece)
            room -= size
            taken += size
        if small:
            sealed += write(b"".join(small) if len(small) > 1 else small[0])
        if sealed != taken:  # a memory buffer takes all
            raise OSError("TLS took a part of what was to be sent")
        return taken

    def receive_into(self, sock: Socket, view: memoryview) -> int:
        """Receive and open what there is, as much as fits into `view` (not empty); 0: the connection has ended.

        Raises   BlockingIOError: nothing whole has come. OSError: see above; what was whole before it is lost too.
        """
        incoming, read = self._incoming, self._read
        if not (self._full or self._ended or incoming.pending):
            received = sock.recv_into(_received)
            if received == 0:
                return 0
            incoming.write(_received_view[:received])
        end, size = 0, len(view)
        self._full = False
        try:
            while not self._ended:
                count: int = read(size - end, view[end:] if end else view)  # type: ignore[arg-type, assignment]
                end += count
                self._ended = count == 0
                self._full = end == size
                if self._full or not incoming.pending:
                    break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._ended = True
        if self._outgoing.pending > CONTROL_SIZE_MAX:
            raise OSError("the other side asks for new keys all the time")
        if end == 0 and not self._ended:
            raise BlockingIOError
        return end

    @property
    def has_more(self) -> bool:
        """Whether receive_into must be called again, though the socket may have nothing: no event would say so."""
        return self._full or self._ended or self._incoming.pending > 0


class Identity:
    """This node's certificate, the CA it believes, and the certificates that are not taken any more."""

    def __init__(self, node: str, directory: Path) -> None:
        """Raises Unavailable: the certificates do not work, or are not this node's."""
        self.node = node
        self._revoked: frozenset[int] = frozenset()
        self._links: dict[object, tuple[int, Callable[[Refused], None]]] = {}
        try:
            self.accepting = _context(ssl.PROTOCOL_TLS_SERVER, directory)
            self.accepting.num_tickets = 0
            self.connecting = _context(ssl.PROTOCOL_TLS_CLIENT, directory)
            own = self._meet_itself()
        except (OSError, Refused) as error:
            raise Unavailable(f"{directory}: the certificates of node {node} do not work: {error}") from None
        if own.node != node:
            raise Unavailable(f"{directory}: node.crt is the certificate of node {own.node}, not of {node}")

    def _meet_itself(self) -> Peer:
        """What others will see: found out at the start, and not by the first of them who refuses."""
        server, client = Handshake(self, accepting=True), Handshake(self, accepting=False)
        client.advance(b"")
        server.advance(client.to_send())
        seal = client.advance(server.to_send())
        if seal is None or server.advance(client.to_send()) is None:
            raise Refused(Reason.NOT_TLS, "a handshake with itself does not end")
        return seal.peer

    def check(self, certificate: object) -> Peer:
        """Of a chain that OpenSSL verified. Raises Refused: it bears no name, or is revoked."""
        peer = _peer_of(certificate)
        if peer.serial in self._revoked:
            raise Refused(Reason.REVOKED, f"the certificate of node {peer.node} is revoked: it was evicted")
        return peer

    def require(self, peer: Peer, node: str) -> None:
        """Raises Refused: it is not the certificate of `node`."""
        if not node or peer.node != node:
            raise Refused(Reason.WRONG_NODE, f"node {node or '(none)'} was wanted, the certificate is of node {peer.node}")

    def shake_hands_blocking(self, sock: Socket, node: str) -> ssl.SSLSocket:
        """For a connection that blocks, with the time-out that it has. Raises Refused, OSError; `sock` is used up."""
        sealed = self.connecting.wrap_socket(sock)
        try:
            self.require(self.check(sealed.getpeercert()), node)
        except BaseException:
            sealed.close()
            raise
        return sealed

    # -- who is there, and must go ----------------------------------------------------------------

    def opened(self, link: object, serial: int, close: Callable[[Refused], None]) -> None:
        """From now on `close` is called when that certificate is revoked."""
        self._links[link] = (serial, close)

    def closed(self, link: object) -> None:
        self._links.pop(link, None)

    def revoke(self, serials: Iterable[int]) -> int:
        """These certificates, all there are, are not taken any more; returns how many open links were closed for it."""
        self._revoked = frozenset(serials)
        doomed = [close for serial, close in self._links.values() if serial in self._revoked]
        for close in doomed:
            close(Refused(Reason.REVOKED, "its certificate was revoked: the node was evicted"))
        return len(doomed)


def open_identity(config: NodeConfig) -> Identity | None:
    """What `tls_dir` of the configuration says; None: no TLS. Raises Unavailable: its certificates do not work."""
    return None if config.tls_dir is None else Identity(config.node, config.tls_dir)


def _context(protocol: int, directory: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False  # names of nodes are compared by Identity.require: exactly, and on both sides
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(directory / "ca.crt")
    context.load_cert_chain(directory / "node.crt", directory / "node.key")
    return context


def _peer_of(certificate: object) -> Peer:
    """Raises Refused."""
    try:
        assert isinstance(certificate, dict)
        names = [text for row in certificate["subject"] for kind, text in row if kind == "commonName"]
        (name,) = names
        return Peer(str(name), int(certificate["serialNumber"], 16))
    except (AssertionError, KeyError, TypeError, ValueError):
        raise Refused(Reason.FOREIGN, "its certificate bears no name of a node") from None


def _explain(error: ssl.SSLError) -> tuple[Reason, str]:
    """Which reason an error of OpenSSL's is."""
    word = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return Reason.FOREIGN, f"its certificate is not one of this cluster's: {error.verify_message}"
    if word == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return Reason.NO_CERTIFICATE, "it shows no certificate"
    if "ALERT" in word:
        said = word.partition("ALERT_")[2].replace("_", " ").lower()
        return Reason.BROKEN_OFF, f"it ends the handshake: {said or word}"
    if isinstance(error, ssl.SSLEOFError):
        return Reason.BROKEN_OFF, "it closed the connection in the middle of the handshake"
    return Reason.NOT_TLS, f"it does not speak TLS 1.3 ({word.replace('_', ' ').lower() or error})"
