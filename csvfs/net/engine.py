"""The event engine: one epoll for everything hot, inside one trio task.

Place      net floor. One engine per process, in its one thread.
Why        A trio task, await and wake-up per I/O costs 30 us and more; a 4 KiB write has a budget of about that
           for everything. So hot descriptors (links, /dev/fuse) share one epoll; trio sees a single readable
           descriptor, and one wake-up handles all that is ready, synchronously, until nothing is.
Hot waits  A trio wake-up costs about 20 us, several times per write. While I/O is hot (`hot`: some was handled within
           the last HOT_NS) and trio has nothing to run, the engine waits in its own epoll instead, 1 ms at most, and
           then lets trio look. Who needs trio to notice something that is not in this epoll at once (a thread that
           ends, pyfuse3's socket) says so: `trio_due`, `trio_awaited`.
Batches    Within a batch, links only collect what they send; it leaves in one sendmsg per link at the batch's
           end (`at_batch_end`). Outside of a batch it leaves at once.
Alarms     for what must not last (`after`): rare, and looked at between batches.
Who        `identity`: this node towards others, None: connections are not encrypted. `refusals`: who was turned away.
           Both belong to the process, as the engine does.
"""

import heapq
import itertools
import select
import time
from collections.abc import Callable

import trio

from csvfs.net.refusals import Refusals
from csvfs.net.tls import Identity

EventHandler = Callable[[int], None]

EVENTS_PER_POLL = 64
# Other trio tasks (timers, slow operations) get the thread at least this often under load.
CHECKPOINT_INTERVAL_NS = 500_000
HOT_NS = 2_000_000
HOT_WAIT_S = 0.001  # the shortest that epoll_wait can
# A trio deadline nearer than this is not kept waiting by a hot wait.
DEADLINE_S_MIN = 0.002


class Engine:
    """Owns the epoll descriptor and the handlers of all descriptors registered in it."""

    def __init__(self, identity: Identity | None = None) -> None:
        self.identity = identity
        self.refusals = Refusals()
        self._alarms: list[tuple[float, int, Callable[[], None]]] = []  # heap; the number keeps their order
        self._alarm_numbers = itertools.count()
        self._epoll = select.epoll()
        self._handlers: dict[int, EventHandler] = {}
        self._at_batch_end: list[Callable[[], None]] = []
        self.in_batch = False
        self.trio_due = False  # trio has something to see now that is not in this epoll
        self.trio_awaited = 0  # operations under way that end in trio, not in this epoll
        self._hot_until_ns = 0

    def hot(self) -> None:
        """More I/O of this kind is likely within a millisecond. Call from handlers of hot I/O."""
        self._hot_until_ns = time.monotonic_ns() + HOT_NS

    def register(self, fd: int, events: int, handler: EventHandler) -> None:
        """Call `handler(events)` in the engine's task whenever `fd` has one of `events` (select.EPOLL*)."""
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Must be called before `fd` is closed; events already polled are dropped."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def at_batch_end(self, function: Callable[[], None]) -> None:
        """Run `function` once when the current batch has been handled. Only within a batch."""
        self._at_batch_end.append(function)

    def after(self, delay_s: float, function: Callable[[], None]) -> None:
        """Run `function` once, in the engine's task, `delay_s` from now at the earliest. It cannot be taken back.

        Only from a handler: an engine that waits already would not hear of it.
        """
        heapq.heappush(self._alarms, (time.monotonic() + delay_s, next(self._alarm_numbers), function))

    def _ring(self) -> None:
        while self._alarms and self._alarms[0][0] <= time.monotonic():
            heapq.heappop(self._alarms)[2]()

    async def _wait(self, fd: int) -> None:
        if not self._alarms:
            await trio.lowlevel.wait_readable(fd)
            return
        with trio.move_on_after(max(0.0, self._alarms[0][0] - time.monotonic())):
            await trio.lowlevel.wait_readable(fd)

    async def run_forever(self) -> None:
        """Handle events until cancelled. An exception of a handler is a bug and ends it."""
        poll = self._epoll.poll
        handlers = self._handlers
        fd = self._epoll.fileno()
        checkpoint_due_ns = time.monotonic_ns() + CHECKPOINT_INTERVAL_NS
        while True:
            if self._alarms:
                self._ring()
            events = poll(0, EVENTS_PER_POLL)
            if not events and self._may_wait_hot():
                events = poll(HOT_WAIT_S, EVENTS_PER_POLL)
            if not events:
                self.trio_due = False
                await self._wait(fd)
                checkpoint_due_ns = time.monotonic_ns() + CHECKPOINT_INTERVAL_NS
                continue
            self.in_batch = True
            try:
                for ready_fd, mask in events:
                    handler = handlers.get(ready_fd)
                    if handler is not None:  # None: unregistered by an earlier handler of this batch
                        handler(mask)
                self._finish_batch()
            finally:
                self.in_batch = False
            if time.monotonic_ns() >= checkpoint_due_ns:
                await trio.lowlevel.checkpoint()
                checkpoint_due_ns = time.monotonic_ns() + CHECKPOINT_INTERVAL_NS

    def _may_wait_hot(self) -> bool:
        if self.trio_due or self.trio_awaited or time.monotonic_ns() >= self._hot_until_ns:
            return False
        statistics = trio.lowlevel.current_statistics()
        return statistics.tasks_runnable == 0 and statistics.seconds_to_next_deadline > DEADLINE_S_MIN

    def _finish_batch(self) -> None:
        while self._at_batch_end:
            functions, self._at_batch_end = self._at_batch_end, []
            for function in functions:
                function()

    def close(self) -> None:
        self._handlers.clear()
        self._epoll.close()
