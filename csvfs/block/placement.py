"""Placement: which drives get the copies of a new slab.

Place      block floor. Pure; randomness is an argument.
Rule       no two copies in one fault domain. A domain is what fails together, at the level that `domain_of`
           knows (csvfs/fault_domains.py). Domains and drives are drawn with the weight of their free slots,
           so drives fill at one rate, whatever their sizes, and every drive that can help a resync holds a
           part.
Stranding  Chance alone would leave large domains over when the small ones are full. So a domain is drawn for
           certain where leaving it out would cost the pool a slab: filled to the end, a pool holds as many
           slabs as any placement could have made of it (`slabs_that_fit`). By weights alone a pool of
           10/10/20 with two copies strands a tenth of itself, one of 10/10/10/15 with three a twentieth.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
        there = f" ({', '.join(sorted(by_domain))})" if by_domain else ""
        raise NoSpace(
            f"{copies} copies need {copies} fault domains with free space, there are "
            f"{len(by_domain)}{there}; add drives in others"
        )
    chosen: list[DriveSpace] = []
    free = {domain: sum(d.free_slots for d in by_domain[domain]) for domain in sorted(by_domain)}
    for domain in _draw_domains(free, copies, rng):
        drives = sorted(by_domain[domain], key=lambda drive: drive.drive)
        chosen.append(drives[_draw([drive.free_slots for drive in drives], rng)])
    return chosen


def slabs_that_fit(free: Iterable[int], copies: int) -> int:
    """How many slabs of so many copies fit into fault domains with `free` slots each: exactly, not a bound.

    n slabs fit iff the domains' slots, each counted up to n, sum up to `copies` * n: then dealing them out in
    a row puts no two copies of a slab into one domain.
    """
    slots = list(free)
    low, high = 0, sum(slots) // copies
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(count, middle) for count in slots) >= copies * middle:
            low = middle
        else:
            high = middle - 1
    return low


def _draw_domains(free: Mapping[str, int], copies: int, rng: Random) -> Iterator[str]:
    """`copies` of the domains, so that one slab less fits into what is left, not two.

    Of `fit` slabs that fit, with the domains' slots counted up to `fit` each, `spare` slots are not needed. A
    domain with `fit` slots or more loses one of those that count if it is left out, every other one does not.
    So of the former as many may be left out as there are spare slots.
    """
    fit = slabs_that_fit(free.values(), copies)
    spare = sum(min(slots, fit) for slots in free.values()) - copies * fit
    large = {domain for domain, slots in free.items() if slots >= fit}
    large_due = max(0, len(large) - spare)
    left = list(free)
    for draws_left in range(copies, 0, -1):
        able = left if draws_left > large_due else [domain for domain in left if domain in large]
        domain = able[_draw([free[name] for name in able], rng)]
        large_due -= domain in large
        left.remove(domain)
        yield domain


def _draw(weights: Sequence[int], rng: Random) -> int:
    """An index, each with the probability of its weight."""
    point = rng.randrange(sum(weights))
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    raise AssertionError("unreachable")
