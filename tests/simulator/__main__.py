"""`python -m tests.simulator`: see tools/sim."""

from __future__ import annotations

import gc
import logging
import sys
import time

import click

from tests.simulator.world import run_seed


@click.command()
@click.option("--seed", type=int, help="Replay one run and print what happens in it.")
@click.option("--seeds", help="A..B,C: run these, ends included; print the rate and the seeds that fail.")
@click.option("--digests", is_flag=True, help="With --seeds: print a hash of all that happened in each.")
@click.option("--steps", type=int, default=12, show_default=True, help="Operations of writers, in tens.")
@click.option("-v", "--verbose", is_flag=True, help="Print the log of the production code, too.")
def main(seed: int | None, seeds: str | None, digests: bool, steps: int, verbose: bool) -> None:
    """Run the block layer under simulated faults; a seed replays a run exactly."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.CRITICAL, format="           log: %(name)s %(message)s",
        stream=sys.stdout,
    )  # fmt: skip
    if seed is not None:
        outcome = run_seed(seed, steps, verbose=True)
        print(outcome.failure or "ok", outcome.digest)
        sys.exit(outcome.failure is not None)
    sys.exit(run_many(_numbers(seeds or "1..100"), steps, digests=digests))


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("..")
        found += range(int(first), int(last or first) + 1)
    return found


def run_many(seeds: list[int], steps: int, *, digests: bool = False) -> int:
    gc.freeze()  # a collection after a run looks at what the run has left, not at all modules
    started = time.monotonic()
    failed = reads = writes = flushes = 0
    simulated_s = 0.0
    for seed in seeds:
        outcome = run_seed(seed, steps)
        reads, writes = reads + outcome.reads, writes + outcome.writes
        flushes, simulated_s = flushes + outcome.flushes, simulated_s + outcome.simulated_s
        if digests:
            print(f"digest of {seed}: {outcome.digest}")
        if outcome.failure is not None:
            failed += 1
            print(f"seed {seed}: {outcome.failure}; replay: tools/sim --seed {seed}", flush=True)
    elapsed = time.monotonic() - started
    print(
        f"{len(seeds)} seeds, {failed} failed, {len(seeds) / elapsed:.1f} seeds/s; {writes} writes, "
        f"{reads} reads, {flushes} flushes, {simulated_s / 3600:.1f} simulated hours"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    main()
