"""Deliberately broken rules of leases, sessions and fences are caught by the simulator's world of clients.

The mutants: tests/simulator/clients/mutants.py. The true code passes the same seeds.
"""

import logging

import pytest

from tests.simulator.clients.mutants import MUTANTS, broken, emphasis_of, seeds_of
from tests.simulator.clients.world import run_seed

SEEDS_MAX = 400


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_the_simulator_of_clients_catches(name: str) -> None:
    """Run seed after seed with the rule broken, until the history of a file or of the names gives it away."""
    logging.disable(logging.CRITICAL)
    try:
        with emphasis_of(name):
            for seed in seeds_of(name, SEEDS_MAX):
                with broken(name):
                    outcome = run_seed(seed)
                # A mutant that does not run at all, or hangs, would be caught by anything.
                if outcome.lied and run_seed(seed).failure is None:  # the true code passes it
                    return
    finally:
        logging.disable(logging.NOTSET)
    pytest.fail(f"{name}: not noticed in {SEEDS_MAX} seeds")


def test_leases_fences_and_exactly_once_have_mutants() -> None:
    assert {name.split()[0] for name in MUTANTS} >= {"I5", "I6", "I11"}
