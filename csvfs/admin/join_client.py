"""What a new machine asks a join desk, and how it knows that it speaks to the right one.

Place      admin floor, below cluster_join.py.
Trust      At first it has nothing but the token. So it asks a desk for the CA's certificate without believing anything,
           compares that with the fingerprint in the token, and only then asks to be let in: in a new TLS session whose
           other end has to show a certificate of that CA for the address that was called.
Failover   The token names several desks; one that is away or cannot decide now is passed over.
"""

import ssl
from typing import Any

import trio

from csvfs.admin.cluster_ca import fingerprint
from csvfs.admin.join_desk import ANSWER_S, receive_message
from csvfs.admin.join_messages import (
    ASK_CA,
    ASK_STANDING,
    TEXT_SIZE_MAX,
    JoinAnswer,
    JoinRequest,
    pack_message,
    text_of,
)
from csvfs.admin.join_token import Token
from csvfs.errors import (
    AccessDenied,
    BadRequest,
    CsvfsError,
    Disconnected,
    ProtocolError,
    TimedOut,
    Unavailable,
    error_kinds,
)
from csvfs.store.etcd_http import Endpoint, reason_of

CONNECT_S = 5.0


async def ask_to_join(token: Token, request: JoinRequest) -> JoinAnswer:
    """Raises AccessDenied, Exists and others: refused. Unavailable: no desk can decide now. Cancel: ask again."""
    reasons = []
    for desk in token.desks:
        try:
            ca = await trusted_ca(token, desk)
            return JoinAnswer.of(await ask(desk, tls_for(ca), request.to_map()))
        except Unavailable as error:
            reasons.append(f"{desk}: {error}")
    raise Unavailable(f"no join desk that the token names can let this machine in now: {'; '.join(reasons)}")


async def trusted_ca(token: Token, desk: Endpoint) -> str:
    """The CA's certificate, as the token says it. Raises AccessDenied: the desk has another one. Unavailable."""
    answer = await ask(desk, tls_for(None), {"ask": ASK_CA})
    ca = text_of(answer, "ca", TEXT_SIZE_MAX)
    try:
        is_right = fingerprint(ca) == token.fingerprint
    except BadRequest:
        is_right = False
    if not is_right:
        raise AccessDenied(
            f"whoever answers at {desk} is not of the cluster that made the token: its CA is another one; nothing was"
            " sent to it"
        )
    return ca


async def ask_standing(desk: Endpoint, ca: str, node: str, serial: int) -> int:
    """When (s since 1970) the node with that certificate was evicted; 0: it was not. Raises Unavailable."""
    question = {"ask": ASK_STANDING, "node": node, "serial": f"{serial:x}"}
    when = (await ask(desk, tls_for(ca), question)).get("evicted")
    if not isinstance(when, int) or isinstance(when, bool):
        raise ProtocolError(f"the join desk at {desk} answers nonsense")
    return when


async def ask(desk: Endpoint, tls: ssl.SSLContext, question: dict[str, Any]) -> dict[str, Any]:
    """One question, one answer. Raises Disconnected, TimedOut, ProtocolError; what the desk refuses with."""
    try:
        with trio.fail_after(CONNECT_S):
            transport = await trio.open_tcp_stream(desk.host, desk.port)
        stream = trio.SSLStream(transport, tls, server_hostname=desk.host)
        try:
            with trio.fail_after(ANSWER_S + CONNECT_S):
                await stream.do_handshake()
                await stream.send_all(pack_message(question))
                answer = await receive_message(stream)
        finally:
            await trio.aclose_forcefully(stream)
    except trio.TooSlowError:
        raise TimedOut(f"the join desk at {desk} does not answer") from None
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise Disconnected(f"no join desk at {desk}: {reason_of(error)}") from None
    refused = answer.get("error")
    if refused is None:
        return answer
    raise _refusal(refused)


def tls_for(ca: str | None) -> ssl.SSLContext:
    """How to speak to a desk whose certificate is to be of `ca` (PEM); None: anybody's. Raises BadRequest."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if ca is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    try:
        context.load_verify_locations(cadata=ca)
    except ssl.SSLError:
        raise BadRequest("the cluster's CA certificate is damaged") from None
    return context


def _refusal(value: Any) -> CsvfsError:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(text, str) for text in value):
        return ProtocolError("the join desk refuses in words that it does not have")
    return error_kinds().get(value[0], CsvfsError)(value[1][:1000])
