"""A model of what the kernel does above one FUSE session: names, attributes and pages that it keeps, and their locks.

Place      simulator, above events.py; below it is the real channel of a mount, which reads requests and writes
           replies in the kernel's own format.
Model      Linux 6.18, fs/fuse. Names are kept while their reply allows it and the epoch is the same; attributes until
           they are taken back, or something that began earlier would put older ones in their place (attr_version);
           those that come with a new name (LINK, CREATE, MKDIR) are taken whatever came meanwhile;
           pages until they are taken back. A page is locked while a READ or WRITE of it is unanswered; taking pages
           back waits for that. A listing is kept where OPENDIR says so. A reply takes effect when it is written.
           A directory is locked while a name of it is looked up, made or removed, also against names that are kept: the
           real kernel shows these without its lock. So a name that is being changed, and is changed already for other
           nodes, is not seen as it was before by other programs on this node (RELIABILITY.md, "Open").
           Who looks at a file waits while a program of the same node changes its size, by a write or a truncation: the
           real kernel knows the new size when that is answered, while other nodes, and direct reads, may see it before.
Not        mmap, read-ahead, memory pressure. A size that is told while attributes are taken back is not kept, and
           who wanted to read up to it asks again: the real kernel reads on with the size that it had, and may find
           an end that is none any more (fuse_change_attributes; RELIABILITY.md, "Open"). The answer to a READ tells
           the size: the real kernel keeps to the one that it knew, and may give the new bytes of a page up to the old
           size, or zeros (fuse_short_read). A page that is being written is seen by others on the node once the
           WRITE is answered; the real kernel shows it before, if it had the page.
"""

from __future__ import annotations

import errno
import os
import select
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from csvfs.mount import fuse_abi as abi
from csvfs.mount.request_journal import UNIQUE_RESENT
from tests.simulator import freezing
from tests.simulator.process import Process

if TYPE_CHECKING:
    from tests.simulator.clients.world import ClientsWorld

PAGE = 4096
# valid, padding, fh, size, lock_owner, atime, mtime, ctime, three times ns, mode, unused, uid, gid, unused
SETATTR_IN = struct.Struct("=IIQQQQQQIIIIIIII")
SETATTR_SIZE = 1 << 3
LINK_IN = struct.Struct("=Q")
OnReply = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Listing:
    """`at_once`: the names came in one reply, so that they were all there at one moment."""

    names: list[tuple[bytes, int]]
    at_once: bool


@dataclass(slots=True)
class Inode:
    """What the kernel knows of one. `version`: of the last thing that changed it here (attr_version)."""

    size: int = 0
    nlink: int = 0
    has_attr: bool = False
    version: int = 0
    lookups: int = 0
    lock: trio.Lock = field(default_factory=trio.Lock)
    pages: dict[int, bytes] = field(default_factory=dict)
    locks: dict[int, trio.Lock] = field(default_factory=dict)
    listing: Listing | None = None
    changes: int = 0  # of a directory, made on this node (i_version)
    settled: trio.Event | None = None  # its links are being changed by a program of this node
    resized: trio.Event | None = None  # a program of this node changes its size
    # Pages that were kept when a WRITE to them was sent: unlike others these are not locked meanwhile (fuse_fill_write_pages),
    # so that they may be taken back; then what was written is not kept.
    written: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Asked:
    event: trio.Event
    on_reply: OnReply | None
    what: str
    request: bytes
    is_read: bool = False  # by the mount
    error: int = 0
    body: bytes = b""


class Connection:
    """One FUSE session, from the start of a mount to its end, or to that of the last one that goes on with it."""

    def __init__(self, world: ClientsWorld) -> None:
        self.world = world
        self.process: Process | None = None  # that serves it
        self.alive = True
        self.epoch = 0
        self.inodes: dict[int, Inode] = {}
        self.names: dict[tuple[int, bytes], tuple[int, int]] = {}  # to (inode or 0, epoch)
        # Since its mount has stood still for long: nothing that is kept here counts (RELIABILITY.md, "Open").
        self.doubted = False
        self.cached_reads = 0
        self._version = 1
        self._unique = 0
        self._asked: dict[int, _Asked] = {}
        self._queue: deque[bytes] = deque()
        self._handler: Callable[[int], None] | None = None
        self._reading = True
        self._due = False

    # -- the device, as the mount sees it --------------------------------------------------------

    def attach(self, process: Process) -> None:
        """A mount process has the descriptor now."""
        self.process = process
        self._context = freezing.context_of(process)
        self._reading = True

    def detach(self) -> None:
        """It is dead."""
        self.process = self._handler = None

    def unregister(self, process: Process) -> None:
        if self.process is process:
            self._handler = None

    def has_requests(self) -> bool:
        return bool(self._queue)

    def register(self, handler: Callable[[int], None]) -> None:
        self._handler = handler
        self.wake()

    def modify(self, events: int) -> None:
        self._reading = bool(events & select.EPOLLIN)
        self.wake()

    def read_into(self, buffer: memoryview) -> int:
        if not self.alive:
            raise OSError(errno.ENODEV, "No such device")
        if not self._queue or not self._reading:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        request = self._queue.popleft()
        asked = self._asked.get(abi.IN_HEADER.unpack_from(request)[2])
        if asked is not None:
            asked.is_read = True
        buffer[: len(request)] = request
        return len(request)

    def take_reply(self, reply: bytes) -> int:
        """A reply. Raises OSError: nobody waits for it."""
        if not self.alive:
            raise OSError(errno.ENODEV, "No such device")
        _, error, unique = abi.OUT_HEADER.unpack_from(reply)
        if not unique:
            assert reply == abi.pack_resend(), f"a notification that is not known here: {reply.hex()}"
            self._resend()
            return len(reply)
        asked = self._asked.pop(unique, None)
        if asked is None:
            raise OSError(errno.ENOENT, "No such file or directory")
        asked.error, asked.body = -error, reply[abi.OUT_HEADER.size :]
        if not error and asked.on_reply is not None:
            asked.on_reply(asked.body)
        # Whoever waits runs a little later, as a thread that is woken does.
        self.world.events_queue.after(0.00001, asked.event.set)
        return len(reply)

    def wake(self) -> None:
        """There is something to read, or the mount goes on."""
        if not self._due and self._queue and self._handler is not None:
            self._due = True
            self.world.events_queue.after(0.00001, self._deliver)

    def _deliver(self) -> None:
        self._due = False
        process = self.process
        if process is None or process.paused or not self.alive:
            return
        if self._reading and self._queue and self._handler is not None:
            self._context.run(self._handler, select.EPOLLIN)
            self.wake()

    def _resend(self) -> None:
        """fuse_resend: what was read and not answered is asked again, ahead of all else, in no order."""
        again = {unique: asked for unique, asked in self._asked.items() if asked.is_read}
        uniques = list(again)
        self.world.kernel_rng.shuffle(uniques)
        for unique in uniques:
            asked = again[unique]
            del self._asked[unique]
            fields = list(abi.IN_HEADER.unpack_from(asked.request))
            fields[2] |= UNIQUE_RESENT
            asked.request = abi.IN_HEADER.pack(*fields) + asked.request[abi.IN_HEADER.size :]
            asked.is_read = False
            self._asked[fields[2]] = asked
            self._queue.appendleft(asked.request)
        self.wake()

    def abort(self) -> None:
        """The mount is gone: whatever waits for it fails."""
        if self.alive:
            self.alive = False
            asked, self._asked = self._asked, {}
            for one in asked.values():
                one.error = errno.ENOTCONN
                one.event.set()

    def waiting(self) -> str:
        """Requests without an answer, for people."""
        unread = f"{len(self._queue)} not read, " if self._queue else ""
        return unread + (", ".join(asked.what for asked in self._asked.values()) or "nothing waits")

    # -- notifications ---------------------------------------------------------------------------

    def invalidate_attr(self, ino: int) -> bool:
        inode = self.inodes.get(ino)
        if inode is not None:
            inode.has_attr = False
            inode.version = self._newer()
        return inode is not None

    async def invalidate_pages(self, ino: int, offset: int, length: int) -> None:
        """By a thread of the mount: it waits for pages that are locked."""
        await self.world.events_queue.sleep(0.0005 * self.world.kernel_rng.random())
        inode = self.inodes.get(ino)
        if inode is None or not self.alive:
            return
        self.invalidate_attr(ino)
        last = (offset + length - 1) // PAGE if length > 0 else 1 << 60
        for page in sorted({*inode.pages, *inode.locks}):
            if offset // PAGE <= page <= last:
                if page in inode.written:
                    inode.pages.pop(page, None)
                    inode.written.discard(page)
                    continue
                async with self.page_lock(inode, page):
                    inode.pages.pop(page, None)

    async def invalidate_all(self, ranges: list[tuple[int, int, int]]) -> None:
        for ino, offset, length in ranges:
            if offset < 0:
                self.invalidate_attr(ino)
            else:
                await self.invalidate_pages(ino, offset, length)

    def increment_epoch(self) -> None:
        self.epoch += 1

    def _newer(self) -> int:
        self._version += 1
        return self._version

    # -- requests --------------------------------------------------------------------------------

    async def ask(self, opcode: int, node: int, body: bytes = b"", on_reply: OnReply | None = None) -> bytes:
        """Raises OSError."""
        if not self.alive:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        asked = self._send(opcode, node, body, on_reply)
        await asked.event.wait()
        if asked.error:
            raise OSError(asked.error, os.strerror(asked.error))
        return asked.body

    def _send(self, opcode: int, node: int, body: bytes, on_reply: OnReply | None = None) -> _Asked:
        self._unique += 2
        size = abi.IN_HEADER.size + len(body)
        request = abi.IN_HEADER.pack(size, opcode, self._unique, node, 0, 0, 1, 0, 0) + body
        self._queue.append(request)
        asked = _Asked(trio.Event(), on_reply, f"opcode {opcode} of inode {node}", request)
        if opcode != abi.FORGET:
            self._asked[self._unique] = asked
        self.wake()
        return asked

    def inode(self, ino: int) -> Inode:
        found = self.inodes.get(ino)
        if found is None:
            found = self.inodes[ino] = Inode()
        return found

    # -- names -----------------------------------------------------------------------------------

    def known(self, directory: int, name: bytes) -> int | None:
        """The inode that is kept for a name, 0: none has it; None: it has to be asked for."""
        entry = self.names.get((directory, name))
        if entry is None or entry[1] != self.epoch or self.doubted:
            return None
        self.cached_reads += 1
        return entry[0]

    async def lookup(self, directory: int, name: bytes) -> int:
        """0: there is no such name. Raises OSError."""
        async with self.inode(directory).lock:
            return await self._lookup(directory, name)

    async def _lookup(self, directory: int, name: bytes) -> int:
        known = self.known(directory, name)
        if known is not None:
            return known
        found: list[int] = []
        version, epoch = self._version, self.epoch

        def take(body: bytes) -> None:
            found.append(self._take_entry(directory, name, body, version, epoch))

        try:
            await self.ask(abi.LOOKUP, directory, name + b"\0", take)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return 0
            raise
        return found[0]

    def _take_entry(self, directory: int, name: bytes, body: bytes, version: int | None, epoch: int) -> int:
        ino, _, entry_valid, attr_valid, _, _ = struct.unpack_from("=QQQQII", body)
        if entry_valid:
            self.names[directory, name] = (ino, epoch)
        else:
            self.names.pop((directory, name), None)
        if ino:
            self.inode(ino).lookups += 1
            self._take_attr(ino, body[40 : 40 + abi.ATTR.size], attr_valid, version)
        return int(ino)

    def _take_attr(self, ino: int, packed: bytes, valid: int, version: int | None) -> tuple[int, int]:
        """(links, size) as the reply says; kept unless something newer than `version` is known (None: in any case)."""
        fields = abi.ATTR.unpack_from(packed)
        size, nlink = int(fields[1]), int(fields[10])
        inode = self.inode(ino)
        if version is None or inode.version <= version:
            inode.version = self._newer()
            inode.has_attr, inode.nlink = valid > 0, nlink
            self._resize(inode, size)
        return nlink, size

    @staticmethod
    def _resize(inode: Inode, size: int) -> None:
        if size < inode.size:
            for page in [page for page in inode.pages if page * PAGE >= size]:
                del inode.pages[page]
            if size % PAGE and size // PAGE in inode.pages:
                inode.pages[size // PAGE] = inode.pages[size // PAGE][: size % PAGE].ljust(PAGE, b"\0")
        inode.size = size

    async def getattr(self, ino: int) -> tuple[int, int]:
        """(links, size). Raises OSError."""
        inode = self.inode(ino)
        while inode.settled is not None or inode.resized is not None:
            for changing in (inode.settled, inode.resized):
                if changing is not None:
                    await changing.wait()
        if inode.has_attr and not self.doubted:
            self.cached_reads += 1
            return inode.nlink, inode.size
        told: list[tuple[int, int]] = []
        version = self._version

        def take(body: bytes) -> None:
            valid, _ = abi.ATTR_VALID.unpack_from(body)
            told.append(self._take_attr(ino, body[16 : 16 + abi.ATTR.size], valid, version))

        await self.ask(abi.GETATTR, ino, bytes(16), take)
        return told[0]

    @asynccontextmanager
    async def _changing(self, directories: set[int], inos: set[int]) -> AsyncIterator[None]:
        """While names in `directories` and the links of `inos` are changed: nobody on this node looks at them."""
        async with AsyncExitStack() as stack:
            for directory in sorted(directories):
                await stack.enter_async_context(self.inode(directory).lock)
            held = []
            for inode in [self.inode(ino) for ino in sorted(inos - {0})]:
                while inode.settled is not None:
                    await inode.settled.wait()
                inode.settled = trio.Event()
                held.append((inode, inode.settled))
            try:
                yield
            finally:
                for inode, settled in held:
                    inode.settled = None
                    settled.set()

    def _kept(self, directory: int, name: bytes) -> int:
        """The inode that this name led to last; 0: none is known."""
        return self.names.get((directory, name), (0, 0))[0]

    def _changed(self, *inos: int) -> None:
        """By a call of this node, just now."""
        for ino in inos:
            self.invalidate_attr(ino)
            inode = self.inode(ino)
            inode.changes += 1
            inode.listing = None

    async def make(self, directory: int, name: bytes, *, is_directory: bool) -> int:
        """A directory, or a file that is left open. The inode. Raises OSError."""
        made: list[int] = []
        epoch = self.epoch

        def take(body: bytes) -> None:
            made.append(self._take_entry(directory, name, body, None, epoch))  # create_new_entry: version 0
            self._changed(directory)

        opcode, body = abi.MKDIR, abi.MKDIR_IN.pack(0o755, 0)
        if not is_directory:
            opcode, body = abi.CREATE, abi.CREATE_IN.pack(os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o100644, 0, 0)
        async with self._changing({directory}, set()):
            await self.ask(opcode, directory, body + name + b"\0", take)
        return made[0]

    async def unlink(self, directory: int, name: bytes, *, is_directory: bool) -> None:
        def take(_body: bytes) -> None:
            ino, _ = self.names.pop((directory, name), (0, 0))
            self._changed(directory, ino)

        opcode = abi.RMDIR if is_directory else abi.UNLINK
        async with self._changing({directory}, {self._kept(directory, name)}):
            await self.ask(opcode, directory, name + b"\0", take)

    async def rename(self, directory: int, name: bytes, new_directory: int, new_name: bytes) -> None:
        def take(_body: bytes) -> None:
            moved = self.names.pop((directory, name), None)
            gone = self.names.pop((new_directory, new_name), None)
            if moved is not None:
                self.names[new_directory, new_name] = moved  # as kept as it was under the name before
            self._changed(directory, new_directory, *(entry[0] for entry in (moved, gone) if entry))

        body = abi.RENAME2_IN.pack(new_directory, 0, 0) + name + b"\0" + new_name + b"\0"
        inos = {self._kept(directory, name), self._kept(new_directory, new_name)}
        async with self._changing({directory, new_directory}, inos):
            await self.ask(abi.RENAME2, directory, body, take)

    async def link(self, ino: int, directory: int, name: bytes) -> None:
        epoch = self.epoch

        def take(body: bytes) -> None:
            self._take_entry(directory, name, body, None, epoch)  # create_new_entry: version 0
            self._changed(directory)

        # The inode's lock, too (vfs_link): no write or truncation changes its size meanwhile.
        async with self._changing({directory}, {ino}), self.inode(ino).lock:
            await self.ask(abi.LINK, directory, LINK_IN.pack(ino) + name + b"\0", take)

    async def listing(self, ino: int) -> Listing:
        """All names of a directory with their inodes, but `.` and `..`."""
        async with self.inode(ino).lock:
            return await self._listing(ino, self.inode(ino))

    async def _listing(self, ino: int, inode: Inode) -> Listing:
        opened = await self.ask(abi.OPENDIR, ino, abi.OPEN_IN.pack(0, 0))
        fh, flags, _ = abi.OPEN_OUT.unpack_from(opened)
        try:
            if not flags & abi.FOPEN_KEEP_CACHE or self.doubted:
                inode.listing = None
            if flags & abi.FOPEN_CACHE_DIR and inode.listing is not None:
                self.cached_reads += 1
                return inode.listing
            changes = inode.changes
            found = await self._read_directory(ino, fh)
            inode.listing = found if flags & abi.FOPEN_CACHE_DIR and inode.changes == changes else None
            return found
        finally:
            if self.alive:
                self._send(abi.RELEASEDIR, ino, abi.RELEASE_IN.pack(fh, 0, 0, 0))

    async def _read_directory(self, ino: int, fh: int) -> Listing:
        names: list[tuple[bytes, int]] = []
        replies = offset = 0
        while body := await self.ask(abi.READDIR, ino, abi.READ_IN.pack(fh, offset, PAGE, 0, 0, 0, 0)):
            at, before = 0, len(names)
            while at < len(body):
                number, offset, size, _ = abi.DIRENT.unpack_from(body, at)
                name = bytes(body[at + abi.DIRENT.size : at + abi.DIRENT.size + size])
                if name not in (b".", b".."):
                    names.append((name, number))
                at += (abi.DIRENT.size + size + 7) // 8 * 8
            replies += len(names) > before
        return Listing(names, replies < 2)

    # -- files -----------------------------------------------------------------------------------

    async def open(self, ino: int, flags: int) -> bool:
        """Whether it is read and written past the cache."""
        opened = await self.ask(abi.OPEN, ino, abi.OPEN_IN.pack(flags, 0))
        return bool(abi.OPEN_OUT.unpack_from(opened)[1] & abi.FOPEN_DIRECT_IO)

    def close(self, ino: int, flags: int) -> None:
        """Nobody waits for it."""
        if self.alive:
            if abi.may_write(flags):
                self._send(abi.FLUSH, ino, bytes(24))
            self._send(abi.RELEASE, ino, abi.RELEASE_IN.pack(ino, flags, 0, 0))

    async def fsync(self, ino: int) -> None:
        await self.ask(abi.FSYNC, ino, abi.FSYNC_IN.pack(ino, 0, 0))

    @staticmethod
    def page_lock(inode: Inode, page: int) -> trio.Lock:
        return inode.locks.setdefault(page, trio.Lock())

    async def read(self, ino: int, page: int, *, direct: bool) -> bytes:
        """One page, as far as it lies within the file. Raises OSError."""
        inode = self.inode(ino)
        while inode.resized is not None:
            await inode.resized.wait()
        if direct:
            read_flags = abi.READ_LOCKOWNER if self.world.shares_writes else 0
            return await self.ask(abi.READ, ino, abi.READ_IN.pack(ino, page * PAGE, PAGE, read_flags, 0, os.O_DIRECT, 0))
        if self.doubted or (page + 1) * PAGE > inode.size:
            while (await self.getattr(ino))[1] > inode.size:
                continue  # see "Not"
        if page * PAGE >= inode.size:
            return b""
        content = await self._page(ino, inode, page)
        return content[: max(0, inode.size - page * PAGE)]

    async def _page(self, ino: int, inode: Inode, page: int) -> bytes:
        if page in inode.pages and not self.doubted:
            self.cached_reads += 1
            return inode.pages[page]
        async with self.page_lock(inode, page):
            if page in inode.pages and not self.doubted:
                return inode.pages[page]
            filled: list[bytes] = []

            def fill(body: bytes) -> None:
                content = bytes(body).ljust(PAGE, b"\0")
                inode.pages[page] = content
                filled.append(content)
                end = page * PAGE + len(body)
                if not body:  # the file ends here, or anywhere before
                    self._resize(inode, min(end, inode.size))
                elif len(body) < PAGE or end > inode.size:
                    self._resize(inode, end)

            await self.ask(abi.READ, ino, abi.READ_IN.pack(ino, page * PAGE, PAGE, 0, 0, 0, 0), fill)
            return filled[0]

    async def write(self, ino: int, offset: int, data: bytes, *, append: bool, direct: bool) -> None:
        inode = self.inode(ino)
        flags = (os.O_APPEND if append else 0) | (os.O_DIRECT if direct else 0) | os.O_RDWR
        async with inode.lock:
            at = inode.size if append else offset
            if append or at + len(data) > inode.size or inode.version == 0:
                inode.resized = trio.Event()
            pages = range(at // PAGE, (at + len(data) - 1) // PAGE + 1)
            held: list[trio.Lock] = []
            kept_before: set[int] = set()
            try:
                for page in pages:
                    lock = self.page_lock(inode, page)
                    await lock.acquire()
                    held.append(lock)
                    if direct:
                        inode.pages.pop(page, None)
                if direct:
                    while held:
                        held.pop().release()
                elif self.world.shares_writes:
                    inode.written = {page for page in pages if page in inode.pages}
                    kept_before = set(inode.written)

                def written(_body: bytes) -> None:
                    taken_back, inode.written = kept_before - inode.written, set()
                    self._written(inode, at, data, keep=not direct)
                    for page in taken_back:
                        inode.pages.pop(page, None)

                body = abi.WRITE_IN.pack(ino, at, len(data), 0, 0, flags, 0) + data
                await self.ask(abi.WRITE, ino, body, written)
            except OSError:
                for page in pages:
                    inode.pages.pop(page, None)
                raise
            finally:
                inode.written = set()
                for lock in held:
                    lock.release()
                if inode.resized is not None:
                    inode.resized.set()
                    inode.resized = None

    def _written(self, inode: Inode, at: int, data: bytes, *, keep: bool) -> None:
        inode.version = self._newer()
        inode.has_attr = False
        inode.size = max(inode.size, at + len(data))
        for page in range(at // PAGE, (at + len(data) - 1) // PAGE + 1):
            begin, end = max(at, page * PAGE), min(at + len(data), (page + 1) * PAGE)
            old = inode.pages.pop(page, None)
            if keep and (old is not None or end - begin == PAGE):
                old = old or bytes(PAGE)
                skip = begin - page * PAGE
                inode.pages[page] = old[:skip] + data[begin - at : end - at] + old[skip + end - begin :]

    def resized_by_call(self, inode: Inode, end: int) -> None:
        """fuse_write_update_attr: a call of this node was answered that has the file go to `end`, or to where it went."""
        inode.version = self._newer()
        inode.has_attr = False
        inode.size = max(inode.size, end)

    async def truncate(self, ino: int, size: int) -> None:
        inode = self.inode(ino)
        async with inode.lock:

            def take(body: bytes) -> None:
                valid, _ = abi.ATTR_VALID.unpack_from(body)
                fields = abi.ATTR.unpack_from(body, 16)
                inode.version = self._newer()
                inode.has_attr, inode.nlink = valid > 0, int(fields[10])
                self._resize(inode, int(fields[1]))

            body = SETATTR_IN.pack(SETATTR_SIZE, 0, 0, size, *(0,) * 12)
            inode.resized = trio.Event()
            try:
                await self.ask(abi.SETATTR, ino, body, take)
            finally:
                inode.resized.set()
                inode.resized = None


class Poll:
    """Of select.poll, for one descriptor."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._fd = -1

    def register(self, fd: int, events: int) -> None:
        self._fd = fd

    def poll(self, timeout_ms: int) -> list[tuple[int, int]]:
        return [(self._fd, select.POLLIN)] if self._devices.connection(self._fd).has_requests() else []


class Devices:
    """`os` for the modules of a mount that touch /dev/fuse; everything else is the real one's."""

    def __init__(self) -> None:
        self._connections: dict[int, Connection] = {}
        self._next = 1 << 24

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def add(self, connection: Connection) -> int:
        self._next += 1
        self._connections[self._next] = connection
        return self._next

    def connection(self, fd: int) -> Connection:
        return self._connections[fd]

    def find(self, fd: int) -> Connection | None:
        return self._connections.get(fd)

    def poll(self) -> Poll:
        return Poll(self)

    def readv(self, fd: int, buffers: tuple[memoryview]) -> int:
        return self._connections[fd].read_into(buffers[0])

    def writev(self, fd: int, parts: tuple[Any, ...]) -> int:
        return self._connections[fd].take_reply(b"".join(parts))

    def write(self, fd: int, reply: Any) -> int:
        return self._connections[fd].take_reply(bytes(reply))
