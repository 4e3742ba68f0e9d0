"""Programs at work on a lab while a story goes on: fio that verifies what it reads, pass after pass.

Place      tests, over ground.py.
Passes     Random 4 KiB O_DIRECT writes over the whole of a file, each block with a checksum of its own, then all
           read back and verified. What the last pass wrote is verified on the other nodes at the end.
"""

import json
import subprocess
import time
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

from tests.proofs.ground import NODES, VOLUME, Ground

PASS_TIMEOUT_S = 600.0


@dataclass(slots=True)
class LoadFigures:
    """`pause_s`: the longest that one read or write took."""

    passes: int = 0
    writes: int = 0
    reads: int = 0
    pause_s: float = 0.0

    def __add__(self, other: "LoadFigures") -> "LoadFigures":
        return LoadFigures(
            self.passes + other.passes, self.writes + other.writes, self.reads + other.reads,
            max(self.pause_s, other.pause_s),
        )  # fmt: skip


class Load:
    """fio on one node, in a thread, until `finish`."""

    def __init__(self, ground: Ground, node: str, *, iops: int = 1500, fsync_each: int = 64) -> None:
        self._ground = ground
        self._node = node
        self.path = f"{VOLUME}/fio-{node}"
        self._job = (
            "fio", "--name=t", "--ioengine=psync", "--direct=1", "--bs=4k", f"--size={ground.load_mib}M",
            "--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--fallocate=none",
            f"--filename={self.path}", f"--fsync={fsync_each}", "--verify_state_save=0",
        )  # fmt: skip
        self._rate = (f"--rate_iops={iops},{iops}",) if iops else ()
        self.figures = LoadFigures()
        self._over = Event()
        self._seed = 0
        self._failure = ""
        self._thread = Thread(target=self._run_forever)

    def start(self) -> "Load":
        self._thread.start()
        return self

    def _run_forever(self) -> None:
        while not self._over.is_set() and not self._failure:
            self._seed += 1
            seeded = (*self._job, *self._rate, f"--randseed={self._seed}", "--do_verify=1")
            self._failure = self._run(self._node, *seeded)

    def _run(self, node: str, *job: str) -> str:
        """Why it failed; empty: it did not."""
        running = self._ground.lab.start_command(
            node, *job, "--output-format=json", stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            output, errors = running.communicate(timeout=PASS_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            running.kill()
            return f"fio on {node} has not ended in {PASS_TIMEOUT_S:.0f} s"
        if running.returncode != 0:
            said = (errors.decode() + output.decode()[-3000:]).strip()
            return f"fio on {node}, seed {self._seed}, ended with {running.returncode}: {said}"
        self.figures += figures_of(output)
        return ""

    def wait_passes(self, count: int, within_s: float = 300) -> None:
        """Until so many more passes are over."""
        wanted, began = self.figures.passes + count, time.monotonic()
        while self.figures.passes < wanted and not self._failure:
            assert time.monotonic() - began < within_s, f"no {count} passes of fio within {within_s:.0f} s"
            time.sleep(0.1)
        assert not self._failure, self._failure

    def finish(self, nodes: tuple[str, ...] = NODES) -> LoadFigures:
        """End after the pass under way, and verify what it wrote on these nodes. Raises AssertionError."""
        self.stop()
        assert not self._failure, self._failure + "\n" + self._ground.lab.logs()
        for node in nodes:
            wrong = self._run(node, *self._job, f"--randseed={self._seed}", "--verify_only")
            assert not wrong, f"verified on {node}: {wrong}"
        return self.figures

    def stop(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()


def figures_of(output: bytes) -> LoadFigures:
    text = output.decode()
    job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
    slowest_ns = max(job[kind]["clat_ns"]["max"] for kind in ("read", "write"))
    return LoadFigures(1, job["write"]["total_ios"], job["read"]["total_ios"], slowest_ns / 1e9)
