"""`tools/prove_repair`: runs the stories, each in a lab of its own, and prints what came of them.

Place      tests. Exit status 0: all held. A story that does not hold leaves its message and the lab's logs; the lab
           itself is always taken down.
"""

import argparse
import json
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from csvfs.admin.render import print_table
from tests.lab_cluster import lab_arguments
from tests.proofs.ground import proof_ground
from tests.proofs.stories import STORIES, Story


@dataclass(slots=True)
class Row:
    name: str
    what: str
    held: bool
    seconds: float
    green_s: float | None = None
    load: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    moments: list[str] = field(default_factory=list)
    failure: str = ""


def run_story(name: str, story: Story, seed: int, directory: Path | None) -> Row:
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"  {time.monotonic() - began:6.1f} s  {text}", file=sys.stderr, flush=True)

    print(f"== {name}: {story.what} (seed {seed})", file=sys.stderr, flush=True)
    row = Row(name, story.what, False, 0.0)
    try:
        with proof_ground(
            say, drives=story.drives, drive_size=story.drive_size, directory=directory, options=story.options
        ) as ground:
            ground.load_mib = story.load_mib
            try:
                with ground.watched() as timeline:
                    outcome = story.tell(ground, Random(seed))
            except BaseException:
                keep = Path(f"/var/tmp/prove_repair-{name}.log")
                keep.write_text(ground.lab.logs())
                say(f"the lab's logs are in {keep}")
                raise
        assert not timeline.lies, "; ".join(timeline.lies)
        row.held, row.green_s, row.facts = True, outcome.green_s, outcome.facts
        row.load, row.moments = asdict(outcome.load), [str(moment) for moment in timeline.moments]
    except Exception as error:  # a story that does not hold must not keep the others from being told
        row.failure = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    row.seconds = time.monotonic() - began
    said = ", ".join(f"{key} {value}" for key, value in (row.load | row.facts).items())
    say(f"{name} {'holds' if row.held else 'DOES NOT HOLD'}: {row.failure[:500] or said}")
    return row


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/prove_repair", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", action="append", choices=STORIES, help="may be repeated")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    arguments = lab_arguments(parser)
    rows = []
    for number in range(arguments.rounds):
        for name in arguments.only or STORIES:
            rows.append(run_story(name, STORIES[name], arguments.seed + number, arguments.dir))
    if arguments.json:
        print(json.dumps({"load_average": os.getloadavg()[0], "stories": [asdict(row) for row in rows]}, indent=2))
    else:
        print_table(
            ("STORY", "HELD", ">SECONDS", ">GREEN AFTER", ">FIO PASSES", ">LONGEST I/O", "AND"),
            [
                (
                    row.name, "yes" if row.held else "NO", f"{row.seconds:.0f}",
                    None if row.green_s is None else f"{row.green_s:.1f} s", row.load.get("passes"),
                    f"{row.load['pause_s']:.2f} s" if row.load else None,
                    row.failure[:200] or ", ".join(f"{key} {value}" for key, value in row.facts.items()),
                )
                for row in rows
            ],
            empty="no stories",
        )  # fmt: skip
    return 0 if all(row.held for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
