"""A watch on etcd: one stream, begun again at the revision where the last one broke.

Place      store floor, below etcd.py.
Waiting    A stream that is silent for CHECK_S is doubted: its member must answer a read of a majority, or the
           watch goes on at another one. So a member that hangs or is cut off holds it up for 3 s at most.
Compaction A watch that fell behind etcd's history reads all and compares it with what it told (`known`).

Invariants
  C1  Everything up to `_next_revision - 1` has been told; what is told twice by etcd (a broken stream, a
      fragment) is recognised by the key's revision in `known`.
  C2  `_next_revision`, `known` and the batch that is returned change without an await in between: a cancelled
      caller loses nothing.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from csvfs.errors import CsvfsError, Disconnected, ProtocolError, TimedOut, Unavailable
from csvfs.store import etcd_messages as messages
from csvfs.store.etcd_client import ATTEMPT_S, Closed, EtcdClient
from csvfs.store.etcd_http import HttpConnection
from csvfs.store.interface import Change, Item

logger = logging.getLogger(__name__)
CHECK_S = 2.0
RETRY_S = 0.1
_PROBE = messages.TOKEN_ROOT + b"-"

Snapshot = Callable[[str], Awaitable[tuple[int, dict[str, Item]]]]


class EtcdWatch:
    """Its `anext` may be cancelled and called again."""

    def __init__(
        self, client: EtcdClient, snapshot: Snapshot, prefix: str, revision: int, known: dict[str, int]
    ) -> None:
        """`known`: the revisions of the keys under `prefix` at `revision` of the store."""
        self._client = client
        self._snapshot = snapshot
        self._prefix = prefix
        self._next_revision = revision + 1
        self._known = known
        self._stream: HttpConnection | None = None
        self._is_behind = False  # etcd's history begins later than we stopped
        self._is_well = True  # for the log

    def __aiter__(self) -> "EtcdWatch":
        return self

    async def __anext__(self) -> list[Change]:
        while True:
            try:
                batch = await self._next_batch()
            except Closed:
                raise
            except (Unavailable, ProtocolError, messages.Refused) as error:
                self._client.refuse_when_closed()
                self._lose_stream()
                if self._is_well:
                    logger.info("watch of the cluster store: %s; going on elsewhere", error)
                self._is_well = False
                await trio.sleep(RETRY_S)
                self._client.reread_endpoints()
            else:
                self._is_well = True
                if batch:
                    return batch

    async def _next_batch(self) -> list[Change]:
        if self._is_behind:
            return await self._catch_up()
        if self._stream is None:
            self._stream = await self._open()
        answer = None
        with trio.move_on_after(CHECK_S):
            answer = await self._stream.next_line()
        if answer is None:
            await self._check(self._stream)
            return []
        return self._take(answer)

    async def _open(self) -> HttpConnection:
        body = messages.watch_request(messages.full_key(self._prefix), self._next_revision)
        failure: CsvfsError = Unavailable("the cluster store has no members")
        for endpoint in self._client.endpoints_in_order():
            try:
                stream = await self._client.connection(endpoint)
            except (Disconnected, TimedOut) as error:
                failure = error
                continue
            try:
                with trio.move_on_after(ATTEMPT_S):
                    await stream.open_stream("/v3/watch", body)
                    return stream
                failure = TimedOut(f"etcd at {endpoint} begins no watch within {ATTEMPT_S * 1000:.0f} ms")
            except (Disconnected, ProtocolError, messages.Refused) as error:
                failure = error
            except BaseException:
                self._client.drop(stream)
                raise
            self._client.drop(stream)
        raise failure

    async def _check(self, stream: HttpConnection) -> None:
        """Raises Unavailable: the member that serves the stream has no majority, or is not there any more."""
        with trio.move_on_after(ATTEMPT_S):
            connection = await self._client.connection(stream.endpoint)
            try:
                await connection.post("/v3/kv/range", messages.range_request(_PROBE))
            finally:
                self._client.give_back(connection)
            return
        raise TimedOut(f"etcd at {stream.endpoint} does not answer within {ATTEMPT_S * 1000:.0f} ms")

    def _take(self, answer: dict[str, Any]) -> list[Change]:
        """Raises Refused, Unavailable: the stream is over. ProtocolError."""
        refused = messages.stream_refusal(answer.get("error"))
        if refused is not None:
            raise refused
        result = answer.get("result")
        if not isinstance(result, dict):
            raise ProtocolError("etcd's watch sends neither a result nor an error")
        if messages.number(result, "compact_revision"):
            self._is_behind = True
            self._lose_stream()
            return []
        if result.get("canceled"):
            raise Unavailable(f"etcd ended the watch: {str(result.get('cancel_reason'))[:80]}")
        changes = [messages.parse_change(event) for event in messages.objects(result, "events")]
        if not changes:
            return []
        # Of a fragment the rest is still to come, and may be of the same revision (C1).
        self._next_revision = changes[-1].revision + (0 if result.get("fragment") else 1)
        return self._new_ones(changes)

    def _new_ones(self, changes: list[Change]) -> list[Change]:
        batch = []
        for change in changes:
            known = self._known.get(change.key, 0)
            # A key that came and went before it was told of is no news when it goes.
            if change.revision <= known or (change.item is None and not known):
                continue
            if change.item is None:
                del self._known[change.key]
            else:
                self._known[change.key] = change.revision
            batch.append(change)
        return batch

    async def _catch_up(self) -> list[Change]:
        revision, items = await self._snapshot(self._prefix)
        changed = [Change(key, item, item.revision) for key, item in items.items()]
        changed.sort(key=lambda change: change.revision)
        gone = [Change(key, None, revision) for key in self._known if key not in items]
        self._next_revision, self._is_behind = revision + 1, False
        return self._new_ones(changed + gone)

    def _lose_stream(self) -> None:
        if self._stream is not None:
            self._client.pass_over(self._stream.endpoint)
            self._client.drop(self._stream)
            self._stream = None

    def close(self) -> None:
        if self._stream is not None:
            self._client.drop(self._stream)
            self._stream = None
