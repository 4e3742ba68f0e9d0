"""Programs on the nodes: each makes, writes, reads, clones, renames and removes a few files, one system call at a time.

Place      simulator, above kernel.py and recorder.py.
Answers    every system call is recorded as what it asks of the names and of one file, each in the same time. A call
           that fails because its mount is gone has no answer: it may be carried out or not.
"""

from __future__ import annotations

import errno
import os
from random import Random
from typing import TYPE_CHECKING, Any

import trio

from tests.simulator.clients.kernel import PAGE, Connection
from tests.simulator.clients.kernel_space import copy_between, punch
from tests.simulator.clients.models import CELL, CELLS_PER_PAGE, DIRECTORY, PIECEMEAL, ROOT
from tests.simulator.clients.recorder import NAMES, cell, cells_of

if TYPE_CHECKING:
    from tests.simulator.clients.world import ClientsWorld

_ANSWERS = frozenset((errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY))
FILES = ((b"", b"f0"), (b"", b"f0"), (b"", b"f1"), (b"d", b"f0"), (b"d", b"f0"), (b"d", b"f1"), (b"m", b"f0"))
DIRECTORY_NAMES = (b"m",)  # made and removed in the root
PAGES_MAX = 4
CELLS_MAX = 7
PACES_S = (0.0, 0.001, 0.05, 0.5, 2.0)  # between two calls, at most
# Runs of seeds below do without clones and holes, so that those which found something are what they were.
FIRST_SEED_WITH_CLONES = 100_000
WATCH_S = 0.4  # between two looks of a watcher, at most


class NoAnswerError(Exception):
    """A system call failed in a way that tells nothing of the volume."""


class Program:
    """One thread of one program. `who`: its name; it lives as long as its node."""

    def __init__(self, world: ClientsWorld, node: str, number: int) -> None:
        self.world = world
        self.node = node
        self.who = f"{node}.{number}"
        self.rng = Random(f"{world.seed}/{self.who}")
        self.record = world.record
        self._open: tuple[Connection, int, int, bool] | None = None  # a file held open: inode, flags, past the cache
        self._kinds = {
            self._read: 26, self._write: 22, self._append: 6, self._truncate: 6, self._stat: 10,
            self._create: 8, self._unlink: 5, self._rename: 6, self._link: 4, self._mkdir: 3, self._rmdir: 2,
            self._list: 5, self._fsync: 3,
        }  # fmt: skip
        if world.seed >= FIRST_SEED_WITH_CLONES:
            self._kinds |= {self._clone: 14, self._punch: 4}
        self._files, self._paces_s = FILES, PACES_S
        self._directs, self._changes_file = 0.25, 0.3  # of the files opened: past the cache; of the calls: after closing it
        if world.shares_writes:
            self._share_writes()

    def _share_writes(self) -> None:
        """A busy program, mostly: as a virtual machine with its disk, which others have, too."""
        if self.rng.random() < 0.15:
            return
        self._kinds = dict.fromkeys(self._kinds, 1) | {self._read: 60, self._write: 70, self._fsync: 4}
        self._files = (*FILES, *(((b"", b"f0"),) * 30))
        self._paces_s = self.rng.choice(((0.0, 0.001, 0.01), (0.0, 0.01, 0.1), (0.0, 0.05, 0.5)))
        self._directs, self._changes_file = self.rng.choice((0.9, 0.99, 1.0)), 0.03

    async def run(self) -> None:
        kinds, weights = list(self._kinds), list(self._kinds.values())
        while self.world.has_work():
            connection = await self._connection()
            (kind,) = self.rng.choices(kinds, weights)
            try:
                await kind(connection)
            except NoAnswerError:
                await trio.sleep(0.05)
            except OSError as error:
                if error.errno not in _ANSWERS:
                    self.world.refused(self, connection, error)
                await trio.sleep(0.05)
            self.world.operated()
            await self.world.events_queue.sleep(self.rng.choice(self._paces_s) * self.rng.random())
        self._close()

    async def look_at_all(self) -> None:
        """In the end: every name, every file, by this node."""
        connection = await self._connection()
        inodes: dict[int, None] = {}
        for directory in (ROOT, DIRECTORY):
            for name, ino in await self._listing(connection, directory):
                if name not in (b"d", *DIRECTORY_NAMES):
                    inodes[ino] = None
                    await self._lookup(connection, directory, name)
        for ino in inodes:
            await self._attributes(connection, ino)
            for page in range(PAGES_MAX):
                await self._read_page(connection, ino, page, direct=self.rng.random() < 0.5)

    async def _connection(self) -> Connection:
        """The present mount of this node."""
        while True:
            connection = self.world.connections.get(self.node)
            if connection is not None and connection.alive:
                return connection
            await self.world.events_queue.sleep(0.05)

    # -- the calls, as they are recorded ---------------------------------------------------------

    async def _call(self, what: int, name: str, args: tuple[Any, ...], call: Any) -> Any:
        """Raises OSError: an answer, or none (then it is not recorded as one)."""
        operation = self.record.begin(what, self.who, name, *args)
        try:
            answer = await call
        except OSError as error:
            if error.errno in _ANSWERS and not operation.reads:
                self.record.end(operation, -error.errno)
            raise
        self.record.end(operation, answer)
        return answer

    async def _lookup(self, connection: Connection, directory: int, name: bytes) -> int | None:
        async def call() -> int | None:
            return await connection.lookup(directory, name) or None

        found: int | None = await self._call(NAMES, "lookup", (directory, name), call())
        return found

    async def _listing(self, connection: Connection, directory: int) -> list[tuple[bytes, int]]:
        operation = self.record.begin(NAMES, self.who, "list", directory)
        listing = await connection.listing(directory)
        if not listing.at_once:
            operation.name = PIECEMEAL
        self.record.end(operation, sorted(listing.names))
        return sorted(listing.names)

    async def _attributes(self, connection: Connection, ino: int) -> None:
        links = self.record.begin(NAMES, self.who, "links", ino)
        size = self.record.begin(ino, self.who, "size")
        nlink, length = await connection.getattr(ino)
        self.record.end(links, nlink)
        self.record.end(size, length // CELL)

    async def _read_page(self, connection: Connection, ino: int, page: int, *, direct: bool) -> None:
        async def call() -> tuple[int, ...]:
            data = await connection.read(ino, page, direct=direct)
            return cells_of(bytes(data), f"inode {ino} page {page} read by {self.who}")

        await self._call(ino, "read", (page,), call())

    # -- ways to files ---------------------------------------------------------------------------

    async def _directory(self, connection: Connection, name: bytes) -> int:
        if not name:
            return ROOT
        ino = await self._lookup(connection, ROOT, name)
        if ino is None:
            raise NoAnswerError
        return ino

    async def _place(self, connection: Connection) -> tuple[int, bytes]:
        directory, name = self.rng.choice(self._files)
        return await self._directory(connection, directory), name

    async def _file(self, connection: Connection) -> int:
        directory, name = await self._place(connection)
        ino = await self._lookup(connection, directory, name)
        if ino is None:
            raise NoAnswerError
        return ino

    async def _opened(self, connection: Connection, flags: int) -> tuple[int, bool]:
        """A file that is open, and whether it is read and written past the cache. It is held for a while."""
        held = self._open
        if held is not None and (held[0] is not connection or self.rng.random() < self._changes_file or held[2] & 3 < flags & 3):
            self._close()
            held = None
        if held is None:
            flags = os.O_RDWR if self.rng.random() < 0.3 else flags
            flags |= os.O_DIRECT if self.rng.random() < self._directs else 0
            ino = await self._file(connection)
            held = self._open = (connection, ino, flags, await connection.open(ino, flags))
        return held[1], held[3]

    def _close(self) -> None:
        if self._open is not None:
            connection, ino, flags, _ = self._open
            connection.close(ino, flags)
            self._open = None

    # -- what it does ----------------------------------------------------------------------------

    async def _read(self, connection: Connection) -> None:
        ino, direct = await self._opened(connection, os.O_RDONLY)
        for _ in range(self.rng.choice((1, 1, 2, 4))):
            await self._read_page(connection, ino, self.rng.randrange(PAGES_MAX), direct=direct)

    async def _write(self, connection: Connection) -> None:
        ino, direct = await self._opened(connection, os.O_WRONLY)
        first, count = self.rng.randrange(CELLS_MAX), self.rng.choice((1, 2, 2, 2, 3))
        if direct or self.rng.random() < 0.5:
            first, count = first & ~1, 2  # a whole page
        await self._write_cells(connection, ino, first, count, direct=direct)

    async def _write_cells(self, connection: Connection, ino: int, first: int, count: int, *, direct: bool) -> None:
        cells = tuple(self.record.next_write() for _ in range(count))
        data = b"".join(map(cell, cells))
        call = connection.write(ino, first * CELL, data, append=False, direct=direct)
        await self._call(ino, "write", (first, cells), call)

    async def _append(self, connection: Connection) -> None:
        ino = await self._file(connection)
        flags = os.O_WRONLY | os.O_APPEND
        direct = await connection.open(ino, flags)
        try:
            if connection.inode(ino).size >= PAGES_MAX * PAGE:
                raise NoAnswerError
            cells = tuple(self.record.next_write() for _ in range(self.rng.choice((1, 2))))
            call = connection.write(ino, 0, b"".join(map(cell, cells)), append=True, direct=direct)
            await self._call(ino, "append", (cells,), call)
        finally:
            connection.close(ino, flags)

    async def _truncate(self, connection: Connection) -> None:
        ino = await self._file(connection)
        count = self.rng.choice((0, 1, 2, 3, 5))
        await self._call(ino, "truncate", (count,), connection.truncate(ino, count * CELL))

    async def _clone(self, connection: Connection) -> None:
        """Whole pages, as far as the source has them: as `cp` does, with a look at its size before."""
        source = await self._file(connection)
        target = source if self.rng.random() < 0.4 else await self._file(connection)
        _, size = await connection.getattr(source)
        if size < PAGE:
            await connection.open(source, os.O_WRONLY)
            try:
                await self._write_cells(connection, source, 0, 2 * CELLS_PER_PAGE, direct=False)
            finally:
                connection.close(source, os.O_WRONLY)
            size = 2 * PAGE
        page, to = self.rng.randrange(size // PAGE), self.rng.randrange(PAGES_MAX)
        count = min(self.rng.choice((1, 2, 4)), size // PAGE - page)
        if source == target and abs(page - to) < count:
            raise NoAnswerError
        call = copy_between(connection, source, page, target, to, count)
        await self._call(target, "clone", (source, page, to, count), call)

    async def _punch(self, connection: Connection) -> None:
        page, count = self.rng.randrange(PAGES_MAX), self.rng.choice((1, 2))
        ino = await self._file(connection)
        await connection.open(ino, os.O_WRONLY)
        try:
            args = (page * CELLS_PER_PAGE, count * CELLS_PER_PAGE)
            await self._call(ino, "punch", args, punch(connection, ino, page, count))
        finally:
            connection.close(ino, os.O_WRONLY)

    async def _stat(self, connection: Connection) -> None:
        await self._attributes(connection, await self._file(connection))

    async def _fsync(self, connection: Connection) -> None:
        ino, _ = await self._opened(connection, os.O_WRONLY)
        await connection.fsync(ino)

    async def _create(self, connection: Connection) -> None:
        await self._make(connection, *await self._place(connection), is_directory=False)

    async def _mkdir(self, connection: Connection) -> None:
        await self._make(connection, ROOT, self.rng.choice(DIRECTORY_NAMES), is_directory=True)

    async def _make(self, connection: Connection, directory: int, name: bytes, *, is_directory: bool) -> None:
        if await self._lookup(connection, directory, name) is not None:
            return
        call = connection.make(directory, name, is_directory=is_directory)
        ino = await self._call(NAMES, "make", (directory, name, is_directory), call)
        if not is_directory:
            connection.close(ino, os.O_RDWR)

    async def _unlink(self, connection: Connection) -> None:
        await self._remove(connection, *await self._place(connection), is_directory=False)

    async def _rmdir(self, connection: Connection) -> None:
        await self._remove(connection, ROOT, self.rng.choice(DIRECTORY_NAMES), is_directory=True)

    async def _remove(self, connection: Connection, directory: int, name: bytes, *, is_directory: bool) -> None:
        if await self._lookup(connection, directory, name) is None:
            return
        await self._changed("unlink", (directory, name, is_directory),
                            connection.unlink(directory, name, is_directory=is_directory))  # fmt: skip

    async def _changed(self, name: str, args: tuple[Any, ...], call: Any) -> None:
        """A change whose answer is that it was done."""

        async def done() -> int:
            await call
            return 0

        await self._call(NAMES, name, args, done())

    async def _rename(self, connection: Connection) -> None:
        directory, name = await self._place(connection)
        new_directory, new_name = await self._place(connection)
        ino = await self._lookup(connection, directory, name)
        other = await self._lookup(connection, new_directory, new_name)
        if ino is None or ino == other:
            return
        args = (directory, name, new_directory, new_name)
        await self._changed("rename", args, connection.rename(*args))

    async def _link(self, connection: Connection) -> None:
        directory, name = await self._place(connection)
        ino = await self._file(connection)
        if await self._lookup(connection, directory, name) is None:
            await self._changed("link", (ino, directory, name), connection.link(ino, directory, name))

    async def _list(self, connection: Connection) -> None:
        await self._listing(connection, await self._directory(connection, self.rng.choice((b"", b"d", b"m"))))


class Watcher(Program):
    """A program that looks at what its node has at hand, again and again: names, attributes and pages that the kernel
    keeps, without asking anybody, and by direct reads, which its mount answers from the node's own drive. So it does
    not wait where others do, and what is shown there for too long does not go unseen."""

    async def run(self) -> None:
        while self.world.has_work():
            await self.world.events_queue.sleep(WATCH_S * self.rng.random())
            connection = self.world.connections.get(self.node)
            if connection is None or not connection.alive:
                continue
            try:
                await self._watch(connection)
            except (NoAnswerError, OSError):
                await trio.sleep(0.05)
        self._close()

    async def _watch(self, connection: Connection) -> None:
        if self.rng.random() < self.world.looks_direct:
            ino, direct = await self._opened(connection, os.O_RDONLY | os.O_DIRECT)
            await self._read_page(connection, ino, self.rng.randrange(PAGES_MAX - 1), direct=direct)
            return
        for directory in (ROOT, DIRECTORY):
            for name in (b"f0", b"f1", *DIRECTORY_NAMES):
                if connection.known(directory, name) is not None:
                    found = await self._lookup(connection, directory, name)
                    if found is not None and name not in DIRECTORY_NAMES:
                        await self._look_at(connection, found)

    async def _look_at(self, connection: Connection, ino: int) -> None:
        inode = connection.inode(ino)
        if inode.has_attr:
            await self._attributes(connection, ino)
        for page in sorted(inode.pages):
            if page in inode.pages and (page + 1) * PAGE <= inode.size:
                await self._read_page(connection, ino, page, direct=False)
