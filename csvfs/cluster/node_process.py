"""What the processes of a node have in common: their numbers, how they are asked to end, their exit status.

Place      cluster floor. `csvfs node run` (admin/node_run.py) gives the numbers; drive server, coordinator host and
           mounts are run by `run_process`.
Beat       A process whose one thread hangs in the kernel cannot say so. So one that may (the drive server) writes a byte
           into a pipe every BEAT_S, and its parent replaces it when none comes any more (admin/child.py).
Ends       status 0: asked to by SIGTERM or SIGINT, or whatever the process returns; 1: a CsvfsError, each logged as
           one line. Any other exception is a bug: its traceback, and the parent starts the next incarnation.
"""

import logging
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from csvfs.config import load_config
from csvfs.errors import BadRequest, CsvfsError, leaves
from csvfs.ids import Incarnation

log = logging.getLogger(__name__)

LEASE_ENVIRONMENT = "CSVFS_NODE_LEASE"
NODE_INCARNATION_ENVIRONMENT = "CSVFS_NODE_INCARNATION"
INCARNATION_ENVIRONMENT = "CSVFS_INCARNATION"
ROLE_ENVIRONMENT = "CSVFS_ROLE"
BEAT_ENVIRONMENT = "CSVFS_BEAT"  # a descriptor of a pipe
BEAT_S = 0.5


@dataclass(slots=True, frozen=True)
class ProcessNumbers:
    """`incarnation`: of this process. `node_incarnation`, `lease`: of the node's lease in the cluster store."""

    incarnation: Incarnation
    node_incarnation: Incarnation
    lease: int

    @classmethod
    def from_environment(cls) -> "ProcessNumbers":
        """Raises BadRequest."""
        return cls(
            Incarnation(_number(INCARNATION_ENVIRONMENT)),
            Incarnation(_number(NODE_INCARNATION_ENVIRONMENT)),
            _number(LEASE_ENVIRONMENT),
        )


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise BadRequest(f"{name} is {text!r}, not a number; this process is started by csvfs node run")
    return int(text)


async def run_until_signalled(run: Callable[[], Awaitable[None]]) -> None:
    """`run()`, cancelled by SIGTERM or SIGINT. Raises groups of what it raises."""
    async with trio.open_nursery() as nursery:
        await nursery.start(call_when_signalled, nursery.cancel_scope.cancel)
        await run()
        nursery.cancel_scope.cancel()


async def beat_forever() -> None:
    """Show the parent that trio's loop runs, if it looks."""
    text = os.environ.get(BEAT_ENVIRONMENT, "")
    if not text.isdecimal():
        return
    while True:
        try:
            os.write(int(text), b".")
        except BlockingIOError:
            pass  # the parent has enough of them, or hangs itself
        except OSError as error:
            log.warning("no beats any more: %s", error)
            return
        await trio.sleep(BEAT_S)


async def call_when_signalled(
    end: Callable[[], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Until cancelled: call `end` whenever SIGTERM or SIGINT comes."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            end()


def run_process(main: Callable[..., Awaitable[int]], *args: Any) -> int:
    """Run `main(config, *args)` in trio; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return trio.run(main, load_config(), *args)
    except* CsvfsError as errors:
        for error in leaves(errors):
            log.error("%s", error)
        status = 1
    return status
