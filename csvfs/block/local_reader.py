"""Reading this node's copies straight from the drive files.

Place      block floor, under bus.py.
Why        A READ through the drive server costs two processes about 60 us of CPU; pread of data and checksum entry
           costs 3. The checksum is the seqlock: what is torn by a write under way, or belongs to another slab by
           now, does not verify, and is read again through the drive server.
Owns       read-only descriptors of drive files, and where each slab lies in them (asked for by `locate`).
Rule       Only copies that are in sync in the newest descriptor learned are read (I5).
"""

import logging
import os
from collections import deque
from struct import Struct
from typing import NamedTuple

import trio

from csvfs.block.server_links import ServerLinks
from csvfs.errors import CsvfsError
from csvfs.ids import DriveId, NodeName, SlabId, VolumeId
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import (
    NEVER_WRITTEN,
    ROLE_IN_SYNC,
    ZERO_BLOCK,
    SlabDescriptor,
    block_checksum,
    slab_seed,
    unpack_checksums,
)

log = logging.getLogger(__name__)

LOCATE_TIMEOUT_S = 2.0
_ONE = Struct("<I")
_NOWAIT = os.RWF_NOWAIT


class Location(NamedTuple):
    fd: int
    data_offset: int
    checksum_offset: int
    written_offset: int
    header_offset: int
    header: bytes  # of the slot's metadata, as long as the slot is this slab's
    seed: int


class LocalReader:
    """Where this node's in-sync copies lie. `read` never waits: not for a lock, a server, or a disk."""

    def __init__(self, links: ServerLinks, *, volume: VolumeId, local_node: NodeName) -> None:
        self._links = links
        self._volume = volume
        self._node = local_node
        self._locations: dict[SlabId, Location] = {}
        self._drives: dict[SlabId, DriveId] = {}  # slabs with an in-sync copy here
        self._wanted: deque[SlabId] = deque()
        self._asked: set[SlabId] = set()
        self._want = trio.Event()
        self._files: dict[str, int] = {}

    def learn(self, descriptor: SlabDescriptor) -> None:
        """Take the slab's newest descriptor: forget, or ask for, where its copy here lies."""
        slab = descriptor.slab
        self._locations.pop(slab, None)
        self._asked.discard(slab)
        for member in descriptor.members:
            if member.node == self._node and member.role == ROLE_IN_SYNC:
                self._drives[slab] = member.drive
                self._ask(slab)
                return
        self._drives.pop(slab, None)

    def node_lost(self, node: NodeName) -> None:
        """The local drive server went away: it may come back with other drives."""
        if node == self._node:
            self._locations.clear()
            self._asked.clear()

    def _ask(self, slab: SlabId) -> None:
        if slab not in self._asked:
            self._asked.add(slab)
            self._wanted.append(slab)
            self._want.set()

    def read(self, slab: SlabId, block: int, count: int) -> bytes | bytearray | None:
        """Verified blocks, or None: not here, not known where, not in memory, or not verifying now."""
        location = self._locations.get(slab)
        if location is None:
            if slab in self._drives:
                self._ask(slab)
            return None
        fd, data_offset, checksum_offset, _, _, _, seed = location
        data = bytearray(count * BLOCK_SIZE)
        packed = bytearray(4 * count)
        try:
            os.preadv(fd, (packed,), checksum_offset + 4 * block, _NOWAIT)
            got = os.preadv(fd, (data,), data_offset + block * BLOCK_SIZE, _NOWAIT)
        except OSError:  # EAGAIN: not in the page cache. Any other: the drive server will say what it is.
            return None
        if count == 1:
            (checksum,) = _ONE.unpack(packed)
            if checksum == NEVER_WRITTEN:
                return ZERO_BLOCK if _holes_hold(location, block, packed) else None
            if got == BLOCK_SIZE and block_checksum(data, seed, block) == checksum:
                return data
            return None
        if got != len(data) or not _verify(data, packed, seed, block):
            return None
        if b"\0\0\0\0" in packed and not _holes_hold(location, block, packed):
            return None
        return data

    async def run_forever(self) -> None:
        """Find out where wanted slabs lie, until cancelled."""
        while True:
            await self._want.wait()
            self._want = trio.Event()
            while self._wanted:
                slab = self._wanted.popleft()
                try:
                    await self._locate(slab)
                except (CsvfsError, OSError) as error:
                    log.info("slab %d is read through the drive server: %s", slab, error)
                    await trio.sleep(0.1)
                    self._asked.discard(slab)

    async def _locate(self, slab: SlabId) -> None:
        drive = self._drives.get(slab)
        if drive is None:
            return
        server = await self._links.serving(self._node, drive)
        server.drive_index(drive)  # DriveFailed when it is not there
        answer = await server.link.call("locate", {"drive": drive, "slab": slab}, timeout_s=LOCATE_TIMEOUT_S)
        path = server.drives[drive].path
        fd = self._files.get(path)
        if fd is None:
            fd = self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        elif not os.path.samestat(os.fstat(fd), os.stat(path)):  # replaced by another file
            os.close(fd)
            fd = self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if self._drives.get(slab) == drive:  # no newer descriptor came meanwhile
            seed = slab_seed(self._volume, slab)
            self._locations[slab] = Location(
                fd,
                int(answer["data_offset"]),
                int(answer["checksum_offset"]),
                int(answer["written_offset"]),
                int(answer["header_offset"]),
                bytes(answer["header"]),
                seed,
            )

    def close(self) -> None:
        self._locations.clear()
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


def _holes_hold(location: Location, block: int, packed: bytearray) -> bool:
    """Whether blocks without a checksum are holes of this slab (FORMAT.md, "Readers beside the drive server").

    A written bit without a checksum is a damaged table; another header is a slot given to another slab.
    """
    count = len(packed) // 4
    first = block >> 3
    bits = bytearray(((block + count - 1) >> 3) - first + 1)
    header = bytearray(len(location.header))
    try:
        got = os.preadv(location.fd, (bits,), location.written_offset + first, _NOWAIT)
        got += os.preadv(location.fd, (header,), location.header_offset, _NOWAIT)
    except OSError:
        return False
    if got != len(bits) + len(header) or header != location.header:
        return False
    return not any(
        checksum == NEVER_WRITTEN and bits[(number >> 3) - first] >> (number & 7) & 1
        for number, checksum in enumerate(unpack_checksums(memoryview(packed), count), block)
    )


def _verify(data: bytearray, packed: bytearray, seed: int, block: int) -> bool:
    """Check every block; zero those never written, whatever the medium holds there."""
    view = memoryview(data)
    for index, checksum in enumerate(unpack_checksums(memoryview(packed), len(packed) // 4)):
        begin = index * BLOCK_SIZE
        if checksum == NEVER_WRITTEN:
            data[begin : begin + BLOCK_SIZE] = ZERO_BLOCK
        elif block_checksum(view[begin : begin + BLOCK_SIZE], seed, block + index) != checksum:
            return False
    return True
