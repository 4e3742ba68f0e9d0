"""SQLite over metadata slabs: the image, its log, its limits."""

import pytest

from coordinator.metadata import Metadata
from coordinator.slab_image import PAGE_SIZE, PAGES_PER_BLOCK, LogBarrier, LogWrite, SlabImage
from coordinator.slab_vfs import connect
from csvfs.errors import BadRequest, Corrupt, NoSpace, Unavailable
from tests.metadata_members import SLAB_BLOCKS, VOLUME, Members, TestVolume

FILE = 0o100644


def make_files(metadata: Metadata, first: int, count: int) -> None:
    for number in range(first, first + count):
        metadata.make(1, b"file-%04d-" % number + b"x" * 200, FILE, 0, 0, 0, b"", 5)


def test_what_was_committed_is_there_after_opening_the_members_blocks():
    volume = TestVolume()
    with volume.batch() as metadata:
        make_files(metadata, 0, 100)
    successor = volume.reopened()
    entries, eof = successor.readdir(1, 0, 1000)
    assert len(entries) == 100 and eof
    assert successor.database.rows("PRAGMA integrity_check") == [("ok",)]
    successor.close()


def test_closing_writes_nothing_to_the_members():
    volume = TestVolume()
    with volume.batch() as metadata:
        make_files(metadata, 0, 10)
    volume.metadata.begin()
    make_files(volume.metadata, 10, 1)
    volume.metadata.close()
    assert volume.metadata.image.take_log() == []


def test_blocks_leave_the_memory_once_written_unless_written_again_meanwhile():
    members = Members()
    image = SlabImage.create(members.read_blocks, SLAB_BLOCKS, SLAB_BLOCKS)
    image.write_database(b"a" * 4096, 0)
    first = image.take_log()
    image.write_database(b"b" * 4096, 0)
    members.apply(first)
    image.written(first)
    assert image.overlay_blocks == 1
    assert image.read_database(4096, 0) == b"b" * 4096
    second = image.take_log()
    members.apply(second)
    image.written(second)
    assert image.overlay_blocks == 0
    assert image.read_database(10, 4000) == b"b" * 10


def test_writes_of_one_block_are_merged_only_between_barriers():
    image = SlabImage.create(Members().read_blocks, SLAB_BLOCKS, SLAB_BLOCKS)
    image.write_wal(b"1", 0)
    image.write_wal(b"2", 1)
    image.barrier()
    image.barrier()
    image.write_wal(b"3", 2)
    log = image.take_log()
    assert [type(entry) for entry in log] == [LogWrite, LogBarrier, LogWrite]
    assert log[0].data[:4] == b"12\0\0" and log[2].data[:4] == b"123\0"


def test_a_barrier_is_kept_when_what_it_orders_was_taken_before():
    """The checkpoint after an idle moment: the WAL's blocks have long left with an earlier take_log."""
    image = SlabImage.create(Members().read_blocks, SLAB_BLOCKS, SLAB_BLOCKS)
    image.write_wal(b"1", 0)
    assert len(image.take_log()) == 1
    image.barrier()
    image.write_database(b"page" * 1024, 0)
    assert [type(entry) for entry in image.take_log()] == [LogBarrier, LogWrite]


def test_pages_that_share_a_block_keep_each_other():
    members = Members()
    image = SlabImage.create(members.read_blocks, SLAB_BLOCKS, SLAB_BLOCKS)
    for number in range(PAGES_PER_BLOCK):
        image.write_database(bytes([65 + number]) * PAGE_SIZE, number * PAGE_SIZE)
        log = image.take_log()
        members.apply(log)
        image.written(log)  # from here on the block is read from the members
    image.write_database(b"z" * PAGE_SIZE, PAGE_SIZE)
    assert image.read_database(4 * PAGE_SIZE, 0) == b"".join(c * PAGE_SIZE for c in (b"A", b"z", b"C", b"D"))
    members.apply(image.take_log())
    assert members.read_blocks(image.database_block, 1)[:3000:1024] == b"AzC"


def test_a_checkpoint_reads_nothing_from_the_members_but_the_first_of_a_successor():
    """Whatever SQLite changes it has read before, from its file; or from the WAL that it found."""
    volume = TestVolume()
    with volume.batch() as metadata:
        make_files(metadata, 0, 300)
    metadata = volume.reopened()
    image = metadata.image
    metadata.checkpoint()
    image.written(image.take_log())
    reads = []
    image._read_blocks = lambda block, count: reads.append(block)  # None: a read would fail
    metadata.begin()
    make_files(metadata, 300, 20)
    metadata.commit()
    metadata.checkpoint()
    assert reads == [] and any(isinstance(entry, LogBarrier) for entry in image.take_log())


def test_the_log_of_one_small_change_is_short():
    volume = TestVolume()
    with volume.batch() as metadata:
        make_files(metadata, 0, 500)
    volume.log.clear()
    for number in range(100):
        with volume.batch() as metadata:
            make_files(metadata, 1000 + number, 1)
    assert len(volume.log) < 400, "blocks for 100 files, checkpoints included"


def test_the_wal_never_leaves_its_region_however_many_batches_come():
    volume = TestVolume()
    used = []
    for number in range(200):
        with volume.batch() as metadata:
            make_files(metadata, number * 5, 5)
        used.append(volume.metadata.image.wal_used)
    assert 0.5 < max(used) < 0.7
    assert max(e.block for e in volume.log if isinstance(e, LogWrite)) < volume.capacity
    assert len(volume.reopened().readdir(1, 0, 4000)[0]) == 1000


def test_a_checkpoint_when_due_empties_the_wal_for_the_next_batch():
    volume = TestVolume()
    number = 0
    while not volume.metadata.checkpoint_due:
        with volume.batch() as metadata:
            make_files(metadata, number, 10)
        number += 10
    volume.metadata.checkpoint()
    with volume.batch() as metadata:
        make_files(metadata, number, 1)
    assert volume.metadata.image.wal_used < 0.1


def test_a_transaction_larger_than_the_wal_is_refused_and_leaves_nothing_behind():
    volume = TestVolume(slabs=16)
    with volume.batch() as metadata:
        make_files(metadata, 0, 10)
    with pytest.raises(NoSpace), volume.batch() as metadata:
        make_files(metadata, 1000, 20_000)
    with volume.batch() as metadata:
        make_files(metadata, 500, 1)
    assert len(volume.metadata.readdir(1, 0, 1000)[0]) == 11
    assert len(volume.reopened().readdir(1, 0, 1000)[0]) == 11


def test_full_metadata_slabs_refuse_the_batch_and_growing_helps():
    volume = TestVolume(slabs=1)
    number = 0
    with pytest.raises(NoSpace):
        while True:
            with volume.batch() as metadata:
                make_files(metadata, number, 20)
            number += 20
    assert len(volume.metadata.readdir(1, 0, 4096)[0]) == min(number, 4096)
    assert volume.metadata.used_blocks() > volume.capacity * 0.95
    volume.capacity *= 2
    volume.metadata.image.grow(volume.capacity)
    with volume.batch() as metadata:
        make_files(metadata, number, 20)
    assert volume.reopened().statfs().files == number + 21


def test_after_a_failed_statement_nothing_more_of_the_batch_is_committed():
    volume = TestVolume()
    metadata = volume.metadata
    metadata.begin()
    make_files(metadata, 0, 1)
    with pytest.raises(Exception, match="UNIQUE"):
        metadata.database.run("INSERT INTO settings(name, value) VALUES('volume', 'x')")
    make_files(metadata, 1, 1)
    with pytest.raises(Exception, match="UNIQUE"):
        metadata.commit()
    assert metadata.readdir(1, 0, 10) == ([], True)


def test_an_error_of_reading_blocks_comes_through_as_what_it_is():
    volume = TestVolume()
    for number in range(30):
        with volume.batch() as metadata:
            make_files(metadata, number * 10, 10)
    volume.metadata.checkpoint()
    volume.send_log()
    failing = False

    def read_blocks(block: int, count: int) -> bytes:
        if failing:
            raise Unavailable("no member of metadata slab 3 answers")
        return volume.members.read_blocks(block, count)

    metadata = Metadata.open(SlabImage.open(read_blocks, volume.capacity, VOLUME), VOLUME)
    failing = True
    with pytest.raises(Unavailable, match="slab 3"):
        metadata.readdir(1, 0, 300)
    failing = False
    assert len(metadata.readdir(1, 0, 300)[0]) == 300


@pytest.mark.parametrize("offset", [0, 8, 17, 24, 40, 60, 4095])
def test_a_damaged_header_is_refused(offset):
    volume = TestVolume()
    header = bytearray(volume.members.blocks[0])
    header[offset] ^= 0x40
    volume.members.blocks[0] = bytes(header)
    with pytest.raises(Corrupt, match="metadata header"):
        volume.reopened()


def test_slabs_of_another_volume_or_without_a_header_are_refused():
    volume = TestVolume()
    with pytest.raises(Corrupt, match="of volume"):
        SlabImage.open(volume.members.read_blocks, volume.capacity, b"another-volume-0")
    with pytest.raises(Corrupt, match="magic"):
        SlabImage.open(Members().read_blocks, volume.capacity, VOLUME)


def test_a_list_of_slabs_that_is_too_short_is_refused():
    volume = TestVolume()
    with pytest.raises(Corrupt, match="do not fit"):
        SlabImage.open(volume.members.read_blocks, 100, VOLUME)


def test_slabs_too_small_for_metadata_are_refused():
    with pytest.raises(BadRequest, match="larger slab"):
        SlabImage.create(Members().read_blocks, 128, 128)


def test_a_damaged_database_page_is_reported_as_corrupt():
    volume = TestVolume()
    for number in range(30):
        with volume.batch() as metadata:
            make_files(metadata, number * 10, 10)
    volume.metadata.checkpoint()
    volume.send_log()
    first = volume.metadata.image.database_block
    for block in range(first + 1, first + 1 + 100):
        if block in volume.members.blocks:
            volume.members.blocks[block] = b"\xa5" * 4096
    wal = range(1, first)
    for block in wal:
        volume.members.blocks.pop(block, None)
    with pytest.raises(Corrupt, match="metadata database"):
        volume.reopened().readdir(1, 0, 300)


def test_two_images_are_open_at_once_without_meeting():
    left, right = TestVolume(), TestVolume()
    with left.batch() as metadata:
        make_files(metadata, 0, 3)
    with right.batch() as metadata:
        make_files(metadata, 0, 5)
    assert (left.metadata.statfs().files, right.metadata.statfs().files) == (4, 6)


def test_switching_back_to_a_rollback_journal_and_forth_keeps_the_data():
    members = Members()
    image = SlabImage.create(members.read_blocks, SLAB_BLOCKS, SLAB_BLOCKS)
    connection, vfs = connect(image)
    connection.execute("CREATE TABLE t(a); INSERT INTO t VALUES(1)")
    connection.execute("PRAGMA journal_mode=DELETE").fetchall()
    connection.execute("INSERT INTO t VALUES(2)")
    connection.execute("PRAGMA journal_mode=WAL").fetchall()
    connection.execute("INSERT INTO t VALUES(3)")
    assert connection.execute("SELECT sum(a) FROM t").get == 6
    connection.close()
    vfs.unregister()


def test_opening_reads_no_more_however_many_files_there_are():
    """Takeover time must not grow with the volume."""
    volume = TestVolume(slabs=16)
    read = []
    for number in range(40):
        with volume.batch() as metadata:
            make_files(metadata, number * 100, 100)
        volume.metadata.checkpoint()
        volume.send_log()
        if number in (2, 39):
            blocks = []

            def read_blocks(block: int, count: int, blocks: list[int] = blocks) -> bytes:
                blocks.extend(range(block, block + count))
                return volume.members.read_blocks(block, count)

            Metadata.open(SlabImage.open(read_blocks, volume.capacity, VOLUME), VOLUME).close()
            read.append(len(blocks))
    assert volume.metadata.used_blocks() > 500
    assert read[1] <= read[0] + 128 and read[1] < 300
