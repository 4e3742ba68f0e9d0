"""Fault domains: where nodes stand, and which of them fail together.

Place      ground floor. Pure.
Levels     site > rack > chassis > node. A place names any of them, or none; a volume chooses the level at
           which no two of its copies may share a domain.

Invariants
  D1  A domain is named with all levels above it: rack r1 of one site is not rack r1 of another.
  D2  Nodes in one domain are in one domain at every higher level, too. So a node whose place leaves a
      level out is, at that level, in the domain of the level below: its chassis if that is named, else it
      is a domain of its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

Level = Literal["node", "chassis", "rack", "site"]
LEVELS: tuple[Level, ...] = get_args(Level)  # the finest first
LEVEL_DEFAULT: Level = "node"
PLACE_LEVELS: tuple[Level, ...] = ("site", "rack", "chassis")  # the highest first


@dataclass(slots=True, frozen=True)
class Place:
    """Where a node stands; empty: not said."""

    site: str = ""
    rack: str = ""
    chassis: str = ""

    @property
    def path(self) -> tuple[str, str, str]:
        return self.site, self.rack, self.chassis

    def to_map(self) -> dict[str, str]:
        """As in the cluster store and on the wire: what is said."""
        return {level: name for level, name in zip(PLACE_LEVELS, self.path, strict=True) if name}

    def __str__(self) -> str:
        said = (f"{level} {name}" for level, name in self.to_map().items())
        return ", ".join(said) or "no place"


NOWHERE = Place()


def place_of(value: Any) -> Place:
    """What a map says, of the cluster store or the wire; what is no text is not said."""
    if not isinstance(value, dict):
        return NOWHERE
    said = {level: name for level in PLACE_LEVELS if isinstance(name := value.get(level), str)}
    return Place(**said)


def level_of(value: Any) -> Level:
    """The level that a volume's map names; none or an unknown one: the node."""
    level = value.get("fault_domain") if isinstance(value, dict) else None
    return level if level in LEVELS else LEVEL_DEFAULT


def domain_at(level: Level, node: str, place: Place) -> str:
    """The node's fault domain at a level, such as `rack dc1/r1`; a node's own domain is its name."""
    path = place.path
    begin = len(path) if level == "node" else PLACE_LEVELS.index(level)
    for depth in range(begin, len(path)):
        if path[depth]:
            names = [name or "-" for name in path[: depth + 1]]  # "-" is no name, see config.check_name
            while names[0] == "-":
                del names[0]
            return f"{PLACE_LEVELS[depth]} {'/'.join(names)}"
    return node


def counted(count: int, level: Level) -> str:
    """`1 rack`, `3 racks`, `2 chassis`."""
    return f"{count} {level}" if count == 1 or level == "chassis" else f"{count} {level}s"


def verb(count: int) -> str:
    return "is" if count == 1 else "are"


def misplaced_copies(domains: Iterable[str], wanted: int) -> int:
    """How many of a slab's copies should be in another domain, for `wanted` copies; copies beyond that may be
    anywhere."""
    domains = list(domains)
    return max(0, min(wanted, len(domains)) - len(set(domains)))
