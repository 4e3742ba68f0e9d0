"""Election: who becomes the coordinator of a volume that has none.

Place      cluster floor. `decide` is pure; `take_ownership` and `release_ownership` are its hands in the
           store.
How        Every host computes the same order of candidates from the same view and waits according to its
           rank, so that normally one host tries. That is courtesy, not safety: of several that try, the
           store's compare-and-swap lets exactly one through.

Invariants
  L1  `owner/<name>` is created only where it is absent (or is this very host's), and in the same transaction
      `term/<name>` is raised. So no term is ever held by two hosts, and terms only grow (I1).
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from csvfs.cluster.membership import item_map
from csvfs.errors import Conflict
from csvfs.ids import Incarnation, NodeName, Term
from csvfs.store.interface import ClusterStore, Compare, Delete, Item, Put
from csvfs.wire.control import pack_value

RANK_DELAY_NS = (
    200_000_000  # longer than a takeover transaction on a slow disk, short beside the 1 s of failover
)
_TRIES_MAX = 10


@dataclass(slots=True, frozen=True)
class Attempt:
    """Try to take `volume` at `start_ns` (CLOCK_MONOTONIC), unless it has an owner by then."""

    volume: str
    start_ns: int


def decide(
    node: NodeName,
    volumes: Iterable[str],
    owners: Mapping[str, NodeName],
    alive: Collection[NodeName],
    preferred: Mapping[str, NodeName],
    now_ns: int,
) -> list[Attempt]:
    """What `node` should try to take.

    Args     volumes: the names of those that want an owner. owners: volume -> node, those that have one.
             alive: nodes with a coordinator host. preferred: volume -> node, where somebody said so.
             now_ns: since when the volumes have been without owner, as far as this node knows.
    Returns  one attempt per volume without owner, by volume name; none when `node` is not itself alive.

    The preferred node goes first, then whoever owns the fewest volumes, then by name. A volume counts as its
    first candidate's at once, so that several volumes that lose their owner together are spread too.
    """
    owned = dict.fromkeys(alive, 0)
    for owner in owners.values():
        if owner in owned:
            owned[owner] += 1
    attempts: list[Attempt] = []
    for volume in sorted(volumes):
        if node not in owned or volume in owners:
            continue
        wanted = preferred.get(volume)
        candidates = sorted(owned, key=lambda name: (name != wanted, owned[name], name))
        attempts.append(Attempt(volume, now_ns + candidates.index(node) * RANK_DELAY_NS))
        owned[candidates[0]] += 1
    return attempts


async def take_ownership(
    store: ClusterStore,
    volume_name: str,
    node: NodeName,
    address: str,
    port: int,
    host_incarnation: Incarnation,
    lease: int,
) -> Term | None:
    """Make this host the coordinator of a volume that has none.

    Args     lease: of the node; when it ends, so does the ownership.
    Returns  the new term, or None: another has it. A host that owns the volume already (the answer of an
             earlier try was lost) gets a fresh term: whatever ran under the earlier one is over.
    Raises   Unavailable: it may or may not have happened; call again. NotFound: the lease has ended.
    Cancel   safe; it may or may not have happened.
    """
    owner_key, term_key = f"owner/{volume_name}", f"term/{volume_name}"
    owner = {"node": node, "address": address, "port": port, "incarnation": host_incarnation}
    for _ in range(_TRIES_MAX):
        owner_item = await store.get(owner_key)
        if owner_item is not None and not _is_host(owner_item, node, host_incarnation):
            return None
        term_item = await store.get(term_key)
        term = Term(_term(term_item) + 1)
        compares = [
            Compare(owner_key, owner_item.revision if owner_item else 0),
            Compare(term_key, term_item.revision if term_item else 0),
        ]
        changes: list[Put | Delete] = [
            Put(owner_key, pack_value(owner), lease),
            Put(term_key, pack_value({"term": term})),
        ]
        if (await store.transact(compares, changes)).succeeded:
            return term
    raise Conflict(
        f"volume {volume_name}: its owner changed {_TRIES_MAX} times while {node} tried to take it"
    )


async def release_ownership(
    store: ClusterStore, volume_name: str, node: NodeName, host_incarnation: Incarnation
) -> bool:
    """Give the volume up; False: it was not this host's (any more), and nothing was changed. Raises
    Unavailable."""
    key = f"owner/{volume_name}"
    item = await store.get(key)
    if item is None or not _is_host(item, node, host_incarnation):
        return False
    return (await store.transact([Compare(key, item.revision)], [Delete(key)])).succeeded


async def release_host(store: ClusterStore, node: NodeName, host_incarnation: Incarnation) -> list[str]:
    """Give up all that a coordinator host owned, after it died; returns the volumes' names. Raises
    Unavailable."""
    return await _release(store, node, lambda incarnation: incarnation == host_incarnation)


async def release_earlier_hosts(store: ClusterStore, node: NodeName, host_incarnation: Incarnation) -> list[str]:
    """Give up what hosts of `node` before `host_incarnation` owned: they are dead. As release_host.

    Where the store could not be reached when one died, and the node's lease outlived that (a leader of etcd
    counts leases anew when it is elected), nobody else would.
    """
    return await _release(store, node, lambda incarnation: incarnation < host_incarnation)


async def _release(store: ClusterStore, node: NodeName, is_dead: Callable[[int], bool]) -> list[str]:
    released = []
    for item in await store.list("owner/"):
        value = item_map(item)
        incarnation = value.get("incarnation")
        if value.get("node") == node and isinstance(incarnation, int) and is_dead(incarnation):
            volume_name = item.key.removeprefix("owner/")
            if await release_ownership(store, volume_name, node, Incarnation(incarnation)):
                released.append(volume_name)
    return released


def _is_host(item: Item, node: NodeName, host_incarnation: Incarnation) -> bool:
    value = item_map(item)
    return value.get("node") == node and value.get("incarnation") == host_incarnation


def _term(item: Item | None) -> int:
    if item is None:
        return 0
    term = item_map(item).get("term")
    if isinstance(term, int) and term >= 0:
        return term
    # Not taken as 0: a term that goes back would let a deposed coordinator write.
    raise Conflict(f"{item.key} holds no term: {item.value[:32]!r}; restore the cluster store")
