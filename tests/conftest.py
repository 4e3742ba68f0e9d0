"""For all tests: several engines share one thread here, so none of them may wait for its own I/O alone."""

import pytest

from csvfs.net import engine


@pytest.fixture(autouse=True)
def no_hot_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In production each process has one engine, and a hot wait costs nobody anything."""
    monkeypatch.setattr(engine, "HOT_NS", 0)
