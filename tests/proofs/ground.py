"""A lab to break things on: a volume, programs at work, and an eye on what `csvfs status` says meanwhile.

Place      tests, over lab_cluster.py. Blocks; for stories that take seconds to minutes.
Green      every node up, every drive OK, every volume Healthy, no job left. A drive that was destroyed cannot become
           OK by itself: stories name those, and the rest must be green.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

from csvfs.admin import lab
from csvfs.errors import CsvfsError
from csvfs.units import GIB
from tests.lab_cluster import LabCluster, running_lab, wait_for

VOLUME = "/clusterstorage/Volume1"
NODES = ("n1", "n2", "n3")
WATCH_INTERVAL_S = 0.7
Say = Callable[[str], None]


@dataclass(slots=True, frozen=True)
class Moment:
    """What `csvfs status --json` said at one time, in short. `at_s`: since the story began."""

    at_s: float
    health: str
    jobs: tuple[str, ...]
    bad: tuple[str, ...]  # nodes and drives that are not in order

    def gist(self) -> list[str]:
        """Without the figures, which change all the time."""
        return [re.sub(r"\d+ (%|s\b)", "", text) for text in (self.health, *self.bad, *self.jobs)]

    def __str__(self) -> str:
        parts = [self.health, *self.bad, *self.jobs]
        return f"{self.at_s:6.1f} s  {'; '.join(parts)}"


@dataclass(slots=True)
class Timeline:
    """What an administrator would have seen, and what was wrong with it (`lies`)."""

    moments: list[Moment] = field(default_factory=list)
    lies: list[str] = field(default_factory=list)

    def add(self, moment: Moment) -> bool:
        """False: nothing has changed."""
        last = self.moments[-1] if self.moments else None
        if last is not None and last.gist() == moment.gist():
            return False
        self.moments.append(moment)
        return True

GREEN_STATES = ("OK", "Transient error")  # the latter: it is back in service, and spoken of for an hour


class Ground:
    """A running lab of three nodes with Volume1, three copies of everything."""

    def __init__(self, cluster: LabCluster, say: Say, load_mib: int = 32) -> None:
        """load_mib: what each pass of fio writes."""
        self.lab = cluster
        self.say = say
        self.load_mib = load_mib

    def csvfs(self, *argv: str, node: str = "n1", check: bool = True) -> str:
        return self.lab.run(node, "csvfs", *argv, check=check).decode()

    def status(self, node: str = "n1") -> dict[str, Any]:
        return dict(json.loads(self.csvfs("status", "--json", node=node)))

    def drives(self, node: str | None = None) -> list[dict[str, Any]]:
        rows = json.loads(self.csvfs("drive", "list", "--json"))
        return [row for row in rows if node in (None, row["node"])]

    def drive(self, path: str) -> dict[str, Any]:
        return next(row for row in self.drives() if row["path"] == path)

    def is_mounted(self, node: str) -> bool:
        return b"ok" in self.lab.run(node, "sh", "-c", f"mountpoint -q {VOLUME} && echo ok", check=False)

    def fill(self, name: str, mib: int) -> str:
        """Write a file of random bytes on n1, fsynced; returns its sha256."""
        script = f"dd if=/dev/urandom of={VOLUME}/{name} bs=1M count={mib} conv=fsync status=none"
        self.lab.run("n1", "sh", "-c", f"{script} && sync {VOLUME}")
        return self.sha256("n1", name)

    def sha256(self, node: str, name: str) -> str:
        """Of a file, read from the drives and not from the node's page cache."""
        script = f"dd if={VOLUME}/{name} bs=1M iflag=direct status=none | sha256sum"
        return self.lab.run(node, "sh", "-c", script).split()[0].decode()

    def counter(self, node: str, name: str) -> int:
        """Of `csvfs drive list`, summed over the node's drives; since they were opened."""
        return sum(int(drive["counters"].get(name, 0)) for drive in self.drives(node))

    def scrub(self, within_s: float = 300) -> dict[str, Any]:
        """Verify everything once; returns what the round found."""
        before = self._scrubbed().get("finished", 0)
        self.csvfs("volume", "scrub", "Volume1")

        def finished() -> dict[str, Any] | None:
            scrub = self._scrubbed()
            return scrub if scrub.get("finished", 0) > before and not scrub["under_way"] else None

        return wait_for(finished, within_s) or {}

    def _scrubbed(self) -> dict[str, Any]:
        return dict(json.loads(self.csvfs("volume", "status", "Volume1", "--json"))["volume"]["scrub"])

    def wait_mounted(self, within_s: float = 60) -> None:
        for node in NODES:
            wait_for(lambda node=node: self.is_mounted(node), within_s)

    def wait_state(self, path: str, *states: str, within_s: float = 120) -> dict[str, Any]:
        """Until the drive at `path` is in one of these states; returns its row."""
        deadline = time.monotonic() + within_s
        while (row := self.drive(path))["state"] not in states:
            assert time.monotonic() < deadline, f"not {' or '.join(states)} within {within_s:.0f} s: {row}"
            time.sleep(0.1)
        return row

    def empty_onto_others(self, paths: list[str]) -> None:
        """Move all copies off these drives by retiring them, then take them back into use."""
        drives = [drive for drive in self.drives() if drive["path"] in paths]
        for drive in drives:
            self.csvfs("drive", "retire", drive["id"])
        wait_for(lambda: all(d["free"] == d["size"] for d in self.drives() if d["path"] in paths), within_s=300)
        for drive in drives:
            self.csvfs("drive", "retire", "--undo", drive["id"])
        self.wait_green()

    def wait_green(self, within_s: float = 300, but: tuple[str, ...] = ()) -> float:
        """Until the status is green, but for drives at these paths; returns how many seconds that took.

        It must be so five times in a row: green for an instant, between two jobs, is not the end.
        """
        began = time.monotonic()
        good = 0
        while good < 5:
            moment = self.moment(0.0, but)
            good = good + 1 if moment.health == "Healthy" and not moment.jobs and not moment.bad else 0
            assert time.monotonic() - began < within_s, f"not green within {within_s:.0f} s: {moment}"
            time.sleep(0.2)
        return time.monotonic() - began

    def moment(self, at_s: float, but: tuple[str, ...] = ()) -> Moment:
        status = self.status()
        bad = [f"{node['name']} {node['state']}{' ' + node['note'] if node['note'] else ''}"
               for node in status["nodes"] if node["state"] != "up" or node["note"]]  # fmt: skip
        for drive in status["drives"]:
            if drive["state"] not in GREEN_STATES and drive["path"] not in but:
                name = f"{drive['node']}/{os.path.basename(drive['path'])}"
                bad.append(f"{name} {drive['state']}" + (f" ({drive['reason']})" if drive["reason"] else ""))
        health = ", ".join(sorted({volume["health"] for volume in status["volumes"]})) or "no volume"
        return Moment(at_s, health, tuple(job_text(job) for job in status["jobs"]), tuple(bad))

    @contextlib.contextmanager
    def watched(self) -> Iterator[Timeline]:
        """Look at the status all the time; say what changes."""
        timeline = Timeline()
        over = Event()
        began = time.monotonic()

        def look_forever() -> None:
            while not over.wait(WATCH_INTERVAL_S):
                with contextlib.suppress(AssertionError, CsvfsError, ValueError):  # n1 itself may be down
                    moment = self.moment(time.monotonic() - began)
                    if timeline.add(moment):
                        self.say(str(moment))

        watcher = Thread(target=look_forever)
        watcher.start()
        try:
            yield timeline
        finally:
            over.set()
            watcher.join()

    def configure(self, options: dict[str, int]) -> None:
        """Set options of all nodes, which are restarted for it."""
        for name in NODES:
            node = self.lab.node(name)
            text = node.config.read_text().partition("[options]")[0]
            rows = "".join(f"{key} = {value}\n" for key, value in options.items())
            node.config.write_text(text + "[options]\n" + rows)
        for name in NODES:
            self.lab.kill(name)
        for name in NODES:
            self.lab.start(name)


def job_text(job: dict[str, Any]) -> str:
    percent = "?" if job["percent"] is None else f"{job['percent']:.0f}"
    waits = f", waits for {job['waiting_for']}" if job["waiting_for"] else ""
    return f"{job['what']} {percent} %{waits}"


@contextlib.contextmanager
def proof_ground(
    say: Say, *, drives: int = 2, drive_size: int = 2 * GIB, directory: Path | None = None,
    options: dict[str, int] | None = None, tls: bool = True,
) -> Iterator[Ground]:  # fmt: skip
    """A lab inside the `with`, taken down after it whatever happens. tls: else it needs a `directory`."""
    with contextlib.ExitStack() as stack:
        if directory is None:
            cluster = stack.enter_context(running_lab(nodes=3, drives=drives, drive_size=drive_size))
        else:
            stack.callback(lab.lab_down, directory, say=lambda line: None)
            lab.lab_up(directory, nodes=3, drives=drives, drive_size=drive_size, tls=tls, say=lambda line: None)
            cluster = LabCluster(directory)
        ground = Ground(cluster, say)
        if options:
            ground.configure(options)
        wait_for(lambda: all(d["state"] == "OK" for d in ground.drives()), within_s=60)
        ground.csvfs("volume", "create", "Volume1", "--copies", "3")
        ground.wait_mounted()
        yield ground
