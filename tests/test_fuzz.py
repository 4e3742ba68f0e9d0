"""Bytes from outside, in small doses: `tools/fuzz` gives them by the million."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.services import SERVICES, run_service
from tests.fuzz.targets import SIZE_MAX, TARGETS


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_what_is_valid_is_taken_and_what_is_nearly_valid_ends_in_a_typed_error(name):
    target = TARGETS[name]
    draw = random.Random(name)
    for example in target.examples:
        target.try_input(example)
        for _ in range(60):
            data = bytearray(example)
            for _ in range(draw.randrange(1, 4)):
                kind, at = draw.randrange(3), draw.randrange(len(data) + 1)
                if kind == 0 and data:
                    data[at % len(data)] ^= 1 << draw.randrange(8)
                elif kind == 1:
                    data[at:at] = draw.randbytes(draw.randrange(1, 9))
                else:
                    del data[at : at + draw.randrange(1, 9)]
            target.try_input(bytes(data))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(TARGETS)), st.binary(max_size=SIZE_MAX))
def test_any_bytes_end_in_a_typed_error(name, data):
    TARGETS[name].try_input(data)


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_answers_after_hostile_frames_and_nothing_of_them_was_unplanned(name):
    attack, findings = run_service(name, inputs=1500, seed=20261128)
    assert findings == []
    assert attack is not None and attack.answered > 500 and attack.closed > 0
