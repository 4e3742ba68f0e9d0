"""copy_file_range in the file table: files that share blocks keep what each of them was written."""

import random

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from csvfs.errors import BadRequest, CsvfsError, DriveFailed, NoSpace, NotSupported, TimedOut
from tests.mount_nodes import Cluster, Node, cluster
from tests.test_file_table import BLOCK, FILE, settle, taken_nowait

CLONE = 6


async def pair(c: Cluster, blocks: int = 40) -> Node:
    """A node with a file of so many blocks, each with a letter of its own, and its clone."""
    c.coordinator.add_file(FILE)
    c.coordinator.add_file(CLONE)
    node = c.node("n1")
    await node.write(FILE, 0, letters(blocks))
    assert await node.table.copy_range(FILE, 0, CLONE, 0, blocks * BLOCK) == blocks * BLOCK
    node.bus.writes.clear()
    c.coordinator.calls.clear()
    return node


def letters(blocks: int) -> bytes:
    return b"".join(bytes([65 + at % 26]) * BLOCK for at in range(blocks))


def over(content: bytes, offset: int, data: bytes) -> bytes:
    return content[:offset] + data + content[offset + len(data) :]


async def test_a_clone_is_the_source_without_a_byte_written() -> None:
    async with cluster() as c:
        node = await pair(c)
        assert c.coordinator.files[CLONE].blocks == c.coordinator.files[FILE].blocks
        for who in (node, c.node("n2")):
            assert await who.read(CLONE, 0, 40 * BLOCK) == await who.read(FILE, 0, 40 * BLOCK) == letters(40)
        assert node.bus.writes == []


async def test_a_write_to_a_shared_block_replaces_its_chunk_and_the_other_file_stays() -> None:
    async with cluster() as c:
        node = await pair(c)
        for ino, offset in ((CLONE, 5 * BLOCK), (FILE, 20 * BLOCK + 7), (CLONE, 39 * BLOCK + 1)):
            before = {at: await node.read(at, 0, 41 * BLOCK) for at in (FILE, CLONE)}
            await node.write(ino, offset, b"new")
            assert await node.read(ino, 0, 41 * BLOCK) == over(before[ino], offset, b"new")
            assert await node.read(FILE + CLONE - ino, 0, 41 * BLOCK) == before[FILE + CLONE - ino]
        other = c.node("n2")
        assert await other.read(CLONE, 0, 40 * BLOCK) == await node.read(CLONE, 0, 40 * BLOCK)
        assert c.coordinator.names().count("replace") == 3
        c.coordinator.calls.clear()
        await node.write(CLONE, 4 * BLOCK, b"again" * 1000)  # of a chunk that is its own by now
        assert "unshare" not in c.coordinator.names()


async def test_what_replaces_a_block_is_flushed_before_it_is_put_in_place() -> None:
    """After a power cut the file has what it had, and that may have been flushed long ago; never zeros."""
    async with cluster() as c:
        node = await pair(c)
        flushed_before: list[set] = []
        replace = c.coordinator._replace

        async def watched(session, ino, rows):
            flushed_before.append({row[2] for row in rows} - set().union(*node.bus.flushed))
            return await replace(session, ino=ino, rows=rows)

        c.coordinator._replace = watched
        await node.write(CLONE, 0, b"n" * BLOCK)
        assert flushed_before == [set()]


@pytest.mark.parametrize("point", ["unshare", "write", "flush", "replace", "after replace"])
async def test_a_write_that_fails_at_any_point_leaves_old_or_new_and_never_anything_else(point: str) -> None:
    async with cluster() as c:
        node = await pair(c)
        error = TimedOut("no answer") if "replace" in point else DriveFailed("drive 1")
        if point == "write":
            node.bus.fail_next = [error]
        elif point == "flush":
            node.bus.flush_errors = [error]
        else:
            faults = c.coordinator.after if point.startswith("after") else c.coordinator.faults
            faults[point.split()[-1]] = [NoSpace("full") if point == "unshare" else error]
        with pytest.raises(CsvfsError):
            await node.write(CLONE, 2 * BLOCK + 5, b"new")
        await settle()
        new = over(letters(40), 2 * BLOCK + 5, b"new")
        found = await node.read(CLONE, 0, 40 * BLOCK)
        assert found == (new if point == "after replace" else letters(40))
        assert await c.node("n2").read(CLONE, 0, 40 * BLOCK) == found
        await node.write(CLONE, 2 * BLOCK + 5, b"new")
        assert await node.read(CLONE, 0, 40 * BLOCK) == new
        assert await node.read(FILE, 0, 40 * BLOCK) == letters(40)


async def test_a_mount_that_wrote_the_source_at_once_before_a_clone_does_not_write_into_it_after() -> None:
    """Its layout said that the blocks are its own."""
    async with cluster() as c:
        node, other = await pair(c), c.node("n2")
        await node.write(FILE, 0, letters(16))  # its own by now
        for who in (node, other):
            await who.write(FILE, 0, b"0" * BLOCK)
            assert taken_nowait(who, BLOCK, b"1" * BLOCK) is not None
            await settle()
            await node.table.copy_range(FILE, 0, CLONE, 0, 16 * BLOCK)
            assert not who.table.write_nowait(FILE, 0, memoryview(b"2" * BLOCK), 0, lambda error: None)
            await who.write(FILE, 0, b"2" * BLOCK)
            assert await node.read(CLONE, 0, BLOCK) == b"0" * BLOCK
            assert await other.read(FILE, 0, 2 * BLOCK) == b"2" * BLOCK + b"1" * BLOCK


async def test_a_clone_waits_for_the_writes_to_its_source_and_no_write_begins_meanwhile() -> None:
    async with cluster() as c:
        node = await pair(c)
        await node.write(FILE, 0, letters(16))
        node.bus.hold()
        result = taken_nowait(node, 0, b"w" * BLOCK)
        done: list[int] = []

        async def copy() -> None:
            done.append(await node.table.copy_range(FILE, 0, CLONE, 0, 16 * BLOCK))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(copy)
            await settle()
            assert "clone" not in c.coordinator.names() and result == []
            nursery.start_soon(node.write, FILE, BLOCK, b"x" * BLOCK)
            await settle()
            assert node.bus.in_flight == 1  # the second one waits
            node.bus.let_go()
        assert done == [16 * BLOCK] and result == [None]
        assert await node.read(CLONE, 0, 2 * BLOCK) == b"w" * BLOCK + letters(2)[BLOCK:]
        assert await node.read(FILE, 0, 2 * BLOCK) == b"w" * BLOCK + b"x" * BLOCK


async def test_a_copy_within_a_file_that_another_node_makes_shorter_ends_where_the_file_did() -> None:
    """What it has copied makes the file longer again: the gap before that is not copied after it."""
    async with cluster() as c:
        node, other = await pair(c, 4), c.node("n2")
        await node.write(FILE, 0, letters(4))  # its own by now
        cloning = node.table.copy_range.__self__
        share = cloning._share

        async def share_late(*args):  # the size was asked for
            cloning._share = share
            await other.table.truncate(FILE, {"size": 100, "mtime_ns": 1})
            return await share(*args)

        cloning._share = share_late
        assert await node.table.copy_range(FILE, 0, FILE, 10 * BLOCK, 4 * BLOCK) == 100
        assert await other.read(FILE, 0, 20 * BLOCK) == b"A" * 100 + bytes(10 * BLOCK - 100) + b"A" * 100


async def test_a_copy_within_a_file_that_another_node_made_shorter_just_before_ends_where_the_file_did() -> None:
    async with cluster() as c:
        node, other = await pair(c, 4), c.node("n2")
        await node.write(FILE, 0, letters(4))
        cloning = node.table.copy_range.__self__
        getattr_, asked = cloning._getattr, []

        async def getattr_late(ino):  # the size was asked for once, and is asked for before each part
            asked.append(ino)
            if len(asked) == 2:
                await other.table.truncate(FILE, {"size": 100, "mtime_ns": 1})
            return await getattr_(ino)

        cloning._getattr = getattr_late
        assert await node.table.copy_range(FILE, 0, FILE, 10 * BLOCK, 4 * BLOCK) == 100
        assert await other.read(FILE, 0, 20 * BLOCK) == b"A" * 100 + bytes(10 * BLOCK - 100) + b"A" * 100


async def test_an_answer_with_the_layout_of_before_a_clone_is_not_believed_after_it() -> None:
    async with cluster() as c:
        node = await pair(c)
        await node.write(FILE, 0, letters(40))
        node.table.leases.states[FILE].extents.forget(0, 16)
        acquire, answered = c.coordinator._acquire, trio.Event()

        async def answer_late(*args, **kwargs):
            value = await acquire(*args, **kwargs)
            await answered.wait()
            return value

        c.coordinator._acquire = answer_late
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.read, FILE, 0, BLOCK)
            await settle()
            nursery.start_soon(node.table.copy_range, FILE, 0, CLONE, 0, 40 * BLOCK)
            await settle()
            assert "clone" not in c.coordinator.names()
            answered.set()
        await node.write(FILE, 0, b"new" * 4000)  # the drives refuse a write into a shared block
        assert await node.read(CLONE, 0, 40 * BLOCK) == letters(40)


async def test_a_slow_read_of_a_block_that_is_replaced_sees_nothing_that_its_other_owner_writes() -> None:
    async with cluster() as c:
        node, other = await pair(c), c.node("n2")
        node.bus.local, node.bus.delay = False, 100
        read: list[bytes] = []

        async def look() -> None:
            read.append(await node.read(CLONE, 0, 2 * BLOCK))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await settle()
            node.bus.delay = 1
            nursery.start_soon(node.write, CLONE, BLOCK, b"n" * BLOCK)
            await settle()
            assert not read and "replace" not in c.coordinator.names()
            nursery.start_soon(other.write, FILE, 0, b"f" * (2 * BLOCK))
        assert read[0][:BLOCK] == letters(1) and read[0][BLOCK:] in (letters(2)[BLOCK:], b"n" * BLOCK)
        assert await node.read(CLONE, 0, 2 * BLOCK) == letters(1) + b"n" * BLOCK


async def test_what_was_copied_under_a_lease_that_was_lost_does_not_replace_what_another_node_wrote_since() -> None:
    async with cluster() as c:
        node, other = await pair(c), c.node("n2")
        flush, flushed = node.bus.flush, trio.Event()

        async def flush_late(slabs) -> None:
            await flush(slabs)
            await flushed.wait()

        node.bus.flush = flush_late
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.write, CLONE, 0, b"n" * BLOCK)
            await settle()
            node.table.refused([CLONE])
            await other.write(CLONE, 3 * BLOCK, b"o" * BLOCK)
            node.bus.flush = flush
            await node.write(CLONE, 39 * BLOCK, b"e" * BLOCK)
            assert node.table.holds(CLONE) == 3
            flushed.set()
        want = over(over(over(letters(40), 0, b"n" * BLOCK), 3 * BLOCK, b"o" * BLOCK), 39 * BLOCK, b"e" * BLOCK)
        assert await other.read(CLONE, 0, 40 * BLOCK) == want


async def test_an_answer_about_space_from_before_a_replacement_does_not_bring_the_old_place_back() -> None:
    """It tells of whole extents, also of blocks that were replaced while it was on its way."""
    async with cluster() as c:
        node = await pair(c, blocks=16)
        file = c.coordinator.files[CLONE]
        file.size = 64 * BLOCK
        node.table.refused([CLONE])
        assert await node.read(CLONE, 32 * BLOCK, BLOCK) == bytes(BLOCK)
        allocate, answered = c.coordinator._allocate, trio.Event()

        async def answer_late(session, **args):
            value = await allocate(session, **args)
            value |= c.coordinator._layout(file, 0, 64)
            await answered.wait()
            return value

        c.coordinator._allocate = answer_late
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.write, CLONE, 32 * BLOCK, b"far")
            await settle()
            nursery.start_soon(node.write, CLONE, 0, b"n" * BLOCK)
            await settle()
            assert "replace" not in c.coordinator.names()
            answered.set()
        await node.write(FILE, 0, b"f" * (16 * BLOCK))
        assert await node.read(CLONE, 0, 16 * BLOCK) == b"n" * BLOCK + letters(16)[BLOCK:]


async def test_a_clone_of_many_parts_and_odd_ends_is_the_source_and_grows_its_target() -> None:
    async with cluster() as c:
        c.coordinator.clone_max = 3
        node = await pair(c, blocks=10)
        await node.write(FILE, 10 * BLOCK, b"tail")
        await node.table.truncate(CLONE, {"size": 50, "mtime_ns": 1})
        copy = node.table.copy_range
        assert await copy(FILE, 0, CLONE, 0, 1 << 30) == 10 * BLOCK + 4
        whole = letters(10) + b"tail"
        assert await node.read(CLONE, 0, 1 << 20) == whole
        assert await copy(FILE, BLOCK - 10, CLONE, 20 * BLOCK - 10, 3 * BLOCK + 20) == 3 * BLOCK + 20
        want = whole.ljust(20 * BLOCK - 10, b"\0") + whole[BLOCK - 10 : 4 * BLOCK + 10]
        for who in (node, c.node("n2")):
            assert await who.read(CLONE, 0, 1 << 20) == want
        assert c.coordinator.files[CLONE].size == len(want)
        assert await copy(FILE, 10 * BLOCK + 4, CLONE, 10 * BLOCK + 4, 100) == 0


async def test_what_cannot_be_shared_is_left_to_the_kernel_and_what_overlaps_refused() -> None:
    async with cluster() as c:
        node = await pair(c)
        copy = node.table.copy_range
        with pytest.raises(NotSupported):
            await copy(FILE, 1, CLONE, 0, 10 * BLOCK)
        for offset, target in ((0, BLOCK), (BLOCK, 0), (0, 0)):
            with pytest.raises(BadRequest):
                await copy(FILE, offset, FILE, target, 2 * BLOCK)
        assert await copy(FILE, 0, FILE, 20 * BLOCK, 10 * BLOCK) == 10 * BLOCK
        await node.write(FILE, 5, b"new")
        want = over(over(letters(40), 20 * BLOCK, letters(10)), 5, b"new")
        assert await node.read(FILE, 0, 40 * BLOCK) == want


async def test_a_clone_of_unknown_outcome_gives_both_leases_back() -> None:
    for faults in ("faults", "after"):
        async with cluster() as c:
            node = await pair(c)
            await node.write(CLONE, 0, b"c" * (16 * BLOCK))
            getattr(c.coordinator, faults)["clone"] = [TimedOut("no answer")]
            with pytest.raises(TimedOut):
                await node.table.copy_range(FILE, 0, CLONE, 0, 16 * BLOCK)
            await settle()
            assert node.table.holds(FILE) < 3 and node.table.holds(CLONE) < 3
            await node.write(FILE, 0, b"f" * BLOCK)
            want = letters(16) if faults == "after" else b"c" * (16 * BLOCK)
            assert await node.read(CLONE, 0, 16 * BLOCK) == want


async def test_a_clone_made_while_another_node_writes_the_source_in_order_is_how_it_was_at_one_moment() -> None:
    for delay in (1, 4):
        async with cluster() as c:
            c.coordinator.delay = delay
            node, other = await pair(c, blocks=16), c.node("n2")
            await other.write(FILE, 0, b"A" * (16 * BLOCK))
            over_now = False

            async def write_in_order(who: Node) -> None:
                for number in range(1, 5):
                    for block in range(16):
                        await who.write(FILE, block * BLOCK, bytes([65 + number]) * BLOCK)
                nonlocal over_now
                over_now = True

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write_in_order, other)
                seen: set[bytes] = set()
                while not over_now:
                    await node.table.copy_range(FILE, 0, CLONE, 0, 16 * BLOCK)
                    found = await node.read(CLONE, 0, 16 * BLOCK)
                    versions = [found[at * BLOCK] for at in range(16)]
                    assert versions == sorted(versions, reverse=True) and versions[0] - versions[-1] <= 1
                    assert all(found[at * BLOCK : (at + 1) * BLOCK] == bytes([versions[at]]) * BLOCK for at in range(16))
                    seen.add(found)
            assert len(seen) > 2
            assert await node.read(FILE, 0, 16 * BLOCK) == b"E" * (16 * BLOCK)


async def test_fsync_of_a_clone_speaks_for_what_its_source_was_written() -> None:
    """I8."""
    async with cluster() as c:
        node = await pair(c)
        node.bus.flushed.clear()
        await node.table.fsync(CLONE)
        assert {slab for slab, _ in c.coordinator.files[CLONE].blocks.values()} <= set().union(*node.bus.flushed)


async def test_truncating_into_a_shared_block_and_growing_again_shows_zeros_in_one_file_only() -> None:
    """W1, W6."""
    async with cluster() as c:
        node = await pair(c)
        await node.table.truncate(CLONE, {"size": 2 * BLOCK + 9, "mtime_ns": 1})
        await node.table.truncate(CLONE, {"size": 4 * BLOCK, "mtime_ns": 2})
        assert await node.read(CLONE, 0, 4 * BLOCK) == letters(3)[: 2 * BLOCK + 9].ljust(4 * BLOCK, b"\0")
        await node.table.truncate(FILE, {"size": 3 * BLOCK + 9, "mtime_ns": 1})
        await node.write(FILE, 5 * BLOCK, b"end")
        want = letters(4)[: 3 * BLOCK + 9].ljust(5 * BLOCK, b"\0") + b"end"
        assert await node.read(FILE, 0, 8 * BLOCK) == want


async def test_clones_both_ways_at_once_and_truncations_of_both_come_to_an_end() -> None:
    async with cluster() as c:
        node, other = await pair(c), c.node("n2")
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                for who in (node, other):
                    nursery.start_soon(who.table.copy_range, FILE, 0, CLONE, 0, 16 * BLOCK)
                    nursery.start_soon(who.table.copy_range, CLONE, 0, FILE, 0, 16 * BLOCK)
                    nursery.start_soon(who.table.truncate, FILE, {"size": 40 * BLOCK, "mtime_ns": 1})
                    nursery.start_soon(who.table.fallocate, CLONE, 39 * BLOCK, BLOCK, 3)
                    nursery.start_soon(who.write, FILE, 30 * BLOCK, b"w" * BLOCK)
        assert await node.read(CLONE, 0, 16 * BLOCK) == letters(16) == await other.read(FILE, 0, 16 * BLOCK)


steps = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["write", "write", "read", "punch"]),
            st.integers(0, 1), st.integers(0, 2), st.integers(0, 30 * 4), st.integers(1, 12 * 4),
        ),
        st.tuples(
            st.just("clone"), st.integers(0, 1), st.integers(0, 2), st.integers(0, 30 * 4), st.integers(1, 12 * 4),
            st.integers(0, 2), st.integers(0, 30),
        ),
        st.tuples(st.just("truncate"), st.integers(0, 1), st.integers(0, 2), st.integers(0, 40 * 4), st.just(1)),
    ),
    min_size=3, max_size=16,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(steps, st.integers(0, 1 << 30))
@example([("write", 0, 0, 0, 42), ("clone", 1, 0, 0, 43, 0, 12)], 45)  # beyond the end of a file that grows by it
def test_three_files_used_from_two_nodes_are_those_of_a_model(history: list, seed: int) -> None:
    async def main() -> None:
        async with cluster() as c:
            await run(c, history, random.Random(seed))

    trio.run(main)


async def run(c: Cluster, history: list, draw: random.Random) -> None:
    c.coordinator.clone_max = draw.choice([2, 5, 1 << 20])
    c.coordinator.ahead = draw.choice([0, 3])
    nodes = [c.node("n1"), c.node("n2")]
    models = [bytearray() for _ in range(3)]
    for at in range(3):
        c.coordinator.add_file(FILE + at)
    for number, (kind, who, at, quarter, size, *rest) in enumerate(history):
        node, model, ino = nodes[who], models[at], FILE + at
        offset, length = quarter * 1024, size * 1024 + draw.choice([0, 0, -7])
        if kind == "write":
            data = bytes([65 + number]) * length
            await node.write(ino, offset, data)
            model.extend(bytes(max(0, offset + length - len(model))))
            model[offset : offset + length] = data
        elif kind == "read":
            assert await node.read(ino, offset, length) == bytes(model[offset : offset + length])
        elif kind == "punch":
            await node.table.fallocate(ino, offset, length, 3)
            end = min(offset + length, len(model))
            model[offset:end] = bytes(max(0, end - offset))
        elif kind == "truncate":
            await node.table.truncate(ino, {"size": offset, "mtime_ns": 1})
            del model[offset:]
            model.extend(bytes(offset - len(model)))
        else:
            into, block = rest
            target = block * BLOCK + offset % BLOCK
            if into == at and abs(target - offset) < length:
                continue
            data = bytes(model[offset : offset + length])
            assert await node.table.copy_range(ino, offset, FILE + into, target, length) == len(data)
            if data:
                other = models[into]
                other.extend(bytes(max(0, target + len(data) - len(other))))
                other[target : target + len(data)] = data
        for index, content in enumerate(models):
            assert await nodes[1 - who].read(FILE + index, 0, 1 << 20) == bytes(content)
