"""The cluster's certificate authority, and the certificates of its nodes.

Place      admin floor. Bytes in, bytes out, but for `write_certificates`.
Keys       ECDSA P-256. A node's certificate serves both ends of a connection, bears its name and IP address,
           and is good for CERTIFICATE_DAYS: there is no renewal yet.
Requests   A node makes its key itself and has only a request (CSR) signed. Of that the public key is taken and nothing
           else: names, address and uses are what the cluster says.
Secret     whoever has `ca.key` can let anybody in. It lies on the nodes that were given a member of the cluster store
           (admin/join_admission.py), so that a node can join whichever of them is up; not on witnesses.
"""

import datetime
import hashlib
import ipaddress
import os
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from csvfs.admin.files import write_whole
from csvfs.errors import BadRequest, Corrupt, NotFound
from csvfs.store.etcd_place import EtcdPlace

CERTIFICATE_DAYS = 3650
CLOCK_SKEW = datetime.timedelta(days=1)  # clocks of nodes may differ
REQUEST_SIZE_MAX = 4096  # bytes of DER; ours have 250


@dataclass(slots=True, frozen=True)
class Certificate:
    """PEM. `ca`: of the authority that signed it."""

    ca: str
    certificate: str
    key: str


def make_authority(cluster_name: str) -> tuple[str, str]:
    """A new authority: its certificate and its key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"csvfs cluster {cluster_name}")])
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip
    builder = _builder(name, name, key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage, critical=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = builder.add_extension(identifier, critical=False).sign(key, hashes.SHA256())
    return _pem(certificate), _key_pem(key)


def issue(ca: str, ca_key: str, node: str, address: str) -> Certificate:
    """A certificate for a node, with its key. Raises Corrupt: the authority's files are damaged."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _sign(ca, ca_key, key.public_key(), node, address)
    return Certificate(ca, _pem(certificate), _key_pem(key))


def make_request(node: str, key_pem: str = "") -> tuple[str, bytes]:
    """A node's key (PEM; the one given, else a new one) and its request for a certificate (DER).

    Raises   Corrupt: the key is none of ours.
    """
    key = _load_key(key_pem) if key_pem else ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return _key_pem(key), request.public_bytes(serialization.Encoding.DER)


def requested_key(request_der: bytes, node: str) -> ec.EllipticCurvePublicKey:
    """The public key of a request, which is `node`'s and signed with that key. Raises BadRequest: it is something else."""
    if len(request_der) > REQUEST_SIZE_MAX:
        raise BadRequest(f"a certificate request of {len(request_der)} bytes; at most {REQUEST_SIZE_MAX} are taken")
    try:
        request = x509.load_der_x509_csr(request_der)
        key = request.public_key()
        is_signed = request.is_signature_valid
        names = [name.value for name in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except Exception as error:  # the parser of hostile bytes raises many kinds, all of which mean the same here
        raise BadRequest(f"not a certificate request: {type(error).__name__}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise BadRequest("the certificate request has no key on the curve P-256")
    if not is_signed:
        raise BadRequest("the certificate request is not signed with its own key")
    if names != [node]:
        raise BadRequest(f"the certificate request is not for node {node}")
    return key


def sign_request(ca: str, ca_key: str, request_der: bytes, node: str, address: str) -> str:
    """The certificate (PEM) for a node's request. Raises BadRequest; Corrupt: the authority's files are damaged."""
    return _pem(_sign(ca, ca_key, requested_key(request_der, node), node, address))


def key_digest(key: ec.EllipticCurvePublicKey) -> bytes:
    """SHA-256 of a public key: the same for all requests that are made with it."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).digest()


def key_digest_of(certificate: str) -> bytes:
    """The digest of a certificate's (PEM) key. Raises BadRequest."""
    key = _load_certificate(certificate).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise BadRequest("the certificate has no key on the curve P-256")
    return key_digest(key)


def fingerprint(ca: str) -> bytes:
    """SHA-256 of a certificate (PEM). Raises BadRequest: it is none."""
    return _load_certificate(ca).fingerprint(hashes.SHA256())


def serial_of(certificate: str) -> int:
    """What a certificate (PEM) is called in a list of revoked ones. Raises BadRequest."""
    return _load_certificate(certificate).serial_number


def is_pair(ca: str, certificate: str, key: str) -> bool:
    """Whether `certificate` is one of `ca`'s for that key. Raises BadRequest, Corrupt."""
    found = _load_certificate(certificate)
    try:
        found.verify_directly_issued_by(_load_certificate(ca))
    except (ValueError, TypeError, InvalidSignature):
        return False
    return found.public_key() == _load_key(key).public_key()


def revocation_list(serials: list[int]) -> bytes:
    """A CRL (PEM) of these serial numbers, as etcd reads it: it looks at nothing but the numbers, so who signed it says
    nothing, and a key is made for it that nobody keeps.
    """
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "csvfs evicted nodes")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateRevocationListBuilder().issuer_name(name).last_update(now - CLOCK_SKEW)
    builder = builder.next_update(now + datetime.timedelta(days=CERTIFICATE_DAYS))
    for serial in serials:
        revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - CLOCK_SKEW).build()
        builder = builder.add_revoked_certificate(revoked)
    key = ec.generate_private_key(ec.SECP256R1())
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _sign(
    ca: str, ca_key: str, public_key: ec.EllipticCurvePublicKey, node: str, address: str
) -> x509.Certificate:
    try:
        authority = x509.load_pem_x509_certificate(ca.encode())
        signing_key = serialization.load_pem_private_key(ca_key.encode(), password=None)
    except ValueError as error:
        raise Corrupt(f"the cluster's ca.crt or ca.key is damaged: {error}; restore it from a backup") from None
    assert isinstance(signing_key, ec.EllipticCurvePrivateKey)  # make_authority makes no others
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)])
    names = [x509.DNSName(node), x509.IPAddress(ipaddress.ip_address(address))]
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = _builder(subject, authority.subject, public_key)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key())
    return builder.add_extension(issuer_id, critical=False).sign(signing_key, hashes.SHA256())


def read_authority(place: EtcdPlace) -> tuple[str, str]:
    """Raises NotFound: it is not here."""
    try:
        return place.ca_path.read_text(), place.ca_key_path.read_text()
    except OSError:
        raise NotFound(
            f"{place.ca_key_path} is not here: certificates are signed where the cluster was made"
        ) from None


def write_certificates(place: EtcdPlace, certificate: Certificate, ca_key: str = "") -> None:
    """Put a node's certificate where its store looks for it; the authority's own last. Raises OSError."""
    os.makedirs(place.directory, mode=0o700, exist_ok=True)
    if ca_key:
        write_whole(place.ca_key_path, ca_key, 0o600)
    write_whole(place.key_path, certificate.key, 0o600)
    write_whole(place.certificate_path, certificate.certificate)
    write_whole(place.ca_path, certificate.ca)


def _load_certificate(text: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(text.encode())
    except Exception as error:  # as in requested_key
        raise BadRequest(f"not a certificate: {type(error).__name__}") from None


def _load_key(text: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(text.encode(), password=None)
    except (ValueError, TypeError) as error:
        raise Corrupt(f"the key of this node is damaged: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Corrupt("the key of this node is not on the curve P-256")
    return key


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()
