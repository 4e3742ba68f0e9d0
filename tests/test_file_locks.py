"""File locks at the mount: what is asked of the coordinator, what programs are told, and what a close gives up."""

import errno
import fcntl
from typing import Any

import pytest
import trio

from csvfs.errors import Fenced, TooManyLocks, Unavailable
from csvfs.mount import file_locks
from csvfs.mount import fuse_abi as abi
from csvfs.mount.file_locks import LOCK_END, FileLocks

FILE = 5
OWNER = (1 << 63) + 5  # of the kernel: all 64 bits are used
SIGNED = OWNER - (1 << 64)
HANDLE = 77


def lk(kind: int = fcntl.F_WRLCK, owner: int = OWNER, handle: int = HANDLE, first: int = 0, last: int = 9, flags: int = 0) -> bytes:
    return abi.LK_IN.pack(handle, owner, first, last, kind, 42, flags, 0)


def flush_body(owner: int = OWNER) -> memoryview:
    return memoryview(abi.FLUSH_IN.pack(HANDLE, 0, 0, owner))


class Coordinator:
    """Answers by `answers[name]`, a list of values or errors; what is not there is granted."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, list[Any]] = {}
        self.held: dict[str, trio.Event] = {}  # calls of that name wait until it is set

    async def call(self, name: str, args: dict[str, Any]) -> Any:
        self.calls.append((name, args))
        if name in self.held:
            await self.held[name].wait()
        await trio.lowlevel.checkpoint()
        answer = self.answers[name].pop(0) if self.answers.get(name) else {"granted": True}
        if isinstance(answer, Exception):
            raise answer
        return answer

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator()


@pytest.fixture
def locks(coordinator: Coordinator, nursery: trio.Nursery) -> FileLocks:
    locks = FileLocks(coordinator)
    locks.start(nursery)
    return locks


async def close(locks: FileLocks, ino: int, handle: int) -> None:
    closing = locks.closing(ino, handle)
    assert closing is not None
    await closing()


async def until(condition: Any) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.005)


async def test_a_lock_is_asked_for_with_all_that_the_kernel_says(locks: FileLocks, coordinator: Coordinator) -> None:
    assert await locks.set(1, FILE, lk(), waits=False) == 0
    want = {"ino": FILE, "owner": SIGNED, "flock": False, "exclusive": True, "first": 0, "last": 9, "pid": 42}
    assert coordinator.calls == [("lock", {**want, "opened": HANDLE, "wait": False})]
    coordinator.answers["lock"] = [{"granted": False}]
    assert await locks.set(2, FILE, lk(fcntl.F_RDLCK, flags=abi.LK_FLOCK), waits=False) == errno.EAGAIN
    assert coordinator.calls[-1][1]["flock"] and not coordinator.calls[-1][1]["exclusive"]


async def test_what_is_in_the_way_is_told_and_that_nothing_is(locks: FileLocks, coordinator: Coordinator) -> None:
    coordinator.answers["getlock"] = [{"lock": None}, {"lock": [False, 3, LOCK_END, 17]}]
    for want in ((0, 9, fcntl.F_UNLCK, 42), (3, LOCK_END, fcntl.F_RDLCK, 17)):
        reply = await locks.get(1, FILE, lk())
        assert abi.LK_OUT.unpack_from(reply, 16) == want


async def test_a_wait_is_asked_for_again_until_it_is_granted(locks: FileLocks, coordinator: Coordinator) -> None:
    coordinator.answers["lock"] = [{"granted": False}, {"granted": False}, {"granted": True}]
    assert await locks.set(1, FILE, lk(), waits=True) == 0
    assert coordinator.names() == ["lock"] * 3
    assert len({args["token"] for _, args in coordinator.calls}) == 1


async def test_a_signal_breaks_a_wait_off_and_the_answer_to_the_lock_says_how_it_ended(
    locks: FileLocks, coordinator: Coordinator, nursery: trio.Nursery
) -> None:
    results: dict[int, int] = {}

    async def wait(unique: int) -> None:
        results[unique] = await locks.set(unique, FILE, lk(), waits=True)

    for unique, granted, outcome in ((8, False, errno.EINTR), (10, True, 0)):
        coordinator.held["lock"] = trio.Event()
        coordinator.answers["lock"] = [{"granted": granted}]
        nursery.start_soon(wait, unique)
        await until(lambda: coordinator.names().count("lock") == len(results) + 1)
        locks.interrupt(memoryview(abi.INTERRUPT_IN.pack(999)))  # of another request
        locks.interrupt(memoryview(abi.INTERRUPT_IN.pack(unique)))
        await until(lambda: coordinator.names()[-2:] == ["lock_cancel"] * 2)  # again, while there is no answer
        assert unique not in results
        coordinator.held.pop("lock").set()
        await until(lambda unique=unique: unique in results)
        assert results[unique] == outcome
    count = len(coordinator.calls)
    locks.interrupt(memoryview(abi.INTERRUPT_IN.pack(8)))  # over already
    await trio.testing.wait_all_tasks_blocked()
    assert len(coordinator.calls) == count


async def test_waits_are_bounded(locks: FileLocks, coordinator: Coordinator, nursery: trio.Nursery, monkeypatch: Any) -> None:
    monkeypatch.setattr(file_locks, "WAITS_MAX", 1)
    coordinator.held["lock"] = trio.Event()
    nursery.start_soon(lambda: locks.set(1, FILE, lk(), waits=True))
    await until(lambda: coordinator.calls)
    with pytest.raises(TooManyLocks):
        await locks.set(2, FILE, lk(), waits=True)


async def test_a_close_asks_only_where_the_program_may_hold_something(locks: FileLocks, coordinator: Coordinator) -> None:
    assert not locks.is_due(FILE, flush_body())
    assert locks.closing(FILE, HANDLE) is None
    await locks.set(1, FILE, lk(), waits=False)
    assert locks.is_due(FILE, flush_body()) and not locks.is_due(FILE, flush_body(3)) and not locks.is_due(6, flush_body())
    await locks.flush(FILE, OWNER)
    assert coordinator.calls[-1] == ("unlock", {"ino": FILE, "owner": SIGNED, "first": 0, "last": LOCK_END})
    assert not locks.is_due(FILE, flush_body())
    await close(locks, FILE, HANDLE)
    assert coordinator.calls[-1] == ("unlock", {"ino": FILE, "handle": HANDLE})
    assert locks.closing(FILE, HANDLE) is None


async def test_a_lock_that_is_asked_for_during_a_close_stays_known(
    locks: FileLocks, coordinator: Coordinator, nursery: trio.Nursery
) -> None:
    await locks.set(1, FILE, lk(), waits=False)
    coordinator.held["unlock"] = trio.Event()
    nursery.start_soon(locks.flush, FILE, OWNER)
    await until(lambda: coordinator.names()[-1] == "unlock")
    nursery.start_soon(lambda: locks.set(2, FILE, lk(), waits=False))
    await trio.testing.wait_all_tasks_blocked()
    assert coordinator.names().count("lock") == 1, "it comes behind"
    coordinator.held.pop("unlock").set()
    await until(lambda: coordinator.names().count("lock") == 2)
    assert locks.is_due(FILE, flush_body())


async def test_L1_what_a_close_could_not_give_up_goes_on_and_later_locks_come_behind_it(
    locks: FileLocks, coordinator: Coordinator, nursery: trio.Nursery, monkeypatch: Any
) -> None:
    monkeypatch.setattr(file_locks, "RETRY_S", 0.01)
    await locks.set(1, FILE, lk(), waits=False)
    coordinator.answers["unlock"] = [Unavailable("no coordinator"), Unavailable("still none")]
    with pytest.raises(Unavailable):
        await locks.flush(FILE, OWNER)
    nursery.start_soon(lambda: locks.set(2, FILE, lk(), waits=False))
    await until(lambda: coordinator.names().count("lock") == 2)
    assert coordinator.names() == ["lock", "unlock", "unlock", "unlock", "lock"]


async def test_the_end_of_the_session_ends_what_goes_on_behind(locks: FileLocks, coordinator: Coordinator) -> None:
    await locks.set(1, FILE, lk(), waits=False)
    coordinator.answers["unlock"] = [Fenced("evicted")]
    await close(locks, FILE, HANDLE)
    assert coordinator.names() == ["lock", "unlock"]


async def test_a_later_process_of_the_session_knows_from_the_hello_what_to_give_up(
    locks: FileLocks, coordinator: Coordinator
) -> None:
    locks.learn({"locks": [[FILE, SIGNED, HANDLE]]})
    assert locks.is_due(FILE, flush_body()) and not locks.is_due(6, flush_body())
    locks.learn({"locks": None})
    assert locks.is_due(6, flush_body(3)), "more than could be said: every close asks"
    await locks.flush(6, 3)
    await close(locks, 6, 1)
    assert coordinator.names() == ["unlock", "unlock"]


async def test_a_signal_that_comes_before_a_lock_that_is_asked_anew_is_not_lost(
    locks: FileLocks, coordinator: Coordinator
) -> None:
    locks.interrupt(memoryview(abi.INTERRUPT_IN.pack(8)))
    assert await locks.set(8 | 1 << 63, FILE, lk(), waits=True) == errno.EINTR
    assert coordinator.calls == []
