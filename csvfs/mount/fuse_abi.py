"""The kernel's FUSE wire format: numbers, structs, and replies packed from them.

Place      mount floor. Sans-IO. Reference: <linux/fuse.h>, protocol 7.45; the kernel and we are on one
           machine, so numbers are in native byte order.
Rule       sizes are asserted against the kernel's structs; a request is unpacked only after its length is
           checked.
"""

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from csvfs.units import MIB

if TYPE_CHECKING:
    from pyfuse3 import EntryAttributes

FUSE_MAJOR = 7
FUSE_MINOR_MAX = 45  # the newest minor this module knows; the smaller of both sides' is spoken
FUSE_MINOR_MIN = 31  # FUSE_MAX_PAGES, EXPLICIT_INVAL_DATA and CACHE_SYMLINKS are all older
MINOR_WITH_EPOCH = 44  # FUSE_NOTIFY_INC_EPOCH
ROOT_NODE = 1

LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK = 1, 2, 3, 4, 5, 6
MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN, READ, WRITE = 8, 9, 10, 11, 12, 13, 14, 15, 16
STATFS, RELEASE, FSYNC, SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, FLUSH = 17, 18, 20, 21, 22, 23, 24, 25
INIT, OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, GETLK, SETLK, SETLKW = 26, 27, 28, 29, 30, 31, 32, 33
ACCESS, CREATE, INTERRUPT, BMAP, DESTROY, IOCTL, POLL, NOTIFY_REPLY = 34, 35, 36, 37, 38, 39, 40, 41
BATCH_FORGET, FALLOCATE, READDIRPLUS, RENAME2, LSEEK, COPY_FILE_RANGE = 42, 43, 44, 45, 46, 47
TMPFILE = 51

IN_HEADER = struct.Struct("=IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER = struct.Struct("=IiQ")  # len, error, unique
assert (IN_HEADER.size, OUT_HEADER.size) == (40, 16)
READ_IN = struct.Struct("=QQIIQII")  # fh, offset, size, read_flags, lock_owner, flags, padding
WRITE_IN = struct.Struct("=QQIIQII")  # fh, offset, size, write_flags, lock_owner, flags, padding
WRITE_REPLY = struct.Struct("=IiQII")  # header; size, padding
assert (READ_IN.size, WRITE_IN.size, WRITE_REPLY.size) == (40, 40, 24)
WRITE_DATA_OFFSET = IN_HEADER.size + WRITE_IN.size
FORGET_IN = struct.Struct("=Q")  # nlookup
BATCH_FORGET_IN = struct.Struct("=II")  # count, dummy
FORGET_ONE = struct.Struct("=QQ")  # nodeid, nlookup
OPEN_IN = struct.Struct("=II")  # flags, open_flags; also the start of fuse_create_in
CREATE_IN = struct.Struct("=IIII")  # flags, mode, umask, open_flags; then the name. Also of TMPFILE
MKNOD_IN = struct.Struct("=IIII")  # mode, rdev, umask, padding; then the name
LINK_IN = struct.Struct("=Q")  # the inode; then the name
# valid, padding, fh, size, lock_owner, atime, mtime, ctime, their nanoseconds, mode, unused, uid, gid, unused
SETATTR_IN = struct.Struct("=IIQQQqqqIIIIIIII")
assert SETATTR_IN.size == 88
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME = 1, 2, 4, 8, 16, 32  # in `valid`
SET_ATIME_NOW, SET_MTIME_NOW = 128, 256
MKDIR_IN = struct.Struct("=II")  # mode, umask; then the name
RENAME_IN = struct.Struct("=Q")  # new directory; then both names
RENAME2_IN = struct.Struct("=QII")  # new directory, flags, padding; then both names
RELEASE_IN = struct.Struct("=QIIQ")  # fh, flags, release_flags, lock_owner
FSYNC_IN = struct.Struct("=QII")  # fh, fsync_flags, padding
SETXATTR_IN = struct.Struct("=II")  # size, flags; then name, NUL, value: without FUSE_SETXATTR_EXT
SETXATTR_EXT_IN = struct.Struct("=IIII")  # size, flags, setxattr_flags, padding; with it
SETXATTR_ACL_KILL_SGID = 1 << 0
FALLOCATE_IN = struct.Struct("=QQQII")  # fh, offset, length, mode, padding
LK_IN = struct.Struct("=QQQQIIII")  # fh, owner, start, end, type, pid, lk_flags, padding
LK_OUT = struct.Struct("=QQII")  # start, end, type, pid
FLUSH_IN = struct.Struct("=QIIQ")  # fh, unused, padding, lock_owner
INTERRUPT_IN = struct.Struct("=Q")  # unique
assert (LK_IN.size, LK_OUT.size, FLUSH_IN.size, INTERRUPT_IN.size) == (48, 24, 24, 8)
COPY_FILE_RANGE_IN = struct.Struct("=7Q")  # fh_in, off_in, nodeid_out, fh_out, off_out, len, flags
COPY_SIZE_MAX = 1 << 30  # of one COPY_FILE_RANGE: its answer has 32 bits for the number of bytes
assert COPY_FILE_RANGE_IN.size == 56
LSEEK_IN = struct.Struct("=QQII")  # fh, offset, whence, padding
assert (FALLOCATE_IN.size, LSEEK_IN.size) == (32, 24)
GETXATTR_IN = struct.Struct("=II")  # size, padding; then name, NUL. Also of LISTXATTR, without a name
assert (RELEASE_IN.size, FSYNC_IN.size, SETXATTR_IN.size, GETXATTR_IN.size) == (24, 16, 8, 8)
READDIR_SIZE_OFFSET = IN_HEADER.size + 16  # `size` of a fuse_read_in
U32 = struct.Struct("=I")
ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
ATTR_BLOCK_SIZE = 4096  # st_blksize
_U64 = (1 << 64) - 1
ENTRY_VALID = struct.Struct("=QQII")  # entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec
ENTRY_VALID_OFFSET = 16  # in fuse_entry_out, after nodeid and generation
ENTRY_OUT_SIZE = 40 + ATTR.size
ATTR_VALID = struct.Struct("=QI")  # attr_valid, attr_valid_nsec: the start of fuse_attr_out
ATTR_OUT_SIZE = 16 + ATTR.size
assert (ATTR.size, ENTRY_OUT_SIZE, ATTR_OUT_SIZE) == (88, 128, 104)
NODEID = struct.Struct("=Q")
OPEN_OUT = struct.Struct("=QII")  # fh, open_flags, padding
DIRENT = struct.Struct("=QQII")  # ino, off, namelen, type; then the name, padded to 8 bytes
assert (OPEN_OUT.size, DIRENT.size) == (16, 24)
STATFS_OUT = struct.Struct("=QQQQQIIII6I")  # blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, ...
assert STATFS_OUT.size == 80
INIT_IN = struct.Struct("=IIII")  # major, minor, max_readahead, flags; then flags2 if FLAG_INIT_EXT is set
# major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
# map_alignment, flags2, max_stack_depth, request_timeout, unused
INIT_OUT = struct.Struct("=IIIIHHIIHHIIH11H")
assert INIT_OUT.size == 64

FLAG_ASYNC_READ = 1 << 0
FLAG_POSIX_LOCKS = 1 << 1
FLAG_ATOMIC_O_TRUNC = 1 << 3
FLAG_BIG_WRITES = 1 << 5
FLAG_DONT_MASK = 1 << 6
FLAG_FLOCK_LOCKS = 1 << 10
FLAG_AUTO_INVAL_DATA = 1 << 12
FLAG_DO_READDIRPLUS = 1 << 13
FLAG_READDIRPLUS_AUTO = 1 << 14
FLAG_ASYNC_DIO = 1 << 15
FLAG_WRITEBACK_CACHE = 1 << 16
FLAG_PARALLEL_DIROPS = 1 << 18
FLAG_POSIX_ACL = 1 << 20
FLAG_MAX_PAGES = 1 << 22
FLAG_CACHE_SYMLINKS = 1 << 23
FLAG_EXPLICIT_INVAL_DATA = 1 << 25
FLAG_SETXATTR_EXT = 1 << 29
FLAG_INIT_EXT = 1 << 30
FLAG_DIRECT_IO_ALLOW_MMAP = 1 << 36
FLAG_HAS_RESEND = 1 << 39  # the kernel offers it: FUSE_NOTIFY_RESEND works

FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_CACHE_DIR = 1 << 3
FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6

READ_LOCKOWNER = 1 << 1  # in read_flags: for a program, past the page cache
WRITE_CACHE = 1 << 0  # in write_flags: write-back of dirty mmapped pages
WRITE_KILL_SUIDGID = 1 << 2  # in write_flags: the caller may not keep set-uid and set-gid bits
FSYNC_FDATASYNC = 1 << 0
LK_FLOCK = 1 << 0  # in lk_flags: by flock(2), of the whole file

NOTIFY_INVAL_INODE = 2
NOTIFY_RESEND = 7
NOTIFY_INC_EPOCH = 8
NOTIFY_PRUNE = 9  # Linux 6.18
NOTIFY_INVAL_INODE_OUT = struct.Struct("=IiQQqq")  # header with unique 0; ino, off, len
assert NOTIFY_INVAL_INODE_OUT.size == 40
NOTIFY_PRUNE_OUT = struct.Struct("=IiQIIQ")  # header with unique 0; count, padding, spare; the inodes follow
assert NOTIFY_PRUNE_OUT.size == 32

IO_SIZE_MAX = MIB  # of one READ or WRITE
# The kernel refuses to deliver into a smaller buffer than its largest WRITE.
REQUEST_SIZE_MAX = IO_SIZE_MAX + 8192


@dataclass(slots=True, frozen=True)
class InitRequest:
    """What the kernel offers when a file system is mounted."""

    major: int
    minor: int
    max_readahead: int  # bytes
    flags: int  # both words as one number


def unpack_init(body: memoryview) -> InitRequest | None:
    """From what follows the header of an INIT request; None: too short."""
    if len(body) < INIT_IN.size:
        return None
    major, minor, max_readahead, flags = INIT_IN.unpack_from(body)
    if flags & FLAG_INIT_EXT and len(body) >= INIT_IN.size + U32.size:
        flags |= U32.unpack_from(body, INIT_IN.size)[0] << 32
    return InitRequest(major, minor, max_readahead, flags)


def pack_init_reply(
    unique: int, *, minor: int, flags: int, max_readahead: int, max_background: int, io_size_max: int
) -> bytes:
    """Header and fuse_init_out."""
    congestion_threshold = max_background * 3 // 4
    body = INIT_OUT.pack(
        FUSE_MAJOR, minor, max_readahead, flags & 0xFFFF_FFFF, max_background, congestion_threshold,
        io_size_max, 1, io_size_max // 4096, 0, flags >> 32, 0, 0, *(0,) * 11,
    )  # fmt: skip
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def pack_error_reply(unique: int, errno_value: int) -> bytes:
    """A reply without a body; `errno_value` 0: success, else a positive errno."""
    return OUT_HEADER.pack(OUT_HEADER.size, -errno_value, unique)


def pack_lseek_reply(unique: int, offset: int) -> bytes:
    return OUT_HEADER.pack(OUT_HEADER.size + 8, 0, unique) + NODEID.pack(offset)


def pack_lock_reply(unique: int, first: int, last: int, kind: int, pid: int) -> bytes:
    """To a GETLK. kind: fcntl.F_RDLCK, F_WRLCK, or F_UNLCK: nothing stands in the way."""
    return OUT_HEADER.pack(OUT_HEADER.size + LK_OUT.size, 0, unique) + LK_OUT.pack(first, last, kind, pid)


def pack_no_names_reply(unique: int, room: int) -> bytes:
    """To a LISTXATTR of an inode without attributes; room: that it asked for, 0: it asks how much it would be."""
    body = b"" if room else GETXATTR_IN.pack(0, 0)
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def pack_write_reply(unique: int, size: int) -> bytes:
    return WRITE_REPLY.pack(WRITE_REPLY.size, 0, unique, size, 0)


def pack_statfs_reply(unique: int, figures: dict[str, int], block_size: int = 4096) -> bytes:
    """`figures`: size and free in bytes, files, files_free, name_max (PROTOCOL.md, `statfs`)."""
    free = figures["free"] // block_size
    body = STATFS_OUT.pack(
        figures["size"] // block_size, free, free, figures["files"], figures["files_free"],
        block_size, figures["name_max"], block_size, 0, *(0,) * 6,
    )  # fmt: skip
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def pack_attr_reply(unique: int, attr: list[int], valid_s: int) -> bytes:
    """`attr` as in PROTOCOL.md."""
    ino, mode, nlink, uid, gid, rdev, size, blocks, atime_ns, mtime_ns, ctime_ns = attr[:11]
    atime, atime_rest = divmod(atime_ns, 1_000_000_000)
    mtime, mtime_rest = divmod(mtime_ns, 1_000_000_000)
    ctime, ctime_rest = divmod(ctime_ns, 1_000_000_000)
    body = ATTR.pack(
        ino, size, blocks, atime & _U64, mtime & _U64, ctime & _U64, atime_rest, mtime_rest, ctime_rest,
        mode, nlink, uid, gid, rdev & 0xFFFF_FFFF, ATTR_BLOCK_SIZE, 0,
    )  # fmt: skip
    header = OUT_HEADER.pack(OUT_HEADER.size + ATTR_OUT_SIZE, 0, unique)
    return b"".join((header, ATTR_VALID.pack(valid_s, 0), bytes(4), body))


def pack_entry(entry: "EntryAttributes") -> bytes:
    """A fuse_entry_out; its time-outs 1 or 0, for relay.py to complete."""
    atime, atime_rest = divmod(entry.st_atime_ns, 1_000_000_000)
    mtime, mtime_rest = divmod(entry.st_mtime_ns, 1_000_000_000)
    ctime, ctime_rest = divmod(entry.st_ctime_ns, 1_000_000_000)
    return b"".join((
        NODEID.pack(entry.st_ino), NODEID.pack(entry.generation),
        ENTRY_VALID.pack(int(entry.entry_timeout), int(entry.attr_timeout), 0, 0),
        ATTR.pack(
            entry.st_ino, entry.st_size, entry.st_blocks, atime & _U64, mtime & _U64, ctime & _U64,
            atime_rest, mtime_rest, ctime_rest, entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid,
            entry.st_rdev & 0xFFFF_FFFF, ATTR_BLOCK_SIZE, 0,
        ),
    ))  # fmt: skip


def pack_attr(entry: "EntryAttributes") -> bytes:
    """A fuse_attr_out; its time-out 1 or 0, for relay.py to complete."""
    return ATTR_VALID.pack(int(entry.attr_timeout), 0) + bytes(4) + pack_entry(entry)[ENTRY_OUT_SIZE - ATTR.size :]


def pack_absent_reply(unique: int, valid_s: int) -> bytes:
    """To a LOOKUP: there is no such name, and the kernel may remember that for `valid_s`."""
    header = OUT_HEADER.pack(OUT_HEADER.size + ENTRY_OUT_SIZE, 0, unique)
    entry = bytes(ENTRY_VALID_OFFSET) + ENTRY_VALID.pack(valid_s, 0, 0, 0)
    return header + entry.ljust(ENTRY_OUT_SIZE, b"\0")


def pack_inval_inode(ino: int, offset: int, length: int) -> bytes:
    """Offset negative: attributes only. Length 0 or less: to the end of the file."""
    size = NOTIFY_INVAL_INODE_OUT.size
    return NOTIFY_INVAL_INODE_OUT.pack(size, NOTIFY_INVAL_INODE, 0, ino, offset, length)


def pack_prune(inos: list[int]) -> bytes:
    """Have the kernel forget these inodes, but those in use: FORGETs follow."""
    size = NOTIFY_PRUNE_OUT.size + 8 * len(inos)
    return NOTIFY_PRUNE_OUT.pack(size, NOTIFY_PRUNE, 0, len(inos), 0, 0) + struct.pack(f"={len(inos)}Q", *inos)


def pack_inc_epoch() -> bytes:
    return OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_INC_EPOCH, 0)


def pack_resend() -> bytes:
    """Have the kernel ask anew all that it was not answered, with `unique` | UNIQUE_RESENT."""
    return OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0)


def copy_target(request: memoryview) -> int:
    """The inode that a COPY_FILE_RANGE changes; the header names the other one."""
    return int(COPY_FILE_RANGE_IN.unpack_from(request, IN_HEADER.size)[2])


def may_write(open_flags: int) -> bool:
    """Whether a file opened with these flags may be written to, through mmap too. Odd modes may, for all we know."""
    return open_flags & os.O_ACCMODE != os.O_RDONLY


def entry_offsets(reply: memoryview) -> list[int]:
    """Where each fuse_direntplus starts in a READDIRPLUS reply. Raises ValueError when it does not add up."""
    offsets = []
    at = OUT_HEADER.size
    while at < len(reply):
        if len(reply) - at < ENTRY_OUT_SIZE + DIRENT.size:
            raise ValueError(f"READDIRPLUS reply of {len(reply)} B ends within the entry at {at}")
        offsets.append(at)
        at += plus_entry_size(reply, at)
    if at != len(reply):
        raise ValueError(f"READDIRPLUS reply of {len(reply)} B ends within a name")
    return offsets


def plus_entry_size(reply: memoryview, at: int) -> int:
    name_size = U32.unpack_from(reply, at + ENTRY_OUT_SIZE + 16)[0]
    return ENTRY_OUT_SIZE + (DIRENT.size + name_size + 7) // 8 * 8


def without_attributes(reply: memoryview) -> bytes:
    """The READDIR reply with the entries of a READDIRPLUS reply."""
    parts = [b""]
    size = OUT_HEADER.size
    for at in entry_offsets(reply):
        entry = bytes(reply[at + ENTRY_OUT_SIZE : at + plus_entry_size(reply, at)])
        parts.append(entry)
        size += len(entry)
    parts[0] = OUT_HEADER.pack(size, 0, OUT_HEADER.unpack_from(reply)[2])
    return b"".join(parts)
