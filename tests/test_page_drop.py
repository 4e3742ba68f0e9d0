"""Pages are taken back around those that wait for an answer, which nobody gives."""

import threading
from collections.abc import Iterator

import pytest

from csvfs.mount import page_drop
from csvfs.mount.page_drop import PageDrop
from csvfs.units import BLOCK_SIZE

WITHIN_S = 60.0


class Kernel:
    """Pages it has cached, by inode, and pages that are locked: an invalidation goes in order, and waits at these."""

    def __init__(self, cached: dict[int, set[int]], locked: dict[int, set[int]]) -> None:
        self.cached, self.locked = cached, locked
        self.answered = threading.Event()

    def invalidate(self, ino: int, offset: int, length: int) -> None:
        first = offset // BLOCK_SIZE
        end = (offset + length) // BLOCK_SIZE if length else page_drop.PAGES_MAX
        locked = self.locked.get(ino, set())
        for page in sorted(page for page in self.cached[ino] | locked if first <= page < end):
            if page in locked:
                self.answered.wait()
            self.cached[ino].discard(page)


@pytest.fixture
def answered() -> Iterator[list[Kernel]]:
    """Kernels put here answer in the end, so that no thread is left."""
    kernels: list[Kernel] = []
    yield kernels
    for kernel in kernels:
        kernel.answered.set()


def test_I5_of_files_with_reads_unanswered_all_other_pages_are_taken_back(answered: list[Kernel]) -> None:
    locked = {1: set(range(100, 132)), 3: {0, 5000, 5001}, 5: {70_000}, 6: {2**40}}
    cached = {ino: set(range(0, 80_000, 7)) - locked.get(ino, set()) | {2**45} for ino in range(1, 9)}
    kernel = Kernel(cached, locked)
    answered.append(kernel)
    assert PageDrop(kernel.invalidate, cached, frozenset()).run(WITHIN_S)
    assert not any(cached.values())


def test_I5_what_could_not_all_be_taken_back_in_time_is_said(
    answered: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_drop, "THREADS_MAX", 20)
    locked = {1: set(range(0, 5000, 2))}
    kernel = Kernel({1: set(range(1, 5000, 2)), 2: {1}}, locked)
    answered.append(kernel)
    assert not PageDrop(kernel.invalidate, [1, 2], frozenset([2])).run(WITHIN_S)


def test_very_many_dirty_pages_of_a_file_held_for_writing_stay_and_hold_up_no_other_file(
    answered: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_drop, "THREADS_MAX", 20)
    dirty = {1: set(range(5000))}
    cached = {1: set(), **{ino: {1, 2, 3} for ino in range(2, 200)}}
    kernel = Kernel(cached, dirty)
    answered.append(kernel)
    assert PageDrop(kernel.invalidate, cached, frozenset([1])).run(WITHIN_S)
    assert not any(cached.values())
