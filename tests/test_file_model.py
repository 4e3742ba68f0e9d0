"""Random histories of two nodes against a bytearray."""

import os

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from csvfs.mount.holes import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from tests.mount_nodes import Node, cluster

BLOCK = 4096
FILE = 5

sizes = st.one_of(st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK]), st.integers(0, 5 * BLOCK))
offsets = st.one_of(st.sampled_from([0, BLOCK, 2 * BLOCK, 3 * BLOCK]), st.integers(0, 8 * BLOCK))
operations = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 1), offsets, sizes),
        st.tuples(st.just("read"), st.integers(0, 1), offsets, sizes),
        st.tuples(st.just("truncate"), st.integers(0, 1), sizes),
        st.tuples(
            st.just("fallocate"), st.integers(0, 1), offsets, sizes, st.sampled_from([0, 1, 3, 16, 17])
        ),
        st.tuples(st.just("seek"), st.integers(0, 1), offsets),
        st.tuples(st.just("fsync"), st.integers(0, 1)),
        st.tuples(st.just("getattr"), st.integers(0, 1)),
        st.tuples(st.just("release"), st.integers(0, 1)),
    ),
    min_size=4,
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(operations, st.integers(0, 5), st.booleans())
def test_two_nodes_reading_and_writing_in_turns_are_one_file(history: list, ahead: int, local: bool) -> None:
    async def play() -> None:
        async with cluster() as c:
            c.coordinator.add_file(FILE)
            c.coordinator.ahead = ahead
            nodes = [c.node("n1"), c.node("n2")]
            nodes[0].bus.local = local
            model = bytearray()
            for step, (name, who, *args) in enumerate(history):
                await play_step(nodes[who], model, step, name, args)
            for node in nodes:
                assert await node.read(FILE, 0, 1 << 20) == bytes(model)
                assert (await node.table.getattr(FILE))[6] == len(model)

    trio.run(play)


async def play_step(node: Node, model: bytearray, step: int, name: str, args: list[int]) -> None:
    if name == "write":
        offset, size = args
        data = bytes([step + 1]) * size
        await node.write(FILE, offset, data)
        if data:
            model.extend(bytes(max(0, offset - len(model))))
            model[offset : offset + size] = data
    elif name == "read":
        offset, size = args
        assert await node.read(FILE, offset, size) == bytes(model[offset : offset + size])
    elif name == "truncate":
        (size,) = args
        await node.table.truncate(FILE, {"size": size, "mtime_ns": step + 1})
        del model[size:]
        model.extend(bytes(size - len(model)))
    elif name == "fallocate":
        offset, size, mode = args
        if size:
            await node.table.fallocate(FILE, offset, size, mode)
            if not mode & KEEP_SIZE:
                model.extend(bytes(max(0, offset + size - len(model))))
            if mode & (PUNCH_HOLE | ZERO_RANGE):
                end = min(offset + size, len(model))
                model[offset:end] = bytes(max(0, end - offset))
    elif name == "seek":
        (offset,) = args
        hole = await node.table.seek(FILE, offset, os.SEEK_HOLE)
        data = await node.table.seek(FILE, offset, os.SEEK_DATA)
        assert (hole is None) == (offset >= len(model))
        if hole is not None:
            assert offset in (hole, data) and hole <= len(model)
            assert not any(model[offset : len(model) if data is None else data])
    elif name == "fsync":
        await node.table.fsync(FILE)
        for state in node.table.leases.states.values():
            assert not state.dirty_slabs
    elif name == "getattr":
        assert (await node.table.getattr(FILE))[6] == len(model)
    else:
        node.table.forget(FILE)
        await node.table.release_unused()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(1, 1500), st.integers(0, 1000)), min_size=2, max_size=12
    ),
    st.integers(0, 4),
    st.integers(0, 3),
)
def test_writes_of_two_nodes_at_once_side_by_side_all_survive(parts: list, ahead: int, delay: int) -> None:
    """Neighbours share blocks, gaps and the end of the file; nobody's bytes may be lost or doubled."""

    async def play() -> None:
        async with cluster() as c:
            c.coordinator.add_file(FILE)
            c.coordinator.ahead = ahead
            c.coordinator.delay = delay
            nodes = [c.node("n1"), c.node("n2")]
            model = bytearray()
            async with trio.open_nursery() as nursery:
                for index, (who, size, gap) in enumerate(parts):
                    model.extend(bytes(gap))
                    data = bytes([index + 1]) * size
                    nursery.start_soon(nodes[who].write, FILE, len(model), data)
                    model.extend(data)
            for node in nodes:
                assert await node.read(FILE, 0, 1 << 20) == bytes(model)

    trio.run(play)
