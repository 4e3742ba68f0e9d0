"""Operations that change metadata: what each needs of other sessions, what it does, which leases its reply
carries.

Place      coordinator floor; above metadata.py and lease_table.py, below service.py. Synchronous.
Order      `needs` is looked up before leases are taken, and again in the batch: names may point elsewhere by
           then, in which case nothing is done and the service begins anew.
"""

import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from coordinator import arguments
from coordinator.arguments import U32_MAX, Args
from coordinator.lease_table import READ, WRITE, LeaseTable, Need, SessionKey
from coordinator.metadata import Metadata
from csvfs.errors import BadRequest, Conflict, CsvfsError
from csvfs.ids import InodeNo
from csvfs.net.calls import field as typed
from csvfs.net.calls import optional_field

Needs = dict[InodeNo, Need]
Value = dict[str, Any]

_INO, _MODE, _NLINK, _SIZE = 0, 1, 2, 6  # in an attr
RENAME_EXCHANGE = 2
REPLACE_ROWS_MAX = 4096
_STRENGTH = {Need.OPEN: 0, Need.READ: 1, Need.ATTRIBUTES: 2, Need.ENTRIES: 3, Need.WRITE: 4}


def _no_leases(reply: Value) -> dict[str, InodeNo]:
    return {}


def _nobody(reply: Value) -> list[InodeNo]:
    return []


@dataclass(slots=True)
class Operation:
    """One call that changes metadata, ready to be carried out.

    needs     of other sessions, as the names are now
    apply     the change itself, in a batch; its reply without leases
    leases    fields of the reply -> inode whose lease they show
    made      inodes that did not exist before: the session gets them whole
    orphans   inodes that may have lost their last name
    again     the reply says that more is to do: commit, then apply once more
    """

    needs: Callable[[], Needs]
    apply: Callable[[], Value]
    leases: Callable[[Value], dict[str, InodeNo]] = field(default=_no_leases)
    made: Callable[[Value], list[InodeNo]] = field(default=_nobody)
    orphans: Callable[[Value], list[InodeNo]] = field(default=_nobody)
    again: Callable[[Value], bool] = field(default=lambda reply: False)


class Operations:
    """Makes Operations from the arguments of calls. All raise BadRequest."""

    def __init__(
        self, metadata: Metadata, table: LeaseTable, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._metadata = metadata
        self._table = table
        self.now_ns = clock_ns
        self.by_name: dict[str, Callable[[SessionKey, Args], Operation]] = {
            "setattr": self._setattr,
            "make": self._make,
            "link": self._link,
            "unlink": self._unlink,
            "rename": self._rename,
            "setxattr": self._setxattr,
            "removexattr": self._removexattr,
            "commit": self._commit,
            "punch": self._punch,
            "clone": self._clone,
            "replace": self._replace,
        }

    # -- attributes ------------------------------------------------------------------------------

    def _setattr(self, session: SessionKey, args: Args) -> Operation:
        ino = arguments.inode(args)
        size = arguments.optional_number(args, "size")
        changes = {
            "mode": arguments.optional_number(args, "mode", 0, 0xFFFF),
            "uid": arguments.optional_number(args, "uid", 0, U32_MAX),
            "gid": arguments.optional_number(args, "gid", 0, U32_MAX),
            "size": size,
            "atime_ns": arguments.time_ns(args, "atime_ns"),
            "mtime_ns": arguments.time_ns(args, "mtime_ns"),
        }

        def needs() -> Needs:
            if size is None:
                return {ino: Need.ATTRIBUTES}
            # Its own write lease is all it takes, as for `commit`: a truncation must not wait behind a recall that
            # waits for dirty pages which the kernel keeps back until the truncation is answered.
            return {} if self._table.held(session, ino) == WRITE else {ino: Need.WRITE}

        return Operation(
            needs=needs,
            apply=lambda: {"attr": self._metadata.setattr(ino, **changes, now_ns=self.now_ns())},
            leases=lambda reply: {"lease": ino},
            again=lambda reply: size is not None and reply["attr"][_SIZE] > size,
        )

    def _setxattr(self, session: SessionKey, args: Args) -> Operation:
        ino, name, value = arguments.inode(args), typed(args, "name", bytes), typed(args, "value", bytes)
        flags = arguments.number_or_zero(args, "flags")
        drops_set_gid = arguments.flag(args, "drops_set_gid")

        def apply() -> Value:
            self._metadata.setxattr(ino, name, value, flags, self.now_ns(), drops_set_gid=drops_set_gid)
            return {}

        return Operation(needs=lambda: {ino: Need.ATTRIBUTES}, apply=apply)

    def _removexattr(self, session: SessionKey, args: Args) -> Operation:
        ino, name = arguments.inode(args), typed(args, "name", bytes)

        def apply() -> Value:
            self._metadata.removexattr(ino, name, self.now_ns())
            return {}

        return Operation(needs=lambda: {ino: Need.ATTRIBUTES}, apply=apply)

    def _commit(self, session: SessionKey, args: Args) -> Operation:
        """What the holder of a lease reports: size and times of a writer, the access time of a reader."""
        ino, size = arguments.inode(args), arguments.number_or_zero(args, "size")
        mtime_ns, atime_ns = arguments.time_ns(args, "mtime_ns"), arguments.time_ns(args, "atime_ns")

        def apply() -> Value:
            self.check_holds(session, ino, WRITE if size or mtime_ns else READ)
            self._metadata.commit_file(ino, size, mtime_ns or None, atime_ns, self.now_ns())
            return {}

        # The session's own lease is all it takes: this must work while somebody waits for that lease.
        return Operation(needs=dict, apply=apply)

    def _punch(self, session: SessionKey, args: Args) -> Operation:
        """Blocks that the holder of the write lease does not want any more."""
        ino, block = arguments.inode(args), arguments.number(args, "block")
        count = arguments.number(args, "count", 1)
        check_grant = self.grant_of(session, ino)

        def apply() -> Value:
            check_grant()
            attr, reached = self._metadata.punch(ino, block, count, self.now_ns())
            return {"attr": attr, "reached": reached}

        # As `commit`: a recall of this lease waits for the answer.
        return Operation(needs=dict, apply=apply, again=lambda reply: reply["reached"] > block)

    def _clone(self, session: SessionKey, args: Args) -> Operation:
        """Blocks of one file for another, of both of which the session has the write lease: nobody else has a layout that
        says whose these blocks are."""
        ino, target = arguments.inode(args), arguments.inode(args, "target")
        block, target_block = arguments.number(args, "block"), arguments.number(args, "target_block")
        count = arguments.number(args, "count", 1)
        checks = [self.grant_of(session, one) for one in (ino, target)]

        def apply() -> Value:
            for check in checks:
                check()
            cloned = self._metadata.clone(ino, block, count, target, target_block, self.now_ns())
            return {
                "attr": cloned.attr,
                "count": cloned.count,
                "extents": [extent.to_wire() for extent in cloned.extents],
                "shared": self._metadata.shared_in(cloned.extents),
                "slabs": [self._metadata.slab(slab).to_wire() for slab in sorted({e.slab for e in cloned.extents})],
            }

        return Operation(needs=dict, apply=apply)  # as `punch`

    def _replace(self, session: SessionKey, args: Args) -> Operation:
        """Fresh blocks, whose copies are on the media, in place of shared ones."""
        ino = arguments.inode(args)
        rows = [tuple(row) for row in arguments.rows(args, "rows", 4, REPLACE_ROWS_MAX)]
        if any(value is None for row in rows for value in row):
            raise BadRequest("rows must be [block, count, slab, slab block]")
        check_grant = self.grant_of(session, ino)

        def apply() -> Value:
            check_grant()
            known = self._metadata.sessions.id_of(*session)
            return {"attr": self._metadata.replace(ino, known, rows, self.now_ns())}

        return Operation(needs=dict, apply=apply)  # as `punch`

    def grant_of(self, session: SessionKey, ino: InodeNo) -> Callable[[], None]:
        """What a batch has to call before it changes what only the holder of a write lease may: raises Conflict when that
        is not the lease of now any more. Its mount gave up waiting, and may have written there since: carried out then,
        the change would take that away."""
        grant = self._table.write_grant(session, ino)

        def check() -> None:
            self.check_holds(session, ino, WRITE)
            if self._table.write_grant(session, ino) != grant:
                raise Conflict(f"inode {ino}: mount of {session[0]} asked for this under an earlier lease")

        return check

    def check_holds(self, session: SessionKey, ino: InodeNo, kind: int) -> None:
        """Raises Conflict unless the session holds at least `kind` on `ino`."""
        held = self._table.held(session, ino)
        if held < kind:
            raise Conflict(
                f"inode {ino}: mount of {session[0]} holds lease {held}, this needs {kind}; acquire it first"
            )

    # -- names -----------------------------------------------------------------------------------

    def _peek(self, parent: InodeNo, name: bytes) -> list[int] | None:
        """The attr that a name leads to now; None: nothing, or what is wrong will show when the change is
        done."""
        try:
            return self._metadata.lookup(parent, name)
        except CsvfsError:
            return None

    def _make(self, session: SessionKey, args: Args) -> Operation:
        parent, name = arguments.inode(args, "parent"), optional_field(args, "name", bytes)
        mode = arguments.number(args, "mode", 0, 0xFFFF)
        uid, gid = arguments.number(args, "uid", 0, U32_MAX), arguments.number(args, "gid", 0, U32_MAX)
        rdev = arguments.number_or_zero(args, "rdev")
        umask = arguments.optional_number(args, "umask", 0, 0o7777) or 0
        target = optional_field(args, "target", bytes) or b""

        def apply() -> Value:
            attr = self._metadata.make(parent, name, mode, uid, gid, rdev, target, self.now_ns(), umask=umask)
            return {"attr": attr}

        def made(reply: Value) -> list[InodeNo]:
            return [InodeNo(reply["attr"][_INO])]

        if name is None:  # the directory stays as it is
            return Operation(
                needs=dict, apply=apply, leases=lambda reply: {"lease": made(reply)[0]}, made=made, orphans=made
            )
        return Operation(
            needs=lambda: {parent: Need.ENTRIES},
            apply=apply,
            leases=lambda reply: {"lease": made(reply)[0], "dir_lease": parent},
            made=made,
        )

    def _link(self, session: SessionKey, args: Args) -> Operation:
        ino, parent = arguments.inode(args), arguments.inode(args, "parent")
        name = typed(args, "name", bytes)
        return Operation(
            needs=lambda: _merged((ino, Need.ATTRIBUTES), (parent, Need.ENTRIES)),
            apply=lambda: {"attr": self._metadata.link(ino, parent, name, self.now_ns())},
            leases=lambda reply: {"lease": ino, "dir_lease": parent},
        )

    def _unlink(self, session: SessionKey, args: Args) -> Operation:
        parent, name = arguments.inode(args, "parent"), typed(args, "name", bytes)
        directory = arguments.flag(args, "directory")

        def apply() -> Value:
            now_ns = self.now_ns()
            ino, nlink = self._metadata.unlink(parent, name, directory, now_ns)
            return {"ino": ino, "nlink": nlink, "time_ns": now_ns}

        return Operation(
            needs=lambda: _merged((parent, Need.ENTRIES), *_losing_a_name(self._peek(parent, name))),
            apply=apply,
            leases=lambda reply: {"dir_lease": parent},
            orphans=lambda reply: [] if reply["nlink"] else [InodeNo(reply["ino"])],
        )

    def _rename(self, session: SessionKey, args: Args) -> Operation:
        parent, name = arguments.inode(args, "parent"), typed(args, "name", bytes)
        new_parent, new_name = arguments.inode(args, "new_parent"), typed(args, "new_name", bytes)
        flags = arguments.number_or_zero(args, "flags")
        uid, gid = (arguments.optional_number(args, who, 0, U32_MAX) or 0 for who in ("uid", "gid"))

        def needs() -> Needs:
            moved, other = self._peek(parent, name), self._peek(new_parent, new_name)
            others = _kept(other) if flags == RENAME_EXCHANGE else _losing_a_name(other)
            return _merged((parent, Need.ENTRIES), (new_parent, Need.ENTRIES), *_kept(moved), *others)

        def apply() -> Value:
            now_ns = self.now_ns()
            ino, replaced, nlink = self._metadata.rename(parent, name, new_parent, new_name, flags, now_ns, (uid, gid))
            return {"ino": ino, "replaced": replaced, "replaced_nlink": nlink, "time_ns": now_ns}

        return Operation(
            needs=needs,
            apply=apply,
            leases=lambda reply: {"dir_lease": parent, "new_dir_lease": new_parent},
            orphans=lambda reply: (
                [InodeNo(reply["replaced"])] if reply["replaced"] and not reply["replaced_nlink"] else []
            ),
        )


def _kept(attr: list[int] | None) -> list[tuple[InodeNo, Need]]:
    return [] if attr is None else [(InodeNo(attr[_INO]), Need.ATTRIBUTES)]


def _losing_a_name(attr: list[int] | None) -> list[tuple[InodeNo, Need]]:
    """An inode that loses its last name leaves all caches, so that those who do not have it open let it
    go."""
    if attr is None:
        return []
    last = stat.S_ISDIR(attr[_MODE]) or attr[_NLINK] <= 1
    return [(InodeNo(attr[_INO]), Need.ENTRIES if last else Need.ATTRIBUTES)]


def _merged(*needs: tuple[InodeNo, Need]) -> Needs:
    """One need per inode, the strongest."""
    merged: Needs = {}
    for ino, need in needs:
        known = merged.get(ino)
        if known is None or _STRENGTH[need] > _STRENGTH[known]:
            merged[ino] = need
    return merged


def lease_of_new(attr: list[int]) -> int:
    """What its maker gets on a new inode, which nobody else can know: a file is usually written next."""
    return WRITE if stat.S_ISREG(attr[_MODE]) else READ
