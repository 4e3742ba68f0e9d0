"""Misplacement: slabs with two copies in one fault domain, as things are or as they would be.

Place      coordinator floor; under healing.py. Counts only: what comes of it is repair's (repair_plan.py).
Asked by   `csvfs domain set|load` and `csvfs volume set --fault-domain`, before they change anything.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import trio

from coordinator.cluster_facts import ClusterFacts
from coordinator.slab_book import SlabBook
from csvfs.block.placement import DomainOf
from csvfs.errors import BadRequest
from csvfs.fault_domains import LEVELS, Level, Place, domain_at, misplaced_copies, place_of
from csvfs.ids import NodeName
from csvfs.net.calls import optional_field
from csvfs.wire.block_messages import SlabDescriptor

SLABS_PER_TURN = 256
NODES_MAX = 1024  # in one question


@dataclass(slots=True, frozen=True)
class PlacesAsked:
    """Fault domains as they would be: at `level`, with `places` of some nodes and those known of the others."""

    level: Level
    places: dict[NodeName, Place]
    facts: ClusterFacts

    @staticmethod
    def from_args(args: dict[str, Any], facts: ClusterFacts) -> "PlacesAsked":
        """`level` and `places` (by node: site, rack, chassis) may be absent. Raises BadRequest, ProtocolError."""
        level, places = optional_field(args, "level", str), optional_field(args, "places", dict) or {}
        if level is not None and level not in LEVELS:
            raise BadRequest(f"{level!r} is no level of fault domains: {', '.join(LEVELS)}")
        if len(places) > NODES_MAX:
            raise BadRequest(f"places of {len(places)} nodes; at most {NODES_MAX}")
        by_node = {NodeName(str(node)): place_of(value) for node, value in places.items()}
        return PlacesAsked(level or facts.level, by_node, facts)  # type: ignore[arg-type]

    def domain_of(self, node: NodeName) -> str:
        place = self.places.get(node)
        return domain_at(self.level, node, self.facts.place_of(node) if place is None else place)


async def count_misplaced(
    books: Iterable[SlabBook], wanted: Callable[[SlabDescriptor], int], domain_of: DomainOf
) -> dict[str, Any]:
    """`slabs`: all. `misplaced`: those with two copies in one domain that should be in two. `groups`: [[nodes
    that keep a copy, one in each domain], how many further copies need a place in other domains]."""
    slabs = misplaced = 0
    groups: Counter[tuple[NodeName, ...]] = Counter()
    for book in books:
        for descriptor in book.all():
            slabs += 1
            if slabs % SLABS_PER_TURN == 0:
                await trio.lowlevel.checkpoint()
            keepers = {domain_of(member.node): member.node for member in descriptor.members}
            copies = misplaced_copies((domain_of(m.node) for m in descriptor.members), wanted(descriptor))
            if copies:
                misplaced += 1
                groups[tuple(sorted(keepers.values()))] += copies
    return {
        "slabs": slabs,
        "misplaced": misplaced,
        "groups": [[list(nodes), count] for nodes, count in sorted(groups.items())],
    }
