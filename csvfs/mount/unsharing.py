"""Unsharing: a block that several files have is replaced by a fresh one before it is written (copy on write).

Place      mount floor; under write_path.py.
Order      1. `unshare`: the coordinator sets fresh blocks aside, for whole chunks around what is written.
           2. They are written: what is to be written over what the file has there.
           3. They are flushed. Only then is anything known of them that a power cut cannot take away; what the file
              had before may have been flushed long ago.
           4. `replace`: the coordinator puts them in place of the shared ones, of which another file may be the only
              owner from then on, and write there. So no read of the old ones is under way here, and nothing that was
              learned of them is used behind it (quiet.py).
           Whatever ends in between, the file has what it had. Blocks set aside in vain are freed by the coordinator.
"""

from collections.abc import Callable

from csvfs.errors import CsvfsError, LeaseLost
from csvfs.mount.file_state import LEASE_WRITE, FileState
from csvfs.mount.leases import Leases
from csvfs.mount.quiet import none_told
from csvfs.mount.reports import Reports
from csvfs.units import BLOCK_SIZE, BLOCKS_PER_CHUNK
from csvfs.volume import file_io
from csvfs.volume.file_io import BlockBus, Delivery

Row = list[int]  # file block, count, slab, slab block


def around(first: int, last: int) -> tuple[int, int]:
    """What is replaced together with blocks `first..last`: the chunks that they lie in."""
    return first - first % BLOCKS_PER_CHUNK, -(-last // BLOCKS_PER_CHUNK) * BLOCKS_PER_CHUNK


class Unsharing:
    def __init__(
        self, leases: Leases, bus: BlockBus, reports: Reports, give_up: Callable[[FileState], None]
    ) -> None:
        self._leases = leases
        self._bus = bus
        self._reports = reports
        self._give_up = give_up

    async def replace(self, state: FileState, first: int, last: int, blocks: memoryview) -> bool:
        """Have no shared block in `first..last`; the caller has claimed all `around` them, under the write lease.

        blocks   what is to be written there; what is replaced has it then, on the media. True: that is all of it.
        Raises   NoSpace, LeaseLost; Unavailable ...: nothing was written, or all of that. Cancel as these.
        """
        start, end = around(first, last)
        end = max(last, min(end, -(-state.size // BLOCK_SIZE)))
        if not state.extents.covers(start, end - start):
            start, end = first, last  # what lies around is not known
        losses = state.losses
        args = {"ino": state.ino, "block": start, "count": end - start}
        reply = await self._reports.ask(state, "unshare", args)
        rows: list[Row] = reply["rows"]
        if rows:
            self._leases.take_slabs(state, rows, reply)
            written = {row[2]: file_io.epoch_of(self._bus, row[2]) for row in rows}
            await self._write_all(state, rows, first, last, blocks)
            await self._bus.flush(written)
            if (lost := file_io.lost_before_flush(self._bus, written)) is not None:
                raise lost
            async with none_told(state, [(block, block + count) for block, count, _, _ in rows]):
                if state.losses != losses:  # somebody may have written to the file since it was copied
                    raise LeaseLost(f"the write lease of inode {state.ino} was lost while shared blocks were copied")
                await self._put_in_place(state, rows)
        elif state.losses != losses:
            raise LeaseLost(f"the write lease of inode {state.ino} was lost; its shared blocks are asked for again")
        state.extents.unshare(start, end - start)
        inside = (min(last, block + count) - max(first, block) for block, count, _, _ in rows)
        return sum(max(0, count) for count in inside) == last - first

    async def _write_all(
        self, state: FileState, rows: list[Row], first: int, last: int, blocks: memoryview
    ) -> None:
        deliveries: list[Delivery] = []
        failure: CsvfsError | None = None
        try:
            for row in rows:
                content = await self._content(state, row, first, last, blocks)
                deliveries.append(Delivery(self._bus, [(row[0], row[1], row[2], row[3])], content))
        finally:
            # Also behind an error: while one is under way its blocks are not anybody else's.
            for delivery in deliveries:
                failure = await delivery.wait() or failure
        if failure is not None:
            raise failure

    async def _content(
        self, state: FileState, row: Row, first: int, last: int, blocks: memoryview
    ) -> memoryview:
        """What the file is to have in the blocks of `row`: `blocks` in `first..last`, else what it has."""
        block, end = row[0], row[0] + row[1]
        low, high = max(block, first), min(end, last)
        if low == block and high == end:
            return blocks[(low - first) * BLOCK_SIZE : (high - first) * BLOCK_SIZE]
        pieces = state.extents.pieces(block, end - block)
        if pieces is None:
            raise LeaseLost(f"the write lease of inode {state.ino} was lost; the write is tried again")
        content = await file_io.read_kept(self._bus, pieces)
        if low < high:
            at = (low - block) * BLOCK_SIZE
            new = blocks[(low - first) * BLOCK_SIZE : (high - first) * BLOCK_SIZE]
            content[at : at + len(new)] = new
        return memoryview(content)

    async def _put_in_place(self, state: FileState, rows: list[Row]) -> None:
        try:
            reply = await self._reports.ask(state, "replace", {"ino": state.ino, "rows": rows})
        except LeaseLost:
            raise
        except BaseException as error:
            if not isinstance(error, CsvfsError) or error.retryable:
                self._give_up(state)  # it may be done or not
            raise
        if state.lease < LEASE_WRITE:
            raise LeaseLost(f"the write lease of inode {state.ino} was lost while shared blocks were replaced")
        for row in rows:
            state.extents.learn(row[0], row[1], [row])
        self._reports.changed(state, reply)
