"""Quotas of directories: what counts, what is refused, and what moves."""

import contextlib
from collections.abc import Iterator
from random import Random

import pytest

from coordinator.consistency import check
from coordinator.inodes import Inodes
from coordinator.metadata import Metadata
from coordinator.namespace import RENAME_EXCHANGE
from coordinator.quotas import COUNTING, IN_FORCE
from csvfs.errors import Conflict, CrossesQuota, CsvfsError, NotADirectory, NotFound, QuotaExceeded
from tests.metadata_members import TestVolume

FILE, DIRECTORY = 0o100644, 0o040755
INO, BLOCKS = 0, 7


@pytest.fixture
def volume() -> Iterator[TestVolume]:
    volume = TestVolume(data_slabs=4)
    yield volume
    assert check(volume.metadata) == []
    assert check(volume.reopened()) == []


def make(metadata: Metadata, parent: int, name: bytes, mode: int = FILE) -> int:
    return metadata.make(parent, name, mode, 0, 0, 0, b"", 10)[INO]


def write(metadata: Metadata, ino: int, blocks: int, at: int = 0) -> None:
    """As a mount that writes them: no holes are left, and the size tells."""
    assert metadata.allocate(ino, at, blocks, (at + blocks) * 4096, 0, 10).missing == 0


def rename(metadata: Metadata, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0) -> None:
    metadata.rename(parent, name, new_parent, new_name, flags, 20)


def settled(volume: TestVolume, root: int, limit: int = 3) -> None:
    """All that is to be counted, or forgotten, is."""
    for _ in range(10_000):
        with volume.batch() as metadata:
            if metadata.quota_trees.step(root, limit):
                return
    raise AssertionError("it does not come to an end")


def use(metadata: Metadata, root: int) -> tuple[int, int]:
    quota = metadata.quotas.by_root[root]
    return quota.blocks, quota.files


def limited(volume: TestVolume, blocks: int, files: int = 0) -> int:
    """A directory `vm` with a quota that has been counted."""
    with volume.batch() as metadata:
        root = make(metadata, 1, b"vm", DIRECTORY)
        metadata.quota_trees.set(root, blocks, files)
    settled(volume, root)
    return root


def test_blocks_of_a_tree_count_and_what_would_be_too_many_is_refused_without_a_trace(volume: TestVolume) -> None:
    root = limited(volume, blocks=10)
    with volume.batch() as metadata:
        below = make(metadata, root, b"below", DIRECTORY)
        first, second = make(metadata, root, b"first"), make(metadata, below, b"second")
        write(metadata, first, 6)
        outside = make(metadata, 1, b"outside")
        write(metadata, outside, 6)
        with pytest.raises(QuotaExceeded, match=r"quota of 40.0 KiB and 24.0 KiB in use: 20.0 KiB more do not fit"):
            write(metadata, second, 5)
        write(metadata, second, 4)
    assert use(volume.metadata, root) == (10, 4)
    assert volume.metadata.getattr(second)[BLOCKS] == 4 * 8


def test_little_space_is_granted_ahead_where_there_is_a_quota_so_that_others_find_theirs(volume: TestVolume) -> None:
    root = limited(volume, blocks=24)
    with volume.batch() as metadata:
        file = make(metadata, root, b"grows")
        for at in range(12):
            write(metadata, file, 1, at)
            assert use(metadata, root)[0] - at - 1 <= (24 - at) // 8
        other = make(metadata, root, b"other")
        write(metadata, other, 10)
        for at in range(12, 14):
            write(metadata, file, 1, at)
        with pytest.raises(QuotaExceeded):
            write(metadata, file, 1, 14)
    assert use(volume.metadata, root) == (24, 3)


def test_files_count_with_directories_and_deleted_ones_until_they_are_let_go_of(volume: TestVolume) -> None:
    root = limited(volume, blocks=0, files=3)
    with volume.batch() as metadata:
        make(metadata, root, b"directory", DIRECTORY)
        file = make(metadata, root, b"file")
        with pytest.raises(QuotaExceeded, match="quota of 3 files and has 3"):
            make(metadata, root, b"more")
        write(metadata, file, 5)
        metadata.unlink(root, b"file", False, 20)
        with pytest.raises(QuotaExceeded):
            make(metadata, root, b"more")
        assert use(metadata, root) == (5, 3)
        assert metadata.drop_orphan(file)
        make(metadata, root, b"more")
    assert use(volume.metadata, root) == (0, 3)


def test_truncation_and_holes_give_back(volume: TestVolume) -> None:
    root = limited(volume, blocks=8)
    with volume.batch() as metadata:
        file = make(metadata, root, b"file")
        write(metadata, file, 8)
        metadata.punch(file, 2, 3, 20)
        assert use(metadata, root) == (5, 2)
        metadata.setattr(file, mode=None, uid=None, gid=None, size=4096, atime_ns=None, mtime_ns=None, now_ns=20)
    assert use(volume.metadata, root) == (1, 2)


def test_what_is_there_already_is_counted_step_by_step_while_everything_changes(volume: TestVolume) -> None:
    with volume.batch() as metadata:
        root = make(metadata, 1, b"vm", DIRECTORY)
        directories = [make(metadata, root, b"d%d" % index, DIRECTORY) for index in range(5)]
        for directory in directories:
            for index in range(9):
                write(metadata, make(metadata, directory, b"f%d" % index), 1)
        elsewhere = make(metadata, 1, b"elsewhere", DIRECTORY)
        tree = make(metadata, elsewhere, b"tree", DIRECTORY)
        for index in range(9):
            write(metadata, make(metadata, tree, b"f%d" % index), 1)
        metadata.quota_trees.set(root, 1000, 0)
        # The walk has not begun: what comes now joins, with all below it; what goes was never counted.
        rename(metadata, elsewhere, b"tree", root, b"tree")
        rename(metadata, directories[0], b"f0", elsewhere, b"f0")
    for step in range(200):
        with volume.batch() as metadata:
            done = metadata.quota_trees.step(root, 2)
            if step % 3 == 0 and step < 27:
                source, target = directories[step % 5], directories[(step * 2 + 1) % 5]
                rename(metadata, source, b"f%d" % (step // 3 or 1), target, b"moved%d" % step)
                write(metadata, make(metadata, directories[step % 5], b"new%d" % step), 2)
        if step == 7:
            volume.reopened()
        if done:
            break
    assert volume.metadata.quotas.by_root[root].state == IN_FORCE
    assert use(volume.metadata, root) == (5 * 9 - 1 + 9 + 9 * 2, 1 + 5 + 44 + 1 + 9 + 9)


def test_the_next_coordinator_goes_on_counting(volume: TestVolume) -> None:
    with volume.batch() as metadata:
        root = make(metadata, 1, b"vm", DIRECTORY)
        for index in range(20):
            make(metadata, root, b"f%d" % index)
        metadata.quota_trees.set(root, 10, 0)
        metadata.quota_trees.step(root, 3)
    metadata = volume.reopened()
    assert metadata.quota_trees.unfinished() == [root]
    assert metadata.quotas.by_root[root].state == COUNTING
    assert use(metadata, root) == (0, 4)


def test_a_file_that_moves_counts_where_it_is_and_a_directory_with_entries_is_copied_by_mv(volume: TestVolume) -> None:
    root = limited(volume, blocks=10)
    with volume.batch() as metadata:
        outside = make(metadata, 1, b"outside", DIRECTORY)
        file, large = make(metadata, outside, b"file"), make(metadata, outside, b"large")
        write(metadata, file, 4)
        write(metadata, large, 7)
        rename(metadata, outside, b"file", root, b"file")
        assert use(metadata, root) == (4, 2)
        with pytest.raises(QuotaExceeded):
            rename(metadata, outside, b"large", root, b"large")
        empty = make(metadata, outside, b"empty", DIRECTORY)
        rename(metadata, outside, b"empty", root, b"empty")
        assert use(metadata, root) == (4, 3)
        make(metadata, empty, b"entry")
        with pytest.raises(CrossesQuota):
            rename(metadata, root, b"empty", outside, b"empty")
        full = make(metadata, outside, b"full", DIRECTORY)
        make(metadata, full, b"entry")
        with pytest.raises(CrossesQuota):
            rename(metadata, outside, b"full", root, b"full")
        rename(metadata, root, b"file", outside, b"file")
        with pytest.raises(CrossesQuota):
            rename(metadata, outside, b"file", root, b"empty", RENAME_EXCHANGE)
    assert use(volume.metadata, root) == (0, 3)


def test_no_file_has_names_in_two_trees(volume: TestVolume) -> None:
    root = limited(volume, blocks=10)
    with volume.batch() as metadata:
        outside, inside = make(metadata, 1, b"outside"), make(metadata, root, b"inside")
        write(metadata, inside, 2)
        with pytest.raises(CrossesQuota):
            metadata.link(outside, root, b"name", 20)
        metadata.link(inside, 1, b"name outside", 20)  # it counts where it is
        rename(metadata, root, b"inside", 1, b"moved")
    assert use(volume.metadata, root) == (2, 2)


def test_trees_do_not_contain_each_other(volume: TestVolume) -> None:
    root = limited(volume, blocks=10)
    with volume.batch() as metadata:
        below, file = make(metadata, root, b"below", DIRECTORY), make(metadata, 1, b"file")
        other = make(metadata, 1, b"other", DIRECTORY)
        metadata.quota_trees.set(other, 5, 0)
        for directory, error in ((below, Conflict), (1, Conflict), (file, NotADirectory), (999, NotFound)):
            with pytest.raises(error):
                metadata.quota_trees.set(directory, 1, 1)
        with pytest.raises(CrossesQuota):
            rename(metadata, 1, b"other", root, b"other")
        rename(metadata, 1, b"vm", 1, b"renamed")  # takes its quota along
    assert use(volume.metadata, root) == (0, 2)


def test_a_quota_may_be_less_than_is_in_use_and_is_removed_in_steps(volume: TestVolume) -> None:
    root = limited(volume, blocks=100)
    with volume.batch() as metadata:
        files = [make(metadata, root, b"f%d" % index) for index in range(10)]
        write(metadata, files[0], 5)
        metadata.quota_trees.set(root, 3, 2)
        with pytest.raises(QuotaExceeded):
            write(metadata, files[1], 1)
        metadata.unlink(root, b"f9", False, 20)
        metadata.drop_orphan(files[9])
        metadata.quota_trees.remove(root)
        write(metadata, files[1], 1)
        with pytest.raises(Conflict, match="is being removed"):
            metadata.quota_trees.set(root, 1, 1)
    settled(volume, root)
    assert volume.metadata.quotas.by_root == {}
    with volume.batch() as metadata:
        assert metadata.quota_trees.set(root, 50, 0).state == COUNTING
    settled(volume, root)
    assert use(volume.metadata, root) == (6, 10)


def test_a_directory_that_is_deleted_takes_its_quota_along(volume: TestVolume) -> None:
    root = limited(volume, blocks=10)
    with volume.batch() as metadata:
        file = make(metadata, root, b"open while deleted")
        write(metadata, file, 2)
        metadata.unlink(root, b"open while deleted", False, 20)
        metadata.unlink(1, b"vm", True, 20)
        metadata.drop_orphan(root)
        assert metadata.quotas.by_root == {}
        write(metadata, file, 20)
        metadata.drop_orphan(file)


def test_a_batch_that_is_rolled_back_leaves_no_trace(volume: TestVolume) -> None:
    root = limited(volume, blocks=10)
    with volume.batch() as metadata:
        file = make(metadata, root, b"file")
        write(metadata, file, 2)
    with pytest.raises(ZeroDivisionError), volume.batch() as metadata:
        write(metadata, file, 3, 2)
        make(metadata, root, b"more")
        _ = 1 // 0
    assert use(volume.metadata, root) == (2, 2)


def test_a_volume_made_before_there_were_quotas_gets_them(volume: TestVolume) -> None:
    with volume.batch() as metadata:
        for table in ("quotas", "quota_walk", "quota_members"):
            metadata.database.run(f"DROP TABLE {table}")
        root = make(metadata, 1, b"vm", DIRECTORY)
    metadata = volume.metadata
    assert Inodes(metadata.database).quotas.by_root == {}
    metadata.quotas.prepare()
    volume.send_log()
    with volume.batch() as metadata:
        metadata.quota_trees.set(root, 1, 1)
    settled(volume, root)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_a_quota_says_what_its_tree_holds(volume: TestVolume, seed: int) -> None:
    """The fixture compares quotas with the inodes that count for them; here it is that nothing goes over a limit."""
    random = Random(seed)
    directories, number = [1], 0
    files: list[tuple[int, bytes]] = []
    for _ in range(12):
        with volume.batch() as metadata:
            for _ in range(12):
                number += 1
                parent, other, name = random.choice(directories), random.choice(directories), b"n%d" % number
                with contextlib.suppress(CsvfsError):
                    match random.randrange(9):
                        case 0:
                            directories.append(make(metadata, parent, name, DIRECTORY))
                        case 1 | 2:
                            write(metadata, make(metadata, parent, name), random.randrange(1, 9))
                            files.append((parent, name))
                        case 3 if files:
                            rename(metadata, *random.choice(files), other, name)
                        case 4 if files:
                            ino, nlink = metadata.unlink(*files.pop(), False, 20)
                            if not nlink and random.random() < 0.5:
                                metadata.drop_orphan(ino)
                        case 5 if files:
                            attr = metadata.lookup(*random.choice(files))
                            if attr is not None:
                                metadata.link(attr[INO], other, name, 20)
                        case 6:
                            metadata.quota_trees.set(parent, random.choice((0, 20, 40)), random.choice((0, 9)))
                        case 7:
                            for root in metadata.quota_trees.unfinished():
                                metadata.quota_trees.step(root, random.randrange(1, 5))
                        case 8 if random.random() < 0.2:
                            metadata.quota_trees.remove(parent)
        assert check(volume.metadata) == []
    for root in volume.metadata.quota_trees.unfinished():
        settled(volume, root)
