"""Node processes: what drive server, coordinator host and mounts have in common, in real processes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from csvfs.cluster.node_process import (
    INCARNATION_ENVIRONMENT,
    LEASE_ENVIRONMENT,
    NODE_INCARNATION_ENVIRONMENT,
    ProcessNumbers,
)
from csvfs.errors import BadRequest

ENDS_IN = """
import sys, trio
from csvfs.cluster import node_process
from csvfs.errors import NotFound, Unavailable

node_process.load_config = lambda: None

async def fail(error):
    raise error

async def wait():
    print("waits", flush=True)
    try:
        await trio.sleep_forever()
    finally:
        print("closes in order", flush=True)

async def main(config, what):
    if what == "waits":
        await node_process.run_until_signalled(wait)
    if what == "two errors":
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, NotFound("no volume v"))
            nursery.start_soon(fail, Unavailable("no store"))
    if what == "a bug":
        await fail(TypeError("a bug"))
    return 3 if what == "a status" else 0

sys.exit(node_process.run_process(main, sys.argv[1]))
"""


def process(what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ENDS_IN, what],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_asked_to_end_closes_in_order_with_status_0(number: int) -> None:
    child = process("waits")
    assert child.stdout is not None and child.stdout.readline() == "waits\n"
    child.send_signal(number)
    out, _ = child.communicate(timeout=60)
    assert (child.returncode, out) == (0, "closes in order\n")


def test_each_error_of_a_process_is_one_line_and_its_status_is_1() -> None:
    child = process("two errors")
    _, said = child.communicate(timeout=60)
    assert child.returncode == 1
    assert sorted(line.rpartition(": ")[2] for line in said.splitlines()) == ["no store", "no volume v"]


def test_a_bug_ends_a_process_with_its_traceback() -> None:
    child = process("a bug")
    _, said = child.communicate(timeout=60)
    assert child.returncode == 1 and "Traceback" in said and "TypeError: a bug" in said


def test_a_process_ends_with_the_status_it_returns() -> None:
    child = process("a status")
    child.communicate(timeout=60)
    assert child.returncode == 3


def test_the_numbers_come_from_the_environment_and_a_process_without_them_says_who_starts_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (INCARNATION_ENVIRONMENT, NODE_INCARNATION_ENVIRONMENT, LEASE_ENVIRONMENT):
        monkeypatch.setenv(name, str(len(name)))
    assert ProcessNumbers.from_environment() == ProcessNumbers(17, 22, 16)
    for wrong in ("", "-1", "one"):
        monkeypatch.setenv(LEASE_ENVIRONMENT, wrong)
        with pytest.raises(BadRequest, match=r"CSVFS_NODE_LEASE is .* started by csvfs node run"):
            ProcessNumbers.from_environment()
