"""Reading blocks from in-sync members, and healing bad copies found on the way (I9).

Place      block floor, under bus.py.
Hedging    A read that takes much longer than its peers usually do is sent to another in-sync member too; the
           first good answer wins. A member that is slow all the time is asked last (member_latency.py).
"""

import logging
from time import monotonic
from typing import TYPE_CHECKING

import trio

from csvfs.block.compression import Asking, expand
from csvfs.block.local_reader import LocalReader
from csvfs.block.member_latency import MemberLatencies
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
    READ_COMPRESSED,
    ZERO_BLOCK,
    Member,
    SlabDescriptor,
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
    """Checksums and data of one READ_DATA, copied out of the receive buffer; or the error. `done`: it is here."""

    __slots__ = ("abandoned", "answered_at", "data", "done", "error", "packed")

    def __init__(self, done: trio.Event | None = None) -> None:
        self.packed = b""
        self.data = bytearray()
        self.error: CsvfsError | None = None
        self.done = trio.Event() if done is None else done
        self.answered_at = 0.0
        self.abandoned = False  # another member was quicker

    def __call__(self, frame: Frame | None, error: CsvfsError | None) -> None:
        self.answered_at = monotonic()
        if frame is None:
            self.error = error
        elif not self.abandoned:
            self.packed = bytes(frame.head)
            self.data = bytearray(frame.payload)
        self.done.set()

    def verified(
        self, peer: str, slab: SlabId, block: int, count: int, seed: int
    ) -> tuple[bytes, bytearray]:
        """Packed checksums and data; never-written blocks are zeros. Raises as read_blocks."""
        if self.error is not None:
            raise self.error
        data = self.data
        if len(data) != count * BLOCK_SIZE:
            raise ProtocolError(f"{peer} answered a READ of {count} blocks with {len(data)} bytes")
        view = memoryview(data)
        for position, checksum in enumerate(unpack_checksums(self.packed, count)):
            begin = position * BLOCK_SIZE
            if checksum == NEVER_WRITTEN:
                data[begin : begin + BLOCK_SIZE] = ZERO_BLOCK
            elif block_checksum(view[begin : begin + BLOCK_SIZE], seed, block + position) != checksum:
                raise Corrupt(f"slab {slab} block {block + position}: damaged on the way from {peer}")
        return self.packed, data


async def read_blocks(
    link: Link,
    index: int,
    slab: SlabId,
    epoch: int,
    block: int,
    count: int,
    seed: int,
    asking: Asking | None = None,
) -> tuple[bytes, bytearray]:
    """One READ: (packed checksums, data), verified here; never-written blocks are zeros.

    asking   may ask for the data as an lz4 frame; it is verified as it comes out of that.
    Raises  what the server answers (Corrupt, Unavailable, DriveFailed ...), ProtocolError, Disconnected.
    """
    answer = ReadAnswer()
    flags = READ_COMPRESSED if asking is not None and asking.next() else 0
    began = trio.current_time()
    link.request(Kind.READ, BLOCK_HEAD.pack(slab, 0, 0, epoch, block, count, index, flags), None, answer)
    with trio.move_on_after(READ_TIMEOUT_S) as scope:
        await answer.done.wait()
    if scope.cancelled_caught:
        raise Disconnected(f"{link.peer} did not answer a READ within {READ_TIMEOUT_S:g} s")
    if answer.error is None and flags and len(answer.data) < count * BLOCK_SIZE:
        answer.data = await trio.to_thread.run_sync(expand, answer.data, count * BLOCK_SIZE)
    if answer.error is None and asking is not None:
        asking.took(bool(flags), count * BLOCK_SIZE, trio.current_time() - began)
    return answer.verified(link.peer, slab, block, count, seed)


class Reader:
    """Reads through drive servers, nearest member first."""

    def __init__(self, bus: "Bus", links: ServerLinks, local: LocalReader, *, local_node: NodeName) -> None:
        self._bus = bus
        self._links = links
        self._local = local
        self._node = local_node
        self.latencies = MemberLatencies()

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
        attempt = _HedgedRead(self, descriptor, self._order(descriptor.in_sync), block, count)
        good = await attempt.run()
        bad = attempt.bad
        if good is not None:
            for damaged in bad:
                await self._heal(damaged, slab, descriptor.epoch, block, count, *good)
            return good[1]
        if bad and count > 1:
            return await self._read_block_by_block(slab, block, count)
        if bad:
            raise Corrupt(
                f"slab {slab} block {block}: none of {len(bad)} copies matches its checksum; {attempt.failure}"
            )
        raise Unavailable(str(attempt.failure))

    def _order(self, members: tuple[Member, ...]) -> list[Member]:
        """This node's first, those that are slow all the time last, and before them those behind a detour."""
        slow = self.latencies.slow([member.drive for member in members])
        return sorted(
            members, key=lambda m: (m.drive in slow, self._links.is_detoured(m.node), m.node != self._node)
        )

    async def send(
        self, member: Member, descriptor: SlabDescriptor, block: int, count: int, answer: ReadAnswer
    ) -> Link:
        """Send one READ; `answer` is called later. Raises what keeps it from being sent."""
        server = await self._links.serving(member.node, member.drive)
        index = server.drive_index(member.drive)
        head = BLOCK_HEAD.pack(descriptor.slab, 0, 0, descriptor.epoch, block, count, index, 0)
        server.link.request(Kind.READ, head, None, answer)
        return server.link

    def is_ready(self, member: Member) -> bool:
        return self._links.ready(member.node) is not None

    def seed(self, slab: SlabId) -> int:
        return self._bus.seed(slab)

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
        server = await self._links.serving(member.node, member.drive)
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

class _HedgedRead:
    """One read of a range: from one member, from the next where that fails or takes too long.

    bad      members whose copy does not verify.
    failure  why there is no answer, when there is none.
    """

    def __init__(
        self, reader: Reader, descriptor: SlabDescriptor, members: list[Member], block: int, count: int
    ) -> None:
        self._reader = reader
        self._descriptor = descriptor
        self._members = members
        self._block = block
        self._count = count
        self._next = 0
        self._sent: list[tuple[Member, ReadAnswer, Link, float]] = []
        self._answered = trio.Event()
        self.bad: list[Member] = []
        self.failure: CsvfsError = Unavailable(
            f"slab {descriptor.slab} has no in-sync copy that can be reached now"
        )

    async def run(self) -> tuple[bytes, bytearray] | None:
        """Checksums and data of the first good answer. Raises Fenced."""
        try:
            while self._sent or self._next < len(self._members):
                if not self._sent:
                    await self._send_next()
                    continue
                waited_for = self._sent[-1][0]
                peers = [member.drive for member in self._members if member is not waited_for]
                hedging = self._next < len(self._members)
                timeout_s = self._reader.latencies.hedge_after_s(peers) if hedging else READ_TIMEOUT_S
                with trio.move_on_after(timeout_s) as scope:
                    await self._answered.wait()
                if not scope.cancelled_caught:
                    good = self._take_answers()
                    if good is not None:
                        return good
                elif not hedging:
                    self._give_up()
                elif self._reader.is_ready(self._members[self._next]):
                    await self._send_next()
                else:  # a connection that would have to be opened first is no shortcut
                    self._members.append(self._members.pop(self._next))
                    if not any(self._reader.is_ready(m) for m in self._members[self._next :]):
                        await self._wait_last()
            return None
        finally:
            for _, answer, _, _ in self._sent:
                answer.abandoned = True

    async def _wait_last(self) -> None:
        with trio.move_on_after(READ_TIMEOUT_S) as scope:
            await self._answered.wait()
        if scope.cancelled_caught:
            self._give_up()

    def _give_up(self) -> None:
        """Nobody of those who were asked answers."""
        for member, answer, link, _ in self._sent:
            answer.abandoned = True
            self._note(member, Disconnected(f"{link.peer} did not answer a READ within {READ_TIMEOUT_S:g} s"))
        self._sent.clear()

    async def _send_next(self) -> None:
        member = self._members[self._next]
        self._next += 1
        answer = ReadAnswer(self._answered)
        try:
            began = monotonic()
            link = await self._reader.send(member, self._descriptor, self._block, self._count, answer)
            self._sent.append((member, answer, link, began))
        except CsvfsError as error:
            self._note(member, error)

    def _take_answers(self) -> tuple[bytes, bytearray] | None:
        self._answered = trio.Event()
        waiting = []
        good = None
        slab = self._descriptor.slab
        for member, answer, link, began in self._sent:
            if not answer.answered_at:
                answer.done = self._answered
                waiting.append((member, answer, link, began))
                continue
            if answer.error is None:
                self._reader.latencies.record(member.drive, answer.answered_at - began)
            try:
                seed = self._reader.seed(slab)
                good = good or answer.verified(link.peer, slab, self._block, self._count, seed)
            except CsvfsError as error:
                self._note(member, error)
        self._sent = waiting
        for member, _, _, began in waiting if good is not None else ():
            self._reader.latencies.record(member.drive, monotonic() - began)  # so long at least
        return good

    def _note(self, member: Member, error: CsvfsError) -> None:
        if isinstance(error, Fenced):
            raise error
        if isinstance(error, Corrupt):
            self.bad.append(member)
            self.failure = error
        elif not self.bad:
            self.failure = error
