"""Which writer's writes keep which chunks active (I3).

Place      block floor, under the drive server. No I/O: it says what may be unmarked, the server does it.
Why        A chunk with a write that may not be on all members must be found after its writer died. The drive keeps
           the bit (FORMAT.md, "Slot metadata"); here stands whose it is, so that the writer's word that it is
           complete on all members (`completed_below`) can take it away again.
Rule       A bit goes only after the write is complete, or the coordinator has made the chunk equal on all members,
           *and* the drive has been flushed since.
Pulled     What a copy was given by a pull may be such a write, too: the source has it, others may not. Then the chunk is
           as **unsettled** here as it is there, until the coordinator says that it is equal everywhere. Else the source
           could die, and nobody would know that the others differ.
Rest       It does not go at once: a chunk written now is likely to be written again, and each change of a bit is one
           more page for the next flush, where a small synced write has two others (data and checksum). So a
           chunk that may be unmarked **rests** for REST_S since its last flush, RESTING_MAX of them per drive.
           The price: a drive server that is killed has so many chunks more to take from other copies, 128 MiB
           at most. A flush that covers many chunks has pages enough of its own: its chunks do not rest.
"""

from collections.abc import Callable, Iterable
from typing import Any

from csvfs.ids import Incarnation

Chunk = tuple[Any, int]  # (slab copy, chunk index in it)

REST_S = 60.0
RESTING_MAX = 2048  # per drive: chunks of 64 KiB
RESTING_COVERED_MAX = 16  # of a flush whose chunks rest


class WriterMarks:
    """Marks of one incarnation of one writer. Lives on when its link breaks."""

    __slots__ = ("below", "incarnation", "marks", "writer")

    def __init__(self, writer: str, incarnation: Incarnation) -> None:
        self.writer = writer
        self.incarnation = incarnation
        self.marks: dict[Chunk, int] = {}  # to the sequence of the last write there
        self.below = 0  # all sequences below are complete on all members

    def take_complete(self) -> list[Chunk]:
        """Chunks whose writes are all complete; they are no longer this writer's."""
        below = self.below
        complete = [chunk for chunk, sequence in self.marks.items() if sequence < below]
        for chunk in complete:
            del self.marks[chunk]
        return complete


class MarkBook:
    """All writers of one drive server, and the chunks that wait for a flush to be unmarked."""

    def __init__(self) -> None:
        self._writers: dict[tuple[bytes, str, Incarnation], WriterMarks] = {}
        self._awaiting_flush: dict[Any, set[Chunk]] = {}  # by drive
        self._unsettled: set[Chunk] = set()  # pulled, and maybe not on all members
        # By drive: when they were flushed, the longest ago first. Those that were marked again stay here until
        # they are looked at.
        self._resting: dict[Any, dict[Chunk, float]] = {}

    def writer(self, volume: bytes, writer: str, incarnation: Incarnation) -> WriterMarks:
        key = (volume, writer, incarnation)
        marks = self._writers.get(key)
        if marks is None:
            marks = self._writers[key] = WriterMarks(writer, incarnation)
        return marks

    def of_writer(self, volume: bytes, writer: str | None) -> set[Chunk]:
        """Chunks marked by any incarnation of `writer` of the volume; None: of all its writers."""
        return {
            chunk
            for (marked_volume, name, _), marks in self._writers.items()
            if marked_volume == volume and writer in (None, name)
            for chunk in marks.marks
        }

    def settle(self, volume: bytes, writer: str, min_incarnation: Incarnation) -> None:
        """Older incarnations are over. What was not made equal of what they marked stays active, as nobody's: it is on a
        copy that was out of its slab, and is copied anew when it returns."""
        for key in [key for key in self._writers if key[:2] == (volume, writer) and key[2] < min_incarnation]:
            del self._writers[key]

    def made_equal(self, chunks: Iterable[Chunk], is_over: Callable[[bytes, str, Incarnation], bool]) -> None:
        """Chunks are the same on all members: marks there may go after a flush, but for those of writers not over."""
        equal = set(chunks)
        for key, marks in self._writers.items():
            if is_over(*key):
                for chunk in equal.intersection(marks.marks):
                    del marks.marks[chunk]
        self._unsettled -= equal
        self._await_flush(equal)

    def note_unsettled(self, chunks: Iterable[Chunk]) -> None:
        """Chunks are about to be pulled, from where they may not be on all members."""
        self._unsettled.update(chunks)

    def forget_unsettled(self, chunks: Iterable[Chunk]) -> None:
        """What was pulled is on all members."""
        self._unsettled.difference_update(chunks)

    def is_unsettled(self, chunk: Chunk) -> bool:
        """It was pulled, and nobody has said that it is equal everywhere."""
        return chunk in self._unsettled

    def is_incomplete(self, chunk: Chunk) -> bool:
        """Of an active chunk: it may have content that other members lack. Call `sweep` first."""
        awaits_flush = chunk in self._awaiting_flush.get(chunk[0].drive, ())
        return self._is_written(chunk) or not (awaits_flush or chunk in self._resting.get(chunk[0].drive, ()))

    def sweep(self) -> None:
        """Move complete marks to those that wait for a flush."""
        for marks in self._writers.values():
            if marks.marks:
                self._await_flush(marks.take_complete())

    def _await_flush(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            self._awaiting_flush.setdefault(chunk[0].drive, set()).add(chunk)

    def waiting_count(self, drive: Any) -> int:
        return len(self._awaiting_flush.get(drive, ()))

    def begin_flush(self, drive: Any) -> set[Chunk]:
        """What a flush of `drive` that starts now will cover; give it to `flushed` or `flush_failed`."""
        self.sweep()
        return self._awaiting_flush.pop(drive, set())

    def flush_failed(self, drive: Any, covered: set[Chunk]) -> None:
        self._awaiting_flush.setdefault(drive, set()).update(covered)

    def flushed(self, drive: Any, covered: set[Chunk], now_s: float) -> dict[Any, list[int]]:
        """Chunks covered by a flush of `drive` begin to rest; returns those to unmark, by slab copy."""
        resting = self._resting.setdefault(drive, {})
        unmark: dict[Any, list[int]] = {}
        for chunk in covered:
            if not self.is_marked(chunk):
                resting.pop(chunk, None)
                if len(covered) <= RESTING_COVERED_MAX:
                    resting[chunk] = now_s
                else:
                    unmark.setdefault(chunk[0], []).append(chunk[1])
        self._end_rest(drive, now_s, unmark)
        return unmark

    def rested(self, drive: Any, now_s: float) -> dict[Any, list[int]]:
        """Chunks of `drive` that have rested long enough, to be unmarked, by slab copy."""
        unmark: dict[Any, list[int]] = {}
        self._end_rest(drive, now_s, unmark)
        return unmark

    def _end_rest(self, drive: Any, now_s: float, unmark: dict[Any, list[int]]) -> None:
        resting = self._resting.get(drive, {})
        while resting:
            chunk, since_s = next(iter(resting.items()))
            if len(resting) <= RESTING_MAX and now_s - since_s < REST_S:
                break
            del resting[chunk]
            if not self.is_marked(chunk):
                unmark.setdefault(chunk[0], []).append(chunk[1])

    def is_marked(self, chunk: Chunk) -> bool:
        """Some write to it is not known to be complete, or not flushed yet."""
        return self._is_written(chunk) or chunk in self._awaiting_flush.get(chunk[0].drive, ())

    def _is_written(self, chunk: Chunk) -> bool:
        """A write or a pull to it is not known to be on all members."""
        return chunk in self._unsettled or any(chunk in marks.marks for marks in self._writers.values())

    def is_resting(self, chunk: Chunk) -> bool:
        """It is active on the drive only because it rests: all its writes are complete and flushed."""
        return chunk in self._resting.get(chunk[0].drive, ()) and not self.is_marked(chunk)

    def forget_drive(self, drive: Any) -> None:
        """The drive has failed: its copies are others when it is opened again, all marked on the drive itself."""
        for marks in self._writers.values():
            for chunk in [chunk for chunk in marks.marks if chunk[0].drive is drive]:
                del marks.marks[chunk]
        self._unsettled = {chunk for chunk in self._unsettled if chunk[0].drive is not drive}
        self._awaiting_flush.pop(drive, None)
        self._resting.pop(drive, None)

    def forget(self, copy: Any) -> None:
        """The slab copy was deleted."""
        for marks in self._writers.values():
            for chunk in [chunk for chunk in marks.marks if chunk[0] is copy]:
                del marks.marks[chunk]
        self._unsettled = {chunk for chunk in self._unsettled if chunk[0] is not copy}
        for waiting in self._awaiting_flush.values():
            waiting.difference_update([chunk for chunk in waiting if chunk[0] is copy])
        for resting in self._resting.values():
            for chunk in [chunk for chunk in resting if chunk[0] is copy]:
                del resting[chunk]
