"""How fast copies are made: by feedback from those who use the drives, never below the floor."""

import trio
from hypothesis import given
from hypothesis import strategies as st

from csvfs.block.pace import (
    RATE_MAX,
    RATE_MIN,
    RATE_START,
    SLOWDOWN_MAX,
    SPEEDS,
    Foreground,
    Load,
    Pacer,
    next_rate,
)
from csvfs.units import MIB

LEVELS = st.integers(0, len(SPEEDS) - 1)
LATENCY = st.floats(1, 1e6)
RATES = st.floats(RATE_MIN, RATE_MAX)


@given(LEVELS, st.one_of(st.none(), LATENCY), LATENCY, RATES)
def test_a_rate_lies_between_the_floor_and_full_speed_and_is_full_when_nobody_is_there(
    level, now, idle, rate
):
    found = next_rate(level, now, idle, rate)
    assert RATE_MIN <= found <= RATE_MAX
    assert (found == RATE_MAX) == (now is None)


@given(LEVELS, LATENCY, LATENCY, LATENCY, RATES)
def test_slower_programs_never_make_copies_faster_and_a_higher_level_never_makes_them_slower(
    level, one, other, idle, rate
):
    better, worse = sorted((one, other))
    assert next_rate(level, worse, idle, rate) <= next_rate(level, better, idle, rate)
    if level:
        assert next_rate(level - 1, one, idle, rate) <= next_rate(level, one, idle, rate)


@given(LEVELS, LATENCY, RATES)
def test_under_lasting_pressure_the_floor_is_reached_and_when_it_ends_full_speed_comes_back(
    level, idle, rate
):
    for _ in range(12):
        rate = next_rate(level, idle * SLOWDOWN_MAX[level] * 1.01, idle, rate)
    assert rate == RATE_MIN
    for _ in range(40):
        rate = next_rate(level, idle, idle, rate)
    assert rate >= RATE_MAX / 2
    assert next_rate(level, None, idle, rate) == RATE_MAX


def test_when_programs_come_back_copies_begin_again_from_a_modest_rate():
    for level, start in enumerate(RATE_START):
        assert next_rate(level, 100.0, 100.0, RATE_MAX) <= 1.25 * start


def test_the_baseline_is_what_requests_took_while_nothing_was_pulled():
    foreground = Foreground()
    now_s = 0.0

    def interval(micros: int | None, pulling: bool) -> Load:
        nonlocal now_s
        now_s += 0.1
        for _ in range(0 if micros is None else 10):
            foreground.note(micros * 1000)
        return foreground.load(now_s, pulling=pulling)

    assert interval(None, False).latency_us is None
    for _ in range(50):
        interval(100, False)
    for _ in range(20):
        load = interval(300, True)
    assert load.latency_us == 300 and 100 <= load.baseline_us < 110 and load.slowdown > 2.7
    assert foreground.load(now_s, pulling=True) is load, "an interval that has just begun says nothing yet"
    for _ in range(50):
        load = interval(300, False)
    assert load.baseline_us > 290, "that is how they are now"
    foreground.note(50_000)
    now_s += 0.1
    assert foreground.load(now_s, pulling=True).latency_us is None, "one short request is nobody at work"
    foreground.note(50_000_000)
    now_s += 0.1
    assert foreground.load(now_s, pulling=True).latency_us == 50_000, "one that took long is"
    foreground.note_lag(0.004)
    assert interval(300, True).latency_us == 3800, "requests wait while this process is busy"


def test_the_worst_of_here_and_the_sources_counts():
    pacer = Pacer()
    pacer.adjust([Load(None, 1.0), Load(None, 1.0)])
    assert pacer.rate == RATE_MAX
    pacer.adjust([Load(100.0, 100.0), Load(900.0, 100.0)])
    slow = pacer.rate
    assert slow == RATE_START[pacer.level] / 2
    pacer.adjust([Load(100.0, 100.0), Load(None, 100.0)])
    assert pacer.rate > slow


async def test_pulls_of_one_drive_share_its_rate(autojump_clock):
    pacer = Pacer()
    pacer.rate = 8.0 * MIB
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(take_often, pacer)
    took_s = trio.current_time() - began
    assert 3.7 < took_s < 4.1, "32 MiB at 8 MiB/s"


async def take_often(pacer: Pacer) -> None:
    for _ in range(8):
        await pacer.take(MIB)
