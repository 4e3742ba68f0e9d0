"""The stories: each breaks something under load, waits until all is green again by itself, and proves that nothing is lost.

Place      tests, over ground.py, load.py and copies.py. `STORIES` is what `tools/prove_repair` runs; the test suite
           runs some with smaller numbers.
Proof      fio has seen no error and verified every pass; what its last pass wrote is verified on every node; all
           copies of every slab are in sync and equal, block by block; the status is green.
"""

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from csvfs.admin.lab_processes import node_pid
from csvfs.units import BLOCK_SIZE, CHUNK_SIZE, GIB, format_size
from tests.lab_cluster import wait_for
from tests.proofs.copies import changed_chunks, checksum_tables, compare_copies, copies_on, rot
from tests.proofs.ground import NODES, VOLUME, Ground
from tests.proofs.load import Load, LoadFigures

MARKS_GONE_S = 12.0  # longer than chunks of complete writes stay active
AWAY_MS = 15_000  # instead of 15 minutes: a drive that is away for longer counts as lost
TOP = Path(__file__).resolve().parent.parent.parent


@dataclass(slots=True)
class Outcome:
    """`facts`: what else is worth knowing, by name."""

    green_s: float = 0.0
    load: LoadFigures = field(default_factory=LoadFigures)
    facts: dict[str, object] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Story:
    what: str
    tell: Callable[[Ground, Random], Outcome]
    drives: int = 2
    drive_size: int = 2 * GIB
    options: dict[str, int] = field(default_factory=dict)
    load_mib: int = 32  # that each pass of fio writes


def prove(ground: Ground, load: Load, but: tuple[str, ...] = (), within_s: float = 300) -> Outcome:
    """After the last fault: green by itself, nothing lost, all copies equal."""
    green_s = ground.wait_green(within_s, but)
    figures = load.finish()
    ground.wait_green(within_s, but)
    return Outcome(green_s, figures, prove_copies(ground, but))


def prove_copies(ground: Ground, but: tuple[str, ...] = ()) -> dict[str, object]:
    ground.lab.run("n1", "sync")
    paths = [seen_from_here(ground, d["node"], d["path"]) for d in ground.drives() if d["path"] not in but]
    comparison = compare_copies(paths)
    for _ in range(40):  # the coordinator may just be writing something of its own
        if not comparison.unequal:
            break
        time.sleep(0.5)
        comparison = compare_copies(paths)
    assert not comparison.unequal, "\n".join(comparison.unequal)
    return {"slabs": comparison.slabs, "copies": comparison.copies, "blocks equal": comparison.blocks}


def seen_from_here(ground: Ground, node: str, path: str) -> str:
    """A path of a node's mount namespace."""
    return f"/proc/{node_pid(ground.lab.files, ground.lab.node(node))}/root{path}"


# Drive servers and nodes


def restarts(ground: Ground, rng: Random, times: int = 20) -> Outcome:
    load = Load(ground, "n1").start()
    try:
        load.wait_passes(1)
        for number in range(times):
            node = rng.choice(NODES)
            wait_for(lambda node=node: ground.lab.pids(node).get("drives"), within_s=60)
            ground.lab.kill(node, "drives")
            ground.say(f"kill -9 of the drive server of {node}, number {number + 1}")
            time.sleep(rng.choice((0.0, 0.3, 1.0, 3.0, 8.0)))
        outcome = prove(ground, load)
    finally:
        load.stop()
    outcome.facts["kills"] = times
    return outcome


def node_away(ground: Ground, rng: Random, away_s: float = 60.0) -> Outcome:
    ground.csvfs("volume", "move", "Volume1", "n3")  # the coordinator goes with it
    load = Load(ground, "n1").start()
    try:
        load.wait_passes(1)
        ground.lab.kill("n3")
        ground.say(f"n3 has no power for {away_s:.0f} s")
        time.sleep(away_s)
        ground.lab.start("n3")
        ground.say("n3 has power again")
        ground.wait_mounted()
        outcome = prove(ground, load)
    finally:
        load.stop()
    outcome.facts["away"] = f"{away_s:.0f} s"
    return outcome


# Drive files


def destroyed(how: Callable[[str], None], word: str, *states: str) -> Callable[[Ground, Random], Outcome]:
    """A story of a drive file that is gone for good: rebuilt on the other drive of the node, then replaced."""

    def tell(ground: Ground, rng: Random) -> Outcome:
        path = str(rng.choice(ground.drives("n2"))["path"])
        size = os.stat(path).st_size
        load = Load(ground, "n1").start()
        try:
            load.wait_passes(1)
            how(path)
            ground.say(f"{path} is {word}")
            ground.wait_state(path, *states)
            load.wait_passes(1)
            outcome = prove(ground, load, but=(path,))
        finally:
            load.stop()
        ground.say(f"{path} is replaced by an empty one, and reset")
        with open(path, "wb") as file:
            file.truncate(size)
        ground.csvfs("drive", "reset", path, node="n2")
        outcome.facts["green with a new one after"] = f"{ground.wait_green():.1f} s"
        prove_copies(ground)
        return outcome

    return tell


def truncate(path: str) -> None:
    os.truncate(path, 0)


def zero(path: str) -> None:
    """Every byte, in place."""
    size = os.stat(path).st_size
    subprocess.run(["fallocate", "--punch-hole", "--offset", "0", "--length", str(size), path], check=True)


def read_only(ground: Ground, rng: Random) -> Outcome:
    path = str(rng.choice(ground.drives("n3"))["path"])
    load = Load(ground, "n1").start()
    try:
        load.wait_passes(1)
        os.chmod(path, 0o400)
        ground.say(f"{path} is read-only")
        ground.wait_state(path, "Not usable")
        load.wait_passes(1)
        os.chmod(path, 0o600)
        ground.say(f"{path} may be written again")
        return prove(ground, load)
    finally:
        load.stop()


def filled(ground: Ground, rng: Random) -> Outcome:
    """The file system that a drive file lies on is full: somebody else's file took the room."""
    directory = ground.lab.node("n2").directory / "small"
    directory.mkdir()
    script = (
        "truncate -s 800M fs && mkfs.ext4 -q -m 0 fs && mkdir m && mount -o loop fs m"
        " && truncate -s 1500M m/d && csvfs drive add $PWD/m/d"
    )
    ground.lab.run("n2", "sh", "-ec", f"cd {directory} && {script}")
    path = f"{directory}/m/d"
    ground.wait_state(path, "OK")
    load = Load(ground, "n1").start()
    try:
        load.wait_passes(1)
        ground.lab.run("n2", "sh", "-c", f"cat /dev/zero > {directory}/m/other; true")
        ground.say("the file system below one drive of n2 is full")
        written = 0
        while ground.drive(path)["state"] == "OK" and written < 40:
            ground.lab.run(
                "n1", "dd", "if=/dev/urandom", f"of={VOLUME}/more-{written}", "bs=1M", "count=16", "conv=fsync"
            )
            written += 1
        ground.wait_state(path, "IO error")
        load.wait_passes(1)
        ground.lab.run("n2", "rm", f"{directory}/m/other")
        ground.say("there is room again")
        outcome = prove(ground, load)
    finally:
        load.stop()
    outcome.facts["written until it was noticed"] = f"{written * 16} MiB"
    return outcome


# Resync, rot


def resync(ground: Ground, rng: Random, writes: int = 4096, file_mib: int = 512) -> Outcome:
    """What a node that was away is copied, beside what was written meanwhile."""
    ground.fill("base", file_mib)
    time.sleep(MARKS_GONE_S)
    before = checksum_tables(own_paths(ground, "n1"))
    ground.lab.kill("n2")
    active = sum(copy.active_chunks() for path in lab_paths(ground, "n2") for copy in copies_on(path))
    job = (
        "fio", "--name=t", "--ioengine=psync", "--direct=1", "--bs=4k", f"--size={file_mib}M", "--rw=randwrite",
        "--fallocate=none", f"--filename={VOLUME}/base", f"--number_ios={writes}", "--verify=crc32c", "--do_verify=0",
        f"--randseed={rng.randrange(1 << 30)}", "--end_fsync=1", "--verify_state_save=0",
    )  # fmt: skip
    ground.lab.run("n1", *job)
    ground.say(f"{writes} random blocks of 4 KiB were written while n2 was away")
    ground.lab.start("n2")
    outcome = Outcome(ground.wait_green())
    outcome.facts = prove_copies(ground)
    copied = ground.counter("n2", "pulled")
    touched = changed_chunks(before, checksum_tables(own_paths(ground, "n1"))) + active
    outcome.facts |= {
        "written": format_size(writes * BLOCK_SIZE), "chunks touched": touched,
        "of them active when it went": active, "touched": format_size(touched * CHUNK_SIZE),
        "copied": format_size(copied),
    }  # fmt: skip
    assert 0 < copied <= touched * CHUNK_SIZE, outcome.facts
    return outcome


def bits(ground: Ground, rng: Random, count: int = 1000, file_mib: int = 128) -> Outcome:
    """Single bits flipped all over one node's drives while it serves them."""
    digest = ground.fill("base", file_mib)
    assert ground.scrub()["found"] == 0  # and the slot table is at rest
    healed = ground.counter("n2", "healed")
    kinds = rot(lab_paths(ground, "n2"), rng, count)
    ground.say(f"{count} bits are flipped on the drives of n2")
    for node in ("n2", "n1", "n3"):  # n2 reads its own drives
        assert ground.sha256(node, "base") == digest, f"{node} has read wrong bytes"
    found = ground.scrub()
    healed = ground.counter("n2", "healed") - healed
    again = ground.scrub()
    assert (found["lost"], healed, again["found"]) == (0, count, 0), (found, healed, again)
    for node in NODES:
        assert ground.sha256(node, "base") == digest, f"{node} has read wrong bytes"
    outcome = Outcome(ground.wait_green())
    outcome.facts = {**kinds, "healed": healed, "wrong bytes read": 0, **prove_copies(ground)}
    return outcome


def lab_paths(ground: Ground, node: str) -> list[str]:
    """The node's drive files, also while it is down."""
    return [str(path) for path in sorted((ground.lab.node(node).directory / "drives").iterdir())]


def own_paths(ground: Ground, node: str) -> list[str]:
    ground.lab.run(node, "sync", VOLUME)
    return lab_paths(ground, node)


# Slow and failing drives


class SlowDrive:
    """A further drive of a node, on slow_fs.py, which all the node's copies are moved to."""

    def __init__(self, ground: Ground, node: str, size: int) -> None:
        self._ground = ground
        self._node = node
        directory = ground.lab.node(node).directory / "slow"
        self._control = directory / "control"
        source, mount_point = directory / "source", directory / "drive"
        for made in (source, mount_point):
            made.mkdir(parents=True)
        with open(source / "d", "wb") as file:
            file.truncate(size)
        self.path = f"{mount_point}/d"
        self.be()
        python = str(TOP / ".venv" / "bin" / "python")
        argv = ("env", f"PYTHONPATH={TOP}", python, "-m", "tests.proofs.slow_fs", source, mount_point, self._control)
        self._server = ground.lab.start_command(node, *map(str, argv), stderr=subprocess.DEVNULL)
        wait_for(lambda: self._is_there(), within_s=30)
        ground.csvfs("drive", "add", self.path, node=node)
        ground.wait_state(self.path, "OK")
        ground.empty_onto_others([row["path"] for row in ground.drives(node) if row["path"] != self.path])

    def _is_there(self) -> bool:
        return b"ok" in self._ground.lab.run(self._node, "sh", "-c", f"test -e {self.path} && echo ok", check=False)

    def be(self, control: str = "{}") -> None:
        staged = self._control.with_name("control.new")
        staged.write_text(control)
        os.replace(staged, self._control)


def slow(ground: Ground, rng: Random, delay_ms: int = 500) -> Outcome:
    """Flagged, read around, retired and emptied; taken back when an administrator says so."""
    ground.fill("base", 8 * ground.load_mib)
    drive = SlowDrive(ground, "n2", 2 * GIB)
    loads = [Load(ground, node).start() for node in ("n1", "n2")]
    try:
        for load in loads:
            load.wait_passes(1)
        before = max(load.figures.pause_s for load in loads)
        drive.be(f'{{"read_ms": {delay_ms}, "write_ms": {delay_ms}, "fsync_ms": {delay_ms}}}')
        ground.say(f"each request to {drive.path} takes {delay_ms} ms from now on")
        began = time.monotonic()
        ground.wait_state(drive.path, "Abnormal latency", "Retired", within_s=120)
        flagged_s = time.monotonic() - began
        ground.wait_state(drive.path, "Retired", within_s=120)
        retired_s = time.monotonic() - began
        outcome = prove(ground, loads[0], but=(drive.path,))
        outcome.load += loads[1].finish()
        row = ground.drive(drive.path)
        assert row["free"] == row["size"], f"a retired drive still has copies: {row}"
    finally:
        for load in loads:
            load.stop()
    drive.be()
    ground.csvfs("drive", "retire", "--undo", drive.path, node="n2")
    outcome.facts |= {
        "flagged after": f"{flagged_s:.0f} s", "retired after": f"{retired_s:.0f} s",
        "longest pause before": f"{before:.2f} s", "green when taken back": f"{ground.wait_green():.1f} s",
    }  # fmt: skip
    return outcome


FAILURES = ('"fsync"', '"write", "fsync"', '"read", "write", "fsync"')


def failing(ground: Ground, rng: Random, kinds: tuple[str, ...] = FAILURES) -> Outcome:
    """A drive whose flushes fail, then its reads, then its writes; each time it comes back when it works again."""
    ground.fill("base", 8 * ground.load_mib)
    drive = SlowDrive(ground, "n2", 1 * GIB)
    load = Load(ground, "n1").start()
    try:
        load.wait_passes(1)
        for failure in kinds:
            drive.be(f'{{"fail": [{failure}]}}')
            ground.say(f"{failure} of {drive.path} fail with EIO")
            ground.wait_state(drive.path, "IO error")
            load.wait_passes(1)
            drive.be()
            ground.say(f"{drive.path} works again")
            ground.wait_green()
        return prove(ground, load)
    finally:
        load.stop()


FAST_AWAY = {"drive_retire_ms": AWAY_MS}

STORIES = {
    "restarts": Story("a drive server killed and restarted 20 times, any node's", restarts),
    "node": Story("a node without power for a minute, with the coordinator", node_away),
    "truncated": Story("a drive file truncated to nothing", destroyed(truncate, "truncated", "Failed media"),
                       options=FAST_AWAY),
    "zeroed": Story("a drive file overwritten with zeros", destroyed(zero, "zeros", "Failed media"), options=FAST_AWAY),
    "deleted": Story("a drive file deleted", destroyed(os.unlink, "deleted", "Lost communication"), options=FAST_AWAY),
    "read-only": Story("a drive file made read-only, and writable again", read_only),
    "filled": Story("the file system below a drive full, and not any more", filled),
    "slow": Story("a drive that takes 500 ms for everything", slow, drives=1, load_mib=8,
                  options={"slow_drive_ms": 200, "slow_drive_after_s": 20, "slow_drive_retire_s": 45}),
    "resync": Story("a node away while 16 MiB are written at random: how much it is copied", resync),
    "bits": Story("1,000 single bits flipped on one node's drives", bits),
    "failing": Story("a drive that fails its flushes, writes and reads", failing, drives=1),
}  # fmt: skip
