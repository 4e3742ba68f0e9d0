"""POSIX access control lists: bytes of an extended attribute <-> entries, and what they have to do with a mode.

Place      coordinator floor; pure. The kernel checks permissions by what is stored here (FUSE_POSIX_ACL), so nothing is
           stored that it could take for something else.
Source     acl(5); the format is that of system.posix_acl_access and _default: version u32, then 8 bytes per entry.

Canonical  one order and one entry for each tag and id: owner, users by id, group, groups by id, mask, others. Masks are
           there where named users or groups are.
"""

import itertools
import struct
from collections.abc import Iterable
from typing import NamedTuple

from csvfs.errors import BadRequest

ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
NAMES = (ACCESS, DEFAULT)

VERSION = 2
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
NO_ID = 0xFFFF_FFFF  # of the entries that name nobody
ENTRIES_MAX = 511  # what Linux reads of a FUSE file system: one page
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")  # tag, permissions, id
_ONE_EACH = (USER_OBJ, GROUP_OBJ, MASK, OTHER)
_S_IRWXUGO = 0o777


class Entry(NamedTuple):
    """In the order of the list: tags ascend in it."""

    tag: int
    who: int  # uid or gid; NO_ID: of the file
    permissions: int  # 0 to 7: rwx


Entries = tuple[Entry, ...]


def parse(value: bytes) -> Entries:
    """Canonical; no entries: no list. Raises BadRequest: it is none, or one that says two things at once."""
    if len(value) < _HEADER.size or (len(value) - _HEADER.size) % _ENTRY.size:
        raise BadRequest(f"an ACL of {len(value)} B: has 4 B and 8 B for each entry")
    (version,) = _HEADER.unpack_from(value)
    if version != VERSION:
        raise BadRequest(f"an ACL of version {version}, must be {VERSION}")
    count = (len(value) - _HEADER.size) // _ENTRY.size
    if count > ENTRIES_MAX:
        raise BadRequest(f"an ACL of {count} entries, may have {ENTRIES_MAX}")
    entries = []
    for tag, permissions, who in _ENTRY.iter_unpack(value[_HEADER.size :]):
        if tag not in (*_ONE_EACH, USER, GROUP) or permissions & ~7:
            raise BadRequest(f"an ACL with an entry of tag {tag:#x}, permissions {permissions:#o}")
        if tag not in _ONE_EACH and who == NO_ID:
            raise BadRequest(f"an ACL with an entry of tag {tag:#x} that names nobody")
        entries.append(Entry(tag, NO_ID if tag in _ONE_EACH else who, permissions))
    entries.sort()
    if entries:
        _check_whole(entries)
    return tuple(entries)


def _check_whole(entries: list[Entry]) -> None:
    for one, other in itertools.pairwise(entries):
        if one[:2] == other[:2]:
            raise BadRequest(f"an ACL with two entries of tag {one.tag:#x}, id {one.who}")
    tags = {entry.tag for entry in entries}
    if not {USER_OBJ, GROUP_OBJ, OTHER} <= tags:
        raise BadRequest("an ACL without an entry for owner, group or others")
    if tags & {USER, GROUP} and MASK not in tags:
        raise BadRequest("an ACL that names users or groups, without a mask")


def pack(entries: Entries) -> bytes:
    return _HEADER.pack(VERSION) + b"".join(_ENTRY.pack(tag, perm, who) for tag, who, perm in entries)


def is_plain(entries: Entries) -> bool:
    """It says what a mode can say: nothing else has to be kept."""
    return len(entries) == 3


def mode_of(entries: Entries, mode: int) -> int:
    """`mode` with the permissions that the list shows there: its mask, where it has one, as those of the group."""
    shown = {entry.tag: entry.permissions for entry in entries if entry.tag in _ONE_EACH}
    group = shown.get(MASK, shown[GROUP_OBJ])
    return mode & ~_S_IRWXUGO | shown[USER_OBJ] << 6 | group << 3 | shown[OTHER]


def after_chmod(entries: Entries, mode: int) -> Entries:
    """The list of a file that got this mode: the group's bits are those of the mask, where there is one."""
    return _with(entries, {USER_OBJ: mode >> 6 & 7, _group_tag(entries): mode >> 3 & 7, OTHER: mode & 7})


def inherited(default: Entries, mode: int) -> tuple[Entries, int]:
    """What something new gets in a directory with this default list, and its mode; `mode`: as asked for, which takes
    away from what the list allows. Instead of a umask."""
    granted = mode_of(default, mode) & mode
    return after_chmod(default, granted), granted


def _group_tag(entries: Iterable[Entry]) -> int:
    return MASK if any(entry.tag == MASK for entry in entries) else GROUP_OBJ


def _with(entries: Entries, permissions: dict[int, int]) -> Entries:
    return tuple(Entry(tag, who, permissions.get(tag, perm)) for tag, who, perm in entries)
