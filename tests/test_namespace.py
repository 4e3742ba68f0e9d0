"""Names and attributes: POSIX details by example. Random operations: test_namespace_model.py."""

import stat

import pytest

from coordinator.consistency import check
from coordinator.metadata import Metadata
from coordinator.namespace import COOKIE_BUCKET, NLINK_MAX, RENAME_EXCHANGE, RENAME_NOREPLACE
from csvfs.errors import (
    BadRequest,
    Conflict,
    Exists,
    FileTooBig,
    IsADirectory,
    NameTooLong,
    NoAttribute,
    NoSpace,
    NotADirectory,
    NotEmpty,
    NotFound,
    NotPermitted,
    ResultTooLarge,
    TooManyLinks,
)
from tests.metadata_members import TestVolume

FILE, DIRECTORY, SYMLINK = 0o100644, 0o040755, 0o120777
INO, MODE, NLINK, UID, GID, RDEV, SIZE, BLOCKS, ATIME, MTIME, CTIME, GENERATION, XATTRS = range(13)


@pytest.fixture
def volume():
    volume = TestVolume()
    yield volume
    assert check(volume.metadata) == []
    assert check(volume.reopened()) == []


def make(metadata: Metadata, parent: int, name: bytes, mode: int = FILE, now_ns: int = 10) -> int:
    return metadata.make(parent, name, mode, 1000, 1000, 0, b"", now_ns)[INO]


def names(metadata: Metadata, ino: int) -> list[bytes]:
    return sorted(name for _, name, _ in metadata.readdir(ino, 0, 4096)[0])


def test_a_new_file_has_the_attributes_it_was_made_with(volume):
    with volume.batch() as metadata:
        attr = metadata.make(1, b"file", 0o104755, 7, 8, 0, b"", 1234)
        device = metadata.make(1, b"device", stat.S_IFCHR | 0o600, 0, 0, 0x501, b"", 1234)
    assert attr == [2, 0o104755, 1, 7, 8, 0, 0, 0, 1234, 1234, 1234, 1, 0]
    assert device[RDEV] == 0x501
    assert metadata.lookup(1, b"file") == attr
    assert metadata.lookup(1, b"fil") is None
    assert metadata.getattr(1)[MTIME] == metadata.getattr(1)[CTIME] == 1234


def test_directories_count_their_subdirectories(volume):
    with volume.batch() as metadata:
        directory = make(metadata, 1, b"d", DIRECTORY)
        make(metadata, directory, b"a", DIRECTORY)
        make(metadata, directory, b"b", DIRECTORY)
        make(metadata, directory, b"file")
        assert metadata.getattr(directory)[NLINK] == 4
        metadata.unlink(directory, b"a", True, 11)
    assert metadata.getattr(directory)[NLINK] == 3
    assert metadata.getattr(1)[NLINK] == 3


def test_a_setgid_directory_hands_its_group_down(volume):
    with volume.batch() as metadata:
        shared = metadata.make(1, b"shared", DIRECTORY | stat.S_ISGID, 0, 77, 0, b"", 1)[INO]
        file = metadata.make(shared, b"file", FILE, 5, 5, 0, b"", 1)
        directory = metadata.make(shared, b"directory", DIRECTORY, 5, 5, 0, b"", 1)
    assert (file[GID], file[MODE]) == (77, FILE)
    assert (directory[GID], directory[MODE]) == (77, DIRECTORY | stat.S_ISGID)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (b"", NameTooLong),
        (b"x" * 256, NameTooLong),
        (b"a/b", BadRequest),
        (b"a\0b", BadRequest),
        (b".", BadRequest),
        (b"..", BadRequest),
    ],
)
def test_names_that_cannot_be_are_refused_everywhere(volume, name, error):
    with volume.batch() as metadata:
        make(metadata, 1, b"file")
        with pytest.raises(error):
            make(metadata, 1, name)
        with pytest.raises(error):
            metadata.lookup(1, name)
        with pytest.raises(error):
            metadata.link(2, 1, name, 1)
        with pytest.raises(error):
            metadata.unlink(1, name, False, 1)
        with pytest.raises(error):
            metadata.rename(1, b"file", 1, name, 0, 1)
        with pytest.raises(error):
            metadata.rename(1, name, 1, b"file", 0, 1)
    assert names(metadata, 1) == [b"file"]


def test_names_of_255_bytes_and_of_any_bytes_are_kept(volume):
    odd = [b"x" * 255, b"\xff\xfe", b"...", b" ", b"\n"]
    with volume.batch() as metadata:
        for name in odd:
            make(metadata, 1, name)
    assert names(metadata, 1) == sorted(odd)


def test_expected_errors_leave_the_batch_intact(volume):
    with volume.batch() as metadata:
        directory = make(metadata, 1, b"d", DIRECTORY)
        make(metadata, directory, b"inside")
        make(metadata, 1, b"f")
        for error, attempt in [
            (Exists, lambda: make(metadata, 1, b"f")),
            (Exists, lambda: metadata.link(3, 1, b"d", 1)),
            (NotPermitted, lambda: metadata.link(directory, 1, b"d2", 1)),
            (NotFound, lambda: metadata.link(99, 1, b"x", 1)),
            (NotFound, lambda: make(metadata, 99, b"x")),
            (NotADirectory, lambda: make(metadata, 4, b"x")),
            (NotADirectory, lambda: metadata.lookup(4, b"x")),
            (NotADirectory, lambda: metadata.readdir(4, 0, 10)),
            (NotADirectory, lambda: metadata.unlink(1, b"f", True, 1)),
            (IsADirectory, lambda: metadata.unlink(1, b"d", False, 1)),
            (NotEmpty, lambda: metadata.unlink(1, b"d", True, 1)),
            (NotFound, lambda: metadata.unlink(1, b"g", False, 1)),
            (NotFound, lambda: metadata.rename(1, b"g", 1, b"h", 0, 1)),
            (NotFound, lambda: metadata.rename(1, b"f", 99, b"h", 0, 1)),
            (Exists, lambda: metadata.rename(1, b"f", directory, b"inside", RENAME_NOREPLACE, 1)),
            (NotFound, lambda: metadata.rename(1, b"f", 1, b"g", RENAME_EXCHANGE, 1)),
            (IsADirectory, lambda: metadata.rename(1, b"f", 1, b"d", 0, 1)),
            (NotADirectory, lambda: metadata.rename(1, b"d", 1, b"f", 0, 1)),
            (BadRequest, lambda: metadata.rename(1, b"d", directory, b"d", 0, 1)),
            (BadRequest, lambda: metadata.rename(1, b"f", 1, b"g", 8, 1)),
            (BadRequest, lambda: metadata.readlink(4)),
            (BadRequest, lambda: metadata.make(1, b"m", 0o644, 0, 0, 0, b"", 1)),
            (BadRequest, lambda: metadata.readdir(1, 0, 0)),
            (BadRequest, lambda: metadata.setattr(4, uid=1 << 32, now_ns=1)),
            (IsADirectory, lambda: metadata.setattr(directory, size=0, now_ns=1)),
            (FileTooBig, lambda: metadata.setattr(4, size=(16 << 40) + 1, now_ns=1)),
            (FileTooBig, lambda: metadata.allocate(4, 1 << 32, 1, 0, 0, 1)),
            (Conflict, lambda: metadata.drop_orphan(4)),
            (NameTooLong, lambda: metadata.make(1, b"s", SYMLINK, 0, 0, 0, b"t" * 4096, 1)),
            (NameTooLong, lambda: metadata.make(1, b"s", SYMLINK, 0, 0, 0, b"", 1)),
        ]:
            before = metadata.getattr(1), metadata.getattr(directory), metadata.getattr(4)
            with pytest.raises(error):
                attempt()
            assert (metadata.getattr(1), metadata.getattr(directory), metadata.getattr(4)) == before
    assert names(volume.reopened(), 1) == [b"d", b"f"]


def test_an_unlinked_file_lives_on_as_an_orphan_until_it_is_dropped(volume):
    with volume.batch() as metadata:
        ino = make(metadata, 1, b"file")
        metadata.link(ino, 1, b"second", 12)
        assert metadata.unlink(1, b"file", False, 13) == (ino, 1)
        assert metadata.unlink(1, b"second", False, 14) == (ino, 0)
    assert volume.reopened().orphans() == [ino]
    with volume.batch() as metadata:
        metadata.setattr(ino, size=100, now_ns=15)
        with pytest.raises(NotFound):
            metadata.link(ino, 1, b"again", 15)
        assert metadata.drop_orphan(ino)
    assert metadata.orphans() == []
    with pytest.raises(NotFound):
        metadata.getattr(ino)


def test_nothing_can_be_made_in_a_directory_that_was_removed(volume):
    with volume.batch() as metadata:
        directory = make(metadata, 1, b"d", DIRECTORY)
        make(metadata, 1, b"f")
        assert metadata.unlink(1, b"d", True, 2) == (directory, 0)
        with pytest.raises(NotFound):
            make(metadata, directory, b"x")
        with pytest.raises(NotFound):
            metadata.rename(1, b"f", directory, b"f", 0, 3)
        assert metadata.readdir(directory, 0, 10) == ([], True)


def test_rename_replaces_and_says_what_it_replaced(volume):
    with volume.batch() as metadata:
        a, b = make(metadata, 1, b"a"), make(metadata, 1, b"b")
        assert metadata.rename(1, b"a", 1, b"b", 0, 20) == (a, b, 0)
        assert metadata.lookup(1, b"b")[INO] == a and metadata.lookup(1, b"a") is None
        assert metadata.getattr(a)[CTIME] == 20 and metadata.getattr(1)[MTIME] == 20
        assert metadata.orphans() == [b]
        metadata.drop_orphan(b)


def test_rename_onto_itself_or_another_name_of_the_same_file_changes_nothing(volume):
    with volume.batch() as metadata:
        ino = make(metadata, 1, b"a")
        metadata.link(ino, 1, b"b", 11)
        for flags in (0, RENAME_EXCHANGE):
            assert metadata.rename(1, b"a", 1, b"a", flags, 20) == (ino, 0, 0)
            assert metadata.rename(1, b"a", 1, b"b", flags, 20) == (ino, 0, 0)
    assert names(metadata, 1) == [b"a", b"b"]
    assert metadata.getattr(1)[MTIME] == 11


def test_directories_move_with_all_below_and_never_into_themselves(volume):
    with volume.batch() as metadata:
        a = make(metadata, 1, b"a", DIRECTORY)
        b = make(metadata, a, b"b", DIRECTORY)
        c = make(metadata, b, b"c", DIRECTORY)
        for target in (a, b, c):
            with pytest.raises(BadRequest, match="into itself"):
                metadata.rename(1, b"a", target, b"x", 0, 1)
        with pytest.raises(NotEmpty):
            metadata.rename(b, b"c", 1, b"a", 0, 1)
        metadata.rename(a, b"b", 1, b"b", 0, 2)
        metadata.rename(1, b"a", c, b"a", 0, 2)
        with pytest.raises(BadRequest, match="into itself"):
            metadata.rename(1, b"b", a, b"x", 0, 1)
    assert [metadata.getattr(ino)[NLINK] for ino in (1, a, b, c)] == [3, 2, 3, 3]


def test_a_directory_replaces_only_an_empty_directory(volume):
    with volume.batch() as metadata:
        a, empty = make(metadata, 1, b"a", DIRECTORY), make(metadata, 1, b"empty", DIRECTORY)
        make(metadata, a, b"file")
        full = make(metadata, 1, b"full", DIRECTORY)
        make(metadata, full, b"file")
        with pytest.raises(NotEmpty):
            metadata.rename(1, b"a", 1, b"full", 0, 1)
        assert metadata.rename(1, b"a", 1, b"empty", 0, 1) == (a, empty, 0)
        metadata.drop_orphan(empty)
    assert metadata.getattr(1)[NLINK] == 4


def test_exchange_swaps_a_file_and_a_directory(volume):
    with volume.batch() as metadata:
        left, right = make(metadata, 1, b"left", DIRECTORY), make(metadata, 1, b"right", DIRECTORY)
        moved, file = make(metadata, left, b"moved", DIRECTORY), make(metadata, right, b"file")
        assert metadata.rename(left, b"moved", right, b"file", RENAME_EXCHANGE, 9) == (moved, file, 1)
        with pytest.raises(BadRequest):
            metadata.rename(1, b"left", left, b"moved", RENAME_EXCHANGE, 9)
        with pytest.raises(BadRequest):
            metadata.rename(right, b"file", 1, b"right", RENAME_EXCHANGE, 9)
    assert metadata.lookup(left, b"moved")[INO] == file
    assert [metadata.getattr(ino)[NLINK] for ino in (left, right)] == [2, 3]


def test_link_counts_have_a_limit(volume):
    with volume.batch() as metadata:
        ino = make(metadata, 1, b"file")
        directory = make(metadata, 1, b"directory", DIRECTORY)
        make(metadata, 1, b"other", DIRECTORY)
        for full in (ino, directory):
            metadata.inodes.get(full).nlink = NLINK_MAX
        with pytest.raises(TooManyLinks):
            metadata.link(ino, 1, b"one more", 1)
        with pytest.raises(TooManyLinks):
            make(metadata, directory, b"one more", DIRECTORY)
        with pytest.raises(TooManyLinks):
            metadata.rename(1, b"other", directory, b"one more", 0, 1)
        metadata.inodes.get(ino).nlink, metadata.inodes.get(directory).nlink = 1, 2


def test_symlinks_keep_their_target(volume):
    with volume.batch() as metadata:
        attr = metadata.make(1, b"link", SYMLINK, 0, 0, 0, b"../\xff/target", 1)
        assert attr[SIZE] == 11
        assert metadata.readlink(attr[INO]) == b"../\xff/target"
        metadata.unlink(1, b"link", False, 2)
        metadata.drop_orphan(attr[INO])


def test_readdir_goes_on_from_a_cookie_while_the_directory_changes(volume):
    with volume.batch() as metadata:
        stay = [b"stay-%03d" % number for number in range(200)]
        for name in stay:
            make(metadata, 1, name)
        seen: list[bytes] = []
        cookie, eof, turn = 0, False, 0
        while not eof:
            entries, eof = metadata.readdir(1, cookie, 7)
            seen += [name for _, name, _ in entries]
            cookie = entries[-1][0] if entries else cookie
            turn += 1
            make(metadata, 1, b"new-%d" % turn)
            if turn % 2 == 0:
                metadata.unlink(1, b"new-%d" % turn, False, 1)
            elif turn % 3 == 0:
                metadata.rename(1, b"new-%d" % turn, 1, b"newer-%d" % turn, 0, 1)
        assert sorted(name for name in seen if name in stay) == stay
        for ino in metadata.orphans():
            metadata.drop_orphan(ino)


def test_names_of_one_hash_share_a_bucket_until_it_is_full(volume, monkeypatch):
    monkeypatch.setattr(volume.metadata.names, "bucket", lambda name: 4096)
    with volume.batch() as metadata:
        for number in range(COOKIE_BUCKET):
            make(metadata, 1, b"%d" % number)
        with pytest.raises(NoSpace):
            make(metadata, 1, b"one more")
        metadata.unlink(1, b"5", False, 1)
        metadata.drop_orphan(metadata.orphans()[0])
        metadata.rename(1, b"3", 1, b"three", 0, 1)
        assert metadata.lookup(1, b"15") is not None
        assert metadata.lookup(1, b"3") is None and metadata.lookup(1, b"three") is not None
        assert len({cookie for cookie, _, _ in metadata.readdir(1, 0, 100)[0]}) == COOKIE_BUCKET - 1


def test_chown_takes_setuid_away_as_linux_does(volume):
    with volume.batch() as metadata:
        ino = metadata.make(1, b"program", 0o106755, 0, 0, 0, b"", 1)[INO]
        assert metadata.setattr(ino, uid=5, now_ns=2)[MODE] == 0o100755
        metadata.setattr(ino, mode=0o6745, now_ns=2)
        assert metadata.setattr(ino, gid=5, now_ns=2)[MODE] == 0o102745
        assert metadata.setattr(ino, uid=5, mode=0o6755, now_ns=3)[MODE] == 0o106755
        directory = make(metadata, 1, b"d", DIRECTORY | stat.S_ISGID)
        assert metadata.setattr(directory, gid=1, now_ns=3)[MODE] == DIRECTORY | stat.S_ISGID
        assert metadata.setattr(ino, atime_ns=-5, mtime_ns=6, now_ns=7)[ATIME : CTIME + 1] == [-5, 6, 7]


def test_a_reported_size_only_grows(volume):
    with volume.batch() as metadata:
        ino = make(metadata, 1, b"file")
        metadata.commit_file(ino, 5000, 77, None, 78)
        metadata.commit_file(ino, 4000, None, 99, 100)
    attr = metadata.getattr(ino)
    assert (attr[SIZE], attr[ATIME], attr[MTIME], attr[CTIME]) == (5000, 99, 77, 78)


def test_extended_attributes_keep_their_limits_and_flags(volume):
    with volume.batch() as metadata:
        ino = make(metadata, 1, b"file")
        metadata.setxattr(ino, b"user.a", b"1", 1, 20)
        metadata.setxattr(ino, b"user.b", b"x" * 65536, 0, 21)
        with pytest.raises(Exists):
            metadata.setxattr(ino, b"user.a", b"2", 1, 22)
        with pytest.raises(NoAttribute):
            metadata.setxattr(ino, b"user.c", b"2", 2, 22)
        with pytest.raises(ResultTooLarge):
            metadata.setxattr(ino, b"user.c", b"x" * 65537, 0, 22)
        with pytest.raises(NameTooLong):
            metadata.setxattr(ino, b"x" * 256, b"", 0, 22)
        assert metadata.listxattr(ino) == [b"user.a", b"user.b"]
        metadata.setxattr(ino, b"user.a", b"", 2, 23)
        assert metadata.getxattr(ino, b"user.a") == b""
        assert metadata.getattr(ino)[CTIME] == 23
        metadata.removexattr(ino, b"user.a", 24)
        with pytest.raises(NoAttribute):
            metadata.removexattr(ino, b"user.a", 25)
        with pytest.raises(NoAttribute):
            metadata.getxattr(ino, b"user.a")
        for number in range(255):
            metadata.setxattr(ino, b"%0255d" % number, b"", 0, 26)
        with pytest.raises(NoSpace):
            metadata.setxattr(ino, b"%0255d" % 256, b"", 0, 26)


def test_rollback_undoes_what_is_only_in_memory_too(volume):
    with volume.batch() as metadata:
        kept = make(metadata, 1, b"kept")
    before = metadata.getattr(1), metadata.statfs()
    metadata.begin()
    make(metadata, 1, b"gone")
    metadata.allocate(kept, 0, 10, 40960, 5, 5)
    metadata.unlink(1, b"kept", False, 6)
    metadata.rollback()
    assert (metadata.getattr(1), metadata.statfs()) == before
    assert names(metadata, 1) == [b"kept"] and metadata.orphans() == []


def test_numbers_and_types_out_of_range_are_refused_one_by_one(volume):
    """A confused mount must not take down the batch that others are in."""
    huge = 1 << 70
    with volume.batch() as metadata:
        ino = make(metadata, 1, b"file")
        for error, attempt in [
            (NotFound, lambda: metadata.getattr(huge)),
            (NotFound, lambda: metadata.getattr(-1)),
            (BadRequest, lambda: metadata.lookup(1, "text")),
            (BadRequest, lambda: metadata.readdir(1, huge, 10)),
            (BadRequest, lambda: metadata.readdir(1, -1, 10)),
            (BadRequest, lambda: metadata.make(1, b"x", -1, 0, 0, 0, b"", 1)),
            (BadRequest, lambda: metadata.make(1, b"x", huge, 0, 0, 0, b"", 1)),
            (BadRequest, lambda: metadata.make(1, b"x", FILE, huge, 0, 0, b"", 1)),
            (BadRequest, lambda: metadata.make(1, b"x", FILE, 0, 0, -1, b"", 1)),
            (BadRequest, lambda: metadata.setattr(ino, mtime_ns=huge, now_ns=1)),
            (BadRequest, lambda: metadata.setattr(ino, mode=huge, now_ns=1)),
            (FileTooBig, lambda: metadata.setattr(ino, size=-1, now_ns=1)),
            (BadRequest, lambda: metadata.allocate(ino, 0, 1, 0, huge, 1)),
            (FileTooBig, lambda: metadata.allocate(ino, huge, 1, 0, 0, 1)),
            (FileTooBig, lambda: metadata.allocate(ino, 0, 1, huge, 0, 1)),
            (FileTooBig, lambda: metadata.commit_file(ino, huge, None, None, 1)),
            (BadRequest, lambda: metadata.commit_file(ino, 1, huge, None, 1)),
            (BadRequest, lambda: metadata.setxattr(ino, "text", b"", 0, 1)),
        ]:
            with pytest.raises(error):
                attempt()
    assert names(volume.reopened(), 1) == [b"file"]
