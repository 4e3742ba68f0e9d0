"""A coordinator in memory for several file tables: files, layouts, and the real lease table.

Recalls are sent and waited for as the real one does it. `delay` scheduler turns pass before and after each
call is carried out; `faults` maps a call's name to errors that its next calls raise instead, `after` likewise
but once they have been carried out (the answer got lost). `trims` freed blocks at once, as the real one
before it grants them anew.
"""

import stat
from typing import Any, Protocol

import trio

from coordinator.lease_table import READ, WRITE, Action, Grant, LeaseTable, Need, Recall, SessionKey, Ticket
from csvfs.errors import BadRequest, Conflict, CsvfsError, NotFound
from csvfs.ids import Incarnation, InodeNo, NodeName
from csvfs.units import BLOCK_SIZE
from tests.fake_bus import Drives, descriptor

SLAB_BLOCKS = 64  # small, so that files cross slabs
_NEEDS = {1: Need.OPEN, 2: Need.READ, 3: Need.WRITE}


class Holder(Protocol):
    async def recall(self, ino: int, kind: int, attr: bool) -> dict[str, Any]: ...
    def query(self, ino: int) -> dict[str, Any] | None: ...


class File:
    def __init__(self, ino: int, mode: int) -> None:
        self.ino = ino
        self.mode = mode
        self.size = 0
        self.atime = self.mtime = self.ctime = 1000
        self.blocks: dict[int, tuple[int, int]] = {}  # file block -> (slab, slab block)

    def attr(self) -> list:
        times = [self.atime, self.mtime, self.ctime]
        return [self.ino, self.mode, 1, 0, 0, 0, self.size, 8 * len(self.blocks), *times, 1, 0]


class FakeCoordinator:
    def __init__(self, drives: Drives, nursery: trio.Nursery) -> None:
        self.drives = drives
        drives.may_write = lambda slab, block: self.owners((slab, block)) < 2
        self.set_aside: dict[tuple[int, int], tuple[int, int]] = {}  # (inode, block) -> (slab, slab block)
        self.nursery = nursery
        self.table = LeaseTable()
        self.holders: dict[SessionKey, Holder] = {}
        self.files: dict[int, File] = {}
        self.clone_max = 1 << 20  # blocks of one `clone`
        self.ahead = 0  # blocks given beyond what was asked for
        self.delay = 1
        self.next_block = 1
        self.clock = 1000
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.faults: dict[str, list[CsvfsError]] = {}
        self.after: dict[str, list[CsvfsError]] = {}
        self._granted: dict[Ticket, trio.Event] = {}

    def session(self, node: str) -> "FakeSession":
        return FakeSession(self, (NodeName(node), Incarnation(1)))

    def add_file(self, ino: int, mode: int = stat.S_IFREG | 0o644) -> File:
        file = self.files[ino] = File(ino, mode)
        return file

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    # -- leases

    async def take(self, session: SessionKey, ino: int, need: Need) -> Ticket:
        ticket, actions = self.table.begin(session, {InodeNo(ino): need})
        if not ticket.granted:
            event = self._granted[ticket] = trio.Event()
            self.perform(actions)
            try:
                with trio.fail_after(30):
                    await event.wait()
            except BaseException:
                self.perform(self.table.finish(ticket))
                raise
            del self._granted[ticket]
        else:
            self.perform(actions)
        return ticket

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Grant):
                self._granted[action.ticket].set()
            else:
                self.nursery.start_soon(self._recall, action)

    async def _recall(self, recall: Recall) -> None:
        await self._pass_time()
        answer = await self.holders[recall.session].recall(recall.ino, recall.to_kind, recall.attr)
        file = self.files.get(recall.ino)
        wrote = self.table.held(recall.session, recall.ino) == WRITE
        if file is not None and wrote and isinstance(answer["size"], int):
            file.size = max(file.size, answer["size"])
            file.mtime = answer["mtime_ns"] or file.mtime
        if file is not None and self.table.held(recall.session, recall.ino) >= READ:
            file.atime = max(file.atime, answer["atime_ns"] or 0)
        await self._pass_time()
        self.perform(self.table.answer(recall.session, recall.ino, answer["kind"]))

    # -- calls

    async def _pass_time(self) -> None:
        for _ in range(self.delay):
            await trio.lowlevel.checkpoint()

    async def call(self, session: SessionKey, name: str, args: dict[str, Any]) -> Any:
        self.calls.append((name, args))
        await self._pass_time()
        if self.faults.get(name):
            raise self.faults[name].pop(0)
        value = await getattr(self, f"_{name}")(session, **args)
        await self._pass_time()
        if self.after.get(name):
            raise self.after[name].pop(0)
        return value

    def _file(self, ino: int) -> File:
        if ino not in self.files:
            raise NotFound(f"inode {ino}")
        return self.files[ino]

    def owners(self, where: tuple[int, int]) -> int:
        return sum(1 for file in self.files.values() for found in file.blocks.values() if found == where)

    def _free(self, file: File, at: int) -> None:
        """Another file has the block's place now, unless another one had it already."""
        where = file.blocks.pop(at)
        if not self.owners(where):
            self.drives.give_away(*where)

    def _layout(self, file: File, block: int, count: int) -> dict[str, Any]:
        rows: list[list[int]] = []
        for at in sorted(b for b in file.blocks if block <= b < block + count):
            slab, slab_block = file.blocks[at]
            if rows and rows[-1][0] + rows[-1][1] == at and rows[-1][2:] == [slab, slab_block - rows[-1][1]]:
                rows[-1][1] += 1
            else:
                rows.append([at, 1, slab, slab_block])
        shared = [
            [at, 1] for at, where in file.blocks.items() if block <= at < block + count and self.owners(where) > 1
        ]
        slabs = [descriptor(slab).to_wire() for slab in {row[2] for row in rows}]
        return {"extents": rows, "slabs": slabs, "shared": shared}

    async def _acquire(self, session: SessionKey, ino: int, kind: int, block: int, count: int) -> dict:
        ticket = await self.take(session, ino, _NEEDS[kind])
        file = self._file(ino)
        reply = {"lease": self.table.held(session, InodeNo(ino)), "attr": file.attr()}
        reply |= self._layout(file, block, count)
        self.perform(self.table.finish(ticket))
        return reply

    async def _getattr(self, session: SessionKey, ino: int) -> dict:
        file = self._file(ino)
        serial = self.table.try_read(session, InodeNo(ino))
        writer = self.table.writer(InodeNo(ino))
        attr = file.attr()
        if writer is not None and writer != session:
            told = self.holders[writer].query(ino)
            if told is not None:
                attr[6], attr[9] = told["size"], told["mtime_ns"] or attr[9]
                attr[8] = told["atime_ns"] or attr[8]
        return {"attr": attr, "lease": self.table.lease_at_send(session, InodeNo(ino), serial)}

    def _check_writer(self, session: SessionKey, ino: int) -> None:
        if self.table.held(session, InodeNo(ino)) < WRITE:
            raise Conflict(f"inode {ino}: {session} does not hold the write lease")

    async def _allocate(
        self, session: SessionKey, ino: int, block: int, count: int, size: int, mtime_ns: int
    ) -> dict:
        self._check_writer(session, ino)
        file = self._file(ino)
        given = count + self.ahead
        for at in range(block, block + given):
            if at not in file.blocks:
                file.blocks[at] = divmod(self.next_block, SLAB_BLOCKS)
                self.next_block += 1
        file.size = max(file.size, size)
        file.mtime = mtime_ns or file.mtime
        self._changed(file)
        return {"attr": file.attr(), **self._layout(file, block, given)}

    async def _commit(
        self, session: SessionKey, ino: int, size: int, mtime_ns: int, atime_ns: int | None
    ) -> dict:
        if size or mtime_ns:
            self._check_writer(session, ino)
        file = self._file(ino)
        file.size = max(file.size, size)
        file.mtime = mtime_ns or file.mtime
        self._changed(file)
        return {}

    async def _accessed(self, session: SessionKey, items: list[list[int]]) -> dict:
        for ino, atime_ns in items:
            if self.table.held(session, InodeNo(ino)) >= READ and ino in self.files:
                self.files[ino].atime = max(self.files[ino].atime, atime_ns)
        return {}

    async def _punch(self, session: SessionKey, ino: int, block: int, count: int) -> dict:
        self._check_writer(session, ino)
        file = self._file(ino)
        for at in [at for at in file.blocks if block <= at < block + count]:
            self._free(file, at)
        self._changed(file)
        return {"attr": file.attr(), "reached": block}

    async def _clone(
        self, session: SessionKey, ino: int, block: int, count: int, target: int, target_block: int
    ) -> dict:
        """At most `clone_max` blocks at once."""
        count = min(count, self.clone_max)
        source, into = self._file(ino), self._file(target)
        self._check_writer(session, ino)
        self._check_writer(session, target)
        if (block + count) * BLOCK_SIZE > source.size:
            raise BadRequest("over the end of the source")
        moved = {at - block + target_block: source.blocks[at] for at in source.blocks if block <= at < block + count}
        for at in [at for at in into.blocks if target_block <= at < target_block + count]:
            if moved.get(at) != into.blocks[at]:
                self._free(into, at)
        into.blocks.update(moved)
        into.size = max(into.size, (target_block + count) * BLOCK_SIZE)
        self._changed(into)
        return {"attr": into.attr(), "count": count, **self._layout(into, target_block, count)}

    async def _unshare(self, session: SessionKey, ino: int, block: int, count: int) -> dict:
        self._check_writer(session, ino)
        file, rows = self._file(ino), []
        for at in sorted(at for at in file.blocks if block <= at < block + count):
            if self.owners(file.blocks[at]) > 1:
                self.set_aside[ino, at] = where = divmod(self.next_block, SLAB_BLOCKS)
                self.next_block += 1
                rows.append([at, 1, *where])
        return {"rows": rows, "slabs": [descriptor(slab).to_wire() for slab in {row[2] for row in rows}]}

    async def _replace(self, session: SessionKey, ino: int, rows: list[list[int]]) -> dict:
        self._check_writer(session, ino)
        file = self._file(ino)
        for at, count, slab, slab_block in rows:
            if count != 1 or self.set_aside.pop((ino, at), None) != (slab, slab_block):
                raise Conflict("nothing was set aside")
            self._free(file, at)
            file.blocks[at] = (slab, slab_block)
        self._changed(file)
        return {"attr": file.attr()}

    async def _seek(self, session: SessionKey, ino: int, block: int, hole: bool) -> dict:
        file = self._file(ino)
        while block <= max(file.blocks, default=-1) and (block in file.blocks) == hole:
            block += 1
        return {"block": block if hole or block in file.blocks else 1 << 32, "found": True}

    async def _setattr(self, session: SessionKey, ino: int, **changes: Any) -> dict:
        size = changes.get("size")
        ticket = await self.take(session, ino, Need.ATTRIBUTES if size is None else Need.WRITE)
        file = self._file(ino)
        if size is not None:
            for at in [at for at in file.blocks if at >= -(-size // BLOCK_SIZE)]:
                where = file.blocks.pop(at)
                if not self.owners(where):
                    self.drives.trim(*where, 1)
            file.size = size
        file.mtime = changes.get("mtime_ns") or file.mtime
        if changes.get("mode") is not None:
            file.mode = stat.S_IFMT(file.mode) | changes["mode"]
        self._changed(file)
        reply = {"attr": file.attr(), "lease": self.table.held(session, InodeNo(ino))}
        self.perform(self.table.finish(ticket))
        return reply

    def _changed(self, file: File) -> None:
        self.clock += 1
        file.ctime = self.clock

    async def _release(self, session: SessionKey, items: list) -> dict:
        for ino, kind in items:
            self.perform(self.table.release(session, InodeNo(ino), kind))
        return {}

    async def _segments_flush(self, session: SessionKey, ino: int) -> dict:
        return {}  # no file is shared

    async def _fsync(self, session: SessionKey) -> dict:
        return {}

    async def _statfs(self, session: SessionKey, ino: int = 0) -> dict:
        return {"size": 1 << 30, "free": 1 << 29, "files": 10, "files_free": 90, "name_max": 255}

    def lookup(self, session: SessionKey, ino: int) -> dict:
        """What a lookup of the inode replies, at once."""
        serial = self.table.try_read(session, InodeNo(ino))
        lease = READ if serial is not None else 0
        return {"attr": self._file(ino).attr(), "lease": max(lease, self.table.held(session, InodeNo(ino)))}


class FakeSession:
    """One node's way to the coordinator."""

    def __init__(self, coordinator: FakeCoordinator, key: SessionKey) -> None:
        self.coordinator = coordinator
        self.key = key

    async def call(self, name: str, args: dict[str, Any]) -> Any:
        return await self.coordinator.call(self.key, name, args)
