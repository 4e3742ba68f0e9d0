"""What a mount knows of one inode: lease, attributes, layout, and what is under way.

Place      mount floor. Plain state; the rules that change it are in leases.py, the paths and recall.py.

Invariants
  M1  `size` is what a reader may see: it grows after data and size are both done, shrinks before the blocks
      go. It is right while the lease is READ or more.
  M2  `readable` and `writable` say whether the hot path may answer; `regate` follows every change of what
      they are made of, in the same synchronous step.
  M3  Whoever does I/O has raised `reads` or `writers`, or stands in `writes`, without an await since it
      looked at the lease. None of them waits for a lease meanwhile: a recall waits for them.
  M4  An inode that is open for writing here is also read under the write lease only, and never keeps pages
      under a lesser one: the kernel does not say when a mapped page is dirtied, and one dirtied under a read
      lease would be written back over what another node has written since.
"""

import trio

from csvfs.errors import CsvfsError
from csvfs.mount.segments import Segments
from csvfs.units import BLOCK_SIZE
from csvfs.volume.extents import ExtentMap
from csvfs.volume.file_io import Epochs, WriteDone

LEASE_NONE, LEASE_OPEN, LEASE_READ, LEASE_WRITE = range(4)  # PROTOCOL.md, lease kinds

# PROTOCOL.md, "attr"
INO, MODE, NLINK, UID, GID, RDEV, SIZE, BLOCKS, ATIME, MTIME, CTIME, GENERATION, XATTRS = range(13)
ATTR_LENGTH = 13

WHOLE_FILE = (0, 0)  # offset, length; length 0: to the end


class InFlight:
    """One write taken by write_nowait. `done` is called exactly once."""

    __slots__ = ("done", "end", "epochs", "error", "first", "remaining", "state")

    def __init__(
        self, state: "FileState", first: int, end: int, epochs: Epochs, done: WriteDone
    ) -> None:
        """epochs: those that its slabs have when it is sent."""
        self.state = state
        self.first = first
        self.end = end
        self.epochs = epochs
        self.done = done
        self.remaining = len(epochs)
        self.error: CsvfsError | None = None

    def landed(self, error: CsvfsError | None) -> None:
        """One of its pieces ended."""
        if error is not None:
            self.error = error
        self.remaining -= 1
        if self.remaining:
            return
        state = self.state
        del state.writes[self]
        # Now, not when it was sent: a flush between the two would not have covered it (I8).
        state.dirtied(self.epochs)
        if state.waiters is not None:
            state.notify()
        self.done(self.error)


class BufferedWrite:
    """A WRITE from the page cache, from its arrival until just before its answer.

    The kernel does not keep its pages locked when they were cached: an invalidation may drop them meanwhile. A
    READ that filled them anew with old bytes would leave these there for good, so it waits for the answer.
    """

    __slots__ = ("end", "offset", "state")

    def __init__(self, state: "FileState", offset: int, end: int) -> None:
        self.state = state
        self.offset = offset
        self.end = end
        state.buffered[self] = None

    def ended(self) -> None:
        del self.state.buffered[self]
        self.state.notify()


class Claim:
    """Blocks that a write which reads, allocates or extends has for itself."""

    __slots__ = ("end", "first")

    def __init__(self, first: int, end: int) -> None:
        self.first = first
        self.end = end


class Recall:
    """A recall under way. `signal` is set when a write got stuck behind it; `yielding`: it must not wait for
    pages."""

    __slots__ = ("signal", "yielding")

    def __init__(self) -> None:
        self.signal = trio.Event()
        self.yielding = False


class FileState:
    """One inode. Numbers in bytes unless they are called blocks."""

    __slots__ = (
        "__weakref__",
        "_locks",
        "allocated_upto",
        "asking",
        "atime_ns",
        "atime_seen",
        "attr",
        "buffered",
        "changed_at",
        "claims",
        "committed",
        "directory",
        "dirty_slabs",
        "extents",
        "failure",
        "fills",
        "inherited",
        "inherited_time",
        "ino",
        "learned_at",
        "lease",
        "losses",
        "lost",
        "metadata_dirty",
        "moving",
        "mtime_ns",
        "open_count",
        "pages_read",
        "parent",
        "read_holds",
        "readable",
        "reads",
        "recall",
        "replays",
        "report",
        "runs",
        "segments",
        "shared",
        "size",
        "stale",
        "starts",
        "stuck",
        "symlink",
        "tail_zero",
        "taint",
        "times_dirty",
        "truncating",
        "truncations",
        "used",
        "waiters",
        "waiting",
        "writable",
        "write_holds",
        "write_opens",
        "writers",
        "writes",
    )

    def __init__(self, ino: int) -> None:
        self.ino = ino
        self.lease = LEASE_NONE
        # Held by the process before this one, and by its kernel cached under; until it is restored `lease` is OPEN at most.
        self.inherited = LEASE_NONE
        self.inherited_time = False  # it was written to, and the coordinator has not heard when
        self.replays = 0  # requests under way that the process before may have carried out already
        self.segments: Segments | None = None  # of a file that several nodes write at once
        self.directory = False
        self.symlink = False
        self.parent = 0  # of a directory: where it was found last; 0: not known
        self.attr: list | None = None  # as the coordinator said last; see `attributes`
        self.changed_at = 0  # stamp of our last own change of attributes; see Leases.changed
        self.learned_at = 0  # stamp of the last reply that told them
        self.losses = 0  # how often its lease was lost
        self.lost = 0  # passes over pages whose lease was lost: what of them is dirty may be older than others' writes
        self.stale = False  # `attr` does not show an own change
        self.size = 0
        self.committed = 0  # size the coordinator knows
        self.mtime_ns = 0
        self.atime_ns = 0  # when it was read, as long as the coordinator has not heard of it; 0: nothing to tell
        self.atime_seen = False  # a read has nothing to do about the access time (access_times.py)
        self.times_dirty = False  # mtime_ns is newer than what the coordinator knows
        self.extents = ExtentMap()
        self.starts = self.extents.starts  # the same lists, for the hot path
        self.runs = self.extents.runs
        self.shared = self.extents.shared
        self.fills = 0  # `allocate` under way, whose answer tells of the layout
        self.moving = False  # blocks of it are being put elsewhere: no such call may begin
        self.tail_zero = -1  # the size for which the rest of its last block is known to be zeros
        self.allocated_upto = 0  # block: beyond the end of the file, up to here, blocks may hold old bytes
        self.used = False  # opened, or something found in it, since that was set to false
        self.open_count = 0
        self.write_opens = 0  # of open_count, those that may write
        self.reads: dict[object, None] = {}
        self.pages_read: dict[object, tuple[int, int]] = {}  # (offset, end) of READs that wait, in whatever phase
        self.writers = 0
        self.writes: dict[InFlight, None] = {}
        self.claims: dict[Claim, None] = {}
        self.buffered: dict[BufferedWrite, None] = {}
        self.dirty_slabs: Epochs = {}  # not flushed, with the epoch of the first write since
        self.metadata_dirty = True  # changed since the coordinator's last fsync, as far as we can tell
        self.failure: CsvfsError | None = None  # of a flush; reported until the file is closed (I8)
        self.read_holds = 0
        self.write_holds = 0
        self.truncating = False  # the coordinator is at it: no write may begin
        self.truncations = 0  # under way, in whatever phase
        self.waiting = 0  # reads and writes that are with us, in whatever phase
        self.stuck: dict[
            object, tuple[int, int]
        ] = {}  # writes and reads without the lease they need: (offset, end) of pages
        self.recall: Recall | None = None
        self.report: dict | None = None  # what the last recall answered, until the next grant
        self.taint: list[tuple[int, int]] | None = None  # (offset, length) of pages filled during a pass
        self.readable = False
        self.writable = False
        self.waiters: trio.Event | None = None
        self.asking: dict[object, int] = {}  # leases being asked for
        self._locks: dict[str, trio.Lock] | None = None

    def regate(self) -> None:
        """Call after every change of lease, write_opens, holds or truncating (M2); wakes who waits for it."""
        self.readable = self.lease >= self.lease_to_read and not self.read_holds
        self.writable = self.lease == LEASE_WRITE and not self.write_holds and not self.truncating
        self.notify()

    @property
    def lease_to_read(self) -> int:
        """M4: the lease under which its pages may be filled."""
        return LEASE_WRITE if self.write_opens else LEASE_READ

    def dirtied(self, epochs: Epochs) -> None:
        """These slabs were written to, or could not be flushed; of one that is dirty already the earlier epoch counts."""
        dirty = self.dirty_slabs
        for slab, epoch in epochs.items():
            known = dirty.get(slab)
            if known is None or epoch < known:
                dirty[slab] = epoch

    def notify(self) -> None:
        event = self.waiters
        if event is not None:
            self.waiters = None
            event.set()

    async def wait_change(self) -> None:
        """Returns after the next `notify`: then look again. Cancel safe."""
        if self.waiters is None:
            self.waiters = trio.Event()
        await self.waiters.wait()

    def attributes(self) -> list:
        """The attributes as they are now, ours laid over the coordinator's. `attr` must be known."""
        assert self.attr is not None
        attr = list(self.attr)
        if self.lease == LEASE_WRITE:
            attr[SIZE] = self.size
            if self.times_dirty:
                attr[MTIME] = self.mtime_ns
            attr[CTIME] = max(attr[CTIME], self.mtime_ns)
        if self.atime_ns:
            attr[ATIME] = self.atime_ns
        return attr

    def share(self) -> None:
        """The coordinator says that several nodes write to it."""
        known = self.segments
        if known is None or (known.ending and not known.kinds and not known.uses):
            self.segments = Segments()

    def is_claimed(self, first: int, end: int) -> bool:
        return any(claim.first < end and first < claim.end for claim in self.claims)

    @property
    def has_pages(self) -> bool:
        """Whether the kernel may have pages of it that can become old. Those of a symbolic link cannot: it never leads
        elsewhere. They must be left alone, for the kernel keeps them locked while a READLINK is unanswered."""
        return not (self.directory or self.symlink)

    def is_buffered(self, offset: int, end: int) -> bool:
        return any(write.offset < end and offset < write.end for write in self.buffered)

    def is_written(self, first: int, end: int) -> bool:
        return any(write.first < end and first < write.end for write in self.writes)

    def is_busy(self) -> bool:
        """Something is under way, or the kernel has it open: not to be released."""
        return bool(
            self.open_count or self.waiting or self.lost or self.writes or self.buffered or self.recall or self.truncations
            or (self.segments is not None and (self.segments.uses or self.segments.times_dirty))
            or (self._locks and any(lock.locked() for lock in self._locks.values()))
        )  # fmt: skip

    def _lock(self, name: str) -> trio.Lock:
        """Made when first used: most inodes never need one."""
        if self._locks is None:
            self._locks = {}
        return self._locks.setdefault(name, trio.Lock())

    @property
    def mapping(self) -> trio.Lock:
        """Held while the layout alone is asked for, or changes."""
        return self._lock("mapping")

    @property
    def flushing(self) -> trio.Lock:
        """Held during fsync."""
        return self._lock("flushing")

    @property
    def settling(self) -> trio.Lock:
        """Held while others are asked to flush."""
        return self._lock("settling")

    @property
    def tail(self) -> trio.Lock:
        """Held by the write that moves the end of the file."""
        return self._lock("tail")

    def note_stuck(self, token: object, offset: int, end: int) -> None:
        """A READ or WRITE of bytes `offset..end` has to get a lease first; a recall under way must not wait for
        its pages. Taken out of `stuck` by its `token`."""
        if token in self.stuck:
            return
        self.stuck[token] = (offset & -BLOCK_SIZE, (end + BLOCK_SIZE - 1) & -BLOCK_SIZE)
        if self.recall is not None:
            self.recall.signal.set()

    async def claim(self, first: int, end: int) -> Claim:
        """Have blocks `first..end` for oneself: no other write is or gets under way there until `unclaim`."""
        while self.is_claimed(first, end) or self.is_written(first, end):
            await self.wait_change()
        claim = Claim(first, end)
        self.claims[claim] = None
        return claim

    def unclaim(self, claim: Claim) -> None:
        del self.claims[claim]
        self.notify()

    async def wait_writes(self) -> None:
        """Until the writes under way now have ended; not those that begin meanwhile."""
        before: set[InFlight | Claim] = {*self.writes, *self.claims}
        while any(write in self.writes or write in self.claims for write in before):
            await self.wait_change()
