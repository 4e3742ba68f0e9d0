"""Names and attributes: what pyfuse3 calls, asked of the volume's coordinator through the session.

Place      mount floor; the channel answers reads, writes and what pyfuse3 lacks.
Leases     every reply of the coordinator says what this mount holds now; it is told to the file table at
           once, without an await in between, so that a recall which comes next finds it there.
Caching    a time-out above 0 says: this was learned under a lease of READ or more, granted by the same reply.
           relay.py makes it long, or 0 (K1). What came without a lease may be older than a lease got
           meanwhile.
Attributes of an inode under this mount's own write lease are known here, not at the coordinator: a stale size
           given to the kernel would cut a file short, so the file table is asked for them.
"""

import errno
import os
import stat
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields

from csvfs.errors import Exists, NoAttribute, NotFound
from csvfs.mount import fuse_abi
from csvfs.mount.access_times import AccessTimes
from csvfs.mount.errno_border import fuse_errors, stale_when_gone
from csvfs.mount.file_state import CTIME, MODE
from csvfs.mount.known_names import KnownNames
from csvfs.mount.relay import LEASE_READ, LEASE_WRITE

READDIR_ENTRIES_MAX = 1024  # asked of the coordinator at a time
UNNAMED_TRIES_MAX = 5  # one for each coordinator that dies within one O_TMPFILE
COOKIE_OF_PARENT = 2  # of `..`; the coordinator's cookies are above
# Others are of the kernel or of other layers, as are file capabilities: the mount is nosuid.
_NAMESPACES_KEPT = (b"user.", b"trusted.", b"security.")
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
_TRUSTED = b"trusted."
RENAME_WHITEOUT = 4  # of <linux/fs.h>; pyfuse3 does not know it
_CAPABILITY = b"security.capability"

Attr = list  # [ino, mode, nlink, uid, gid, rdev, size, blocks, atime_ns, mtime_ns, ctime_ns, generation, xattrs]


class Table(Protocol):
    """What the operations need of the file table."""

    access: AccessTimes

    def stamp(self) -> int: ...
    def recalled_since(self, ino: int, stamp: int) -> bool: ...
    def holds(self, ino: int) -> int: ...
    def may_answer(self, ino: int) -> bool: ...
    def granted(self, ino: int, kind: int, attr: Attr, asked: int, changed: bool = False) -> None: ...
    def changed(
        self, ino: int, asked: int, time_ns: int | None, *, entries: bool = False, links: int | None = 0
    ) -> None: ...
    def granted_directory(self, ino: int, kind: int) -> None: ...
    async def open(self, ino: int, writing: bool) -> None: ...
    def set_parent(self, ino: int, parent: int) -> None: ...
    def parent(self, ino: int) -> int: ...
    def knows_attributes(self, ino: int) -> bool: ...
    async def getattr(self, ino: int) -> Attr: ...
    async def truncate(self, ino: int, changes: dict[str, Any]) -> Attr: ...
    async def flush(self, ino: int) -> None: ...


class Caller(Protocol):
    async def call(self, name: str, args: dict[str, Any]) -> Any:
        """Ask the coordinator; rides over its failover. Raises CsvfsError."""
        ...


@dataclass(slots=True)
class OpenDirectory:
    """A directory being listed: the coordinator's last page."""

    ino: int
    entries: list = field(default_factory=list)  # [next cookie, name, attr]
    positions: dict[int, int] = field(default_factory=dict)  # cookie -> index of the entry that follows it
    stamp: int = 0  # of the file table, before the page was asked for
    leased: bool = False  # the page was given together with the directory's lease


def entry_attributes(attr: Attr, leased: bool, name_leased: bool = False) -> EntryAttributes:
    """As pyfuse3 wants it. Time-outs are 1 s or 0 here and mean yes or no (see "Caching")."""
    entry = EntryAttributes()
    entry.st_ino, entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid = attr[0:5]
    entry.st_rdev, entry.st_size, entry.st_blocks = attr[5:8]
    entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns, entry.generation = attr[8:12]
    entry.attr_timeout = int(leased)
    entry.entry_timeout = int(name_leased)
    return entry


def directory_entry(ino: int) -> EntryAttributes:
    """Number and type: all that the kernel is given of `.` and `..`."""
    entry = EntryAttributes()
    entry.st_ino, entry.st_mode = ino, stat.S_IFDIR
    entry.attr_timeout = entry.entry_timeout = 0
    return entry


def absent_entry(name_leased: bool) -> EntryAttributes:
    """Number 0: the kernel may remember that the name does not exist."""
    entry = EntryAttributes()
    entry.attr_timeout, entry.entry_timeout = 0, int(name_leased)
    return entry


def _change_ns(reply: dict[str, Any], time_ns: int | None) -> int | None:
    """When the change was made, to add it to what is known; None: that has to be asked for. What the process before this one
    has changed may be in it already."""
    return None if reply.get("history") else time_ns


class VolumeOperations(pyfuse3.Operations):
    """One volume's names and attributes. Errors become FUSEError; nothing else leaves a handler."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, session: Caller, table: Table, first_handle: int = 1) -> None:
        """first_handle: of directories; above those of the processes before this one."""
        super().__init__()
        self._session = session
        self._table = table
        self._directories: dict[int, OpenDirectory] = {}
        self._next_handle = first_handle
        self._known = KnownNames(table)

    async def _entry(
        self, reply: dict[str, Any], asked: int, directory: int | None = None, *, changed: bool = False
    ) -> EntryAttributes:
        """Tell the table what a reply with attr, lease (and dir_lease) granted; what pyfuse3 is told.

        asked, changed: see FileTable.granted.
        """
        if reply.get("history"):
            reply, asked = await self._as_it_is_now(reply)
        attr: Attr = reply["attr"]
        ino: int = attr[0]
        self._table.granted(ino, reply["lease"], attr, asked, changed)
        name_leased = False
        if directory is not None:
            if stat.S_ISDIR(attr[MODE]):
                self._table.set_parent(ino, directory)
            self._table.granted_directory(directory, reply["dir_lease"])
            name_leased = reply["dir_lease"] >= LEASE_READ
        if self._table.holds(ino) == LEASE_WRITE or self._table.access.is_noted(ino):
            return entry_attributes(*await self._own_attributes(ino), name_leased)
        return entry_attributes(attr, reply["lease"] >= LEASE_READ, name_leased)

    async def _as_it_is_now(self, reply: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Instead of what was true when the process before this one asked; and the stamp of it."""
        asked = self._table.stamp()
        now = await self._session.call("getattr", {"ino": reply["attr"][0]})
        return {**reply, "attr": now["attr"], "lease": now["lease"]}, asked

    async def _own_attributes(self, ino: int) -> tuple[Attr, bool]:
        attr = await self._table.getattr(ino)
        # That a lease is held is not enough: while somebody else changes them they are told without it, though it stays.
        return attr, self._table.knows_attributes(ino)

    # ---- attributes

    def is_absent(self, parent: int, name: bytes) -> bool:
        """Whether the name is known not to exist, without asking."""
        return self._known.is_absent(parent, name)

    @fuse_errors
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if self.is_absent(parent_inode, name):
            return absent_entry(name_leased=True)
        asked = self._table.stamp()
        reply = await self._session.call("lookup", {"parent": parent_inode, "name": name})
        if reply["attr"] is None:
            self._table.granted_directory(parent_inode, reply["dir_lease"])
            return absent_entry(name_leased=reply["dir_lease"] >= LEASE_READ)
        return await self._entry(reply, asked, parent_inode)

    @fuse_errors
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        with stale_when_gone():
            return entry_attributes(*await self._own_attributes(inode))

    @fuse_errors
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        return await self.change_attributes(
            inode,
            {
                "mode": attr.st_mode & 0o7777 if fields.update_mode else None,
                "uid": attr.st_uid if fields.update_uid else None,
                "gid": attr.st_gid if fields.update_gid else None,
                "size": attr.st_size if fields.update_size else None,
                "atime_ns": attr.st_atime_ns if fields.update_atime else None,
                "mtime_ns": attr.st_mtime_ns if fields.update_mtime else None,
            },
        )

    @fuse_errors
    async def change_attributes(self, inode: int, changes: dict[str, Any]) -> EntryAttributes:
        """`changes`: the arguments of `setattr` in PROTOCOL.md, None for what stays."""
        if changes["atime_ns"] is None:
            return await self._change_attributes(inode, changes)
        with self._table.access.explicit(inode):
            await self._table.access.answered(inode)
            return await self._change_attributes(inode, changes)

    async def _change_attributes(self, inode: int, changes: dict[str, Any]) -> EntryAttributes:
        if changes["size"] is not None:
            if changes["mtime_ns"] is None:
                changes["mtime_ns"] = time.time_ns()
            truncated = await self._table.truncate(inode, changes)
            return entry_attributes(truncated, self._table.knows_attributes(inode))
        if changes["mtime_ns"] is not None and self._table.holds(inode) == LEASE_WRITE:
            # A time set by hand must not be overwritten by that of an earlier write, which is reported
            # lazily.
            await self._table.flush(inode)
        asked = self._table.stamp()
        reply = await self._session.call("setattr", {"ino": inode, **changes})
        return await self._entry(reply, asked, changed=True)

    # ---- names

    async def _make(
        self,
        parent: int,
        name: bytes,
        mode: int,
        ctx: RequestContext,
        *,
        rdev: int = 0,
        target: bytes | None = None,
    ) -> EntryAttributes:
        args = {"parent": parent, "name": name, "mode": mode, "uid": ctx.uid, "gid": ctx.gid, "umask": ctx.umask}
        asked = self._table.stamp()
        self._known.add(parent, name)
        reply = await self._session.call("make", {**args, "rdev": rdev, "target": target})
        # The directory got the time of what was made in it.
        made_ns = _change_ns(reply, reply["attr"][CTIME])
        self._table.changed(parent, asked, made_ns, entries=True, links=int(stat.S_ISDIR(mode)))
        with stale_when_gone():  # made by the process before, and removed since: the kernel begins anew
            entry = await self._entry(reply, asked, parent)
        # With the lease that the reply gave: nobody else has put a name there. Of a directory that the process before
        # this one made, others may have since.
        if stat.S_ISDIR(mode) and entry.attr_timeout and not reply.get("history"):
            self._known.made(entry.st_ino, asked)
        return entry

    @fuse_errors
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return await self._make(parent_inode, name, mode, ctx, rdev=rdev)

    @fuse_errors
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return await self._make(parent_inode, name, stat.S_IFDIR | stat.S_IMODE(mode), ctx)

    @fuse_errors
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        mode = stat.S_IFLNK | 0o777
        return await self._make(parent_inode, name, mode, ctx, target=target)

    @fuse_errors
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        try:
            entry = await self._make(parent_inode, name, stat.S_IFREG | stat.S_IMODE(mode), ctx)
        except Exists:
            # Another node was faster. After CREATE the kernel neither checks the mode of what it opens nor
            # truncates it; on ESTALE it looks the name up again and opens the file in the ordinary way.
            raise FUSEError(errno.EEXIST if flags & os.O_EXCL else errno.ESTALE)
        with stale_when_gone():
            await self._table.open(entry.st_ino, fuse_abi.may_write(flags))
        return FileInfo(fh=entry.st_ino), entry

    @fuse_errors
    async def create_unnamed(
        self, parent: int, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """O_TMPFILE: a file that is gone with its last close, unless `link` gives it a name."""
        args = {"parent": parent, "name": None, "mode": stat.S_IFREG | stat.S_IMODE(mode), "uid": ctx.uid}
        args |= {"gid": ctx.gid, "umask": ctx.umask, "rdev": 0, "target": None}
        for attempt in range(UNNAMED_TRIES_MAX):
            asked = self._table.stamp()
            reply = await self._session.call("make", args)
            try:
                entry = await self._entry(reply, asked)
                await self._table.open(entry.st_ino, fuse_abi.may_write(flags))
                return FileInfo(fh=entry.st_ino), entry
            except NotFound:
                # Made by a coordinator that died before it could say so; the next one had nobody who held it. Nobody
                # has seen that file either, so another one does as well.
                if attempt + 1 == UNNAMED_TRIES_MAX:
                    raise
        raise AssertionError("not reached")

    @fuse_errors
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        args = {"ino": inode, "parent": new_parent_inode, "name": new_name}
        asked = self._table.stamp()
        self._known.add(new_parent_inode, new_name)
        reply = await self._session.call("link", args)
        linked_ns = _change_ns(reply, reply["attr"][CTIME])
        self._table.changed(new_parent_inode, asked, linked_ns, entries=True)
        return await self._entry(reply, asked, new_parent_inode, changed=True)

    @fuse_errors
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._remove(parent_inode, name, directory=False)

    @fuse_errors
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._remove(parent_inode, name, directory=True)

    async def _remove(self, parent: int, name: bytes, *, directory: bool) -> None:
        args = {"parent": parent, "name": name, "directory": directory}
        asked = self._table.stamp()
        reply = await self._session.call("unlink", args)
        self._known.discard(parent, name)
        if directory:
            self._known.forget(reply["ino"])
        time_ns = _change_ns(reply, reply.get("time_ns"))
        self._table.changed(reply["ino"], asked, time_ns, links=-2 if directory else -1)
        self._table.changed(parent, asked, time_ns, entries=True, links=-int(directory))
        self._table.granted_directory(parent, reply["dir_lease"])

    @fuse_errors
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        if flags & ~(pyfuse3.RENAME_NOREPLACE | pyfuse3.RENAME_EXCHANGE | RENAME_WHITEOUT):
            raise FUSEError(errno.EINVAL)
        args = {"parent": parent_inode_old, "name": name_old}
        args |= {"new_parent": parent_inode_new, "new_name": name_new, "flags": flags}
        if flags & RENAME_WHITEOUT:
            args |= {"uid": ctx.uid, "gid": ctx.gid}
        asked = self._table.stamp()
        self._known.add(parent_inode_new, name_new)
        reply = await self._session.call("rename", args)
        if not flags & (pyfuse3.RENAME_EXCHANGE | RENAME_WHITEOUT):
            self._known.discard(parent_inode_old, name_old)
        time_ns = _change_ns(reply, reply.get("time_ns"))
        self._table.changed(reply["ino"], asked, time_ns)
        self._table.set_parent(reply["ino"], parent_inode_new)
        if reply["replaced"]:
            self._table.changed(reply["replaced"], asked, time_ns, links=None)
        # Whether a directory came or went is not known here.
        links = 0 if parent_inode_old == parent_inode_new and not reply["replaced"] else None
        for parent in {parent_inode_old, parent_inode_new}:
            self._table.changed(parent, asked, time_ns, entries=True, links=links)
        self._table.granted_directory(parent_inode_old, reply["dir_lease"])
        self._table.granted_directory(parent_inode_new, reply["new_dir_lease"])

    @fuse_errors
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        with stale_when_gone():
            target: bytes = (await self._session.call("readlink", {"ino": inode}))["target"]
        self._table.access.accessed_inode(inode)
        return target

    # ---- open files

    @fuse_errors
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        with stale_when_gone():
            await self._table.open(inode, fuse_abi.may_write(flags))
        return FileInfo(fh=inode)

    # ---- directories

    @fuse_errors
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        handle = self._next_handle
        self._next_handle += 1
        self._directories[handle] = OpenDirectory(inode)
        return handle

    @fuse_errors
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """Entries of one page of the coordinator, fetched anew at the start and after a recall. Before them
        `.` and `..`, whose cookies are 1 and 2: the coordinator's are larger."""
        directory = self._directories[fh]
        outdated = self._table.recalled_since(directory.ino, directory.stamp)
        after = 0 if start_id <= COOKIE_OF_PARENT else start_id  # the coordinator's cookie
        if start_id == 0 or outdated or after not in directory.positions:
            await self._fetch_page(directory, after)
            self._table.access.accessed_inode(directory.ino)
        dots = [(1, b".", directory.ino), (COOKIE_OF_PARENT, b"..", self._table.parent(directory.ino))]
        for cookie, name, ino in dots[start_id:]:
            if not pyfuse3.readdir_reply(token, name, directory_entry(ino), cookie):
                return
        for cookie, name, attr in directory.entries[directory.positions[after] :]:
            if not pyfuse3.readdir_reply(token, name, entry_attributes(attr, leased=False), cookie):
                return

    async def _fetch_page(self, directory: OpenDirectory, cookie: int) -> None:
        stamp = self._table.stamp()
        args = {"ino": directory.ino, "cookie": cookie, "limit": READDIR_ENTRIES_MAX}
        reply = await self._session.call("readdir", args)
        self._table.granted_directory(directory.ino, reply["dir_lease"])
        entries = reply["entries"]
        directory.stamp = stamp
        directory.leased = reply["dir_lease"] >= LEASE_READ
        directory.entries = entries
        directory.positions = {cookie: 0}
        for index, (next_cookie, _, _) in enumerate(entries):
            # Behind the last entry of the volume's last page: an empty reply, without asking again.
            if index + 1 < len(entries) or reply["eof"]:
                directory.positions[next_cookie] = index + 1

    def listing_was_leased(self, fh: int) -> bool:
        """See relay.Listings."""
        directory = self._directories.get(fh)
        return directory is not None and directory.leased

    def adopt_listing(self, fh: int, ino: int) -> None:
        """See relay.Listings."""
        if fh not in self._directories:
            self._directories[fh] = OpenDirectory(ino)

    def close_directory(self, fh: int) -> None:
        self._directories.pop(fh, None)

    async def fsync_directory(self) -> None:
        """All names and attributes answered so far are on the media of all members."""
        await self._session.call("fsync", {})

    # ---- extended attributes

    @fuse_errors
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        _check_namespace(name)
        value: bytes = (await self._session.call("getxattr", {"ino": inode, "name": name}))["value"]
        return value

    @fuse_errors
    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        names: list[bytes] = (await self._session.call("listxattr", {"ino": inode, "name": b""}))["names"]
        # As local file systems do: what only root may read, only root sees.
        return names if ctx.uid == 0 else [name for name in names if not name.startswith(_TRUSTED)]

    @fuse_errors
    async def set_attribute(
        self, ino: int, name: bytes, value: bytes, flags: int, drops_set_gid: bool = False
    ) -> None:
        """setxattr(2) with XATTR_CREATE or XATTR_REPLACE in `flags`: one step at the coordinator.

        drops_set_gid: an ACL, set by somebody who may not keep that bit of the mode.
        """
        _check_namespace(name)
        args = {"ino": ino, "name": name, "value": value, "flags": flags, "drops_set_gid": drops_set_gid}
        await self._change(ino, "setxattr", args)

    @fuse_errors
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        _check_namespace(name)
        args = {"ino": inode, "name": name, "value": b"", "flags": 0}
        try:
            await self._change(inode, "removexattr", args)
        except NoAttribute:
            if name not in _ACLS:  # to have no ACL is what was asked for
                raise

    async def _change(self, ino: int, name: str, args: dict[str, Any]) -> None:
        """A call that changes the inode's ctime, of which the reply says nothing."""
        asked = self._table.stamp()
        await self._session.call(name, args)
        self._table.changed(ino, asked, None)


def _check_namespace(name: bytes) -> None:
    if name in _ACLS:
        return
    if not name.startswith(_NAMESPACES_KEPT) or name == _CAPABILITY:
        raise FUSEError(errno.EOPNOTSUPP)
    if name in _NAMESPACES_KEPT:
        raise FUSEError(errno.EINVAL)  # a namespace without a name in it
