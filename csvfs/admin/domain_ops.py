"""Fault domains: where nodes stand, at which level volumes keep their copies apart, and what a change would mean.

Place      admin floor. Changes `place` of the keys `nodes/<node>` and `fault_domain` of `volumes/<name>`; coordinators
           see it at once, place new slabs accordingly, and move copies apart: copy first, then drop.
Rule       what is said of a change before it is made is what the coordinators count in their slabs. A change that
           leaves a volume worse off than it can be mended is refused unless it is forced; the transaction compares
           all nodes and volumes that it was decided upon.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio

from csvfs.admin.cluster_view import VOLUME_ONLINE, ClusterView, Record, read_cluster_view
from csvfs.admin.drive_life import free_slots
from csvfs.admin.peers import Peers, answer_or_error
from csvfs.block.capacity import missing_slots
from csvfs.config import parse_place
from csvfs.errors import BadRequest, Conflict, NotFound, ProtocolError
from csvfs.fault_domains import LEVELS, Level, Place, counted, domain_at, verb
from csvfs.store.interface import ClusterStore, Compare, Delete, Put
from csvfs.units import SLAB_SIZE_DEFAULT, format_size

CHANGE_ATTEMPTS = 5
COUNT_TIMEOUT_S = 30.0  # a coordinator looks at all slabs of its volume
FILE_SIZE_MAX = 1 << 20


@dataclass(slots=True, frozen=True)
class Change:
    """Places of some nodes, levels of some volumes: as they shall be."""

    places: Mapping[str, Place]
    levels: Mapping[str, Level]

    def place_of(self, view: ClusterView, node: str) -> Place:
        return self.places.get(node) or view.place_of(node)

    def domains_of(self, view: ClusterView, level: Level) -> dict[str, str]:
        """By node."""
        return {node: domain_at(level, node, self.place_of(view, node)) for node in view.node_names}


@dataclass(slots=True)
class Effect:
    """What a change means for one volume. `domains`: those with drives; bytes of copies."""

    volume: str
    level: Level
    copies: int
    domains_before: int
    domains: int
    slabs: int = 0
    misplaced: int = 0  # of them: two copies in one domain
    to_move: int = 0
    without_place: int = 0
    unknown: str = ""  # why its slabs could not be counted

    @property
    def objection(self) -> str:
        """Why it cannot be satisfied; empty: it can, or is no worse off than before."""
        if self.domains < self.copies and self.domains < self.domains_before:
            return (
                f"volume {self.volume} keeps {self.copies} copies in {counted(self.copies, self.level)}, and there "
                f"would be {self.domains} with drives"
            )
        if self.without_place and self.domains >= self.copies:
            return (
                f"volume {self.volume} would have two copies in one {self.level} in {self.misplaced} of {self.slabs} "
                f"slabs, and for {format_size(self.without_place)} of {format_size(self.to_move)} there is no place "
                "elsewhere"
            )
        if self.unknown:
            return f"volume {self.volume} cannot be asked how many slabs would have to move: {self.unknown}"
        return ""

    @property
    def text(self) -> str:
        """One line for people."""
        there = f"{counted(self.domains, self.level)} with drives for {self.copies} copies"
        if self.objection:
            return f"{self.objection} ({there})" if self.unknown else self.objection
        if not self.misplaced:
            return f"volume {self.volume}: {there}, no slab has to move"
        moves = f"{format_size(self.to_move)} in {self.misplaced} of {self.slabs} slabs"
        if self.domains < self.copies:
            return f"volume {self.volume}: {there}; {moves} stay where they are"
        return f"volume {self.volume}: {there}; {moves} are moved: copied first, then given up"


# -- what is asked for -------------------------------------------------------------------------------


def changed_place(place: Place, site: str | None, rack: str | None, chassis: str | None) -> Place:
    """`place` with what is not None replaced; empty: not said any more. Raises BadRequest."""
    given = {"site": site, "rack": rack, "chassis": chassis}
    parse_place({level: name for level, name in given.items() if name}, "the place")
    return replace(place, **{level: name for level, name in given.items() if name is not None})


def read_places(path: Path) -> dict[str, Place]:
    """The file of `csvfs domain load`: a table `[nodes.NAME]` for every node. Raises BadRequest, OSError."""
    with path.open("rb") as file:
        text = file.read(FILE_SIZE_MAX + 1)
    if len(text) > FILE_SIZE_MAX:
        raise BadRequest(f"{path} is larger than {FILE_SIZE_MAX} bytes: it is no list of nodes")
    try:
        table = tomllib.loads(text.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadRequest(f"{path} is not TOML: {error}") from None
    nodes = table.get("nodes")
    if set(table) != {"nodes"} or not isinstance(nodes, dict):
        raise BadRequest(f'{path}: write [nodes.n1], then site = "...", rack = "...", chassis = "..."')
    return {node: parse_place(value, f"{path}: nodes.{node}") for node, value in nodes.items()}


def check_nodes(view: ClusterView, places: Mapping[str, Place], *, all_of_them: bool) -> None:
    """Raises NotFound: a node is unknown; BadRequest: one is left out."""
    there_are = ", ".join(view.node_names) or "none"
    for node in places:
        if node not in view.nodes:
            raise NotFound(f"no node {node!r}; there are: {there_are}. Before its first start node.toml says its place")
    left_out = [node for node in view.nodes if node not in places]
    if all_of_them and left_out:
        raise BadRequest(f"nothing is said of {', '.join(left_out)}: name every node, one without a place as [nodes.NAME]")


# -- what it means -----------------------------------------------------------------------------------


async def effects(view: ClusterView, peers: Peers, change: Change) -> list[Effect]:
    """Of the volumes that a change touches. Cancel safe."""
    found = []
    for name, record in sorted(view.volumes.items()):
        before, level = view.level_of(name), change.levels.get(name) or view.level_of(name)
        domains = change.domains_of(view, level)
        if level == before and domains == {node: view.domain_of(node, before) for node in view.node_names}:
            continue
        with_drives = view.nodes_with_drives(up=False)
        there_are = len({domains[node] for node in with_drives})
        there_were = len({view.domain_of(node, level) for node in with_drives})
        if level != before:  # more was promised than before: it has to be there
            there_were = max(there_were, there_are + 1)
        found.append(Effect(name, level, record.number("copies", 1), there_were, there_are))
    await _count(view, peers, change, found)
    return found


async def _count(view: ClusterView, peers: Peers, change: Change, found: list[Effect]) -> None:
    """Have the coordinators count in their slabs."""
    places = {node: place.to_map() for node, place in change.places.items()}
    answers: dict[str, Any] = {}
    errors: dict[str, str] = {}
    free: dict[str, int] = {}

    async def ask_room() -> None:
        free.update(await free_slots(view, peers))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask_room)
        for effect in found:
            if view.volumes[effect.volume].text("state") == VOLUME_ONLINE:
                call = peers.coordinator_slowly(
                    view, effect.volume, "misplaced", COUNT_TIMEOUT_S, level=effect.level, places=places
                )
                nursery.start_soon(answer_or_error, call, effect.volume, answers, errors)
    slab_size = view.pool.number("slab_size", SLAB_SIZE_DEFAULT) if view.pool else SLAB_SIZE_DEFAULT
    for effect in found:
        effect.unknown = errors.get(effect.volume, "")
        if effect.volume in answers:
            groups = _learn(effect, answers[effect.volume], change.domains_of(view, effect.level))
            effect.to_move = sum(count for _, count in groups) * slab_size
            effect.without_place = missing_slots(groups, free) * slab_size


def _learn(effect: Effect, answer: Any, domains: Mapping[str, str]) -> list[tuple[frozenset[str], int]]:
    """What the coordinator says; returns the copies to be moved, with the nodes where they cannot go."""
    try:
        effect.slabs, effect.misplaced = int(answer["slabs"]), int(answer["misplaced"])
        groups = []
        for nodes, count in answer["groups"]:
            taken = {domains.get(str(node)) for node in nodes}
            ruled_out = frozenset(node for node, domain in domains.items() if domain in taken)
            groups.append((ruled_out, int(count)))
        return groups
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(
            f"the coordinator of {effect.volume} answered misplaced with nonsense: {error!r}"
        ) from None


def refuse(found: list[Effect]) -> None:
    """Raises Conflict when a volume cannot be satisfied."""
    objections = [effect.objection for effect in found if effect.objection]
    if objections:
        raise Conflict(f"{'; '.join(objections)}: nothing was changed. Add drives elsewhere first, or use --force")


# -- doing it ----------------------------------------------------------------------------------------


async def apply(
    store: ClusterStore, peers: Peers, change: Change, *, all_nodes: bool = False, force: bool = False,
    dry_run: bool = False,
) -> list[Effect]:  # fmt: skip
    """Change places and levels at once, or nothing; returns what it means.

    Raises  NotFound, BadRequest: see check_nodes. Conflict: refused (see `refuse`), or the cluster is being changed
            by others all the time. Unavailable.
    """
    for _ in range(CHANGE_ATTEMPTS):
        view = await read_cluster_view(store)
        check_nodes(view, change.places, all_of_them=all_nodes)
        for name in change.levels:
            view.volume(name)
        found = await effects(view, peers, change)
        if dry_run:
            return found
        if not force:
            refuse(found)
        puts: list[Put | Delete] = [_put(view.nodes[node], place=place.to_map()) for node, place in change.places.items()]
        puts += [_put(view.volumes[name], fault_domain=level) for name, level in change.levels.items()]
        decided_upon = [*view.nodes.values(), *view.volumes.values()]
        compares = [Compare(record.key, record.revision) for record in decided_upon]
        if (await store.transact(compares, puts)).succeeded:
            return found
    raise Conflict("nodes and volumes are being changed by others all the time: nothing was changed, try again")


def _put(record: Record, **fields: Any) -> Put:
    return Put(record.key, record.packed_with(**fields), record.lease)


# -- looking -----------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class NodePlace:
    """A node in the tree of `csvfs domain list`; empty: not said. `size`: bytes of its drives."""

    node: str
    site: str
    rack: str
    chassis: str
    state: str  # up, down
    drives: int
    size: int


def node_places(view: ClusterView) -> list[NodePlace]:
    """In the order of the tree."""
    slab_size = view.pool.number("slab_size", SLAB_SIZE_DEFAULT) if view.pool else SLAB_SIZE_DEFAULT
    rows = []
    for node in sorted(view.node_names, key=lambda name: (view.place_of(name).path, name)):
        drives = view.drives_of(node)
        size = sum(drive.number("slots") * slab_size or drive.number("size") for drive in drives)
        state = "up" if node in view.alive else "down"
        rows.append(NodePlace(node, *view.place_of(node).path, state, len(drives), size))
    return rows


def volume_domains(view: ClusterView) -> list[dict[str, Any]]:
    """For every volume how many domains it needs and has."""
    rows = []
    for name, record in sorted(view.volumes.items()):
        level = view.level_of(name)
        domains = sorted(view.domains_with_drives(level, up=False))
        rows.append({"volume": name, "level": level, "copies": record.number("copies", 1), "domains": domains})
    return rows


def volume_line(row: dict[str, Any]) -> str:
    level, copies, count = row["level"], row["copies"], len(row["domains"])
    assert level in LEVELS
    text = f"volume {row['volume']}: {copies} {'copy' if copies == 1 else 'copies'}, no two in one {level}; there "
    text += f"{verb(count)} {counted(count, level)} with drives"
    return text if count >= copies else f"{text}: too few, see csvfs domain set"
