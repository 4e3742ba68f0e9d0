"""Whether the pool can hold copies that are to be made, each in another fault domain than its slab's others.

Place      block floor. Pure.
"""

from collections.abc import Mapping, Sequence


def missing_slots(groups: Sequence[tuple[frozenset[str], int]], free: Mapping[str, int]) -> int:
    """How many copies would find no place; 0: all do.

    Args    groups: (nodes where there is no place for them: other copies are in their fault domains; how many
            such copies). free: slots, by node. A largest flow from groups to nodes, found by augmenting paths.
    """
    left = [count for _, count in groups]
    room = dict(free)
    given: dict[tuple[int, str], int] = {}

    def place(group: int, seen: set[str]) -> bool:
        """One copy of a group, moving copies of other groups elsewhere if need be."""
        for domain in sorted(room):
            if domain in groups[group][0] or domain in seen:
                continue
            seen.add(domain)
            if room[domain] > 0:
                room[domain] -= 1
                given[group, domain] = given.get((group, domain), 0) + 1
                return True
            for other in range(len(groups)):
                if given.get((other, domain), 0) and place(other, seen):
                    given[other, domain] -= 1
                    given[group, domain] = given.get((group, domain), 0) + 1
                    return True
        return False

    for group in range(len(groups)):
        _place_freely(group, groups[group][0], left, room, given)
    return sum(sum(1 for _ in range(left[group]) if not place(group, set())) for group in range(len(groups)))


def _place_freely(
    group: int,
    taken: frozenset[str],
    left: list[int],
    room: dict[str, int],
    given: dict[tuple[int, str], int],
) -> None:
    """As many as fit at once, where there is most room: only the rest is worth searching for."""
    for domain in sorted(room, key=lambda name: -room[name]):
        if domain not in taken:
            count = min(left[group], room[domain])
            left[group] -= count
            room[domain] -= count
            given[group, domain] = given.get((group, domain), 0) + count
