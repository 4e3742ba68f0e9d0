"""Calls that change nothing: answered at once from the database, with whatever leases are free.

Place      coordinator floor; above metadata.py and leases.py, below service.py. Synchronous.
Rule       they never wait for leases. A read lease that cannot be had at once is left out of the reply, and
           the mount does not cache what the reply says.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from coordinator import arguments
from coordinator.arguments import Args
from coordinator.extents import FILE_BLOCKS_MAX
from coordinator.lease_table import Ticket
from coordinator.leases import Leases
from coordinator.metadata import Metadata
from coordinator.sessions import Session
from csvfs.ids import InodeNo
from csvfs.net.calls import field as typed

READDIR_REPLY_SIZE_MAX = 700_000  # bytes, of the 1 MiB that a reply may have
_ENTRY_SIZE = 120  # bytes of an attr with its numbers, at most


@dataclass(slots=True)
class Reply:
    """`leases`: field -> (inode, serial of the lease when this was computed); filled in when it is sent.

    `position`: of the log, when this was computed: sent once that is durable. 0: it depends on no change.
    `writer`: the session to be asked for the size and times in `value["attr"]` first; `sharers`: those to be asked for the
    time of the last write, the latest of which counts.
    `ticket`: keeps others off until the reply has left; finished then, also if it never does; so is `finish`, once or more.
    `seal`: fills in the rest of the value as it leaves.
    """

    value: Any
    leases: dict[str, tuple[InodeNo, int | None]] = field(default_factory=dict)
    writer: Session | None = None
    position: int = 0
    ticket: Ticket | None = None
    sharers: list[Session] = field(default_factory=list)
    seal: Callable[[], None] | None = None
    finish: Callable[[], None] | None = None


class Questions:
    """Answers by the name of the call. They raise CsvfsError."""

    def __init__(self, metadata: Metadata, leases: Leases) -> None:
        self._metadata = metadata
        self._leases = leases
        self.sharers: Callable[[InodeNo], list[Session]] = lambda ino: []  # see SharedWrite.members
        self.by_name: dict[str, Callable[[Session, Args], Reply]] = {
            "lookup": self._lookup,
            "getattr": self._getattr,
            "readlink": self._readlink,
            "readdir": self._readdir,
            "getxattr": self._getxattr,
            "listxattr": self._listxattr,
            "seek": self._seek,
        }

    def _lookup(self, session: Session, args: Args) -> Reply:
        parent = arguments.inode(args, "parent")
        attr = self._metadata.lookup(parent, typed(args, "name", bytes))
        leases = {"dir_lease": (parent, self._leases.table.try_read(session.key, parent))}
        if attr is None:
            return Reply({"attr": None, "lease": 0}, leases)
        return self._with_lease(session, attr, leases)

    def _getattr(self, session: Session, args: Args) -> Reply:
        return self._with_lease(session, self._metadata.getattr(arguments.inode(args)), {})

    def _with_lease(
        self, session: Session, attr: list[int], leases: dict[str, tuple[InodeNo, int | None]]
    ) -> Reply:
        ino = InodeNo(attr[0])
        writer = self._leases.other_writer(session, ino)
        if writer is not None:
            return Reply({"attr": attr, "lease": 0}, leases, writer)
        if sharers := self.sharers(ino):
            return Reply({"attr": attr, "lease": 0}, leases, sharers=sharers)
        leases["lease"] = (ino, self._leases.table.try_read(session.key, ino))
        return Reply({"attr": attr}, leases)

    def _readdir(self, session: Session, args: Args) -> Reply:
        ino, cookie = arguments.inode(args), arguments.number_or_zero(args, "cookie")
        entries, eof = self._metadata.readdir(ino, cookie, arguments.number(args, "limit", 1))
        size = 0
        for index, entry in enumerate(entries):
            size += _ENTRY_SIZE + len(entry[1])
            if size > READDIR_REPLY_SIZE_MAX:
                entries, eof = entries[:index], False
                break
        serial = self._leases.table.try_read(session.key, ino)
        return Reply({"entries": entries, "eof": eof}, {"dir_lease": (ino, serial)})

    def _readlink(self, session: Session, args: Args) -> Reply:
        return Reply({"target": self._metadata.readlink(arguments.inode(args))})

    def _getxattr(self, session: Session, args: Args) -> Reply:
        return Reply({"value": self._metadata.getxattr(arguments.inode(args), typed(args, "name", bytes))})

    def _listxattr(self, session: Session, args: Args) -> Reply:
        return Reply({"names": self._metadata.listxattr(arguments.inode(args))})

    def _seek(self, session: Session, args: Args) -> Reply:
        ino, block = arguments.inode(args), arguments.number(args, "block", 0, FILE_BLOCKS_MAX)
        at, found = self._metadata.seek(ino, block, hole=arguments.flag(args, "hole"))
        return Reply({"block": at, "found": found})
