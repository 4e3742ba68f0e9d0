"""Every state that small worlds of the write and takeover protocol reach within so many steps (tools/check_states).

A failure prints the shortest way there, in words. Worlds, and what in them is the product's: tests/states/.
"""

import pytest

from tests.states.__main__ import DEPTH_MAX, checks, describe, run, run_walks
from tests.states.explorer import Outcome
from tests.states.mutants import MUTANTS, Mutant, broken

MUTANT_STATES_MAX = 20_000
WALKS = 60


@pytest.mark.slow
@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("name", checks(2, None))
def test_no_state_breaks_an_invariant(name: str, members: int) -> None:
    """I1, I2, I3, I5, I6, I7 (as I2 and I3 of what was called in sync), T1, T4."""
    check = checks(members, None)[name]
    outcome = run(check.make, depth=DEPTH_MAX, states=check.states // 2, seconds=None)
    assert not outcome.violation, describe(name, outcome)
    assert outcome.complete or outcome.states >= check.states // 2
    deeper = run_walks(check.make, WALKS, seed=1)
    assert not deeper.violation, describe(name, deeper, WALKS)
    assert deeper.transitions > WALKS


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_the_state_checker_finds(name: str) -> None:
    """A broken rule, by its shortest counterexample; the true code passes the same world, as far as that."""
    mutant = MUTANTS[name]
    with broken(name):
        found = _explored(mutant, MUTANT_STATES_MAX)
    assert found.violation.startswith(mutant.breaks), describe(name, found, mutant.walks)
    true = _explored(mutant, found.states)
    assert not true.violation, describe(name, true, mutant.walks)


def _explored(mutant: Mutant, states: int) -> Outcome:
    if mutant.walks:
        return run_walks(mutant.make, mutant.walks, seed=1)
    return run(mutant.make, depth=DEPTH_MAX, states=states, seconds=None)
