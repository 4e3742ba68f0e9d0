"""The metadata check: does everything in the database fit together?

Place      coordinator floor; above metadata.py. Reads everything: for tests and for `csvfs volume check`.
"""

import stat
from collections import Counter

from coordinator import quotas
from coordinator.database import Database
from coordinator.metadata import Metadata
from csvfs.ids import ROOT_INODE


def check(metadata: Metadata) -> list[str]:
    """What is wrong, one line each; empty: all is well. Call it between batches."""
    database = metadata.database
    problems = [f"sqlite: {row[0]}" for row in database.rows("PRAGMA integrity_check") if row[0] != "ok"]
    problems += _check_links(database)
    problems += _check_belongings(database)
    problems += _check_space(database)
    problems += quotas.problems(database)
    return problems


def _check_links(database: Database) -> list[str]:
    problems = []
    inodes = {
        row[0]: row[1:]
        for row in database.rows("SELECT ino, mode, nlink, parent, size, blocks, xattrs FROM inodes")
    }
    orphans = {ino for (ino,) in database.rows("SELECT ino FROM orphans")}
    names: Counter[int] = Counter()
    subdirectories: Counter[int] = Counter()
    seen: set[tuple[int, bytes]] = set()
    for parent, name, ino in database.rows("SELECT parent, name, ino FROM entries"):
        names[ino] += 1
        if (parent, name) in seen:
            problems.append(f"directory {parent}: {name!r} is there twice")
        seen.add((parent, name))
        holder, inode = inodes.get(parent), inodes.get(ino)
        if holder is None or not stat.S_ISDIR(holder[0]) or holder[1] == 0:
            problems.append(f"entry {name!r} is in {parent}, which is no live directory")
        if inode is None:
            problems.append(
                f"entry {name!r} of directory {parent} leads to inode {ino}, which does not exist"
            )
        elif stat.S_ISDIR(inode[0]):
            subdirectories[parent] += 1
            if inode[2] != parent:
                problems.append(f"directory {ino} is in {parent}, its `..` says {inode[2]}")
    for ino, (mode, nlink, *_) in inodes.items():
        if stat.S_ISDIR(mode):
            named = names[ino] + (ino == ROOT_INODE)
            want = 2 + subdirectories[ino] if named else 0
            if named > 1:
                problems.append(f"directory {ino} has {named} names")
        else:
            want = names[ino]
        if nlink != want:
            problems.append(f"inode {ino} says {nlink} links, has {want}")
        if (nlink == 0) != (ino in orphans):
            problems.append(f"inode {ino} of {nlink} links is {'' if ino in orphans else 'not '}an orphan")
    problems += [f"orphan {ino} does not exist" for ino in orphans - inodes.keys()]
    ((files, next_ino),) = database.rows("SELECT files, next_ino FROM counters")
    if files != len(inodes):
        problems.append(f"{files} files are counted, {len(inodes)} exist")
    if max(inodes) >= next_ino:
        problems.append(f"inode {max(inodes)} exists, the next is to be {next_ino}")
    return problems


def _check_belongings(database: Database) -> list[str]:
    """Rows of other tables belong to an inode of the right kind, and its counts are right."""
    problems = []
    for table in ("extents", "xattrs", "symlinks"):
        lost = database.rows(f"SELECT DISTINCT ino FROM {table} WHERE ino NOT IN (SELECT ino FROM inodes)")
        problems += [f"{table} of inode {ino}, which does not exist" for (ino,) in lost]
    symlinks = {ino for (ino,) in database.rows("SELECT ino FROM symlinks")}
    xattrs = dict(database.rows("SELECT ino, count(*) FROM xattrs GROUP BY ino"))
    blocks = dict(database.rows("SELECT ino, sum(count) FROM extents GROUP BY ino"))
    for ino, mode, inode_blocks, inode_xattrs in database.rows(
        "SELECT ino, mode, blocks, xattrs FROM inodes"
    ):
        if stat.S_ISLNK(mode) != (ino in symlinks):
            problems.append(f"inode {ino} of mode {mode:#o}: symlink target does not fit")
        if inode_xattrs != xattrs.get(ino, 0):
            problems.append(f"inode {ino} says {inode_xattrs} attributes, has {xattrs.get(ino, 0)}")
        if inode_blocks != blocks.get(ino, 0):
            problems.append(f"inode {ino} says {inode_blocks} blocks, has {blocks.get(ino, 0)}")
        if ino in blocks and not stat.S_ISREG(mode):
            problems.append(f"inode {ino} of mode {mode:#o} has blocks")
    last_ino, last_end = 0, 0
    for ino, block, count in database.rows("SELECT ino, block, count FROM extents ORDER BY ino, block"):
        if count <= 0 or (ino == last_ino and block < last_end):
            problems.append(f"inode {ino}: extent {block}+{count} overlaps the one before, or is empty")
        last_ino, last_end = ino, block + count
    return problems


def _check_space(database: Database) -> list[str]:
    """Every block is in one extent, or in one trim, or free (P1)."""
    problems = []
    slabs = {row[0]: row[1:] for row in database.rows("SELECT id, blocks, free, bitmap FROM slabs")}
    taken = {slab: bytearray(blocks) for slab, (blocks, _, _) in slabs.items()}
    owners = "SELECT slab, slab_block, count FROM extents UNION ALL SELECT slab, block, count FROM trims"
    for slab, block, count in database.rows(owners):
        if slab not in taken or block < 0 or block + count > len(taken[slab]):
            problems.append(f"blocks {block}+{count} of slab {slab} do not exist")
        elif any(taken[slab][block : block + count]):
            problems.append(f"blocks {block}+{count} of slab {slab} have two owners")
        else:
            taken[slab][block : block + count] = b"\1" * count
    for slab, (blocks, free, bitmap) in slabs.items():
        bits = int.from_bytes(bitmap, "little")
        wrong = [block for block in range(blocks) if (bits >> block & 1) != taken[slab][block]]
        if wrong:
            problems.append(f"slab {slab}: bitmap is wrong for {len(wrong)} blocks, the first {wrong[0]}")
        if free != taken[slab].count(0):
            problems.append(f"slab {slab} says {free} free blocks, has {taken[slab].count(0)}")
    ((used,),) = database.rows("SELECT ifnull(sum(count), 0) FROM extents")
    found = (used, sum(free for _, free, _ in slabs.values()), sum(blocks for blocks, _, _ in slabs.values()))
    (counted,) = database.rows("SELECT used_blocks, free_blocks, slab_blocks FROM counters")
    if counted != found:
        problems.append(f"used, free and all blocks are counted as {counted}, are {found}")
    ((next_slab, next_trim),) = database.rows("SELECT next_slab, next_trim FROM counters")
    if max(slabs, default=0) >= next_slab:
        problems.append(f"slab {max(slabs)} exists, the next is to be {next_slab}")
    ((last_trim,),) = database.rows("SELECT ifnull(max(id), 0) FROM trims")
    if last_trim >= next_trim:
        problems.append(f"trim {last_trim} exists, the next is to be {next_trim}")
    return problems
