"""Flushes of one drive, in a thread of its own: who asks while one is under way shares the next one.

Place      block floor, under the drive server, on the engine.
Why        fdatasync of a good disk takes 100 us; a trio task and a hop to trio's thread pool take as long again. So
           requests are callbacks, and the thread tells the engine by an eventfd.
"""

import os
import queue
import select
import threading
from collections.abc import Callable

from csvfs.errors import CsvfsError, DriveFailed
from csvfs.net.engine import Engine

Flushed = Callable[[CsvfsError | None], None]


class Flusher:
    """One drive's flushes.

    begin   called in the engine's thread right before a flush begins; what it returns goes to `end`
    flush   called in this flusher's thread; raises CsvfsError
    end     called in the engine's thread after it, before those who wait are told
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        begin: Callable[[], object],
        flush: Callable[[], None],
        end: Callable[[object, CsvfsError | None], None],
    ) -> None:
        self._engine = engine
        self._begin = begin
        self._flush = flush
        self._end = end
        self._waiting: list[Flushed] = []  # for the next flush
        self._told: list[Flushed] = []  # by the one under way
        self._running = False
        self._token: object = None
        self._error: CsvfsError | None = None
        self._orders: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        engine.register(self._eventfd, select.EPOLLIN, self._on_done)
        self._thread = threading.Thread(target=self._work, name=f"flush {name}", daemon=True)
        self._thread.start()

    def request(self, flushed: Flushed) -> None:
        """Call `flushed(error)` after a flush that begins after this call (I8)."""
        self._waiting.append(flushed)
        if not self._running:
            self._start()

    def _start(self) -> None:
        self._running = True
        self._told, self._waiting = self._waiting, []
        self._token = self._begin()
        self._orders.put(True)

    def _work(self) -> None:
        while self._orders.get():
            self._error = None
            try:
                self._flush()
            except CsvfsError as error:
                self._error = error
            except Exception as error:  # whoever waits must hear of it, whatever it is
                self._error = DriveFailed(f"flush failed in a way nobody planned for: {error!r}")
            os.eventfd_write(self._eventfd, 1)

    def _on_done(self, mask: int) -> None:
        os.eventfd_read(self._eventfd)
        told, self._told = self._told, []
        error = self._error
        self._running = False
        self._end(self._token, error)
        if self._waiting:
            self._start()
        for flushed in told:
            flushed(error)

    def give_up(self, error: CsvfsError) -> None:
        """The flush under way does not end: who waits for it, or for a later one, hears `error`."""
        told, self._told, self._waiting = [*self._told, *self._waiting], [], []
        for flushed in told:
            flushed(error)

    def close(self) -> None:
        """Waits for the flush under way; those who wait for a later one are told that there is none."""
        self._orders.put(False)
        self._thread.join()
        self._engine.unregister(self._eventfd)
        os.close(self._eventfd)
        for flushed in [*self._told, *self._waiting]:
            flushed(DriveFailed("the drive was closed"))
        self._told, self._waiting = [], []
