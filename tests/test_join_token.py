"""Join tokens, requests and answers: what is whole comes through, whatever else is refused."""

import base64
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfs.admin import join_token
from csvfs.admin.cluster_ca import (
    fingerprint,
    is_pair,
    issue,
    key_digest,
    key_digest_of,
    make_authority,
    make_request,
    requested_key,
    revocation_list,
    serial_of,
    sign_request,
)
from csvfs.admin.join_messages import (
    MESSAGE_SIZE_MAX,
    SIZE,
    JoinAnswer,
    JoinRequest,
    message_size,
    pack_message,
    unpack_message,
)
from csvfs.errors import BadRequest, Corrupt, ProtocolError
from csvfs.store.etcd_http import Endpoint
from csvfs.wire.control import pack_value

TOKEN = join_token.Token((Endpoint("10.0.0.1", 7005), Endpoint("fd00::1", 7005)), b"f" * 32, b"i" * 8, b"s" * 32)
CA, CA_KEY = make_authority("Tower")
KEY, CSR = make_request("n2")

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.binary(max_size=80) | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=12), inner, max_size=6),
    max_leaves=20,
)


# Tokens


def test_a_token_comes_back_as_it_was() -> None:
    assert join_token.parse_token(f"  {join_token.format_token(TOKEN)}\n") == TOKEN


@given(st.data())
def test_a_token_with_any_character_changed_lost_or_added_is_refused(data: st.DataObject) -> None:
    text = join_token.format_token(TOKEN)
    at = data.draw(st.integers(0, len(text) - 1))
    put = data.draw(st.text(max_size=2))
    changed = text[:at] + put + text[at + 1 :]
    if changed.strip() == text:
        return
    with pytest.raises(BadRequest):
        join_token.parse_token(changed)


@given(values)
def test_a_token_that_says_nonsense_in_good_order_is_refused(value: object) -> None:
    packed = pack_value(value)
    packed += zlib.crc32(packed).to_bytes(4, "little")
    text = join_token.PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("=")
    with pytest.raises(BadRequest):
        join_token.parse_token(text)


def request_of(mac: bytes = b"") -> JoinRequest:
    return JoinRequest(TOKEN.id, CSR, "n2", "10.0.0.2", 7000, False, mac)


def test_the_proof_of_a_token_is_bound_to_all_that_is_asked_for() -> None:
    verifier = join_token.verifier_of(TOKEN.secret)
    proof = join_token.proof(verifier, request_of().asked())
    assert join_token.is_proof(proof, verifier, request_of(b"whatever the proof says").asked())
    others = [
        JoinRequest(b"j" * 8, CSR, "n2", "10.0.0.2", 7000, False),
        JoinRequest(TOKEN.id, make_request("n2")[1], "n2", "10.0.0.2", 7000, False),
        JoinRequest(TOKEN.id, CSR, "n3", "10.0.0.2", 7000, False),
        JoinRequest(TOKEN.id, CSR, "n2", "10.0.0.3", 7000, False),
        JoinRequest(TOKEN.id, CSR, "n2", "10.0.0.2", 7010, False),
        JoinRequest(TOKEN.id, CSR, "n2", "10.0.0.2", 7000, True),
    ]
    for other in others:
        assert not join_token.is_proof(proof, verifier, other.asked())
    assert not join_token.is_proof(proof, join_token.verifier_of(b"t" * 32), request_of().asked())
    assert TOKEN.secret not in verifier


# Certificate requests


def test_a_node_gets_a_certificate_for_the_key_that_it_made_itself() -> None:
    certificate = sign_request(CA, CA_KEY, CSR, "n2", "10.0.0.2")
    assert is_pair(CA, certificate, KEY)
    assert key_digest_of(certificate) == key_digest(requested_key(CSR, "n2"))
    other_ca, other_key = make_authority("Tower")
    assert not is_pair(other_ca, certificate, KEY)
    assert not is_pair(CA, certificate, make_request("n2")[0])
    assert not is_pair(CA, sign_request(other_ca, other_key, CSR, "n2", "10.0.0.2"), KEY)
    assert fingerprint(CA) != fingerprint(other_ca)


def test_asking_again_with_the_same_key_is_seen_as_the_same_request() -> None:
    key, again = make_request("n2", KEY)
    assert key == KEY
    assert key_digest(requested_key(again, "n2")) == key_digest(requested_key(CSR, "n2"))


def test_a_request_in_the_name_of_another_node_is_refused() -> None:
    with pytest.raises(BadRequest, match="not for node n1"):
        requested_key(CSR, "n1")


@given(st.integers(0, len(CSR) - 1), st.integers(1, 255))
def test_a_request_with_any_byte_changed_is_refused(at: int, change: int) -> None:
    changed = bytearray(CSR)
    changed[at] ^= change
    with pytest.raises(BadRequest):
        requested_key(bytes(changed), "n2")


@given(st.binary(max_size=5000))
def test_a_request_of_any_other_bytes_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        requested_key(data, "n2")


def test_keys_of_other_kinds_are_refused() -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.x509.oid import NameOID

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "n2")])
    for key in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
        with pytest.raises(BadRequest, match="P-256"):
            requested_key(request.public_bytes(serialization.Encoding.DER), "n2")


def test_damaged_files_of_the_authority_are_said_to_be() -> None:
    with pytest.raises(Corrupt, match="damaged"):
        sign_request(CA, "nonsense", CSR, "n2", "10.0.0.2")


def test_a_list_of_revoked_certificates_names_their_numbers() -> None:
    from cryptography import x509

    serials = [serial_of(issue(CA, CA_KEY, f"n{index}", "10.0.0.1").certificate) for index in (1, 2)]
    found = x509.load_pem_x509_crl(revocation_list(serials))
    assert {entry.serial_number for entry in found} == set(serials)
    assert not list(x509.load_pem_x509_crl(revocation_list([])))


# Messages


ANSWER = JoinAnswer(
    "Tower", "certificate", "ca", "", ("10.0.0.1:7003",), (("n1", "https://10.0.0.1:7004"),), "token", (5, 1 << 150)
)


def test_requests_and_answers_come_through_as_they_were() -> None:
    request = request_of(b"m" * 32)
    packed = pack_message(request.to_map())
    assert message_size(packed[: SIZE.size]) == len(packed) - SIZE.size
    assert JoinRequest.of(unpack_message(packed[SIZE.size :])) == request
    assert JoinAnswer.of(unpack_message(pack_message(ANSWER.to_map())[SIZE.size :])) == ANSWER


@given(st.sampled_from([request_of(b"m" * 32).to_map(), ANSWER.to_map()]), st.data())
def test_a_message_with_a_field_lost_or_of_another_kind_is_refused_or_harmless(
    good: dict[str, object], data: st.DataObject
) -> None:
    changed = dict(good)
    name = data.draw(st.sampled_from(sorted(changed)))
    if data.draw(st.booleans()):
        del changed[name]
    else:
        changed[name] = data.draw(values)
    for kind in (JoinRequest, JoinAnswer):
        try:
            kind.of(changed)
        except ProtocolError:
            pass


@given(st.binary(max_size=300))
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    try:
        value = unpack_message(data)
    except ProtocolError:
        return
    assert isinstance(value, dict)


@pytest.mark.parametrize("size", [0, MESSAGE_SIZE_MAX + 1, 0xFFFFFFFF])
def test_the_size_of_a_message_is_looked_at_before_it_is_read(size: int) -> None:
    with pytest.raises(ProtocolError):
        message_size(SIZE.pack(size))
