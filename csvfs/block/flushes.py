"""Flushes of all drives of a drive server, and what they make known of active chunks (I3).

Place      block floor, under block_service.py; a flusher.py for each drive that was flushed once.
"""

import logging
from collections.abc import Callable
from typing import cast

import trio

from csvfs.block import latency
from csvfs.block.drive import Drive
from csvfs.block.flusher import Flushed, Flusher
from csvfs.block.served_drives import ServedDrive
from csvfs.block.slab_copy import SlabCopy
from csvfs.block.writer_marks import Chunk, MarkBook
from csvfs.errors import CsvfsError
from csvfs.net.engine import Engine

log = logging.getLogger(__name__)


class Flushes:
    def __init__(self, engine: Engine, marks: MarkBook, failed: Callable[[], None]) -> None:
        """failed: called when a flush has failed, and with it its drive."""
        self._engine = engine
        self._marks = marks
        self._failed = failed
        self._flushers: dict[int, Flusher] = {}  # by the drive's index

    def request(self, served: ServedDrive, flushed: Flushed) -> None:
        """Call `flushed(error)` when everything taken before is on the medium (I8). Raises DriveFailed."""
        drive, measured = served.opened(), served.latency
        flusher = self._flushers.get(served.index)
        if flusher is None:
            flusher = self._flushers[served.index] = Flusher(
                self._engine,
                served.path,
                lambda: (self._marks.begin_flush(drive), measured.begin(latency.FLUSH, trio.current_time())),
                drive.flush,
                lambda began, error: self._after(served, drive, cast(tuple[set[Chunk], int], began), error),
            )
        flusher.request(flushed)

    async def flush(self, served: ServedDrive) -> None:
        """As request, awaited. Raises DriveFailed. Cancel safe."""
        done = trio.Event()
        errors: list[CsvfsError] = []

        def flushed(error: CsvfsError | None) -> None:
            if error is not None:
                errors.append(error)
            done.set()

        self.request(served, flushed)
        await done.wait()
        if errors:
            raise errors[0]

    def give_up(self, served: ServedDrive, error: CsvfsError) -> None:
        """The drive has failed: who waits for a flush of it is told now, however long that takes."""
        flusher = self._flushers.get(served.index)
        if flusher is not None:
            flusher.give_up(error)

    def end(self, served: ServedDrive) -> None:
        """The drive has failed or is not served any more, and no flush of it is under way."""
        flusher = self._flushers.pop(served.index, None)
        if flusher is not None:
            flusher.close()

    def close(self) -> None:
        """End the threads of all drives."""
        for flusher in self._flushers.values():
            flusher.close()
        self._flushers.clear()

    def unmark_rested(self, served: ServedDrive) -> None:
        """To be called now and then, for drives that nobody flushes."""
        if served.drive is not None:
            self._unmark(served, self._marks.rested(served.drive, trio.current_time()))

    def _after(
        self, served: ServedDrive, drive: Drive, began: tuple[set[Chunk], int], error: CsvfsError | None
    ) -> None:
        covered, token = began
        now_s = trio.current_time()
        served.latency.end(token, now_s)
        if error is not None:
            self._failed()
            if served.drive is drive:
                self._marks.flush_failed(drive, covered)
            return
        if served.drive is drive:
            self._unmark(served, self._marks.flushed(drive, covered, now_s))

    def _unmark(self, served: ServedDrive, unmark: dict[SlabCopy, list[int]]) -> None:
        for copy, chunks in unmark.items():
            try:
                copy.clear_active(chunks)
            except CsvfsError as failure:
                # Its slab was deleted or the drive released during the flush, or its tables are damaged: then the
                # copy is made anew.
                log.warning("chunks of slab %d on %s stay active: %s", copy.slab, served.path, failure)
