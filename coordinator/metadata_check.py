"""The metadata check of a volume in use: goes through everything in small steps, between batches.

Place      coordinator floor; above metadata.py, below check_desk.py. Synchronous: no trio, no clock.
Steps      `steps` yields after every ROWS_PER_STEP rows. Between two of them others change what they like.
Truth      What can be judged from the rows of one step is judged there. What needs a whole table (how many names an inode
           has, who has which block) is counted over many steps, and counts only for inodes and slabs that did not
           change meanwhile (watch.py). The others are counted again, PASSES_MAX times; what changed all the time is
           `unchecked`, never a finding.
Memory     WINDOW_INODES inodes at a time with 16 B each, and 16 B for every directory; WINDOW_SLABS slabs at a time with
           a bit for every block (2 KiB for slabs of 64 MiB). Volumes of more are gone through several times.
Not here   what lies in the blocks: that is the scrub's.
"""

import stat
from array import array
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from coordinator import quotas
from coordinator.consistency import has_shared_blocks
from coordinator.metadata import Metadata
from coordinator.namespace import COOKIE_BUCKET
from csvfs.ids import ROOT_INODE

ROWS_PER_STEP = 500
SLABS_PER_STEP = 64
WINDOW_INODES = 1 << 20
WINDOW_SLABS = 4096
PASSES_MAX = 3
FINDINGS_MAX = 2000  # more are only counted: repair these, and check again
INTEGRITY_PAGES_MAX = 8192  # of 1 KiB. SQLite checks itself in one go: up to this size it takes some tens of ms

# One step's worth of each table, with what belongs to its rows.
_INODES = """
SELECT i.ino, i.mode, i.nlink, i.parent, i.blocks, i.xattrs,
  EXISTS(SELECT 1 FROM orphans o WHERE o.ino = i.ino), EXISTS(SELECT 1 FROM symlinks s WHERE s.ino = i.ino),
  (SELECT count(*) FROM xattrs x WHERE x.ino = i.ino), EXISTS(SELECT 1 FROM extents e WHERE e.ino = i.ino)
FROM inodes i WHERE i.ino > ? ORDER BY i.ino LIMIT ?
"""
_ENTRIES = """
SELECT e.parent, e.cookie, e.name, e.ino, i.mode, i.parent, p.mode, p.nlink FROM entries e
LEFT JOIN inodes i ON i.ino = e.ino LEFT JOIN inodes p ON p.ino = e.parent
WHERE (e.parent, e.cookie) > (?, ?) ORDER BY e.parent, e.cookie LIMIT ?
"""
_EXTENTS = """
SELECT e.ino, e.block, e.slab, e.slab_block, e.count, i.mode, i.blocks, s.blocks FROM extents e
LEFT JOIN inodes i ON i.ino = e.ino LEFT JOIN slabs s ON s.id = e.slab
WHERE (e.ino, e.block) > (?, ?) ORDER BY e.ino, e.block LIMIT ?
"""
_TRIMS = """
SELECT t.id, t.slab, t.block, t.count, s.blocks FROM trims t LEFT JOIN slabs s ON s.id = t.slab
WHERE t.id > ? ORDER BY t.id LIMIT ?
"""
_REPLACEMENTS = """
SELECT r.ino, r.block, r.slab, r.slab_block, r.count, s.blocks FROM replacements r LEFT JOIN slabs s ON s.id = r.slab
WHERE (r.ino, r.block) > (?, ?) ORDER BY r.ino, r.block LIMIT ?
"""
_PHASES = ("inodes", "names", "links", "directories", "space", "belongings", "counters")


@dataclass(frozen=True, slots=True)
class Finding:
    """kind: a key of metadata_repair.REPAIRS, or none of them: cannot be mended. about: what that wants to know."""

    kind: str
    text: str
    about: tuple = ()


class MetadataCheck:
    """One run over a volume's metadata."""

    def __init__(
        self,
        metadata: Metadata,
        *,
        is_forgotten: Callable[[int], bool] = lambda ino: False,
    ) -> None:
        """is_forgotten: nobody has this orphan open, and nobody is about to let it go."""
        self._metadata = metadata
        self._database = metadata.database
        self._watch = metadata.database.watch
        self._is_forgotten = is_forgotten
        self.findings: list[Finding] = []
        self.found = 0
        self.unchecked = 0  # inodes and slabs that changed all the time
        self.rows = 0
        self.skipped: list[str] = []
        self.phase = _PHASES[0]
        self.progress = 0.0  # of this phase, or of its present pass
        self._directories: tuple[array, array] = (array("q"), array("q"))  # numbers, parents

    @property
    def fraction(self) -> float:
        """Of the whole run, roughly; passes that are repeated do not count."""
        return (_PHASES.index(self.phase) + min(self.progress, 1.0)) / len(_PHASES)

    def steps(self) -> Generator[None, None, None]:
        """Run it from the first to the last step. No batch may be active at any of them. Raises Corrupt."""
        try:
            yield from self._names()
            yield from self._reachable()
            yield from self._space()
            yield from self._belongings()
            self._counters()
            self._integrity()
        finally:
            self._watch.end()

    def _find(self, kind: str, text: str, *about: object) -> None:
        self.found += 1
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(Finding(kind, text, about))

    def _begin(self, phase: str) -> None:
        self.phase, self.progress = phase, 0.0

    def _pages(self, statement: str, keys: int) -> Iterator[list[tuple]]:
        """A table's rows by the first `keys` columns, one step at a time; the caller yields in between."""
        assert not self._database.active, "a step stands between two batches"
        after: tuple = (0,) * keys
        while rows := self._database.rows(statement, (*after, ROWS_PER_STEP)):
            self.rows += len(rows)
            self.progress = rows[-1][0] / max(1, self._database.counters.next_ino)
            yield rows
            after = rows[-1][:keys]

    # -- names and links -------------------------------------------------------------------------

    def _names(self) -> Iterator[None]:
        self._watch.position = self._watch.files = 0
        self._watch.rolled_back = False
        files, window, is_first = 0, array("q"), True
        self._begin("inodes")
        self._watch.begin()
        for rows in self._pages(_INODES, 1):
            for row in rows:
                self._look_at_inode(*row)
            window.extend(row[0] for row in rows)
            files += len(rows)
            self._watch.position = rows[-1][0]
            if len(window) >= WINDOW_INODES:
                yield from self._links(window, is_first)
                window, is_first = array("q"), False
                self._begin("inodes")
            yield
        self._watch.position = self._database.counters.next_ino  # the step that found no more rows
        found = files + self._watch.files
        if not self._watch.rolled_back and found != self._database.counters.files:
            self._find("counters", f"{self._database.counters.files} files are counted, {found} exist")
        yield from self._links(window, is_first)

    def _look_at_inode(
        self, ino: int, mode: int, nlink: int, parent: int, blocks: int, xattrs: int,
        is_orphan: int, has_target: int, has_xattrs: int, has_extents: int,
    ) -> None:  # fmt: skip
        if stat.S_ISDIR(mode) and nlink:
            self._directories[0].append(ino)
            self._directories[1].append(parent)
        if (nlink == 0) != bool(is_orphan):
            which = "is not listed as an orphan" if nlink == 0 else "is listed as an orphan"
            self._find("orphan", f"inode {ino} of {nlink} links {which}", ino)
        if nlink == 0 and is_orphan and self._is_forgotten(ino):
            self._find("forgotten", f"inode {ino} has no name and nobody has it open: it was to be let go", ino)
        if stat.S_ISLNK(mode) != bool(has_target):
            self._find("target", f"inode {ino} of mode {mode:#o}: symlink target does not fit", ino)
        if xattrs != has_xattrs:
            self._find("xattrs", f"inode {ino} says {xattrs} attributes, has {has_xattrs}", ino)
        if blocks and not has_extents:
            self._find("blocks", f"inode {ino} says {blocks} blocks, has 0", ino)

    def _links(self, inos: array, is_first: bool) -> Iterator[None]:
        """Names and subdirectories of these inodes, which were seen since the watch began."""
        for _ in range(PASSES_MAX):
            names, below = array("I", bytes(4 * len(inos))), array("I", bytes(4 * len(inos)))
            self._begin("names")
            bucket: set[bytes] = set()
            last = (0, 0)
            for rows in self._pages(_ENTRIES, 2):
                for parent, cookie, name, ino, mode, up, holder_mode, holder_nlink in rows:
                    if is_first:
                        where = (parent, cookie // COOKIE_BUCKET)
                        bucket, last = (bucket, last) if where == last else (set(), where)
                        self._look_at_entry(parent, cookie, name, ino, mode, up, holder_mode, holder_nlink, bucket)
                        bucket.add(name)
                    _count(inos, names, ino)
                    if mode is not None and stat.S_ISDIR(mode):
                        _count(inos, below, parent)
                yield
            self._begin("links")
            changed = array("q")
            yield from self._compare_links(inos, names, below, changed)
            inos, is_first = changed, False
            self._watch.begin()
            if not inos:
                return
        self.unchecked += len(inos)

    def _look_at_entry(
        self, parent: int, cookie: int, name: bytes, ino: int, mode: int | None, up: int,
        holder_mode: int | None, holder_nlink: int, bucket: set[bytes],
    ) -> None:  # fmt: skip
        about = (parent, cookie, ino)
        text = f"entry {name!r} of directory {parent}"
        if mode is None:
            self._find("entry", f"{text} leads to inode {ino}, which does not exist", *about)
        elif holder_mode is None or not stat.S_ISDIR(holder_mode) or not holder_nlink:
            self._find("entry", f"{text}, which is no directory that exists, leads to inode {ino}", *about)
        elif name in bucket or cookie // COOKIE_BUCKET != self._metadata.names.bucket(name) // COOKIE_BUCKET:
            self._find("entry", f"{text} is there twice, or is not where it is looked for", *about)
        elif stat.S_ISDIR(mode) and up != parent:
            self._find("dotdot", f"directory {ino} is in {parent}, its `..` says {up}", ino, parent, cookie)

    def _compare_links(self, inos: array, names: array, below: array, changed: array) -> Iterator[None]:
        for start in range(0, len(inos), ROWS_PER_STEP):
            some = inos[start : start + ROWS_PER_STEP]
            marks = ",".join("?" * len(some))
            rows = self._database.rows(f"SELECT ino, mode, nlink FROM inodes WHERE ino IN ({marks})", tuple(some))
            for ino, mode, nlink in rows:
                if self._watch.overflowed or ino in self._watch.inodes:
                    changed.append(ino)
                    continue
                index = bisect_left(inos, ino)
                self._compare(ino, mode, nlink, names[index], below[index])
            self.rows += len(rows)
            self.progress = start / len(inos)
            yield

    def _compare(self, ino: int, mode: int, nlink: int, named: int, below: int) -> None:
        is_directory = stat.S_ISDIR(mode)
        named += ino == ROOT_INODE
        want = (2 + below if named else 0) if is_directory else named
        if nlink and not named:
            self._find("nameless", f"inode {ino} says {nlink} links, has no name", ino)
        elif is_directory and named > 1:
            self._find("names", f"directory {ino} has {named} names", ino)
        elif nlink != want:
            self._find("links", f"inode {ino} says {nlink} links, has {want}", ino)

    def _reachable(self) -> Iterator[None]:
        """Directories from which no way leads up to the root."""
        self._begin("directories")
        inos, parents = self._directories
        leads_up = bytearray(len(inos))  # 1: it does; 2: not known yet, being followed
        for start in range(len(inos)):
            path, index = [], start
            while not leads_up[index] and inos[index] != ROOT_INODE:
                leads_up[index] = 2
                path.append(index)
                up = bisect_left(inos, parents[index])
                if up == len(inos) or inos[up] != parents[index]:
                    break
                index = up
            else:
                if leads_up[index] != 2:
                    path.append(index)
                    for index in path:
                        leads_up[index] = 1
                    path = []
            if path and not self._leads_up(inos[start]):  # as it is now
                self._find("detached", f"directory {inos[start]} is below itself, or below what is gone", inos[start])
            for index in path:
                leads_up[index] = 1  # said once
            self.progress = start / len(inos)
            if start % ROWS_PER_STEP == 0:
                yield
        self._directories = (array("q"), array("q"))

    def _leads_up(self, ino: int) -> bool:
        """Or it is gone."""
        seen: set[int] = set()
        while ino != ROOT_INODE:
            rows = self._database.rows("SELECT parent, nlink FROM inodes WHERE ino = ?", (ino,))
            if not rows or not rows[0][1]:
                return not seen  # the directory itself
            seen.add(ino)
            ino = rows[0][0]
            if ino in seen:
                return False
        return True

    # -- space -----------------------------------------------------------------------------------

    def _space(self) -> Iterator[None]:
        after, is_first = 0, True
        while True:
            rows = self._database.rows("SELECT id FROM slabs WHERE id > ? ORDER BY id LIMIT ?", (after, WINDOW_SLABS))
            if not rows and not is_first:
                return
            self._watch.begin()
            yield from self._owners([slab for (slab,) in rows], is_first)
            after, is_first = rows[-1][0] if rows else after, False

    def _owners(self, slabs: list[int], is_first: bool) -> Iterator[None]:
        """Who has which block of these slabs; `is_first`: look at every extent as such, too."""
        for _ in range(PASSES_MAX):
            self._begin("space")
            taken, shared = dict.fromkeys(slabs, 0), dict[int, tuple[int, int]]()
            owner: tuple[int, int | None, int | None] = (0, 0, 0)  # inode, mode, blocks
            has = end = 0  # its extents so far
            for rows in self._pages(_EXTENTS, 2):
                for ino, block, slab, slab_block, count, mode, blocks, room in rows:
                    if is_first:
                        if ino != owner[0]:
                            self._look_at_blocks(*owner, has)
                            has = end = 0
                        owner, has = (ino, mode, blocks), has + count
                        self._look_at_extent(ino, block, slab, slab_block, count, mode, room, end)
                        end = block + count
                    self._take(taken, shared, slab, slab_block, count, room, may_share=True)
                yield
            if is_first:
                self._look_at_blocks(*owner, has)
            after = 0
            while rows := self._database.rows(_TRIMS, (after, ROWS_PER_STEP)):
                for _, slab, block, count, room in rows:
                    if is_first and not _fits(block, count, room):
                        self._find("trim", f"blocks {block}+{count} of slab {slab} are to be trimmed, but do not exist")
                    self._take(taken, shared, slab, block, count, room)
                after = rows[-1][0]
                yield
            if has_shared_blocks(self._database):
                for rows in self._pages(_REPLACEMENTS, 2):
                    for _, _, slab, block, count, room in rows:
                        self._take(taken, shared, slab, block, count, room)
                    yield
            changed: list[int] = []
            yield from self._compare_slabs(slabs, taken, shared, changed)
            slabs, is_first = changed, False
            self._watch.begin()
            if not slabs:
                return
        self.unchecked += len(slabs)

    def _look_at_blocks(self, ino: int, mode: int | None, blocks: int | None, has: int) -> None:
        """The last extent of an inode has been seen."""
        if ino and mode is not None and blocks != has and not self._changes(ino):
            self._find("blocks", f"inode {ino} says {blocks} blocks, has {has}", ino)

    def _changes(self, ino: int) -> bool:
        if ino in self._watch.inodes or self._watch.overflowed:
            self.unchecked += 1
            return True
        return False

    def _look_at_extent(
        self, ino: int, block: int, slab: int, slab_block: int, count: int, mode: int | None, room: int | None, end: int
    ) -> None:
        text = f"inode {ino}: blocks {block}+{count}"
        if mode is None:
            self._find("extents", f"{text} belong to no inode", ino)
        elif not stat.S_ISREG(mode):
            self._find("no file", f"{text}, though its mode is {mode:#o}")
        if count <= 0 or (block < end and ino not in self._watch.inodes):
            self._find("extent", f"{text} overlap what is before, or are none")
        if not _fits(slab_block, count, room):
            where = f"slab {slab}, which does not exist" if room is None else f"slab {slab}, which has {room} blocks"
            self._find("extent", f"{text} are to be blocks {slab_block}+{count} of {where}")

    def _take(
        self, taken: dict[int, int], shared: dict[int, tuple[int, int]], slab: int, block: int, count: int,
        room: int | None, *, may_share: bool = False,
    ) -> None:  # fmt: skip
        bits = taken.get(slab)
        if bits is None or not _fits(block, count, room):
            return
        mask = (1 << count) - 1 << block
        if bits & mask and not (may_share and self._are_shared(slab, bits & mask)):
            shared.setdefault(slab, (block, count))
        taken[slab] = bits | mask

    def _are_shared(self, slab: int, blocks: int) -> bool:
        """Whether each of these (bit n: block n) may be in several files (clones)."""
        if not has_shared_blocks(self._database):
            return False
        end = blocks.bit_length()
        for block, count in self._database.rows("SELECT block, count FROM shared WHERE slab = ? AND block < ?", (slab, end)):
            blocks &= ~((1 << count) - 1 << block)
        return not blocks

    def _compare_slabs(
        self, slabs: list[int], taken: dict[int, int], shared: dict[int, tuple[int, int]], changed: list[int]
    ) -> Iterator[None]:
        for start in range(0, len(slabs), SLABS_PER_STEP):
            some = slabs[start : start + SLABS_PER_STEP]
            marks = ",".join("?" * len(some))
            rows = self._database.rows(f"SELECT id, blocks, free, bitmap FROM slabs WHERE id IN ({marks})", some)
            for slab, blocks, free, bitmap in rows:
                if self._watch.overflowed or slab in self._watch.slabs:
                    changed.append(slab)
                    continue
                if slab in shared:
                    block, count = shared[slab]
                    self._find("shared", f"blocks {block}+{count} of slab {slab} have two owners")
                bits = int.from_bytes(bitmap, "little")
                leaked, missed = (bits & ~taken[slab]).bit_count(), (taken[slab] & ~bits).bit_count()
                if leaked or missed:
                    text = f"{leaked} blocks have no owner and are not free, {missed} have one and count as free"
                    self._find("slab", f"slab {slab}: {text}", slab)
                elif free != blocks - bits.bit_count():
                    self._find("slab", f"slab {slab} says {free} free blocks, has {blocks - bits.bit_count()}", slab)
            self.rows += len(rows)
            yield

    # -- the rest --------------------------------------------------------------------------------

    def _belongings(self) -> Iterator[None]:
        """Rows of inodes that are gone."""
        self._begin("belongings")
        for table in ("xattrs", "symlinks", "locks", "orphans"):
            statement = f"SELECT DISTINCT ino FROM {table} WHERE ino > ? ORDER BY ino LIMIT ?"
            for rows in self._pages(statement, 1):
                inos = [ino for (ino,) in rows]
                there = self._metadata.inodes.sizes(inos)
                for ino in inos:
                    if ino not in there:
                        self._find("rows", f"{table} of inode {ino}, which does not exist", table, ino)
                yield
        lost = self._database.rows("SELECT DISTINCT session FROM locks WHERE session NOT IN (SELECT id FROM sessions)")
        for (session,) in lost:
            self._find("locks", f"file locks of session {session}, which is over", session)

    def _counters(self) -> None:
        self._begin("counters")
        counters = self._database.counters
        ((blocks, free),) = self._database.rows("SELECT ifnull(sum(blocks), 0), ifnull(sum(free), 0) FROM slabs")
        ((trimmed,),) = self._database.rows("SELECT ifnull(sum(count), 0) FROM trims")
        found = (blocks - free - trimmed, free, blocks)
        counted = (counters.used_blocks, counters.free_blocks, counters.slab_blocks)
        if counted != found:
            self._find("counters", f"used, free and all blocks are counted as {counted}, are {found}")
        for table, key, following in (
            ("inodes", "ino", counters.next_ino), ("slabs", "id", counters.next_slab), ("trims", "id", counters.next_trim),
        ):  # fmt: skip
            ((last,),) = self._database.rows(f"SELECT ifnull(max({key}), 0) FROM {table}")
            if last >= following:
                self._find("counters", f"number {last} is in {table}, the next is to be {following}")

    def _integrity(self) -> None:
        ((pages,),) = self._database.rows("PRAGMA page_count")
        if pages > INTEGRITY_PAGES_MAX:
            self.skipped.append(f"SQLite's own check, and that of quotas: {pages} pages would hold up the volume; all rows were read")
            return
        for (text,) in self._database.rows("PRAGMA integrity_check"):
            if text != "ok":
                self._find("sqlite", f"sqlite: {text}")
        for text in quotas.problems(self._database):
            self._find("quota", text)


def _count(inos: array, counts: array, ino: int) -> None:
    index = bisect_left(inos, ino)
    if index < len(inos) and inos[index] == ino:
        counts[index] += 1


def _fits(block: int, count: int, room: int | None) -> bool:
    return room is not None and block >= 0 and count > 0 and block + count <= room
