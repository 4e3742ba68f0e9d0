"""`tools/coherence`: programs on three nodes do what they like to the same few files; was it one file system to them?

Place      tests, over coherence_worker.py (the programs) and the simulator's checker.py and models.py.
Judged     after rounds of some seconds, each in a folder of its own: the history of each object (a page, a log, a
           counter, a lock, the names) must be linearizable: there is an order of all calls, each between its beginning
           and its answer, in which they are answered so by one file system on one machine.
Kills      with `--kill`: every 20 s the volume's coordinator, a mount, or both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from csvfs.admin import lab
from csvfs.admin.lab_files import LAB_DIR_DEFAULT, lab_files
from csvfs.admin.lab_processes import run_in_node, start_in_node
from tests.programs.coherence_worker import RECORD
from tests.simulator.clients.checker import Operation, Step, judge
from tests.simulator.clients.models import names_step

ROUND_S = 10.0
KILL_EACH_S = 20.0
TOLD = 40  # operations before a wrong one
END_WITHIN_S = 120.0  # after its time a program may wait for a call that long
READS = frozenset(("read", "records", "size", "lookup", "list", "links"))
FIRST_NAMES: frozenset[Any] = frozenset()
Say = Callable[[str], None]


class NotCoherent(Exception):
    pass


@dataclass(slots=True)
class Figures:
    operations: int = 0
    unknown: int = 0  # calls that failed
    histories: int = 0  # of one object in one round
    undecided: int = 0
    rounds: int = 0
    kills: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    errors: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def text(self) -> str:
        kills = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items())) or "none"
        errors = ", ".join(f"{name} {count}" for name, count in sorted(self.errors.items())) or "none"
        return (f"{self.operations:,} operations, {self.histories} histories in {self.rounds} rounds, linearizable "
                f"({self.undecided} undecided, {self.unknown} without an answer); killed: {kills}; errors: {errors}")  # fmt: skip


# -- what one machine would answer: (state, operation) -> state, None: not so --------------------


def register_step(state: int, operation: Operation) -> int | None:
    if operation.name == "write":
        return int(operation.args[0])
    return state if state == operation.answer else None


def log_step(state: tuple[int, ...], operation: Operation) -> tuple[int, ...] | None:
    if operation.name == "append":
        return (*state, operation.args[0])
    if operation.name == "empty":
        return ()
    wanted: Any = RECORD * len(state) if operation.name == "size" else list(state)
    return state if wanted == operation.answer else None


def lock_step(state: int, operation: Operation) -> int | None:
    """State: who has it; 0: nobody."""
    (who,) = operation.args
    if operation.name == "lock":
        return who if state == 0 else None
    return 0 if state == who else None


def model_of(what: str) -> tuple[Any, Step]:
    """The first state, and what calls do to it."""
    special: dict[str, tuple[Any, Step]] = {
        "names": (FIRST_NAMES, names_step), "log": ((), log_step), "lock": (0, lock_step),
    }  # fmt: skip
    return special.get(what, (0, register_step))


def operation_of(who: str, row: list[Any]) -> Operation:
    """A line of a worker's log, in the form of the models."""
    what, name, args, begun, ended, answer = row
    if what == "names":
        args = [arg.encode() if isinstance(arg, str) else arg for arg in args]
        if name == "lookup" and answer == 0:
            answer = None
            return Operation(who, name, tuple(args), begun, ended, None, reads=True)
        if name == "list" and answer is not None:
            answer = [(entry.encode(), ino) for entry, ino in answer]
    return Operation(who, name, tuple(args), begun, ended, answer, unknown=answer is None, reads=name in READS)


def judge_round(logs: Iterable[tuple[str, Iterable[str]]], figures: Figures) -> None:
    """`logs`: who, and the lines. Raises NotCoherent."""
    objects: dict[str, list[Operation]] = defaultdict(list)
    added: list[int] = []
    for who, lines in logs:
        for line in lines:
            row = json.loads(line)
            if row[0] == "error":
                figures.errors[f"{row[1]} {row[2]}"] += 1
            elif row[0] == "added":
                added.append(row[1])
            else:
                objects[row[0]].append(operation_of(who, row))
    for what, operations in sorted(objects.items()):
        figures.histories += 1
        figures.operations += len(operations)
        figures.unknown += sum(operation.unknown for operation in operations)
        first, step = model_of(what)
        known = [operation for operation in operations if not (operation.reads and operation.unknown)]
        verdict = judge(known, first, step)
        figures.undecided += verdict.undecided
        if verdict.wrong is not None:
            raise NotCoherent(explain(what, verdict.wrong, verdict.states, known))
    if len(set(added)) != len(added):
        raise NotCoherent(f"counter: two additions under the lock made the same number: {sorted(added)}")
    figures.rounds += 1


def explain(what: str, wrong: Operation, states: frozenset[Any], operations: list[Operation]) -> str:
    window = sorted((op for op in operations if op is not wrong and op.begun < wrong.ended), key=lambda op: op.begun)
    near = "\n  ".join(str(operation) for operation in window[-TOLD:])
    could = " or ".join(sorted(str(state) for state in states)[:4])
    return f"{what}: {wrong}: no order of all calls explains it; it was {could}. Before it:\n  {near}"


class Programs:
    """Those of one round: two on each node."""

    def __init__(self, directory: Path, nodes: tuple[str, ...], folder: str, logs: Path, seed: str, seconds: float) -> None:
        self._running: list[tuple[str, Path, subprocess.Popen[bytes]]] = []
        files = lab_files(directory)
        who = 0
        for node in nodes:
            for kind in ("data", "names"):
                who += 1
                log = logs / f"{node}-{kind}.log"
                argv = worker_argv(kind, folder, str(log), f"{seed} {who}", str(seconds))
                running = start_in_node(files, files.node_named(node), argv, stderr=subprocess.PIPE)
                self._running.append((f"{node}.{kind}", log, running))

    def finish(self, within_s: float) -> list[tuple[str, list[str]]]:
        """Who, and the lines of each log. Raises NotCoherent: a program failed or does not end."""
        deadline = time.monotonic() + within_s
        found = []
        for who, log, running in self._running:
            try:
                _, said = running.communicate(timeout=max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise NotCoherent(f"{who} does not end") from None
            if running.returncode != 0:
                raise NotCoherent(f"{who} ended with {running.returncode}: {said.decode(errors='replace')[-2000:]}")
            found.append((who, log.read_text().splitlines()))
        return found

    def end(self) -> None:
        for _, _, running in self._running:
            if running.poll() is None:
                running.kill()
                running.communicate()


def worker_argv(*arguments: str) -> list[str]:
    return [sys.executable, "-S", "-m", "tests.programs.coherence_worker", *arguments]


class Killer:
    """Kills coordinators and mounts when it is time to."""

    def __init__(self, directory: Path, volume: str, nodes: tuple[str, ...], seed: int, figures: Figures) -> None:
        self._directory, self._volume, self._nodes, self._figures = directory, volume, nodes, figures
        self._draw = Random(seed)
        self._next = time.monotonic() + KILL_EACH_S / 4

    def look(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next += KILL_EACH_S
        what = self._draw.choice(("coordinator", "mount", "both"))
        if what != "mount":
            self._kill(owner_of(self._directory, self._volume, self._nodes[0]), "coordinator")
        if what != "coordinator":
            self._kill(self._draw.choice(self._nodes), "mount")

    def _kill(self, node: str, role: str) -> None:
        lab.lab_kill(self._directory, node, role)
        self._figures.kills[role] += 1


def owner_of(directory: Path, volume: str, node: str) -> str:
    """Which node coordinates the volume, as `csvfs` on `node` says."""
    files = lab_files(directory)
    shown = run_in_node(files, files.node_named(node), ["csvfs", "volume", "list", "--json"], capture_output=True)
    row = next(row for row in json.loads(shown.stdout) if row["name"] == volume)
    return str(row["coordinator"])


def run(directory: Path, nodes: tuple[str, ...], volume: str, *, seconds: float, seed: int, kill: bool,
        round_s: float = ROUND_S, say: Say = lambda text: None) -> Figures:  # fmt: skip
    """Raises NotCoherent."""
    figures = Figures()
    killer = Killer(directory, volume, nodes, seed, figures) if kill else None
    files = lab_files(directory)
    end = time.monotonic() + seconds
    with TemporaryDirectory(prefix="coherence-", dir="/var/tmp") as logs:
        while time.monotonic() < end:
            number = figures.rounds
            folder = f"/clusterstorage/{volume}/coherence-{seed}-{number}-{time.monotonic_ns()}"
            argv = worker_argv("prepare", folder, "", "", "")
            prepared = run_in_node(files, files.node_named(nodes[0]), argv, stderr=subprocess.PIPE)
            if prepared.returncode != 0:
                raise NotCoherent(f"no folder could be made on {nodes[0]}: {prepared.stderr.decode(errors='replace')[-2000:]}")
            programs = Programs(directory, nodes, folder, Path(logs), f"{seed} {number}", round_s)
            try:
                over = time.monotonic() + round_s
                while killer is not None and time.monotonic() < over:
                    killer.look()
                    time.sleep(0.1)
                judge_round(programs.finish(round_s + END_WITHIN_S), figures)
            finally:
                programs.end()
            say(f"{figures.rounds} rounds: {figures.text()}")
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/coherence", description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=LAB_DIR_DEFAULT, help="which lab")
    parser.add_argument("--nodes", default="n1,n2,n3")
    parser.add_argument("--volume", default="Volume1")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill", action="store_true", help=f"a coordinator, a mount or both every {KILL_EACH_S:.0f} s")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    try:
        figures = run(arguments.dir, tuple(arguments.nodes.split(",")), arguments.volume, seconds=arguments.seconds,
                      seed=arguments.seed, kill=arguments.kill, say=say)  # fmt: skip
    except NotCoherent as error:
        print(error)
        return 1
    print(json.dumps(asdict(figures), indent=2) if arguments.json else figures.text())
    return 1 if figures.errors else 0  # a program sees a pause, never an error


if __name__ == "__main__":
    sys.exit(main())
