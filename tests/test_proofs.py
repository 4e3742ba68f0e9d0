"""Short versions of the stories of tests/proofs that no other test tells; `tools/prove_repair` tells them at length."""

from collections.abc import Iterator
from random import Random

import pytest

from csvfs.units import GIB
from tests.lab_cluster import needs_lab
from tests.proofs import stories
from tests.proofs.ground import Ground, proof_ground

pytestmark = [pytest.mark.lab, needs_lab]

AWAY_MS = 6_000


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with proof_ground(print, drives=2, drive_size=1 * GIB, options={"drive_retire_ms": AWAY_MS}) as made:
        made.load_mib = 4
        yield made


def test_a_drive_overwritten_with_zeros_is_rebuilt_elsewhere_and_replaced_and_programs_see_nothing(ground):
    stories.destroyed(stories.zero, "zeros", "Failed media")(ground, Random(1))


def test_a_thousand_flipped_bits_on_a_running_node_are_all_healed_and_no_wrong_byte_is_read(ground):
    stories.bits(ground, Random(2), file_mib=24)


def test_a_node_that_was_away_is_copied_at_most_the_chunks_that_were_touched(ground, monkeypatch):
    monkeypatch.setattr(stories, "MARKS_GONE_S", 0.0)  # what is active still counts as touched
    stories.resync(ground, Random(3), writes=256, file_mib=64)


def test_I8_a_drive_that_fails_its_flushes_costs_no_program_an_error_and_comes_back(ground):
    stories.failing(ground, Random(4), kinds=('"fsync"',))
