"""`tools/bench_repair`: how fast a pool rebuilds when nobody is at work, and what programs notice of it when somebody is.

Place      tests, over ground.py. The machine should be quiet: the load average is printed with the figures.
Idle       A drive of n2 is retired; its copies are made on the node's other drives. Rate: bytes copied onto them, as
           the drive servers count, by the seconds from the command until no job is left.
Busy       fio on n1, 4 KiB O_DIRECT, 70 % reads, 4 jobs; its p99 alone, then while one drive after the other is emptied
           without a pause, then alone again.
"""

import argparse
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from threading import Event, Thread
from typing import Any

from csvfs.admin.render import print_table
from csvfs.errors import CsvfsError
from csvfs.units import GIB, MIB
from tests.lab_cluster import lab_arguments
from tests.proofs.ground import VOLUME, Ground, proof_ground

GOAL_MIB_S, GOAL_RATIO = 300.0, 2.0
EMPTY_TIMEOUT_S = 600.0


@dataclass(slots=True)
class Rebuild:
    """Copies made elsewhere of what was on one drive."""

    copied: int  # bytes
    seconds: float

    @property
    def mib_s(self) -> float:
        return self.copied / MIB / max(self.seconds, 0.001)


@dataclass(slots=True)
class Busy:
    """fio's figures of one run: p99 of completion in ms, and requests per second."""

    read_p99_ms: float
    write_p99_ms: float
    read_iops: float
    write_iops: float


def empty_drive(ground: Ground, path: str, *, within_s: float = EMPTY_TIMEOUT_S) -> Rebuild:
    """Retire a drive and wait until it is empty; then take it back into use, empty."""
    before = pulled(ground)
    began = time.monotonic()
    ground.csvfs("drive", "retire", path, node="n2")
    while True:
        row = ground.drive(path)
        ended = time.monotonic()
        if row["free"] == row["size"]:
            break
        assert ended - began < within_s, f"{path} is not empty within {within_s:.0f} s"
        time.sleep(0.05)
    copied = pulled(ground) - before
    ground.csvfs("drive", "retire", "--undo", path, node="n2")
    return Rebuild(copied, ended - began)


def pulled(ground: Ground) -> int:
    return sum(int(drive["counters"].get("pulled", 0)) for drive in ground.drives())


def fullest(ground: Ground) -> str:
    rows = [row for row in ground.drives("n2") if row["free"] is not None]
    return str(max(rows, key=lambda row: row["size"] - row["free"])["path"])


def fio(ground: Ground, seconds: int) -> Busy:
    output = ground.lab.run(
        "n1", "fio", "--name=t", "--ioengine=psync", "--direct=1", "--bs=4k", "--rw=randrw", "--rwmixread=70",
        "--numjobs=4", "--group_reporting", "--size=256M", f"--filename={VOLUME}/busy", "--fallocate=none",
        "--time_based", f"--runtime={seconds}", "--norandommap", "--output-format=json",
    ).decode()  # fmt: skip
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    p99 = {kind: job[kind]["clat_ns"]["percentile"]["99.000000"] / 1e6 for kind in ("read", "write")}
    return Busy(p99["read"], p99["write"], job["read"]["iops"], job["write"]["iops"])


class Rebuilding:
    """One drive of n2 after the other is emptied, in a thread, until `stop`."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._over = Event()
        self.rounds: list[Rebuild] = []
        self._thread = Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            with suppress(AssertionError, CsvfsError):
                self.rounds.append(empty_drive(self._ground, fullest(self._ground)))

    def stop(self) -> list[Rebuild]:
        self._over.set()
        self._thread.join()
        return self.rounds


def measure(ground: Ground, *, mib: int, seconds: int, idle_rounds: int) -> dict[str, Any]:
    ground.fill("data", mib)
    ground.fill("busy", 256)
    idle = []
    for _ in range(idle_rounds):
        idle.append(empty_drive(ground, fullest(ground)))
        ground.say(f"idle: {idle[-1].copied // MIB} MiB in {idle[-1].seconds:.1f} s, {idle[-1].mib_s:.0f} MiB/s")
        ground.wait_green()
    before = fio(ground, seconds)
    ground.say(f"programs alone: {before}")
    rebuilding = Rebuilding(ground)
    during = fio(ground, seconds)
    rounds = rebuilding.stop()
    ground.say(f"during {len(rounds)} rebuilds: {during}")
    ground.wait_green()
    after = fio(ground, seconds)
    ground.say(f"programs alone again: {after}")
    busy_rate = sum(r.copied for r in rounds) / MIB / max(sum(r.seconds for r in rounds), 0.001)
    return {
        "idle": [asdict(r) | {"mib_s": r.mib_s} for r in idle], "idle_mib_s": max(r.mib_s for r in idle),
        "alone": asdict(before), "rebuilding": asdict(during), "alone_again": asdict(after),
        "busy_mib_s": busy_rate, "load_average": os.getloadavg()[0],
    }  # fmt: skip


def print_figures(figures: dict[str, Any]) -> None:
    rate = figures["idle_mib_s"]
    rows = [("rebuild, nobody at work", f"{rate:.0f} MiB/s", f"at least {GOAL_MIB_S:.0f}", yes(rate >= GOAL_MIB_S))]
    rows.append(("rebuild, programs at work", f"{figures['busy_mib_s']:.0f} MiB/s", "-", "-"))
    for kind in ("read", "write"):
        key = f"{kind}_p99_ms"
        alone = max(figures["alone"][key], figures["alone_again"][key])
        during = figures["rebuilding"][key]
        said = f"{during:.2f} ms, alone {figures['alone'][key]:.2f} and {figures['alone_again'][key]:.2f} ms"
        ratio = during / alone
        rows.append((f"p99 of a 4 KiB {kind}", said, f"at most {GOAL_RATIO:.0f} x", f"{yes(ratio <= GOAL_RATIO)}: {ratio:.1f} x"))
    for name in ("alone", "rebuilding", "alone_again"):
        one = figures[name]
        rows.append((f"requests/s, {name.replace('_', ' ')}", f"{one['read_iops']:.0f} + {one['write_iops']:.0f}", "-", "-"))
    print_table(("WHAT", "FIGURE", "GOAL", "REACHED"), rows, empty="")
    print(f"load average at the end: {figures['load_average']:.1f}")


def yes(held: bool) -> str:
    return "yes" if held else "NO"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench_repair", description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="of data, in three copies")
    parser.add_argument("--seconds", type=int, default=20, help="of each of the three runs of fio")
    parser.add_argument("--rounds", type=int, default=3, help="of rebuilding with nobody at work; the best counts")
    arguments = lab_arguments(parser)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with proof_ground(say, drives=3, drive_size=4 * GIB, directory=arguments.dir) as ground:
        figures = measure(ground, mib=arguments.mib, seconds=arguments.seconds, idle_rounds=arguments.rounds)
    print(json.dumps(figures, indent=2)) if arguments.json else print_figures(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
