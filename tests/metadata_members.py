"""For the metadata tests: members of metadata slabs in memory, and a volume on them."""

from collections.abc import Iterable

from coordinator.metadata import Metadata
from coordinator.slab_image import LogEntry, LogWrite, SlabImage
from csvfs.ids import DriveId, Epoch, NodeName, SlabId, VolumeId
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import ROLE_IN_SYNC, Member, SlabDescriptor

VOLUME = VolumeId(b"volume-of-tests!")
SLAB_BLOCKS = 1024  # slabs of 4 MiB
ZERO_BLOCK = bytes(BLOCK_SIZE)


class Members:
    """What the members of the metadata slabs hold."""

    def __init__(self, blocks: dict[int, bytes] | None = None) -> None:
        self.blocks = {} if blocks is None else blocks

    def read_blocks(self, block: int, count: int) -> bytes:
        return b"".join(self.blocks.get(number, ZERO_BLOCK) for number in range(block, block + count))

    def apply(self, log: Iterable[LogEntry]) -> None:
        for entry in log:
            if isinstance(entry, LogWrite):
                self.blocks[entry.block] = entry.data


def descriptor(slab: int, epoch: int = 1) -> SlabDescriptor:
    member = Member(DriveId(b"drive-0123456789"), NodeName("n1"), ROLE_IN_SYNC)
    return SlabDescriptor(SlabId(slab), Epoch(epoch), (member,))


class TestVolume:
    """A volume whose log goes to its members at once."""

    __test__ = False

    def __init__(self, slabs: int = 4, data_slabs: int = 1, data_blocks: int = SLAB_BLOCKS) -> None:
        self.members = Members()
        self.capacity = slabs * SLAB_BLOCKS
        self.log: list[LogEntry] = []
        image = SlabImage.create(self.members.read_blocks, self.capacity, SLAB_BLOCKS)
        self.metadata = Metadata.create(image, VOLUME, 1)
        self.send_log()
        for _ in range(data_slabs):
            self.add_data_slab(data_blocks)

    def send_log(self) -> None:
        log = self.metadata.image.take_log()
        self.log += log
        self.members.apply(log)
        self.metadata.image.written(log)

    def batch(self) -> "TestVolume":
        return self

    def __enter__(self) -> Metadata:
        self.metadata.begin()
        return self.metadata

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.metadata.commit()
            self.send_log()
        else:
            self.metadata.rollback()

    def add_data_slab(self, blocks: int = SLAB_BLOCKS) -> int:
        with self.batch() as metadata:
            slab = metadata.new_slab_id()
            metadata.add_slab(descriptor(slab), blocks)
        return slab

    def carry_out_trims(self) -> int:
        trims = self.metadata.take_trims(10_000, self.metadata.trim_mark())
        self.metadata.trims_done(trims)
        with self.batch():
            pass
        return len(trims)

    def reopened(self) -> Metadata:
        """As a successor of the coordinator finds it on the members."""
        copy = Members(dict(self.members.blocks))
        return Metadata.open(SlabImage.open(copy.read_blocks, self.capacity, VOLUME), VOLUME)
