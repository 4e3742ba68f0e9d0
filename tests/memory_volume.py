"""A complete little volume in dictionaries: file table and session in one, to test the mount with."""

import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from csvfs.errors import (
    BadRequest,
    Exists,
    IsADirectory,
    NoAttribute,
    NotADirectory,
    NotEmpty,
    NotFound,
    NotSupported,
)
from csvfs.mount.access_times import AccessTimes
from csvfs.mount.holes import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from csvfs.mount.set_id import mode_after_write
from csvfs.mount.write_path import WRITE_APPEND
from csvfs.units import GIB
from tests.memory_locks import MemoryLocks

READ_LEASE, WRITE_LEASE = 2, 3
XATTR_CREATE, XATTR_REPLACE = 1, 2
ROOT = 1


@dataclass
class Inode:
    ino: int
    mode: int
    uid: int
    gid: int
    rdev: int = 0
    nlink: int = 1
    target: bytes = b""
    data: bytearray = field(default_factory=bytearray)
    entries: dict[bytes, int] = field(default_factory=dict)
    cookies: dict[bytes, int] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    atime_ns: int = field(default_factory=time.time_ns)
    mtime_ns: int = field(default_factory=time.time_ns)
    ctime_ns: int = field(default_factory=time.time_ns)
    opens: int = 0
    write_opens: int = 0

    def attr(self) -> list:
        size = len(self.data) if stat.S_ISREG(self.mode) else len(self.target) or len(self.entries)
        blocks = (size + 4095) // 4096 * 8
        times = [self.atime_ns, self.mtime_ns, self.ctime_ns]
        return [self.ino, self.mode, self.nlink, self.uid, self.gid, self.rdev, size, blocks, *times, 1, len(self.xattrs)]

    def changed(self) -> None:
        self.mtime_ns = self.ctime_ns = time.time_ns()


class MemoryVolume:
    """Both interfaces the mount needs. Holds every lease by itself until a test recalls one."""

    def __init__(self) -> None:
        self.locks = MemoryLocks()
        self.access = AccessTimes(self, {})  # knows no inode: notes nothing
        self.inodes = {ROOT: Inode(ROOT, stat.S_IFDIR | 0o755, 0, 0, nlink=2)}
        self.next_ino = 2
        self.next_cookie = 16
        self.parents: dict[int, int] = {}
        self.calls: list[str] = []
        self.attributes_at_hand = False  # as if each were stale
        self.changes: list[tuple] = []  # of attributes, as the table was told
        self.changed_inodes: set[int] = set()  # whose attributes count as changed since any stamp
        self.forgotten: list[int] = []
        self.nowait = True
        self.fsync_count = 0
        self.leases: dict[int, int] = {}
        self.recalls: dict[int, int] = {}
        self.clock = 0
        self.before_reply: Callable[[str, dict], None] = lambda name, args: None

    # ---- file table: leases

    def set_parent(self, ino: int, parent: int) -> None:
        self.parents[ino] = parent

    def parent(self, ino: int) -> int:
        return self.parents.get(ino, ino)

    def stamp(self) -> int:
        return self.clock

    def recalled_since(self, ino: int, stamp: int) -> bool:
        return self.recalls.get(ino, -1) > stamp

    def recall(self, ino: int) -> None:
        """As if another node wanted it: the lease is gone. Notifying the kernel is the test's part."""
        self.clock += 1
        self.recalls[ino] = self.clock
        self.leases.pop(ino, None)

    def may_answer(self, ino: int) -> bool:
        return self.holds(ino) >= READ_LEASE

    def holds(self, ino: int) -> int:
        return self.leases.get(ino, 0)

    def granted(self, ino: int, kind: int, attr: list, asked: int, changed: bool = False) -> None:
        self.leases[ino] = kind

    def changed(
        self, ino: int, asked: int, time_ns: int | None, *, entries: bool = False, links: int | None = 0
    ) -> None:
        self.changes.append((ino, time_ns, entries, links))

    def changed_since(self, ino: int, stamp: int) -> bool:
        return ino in self.changed_inodes

    def granted_directory(self, ino: int, kind: int) -> None:
        self.leases[ino] = kind

    # ---- file table: data

    def _inode(self, ino: int) -> Inode:
        inode = self.inodes.get(ino)
        if inode is None:
            raise NotFound(f"no inode {ino}")
        return inode

    def read_nowait(self, ino: int, offset: int, size: int) -> bytes | None:
        if not self.nowait:
            return None
        return bytes(memoryview(self._inode(ino).data)[offset : offset + size])

    def read_segments(self, ino: int, offset: int, size: int) -> bytes | None:
        return None  # no other node writes here

    def write_segments(
        self, ino: int, offset: int, data: memoryview, done: Callable[[Exception | None], None], request: int
    ) -> bool:
        return False

    async def read(self, ino: int, offset: int, size: int, *, direct: bool = False) -> list[bytes]:
        data = bytes(self._inode(ino).data[offset : offset + size])
        return [data[:100], data[100:]]

    def write_nowait(
        self,
        ino: int,
        offset: int,
        data: memoryview,
        write_flags: int,
        done: Callable[[Exception | None], None],
    ) -> bool:
        if not self.nowait:
            return False
        self._write(ino, offset, data, write_flags)
        done(None)
        return True

    def buffered_write(self, ino: int, offset: int, size: int) -> "MemoryVolume":
        return self

    def ended(self) -> None:
        """See buffered_write: nothing is kept of it."""

    async def write(self, ino: int, offset: int, data: memoryview, write_flags: int, *, direct: bool = False) -> None:
        self._write(ino, offset, data, write_flags)

    def _write(self, ino: int, offset: int, data: memoryview, write_flags: int) -> None:
        inode = self._inode(ino)
        content = inode.data
        if write_flags & WRITE_APPEND:
            offset = len(content)
        if offset > len(content):
            content.extend(bytes(offset - len(content)))
        content[offset : offset + len(data)] = data
        inode.mtime_ns = inode.ctime_ns = time.time_ns()

    async def fsync(self, ino: int) -> None:
        self._inode(ino)

    def flush_is_due(self, ino: int) -> bool:
        return True

    async def flush(self, ino: int) -> None:
        self._inode(ino)

    async def open(self, ino: int, writing: bool) -> None:
        if self.holds(ino) == 0:
            reply = await self.call("acquire", {"ino": ino, "kind": 1, "block": 0, "count": 0})
            self.granted(ino, reply["lease"], reply["attr"], self.stamp())
        inode = self._inode(ino)
        inode.opens += 1
        inode.write_opens += writing

    def closed(self, ino: int, writing: bool) -> None:
        inode = self._inode(ino)
        inode.opens -= 1
        inode.write_opens -= writing
        self._drop_if_orphan(inode)

    def forget(self, ino: int) -> None:
        self.forgotten.append(ino)

    def getattr_nowait(self, ino: int) -> list | None:
        return self._inode(ino).attr() if self.attributes_at_hand and self.holds(ino) >= READ_LEASE else None

    def knows_attributes(self, ino: int) -> bool:
        return self.holds(ino) >= READ_LEASE

    async def getattr(self, ino: int) -> list:
        self.leases.setdefault(ino, READ_LEASE)
        return self._inode(ino).attr()

    async def truncate(self, ino: int, changes: dict[str, Any]) -> list:
        self._apply(self._inode(ino), changes)
        return self._inode(ino).attr()

    async def statfs(self, ino: int) -> dict[str, int]:
        used = sum(len(inode.data) for inode in self.inodes.values())
        return {
            "size": 8 * GIB, "free": 8 * GIB - used,
            "files": len(self.inodes), "files_free": 1000, "name_max": 255,
        }  # fmt: skip

    async def fallocate(self, ino: int, offset: int, length: int, mode: int) -> None:
        data = self._inode(ino).data
        if mode & ~(KEEP_SIZE | PUNCH_HOLE | ZERO_RANGE):
            raise NotSupported(f"mode {mode}")
        if not mode & KEEP_SIZE:
            data.extend(bytes(max(0, offset + length - len(data))))
        if mode & (PUNCH_HOLE | ZERO_RANGE):
            end = min(offset + length, len(data))
            data[offset:end] = bytes(max(0, end - offset))

    async def seek(self, ino: int, offset: int, whence: int) -> int | None:
        """All of it is data."""
        size = len(self._inode(ino).data)
        if offset >= size:
            return None
        return offset if whence == os.SEEK_DATA else size

    async def copy_range(self, ino: int, offset: int, target: int, target_offset: int, length: int) -> int:
        data = bytes(self._inode(ino).data[offset : offset + length])
        self._write(target, target_offset, memoryview(data), 0)
        return len(data)

    def set_id_is_due(self, ino: int) -> bool:
        mode = self._inode(ino).attr()[1]
        return mode_after_write(mode) != mode

    async def clear_set_id(self, ino: int) -> None:
        inode = self._inode(ino)
        inode.mode = mode_after_write(inode.mode)

    # ---- session

    async def call(self, name: str, args: dict[str, Any]) -> Any:
        self.calls.append(name)
        place = self.locks if name in ("lock", "unlock", "getlock") else self
        reply = getattr(place, f"call_{name}")(**args)
        self.before_reply(name, args)
        return reply

    def _entry(self, inode: Inode, parent: int | None = None) -> dict[str, Any]:
        reply = {"attr": inode.attr(), "lease": READ_LEASE}
        return reply if parent is None else {**reply, "dir_lease": READ_LEASE}

    def _directory(self, ino: int) -> Inode:
        inode = self._inode(ino)
        if not stat.S_ISDIR(inode.mode):
            raise NotADirectory(f"inode {ino}")
        return inode

    def _add(self, directory: Inode, name: bytes, ino: int) -> None:
        directory.entries[name] = ino
        directory.cookies[name] = self.next_cookie
        self.next_cookie += 1
        directory.changed()

    def _take(self, directory: Inode, name: bytes) -> Inode:
        if name not in directory.entries:
            raise NotFound(name.decode())
        directory.cookies.pop(name)
        directory.changed()
        return self.inodes[directory.entries.pop(name)]

    def _drop_if_orphan(self, inode: Inode) -> None:
        if inode.nlink == 0 and inode.opens == 0:
            self.inodes.pop(inode.ino, None)

    def call_lookup(self, parent: int, name: bytes) -> dict[str, Any]:
        ino = self._directory(parent).entries.get(name)
        if ino is None:
            return {"attr": None, "lease": 0, "dir_lease": READ_LEASE}
        return self._entry(self.inodes[ino], parent)

    def _apply(self, inode: Inode, changes: dict[str, Any]) -> None:
        if changes["mode"] is not None:
            inode.mode = stat.S_IFMT(inode.mode) | changes["mode"]
        for key in ("uid", "gid", "atime_ns", "mtime_ns"):
            if changes[key] is not None:
                setattr(inode, key, changes[key])
        if changes["size"] is not None:
            del inode.data[changes["size"] :]
            inode.data.extend(bytes(changes["size"] - len(inode.data)))
        inode.ctime_ns = time.time_ns()

    def call_setattr(self, ino: int, **changes: Any) -> dict[str, Any]:
        self._apply(self._inode(ino), changes)
        return self._entry(self._inode(ino))

    def call_make(
        self, parent: int, name: bytes | None, mode: int, uid: int, gid: int, rdev: int, target: bytes | None, umask: int = 0
    ) -> dict[str, Any]:
        directory = self._directory(parent)
        mode &= ~0 if stat.S_ISLNK(mode) else ~umask
        if name is not None and name in directory.entries:
            raise Exists(name.decode())
        inode = Inode(self.next_ino, mode, uid, gid, rdev, target=target or b"")
        if directory.mode & stat.S_ISGID:
            inode.gid = directory.gid
            inode.mode |= stat.S_ISGID if stat.S_ISDIR(mode) else 0
        if stat.S_ISDIR(mode):
            inode.nlink = 2
            directory.nlink += 1
        self.next_ino += 1
        self.inodes[inode.ino] = inode
        if name is None:
            inode.nlink = 0
            return self._entry(inode)
        self._add(directory, name, inode.ino)
        return self._entry(inode, parent)

    def call_link(self, ino: int, parent: int, name: bytes) -> dict[str, Any]:
        if name in self._directory(parent).entries:
            raise Exists(name.decode())
        inode = self._inode(ino)
        inode.nlink += 1
        self._add(self._directory(parent), name, ino)
        return self._entry(inode, parent)

    def _check_empty(self, inode: Inode) -> None:
        if inode.entries:
            raise NotEmpty(f"inode {inode.ino}")

    def _lose_name(self, inode: Inode, parent: Inode) -> None:
        if stat.S_ISDIR(inode.mode):
            parent.nlink -= 1
            inode.nlink = 0
        else:
            inode.nlink -= 1
        inode.ctime_ns = time.time_ns()
        self._drop_if_orphan(inode)

    def call_unlink(self, parent: int, name: bytes, directory: bool) -> dict[str, Any]:
        holder = self._directory(parent)
        inode = self.inodes.get(holder.entries.get(name, 0))
        if inode is None:
            raise NotFound(name.decode())
        if stat.S_ISDIR(inode.mode) != directory:
            raise NotADirectory(name.decode()) if directory else IsADirectory(name.decode())
        self._check_empty(inode)
        self._take(holder, name)
        self._lose_name(inode, holder)
        return {"ino": inode.ino, "nlink": inode.nlink, "dir_lease": READ_LEASE}

    def call_rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int
    ) -> dict[str, Any]:
        source, target = self._directory(parent), self._directory(new_parent)
        reply = {"replaced": 0, "replaced_nlink": 0, "dir_lease": READ_LEASE, "new_dir_lease": READ_LEASE}
        if name not in source.entries:
            raise NotFound(name.decode())
        if flags & 2:
            if new_name not in target.entries:
                raise NotFound(new_name.decode())
            source.entries[name], target.entries[new_name] = target.entries[new_name], source.entries[name]
            return {"ino": target.entries[new_name], **reply}
        if new_name in target.entries:
            if flags & 1:
                raise Exists(new_name.decode())
            self._check_empty(self.inodes[target.entries[new_name]])
            replaced = self._take(target, new_name)
            self._lose_name(replaced, target)
            reply |= {"replaced": replaced.ino, "replaced_nlink": replaced.nlink}
        inode = self._take(source, name)
        self._add(target, new_name, inode.ino)
        if stat.S_ISDIR(inode.mode):
            source.nlink -= 1
            target.nlink += 1
        inode.ctime_ns = time.time_ns()
        return {"ino": inode.ino, **reply}

    def call_readlink(self, ino: int) -> dict[str, Any]:
        return {"target": self._inode(ino).target}

    def call_readdir(self, ino: int, cookie: int, limit: int) -> dict[str, Any]:
        directory = self._directory(ino)
        names = [name for name in directory.entries if directory.cookies[name] > cookie]
        names.sort(key=directory.cookies.__getitem__)
        entries = [
            [directory.cookies[name], name, self.inodes[directory.entries[name]].attr()]
            for name in names[:limit]
        ]
        return {"entries": entries, "eof": len(names) <= limit, "dir_lease": READ_LEASE}

    def call_getxattr(self, ino: int, name: bytes) -> dict[str, Any]:
        if name not in self._inode(ino).xattrs:
            raise NoAttribute(name.decode())
        return {"value": self._inode(ino).xattrs[name]}

    def call_listxattr(self, ino: int, name: bytes) -> dict[str, Any]:
        return {"names": list(self._inode(ino).xattrs)}

    def call_setxattr(self, ino: int, name: bytes, value: bytes, flags: int, drops_set_gid: bool) -> None:
        xattrs = self._inode(ino).xattrs
        if flags & XATTR_CREATE and name in xattrs:
            raise Exists(name.decode())
        if flags & XATTR_REPLACE and name not in xattrs:
            raise NoAttribute(name.decode())
        xattrs[name] = value

    def call_removexattr(self, ino: int, name: bytes, value: bytes, flags: int) -> None:
        if self._inode(ino).xattrs.pop(name, None) is None:
            raise NoAttribute(name.decode())

    def call_acquire(self, ino: int, kind: int, block: int, count: int) -> dict[str, Any]:
        if count:
            raise BadRequest("the volume in memory has no layouts")
        return {**self._entry(self._inode(ino)), "extents": [], "slabs": []}

    def call_fsync(self) -> None:
        self.fsync_count += 1
