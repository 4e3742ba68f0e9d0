"""Access lists: the POSIX ACLs of the volume's inodes, kept in step with their modes.

Place      coordinator floor; above inodes.py and posix_acl.py, below attributes.py and namespace.py. All in a batch.
Owns       the rows of table xattrs with the names of posix_acl.NAMES.
Rule       permissions that the access list shows in the mode are equal in both, whatever changes one of them; a list that
           says no more than a mode is not kept.
Cost       an inode without extended attributes: one look at its count of them.
"""

import stat

from coordinator import posix_acl
from coordinator.database import Database
from coordinator.inodes import Inode
from coordinator.posix_acl import ACCESS, DEFAULT, Entries
from csvfs.errors import AccessDenied, BadRequest, Corrupt, NotSupported

_READ = "SELECT value FROM xattrs WHERE ino = ? AND name = ?"
_WRITE = "INSERT OR REPLACE INTO xattrs(ino, name, value) VALUES(?,?,?)"
_REMOVE = "DELETE FROM xattrs WHERE ino = ? AND name = ?"


class AccessLists:
    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, inode: Inode, name: bytes) -> Entries:
        """Empty: it has none. Raises Corrupt."""
        rows = self._database.rows(_READ, (inode.ino, name)) if inode.xattrs else []
        if not rows:
            return ()
        try:
            return posix_acl.parse(rows[0][0])
        except BadRequest as error:
            raise Corrupt(f"inode {inode.ino}: its {name.decode()} is damaged: {error}; set it anew") from None

    def check(self, inode: Inode, name: bytes, value: bytes) -> Entries:
        """The list in `value`, which the inode may get. Raises BadRequest, NotSupported, AccessDenied."""
        if stat.S_ISLNK(inode.mode):
            raise NotSupported(f"inode {inode.ino} is a symlink: it has no ACL")
        entries = posix_acl.parse(value)
        if name == DEFAULT and entries and not inode.is_directory:
            raise AccessDenied(f"inode {inode.ino} is no directory: it has no default ACL")
        return entries

    def set(self, inode: Inode, name: bytes, entries: Entries, *, drops_set_gid: bool = False) -> None:
        """None where there are no entries. drops_set_gid: by somebody who may not keep that bit.

        The inode has changed afterwards: call `Inodes.changed`.
        """
        if name == ACCESS and entries:
            inode.mode = posix_acl.mode_of(entries, inode.mode)
            if drops_set_gid:
                inode.mode &= ~stat.S_ISGID
            if posix_acl.is_plain(entries):
                entries = ()
        had = bool(inode.xattrs and self._database.rows(_READ, (inode.ino, name)))
        if entries:
            self._database.run(_WRITE, (inode.ino, name, posix_acl.pack(entries)))
        elif had:
            self._database.run(_REMOVE, (inode.ino, name))
        inode.xattrs += bool(entries) - had

    def mode_changed(self, inode: Inode, entries: Entries) -> None:
        """The list follows the mode; `entries`: its access list before."""
        if entries:
            self._database.run(_WRITE, (inode.ino, ACCESS, posix_acl.pack(posix_acl.after_chmod(entries, inode.mode))))

    def default_of(self, directory: Inode) -> Entries:
        """What is made in it inherits this. Raises Corrupt."""
        return self.of(directory, DEFAULT)

    def inherit(self, inode: Inode, default: Entries, umask: int) -> None:
        """A new inode, not a symlink, with the mode that was asked for, in a directory with this default list."""
        if not default:
            inode.mode &= ~(umask & 0o777)
            return
        entries, inode.mode = posix_acl.inherited(default, inode.mode)
        self.set(inode, ACCESS, entries)
        if inode.is_directory:
            self.set(inode, DEFAULT, default)
