"""fallocate and lseek in the file table: what is given back is used no more, and nothing else is touched."""

import os

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from csvfs.errors import BadRequest, FileTooBig, NoSpace, NotSupported, TimedOut
from csvfs.mount.holes import BEYOND_BLOCKS_MAX, KEEP_SIZE, PUNCH_HOLE, WINDOW_BLOCKS, ZERO_RANGE
from csvfs.units import TIB
from tests.mount_nodes import cluster
from tests.test_file_table import BLOCK, FILE, prepared, settle, taken_nowait

PUNCH = PUNCH_HOLE | KEEP_SIZE


async def test_a_punched_range_reads_as_zeros_and_its_whole_blocks_are_given_back() -> None:
    async with cluster() as c:
        node = await prepared(c)
        await node.table.fallocate(FILE, 100, 3 * BLOCK, PUNCH)
        want = b"o" * 100 + bytes(3 * BLOCK) + b"o" * (BLOCK - 100)
        assert await node.read(FILE, 0, 4 * BLOCK) == want
        assert set(c.coordinator.files[FILE].blocks) == {0, 3}
        other = c.node("n2")
        assert await other.read(FILE, 0, 4 * BLOCK) == want


async def test_blocks_are_given_back_only_when_no_write_is_under_way() -> None:
    async with cluster() as c:
        node = await prepared(c)
        node.bus.hold()
        result = taken_nowait(node, BLOCK, b"n" * BLOCK)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.table.fallocate, FILE, 0, 2 * BLOCK, PUNCH)
            await settle()
            assert "punch" not in c.coordinator.names()
            nursery.start_soon(node.write, FILE, 3 * BLOCK, b"w" * BLOCK)
            await settle()
            assert node.bus.in_flight == 1  # new writes wait: nothing learned before is used behind it
            assert await node.read(FILE, 0, BLOCK) == b"o" * BLOCK
            node.bus.let_go()
        assert result == [None]
        assert await node.read(FILE, 0, 4 * BLOCK) == bytes(2 * BLOCK) + b"o" * BLOCK + b"w" * BLOCK


async def test_a_slow_read_that_began_before_a_punch_sees_no_bytes_of_another_file() -> None:
    async with cluster() as c:
        node = await prepared(c)
        node.bus.local, node.bus.delay = False, 100
        read: list[bytes] = []

        async def look() -> None:
            read.append(await node.read(FILE, 0, 2 * BLOCK))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await settle()
            nursery.start_soon(node.table.fallocate, FILE, 0, 2 * BLOCK, PUNCH)
            await settle()
            assert not read and "punch" not in c.coordinator.names()
        assert read == [b"o" * (2 * BLOCK)]


async def test_a_punch_waits_for_a_layout_that_is_on_its_way() -> None:
    async with cluster() as c:
        node = await prepared(c)
        node.table.leases.states[FILE].extents.clear()
        acquire, answered = c.coordinator._acquire, trio.Event()

        async def answer_late(*args, **kwargs):
            value = await acquire(*args, **kwargs)
            await answered.wait()
            return value

        c.coordinator._acquire = answer_late
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.read, FILE, 0, BLOCK)
            await settle()
            nursery.start_soon(node.table.fallocate, FILE, 0, 2 * BLOCK, PUNCH)
            await settle()
            assert "punch" not in c.coordinator.names()
            answered.set()
        assert await node.read(FILE, 0, 3 * BLOCK) == bytes(2 * BLOCK) + b"o" * BLOCK


async def test_a_write_after_a_punch_gets_space_of_its_own() -> None:
    async with cluster() as c:
        node = await prepared(c)
        old = dict(c.coordinator.files[FILE].blocks)
        await node.table.fallocate(FILE, 0, 4 * BLOCK, PUNCH)
        await node.write(FILE, BLOCK, b"n" * BLOCK)
        assert c.coordinator.files[FILE].blocks[1] not in old.values()
        assert await node.read(FILE, 0, 4 * BLOCK) == bytes(BLOCK) + b"n" * BLOCK + bytes(2 * BLOCK)


async def test_a_hole_up_to_the_end_takes_the_last_partial_block_and_what_lies_behind_it() -> None:
    async with cluster() as c:
        c.coordinator.ahead = 5
        node = await prepared(c)
        await node.table.truncate(FILE, {"size": 2 * BLOCK + 10, "mtime_ns": 1})
        await node.table.fallocate(FILE, BLOCK, 1 << 30, PUNCH)
        assert set(c.coordinator.files[FILE].blocks) == {0}
        assert (await node.table.getattr(FILE))[6] == 2 * BLOCK + 10
        await node.write(FILE, 5 * BLOCK, b"x")
        assert await node.read(FILE, 0, 6 * BLOCK) == b"o" * BLOCK + bytes(4 * BLOCK) + b"x"


async def test_bytes_that_another_node_appends_during_a_punch_of_all_are_kept() -> None:
    for delay in range(0, 24, 3):
        async with cluster() as c:
            c.coordinator.delay = delay
            node, other = await prepared(c, blocks=1), c.node("n2")
            await node.table.truncate(FILE, {"size": 100, "mtime_ns": 1})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(node.table.fallocate, FILE, 0, 100, PUNCH)
                nursery.start_soon(other.write, FILE, 100, b"a" * 100)
            assert await node.read(FILE, 0, 300) == bytes(100) + b"a" * 100


async def test_a_punch_of_unknown_outcome_gives_the_lease_back_before_anything_is_read() -> None:
    async with cluster() as c:
        node = await prepared(c)
        c.coordinator.after["punch"] = [TimedOut("no answer")]  # it was carried out
        with pytest.raises(TimedOut):
            await node.table.fallocate(FILE, 0, 2 * BLOCK, PUNCH)
        await settle()
        assert node.table.holds(FILE) < 3  # it may still be carried out: what is known then must not be used
        assert await node.read(FILE, 0, 4 * BLOCK) == bytes(2 * BLOCK) + b"o" * (2 * BLOCK)


async def test_reserving_grows_the_file_by_windows_and_gives_fresh_space_that_reads_as_zeros() -> None:
    async with cluster() as c:
        node = await prepared(c, blocks=1)
        await node.table.truncate(FILE, {"size": 100, "mtime_ns": 1})
        c.coordinator.calls.clear()
        await node.table.fallocate(FILE, 0, 3 * BLOCK, 0)
        assert await node.read(FILE, 0, 4 * BLOCK) == b"o" * 100 + bytes(3 * BLOCK - 100)
        assert set(c.coordinator.files[FILE].blocks) == {0, 1, 2}
        assert c.coordinator.names().count("allocate") == 1
        c.coordinator.calls.clear()
        await node.write(FILE, BLOCK, b"n" * BLOCK)
        assert "allocate" not in c.coordinator.names()
        c.coordinator._statfs = lambda session: _answer({"free": 1 << 50})
        asked: list[tuple[int, int, int]] = []

        async def allocate(session, ino, block, count, size, mtime_ns):
            asked.append((block, count, size))
            return {"attr": c.coordinator.files[FILE].attr(), "extents": [], "slabs": []}

        c.coordinator._allocate = allocate
        await node.table.fallocate(FILE, 0, 2 * WINDOW_BLOCKS * BLOCK + 5, 0)
        sizes = [WINDOW_BLOCKS * BLOCK, 2 * WINDOW_BLOCKS * BLOCK, 2 * WINDOW_BLOCKS * BLOCK + 5]
        assert asked == [
            (0, WINDOW_BLOCKS, sizes[0]),
            (WINDOW_BLOCKS, WINDOW_BLOCKS, sizes[1]),
            (2 * WINDOW_BLOCKS, 1, sizes[2]),
        ]


async def test_a_file_does_not_grow_over_blocks_that_were_forgotten_while_its_tail_was_zeroed() -> None:
    """W2: behind the end may lie what a writer that died has left there. The lease was lost and had anew meanwhile,
    for another part of the file."""
    async with cluster() as c:
        node = await prepared(c, blocks=1)
        end = 25_600 * BLOCK
        await node.write(FILE, end, b"t" * 50)
        await node.table.truncate(FILE, {"size": end + 20, "mtime_ns": 1})
        file = c.coordinator.files[FILE]
        file.blocks[25_601] = (9, 9)
        c.drives.write(9, 9, b"left" * (BLOCK // 4))
        node.bus.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.table.fallocate, FILE, end, 3 * BLOCK, 0)
            await settle()
            assert node.bus.in_flight == 1 and file.size == end + 20  # its tail
            node.table.refused([FILE])
            nursery.start_soon(node.write, FILE, 0, b"n" * BLOCK)
            await settle()
            assert node.table.holds(FILE) == 3
            node.bus.let_go()
        assert await node.read(FILE, end, 3 * BLOCK) == b"t" * 20 + bytes(3 * BLOCK - 20)


async def test_space_kept_behind_the_end_is_bounded_and_the_size_stays() -> None:
    async with cluster() as c:
        node = await prepared(c)
        c.coordinator._statfs = lambda session: _answer({"free": 1 << 50})
        asked: list[tuple[int, int, int]] = []

        async def allocate(session, ino, block, count, size, mtime_ns):
            asked.append((block, count, size))
            return {"attr": c.coordinator.files[FILE].attr(), "extents": [], "slabs": []}

        c.coordinator._allocate = allocate
        await node.table.fallocate(FILE, 0, 10 << 30, KEEP_SIZE)
        assert asked == [(0, 4 + BEYOND_BLOCKS_MAX, 0)]
        assert (await node.table.getattr(FILE))[6] == 4 * BLOCK


async def _answer(value: dict) -> dict:
    return value


async def test_what_cannot_fit_is_refused_before_anything_is_taken() -> None:
    async with cluster() as c:
        node = await prepared(c)
        before = dict(c.coordinator.files[FILE].blocks)
        with pytest.raises(NoSpace, match="no room"):
            await node.table.fallocate(FILE, 0, 1 << 30, 0)  # 512 MiB are free
        with pytest.raises(FileTooBig):
            await node.table.fallocate(FILE, 16 * TIB - 1, 2, 0)
        for offset, length in ((0, 0), (-1, 5)):
            with pytest.raises(BadRequest):
                await node.table.fallocate(FILE, offset, length, 0)
        for mode in (PUNCH_HOLE, PUNCH | ZERO_RANGE, 8, 0x20, 0x40):
            with pytest.raises(NotSupported):
                await node.table.fallocate(FILE, 0, 1, mode)
        assert c.coordinator.files[FILE].blocks == before


async def test_seeking_finds_data_and_holes_of_what_another_node_is_writing() -> None:
    async with cluster() as c:
        node, other = await prepared(c), c.node("n2")
        await node.write(FILE, 10 * BLOCK, b"far")
        for who in (other, node):
            seek = who.table.seek
            assert await seek(FILE, 5, os.SEEK_DATA) == 5
            assert await seek(FILE, 5, os.SEEK_HOLE) == 4 * BLOCK
            assert await seek(FILE, 4 * BLOCK + 1, os.SEEK_HOLE) == 4 * BLOCK + 1
            assert await seek(FILE, 4 * BLOCK + 1, os.SEEK_DATA) == 10 * BLOCK
            assert await seek(FILE, 10 * BLOCK + 1, os.SEEK_HOLE) == 10 * BLOCK + 3
            assert await seek(FILE, 10 * BLOCK + 3, os.SEEK_DATA) is None
            assert await seek(FILE, 10 * BLOCK + 3, os.SEEK_HOLE) is None
        with pytest.raises(BadRequest):
            await node.table.seek(FILE, 0, os.SEEK_SET)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 1), st.integers(0, 11), st.integers(1, 4)),
        st.tuples(st.just("punch"), st.integers(0, 1), st.integers(0, 11), st.integers(1, 4)),
        st.tuples(st.just("read"), st.integers(0, 1), st.integers(0, 11), st.integers(1, 4)),
    ),
    min_size=3,
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(steps, st.integers(0, 4))
def test_I4_punches_writes_and_reads_of_two_nodes_at_once_never_mix_up_blocks(
    history: list, delay: int
) -> None:
    """A block holds what one of the operations upon it left, a read shows such a thing: never bytes of elsewhere."""

    async def play() -> None:
        async with cluster() as c:
            c.coordinator.add_file(FILE)
            c.coordinator.delay = delay
            nodes = [c.node("n1"), c.node("n2")]
            possible: list[set[bytes]] = [{b"\0" * BLOCK} for _ in range(16)]
            await nodes[0].write(FILE, 0, b"\0" * (16 * BLOCK))
            for step, (name, _, first, count) in enumerate(history):
                content = bytes([step + 1]) * BLOCK if name == "write" else bytes(BLOCK)
                for block in range(first, first + count) if name != "read" else ():
                    possible[block].add(content)

            async def do(step: int, name: str, who: int, first: int, count: int) -> None:
                node = nodes[who]
                if name == "write":
                    await node.write(FILE, first * BLOCK, bytes([step + 1]) * (count * BLOCK))
                elif name == "punch":
                    await node.table.fallocate(FILE, first * BLOCK, count * BLOCK, PUNCH)
                else:
                    data = await node.read(FILE, first * BLOCK, count * BLOCK)
                    for index in range(count):
                        assert data[index * BLOCK : (index + 1) * BLOCK] in possible[first + index]

            async with trio.open_nursery() as nursery:
                for step, (name, who, first, count) in enumerate(history):
                    nursery.start_soon(do, step, name, who, first, count)
            whole = [await node.read(FILE, 0, 16 * BLOCK) for node in nodes]
            assert whole[0] == whole[1]
            for block in range(16):
                assert whole[0][block * BLOCK : (block + 1) * BLOCK] in possible[block]

    trio.run(play)
