"""The namespace: names in directories, and what make, link, unlink and rename do to them.

Place      coordinator floor; above inodes.py, access_lists.py and extents.py, below metadata.py.
Owns       tables entries, symlinks and orphans; link counts; `parent` of directories and of files without a name.
Rule       an operation checks all before it changes anything: an expected error leaves the batch intact.

Directory cookies: an entry's key in its directory is a keyed hash of its name, so it stays where it is while
others come and go, and readdir goes on from it. Names of one hash share a bucket of 16 keys.
"""

import stat
from hashlib import blake2b

from coordinator.access_lists import AccessLists
from coordinator.database import Database
from coordinator.extents import Extents
from coordinator.inodes import ATTR_COLUMNS, DIRECTORY_SIZE, Inode, Inodes
from coordinator.quota_trees import QuotaTrees
from csvfs.errors import (
    BadRequest,
    Conflict,
    Exists,
    IsADirectory,
    NameTooLong,
    NoSpace,
    NotADirectory,
    NotEmpty,
    NotFound,
    NotPermitted,
    TooManyLinks,
)
from csvfs.ids import ROOT_INODE

NAME_SIZE_MAX = 255
TARGET_SIZE_MAX = 4095
NLINK_MAX = 65_000
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4
_RENAME_FLAGS = (0, RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT, RENAME_WHITEOUT | RENAME_NOREPLACE)
READDIR_LIMIT_MAX = 4096

COOKIE_BUCKET = 16
COOKIE_MIN = 16  # those below are the mount's, for the start, `.` and `..`
COOKIE_LIMIT = 1 << 62
_COOKIE_MASK = COOKIE_LIMIT - COOKIE_BUCKET
HASH_KEY_SIZE = 16
_KINDS = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK}

_FIND = "SELECT cookie, name, ino FROM entries WHERE parent = ? AND cookie BETWEEN ? AND ?"
_ADD = "INSERT INTO entries(parent, cookie, name, ino) VALUES(?,?,?,?)"
_REMOVE = "DELETE FROM entries WHERE parent = ? AND cookie = ?"
_POINT = "UPDATE entries SET ino = ? WHERE parent = ? AND cookie = ?"
_LIST = f"""
SELECT e.cookie, e.name, {ATTR_COLUMNS} FROM entries e CROSS JOIN inodes i ON i.ino = e.ino
WHERE e.parent = ? AND e.cookie > ? ORDER BY e.cookie LIMIT ?
"""


class Namespace:
    """All directories of the volume."""

    def __init__(
        self, database: Database, inodes: Inodes, extents: Extents, lists: AccessLists, hash_key: bytes
    ) -> None:
        self._database = database
        self._lists = lists
        self._inodes = inodes
        self._extents = extents
        self.trees = QuotaTrees(database, inodes)
        self._hash = blake2b(key=hash_key, digest_size=8)
        self._new_orphans: set[int] = (
            set()
        )  # not in the table yet: most are dropped in the batch that made them
        database.add_part(self)

    def make_root(self, now_ns: int) -> None:
        """Of a new volume."""
        mode = stat.S_IFDIR | 0o755
        root = Inode(
            ROOT_INODE, mode, 2, 0, 0, 0, DIRECTORY_SIZE, 0, now_ns, now_ns, now_ns, 1, ROOT_INODE, 0
        )
        self._inodes.add(root)

    # Looking

    def lookup(self, parent: int, name: bytes) -> list[int] | None:
        """The attr of the entry, or None. Raises NotFound (no parent), NotADirectory, NameTooLong."""
        self._inodes.directory(parent)
        found = self.find_entry(parent, name)[0]
        return None if found is None else self._inodes.get(found[1]).attr()

    def readlink(self, ino: int) -> bytes:
        """Raises NotFound, BadRequest: not a symlink."""
        if not stat.S_ISLNK(self._inodes.get(ino).mode):
            raise BadRequest(f"inode {ino} is not a symlink")
        ((target,),) = self._database.rows("SELECT target FROM symlinks WHERE ino = ?", (ino,))
        return target

    def readdir(self, ino: int, cookie: int, limit: int) -> tuple[list[list], bool]:
        """Up to `limit` entries behind `cookie` (0: all), as [cookie, name, attr]; and if they are the last.

        An entry that is there all the time is seen exactly once, whatever else changes between two calls.

        Raises   NotFound, NotADirectory, BadRequest.
        """
        self._inodes.directory(ino)
        if limit <= 0 or not 0 <= cookie < COOKIE_LIMIT:
            raise BadRequest(f"readdir: {limit} entries from cookie {cookie}; ask for {READDIR_LIMIT_MAX}")
        limit = min(limit, READDIR_LIMIT_MAX)
        if self._database.active:
            self._inodes.flush()
        rows = self._database.rows(_LIST, (ino, cookie, limit))
        return [[cookie, name, attr] for cookie, name, *attr in rows], len(rows) < limit

    # Changing

    def make(
        self,
        parent: int,
        name: bytes | None,
        mode: int,
        uid: int,
        gid: int,
        rdev: int,
        target: bytes,
        now_ns: int,
        *,
        umask: int = 0,
    ) -> list[int]:
        """A new file, directory, symlink (to `target`) or special file; returns its attr.

        name: None: an orphan from the start, to which `link` may give a name (O_TMPFILE); of files only.
        umask: taken away from `mode`, but not of a symlink, and not where the directory has a default ACL.

        Raises   NotFound (no parent), NotADirectory, Exists, NameTooLong, TooManyLinks, BadRequest.
        """
        directory = self._live_directory(parent)
        kind = stat.S_IFMT(mode & 0xFFFF)
        fits = 0 <= mode <= 0xFFFF and min(uid, gid, rdev) >= 0 and not max(uid, gid, rdev) >> 32
        if kind not in _KINDS or not fits:
            raise BadRequest(f"cannot make mode {mode:#o}, owner {uid}:{gid}, device {rdev}")
        is_symlink = kind == stat.S_IFLNK
        if is_symlink and (not 0 < len(target) <= TARGET_SIZE_MAX or b"\0" in target):
            raise NameTooLong(
                f"symlink target of {len(target)} B, may have 1 to {TARGET_SIZE_MAX} and no NUL"
            )
        if name is None and kind != stat.S_IFREG:
            raise BadRequest(f"cannot make mode {mode:#o} without a name: only regular files")
        found, free_cookie = (None, 0) if name is None else self.find_entry(parent, name)
        if found is not None:
            raise Exists(f"{name!r} exists in directory {parent}")
        is_directory = kind == stat.S_IFDIR
        if is_directory and directory.nlink >= NLINK_MAX:
            raise TooManyLinks(f"directory {parent} has {NLINK_MAX - 2} subdirectories already")
        self.trees.check_make(parent)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
            mode |= stat.S_ISGID if is_directory else 0
        default = () if is_symlink else self._lists.default_of(directory)
        ino = self._next_ino()
        size = DIRECTORY_SIZE if is_directory else len(target) if is_symlink else 0
        inode = Inode(
            ino, mode, 0 if name is None else 1 + is_directory, uid, gid, rdev, size, 0, now_ns, now_ns, now_ns,
            1, parent if is_directory or name is None else 0, 0,
        )  # fmt: skip
        if not is_symlink:
            self._lists.inherit(inode, default, umask)
        self._inodes.add(inode)
        self.trees.made(inode, parent)
        if name is None:
            self._new_orphans.add(ino)
            return inode.attr()
        self._database.run(_ADD, (parent, free_cookie, name, ino))
        if is_symlink:
            self._database.run("INSERT INTO symlinks(ino, target) VALUES(?,?)", (ino, target))
        directory.nlink += is_directory
        self._entries_changed(directory, now_ns)
        return inode.attr()

    def link(self, ino: int, parent: int, name: bytes, now_ns: int) -> list[int]:
        """Another name; returns the attr. Raises NotFound, NotPermitted (directory), Exists, TooManyLinks."""
        inode = self._inodes.get(ino)
        directory = self._live_directory(parent)
        if inode.is_directory:
            raise NotPermitted(f"inode {ino} is a directory: it cannot have a second name")
        if inode.nlink == 0 and not inode.parent:
            raise NotFound(f"inode {ino} has been deleted")
        if inode.nlink >= NLINK_MAX:
            raise TooManyLinks(f"inode {ino} has {NLINK_MAX} names already")
        found, free_cookie = self.find_entry(parent, name)
        if found is not None:
            raise Exists(f"{name!r} exists in directory {parent}")
        if inode.nlink == 0:
            self.trees.check_move(inode, parent)
            self._no_orphan(ino)
            inode.parent = 0
            self.trees.moved(inode, parent)
        else:
            self.trees.check_link(inode, parent)
        self._database.run(_ADD, (parent, free_cookie, name, ino))
        inode.nlink += 1
        inode.ctime = now_ns
        self._inodes.changed(inode)
        self._entries_changed(directory, now_ns)
        return inode.attr()

    def unlink(self, parent: int, name: bytes, directory: bool, now_ns: int) -> tuple[int, int]:
        """Remove a name, of an empty directory if `directory`; returns (ino, links left).

        At 0 links the inode is an orphan: `drop_orphan` it once no session has it open.

        Raises   NotFound, NotADirectory, IsADirectory, NotEmpty, NameTooLong.
        """
        holder = self._inodes.directory(parent)
        found, _ = self.find_entry(parent, name)
        if found is None:
            raise NotFound(f"{name!r} does not exist in directory {parent}")
        cookie, ino = found
        inode = self._inodes.get(ino)
        if directory:
            self._check_empty_directory(inode, name)
        elif inode.is_directory:
            raise IsADirectory(f"{name!r} in directory {parent} is a directory; use rmdir")
        self._database.run(_REMOVE, (parent, cookie))
        self._drop_link(inode, holder, now_ns)
        self._entries_changed(holder, now_ns)
        return ino, inode.nlink

    def rename(
        self,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: int,
        now_ns: int,
        owner: tuple[int, int] = (0, 0),
    ) -> tuple[int, int, int]:
        """As renameat2(2); returns (ino, replaced or 0, its links left).

        With RENAME_EXCHANGE "replaced" is the other one. A replaced inode of 0 links is an orphan. With
        RENAME_WHITEOUT the old name then leads to a new device 0:0 of `owner` (user, group).

        Raises   NotFound, NotADirectory, IsADirectory, Exists, NotEmpty, TooManyLinks, NameTooLong;
                 BadRequest: a directory into itself, unknown flags.
        """
        if flags not in _RENAME_FLAGS:
            raise BadRequest(f"rename flags {flags:#x} are not known")
        source = self._inodes.directory(parent)
        target = self._live_directory(new_parent)
        found, _ = self.find_entry(parent, name)
        if found is None:
            raise NotFound(f"{name!r} does not exist in directory {parent}")
        inode = self._inodes.get(found[1])
        new_found, free_cookie = self.find_entry(new_parent, new_name)
        other = None if new_found is None else self._inodes.get(new_found[1])
        if other is not None and flags & RENAME_NOREPLACE:
            raise Exists(f"{new_name!r} exists in directory {new_parent}")
        if other is None and flags == RENAME_EXCHANGE:
            raise NotFound(f"{new_name!r} does not exist in directory {new_parent}")
        self._check_not_below(inode, source, target)
        if other is inode:
            return inode.ino, 0, 0
        if flags == RENAME_EXCHANGE:
            assert other is not None and new_found is not None
            self.trees.check_exchange(inode, parent, other, new_parent)
            self._exchange((source, found[0], inode), (target, new_found[0], other), now_ns)
            return inode.ino, other.ino, other.nlink
        if other is not None:
            self._check_replaceable(inode, other, new_name)
        moves_directory = inode.is_directory and source is not target
        if moves_directory and other is None and target.nlink >= NLINK_MAX:
            raise TooManyLinks(f"directory {new_parent} has {NLINK_MAX - 2} subdirectories already")
        self.trees.check_move(inode, new_parent)
        if flags & RENAME_WHITEOUT:
            self.trees.check_make(parent)
        if flags & RENAME_WHITEOUT:
            self._database.run(_POINT, (self._make_whiteout(source, owner, now_ns), parent, found[0]))
        else:
            self._database.run(_REMOVE, (parent, found[0]))
        if other is None or new_found is None:
            self._database.run(_ADD, (new_parent, free_cookie, new_name, inode.ino))
        else:
            self._database.run(_POINT, (inode.ino, new_parent, new_found[0]))
            self._drop_link(other, target, now_ns)
        if moves_directory:
            self._move_directory(inode, source, target)
        self.trees.moved(inode, new_parent)
        inode.ctime = now_ns
        self._inodes.changed(inode)
        self._entries_changed(source, now_ns)
        self._entries_changed(target, now_ns)
        return inode.ino, 0 if other is None else other.ino, 0 if other is None else other.nlink

    # Orphans

    def orphans(self) -> list[int]:
        """Inodes without a name, kept for those who have them open."""
        if self._database.active:
            self.flush()
        return [ino for (ino,) in self._database.rows("SELECT ino FROM orphans ORDER BY ino")]

    def drop_orphan(self, ino: int) -> bool:
        """Free an inode without names. False: it has too many extents for one batch; call again in the next.

        Raises   NotFound. Conflict: it has names.
        """
        inode = self._inodes.get(ino)
        if inode.nlink:
            raise Conflict(f"inode {ino} has {inode.nlink} names: it is no orphan")
        if self._extents.free_from(inode, 0) > 0:
            return False
        if stat.S_ISLNK(inode.mode):
            self._database.run("DELETE FROM symlinks WHERE ino = ?", (ino,))
        if inode.xattrs:
            self._database.run("DELETE FROM xattrs WHERE ino = ?", (ino,))
        self._no_orphan(ino)
        self._inodes.remove(inode)
        return True

    def _no_orphan(self, ino: int) -> None:
        if ino in self._new_orphans:
            self._new_orphans.discard(ino)
        else:
            self._database.run("DELETE FROM orphans WHERE ino = ?", (ino,))

    # Part

    def flush(self) -> None:
        if self._new_orphans:
            self._database.run_many(
                "INSERT INTO orphans(ino) VALUES(?)", [(ino,) for ino in self._new_orphans]
            )
            self._new_orphans.clear()

    def forget(self) -> None:
        self._new_orphans.clear()

    def settle(self) -> None:
        pass

    # Steps

    def find_entry(self, parent: int, name: bytes) -> tuple[tuple[int, int] | None, int]:
        """(cookie, ino) of the entry, or None; and the first free cookie of its bucket."""
        if not isinstance(name, bytes):
            raise BadRequest(f"name {name!r} is not bytes")
        if not 0 < len(name) <= NAME_SIZE_MAX:
            raise NameTooLong(f"name of {len(name)} B, may have 1 to {NAME_SIZE_MAX}")
        if b"/" in name or b"\0" in name or name in (b".", b".."):
            raise BadRequest(f"{name!r} cannot be a name")
        bucket = self.bucket(name)
        rows = self._database.rows(_FIND, (parent, bucket, bucket + COOKIE_BUCKET - 1))
        if not rows:
            return None, bucket
        for cookie, known, ino in rows:
            if known == name:
                return (cookie, ino), 0
        taken = {row[0] for row in rows}
        free_cookie = next((c for c in range(bucket, bucket + COOKIE_BUCKET) if c not in taken), 0)
        if not free_cookie:
            raise NoSpace(
                f"directory {parent}: {COOKIE_BUCKET} names have the hash of {name!r}; use another name"
            )
        return None, free_cookie

    def bucket(self, name: bytes) -> int:
        """The first of the COOKIE_BUCKET keys that an entry of this name may have."""
        digest = self._hash.copy()
        digest.update(name)
        return max(int.from_bytes(digest.digest(), "little") & _COOKIE_MASK, COOKIE_MIN)

    def _next_ino(self) -> int:
        counters = self._database.counters
        ino: int = counters.next_ino
        counters.next_ino += 1
        return ino

    def _make_whiteout(self, directory: Inode, owner: tuple[int, int], now_ns: int) -> int:
        """What an overlay takes for "there is no such name here, whatever the layer below has"."""
        ino, (uid, gid) = self._next_ino(), owner
        gid = directory.gid if directory.mode & stat.S_ISGID else gid
        whiteout = Inode(ino, stat.S_IFCHR, 1, uid, gid, 0, 0, 0, now_ns, now_ns, now_ns, 1, 0, 0)
        self._inodes.add(whiteout)
        self.trees.made(whiteout, directory.ino)
        return ino

    def _live_directory(self, ino: int) -> Inode:
        directory = self._inodes.directory(ino)
        if directory.nlink == 0:
            raise NotFound(f"directory {ino} has been deleted")
        return directory

    def _entries_changed(self, directory: Inode, now_ns: int) -> None:
        directory.mtime = directory.ctime = now_ns
        self._inodes.changed(directory)

    def _drop_link(self, inode: Inode, holder: Inode, now_ns: int) -> None:
        """One name of `inode`, in `holder`, has gone."""
        if inode.is_directory:
            inode.nlink = 0
            holder.nlink -= 1
        else:
            inode.nlink -= 1
        inode.ctime = now_ns
        self._inodes.changed(inode)
        if inode.nlink == 0:
            self._new_orphans.add(inode.ino)

    def _move_directory(self, inode: Inode, source: Inode, target: Inode) -> None:
        """Its `..` changes: not its own link count, but those of both parents."""
        inode.parent = target.ino
        source.nlink -= 1
        target.nlink += 1

    def _exchange(self, left: tuple[Inode, int, Inode], right: tuple[Inode, int, Inode], now_ns: int) -> None:
        (holder, cookie, inode), (other_holder, other_cookie, other) = left, right
        self._check_not_below(other, other_holder, holder)
        if holder is not other_holder:
            moved_right = inode.is_directory - other.is_directory
            fuller = other_holder if moved_right > 0 else holder
            if moved_right and fuller.nlink >= NLINK_MAX:
                raise TooManyLinks(f"directory {fuller.ino} has {NLINK_MAX - 2} subdirectories already")
        self._database.run(_POINT, (other.ino, holder.ino, cookie))
        self._database.run(_POINT, (inode.ino, other_holder.ino, other_cookie))
        if holder is not other_holder:
            if inode.is_directory:
                self._move_directory(inode, holder, other_holder)
            if other.is_directory:
                self._move_directory(other, other_holder, holder)
        for moved in (inode, other):
            moved.ctime = now_ns
            self._inodes.changed(moved)
        self._entries_changed(holder, now_ns)
        self._entries_changed(other_holder, now_ns)

    def _check_not_below(self, inode: Inode, source: Inode, target: Inode) -> None:
        """`inode`, if a directory, may not be moved from `source` to a `target` at or below itself."""
        if not inode.is_directory or source is target:
            return
        above = target
        while above.ino != ROOT_INODE:
            if above.ino == inode.ino:
                raise BadRequest(
                    f"directory {inode.ino} cannot be moved into itself, to directory {target.ino}"
                )
            above = self._inodes.get(above.parent)

    def _check_replaceable(self, inode: Inode, other: Inode, name: bytes) -> None:
        if inode.is_directory:
            self._check_empty_directory(other, name)
        elif other.is_directory:
            raise IsADirectory(f"{name!r} is a directory: only a directory can replace it")

    def _check_empty_directory(self, inode: Inode, name: bytes) -> None:
        if not inode.is_directory:
            raise NotADirectory(f"{name!r} is not a directory")
        if self._database.rows("SELECT 1 FROM entries WHERE parent = ? LIMIT 1", (inode.ino,)):
            raise NotEmpty(f"directory {name!r} is not empty")
