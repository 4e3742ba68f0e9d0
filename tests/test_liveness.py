"""The liveness page: a node stops serving before the others may count it as gone (I5)."""

import timeit
from pathlib import Path

import pytest

from csvfs.cluster.liveness import PAGE_SIZE, Liveness, LivenessWriter, serve_until_ns
from csvfs.errors import LeaseLost
from csvfs.ids import Incarnation

FIRST, SECOND = Incarnation(1), Incarnation(2)


def at(now_ns: int):  # type: ignore[no-untyped-def]
    return lambda: now_ns


def test_i5_a_new_page_does_not_allow_serving(tmp_path: Path) -> None:
    LivenessWriter(tmp_path / "liveness", FIRST)
    page = Liveness(tmp_path / "liveness", FIRST, clock=at(0))
    assert not page.may_serve()
    assert page.remaining_ms == 0
    assert (tmp_path / "liveness").stat().st_size == PAGE_SIZE


def test_i5_serving_ends_at_the_very_nanosecond(tmp_path: Path) -> None:
    writer = LivenessWriter(tmp_path / "liveness", FIRST)
    writer.serve_until(5_000_000)
    assert Liveness(tmp_path / "liveness", clock=at(4_999_999)).may_serve()
    assert not Liveness(tmp_path / "liveness", clock=at(5_000_000)).may_serve()
    assert Liveness(tmp_path / "liveness", clock=at(2_000_000)).remaining_ms == 3


def test_i5_expiring_is_seen_by_who_has_the_page_open(tmp_path: Path) -> None:
    writer = LivenessWriter(tmp_path / "liveness", FIRST)
    page = Liveness(tmp_path / "liveness", FIRST)
    writer.serve_until(1 << 63)
    assert page.may_serve()
    writer.expire()
    assert not page.may_serve()


def test_i5_a_process_left_over_from_an_earlier_lease_never_serves_again(tmp_path: Path) -> None:
    earlier = LivenessWriter(tmp_path / "liveness", FIRST)
    left_over = Liveness(tmp_path / "liveness", FIRST)
    earlier.close()
    later = LivenessWriter(tmp_path / "liveness", SECOND)
    later.serve_until(1 << 63)
    assert Liveness(tmp_path / "liveness", SECOND).may_serve()
    assert not left_over.may_serve()
    with pytest.raises(LeaseLost, match="lease 2"):
        Liveness(tmp_path / "liveness", FIRST)


def test_i5_lease_time_counts_from_when_the_heartbeat_was_sent() -> None:
    assert serve_until_ns(sent_ns=1_000, lease_ms=3000, margin_ms=500) == 1_000 + 2_500_000_000


@pytest.mark.parametrize("content", [None, b"", b"\0" * PAGE_SIZE, b"CSVFSLV1"])
def test_what_is_no_page_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "liveness").write_bytes(content)
    with pytest.raises(LeaseLost):
        Liveness(tmp_path / "liveness")


def test_looking_costs_less_than_a_microsecond(tmp_path: Path) -> None:
    LivenessWriter(tmp_path / "liveness", FIRST)
    page = Liveness(tmp_path / "liveness")
    best_s = min(timeit.repeat(page.may_serve, number=10_000, repeat=5)) / 10_000
    assert best_s < 1e-6
