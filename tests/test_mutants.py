"""Deliberately broken rules are caught by the simulator: at least one for each of I1 to I9.

The mutants: tests/simulator/mutants.py. The true code passes the same seeds (tests/test_simulator.py runs them).
"""

import logging

import pytest

from tests.simulator.mutants import MUTANTS, SEEN_AS_UNHEALED, broken
from tests.simulator.world import run_seed

SEEDS_MAX = 400


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_the_simulator_catches(name: str) -> None:
    """Run seed after seed with the rule broken, until a history, a copy or an in-sync set gives it away."""
    logging.disable(logging.CRITICAL)
    try:
        for seed in range(1, SEEDS_MAX + 1):
            with broken(name):
                outcome = run_seed(seed)
            # A mutant that does not run at all, or hangs, would be caught by anything.
            caught = outcome.lied or (outcome.unhealed and name in SEEN_AS_UNHEALED)
            if caught and run_seed(seed).failure is None:  # the true code passes it
                return
    finally:
        logging.disable(logging.NOTSET)
    pytest.fail(f"{name}: not noticed in {SEEDS_MAX} seeds")


def test_every_invariant_of_the_block_layer_has_a_mutant() -> None:
    assert {name.split()[0] for name in MUTANTS} == {f"I{number}" for number in range(1, 10)}
