"""Watch: what changes while somebody goes through all metadata in many small steps (metadata_check.py).

Place      coordinator floor; pure. Told by inodes.py and space.py of every change, also of one that is rolled back later:
           too much is harmless.
Cost       of a change while nobody watches: one call.
Limits     CHANGES_MAX inodes and slabs; beyond it `overflowed`, and nothing of this pass counts.
"""

CHANGES_MAX = 262_144  # about 25 MB


class Watch:
    def __init__(self) -> None:
        self._watching = False
        self.inodes: set[int] = set()
        self.slabs: set[int] = set()
        self.overflowed = False
        self.position = 0  # inodes up to here have been counted
        self.files = 0  # how many more of those there are since
        self.rolled_back = False  # then that number is wrong

    def begin(self) -> None:
        """Forget what was seen, and look on."""
        self._watching, self.overflowed = True, False
        self.inodes, self.slabs = set(), set()

    def end(self) -> None:
        self.begin()
        self._watching = False

    def inode(self, ino: int) -> None:
        """Its row, its names or its extents."""
        if self._watching:
            self.inodes.add(ino)
            self.overflowed |= len(self.inodes) > CHANGES_MAX

    def slab(self, slab: int) -> None:
        """Who has which of its blocks."""
        if self._watching:
            self.slabs.add(slab)
            self.overflowed |= len(self.slabs) > CHANGES_MAX

    def came(self, ino: int, count: int) -> None:
        """The inode is new (1), or gone (-1)."""
        if ino <= self.position:
            self.files += count
        self.inode(ino)
