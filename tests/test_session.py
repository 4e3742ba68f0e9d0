"""The session against coordinators in memory: failover, calls once, leases reclaimed."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio

from csvfs.errors import (
    CsvfsError,
    Disconnected,
    Exists,
    Fenced,
    NotCoordinator,
    NotFound,
    TimedOut,
    Unavailable,
)
from csvfs.mount.session import RUNS_BATCH, Session, _batches
from csvfs.net.link import Address
from csvfs.wire.control import pack_call
from csvfs.wire.frames import Frame, Kind


class Metadata:
    """What survives a coordinator: names, and the stored replies of sessions."""

    def __init__(self) -> None:
        self.names: dict[bytes, int] = {}
        self.replies: dict[int, Any] = {}


class Coordinator:
    """One term's coordinator. `faults`: by call, what happens to the next ones: "before" or "after" it is
    carried out the coordinator dies; an error is answered; an event is waited for."""

    def __init__(self, term: int, metadata: Metadata) -> None:
        self.term = term
        self.metadata = metadata
        self.links: list[MemoryLink] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.faults: dict[str, list] = {}
        self.refuses: list[int] = []
        self.lowers: list[int] = []
        self.dead = False
        self.inherited: bool | None = None
        self.claimed = False
        self.more: dict[str, Any] = {}

    def die(self) -> None:
        self.dead = True
        for link in list(self.links):
            link.close(Disconnected("the coordinator died"))

    async def serve(self, name: str, args: dict[str, Any]) -> Any:
        self.calls.append((name, args))
        fault = self.faults[name].pop(0) if self.faults.get(name) else None
        if isinstance(fault, trio.Event):
            await fault.wait()
        if isinstance(fault, CsvfsError):
            raise fault
        if fault == "before":
            self.die()
            await trio.sleep_forever()
        value = self._answer(name, args)
        if fault == "after":
            self.die()
            await trio.sleep_forever()
        return value

    def _answer(self, name: str, args: dict[str, Any]) -> Any:
        if name == "hello" and self.inherited is not None:
            known = {"term": self.term, "volume": bytes(16), "slab_size": 1 << 26, **self.more}
            return {**known, "inherited": self.inherited, "claimed": self.claimed, "unflushed": []}
        if name == "hello":
            return {"term": self.term, "volume": bytes(16), "slab_size": 1 << 26}
        if name == "reclaim":
            lowered = {"lowered": self.lowers} if self.lowers else {}
            return {"refused": [ino for ino, *_ in args["leases"] if ino in self.refuses], **lowered}
        if name == "make":
            return self._once(args["op"], lambda: self._make(args["name"]))
        return {"answered": name}

    def _once(self, op: int, change: Callable[[], Any]) -> Any:
        if op not in self.metadata.replies:
            self.metadata.replies[op] = change()
        return self.metadata.replies[op]

    def _make(self, name: bytes) -> dict[str, Any]:
        if name in self.metadata.names:
            raise Exists(f"{name!r} exists")
        self.metadata.names[name] = ino = len(self.metadata.names) + 2
        return {"ino": ino, "lease": 3, "dir_lease": 2}

    def named(self, name: str) -> list[dict[str, Any]]:
        return [args for called, args in self.calls if called == name]


class MemoryLink:
    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.peer = f"term {coordinator.term}"
        self.closed: CsvfsError | None = None
        self.on_frame: Callable = lambda link, frame: None
        self.on_close: Callable = lambda link, error: None
        self.replied: list[Any] = []
        self._ended = trio.Event()
        coordinator.links.append(self)

    async def call(self, name: str, args: dict[str, Any], *, timeout_s: float) -> Any:
        result: list[Any] = []

        async def serve() -> None:
            try:
                result.append(await self.coordinator.serve(name, args))
            except CsvfsError as error:
                result.append(error)
            nursery.cancel_scope.cancel()

        async def watch() -> None:
            await self._ended.wait()
            result.append(Disconnected(f"{self.peer} was lost"))
            nursery.cancel_scope.cancel()

        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                nursery.start_soon(serve)
        if not result:
            raise TimedOut(name)
        if isinstance(result[0], CsvfsError):
            raise result[0]
        return result[0]

    def close(self, error: CsvfsError | None = None) -> None:
        if self.closed is None:
            self.closed = error or Disconnected("closed")
            self._ended.set()
            self.on_close(self, self.closed)

    def reply(self, request_id: int, value: Any) -> None:
        self.replied.append(value)

    def reply_error(self, request_id: int, error: CsvfsError) -> None:
        self.replied.append(error)

    def ask(self, name: str, args: dict[str, Any]) -> None:
        """The coordinator calls the session."""
        head = memoryview(pack_call(name, args))
        self.on_frame(self, Frame(int(Kind.CALL), 1 << 63, head, memoryview(b"")))


class Owner:
    """The owner key. An address is (name, port); `moved_to` changes it."""

    def __init__(self) -> None:
        self.at: Address | None = None
        self._changed = trio.Event()

    def address(self) -> Address | None:
        return self.at

    async def wait_change(self, known: Address | None) -> None:
        while self.at == known:
            await self._changed.wait()

    def move_to(self, port: int | None) -> None:
        self.at = None if port is None else ("host", port)
        changed, self._changed = self._changed, trio.Event()
        changed.set()


class Leases:
    def __init__(self) -> None:
        self.held = [[10, 3, 4096, 7], [11, 2, 0, 0]]
        self.lost: list[int] = []
        self.open_still: list[int] = []
        self.lost_locks: list[int] | None = []
        self.open_files = 5

    def claims_of_segments(self) -> list[list[Any]]:
        return []

    def without_segments(self, inos: list[int]) -> None:
        assert not inos

    async def recall_segment(self, ino: int, segment: int, kind: int) -> dict[str, Any]:
        return {"kind": 0}

    async def flush_segments(self, ino: int) -> None:
        pass

    def claims(self) -> list[list[int]]:
        return self.held

    def refused(self, inos: list[int], *, are_open: bool = False) -> None:
        self.lost += inos
        self.open_still += inos if are_open else []

    def lowered(self, inos: list[int]) -> None:
        self.open_still += inos

    def adopted(self, lost_locks: list[int] | None) -> None:
        assert not self.lost
        self.lost_locks = lost_locks

    async def recall(self, ino: int, kind: int, attr: bool) -> dict[str, Any]:
        return {"kind": kind, "size": ino, "mtime_ns": None, "atime_ns": attr}

    def query(self, ino: int) -> dict[str, Any] | None:
        return {"size": ino}


class World:
    """Coordinators by port: port and term are the same number."""

    def __init__(self) -> None:
        self.metadata = Metadata()
        self.owner = Owner()
        self.coordinators: dict[int, Coordinator] = {}
        self.leases = Leases()
        self.fenced: list[Fenced] = []
        self.session = Session(
            volume="Volume1",
            node="n1",
            incarnation=4,
            owner=self.owner,
            connect=self.connect,  # type: ignore[arg-type]
            on_fenced=self.fenced.append,
            io_timeout_s=5,
        )
        self.session.holder = self.leases

    async def connect(self, address: Address) -> MemoryLink:
        await trio.lowlevel.checkpoint()
        coordinator = self.coordinators.get(int(address[1]))
        if coordinator is None or coordinator.dead:
            raise Unavailable("connection refused")
        return MemoryLink(coordinator)

    def elect(self, term: int) -> Coordinator:
        coordinator = self.coordinators[term] = Coordinator(term, self.metadata)
        self.owner.move_to(term)
        return coordinator


@contextlib.asynccontextmanager
async def world() -> AsyncIterator[World]:
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            made = World()
            nursery.start_soon(made.session.run_forever)
            yield made
            nursery.cancel_scope.cancel()


async def test_it_introduces_itself_claims_its_leases_and_only_then_calls(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with world() as w:
        one = w.elect(1)
        assert await w.session.call("lookup", {"parent": 1, "name": b"x"}) == {"answered": "lookup"}
        assert [name for name, _ in one.calls] == ["hello", "reclaim", "lookup"]
        assert one.named("hello") == [{"volume": "Volume1", "node": "n1", "incarnation": 4, "inherit": False, "term": 0}]
        assert one.named("reclaim") == [{"leases": w.leases.held, "last": True}]


@pytest.mark.parametrize("claimed", [True, False])
async def test_one_that_goes_on_for_another_says_what_it_believes_to_hold_also_where_that_is_known(
    autojump_clock: trio.abc.Clock, claimed: bool
) -> None:
    """The one before may have been killed before it noted what it had given back (I4)."""
    async with world() as w:
        w.session._inherit = True
        one = w.coordinators[1] = Coordinator(1, w.metadata)
        one.inherited, one.claimed, one.lowers = True, claimed, [10] * claimed
        w.owner.move_to(1)
        await w.session.wait_linked()
        assert [name for name, _ in one.calls] == ["hello", "reclaim"]
        assert w.leases.open_still == one.lowers and w.leases.lost == []
        assert one.named("hello")[0]["inherit"] is True
        one.die()
        two = w.elect(2)
        await w.session.call("statfs", {})
        assert [name for name, _ in two.calls] == ["hello", "reclaim", "statfs"]
        assert two.named("hello")[0]["inherit"] is False


@pytest.mark.parametrize("lost_locks", [[7], None])
async def test_one_that_goes_on_for_one_that_was_evicted_hears_so_before_it_claims_and_has_open_what_is_refused(
    autojump_clock: trio.abc.Clock, lost_locks: list[int] | None
) -> None:
    async with world() as w:
        w.session._inherit = True
        one = w.coordinators[1] = Coordinator(1, w.metadata)
        one.inherited, one.refuses, one.more = True, [10], {"adopted": True, "lost_locks": lost_locks}
        w.owner.move_to(1)
        await w.session.wait_linked()
        assert w.leases.open_still == [10] and w.leases.lost_locks == lost_locks
        one.die()
        two = w.elect(2)
        two.refuses = [11]
        await w.session.call("statfs", {})
        assert w.leases.lost == [10, 11] and w.leases.open_still == [10]  # from then on as any other


async def test_one_that_cannot_go_on_for_another_ends(autojump_clock: trio.abc.Clock) -> None:
    async with world() as w:
        w.session._inherit = True
        one = w.coordinators[1] = Coordinator(1, w.metadata)
        one.inherited = False
        w.owner.move_to(1)
        with pytest.raises(Fenced):
            await w.session.wait_linked()
        assert len(w.fenced) == 1


async def test_calls_wait_until_there_is_a_coordinator(autojump_clock: trio.abc.Clock) -> None:
    async with world() as w, trio.open_nursery() as nursery:
        nursery.start_soon(w.session.call, "statfs", {})
        await trio.sleep(1)
        one = w.elect(1)
        await trio.sleep(0.1)
        assert one.named("statfs") == [{}]


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_I11_a_create_retried_after_failover_gets_its_first_answer(
    autojump_clock: trio.abc.Clock, moment: str
) -> None:
    """No EEXIST for one's own create, whether the coordinator died before or after carrying it out."""
    async with world() as w, trio.open_nursery() as nursery:
        one = w.elect(1)
        one.faults["make"] = [moment]
        answers: list[Any] = []

        async def create() -> None:
            answers.append(await w.session.call("make", {"parent": 1, "name": b"disk"}))

        nursery.start_soon(create)
        await trio.sleep(0.5)
        two = w.elect(2)
        await trio.sleep(0.5)
        assert answers == [{"ino": 2, "lease": 0, "dir_lease": 0}]  # Q1: leases of a second try do not count
        assert one.named("make")[0]["op"] == two.named("make")[0]["op"]
        with pytest.raises(Exists):
            await w.session.call("make", {"parent": 1, "name": b"disk"})


async def test_I11_op_done_never_passes_a_call_that_may_be_sent_again(autojump_clock: trio.abc.Clock) -> None:
    async with world() as w, trio.open_nursery() as nursery:
        one = w.elect(1)
        hangs = trio.Event()
        one.faults["make"] = [hangs]
        nursery.start_soon(w.session.call, "make", {"name": b"slow"})
        await trio.sleep(0.1)
        await w.session.call("make", {"name": b"b"})
        await w.session.call("make", {"name": b"c"})
        assert [(args["op"], args["op_done"]) for args in one.named("make")] == [(1, 1), (2, 1), (3, 1)]
        hangs.set()
        await trio.sleep(0.1)
        await w.session.call("make", {"name": b"d"})
        assert one.named("make")[-1]["op_done"] == 4


async def test_a_new_term_is_told_all_leases_in_batches_and_what_it_refuses_is_given_up(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with world() as w:
        w.elect(1)
        await w.session.call("statfs", {})
        w.leases.held = [[ino, 2, 0, 0] for ino in range(2500)]
        two = Coordinator(2, w.metadata)
        two.refuses = [7, 2400]
        w.coordinators[2] = two
        w.owner.move_to(2)
        await trio.sleep(0.1)
        await w.session.call("statfs", {})
        assert [len(args["leases"]) for args in two.named("reclaim")] == [1000, 1000, 500]
        assert [args["last"] for args in two.named("reclaim")] == [False, False, True]
        assert w.leases.lost == [7, 2400]


async def test_a_broken_link_to_the_same_coordinator_needs_no_reclaim(autojump_clock: trio.abc.Clock) -> None:
    async with world() as w:
        one = w.elect(1)
        await w.session.call("statfs", {})
        one.links[0].close(Disconnected("cable"))
        await w.session.call("statfs", {})
        assert len(one.named("reclaim")) == 1 and len(one.named("hello")) == 2


async def test_a_call_rides_over_errors_that_pass(autojump_clock: trio.abc.Clock) -> None:
    async with world() as w:
        one = w.elect(1)
        one.faults["statfs"] = [Unavailable("starting"), NotCoordinator("not yet"), TimedOut("slow")]
        assert await w.session.call("statfs", {}) == {"answered": "statfs"}
        assert len(one.named("statfs")) == 4


async def test_errors_that_stay_are_told_at_once(autojump_clock: trio.abc.Clock) -> None:
    async with world() as w:
        one = w.elect(1)
        one.faults["getattr"] = [NotFound("inode 9")]
        with pytest.raises(NotFound):
            await w.session.call("getattr", {"ino": 9})
        assert len(one.named("getattr")) == 1


async def test_a_call_gives_up_after_io_timeout(autojump_clock: trio.abc.Clock) -> None:
    async with world() as w:
        before = trio.current_time()
        with pytest.raises(Unavailable):
            await w.session.call("statfs", {})
        assert trio.current_time() - before == pytest.approx(5, abs=0.5)


async def test_a_coordinator_that_moved_without_a_word_is_left_at_once(
    autojump_clock: trio.abc.Clock,
) -> None:
    """Its node lost power: no packet says so, only the owner key."""
    async with world() as w, trio.open_nursery() as nursery:
        one = w.elect(1)
        one.faults["statfs"] = [trio.Event()]
        nursery.start_soon(w.session.call, "statfs", {})
        await trio.sleep(0.2)
        two = w.elect(2)
        await trio.sleep(0.05)
        assert two.named("statfs") == [{}]


async def test_a_host_that_does_not_answer_a_hello_is_left_when_the_volume_is_elsewhere(
    autojump_clock: trio.abc.Clock,
) -> None:
    """It may be taking the volume over for a while, and be stopped meanwhile."""
    async with world() as w, trio.open_nursery() as nursery:
        one = Coordinator(1, w.metadata)
        one.faults["hello"] = [trio.Event()]
        w.coordinators[1] = one
        w.owner.move_to(1)
        nursery.start_soon(w.session.call, "statfs", {})
        await trio.sleep(0.2)
        assert one.named("hello")
        two = w.elect(2)
        await trio.sleep(0.05)
        assert two.named("statfs") == [{}] and all(link.closed for link in one.links)


async def test_a_coordinator_that_hangs_is_noticed_by_its_silence(autojump_clock: trio.abc.Clock) -> None:
    async with world() as w:
        one = w.elect(1)
        one.faults["slabs"] = [trio.Event()]  # the ping
        await w.session.call("statfs", {})
        await trio.sleep(5)
        assert len(one.named("hello")) == 2


async def test_the_ping_says_how_many_files_are_open(autojump_clock: trio.abc.Clock) -> None:
    async with world() as w:
        one = w.elect(1)
        await w.session.call("statfs", {})
        await trio.sleep(2)
        assert {"ids": [], "open": 5} in one.named("slabs")


async def test_a_fenced_session_says_so_once_and_ends(autojump_clock: trio.abc.Clock) -> None:
    async with world() as w:
        one = w.elect(1)
        one.faults["statfs"] = [Fenced("evicted")]
        with pytest.raises(Fenced):
            await w.session.call("statfs", {})
        with pytest.raises(Fenced):
            await w.session.call("lookup", {})
        assert len(w.fenced) == 1 and one.named("lookup") == []


async def test_a_session_fenced_at_hello_fails_the_calls_that_wait(autojump_clock: trio.abc.Clock) -> None:
    async with world() as w:
        one = Coordinator(1, w.metadata)
        one.faults["hello"] = [Fenced("incarnation 5 has taken your place")]
        w.coordinators[1] = one
        w.owner.move_to(1)
        with pytest.raises(Fenced):
            await w.session.call("statfs", {})
        assert len(w.fenced) == 1


async def test_an_older_term_is_not_believed(autojump_clock: trio.abc.Clock) -> None:
    async with world() as w:
        w.elect(2)
        await w.session.call("statfs", {})
        old = Coordinator(1, w.metadata)
        w.coordinators[1] = old
        w.owner.move_to(1)
        await trio.sleep(0.1)
        with pytest.raises(Unavailable):
            await w.session.call("statfs", {})
        assert old.named("statfs") == []


async def test_recalls_and_queries_of_the_coordinator_are_answered(autojump_clock: trio.abc.Clock) -> None:
    async with world() as w:
        one = w.elect(1)
        await w.session.call("statfs", {})
        link = one.links[0]
        link.ask("recall", {"ino": 10, "kind": 2, "attr": True})
        await trio.sleep(0.01)
        link.ask("query", {"ino": 11})
        link.ask("recall", {"ino": "ten"})
        await trio.sleep(0.01)
        assert link.replied[:2] == [
            {"kind": 2, "size": 10, "mtime_ns": None, "atime_ns": True},
            {"size": 11},
        ]
        assert isinstance(link.replied[2], CsvfsError)


def test_claims_of_very_many_segments_go_in_batches_with_nothing_left_out() -> None:
    runs = [[2 * at, 1, 3] for at in range(2 * RUNS_BATCH + 5)]
    claims = [[5, 0, []], [6, 7, runs], [8, 0, []], [9, 0, [[0, 1, 2]]]]
    batches = _batches(claims)
    assert all(sum(max(1, len(row[2])) for row in batch) <= RUNS_BATCH for batch in batches)
    rows = [row for batch in batches for row in batch]
    assert [run for ino, _, part in rows if ino == 6 for run in part] == runs
    assert {ino for ino, _, _ in rows} == {5, 6, 8, 9} and [5, 0, []] in rows and _batches([]) == [[]]
