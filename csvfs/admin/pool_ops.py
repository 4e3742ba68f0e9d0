"""Making the cluster and its one pool: keys of the cluster store, each created once.

Place      admin floor.
"""

import secrets
import time

from csvfs.admin.cluster_view import CLUSTER_KEY, POOL_KEY, Record, read_record
from csvfs.cluster.departures import LIMIT_DEFAULT
from csvfs.config import check_name
from csvfs.errors import BadRequest, Conflict, Exists, NotFound
from csvfs.ids import PoolId
from csvfs.store.interface import ClusterStore, Compare, Put
from csvfs.units import SLAB_SIZE_DEFAULT, SLAB_SIZE_MAX, SLAB_SIZE_MIN, format_size
from csvfs.wire.control import pack_value


def check_slab_size(size: int) -> None:
    """Raises BadRequest unless `size` is a power of two within limits."""
    if not SLAB_SIZE_MIN <= size <= SLAB_SIZE_MAX or size & (size - 1):
        raise BadRequest(
            f"slabs of {size} bytes are not possible: use a power of two from {format_size(SLAB_SIZE_MIN)} "
            f"to {format_size(SLAB_SIZE_MAX)}, such as {format_size(SLAB_SIZE_DEFAULT)}"
        )


async def create_cluster(store: ClusterStore, name: str) -> Record:
    """Create the key `cluster`. Raises BadRequest, Exists, Unavailable. Cancel: it may exist afterwards."""
    check_name(name, "cluster")
    value = {
        "id": secrets.token_bytes(16), "name": name, "created": time.time_ns(), "quarantine": LIMIT_DEFAULT,
    }  # fmt: skip
    if not (await store.transact([Compare(CLUSTER_KEY, 0)], [Put(CLUSTER_KEY, pack_value(value))])).succeeded:
        existing = await read_record(store, CLUSTER_KEY)
        raise Exists(
            f"this cluster store already holds the cluster {existing.text('name') if existing else ''!r}"
        )
    return Record(CLUSTER_KEY, value, 0)


async def set_quarantine(store: ClusterStore, departures: int) -> Record:
    """After how many departures within an hour a node is quarantined; 0: never. Raises NotFound, Conflict."""
    return await _set(store, await require_cluster(store), quarantine=departures)


async def _set(store: ClusterStore, record: Record, **values: object) -> Record:
    """Raises Conflict."""
    put = Put(record.key, record.packed_with(**values), record.lease)
    result = await store.transact([Compare(record.key, record.revision)], [put])
    if not result.succeeded:
        raise Conflict(f"the {record.key} was changed by somebody else meanwhile; try again")
    return Record(record.key, {**record.value, **values}, result.revision)


async def create_pool(store: ClusterStore, name: str, slab_size: int) -> Record:
    """Create the key `pool`. Raises BadRequest, Exists, NotFound (no cluster yet), Unavailable."""
    check_name(name, "pool")
    check_slab_size(slab_size)
    await require_cluster(store)
    value = {"id": PoolId(secrets.token_bytes(16)), "name": name, "slab_size": slab_size}
    if not (await store.transact([Compare(POOL_KEY, 0)], [Put(POOL_KEY, pack_value(value))])).succeeded:
        existing = await read_record(store, POOL_KEY)
        raise Exists(
            f"the cluster already has its pool {existing.text('name') if existing else ''!r}: "
            "add drives with csvfs drive add"
        )
    return Record(POOL_KEY, value, 0)


async def set_auto_claim(store: ClusterStore, on: bool) -> Record:
    """Whether nodes claim eligible drives by themselves. Raises NotFound (no pool), Conflict, Unavailable."""
    return await _set(store, await require_pool(store), auto_claim=on)


async def require_cluster(store: ClusterStore) -> Record:
    """Raises NotFound, saying how to make a cluster."""
    cluster = await read_record(store, CLUSTER_KEY)
    if cluster is None:
        raise NotFound("there is no cluster in this cluster store yet: csvfs cluster create NAME")
    return cluster


async def require_pool(store: ClusterStore) -> Record:
    """Raises NotFound, saying how to make a pool."""
    pool = await read_record(store, POOL_KEY)
    if pool is None:
        raise NotFound("there is no pool yet: csvfs pool create")
    return pool
