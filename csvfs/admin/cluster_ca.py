"""The cluster's certificate authority, and the certificates of its nodes.

Place      admin floor. Bytes in, bytes out, but for `write_certificates`.
Keys       ECDSA P-256. A node's certificate serves both ends of a connection, bears its name and IP address,
           and is good for CERTIFICATE_DAYS: there is no renewal yet.
Secret     whoever has `ca.key` can let anybody in: keep it where the cluster was made.
"""

import datetime
import ipaddress
import os
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from csvfs.admin.files import write_whole
from csvfs.errors import Corrupt, NotFound
from csvfs.store.etcd_place import EtcdPlace

CERTIFICATE_DAYS = 3650
CLOCK_SKEW = datetime.timedelta(days=1)  # clocks of nodes may differ


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
    """A certificate for a node. Raises Corrupt: the authority's files are damaged."""
    try:
        authority = x509.load_pem_x509_certificate(ca.encode())
        signing_key = serialization.load_pem_private_key(ca_key.encode(), password=None)
    except ValueError as error:
        raise Corrupt(f"the cluster's ca.crt or ca.key is damaged: {error}; restore it from a backup") from None
    assert isinstance(signing_key, ec.EllipticCurvePrivateKey)  # make_authority makes no others
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)])
    names = [x509.DNSName(node), x509.IPAddress(ipaddress.ip_address(address))]
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = _builder(subject, authority.subject, key.public_key())
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key())
    certificate = builder.add_extension(issuer_id, critical=False).sign(signing_key, hashes.SHA256())
    return Certificate(ca, _pem(certificate), _key_pem(key))


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
