"""A FUSE session held by the parent of the mount process: the next process goes on with it, or the parent clears up.

Place      mount floor; used by admin/mount_keeper.py (the parent) and process.py (the mount).
Why        The kernel asks anew what a dead process has not answered (FUSE_NOTIFY_RESEND, Linux 6.9), as long as somebody
           has a descriptor of the session: so programs see a pause, no error. And where nobody can go on, the kernel
           shows the pages it has cached to programs that have their files open, for ever and whatever other nodes write
           meanwhile (I5), unless somebody with that descriptor takes them back, who knows of which inodes.
What       the parent opens /dev/fuse and a **record** in memory, and hands both on to each process in turn. The mount
           keeps the record up to date: a header (below), requests under way (request_journal.py), and inodes
           (inode_rows.py).
Limits     as of these two; a record that was too small is not taken over, and all caches of the machine are dropped.
"""

import errno
import logging
import mmap
import os
from pathlib import Path

from csvfs.errors import BadRequest
from csvfs.mount import device, inode_rows, request_journal
from csvfs.mount import fuse_abi as abi
from csvfs.mount.file_state import LEASE_WRITE
from csvfs.mount.inode_rows import InodeRows
from csvfs.mount.page_drop import PageDrop
from csvfs.mount.request_journal import RequestJournal

log = logging.getLogger(__name__)

SESSION_ENVIRONMENT = "CSVFS_MOUNT_SESSION"  # "descriptor of /dev/fuse,descriptor of the record"
# The header, in words: its layout's number, so that a later version does not take over what it does not understand; how
# far the session is; until when (CLOCK_MONOTONIC, ns) the kernel may go on showing what it has cached without a process;
# whether it shows nothing; the kernel's INIT request, its size in bytes and itself.
_VERSION, _STAGE, _COVERED_UNTIL, _EMPTIED, _INIT_SIZE, _INIT = range(6)
VERSION = 3
STAGE_NEW, STAGE_SERVED, STAGE_OVER = range(3)  # SERVED: the next process can take over
INIT_SIZE_MAX = 472  # 40 of its header, 64 of its body so far
_JOURNAL = 64  # words
_ROWS = _JOURNAL + request_journal.WORDS
SIZE = 8 * (_ROWS + inode_rows.WORDS)  # bytes
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class Record:
    """The mount's side of the record."""

    def __init__(self, words: memoryview) -> None:
        """words: u64, of the memory that is shared with the parent. Raises BadRequest: another version wrote it."""
        if words[_VERSION] not in (0, VERSION):
            words[_STAGE] = STAGE_OVER
            raise BadRequest(f"the mount before wrote a record of version {words[_VERSION]}, this is {VERSION}")
        words[_VERSION] = VERSION
        self._words = words
        self.journal = RequestJournal(words[_JOURNAL:_ROWS])
        self.left = inode_rows.rows_in(words[_ROWS:])  # by the process before
        self.inodes = InodeRows(words[_ROWS:])

    @property
    def has_served(self) -> bool:
        """This process or one before it has served the session, and the next one can take over."""
        return bool(self._words[_STAGE] == STAGE_SERVED)

    @property
    def init(self) -> bytes:
        """The kernel's INIT request, header included."""
        return self._words[_INIT : _INIT + INIT_SIZE_MAX // 8].tobytes()[: self._words[_INIT_SIZE]]

    def served(self, init: bytes) -> None:
        """The session has begun, with this INIT request, and the kernel can ask the next process anew."""
        if len(init) > INIT_SIZE_MAX:
            log.info("an INIT request of %d bytes: the next process cannot take over", len(init))
            return
        padded = init + bytes(-len(init) % 8)
        self._words[_INIT : _INIT + len(padded) // 8] = memoryview(padded).cast("Q")
        self._words[_INIT_SIZE] = len(init)
        self._words[_STAGE] = STAGE_SERVED

    def over(self) -> None:
        """Nobody can go on with this session."""
        self._words[_STAGE] = STAGE_OVER

    def emptied(self, is_emptied: bool) -> None:
        """Whether the kernel shows nothing that it has cached, and is told nothing that it would cache (lapse.py)."""
        self._words[_EMPTIED] = is_emptied

    def covered_until(self, time_ns: int) -> None:
        """Others may be given our leases some time after `time_ns`, CLOCK_MONOTONIC, if nobody serves until then."""
        self._words[_COVERED_UNTIL] = time_ns


class HeldSession:
    """The parent's side, of one start of a mount process."""

    def __init__(self) -> None:
        """Raises Unavailable: no FUSE here."""
        self._device = device.open_device()
        self._record = os.memfd_create("csvfs-mount", os.MFD_CLOEXEC)
        os.ftruncate(self._record, SIZE)
        self._words = mapped(self._record)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """For the mount process to inherit."""
        return (self._device, self._record)

    def environment(self) -> dict[str, str]:
        return {SESSION_ENVIRONMENT: f"{self._device},{self._record}"}

    @property
    def can_be_taken_over(self) -> bool:
        """Whether the next process can go on where a dead one was."""
        journal, rows = self._words[_JOURNAL:_ROWS], self._words[_ROWS:]
        overflowed = inode_rows.overflowed(rows) or request_journal.overflowed(journal)
        return self._words[_STAGE] == STAGE_SERVED and not overflowed

    @property
    def covered_until_ns(self) -> int:
        """Until then what the kernel shows cannot be older than what others wrote, though no process serves it (I5)."""
        return self._words[_COVERED_UNTIL]

    @property
    def is_emptied(self) -> bool:
        """The process saw to it that the kernel shows nothing that it has cached, before it died."""
        return bool(self._words[_EMPTIED])

    def drop_pages(self, within_s: float) -> bool:
        """The process is dead, and the session is kept for the next one: take back what the kernel has cached.

        Returns whether nothing is left that somebody could be shown; see page_drop.py. Blocks for microseconds per
        inode, and for `within_s` where pages wait for an answer; call it in a thread. Raises OSError.
        """
        rows = rows_of(self._words)
        device = _Device(self._device)
        device.tell(abi.pack_inc_epoch())
        for row in rows:  # attributes first: these wait for nothing
            device.tell(abi.pack_inval_inode(row.ino, -1, 0))

        def invalidate(ino: int, offset: int, length: int) -> None:
            device.tell(abi.pack_inval_inode(ino, offset, length))

        written = frozenset(row.ino for row in rows if row.kind == LEASE_WRITE)
        return PageDrop(invalidate, [row.ino for row in rows], written).run(within_s)

    def drop_pages_and_close(self) -> None:
        """The process is dead and the session ended (its requests too): take back what the kernel has cached.

        Blocks for microseconds per inode; call it in a thread.
        """
        try:
            rows = self._words[_ROWS:]
            inodes, overflowed = inode_rows.inodes_in(rows), inode_rows.overflowed(rows)
            rows.release()
            left = [ino for ino in inodes if self._invalidate(ino)]
            left = [ino for ino in left if self._invalidate(ino)]
            if inodes:
                _tell(self._device, abi.pack_inc_epoch())  # names too, where the kernel caches them
            if left or overflowed:
                log.error("%d inodes of a mount that ended keep pages: all caches of this machine are dropped", len(left))
                os.sync()
                DROP_CACHES.write_text("1\n")
        except OSError as error:
            log.error("cached pages of a mount that ended were not all taken back: %s", error)
        finally:
            os.close(self._device)
            os.close(self._record)

    def _invalidate(self, ino: int) -> bool:
        """Whether something of it may be left. Dirty pages cannot be written any more: a first try makes them clean."""
        # ENOENT: the kernel does not know the inode. EPERM: this was never mounted.
        return _tell(self._device, abi.pack_inval_inode(ino, 0, 0)) not in (0, errno.ENOENT, errno.EPERM)


class _Device:
    """A descriptor of /dev/fuse of our own, for as long as any thread uses it: whoever does not wait for them may close
    the other."""

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)

    def tell(self, message: bytes) -> int:
        """The errno."""
        return _tell(self._fd, message)

    def __del__(self) -> None:
        os.close(self._fd)


def _tell(fd: int, message: bytes) -> int:
    """The errno."""
    try:
        os.write(fd, message)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def rows_of(words: memoryview) -> list[inode_rows.Row]:
    """Of the inodes that a mount process has noted in its record."""
    return inode_rows.rows_in(words[_ROWS:])


def mapped(record: int) -> memoryview:
    """The words of a record, by its descriptor."""
    return memoryview(mmap.mmap(record, SIZE)).cast("Q")


def inherited_session() -> tuple[int, Record] | None:
    """In the mount process: the descriptor of the session, and the record; None: it has no parent that holds one.

    Raises BadRequest: the environment is not what a parent sets, or the record of another version.
    """
    value = os.environ.pop(SESSION_ENVIRONMENT, "")
    if not value:
        return None
    try:
        fuse, record = (int(number) for number in value.split(","))
        os.set_inheritable(fuse, False)
        os.set_inheritable(record, False)
        return fuse, Record(mapped(record))
    except (OSError, ValueError) as error:
        raise BadRequest(f"{SESSION_ENVIRONMENT}={value!r} does not name two descriptors: {error}") from None
