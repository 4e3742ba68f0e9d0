"""What the bus knows of a slab and of a write that is not answered yet.

Place      block floor, under bus.py. No I/O of its own.
"""

import bisect
from collections.abc import Callable

import trio

from csvfs.block.server_links import ServerLinks
from csvfs.errors import CsvfsError
from csvfs.ids import DriveId
from csvfs.net.link import Link
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import SlabDescriptor

Target = tuple[Link, int, DriveId]  # link, drive index on it, drive


class PendingWrite:
    """One write until all members have answered it. `attempt` tells answers of earlier sendings apart."""

    __slots__ = (
        "attempt",
        "block",
        "checksums",
        "complete",
        "count",
        "data",
        "done",
        "epoch",
        "failed",
        "parked_since",
        "remaining",
        "sequence",
        "state",
    )

    def __init__(
        self,
        sequence: int,
        state: "SlabState",
        block: int,
        data: memoryview,
        checksums: bytes,
        done: Callable[[CsvfsError | None], None],
    ) -> None:
        self.sequence = sequence
        self.state = state
        self.block = block
        self.count = len(data) // BLOCK_SIZE
        self.data = data
        self.checksums = checksums
        self.done = done
        self.attempt = 0
        self.epoch = 0  # of the last sending
        self.remaining = 0
        self.failed = False
        self.parked_since = 0.0  # seconds of the trio clock; 0: never
        self.complete = False

    def finish(self, error: CsvfsError | None) -> None:
        """Tell the caller and let its data go."""
        done = self.done
        self.data = memoryview(b"")
        done(error)


class SlabState:
    """A learned slab: its descriptor, where its writes go, those that wait, and what failed at this epoch."""

    __slots__ = ("_failures", "descriptor", "in_vain", "parked", "seed", "targets", "trouble")

    def __init__(self, descriptor: SlabDescriptor, seed: int) -> None:
        self.descriptor = descriptor
        self.seed = seed
        self.targets: list[Target] | None = None  # None: to be found before the next sending
        self.parked: list[PendingWrite] = []  # by sequence
        self.trouble = ""  # why they could not be sent again at the last try
        self.in_vain = False  # and waiting would not help
        self._failures: dict[DriveId, CsvfsError] = {}

    def set_descriptor(self, descriptor: SlabDescriptor) -> None:
        self.descriptor = descriptor
        self.targets = None
        self._failures.clear()

    def find_targets(self, links: ServerLinks, min_copies: int) -> list[Target] | None:
        """The open links to all writable members; None: one is missing, or too few are in sync."""
        targets: list[Target] = []
        for member in self.descriptor.writable:
            server = links.ready(member.node)
            remote = None if server is None else server.drives.get(member.drive)
            if server is None or remote is None or remote.state != "ok" or server.link.closed is not None:
                return None
            targets.append((server.link, remote.index, member.drive))
        if len(self.descriptor.in_sync) < min_copies:
            return None
        self.targets = targets
        return targets

    def note_failure(self, drive: DriveId, error: CsvfsError, epoch: int) -> None:
        """What failed at an earlier epoch has been dealt with by the change to this one."""
        self.targets = None
        if epoch == self.descriptor.epoch:
            self._failures[drive] = error

    @property
    def failing(self) -> bool:
        """Whether a member has answered badly at this epoch and nobody has dealt with it yet."""
        return bool(self._failures)

    def take_failures(self, epoch: int) -> dict[DriveId, CsvfsError]:
        """What members answered badly at `epoch` since the last call."""
        failures, self._failures = self._failures, {}
        return failures if epoch == self.descriptor.epoch else {}

    def park(self, write: PendingWrite) -> None:
        if not write.parked_since:
            write.parked_since = trio.current_time()
        bisect.insort(self.parked, write, key=lambda parked: parked.sequence)

    def take_parked_before(self, when: float) -> list[PendingWrite]:
        """Those that have been waiting since `when` or longer."""
        late = [write for write in self.parked if write.parked_since <= when]
        self.parked = [write for write in self.parked if write.parked_since > when]
        return late

    def take_parked(self) -> list[PendingWrite]:
        """All parked writes in the order they were given (I4); none is parked afterwards."""
        parked, self.parked = self.parked, []
        return parked
