"""A simulated mount: a session with the coordinator, a real Bus, and a program that writes, reads and flushes.

Place      simulator. Production's leases on files are leases on regions here: runs of blocks of one slab that only
           the holder reads and writes. The guard is the real one.
Program    takes a region, does some operations, several writes at a time, gives it back; and begins anew.
"""

from __future__ import annotations

from random import Random
from typing import Any

import trio

from coordinator.cluster_facts import ClusterFacts
from csvfs.block.bus import Bus
from csvfs.block.server_links import ServerLinks
from csvfs.cluster.membership import View, keep_view_forever
from csvfs.errors import CsvfsError, Fenced, LeaseLost, NotCoordinator, Unavailable
from csvfs.ids import DriveId, Epoch, SlabId
from csvfs.mount.guard import Guard
from csvfs.net.calls import CallTable
from csvfs.net.link import Link
from csvfs.volume import file_io
from csvfs.wire.block_messages import SlabDescriptor
from tests.simulator import faults
from tests.simulator.coordinator import WRITE_TIMEOUT_MS
from tests.simulator.history import Key, content
from tests.simulator.process import Process

PING_S = 1.0
CALL_TIMEOUT_S = 5.0
RETRY_S = 0.1


class Writer:
    """One incarnation of one node's mount."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.world = process.world
        self.rng = Random(f"{self.world.seed}/{process.name}")
        self.history = self.world.history
        self.view = View()
        self.facts = ClusterFacts(self.view)
        self.guard = Guard(process.may_serve, clock=process.machine.clock_ns)
        self.held: int | None = None
        self._asking: int | None = None
        self.in_flight: set[tuple[Key, int]] = set()
        self.dirty: file_io.Epochs = {}  # as FileState.dirty_slabs
        self._recalled = trio.Event()
        self._idle = trio.Event()
        self._released = trio.Event()
        self._link: Link | None = None
        self._connecting = trio.Lock()
        self._answered = trio.Event()
        process.on_killed = self._killed

    def _killed(self) -> None:
        for key, number in self.in_flight:
            self.history.abandon(key, number)
        self.in_flight.clear()

    async def run(self) -> None:
        process, world = self.process, self.world
        links = ServerLinks(
            process.engine, self.facts.server, cluster=world.cluster, volume=world.volume,  # type: ignore[arg-type]
            writer=f"mount/{process.node}", incarnation=process.incarnation, local_node=process.node,
        )  # fmt: skip
        self.bus = Bus(
            links, self, volume=world.volume, local_node=process.node, silence_ms_max=WRITE_TIMEOUT_MS
        )
        self.bus.on_fenced = self._fenced
        try:
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                await nursery.start(keep_view_forever, process.store, self.view)
                nursery.start_soon(self.bus.run_forever)
                nursery.start_soon(self._ping_forever)
                await self._work()
                await trio.sleep_forever()
        finally:
            self.bus.close()

    def _fenced(self, error: Fenced) -> None:
        """This incarnation is out: it ends, as the mount does."""
        self.world.trace(f"{self.process.name} is fenced: {error}")
        self.nursery.cancel_scope.cancel()

    # -- the coordinator -------------------------------------------------------------------------

    async def _ping_forever(self) -> None:
        while True:
            await self.process.gate()
            await self.call("ping", {})
            await self.world.events_queue.sleep(PING_S)

    async def call(self, name: str, args: dict[str, Any]) -> Any:
        """Ask the coordinator, whoever it is, until it answers. Raises Fenced: this incarnation is out."""
        while True:
            try:
                link = await self._connected()
                sent_ns = self.process.machine.clock_ns()
                value = await link.call(name, args, timeout_s=CALL_TIMEOUT_S)
                self.guard.contact(sent_ns)
                return value
            except Fenced:
                raise
            except NotCoordinator:
                if self._link is not None:
                    self._link.close()
            except Unavailable:
                pass
            await trio.sleep(RETRY_S)

    async def _connected(self) -> Link:
        async with self._connecting:
            if self._link is not None and self._link.closed is None:
                return self._link
            owner = self.view.owners.get(self.world.volume_name)
            if owner is None:
                raise Unavailable("the volume has no coordinator now")
            address = (str(owner["address"]), int(owner["port"]))
            link = await self.process.network.connect(self.process.engine, address, timeout_s=1.0)
            table = CallTable({"recall": self._recall})
            link.on_frame = lambda link, frame: table.handle(link, frame, self.nursery)
            sent_ns = self.process.machine.clock_ns()
            hello = {"node": self.process.node, "incarnation": self.process.incarnation}
            try:
                await link.call("hello", hello, timeout_s=CALL_TIMEOUT_S)
            except BaseException:
                link.close()
                raise
            self.guard.contact(sent_ns)
            self._link = link
            return link

    async def slab_failed(
        self, slab: SlabId, epoch: int, drives: list[DriveId], reason: str
    ) -> SlabDescriptor:
        """SlabOwner of the bus."""
        args = {"slab": slab, "epoch": Epoch(epoch), "drives": drives, "reason": reason[:200]}
        link = await self._connected()
        return SlabDescriptor.from_wire(await link.call("slab_failed", args, timeout_s=CALL_TIMEOUT_S))

    async def _recall(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        """Give the region back: what was begun is finished first."""
        region = args["region"]
        if self._asking == region:
            # An answer that was sent before the recall has arrived before it, and is taken by now. An answer
            # that was lost will not come: what is granted later is granted anew.
            await trio.sleep(0.01)
        if self.held == region:
            self._recalled.set()
            await self._released.wait()
        return {}

    # -- the program -----------------------------------------------------------------------------

    async def _work(self) -> None:
        while not self.world.calm:
            region = self.rng.choice(self.world.regions)
            await self.hold(region.number, region.slab)
            try:
                for _ in range(1000 if faults.READS in faults.EMPHASIS else self.rng.randrange(3, 12)):
                    if self._recalled.is_set() or self.world.calm:
                        break
                    await self._operate(region)
                    await self.world.events_queue.sleep(self.rng.choice((0, 0.001, 0.02, 0.2)))
                await self.finish_writes()
                if self.rng.random() < 0.5:
                    await self._flush(region)
            finally:
                self.let_go()
            if self.rng.random() < 0.5:
                await self.call("release", {"region": region.number})
            self.world.operated()
            await self.world.events_queue.sleep(self.rng.choice((0.01, 0.1, 0.5, 2.0)))

    async def hold(self, region: int, slab: int) -> None:
        """Take the lease of a region, and the descriptors that come with it."""
        self._asking = region
        try:
            value = await self.call("acquire", {"region": region, "slabs": [slab]})
        finally:
            self._asking = None
        self._recalled, self._released = trio.Event(), trio.Event()
        self.held = region  # no await since the answer was taken
        for wire in value["slabs"]:
            self.bus.learn(SlabDescriptor.from_wire(wire))

    def let_go(self) -> None:
        self.held = None
        self._released.set()

    async def _operate(self, region: Any) -> None:
        self._check_guard()
        kind = self.rng.random()
        if faults.READS in faults.EMPHASIS:
            kind = 0.6 if kind > 0.05 else 0.0
        if kind < 0.55:
            first = self.rng.choice(region.blocks)
            count = self.rng.choice((1, 1, 1, 2, 4))
            self.write((region.slab, first), min(count, region.blocks[-1] + 1 - first))
        elif kind < 0.85:
            await self.read_one((region.slab, self.rng.choice(region.blocks)))
        elif kind < 0.93:
            await self._flush(region)
        else:
            await self.finish_writes()

    def _check_guard(self) -> None:
        if not self.guard.serving():
            raise LeaseLost("no contact with the coordinator")

    def write(self, key: Key, count: int) -> None:
        """Issue one write of consecutive blocks."""
        numbers = [(key[0], key[1] + index) for index in range(count)]
        issued = [(block, self.history.begin_write(block)) for block in numbers]
        self.in_flight.update(issued)
        data = b"".join(content(block, number) for block, number in issued)

        def done(error: CsvfsError | None) -> None:
            for block, number in issued:
                self.in_flight.discard((block, number))
                if not self.process.alive or error is not None:
                    self.history.abandon(block, number)
                else:
                    self.history.acknowledge(block, number, self)
                    self._note_dirty(block[0], epochs[block[0]])
            if not self.in_flight:
                self._idle.set()

        epochs = file_io.epochs(self.bus, [(0, count, key[0], key[1])])
        self.world.trace_write(self.process, issued)
        self.bus.write(SlabId(key[0]), key[1], data, done)

    def _note_dirty(self, slab: int, epoch: Epoch) -> None:
        self.dirty[slab] = min(epoch, self.dirty.get(slab, epoch))

    async def finish_writes(self) -> None:
        while self.in_flight:
            self._idle = trio.Event()
            await self._idle.wait()

    async def read_one(self, key: Key) -> None:
        """A read that is answered only while the guard allows it."""
        begun = self.history.begin_read(key)
        try:
            data = await self.bus.read(SlabId(key[0]), key[1], 1)
        except Fenced:
            raise
        except CsvfsError as error:
            self.world.read_failed(key, error)
            return
        self._check_guard()
        number = self.history.end_read(key, begun, data)
        self.world.trace_read(self.process, key, number)

    async def _flush(self, region: Any) -> None:
        """As fsync of a file whose size did not change: the data alone."""
        await self.finish_writes()
        begun, lost = self.history.begin_flush([region.slab]), self.history.lost_of(self, [region.slab])
        written = {region.slab: self.dirty.pop(region.slab)} if region.slab in self.dirty else {}
        try:
            await self.bus.flush([SlabId(region.slab)])
        except Fenced:
            raise
        except CsvfsError as error:
            for slab, epoch in written.items():
                self._note_dirty(slab, epoch)
            self.world.trace(f"{self.process.name} flush of slab {region.slab} fails: {error}")
            return
        if (told := file_io.lost_before_flush(self.bus, written)) is not None:
            self.world.trace(f"{self.process.name} flush of slab {region.slab}: {told}")
            self.history.told_of_loss(self, [region.slab])
            return
        self.history.end_flush(begun, lost)
        self.world.trace(f"{self.process.name} flushed slab {region.slab}")
