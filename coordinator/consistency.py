"""The metadata check: does everything in the database fit together?

Place      coordinator floor; above metadata.py. Reads everything: for tests and for `csvfs volume check`.
"""

import stat
from collections import Counter

from coordinator import quotas
from coordinator.database import Database
from coordinator.metadata import Metadata
from csvfs.ids import ROOT_INODE

OWNERS_MAX = 255


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


def owners_of_blocks(database: Database) -> dict[int, bytearray]:
    """By slab: for each of its blocks how many extents have it, OWNERS_MAX and more as one."""
    found = {slab: bytearray(blocks) for slab, blocks in database.rows("SELECT id, blocks FROM slabs")}
    for slab, block, count in database.rows("SELECT slab, slab_block, count FROM extents"):
        owners = found.get(slab, bytearray())
        end = min(block + count, len(owners))
        if not any(owners[block:end]):
            owners[block:end] = b"\1" * max(0, end - block)
            continue
        for at in range(block, end):
            owners[at] = min(owners[at] + 1, OWNERS_MAX)
    return found


def _check_shared(database: Database) -> list[str]:
    """What several extents have is in `shared` with their number, and nothing else is (P3)."""
    problems = []
    found = owners_of_blocks(database)
    said = {slab: bytearray(min(owners, 1) for owners in blocks) for slab, blocks in found.items()}
    if has_shared_blocks(database):
        for slab, block, count, owners in database.rows("SELECT slab, block, count, owners FROM shared"):
            if slab not in said or not 0 <= block < block + count <= len(said[slab]) or owners < 1:
                problems.append(f"shared blocks {block}+{count} of slab {slab} of {owners} owners cannot be")
            else:
                said[slab][block : block + count] = bytes([min(owners, OWNERS_MAX)]) * count
    for slab, blocks in found.items():
        wrong = [at for at in range(len(blocks)) if blocks[at] != said[slab][at]]
        if wrong:
            first = wrong[0]
            problems.append(
                f"slab {slab}: {len(wrong)} blocks are counted wrong, the first {first}: "
                f"{blocks[first]} extents have it, {said[slab][first]} are counted"
            )
    return problems


def has_shared_blocks(database: Database) -> bool:
    """Whether anything was ever cloned on the volume: else it has no tables for that."""
    return bool(database.rows("SELECT 1 FROM sqlite_master WHERE name = 'shared'"))


def _check_space(database: Database) -> list[str]:
    """Every block is in extents, or in one trim, or replaces a shared one soon, or is free (P1, P4)."""
    problems = _check_shared(database)
    slabs = {row[0]: row[1:] for row in database.rows("SELECT id, blocks, free, bitmap FROM slabs")}
    taken = {
        slab: bytearray(min(owners, 1) for owners in blocks)
        for slab, blocks in owners_of_blocks(database).items()
    }
    for slab, block, count in database.rows("SELECT slab, slab_block, count FROM extents"):
        if slab not in taken or block < 0 or block + count > len(taken[slab]):
            problems.append(f"blocks {block}+{count} of slab {slab} do not exist")
    in_extents = sum(blocks.count(1) for blocks in taken.values())
    replacing = 0
    owners = "SELECT slab, block, count, 0 FROM trims"
    if has_shared_blocks(database):
        owners += " UNION ALL SELECT slab, slab_block, count, count FROM replacements"
    for slab, block, count, used in database.rows(owners):
        replacing += used
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
    free_blocks, all_blocks = (sum(row[index] for row in slabs.values()) for index in (1, 0))
    found = (in_extents + replacing, free_blocks, all_blocks)
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
