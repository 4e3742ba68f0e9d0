"""The channel: reads every request of the kernel, answers the hot ones at once, passes names on to pyfuse3.

Place      mount floor. Runs in the engine's task; slow requests get a trio task each.
Hot        READ and WRITE that the file table can answer or take without waiting cost no task and no await.
Parts      what pyfuse3 lacks, or does without an inode: write_requests.py, closing_requests.py, attribute_requests.py,
           space_requests.py; locks and STATFS here.
Limits     REQUESTS_WAITING_MAX tasks; then the kernel's queue waits.
"""

import errno
import logging
import os
import select
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import trio

from csvfs.errors import Fenced, Unavailable
from csvfs.mount import barred
from csvfs.mount import fuse_abi as abi
from csvfs.mount.answers import Answers, Buffer, Handler
from csvfs.mount.attribute_requests import AttributeRequests, Attributes, Setter
from csvfs.mount.barred import Barred
from csvfs.mount.closing_requests import ClosingRequests, Directories, Opened
from csvfs.mount.closing_requests import Files as Closing
from csvfs.mount.direct import Direct
from csvfs.mount.errno_border import errno_of
from csvfs.mount.file_locks import FileLocks
from csvfs.mount.leases import NothingKept
from csvfs.mount.relay import CACHE_VALID_S, Leases, Relay
from csvfs.mount.request_journal import UNIQUE_MASK, UNIQUE_RESENT, RequestJournal, current_request
from csvfs.mount.space_requests import Space, SpaceRequests
from csvfs.mount.write_requests import WriteRequests, Writes
from csvfs.net.engine import Engine

log = logging.getLogger(__name__)

REQUESTS_WAITING_MAX = 4096
REQUESTS_PER_TURN = 64  # then other descriptors of the engine have their turn

_CHANGES_OF_DATA = (abi.WRITE, abi.FALLOCATE, abi.COPY_FILE_RANGE)
_OUT_OF_TURN = (abi.FORGET, abi.BATCH_FORGET, abi.INTERRUPT)  # the kernel has queues of their own for these

Buffers = Buffer | list[Buffer] | list[bytes] | list[bytes | memoryview]


class Files(Leases, Attributes, Space, Writes, Closing, Protocol):
    """What the channel needs of the file table (csvfs/mount/file_table.py)."""

    def read_nowait(self, ino: int, offset: int, size: int) -> Buffers | None: ...
    async def read(self, ino: int, offset: int, size: int, *, direct: bool = False) -> Buffers: ...
    async def statfs(self, ino: int) -> dict[str, int]: ...
    def read_segments(self, ino: int, offset: int, size: int) -> Buffers | None: ...


class Replays(Protocol):
    """See inheritance.py."""

    def refuses(self, ino: int) -> bool: ...
    def replay_begins(self, ino: int, unique: int) -> None: ...
    def replay_ends(self, ino: int, unique: int) -> None: ...
    def resent(self) -> None: ...


class Names(Setter, Directories, Protocol):
    """What the channel needs of the operations (csvfs/mount/operations.py) besides what pyfuse3 calls."""

    def is_absent(self, parent: int, name: bytes) -> bool: ...


class Channel:
    """One FUSE session. `ended` is set when the kernel has unmounted it."""

    def __init__(
        self,
        engine: Engine,
        fd: int,
        files: Files,
        names: Names,
        relay: Relay,
        direct: Direct | None = None,
        journal: RequestJournal | None = None,
        noted: Opened | None = None,
        locks: FileLocks | None = None,
        barred: Barred | None = None,
    ) -> None:
        """direct: what of the requests about names does not go through pyfuse3; None: nothing. journal: is told which
        requests are under way. noted: is told which files are no longer open. locks: None: there are none. barred: open files
        that can only be closed."""
        self._engine = engine
        self._fd = fd
        self._files = files
        self._names = names
        self._relay = relay
        self._direct = direct
        self._journal = journal or RequestJournal()
        self._noted = noted
        self._replays: Replays | None = None
        self._replaying: dict[int, int] = {}  # unique -> inode
        self._locks = locks
        self._barred = barred or Barred(NothingKept())
        self._barred_opens = self._barred.opens
        self._nursery: trio.Nursery | None = None
        self._waiting = 0
        self.ended = trio.Event()
        self._inline_reads = 0
        self.waited_count = 0  # requests that needed a task
        self._answers = Answers(self._reply, self._reply_errno, self._reply_failure, self._start, self._then_ok, self._forward)
        self._writes = WriteRequests(self._answers, files, self._replayed, self._journal)
        self._handlers = self._make_handlers()

    @property
    def inline_count(self) -> int:
        """READs and WRITEs answered or taken at once."""
        return self._inline_reads + self._writes.inline_count

    def start(self, nursery: trio.Nursery) -> None:
        """Begin to read requests; slow ones run in `nursery`. Cancelling it leaves them to the unmount.

        The descriptor must be mounted already: an epoll that was given it before never hears of a request.
        """
        self._nursery = nursery
        if self._locks is not None:
            self._locks.start(nursery)
        self._engine.register(self._fd, select.EPOLLIN, self._on_readable)

    def take_over(self, nursery: trio.Nursery, replays: Replays) -> None:
        """As start, of a session that an earlier process has served: what it has not answered the kernel asks anew, ahead
        of everything else. Raises Unavailable: the kernel does not; nothing was begun."""
        self._nursery, self._replays = nursery, replays
        if self._locks is not None:
            self._locks.start(nursery)
        try:
            os.write(self._fd, abi.pack_resend())
        except OSError as error:
            raise Unavailable(f"the kernel does not ask anew: {error.strerror}") from None
        self._engine.register(self._fd, select.EPOLLIN, self._on_resent)
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if not poll.poll(0):
            self._all_resent()  # there was nothing

    def close(self) -> None:
        """Stop reading. The descriptor stays the caller's."""
        if not self.ended.is_set():
            self._engine.unregister(self._fd)
            self.ended.set()

    # ---- reading requests

    def _on_readable(self, _events: int) -> None:
        readv, fd, header = os.readv, self._fd, abi.IN_HEADER
        read_nowait, read_in, barred_opens = self._files.read_nowait, abi.READ_IN, self._barred_opens
        writes = self._writes
        for _ in range(REQUESTS_PER_TURN):
            buffer = writes.buffer
            try:
                size = readv(fd, (buffer,))
            except BlockingIOError:
                return
            except OSError as error:
                if self._goes_on_after(error):
                    continue
                return
            if size < 40:
                log.error("the kernel sent a request of %d bytes", size)
                continue
            _, opcode, unique, node, _, _, _, _, _ = header.unpack_from(buffer)
            if opcode == abi.READ and size >= 80 and node not in barred_opens:
                _, offset, want, read_flags, _, _, _ = read_in.unpack_from(buffer, 40)
                try:
                    data = read_nowait(node, offset, want)
                    if data is None and read_flags & abi.READ_LOCKOWNER:
                        data = self._files.read_segments(node, offset, want)
                    if data is None:
                        self._start(unique, self._read, node, offset, want, read_flags)
                    else:
                        self._inline_reads += 1
                        self._engine.hot()
                        self._reply_data(unique, data)
                except Exception as error:
                    self._reply_failure(unique, error)
            else:
                self._dispatch(opcode, unique, node, buffer[:size])

    def _goes_on_after(self, error: OSError) -> bool:
        if error.errno in (errno.ENOENT, errno.EINTR):  # taken back by the kernel meanwhile
            return True
        if error.errno != errno.ENODEV:
            log.error("reading from the FUSE device: %s; the session ends", error.strerror)
        self.close()
        return False

    def _on_resent(self, _events: int) -> None:
        """As _on_readable, until all that the kernel asks anew has been read: it comes before anything else."""
        while True:
            try:
                buffer = self._writes.buffer
                size = os.readv(self._fd, (buffer,))
            except BlockingIOError:
                break
            except OSError as error:
                if self._goes_on_after(error):
                    continue
                return
            _, opcode, unique, node, _, _, _, _, _ = abi.IN_HEADER.unpack_from(buffer)
            is_resent = bool(unique & UNIQUE_RESENT)
            if is_resent and opcode in _CHANGES_OF_DATA and self._replays is not None:
                changed = node if opcode != abi.COPY_FILE_RANGE else abi.copy_target(buffer)
                if self._replays.refuses(changed):
                    self._reply_errno(unique, barred.ERRNO if changed in self._barred_opens else errno.EIO)
                    continue
                self._replaying[unique] = changed
                self._replays.replay_begins(changed, unique & UNIQUE_MASK)
            self._dispatch(opcode, unique, node, buffer[:size])
            if not is_resent and opcode not in _OUT_OF_TURN:
                break
        self._all_resent()

    def _all_resent(self) -> None:
        self._journal.drop_old()
        if self._replays is not None:
            self._replays.resent()
        self._engine.unregister(self._fd)
        self._engine.register(self._fd, select.EPOLLIN if self._waiting < REQUESTS_WAITING_MAX else 0, self._on_readable)

    def _replayed(self, unique: int) -> None:
        ino = self._replaying.pop(unique, None)
        if ino is not None and self._replays is not None:
            self._replays.replay_ends(ino, unique & UNIQUE_MASK)

    def _dispatch(self, opcode: int, unique: int, node: int, request: memoryview) -> None:
        handler = self._handlers.get(opcode)
        if self._barred_opens and self._barred.refuses(opcode, node, request[abi.IN_HEADER.size :]):
            self._reply_errno(unique, barred.ERRNO)
            self._replayed(unique)
            return
        try:
            if handler is None:
                self._relay.forward(opcode, unique, node, request)
            else:
                handler(unique, node, request[abi.IN_HEADER.size :])
        except Exception as error:
            self._reply_failure(unique, error)

    def _make_handlers(self) -> dict[int, Handler]:
        """By opcode; what is not here goes to pyfuse3."""
        refuse = self._refuse
        direct = {} if self._direct is None else self._direct.by_opcode
        answers, files, names = self._answers, self._files, self._names
        closing = ClosingRequests(answers, files, names, self._relay, self._barred, self._noted, self._locks)
        return {
            **self._lock_handlers(),
            **AttributeRequests(answers, files, names, self._relay).handlers(),
            **SpaceRequests(answers, files).handlers(),
            **self._writes.handlers(),
            **closing.handlers(),
            abi.READ: self._on_read,  # one that comes again
            abi.GETATTR: self._on_getattr,
            abi.LOOKUP: self._on_lookup,
            abi.STATFS: lambda unique, node, _: self._start(unique, self._statfs, node),
            abi.DESTROY: lambda unique, _n, _: self._reply_errno(unique, 0),
            abi.IOCTL: refuse(errno.ENOTTY),
            abi.NOTIFY_REPLY: lambda _u, _n, _: None,  # expects no answer, and we never ask
            # ENOSYS: the kernel does it in its own way from then on, without asking again.
            **{opcode: refuse(errno.ENOSYS) for opcode in (
                abi.READDIRPLUS, abi.POLL, abi.BMAP, abi.ACCESS,
                *range(abi.COPY_FILE_RANGE + 1, 64),
            )},
            **{opcode: partial(self._on_direct, opcode) for opcode in direct},
        }  # fmt: skip

    def _lock_handlers(self) -> dict[int, Handler]:
        locks = self._locks
        if locks is None:
            refused = self._refuse(errno.ENOSYS)
            return dict.fromkeys((abi.INTERRUPT, abi.GETLK, abi.SETLK, abi.SETLKW), refused)
        return {
            abi.GETLK: lambda unique, node, body: self._start(unique, self._get_lock, locks, node, bytes(body)),
            abi.SETLK: lambda unique, node, body: self._start(unique, self._set_lock, locks, node, bytes(body), False),
            abi.SETLKW: lambda unique, node, body: self._start(unique, self._set_lock, locks, node, bytes(body), True),
            # Expects no answer. Other requests that wait for the cluster go on waiting: the signal is seen afterwards.
            abi.INTERRUPT: lambda _unique, _node, body: locks.interrupt(body),
        }

    async def _get_lock(self, unique: int, locks: FileLocks, node: int, body: bytes) -> None:
        self._reply(unique, (await locks.get(unique, node, body),))

    async def _set_lock(self, unique: int, locks: FileLocks, node: int, body: bytes, waits: bool) -> None:
        self._reply_errno(unique, await locks.set(unique, node, body, waits=waits))

    def _refuse(self, errno_value: int) -> Handler:
        return lambda unique, _node, _body: self._reply_errno(unique, errno_value)

    # ---- slow requests

    def _start(self, unique: int, function: Callable[..., Awaitable[None]], *args: object) -> None:
        assert self._nursery is not None
        self.waited_count += 1
        self._waiting += 1
        self._journal.begin(unique & UNIQUE_MASK)
        if self._waiting == REQUESTS_WAITING_MAX:
            self._engine.modify(self._fd, 0)
        self._nursery.start_soon(self._serve, unique, function, args)

    async def _serve(self, unique: int, function: Callable[..., Awaitable[None]], args: tuple) -> None:
        request = unique & UNIQUE_MASK
        current_request.set(request)
        try:
            await self._answer(unique, function, args)
            # Not when cancelled: the kernel has no answer, and the next process must find what was done for it (I11).
            self._journal.done(request)
            if self._replaying:
                self._replayed(unique)
        finally:
            if self._waiting == REQUESTS_WAITING_MAX and not self.ended.is_set():
                self._engine.modify(self._fd, select.EPOLLIN)
            self._waiting -= 1

    async def _answer(self, unique: int, function: Callable[..., Awaitable[None]], args: tuple) -> None:
        try:
            await function(unique, *args)
        except Fenced:
            await trio.sleep_forever()  # no answer (errno_border.py), and nothing of it is forgotten
        except Exception as error:
            self._reply_failure(unique, error)

    def _on_read(self, unique: int, node: int, body: memoryview) -> None:
        _, offset, size, read_flags, _, _, _ = abi.READ_IN.unpack_from(body)
        self._start(unique, self._read, node, offset, size, read_flags)

    async def _read(self, unique: int, node: int, offset: int, size: int, read_flags: int) -> None:
        # Without an await between the table's last look at the lease and the reply: pages never come too
        # late.
        direct = bool(read_flags & abi.READ_LOCKOWNER)
        self._reply_data(unique, await self._files.read(node, offset, size, direct=direct))

    async def _then_ok(self, unique: int, function: Callable[..., Awaitable[None]], *args: object) -> None:
        await function(*args)
        self._reply_errno(unique, 0)

    async def _statfs(self, unique: int, node: int) -> None:
        self._reply(unique, (abi.pack_statfs_reply(unique, await self._files.statfs(node)),))

    # ---- small requests answered here

    def _on_getattr(self, unique: int, node: int, body: memoryview) -> None:
        # K1 of relay.py: known under the lease, and nothing can come between this and the answer.
        attr = self._files.getattr_nowait(node)
        if attr is None:
            self._forward(abi.GETATTR, unique, node, body)
        else:
            self._reply(unique, (abi.pack_attr_reply(unique, attr, CACHE_VALID_S),))

    def _on_lookup(self, unique: int, node: int, body: memoryview) -> None:
        if self._names.is_absent(node, bytes(body[:-1])):
            valid_s = CACHE_VALID_S if self._relay.can_cache_entries else 0
            self._reply(unique, (abi.pack_absent_reply(unique, valid_s),))
        else:
            self._forward(abi.LOOKUP, unique, node, body)

    def _on_direct(self, opcode: int, unique: int, node: int, body: memoryview) -> None:
        assert self._direct is not None
        whole = memoryview(body.obj)[: abi.IN_HEADER.size + len(body)]
        self._start(unique, self._direct.prepare(opcode, node, whole))

    def _forward(self, opcode: int, unique: int, node: int, body: memoryview) -> None:
        whole = memoryview(body.obj)[: abi.IN_HEADER.size + len(body)]
        self._relay.forward(opcode, unique, node, whole)

    # ---- replies

    def _reply_data(self, unique: int, data: Buffers) -> None:
        if isinstance(data, list):
            size = abi.OUT_HEADER.size + sum(map(len, data))
            self._reply(unique, (abi.OUT_HEADER.pack(size, 0, unique), *data))
        else:
            self._reply(unique, (abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(data), 0, unique), data))

    def _reply_failure(self, unique: int, error: BaseException) -> None:
        if isinstance(error, Fenced):
            return  # no answer (errno_border.py)
        self._reply_errno(unique, errno_of(error))

    def _reply_errno(self, unique: int, errno_value: int) -> None:
        self._reply(unique, (abi.pack_error_reply(unique, errno_value),))

    def _reply(self, unique: int, parts: tuple[Buffer, ...]) -> None:
        try:
            os.writev(self._fd, parts)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENOTCONN, errno.EBADF):
                return  # taken back by the kernel, or unmounted: nobody waits for it
            log.error("the kernel refused the reply to request %d: %s", unique, error.strerror)
            if error.errno == errno.EINVAL and len(parts[0]) + len(parts) > abi.OUT_HEADER.size + 1:
                os.write(self._fd, abi.pack_error_reply(unique, errno.EIO))
