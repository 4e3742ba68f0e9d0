"""The simulated cluster store: linearizable, with leases and watches; each process has a handle of its own.

Place      simulator. Interface: csvfs/store/interface.py. The store itself never fails; a node may be cut off from
           it, which is found out slowly, and may leave a transaction committed whose answer was lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import TYPE_CHECKING

import trio

from csvfs.errors import NotFound, Unavailable
from csvfs.store.interface import Change, Compare, Delete, Item, Put, TransactionResult
from tests.simulator.clock import SimClock
from tests.simulator.events import EventQueue

if TYPE_CHECKING:
    from tests.simulator.process import Process

GIVE_UP_S = 1.0


class Watch:
    """Changes not yet taken by one watcher."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.changes: deque[Change] = deque()
        self.event = trio.Event()


class StoreCore:
    """What is true."""

    def __init__(self, clock: SimClock, events: EventQueue, rng: Random) -> None:
        self.clock = clock
        self.rng = rng
        self.events = events
        self.items: dict[str, Item] = {}
        self.revision = 0
        self.leases: dict[int, tuple[float, float]] = {}  # to (ends at, lasts)
        self.watches: list[Watch] = []
        self.cut: set[str] = set()  # nodes that cannot reach it
        self.on_change: dict[str, Callable[[Change], None]] = {}  # for the checker: by key, at once
        self._lease_number = 0

    def transact(self, compares: list[Compare], changes: list[Put | Delete]) -> TransactionResult:
        for compare in compares:
            item = self.items.get(compare.key)
            if (item.revision if item else 0) != compare.revision:
                return TransactionResult(False, self.revision)
        for change in changes:
            if isinstance(change, Put) and change.lease and change.lease not in self.leases:
                raise NotFound(f"{change.key}: lease {change.lease} has ended; grant a new one")
        self.revision += 1
        for change in changes:
            if isinstance(change, Put):
                self.items[change.key] = Item(change.key, change.value, self.revision, change.lease)
            elif self.items.pop(change.key, None) is None:
                continue
            self._tell(Change(change.key, self.items.get(change.key), self.revision))
        return TransactionResult(True, self.revision)

    def _tell(self, change: Change) -> None:
        if change.key in self.on_change:
            self.on_change[change.key](change)
        for watch in self.watches:
            if change.key.startswith(watch.prefix):
                watch.changes.append(change)
                self.events.after(0.0005 + 0.003 * self.rng.random(), watch.event.set)

    def grant(self, ttl_ms: int) -> int:
        self._lease_number += 1
        self.leases[self._lease_number] = (self.clock.now + ttl_ms / 1000, ttl_ms / 1000)
        self._check_at(self._lease_number)
        return self._lease_number

    def _check_at(self, lease: int) -> None:
        due, _ = self.leases[lease]
        self.events.at(due, lambda: self._check(lease))

    def _check(self, lease: int) -> None:
        if lease in self.leases:
            if self.leases[lease][0] <= self.clock.now:
                self.revoke(lease)
            else:
                self._check_at(lease)

    def keep_alive(self, lease: int) -> None:
        if lease not in self.leases:
            raise NotFound(f"lease {lease} has ended")
        lasts = self.leases[lease][1]
        self.leases[lease] = (self.clock.now + lasts, lasts)

    def revoke(self, lease: int) -> None:
        if self.leases.pop(lease, None) is not None:
            keys = [item.key for item in self.items.values() if item.lease == lease]
            if keys:
                self.transact([], [Delete(key) for key in keys])


class StoreHandle:
    """ClusterStore as one process sees it."""

    def __init__(self, core: StoreCore, process: Process) -> None:
        self._core = core
        self._process = process

    async def _travel(self) -> None:
        if not self._process.alive and self._process.world.freezes:
            raise Unavailable("its process is dead: what still runs are its last steps")
        await self._core.events.sleep(self._delay())
        if self._process.node in self._core.cut:
            await trio.sleep(GIVE_UP_S)
            raise Unavailable("the cluster store cannot be reached")
        while self._process.paused:
            await trio.sleep(0.05)

    async def get(self, key: str) -> Item | None:
        await self._travel()
        item = self._core.items.get(key)
        await self._travel()
        return item

    async def list_items(self, prefix: str) -> list[Item]:
        await self._travel()
        found = [self._core.items[key] for key in sorted(self._core.items) if key.startswith(prefix)]
        await self._travel()
        return found

    async def transact(self, compares: list[Compare], changes: list[Put | Delete]) -> TransactionResult:
        await self._travel()
        result = self._core.transact(compares, changes)
        await self._travel()
        return result

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        return (await self.transact([], [Put(key, value, lease)])).revision

    async def delete(self, key: str) -> None:
        await self.transact([], [Delete(key)])

    async def grant_lease(self, ttl_ms: int) -> int:
        await self._travel()
        lease = self._core.grant(ttl_ms)
        await self._travel()
        return lease

    async def keep_alive(self, lease: int) -> None:
        await self._travel()
        self._core.keep_alive(lease)
        await self._travel()

    def keep_alive_soon(self, lease: int, told: Callable[[bool | None], None]) -> None:
        """As keep_alive, without a task: `told` is called with whether there is such a lease; None: no answer."""
        core, events, process = self._core, self._core.events, self._process

        def arrive() -> None:
            if process.node in core.cut:
                events.after(GIVE_UP_S, lambda: told(None))
                return
            renewed = lease in core.leases
            if renewed:
                core.keep_alive(lease)
            answer(renewed)

        def answer(renewed: bool) -> None:
            if process.paused:
                events.after(0.05, lambda: answer(renewed))
            else:
                events.after(self._delay(), lambda: told(None if process.node in core.cut else renewed))

        events.after(self._delay(), arrive)

    def _delay(self) -> float:
        return 0.0003 + 0.0005 * self._core.rng.random()

    async def revoke_lease(self, lease: int) -> None:
        await self._travel()
        self._core.revoke(lease)

    @asynccontextmanager
    async def watch(self, prefix: str) -> AsyncIterator[AsyncIterator[list[Change]]]:
        watch = Watch(prefix)
        self._core.watches.append(watch)
        try:
            yield self._changes(watch)
        finally:
            self._core.watches.remove(watch)

    async def _changes(self, watch: Watch) -> AsyncIterator[list[Change]]:
        while True:
            await watch.event.wait()
            watch.event = trio.Event()
            while self._process.node in self._core.cut or self._process.paused:
                await trio.sleep(0.1)
            batch = list(watch.changes)
            watch.changes.clear()
            if batch:
                yield batch

    async def close(self) -> None:
        """Nothing to close."""

    list = list_items
