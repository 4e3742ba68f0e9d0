"""`tools/bench_scale`: what very many entries and extents cost: time per operation, and memory of every process.

Place      tests, over lab_cluster.py and proofs/ground.py; what is done on a node: scale_worker.py.
Lab        three nodes, three copies, without TLS; one of its own, taken down at the end.
Nodes      `maker` makes and removes, `other` looks without having made anything; neither coordinates the volume, if
           there are three.
Directory  filled by a session of its own, many names at a time (filler.py). Then, one after the other: create some more;
           look up at random; list on the other node; go on from a place in the middle while names change; look up what
           is not there; rename; unlink. With --takeover look up very many, and kill the coordinator.
Tree       the same in directories of 1,000 files each.
Sparse     extents at random places of 1 TiB, some thousand of them written (4 KiB) and read back on the other node; walked by
           SEEK_DATA, `csvfs file map`, truncated to a half, deleted; how long until the space is back.
Processes  resident size, peak and processor time of every csvfs process in each step. Time says something on a quiet machine
           only, processor time, less what the processes take when there is nothing to do, on any.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from csvfs.admin.cluster_view import read_cluster_view, read_record
from csvfs.admin.lab_processes import lab_processes
from csvfs.admin.render import print_table
from csvfs.config import load_config
from csvfs.errors import CsvfsError
from csvfs.store.interface import ClusterStore
from csvfs.units import GIB, MIB, TIB
from csvfs.wire.control import pack_value
from tests.lab_cluster import lab_arguments, wait_for
from tests.programs.coherence import owner_of
from tests.programs.filler import Filler
from tests.programs.scale_figures import HEAD, Step, Usage, progress, rows_of, summary_of
from tests.programs.scale_worker import FILES_PER_DIRECTORY, path_of, places
from tests.proofs.ground import NODES, VOLUME, Ground, proof_ground

WORKER = str(Path(__file__).with_name("scale_worker.py"))
LOOKUPS = 5000  # entries that are looked up
MANY = 100_000  # that a mount is to have seen when its coordinator dies: more than it remembers (mount/shedding.py)
WRITTEN = 3000  # of the extents of a sparse file; the others are made by a session of its own (filler.py)
CHANGES = 1000  # that are made, renamed and removed, one after the other
FILLER = "filler"
SEED = 1
ROLES = ("mount", "coordinator", "drives", "node")
SPARSE_SIZE = TIB
STEP_S_MAX = 3 * 3600.0
SPACE_BACK_S = 600.0
TAKEOVER_S = 12.0
IDLE_S = 5.0
Say = Callable[[str], None]


class Failed(Exception):
    """A step did not do what it should: what it said."""


class Scale:
    """A lab and what was measured on it so far."""

    def __init__(self, ground: Ground, say: Say, *, jobs: int) -> None:
        self._ground = ground
        self._say = say
        self._jobs = jobs
        self.steps: list[Step] = []
        self._cpu_s: dict[int, float] = {}
        self._began = 0.0
        self._idle: dict[str, float] = {}  # seconds of processor time per second, of a process that has nothing to do
        owner = owner_of(ground.lab.directory, "Volume1", NODES[0])
        others = [node for node in NODES if node != owner]
        self.maker, self.other = others[0], others[1]
        self._begin()
        time.sleep(IDLE_S)
        rows = self.usage()
        self._idle = {role: max(row.cpu_s for row in rows if row.role == role) / IDLE_S for role in ROLES}

    # -- one step ----------------------------------------------------------------------------------

    def step(self, ground: str, entries: int, what: str, node: str, name: str, *, jobs: int = 1, note: str = "",
             **arguments: Any) -> Step:  # fmt: skip
        """Run step `name` of the worker on `node`. Raises Failed."""
        self._begin()
        began = time.monotonic()
        arguments["jobs"] = jobs
        running = self._ground.lab.start_command(
            node, sys.executable, WORKER, name, json.dumps(arguments), stdout=subprocess.PIPE
        )
        assert running.stdout is not None
        last: dict[str, Any] = {}
        for line in running.stdout:
            last = json.loads(line)
            if "done" in last:
                self._say(f"  {what} on {node}: {progress(last, time.monotonic() - began)}")
            if "error" in last:
                self._say(f"  {what} on {node}: {last['error']}")
        if running.wait(timeout=60) or "count" not in last:
            raise Failed(f"{what} on {node}, {entries:,} entries: {last.get('error', 'it ended without a word')}")
        note = note or (f"{jobs} processes" if jobs > 1 else "")
        return self.note(Step(ground, entries, what, node, last["count"], last["seconds"], last["tenths"], note=note))

    def note(self, step: Step) -> Step:
        """Add what all processes take now."""
        step.usage = self.usage()
        step.metadata = self.metadata()
        step.load = os.getloadavg()[0]
        self.steps.append(step)
        growth = "" if step.growth is None else f", growth {step.growth:.2f}"
        peaks = ", ".join(f"{role} {step.peak(role) / MIB:.0f}" for role in ROLES)
        self._say(f"{step.ground} of {step.entries:,}: {step.what} on {step.node}: {step.micros:,.0f} us,"
                  f" processor {step.cpu_micros():,.0f} us{growth};"
                  f" MiB at most: {peaks}; metadata {step.metadata / MIB:.0f} MiB; load {step.load:.1f}")  # fmt: skip
        return step

    def _processes(self) -> list[tuple[str, str, int]]:
        files = self._ground.lab.files
        return [(p.node, p.role, p.pid) for p in lab_processes(files, files.nodes()) if p.role in ROLES]

    def _begin(self) -> None:
        """What is told of the processes next is since now."""
        self._cpu_s, self._began = {}, time.monotonic()
        for _, _, pid in self._processes():
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")
                self._cpu_s[pid] = cpu_s(pid)

    def usage(self) -> list[Usage]:
        found = []
        for node, role, pid in self._processes():
            with contextlib.suppress(OSError, KeyError):
                rows = dict(row.split(":", 1) for row in Path(f"/proc/{pid}/status").read_text().splitlines())
                spent_s = cpu_s(pid) - self._cpu_s.get(pid, 0.0)
                idle_s = self._idle.get(role, 0.0) * (time.monotonic() - self._began)
                found.append(Usage(node, role, kib(rows["VmRSS"]), kib(rows["VmHWM"]), max(0.0, spent_s - idle_s)))
        return found

    def metadata(self) -> int:
        """Bytes of the volume's metadata slabs."""

        async def look(store: ClusterStore) -> int:
            view = await read_cluster_view(store)
            record = await read_record(store, "meta/Volume1")
            return 0 if record is None or view.pool is None else len(record.value["slabs"]) * int(view.pool.value["slab_size"])

        return self._ground.lab.store(look)

    def used(self) -> int:
        """Bytes of one copy."""
        said = self._ground.lab.run(self.other, "stat", "-f", "-c", "%b %f %S", VOLUME).split()
        size, free, unit = (int(word) for word in said)
        return (size - free) * unit

    # -- grounds -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def filler(self) -> Iterator[Filler]:
        """A session that makes and removes names many at a time."""
        lab = self._ground.lab
        row = pack_value({"incarnation": 1, "address": "127.0.0.1", "started": 0})
        lab.store(lambda store: store.put(f"alive/{FILLER}", row))
        try:
            path = load_config(lab.node(owner_of(lab.directory, "Volume1", NODES[0])).config).coordinator_socket
            filler = wait_for(lambda: self._try_fill(path), within_s=30)
            yield filler
            filler.close()
        finally:
            lab.store(lambda store: store.delete(f"alive/{FILLER}"))

    def _try_fill(self, path: Path) -> Filler | None:
        try:
            return Filler(path, "Volume1", FILLER, self._say)
        except CsvfsError as error:  # it does not know yet that the node is there
            self._say(f"  not yet: {error}")
            time.sleep(0.2)
            return None

    def fill(self, ground: str, root: str, count: int, *, tree: bool) -> None:
        """`count` names, of which the maker's node makes the last CHANGES itself, one after the other."""
        self._ground.lab.run(self.maker, "mkdir", root)
        ino = int(self._ground.lab.run(self.maker, "stat", "-c", "%i", root))
        self._begin()
        began = time.monotonic()
        with self.filler() as filler:
            for parent, names in self._names(filler, ino, count, tree=tree):
                filler.make(parent, names)
        self.note(Step(ground, count, "fill", "-", count, time.monotonic() - began, note="256 at a time"))

    def _names(self, filler: Filler, ino: int, count: int, *, tree: bool) -> Iterator[tuple[int, list[bytes]]]:
        if not tree:
            yield ino, [path_of("", number, False)[1:].encode() for number in range(count)]
            return
        for number in range(0, count, FILES_PER_DIRECTORY):
            directory = filler.make_directory(ino, path_of("", number, True).split("/")[1].encode())
            files = range(number, min(number + FILES_PER_DIRECTORY, count))
            yield directory, [path_of("", file, True).split("/")[2].encode() for file in files]

    def names(self, ground: str, count: int, *, tree: bool, takeover: bool) -> None:
        """All steps of a directory or a tree of `count` files."""
        root = f"{VOLUME}/{ground}-{count}"
        self.fill(ground, root, count, tree=tree)
        base = {"root": root, "count": count, "tree": tree}
        looked = {**base, "size": LOOKUPS, "seed": SEED}
        changed = {**base, "size": CHANGES, "seed": SEED}
        self.step(ground, count, "create", self.maker, "create more", **changed)
        self.step(ground, count, "lookup, cold", self.maker, "lookup", **looked)
        self.step(ground, count, "lookup, cached", self.maker, "lookup", **looked)
        self.step(ground, count, "lookup, absent", self.other, "lookup absent", **looked)
        self.step(ground, count, "readdir", self.other, "list", **base)
        if not tree:
            self.step(ground, count, "readdir, telldir", self.other, "seek", **base)
        self.step(ground, count, "rename", self.maker, "rename", **changed)
        self.step(ground, count, "unlink", self.maker, "unlink more", **changed)
        if takeover:
            many = {**base, "size": MANY, "seed": SEED}
            self.step(ground, count, "lookup, very many", self.other, "lookup", jobs=self._jobs, **many)
            self.takeover(ground, count)

    def takeover(self, ground: str, entries: int) -> None:
        """Kill the coordinator under programs on two nodes. Raises Failed: a mount was evicted."""
        owner = owner_of(self._ground.lab.directory, "Volume1", NODES[0])
        before = self._mounts()
        running = {}
        for node in (self.maker, self.other):
            root = f"{VOLUME}/at-work-{node}"
            self._ground.lab.run(node, "mkdir", root)
            arguments = json.dumps({"root": root, "seconds": TAKEOVER_S})
            running[node] = self._ground.lab.start_command(
                node, sys.executable, WORKER, "at work", arguments, stdout=subprocess.PIPE
            )
        time.sleep(3)
        self._begin()
        self._ground.lab.kill(owner, "coordinator")
        for node, process in running.items():
            said, _ = process.communicate(timeout=120)
            if process.returncode:
                raise Failed(f"takeover, {entries:,} entries: the program on {node} failed: {said.decode()}")
            longest = json.loads(said.splitlines()[-1])["longest"]
            self.note(Step(ground, entries, "takeover, longest wait", node, 1, longest, note=f"coordinator of {owner} killed"))
            self._ground.lab.run(node, "rmdir", f"{VOLUME}/at-work-{node}")
        if self._mounts() != before:
            raise Failed(f"takeover, {entries:,} entries: mounts were {before}, are {self._mounts()}")

    def _mounts(self) -> dict[str, list[int]]:
        return {node: self._ground.lab.pids(node).get("mount", []) for node in NODES}

    def sparse(self, count: int) -> None:
        """All steps of a file of 1 TiB with `count` extents, of which a part is written."""
        ground, path, size = "sparse file", f"{VOLUME}/sparse-{count}", SPARSE_SIZE
        used = self.used()
        self._ground.lab.run(self.maker, "truncate", "-s", str(size), path)
        ino = int(self._ground.lab.run(self.maker, "stat", "-c", "%i", path))
        self._begin()
        began = time.monotonic()
        with self.filler() as filler:
            filler.allocate(ino, places(count, size, SEED)[WRITTEN:])
        filled = max(0, count - WRITTEN)
        self.note(Step(ground, count, "fill", "-", filled, time.monotonic() - began, note="256 at a time"))
        base = {"path": path, "count": count, "size": size, "seed": SEED, "written": WRITTEN}
        self.step(ground, count, "write 4 KiB", self.maker, "sparse write", jobs=self._jobs, **base)
        self.step(ground, count, "read", self.other, "sparse read", jobs=self._jobs, **base)
        self.step(ground, count, "SEEK_DATA, SEEK_HOLE", self.other, "sparse walk", **base)

        def file_map() -> int:
            return int(json.loads(self._ground.csvfs("file", "map", path, "--json", node=self.other))["extents"])

        self.timed(ground, count, "csvfs file map", file_map)
        self.timed(ground, count, "truncate to a half", lambda: self._run("truncate", "-s", str(size // 2), path))
        self.timed(ground, count, "unlink", lambda: self._run("rm", path))
        self.timed(ground, count, "space back", lambda: self._until_used(used + 64 * MIB))

    def timed(self, ground: str, entries: int, what: str, work: Callable[[], int]) -> None:
        self._begin()
        began = time.monotonic()
        count = work()
        self.note(Step(ground, entries, what, self.maker, count, time.monotonic() - began))

    def _run(self, *argv: str) -> int:
        self._ground.lab.run(self.maker, *argv)
        return 1

    def _until_used(self, used: int) -> int:
        wait_for(lambda: self.used() <= used, within_s=SPACE_BACK_S)
        return 1


def cpu_s(pid: int) -> float:
    """Seconds of processor time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def kib(row: str) -> int:
    return int(row.split()[0]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench_scale", description=__doc__.splitlines()[0])
    parser.add_argument("--entries", default="1000,100000", help="sizes of directories, one after the other")
    parser.add_argument("--tree", default="", help="sizes of trees")
    parser.add_argument("--extents", default="", help="4 KiB writes into a file of 1 TiB")
    parser.add_argument("--takeover", action="store_true", help="kill the coordinator while all that is cached")
    parser.add_argument("--jobs", type=int, default=4, help="processes of steps that are not one after the other")
    parser.add_argument("--drive-gib", type=int, default=12, help="one drive per node, sparse")
    arguments = lab_arguments(parser)

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    directory = arguments.dir or Path(tempfile.mkdtemp(prefix="sc-", dir="/var/tmp"), "lab")
    size = arguments.drive_gib * GIB
    # The session that fills is of no node that has a certificate.
    with proof_ground(say, drives=1, drive_size=size, directory=directory, tls=False) as ground:
        scale = Scale(ground, say, jobs=arguments.jobs)
        try:
            for size in numbers_in(arguments.entries):
                scale.names("directory", size, tree=False, takeover=arguments.takeover)
            for size in numbers_in(arguments.tree):
                scale.names("tree", size, tree=True, takeover=arguments.takeover)
            for count in numbers_in(arguments.extents):
                scale.sparse(count)
        except Failed as failure:
            say(f"FAILED: {failure}")
            say(ground.lab.logs())
            show(scale.steps, as_json=arguments.json)
            return 1
    show(scale.steps, as_json=arguments.json)
    return 0


def numbers_in(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def show(steps: list[Step], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([step.plain() for step in steps], indent=2))
        return
    for ground in dict.fromkeys(step.ground for step in steps):
        print(f"{ground}:")
        print_table(HEAD, rows_of([step for step in steps if step.ground == ground]), empty="nothing was measured")
    head, *rows = summary_of(steps)
    print_table(("MICROSECONDS OF ONE", *(f">{size}" for size in head[1:])), rows, empty="")


if __name__ == "__main__":
    sys.exit(main())
