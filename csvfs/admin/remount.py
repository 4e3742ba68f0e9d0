"""`csvfs volume remount`: a new process for this node's mount of a volume, under the programs that use it.

Place      admin floor. The process is killed, and the next one goes on over the same FUSE session
           (mount/held_session.py): so a node gets a new version of the mount without unmounting.
"""

import os
import signal
from dataclasses import dataclass
from typing import Any

import trio

from csvfs.admin.peers import Peers
from csvfs.config import NodeConfig, check_name
from csvfs.errors import Conflict, CsvfsError, Disconnected, TimedOut, Unavailable

ASK_S = 1.0
POLL_S = 0.02


@dataclass(slots=True, frozen=True)
class Remounted:
    """pause_s: until the next process answers; programs wait a little longer."""

    incarnation: int
    pause_s: float


async def remount(config: NodeConfig, peers: Peers, name: str, timeout_s: float) -> Remounted:
    """Replace the process. Returns when the next one serves.

    Raises  Unavailable: no mount of that volume answers here. Conflict: nobody could go on, programs would get errors.
            TimedOut: no process has gone on. Cancel: the process may have been killed.
    """
    check_name(name, "volume")
    before = await _process_of(config, peers, name)
    if not before.get("can_be_followed"):
        raise Conflict(
            f"the mount of {name} cannot be taken over by another process (Linux 6.9 and csvfs node run are needed): "
            "programs would get errors"
        )
    began_s = trio.current_time()
    os.kill(int(before["pid"]), signal.SIGKILL)
    with trio.move_on_after(timeout_s):
        while True:
            try:
                now = await _process_of(config, peers, name)
                if now["incarnation"] > before["incarnation"] and now.get("serves"):
                    return Remounted(int(now["incarnation"]), trio.current_time() - began_s)
            except (Disconnected, TimedOut, Unavailable):
                pass
            await trio.sleep(POLL_S)
    raise TimedOut(f"no process has gone on with the mount of {name} for {timeout_s:g} s; see csvfs why {name}")


async def _process_of(config: NodeConfig, peers: Peers, name: str) -> dict[str, Any]:
    try:
        answer = await peers.local(str(config.mount_socket(name)), "why", ASK_S)
    except CsvfsError as error:
        raise Unavailable(f"no mount of {name} answers on {config.node}: {error}") from None
    process = answer.get("process") if isinstance(answer, dict) else None
    if not isinstance(process, dict) or not all(isinstance(process.get(key), int) for key in ("pid", "incarnation")):
        raise Unavailable(f"the mount of {name} does not say which process it is")
    return process
