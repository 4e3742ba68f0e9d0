"""What a POSIX file system answers, made of dicts: names, attributes and bytes, open files, and every refusal by errno.

Place      tests; pure. Programs are root, of one cluster: it does not matter on which node a call is made.
Order      of refusals is that of Linux's VFS: fs/namei.c.
Unknown    a modification time that was not set by hand is None: nobody can say it beforehand.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

NOREPLACE, EXCHANGE = 1, 2
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
XATTR_CREATE, XATTR_REPLACE = 1, 2
LINKS_FOLLOWED_MAX = 40


class Refused(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(errno.errorcode[code])
        self.code = code


@dataclass(slots=True, eq=False)
class Inode:
    mode: int
    uid: int = 0
    gid: int = 0
    links: int = 1
    modified: int | None = None
    target: bytes = b""
    data: bytearray = field(default_factory=bytearray)
    entries: dict[bytes, Inode] = field(default_factory=dict)
    attributes: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    def holds(self, other: Inode) -> bool:
        """It is `other`, or `other` lies somewhere below."""
        return self is other or any(
            child.holds(other) for child in self.entries.values() if child.is_directory
        )

    def facts(self) -> tuple[int | None, ...]:
        """Mode, links, uid, gid, size (of a directory None), modification time (None: nobody knows)."""
        size = None if self.is_directory else len(self.target) if self.is_link else len(self.data)
        return self.mode, self.links, self.uid, self.gid, size, self.modified


@dataclass(slots=True)
class Place:
    """Where a path leads: the directory, the last name, and what is there."""

    directory: Inode
    name: bytes
    inode: Inode | None

    def must(self) -> Inode:
        if self.inode is None:
            raise Refused(errno.ENOENT)
        return self.inode


@dataclass(slots=True)
class OpenFile:
    inode: Inode
    append: bool


class Model:
    """A method for each call. They return what the call returns, or raise Refused."""

    def __init__(self) -> None:
        self.root = Inode(stat.S_IFDIR | 0o755, links=2)
        self.files: dict[int, OpenFile] = {}

    # -- paths ------------------------------------------------------------------------------------

    def place(self, path: bytes, *, follow: bool) -> Place:
        return self._walk(self.root, path, follow, [0])

    def _walk(self, directory: Inode, path: bytes, follow: bool, followed: list[int]) -> Place:
        *parents, last = path.split(b"/")
        for name in parents:
            inode = self._child(directory, name)
            if inode is None:
                raise Refused(errno.ENOENT)
            if inode.is_link:
                inode = self._follow(directory, inode, followed).must()
            directory = inode
        inode = self._child(directory, last)
        if inode is not None and inode.is_link and follow:
            return self._follow(directory, inode, followed)
        return Place(directory, last, inode)

    def _follow(self, directory: Inode, link: Inode, followed: list[int]) -> Place:
        followed[0] += 1
        if followed[0] > LINKS_FOLLOWED_MAX:
            raise Refused(errno.ELOOP)
        return self._walk(directory, link.target, True, followed)

    def _child(self, directory: Inode, name: bytes) -> Inode | None:
        if not directory.is_directory:
            raise Refused(errno.ENOTDIR)
        return directory.entries.get(name)

    # -- names ------------------------------------------------------------------------------------

    def _enter(self, place: Place, inode: Inode) -> int:
        if place.inode is not None:
            raise Refused(errno.EEXIST)
        if place.directory.links == 0:
            raise Refused(errno.ENOENT)
        place.directory.entries[place.name] = inode
        place.directory.modified = None
        if inode.is_directory:
            place.directory.links += 1
        return 0

    def _made(self, place: Place, mode: int) -> Inode:
        inode = Inode(mode)
        if place.directory.mode & stat.S_ISGID:
            inode.gid = place.directory.gid
            inode.mode |= stat.S_ISGID if inode.is_directory else 0
        return inode

    def mkdir(self, path: bytes, mode: int) -> int:
        place = self.place(path, follow=False)
        inode = self._made(place, stat.S_IFDIR | mode)
        inode.links = 2
        return self._enter(place, inode)

    def symlink(self, target: bytes, path: bytes) -> int:
        place = self.place(path, follow=False)
        inode = self._made(place, stat.S_IFLNK | 0o777)
        inode.target = target
        return self._enter(place, inode)

    def readlink(self, path: bytes) -> bytes:
        inode = self.place(path, follow=False).must()
        if not inode.is_link:
            raise Refused(errno.EINVAL)
        return inode.target

    def link(self, path: bytes, new: bytes) -> int:
        inode = self.place(path, follow=False).must()
        place = self.place(new, follow=False)
        if place.inode is not None:
            raise Refused(errno.EEXIST)
        if inode.is_directory:
            raise Refused(errno.EPERM)
        inode.links += 1
        return self._enter(place, inode)

    def _leave(self, place: Place) -> None:
        inode = place.directory.entries.pop(place.name)
        place.directory.modified = None
        if inode.is_directory:
            place.directory.links -= 1
            inode.links = 0
        else:
            inode.links -= 1

    def unlink(self, path: bytes) -> int:
        place = self.place(path, follow=False)
        if place.must().is_directory:
            raise Refused(errno.EISDIR)
        self._leave(place)
        return 0

    def rmdir(self, path: bytes) -> int:
        place = self.place(path, follow=False)
        if not place.must().is_directory:
            raise Refused(errno.ENOTDIR)
        if place.must().entries:
            raise Refused(errno.ENOTEMPTY)
        self._leave(place)
        return 0

    def rename(self, path: bytes, new: bytes, flags: int) -> int:
        old, target = self.place(path, follow=False), self.place(new, follow=False)
        inode, other = old.must(), target.inode
        if other is not None and flags == NOREPLACE:
            raise Refused(errno.EEXIST)
        if other is None and flags == EXCHANGE:
            raise Refused(errno.ENOENT)
        if inode.is_directory and inode.holds(target.directory):
            raise Refused(errno.EINVAL)
        if other is not None and other.is_directory and other.holds(old.directory):
            raise Refused(errno.EINVAL if flags == EXCHANGE else errno.ENOTEMPTY)
        if other is inode:
            return 0
        if other is not None and flags == EXCHANGE:
            self._exchange(old, target)
            return 0
        if other is not None:
            if inode.is_directory != other.is_directory:
                raise Refused(errno.ENOTDIR if inode.is_directory else errno.EISDIR)
            if other.entries:
                raise Refused(errno.ENOTEMPTY)
            self._leave(target)
        del old.directory.entries[old.name]
        target.directory.entries[target.name] = inode
        old.directory.modified = target.directory.modified = None
        if inode.is_directory:
            old.directory.links -= 1
            target.directory.links += 1
        return 0

    def _exchange(self, one: Place, two: Place) -> None:
        for place, inode in ((one, two.must()), (two, one.must())):
            place.directory.entries[place.name] = inode
            place.directory.modified = None
        change = one.must().is_directory - two.must().is_directory
        one.directory.links -= change
        two.directory.links += change

    def list(self, path: bytes) -> list[bytes]:
        inode = self.place(path, follow=True).must()
        if not inode.is_directory:
            raise Refused(errno.ENOTDIR)
        return sorted(inode.entries)

    # -- attributes -------------------------------------------------------------------------------

    def lstat(self, path: bytes) -> tuple[int | None, ...]:
        return self.place(path, follow=False).must().facts()

    def chmod(self, path: bytes, mode: int) -> int:
        inode = self.place(path, follow=True).must()
        inode.mode = stat.S_IFMT(inode.mode) | mode
        return 0

    def chown(self, path: bytes, uid: int, gid: int) -> int:
        inode = self.place(path, follow=False).must()
        inode.uid = inode.uid if uid == -1 else uid
        inode.gid = inode.gid if gid == -1 else gid
        if not inode.is_directory:
            inode.mode &= ~stat.S_ISUID
            if inode.mode & stat.S_IXGRP:
                inode.mode &= ~stat.S_ISGID
        return 0

    def utimens(self, path: bytes, accessed: int, modified: int) -> int:
        self.place(path, follow=False).must().modified = modified
        return 0

    def _attributed(self, path: bytes) -> Inode:
        inode = self.place(path, follow=True).must()
        assert not inode.is_link
        return inode

    def setxattr(self, path: bytes, name: bytes, value: bytes, flags: int) -> int:
        attributes = self._attributed(path).attributes
        if flags == XATTR_CREATE and name in attributes:
            raise Refused(errno.EEXIST)
        if flags == XATTR_REPLACE and name not in attributes:
            raise Refused(errno.ENODATA)
        attributes[name] = value
        return 0

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        attributes = self._attributed(path).attributes
        if name not in attributes:
            raise Refused(errno.ENODATA)
        return attributes[name]

    def removexattr(self, path: bytes, name: bytes) -> int:
        self.getxattr(path, name)
        del self._attributed(path).attributes[name]
        return 0

    # -- open files -------------------------------------------------------------------------------

    def open(self, handle: int, path: bytes, flags: int, mode: int) -> int:
        """For reading and writing. A handle that is open already is closed by its owner before."""
        follow = not flags & os.O_NOFOLLOW and not (flags & os.O_CREAT and flags & os.O_EXCL)
        place = self.place(path, follow=follow)
        inode = place.inode
        if inode is None:
            if not flags & os.O_CREAT:
                raise Refused(errno.ENOENT)
            inode = self._made(place, stat.S_IFREG | mode)
            self._enter(place, inode)
        elif flags & os.O_CREAT and flags & os.O_EXCL:
            raise Refused(errno.EEXIST)
        elif inode.is_link:
            raise Refused(errno.ELOOP)
        elif inode.is_directory:
            raise Refused(errno.EISDIR)
        elif flags & os.O_TRUNC:
            self._resize(inode, 0)
        self.files[handle] = OpenFile(inode, bool(flags & os.O_APPEND))
        return 0

    def close(self, handle: int) -> int:
        del self.files[handle]
        return 0

    def fstat(self, handle: int) -> tuple[int | None, ...]:
        return self.files[handle].inode.facts()

    def _resize(self, inode: Inode, size: int) -> None:
        del inode.data[size:]
        inode.data.extend(bytes(size - len(inode.data)))
        inode.modified = None

    def pwrite(self, handle: int, offset: int, data: bytes) -> int:
        """Linux appends where the file was opened for that, whatever the offset."""
        file = self.files[handle]
        if not data:
            return 0
        if file.append:
            offset = len(file.inode.data)
        self._resize(file.inode, max(len(file.inode.data), offset + len(data)))
        file.inode.data[offset : offset + len(data)] = data
        return len(data)

    def pread(self, handle: int, offset: int, size: int) -> bytes:
        return bytes(self.files[handle].inode.data[offset : offset + size])

    def ftruncate(self, handle: int, size: int) -> int:
        self._resize(self.files[handle].inode, size)
        return 0

    def truncate(self, path: bytes, size: int) -> int:
        inode = self.place(path, follow=True).must()
        if inode.is_directory:
            raise Refused(errno.EISDIR)
        self._resize(inode, size)
        return 0

    def fallocate(self, handle: int, mode: int, offset: int, size: int) -> int:
        inode = self.files[handle].inode
        inode.modified = None
        if not mode & KEEP_SIZE:
            self._resize(inode, max(len(inode.data), offset + size))
        if mode & (PUNCH_HOLE | ZERO_RANGE):
            end = min(offset + size, len(inode.data))
            inode.data[offset:end] = bytes(max(0, end - offset))
        return 0

    def fsync(self, handle: int) -> int:
        return 0

    # -- everything -------------------------------------------------------------------------------

    def tree(self) -> Iterator[tuple[bytes, tuple[int | None, ...], bytes, list[tuple[bytes, bytes]]]]:
        return self._tree(self.root, b"")

    def _tree(self, directory: Inode, above: bytes) -> Iterator[Any]:
        for name, inode in sorted(directory.entries.items()):
            path = above + b"/" + name
            yield (
                path,
                inode.facts(),
                bytes(inode.data) if inode.is_file else inode.target,
                sorted(inode.attributes.items()),
            )
            if inode.is_directory:
                yield from self._tree(inode, path)
