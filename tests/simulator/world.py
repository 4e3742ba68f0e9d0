"""One run: machines, drives, a volume, writers, faults, and at the end the proof that all is well.

Place      simulator, top.
Run        set up; writers work while faults happen; calm: everything is mended, writers end; the volume must heal
           by itself; every block is read back and judged; all copies must be equal, byte for byte.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import trio

from coordinator.slab_book import pack_descriptors, parse_descriptors
from csvfs.block.drive import Drive
from csvfs.block.layout import layout_of
from csvfs.block.slab_state import new_slab
from csvfs.block.slot_table import format_slot_table
from csvfs.block.superblock import Superblock, write_superblock
from csvfs.cluster.membership import item_map
from csvfs.errors import CsvfsError, Fenced
from csvfs.ids import METADATA_SLAB_ID_MIN, DriveId, Epoch, NodeName, PoolId, SlabId, Term, VolumeId
from csvfs.store.interface import Change, Put
from csvfs.units import MIB
from csvfs.wire.block_messages import ROLE_IN_SYNC, Member, SlabDescriptor, block_checksums, pack_checksums
from csvfs.wire.control import pack_value
from tests.simulator import seams
from tests.simulator.clock import START_S, SimClock
from tests.simulator.coordinator import Host
from tests.simulator.events import EventQueue
from tests.simulator.faults import Faults
from tests.simulator.history import History, Key, Unhealed, Violation
from tests.simulator.journal import first_block
from tests.simulator.medium import Medium, SimOs
from tests.simulator.network import Network
from tests.simulator.process import Machine, Process
from tests.simulator.server import SimDriveServer
from tests.simulator.store import StoreCore
from tests.simulator.writer import Writer

SLAB_SIZE = 4 * MIB
DRIVE_SIZE = 24 * MIB
CLUSTER, POOL, VOLUME = b"c" * 16, PoolId(b"p" * 16), VolumeId(b"v" * 16)
NAME = "v"
BEGIN_S = 0.8  # until the volume is served
WORK_S_MAX = 60.0
HEAL_S_MAX = 400.0
READ_S_MAX = 60.0
HOLD_S_MAX = 10.0  # for a lease; the process that asks for it may have died
COLLECT_EVERY = 8  # runs; each leaves some 5 MB in cycles


@dataclass(slots=True, frozen=True)
class Region:
    """Blocks of a slab that one writer holds at a time."""

    number: int
    slab: int
    blocks: tuple[int, ...]


@dataclass(slots=True)
class Outcome:
    """`failure`: what went wrong, in one line; None: nothing. `digest`: of all that happened.
    `lied`: a history, a copy or an in-sync set is wrong. `unhealed`: it does not come back to order. Neither: a bug."""

    seed: int
    failure: str | None = None
    lied: bool = False
    unhealed: bool = False
    events: list[str] = field(default_factory=list)
    digest: str = ""
    reads: int = 0
    writes: int = 0
    flushes: int = 0
    simulated_s: float = 0.0
    calls: int = 0  # of programs, that were answered (clients/)
    undecided: int = 0  # objects whose history was too long for the checker
    errors: dict[str, int] = field(default_factory=dict)  # seen by programs, other than answers


class World:
    """All that exists in a run. `freezes`: stopped processes run none of their own timers (freezing.py)."""

    freezes = False

    def __init__(self, seed: int, operations: int, *, verbose: bool = False) -> None:
        self.seed = seed
        self.rng = Random(f"{seed}/world")
        self.clock = SimClock()
        self.events_queue = EventQueue(self.clock)
        self.network = Network(self.events_queue, Random(f"{seed}/network"))
        self.store = StoreCore(self.clock, self.events_queue, Random(f"{seed}/store"))
        self.os = SimOs()
        self.history = History()
        self.machines: dict[str, Machine] = {}
        self.cluster, self.volume, self.volume_name, self.slab_size = CLUSTER, VOLUME, NAME, SLAB_SIZE
        self.calm = False
        self.kill_writer_at_write = False
        self.rotten: set[tuple[str, int]] = set()
        self.events: list[str] = []
        self._verbose = verbose
        self._operations = operations
        self._undo: list[Callable[[], None]] = []
        self._drive_of: dict[DriveId, Medium] = {}
        self._lost_power: set[tuple[SlabId, DriveId]] = set()
        self._journal_lost = False  # all copies of the metadata have lost what was not flushed
        self._descriptors: dict[SlabId, SlabDescriptor] = {}
        self._slow_rng = Random(f"{seed}/slow")
        self._draw()

    def _draw(self) -> None:
        rng = self.rng
        node_count = rng.choice((2, 3, 3, 3, 4))
        self.network.scale = rng.choice((1.0, 1.0, 1.0, 10.0, 40.0))
        self.copies = min(node_count, rng.choice((2, 3, 3)))
        self.rest_s = Random(f"{self.seed}/rest").choice((0.0, 0.5, 60.0))  # of chunks (writer_marks.py)
        self._slab_count = rng.choice((1, 1, 2, 3))
        self._writer_count = rng.choice((1, 2, 2))
        self.regions: list[Region] = []
        for slab in range(1, self._slab_count + 1):
            for _ in range(rng.choice((1, 2))):
                first = 14 + 40 * len(self.regions)  # over a border between chunks
                count = rng.choice((2, 4, 8))
                number = len(self.regions)
                self.regions.append(Region(number, slab, tuple(range(first, first + count))))

    # -- telling ---------------------------------------------------------------------------------

    def trace(self, text: str) -> None:
        """Note what happens; it is part of what a replay must repeat."""
        line = f"{self.clock.now - START_S:9.4f}  {text}"
        self.events.append(line)
        if self._verbose:
            print(line, flush=True)

    def trace_write(self, process: Process, issued: list[tuple[Key, int]]) -> None:
        (slab, block), number = issued[0]
        self.trace(f"{process.name} writes slab {slab} block {block} +{len(issued)} as {number}")
        if self.kill_writer_at_write:
            self.kill_writer_at_write = False
            delay = self.network.scale * 0.002 * self.rng.random()
            self.events_queue.after(delay, lambda: process.kill("SIGKILL in the middle of a write"))

    def trace_read(self, process: Process, key: Key, number: int) -> None:
        self.trace(f"{process.name} reads slab {key[0]} block {key[1]}: {number}")

    def read_failed(self, key: Key, error: CsvfsError) -> None:
        """A read that gives an error is no lie; at the end there must be none."""
        self.trace(f"read of slab {key[0]} block {key[1]} fails: {error}")

    def operated(self) -> None:
        self._operations -= 1

    # -- set-up ----------------------------------------------------------------------------------

    def set_up(self) -> None:
        rng = self.rng
        count = max(self.copies, rng.choice((2, 3, 3, 3, 4)))
        names = [f"n{index + 1}" for index in range(count)]
        drives: dict[str, list[DriveId]] = {}
        drive_count = rng.choice((1, 1, 2))  # with two, metadata and data lie on different ones
        for index, name in enumerate(names):
            rate = 1.0 + rng.choice((0.0, 0.0, 0.02, -0.02)) * rng.random()
            media = []
            drives[name] = [DriveId(bytes([16 * number + index + 1]) * 16) for number in range(drive_count)]
            for number, drive in enumerate(drives[name]):
                medium = blank_drive(drive).copy(f"drive {number} of {name}")
                medium.rng = Random(f"{self.seed}/{medium.path}")
                medium.cold = rng.choice((0.0, 0.0, 0.1))
                self.os.media[medium.path] = medium
                self._drive_of[drive] = medium
                media.append(medium)
            self.machines[name] = Machine(self, name, media, rate)
        self._make_volume(names, drives)
        for index, machine in enumerate(self.machines.values()):
            machine.roles = {"server": _run_server, "host": _run_host}
            if index < self._writer_count:
                machine.roles["writer"] = _run_writer

    def _make_volume(self, names: list[str], drives: dict[str, list[DriveId]]) -> None:
        def places(copies: int, number: int) -> list[tuple[DriveId, NodeName]]:
            return [(drives[name][number], NodeName(name)) for name in self.rng.sample(names, copies)]

        metadata = new_slab(METADATA_SLAB_ID_MIN, places(min(3, len(names)), -1))
        data = [new_slab(SlabId(slab), places(self.copies, 0)) for slab in range(1, self._slab_count + 1)]
        block = first_block(data)
        for drive, medium in self._drive_of.items():
            opened = Drive.open(medium.path)
            for descriptor in [metadata, *data]:
                if any(member.drive == drive for member in descriptor.members):
                    copy = opened.create_slab(VOLUME, descriptor.slab, Epoch(1), ROLE_IN_SYNC, Term(0))
                    if descriptor is metadata:
                        copy.write_blocks(1, block, _sums(block, copy.seed, 1))
                        copy.clear_active([0])
            opened.close()
        self.descriptors_changed(data)
        values: dict[str, Any] = {
            "cluster": {"id": CLUSTER, "name": "simulated", "created": 0},
            "pool": {"id": POOL, "name": "pool", "slab_size": SLAB_SIZE},
            f"volumes/{NAME}": {"id": VOLUME, "copies": self.copies, "size": 0, "state": "online"},
        }
        for name in names:
            values[f"nodes/{name}"] = {"address": name}
            for drive in drives[name]:
                path = self._drive_of[drive].path
                values[f"drives/{drive.hex()}"] = {"node": name, "path": path, "state": "ok"}
        self.store.transact([], [Put(key, pack_value(value)) for key, value in values.items()])
        self.store.on_change[f"meta/{NAME}"] = self.metadata_changed
        self.store.transact([], [Put(f"meta/{NAME}", pack_descriptors([metadata]))])

    # -- faults ----------------------------------------------------------------------------------

    def undo(self, action: Callable[[], None], delay_s: float) -> None:
        """Carry out `action` in a while; `mend` does it at the latest."""

        def once() -> None:
            if action in self._undo:
                self._undo.remove(action)
                action()

        self._undo.append(action)
        self.events_queue.after(delay_s, once)

    def mend(self) -> None:
        """End all faults."""
        self.kill_writer_at_write = False
        while self._undo:
            self._undo.pop(0)()
        for machine in self.machines.values():
            for medium in machine.media:
                medium.kill_after_stores = None
            server = machine.processes.get("server")
            if server is not None and any(s.drive and s.drive.failure for s in _served(server)):
                server.kill("its drive is failed for good: somebody replaces the cable")

    def cut(self, pairs: list[tuple[str, str]]) -> None:
        self.trace(f"cut: {', '.join(f'{a}>{b}' for a, b in pairs)}")
        self.network.cut.update(pairs)

    def heal(self, pairs: list[tuple[str, str]]) -> None:
        self.trace(f"healed: {', '.join(f'{a}>{b}' for a, b in pairs)}")
        self.network.cut.difference_update(pairs)
        self.network.kick()

    def pause(self, processes: list[Process]) -> None:
        for process in processes:
            self.trace(f"{process.name} is stopped")
            process.paused = True

    def resume(self, processes: list[Process]) -> None:
        for process in processes:
            self.trace(f"{process.name} goes on")
            process.paused = False
        self.network.kick()

    def power_lost(self, media: list[Medium]) -> None:
        """These have lost what was not flushed: slabs of which all in-sync copies have may fall back.

        A drive that had flushed everything lost nothing, and need not say that it did.
        """
        drives = [drive for drive, medium in self._drive_of.items() if medium in media]
        self._lost_power.update((slab, drive) for slab in self._descriptors for drive in drives)
        self._check_power()

    def descriptors_changed(self, descriptors: list[SlabDescriptor]) -> None:
        """The coordinator has other descriptors: I1 is judged here."""
        for descriptor in descriptors:
            before = self._descriptors.get(descriptor.slab)
            if before is None or descriptor.epoch > before.epoch:
                if before is not None:
                    self._check_step(before, descriptor)
                self._descriptors[descriptor.slab] = descriptor
                self.trace(
                    f"slab {descriptor.slab} epoch {descriptor.epoch}: "
                    + " ".join(f"{m.node}:{'-+j'[m.role]}" for m in descriptor.members)
                )
        self._check_power()

    def _check_step(self, before: SlabDescriptor, after: SlabDescriptor) -> None:
        old = {member.drive for member in before.in_sync}
        new = {member.drive for member in after.in_sync}
        if not new:
            raise Violation(f"slab {after.slab} epoch {after.epoch} has no in-sync copy (I1)")
        if after.epoch == before.epoch + 1 and not old & new:
            raise Violation(f"slab {after.slab} epoch {after.epoch} shares no copy with the one before (I1)")
        self._lost_power.difference_update((after.slab, drive) for drive in new - old)
        if after.lost_epoch == after.epoch:
            # It goes on with what is left, for good.
            self._lost_power.difference_update((after.slab, drive) for drive in new)

    def _check_power(self) -> None:
        for slab, descriptor in self._descriptors.items():
            if all((slab, member.drive) in self._lost_power for member in descriptor.in_sync):
                self.history.power_lost(slab)
                self._journal_lost |= slab >= METADATA_SLAB_ID_MIN

    def metadata_changed(self, change: Change) -> None:
        """The cluster store has other descriptors of metadata slabs."""
        if change.item is not None:
            self.descriptors_changed(list(parse_descriptors(change.item).values()))

    def journal_opened(self, descriptors: list[SlabDescriptor]) -> None:
        """A new coordinator knows these. Changes that were not flushed may have been lost with all copies."""
        if self._journal_lost:
            self._journal_lost = False
            for descriptor in descriptors:
                self._descriptors[descriptor.slab] = descriptor
            self._check_power()
        self.descriptors_changed(descriptors)

    def owner_node(self) -> str | None:
        owner = item_map(self.store.items.get(f"owner/{NAME}")).get("node")
        return owner if isinstance(owner, str) else None

    def twins(self, medium: Medium, page: int) -> set[tuple[str, int]]:
        """Pages of other drives that may hold the same block; without asking which: all of the same number
        within the slot."""
        within = (page * 4096 - medium.layout.data_offset) % SLAB_SIZE // 4096
        return {
            (path, number)
            for path, number in self.rotten
            if (number * 4096 - medium.layout.data_offset) % SLAB_SIZE // 4096 == within
        }

    def has_equal(self, medium: Medium, page: int) -> bool:
        """Whether another drive has the same content at the same place of the slab: what only one has must not rot."""
        content, within = medium.pages[page], self._within_slab(medium, page)
        return any(
            data == content and self._within_slab(other, number) == within
            for other in self._drive_of.values()
            if other is not medium
            for number, data in other.pages.items()
        )

    @staticmethod
    def _within_slab(medium: Medium, page: int) -> int:
        return (page * 4096 - medium.layout.data_offset) % SLAB_SIZE // 4096

    # -- the run ---------------------------------------------------------------------------------

    async def slow_call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of a thread: it takes a while, and happens at one instant of that while."""
        await self.events_queue.sleep(self._slow_rng.random() * 0.004)
        result = function(*args)
        await self.events_queue.sleep(self._slow_rng.random() * 0.002)
        return result

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            nursery.start_soon(self.events_queue.run_forever)
            for machine in self.machines.values():
                nursery.start_soon(machine.run_forever)
            faults = Faults(self, Random(f"{self.seed}/faults"))
            self.trace("plan: " + ", ".join(name for name, _ in faults.plan))
            with trio.move_on_after(WORK_S_MAX):
                await trio.sleep(BEGIN_S)
                await faults.run()
                while self._operations > 0:
                    await trio.sleep(0.5)
            self.calm = True
            self.trace("calm")
            self.mend()
            await self._wait_healed()
            await self._read_back()
            self._compare_copies()
            nursery.cancel_scope.cancel()

    async def _wait_healed(self) -> None:
        deadline = self.clock.now + HEAL_S_MAX
        while True:
            why = self._not_healed()
            if not why:
                return
            if self.clock.now > deadline:
                raise Unhealed(f"not healed after {HEAL_S_MAX:g} s: {why}")
            await trio.sleep(0.5)

    def _service(self) -> Any:
        owner = self.owner_node()
        if owner is None:
            return None
        process = self.machines[owner].processes.get("host")
        host = getattr(process, "host", None)
        service = None if host is None else host.service
        return service if service is not None and service.ready and process.alive else None

    def _not_healed(self) -> str:
        service = self._service()
        if service is None:
            return "there is no coordinator"
        if service.setup.term != service.host.view.terms.get(NAME):
            return "the coordinator is an old one"
        for descriptor in [*service.book.all(), *service.journal.slabs()]:
            if len(descriptor.in_sync) != len(descriptor.members):
                return f"slab {descriptor.slab} epoch {descriptor.epoch}: not all members are in sync"
            if not all(self._has_epoch(member, descriptor) for member in descriptor.members):
                return f"slab {descriptor.slab} epoch {descriptor.epoch}: not installed everywhere"
        for machine in self.machines.values():
            writer = machine.processes.get("writer")
            if writer is not None and getattr(writer, "writer", None) is not None and writer.alive:
                if writer.writer.in_flight:  # type: ignore[attr-defined]
                    return f"{writer.name} still writes"
                if writer.writer.held is not None:  # type: ignore[attr-defined]
                    return f"{writer.name} still holds a region"
        return ""

    def _has_epoch(self, member: Member, descriptor: SlabDescriptor) -> bool:
        served = _served(self.machines[member.node].processes["server"])
        drive = next((s.drive for s in served if s.drive_id == member.drive), None)
        copy = None if drive is None else drive.find(VOLUME, descriptor.slab)
        return copy is not None and copy.epoch == descriptor.epoch

    async def _read_back(self) -> None:
        """Every block, by one writer that takes all leases, twice: the second time from settled copies."""
        with trio.move_on_after(READ_S_MAX) as scope:
            for _ in range(2):
                for region in self.regions:
                    await self._read_region(region)
        if scope.cancelled_caught:
            raise Unhealed(f"the volume could not be read back within {READ_S_MAX:g} s")
        await self._wait_healed()

    async def _read_region(self, region: Region) -> None:
        while True:
            machine = self.rng.choice([m for m in self.machines.values() if "writer" in m.roles])
            process = machine.processes.get("writer")
            writer: Writer | None = getattr(process, "writer", None)
            if process is None or writer is None or not process.alive:
                await trio.sleep(0.2)
                continue
            with trio.move_on_after(HOLD_S_MAX) as scope:
                try:
                    await writer.hold(region.number, region.slab)
                except Fenced:  # it was stopped for too long
                    await trio.sleep(0.2)
                    continue
            if scope.cancelled_caught or not process.alive:
                continue
            try:
                for block in region.blocks:
                    key = (region.slab, block)
                    begun = self.history.begin_read(key)
                    try:
                        data = await writer.bus.read(SlabId(region.slab), block, 1)
                    except Fenced:
                        break
                    except CsvfsError as error:
                        if process.alive:
                            raise Unhealed(f"slab {key[0]} block {key[1]} cannot be read: {error}") from None
                        break
                    self.trace_read(process, key, self.history.end_read(key, begun, data))
                else:
                    return
            finally:
                writer.let_go()

    def _compare_copies(self) -> None:
        service = self._service()
        if service is None:
            raise Unhealed("the coordinator went away while all was well")
        for descriptor in service.journal.slabs():
            blocks = [b for region in self.regions if region.slab == descriptor.slab for b in region.blocks]
            found: dict[str, list[bytes | None]] = {}
            for member in descriptor.in_sync:
                copy = self._copy(member.node, member.drive, descriptor.slab)
                if copy.epoch != descriptor.epoch:
                    raise Violation(f"slab {descriptor.slab} on {member.node}: epoch {copy.epoch}")
                found[member.node] = self._blocks_of(copy, blocks, member.node)
            first = next(iter(found.values()))
            for node, data in found.items():
                if data != first:
                    pairs = zip(blocks, data, first, strict=True)
                    unequal = [block for block, a, b in pairs if a != b and a is not None and b is not None]
                    if unequal:
                        raise Violation(
                            f"slab {descriptor.slab} blocks {unequal} of {node} differ from another in-sync copy"
                        )

    def _blocks_of(self, copy: Any, blocks: list[int], node: str) -> list[bytes | None]:
        """None: it rotted, and nobody has read it since."""
        data: list[bytes | None] = []
        for block in blocks:
            try:
                data.append(bytes(copy.read_blocks(block, 1)[1]))
            except CsvfsError as error:
                if not self.rotten:
                    raise Violation(f"a copy on {node} does not verify: {error}") from None
                data.append(None)
        return data

    def _copy(self, node: str, drive: DriveId, slab: SlabId) -> Any:
        server: SimDriveServer = self.machines[node].processes["server"].server  # type: ignore[attr-defined]
        copy = server.service.drives.by_id(drive).opened().find(VOLUME, slab)
        if copy is None:
            raise Violation(f"slab {slab} has no copy on {node}, which is in sync")
        return copy


def _served(process: Process) -> list[Any]:
    server: SimDriveServer | None = getattr(process, "server", None)
    return list(server.service.drives) if server is not None and process.alive else []


async def _run_server(process: Process) -> None:
    await SimDriveServer(process).run()


async def _run_host(process: Process) -> None:
    process.host = Host(process)  # type: ignore[attr-defined]
    await process.host.run()  # type: ignore[attr-defined]


async def _run_writer(process: Process) -> None:
    process.writer = Writer(process)  # type: ignore[attr-defined]
    await process.writer.run()  # type: ignore[attr-defined]


_blanks: dict[DriveId, Medium] = {}


def blank_drive(drive: DriveId) -> Medium:
    """A formatted drive, made once."""
    if drive not in _blanks:
        layout = layout_of(DRIVE_SIZE, SLAB_SIZE)
        medium = Medium("blank", layout)
        sim_os = SimOs()
        sim_os.media["blank"] = medium
        with seams.installed(SimClock(), sim_os, 0, None):  # type: ignore[arg-type]
            fd = sim_os.open("blank")
            superblock = Superblock(
                sequence=1, drive_id=drive, pool_id=POOL, cluster_id=CLUSTER, size=layout.size,
                slab_size=SLAB_SIZE, node=NodeName("n"), label="", created_ns=0,
            )  # fmt: skip
            format_slot_table(fd, layout, drive)
            write_superblock(fd, superblock)
        _blanks[drive] = medium
    return _blanks[drive]


def _sums(block: bytes, seed: int, number: int) -> bytes:
    return pack_checksums(block_checksums(memoryview(block), seed, number))


def run_seed(seed: int, operations: int = 12, *, verbose: bool = False) -> Outcome:
    """One run, from nothing but its seed."""
    outcome = Outcome(seed)
    world = World(seed, operations, verbose=verbose)
    collecting = gc.isenabled()
    gc.disable()  # collections would come at other places in a replay
    try:
        with seams.installed(world.clock, world.os, seed, world.slow_call, rest_s=world.rest_s):
            world.set_up()
            try:
                trio.run(world.run, clock=world.clock)
            except BaseException as error:
                outcome.failure = _first_failure(error)
                outcome.lied, outcome.unhealed = _has(error, Violation, but=Unhealed), _has(error, Unhealed)
                if outcome.failure is None:
                    raise
    finally:
        if collecting:
            gc.enable()
    if seed % COLLECT_EVERY == 0:
        gc.collect()
    outcome.events = world.events
    outcome.digest = hashlib.sha256("\n".join(world.events).encode()).hexdigest()[:16]
    outcome.reads, outcome.writes = world.history.reads, world.history.writes
    outcome.flushes = world.history.flushes
    outcome.simulated_s = world.clock.now - START_S
    return outcome


def _has(error: BaseException, kind: type[Violation], but: type[Violation] | tuple[()] = ()) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_has(member, kind, but) for member in error.exceptions)
    return isinstance(error, kind) and not isinstance(error, but)


def _first_failure(error: BaseException) -> str | None:
    """In one line; None: the run was interrupted."""
    if isinstance(error, BaseExceptionGroup):
        failures = [_first_failure(member) for member in error.exceptions]
        found = [failure for failure in failures if failure is not None]
        return " & ".join(found) if found else None
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return None
    if isinstance(error, Violation):
        return str(error)
    frames = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__}: {error} ({' '.join(frames[-4:])})"
