"""Creating and deleting volumes: what the host does for volumes in state `creating` and `deleting`.

Place      coordinator floor; above serving.py (links) and slab_state, below host.py.
Creation   remove what an interrupted try left; place and create the metadata slabs; write an empty database
           to them and flush it; then `meta/<name>` and state `online` in one transaction of the cluster
           store.
Deletion   tombstone `deleted/<id>`; delete all copies that can be reached; then the keys. Drives that come
           back later find the tombstone (block/drive_server.py).
A kill at any step: whoever is elected next begins anew; nothing counts before the last transaction.
"""

import logging
import time
from collections.abc import Callable
from random import Random

import trio

from coordinator.background import running
from coordinator.cluster_facts import ClusterFacts
from coordinator.drive_control import DriveControl
from coordinator.metadata import Metadata
from coordinator.metadata_log import MetadataLog
from coordinator.restoration import take_census
from coordinator.service import VolumeSetup
from coordinator.serving import VolumeLinks
from coordinator.slab_book import pack_descriptors
from coordinator.slab_image import SlabImage
from csvfs.block import slab_state
from csvfs.block.bus import Bus
from csvfs.block.placement import DriveSpace, choose_drives
from csvfs.errors import Conflict, CsvfsError, Fenced, NoSpace, Unavailable
from csvfs.ids import METADATA_SLAB_ID_MIN, DriveId, SlabId
from csvfs.net.detours import Paths
from csvfs.net.engine import Engine
from csvfs.store.interface import ClusterStore, Compare, Delete, Item, Put
from csvfs.units import BLOCK_SIZE, MIB
from csvfs.wire.block_messages import SlabDescriptor
from csvfs.wire.control import pack_value, unpack_value

log = logging.getLogger(__name__)

METADATA_COPIES_MAX = 3
METADATA_SIZE_FIRST = 64 * MIB  # of the address space to begin with: with slabs of 4 MiB, 16 slabs
METADATA_SLABS_MAX_FIRST = 4
WRITE_TIMEOUT_S = 20.0
CAS_TRIES_MAX = 10


class _NoOwner:
    """During a creation a failing member ends it: it is begun anew elsewhere."""

    async def slab_failed(
        self, slab: SlabId, epoch: int, drives: list[DriveId], reason: str
    ) -> SlabDescriptor:
        raise Unavailable(f"a drive failed while the volume was being created: {reason}")


async def create_volume(
    setup: VolumeSetup,
    *,
    engine: Engine,
    store: ClusterStore,
    facts: ClusterFacts,
    cluster: bytes,
    rng: Random,
    paths: Paths | None = None,
) -> None:
    """Make the volume's metadata and set it online.

    Raises  NoSpace: too few fault domains for its copies; the message says how many are needed. Fenced,
            NotCoordinator. Unavailable and others: not now. Cancel safe.
    """
    links = VolumeLinks(engine, facts, cluster, setup, paths)
    bus = Bus(links.writes, _NoOwner(), volume=setup.volume, local_node=setup.node)
    try:
        await _remove_copies(setup, links.control, facts)
        spaces = await _spaces(links.control, facts)
        # The data slabs need as many domains as there are copies: to be said now, not at the first write.
        choose_drives(spaces, setup.copies, rng, domain_of=facts.domain_of)
        descriptors = await _create_slabs(setup, links.control, facts, spaces, rng)
        for descriptor in descriptors:
            bus.learn(descriptor)
        async with running(bus.run_forever):
            await _write_database(setup, bus, descriptors)
        await _set_online(setup, store, descriptors)
    finally:
        bus.close()
        links.close()


async def _spaces(control: DriveControl, facts: ClusterFacts) -> list[DriveSpace]:
    spaces: list[DriveSpace] = []
    for node in facts.drive_nodes():
        if facts.server(node) is not None:
            try:
                spaces += [s for s in await control.spaces(node) if facts.takes_slabs(s.drive)]
            except Fenced:
                raise
            except CsvfsError as error:
                log.warning("node %s is left out: %s", node, error)
    return spaces


async def _create_slabs(
    setup: VolumeSetup, control: DriveControl, facts: ClusterFacts, spaces: list[DriveSpace], rng: Random
) -> list[SlabDescriptor]:
    domains = {facts.domain_of(space.node) for space in spaces if space.free_slots > 0}
    copies = min(METADATA_COPIES_MAX, len(domains))
    count = max(1, min(METADATA_SLABS_MAX_FIRST, METADATA_SIZE_FIRST // setup.slab_size))
    descriptors: list[SlabDescriptor] = []
    for number in range(count):
        slab = SlabId(METADATA_SLAB_ID_MIN + number)
        try:
            places = choose_drives(spaces, copies, rng, domain_of=facts.domain_of)
        except NoSpace:
            if descriptors:
                break  # what there is will do to begin with
            raise
        for place in places:
            await control.create_slab(slab, slab_state.EPOCH_FIRST, place.node, place.drive)
        taken = {place.drive for place in places}
        spaces = [DriveSpace(s.drive, s.node, s.free_slots - 1) if s.drive in taken else s for s in spaces]
        descriptors.append(slab_state.new_slab(slab, [(place.drive, place.node) for place in places]))
    return descriptors


async def _write_database(setup: VolumeSetup, bus: Bus, descriptors: list[SlabDescriptor]) -> None:
    """Raises TimedOut, Unavailable: a drive failed meanwhile."""
    image = SlabImage.create(_read_nothing, len(descriptors) * setup.slab_blocks, setup.slab_blocks)
    metadata = Metadata.create(image, setup.volume, time.time_ns())
    try:
        metadata_log = MetadataLog(bus, image, [d.slab for d in descriptors], setup.slab_blocks)
        with trio.move_on_after(WRITE_TIMEOUT_S) as scope:
            async with running(metadata_log.run_forever):
                metadata_log.append(image.take_log())
                await metadata_log.flush()
        if scope.cancelled_caught:
            raise Unavailable(
                f"volume {setup.name}: its drives did not take the metadata in {WRITE_TIMEOUT_S:g} s"
            )
    finally:
        metadata.close()


def _read_nothing(block: int, count: int) -> bytes:
    """New slabs are zeros."""
    return bytes(count * BLOCK_SIZE)


async def _set_online(setup: VolumeSetup, store: ClusterStore, descriptors: list[SlabDescriptor]) -> None:
    meta_key, key = f"meta/{setup.name}", f"volumes/{setup.name}"
    for _ in range(CAS_TRIES_MAX):
        term_item, item, meta = (
            await store.get(f"term/{setup.name}"),
            await store.get(key),
            await store.get(meta_key),
        )
        if term_item is None or unpack_value(term_item.value).get("term") != setup.term:
            raise Fenced(f"volume {setup.name}: term {setup.term} is over")
        if item is None or unpack_value(item.value).get("state") != "creating":
            raise Conflict(f"volume {setup.name} is not being created any more")
        value = {**unpack_value(item.value), "state": "online"}
        value.pop("error", None)
        compares = [
            Compare(term_item.key, term_item.revision),
            Compare(key, item.revision),
            Compare(meta_key, meta.revision if meta else 0),
        ]
        changes: list[Put | Delete] = [
            Put(meta_key, pack_descriptors(descriptors)),
            Put(key, pack_value(value)),
        ]
        if (await store.transact(compares, changes)).succeeded:
            log.info("volume %s is online: %d metadata slabs", setup.name, len(descriptors))
            return
    raise Conflict(f"volume {setup.name} is being changed by others all the time")


async def record_error(store: ClusterStore, name: str, error: str) -> None:
    """Let whoever waits for the volume know why it cannot be created (`volumes/<name>`, field `error`)."""

    def change(value: dict) -> dict | None:
        if value.get("state") != "creating" or value.get("error") == error:
            return None
        return {**value, "error": error}

    await _change_volume(store, name, change)


async def _change_volume(store: ClusterStore, name: str, change: Callable[[dict], dict | None]) -> None:
    for _ in range(CAS_TRIES_MAX):
        item = await store.get(f"volumes/{name}")
        value = None if item is None else change(unpack_value(item.value))
        if item is None or value is None:
            return
        put = Put(item.key, pack_value(value), item.lease)
        if (await store.transact([Compare(item.key, item.revision)], [put])).succeeded:
            return


async def delete_volume(
    setup: VolumeSetup,
    *,
    engine: Engine,
    store: ClusterStore,
    facts: ClusterFacts,
    cluster: bytes,
    paths: Paths | None = None,
) -> None:
    """Remove all that is left of the volume; its keys last.

    Raises  Fenced, Conflict (it is not in state `deleting`), Unavailable: not now; call again.
    """
    await _check_deleting(setup, store)
    tombstone = {"name": setup.name, "when": time.time_ns()}
    await store.put(f"deleted/{setup.volume.hex()}", pack_value(tombstone))
    links = VolumeLinks(engine, facts, cluster, setup, paths)
    try:
        await _remove_copies(setup, links.control, facts)
    finally:
        links.close()
    item = await _check_deleting(setup, store)
    names = (f"meta/{setup.name}", f"owner/{setup.name}", f"term/{setup.name}", item.key)
    changes: list[Put | Delete] = [Delete(name) for name in names]
    if not (await store.transact([Compare(item.key, item.revision)], changes)).succeeded:
        raise Unavailable(f"volume {setup.name} was changed while it was being deleted")
    log.info("volume %s is deleted", setup.name)


async def _check_deleting(setup: VolumeSetup, store: ClusterStore) -> Item:
    item = await store.get(f"volumes/{setup.name}")
    value = {} if item is None else unpack_value(item.value)
    if item is None or value.get("state") != "deleting" or value.get("id") != setup.volume:
        raise Conflict(f"volume {setup.name} is not being deleted")
    return item


async def _remove_copies(setup: VolumeSetup, control: DriveControl, facts: ClusterFacts) -> None:
    """All copies of the volume that can be reached. The census registers our term, so no older one makes
    more."""
    census = await take_census(control, facts, setup.volume, facts.drive_nodes())
    for slab, drives in census.copies.items():
        for drive in drives:
            await control.delete_slab(slab, census.node_of[drive], drive)
