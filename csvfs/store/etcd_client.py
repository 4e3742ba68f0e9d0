"""Calls to an etcd cluster: to whichever member answers, within a deadline.

Place      store floor, below etcd.py. Knows members, connections, failures; nothing of keys.
Failover   The member that answered last is asked first, at the beginning this node's own. One that cannot be
           reached, has lost the majority or stays silent for `attempt_s` is passed over; after a round through
           all of them there is a pause, and `endpoints` is read again.
Repeats    `call` may do its work several times: whoever calls says why that does no harm.
Limits     IDLE_MAX idle connections per member; OPERATION_S for all attempts of a call together.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar

import trio

from csvfs.errors import CsvfsError, Disconnected, ProtocolError, TimedOut, Unavailable
from csvfs.store.etcd_http import Endpoint, HttpConnection, connect
from csvfs.store.etcd_messages import Refused
from csvfs.store.etcd_place import EtcdPlace

logger = logging.getLogger(__name__)
OPERATION_S = 5.0  # as long as the embedded store waits for a lock
ATTEMPT_S = 1.0  # what asks a majority takes milliseconds; an election takes about this long
CONNECT_S = 0.5  # a member on a machine without power answers nothing
ROUND_PAUSE_S = 0.05
IDLE_MAX = 4

T = TypeVar("T")
Work: TypeAlias = Callable[[HttpConnection], Awaitable[T]]


class Closed(Unavailable):
    """This handle is closed."""


class AnswerLost(Unavailable):
    """A request may have reached etcd, and no answer came that says what became of it."""


class EtcdClient:
    """Of one process and one directory."""

    def __init__(self, place: EtcdPlace, only: list[Endpoint] | None = None) -> None:
        """`only`: ask these members, whatever the directory says.

        Raises   Unavailable, BadRequest: the directory does not say how to reach the store.
        """
        self._place = place
        self._tls = place.tls()
        self._only = only
        self._endpoints = only or place.endpoints()
        self._first = self._endpoints[0]  # the one to ask first
        self._idle: dict[Endpoint, list[HttpConnection]] = {}
        self._open: set[HttpConnection] = set()
        self._closed = False

    async def call(
        self, work: Work[T], *, attempt_s: float = ATTEMPT_S, deadline_s: float = 0.0, once: bool = False
    ) -> T:
        """Do `work` on a connection to some member, on others if that fails.

        Args     deadline_s: for all attempts together; 0: OPERATION_S. once: do not begin the work a second
                 time, as it may have been done.
        Raises   Unavailable: none could do it in time; it may have been done all the same.
                 AnswerLost: only with `once`. Refused: etcd does not do this, wherever it is asked.
        Cancel   safe; it may have been done.
        """
        reasons: dict[Endpoint, str] = {}
        deadline_s = max(deadline_s or OPERATION_S, attempt_s)
        deadline = trio.current_time() + deadline_s
        while True:
            for endpoint in self.endpoints_in_order():
                left_s = deadline - trio.current_time()
                if left_s <= 0:
                    raise self._unreachable(reasons, deadline_s)
                try:
                    result = await self._attempt(endpoint, work, min(attempt_s, left_s))
                except (Disconnected, TimedOut, AnswerLost) as error:
                    if once and isinstance(error, AnswerLost):
                        raise
                    if left_s >= attempt_s or endpoint not in reasons:  # else it had little time to answer
                        reasons[endpoint] = str(error)
                else:
                    self._first = endpoint
                    return result
            await trio.sleep(min(ROUND_PAUSE_S, max(0.0, deadline - trio.current_time())))
            self.reread_endpoints()

    async def _attempt(self, endpoint: Endpoint, work: Work[T], attempt_s: float) -> T:
        """Raises Disconnected, TimedOut: not begun. AnswerLost: begun, and nobody knows how it ended."""
        connection = None
        with trio.move_on_after(attempt_s):
            connection = await self.connection(endpoint)
            try:
                return await work(connection)
            except (Disconnected, ProtocolError) as error:
                raise AnswerLost(str(error)) from None
            except Refused as error:
                if error.is_of_the_request:
                    raise
                raise AnswerLost(f"etcd at {endpoint}: {error}") from None
            finally:
                self.give_back(connection)
        reason = f"etcd at {endpoint} does not answer within {attempt_s * 1000:.0f} ms"
        raise TimedOut(reason) if connection is None else AnswerLost(reason)

    async def connection(self, endpoint: Endpoint) -> HttpConnection:
        """An idle connection to that member, or a new one. Raises Disconnected, TimedOut, Closed."""
        self.refuse_when_closed()
        idle = self._idle.get(endpoint)
        if idle:
            await trio.lowlevel.checkpoint_if_cancelled()
            return idle.pop()
        with trio.move_on_after(CONNECT_S):
            connection = await connect(endpoint, self._tls)
            self._open.add(connection)
            return connection
        raise TimedOut(f"etcd at {endpoint} takes no connection within {CONNECT_S * 1000:.0f} ms")

    def give_back(self, connection: HttpConnection) -> None:
        """Keep a connection for the next call, if it can take one."""
        idle = self._idle.setdefault(connection.endpoint, [])
        if connection.is_reusable and len(idle) < IDLE_MAX and not self._closed:
            idle.append(connection)
        else:
            self.drop(connection)

    def drop(self, connection: HttpConnection) -> None:
        """Close a connection that is not to be used any more."""
        self._open.discard(connection)
        connection.close()

    def endpoints_in_order(self) -> list[Endpoint]:
        """All members, the one that answered last first."""
        at = self._endpoints.index(self._first) if self._first in self._endpoints else 0
        return self._endpoints[at:] + self._endpoints[:at]

    def pass_over(self, endpoint: Endpoint) -> None:
        """`endpoint` did not do its duty: ask the one behind it first from now on."""
        if endpoint == self._first and endpoint in self._endpoints:
            self._first = self._endpoints[(self._endpoints.index(endpoint) + 1) % len(self._endpoints)]

    def reread_endpoints(self) -> None:
        if self._only:
            return
        try:
            self._endpoints = self._place.endpoints()
        except CsvfsError as error:
            logger.warning("%s", error)

    def _unreachable(self, reasons: dict[Endpoint, str], deadline_s: float) -> Unavailable:
        text = "; ".join(reasons[endpoint] for endpoint in sorted(reasons, key=str)) or "no member was asked"
        return Unavailable(
            f"the cluster store has no majority of members that can be reached ({deadline_s:.0f} s tried): {text};"
            " nothing changes until most of them are back"
        )

    def refuse_when_closed(self) -> None:
        if self._closed:
            raise Closed(f"the store {self._place.directory} has been closed by this process")

    def close(self) -> None:
        self._closed = True
        self._idle.clear()
        for connection in list(self._open):
            self.drop(connection)

