"""Rebalance: which copies to move so that drives fill alike.

Place      coordinator floor. Pure; repair.py carries the moves out, each as a repair: copy first, then
           remove.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from csvfs.block.placement import DriveSpace
from csvfs.ids import DriveId, NodeName, SlabId
from csvfs.wire.block_messages import SlabDescriptor

TOLERANCE = 0.05  # of a drive's slots: closer than this is level


@dataclass(slots=True, frozen=True)
class Move:
    """One copy, from the member on `source` to the drive `target`."""

    slab: SlabId
    source: DriveId
    target: DriveId
    target_node: NodeName


def plan_moves(
    spaces: Sequence[DriveSpace],
    descriptors: Iterable[SlabDescriptor],
    domain_of: Callable[[NodeName], str],
    moves_max: int,
) -> list[Move]:
    """Moves from the fullest to the emptiest drives until they are within TOLERANCE of each other, as far as
    the slabs that may move (those of `descriptors`) and the fault domains allow; at most `moves_max`.

    Every move makes the two drives' fullness less different, so there is an end.
    """
    known = {space.drive: space for space in spaces if space.slots}
    used = {drive: space.slots - space.free_slots for drive, space in known.items()}
    slabs: dict[DriveId, list[SlabDescriptor]] = {drive: [] for drive in known}
    for descriptor in descriptors:
        for member in descriptor.members:
            if member.drive in slabs:
                slabs[member.drive].append(descriptor)
    moved: set[SlabId] = set()
    moves: list[Move] = []

    def fullness(drive: DriveId, change: int = 0) -> float:
        return (used[drive] + change) / known[drive].slots

    while len(moves) < moves_max:
        move = _next_move(known, fullness, slabs, moved, domain_of)
        if move is None:
            break
        moves.append(move)
        moved.add(move.slab)
        used[move.source] -= 1
        used[move.target] += 1
    return moves


def _next_move(
    known: dict[DriveId, DriveSpace],
    fullness: Callable[..., float],
    slabs: dict[DriveId, list[SlabDescriptor]],
    moved: set[SlabId],
    domain_of: Callable[[NodeName], str],
) -> Move | None:
    by_fullness = sorted(known, key=lambda drive: (fullness(drive), drive))
    for source in reversed(by_fullness):
        for target in by_fullness:
            if fullness(source) - fullness(target) <= TOLERANCE:
                break  # and all that follow are fuller
            if fullness(target, +1) >= fullness(source) or fullness(source, -1) < fullness(target):
                continue  # it would only change which of the two is the fuller one: and then back, without an end
            domain = domain_of(known[target].node)
            for descriptor in slabs[source]:
                if descriptor.slab not in moved and _may_move(descriptor, source, target, domain, domain_of):
                    return Move(descriptor.slab, source, target, known[target].node)
    return None


def _may_move(
    descriptor: SlabDescriptor,
    source: DriveId,
    target: DriveId,
    domain: str,
    domain_of: Callable[[NodeName], str],
) -> bool:
    others = [member for member in descriptor.members if member.drive != source]
    if len(others) == len(descriptor.members):
        return False
    return all(m.drive != target and domain_of(m.node) != domain for m in others)
