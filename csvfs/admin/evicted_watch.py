"""A node that was evicted is told so, and does not run.

Place      admin floor, below node_run.py.
Knows      by the key `evicted/<node>`. The cluster store takes no connection with an evicted node's certificate, so when
           it cannot be reached, the join desks of the nodes that this one knows are asked: they ask for none.
"""

import logging
import time

import trio

from csvfs.admin.cluster_ca import serial_of
from csvfs.admin.cluster_view import EVICTED, read_record
from csvfs.admin.join_admission import desk_of
from csvfs.admin.join_client import ask_standing
from csvfs.cluster.membership import View
from csvfs.config import NodeConfig
from csvfs.errors import Conflict, CsvfsError
from csvfs.store.interface import ClusterStore
from csvfs.store.opening import etcd_place, is_etcd

logger = logging.getLogger(__name__)
LOOK_S = 20.0
EXIT_STATUS = 78  # of `csvfs node run`: systemd does not start it again (examples/csvfs-node.service)


class Evicted(Conflict):
    """This node is not part of the cluster any more."""


async def raise_when_evicted(config: NodeConfig, store: ClusterStore, view: View) -> None:
    """Until cancelled. Raises Evicted."""
    while True:
        when = await _evicted_at(config, store)
        if when:
            raise evicted(config, when)
        with trio.move_on_after(LOOK_S):
            await view.wait_until(lambda: config.node in view.evicted)
            told = view.evicted[config.node].get("when")
            raise evicted(config, told if isinstance(told, int) else 0)


async def _evicted_at(config: NodeConfig, store: ClusterStore) -> int:
    try:
        record = await read_record(store, EVICTED + config.node)
        return 0 if record is None else max(record.number("when"), 1)
    except CsvfsError as error:
        logger.debug("the cluster store does not say whether this node was evicted: %s", error)
    if not is_etcd(config.store):
        return 0
    place = etcd_place(config.store)
    if not place.has_tls:
        return 0
    try:
        serial = serial_of(place.certificate_path.read_text())
        ca = place.ca_path.read_text()
        desks = [desk_of(endpoint) for endpoint in place.endpoints() if endpoint.host != config.address]
    except (CsvfsError, OSError) as error:
        logger.debug("%s", error)
        return 0
    for desk in desks:
        try:
            return await ask_standing(desk, ca, config.node, serial)
        except CsvfsError as error:
            logger.debug("%s", error)
    return 0


def evicted(config: NodeConfig, when: int) -> Evicted:
    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(when))
    where = etcd_place(config.store).directory if is_etcd(config.store) else None
    how = f"move {where} away, then csvfs cluster join with a new token" if where else "csvfs cluster join"
    return Evicted(
        f"node {config.node} was evicted from the cluster on {at} and does not start; to let it in again as a new node:"
        f" {how}"
    )
