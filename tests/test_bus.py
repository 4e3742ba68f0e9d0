"""The bus and three drive servers over loopback: fan-out, failures, resync, fences, healing (I1 to I9)."""

import os
import threading
from types import SimpleNamespace

import pytest
import trio

from csvfs.block import server_links, writer_marks
from csvfs.block.slab_state import bump, drop_members
from csvfs.errors import Corrupt, Disconnected, Fenced, StaleEpoch, Unavailable
from csvfs.ids import Epoch, Incarnation, SlabId
from csvfs.units import BLOCK_SIZE, MIB
from tests.block_cluster import SLAB, BlockCluster, write


def block_of(value: int) -> bytes:
    return bytes([value]) * BLOCK_SIZE


@pytest.fixture
async def cluster(tmp_path, nursery):
    cluster = BlockCluster(tmp_path, nursery)
    await cluster.start()
    yield cluster
    nursery.cancel_scope.cancel()


def contents(server, block: int, count: int = 1) -> bytes:
    return bytes(server.copy().read_blocks(block, count)[1])


async def test_I2_an_acknowledged_write_is_on_all_three_copies(cluster):
    bus = cluster.bus()
    data = os.urandom(MIB)
    await write(bus, 3, data)
    for server in cluster.servers:
        assert contents(server, 3, 256) == data
    assert await bus.read(SLAB, 3, 256) == data


async def test_many_writes_in_flight_arrive_in_order_on_every_copy(cluster):
    bus = cluster.bus()
    done = []
    for value in range(200):
        bus.write(SLAB, value % 5, block_of(value), done.append)
    with trio.fail_after(60):
        while len(done) < 200:
            await trio.sleep(0.001)
    assert set(done) == {None}
    for server in cluster.servers:
        assert [contents(server, block)[0] for block in range(5)] == [195, 196, 197, 198, 199]


async def test_I4_a_write_at_a_new_epoch_does_not_overtake_one_of_the_old_epoch(cluster, monkeypatch):
    """The member that had not answered yet is out by the new epoch, so nothing waits for its answer; a failure that
    comes late must not have the earlier write sent again on top of the later one."""
    bus = cluster.bus("mount/n2")
    await write(bus, 0, block_of(1))
    held = []
    link = bus.links.ready("n3").link
    monkeypatch.setattr(link, "request", lambda kind, head, payload, answer: held.append(answer))
    answered = []
    bus.write(SLAB, 5, block_of(2), lambda error: answered.append((2, error)))
    with trio.fail_after(30):
        while any(contents(server, 5) != block_of(2) for server in cluster.servers[:2]):
            await trio.sleep(0.002)
    monkeypatch.undo()
    await cluster.owner.commit(drop_members(bus.descriptor(SLAB), [cluster.servers[2].drive_id]))
    bus.learn(cluster.owner.descriptors[SLAB])
    bus.write(SLAB, 5, block_of(3), lambda error: answered.append((3, error)))
    await trio.sleep(0.02)
    held[0](None, Unavailable("n3 is out"))
    with trio.fail_after(30):
        while len(answered) < 2:
            await trio.sleep(0.002)
    assert answered == [(2, None), (3, None)]
    assert [contents(server, 5) for server in cluster.servers[:2]] == [block_of(3)] * 2


async def test_a_drive_server_killed_under_writes_drops_out_and_no_write_fails(cluster):
    bus = cluster.bus()
    done = []
    for value in range(300):
        bus.write(SLAB, value, block_of(value % 251 + 1), done.append)
        if value == 150:
            await cluster.servers[2].kill()
    with trio.fail_after(60):
        while len(done) < 300:
            await trio.sleep(0.001)
    assert set(done) == {None}
    assert [member.node for member in cluster.owner.descriptors[SLAB].in_sync] == ["n1", "n2"]
    for server in cluster.servers[:2]:
        assert all(contents(server, value)[0] == value % 251 + 1 for value in range(300))


async def test_I7_a_returning_copy_is_pulled_what_it_missed_while_writes_go_on(cluster):
    bus = cluster.bus()
    victim = cluster.servers[2]
    for block in range(0, 1024, 64):
        await write(bus, block, block_of(1) * 64)
    await bus.flush([SLAB])  # what is not flushed yet is active and would be pulled as well
    await victim.kill()
    await write(bus, 100, block_of(2))
    await write(bus, 700, block_of(3))
    await victim.start(cluster.nursery)
    done = []
    for value in range(50):
        bus.write(SLAB, 200 + value, block_of(4), done.append)
    pulled = await cluster.owner.resync(SLAB, victim)
    for value in range(50):
        bus.write(SLAB, 300 + value, block_of(5), done.append)
    with trio.fail_after(60):
        while len(done) < 100:
            await trio.sleep(0.001)
    assert [member.node for member in cluster.owner.descriptors[SLAB].in_sync] == ["n1", "n2", "n3"]
    reference = contents(cluster.servers[0], 0, 1024)
    assert contents(victim, 0, 1024) == reference
    # Two writes during the outage and those of the meantime: far less than the 64 chunks of the slab.
    assert pulled["chunks"] <= 24


async def test_I2_a_writer_with_an_old_epoch_cannot_complete(cluster):
    bus, other = cluster.bus("mount/n1"), cluster.bus("mount/n2")
    await write(bus, 0, block_of(1))
    await cluster.servers[2].kill()
    await write(bus, 0, block_of(2))  # epoch 2 now
    assert other.descriptor(SLAB).epoch == 1
    await write(other, 1, block_of(3))  # refused at epoch 1, sent again at 2
    assert other.descriptor(SLAB).epoch == 2
    assert contents(cluster.servers[0], 1) == block_of(3)


async def test_I6_after_a_fence_nothing_of_the_evicted_incarnation_lands(cluster):
    evicted = cluster.bus("mount/n2", incarnation=1)
    seen = []
    evicted.on_fenced = seen.append
    await write(evicted, 0, block_of(1))
    for server in cluster.servers:
        await cluster.owner.links.call(
            server.node, "fence", {"writer": "mount/n2", "min_incarnation": 2}, timeout_s=60
        )
    done = []
    evicted.write(SLAB, 0, block_of(9), done.append)
    with trio.fail_after(60):
        while not seen:
            await trio.sleep(0.005)
    assert isinstance(seen[0], Fenced)
    assert all(contents(server, 0) == block_of(1) for server in cluster.servers)
    renewed = cluster.bus("mount/n2", incarnation=2)
    await write(renewed, 0, block_of(5))
    assert all(contents(server, 0) == block_of(5) for server in cluster.servers)


async def _read_zeros(bus):
    assert await bus.read(SLAB, 0, 1) == bytes(BLOCK_SIZE)


async def _trim(bus):
    await bus.trim([(SLAB, 0, 1)])


async def _flush(bus):
    await bus.flush([SLAB])


@pytest.mark.parametrize("has_begun", [False, True])
@pytest.mark.parametrize("call", [_read_zeros, _trim, _flush])
async def test_who_does_not_write_hears_too_that_it_is_fenced(cluster, call, has_begun):
    """The coordinator that had it fenced may have ended before it wrote the eviction down: then nobody else tells it."""
    reader = cluster.bus("mount/n2", incarnation=1)
    seen = []
    reader.on_fenced = seen.append
    # Without a copy on its own node, which it would read without asking.
    await cluster.owner.commit(drop_members(reader.descriptor(SLAB), [cluster.servers[0].drive_id]))
    reader.learn(cluster.owner.descriptors[SLAB])
    if has_begun:
        await call(reader)
    for server in cluster.servers:
        await cluster.owner.links.call(
            server.node, "fence", {"writer": "mount/n2", "min_incarnation": 2}, timeout_s=60
        )
    with trio.fail_after(60), pytest.raises(Fenced):
        await call(reader)
    assert isinstance(seen[0], Fenced)


async def test_a_lower_term_is_refused_once_a_higher_one_is_registered(cluster):
    old, new = cluster.owner.links, cluster.links("coordinator", incarnation=5)
    await new.call("n1", "register_term", {"term": 5}, timeout_s=60)
    for _ in range(2):
        with pytest.raises((Fenced, Unavailable)):
            await old.call("n1", "install", {"term": 1, "items": []}, timeout_s=60)
    with pytest.raises(Fenced, match="term 4"):
        await new.call("n1", "register_term", {"term": 4}, timeout_s=60)


async def test_I9_flipped_bits_are_read_around_rewritten_and_gone_at_the_second_pass(cluster):
    bus = cluster.bus()
    data = os.urandom(MIB)
    await write(bus, 0, data)
    victim = cluster.servers[0]
    copy = victim.copy()
    with victim.path.open("r+b") as file:
        for block in (0, 17, 255):
            file.seek(copy.data_offset + block * BLOCK_SIZE + 100)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 0x40]))
    assert await bus.read(SLAB, 0, 256) == data
    with trio.fail_after(60):
        while copy.drive.counters.healed < 3:
            await trio.sleep(0.001)
    assert copy.bad_blocks_scan(0, 256) == []
    errors = copy.drive.counters.checksum_errors
    assert await bus.read(SLAB, 0, 256) == data
    assert copy.drive.counters.checksum_errors == errors


async def test_I9_blocks_bad_on_different_copies_are_each_read_from_a_good_one(cluster):
    bus = cluster.bus()
    data = os.urandom(16 * BLOCK_SIZE)
    await write(bus, 0, data)
    for index, server in enumerate(cluster.servers):
        with server.path.open("r+b") as file:
            file.seek(server.copy().data_offset + index * BLOCK_SIZE)
            file.write(b"damaged")
    assert await bus.read(SLAB, 0, 16) == data


async def test_I9_a_block_bad_on_every_copy_is_an_error_never_wrong_bytes(cluster):
    bus = cluster.bus()
    await write(bus, 5, block_of(1))
    for server in cluster.servers:
        with server.path.open("r+b") as file:
            file.seek(server.copy().data_offset + 5 * BLOCK_SIZE)
            file.write(b"damaged")
    with pytest.raises(Corrupt, match="block 5"):
        await bus.read(SLAB, 5, 1)
    await write(bus, 5, block_of(2))
    assert await bus.read(SLAB, 5, 1) == block_of(2)


async def test_I8_flush_reaches_every_member_and_a_failed_flush_takes_the_member_out(cluster, monkeypatch):
    bus = cluster.bus()
    await write(bus, 0, block_of(1))
    await bus.flush([SLAB])
    flushes = [server.copy().drive.counters.flushes for server in cluster.servers]
    assert all(count >= 1 for count in flushes)
    failing = cluster.servers[1].copy().drive
    failing.failure = "flush: Input/output error"
    await bus.flush([SLAB])
    assert [member.node for member in cluster.owner.descriptors[SLAB].in_sync] == ["n1", "n3"]


async def test_I3_chunks_stay_active_until_complete_and_flushed(cluster, monkeypatch):
    bus = cluster.bus()
    await write(bus, 0, block_of(1))
    await write(bus, 40, block_of(1))
    assert all(server.copy().active_chunks() == [0, 2] for server in cluster.servers)
    await bus.flush([SLAB])
    for server in cluster.servers:
        copy = server.copy()
        assert all(server.service.marks.is_resting((copy, chunk)) for chunk in (0, 2))
        assert copy.active_chunks() == [0, 2]  # still resting
        monkeypatch.setattr(writer_marks, "REST_S", 0.0)
        server.service.flushes.unmark_rested(server.service.drives.by_index(0))
        assert copy.active_chunks() == []


async def test_I3_a_resting_chunk_that_is_written_again_is_not_unmarked_before_the_next_flush(
    cluster, monkeypatch
):
    bus = cluster.bus()
    await write(bus, 0, block_of(1))
    await bus.flush([SLAB])
    await write(bus, 0, block_of(2))
    monkeypatch.setattr(writer_marks, "REST_S", 0.0)
    for server in cluster.servers:
        server.service.flushes.unmark_rested(server.service.drives.by_index(0))
        assert server.copy().active_chunks() == [0]
        assert not server.service.marks.is_resting((server.copy(), 0))
    await bus.flush([SLAB])
    assert all(server.copy().active_chunks() == [] for server in cluster.servers)


async def test_I3_only_so_many_chunks_rest_those_longest_unused_go_first(cluster, monkeypatch):
    monkeypatch.setattr(writer_marks, "RESTING_MAX", 2)
    bus = cluster.bus()
    for chunk in (0, 1, 2, 0, 3):
        await write(bus, chunk * 16, block_of(chunk))
        await bus.flush([SLAB])
    assert all(server.copy().active_chunks() == [0, 3] for server in cluster.servers)


async def test_I3_a_chunk_written_by_two_is_active_until_both_are_complete(cluster):
    first, second = cluster.bus("mount/n1"), cluster.bus("mount/n2")
    await write(first, 0, block_of(1))
    service = cluster.servers[0].service
    second.write(SLAB, 1, block_of(2), lambda error: None)
    with trio.fail_after(60):
        while len(service.marks.of_writer(b"v" * 16, "mount/n2")) == 0:
            await trio.sleep(0.001)
    await first.flush([SLAB])
    assert cluster.servers[0].copy().active_chunks() == [0]


async def test_I5_a_node_that_may_not_serve_is_passed_over_and_drops_out_of_what_is_written(cluster):
    bus = cluster.bus("mount/n2")
    await write(bus, 0, block_of(1))
    cluster.servers[0].may_serve = False
    assert await bus.read(SLAB, 0, 1) == block_of(1)
    await write(bus, 0, block_of(2))
    assert "n1" not in [member.node for member in cluster.owner.descriptors[SLAB].in_sync]
    assert await bus.read(SLAB, 0, 1) == block_of(2)


async def test_a_restarted_server_serves_no_copy_before_its_coordinator_says_so(cluster):
    victim = cluster.servers[0]
    bus = cluster.bus("mount/n2")
    await write(bus, 0, block_of(1))
    await victim.kill()
    await victim.start(cluster.nursery)
    links = cluster.links("admin")
    server = await links.connected("n1")
    from csvfs.block.bus_reads import read_blocks

    with pytest.raises(Unavailable, match="waits for its coordinator"):
        await read_blocks(server.link, 0, SLAB, 1, 0, 1, bus.seed(SLAB))


async def test_a_read_at_an_epoch_the_copy_has_not_installed_is_refused(cluster):
    from csvfs.block.bus_reads import read_blocks

    bus = cluster.bus()
    server = await bus.links.connected("n1")
    with pytest.raises(StaleEpoch):
        await read_blocks(server.link, 0, SLAB, 2, 0, 1, bus.seed(SLAB))


async def test_trimmed_blocks_read_as_zeros_on_every_copy(cluster):
    bus = cluster.bus()
    await write(bus, 0, block_of(7) * 32)
    await bus.trim([(SLAB, 8, 16)])
    for server in cluster.servers:
        assert contents(server, 8, 16) == bytes(16 * BLOCK_SIZE)
        assert contents(server, 7) == block_of(7)
    assert await bus.read(SLAB, 0, 32) == block_of(7) * 8 + bytes(16 * BLOCK_SIZE) + block_of(7) * 8


async def test_local_reads_come_from_the_drive_file_and_stop_when_the_copy_is_out_of_sync(cluster):
    bus = cluster.bus("mount/n1")
    await write(bus, 0, block_of(1))
    with trio.fail_after(60):
        while bus.read_local(SLAB, 0, 1) is None:
            await trio.sleep(0.001)
    assert bus.read_local(SLAB, 0, 1) == block_of(1)
    assert bus.read_local(SLAB, 500, 2) == bytes(2 * BLOCK_SIZE)
    await cluster.servers[0].kill()
    await write(bus, 0, block_of(2))
    assert bus.read_local(SLAB, 0, 1) is None
    assert await bus.read(SLAB, 0, 1) == block_of(2)


async def test_a_writer_that_connects_anew_closes_its_earlier_link(cluster):
    first = cluster.links("mount/n3", incarnation=4)
    old = await first.connected("n1")
    second = cluster.links("mount/n3", incarnation=4)
    await second.connected("n1")
    with trio.fail_after(60):
        while old.link.closed is None:
            await trio.sleep(0.001)
    with pytest.raises(Fenced):
        await cluster.links("mount/n3", incarnation=3).connected("n1")
    assert Incarnation(4) == 4


async def test_a_server_that_hangs_is_given_up_though_its_connection_stands(cluster, monkeypatch):
    bus = cluster.bus("mount/n2")
    await write(bus, 0, block_of(1))
    cluster.nursery.start_soon(bus.links.watch_forever, 300)
    hung = cluster.servers[2].service
    for client in list(hung.clients):
        client.link.on_frame = lambda link, frame: None  # it takes everything and answers nothing
    with trio.fail_after(120):
        await write(bus, 0, block_of(2))
    assert [member.node for member in cluster.owner.descriptors[SLAB].in_sync] == ["n1", "n2"]


async def begun_while_cut_off(cluster, bus, monkeypatch, work, *args):
    """Begin something without any member, until the owner is asked, which can drop none and waits. Then they are there."""
    asked = trio.Event()

    async def wait_with_the_decision(*failed):
        asked.set()
        await trio.sleep_forever()

    monkeypatch.setattr(cluster.owner, "slab_failed", wait_with_the_decision)
    for patient in (bus, bus._media):
        monkeypatch.setattr(patient, "_owner_patience_s", 0.2)
    with monkeypatch.context() as cut, trio.fail_after(60):
        cut.setattr(bus.links, "_directory", lambda node: None)
        bus.links.check_servers()
        cluster.nursery.start_soon(work, *args)
        await asked.wait()


async def test_members_that_can_be_reached_again_are_written_to_though_their_owner_still_waits(cluster, monkeypatch):
    bus = cluster.bus("mount/n2")
    await write(bus, 0, block_of(1))
    await begun_while_cut_off(cluster, bus, monkeypatch, write, bus, 0, block_of(2))
    with trio.fail_after(60):
        while any(contents(server, 0) != block_of(2) for server in cluster.servers):
            await trio.sleep(0.01)


async def test_I8_a_flush_goes_on_when_its_members_can_be_reached_again_though_their_owner_still_waits(
    cluster, monkeypatch
):
    """Simulator seed 300521: it went on asking the owner to drop all copies, until the fsync of another node failed."""
    bus = cluster.bus("mount/n2")
    await write(bus, 0, block_of(1))
    flushed = trio.Event()

    async def flush():
        await bus.flush([SLAB])
        flushed.set()

    await begun_while_cut_off(cluster, bus, monkeypatch, flush)
    assert not flushed.is_set()
    with trio.fail_after(60):
        await flushed.wait()


async def test_I8_a_drive_that_fails_in_a_later_round_of_a_flush_leaves_what_it_had_flushed_in_the_first(
    cluster, monkeypatch
):
    """It was taken out of all slabs of the flush: each had one copy less for nothing."""
    other = SlabId(SLAB + 1)
    await cluster.create_slab(other)
    bus = cluster.bus("mount/n2")
    for slab in (SLAB, other):
        await write(bus, 0, block_of(1), slab)
    await cluster.owner.slab_failed(other, Epoch(1), [cluster.servers[0].drive_id], "its epoch passes")
    failing, slab_failed = cluster.servers[1].copy().drive, cluster.owner.slab_failed

    async def fails_from_now_on(*failed):
        failing.failure = "flush: Input/output error"
        return await slab_failed(*failed)

    monkeypatch.setattr(cluster.owner, "slab_failed", fails_from_now_on)
    with trio.fail_after(60):
        await bus.flush([SLAB, other])
    assert [member.node for member in bus.known(other).in_sync] == ["n3"]
    assert [member.node for member in bus.known(SLAB).in_sync] == ["n1", "n2", "n3"]


async def test_I8_a_flush_of_a_copy_that_is_not_in_service_takes_it_out(cluster):
    """Its server has started anew, and may have lost what was written: only its coordinator can tell."""
    bus = cluster.bus("mount/n2")
    await write(bus, 0, block_of(1))
    await cluster.servers[0].kill()
    await cluster.servers[0].start(cluster.nursery)
    with trio.fail_after(60):
        await bus.flush([SLAB])
    assert [member.node for member in bus.known(SLAB).in_sync] == ["n2", "n3"]


async def test_I8_a_flush_at_an_epoch_that_has_passed_asks_for_the_present_one(cluster):
    bus, other = cluster.bus("mount/n2"), cluster.bus("mount/n3")
    await write(bus, 0, block_of(1))
    await cluster.servers[0].kill()
    await write(other, 1, block_of(2))
    assert bus.known(SLAB).epoch < other.known(SLAB).epoch
    await cluster.servers[0].start(cluster.nursery)
    with trio.fail_after(60):
        await bus.flush([SLAB])
    assert bus.known(SLAB) == other.known(SLAB)


class ServerThatOwesAnAnswer:
    """A link to a server, seen from `watch_forever`; `progress_ns`: when it last answered."""

    def __init__(self) -> None:
        self.link = self
        self.progress_ns = 0
        self.waiting_count = 1
        self.pings = 0

    def request(self, kind, head, payload, answer) -> None:
        self.pings += 1


async def test_a_process_that_stood_still_gives_up_nobody_whose_answers_it_has_not_read_yet(
    cluster, monkeypatch, nursery
):
    links = cluster.links("mount/n2")
    server = ServerThatOwesAnAnswer()
    given_up, stood_still = [], trio.Event()
    monkeypatch.setattr(links, "drop", lambda node, reason: given_up.append((node, server.pings)))
    monkeypatch.setattr(links, "check_servers", lambda: None)
    clock_ns = [0]

    async def sleep(seconds: float) -> None:
        """The first takes a minute, as when the machine had no time for this process; others what they should."""
        clock_ns[0] += int((seconds if stood_still.is_set() else 60) * 1e9)
        stood_still.set()
        await trio.lowlevel.checkpoint()

    fake = SimpleNamespace(sleep=sleep, current_time=trio.current_time)
    monkeypatch.setattr(server_links, "trio", fake)
    monkeypatch.setattr(server_links, "monotonic_ns", lambda: clock_ns[0])
    links._links["n9"] = server
    nursery.start_soon(links.watch_forever, 3_000)
    await stood_still.wait()
    with trio.fail_after(60):
        while not given_up:
            await trio.lowlevel.checkpoint()
    assert given_up[0] == ("n9", 1), "asked once more, and given up when it did not answer that either"
    links._links.clear()


async def test_a_slow_flush_is_waited_for_as_long_as_the_server_answers_pings(cluster):
    bus = cluster.bus("mount/n2")
    cluster.nursery.start_soon(bus.links.watch_forever, 1_200)
    await write(bus, 0, block_of(1))
    flushes = cluster.servers[1].service.flushes
    request, begun = flushes.request, []

    async def begin_late(served, flushed):
        await trio.sleep(2.5)
        begun.append(served)
        request(served, flushed)

    flushes.request = lambda *args: cluster.nursery.start_soon(begin_late, *args)
    await bus.flush([SLAB])
    assert len(begun) == 1
    assert len(cluster.owner.descriptors[SLAB].in_sync) == 3


async def test_links_to_a_server_that_the_store_no_longer_lists_are_dropped_at_once(cluster):
    bus = cluster.bus("mount/n2")
    await write(bus, 0, block_of(1))
    server = bus.links.ready("n3")
    service, cluster.servers[2].service = cluster.servers[2].service, None
    bus.links.check_servers()
    cluster.servers[2].service = service
    assert server.link.closed is not None and bus.links.ready("n3") is None


async def test_a_long_call_to_a_server_that_is_gone_ends_though_its_connection_stands(cluster, nursery):
    """A node that lost power breaks no connection. Simulator seeds 10446, 11243: takeover and resync hung for it."""
    links = cluster.links("coordinator-pulls")
    nursery.start_soon(links.follow_servers_forever)
    await links.connected("n3")
    service, cluster.servers[2].service = cluster.servers[2].service, None  # no longer listed
    for client in service.clients:
        client.link.on_frame = lambda link, frame: None  # and says nothing any more
    with trio.fail_after(30), pytest.raises(Disconnected, match="gone, says the cluster store"):
        await links.call("n3", "ping", {}, timeout_s=600)
    cluster.servers[2].service = service


async def test_I9_a_reader_that_has_not_heard_of_a_new_epoch_heals_all_the_same(cluster):
    writer, reader = cluster.bus("mount/n2"), cluster.bus("mount/n1")
    await write(writer, 5, block_of(1))
    assert await reader.read(SLAB, 5, 1) == block_of(1)
    await cluster.owner.commit(bump(cluster.owner.descriptors[SLAB]))
    victim = cluster.servers[0]
    with victim.path.open("r+b") as file:
        file.seek(victim.copy().data_offset + 5 * BLOCK_SIZE)
        file.write(b"damaged")
    assert await reader.read(SLAB, 5, 1) == block_of(1)
    assert victim.copy().drive.counters.healed == 1
    assert victim.copy().bad_blocks_scan(5, 1) == []


async def test_a_slab_that_is_deleted_during_a_flush_does_not_end_the_drive_server(cluster, monkeypatch):
    bus = cluster.bus()
    await write(bus, 0, block_of(1))
    await write(bus, 16, block_of(2))
    server = cluster.servers[0]
    drive = server.copy().drive
    may_end = threading.Event()
    flush = drive.flush

    def slow_flush() -> None:
        flush()
        may_end.wait(60)

    monkeypatch.setattr(drive, "flush", slow_flush)
    bus.links.tell_all("completed", {"below": 3})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.service.flushes.flush, next(iter(server.service.drives)))
        await trio.sleep(0.05)
        args = {"drive": server.drive_id, "slab": SLAB, "term": 1}
        await cluster.owner.links.call("n1", "delete_slab", args, timeout_s=60)
        may_end.set()
    assert (await cluster.owner.links.call("n1", "status", {}, timeout_s=60))["node"] == "n1"
