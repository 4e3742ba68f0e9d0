"""Redirected I/O: real drive servers with TLS, joined by wires that are cut, and a writer that goes on."""

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from coordinator.block_reader import BlockReader
from csvfs.admin.cluster_ca import serial_of
from csvfs.block import server_links
from csvfs.block.bus_writes import SlabState
from csvfs.errors import (
    AccessDenied,
    BadRequest,
    CsvfsError,
    Fenced,
    LeaseLost,
    NotPermitted,
    Unavailable,
)
from csvfs.ids import Epoch, NodeName
from csvfs.mount import waits
from csvfs.net.detours import DETOUR_AFTER_S, FORGET_S, Straight, Waypoint, connect_through
from csvfs.net.engine import Engine
from csvfs.net.link import Link, connect
from csvfs.net.refusals import Refused
from csvfs.net.tls import Identity
from csvfs.net.tunnels import TUNNEL_BUFFER_SIZE, TUNNELS_MAX, Tunnels
from csvfs.units import BLOCK_SIZE, MIB
from csvfs.wire.block_messages import SlabDescriptor
from csvfs.wire.control import pack_call
from csvfs.wire.frames import Kind
from tests.block_cluster import CLUSTER, SLAB, SLAB_SIZE, VOLUME, Server, write
from tests.detour_cluster import PATIENCE_S, THEIRS, DetourCluster, detour_cluster, make_place, until

N1, N2, N3 = NodeName("n1"), NodeName("n2"), NodeName("n3")
BLOCKS = 24
IN_FLIGHT = 8


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[DetourCluster]:
    async with detour_cluster(tmp_path) as started:
        yield started


@pytest.fixture
async def four(tmp_path: Path) -> AsyncIterator[DetourCluster]:
    async with detour_cluster(tmp_path, count=4) as started:
        yield started


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in production, only sooner."""
    monkeypatch.setattr(server_links, "WATCH_INTERVAL_S", 0.1)
    monkeypatch.setattr(server_links, "DOUBT_S", 0.3)
    monkeypatch.setattr(server_links, "DOUBT_INTERVAL_S", 0.5)
    monkeypatch.setattr(server_links, "RETURN_INTERVAL_S", 0.3)


class Writer:
    """Writes a growing number over and over to a few blocks, several at once, for as long as it is not stopped."""

    def __init__(self, cluster: DetourCluster, bus=None) -> None:
        self.bus = bus or cluster.bus()
        self.count = 0
        self.done = 0
        self.errors: list[CsvfsError] = []
        self.last: dict[int, int] = {}
        self._stopped = False
        cluster.nursery.start_soon(self._run)

    async def _run(self) -> None:
        while not self._stopped:
            while self.count - self.done < IN_FLIGHT:
                self._write_next()
            await trio.sleep(0.001)

    def _write_next(self) -> None:
        block = self.count * 7 % BLOCKS
        self.last[block] = self.count
        self.bus.write(SLAB, block, self.content(self.count), self._finish)
        self.count += 1

    def _finish(self, error: CsvfsError | None) -> None:
        self.done += 1
        if error is not None:
            self.errors.append(error)

    @staticmethod
    def content(number: int) -> bytes:
        return number.to_bytes(8, "little") * (BLOCK_SIZE // 8)

    async def goes_on(self) -> None:
        """Every write under way now is answered, and as many again."""
        enough = self.done + 2 * IN_FLIGHT
        await until(lambda: self.done >= enough)
        assert self.errors == []

    async def stop(self) -> None:
        self._stopped = True
        await until(lambda: self.done == self.count)
        assert self.errors == []

    def is_all_on(self, server: Server) -> bool:
        copy = server.copy()
        return all(copy.read_blocks(block, 1)[1] == self.content(number) for block, number in self.last.items())


def dropped(cluster: DetourCluster) -> list[str]:
    """Nodes whose copies anybody asked to have dropped."""
    drives = {drive for _, _, failed, _ in cluster.owner.reports for drive in failed}
    return sorted(server.node for server in cluster.servers if server.drive_id in drives)


async def test_a_writer_without_a_path_to_a_copy_goes_on_through_another_node_and_drops_nothing(cluster):
    writer = Writer(cluster)
    await writer.goes_on()
    cluster.cut("n1", "n2")
    await until(lambda: writer.bus.links.detours())
    assert list(writer.bus.links.detours()) == [N2] and writer.bus.links.ready(N2).via == "n3"
    await writer.goes_on()
    await writer.bus.flush([SLAB])
    await writer.stop()
    assert dropped(cluster) == []
    assert cluster.passed_on_by("n3") == 1
    assert all(writer.is_all_on(server) for server in cluster.servers)


async def test_a_flush_that_was_under_way_when_the_link_broke_is_made_through_the_detour(cluster):
    """I8: it is not answered before every member has flushed, and no member is dropped for a link."""
    bus = cluster.bus()
    await write(bus, 0, Writer.content(1))
    await bus.flush([SLAB])
    cluster.cut("n1", "n2")
    flushes = cluster.server_of("n2").service.drives.by_id(cluster.server_of("n2").drive_id).opened().counters.flushes
    with trio.fail_after(PATIENCE_S):
        await bus.flush([SLAB])
    served = cluster.server_of("n2").service.drives.by_id(cluster.server_of("n2").drive_id)
    assert served.opened().counters.flushes > flushes
    assert dropped(cluster) == [] and list(bus.links.detours()) == [N2]


async def test_I4_nothing_lands_that_comes_late_by_the_path_that_was_cut(cluster):
    """What was sent into the wire arrives when it is healed: the server has closed that link by then."""
    writer = Writer(cluster)
    await writer.goes_on()
    cluster.cut("n1", "n2")
    await until(lambda: writer.bus.links.detours())
    in_the_wire = writer.count
    await until(lambda: writer.done > in_the_wire + BLOCKS)  # each of these blocks has been written anew
    await writer.stop()
    cluster.heal("n1", "n2")
    await until(lambda: not writer.bus.links.detours() and writer.bus.links.ready(N2) is not None)
    await until(lambda: all(wire.empty for wire in cluster.wires.values()))
    assert all(writer.is_all_on(server) for server in cluster.servers)


async def test_healing_returns_to_the_straight_path_under_load_and_breaks_nothing_off(cluster, monkeypatch):
    writer = Writer(cluster)
    await writer.goes_on()
    cluster.cut("n1", "n2")
    await until(lambda: writer.bus.links.detours())
    await writer.goes_on()
    failures: list[CsvfsError] = []
    monkeypatch.setattr(SlabState, "note_failure", lambda state, drive, error, epoch: failures.append(error))
    cluster.heal("n1", "n2")
    await until(lambda: not writer.bus.links.detours() and writer.bus.links.ready(N2) is not None)
    await writer.goes_on()
    await writer.stop()
    await until(lambda: cluster.passed_on_by("n3") == 0)
    assert failures == [] and dropped(cluster) == []
    assert all(writer.is_all_on(server) for server in cluster.servers)
    assert cluster.paths.why("n2") == ""


async def test_when_the_node_in_between_dies_the_next_one_passes_on(four):
    writer = Writer(four)
    await writer.goes_on()
    four.cut("n1", "n2")
    await until(lambda: writer.bus.links.detours())
    via = writer.bus.links.ready(N2).via
    await four.server_of(via).kill()
    await writer.goes_on()
    await until(lambda: writer.bus.links.ready(N2) is not None)
    assert {via, writer.bus.links.ready(N2).via} == {"n3", "n4"}
    await writer.stop()
    assert dropped(four) == [via]
    assert all(writer.is_all_on(server) for server in four.servers if server.node != via)


async def test_when_the_node_in_between_stands_still_the_next_one_passes_on(four):
    """Nothing breaks then; there are just no answers any more. The server is not given up for it, nor is it waited for."""
    writer = Writer(four, four.bus(silence_ms_max=3_600_000))
    await writer.goes_on()
    four.cut("n1", "n2")
    await until(lambda: writer.bus.links.detours())
    via = writer.bus.links.ready(N2).via
    before = writer.bus.links.ready(N2)
    four.cut(via, "n2")
    await until(lambda: writer.bus.links.ready(N2) not in (None, before))
    assert {via, writer.bus.links.ready(N2).via} == {"n3", "n4"}
    await writer.goes_on()
    await writer.stop()
    assert dropped(four) == []
    assert all(writer.is_all_on(server) for server in four.servers)


async def test_a_copy_that_was_dropped_comes_back_through_the_detour(cluster):
    """Nobody could pass the writer on in time; later somebody can, and the pull has no straight path either."""
    writer = Writer(cluster, cluster.bus(silence_ms_max=2_000))
    await writer.goes_on()
    cluster.cut("n1", "n2")
    cluster.cut("n3", "n2")
    await until(lambda: dropped(cluster) == ["n2"])
    await writer.goes_on()
    cluster.heal("n3", "n2")
    with trio.fail_after(PATIENCE_S):
        pulled = await cluster.owner.resync(SLAB, cluster.server_of("n2"))
    assert pulled["chunks"] > 0
    assert cluster.tunnels["n3"].begun >= 1
    writer.bus.learn(cluster.owner.descriptors[SLAB])
    await writer.goes_on()
    await writer.stop()
    assert all(writer.is_all_on(server) for server in cluster.servers)


async def test_I6_a_fence_holds_for_what_comes_through_another_node(cluster):
    """After its answer nothing of the evicted incarnation lands, by the open detour or by a new one."""
    bus = cluster.bus(incarnation=3)
    fenced: list[Fenced] = []
    bus.on_fenced = fenced.append
    cluster.cut("n1", "n2")
    await write(bus, 0, Writer.content(1))
    assert list(bus.links.detours()) == [N2]
    doomed = bus.links.ready(N2).link
    await cluster.owner.links.call(N2, "fence", {"writer": "mount/n1", "min_incarnation": 4}, timeout_s=PATIENCE_S)
    bus.write(SLAB, 0, Writer.content(2), lambda error: None)
    await until(lambda: fenced)
    await until(lambda: doomed.closed is not None)
    with pytest.raises(Fenced):
        await cluster.links("mount/n1", incarnation=3).connected(N2)
    assert cluster.server_of("n2").copy().read_blocks(0, 1)[1] == Writer.content(1)
    later = await cluster.links("mount/n1", incarnation=4).connected(N2)
    assert later.via == "n3"


async def test_a_process_that_is_gone_is_not_looked_for_behind_other_nodes(cluster):
    """It refuses at once: so there is a path. Its copies are dropped as ever, without a detour being tried."""
    writer = Writer(cluster)
    await writer.goes_on()
    address = cluster.directory(N2)
    with socket.socket() as vacant:
        vacant.bind(("127.0.0.1", 0))
        port = vacant.getsockname()[1]
    with pytest.raises(Unavailable, match="refused"):
        await cluster.paths.connect((address.address, port), node="n2", service="drives", timeout_s=PATIENCE_S)
    await writer.stop()
    assert [tunnels.begun for tunnels in cluster.tunnels.values()] == [0, 0, 0]


async def test_a_coordinator_reads_metadata_by_a_detour_while_it_waits_and_sqlite_with_it(cluster):
    await write(cluster.bus(), 5, Writer.content(1) + Writer.content(2))
    only_n2 = tuple(m for m in cluster.owner.descriptors[SLAB].members if m.node == "n2")
    descriptor = SlabDescriptor(SLAB, Epoch(1), only_n2)
    reader = BlockReader(
        SimpleNamespace(slabs=[SLAB], current=lambda slab: descriptor),  # type: ignore[arg-type]
        cluster.directory, cluster=CLUSTER, volume=VOLUME, term=1, local_node=N1,
        blocks_per_slab=SLAB_SIZE // BLOCK_SIZE, identity=cluster.identities["n1"],
        waypoints=lambda: [Waypoint(node, "127.0.0.1", cluster.server_of(node).port) for node in (N1, N2, N3)],
    )  # fmt: skip

    async def read() -> bytes:
        return await trio.to_thread.run_sync(reader.read, 5, 2)

    assert await read() == Writer.content(1) + Writer.content(2)
    cluster.cut("n1", "n2")
    assert await read() == Writer.content(1) + Writer.content(2)
    by_detour = reader._connections[N2]
    assert by_detour._socket.getpeername()[1] == cluster.server_of("n3").port
    assert await read() == Writer.content(1) + Writer.content(2)
    assert reader._connections[N2] is by_detour
    reader.close()


# Who gets through


async def ask(link: Link, **changes: object) -> None:
    args = {"cluster": CLUSTER, "node": "n2", "service": "drives", **changes}
    await link.call("via", {name: value for name, value in args.items() if value is not None}, timeout_s=PATIENCE_S)


async def to_n3(cluster: DetourCluster, engine: Engine | None = None) -> Link:
    port = cluster.server_of("n3").port
    return await connect(engine or cluster.engine, ("127.0.0.1", port), timeout_s=PATIENCE_S, node="n3")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"cluster": b"d" * 16}, BadRequest, "another cluster"),
        ({"cluster": None}, BadRequest, "cluster"),
        ({"service": "sqlite"}, BadRequest, "no service"),
        ({"service": 3}, BadRequest, "service"),
        ({"node": 7}, BadRequest, "node"),
        ({"node": "n9" * 500}, Unavailable, "no drives"),
        ({"node": "n3"}, Unavailable, "no drives"),
        ({"service": "coordinator"}, Unavailable, "no coordinator"),
    ],
)
async def test_a_node_passes_on_to_services_of_its_cluster_only(cluster, changes, error, words):
    link = await to_n3(cluster)
    with pytest.raises(error, match=words):
        await ask(link, **changes)
    assert cluster.passed_on_by("n3") == 0 and link.closed is None
    await ask(link)
    assert cluster.passed_on_by("n3") == 1
    link.close()
    await until(lambda: cluster.passed_on_by("n3") == 0)


async def test_a_link_of_a_writer_is_not_passed_on_nor_is_anybody_by_a_node_without_its_lease(cluster):
    server = await cluster.links("mount/n1").connected(N3)
    with pytest.raises(NotPermitted):
        await ask(server.link)
    cluster.server_of("n3").may_serve = False
    with pytest.raises(LeaseLost):
        await ask(await to_n3(cluster))


async def test_there_are_at_most_so_many_tunnels_and_the_next_one_is_told(cluster):
    tunnels = cluster.tunnels["n3"]
    for _ in range(TUNNELS_MAX):
        tunnels.reserve()
    link = await to_n3(cluster)
    with pytest.raises(Unavailable, match=f"{TUNNELS_MAX} connections"):
        await ask(link)
    tunnels.give_back()
    await ask(link)


async def test_one_who_leaves_before_the_answer_leaves_nothing_behind(cluster):
    for _ in range(3):
        link = await to_n3(cluster)
        call = pack_call("via", {"cluster": CLUSTER, "node": "n2", "service": "drives"})
        link.request(Kind.CALL, call, None, lambda frame, error: None)
        link.close()
    await until(lambda: cluster.wires["n3", "n2"].accepted == 3)
    await until(lambda: cluster.passed_on_by("n3") == 0)
    await ask(await to_n3(cluster))
    assert cluster.passed_on_by("n3") == 1


async def test_a_stranger_and_another_clusters_node_are_not_passed_on(cluster, tmp_path):
    engine, plain = Engine(Identity("n1", make_place(tmp_path / "foreign", "n1", THEIRS))), Engine()
    cluster.nursery.start_soon(plain.run_forever)
    with pytest.raises((Unavailable, Refused)):
        await to_n3(cluster, engine)
    with pytest.raises(CsvfsError):
        await ask(await to_n3(cluster, plain))  # without TLS: its first frame is no handshake
        pytest.fail("it was let in")
    engine.close()
    assert cluster.tunnels["n3"].begun == 0


async def test_an_evicted_nodes_certificate_does_not_get_through_a_node_that_has_not_heard_of_it(cluster):
    """The node at the end decides, by the same handshake; and whoever hears of it closes what is open."""
    waypoint = Waypoint("n3", "127.0.0.1", cluster.server_of("n3").port)
    arguments = {"cluster": CLUSTER, "node": "n2", "service": "drives"}
    evicted = Engine(Identity("n4", make_place(cluster.servers[0].path.parent / "tls" / "n4", "n4")))
    cluster.nursery.start_soon(evicted.run_forever)
    serial = serial_of((cluster.servers[0].path.parent / "tls" / "n4" / "node.crt").read_text())

    link = await connect_through(evicted, waypoint, arguments, node="n2", timeout_s=PATIENCE_S)
    assert link.via == "n3" and await link.call("ping", {}, timeout_s=PATIENCE_S) is None
    cluster.identities["n2"].revoke([serial])
    await until(lambda: link.closed is not None and cluster.passed_on_by("n3") == 0)
    with pytest.raises(Unavailable):
        late = await connect_through(evicted, waypoint, arguments, node="n2", timeout_s=PATIENCE_S)
        await late.call("ping", {}, timeout_s=PATIENCE_S)
        pytest.fail("the drive server of n2 answered an evicted node")

    cluster.identities["n2"].revoke([])
    link = await connect_through(evicted, waypoint, arguments, node="n2", timeout_s=PATIENCE_S)
    cluster.identities["n3"].revoke([serial])
    await until(lambda: link.closed is not None and cluster.passed_on_by("n3") == 0)
    with pytest.raises(Unavailable):
        await connect_through(evicted, waypoint, arguments, node="n2", timeout_s=PATIENCE_S)


async def test_a_detour_that_ends_at_another_node_is_refused(cluster):
    """Should the node in between lie about where it passes on to: who is there has to show the certificate."""
    waypoint = Waypoint("n3", "127.0.0.1", cluster.server_of("n3").port)
    arguments = {"cluster": CLUSTER, "node": "n1", "service": "drives"}
    with pytest.raises(Refused, match="node n2 was wanted, the certificate is of node n1"):
        await connect_through(cluster.engine, waypoint, arguments, node="n2", timeout_s=PATIENCE_S)
    await until(lambda: cluster.passed_on_by("n3") == 0)


async def test_a_writer_may_not_speak_for_the_node_that_passes_it_on(cluster):
    cluster.cut("n1", "n2")
    with pytest.raises(AccessDenied, match="which its certificate does not"):
        await cluster.links("mount/n3").connected(N2)


# Tunnels


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    made = Engine()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run_forever)
        yield made
        nursery.cancel_scope.cancel()
    made.close()


def pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    return ours, theirs


def dug(engine: Engine) -> tuple[Tunnels, trio.SocketStream, trio.SocketStream]:
    """A tunnel, and its two ends as those see it who speak through it."""
    tunnels = Tunnels(engine)
    (a, near), (b, far) = pair(), pair()
    tunnels.reserve()
    tunnels.dig(near, far, None)
    return tunnels, trio.SocketStream(trio.socket.from_stdlib_socket(a)), trio.SocketStream(trio.socket.from_stdlib_socket(b))


async def test_what_goes_into_a_tunnel_comes_out_whole_and_in_order_both_ways_at_once(engine):
    """Also when nobody takes it for a while: then nothing more is taken in, and no more than the limit is kept."""
    tunnels, near, far = dug(engine)
    (tunnel,) = tunnels._open
    sent = [bytes([number % 251]) * (1 + number * 7919 % 100_000) for number in range(200)]
    total = sum(map(len, sent))
    got = {id(near): bytearray(), id(far): bytearray()}
    kept = 0

    async def send(stream: trio.SocketStream) -> None:
        for piece in sent:
            await stream.send_all(piece)

    async def take(stream: trio.SocketStream) -> None:
        nonlocal kept
        if stream is far:
            await until(lambda: tunnel._ends[1].unsent)
        while len(got[id(stream)]) < total:
            kept = max(kept, *(len(end.unsent) for end in tunnel._ends))
            got[id(stream)] += await stream.receive_some(70_000)

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for stream in (near, far):
                nursery.start_soon(send, stream)
                nursery.start_soon(take, stream)
    assert got[id(near)] == got[id(far)] == b"".join(sent)
    assert 0 < kept <= TUNNEL_BUFFER_SIZE
    assert tunnels.count == 1
    await near.aclose()
    assert await far.receive_some(1) == b""
    assert tunnels.count == 0


async def send_until_it_breaks(stream: trio.SocketStream) -> None:
    with trio.fail_after(PATIENCE_S), pytest.raises(trio.BrokenResourceError):
        while True:
            await stream.send_all(bytes(MIB))


async def test_a_tunnel_ends_with_either_side_also_while_bytes_wait_in_it(engine):
    for leaver in (0, 1):
        tunnels, *ends = dug(engine)
        (tunnel,) = tunnels._open
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_until_it_breaks, ends[leaver])
            await until(lambda tunnel=tunnel: any(end.unsent for end in tunnel._ends))
            await ends[1 - leaver].aclose()
            await until(lambda tunnels=tunnels: tunnels.count == 0)
        await ends[leaver].aclose()


# What is known of paths, and what is said of them


def test_a_detour_is_due_when_the_straight_path_has_failed_for_a_while_and_no_longer_ago():
    known = Straight()
    assert known.patience_s(100.0) == DETOUR_AFTER_S
    known.failed(100.0, 100.1, "refused")
    assert known.patience_s(100.2) == pytest.approx(DETOUR_AFTER_S - 0.2)
    known.failed(100.3, 100.4, "refused again")
    assert known.patience_s(100.5) == 0.0 and known.why == "refused again"
    assert known.patience_s(100.4 + FORGET_S + 1) == DETOUR_AFTER_S
    known.failed(200.0, 200.0, "refused")
    assert known.patience_s(200.0) == DETOUR_AFTER_S
    known.works()
    assert known.patience_s(201.0) == DETOUR_AFTER_S and known.why == ""


async def test_nobody_is_asked_for_a_detour_to_oneself_nor_through_oneself_or_the_node_that_is_wanted(cluster):
    for wire in cluster.wires.values():
        wire.cut()
    with pytest.raises(Unavailable):
        await cluster.paths.connect(("127.0.0.1", cluster.wires["n1", "n2"].port), node="n2", service="drives", timeout_s=1)
    assert cluster.wires["n1", "n3"].accepted >= 2
    assert cluster.wires["n1", "n2"].accepted == 2
    link = await cluster.paths.connect(("127.0.0.1", cluster.server_of("n1").port), node="n1", service="drives", timeout_s=60)
    assert link.via == ""


def facts(**more: object) -> waits.Facts:
    return waits.Facts(now_s=100.0, io_timeout_s=60.0, **more)  # type: ignore[arg-type]


def test_the_mode_is_redirected_with_the_way_and_the_reason_unless_something_waits():
    detours = [waits.Detour("the drives of n2", "n3", "no answer"), waits.Detour("the coordinator on n2", "n3", "no answer")]
    assert waits.mode(facts()) == (waits.DIRECT, "")
    words = "the drives of n2 through n3; the coordinator on n2 through n3 (no answer)"
    assert waits.mode(facts(detours=detours)) == (waits.REDIRECTED, words)
    stuck = [waits.SlabWait(7, 1, 90.0, "node n2 runs no drive server")]
    assert waits.mode(facts(detours=detours, slabs=stuck))[0] == waits.PAUSED
    assert waits.news(facts(detours=detours)) == {"mode": "redirected", "why": words, "busy": False}
