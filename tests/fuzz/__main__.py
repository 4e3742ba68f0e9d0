"""`tools/fuzz`: every parser of bytes from outside, by atheris, one process after the other."""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from tests.fuzz.targets import TARGETS

STATISTIC = re.compile(r"stat::(\w+):\s+(\d+)")
HEX_SHOWN = 400
SERVICE_NAMES = ("drive-server", "coordinator")
SERVICE_SHARE = 20  # of the inputs of a parser: each is a message to a whole service


@dataclass(slots=True, frozen=True)
class Outcome:
    """`finding`: what happened, empty: nothing; `input`: the bytes that did it, in hex."""

    target: str
    inputs: int
    seconds: float
    peak_mib: int
    finding: str = ""
    input: str = ""


def fuzz(target: str, runs: int, seconds: int, seed: int, corpus: Path) -> Outcome:
    """One target, until `runs` inputs, `seconds` (0: no bound) or the first finding."""
    for number, example in enumerate(TARGETS[target].examples):
        (corpus / f"example-{number}").write_bytes(example)
    command = [
        sys.executable, "-m", "tests.fuzz.one", target, "--runs", str(runs), "--seconds", str(seconds),
        "--seed", str(seed), "--corpus", str(corpus),
    ]  # fmt: skip
    began_s = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    took_s = time.monotonic() - began_s
    figures = {name: int(value) for name, value in STATISTIC.findall(result.stderr)}
    finding, data = "", ""
    if result.returncode != 0:
        finding = _what(result.stdout + result.stderr) or f"status {result.returncode}"
        left = sorted(corpus.glob("finding-*"))
        data = left[0].read_bytes().hex() if left else ""
    inputs = figures.get("number_of_executed_units", 0)
    return Outcome(target, inputs, round(took_s, 1), figures.get("peak_rss_mb", 0), finding, data)


def _what(output: str) -> str:
    """The line that names the error."""
    lines = output.splitlines()
    at = next((i for i, line in enumerate(lines) if "Uncaught Python exception" in line), None)
    if at is not None:
        return " | ".join(line.strip() for line in lines[at + 1 : at + 12] if line.strip() and "===" not in line)
    return next((line for line in lines if "ERROR: libFuzzer" in line), "")


def attack(name: str, inputs: int, seed: int) -> Outcome:
    """One of the services, in a process of its own: its memory is measured."""
    command = [sys.executable, "-m", "tests.fuzz.service", name, "--inputs", str(inputs), "--seed", str(seed)]
    began_s = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    took_s = round(time.monotonic() - began_s, 1)
    try:
        said = json.loads(result.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return Outcome(name, 0, took_s, 0, f"status {result.returncode}: {result.stderr[-2000:]}")
    return Outcome(name, said["inputs"], took_s, said["peak_mib"], "; ".join(said["findings"])[:2000], f"seed {seed}")


def all_of(targets: list[str], runs: int, seconds: int, seed: int) -> Iterator[Outcome]:
    for target in targets:
        if target in SERVICE_NAMES:
            yield attack(target, max(1, runs // SERVICE_SHARE), seed)
            continue
        with tempfile.TemporaryDirectory(prefix="fuzz-") as corpus:
            yield fuzz(target, runs, seconds, seed, Path(corpus))


@click.command()
@click.option("--target", "targets", multiple=True, type=click.Choice(sorted((*TARGETS, *SERVICE_NAMES))), help="May be repeated; default: all.")
@click.option("--inputs", default=100_000, show_default=True, help="For each parser; a twentieth of it for each service.")
@click.option("--seconds", default=0, help="For each target at most; 0: no bound.")
@click.option("--seed", default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(targets: tuple[str, ...], inputs: int, seconds: int, seed: int, as_json: bool) -> None:
    """Fuzz the parsers of bytes from outside. Status 1: something was found, which is printed with its input."""
    outcomes = []
    for outcome in all_of(list(targets) or sorted((*TARGETS, *SERVICE_NAMES)), inputs, seconds, seed):
        outcomes.append(outcome)
        if not as_json:
            rate = outcome.inputs / max(outcome.seconds, 0.1)
            print(f"{outcome.target:20} {outcome.inputs:10,} inputs {rate:9,.0f}/s {outcome.peak_mib:5} MiB", flush=True)
            if outcome.finding:
                print(f"    {outcome.finding}\n    input {outcome.input[:HEX_SHOWN]}", flush=True)
    if as_json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    else:
        found = sum(bool(outcome.finding) for outcome in outcomes)
        print(f"{sum(outcome.inputs for outcome in outcomes):,} inputs, {found} findings")
    sys.exit(1 if any(outcome.finding for outcome in outcomes) else 0)


if __name__ == "__main__":
    main()
