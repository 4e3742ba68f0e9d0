"""Power cuts: what was flushed is there, and every block is old or new, never a third thing.

Drives are the real Drive over a simulated page cache (tests/simulator/medium.py): at a cut the medium has what the last
flush put there, and an arbitrary subset of the pages of 4 KiB that were written since, data and tables alike.
"""

from __future__ import annotations

import copy as copying
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import pytest

from csvfs.block.drive import Drive
from csvfs.block.slab_copy import SlabCopy
from csvfs.errors import Corrupt
from csvfs.ids import DriveId, Epoch, SlabId, Term
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import ROLE_IN_SYNC
from tests.drive_files import VOLUME, pattern, sums_of
from tests.simulator import seams
from tests.simulator.clock import SimClock
from tests.simulator.medium import Medium, SimOs
from tests.simulator.world import blank_drive

BLOCKS = 48  # of each slab, over three chunks
SLABS = 2
STEPS = 25
Content = dict[tuple[int, int], bytes]  # (slab, block) to what was written; absent: zeros
ZERO = bytes(BLOCK_SIZE)


class Story:
    """One drive's life up to a cut: what was flushed, and what every block may be."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.os = SimOs()
        self.medium = blank_drive(DriveId(b"P" * 16)).copy("drive")
        self.medium.boot = b"first boot".ljust(16)
        self.os.media["drive"] = self.medium
        self.live: Content = {}
        self.flushed: Content = {}
        self.since: dict[tuple[int, int], list[bytes]] = {}  # written after the last flush
        self.number = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        with seams.installed(SimClock(), self.os, 0, None):  # type: ignore[arg-type]
            yield

    def note(self, slab: int, block: int, data: bytes) -> None:
        self.live[slab, block] = data
        self.since.setdefault((slab, block), []).append(data)

    def step(self, drive: Drive, copies: list[SlabCopy]) -> bool:
        """One operation; True: it was a flush."""
        rng = self.rng
        kind = rng.random()
        copy = rng.choice(copies)
        block = rng.randrange(BLOCKS)
        if kind < 0.7:
            count = min(rng.choice((1, 1, 2, 8)), BLOCKS - block)
            self.number += 1
            data = pattern(self.number, count)
            copy.write_blocks(block, memoryview(data), sums_of(copy, block, data))
            for index in range(count):
                self.note(copy.slab, block + index, data[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
        elif kind < 0.8:
            count = min(rng.choice((1, 4)), BLOCKS - block)
            copy.trim_blocks(block, count)
            for index in range(count):
                self.note(copy.slab, block + index, ZERO)
        elif kind < 0.88:
            self.medium.write_back_some(rng)
        else:
            self.flush(drive)
            return True
        return False

    def flush(self, drive: Drive) -> None:
        drive.flush()
        self.flushed = dict(self.live)
        self.since = {}

    def may_be(self, slab: int, block: int) -> list[bytes]:
        return [self.flushed.get((slab, block), ZERO), *self.since.get((slab, block), ())]


def check_after_cut(story: Story, seed: int) -> tuple[int, int]:
    """Boot again, adopt what is torn as the last copy does, and judge every block. Returns (blocks, adopted)."""
    medium = copying.copy(story.medium)
    medium.pages, medium.durable = dict(medium.pages), dict(medium.durable)
    medium.area, medium.area_durable = type(medium.area)(medium.area), bytearray(medium.area_durable)
    medium._dirty, medium.unreadable = set(medium._dirty), set()
    medium.power_cut(Random(seed))
    medium.boot = b"second boot".ljust(16)
    os = SimOs()
    os.media["drive"] = medium
    judged = 0
    with seams.installed(SimClock(), os, 0, None):  # type: ignore[arg-type]
        drive = Drive.open("drive")
        assert drive.contents_lost
        slabs = {copy.slab: copy for copy in drive.slabs()}
        assert set(slabs) == set(range(1, SLABS + 1))  # they were flushed before anything else
        for copy in slabs.values():
            for block in range(BLOCKS):
                judged += judge(story, copy, block, adopted=False)
            adopted = drive.adopt_torn(copy)
            for block in range(BLOCKS):
                judged += judge(story, copy, block, adopted=True)
        drive.close(clean=False)
    return judged, adopted


def judge(story: Story, copy: SlabCopy, block: int, *, adopted: bool) -> int:
    try:
        data = bytes(copy.read_blocks(block, 1)[1])
    except Corrupt:
        # Torn: only what was being written since the flush can be, and adoption leaves nothing of it.
        assert not adopted
        assert (copy.slab, block) in story.since
        return 1
    allowed = story.may_be(copy.slab, block)
    assert data in allowed, f"slab {copy.slab} block {block} is a third thing"
    if (copy.slab, block) not in story.since:
        assert data == story.flushed.get((copy.slab, block), ZERO), "what was flushed is gone"
    return 1


def tell(seed: int) -> tuple[int, int]:
    """A story with cuts at every flush boundary and at random points. Returns (cuts, blocks judged)."""
    story = Story(seed)
    cuts = judged = 0
    with story.running():
        drive = Drive.open("drive")
        copies = [
            drive.create_slab(VOLUME, SlabId(slab), Epoch(1), ROLE_IN_SYNC, Term(1))
            for slab in range(1, SLABS + 1)
        ]
        drive.flush()
    for step in range(STEPS):
        with story.running():
            flushed = story.step(drive, copies)
        if flushed or story.rng.random() < 0.3:
            for again in range(2):
                judged += check_after_cut(story, 1000 * seed + 2 * step + again)[0]
                cuts += 1
    with story.running():
        drive.close(clean=False)
    return cuts, judged


def test_a_thousand_power_cuts_lose_nothing_that_was_flushed_and_leave_no_third_thing() -> None:
    cuts = judged = 0
    for seed in range(150):
        told = tell(seed)
        cuts, judged = cuts + told[0], judged + told[1]
    assert cuts >= 1000, cuts
    assert judged > 100_000


def test_a_drive_that_forgets_what_it_flushed_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test itself can fail: a flush that reaches no medium is noticed."""
    monkeypatch.setattr(Medium, "sync", lambda self: None)
    with pytest.raises((AssertionError, Corrupt)):
        for seed in range(20):
            tell(seed)
