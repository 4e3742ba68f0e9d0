"""Restoration: drive servers that started anew, and what their copies are worth.

Place      coordinator floor; above slab_changes.py, below resync.py. `judge` is pure.
Why        After a start of a drive server none of its copies is in service (PROTOCOL.md, "Kinds"): writes may
           have been torn, or made elsewhere meanwhile. A copy that is in sync and not the last leaves the
           in-sync set and is resynced (which costs little: what it misses); the last goes on, for it has all
           that was acknowledged.

Invariants
  I1   the last in-sync copy is never dropped, and while one is in service the others are not preferred to it.
"""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from coordinator.at_once import ask_each
from coordinator.cluster_facts import ClusterFacts
from coordinator.drive_control import Copy, DriveControl
from coordinator.slab_changes import SLABS_PER_CHANGE_MAX, SlabChanges
from csvfs.block import slab_state
from csvfs.errors import CsvfsError, Fenced, NotFound
from csvfs.ids import DriveId, Epoch, Incarnation, NodeName, SlabId, VolumeId
from csvfs.wire.block_messages import ROLE_ABSENT, ROLE_JOINING, SlabDescriptor

log = logging.getLogger(__name__)

# How long copies that lost unflushed writes to a power cut wait for one that did not: longer than a server
# takes to boot its services, shorter than an administrator's patience when that one is gone for good.
PATIENCE_S = 60.0


@dataclass(slots=True, frozen=True)
class Judgement:
    """`drops`: members to take out. `kept`: the copy that goes on alone, though its server has started
    anew."""

    drops: frozenset[DriveId] = frozenset()
    kept: DriveId | None = None


def judge(
    descriptor: SlabDescriptor,
    serving: Collection[DriveId],
    returned: Collection[DriveId],
    lost: Collection[DriveId] = (),
    *,
    patience_over: bool = True,
) -> Judgement:
    """What to do with a slab of which some copies are on servers that have started anew.

    Args     serving: drives whose copy is in service. returned: drives that can be reached, with a copy that
             is not in service. Members on drives in neither cannot be reached. lost: drives whose node lost
             power (or whose flush failed): they hold what was flushed, but maybe not all that was
             acknowledged, so a copy on another drive is preferred, and waited for until patience_over.
    """
    in_sync = [member.drive for member in descriptor.in_sync]
    joining = {m.drive for m in descriptor.members if m.role == ROLE_JOINING and m.drive not in serving}
    good = [drive for drive in in_sync if drive in serving]
    if good:
        return Judgement(frozenset(drive for drive in in_sync if drive not in good) | joining)
    back = [drive for drive in in_sync if drive in returned]
    if not back:
        return Judgement()  # None of those that count is here: the slab waits for one.
    whole = [drive for drive in back if drive not in lost]
    if not whole and len(back) < len(in_sync) and not patience_over:
        return Judgement()  # One that is still away may hold all that was acknowledged.
    kept = (whole or back)[0]
    return Judgement(frozenset(in_sync) - {kept} | joining, kept)


@dataclass(slots=True)
class Census:
    """The copies of one volume on the drives that can be reached, as `list_slabs` counts them."""

    copies: dict[SlabId, dict[DriveId, bool]] = field(default_factory=dict)  # drive -> in service
    nodes: dict[NodeName, Incarnation] = field(default_factory=dict)  # those that were asked
    node_of: dict[DriveId, NodeName] = field(default_factory=dict)
    lost: set[DriveId] = field(default_factory=set)  # drives that may not hold all that was acknowledged
    epochs: dict[SlabId, dict[DriveId, Epoch]] = field(default_factory=dict)  # of copies in service, as installed
    patience_over: bool = False

    def add(self, node: NodeName, drive: DriveId, copies: list[Copy]) -> None:
        """copies: those of the volume on a drive."""
        self.node_of[drive] = node
        for copy in copies:
            if copy.contents_lost:
                self.lost.add(drive)
            self.copies.setdefault(copy.slab, {})[drive] = copy.in_service
            if copy.in_service:
                self.epochs.setdefault(copy.slab, {})[drive] = copy.epoch

    def judge(self, descriptor: SlabDescriptor) -> Judgement:
        """See judge."""
        slab = descriptor.slab
        return judge(
            descriptor, self.serving(slab), self.returned(slab), self.lost, patience_over=self.patience_over
        )

    def must_wait(self, descriptor: SlabDescriptor) -> bool:
        """Copies are here, but none that may be chosen yet."""
        slab = descriptor.slab
        here = self.returned(slab).intersection(member.drive for member in descriptor.in_sync)
        return bool(here) and not self.serving(slab) and self.judge(descriptor) == Judgement()

    def is_behind(self, descriptor: SlabDescriptor) -> bool:
        """A change was committed and not installed: whoever committed it ended in between."""
        installed = self.epochs.get(descriptor.slab, {})
        return any(
            member.drive in installed and installed[member.drive] < descriptor.epoch
            for member in descriptor.writable
        )

    def serving(self, slab: SlabId) -> set[DriveId]:
        return {drive for drive, in_service in self.copies.get(slab, {}).items() if in_service}

    def returned(self, slab: SlabId) -> set[DriveId]:
        return {drive for drive, in_service in self.copies.get(slab, {}).items() if not in_service}


async def take_census(
    control: DriveControl,
    facts: ClusterFacts,
    volume: VolumeId,
    nodes: Iterable[NodeName],
    *,
    patience_over: bool = True,
) -> Census:
    """Ask every node for the volume's copies; nodes that cannot be asked are left out. Raises Fenced."""

    async def ask(node: NodeName) -> tuple[Incarnation, dict[DriveId, list[Copy]]]:
        await control.register_term(node)
        incarnation = await control.incarnation(node)
        copies: dict[DriveId, list[Copy]] = {}
        for drive in facts.drives_of(node):
            try:
                copies[drive] = await control.copies(node, drive)
            except Fenced:
                raise
            except CsvfsError as error:
                log.warning("drive %s of node %s is left out: %s", drive.hex()[:8], node, error)
        return incarnation, copies

    census = Census(patience_over=patience_over)
    answers, errors = await ask_each([node for node in nodes if facts.server(node) is not None], ask)
    for node, error in errors.items():
        log.warning("the drive server of node %s is left out: %s", node, error)
    for node, (incarnation, drives) in answers.items():
        census.nodes[node] = incarnation
        for drive, copies in drives.items():
            census.add(node, drive, [copy for copy in copies if copy.volume == volume])
    return census


async def restore(changes: SlabChanges, census: Census, since: int) -> list[SlabId]:
    """Judge every slab with a member on a drive of the census; commit and install what was judged.

    Args     since: `changes.change_count` when the census began: of slabs that a repair has given another
             copy since then, the census may have missed it.
    Returns  slabs that could not be settled now: a later census tries again. Raises Fenced.
    """
    unsettled: list[SlabId] = []
    part: dict[SlabId, Judgement] = {}
    behind: list[SlabId] = []
    for descriptor in changes.book.all():
        judgement = census.judge(descriptor)
        if judgement == Judgement() and census.is_behind(descriptor):
            behind.append(descriptor.slab)
        if census.must_wait(descriptor):
            unsettled.append(descriptor.slab)
        if judgement != Judgement() and changes.has_changed(descriptor.slab, since):
            unsettled.append(descriptor.slab)
        elif judgement != Judgement():
            part[descriptor.slab] = judgement
        if len(part) >= SLABS_PER_CHANGE_MAX:
            unsettled += await _carry_out(changes, part)
            part = {}
    if part:
        unsettled += await _carry_out(changes, part)
    for start in range(0, len(behind), SLABS_PER_CHANGE_MAX):
        unsettled += await changes.settle(behind[start : start + SLABS_PER_CHANGE_MAX])
    return unsettled


async def _carry_out(changes: SlabChanges, judgements: dict[SlabId, Judgement]) -> list[SlabId]:
    def transition(descriptor: SlabDescriptor) -> SlabDescriptor:
        judgement = judgements[descriptor.slab]
        if judgement.kept is not None and judgement.kept not in {m.drive for m in descriptor.in_sync}:
            return descriptor  # it changed since it was judged
        changed = slab_state.drop_members(descriptor, judgement.drops)
        if changed is descriptor and judgement.kept is not None:
            # The server has forgotten its fences: a new epoch keeps out whoever was evicted before.
            return slab_state.bump(descriptor)
        return changed

    outcome = await changes.book.change(judgements, transition)
    changed = [slab for slab, result in outcome.items() if not isinstance(result, CsvfsError)]
    changes.unsettle(changed)
    failures = await changes.settle(changed)
    await _stamp_kept(changes, {slab for slab in changed if judgements[slab].kept is not None and slab not in failures})
    return [slab for slab in judgements if slab in failures or slab not in changed]


async def _stamp_kept(changes: SlabChanges, slabs: set[SlabId]) -> None:
    """Of a copy that goes on alone, what a dead writer left there is the truth from now on: its active chunks are stamped
    with a new epoch, which all other members will miss, and need not be active any more.

    Where this fails they stay active, and every resync from there copies them. Raises Fenced.
    """
    nodes = {member.node for slab in slabs for member in changes.book.current(slab).in_sync}
    chunks: dict[SlabId, set[int]] = {}
    try:
        for drive, slab, marked in await changes.control.active_on(sorted(nodes), None):
            if slab in slabs and any(member.drive == drive for member in changes.book.current(slab).in_sync):
                chunks.setdefault(slab, set()).update(marked)
        await changes.equalize(chunks)
    except Fenced:
        raise
    except CsvfsError as error:
        log.info("active chunks of %d slabs stay active: %s", len(slabs), error)


async def forget_lost_copies(changes: SlabChanges, census: Census) -> None:
    """Absent members whose copy is not on their drive any more (formatted anew): they get a new one, in full.

    A copy that was created after the census counts as lost too, which only costs its copying. Raises Fenced.
    """
    lost: dict[SlabId, list[DriveId]] = {}
    for descriptor in changes.book.all():
        copies = census.copies.get(descriptor.slab, {})
        for member in descriptor.members:
            is_there = member.drive not in census.node_of or member.drive in copies
            if member.role == ROLE_ABSENT and member.since != slab_state.SINCE_UNKNOWN and not is_there:
                lost.setdefault(descriptor.slab, []).append(member.drive)
    slabs = list(lost)
    for start in range(0, len(slabs), SLABS_PER_CHANGE_MAX):
        part = slabs[start : start + SLABS_PER_CHANGE_MAX]
        outcome = await changes.book.change(part, lambda d: _without_history(d, lost[d.slab]))
        changed = [slab for slab, result in outcome.items() if not isinstance(result, CsvfsError)]
        await changes.settle(changed)
        log.warning("%d slabs have lost copies on drives that are there: they are made anew", len(changed))


def _without_history(descriptor: SlabDescriptor, drives: Iterable[DriveId]) -> SlabDescriptor:
    absent = {member.drive for member in descriptor.members if member.role == ROLE_ABSENT}
    for drive in drives:
        if drive in absent:
            descriptor = slab_state.forget_history(descriptor, drive)
    return descriptor


def strays(
    changes: SlabChanges, census: Census, is_ours: "Collection[SlabId]"
) -> list[tuple[SlabId, NodeName, DriveId]]:
    """Copies that no descriptor names: left by a creation that was interrupted, or of a member that was
    replaced.

    Args     is_ours: slab ids to look at; those being created at the moment are not among them.
    """
    found = []
    for slab in is_ours:
        try:
            members = {member.drive for member in changes.book.current(slab).members}
        except NotFound:
            members = set()
        for drive in census.copies.get(slab, {}):
            if drive not in members:
                found.append((slab, census.node_of[drive], drive))
    return found
