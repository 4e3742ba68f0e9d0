"""Creating, moving and deleting volumes: the command changes one key, the cluster does the work.

Place      admin floor.
Rule       every change of a `volumes/<name>` key is a compare-and-swap on the revision it was decided upon.
Waiting    by watches of the cluster store, with a deadline; nothing here hangs.
"""

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from csvfs.admin.cluster_view import (
    OWNERS,
    VOLUME_CREATING,
    VOLUME_DELETING,
    VOLUME_ONLINE,
    VOLUMES,
    ClusterView,
    Record,
    read_cluster_view,
    record_of,
)
from csvfs.admin.mount_points import mounted_paths
from csvfs.admin.peers import Peers
from csvfs.admin.pool_ops import require_pool
from csvfs.config import check_name
from csvfs.errors import (
    BadRequest,
    Conflict,
    CsvfsError,
    Exists,
    NotEmpty,
    NotFound,
    ProtocolError,
    TimedOut,
    Unavailable,
)
from csvfs.fault_domains import LEVEL_DEFAULT, LEVELS, Level, counted, verb
from csvfs.store.interface import ClusterStore, Compare, Item, Put
from csvfs.units import MIB, format_size
from csvfs.wire.control import pack_value

VOLUME_SIZE_MIN = 64 * MIB
COPIES_MAX = 3
CHANGE_ATTEMPTS = 10
SET_TIMEOUT_S = 30.0  # it looks at all slabs
MOUNT_POLL_S = 0.05  # the kernel does not tell about mounts of another process in any simpler way


# -- what may be asked for ---------------------------------------------------------------------------


def copies_of(resiliency: str, copies: int | None) -> int:
    """The number of copies that was meant. Raises BadRequest."""
    if resiliency == "simple":
        if copies not in (None, 1):
            raise BadRequest(
                f"a simple volume has one copy, not {copies}: leave out --copies or use --resiliency mirror"
            )
        return 1
    if resiliency != "mirror":
        raise BadRequest(f"{resiliency!r} is no resiliency: use simple or mirror")
    if copies is None:
        return COPIES_MAX
    if copies not in (2, COPIES_MAX):
        raise BadRequest(f"a mirror has 2 or 3 copies, not {copies}")
    return copies


def check_size(size: int) -> None:
    """`size` in bytes, 0 for as large as the pool. Raises BadRequest."""
    if size != 0 and size < VOLUME_SIZE_MIN:
        raise BadRequest(
            f"a volume of {format_size(size)} is too small: at least {format_size(VOLUME_SIZE_MIN)}"
        )
    if size >= 1 << 62:
        raise BadRequest(
            f"a volume of {size} bytes is larger than any pool: leave out --size to use the whole pool"
        )


def check_min_copies(min_copies: int, copies: int) -> None:
    """Raises BadRequest: a volume never has more copies in sync than it has copies."""
    if not 1 <= min_copies <= copies:
        raise BadRequest(f"--min-copies {min_copies} of a volume with {copies}: from 1 to {copies}")


async def set_volume(store: ClusterStore, peers: Peers, name: str, **wanted: int) -> dict[str, Any]:
    """Have the coordinator change `size` (bytes, 0: as large as the pool), `copies`, `min_copies` of a volume in use.

    It decides, for it alone knows what is in use at that moment; mounts follow within a moment.
    Returns  what it answers (PROTOCOL.md, `volume_set`).
    Raises   NotFound. BadRequest, NoSpace, Conflict: refused, with the numbers. Unavailable: nobody coordinates it now.
             TimedOut: it may have been done.
    """
    view = await read_cluster_view(store)
    state = view.volume(name).text("state")
    if state != VOLUME_ONLINE:
        raise Conflict(f"volume {name} is {state}: only one that is online can be changed")
    answer = await peers.coordinator_slowly(view, name, "volume_set", SET_TIMEOUT_S, **wanted)
    if not isinstance(answer, dict) or not all(isinstance(value, int) for value in answer.values()):
        raise ProtocolError(f"the coordinator of {name} answers volume_set with {answer!r}")
    return answer


def check_domains(view: ClusterView, copies: int, level: Level = LEVEL_DEFAULT) -> None:
    """Every copy needs a fault domain of its own. BadRequest: how many there are, and what would do."""
    domains = view.domains_with_drives(level)
    count = len(domains)
    if count >= copies:
        return
    wanted = "a simple volume" if copies == 1 else f"a {copies}-way mirror"
    needed = counted(copies, level)
    if not view.drives:
        raise BadRequest(f"{wanted} needs {needed} with drives, there are none: csvfs drive add PATH...")
    there = f"there {verb(count)} {count}"
    if level != "node":
        there += f" ({', '.join(sorted(domains))})" if domains else ""
    down = [node for node in view.node_names if node not in view.alive]
    hint = f" (down: {', '.join(down)})" if down else ""
    instead = {0: "", 1: " or use --resiliency simple", 2: " or use --copies 2"}[count]
    if level != "node" and len(view.nodes_with_drives()) >= copies:
        instead += f" or use --fault-domain {LEVELS[LEVELS.index(level) - 1]}"
    where = "" if level == "node" else f" in another {level}, or say where they are (csvfs domain set)"
    raise BadRequest(f"{wanted} needs {needed} with drives, {there}{hint}: add a node{where}{instead}")


# -- changes -----------------------------------------------------------------------------------------


async def create_volume(
    store: ClusterStore,
    name: str,
    *,
    resiliency: str,
    copies: int | None,
    size: int,
    min_copies: int = 1,
    fault_domain: Level = LEVEL_DEFAULT,
) -> Record:
    """Ask the cluster for a volume; it is there once `wait_volume_online` returns.

    Raises  BadRequest (name, size, copies, too few nodes with drives), NotFound (no pool), Exists,
            Unavailable.
    Cancel  the volume may have been asked for.
    """
    check_name(name, "volume")
    copies = copies_of(resiliency, copies)
    check_size(size)
    check_min_copies(min_copies, copies)
    await require_pool(store)
    view = await read_cluster_view(store)
    if name in view.volumes:
        raise Exists(_exists(view.volumes[name]))
    check_domains(view, copies, fault_domain)
    value = {
        "id": secrets.token_bytes(16),
        "name": name,
        "resiliency": resiliency,
        "copies": copies,
        "size": size,
        "min_copies": min_copies,
        "fault_domain": fault_domain,
        "state": VOLUME_CREATING,
        "created": time.time_ns(),
    }
    key = VOLUMES + name
    if not (await store.transact([Compare(key, 0)], [Put(key, pack_value(value))])).succeeded:
        raise Exists(f"volume {name} was created by somebody else just now")
    return Record(key, value, 0)


def _exists(volume: Record) -> str:
    state = volume.text("state")
    if state == VOLUME_DELETING:
        return f"volume {volume.name} is still being deleted: wait until csvfs volume list no longer shows it"
    return f"there is already a volume {volume.name}, {state}: choose another name"


async def change_volume(store: ClusterStore, name: str, change: Callable[[Record], bytes]) -> Record:
    """Replace the value of a volume's key by what `change` makes of it, again if somebody else was faster.

    Raises  NotFound, Conflict (others change it all the time), what `change` raises, Unavailable.
    """
    for _ in range(CHANGE_ATTEMPTS):
        item = await store.get(VOLUMES + name)
        if item is None:
            raise NotFound(f"no volume {name!r}: see csvfs volume list")
        record = record_of(item)
        changed = change(record)
        if changed == item.value:
            return record
        if (
            await store.transact([Compare(item.key, item.revision)], [Put(item.key, changed, item.lease)])
        ).succeeded:
            return record_of(Item(item.key, changed, 0, item.lease))
    raise Conflict(f"volume {name} is being changed by others all the time: try again")


async def require_empty(view: ClusterView, peers: Peers, name: str) -> None:
    """Raises NotEmpty when the volume holds files; Conflict when nobody can tell."""
    try:
        figures = await peers.coordinator(view, name, "statfs")
        if not isinstance(figures, dict):
            raise ProtocolError(f"the coordinator of {name} answers statfs with {type(figures).__name__}")
        file_count = int(figures["files"]) - int(figures["files_free"])
        if file_count < 1:  # the root directory is always there: whatever this counts, it is not files
            raise ProtocolError(f"the coordinator of {name} counts {file_count} files")
    except (CsvfsError, KeyError, TypeError, ValueError) as error:
        raise Conflict(
            f"cannot find out whether volume {name} is empty ({error}): "
            "use --yes to delete it with all it holds"
        ) from None
    held = file_count - 1
    if held > 0:
        what = "1 file or directory" if held == 1 else f"{held} files and directories"
        raise NotEmpty(f"volume {name} holds {what}: use --yes to delete it with all it holds")


async def require_unused(view: ClusterView, peers: Peers, name: str) -> None:
    """Raises Conflict when programs have files of the volume open, as its mounts said within the last second;
    Unavailable: a mount has just connected and not said yet.

    Where nobody coordinates the volume nobody can tell, and nobody uses it for long: then nothing is raised.
    """
    try:
        answer = await peers.coordinator(view, name, "volume_status")
    except Unavailable:
        return
    sessions = answer.get("sessions") if isinstance(answer, dict) else None
    rows = [row for row in sessions if isinstance(row, dict)] if isinstance(sessions, list) else []
    used = {str(row.get("node")): row.get("open_files") for row in rows}
    silent = [str(row.get("node")) for row in rows if row.get("connected") and row.get("open_files") is None]
    counts = {node: count for node, count in sorted(used.items()) if isinstance(count, int) and count > 0}
    if counts:
        where = ", ".join(f"{count} on {node}" for node, count in counts.items())
        raise Conflict(
            f"volume {name} is in use, files are open: {where}; stop the programs, or let them fail with --force"
        )
    if silent:
        raise Unavailable(f"it is not known yet whether files of volume {name} are open on {', '.join(silent)}: try again")


async def repair_now(store: ClusterStore, peers: Peers, name: str) -> dict[str, Any]:
    """Have the coordinator look for what there is to repair; its answer is that of `volume_status`.

    Raises  NotFound, Unavailable, what it answers.
    """
    view = await read_cluster_view(store)
    view.volume(name)
    answer = await peers.coordinator_slowly(view, name, "repair", SET_TIMEOUT_S)
    if not isinstance(answer, dict):
        raise ProtocolError(f"the coordinator of {name} answers repair with {type(answer).__name__}")
    return answer


async def mark_deleting(store: ClusterStore, name: str, volume_id: bytes) -> Record:
    """Ask the cluster to delete a volume. There is no way back.

    Raises  NotFound; Conflict: the name belongs to another volume by now, which nobody meant; Unavailable.
    """

    def change(volume: Record) -> bytes:
        if volume.id() != volume_id:
            raise Conflict(f"volume {name} was deleted and created anew meanwhile: nothing was done")
        return volume.packed_with(state=VOLUME_DELETING)

    return await change_volume(store, name, change)


async def prefer_node(store: ClusterStore, view: ClusterView, name: str, node: str) -> Record:
    """Ask the cluster to coordinate the volume on `node`. Raises NotFound, Unavailable (the node is down)."""
    view.volume(name)
    if node not in view.node_names:
        raise NotFound(f"no node {node!r}; there are: {', '.join(view.node_names) or 'none'}")
    if node not in view.alive:
        raise Unavailable(
            f"node {node} is down: start it, or choose one of {', '.join(sorted(view.alive)) or 'none'}"
        )

    return await change_volume(store, name, lambda volume: _with_preferred(volume, node))


async def set_preferred(store: ClusterStore, name: str, node: str | None) -> Record:
    """Say which node shall coordinate the volume whenever it can; None: whichever, as evenly as possible.

    Raises  NotFound, Conflict, Unavailable: of the cluster store.
    """
    view = await read_cluster_view(store)
    view.volume(name)
    if node is not None and node not in view.node_names:
        raise NotFound(f"no node {node!r}; there are: {', '.join(view.node_names) or 'none'}")
    return await change_volume(store, name, lambda volume: _with_preferred(volume, node))


def _with_preferred(volume: Record, node: str | None) -> bytes:
    if volume.text("state") != VOLUME_ONLINE:
        raise Conflict(f"volume {volume.name} is {volume.text('state')}: only one that is online can be moved")
    return volume.packed_with(preferred=node)


# -- waiting -----------------------------------------------------------------------------------------


async def wait_key(
    store: ClusterStore, key: str, done: Callable[[Record | None], bool], timeout_s: float
) -> bool:
    """Wait until `done(record or None)` for the key; passes on what it raises. False: the time is over."""
    with trio.move_on_after(timeout_s):
        async with store.watch(key) as batches:
            item = await store.get(key)
            if done(None if item is None else record_of(item)):
                return True
            async for batch in batches:
                for change in batch:
                    if change.key == key and done(None if change.item is None else record_of(change.item)):
                        return True
    return False


async def wait_volume_online(store: ClusterStore, name: str, timeout_s: float) -> None:
    """Raises CsvfsError with the reason the cluster gives; NotFound (deleted meanwhile); TimedOut."""

    def online(volume: Record | None) -> bool:
        if volume is None:
            raise NotFound(f"volume {name} was deleted while it was being created")
        if volume.text("error"):
            raise CsvfsError(
                f"volume {name} could not be created: {volume.text('error')}; "
                f"remove it with csvfs volume delete {name} --yes and try again"
            )
        return volume.text("state") == VOLUME_ONLINE

    if not await wait_key(store, VOLUMES + name, online, timeout_s):
        raise TimedOut(
            f"volume {name} is not online after {timeout_s:g} s; it may still come: see csvfs status and the "
            "coordinator's log"
        )


async def wait_volume_gone(store: ClusterStore, name: str, timeout_s: float) -> None:
    """Raises TimedOut."""
    if not await wait_key(store, VOLUMES + name, lambda volume: volume is None, timeout_s):
        raise TimedOut(
            f"volume {name} is still being deleted after {timeout_s:g} s; it goes on: see csvfs volume list"
        )


async def wait_owner(store: ClusterStore, name: str, node: str, timeout_s: float) -> None:
    """Wait until `node` coordinates the volume. Raises TimedOut."""

    def moved(owner: Record | None) -> bool:
        return owner is not None and owner.text("node") == node

    if not await wait_key(store, OWNERS + name, moved, timeout_s):
        raise TimedOut(
            f"volume {name} has not moved to {node} within {timeout_s:g} s; {node} stays preferred: "
            f"see csvfs volume status {name}"
        )


async def wait_mounted(path: Path, timeout_s: float) -> None:
    """Wait until something is mounted at `path` here. Never touches `path`: a stuck mount would hang us.

    Raises TimedOut.
    """
    with trio.move_on_after(timeout_s):
        while os.fsencode(path) not in mounted_paths():
            await trio.sleep(MOUNT_POLL_S)
        return
    raise TimedOut(
        f"the volume is online, but after {timeout_s:g} s not mounted at {path}: "
        "see the log of this node's csvfs node run"
    )
