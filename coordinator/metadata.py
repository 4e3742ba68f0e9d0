"""A volume's metadata: everything its coordinator knows about names, attributes, layouts and sessions.

Place      coordinator floor; above namespace, attributes, extents, space, replies; below service.py.
           Synchronous: no network, clock or trio. Times come in as arguments.
Use        `begin`, operations, `commit` (or `rollback`); then send `image.take_log()` to the members; answer
           the batch once that is there. Expected errors of an operation leave the batch as it was before it.
           Any other error, and NoSpace: roll the batch back, then do its operations again one by one.
"""

import secrets
from dataclasses import dataclass

from coordinator.access_lists import AccessLists
from coordinator.attributes import Attributes
from coordinator.cloning import Cloning
from coordinator.database import Database
from coordinator.extents import Extents
from coordinator.file_locks import FileLocks
from coordinator.inodes import Inodes
from coordinator.namespace import HASH_KEY_SIZE, NAME_SIZE_MAX, Namespace
from coordinator.replies import Replies
from coordinator.shared_blocks import SharedBlocks
from coordinator.slab_image import SlabImage
from coordinator.space import Space
from csvfs.errors import Corrupt
from csvfs.ids import VolumeId

FILES_MAX = 1 << 32  # what statfs says; the true limit is the space of the metadata slabs
_ADD_SETTING = "INSERT INTO settings(name, value) VALUES(?,?)"


@dataclass(slots=True, frozen=True)
class Statistics:
    """Blocks of 4,096 bytes, of one copy. What is neither used nor free waits to be trimmed."""

    files: int
    files_free: int
    used_blocks: int
    free_blocks: int  # in slabs that exist
    available_blocks: int  # of those, what the volume's size allows to be granted
    slab_blocks: int
    name_size_max: int


class Metadata:
    """One method per operation; the docstrings are at the parts that do them."""

    def __init__(self, database: Database, volume: VolumeId, hash_key: bytes) -> None:
        self.database = database
        self.image = database.image
        self.volume = volume
        self.inodes = Inodes(database)
        self.space = space = Space(database)
        lists = AccessLists(database)
        self.shared = shared = SharedBlocks(database, space)
        self.extents = extents = Extents(database, self.inodes, space, shared)
        cloning = Cloning(database, self.inodes, space, extents, shared)
        self.names = names = Namespace(database, self.inodes, extents, lists, hash_key)
        self.attributes = attributes = Attributes(database, self.inodes, extents, lists)
        self.sessions = replies = Replies(database)
        replies.load()
        self.locks = FileLocks(database)
        self.quotas, self.quota_trees = self.inodes.quotas, names.trees

        self.lookup = names.lookup
        self.readlink = names.readlink
        self.readdir = names.readdir
        self.make = names.make
        self.link = names.link
        self.unlink = names.unlink
        self.rename = names.rename
        self.orphans = names.orphans
        self.drop_orphan = names.drop_orphan

        self.getattr = attributes.getattr
        self.setattr = attributes.setattr
        self.commit_file = attributes.commit_file
        self.accessed = attributes.accessed
        self.getxattr = attributes.getxattr
        self.listxattr = attributes.listxattr
        self.setxattr = attributes.setxattr
        self.removexattr = attributes.removexattr

        self.layout = extents.layout
        self.allocate = extents.allocate
        self.punch = extents.punch
        self.seek = extents.seek
        self.trim_allocation_ahead = extents.trim_allocation_ahead
        self.shared_in = extents.shared_in

        self.clone = cloning.clone
        self.unshare = cloning.unshare
        self.replace = cloning.replace

        self.new_slab_id = space.new_slab_id
        self.add_slab = space.add_slab
        self.slab = space.slab
        self.slabs = space.slabs
        self.set_slab = space.set_slab
        self.empty_slabs = space.empty_slabs
        self.remove_slab = space.remove_slab
        self.trim_mark = space.trim_mark
        self.take_trims = space.take_trims
        self.trims_done = space.trims_done
        self.trims_failed = space.trims_failed

        self.open_session = replies.open_session
        self.relabel_session = replies.relabel
        self.reply_of = replies.reply_of
        self.store_reply = replies.store_reply
        self.op_done = replies.op_done

        self.begin = database.begin
        self.commit = database.commit
        self.rollback = database.rollback
        self.checkpoint = database.checkpoint
        self.used_blocks = database.used_blocks

    @staticmethod
    def create(image: SlabImage, volume: VolumeId, now_ns: int) -> "Metadata":
        """The metadata of a new volume: a root directory, no slabs. `image.take_log()` has it all."""
        database = Database.create(image)
        hash_key = secrets.token_bytes(HASH_KEY_SIZE)
        database.begin()
        database.run(_ADD_SETTING, ("volume", volume))
        database.run(_ADD_SETTING, ("hash_key", hash_key))
        database.run(_ADD_SETTING, ("created", now_ns.to_bytes(8, "little")))
        metadata = Metadata(database, volume, hash_key)
        metadata.names.make_root(now_ns)
        metadata.commit()
        image.write_header(volume)
        return metadata

    @staticmethod
    def open(image: SlabImage, volume: VolumeId) -> "Metadata":
        """The metadata as the members have it; takes time that does not grow with it. Raises Corrupt."""
        database = Database.open(image)
        try:
            settings = dict(database.rows("SELECT name, value FROM settings"))
            if settings.get("volume") != volume or len(settings.get("hash_key", b"")) != HASH_KEY_SIZE:
                raise Corrupt(
                    f"metadata database is not that of volume {volume.hex()}; check its metadata slabs"
                )
            return Metadata(database, volume, settings["hash_key"])
        except BaseException:
            database.close()
            raise

    def close(self) -> None:
        """Writes nothing: an open batch is dropped."""
        self.database.close()

    def end_session(self, session: int) -> None:
        """Forget it, its replies and its file locks, and free the blocks that it was to copy into: it was evicted, or has
        said goodbye, and nothing of it is on its way any more."""
        self.sessions.end_session(session)
        self.locks.end_session(session)
        self.shared.end_session(session)

    def statfs(self) -> Statistics:
        counters = self.database.counters
        return Statistics(
            files=counters.files,
            files_free=FILES_MAX - counters.files,
            used_blocks=counters.used_blocks,
            free_blocks=counters.free_blocks,
            available_blocks=self.space.available_blocks,
            slab_blocks=counters.slab_blocks,
            name_size_max=NAME_SIZE_MAX,
        )

    def created_ns(self) -> int:
        """When the volume was made: ns since the epoch, of the wall clock of that machine."""
        rows = self.database.rows("SELECT value FROM settings WHERE name = 'created'")
        return int.from_bytes(rows[0][0], "little") if rows else 0

    @property
    def checkpoint_due(self) -> bool:
        """True: call `checkpoint` between two batches, best when nobody waits."""
        return self.database.checkpoint_due
