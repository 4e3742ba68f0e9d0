"""Reading blocks from in-sync members, and healing bad copies found on the way (I9).

Place      block floor, under bus.py.
"""

import logging
from typing import TYPE_CHECKING

import trio

from csvfs.block.local_reader import LocalReader
from csvfs.block.server_links import ServerLinks
from csvfs.errors import (
    Corrupt,
    CsvfsError,
    Disconnected,
    Fenced,
    ProtocolError,
    StaleEpoch,
    TimedOut,
    Unavailable,
)
from csvfs.ids import NodeName, SlabId
from csvfs.net.link import Link
from csvfs.units import BLOCK_SIZE
from csvfs.wire.block_messages import (
    BLOCK_HEAD,
    NEVER_WRITTEN,
    ZERO_BLOCK,
    Member,
    block_checksum,
    unpack_checksums,
)
from csvfs.wire.frames import Frame, Kind

if TYPE_CHECKING:
    from csvfs.block.bus import Bus

log = logging.getLogger(__name__)

READ_TIMEOUT_S = 10.0
HEAL_TIMEOUT_S = 5.0


class ReadAnswer:
    """Checksums and data of one READ_DATA, copied out of the receive buffer."""

    __slots__ = ("data", "done", "error", "packed")

    def __init__(self) -> None:
        self.packed = b""
        self.data = bytearray()
        self.error: CsvfsError | None = None
        self.done = trio.Event()

    def __call__(self, frame: Frame | None, error: CsvfsError | None) -> None:
        if frame is None:
            self.error = error
        else:
            self.packed = bytes(frame.head)
            self.data = bytearray(frame.payload)
        self.done.set()


async def read_blocks(
    link: Link, index: int, slab: SlabId, epoch: int, block: int, count: int, seed: int
) -> tuple[bytes, bytearray]:
    """One READ: (packed checksums, data), verified here; never-written blocks are zeros.

    Raises  what the server answers (Corrupt, Unavailable, DriveFailed ...), ProtocolError, Disconnected.
    """
    answer = ReadAnswer()
    link.request(Kind.READ, BLOCK_HEAD.pack(slab, 0, 0, epoch, block, count, index, 0), None, answer)
    with trio.move_on_after(READ_TIMEOUT_S) as scope:
        await answer.done.wait()
    if scope.cancelled_caught:
        raise Disconnected(f"{link.peer} did not answer a READ within {READ_TIMEOUT_S:g} s")
    if answer.error is not None:
        raise answer.error
    data = answer.data
    if len(data) != count * BLOCK_SIZE:
        raise ProtocolError(f"{link.peer} answered a READ of {count} blocks with {len(data)} bytes")
    view = memoryview(data)
    for position, checksum in enumerate(unpack_checksums(answer.packed, count)):
        begin = position * BLOCK_SIZE
        if checksum == NEVER_WRITTEN:
            data[begin : begin + BLOCK_SIZE] = ZERO_BLOCK
        elif block_checksum(view[begin : begin + BLOCK_SIZE], seed, block + position) != checksum:
            raise Corrupt(f"slab {slab} block {block + position}: damaged on the way from {link.peer}")
    return answer.packed, data


class Reader:
    """Reads through drive servers, nearest member first."""

    def __init__(self, bus: "Bus", links: ServerLinks, local: LocalReader, *, local_node: NodeName) -> None:
        self._bus = bus
        self._links = links
        self._local = local
        self._node = local_node

    async def read(self, slab: SlabId, block: int, count: int) -> bytes | bytearray:
        """See Bus.read."""
        data = self._local.read(slab, block, count)
        if data is not None:
            return data
        try:
            return await self._read_members(slab, block, count)
        except (Unavailable, Corrupt) as error:
            before = self._bus.descriptor(slab)
            after = await self._bus.ask_owner(slab, str(error))
            # Even the same epoch may be readable now: the owner has installed it before it answered.
            if isinstance(error, Corrupt) and before is not None and after.epoch == before.epoch:
                raise
            return await self._read_members(slab, block, count)

    async def _read_members(self, slab: SlabId, block: int, count: int) -> bytes | bytearray:
        descriptor = self._bus.descriptor(slab)
        assert descriptor is not None, "read of a slab that was never learned"
        members = sorted(descriptor.in_sync, key=lambda member: member.node != self._node)
        bad: list[Member] = []
        failure: CsvfsError = Unavailable(f"slab {slab} has no in-sync copy that can be reached now")
        for member in members:
            try:
                server = await self._links.connected(member.node)
                index = server.drive_index(member.drive)
                seed = self._bus.seed(slab)
                packed, data = await read_blocks(
                    server.link, index, slab, descriptor.epoch, block, count, seed
                )
            except Fenced:
                raise
            except Corrupt as error:
                bad.append(member)
                failure = error
                continue
            except CsvfsError as error:
                failure = failure if bad else error
                continue
            for damaged in bad:
                await self._heal(damaged, slab, descriptor.epoch, block, count, packed, data)
            return data
        if bad and count > 1:
            return await self._read_block_by_block(slab, block, count)
        if bad:
            raise Corrupt(
                f"slab {slab} block {block}: none of {len(bad)} copies matches its checksum; {failure}"
            )
        raise Unavailable(str(failure))

    async def _read_block_by_block(self, slab: SlabId, block: int, count: int) -> bytes:
        """No member has all of the range intact: each block may still have one that is."""
        pieces = [await self._read_members(slab, block + index, 1) for index in range(count)]
        return b"".join(pieces)

    async def _heal(
        self, member: Member, slab: SlabId, epoch: int, block: int, count: int, packed: bytes, data: bytearray
    ) -> None:
        """Offer verified blocks to a member whose copy did not verify; it rewrites those that still do not."""
        try:
            try:
                await self._offer(member, slab, epoch, block, count, packed, data)
            except StaleEpoch as stale:
                # Who only reads hears of no new epochs. What was read is good at the new one too: our lease says
                # that nobody has written these blocks.
                descriptor = await self._bus.ask_owner(slab, str(stale))
                if member.drive not in [known.drive for known in descriptor.in_sync]:
                    return
                await self._offer(member, slab, descriptor.epoch, block, count, packed, data)
            log.warning(
                "slab %d blocks %d to %d on drive %s of node %s did not verify; read from another copy, rewritten",
                slab, block, block + count - 1, member.drive.hex()[:8], member.node,
            )  # fmt: skip
        except CsvfsError as error:
            log.warning("slab %d on node %s could not be healed: %s", slab, member.node, error)

    async def _offer(
        self, member: Member, slab: SlabId, epoch: int, block: int, count: int, packed: bytes, data: bytearray
    ) -> None:
        """One HEAL. Raises what the server answers, TimedOut."""
        server = await self._links.connected(member.node)
        index = server.drive_index(member.drive)
        head = BLOCK_HEAD.pack(slab, 0, 0, epoch, block, count, index, 0)
        answer = ReadAnswer()
        server.link.request(Kind.HEAL, head + packed, bytes(data), answer)
        with trio.move_on_after(HEAL_TIMEOUT_S) as scope:
            await answer.done.wait()
        if scope.cancelled_caught:
            raise TimedOut(f"{server.link.peer} did not answer a HEAL within {HEAL_TIMEOUT_S:g} s")
        if answer.error is not None:
            raise answer.error
