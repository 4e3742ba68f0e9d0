"""SQLite's files over a SlabImage: an apsw VFS for one database, and the connection that uses it.

Place      coordinator floor; above slab_image.py, below database.py. Synchronous.
Files      the database and its -wal are mapped to the image; journals and temporary files are in memory.
Locking    none: one connection, in exclusive locking mode, hence no shared-memory file either.
"""

import itertools

import apsw

from coordinator.slab_image import PAGE_SIZE, SlabImage
from csvfs.errors import NoSpace
from csvfs.units import BLOCK_SIZE, MIB

_DATABASE = "/metadata"
_WAL = _DATABASE + "-wal"
CACHE_SIZE = 64 * MIB
_vfs_numbers = itertools.count(1)


class _File:
    """What all our files answer alike. Duck-typed apsw.VFSFile: no real file lies beneath."""

    def xLock(self, level: int) -> None:
        pass

    def xUnlock(self, level: int) -> None:
        pass

    def xCheckReservedLock(self) -> bool:
        return False

    def xSync(self, flags: int) -> None:
        pass

    def xClose(self) -> None:
        pass

    def xFileControl(self, op: int, pointer: int) -> bool:
        return False

    def xSectorSize(self) -> int:
        return BLOCK_SIZE

    def xDeviceCharacteristics(self) -> int:
        # A block is written whole or not at all; bytes of it that are not being changed stay as they are.
        return int(apsw.SQLITE_IOCAP_ATOMIC4K | apsw.SQLITE_IOCAP_POWERSAFE_OVERWRITE)


class _DatabaseFile(_File):
    def __init__(self, image: SlabImage) -> None:
        self._image = image

    def xRead(self, amount: int, offset: int) -> bytes:
        return self._image.read_database(amount, offset)

    def xWrite(self, data: bytes, offset: int) -> None:
        try:
            self._image.write_database(data, offset)
        except NoSpace as error:
            raise apsw.FullError(str(error)) from None

    def xTruncate(self, size: int) -> None:
        self._image.truncate_database(size)

    def xSync(self, flags: int) -> None:
        self._image.barrier()

    def xFileSize(self) -> int:
        return self._image.database_size


class _WalFile(_File):
    def __init__(self, image: SlabImage) -> None:
        self._image = image

    def xRead(self, amount: int, offset: int) -> bytes:
        return self._image.read_wal(amount, offset)

    def xWrite(self, data: bytes, offset: int) -> None:
        try:
            self._image.write_wal(data, offset)
        except NoSpace as error:
            raise apsw.FullError(str(error)) from None

    def xTruncate(self, size: int) -> None:
        self._image.truncate_wal(size)

    def xSync(self, flags: int) -> None:
        self._image.barrier()

    def xFileSize(self) -> int:
        return self._image.wal_size


class _MemoryFile(_File):
    def __init__(self) -> None:
        self._data = bytearray()

    def xRead(self, amount: int, offset: int) -> bytes:
        return bytes(self._data[offset : offset + amount])

    def xWrite(self, data: bytes, offset: int) -> None:
        if len(self._data) < offset:
            self._data.extend(bytes(offset - len(self._data)))
        self._data[offset : offset + len(data)] = data

    def xTruncate(self, size: int) -> None:
        del self._data[size:]

    def xFileSize(self) -> int:
        return len(self._data)


class SlabVfs(apsw.VFS):
    """The files of one image. Close the connection first, then `unregister` it."""

    def __init__(self, image: SlabImage) -> None:
        self._image = image
        self._journals: dict[str, _MemoryFile] = {}
        self.vfs_name = f"csvfs-metadata-{next(_vfs_numbers)}"
        super().__init__(self.vfs_name, base="")

    def xFullPathname(self, name: str) -> str:
        return name

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> _File:  # type: ignore[override]
        flags[1] = flags[0]
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        if path == _DATABASE:
            return _DatabaseFile(self._image)
        if path == _WAL:
            return _WalFile(self._image)
        file = _MemoryFile()
        if path is not None:
            self._journals[path] = file
        return file

    def xAccess(self, pathname: str, flags: int) -> bool:
        if pathname == _WAL:
            return self._image.wal_size > 0
        return pathname == _DATABASE or pathname in self._journals

    def xDelete(self, filename: str, syncdir: bool) -> None:
        if filename == _WAL:
            self._image.truncate_wal(0)
        else:
            self._journals.pop(filename, None)


def connect(image: SlabImage) -> tuple[apsw.Connection, SlabVfs]:
    """Open the database of an image, recovering it from its WAL. Errors of reading blocks pass through."""
    vfs = SlabVfs(image)
    connection = apsw.Connection(
        _DATABASE,
        flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE,
        vfs=vfs.vfs_name,
        statementcachesize=200,
    )
    try:
        # Closing must not checkpoint: a coordinator that has lost its volume writes nothing any more.
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        for pragma in (
            f"page_size={PAGE_SIZE}",
            "locking_mode=EXCLUSIVE",  # before the first access: then no shared memory is asked for
            "journal_mode=WAL",
            "synchronous=NORMAL",  # sync around checkpoints; the log orders commits without a sync each
            "wal_autocheckpoint=0",  # database.py does it, between batches
            "temp_store=MEMORY",
            f"cache_size=-{CACHE_SIZE // 1024}",
            "mmap_size=0",
            f"max_page_count={image.database_pages_max}",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
    except BaseException:
        connection.close()
        vfs.unregister()
        raise
    return connection, vfs
