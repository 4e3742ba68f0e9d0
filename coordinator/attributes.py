"""Attributes: what stat shows and chmod, chown, utimes and truncate change; and extended attributes.

Place      coordinator floor; above inodes.py, access_lists.py and extents.py, below metadata.py.
Owns       table xattrs, but for ACLs.
"""

import stat

from coordinator import posix_acl
from coordinator.access_lists import AccessLists
from coordinator.database import Database
from coordinator.extents import FILE_SIZE_MAX, Extents
from coordinator.inodes import TIME_MAX, TIME_MIN, Inode, Inodes
from csvfs.errors import (
    BadRequest,
    Exists,
    FileTooBig,
    NameTooLong,
    NoAttribute,
    NoSpace,
    NotFound,
    ResultTooLarge,
)
from csvfs.units import BLOCK_SIZE, KIB

XATTR_NAME_SIZE_MAX = 255
XATTR_VALUE_SIZE_MAX = 64 * KIB
XATTR_LIST_SIZE_MAX = 64 * KIB  # all names of an inode, each with a NUL: what listxattr(2) can give
XATTR_CREATE = 1  # must not exist yet
XATTR_REPLACE = 2  # must exist
_ID_MAX = 0xFFFF_FFFF


class Attributes:
    """Attributes of all inodes."""

    def __init__(self, database: Database, inodes: Inodes, extents: Extents, lists: AccessLists) -> None:
        self._database = database
        self._lists = lists
        self._inodes = inodes
        self._extents = extents

    def getattr(self, ino: int) -> list[int]:
        """Raises NotFound."""
        return self._inodes.get(ino).attr()

    def setattr(
        self,
        ino: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        now_ns: int,
    ) -> list[int]:
        """Change what is not None; returns the attr afterwards.

        A file of very many extents may end up larger than `size`: then commit, and call again.

        Raises   NotFound, BadRequest, FileTooBig, IsADirectory or Conflict: size of what is no regular file; Corrupt.
        """
        inode = self._inodes.get(ino)
        _check_change(mode, uid, gid, atime_ns, mtime_ns)
        entries = () if mode is None else self._lists.of(inode, posix_acl.ACCESS)
        if size is not None:
            self._inodes.file(ino)
            if not 0 <= size <= FILE_SIZE_MAX:
                raise FileTooBig(f"inode {ino}: {size} B, a file may have {FILE_SIZE_MAX} B")
        if size is not None:
            self._resize(inode, size, now_ns)
        if uid is not None or gid is not None:
            inode.uid = inode.uid if uid is None else uid
            inode.gid = inode.gid if gid is None else gid
            if mode is None:
                inode.mode = _mode_after_chown(inode.mode)
        if mode is not None:
            inode.mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(mode)
            self._lists.mode_changed(inode, entries)
        inode.atime = inode.atime if atime_ns is None else atime_ns
        inode.mtime = inode.mtime if mtime_ns is None else mtime_ns
        inode.ctime = now_ns
        self._inodes.changed(inode)
        return inode.attr()

    def commit_file(
        self, ino: int, size: int, mtime_ns: int | None, atime_ns: int | None, now_ns: int
    ) -> None:
        """What the holder of a write lease reports: the size only grows. Raises NotFound, FileTooBig ..."""
        inode = self._inodes.file(ino)
        _check_change(None, None, None, atime_ns, mtime_ns)
        if size > FILE_SIZE_MAX:
            raise FileTooBig(f"inode {ino}: {size} B, a file may have {FILE_SIZE_MAX} B")
        if size > inode.size or (mtime_ns is not None and mtime_ns != inode.mtime):
            inode.ctime = now_ns
        inode.size = max(inode.size, size)
        inode.mtime = inode.mtime if mtime_ns is None else mtime_ns
        inode.atime = inode.atime if atime_ns is None else atime_ns
        self._inodes.changed(inode)

    def accessed(self, ino: int, atime_ns: int) -> bool:
        """When a session has read it, as it tells later: of what is gone, or was read later by another, nothing changes.

        Returns  whether it changed, and is no directory. Raises BadRequest.
        """
        if not 0 < atime_ns <= TIME_MAX:
            raise BadRequest(f"access time {atime_ns} ns of inode {ino}")
        try:
            inode = self._inodes.get(ino)
        except NotFound:
            return False
        if atime_ns <= inode.atime:
            return False
        inode.atime = atime_ns
        self._inodes.changed(inode)
        return not stat.S_ISDIR(inode.mode)

    def _resize(self, inode: Inode, size: int, now_ns: int) -> None:
        # A growing file keeps blocks granted ahead: whoever has its write lease may be writing them now.
        if size < inode.size:
            end = -(-size // BLOCK_SIZE)
            reached = self._extents.free_from(inode, end)
            inode.size = size if reached == end else max(size, min(inode.size, reached * BLOCK_SIZE))
        else:
            inode.size = size
        inode.mtime = now_ns

    # Extended attributes

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """Raises NotFound, NoAttribute."""
        value = self._value(self._inodes.get(ino), name)
        if value is None:
            raise NoAttribute(f"inode {ino} has no attribute {name!r}")
        return value

    def listxattr(self, ino: int) -> list[bytes]:
        """Names, sorted. Raises NotFound."""
        if self._inodes.get(ino).xattrs == 0:
            return []
        return [
            name
            for (name,) in self._database.rows("SELECT name FROM xattrs WHERE ino = ? ORDER BY name", (ino,))
        ]

    def setxattr(
        self, ino: int, name: bytes, value: bytes, flags: int, now_ns: int, *, drops_set_gid: bool = False
    ) -> None:
        """Flags: 0, XATTR_CREATE or XATTR_REPLACE. An access ACL changes the mode, too; drops_set_gid: also by that bit.

        Raises   NotFound, NameTooLong, ResultTooLarge, Exists, NoAttribute, NoSpace (too many), BadRequest;
                 of an ACL: NotSupported, AccessDenied.
        """
        inode = self._inodes.get(ino)
        if not isinstance(name, bytes) or not isinstance(value, bytes):
            raise BadRequest(f"attribute {name!r}: name and value are bytes")
        if not 0 < len(name) <= XATTR_NAME_SIZE_MAX or b"\0" in name:
            raise NameTooLong(
                f"attribute name of {len(name)} B, may have 1 to {XATTR_NAME_SIZE_MAX} and no NUL"
            )
        if len(value) > XATTR_VALUE_SIZE_MAX:
            raise ResultTooLarge(f"attribute {name!r} of {len(value)} B, may have {XATTR_VALUE_SIZE_MAX} B")
        if flags not in (0, XATTR_CREATE, XATTR_REPLACE):
            raise BadRequest(f"setxattr flags {flags:#x} are not known")
        entries = self._lists.check(inode, name, value) if name in posix_acl.NAMES else None
        exists = self._value(inode, name) is not None
        if exists and flags == XATTR_CREATE:
            raise Exists(f"inode {ino} has an attribute {name!r} already")
        if not exists:
            if flags == XATTR_REPLACE:
                raise NoAttribute(f"inode {ino} has no attribute {name!r}")
            names = self.listxattr(ino)
            if sum(len(known) + 1 for known in names) + len(name) + 1 > XATTR_LIST_SIZE_MAX:
                raise NoSpace(f"inode {ino}: its {len(names)} attribute names fill {XATTR_LIST_SIZE_MAX} B")
        if entries is not None:
            self._lists.set(inode, name, entries, drops_set_gid=drops_set_gid)
        else:
            inode.xattrs += not exists
            self._database.run(
                "INSERT OR REPLACE INTO xattrs(ino, name, value) VALUES(?,?,?)", (ino, name, value)
            )
        inode.ctime = now_ns
        self._inodes.changed(inode)

    def removexattr(self, ino: int, name: bytes, now_ns: int) -> None:
        """Raises NotFound, NoAttribute."""
        inode = self._inodes.get(ino)
        if self._value(inode, name) is None:
            raise NoAttribute(f"inode {ino} has no attribute {name!r}")
        self._database.run("DELETE FROM xattrs WHERE ino = ? AND name = ?", (ino, name))
        inode.xattrs -= 1
        inode.ctime = now_ns
        self._inodes.changed(inode)

    def _value(self, inode: Inode, name: bytes) -> bytes | None:
        if inode.xattrs == 0:  # the kernel asks for security.capability before every first write
            return None
        rows = self._database.rows("SELECT value FROM xattrs WHERE ino = ? AND name = ?", (inode.ino, name))
        return rows[0][0] if rows else None


def _check_change(
    mode: int | None, uid: int | None, gid: int | None, atime_ns: int | None, mtime_ns: int | None
) -> None:
    for owner in (uid, gid):
        if owner is not None and not 0 <= owner < _ID_MAX:
            raise BadRequest(f"owner {owner} is not from 0 to {_ID_MAX - 1}")
    if mode is not None and not 0 <= mode <= 0xFFFF:
        raise BadRequest(f"mode {mode:#o} is none")
    for time_ns in (atime_ns, mtime_ns):
        if time_ns is not None and not TIME_MIN <= time_ns <= TIME_MAX:
            raise BadRequest(f"time {time_ns} ns does not fit 64 bits")


def _mode_after_chown(mode: int) -> int:
    """As Linux does, for root too: set-uid goes, and set-gid where it means running as the group."""
    if stat.S_ISDIR(mode):
        return mode
    mode &= ~stat.S_ISUID
    return mode & ~stat.S_ISGID if mode & stat.S_IXGRP else mode
