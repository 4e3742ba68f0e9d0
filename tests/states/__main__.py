"""`tools/check_states`: visit the states of small worlds, and print a counterexample in words if there is one."""

import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import click

from tests.states.data_world import DataWorld
from tests.states.explorer import Outcome, World, explore, walk
from tests.states.lease_world import LeaseSetup, LeaseWorld
from tests.states.mutants import MUTANTS, broken
from tests.states.schedule import stepped
from tests.states.takeover_world import TakeoverWorld
from tests.states.world import Setup

DEPTH_MAX = 60
_FAULTS = (
    "is killed", "is cut off", "is not answered in time", "does not answer", "lease ends", "is lost", "is evicted"
)  # fmt: skip


@dataclass(slots=True, frozen=True)
class Check:
    """A world, and how much of it the test command visits."""

    make: Callable[[], World]
    states: int


def _data(**settings: object) -> Callable[[], World]:
    return lambda: DataWorld(Setup(**settings))  # type: ignore[arg-type]


def _takeover(**settings: object) -> Callable[[], World]:
    return lambda: TakeoverWorld(Setup(**settings))  # type: ignore[arg-type]


def checks(members: int, faults: int | None) -> dict[str, Check]:
    """Of `members` members; `faults` None: as many as each world is best with."""

    def of(number: int) -> int:
        return number if faults is None else faults

    everything = ("writer", "coordinator", "server", "cut", "late")
    out = ("ABC"[members - 1],)
    return {
        "eviction, members out of reach": Check(
            _data(members=members, dead=True, faults=("cut",), faults_max=of(2)), 9_000
        ),
        "eviction, processes killed": Check(
            _data(members=members, dead=True, faults=("coordinator", "server"), faults_max=of(2)), 4_000
        ),
        "eviction beside a resync": Check(
            _data(members=members, dead=True, out=out, ahead=out, faults=everything, faults_max=of(1)), 4_000
        ),
        "writing": Check(_data(members=members, writes=(0, 0), later=(0,), faults=everything, faults_max=of(1)), 4_000),
        "writing, two changes at once": Check(
            _data(members=members, writes=(0, 1), faults=everything, faults_max=of(2), tasks_max=2), 3_000
        ),
        "takeover": Check(
            _takeover(members=members, writes=(0, 1), later=(0,), faults=everything, faults_max=of(1)), 4_000
        ),
        "leases": Check(lambda: LeaseWorld(LeaseSetup(requests_max=3, inodes=1)), 6_000),
        "leases of two inodes": Check(lambda: LeaseWorld(LeaseSetup(requests_max=2, inodes=2, evictions_max=0)), 6_000),
    }


def run(make: Callable[[], World], *, depth: int, states: int | None, seconds: float | None) -> Outcome:
    """With what the product logs kept quiet."""
    logging.disable(logging.CRITICAL)
    try:
        with stepped():
            return explore(make, depth_max=depth, states_max=states, seconds_max=seconds, progress=_progress)
    finally:
        logging.disable(logging.NOTSET)


def run_walks(make: Callable[[], World], walks: int, seed: int) -> Outcome:
    """As `run`, by random walks."""
    logging.disable(logging.CRITICAL)
    try:
        with stepped():
            return walk(make, walks, seed=seed, is_fault=lambda step: any(words in step for words in _FAULTS))
    finally:
        logging.disable(logging.NOTSET)


def _progress(outcome: Outcome) -> None:
    if sys.stderr.isatty():
        print(f"\rdepth {outcome.depth}, {outcome.states:,} states, {outcome.seconds:.0f} s", end="", file=sys.stderr)


def describe(name: str, outcome: Outcome, walks: int = 0) -> str:
    """One paragraph for people."""
    rate = outcome.transitions / max(outcome.seconds, 0.001)
    bound = "all there are" if outcome.complete else f"complete to depth {outcome.depth - 1}"
    if walks:
        text = f"{name}: {walks:,} walks, {outcome.transitions:,} steps, {outcome.seconds:.0f} s ({rate:.0f}/s)"
    else:
        text = (
            f"{name}: {outcome.states:,} states, {outcome.transitions:,} transitions, {bound}, "
            f"{outcome.seconds:.0f} s ({rate:.0f}/s)"
        )
    if outcome.violation:
        steps = "\n".join(f"  {number:2}. {step}" for number, step in enumerate(outcome.trace, 1))
        text += f"\n{outcome.violation}, after {len(outcome.trace)} steps:\n{steps}"
    return text


@click.command()
@click.option("--depth", default=DEPTH_MAX, show_default=True, help="steps from the first state")
@click.option("--members", type=click.Choice(["2", "3"]), default="2", show_default=True, help="of the slab")
@click.option("--faults", type=click.IntRange(0, 6), default=None, help="in one trace; default: of each world")
@click.option("--states", type=int, default=None, help="in each world; default: those of the test command; 0: all")
@click.option("--seconds", type=float, default=None, help="for each world")
@click.option("--walks", type=int, default=0, help="random ones in each world, instead of breadth-first")
@click.option("--seed", type=int, default=1, show_default=True, help="of the first walk")
@click.option("--only", default=None, help="one world")
@click.option("--mutant", type=click.Choice(list(MUTANTS)), default=None, help="with a rule broken, in its world")
@click.option("--json", "as_json", is_flag=True)
def main(
    depth: int, members: str, faults: int | None, states: int | None, seconds: float | None, walks: int, seed: int,
    only: str | None, mutant: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Visit the states of small worlds breadth-first. Exit status 1: an invariant does not hold."""
    worlds = checks(int(members), faults)
    if mutant is not None:
        worlds = {mutant: Check(MUTANTS[mutant].make, 0)}
    outcomes: dict[str, Outcome] = {}
    with broken(mutant) if mutant is not None else nullcontext():
        for name, check in worlds.items():
            if only not in (None, name):
                continue
            limit = check.states if states is None else states
            if mutant is not None and states is None:
                walks = walks or MUTANTS[mutant].walks
            if walks:
                outcomes[name] = run_walks(check.make, walks, seed)
            else:
                outcomes[name] = run(check.make, depth=depth, states=limit or None, seconds=seconds)
            if not as_json:
                print(describe(name, outcomes[name], walks), flush=True)
    if as_json:
        print(json.dumps({name: asdict(outcome) for name, outcome in outcomes.items()}, indent=2))
    sys.exit(any(outcome.violation for outcome in outcomes.values()))


if __name__ == "__main__":
    assert os.environ.get("PYTHONHASHSEED"), "run tools/check_states"
    main()
