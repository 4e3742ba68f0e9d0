"""Random operations on names, sizes and space, against a model of a file system made of dicts."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from coordinator.consistency import check
from coordinator.namespace import RENAME_EXCHANGE, RENAME_NOREPLACE
from csvfs.errors import BadRequest, CsvfsError, Exists, IsADirectory, NotADirectory, NotEmpty, NotFound
from tests.metadata_members import TestVolume

FILE, DIRECTORY = 0o100644, 0o040755
INO, NLINK, SIZE, BLOCKS = 0, 2, 6, 7


class Node:
    """An inode of the model: a directory with `entries`, or a file with a size and the blocks it may have."""

    def __init__(self, ino: int, directory: bool) -> None:
        self.ino = ino
        self.entries: dict[bytes, Node] | None = {} if directory else None
        self.links = 1
        self.size = 0
        self.granted: set[int] = set()

    def holds(self, other: "Node") -> bool:
        return self is other or any(child.holds(other) for child in (self.entries or {}).values())


NAMES = st.sampled_from([b"a", b"b", b"c", b"\xff", b"long" * 20])
PICK = st.integers(0, 1000)


class FileSystemModel(RuleBasedStateMachine):
    """The same operations on the metadata and on a tree of dicts; both must agree on results and errors."""

    @initialize()
    def start(self) -> None:
        self.volume = TestVolume(data_slabs=2, data_blocks=256)
        self.metadata = self.volume.metadata
        self.root = Node(1, True)
        self.now_ns = 1

    def nodes(self, directory: bool) -> list[Node]:
        found, todo = [], [self.root]
        while todo:
            node = todo.pop()
            if (node.entries is not None) == directory and node not in found:
                found.append(node)
            todo += (node.entries or {}).values()
        return sorted(found, key=lambda node: node.ino)

    def directory(self, pick: int) -> Node:
        directories = self.nodes(True)
        return directories[pick % len(directories)]

    def attempt(self, operation, *args, **kwargs):
        """(result, None) or (None, kind of error), the batch committed either way."""
        self.now_ns += 1
        with self.volume.batch():
            try:
                return operation(*args, **kwargs, now_ns=self.now_ns), None
            except CsvfsError as error:
                return None, type(error)

    def drop(self, ino: int, nlink: int) -> None:
        if nlink == 0:
            with self.volume.batch() as metadata:
                assert metadata.drop_orphan(ino)

    @rule(pick=PICK, name=NAMES, directory=st.booleans())
    def make(self, pick, name, directory):
        parent = self.directory(pick)
        mode = DIRECTORY if directory else FILE
        made, error = self.attempt(
            self.metadata.make, parent.ino, name, mode, uid=0, gid=0, rdev=0, target=b""
        )
        assert error == (Exists if name in parent.entries else None)
        if made:
            parent.entries[name] = Node(made[INO], directory)

    @rule(pick=PICK, file=PICK, name=NAMES)
    def link(self, pick, file, name):
        files, parent = self.nodes(False), self.directory(pick)
        if files:
            node = files[file % len(files)]
            _, error = self.attempt(self.metadata.link, node.ino, parent.ino, name)
            assert error == (Exists if name in parent.entries else None)
            if error is None:
                parent.entries[name] = node
                node.links += 1

    @rule(pick=PICK, name=NAMES, directory=st.booleans())
    def unlink(self, pick, name, directory):
        parent = self.directory(pick)
        node = parent.entries.get(name)
        result, error = self.attempt(self.metadata.unlink, parent.ino, name, directory)
        if node is None:
            assert error is NotFound
        elif directory and node.entries is None:
            assert error is NotADirectory
        elif directory and node.entries:
            assert error is NotEmpty
        elif not directory and node.entries is not None:
            assert error is IsADirectory
        else:
            del parent.entries[name]
            node.links -= 1
            assert result == (node.ino, node.links)
            self.drop(*result)

    @rule(
        pick=PICK,
        name=NAMES,
        new_pick=PICK,
        new_name=NAMES,
        flags=st.sampled_from([0, RENAME_NOREPLACE, RENAME_EXCHANGE]),
    )
    def rename(self, pick, name, new_pick, new_name, flags):
        source, target = self.directory(pick), self.directory(new_pick)
        node, other = source.entries.get(name), target.entries.get(new_name)
        result, error = self.attempt(self.metadata.rename, source.ino, name, target.ino, new_name, flags)
        assert error == self.rename_error(source, node, target, other, flags)
        if error is not None or node is other:
            return
        if flags == RENAME_EXCHANGE:
            source.entries[name], target.entries[new_name] = other, node
            return
        del source.entries[name]
        target.entries[new_name] = node
        if other is None:
            assert result == (node.ino, 0, 0)
        else:
            other.links -= 1
            assert result == (node.ino, other.ino, other.links)
            self.drop(other.ino, other.links)

    def rename_error(self, source, node, target, other, flags):
        if node is None or (other is None and flags == RENAME_EXCHANGE):
            return NotFound
        if other is not None and flags == RENAME_NOREPLACE:
            return Exists
        if node.entries is not None and node.holds(target) and source is not target:
            return BadRequest
        if other is None or node is other:
            return None
        if flags == RENAME_EXCHANGE:
            below = other.entries is not None and other.holds(source) and source is not target
            return BadRequest if below else None
        if node.entries is None:
            return None if other.entries is None else IsADirectory
        if other.entries is None:
            return NotADirectory
        return NotEmpty if other.entries else None

    @rule(file=PICK, size=st.integers(0, 400_000))
    def truncate(self, file, size):
        files = self.nodes(False)
        if files:
            node = files[file % len(files)]
            attr, error = self.attempt(self.metadata.setattr, node.ino, size=size)
            assert error is None and attr[SIZE] == size
            if size < node.size:
                node.granted = {block for block in node.granted if block < -(-size // 4096)}
            node.size = size

    @rule(file=PICK, block=st.integers(0, 100), count=st.integers(1, 40))
    def allocate(self, file, block, count):
        files = self.nodes(False)
        if not files:
            return
        node = files[file % len(files)]
        known = self.layout(node)
        size = (block + count) * 4096
        given, error = self.attempt(self.metadata.allocate, node.ino, block, count, size, mtime_ns=5)
        assert error is None
        needed = set(range(block, block + count)) - known.keys()
        if given.missing:
            assert given.missing == len(needed) - self.metadata.statfs().free_blocks
            self.volume.add_data_slab(256)
            return
        node.size = max(node.size, size)
        now = self.layout(node)
        assert given.reached == block + count
        assert needed <= now.keys() and known.items() <= now.items()
        node.granted |= needed

    @rule(file=PICK, block=st.integers(0, 120), count=st.integers(1, 60))
    def punch(self, file, block, count):
        files = self.nodes(False)
        if not files:
            return
        node = files[file % len(files)]
        known = self.layout(node)
        gone = set(range(block, block + count))
        (attr, reached), error = self.attempt(self.metadata.punch, node.ino, block, count)
        assert error is None and reached == block
        left = {at: place for at, place in known.items() if at not in gone}
        assert self.layout(node) == left
        assert (attr[SIZE], attr[BLOCKS]) == (node.size, len(left) * 8)
        node.granted -= gone

    @rule(file=PICK)
    def close(self, file):
        files = self.nodes(False)
        if files:
            node = files[file % len(files)]
            with self.volume.batch() as metadata:
                assert metadata.trim_allocation_ahead(node.ino)
            assert all(block < -(-node.size // 4096) for block in self.layout(node))

    @rule()
    def trim(self):
        self.volume.carry_out_trims()

    @rule()
    def fail_over(self):
        self.metadata = self.volume.metadata = self.volume.reopened()
        image = self.metadata.image
        self.volume.members.blocks = (
            image._read_blocks.__self__.blocks
        )  # the successor's copy is the members now

    def layout(self, node: Node) -> dict[int, tuple[int, int]]:
        extents = self.metadata.layout(node.ino, 0, 10_000)
        return {
            extent.block + index: (extent.slab, extent.slab_block + index)
            for extent in extents
            for index in range(extent.count)
        }

    @invariant()
    def agrees(self) -> None:
        for directory in self.nodes(True):
            entries, eof = self.metadata.readdir(directory.ino, 0, 100)
            assert eof
            assert {name: attr[INO] for _, name, attr in entries} == {
                name: node.ino for name, node in directory.entries.items()
            }
            assert all(attr == self.metadata.getattr(attr[INO]) for _, _, attr in entries)
        for file in self.nodes(False):
            attr = self.metadata.getattr(file.ino)
            assert (attr[SIZE], attr[NLINK]) == (file.size, file.links)
            assert file.granted <= self.layout(file).keys()

    def teardown(self) -> None:
        if hasattr(self, "metadata"):
            assert check(self.metadata) == []
            assert check(self.volume.reopened()) == []


FileSystemModel.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestFileSystemModel = FileSystemModel.TestCase
