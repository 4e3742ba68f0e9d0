"""Drives that fail in every way under a running cluster: the others go on, and what is repaired comes back."""

import os

import pytest
import trio

from csvfs.block import drive_watch, slab_copy
from csvfs.block.drive_faults import DAMAGED, DELETED, FULL, IO_ERROR, OVERWRITTEN, READ_ONLY, TRUNCATED
from csvfs.units import BLOCK_SIZE, MIB
from csvfs.wire.block_messages import ROLE_IN_SYNC
from tests.coordinator_cluster import DRIVE_SIZE, TestCluster
from tests.drive_files import image_of

BLOCKS = 64


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(drive_watch, "CHECK_INTERVAL_S", 0.02)
    monkeypatch.setattr(drive_watch, "RETRY_INTERVAL_S", 0.02)
    monkeypatch.setattr(drive_watch, "RETRY_S", 0.05)


@pytest.fixture
async def cluster(tmp_path, nursery):
    cluster = await TestCluster(tmp_path, nursery).start()
    await cluster.create_volume(copies=3)
    await cluster.start_host("n1")
    return cluster


class Writer:
    """Writes on and on to a file; knows what was acknowledged."""

    def __init__(self, cluster: TestCluster) -> None:
        self.cluster = cluster
        self.data = bytearray(BLOCKS * BLOCK_SIZE)
        self.round = 0

    async def start(self) -> None:
        await self.cluster.wait_serving()
        self.mount = await self.cluster.mount("n3")
        self.ino = await self.mount.make(b"file")
        await self.mount.acquire(self.ino, 3)
        await self.write()

    async def write(self) -> None:
        self.round += 1
        data = os.urandom(BLOCKS * BLOCK_SIZE)
        await self.mount.write(self.ino, data)
        self.data[:] = data

    async def check(self) -> None:
        assert await self.mount.read(self.ino, BLOCKS) == self.data


@pytest.fixture
async def writer(cluster):
    writer = Writer(cluster)
    await writer.start()
    return writer


def served(cluster, node="n2"):
    server = cluster.servers[node]
    return server.service.drives.by_id(server.drive_id)


def slabs_without(cluster, service, node="n2"):
    """Slabs in whose in-sync set the node's drive is not."""
    drive = cluster.servers[node].drive_id
    books = [service.changes.book, *(book for book in service._health._books)]
    return [
        d.slab for book in books for d in book.all()
        if not any(m.drive == drive and m.role == ROLE_IN_SYNC for m in d.members)
    ]  # fmt: skip


def all_slabs(service):
    return [d.slab for book in service._health._books for d in book.all()]


async def wait_failed(cluster, service, fault):
    await cluster.wait(lambda: served(cluster).drive is None and served(cluster).fault == fault)
    await cluster.wait(lambda: len(set(slabs_without(cluster, service))) == len(all_slabs(service)))


async def wait_whole(cluster, service, within_s=60):
    await cluster.wait(lambda: not slabs_without(cluster, service), within_s)


def truncate(path):
    os.truncate(path, DRIVE_SIZE - 64 * MIB)


def delete(path):
    os.rename(path, f"{path}.keep")
    image_of(f"{path}.keep", path.with_name("copy"))
    os.unlink(f"{path}.keep")


def make_read_only(path):
    os.chmod(path, 0o444)


def overwrite_all(path):
    with open(path, "r+b") as file:
        for start in range(0, DRIVE_SIZE, MIB):
            file.seek(start)
            file.write(bytes(MIB))


async def test_a_drive_file_deleted_under_load_fails_and_comes_back_when_it_is_put_back(cluster, writer):
    service = await cluster.wait_serving()
    path = cluster.servers["n2"].path
    delete(path)
    await wait_failed(cluster, service, DELETED)
    await writer.write()
    await writer.check()
    os.rename(path.with_name("copy"), path)
    await wait_whole(cluster, service)
    await writer.check()


async def test_a_drive_file_made_read_only_fails_and_comes_back_when_it_may_be_written_again(cluster, writer):
    service = await cluster.wait_serving()
    path = cluster.servers["n2"].path
    make_read_only(path)
    await wait_failed(cluster, service, READ_ONLY)
    await writer.write()
    os.chmod(path, 0o600)
    await wait_whole(cluster, service)
    await writer.check()


async def test_a_truncated_drive_file_fails_and_is_refused_until_it_has_been_made_anew(cluster, writer):
    """Its data beyond the cut is gone; the superblocks at its end too. As a whole it is not used again."""
    service = await cluster.wait_serving()
    truncate(cluster.servers["n2"].path)
    await wait_failed(cluster, service, TRUNCATED)
    await writer.write()
    await trio.sleep(0.2)
    assert served(cluster).drive is None
    assert "truncated" in served(cluster).state
    await writer.check()


async def test_an_overwritten_drive_file_never_turns_data_into_zeros(cluster, writer, monkeypatch):
    service = await cluster.wait_serving()
    overwrite_all(cluster.servers["n2"].path)
    await writer.check()  # before anybody has noticed
    await wait_failed(cluster, service, OVERWRITTEN)
    await writer.write()
    await writer.check()


@pytest.mark.parametrize(("number", "fault"), [(28, FULL), (5, IO_ERROR), (30, READ_ONLY)])
async def test_a_write_error_fails_the_drive_as_a_whole_and_it_comes_back(
    cluster, writer, monkeypatch, number, fault
):
    service = await cluster.wait_serving()
    fd = served(cluster).drive.fd
    real = os.pwrite
    broken = True
    monkeypatch.setattr(drive_watch, "room_around", lambda path: 0 if broken else 1 << 40)

    def pwrite(target, data, offset):
        if target == fd and broken:
            raise OSError(number, os.strerror(number))
        return real(target, data, offset)

    monkeypatch.setattr(slab_copy.os, "pwrite", pwrite)
    await writer.write()
    await cluster.wait(lambda: served(cluster).drive is None or served(cluster).drive.opens > 1)
    broken = False
    await writer.write()
    await wait_whole(cluster, service)
    assert served(cluster).drive.opens > 1
    assert served(cluster).failures >= 1 and served(cluster).last_failure.startswith("cannot ")  # Transient error
    await writer.check()


async def test_a_copy_whose_tables_were_overwritten_is_made_anew_from_another_one(cluster, writer):
    """The header of a slot's metadata is damaged: the copy is not believed, and not needed either."""
    service = await cluster.wait_serving()
    slab = next(iter(service.changes.book.all())).slab
    copy = cluster.copy("n2", slab)
    layout = served(cluster).drive.layout
    old_slot = copy.slot
    with open(cluster.servers["n2"].path, "r+b") as file:
        os.pwrite(file.fileno(), bytes(layout.metadata_stride), layout.slot_metadata_offset(copy.slot))
    with pytest.raises(Exception, match="damaged"):
        copy.read_blocks(BLOCKS, 1)
    service.members.look_into([cluster.servers["n2"].drive_id])
    await writer.write()
    await cluster.wait(lambda: (now := cluster.copy("n2", slab)) is not None and now is not copy)
    await wait_whole(cluster, service)
    assert cluster.copy("n2", slab).slot != old_slot
    await writer.check()


async def test_a_drive_whose_beginning_is_overwritten_is_not_believed_for_its_end(cluster, writer):
    """Superblocks at the end are whole; tables and slot entries are zeros."""
    service = await cluster.wait_serving()
    with open(cluster.servers["n2"].path, "r+b") as file:
        file.write(bytes(2 * MIB))
    await writer.check()
    await wait_failed(cluster, service, OVERWRITTEN)
    await writer.write()
    await cluster.wait(lambda: served(cluster).fault == DAMAGED)  # tried again, and refused
    assert "drive reset" in served(cluster).state
    await writer.check()


async def test_superblock_copies_that_rot_are_rewritten_while_the_drive_is_in_use(cluster, writer):
    drive = served(cluster).drive
    offsets = drive.layout.superblock_offsets
    with open(drive.path, "r+b") as file:
        for offset in offsets[:3]:
            os.pwrite(file.fileno(), b"\xff", offset + 100)
    await cluster.wait(lambda: drive.counters.healed >= 3)
    assert served(cluster).drive is drive
