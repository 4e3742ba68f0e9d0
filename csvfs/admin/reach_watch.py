"""Trying the drive servers of the other nodes, and saying which are not reached (cluster/reach.py).

Place      admin floor, a task of `csvfs node run` under the node's lease.
Writer     of `reach/<node>`, which goes with the lease: {unreached, lingering}, written when it changes.
Limits     every LOOK_S one ping to each other node, within the deadline of peers.py.
"""

import logging
from typing import Any

import trio

from csvfs.admin.peers import Peers, open_peers
from csvfs.cluster.membership import View
from csvfs.cluster.reach import UNREACHED_AFTER_S, Report
from csvfs.config import NodeConfig
from csvfs.errors import CsvfsError, Disconnected, NotFound, TimedOut, Unavailable
from csvfs.net.link import Address
from csvfs.net.tls import open_identity
from csvfs.store.interface import ClusterStore
from csvfs.wire.control import pack_value

logger = logging.getLogger(__name__)
LOOK_S = 5.0


class Sightings:
    """Since when each node has not been reached, and where those were that have gone. Pure but for being told."""

    def __init__(self) -> None:
        self._addresses: dict[str, Address] = {}  # as last heard, of nodes up or down
        self._unreached_since: dict[str, float] = {}
        self._answers: dict[str, bool] = {}

    def targets(self, own: str, servers: dict[Any, dict[str, Any]], nodes: Any) -> dict[str, Address]:
        """Whom to try now: all that have a drive server, and those that had one and are still nodes."""
        for node, server in servers.items():
            host, port = server.get("address"), server.get("port")
            if isinstance(host, str) and isinstance(port, int):
                self._addresses[node] = (host, port)
        for node in [node for node in self._addresses if node not in nodes]:
            del self._addresses[node]  # evicted
        return {node: address for node, address in self._addresses.items() if node != own}

    def note(self, node: str, answers: bool, now_s: float) -> None:
        self._answers[node] = answers
        if answers:
            self._unreached_since.pop(node, None)
        else:
            self._unreached_since.setdefault(node, now_s)

    def report(self, servers: Any, alive: Any, now_s: float) -> Report:
        unreached = {
            node
            for node, since in self._unreached_since.items()
            if node in servers and node in alive and now_s - since >= UNREACHED_AFTER_S
        }
        lingering = {
            node for node, answers in self._answers.items() if answers and node in self._addresses and node not in alive
        }
        return Report(frozenset(unreached), frozenset(lingering))


async def report_reach_forever(config: NodeConfig, store: ClusterStore, view: View, lease: int) -> None:
    """Until cancelled, or the lease has ended."""
    sightings = Sightings()
    told: Report | None = None
    async with open_peers(open_identity(config)) as peers:
        while True:
            await _look(peers, sightings, view, config.node)
            report = sightings.report(view.servers, view.alive, trio.current_time())
            if report != told:
                _log_change(told or Report(), report)
                value = {"unreached": sorted(report.unreached), "lingering": sorted(report.lingering)}
                try:
                    await store.put(f"reach/{config.node}", pack_value(value), lease)
                    told = report
                except NotFound:
                    return  # the lease has ended; the heartbeat sees to it
                except Unavailable as error:
                    logger.debug("what this node reaches could not be written down: %s", error)
            await trio.sleep(LOOK_S)


async def _look(peers: Peers, sightings: Sightings, view: View, own: str) -> None:
    async def try_one(node: str, address: Address) -> None:
        try:
            await peers.ping(address, node)
            answers = True
        except (Disconnected, TimedOut, OSError):
            answers = False
        except CsvfsError:
            answers = True  # it refuses, so it is there
        sightings.note(node, answers, trio.current_time())

    async with trio.open_nursery() as nursery:
        for node, address in sightings.targets(own, view.servers, view.nodes).items():
            nursery.start_soon(try_one, node, address)


def _log_change(before: Report, now: Report) -> None:
    for node in sorted(now.unreached - before.unreached):
        logger.warning("the drive server of node %s is not reached, though the cluster store has it", node)
    for node in sorted(before.unreached - now.unreached):
        logger.info("the drive server of node %s is reached again, or gone", node)
