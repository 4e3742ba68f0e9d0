"""The etcd store: for clusters of several machines. etcd 3.4 and later, by its JSON gateway.

Place      store floor, one back end of interface.py. etcd_client.py finds a member that answers,
           etcd_messages.py is the language, etcd_watch.py the watches.
Reads      ask a majority (linearizable), so an answer is never older than its question.
Leases     etcd counts whole seconds: a lease lasts `ttl_ms` rounded up, at least etcd's minimum, and is counted
           anew when etcd elects a leader. Never shorter than asked for, by these; "T2" says how that is kept.

Transactions happen once, though they may be sent twice
  A transaction whose answer is lost may have been done or not, and asking again by compare-and-swap would
  mistake its own success for another's. So each handle has a *token*: a key of its own, under a lease, that
  every transaction of the handle compares and changes.

  T1  At most one transaction of a token can be done at each revision of that token, and only this handle
      changes it. So when an answer is lost, one more change of the token (a fence) settles it: if that succeeds,
      the transaction was not done and can never be; if it fails, the token bears the transaction's mark.
  T2  keep_alive counts only if the member that passed it on then finds, by a read of a majority, that the
      election is still the one it knew before. A deposed leader whose disk hangs renews leases that are
      nobody's business any more (etcd issue 15247), and would have the node serve too long (I5).
"""

import contextlib
import secrets
from collections.abc import AsyncIterator
from typing import Any

import trio

from csvfs.errors import BadRequest, NotFound, ProtocolError, Unavailable
from csvfs.store import etcd_messages as messages
from csvfs.store.etcd_client import ATTEMPT_S, AnswerLost, EtcdClient, Work
from csvfs.store.etcd_http import HttpConnection
from csvfs.store.etcd_messages import CODE_NOT_FOUND, CODE_OUT_OF_RANGE, CODE_RESOURCE_EXHAUSTED, Refused
from csvfs.store.etcd_place import EtcdPlace
from csvfs.store.etcd_watch import EtcdWatch
from csvfs.store.interface import Change, Compare, Delete, Item, Put, TransactionResult
from csvfs.store.limits import check_changes, check_key, check_ttl

PAGE_ITEMS = 512  # of a list, in one answer
WRITE_ATTEMPT_S = 2.0  # two disks flush in between
TURNS_MAX = 5  # 2, 4, 8, 16, 32 s
TOKEN_TTL_S = 120
TOKEN_AGE_MAX_S = 60.0  # an older one is not used for a further transaction: it must outlast its attempts
KEEP_ALIVE_TRIES_MAX = 5  # elections during one of them
_NOBODY = messages.TOKEN_ROOT + b"-"  # a key that does not exist: reading it asks a majority for nothing else


class EtcdStore:
    """A handle of one process."""

    def __init__(self, place: EtcdPlace) -> None:
        """Nothing is sent yet. Raises Unavailable, BadRequest: `place` does not say where the store is."""
        self._client = EtcdClient(place)
        self._token: _Token | None = None
        self._transacting = trio.Lock()  # T1: one transaction of a token at a time

    # Reads

    async def get(self, key: str) -> Item | None:
        check_key(key)
        answer = await self._ask("/v3/kv/range", messages.range_request(messages.full_key(key)))
        rows = messages.objects(answer, "kvs")
        return messages.parse_item(rows[0]) if rows else None

    async def snapshot(self, prefix: str) -> tuple[int, dict[str, Item]]:
        """The store's revision and what lies under `prefix`, of one instant. Raises Unavailable."""
        while True:
            try:
                return await self._read_pages(messages.full_key(prefix))
            except Refused as error:
                if error.code != CODE_OUT_OF_RANGE:
                    raise self._failed(error) from None
                # Compacted while it was being read: that took long; begin anew.

    async def _read_pages(self, prefix: bytes) -> tuple[int, dict[str, Item]]:
        start, end, limit, revision = prefix, messages.prefix_end(prefix), PAGE_ITEMS, 0
        items: dict[str, Item] = {}
        while True:
            body = messages.range_request(start, end=end, limit=limit, revision=revision)
            try:
                answer = await self._client.call(_posting("/v3/kv/range", body))
            except Refused as error:
                if error.code != CODE_RESOURCE_EXHAUSTED or limit == 1:
                    raise
                limit = max(1, limit // 4)  # large values: fewer in one answer
                continue
            revision = revision or messages.header_of(answer).revision
            found = [messages.parse_item(row) for row in messages.objects(answer, "kvs")]
            items.update((item.key, item) for item in found)
            if not answer.get("more") or not found:
                return revision, items
            start = messages.full_key(found[-1].key) + b"\0"

    # Transactions

    async def transact(
        self, compares: list[Compare], changes: list[Put | Delete], *, repeatable: bool = False
    ) -> TransactionResult:
        """See interface.py. Raises NotFound when a Put names a lease that has ended; nothing is changed then.

        Raises   Unavailable: no majority for long; it may or may not have been done, or be done within the
                 next seconds. BadRequest.
        Cancel   safe; it may or may not have been done.
        """
        check_changes(changes)
        if repeatable:
            return await self._transact_again_and_again(compares, changes)
        async with self._transacting:
            try:
                return await self._transact(compares, changes)
            except BaseException:
                self._token = None  # whatever is still on the way may change it
                raise

    async def _transact(self, compares: list[Compare], changes: list[Put | Delete]) -> TransactionResult:
        compared, done = messages.transaction_request(compares, changes)
        is_fresh = False
        for turn in range(TURNS_MAX):  # each that comes round was fenced off: not done
            if self._token is None or self._token.is_old:
                self._token, is_fresh = await self._new_token(), True
            try:
                # Twice as long each time: one that is too large for the first must not fence itself off for ever.
                result = await self._try_once(self._token, compared, done, WRITE_ATTEMPT_S * 2**turn)
            except Refused as error:
                if error.code != CODE_NOT_FOUND:
                    raise self._failed(error) from None
                if is_fresh and not self._token.is_old:  # then it is not the token's lease that has ended
                    raise NotFound(f"{_names(changes)}: its lease has ended; grant a new one") from None
                self._token = None
                continue
            if result is not None:
                return result
        raise Unavailable(f"{_names(changes)}: not done, {TURNS_MAX} times no answer came; is etcd overloaded?")

    async def _transact_again_and_again(
        self, compares: list[Compare], changes: list[Put | Delete]
    ) -> TransactionResult:
        """Without a token: nobody needs to know whether it was done once or twice."""
        compared, done = messages.transaction_request(compares, changes)
        answer = await self._ask("/v3/kv/txn", {"compare": compared, "success": done, "failure": []})
        return TransactionResult(bool(answer.get("succeeded")), messages.header_of(answer).revision)

    async def _try_once(
        self, token: "_Token", compared: list[dict[str, Any]], done: list[dict[str, Any]], attempt_s: float
    ) -> TransactionResult | None:
        """None: it was not done, and never will be. Raises Refused, Unavailable (not settled)."""
        mark = secrets.token_bytes(8)
        body = {
            "compare": [*compared, messages.compare_request(token.key, token.revision)],
            "success": [*done, messages.put_request(token.key, mark, token.lease)],
            "failure": [{"request_range": messages.range_request(token.key)}],
        }
        try:
            work = _posting("/v3/kv/txn", body)
            answer = await self._client.call(work, attempt_s=attempt_s, once=True)
        except AnswerLost:
            return await self._settle(token, mark)
        revision = messages.header_of(answer).revision
        if answer.get("succeeded"):
            token.revision = revision
            return TransactionResult(True, revision)
        if _token_revision(answer)[0] != token.revision:  # this process stood still until its lease was over
            self._token = None
            return None
        return TransactionResult(False, revision)

    async def _settle(self, token: "_Token", mark: bytes) -> TransactionResult | None:
        """Find out what became of a transaction without an answer (T1). Several fences do no harm."""
        fence = secrets.token_bytes(8)
        body = {
            "compare": [messages.compare_request(token.key, token.revision)],
            "success": [messages.put_request(token.key, fence, token.lease)],
            "failure": [{"request_range": messages.range_request(token.key)}],
        }
        answer = await self._ask("/v3/kv/txn", body, attempt_s=WRITE_ATTEMPT_S)
        if answer.get("succeeded"):
            token.revision = messages.header_of(answer).revision
            return None
        revision, value = _token_revision(answer)
        if value not in (mark, fence):
            raise Unavailable("a transaction took so long that nobody knows whether it was done; look, and try again")
        token.revision = revision
        return TransactionResult(True, token.revision) if value == mark else None

    async def _new_token(self) -> "_Token":
        began = trio.current_time()
        lease = await self.grant_lease(TOKEN_TTL_S * 1000)
        return _Token(messages.TOKEN_ROOT + secrets.token_hex(8).encode(), lease, began)

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        return (await self.transact([], [Put(key, value, lease)])).revision

    async def delete(self, key: str) -> None:
        await self.transact([], [Delete(key)])

    # Leases

    async def grant_lease(self, ttl_ms: int) -> int:
        check_ttl(ttl_ms)
        # Sent twice it grants two; the one that nobody knows of ends by itself.
        answer = await self._ask("/v3/lease/grant", {"TTL": str(-(-ttl_ms // 1000))}, attempt_s=WRITE_ATTEMPT_S)
        lease = messages.number(answer, "ID")
        if lease <= 0:
            raise Unavailable("etcd granted a lease without a number; see its log")
        return lease

    async def keep_alive(self, lease: int) -> None:
        is_doubtful = False
        for _ in range(KEEP_ALIVE_TRIES_MAX):
            answer = await self._ask_renewal(lease)
            if answer is None:
                continue
            if messages.number(answer, "TTL") > 0:
                return
            if is_doubtful:
                raise NotFound(f"lease {lease:#x} has ended; its keys are gone, grant a new one")
            is_doubtful = True  # a leader may not have come to its grant yet; it has after the read
        raise Unavailable("etcd elects one leader after the other; are its members' disks or network overloaded?")

    async def _ask_renewal(self, lease: int) -> dict[str, Any] | None:
        try:
            return await self._client.call(lambda connection: _renew(connection, lease))
        except Refused as error:
            raise self._failed(error) from None

    async def revoke_lease(self, lease: int) -> None:
        try:
            await self._ask("/v3/lease/revoke", {"ID": str(lease)}, attempt_s=WRITE_ATTEMPT_S)
        except NotFound:
            pass

    # Watches

    @contextlib.asynccontextmanager
    async def watch(self, prefix: str) -> AsyncIterator[AsyncIterator[list[Change]]]:
        """See interface.py. Entering raises Unavailable; afterwards the iterator waits instead."""
        revision, items = await self.snapshot(prefix)
        known = {key: item.revision for key, item in items.items()}
        watch = EtcdWatch(self._client, self.snapshot, prefix, revision, known)
        try:
            yield watch
        finally:
            watch.close()

    # Shell

    async def close(self) -> None:
        """Close this handle; operations raise Unavailable from now on and watches end with it."""
        await trio.lowlevel.checkpoint()
        self._client.close()

    async def _ask(self, path: str, body: dict[str, Any], *, attempt_s: float = ATTEMPT_S) -> dict[str, Any]:
        """A call that may be sent twice without harm."""
        try:
            return await self._client.call(_posting(path, body), attempt_s=attempt_s)
        except Refused as error:
            raise self._failed(error) from None

    @staticmethod
    def _failed(error: Refused) -> Exception:
        if error.code == CODE_NOT_FOUND:
            return NotFound(f"etcd: {error}")
        if error.code == 3:
            return BadRequest(f"etcd does not take this: {error}")
        return Unavailable(f"etcd refuses: {error}; see its log")

    # Last, because in the lines below it `list` is this method and no type any more.
    async def list(self, prefix: str) -> list[Item]:
        _, items = await self.snapshot(prefix)
        return [items[key] for key in sorted(items)]


class _Token:
    """See the module's docstring."""

    def __init__(self, key: bytes, lease: int, began: float) -> None:
        self.key = key
        self.lease = lease
        self.revision = 0
        self._began = began  # of trio's clock, before its lease was asked for

    @property
    def is_old(self) -> bool:
        return trio.current_time() - self._began > TOKEN_AGE_MAX_S


def _posting(path: str, body: dict[str, Any]) -> Work[dict[str, Any]]:
    return lambda connection: connection.post(path, body)


def _token_revision(answer: dict[str, Any]) -> tuple[int, bytes]:
    """Of the token as a transaction that was not done found it, with its value; 0: it does not exist."""
    for reply in messages.objects(answer, "responses"):
        found = reply.get("response_range")
        for row in messages.objects(found, "kvs") if isinstance(found, dict) else []:
            return messages.number(row, "mod_revision"), messages.raw_value(row)
    return 0, b""


async def _renew(connection: HttpConnection, lease: int) -> dict[str, Any] | None:
    """etcd's answer; None: a leader was elected meanwhile, so it may be that of the one before (T2)."""
    answer = await connection.post("/v3/lease/keepalive", {"ID": str(lease)})
    refused = messages.stream_refusal(answer.get("error"))
    if refused is not None:
        raise refused
    result = answer.get("result")
    if not isinstance(result, dict):
        raise ProtocolError("etcd's answer to a keepalive has no result")
    after = await connection.post("/v3/kv/range", messages.range_request(_NOBODY))
    return result if messages.header_of(result).term == messages.header_of(after).term else None


def _names(changes: list[Put | Delete]) -> str:
    return ", ".join(change.key for change in changes[:3]) + (" ..." if len(changes) > 3 else "")
