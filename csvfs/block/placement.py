"""Placement: which drives get the copies of a new slab.

Place      block floor. Pure; randomness is an argument.
Rule       no two copies in one fault domain. A domain is what fails together: a node today, a rack where
           `domain_of` says so. Domains and drives are drawn with the weight of their free slots, so drives
           fill at one rate, whatever their sizes, and every drive that can help a resync holds a part.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from csvfs.errors import NoSpace
from csvfs.ids import DriveId, NodeName

DomainOf = Callable[[NodeName], str]


@dataclass(slots=True, frozen=True)
class DriveSpace:
    """A drive that may take slabs, and for how many more slabs it has slots."""

    drive: DriveId
    node: NodeName
    free_slots: int
    slots: int = 0  # in all; 0: not known

    @property
    def fullness(self) -> float:
        """From 0.0 to 1.0."""
        return (self.slots - self.free_slots) / self.slots if self.slots else 0.0


def node_is_domain(node: NodeName) -> str:
    return node


def choose_drives(
    candidates: Iterable[DriveSpace],
    copies: int,
    rng: Random,
    *,
    domain_of: DomainOf = node_is_domain,
    taken: Collection[str] = (),
) -> list[DriveSpace]:
    """Drives for `copies` copies of one slab, each in a fault domain of its own and in none of `taken`.

    Raises  NoSpace: too few fault domains with a free slot; the message says how many there are.
    """
    by_domain: dict[str, list[DriveSpace]] = {}
    for candidate in candidates:
        domain = domain_of(candidate.node)
        if candidate.free_slots > 0 and domain not in taken:
            by_domain.setdefault(domain, []).append(candidate)
    if len(by_domain) < copies:
        raise NoSpace(
            f"{copies} copies need {copies} fault domains (nodes) with free space, "
            f"there are {len(by_domain)}; add drives on other nodes"
        )
    chosen: list[DriveSpace] = []
    domains = sorted(by_domain)
    for _ in range(copies):
        weights = [sum(drive.free_slots for drive in by_domain[domain]) for domain in domains]
        domain = domains.pop(_draw(weights, rng))
        drives = sorted(by_domain[domain], key=lambda drive: drive.drive)
        chosen.append(drives[_draw([drive.free_slots for drive in drives], rng)])
    return chosen


def _draw(weights: Sequence[int], rng: Random) -> int:
    """An index, each with the probability of its weight."""
    point = rng.randrange(sum(weights))
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    raise AssertionError("unreachable")
