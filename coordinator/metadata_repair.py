"""Repairs of a volume's metadata: what metadata_check.py found, mended without losing data.

Place      coordinator floor; above metadata.py, below check_desk.py. Every method runs within a batch.
Rule       a repair believes nothing that was found before: it looks anew, within its batch, and does what is right then.
           For that it may read a whole table, which holds the volume up for as long as that takes (about a second for a
           million rows): damage is rare.
Kept       what can still be read stays readable: an inode that lost its name gets one in /lost+found, `#` and its number.
           Blocks that nobody owns are trimmed before they are free. Blocks with two owners and symlinks without a
           target are beyond mending, and only reported.
"""

import stat
from collections.abc import Callable

from coordinator.consistency import has_shared_blocks
from coordinator.inodes import Inode
from coordinator.metadata import Metadata
from coordinator.metadata_check import Finding
from coordinator.space import Piece
from csvfs.errors import NotFound
from csvfs.ids import ROOT_INODE, InodeNo

LOST_AND_FOUND = b"lost+found"
_NAMES_OF = "SELECT parent, cookie, name FROM entries WHERE ino = ?"
_SUBDIRECTORIES = """
SELECT count(*) FROM entries e JOIN inodes i ON i.ino = e.ino WHERE e.parent = ? AND (i.mode & 61440) = 16384
"""
_OWNERS = "SELECT slab_block, count FROM extents WHERE slab = ?1 UNION ALL SELECT block, count FROM trims WHERE slab = ?1"
_REPLACING = " UNION ALL SELECT slab_block, count FROM replacements WHERE slab = ?1"


class MetadataRepair:
    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._database = metadata.database
        self._inodes = metadata.inodes
        self._names = metadata.names
        self._repairs: dict[str, Callable[..., str]] = {
            "counters": self._counters,
            "orphan": self._orphan,
            "target": self._target,
            "xattrs": self._xattrs,
            "blocks": self._blocks,
            "entry": self._entry,
            "dotdot": self._dotdot,
            "links": self._links,
            "nameless": self._links,
            "names": self._one_name,
            "detached": self._detached,
            "extents": self._extents,
            "slab": self._slab,
            "rows": self._rows,
            "locks": self._locks,
        }
        self.orphans: list[int] = []  # inodes that may be let go now

    def can(self, finding: Finding) -> bool:
        return finding.kind in self._repairs

    def inodes_of(self, finding: Finding) -> set[InodeNo]:
        """Which nobody may cache anything of while it is mended."""
        about = {"entry": (0, 2), "dotdot": (0, 1), "slab": (), "locks": (), "counters": (), "rows": (1,)}
        indexes = about.get(finding.kind, (0,))
        inos = {InodeNo(finding.about[index]) for index in indexes if finding.about}
        if finding.kind in ("entry", "links", "nameless", "detached", "names"):
            inos.add(InodeNo(ROOT_INODE))
            row = self._lost_and_found()
            inos |= {InodeNo(row)} if row else set()
        return {ino for ino in inos if ino > 0}

    def mend(self, finding: Finding, now_ns: int) -> str:
        """What was done; empty: there was nothing to do any more. Raises Corrupt, NoSpace."""
        self._database.flush()
        self._inodes.reread()
        self._metadata.space.reread()
        self._now_ns = now_ns
        return self._repairs[finding.kind](*finding.about)

    # -- counts ----------------------------------------------------------------------------------

    def _counters(self) -> str:
        counters = self._database.counters
        before = str(counters)
        one = self._one
        counters.files = one("SELECT count(*) FROM inodes")
        counters.free_blocks = one("SELECT ifnull(sum(free), 0) FROM slabs")
        counters.slab_blocks = one("SELECT ifnull(sum(blocks), 0) FROM slabs")
        trimmed = one("SELECT ifnull(sum(count), 0) FROM trims")
        counters.used_blocks = counters.slab_blocks - counters.free_blocks - trimmed
        counters.next_ino = max(counters.next_ino, 1 + one("SELECT ifnull(max(ino), 0) FROM inodes"))
        counters.next_slab = max(counters.next_slab, 1 + one("SELECT ifnull(max(id), 0) FROM slabs"))
        counters.next_trim = max(counters.next_trim, 1 + one("SELECT ifnull(max(id), 0) FROM trims"))
        return "counted anew" if str(counters) != before else ""

    def _xattrs(self, ino: int) -> str:
        inode = self._there(ino)
        found = self._one("SELECT count(*) FROM xattrs WHERE ino = ?", ino)
        if inode is None or inode.xattrs == found:
            return ""
        inode.xattrs = found
        self._inodes.changed(inode)
        return f"counted {found}"

    def _blocks(self, ino: int) -> str:
        inode = self._there(ino)
        found = self._one("SELECT ifnull(sum(count), 0) FROM extents WHERE ino = ?", ino)
        if inode is None or inode.blocks == found:
            return ""
        inode.blocks = found
        self._inodes.changed(inode)
        return f"counted {found}"

    # -- names -----------------------------------------------------------------------------------

    def _links(self, ino: int) -> str:
        """Counted anew; without a name it gets one, if it is meant to have one."""
        inode = self._there(ino)
        if inode is None:
            return ""
        names = self._database.rows(_NAMES_OF, (ino,))
        if not names and ino != ROOT_INODE:
            return self._adopt(inode) if inode.nlink else ""
        below = self._one(_SUBDIRECTORIES, ino) if inode.is_directory else 0
        want = 2 + below if inode.is_directory else len(names)
        said = ""
        if inode.nlink != want:
            inode.nlink, said = want, f"counted {want}"
            self._inodes.changed(inode)
        return self._listed(inode) or said

    def _orphan(self, ino: int) -> str:
        return self._links(ino) or self._listed(self._there(ino))

    def _listed(self, inode: Inode | None) -> str:
        """Whether it stands in the table of orphans follows its links."""
        if inode is None:
            return ""
        is_listed = bool(self._one("SELECT count(*) FROM orphans WHERE ino = ?", inode.ino))
        if is_listed == (inode.nlink == 0):
            return ""
        if is_listed:
            self._database.run("DELETE FROM orphans WHERE ino = ?", (inode.ino,))
            return f"it has {inode.nlink} names: not let go"
        self._database.run("INSERT INTO orphans(ino) VALUES(?)", (inode.ino,))
        self.orphans.append(inode.ino)
        return "nobody names it: let go"

    def _entry(self, parent: int, cookie: int, ino: int) -> str:
        """Taken away; what it led to keeps that name where it can, or gets another one."""
        rows = self._database.rows("SELECT name FROM entries WHERE parent = ? AND cookie = ? AND ino = ?", (parent, cookie, ino))
        if not rows:
            return ""
        name, inode, holder = rows[0][0], self._there(ino), self._there(parent)
        self._database.run("DELETE FROM entries WHERE parent = ? AND cookie = ?", (parent, cookie))
        if inode is None:
            return "taken away"
        if holder is not None and holder.is_directory and holder.nlink:
            found, free_cookie = self._names.find_entry(parent, name)
            if found is None:
                self._add(parent, free_cookie, name, inode)
                return "put where it is looked for"
        return self._links(ino) or "taken away: what it led to has other names"

    def _dotdot(self, ino: int, parent: int, cookie: int) -> str:
        inode = self._there(ino)
        names = self._database.rows(_NAMES_OF, (ino,))
        if inode is None or len(names) != 1 or names[0][0] == inode.parent:
            return ""
        inode.parent = names[0][0]
        self._inodes.changed(inode)
        return f"`..` is {inode.parent} now"

    def _one_name(self, ino: int) -> str:
        """A directory keeps the name where its `..` says that it is."""
        inode = self._there(ino)
        names = self._database.rows(_NAMES_OF, (ino,))
        if inode is None or len(names) < 2:
            return ""
        kept = next((row for row in names if row[0] == inode.parent), names[0])
        inode.parent = kept[0]
        for parent, cookie, _ in names:
            if (parent, cookie) != kept[:2]:
                self._database.run("DELETE FROM entries WHERE parent = ? AND cookie = ?", (parent, cookie))
        self._inodes.changed(inode)
        self._recount(*{row[0] for row in names}, ino)
        return f"keeps its name {kept[2]!r} in directory {kept[0]}"

    def _detached(self, ino: int) -> str:
        inode, seen, above = self._there(ino), {ino}, 0
        if inode is None or not inode.nlink:
            return ""
        above = inode.parent
        while above != ROOT_INODE and above not in seen:
            seen.add(above)
            up = self._there(above)
            if up is None or not up.nlink:
                break
            above = up.parent
        if above == ROOT_INODE:
            return ""
        names = self._database.rows(_NAMES_OF, (ino,))
        self._database.run("DELETE FROM entries WHERE ino = ?", (ino,))
        said = self._adopt(inode)
        self._recount(*(row[0] for row in names))
        return said

    def _adopt(self, inode: Inode) -> str:
        """A name in /lost+found."""
        below = self._one(_SUBDIRECTORIES, inode.ino) if inode.is_directory else 0
        home = self._lost_and_found()
        if not home:
            mode = stat.S_IFDIR | 0o700
            home = self._metadata.make(ROOT_INODE, LOST_AND_FOUND, mode, 0, 0, 0, b"", self._now_ns)[0]
        name = b"#%d" % inode.ino
        found, free_cookie = self._names.find_entry(home, name)
        while found is not None:
            name += b"_"
            found, free_cookie = self._names.find_entry(home, name)
        inode.nlink = 2 + below if inode.is_directory else 0
        self._add(home, free_cookie, name, inode)
        self._database.run("DELETE FROM orphans WHERE ino = ?", (inode.ino,))
        return f"named /{LOST_AND_FOUND.decode()}/{name.decode()}"

    def _add(self, parent: int, cookie: int, name: bytes, inode: Inode) -> None:
        self._database.run("INSERT INTO entries(parent, cookie, name, ino) VALUES(?,?,?,?)", (parent, cookie, name, inode.ino))
        if inode.is_directory:
            inode.parent = parent
        self._inodes.changed(inode)
        self._metadata.quota_trees.moved(inode, parent)
        self._recount(parent, inode.ino)

    def _recount(self, *inos: int) -> None:
        """Links of inodes that have names, after names have changed."""
        self._database.flush()
        for ino in inos:
            inode = self._there(ino)
            if inode is not None:
                named = self._one("SELECT count(*) FROM entries WHERE ino = ?", ino)
                inode.nlink = 2 + self._one(_SUBDIRECTORIES, ino) if inode.is_directory else named
                self._inodes.changed(inode)
        self._database.flush()

    def _lost_and_found(self) -> int:
        """Its number; 0: there is none."""
        attr = self._metadata.lookup(ROOT_INODE, LOST_AND_FOUND)
        return attr[0] if attr is not None and stat.S_ISDIR(attr[1]) else 0

    # -- space -----------------------------------------------------------------------------------

    def _slab(self, slab: int) -> str:
        """Its bitmap says who has which block: owners are believed, and what nobody owns is trimmed, then free."""
        if not self._one("SELECT count(*) FROM slabs WHERE id = ?", slab):
            return ""
        blocks, free, packed = self._database.rows("SELECT blocks, free, bitmap FROM slabs WHERE id = ?", (slab,))[0]
        owned = 0
        owners = _OWNERS + _REPLACING * has_shared_blocks(self._database)
        for block, count in self._database.rows(owners, (slab,)):
            if block >= 0 and count > 0 and block + count <= blocks:
                owned |= (1 << count) - 1 << block
        bits = int.from_bytes(packed, "little") & (1 << blocks) - 1
        leaked, missed = bits & ~owned, owned & ~bits
        taken = (bits | owned).bit_count()
        if not leaked and not missed and free == blocks - taken:
            return ""
        self._metadata.space.correct(slab, bits | owned)
        self._metadata.space.free_blocks_of(slab, leaked)
        return f"{leaked.bit_count()} blocks are trimmed, then free; {missed.bit_count()} are not free any more"

    def _extents(self, ino: int) -> str:
        if self._there(ino) is not None:
            return ""
        rows = self._database.rows("SELECT slab, slab_block, count FROM extents WHERE ino = ?", (ino,))
        if not rows:
            return ""
        self._database.run("DELETE FROM extents WHERE ino = ?", (ino,))
        freed = sum(piece.count for piece in self._metadata.shared.release([Piece(*row) for row in rows]))
        self._database.counters.used_blocks -= freed
        for slab in sorted({row[0] for row in rows}):
            self._slab(slab)
        return f"{freed} blocks are trimmed, then free"

    # -- rows of nobody --------------------------------------------------------------------------

    def _rows(self, table: str, ino: int) -> str:
        assert table in ("xattrs", "symlinks", "locks", "orphans")
        if self._there(ino) is not None:
            return ""
        self._database.run(f"DELETE FROM {table} WHERE ino = ?", (ino,))
        return "taken away" if self._database.changes() else ""

    def _locks(self, session: int) -> str:
        if self._one("SELECT count(*) FROM sessions WHERE id = ?", session):
            return ""
        self._database.run("DELETE FROM locks WHERE session = ?", (session,))
        return "taken away" if self._database.changes() else ""

    def _target(self, ino: int) -> str:
        inode = self._there(ino)
        if inode is None or stat.S_ISLNK(inode.mode):
            return ""
        self._database.run("DELETE FROM symlinks WHERE ino = ?", (ino,))
        return "taken away" if self._database.changes() else ""

    # -- looking ---------------------------------------------------------------------------------

    def _one(self, statement: str, *bindings: int) -> int:
        return int(self._database.rows(statement, bindings)[0][0])

    def _there(self, ino: int) -> Inode | None:
        try:
            return self._inodes.get(ino)
        except NotFound:
            return None
