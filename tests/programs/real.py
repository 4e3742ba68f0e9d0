"""`tools/real_programs`: git, make, SQLite, PostgreSQL, rsync, tar, cp, qemu-img, stress-ng on a mounted volume of a lab.

Place      tests, over lab_cluster.py. Needs a lab, and of the programs those that are there: others are said to be missing.
Where      on a node that does not coordinate the volume; what they made is read back on a third one.
Judge      the programs' own checks (fsck, integrity_check, pg_amcheck, qemu-img check), and checksums as another node
           and this machine see them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from csvfs.admin import lab
from csvfs.admin.lab_files import LAB_DIR_DEFAULT
from csvfs.admin.render import print_table
from tests.lab_cluster import LabCluster
from tests.programs.coherence import owner_of
from tests.programs.database import CLIENTS, Database, Sums, number_in

TOP = Path(__file__).resolve().parent.parent.parent
PG_BIN = "/usr/lib/postgresql"
PG_SCALE = 4
STRESSOR_S = 3
Say = Callable[[str], None]


@dataclass(slots=True)
class Row:
    what: str
    how: str  # it ended
    held: bool
    seconds: float


class Refused(Exception):
    """A program is not there, or does not want to: why."""


class Site:
    """A volume of a lab, the node where programs run (`here`), and one that reads what they left (`there`)."""

    def __init__(self, lab_directory: Path, volume: str, nodes: tuple[str, ...]) -> None:
        self.lab = LabCluster(lab_directory)
        self.directory, self.volume, self.nodes = lab_directory, volume, nodes
        self.owner = owner_of(lab_directory, volume, nodes[0])
        self.here, self.there = [node for node in nodes if node != self.owner][:2]
        self.folder = f"/clusterstorage/{volume}/programs-{time.time_ns()}"
        self.seconds = 300
        self.repository = TOP
        self.sources: Path | None = None  # a repository of a C project
        self.make_arguments = ""
        self.say: Say = lambda text: None

    def sh(self, script: str, node: str | None = None) -> str:
        """Run by sh -eu in our folder; what it printed. Raises AssertionError with what it said."""
        script = f"cd {self.folder} && {script}"
        return self.lab.run(node or self.here, "sh", "-euc", script).decode(errors="replace")

    def same_everywhere(self, command: str) -> str:
        """What `command` prints, here and there alike."""
        here, there = self.sh(command), self.sh(command, self.there)
        assert here == there, f"{command}: {self.here} says\n{here}\n{self.there} says\n{there}"
        return here


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None and not Path(program).exists():
            raise Refused(f"{program} is not installed")


def git(site: Site) -> str:
    need("git")
    site.sh(f"git clone -q --no-local file://{site.repository} repo && cd repo && git fsck --strict --full 2>&1")
    site.sh("cd repo && git repack -adq && git checkout -q -b other && git gc -q --prune=now && git fsck --full 2>&1")
    site.sh("cd repo && git fsck --strict --full 2>&1 && git status --porcelain && git diff --exit-code HEAD", site.there)
    return f"{site.sh('cd repo && git rev-list --count HEAD').strip()} commits; repacked; fsck clean on both nodes"


C_MAKE = """
mkdir c && cd c
for i in $(seq 300); do printf 'int f%d(int x) { static const char t[] = "%d"; int s = 0;
for (int i = 0; i < x; i++) s = s * 31 + t[i %% (sizeof t - 1)] + %d; return s; }\\n' $i $i $i >f$i.c; done
{ printf '#include <stdio.h>\\n'; for i in $(seq 300); do printf 'int f%d(int);\\n' $i; done
printf 'int main(void) { unsigned s = 0;\\n'
for i in $(seq 300); do printf 's = s * 7 + f%d(%d);\\n' $i $i; done; printf 'printf("%%u\\\\n", s); }\\n'; } >main.c
printf 'OBJECTS = main.o $(patsubst %%.c,%%.o,$(wildcard f*.c))\\nprogram: $(OBJECTS)\\n\\t$(CC) -o $@ $^\\n' >Makefile
make -s -j4 CFLAGS=-O1 program
"""


def build(site: Site) -> str:
    need("gcc", "make")
    site.sh(C_MAKE)
    result = site.same_everywhere("c/program")
    assert "up to date" in site.sh("make -C c program", site.there), "make on another node would build again"
    said = f"301 C files, make -j4; prints {result.strip()} on both nodes; nothing to do for make on the other one"
    return said if site.sources is None else f"{said}; {_build_project(site, site.sources)}"


def _build_project(site: Site, sources: Path) -> str:
    """What a C project's own Makefile makes with -j4: the same bytes on both nodes, and make on the other one makes nothing
    anew. Not `make -q`: many Makefiles have something that is never up to date, and changes no file.
    """
    site.sh(f"mkdir project && git -C {sources} archive HEAD | tar -xC project")
    site.sh(f"make -s -j4 -C project {site.make_arguments} >make.log 2>&1")
    files = site.same_everywhere("find project -type f -exec sha256sum {} + | sort").splitlines()
    site.sh(f"touch made && sleep 0.1 && make -s -j4 -C project {site.make_arguments} >again.log 2>&1", site.there)
    anew = site.sh("find project -type f -newer made").split()
    assert not anew, f"make on {site.there} made {len(anew)} files anew: {anew[:5]}"
    objects = sum(line.endswith(".o") for line in files)
    return f"{sources.name}: make -j4 made {objects} object files, {len(files)} files equal on both nodes, none anew there"


SQLITE = """
import os, sqlite3, sys
path, mode, who, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
db = sqlite3.connect(path, timeout=120, isolation_level=None)
db.execute(f"PRAGMA journal_mode={mode}")
for i in range(count):
    db.execute("BEGIN IMMEDIATE")
    db.execute("UPDATE counter SET n = n + 1")
    db.execute("INSERT INTO rows VALUES (?, ?, ?)", (who, i, os.urandom(500)))
    if i % 10 == 9:
        db.execute("DELETE FROM rows WHERE who = ? AND i = ?", (who, i - 5))
    db.execute("ROLLBACK" if i % 7 == 6 else "COMMIT")
"""
SQLITE_CHECK = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=60)
print(db.execute("PRAGMA integrity_check").fetchone()[0], db.execute("SELECT n FROM counter").fetchone()[0],
      db.execute("SELECT count(*) FROM rows").fetchone()[0])
"""


def sqlite(site: Site) -> str:
    """Four processes each; in rollback mode on two nodes at once (WAL asks for shared memory, so for one machine)."""
    said = []
    count, each = 4, 100
    for mode, nodes in (("WAL", [site.here]), ("DELETE", [site.here, site.there]), ("TRUNCATE", [site.here, site.there])):
        name = f"{site.folder}/sqlite-{mode}"
        make = f"import sqlite3; db = sqlite3.connect('{name}'); db.execute('PRAGMA journal_mode={mode}'); "
        make += "db.executescript('CREATE TABLE counter (n); INSERT INTO counter VALUES (0); CREATE TABLE rows (who, i, x);')"
        site.lab.run(site.here, "python3", "-c", make)
        running = [
            site.lab.start_command(nodes[who % len(nodes)], "python3", "-c", SQLITE, name, mode, str(who), str(each),
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for who in range(count)
        ]  # fmt: skip
        for process in running:
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output.decode()
        committed = count * sum(i % 7 != 6 for i in range(each))
        for node in (site.here, site.there) if mode != "WAL" else (site.here,):
            ok, counted, _ = site.lab.run(node, "python3", "-c", SQLITE_CHECK, name).split()
            assert (ok, int(counted)) == (b"ok", committed), f"{mode} on {node}: {ok}, {counted} of {committed}"
        said.append(f"{mode} on {len(nodes)} node{'s' * (len(nodes) > 1)}: {committed} transactions")
    return "; ".join(said) + "; none lost, integrity_check ok"


def postgres(site: Site) -> str:
    """pgbench: the coordinator's node loses its power; the server crashes; then its own node loses its power."""
    versions = sorted(Path(PG_BIN).glob("*/bin")) if Path(PG_BIN).exists() else []
    if not versions:
        raise Refused("PostgreSQL is not installed")
    database = Database(site.lab, versions[-1], f"{site.folder}/pg")
    database.make(site.here)
    database.start(site.here)
    processes = database.processes(site.here)  # its children end with the first
    try:
        database.fill(site.here, PG_SCALE)
        undisturbed = _bench(site, database)
        done = _bench_while_the_coordinators_node_dies(site, database)
        before = database.sums(site.here)
        assert before.transactions == undisturbed + done, f"{before.transactions}, not {undisturbed} + {done}"
        database.stop(site.here, "immediate")
        database.start(site.here)
        processes = database.processes(site.here)
        after = database.sums(site.here)
        assert after == before, f"after recovery: {after}, not {before}"
        database.check(site.here)
        moved = _move_by_power_cut(site, database, before)
        processes = database.processes(site.there)
        database.check(site.there)
        database.stop(site.there, "fast")
        said = database.verify_checksums(site.there)
        pages = number_in(said, r"Blocks scanned: +(\d+)")
        assert pages > 0 and number_in(said, r"Bad checksums: +(\d+)") == 0, said
    finally:
        database.kill(processes)
        database.forget()
        lab.lab_start(site.directory, site.here)
    return (
        f"{undisturbed} transactions in {site.seconds} s; {done} more across the power cut of {site.owner} (coordinator), 0 "
        f"failed; recovered from a crash; then {site.here} without power in the middle of {moved}: started on {site.there}, "
        f"none missing, sums equal, pg_amcheck clean, {pages} pages with right checksums"
    )


def _bench(site: Site, database: Database) -> int:
    """How many transactions; none may fail."""
    output, _ = database.bench(site.seconds).communicate(timeout=site.seconds + 300)
    return _transactions(output.decode())


def _transactions(text: str) -> int:
    assert "aborted" not in text, text[-3000:]
    assert number_in(text, r"failed transactions: (\d+)") == 0, text[-3000:]
    return number_in(text, r"processed: (\d+)")


def _bench_while_the_coordinators_node_dies(site: Site, database: Database) -> int:
    seconds = max(30, site.seconds // 3)
    running = database.bench(seconds)
    time.sleep(seconds / 4)
    owner = site.owner
    lab.lab_kill(site.directory, owner, "all")
    time.sleep(seconds / 2)
    lab.lab_start(site.directory, owner)
    output, _ = running.communicate(timeout=seconds + 300)
    return _transactions(output.decode())


def _move_by_power_cut(site: Site, database: Database, before: Sums) -> int:
    """The server's node loses its power under load; the database starts on another one. How many transactions were done."""
    running = database.bench(600)
    time.sleep(20)
    processes = database.processes(site.here)
    lab.lab_kill(site.directory, site.here, "all")
    database.kill(processes)
    output, _ = running.communicate(timeout=300)
    acknowledged = number_in(output.decode(), r"processed: (\d+)")
    assert acknowledged > 0, output.decode()[-3000:]
    database.start(site.there)
    there = database.sums(site.there).transactions - before.transactions
    assert acknowledged <= there <= acknowledged + CLIENTS, f"{there} transactions are there, {acknowledged} were acknowledged"
    return there


def rsync(site: Site) -> str:
    need("rsync")
    site.sh(f"mkdir copy && rsync -aHAX --exclude .venv --exclude '*cache*' --exclude .git {TOP}/ copy/")
    again = site.sh(f"rsync -aHAXi --checksum --exclude .venv --exclude '*cache*' --exclude .git {TOP}/ copy/", site.there)
    assert not again.strip(), f"on {site.there} rsync would copy again: {again[:500]}"
    site.sh("rsync -a --inplace --sparse copy/ copy2/ && rsync -a --delete copy/tests/ copy2/tests/")
    return f"{site.same_everywhere('find copy -type f | wc -l').strip()} files; nothing to do for it on another node"


def tar(site: Site) -> str:
    site.sh(f"tar -C {TOP} --exclude .venv --exclude '*cache*' -czf t.tgz . && mkdir t && tar -xpzf t.tgz -C t")
    site.sh("tar -dzf t.tgz -C t", site.there)
    site.sh("truncate -s 1G sparse && printf x | dd of=sparse bs=1 seek=700M conv=notrunc status=none && tar -cSf s.tar sparse")
    size = int(site.sh("stat -c %s s.tar"))
    assert size < 1 << 20, f"the archive of a sparse file has {size} bytes"
    return "unpacked on one node, `tar -d` finds no difference on another; a sparse file of 1 GiB in an archive of 20 KiB"


def copies(site: Site) -> str:
    site.sh("truncate -s 256M holes && head -c 3000000 /dev/urandom | dd of=holes bs=1M seek=100 conv=notrunc status=none")
    for how in ("--sparse=always", "--sparse=auto", "--sparse=never", "--reflink=auto"):
        site.sh(f"cp {how} holes twin && cmp holes twin")
        site.sh("cmp holes twin && rm twin", site.there)
    return "cp --sparse=always, auto, never, --reflink=auto: equal on both nodes"


def qemu(site: Site) -> str:
    need("qemu-img", "qemu-io")
    site.sh("qemu-img create -q -f qcow2 a.qcow2 1G")
    commands = " ".join(f"-c 'write -P {n} {n * 37}M 5M'" for n in range(1, 25))
    site.sh(f"qemu-io -t none {commands} -c 'discard 100M 64M' -c 'write -z 300M 50M' a.qcow2 >/dev/null")
    site.sh("qemu-img snapshot -c s a.qcow2 && qemu-io -c 'write -P 99 5M 100M' a.qcow2 >/dev/null")
    for target, node in (("raw", site.here), ("qcow2", site.there), ("vmdk", site.here), ("vhdx", site.there)):
        site.sh(f"qemu-img convert -t none -T none -O {target} a.qcow2 b.{target} && qemu-img compare a.qcow2 b.{target}", node)
    for name in ("a.qcow2", "b.qcow2"):
        site.sh(f"qemu-img check {name}", site.there)
    return "qcow2 with snapshot and discards; converted to raw, qcow2, vmdk, vhdx on two nodes, compare and check clean"


def stress(site: Site) -> str:
    """Each stressor of the file-system class for some seconds, with its own verification on."""
    need("stress-ng")
    listed = subprocess.run(["stress-ng", "--class", "filesystem?"], capture_output=True, text=True, check=False)
    stressors = (listed.stdout + listed.stderr).partition("stressors:")[2].split()
    assert stressors, "stress-ng names no stressors"
    passed, refused, failed = [], [], []
    site.sh("mkdir stress && chmod 777 stress")
    for name in stressors:
        script = f"stress-ng --{name} 2 --timeout {STRESSOR_S} --verify --temp-path {site.folder}/stress 2>&1"
        said = site.lab.run(site.here, "sh", "-c", f"timeout 120 {script}; echo ended with $?", check=False).decode(errors="replace")
        status = int(said.rsplit("ended with ", 1)[1])
        reason = next((line for line in said.splitlines() if re.search(r"disabled|skip|not support|fail|cannot|not impl", line)), "")
        site.say(f"stress-ng {name}: status {status}")
        if status == 0 and not re.search(r"skipp|not implemented|not supported", said):
            passed.append(name)
        elif status in (0, 3, 4) or "No stress workers invoked" in said:
            refused.append(f"{name} ({reason.partition('] ')[2].strip()[:100]})")
        else:
            failed.append(f"{name}: status {status}: {reason or said[-300:]}")
        site.sh("rm -rf stress/*")
    assert not failed, f"{len(failed)} stressors failed: " + "; ".join(failed)
    return f"{len(passed)} of {len(stressors)} stressors pass: {' '.join(passed)}. Refused: {'; '.join(refused) or 'none'}"


PROGRAMS: dict[str, Callable[[Site], str]] = {
    "git": git, "make": build, "sqlite": sqlite, "rsync": rsync, "tar": tar, "cp": copies, "qemu-img": qemu,
    "stress-ng": stress, "postgres": postgres,
}  # fmt: skip


def run(site: Site, names: list[str], say: Say) -> list[Row]:
    rows = []
    site.say = say
    site.lab.run(site.here, "mkdir", site.folder)
    for name in names:
        began = time.monotonic()
        try:
            how, held = PROGRAMS[name](site), True
        except Refused as refused:
            how, held = str(refused), False
        except AssertionError as wrong:
            how, held = str(wrong)[:3000], False
        rows.append(Row(name, how, held, time.monotonic() - began))
        say(f"{name}: {'held' if held else 'DOES NOT HOLD'} after {rows[-1].seconds:.0f} s: {how}")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/real_programs", description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=LAB_DIR_DEFAULT, help="which lab; three nodes")
    parser.add_argument("--nodes", default="n1,n2,n3")
    parser.add_argument("--volume", default="Volume1")
    parser.add_argument("--only", action="append", choices=PROGRAMS, help="may be repeated")
    parser.add_argument("--seconds", type=int, default=300, help="of pgbench without faults")
    parser.add_argument("--repository", type=Path, default=TOP, help="what git clones; by default this one")
    parser.add_argument("--sources", type=Path, help="a repository of a C project, that make builds, too")
    parser.add_argument("--make-arguments", default="", help="for it")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    site = Site(arguments.dir, arguments.volume, tuple(arguments.nodes.split(",")))
    site.seconds, site.repository = arguments.seconds, arguments.repository
    site.sources, site.make_arguments = arguments.sources, arguments.make_arguments
    rows = run(site, arguments.only or list(PROGRAMS), lambda text: print(text, file=sys.stderr, flush=True))
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        shown: list[tuple[Any, ...]] = [(r.what, "yes" if r.held else "NO", f"{r.seconds:.0f} s", r.how) for r in rows]
        print_table(("PROGRAM", "HELD", ">TIME", "HOW"), shown, empty="nothing ran")
    return 0 if all(row.held for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
