"""`python -m tests.simulator`: see tools/sim."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable

import click

from tests.simulator import world as blocks
from tests.simulator.clients import world as clients
from tests.simulator.world import Outcome


@click.command()
@click.option("--seed", type=int, help="Replay one run and print what happens in it.")
@click.option("--seeds", help="A..B,C: run these, ends included; print the rate and the seeds that fail.")
@click.option("--digests", is_flag=True, help="With --seeds: print a hash of all that happened in each.")
@click.option("--world", type=click.Choice(["blocks", "clients"]), default="blocks",
              help="blocks: the block layer. clients: programs on mounts above coordinators above the block layer.")
@click.option("--steps", type=int, help="How much is done in a run: writers 12, programs 120.")
@click.option("-v", "--verbose", is_flag=True, help="Print the log of the production code, too.")
def main(
    seed: int | None, seeds: str | None, digests: bool, world: str, steps: int | None, verbose: bool
) -> None:
    """Run the block layer, or all layers, under simulated faults; a seed replays a run exactly."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.CRITICAL, format="           log: %(name)s %(message)s",
        stream=sys.stdout,
    )  # fmt: skip
    run = _runner(world, steps)
    if seed is not None:
        outcome = run(seed, True)
        print(outcome.failure or "ok", outcome.digest)
        sys.exit(outcome.failure is not None)
    sys.exit(run_many(_numbers(seeds or "1..100"), run, digests=digests, world=world))


def _runner(world: str, steps: int | None) -> Callable[[int, bool], Outcome]:
    run_seed = clients.run_seed if world == "clients" else blocks.run_seed
    more = () if steps is None else (steps,)
    return lambda seed, verbose: run_seed(seed, *more, verbose=verbose)


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("..")
        found += range(int(first), int(last or first) + 1)
    return found


def run_many(
    seeds: list[int], run: Callable[[int, bool], Outcome], *, digests: bool = False, world: str = "blocks"
) -> int:
    option = "" if world == "blocks" else f"--world {world} "
    gc.freeze()  # a collection after a run looks at what the run has left, not at all modules
    started = time.monotonic()
    failed = reads = writes = flushes = calls = undecided = 0
    simulated_s = 0.0
    errors: Counter[str] = Counter()
    for seed in seeds:
        outcome = run(seed, False)
        calls, undecided = calls + outcome.calls, undecided + outcome.undecided
        errors.update(outcome.errors)
        reads, writes = reads + outcome.reads, writes + outcome.writes
        flushes, simulated_s = flushes + outcome.flushes, simulated_s + outcome.simulated_s
        if digests:
            print(f"digest of {seed}: {outcome.digest}")
        if outcome.failure is not None:
            failed += 1
            print(f"seed {seed}: {outcome.failure}; replay: tools/sim {option}--seed {seed}", flush=True)
    elapsed = time.monotonic() - started
    if option:
        seen = ", ".join(f"{name} ({count})" for name, count in errors.most_common()) or "none"
        print(f"{calls} calls of programs, {undecided} histories undecided; errors that programs saw: {seen}")
    print(
        f"{len(seeds)} seeds, {failed} failed, {len(seeds) / elapsed:.1f} seeds/s; {writes} writes, "
        f"{reads} reads, {flushes} flushes, {simulated_s / 3600:.1f} simulated hours"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    main()
