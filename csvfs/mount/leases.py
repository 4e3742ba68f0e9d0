"""The leases this mount holds: granted by replies, asked for by `acquire`, given back by `release`.

Place      mount floor; under the read and write paths and recall.py.
Order      A reply and a recall about one inode come over one link, so in the order in which the coordinator
           made them. It gives nothing above OPEN on an inode while a recall of it is unanswered (its
           invariant T2). So a grant is applied by whoever waited for the reply, before its next await, and
           recall.py lets those go first: then what is held here is at most what the coordinator believes.
Attributes Replies may overtake each other at the coordinator, and not every reply to a change of ours has the new
           attributes. What was asked before such a change does not count as showing it: the attributes stay
           marked as stale until an answer comes that was asked after it.
Stamps     One counter; a recall moves it. "Recalled since" compares an inode's last recall with a stamp taken
           before a request. The inodes remembered are bounded; the longest not recalled are forgotten, and count as
           recalled at `_floor`.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Protocol

import trio

from csvfs.errors import CsvfsError, NotFound, ProtocolError
from csvfs.mount.file_state import (
    ATTR_LENGTH,
    BLOCKS,
    CTIME,
    LEASE_NONE,
    LEASE_OPEN,
    LEASE_READ,
    LEASE_WRITE,
    MODE,
    MTIME,
    NLINK,
    SIZE,
    FileState,
)
from csvfs.mount.segments import SegmentedError
from csvfs.units import BLOCK_SIZE
from csvfs.volume.extents import BLOCKS_MAX, FILE_BLOCKS_MAX
from csvfs.volume.file_io import BlockBus
from csvfs.wire.block_messages import SlabDescriptor

STAMPS_MAX = 65_536
# 16 MiB of a file per `acquire`: were every block of it an extent in a slab of its own, the answer with 4,096
# descriptors of some 150 bytes would still fit into a frame (HEAD_SIZE_MAX).
LAYOUT_BLOCKS = 4096

_S_IFMT, _S_IFDIR, _S_IFLNK = 0o170000, 0o040000, 0o120000


class Coordinator(Protocol):
    """A Session, or a fake one."""

    async def call(self, name: str, args: dict[str, Any], /) -> Any: ...


class KeptInodes(Protocol):
    """See inode_rows.InodeRows."""

    def add(self, ino: int) -> None: ...
    def remove(self, ino: int) -> None: ...
    def lease(self, ino: int, kind: int) -> None: ...
    def lost(self, ino: int, is_lost: bool) -> None: ...
    def timed(self, ino: int, is_timed: bool) -> None: ...
    def barred(self, ino: int, is_barred: bool) -> None: ...


class NothingKept:
    """Nobody goes on for this mount, or clears up behind it."""

    def add(self, ino: int) -> None:
        pass

    def remove(self, ino: int) -> None:
        pass

    def lease(self, ino: int, kind: int) -> None:
        pass

    def lost(self, ino: int, is_lost: bool) -> None:
        pass

    def timed(self, ino: int, is_timed: bool) -> None:
        pass

    def barred(self, ino: int, is_barred: bool) -> None:
        pass


class Leases:
    """All inodes this mount knows something of."""

    def __init__(self, coordinator: Coordinator, bus: BlockBus, kept: KeptInodes | None = None) -> None:
        self._coordinator = coordinator
        self.kept: KeptInodes = kept or NothingKept()
        self._bus = bus
        self.states: dict[int, FileState] = {}  # the longest not looked up first
        self.wrote_before: Callable[[FileState], None] = lambda state: None  # restored; see FileState.inherited_time
        self.releasing: dict[int, trio.Event] = {}  # `release` sent, not answered
        self._stamp = 1
        self._floor = 0
        self._stamps: dict[int, int] = {}  # the longest not recalled first

    # -- stamps ----------------------------------------------------------------------------------

    def stamp(self) -> int:
        """Take one before asking for something that will be cached; see recalled_since."""
        return self._stamp

    def recalled_since(self, ino: int, stamp: int) -> bool:
        """Whether what was learned of `ino` under `stamp` may be out of date."""
        return self._stamps.get(ino, self._floor) > stamp or ino in self.releasing

    def mark_recalled(self, ino: int) -> None:
        self._stamp += 1
        self._stamps.pop(ino, None)
        self._stamps[ino] = self._stamp
        if len(self._stamps) > STAMPS_MAX:
            # Half of them, not all: what is under way was asked for behind the last of these.
            for old in list(islice(self._stamps, STAMPS_MAX // 2)):
                self._floor = self._stamps.pop(old)

    def mark_all_recalled(self) -> None:
        self._stamp += 1
        self._stamps.clear()
        self._floor = self._stamp

    # -- grants ----------------------------------------------------------------------------------

    def state(self, ino: int) -> FileState:
        """The inode's state, new if there was none."""
        state = self.states.get(ino)
        if state is None:
            state = self.states[ino] = FileState(ino)
            self.kept.add(ino)
        return state

    def drop(self, state: FileState) -> None:
        """Forget an inode of which the kernel caches nothing."""
        del self.states[state.ino]
        self.kept.remove(state.ino)

    def granted(self, ino: int, kind: int, attr: list | None, asked: int, changed: bool = False) -> FileState:
        """A reply said what is held on `ino`, and its attributes. Call before the next await after the reply.

        asked: the stamp before the call. changed: the call changed the attributes to these.
        A reply may say less than is held (it was recalled and granted anew meanwhile); leases are lowered by
        recalls and releases only.
        """
        state = self.state(ino)
        if ino in self.releasing:
            kind = LEASE_NONE
        unleased = kind < LEASE_READ
        if state.inherited and (attr is not None or state.directory):
            kind, state.inherited = max(kind, state.inherited), LEASE_NONE
        if attr is not None:
            taken = self._take_attributes(state, attr, kind)
            # Without the lease: somebody is about to change them, and will not ask us again before he does.
            state.stale = not taken or unleased or asked < state.changed_at or self.recalled_since(ino, asked)
            self._stamp += 1
            state.learned_at = self._stamp
            if changed:
                state.changed_at = self._stamp
        elif state.lease < LEASE_READ and not state.directory:
            kind = min(kind, LEASE_OPEN)  # without its size there is nothing to do with it
        if kind > state.lease and (kind < LEASE_READ or state.recall is None):
            self._raise_lease(state, kind)
        if state.inherited_time and state.lease == LEASE_WRITE:
            state.inherited_time = False
            self.wrote_before(state)
        return state

    def _take_attributes(self, state: FileState, attr: list, kind: int) -> bool:
        """False: they are older than what is known."""
        if len(attr) != ATTR_LENGTH:
            raise ProtocolError(
                f"attributes of inode {state.ino} with {len(attr)} fields, want {ATTR_LENGTH}"
            )
        known = state.attr
        state.directory = attr[MODE] & _S_IFMT == _S_IFDIR
        state.symlink = attr[MODE] & _S_IFMT == _S_IFLNK
        if known is not None and attr[CTIME] != known[CTIME]:
            state.metadata_dirty = True
        if state.lease == LEASE_WRITE:
            if known is not None and attr[MTIME] != known[MTIME]:
                if attr[CTIME] <= known[CTIME]:
                    return False  # a reply that a report of ours has overtaken
                state.times_dirty = False  # somebody set the time; nobody else's writing can have
                self.kept.timed(state.ino, False)
                state.mtime_ns = 0
        elif max(kind, state.lease) >= LEASE_READ:
            state.size = state.committed = attr[SIZE]
        state.attr = list(attr)
        state.atime_seen = False
        return True

    def changed(
        self, ino: int, asked: int, time_ns: int | None, *, entries: bool = False, links: int | None = 0
    ) -> None:
        """A call of ours, asked at stamp `asked`, changed attributes that its reply does not have.

        Args    time_ns: of the change; None: unknown. entries: it was a directory's entries that changed.
                links: what the link count grew by; None: unknown.
        """
        state = self.states.get(ino)
        if state is None:
            self.mark_recalled(ino)
            return
        known = state.attr
        if (
            known is None
            or time_ns is None
            or links is None
            or asked < max(state.learned_at, state.changed_at)
        ):
            state.stale = True
        else:
            known[CTIME] = max(known[CTIME], time_ns)
            known[NLINK] += links
            if entries:
                known[MTIME] = max(known[MTIME], time_ns)
        state.atime_seen = False
        self._stamp += 1
        state.changed_at = self._stamp

    def changed_since(self, ino: int, stamp: int) -> bool:
        """Whether attributes asked for at `stamp` may lack a change of ours."""
        state = self.states.get(ino)
        return state is not None and state.changed_at > stamp

    def _raise_lease(self, state: FileState, kind: int) -> None:
        if kind >= LEASE_READ:
            state.report = None
        if kind == LEASE_WRITE and not state.directory:
            # What others knew of the space beyond the end may have changed until now.
            state.extents.forget(-(-state.size // BLOCK_SIZE))
            state.tail_zero = -1
            state.allocated_upto = 0
            state.committed = state.size
            if state.attr is not None and state.attr[BLOCKS] == 0:
                state.extents.learn(0, BLOCKS_MAX, ())  # a new file: no need to ask where nothing lies
        self.kept.lease(state.ino, kind)
        state.lease = kind
        state.regate()

    def take_layout(self, state: FileState, block: int, count: int, reply: dict[str, Any]) -> None:
        """Learn what a reply says of blocks `block..block+count`. Raises ProtocolError."""
        extents: list[list[int]] = reply["extents"]
        self.take_slabs(state, extents, reply)
        state.extents.learn(block, count, extents, reply.get("shared") or ())

    def take_slabs(self, state: FileState, extents: list[list[int]], reply: dict[str, Any]) -> None:
        """Learn the descriptors of the slabs that these extents lie in. Raises ProtocolError: some are missing."""
        for value in reply.get("slabs") or ():
            self._bus.learn(SlabDescriptor.from_wire(value))
        unknown = {extent[2] for extent in extents if self._bus.descriptor(extent[2]) is None}
        if unknown:
            raise ProtocolError(f"inode {state.ino} lies in slab {min(unknown)}, of which no descriptor came")

    # -- asking ----------------------------------------------------------------------------------

    async def acquire(self, state: FileState, kind: int, block: int, count: int, *, direct: bool = False) -> None:
        """Ask for a lease, and the layout around the first unknown of blocks `block..block+count` (count 0: none).

        direct: for I/O past the cache, which a file that several nodes write may do without the lease.
        Returns when there is reason to look at the state again; what was asked for may still be missing.
        Raises  NotFound, Unavailable ... of the call. SegmentedError: direct, and `state.segments` are to be asked for.
        """
        if state.inherited:
            await self.restore(state)
            return
        await self._acquire(state, kind, block, count, direct)
        if direct and state.segments is not None and not state.segments.ending and state.lease < LEASE_READ:
            raise SegmentedError

    async def _acquire(self, state: FileState, kind: int, block: int, count: int, direct: bool) -> None:
        first, end = window_of(state.extents.first_unknown(block, count)) if count else (0, 0)
        args = {"ino": state.ino, "kind": kind, "block": first, "count": end - first}
        if direct:
            args["direct"] = True
        if state.lease >= kind:
            async with state.mapping:
                if state.lease >= kind and not state.extents.covers(block, count):
                    await self._ask_layout(state, args)
        elif any(asked >= kind for asked in state.asking.values()):
            await state.wait_change()
        else:
            token = object()
            state.asking[token] = kind
            try:
                await self._released(state.ino)
                await self._ask_lease(state, args)
            finally:
                del state.asking[token]
                state.notify()

    async def restore(self, state: FileState) -> None:
        """Learn what belongs to a lease that is inherited; then it is held as any other. A question, which the
        coordinator answers also while it recalls that lease.

        Raises  NotFound, Unavailable ... of the call. Cancel safe.
        """
        while state.inherited:
            asked = self._stamp
            try:
                reply = await self._coordinator.call("getattr", {"ino": state.ino})
            except NotFound:
                self.lose(state)
                self.kept.lost(state.ino, False)
                raise
            self.granted(state.ino, reply["lease"], reply["attr"], asked)

    async def _ask_layout(self, state: FileState, args: dict[str, Any]) -> None:
        """The lease is held. OPEN is what the coordinator answers even while it recalls that lease: a read
        that keeps its page locked must not wait for the recall to end, which may wait for the page."""
        stamp = self._stamp
        reply = await self._coordinator.call("acquire", {**args, "kind": LEASE_OPEN})
        if not self.recalled_since(state.ino, stamp):
            self._take_answer(state, args, reply)

    async def _ask_lease(self, state: FileState, args: dict[str, Any]) -> None:
        """Until it is granted, by this reply or another: the coordinator answers this one only after a recall
        of that other grant, which may have to wait for the page that whoever asks here keeps locked."""
        outcome: list[CsvfsError | None] = []

        asked = self._stamp

        async def ask() -> None:
            try:
                reply = await self._coordinator.call("acquire", args)
                # Here, before any await (see "Order").
                self.states.setdefault(state.ino, state)
                self.kept.add(state.ino)
                self.granted(state.ino, reply["lease"], reply.get("attr"), asked)
                if reply.get("segmented"):
                    state.share()
                if reply["lease"] >= LEASE_READ:
                    self._take_answer(state, args, reply)
                outcome.append(None)
            except CsvfsError as error:
                outcome.append(error)
            state.notify()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            while not outcome and state.lease < args["kind"]:
                await state.wait_change()
            nursery.cancel_scope.cancel()
        if outcome and outcome[0] is not None:
            raise outcome[0]

    def _take_answer(self, state: FileState, args: dict[str, Any], reply: dict[str, Any]) -> None:
        """The layout in a reply to `acquire`, if the lease that makes it true is held."""
        if args["count"] and state.lease >= LEASE_READ:
            self.take_layout(state, args["block"], args["count"], reply)
            if state.lease == LEASE_WRITE:
                state.allocated_upto = max(state.allocated_upto, _allocated_end(state))

    async def _released(self, ino: int) -> None:
        """A release under way must not overtake what is asked for now."""
        while ino in self.releasing:
            await self.releasing[ino].wait()

    # -- giving back -----------------------------------------------------------------------------

    async def release(self, inos: Iterable[int]) -> None:
        """Tell the coordinator that nothing is held any more on `inos`, whose states are gone already.

        Those that came back meanwhile are left out: the coordinator may know of a later grant.
        """
        batch = [ino for ino in inos if ino not in self.states]
        if not batch:
            return
        answered = trio.Event()
        for ino in batch:
            self.mark_recalled(ino)
            self.releasing[ino] = answered
        try:
            await self._coordinator.call("release", {"items": [[ino, LEASE_NONE] for ino in batch]})
        finally:
            for ino in batch:
                del self.releasing[ino]
                self.mark_recalled(ino)
            answered.set()

    def lose(self, state: FileState) -> None:
        """From now on nothing is held: not by a recall, but because it may be somebody else's already."""
        self.kept.lost(state.ino, True)  # until its pages are gone
        self.kept.lease(state.ino, LEASE_NONE)
        self.kept.timed(state.ino, False)
        state.lease = state.inherited = LEASE_NONE
        state.inherited_time = False
        state.losses += 1
        state.segments = None
        state.attr = None
        state.metadata_dirty = True
        state.times_dirty = False
        state.atime_ns = 0
        state.extents.clear()
        state.tail_zero = -1
        state.regate()
        self.mark_recalled(state.ino)

    def claims_of_segments(self) -> list[list[Any]]:
        """Likewise, of files that several nodes write: [ino, mtime_ns, [[first, count, kind]]]."""
        found: list[list[Any]] = []
        for state in self.states.values():
            segments = state.segments
            if segments is None:
                continue
            segments.ending = segments.recalled  # what a coordinator before said of the end is void
            # Nothing is claimed where nothing is held: another node may have the lease on the inode.
            if segments.claimed():
                mtime_ns = segments.mtime_ns if segments.times_dirty else 0
                found.append([state.ino, mtime_ns, segments.runs()])
        return found

    def claims(self) -> list[list[int]]:
        """What to reclaim from a new coordinator: [ino, kind, size, mtime_ns]."""
        return [
            [state.ino, max(state.lease, state.inherited), state.size, state.mtime_ns if state.times_dirty else 0]
            for state in self.states.values()
            if state.lease > LEASE_NONE
        ]


def window_of(block: int) -> tuple[int, int]:
    """The aligned stretch of LAYOUT_BLOCKS around the block."""
    first = block - block % LAYOUT_BLOCKS
    return first, first + LAYOUT_BLOCKS


def _allocated_end(state: FileState) -> int:
    """Where the blocks end that lie beyond the end of the file; 0: there are none."""
    end = -(-state.size // BLOCK_SIZE)
    beyond = state.extents.allocated(end, FILE_BLOCKS_MAX - end)
    return beyond[-1][0] + beyond[-1][1] if beyond else 0
