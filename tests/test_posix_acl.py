"""POSIX ACLs: bytes from outside, and how a list and a mode follow each other. On mounts: test_posix_lab.py."""

import itertools
import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import posix_acl
from coordinator.consistency import check
from coordinator.metadata import Metadata
from coordinator.posix_acl import ACCESS, DEFAULT, GROUP, GROUP_OBJ, MASK, NO_ID, OTHER, USER, USER_OBJ
from csvfs.errors import AccessDenied, BadRequest, Corrupt, NoAttribute, NotSupported
from tests.metadata_members import TestVolume

FILE, DIRECTORY, SYMLINK = 0o100644, 0o040755, 0o120777
INO, MODE, CTIME, XATTRS = 0, 1, 10, 12


def acl(*entries: tuple[int, int, int]) -> bytes:
    """Of (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NAMED = acl((USER_OBJ, 6, NO_ID), (USER, 4, 1001), (GROUP_OBJ, 0, NO_ID), (MASK, 4, NO_ID), (OTHER, 0, NO_ID))
PLAIN = acl((USER_OBJ, 7, NO_ID), (GROUP_OBJ, 5, NO_ID), (OTHER, 1, NO_ID))


@pytest.fixture
def volume():
    volume = TestVolume()
    yield volume
    assert check(volume.metadata) == []
    assert check(volume.reopened()) == []


def make(metadata: Metadata, name: bytes, mode: int = FILE, parent: int = 1, umask: int = 0) -> int:
    return metadata.make(parent, name, mode, 5, 5, 0, b"x" if stat.S_ISLNK(mode) else b"", 10, umask=umask)[INO]


def shown(metadata: Metadata, ino: int) -> tuple[int, bytes | None]:
    """Permissions and access ACL."""
    try:
        value = metadata.getxattr(ino, ACCESS)
    except NoAttribute:
        value = None
    return stat.S_IMODE(metadata.getattr(ino)[MODE]), value


# -- bytes


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\2\0\0",
        acl()[:-1],
        NAMED[:-1],
        struct.pack("<I", 1) + NAMED[4:],
        acl((USER_OBJ, 7, NO_ID), (GROUP_OBJ, 5, NO_ID)),
        acl((USER_OBJ, 7, NO_ID), (USER, 7, 5), (GROUP_OBJ, 5, NO_ID), (OTHER, 5, NO_ID)),
        PLAIN + struct.pack("<HHI", USER_OBJ, 7, 0),
        NAMED + struct.pack("<HHI", USER, 7, 1001),
        NAMED + struct.pack("<HHI", USER, 7, NO_ID),
        NAMED + struct.pack("<HHI", 0x40, 7, 0),
        NAMED + struct.pack("<HHI", 0, 7, 0),
        NAMED + struct.pack("<HHI", USER, 8, 7),
        NAMED + b"".join(struct.pack("<HHI", GROUP, 7, gid) for gid in range(posix_acl.ENTRIES_MAX)),
    ],
)
def test_what_is_no_list_or_says_two_things_is_refused(value: bytes, volume: TestVolume) -> None:
    with volume.batch() as metadata:
        file = make(metadata, b"f")
        before = metadata.getattr(file)
        for name in posix_acl.NAMES:
            with pytest.raises(BadRequest):
                metadata.setxattr(file, name, value, 0, 11)
    assert metadata.getattr(file) == before


def test_every_order_of_the_same_entries_is_stored_as_one() -> None:
    entries = [NAMED[at : at + 8] for at in range(4, len(NAMED), 8)]
    for some in itertools.permutations(entries):
        assert posix_acl.pack(posix_acl.parse(NAMED[:4] + b"".join(some))) == NAMED


@given(
    st.one_of(
        st.binary(max_size=64),
        st.lists(
            st.tuples(
                st.sampled_from((USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER, 3)),
                st.integers(0, 8),
                st.sampled_from((0, 5, 6, NO_ID)),
            ),
            max_size=8,
        ).map(lambda entries: acl(*entries)),
    )
)
def test_whatever_comes_is_refused_or_canonical(value: bytes) -> None:
    try:
        entries = posix_acl.parse(value)
    except BadRequest:
        return
    packed = posix_acl.pack(entries)
    assert posix_acl.parse(packed) == entries
    assert {packed[at : at + 4] for at in range(4, len(packed), 8)} == {value[at : at + 4] for at in range(4, len(value), 8)}


# -- list and mode


def test_a_list_shows_in_the_mode_and_chmod_in_the_list(volume: TestVolume) -> None:
    with volume.batch() as metadata:
        file = make(metadata, b"f", 0o100600)
        metadata.setxattr(file, ACCESS, NAMED, 0, 11)
        assert shown(metadata, file) == (0o640, NAMED)
        assert (metadata.getattr(file)[CTIME], metadata.getattr(file)[XATTRS]) == (11, 1)
        metadata.setattr(file, mode=0o751, now_ns=12)
        expected = acl((USER_OBJ, 7, NO_ID), (USER, 4, 1001), (GROUP_OBJ, 0, NO_ID), (MASK, 5, NO_ID), (OTHER, 1, NO_ID))
        assert shown(metadata, file) == (0o751, expected)


def test_a_list_that_says_no_more_than_a_mode_is_not_kept(volume: TestVolume) -> None:
    with volume.batch() as metadata:
        file = make(metadata, b"f")
        metadata.setxattr(file, ACCESS, PLAIN, 0, 11)
        assert shown(metadata, file) == (0o751, None)
        metadata.setxattr(file, ACCESS, NAMED, 0, 11)
        metadata.setxattr(file, ACCESS, PLAIN, 0, 11)
        assert shown(metadata, file) == (0o751, None)
        assert metadata.listxattr(file) == [] and metadata.getattr(file)[XATTRS] == 0


def test_a_list_without_entries_takes_one_away_and_leaves_the_mode(volume: TestVolume) -> None:
    with volume.batch() as metadata:
        file = make(metadata, b"f")
        metadata.setxattr(file, ACCESS, NAMED, 0, 11)
        metadata.setxattr(file, ACCESS, acl(), 0, 11)
        assert shown(metadata, file) == (0o640, None)
        metadata.setxattr(file, ACCESS, NAMED, 0, 11)
        metadata.removexattr(file, ACCESS, 11)
        assert shown(metadata, file) == (0o640, None)


def test_who_may_not_keep_the_set_gid_bit_loses_it_with_a_list(volume: TestVolume) -> None:
    with volume.batch() as metadata:
        file = make(metadata, b"f", 0o102755)
        metadata.setxattr(file, ACCESS, NAMED, 0, 11)
        assert metadata.getattr(file)[MODE] == 0o102640
        metadata.setxattr(file, ACCESS, NAMED, 0, 11, drops_set_gid=True)
        assert metadata.getattr(file)[MODE] == 0o100640
        metadata.setxattr(file, b"user.a", b"1", 0, 11, drops_set_gid=True)


def test_only_directories_have_a_default_list_and_symlinks_have_none(volume: TestVolume) -> None:
    with volume.batch() as metadata:
        file, link = make(metadata, b"f"), make(metadata, b"l", SYMLINK)
        with pytest.raises(AccessDenied):
            metadata.setxattr(file, DEFAULT, NAMED, 0, 11)
        metadata.setxattr(file, DEFAULT, acl(), 0, 11)
        for name in posix_acl.NAMES:
            with pytest.raises(NotSupported):
                metadata.setxattr(link, name, NAMED, 0, 11)


def test_what_is_made_inherits_the_default_list_instead_of_the_umask(volume: TestVolume) -> None:
    default = acl((USER_OBJ, 7, NO_ID), (USER, 7, 1001), (GROUP_OBJ, 5, NO_ID), (MASK, 7, NO_ID), (OTHER, 5, NO_ID))
    with volume.batch() as metadata:
        shared = make(metadata, b"shared", DIRECTORY)
        metadata.setxattr(shared, DEFAULT, default, 0, 11)
        assert stat.S_IMODE(metadata.getattr(shared)[MODE]) == 0o755
        file = make(metadata, b"f", 0o100666, shared, umask=0o77)
        expected = acl((USER_OBJ, 6, NO_ID), (USER, 7, 1001), (GROUP_OBJ, 5, NO_ID), (MASK, 6, NO_ID), (OTHER, 4, NO_ID))
        assert shown(metadata, file) == (0o664, expected)
        below = make(metadata, b"d", 0o040777, shared, umask=0o77)
        assert shown(metadata, below) == (0o775, default)
        assert metadata.getxattr(below, DEFAULT) == default
        pipe = make(metadata, b"p", stat.S_IFIFO | 0o600, shared, umask=0o22)
        assert shown(metadata, pipe)[0] == 0o600
        link = make(metadata, b"l", SYMLINK, shared, umask=0o77)
        assert shown(metadata, link) == (0o777, None)


def test_a_default_list_that_names_nobody_is_inherited_as_a_mode(volume: TestVolume) -> None:
    with volume.batch() as metadata:
        shared = make(metadata, b"shared", DIRECTORY)
        metadata.setxattr(shared, DEFAULT, PLAIN, 0, 11)
        assert metadata.getxattr(shared, DEFAULT) == PLAIN
        file = make(metadata, b"f", 0o100666, shared, umask=0o777)
        assert shown(metadata, file) == (0o640, None)


def test_without_a_default_list_the_umask_counts_but_not_for_symlinks(volume: TestVolume) -> None:
    with volume.batch() as metadata:
        assert shown(metadata, make(metadata, b"f", 0o104666, umask=0o027)) == (0o4640, None)
        assert shown(metadata, make(metadata, b"d", 0o040777, umask=0o027)) == (0o750, None)
        assert shown(metadata, make(metadata, b"l", SYMLINK, umask=0o027)) == (0o777, None)


def test_a_list_that_was_damaged_is_an_error_and_not_taken_for_another(volume: TestVolume) -> None:
    with volume.batch() as metadata:
        file = make(metadata, b"f")
        metadata.setxattr(file, ACCESS, NAMED, 0, 11)
        metadata.database.run("UPDATE xattrs SET value = ? WHERE ino = ?", (NAMED[:-1], file))
        with pytest.raises(Corrupt, match="posix_acl_access is damaged"):
            metadata.setattr(file, mode=0o600, now_ns=12)
        assert metadata.getattr(file)[MODE] == 0o100640
        metadata.setxattr(file, ACCESS, NAMED, 0, 13)
        assert shown(metadata, file) == (0o640, NAMED)
