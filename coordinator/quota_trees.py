"""Quota trees: which inodes count for the quota of a directory, when it is set, and as names come and move.

Place      coordinator floor; above inodes.py and quotas.py, below metadata.py. Synchronous.
Owns       table quota_walk: directories whose entries still have to be counted, each with the cookie it has got to.
Trees      A new inode counts where its directory does. A tree has one quota: none inside another (as XFS's projects).
Setting    A quota of a directory that is full already counts from its beginning what is new, and the rest step by step;
           in a directory that counts already, everything that comes joins at once, so nothing is missed or counted
           twice, whatever is moved meanwhile.
Moving     A file that moves into another tree, or out of one, counts there. A directory with entries does not, except
           into a tree that is being counted: EXDEV, upon which programs copy. No file has names in two trees.
"""

from coordinator.database import Database
from coordinator.inodes import Inode, Inodes
from coordinator.quotas import COUNTING, IN_FORCE, REMOVING, Quota
from csvfs.errors import Conflict, CrossesQuota, NotFound
from csvfs.ids import ROOT_INODE


class QuotaTrees:
    """Of one volume."""

    def __init__(self, database: Database, inodes: Inodes) -> None:
        self._database = database
        self._inodes = inodes
        self._quotas = inodes.quotas

    # Names come and move; all in a batch

    def check_make(self, parent: int) -> None:
        """Whether one more inode may be made in `parent`. Raises QuotaExceeded."""
        quota = self._quotas.of(parent)
        if quota is not None:
            quota.check(0, 1)

    def made(self, inode: Inode, parent: int) -> None:
        quota = self._quotas.of(parent)
        if quota is not None and quota.state != REMOVING:
            self._join(quota, inode)

    def check_link(self, inode: Inode, parent: int) -> None:
        """Whether it may have a name in `parent`, too. Raises CrossesQuota."""
        there = self._quotas.of(parent)
        if there is not None and there is not self._quotas.of(inode.ino):
            raise CrossesQuota(f"inode {inode.ino} cannot have a name in directory {parent}, which has another quota")

    def check_move(self, inode: Inode, parent: int) -> None:
        """Whether its name may move to `parent`. Raises CrossesQuota, QuotaExceeded."""
        here, there = self._quotas.of(inode.ino), self._quotas.of(parent)
        if there is here:
            return
        if here is not None and here.root == inode.ino:
            if there is not None:
                raise CrossesQuota(f"directory {inode.ino} has a quota, and so has directory {parent}")
            return  # it takes its quota along
        if there is not None and there.state == COUNTING and here is None:
            return
        if inode.is_directory and self._has_entries(inode.ino):
            raise CrossesQuota(f"directory {inode.ino} cannot be moved to directory {parent}, which has another quota")
        if there is not None:
            if inode.nlink > 1 and not inode.is_directory:
                raise CrossesQuota(f"inode {inode.ino} has other names, and directory {parent} another quota")
            there.check(inode.blocks, 1)

    def moved(self, inode: Inode, parent: int) -> None:
        """After check_move, and the move."""
        here, there = self._quotas.of(inode.ino), self._quotas.of(parent)
        if there is here or (here is not None and here.root == inode.ino):
            return
        if there is None and inode.nlink > 1 and not inode.is_directory:
            return  # it has a name where it counts
        if here is not None:
            self._quotas.leave(here, inode.ino, inode.blocks)
        if there is not None and there.state != REMOVING:
            self._join(there, inode)
            if inode.is_directory and self._has_entries(inode.ino):
                self._walk_later(there, inode.ino)

    def check_exchange(self, inode: Inode, parent: int, other: Inode, other_parent: int) -> None:
        """Raises CrossesQuota unless both keep theirs."""
        quotas = self._quotas
        if quotas.of(inode.ino) is not quotas.of(other_parent) or quotas.of(other.ino) is not quotas.of(parent):
            raise CrossesQuota(f"inodes {inode.ino} and {other.ino} count for different quotas: they are not exchanged")

    # Quotas come and go; all in a batch

    def set(self, ino: int, blocks_max: int, files_max: int) -> Quota:
        """Limits of a directory's tree, 0: none; of what is in use already no more may come.

        Raises   NotFound, NotADirectory. Conflict: it is inside, or around, another tree; or its quota is being removed.
        """
        self._inodes.directory(ino)
        quota = self._quotas.by_root.get(ino)
        if quota is None:
            quota = self._begin(ino)
        if quota.state == REMOVING:
            raise Conflict(f"the quota of directory {ino} is being removed; see csvfs quota list, then try again")
        quota.blocks_max, quota.files_max = blocks_max, files_max
        self._quotas.changed(quota)
        return quota

    def _begin(self, ino: int) -> Quota:
        around = self._quotas.of(ino)
        if around is not None:
            raise Conflict(f"directory {ino} is in the tree of directory {around.root}, which has a quota")
        inside = [root for root in self._quotas.by_root if self._is_below(root, ino)]
        if inside:
            raise Conflict(f"directory {inside[0]} below directory {ino} has a quota; csvfs quota remove it first")
        quota = Quota(ino, 0, 0, 0, 0, COUNTING)
        self._quotas.add(quota)
        self._join(quota, self._inodes.get(ino))
        self._walk_later(quota, ino)
        return quota

    def _is_below(self, ino: int, above: int) -> bool:
        while ino != above and ino != ROOT_INODE:
            ino = self._inodes.get(ino).parent
        return ino == above

    def remove(self, ino: int) -> None:
        """No limits from now on; `step` does the rest. Raises NotFound."""
        quota = self._quotas.by_root.get(ino)
        if quota is None:
            raise NotFound(f"directory {ino} has no quota; see csvfs quota list")
        quota.state = REMOVING
        self._quotas.changed(quota)

    def unfinished(self) -> list[int]:
        """Roots of trees that `step` has work with."""
        return [quota.root for quota in self._quotas.by_root.values() if quota.state != IN_FORCE]

    def step(self, root: int, limit: int) -> bool:
        """Count, or forget, up to `limit` more inodes of a tree; whether that was the last. In a batch."""
        quota = self._quotas.by_root.get(root)
        if quota is None or quota.state == IN_FORCE:
            return True
        if quota.state == REMOVING:
            if self._quotas.forget_members(quota, limit):
                self._quotas.remove(quota)
                return True
            return False
        walk = self._database.rows("SELECT directory, cookie FROM quota_walk WHERE root = ? LIMIT 1", (root,))
        if walk:
            ((directory, cookie),) = walk
            self._count_some(quota, directory, cookie, limit)
            return False
        quota.state = IN_FORCE
        self._quotas.changed(quota)
        return True

    def _count_some(self, quota: Quota, directory: int, cookie: int, limit: int) -> None:
        entries = self._database.rows(
            "SELECT cookie, ino FROM entries WHERE parent = ? AND cookie > ? ORDER BY cookie LIMIT ?",
            (directory, cookie, limit),
        )
        for _, ino in entries:
            if self._quotas.of(ino) is not None:
                continue  # it has come while we counted, or has two names
            inode = self._inodes.get(ino)
            self._join(quota, inode)
            if inode.is_directory:
                self._walk_later(quota, ino)
        where = (quota.root, directory)
        if len(entries) < limit:
            self._database.run("DELETE FROM quota_walk WHERE root = ? AND directory = ?", where)
        else:
            self._database.run("UPDATE quota_walk SET cookie = ?3 WHERE root = ?1 AND directory = ?2", (*where, entries[-1][0]))

    def _walk_later(self, quota: Quota, directory: int) -> None:
        self._database.run(
            "INSERT OR REPLACE INTO quota_walk(root, directory, cookie) VALUES(?,?,0)", (quota.root, directory)
        )

    def _join(self, quota: Quota, inode: Inode) -> None:
        self._quotas.join(quota, inode.ino, inode.blocks)
        inode.charged = inode.blocks

    def _has_entries(self, ino: int) -> bool:
        return bool(self._database.rows("SELECT 1 FROM entries WHERE parent = ? LIMIT 1", (ino,)))
