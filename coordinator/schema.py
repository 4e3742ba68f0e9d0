"""Tables of a volume's metadata database (FORMAT.md, "Metadata database").

Place      coordinator floor; data only.
Numbers    sizes in bytes where named size, else in blocks of 4,096; times in ns since the epoch.
"""

SCHEMA_VERSION = 1  # PRAGMA user_version of a new volume
VERSION_WITH_SHARED_BLOCKS = 2  # from its first clone on
VERSIONS_KNOWN = (SCHEMA_VERSION, VERSION_WITH_SHARED_BLOCKS)  # a reader refuses any other

SHARED_BLOCKS = """
CREATE TABLE IF NOT EXISTS shared(
    slab INTEGER NOT NULL,
    block INTEGER NOT NULL,
    count INTEGER NOT NULL,
    owners INTEGER NOT NULL,
    PRIMARY KEY (slab, block)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS shared_by_one ON shared(slab, block) WHERE owners = 1;
CREATE TABLE IF NOT EXISTS replacements(
    ino INTEGER NOT NULL,
    session INTEGER NOT NULL,
    block INTEGER NOT NULL,
    count INTEGER NOT NULL,
    slab INTEGER NOT NULL,
    slab_block INTEGER NOT NULL,
    PRIMARY KEY (ino, block)
) WITHOUT ROWID;
"""

FILE_LOCKS = """
CREATE TABLE IF NOT EXISTS locks(
    ino INTEGER NOT NULL,
    session INTEGER NOT NULL,
    flock INTEGER NOT NULL,
    owner INTEGER NOT NULL,
    first INTEGER NOT NULL,
    last INTEGER NOT NULL,
    exclusive INTEGER NOT NULL,
    pid INTEGER NOT NULL,
    handle INTEGER NOT NULL,
    PRIMARY KEY (ino, session, flock, owner, first)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS locks_of_session ON locks(session);
"""

QUOTAS = """
CREATE TABLE IF NOT EXISTS quotas(
    root INTEGER PRIMARY KEY,
    blocks_max INTEGER NOT NULL,
    files_max INTEGER NOT NULL,
    blocks INTEGER NOT NULL,
    files INTEGER NOT NULL,
    state INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS quota_walk(
    root INTEGER NOT NULL,
    directory INTEGER NOT NULL,
    cookie INTEGER NOT NULL,
    PRIMARY KEY (root, directory)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS quota_members(
    ino INTEGER PRIMARY KEY,
    root INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS quota_members_by_root ON quota_members(root);
"""

TABLES = (
    FILE_LOCKS
    + QUOTAS
    + """
CREATE TABLE settings(
    name TEXT PRIMARY KEY,
    value BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE counters(
    id INTEGER PRIMARY KEY,
    next_ino INTEGER NOT NULL,
    next_slab INTEGER NOT NULL,
    next_trim INTEGER NOT NULL,
    next_session INTEGER NOT NULL,
    files INTEGER NOT NULL,
    used_blocks INTEGER NOT NULL,
    free_blocks INTEGER NOT NULL,
    slab_blocks INTEGER NOT NULL
);
CREATE TABLE inodes(
    ino INTEGER PRIMARY KEY,
    mode INTEGER NOT NULL,
    nlink INTEGER NOT NULL,
    uid INTEGER NOT NULL,
    gid INTEGER NOT NULL,
    rdev INTEGER NOT NULL,
    size INTEGER NOT NULL,
    blocks INTEGER NOT NULL,
    atime INTEGER NOT NULL,
    mtime INTEGER NOT NULL,
    ctime INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    parent INTEGER NOT NULL,
    xattrs INTEGER NOT NULL
);
CREATE TABLE entries(
    parent INTEGER NOT NULL,
    cookie INTEGER NOT NULL,
    name BLOB NOT NULL,
    ino INTEGER NOT NULL,
    PRIMARY KEY (parent, cookie)
) WITHOUT ROWID;
CREATE TABLE symlinks(
    ino INTEGER PRIMARY KEY,
    target BLOB NOT NULL
);
CREATE TABLE xattrs(
    ino INTEGER NOT NULL,
    name BLOB NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (ino, name)
) WITHOUT ROWID;
CREATE TABLE orphans(
    ino INTEGER PRIMARY KEY
);
CREATE TABLE extents(
    ino INTEGER NOT NULL,
    block INTEGER NOT NULL,
    slab INTEGER NOT NULL,
    slab_block INTEGER NOT NULL,
    count INTEGER NOT NULL,
    PRIMARY KEY (ino, block)
) WITHOUT ROWID;
CREATE TABLE slabs(
    id INTEGER PRIMARY KEY,
    blocks INTEGER NOT NULL,
    free INTEGER NOT NULL,
    descriptor BLOB NOT NULL,
    bitmap BLOB NOT NULL
);
CREATE INDEX slabs_with_room ON slabs(id) WHERE free > 0;
CREATE INDEX slabs_empty ON slabs(id) WHERE free = blocks;
CREATE TABLE trims(
    id INTEGER PRIMARY KEY,
    slab INTEGER NOT NULL,
    block INTEGER NOT NULL,
    count INTEGER NOT NULL
);
CREATE TABLE sessions(
    id INTEGER PRIMARY KEY,
    node TEXT NOT NULL,
    incarnation INTEGER NOT NULL,
    last_op INTEGER NOT NULL,
    done_below INTEGER NOT NULL,
    UNIQUE (node, incarnation)
);
CREATE TABLE replies(
    session INTEGER NOT NULL,
    op INTEGER NOT NULL,
    reply BLOB NOT NULL,
    PRIMARY KEY (session, op)
) WITHOUT ROWID;
"""
)
