"""A PostgreSQL database on a volume of a lab, for real.py: its commands on any node, pgbench, and its own checks.

Place      tests, over lab_cluster.py. The server of a node that loses its power is killed here: it hides its environment, by
           which a lab knows its processes.
Accounts   pgbench keeps a history of what it adds to which balance: all sums must be the same, and no transaction that it
           was told of may be missing. One on each connection may be there that it was not told of.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.lab_cluster import LabCluster

PORT = 5499
CLIENTS = 4
AS_POSTGRES = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")


@dataclass(slots=True)
class Sums:
    """transactions in the history; the sum of their deltas, which is that of all balances."""

    transactions: int
    deltas: int


class Database:
    def __init__(self, lab: LabCluster, programs: Path, folder: str) -> None:
        """programs: where PostgreSQL's are. folder: on the volume, does not exist."""
        self._lab, self._programs, self.data = lab, programs, folder
        self._local = f"/tmp/pg-{time.time_ns()}"  # socket and log: not on the volume
        self._connect = f"-h {self._local} -p {PORT}"

    def make(self, node: str) -> None:
        made = f"{self.data} {self._local}"
        self._lab.run(node, "sh", "-euc", f"mkdir {made} && chown postgres {made} && chmod 700 {made}")
        self._run(node, f"initdb -D {self.data} --data-checksums -A trust >/dev/null")

    def start(self, node: str) -> None:
        options = f"-k {self._local} -c listen_addresses= -p {PORT}"
        self._run(node, f"pg_ctl -s -w -t 300 -D {self.data} -l {self._local}/log -o '{options}' start || "
                        f"{{ tail -n 40 {self._local}/log >&2; exit 1; }}")  # fmt: skip

    def stop(self, node: str, mode: str) -> None:
        """mode: `fast`, in order; `immediate`: as in a crash, the next start recovers from the log."""
        self._run(node, f"pg_ctl -s -t 300 -D {self.data} -m {mode} stop")

    def fill(self, node: str, scale: int) -> None:
        self._run(node, f"createdb {self._connect} bench && pgbench {self._connect} -q -i -s {scale} bench 2>&1")

    def bench(self, seconds: int) -> subprocess.Popen[bytes]:
        """pgbench, on this machine itself: it outlives the node whose server it talks to."""
        command = self._shell(f"exec pgbench {self._connect} -n -c {CLIENTS} -j 2 -T {seconds} bench 2>&1")
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def sums(self, node: str) -> Sums:
        """Raises AssertionError: sums differ."""
        query = (
            "select (select count(*) from pgbench_history), (select coalesce(sum(delta), 0) from pgbench_history), "
            "(select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), "
            "(select sum(tbalance) from pgbench_tellers)"
        )
        command = f'psql {self._connect} -At -F " " -c "{query}" bench'
        count, *sums = (int(value) for value in self._run(node, command).split())
        assert len(set(sums)) == 1, f"sums of deltas, accounts, branches and tellers differ: {sums}"
        return Sums(count, sums[0])

    def check(self, node: str) -> None:
        """Tables and their indexes, by pg_amcheck. Raises AssertionError."""
        self._run(node, f"pg_amcheck {self._connect} --install-missing --heapallindexed --parent-check bench 2>&1")

    def verify_checksums(self, node: str) -> str:
        """Of all pages of a database that does not run; what pg_checksums says. Raises AssertionError: one is wrong."""
        return self._run(node, f"pg_checksums --check -D {self.data} 2>&1")

    def processes(self, node: str) -> list[int]:
        """Of the server; it runs."""
        first = int(self._lab.run(node, "head", "-1", f"{self.data}/postmaster.pid"))
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(first)], capture_output=True, text=True, check=False)
        return [first, *map(int, children.stdout.split())]

    def kill(self, processes: list[int]) -> None:
        """kill -9, and wait until they are gone. Raises AssertionError."""
        for pid in processes:
            if _is_postgres(pid):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while left := [pid for pid in processes if _is_postgres(pid)]:
            assert time.monotonic() < deadline, f"processes {left} of PostgreSQL were killed and do not die"
            time.sleep(0.05)

    def forget(self) -> None:
        subprocess.run(["rm", "-rf", self._local], check=True)

    def _shell(self, command: str) -> tuple[str, ...]:
        script = f"cd /tmp; export PATH={self._programs}:/usr/bin:/bin HOME=/tmp LC_ALL=C; {command}"
        return (*AS_POSTGRES, "sh", "-euc", script)

    def _run(self, node: str, command: str) -> str:
        return self._lab.run(node, *self._shell(command)).decode(errors="replace")


def number_in(text: str, pattern: str) -> int:
    """Raises AssertionError: pgbench does not say it."""
    found = re.search(pattern, text)
    assert found is not None, text[-3000:]
    return int(found.group(1))


def _is_postgres(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    name, _, rest = stat.partition(" (")[2].rpartition(") ")
    return name == "postgres" and not rest.startswith("Z")
