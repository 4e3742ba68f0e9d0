"""The relay: carries the requests about names and attributes to pyfuse3 and its replies back to the kernel.

Place      mount floor; used by channel.py. pyfuse3 runs in the same process and thread, on the other end of
           an AF_UNIX SOCK_SEQPACKET pair that it takes for its FUSE device.
Edits      INIT replies carry our flags, OPEN and CREATE replies ours too, and every reply with attributes or
           names gets its cache time-outs here.

Invariant
  K1  The kernel caches a name or attributes for long iff what the reply says was learned under the lease
      (operations.py says so by a time-out above 0), this lease is held and this mount may serve (I5) when the
      reply is written, and nothing was recalled since the request was read; attributes iff we did not change them
      ourselves since. Deciding and writing is one synchronous step, so a recall comes either before (time-out 0)
      or after (its notification takes the cached thing back).
      "After" holds where the kernel notices that a notification has overtaken the program that a reply is for, which takes
      it in later: by the version of the inode (fuse_change_attributes), for names by the epoch. Of what is made, linked
      or set it does not look (version 0): such attributes are cached for no time, and asked for again when wanted.

No READDIRPLUS with the kernel: the attributes of a listing are not covered by leases, and stale ones must not
reach an inode in use. pyfuse3 knows nothing else, so it gets READDIRPLUS and the attributes are cut from its
replies.
"""

import errno
import itertools
import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from csvfs.errors import Unavailable
from csvfs.mount import fuse_abi as abi
from csvfs.net.engine import Engine
from csvfs.units import MIB

log = logging.getLogger(__name__)

LEASE_NONE, LEASE_OPEN, LEASE_READ, LEASE_WRITE = 0, 1, 2, 3  # PROTOCOL.md, lease kinds

# pyfuse3 answers with a blocking write in our own thread: its send buffer must hold the largest replies of
# all its tasks, PYFUSE3_TASKS_MAX times READDIR_SIZE_MAX and as much again for the socket's own overhead.
PYFUSE3_TASKS_MAX = 64
READDIR_SIZE_MAX = 128 * 1024
SOCKET_BUFFER_SIZE = 32 * MIB
REPLY_SIZE_MAX = MIB + 4096
REPLIES_PER_TURN = 64

CACHE_VALID_S = 1 << 24  # "long": half a year; leases end it, not time
# How long the kernel keeps attributes that come with a name. It may not know the inode before the program that asked has
# its turn, which on a machine without a free processor is later than any recall may wait; until then it cannot be told
# to forget them (recall.py, "Not heard"). A jiffy at 250 Hz: stat(2) needs them once; the next one asks for attributes
# alone, without another process (channel.py), and keeps those.
LOOKUP_VALID_NS = 4_000_000
WANTED_FLAGS = (
    abi.FLAG_ASYNC_READ
    | abi.FLAG_BIG_WRITES
    | abi.FLAG_MAX_PAGES
    | abi.FLAG_PARALLEL_DIROPS
    | abi.FLAG_EXPLICIT_INVAL_DATA
    | abi.FLAG_ASYNC_DIO
    | abi.FLAG_CACHE_SYMLINKS
    | abi.FLAG_INIT_EXT
    | abi.FLAG_DIRECT_IO_ALLOW_MMAP
    | abi.FLAG_POSIX_LOCKS
    | abi.FLAG_FLOCK_LOCKS
    # The kernel checks ACLs, as modes; the coordinator keeps them, and takes the umask away where there is no default ACL.
    | abi.FLAG_POSIX_ACL
    | abi.FLAG_DONT_MASK
    | abi.FLAG_SETXATTR_EXT
    # Left out on purpose: WRITEBACK_CACHE (written means in the drives' hands), AUTO_INVAL_DATA (leases say
    # when), ATOMIC_O_TRUNC (the kernel sends SETATTR, which takes the write lease), HANDLE_KILLPRIV (the
    # kernel clears set-uid bits by SETATTR).
)
REQUIRED_FLAGS = abi.FLAG_DO_READDIRPLUS | abi.FLAG_MAX_PAGES | abi.FLAG_EXPLICIT_INVAL_DATA
MAX_READAHEAD = MIB
# Requests the kernel may have in flight in the background: asynchronous direct I/O and read-ahead.
MAX_BACKGROUND = 512

_ENTRY_REPLIES = frozenset((abi.LOOKUP, abi.SYMLINK, abi.MKNOD, abi.MKDIR, abi.LINK, abi.CREATE, abi.TMPFILE))
_ATTR_REPLIES = frozenset((abi.GETATTR, abi.SETATTR))
# linux/fs/fuse/dir.c: create_new_entry, fuse_create_open and fuse_do_setattr take the attributes whatever came meanwhile.
_TAKEN_IN_ANY_CASE = frozenset((abi.SYMLINK, abi.MKNOD, abi.MKDIR, abi.LINK, abi.CREATE, abi.TMPFILE, abi.SETATTR))
_OPEN_FLAG_OPCODES = frozenset((abi.OPEN, abi.CREATE, abi.TMPFILE))


class Leases(Protocol):
    """What the relay asks the file table."""

    def stamp(self) -> int: ...
    def recalled_since(self, ino: int, stamp: int) -> bool: ...
    def changed_since(self, ino: int, stamp: int) -> bool: ...
    def may_answer(self, ino: int) -> bool: ...


class Listings(Protocol):
    def listing_was_leased(self, fh: int) -> bool:
        """Whether the entries last given for handle `fh` were learned under the directory's lease."""
        ...

    def adopt_listing(self, fh: int, ino: int) -> None:
        """Directory `ino` is read by handle `fh`, which may be of the process before this one."""
        ...


class KernelsInodes(Protocol):
    """See inode_rows.InodeRows."""

    def looked_up(self, ino: int, lookups: int) -> None: ...
    def opened(self, ino: int, writing: bool, count: int = 1) -> None: ...


class NotNoted:
    """Nobody goes on for this mount."""

    def looked_up(self, ino: int, lookups: int) -> None:
        pass

    def opened(self, ino: int, writing: bool, count: int = 1) -> None:
        pass


@dataclass(slots=True)
class Pending:
    """A request that pyfuse3 has."""

    opcode: int
    node: int
    stamp: int  # of the file table, when the request was read
    detail: int = 0  # OPEN, CREATE, TMPFILE: open flags; READDIR: file handle
    init: abi.InitRequest | None = None
    request: bytes = b""  # INIT
    is_past: bool = False  # INIT: the kernel was answered by the process before this one


class Relay:
    """One end of the socket pair, what pyfuse3 owes, and how many times the kernel knows each inode."""

    def __init__(
        self,
        engine: Engine,
        device_fd: int,
        table: Leases,
        listings: Listings,
        on_failure: Callable[[Exception], None],
        noted: KernelsInodes | None = None,
        on_served: Callable[[bytes], None] = lambda init: None,
    ) -> None:
        """`on_failure`: called once when the kernel cannot be served at all; the mount must end then. `noted`: hears what
        the kernel knows and has open. `on_served(INIT request)`: the session has begun, and can be taken over."""
        self._engine = engine
        self._device_fd = device_fd
        self._table = table
        self._listings = listings
        self._on_failure = on_failure
        self._noted: KernelsInodes = noted or NotNoted()
        self._on_served = on_served
        self._pending: dict[int, Pending] = {}
        self._unsent: deque[bytes] = deque()
        # Of open files. Also a later process of the same session gives none twice: nobody opens one per nanosecond.
        self._handles = itertools.count(time.monotonic_ns())
        self._reply = memoryview(bytearray(REPLY_SIZE_MAX))
        # Directory -> stamp since which the kernel keeps its entries.
        self._listed_since: dict[int, int] = {}
        # Inode -> how often the kernel was given it and has not forgotten it.
        self.lookups: dict[int, int] = {}
        self.minor = 0
        self.flags = 0  # agreed on with the kernel
        self._socket, self._pyfuse3_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._socket, self._pyfuse3_socket):
            end.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_SNDBUFFORCE", 32), SOCKET_BUFFER_SIZE)
        self._socket.setblocking(False)
        engine.register(self._socket.fileno(), select.EPOLLIN, self._on_event)

    @property
    def can_cache_entries(self) -> bool:
        """Whether names may be cached: only where they can be taken back without waiting for locks."""
        return self.minor >= abi.MINOR_WITH_EPOCH

    def pyfuse3_mount_point(self) -> str:
        """What to give to pyfuse3.init. Its libfuse owns the descriptor from then on and closes it."""
        return f"/dev/fd/{self._pyfuse3_socket.detach()}"

    def close(self) -> None:
        """pyfuse3's main loop sees the end of its socket and returns."""
        self._engine.unregister(self._socket.fileno())
        self._socket.close()
        self._pyfuse3_socket.close()

    # ---- kernel -> pyfuse3

    def forward(self, opcode: int, unique: int, node: int, request: memoryview) -> None:
        """Hand a whole request to pyfuse3; `request` is copied before this returns, and may be edited."""
        pending = Pending(opcode, node, self._table.stamp())
        body = request[abi.IN_HEADER.size :]
        if opcode in _OPEN_FLAG_OPCODES and len(body) >= abi.OPEN_IN.size:
            pending.detail = abi.U32.unpack_from(body)[0]
        elif opcode == abi.READDIR and len(body) >= abi.READ_IN.size:
            pending.detail = abi.READ_IN.unpack_from(body)[0]
            size = abi.U32.unpack_from(request, abi.READDIR_SIZE_OFFSET)[0]
            abi.U32.pack_into(request, abi.READDIR_SIZE_OFFSET, min(size, READDIR_SIZE_MAX))
            abi.U32.pack_into(request, 4, abi.READDIRPLUS)
            self._listings.adopt_listing(pending.detail, node)
        elif opcode == abi.INIT:
            pending.init = abi.unpack_init(body)
            pending.request = bytes(request)
        self._pending[unique] = pending
        if self._unsent:
            self._unsent.append(bytes(request))
            return
        self._engine.trio_due = True  # pyfuse3 waits for its end of the socket there
        try:
            self._socket.send(request)
        except BlockingIOError:
            self._unsent.append(bytes(request))
            self._engine.modify(self._socket.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _send_waiting(self) -> None:
        while self._unsent:
            try:
                self._socket.send(self._unsent[0])
            except BlockingIOError:
                return
            self._unsent.popleft()
        self._engine.modify(self._socket.fileno(), select.EPOLLIN)

    # ---- answers that do not come from pyfuse3 (direct.py)

    def pending(self, opcode: int, node: int) -> Pending:
        """A request that was read just now and will be answered by `answer`."""
        return Pending(opcode, node, self._table.stamp())

    def answer(self, unique: int, pending: Pending, body: bytes) -> None:
        """As if pyfuse3 had replied `body`, of a request that succeeded."""
        size = abi.OUT_HEADER.size + len(body)
        given: list[int] = []
        reply = memoryview(bytearray(abi.OUT_HEADER.pack(size, 0, unique) + body))
        self._write(unique, self._patch(pending, reply, given), given, pending)

    def take_over(self, init: bytes, lookups: dict[int, int]) -> None:
        """Go on with a session that has begun: tell pyfuse3 of the INIT `request` that it began with."""
        self.lookups = lookups
        _, opcode, unique, node, _, _, _, _, _ = abi.IN_HEADER.unpack_from(init)
        self.forward(opcode, unique, node, memoryview(bytearray(init)))
        pending = self._pending[unique]
        pending.is_past = True
        assert pending.init is not None, "the record begins with an INIT"
        self._agree(pending.init)  # now: the kernel's requests are of this form, also before pyfuse3 has answered

    # ---- pyfuse3 -> kernel

    def _on_event(self, events: int) -> None:
        if events & select.EPOLLOUT and self._unsent:
            self._send_waiting()
        for _ in range(REPLIES_PER_TURN):
            try:
                size = self._socket.recv_into(self._reply)
            except BlockingIOError:
                return
            if size == 0:
                self._engine.unregister(self._socket.fileno())
                self._on_failure(Unavailable("pyfuse3 closed its end; the mount must be started again"))
                return
            self._take_reply(self._reply[:size])

    def _take_reply(self, reply: memoryview) -> None:
        if len(reply) < abi.OUT_HEADER.size:
            log.error("pyfuse3 sent %d bytes, which is no reply", len(reply))
            return
        size, error, unique = abi.OUT_HEADER.unpack_from(reply)
        pending = self._pending.pop(unique, None)
        if pending is None or size != len(reply):
            log.error(
                "pyfuse3 sent a reply to no request: unique %d, %d of %d bytes", unique, len(reply), size
            )
            return
        if pending.opcode == abi.INIT:
            self._answer_init(unique, error, pending)
            return
        given: list[int] = []
        out: memoryview | bytes = reply
        if error == 0:
            try:
                out = self._patch(pending, reply, given)
            except (ValueError, IndexError, abi.struct.error) as malformed:
                log.error("reply of pyfuse3 to opcode %d: %s", pending.opcode, malformed)
                out, given, error = abi.pack_error_reply(unique, errno.EIO), [], errno.EIO
        self._write(unique, out, given, pending if error == 0 else None)

    def _write(self, unique: int, reply: memoryview | bytes, given: list[int], pending: Pending | None) -> None:
        """`given`: the inodes whose lookup count the kernel raises by this reply. `pending`: what it is an answer to,
        if not an error."""
        lookups, noted = self.lookups, self._noted
        opens = pending is not None and pending.opcode in _OPEN_FLAG_OPCODES
        opened, writing = 0, False
        for ino in given:  # noted before the kernel has it: see inode_rows.py
            lookups[ino] = count = lookups.get(ino, 0) + 1
            noted.looked_up(ino, count)
        if opens and pending is not None:
            opened, writing = given[0] if given else pending.node, abi.may_write(pending.detail)
            noted.opened(opened, writing)
        try:
            os.write(self._device_fd, reply)
        except OSError as error:
            for ino in given:
                self.forget(ino, 1)
            if opens:
                noted.opened(opened, writing, -1)
            if error.errno == errno.EINVAL:  # the kernel did not like it: an error at least ends its wait
                log.error("the kernel refused a reply of %d bytes", len(reply))
                os.write(self._device_fd, abi.pack_error_reply(unique, errno.EIO))
            elif error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENOTCONN):
                raise
            # else the kernel does not want it any more: it took no inode

    def _answer_init(self, unique: int, error: int, pending: Pending) -> None:
        offer = pending.init
        usable = (
            error == 0
            and offer is not None
            and offer.major == abi.FUSE_MAJOR
            and offer.minor >= abi.FUSE_MINOR_MIN
            and offer.flags & REQUIRED_FLAGS == REQUIRED_FLAGS
        )
        if not usable or offer is None:
            os.write(self._device_fd, abi.pack_error_reply(unique, errno.EPROTO))
            self._on_failure(
                Unavailable(f"kernel or pyfuse3 too old: the kernel offers {offer}, error {error}")
            )
            return
        self._agree(offer)
        if pending.is_past:
            return
        reply = abi.pack_init_reply(
            unique,
            minor=self.minor,
            flags=self.flags,
            max_readahead=min(offer.max_readahead, MAX_READAHEAD),
            max_background=MAX_BACKGROUND,
            io_size_max=abi.IO_SIZE_MAX,
        )
        if offer.flags & abi.FLAG_HAS_RESEND:
            self._on_served(pending.request)
        else:
            log.info("this kernel cannot ask anew (Linux 6.9 can): programs will see an error if this process dies")
        os.write(self._device_fd, reply)

    def _agree(self, offer: abi.InitRequest) -> None:
        self.minor = min(offer.minor, abi.FUSE_MINOR_MAX)
        self.flags = WANTED_FLAGS & offer.flags

    # ---- cache time-outs and open flags (K1: no await from here to the write)

    def _valid_s(self, ino: int, stamp: int) -> int:
        table = self._table
        held = table.may_answer(ino) and not table.recalled_since(ino, stamp)
        return CACHE_VALID_S if held else 0

    def _attr_valid_s(self, ino: int, pending: Pending) -> int:
        if pending.opcode in _TAKEN_IN_ANY_CASE or self._table.changed_since(ino, pending.stamp):
            return 0
        return self._valid_s(ino, pending.stamp)

    def _patch(self, pending: Pending, reply: memoryview, given: list[int]) -> memoryview | bytes:
        """The reply as the kernel gets it; raises ValueError when it is shorter than it must be."""
        opcode = pending.opcode
        body = abi.OUT_HEADER.size
        if opcode in _ATTR_REPLIES:
            if len(reply) < body + abi.ATTR_OUT_SIZE:
                raise ValueError(f"{len(reply)} bytes with attributes")
            leased, _ = abi.ATTR_VALID.unpack_from(reply, body)
            valid = self._attr_valid_s(pending.node, pending) if leased else 0
            abi.ATTR_VALID.pack_into(reply, body, valid, 0)
        elif opcode in _ENTRY_REPLIES:
            if len(reply) < body + abi.ENTRY_OUT_SIZE:
                raise ValueError(f"{len(reply)} bytes with an entry")
            self._patch_entry(reply, body, pending, given)
            if opcode in _OPEN_FLAG_OPCODES:
                self._patch_open(reply, body + abi.ENTRY_OUT_SIZE, pending.detail)
        elif opcode == abi.OPEN:
            self._patch_open(reply, body, pending.detail)
        elif opcode == abi.OPENDIR:
            self._patch_open_directory(reply, body, pending)
        elif opcode == abi.READDIR:
            return self._patch_listing(reply, pending)
        return reply

    def _patch_entry(self, reply: memoryview, at: int, pending: Pending, given: list[int]) -> None:
        ino = abi.NODEID.unpack_from(reply, at)[0]
        at += abi.ENTRY_VALID_OFFSET
        entry_valid, attr_valid, _, _ = abi.ENTRY_VALID.unpack_from(reply, at)
        if entry_valid:
            entry_valid = self._valid_s(pending.node, pending.stamp) if self.can_cache_entries else 0
        attr_valid_ns = 0
        if ino != 0:  # 0: the name does not exist, and the kernel may remember that
            attr_valid_ns = LOOKUP_VALID_NS if attr_valid and self._attr_valid_s(ino, pending) else 0
            given.append(ino)
        abi.ENTRY_VALID.pack_into(reply, at, entry_valid, 0, 0, attr_valid_ns)

    def _patch_open(self, reply: memoryview, at: int, open_flags: int) -> None:
        """Pages outlive opens, leases end them. Direct writes of one file go on side by side."""
        # A number of its own for each open file: locks are taken through it (file_locks.py). Every close is told, too:
        # no FOPEN_NOFLUSH, which would keep from us that a program with a file open for reading gave up its locks.
        fh = next(self._handles)
        flags = abi.FOPEN_KEEP_CACHE | abi.FOPEN_PARALLEL_DIRECT_WRITES
        # O_DIRECT: without it the kernel takes the inode's lock around each direct write: an eighth of the speed.
        # O_APPEND: the kernel's pages would show the data where it believes the end to be, which another node may
        # have moved, from the answer until they are taken back.
        if open_flags & (os.O_DIRECT | os.O_APPEND):
            flags |= abi.FOPEN_DIRECT_IO
        abi.OPEN_OUT.pack_into(reply, at, fh, flags, 0)

    def _patch_open_directory(self, reply: memoryview, at: int, pending: Pending) -> None:
        """The kernel keeps a directory's entries, over opens, as long as its lease lasts."""
        fh, _, _ = abi.OPEN_OUT.unpack_from(reply, at)
        ino = pending.node
        flags = 0
        if self._valid_s(ino, pending.stamp):
            flags = abi.FOPEN_CACHE_DIR
            since = self._listed_since.get(ino)
            if since is not None and not self._table.recalled_since(ino, since):
                flags |= abi.FOPEN_KEEP_CACHE
            else:
                self._listed_since[ino] = pending.stamp
        else:
            self._listed_since.pop(ino, None)
        abi.OPEN_OUT.pack_into(reply, at, fh, flags, 0)

    def _patch_listing(self, reply: memoryview, pending: Pending) -> bytes:
        if not (
            self._listings.listing_was_leased(pending.detail) and self._valid_s(pending.node, pending.stamp)
        ):
            self._listed_since.pop(pending.node, None)  # the kernel may keep this; its next open drops it
        return abi.without_attributes(reply)

    # ---- forgetting

    def forget(self, ino: int, count: int) -> bool:
        """Lower the lookup count; True: the kernel does not know the inode any more."""
        left = self.lookups.get(ino, 0) - count
        if left > 0:
            self.lookups[ino] = left
            self._noted.looked_up(ino, left)
            return False
        self._listed_since.pop(ino, None)
        self._noted.looked_up(ino, 0)
        return self.lookups.pop(ino, None) is not None
