"""A process on a node that makes system calls for somebody elsewhere: `python -S hand.py`, over its standard streams.

Place      tests; the other end: hands.py. Standard library alone, so that it starts at once and can be run anywhere.
Messages   a u32 of the size and a marshalled list of calls (name, arguments...); the answer likewise, a list of results.
           An error is the tuple ("!", errno). Calls of a message are made one after the other, whatever fails.
Handles    numbers that the caller gives to the files it opens.
"""

import ctypes
import errno
import fcntl
import marshal
import mmap
import os
import stat
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

SIZE = struct.Struct("<I")
PAGE = 4096
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_LIBC.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MS_SYNC, _AT_FDCWD, _MAP_FAILED = 4, -100, ctypes.c_void_p(-1).value

_files: dict[int, int] = {}
_maps: dict[int, tuple[int, int]] = {}  # handle -> address, length
_aligned = mmap.mmap(-1, 4 << 20)  # O_DIRECT wants memory that begins on a page


def _checked(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# -- open files --------------------------------------------------------------------------------


def _open(handle: int, path: bytes, flags: int, mode: int = 0o644) -> int:
    _files[handle] = os.open(path, flags | os.O_CLOEXEC, mode)
    return 0


def _close(handle: int) -> int:
    _unmap(handle)
    os.close(_files.pop(handle))
    return 0


def _close_all() -> int:
    for handle in list(_files):
        _close(handle)
    return 0


def _pread(handle: int, offset: int, size: int) -> bytes:
    return os.pread(_files[handle], size, offset)


def _pwrite(handle: int, offset: int, data: bytes) -> int:
    return os.pwrite(_files[handle], data, offset)


def _write(handle: int, data: bytes) -> int:
    return os.write(_files[handle], data)


def _read_direct(handle: int, offset: int, size: int) -> bytes:
    with memoryview(_aligned) as whole, whole[:size] as part:
        return bytes(part[: os.preadv(_files[handle], [part], offset)])


def _write_direct(handle: int, offset: int, data: bytes) -> int:
    with memoryview(_aligned) as whole, whole[: len(data)] as part:
        part[:] = data
        return os.pwritev(_files[handle], [part], offset)


def _ftruncate(handle: int, size: int) -> int:
    os.ftruncate(_files[handle], size)
    return 0


def _fallocate(handle: int, mode: int, offset: int, size: int) -> int:
    _checked(_LIBC.fallocate(_files[handle], mode, offset, size))
    return 0


def _copy_range(source: int, offset: int, target: int, target_offset: int, size: int) -> int:
    """Bytes copied; less than `size` only where the file ends."""
    done = 0
    while done < size:
        count = os.copy_file_range(_files[source], _files[target], size - done, offset + done, target_offset + done)
        if count == 0:
            break
        done += count
    return done


def _seek(handle: int, offset: int, whence: int) -> int:
    return os.lseek(_files[handle], offset, whence)


def _fsync(handle: int) -> int:
    os.fsync(_files[handle])
    return 0


def _fdatasync(handle: int) -> int:
    os.fdatasync(_files[handle])
    return 0


def _drop(handle: int) -> int:
    """What the page cache has of the file goes; dirty pages stay, so they are written back before."""
    os.fsync(_files[handle])
    os.posix_fadvise(_files[handle], 0, 0, os.POSIX_FADV_DONTNEED)
    return 0


def _fstat(handle: int) -> tuple[int, ...]:
    return _facts(os.fstat(_files[handle]))


def _fsize(handle: int) -> int:
    return os.fstat(_files[handle]).st_size


def _lock(handle: int, kind: int, start: int, size: int) -> int:
    fcntl.lockf(_files[handle], kind, size, start)
    return 0


# -- mapped files: shared, as long as asked for, whatever the file's size ------------------------


def _map(handle: int, length: int) -> int:
    address = _LIBC.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, _files[handle], 0)
    if address == _MAP_FAILED:
        _checked(-1)
    _unmap(handle)
    _maps[handle] = (address, length)
    return 0


def _unmap(handle: int) -> int:
    if handle in _maps:
        _checked(_LIBC.munmap(*_maps.pop(handle)))
    return 0


def _load(handle: int, offset: int, size: int) -> bytes:
    return ctypes.string_at(_maps[handle][0] + offset, size)


def _store(handle: int, offset: int, data: bytes, sync: bool) -> int:
    address = _maps[handle][0] + offset
    ctypes.memmove(address, data, len(data))
    if sync:
        first = address & -PAGE
        _checked(_LIBC.msync(first, address + len(data) - first, _MS_SYNC))
    return len(data)


# -- names and attributes ------------------------------------------------------------------------


def _facts(found: os.stat_result) -> tuple[int, ...]:
    """Mode, links, uid, gid, size, access and modification time in ns, inode."""
    return (found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_size, found.st_atime_ns,
            found.st_mtime_ns, found.st_ino)  # fmt: skip


def _lstat(path: bytes) -> tuple[int, ...]:
    return _facts(os.lstat(path))


def _rename(path: bytes, new: bytes, flags: int) -> int:
    _checked(_LIBC.renameat2(_AT_FDCWD, path, _AT_FDCWD, new, flags))
    return 0


def _list(path: bytes) -> list[bytes]:
    return sorted(os.listdir(path))


def _done(call: Callable[..., None]) -> Callable[..., int]:
    """The call, answering 0: None cannot be told from an answer that was forgotten."""

    def made(*arguments: Any) -> int:
        call(*arguments)
        return 0

    return made


def _chown(path: bytes, uid: int, gid: int) -> int:
    os.chown(path, uid, gid, follow_symlinks=False)
    return 0


def _utimens(path: bytes, accessed: int, modified: int) -> int:
    os.utime(path, ns=(accessed, modified), follow_symlinks=False)
    return 0


def _read_file(path: bytes) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _tree(path: bytes) -> list[tuple[Any, ...]]:
    """Everything below: path, facts without access time, and what it holds."""
    found: list[tuple[Any, ...]] = []
    for name in sorted(os.listdir(path)):
        below = path + b"/" + name
        facts = _facts(os.lstat(below))
        held: Any = b""
        if stat.S_ISREG(facts[0]):
            held = _read_file(below)
        elif stat.S_ISLNK(facts[0]):
            held = os.readlink(below)
        attributes = sorted(os.listxattr(below, follow_symlinks=False))
        values = [(os.fsencode(name), os.getxattr(below, name, follow_symlinks=False)) for name in attributes]
        found.append((below, facts, held, values))
        if stat.S_ISDIR(facts[0]):
            found += _tree(below)
    return found


def _remove_tree(path: bytes) -> int:
    for name in os.listdir(path):
        below = path + b"/" + name
        if stat.S_ISDIR(os.lstat(below).st_mode):
            _remove_tree(below)
        else:
            os.unlink(below)
    os.rmdir(path)
    return 0


CALLS: dict[str, Callable[..., Any]] = {
    "open": _open, "close": _close, "close_all": _close_all, "pread": _pread, "pwrite": _pwrite, "write": _write,
    "read_direct": _read_direct, "write_direct": _write_direct, "ftruncate": _ftruncate, "fallocate": _fallocate,
    "copy_range": _copy_range, "seek": _seek, "fsync": _fsync, "fdatasync": _fdatasync, "drop": _drop,
    "fstat": _fstat, "fsize": _fsize, "lock": _lock, "map": _map, "unmap": _unmap, "load": _load, "store": _store,
    "lstat": _lstat, "rename": _rename, "list": _list, "readlink": os.readlink, "read_file": _read_file,
    "mkdir": _done(os.mkdir), "symlink": _done(os.symlink), "link": _done(os.link), "unlink": _done(os.unlink),
    "rmdir": _done(os.rmdir), "truncate": _done(os.truncate), "chmod": _done(os.chmod), "chown": _chown,
    "utimens": _utimens, "setxattr": _done(os.setxattr), "getxattr": os.getxattr,
    "removexattr": _done(os.removexattr), "tree": _tree, "remove_tree": _remove_tree,
    "umask": lambda mask: os.umask(mask), "sleep": _done(time.sleep),
}  # fmt: skip


def make(call: tuple[Any, ...]) -> Any:
    """The result of one call."""
    try:
        return CALLS[call[0]](*call[1:])
    except OSError as error:
        return ("!", error.errno)
    except KeyError:
        return ("!", errno.EBADF)  # a handle of nothing


def serve(source: BinaryIO, target: BinaryIO) -> None:
    """Until the other end closes."""
    while len(head := source.read(SIZE.size)) == SIZE.size:
        calls = marshal.loads(source.read(SIZE.unpack(head)[0]))
        answer = marshal.dumps([make(call) for call in calls])
        target.write(SIZE.pack(len(answer)) + answer)
        target.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
