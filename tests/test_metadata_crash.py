"""Wherever a coordinator's log ends, its successor finds every acknowledged operation, and no half one."""

import random
from itertools import pairwise

import pytest

from coordinator.consistency import check
from coordinator.metadata import Metadata
from coordinator.slab_image import LogBarrier, LogEntry, SlabImage
from csvfs.errors import Corrupt, CsvfsError, NoSpace
from tests.metadata_members import SLAB_BLOCKS, VOLUME, Members, TestVolume

FILE, DIRECTORY = 0o100644, 0o040755
State = list[tuple]


def state_of(metadata: Metadata) -> State:
    """All that operations can change, as rows."""
    tables = ("counters", "inodes", "entries", "xattrs", "orphans", "extents", "trims", "sessions", "replies")
    rows = [(table, *row) for table in tables for row in metadata.database.rows(f"SELECT * FROM {table}")]
    return rows + metadata.database.rows("SELECT 'slabs', id, free, bitmap FROM slabs")


class History:
    """A volume with random batches, and what was committed after how many entries of its log."""

    def __init__(self, seed: int, batches: int, *, files_per_batch: int, cache_pages: int = 2000) -> None:
        self.random = random.Random(seed)
        self.volume = TestVolume(data_slabs=0)
        self.volume.metadata.database.rows(f"PRAGMA cache_size={cache_pages}")
        self.commits: list[tuple[int, State]] = []
        self.volume.add_data_slab()
        self.remember()
        with self.volume.batch() as metadata:
            self.session = metadata.open_session("n1", 1).id
            self.directory = metadata.make(1, b"directory", DIRECTORY, 0, 0, 0, b"", 2)[0]
        self.remember()
        self.op = 0
        for _ in range(batches):
            with self.volume.batch() as metadata:
                for _ in range(self.random.randint(1, files_per_batch)):
                    self.operation(metadata)
            self.remember()
            if self.volume.metadata.checkpoint_due and self.random.random() < 0.5:
                self.volume.metadata.checkpoint()
                self.volume.send_log()
            if self.random.random() < 0.3:
                self.volume.carry_out_trims()
                self.remember()

    def remember(self) -> None:
        self.commits.append((len(self.volume.log), state_of(self.volume.metadata)))

    def operation(self, metadata: Metadata) -> None:
        pick = self.random
        parent, other = pick.choices([1, self.directory], k=2)
        name, new_name = (b"n%02d" % pick.randrange(40) + b"-" * pick.randrange(150) for _ in range(2))
        entries, _ = metadata.readdir(parent, 0, 1000)
        known = pick.choice(entries)[1] if entries else name
        self.op += 1
        try:
            kind = pick.randrange(7)
            if kind <= 2:
                ino = metadata.make(parent, name, FILE, 0, 0, 0, b"", self.op)[0]
                metadata.allocate(ino, pick.randrange(20), pick.randrange(1, 8), 4096, 0, self.op)
            elif kind == 3:
                ino, nlink = metadata.unlink(parent, known, False, self.op)
                if nlink == 0 and pick.random() < 0.8:
                    metadata.drop_orphan(ino)
            elif kind == 4:
                metadata.rename(parent, known, other, new_name, 0, self.op)
            elif kind == 5:
                metadata.setxattr(parent, name[:100], pick.randbytes(500), 0, self.op)
            else:
                metadata.setattr(
                    pick.choice(entries)[2][0] if entries else 1, size=pick.randrange(90_000), now_ns=9
                )
        except CsvfsError:
            pass
        metadata.store_reply(self.session, self.op, b"reply %d" % self.op)
        metadata.op_done(self.session, self.op - 5)

    def states_from(self, acknowledged: int) -> list[State]:
        """What a successor may find when the first `acknowledged` entries of the log are surely there."""
        last = max(index for index, (length, _) in enumerate(self.commits) if length <= acknowledged)
        return [state for _, state in self.commits[last:]]


def recover(blocks: dict[int, bytes], volume: TestVolume) -> Metadata:
    members = Members(blocks)
    return Metadata.open(SlabImage.open(members.read_blocks, volume.capacity, VOLUME), VOLUME)


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_every_prefix_of_the_log_recovers_to_exactly_the_acknowledged_operations(seed):
    """A member holds a prefix of the log at any instant: kill the coordinator at each."""
    history = History(seed, 45, files_per_batch=8)
    volume = history.volume
    first_commit = history.commits[0][0]
    members = Members()
    members.apply(volume.log[:first_commit])
    for length in range(first_commit, len(volume.log) + 1):
        members.apply(volume.log[length - 1 : length])
        metadata = recover(dict(members.blocks), volume)
        allowed = history.states_from(length)[:2]  # the last acknowledged, or the next if its commit is in
        found = state_of(metadata)
        assert found in allowed, f"seed {seed}: cut after {length} of {len(volume.log)} entries"
        if length % 10 == 0:
            assert check(metadata) == []
        metadata.close()


@pytest.mark.parametrize("seed", [11, 12, 13, 14, 15, 16])
def test_a_power_cut_loses_nothing_that_was_flushed_whatever_else_reached_the_media(seed):
    """Before the last barrier all is on the media; of what came later an arbitrary subset is."""
    history = History(seed, 60, files_per_batch=6)
    volume, pick = history.volume, random.Random(seed)
    first_commit = history.commits[0][0]
    cuts = range(first_commit, len(volume.log) + 1)
    for length in [pick.choice(cuts) for _ in range(400)] + list(cuts[-3:]):
        flushed = last_barrier(volume.log, length, first_commit)
        if pick.random() < 0.5:
            flushed = pick.randint(flushed, length)  # an fsync of the service's own
        members = Members()
        members.apply(volume.log[:flushed])
        chance = pick.random()
        members.apply(entry for entry in volume.log[flushed:length] if pick.random() < chance)
        metadata = recover(members.blocks, volume)
        assert state_of(metadata) in history.states_from(flushed), f"seed {seed}: {flushed} to {length}"
        assert metadata.database.rows("PRAGMA integrity_check") == [("ok",)]
        metadata.close()


def test_pages_that_leave_the_cache_before_their_commit_do_not_count_without_it():
    """SQLite then writes frames early, and some of them twice in place."""
    history = History(21, 25, files_per_batch=60, cache_pages=10)
    volume = history.volume
    assert any(next_length - length > 15 for (length, _), (next_length, _) in pairwise(history.commits))
    members = Members()
    first_commit = history.commits[0][0]
    members.apply(volume.log[:first_commit])
    for length in range(first_commit, len(volume.log) + 1):
        members.apply(volume.log[length - 1 : length])
        metadata = recover(dict(members.blocks), volume)
        assert state_of(metadata) in history.states_from(length)[:2], f"cut after {length} entries"
        metadata.close()


def test_a_batch_that_was_refused_leaves_nothing_for_a_successor_to_find():
    volume = TestVolume(slabs=16)
    with volume.batch() as metadata:
        metadata.make(1, b"before", FILE, 0, 0, 0, b"", 1)
    start = len(volume.log)
    with pytest.raises(NoSpace), volume.batch() as metadata:
        for number in range(20_000):
            metadata.make(1, b"%d-" % number + b"x" * 200, FILE, 0, 0, 0, b"", 1)
    volume.send_log()
    refused = len(volume.log)
    assert refused - start > 100
    with volume.batch() as metadata:
        metadata.make(1, b"after", FILE, 0, 0, 0, b"", 1)
    members = Members()
    members.apply(volume.log[:start])
    for length in range(start + 1, len(volume.log) + 1):
        members.apply(volume.log[length - 1 : length])
        metadata = recover(dict(members.blocks), volume)
        found = {name for _, name, _ in metadata.readdir(1, 0, 4096)[0]}
        assert found == {b"before", b"after"} if length == len(volume.log) else found >= {b"before"}
        assert len(found) <= 2
        metadata.close()


def test_a_successor_goes_on_where_the_log_was_cut_and_is_itself_recoverable():
    history = History(7, 30, files_per_batch=8)
    volume, pick = history.volume, random.Random(7)
    for _ in range(15):
        length = pick.randint(history.commits[0][0], len(volume.log))
        members = Members()
        members.apply(volume.log[:length])
        for generation in range(4):
            metadata = recover(members.blocks, volume)
            before = metadata.statfs().files
            for number in range(30):
                metadata.begin()
                metadata.make(1, b"g%d-%d-" % (generation, number) + b"x" * 200, FILE, 0, 0, 0, b"", 1)
                metadata.commit()
            log = metadata.image.take_log()
            members.apply(log)
            metadata.close()
            after = recover(dict(members.blocks), volume)
            assert after.statfs().files == before + 30
            assert check(after) == []
            after.close()


def test_a_volume_whose_creation_was_cut_short_is_refused_not_half_opened():
    members = Members()
    image = SlabImage.create(members.read_blocks, 4 * SLAB_BLOCKS, SLAB_BLOCKS)
    Metadata.create(image, VOLUME, 1)
    log = image.take_log()
    while isinstance(log[-1], LogBarrier):
        log.pop()
    for length in range(len(log)):
        members = Members()
        members.apply(log[:length])
        with pytest.raises(Corrupt, match="magic"):
            SlabImage.open(members.read_blocks, 4 * SLAB_BLOCKS, VOLUME)
    members.apply(log)
    assert check(recover(members.blocks, TestVolume())) == []


def test_replies_are_committed_with_their_operations():
    """I11: who finds the file finds the reply, and the other way round."""
    volume = TestVolume()
    with volume.batch() as metadata:
        session = metadata.open_session("n1", 1).id
    start = len(volume.log)
    for op in range(1, 30):
        with volume.batch() as metadata:
            metadata.make(1, b"%d" % op, FILE, 0, 0, 0, b"", op)
            metadata.store_reply(session, op, b"made %d" % op)
    for length in range(start, len(volume.log) + 1):
        members = Members()
        members.apply(volume.log[:length])
        metadata = recover(members.blocks, volume)
        for op in range(1, 30):
            made = metadata.lookup(1, b"%d" % op) is not None
            assert made == (metadata.reply_of(session, op) is not None)
        metadata.close()


def last_barrier(log: list[LogEntry], length: int, first: int) -> int:
    """How many entries lie before and at the last barrier of `log[:length]`, `first` at least."""
    for index in range(length, first, -1):
        if isinstance(log[index - 1], LogBarrier):
            return index
    return first
