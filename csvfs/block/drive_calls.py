"""The calls a drive server answers (PROTOCOL.md, "Calls to a drive server").

Place      block floor, between drive_server.py (the process) and block_service.py (the state).
"""

from dataclasses import asdict
from typing import Any

import trio

from csvfs.block.block_service import BlockService, Client
from csvfs.block.medium_check import check_medium
from csvfs.block.pace import INTERVAL_S, SPEEDS, Pacer
from csvfs.block.pull import Pull, Source
from csvfs.block.scrub import Healer, rate_of, scrub_blocks, scrub_tables
from csvfs.block.served_drives import ServedDrive
from csvfs.block.slab_copy import SlabCopy
from csvfs.block.slot_tables import pack_slot_header
from csvfs.block.tunnel_desk import TunnelDesk
from csvfs.errors import BadRequest, Corrupt, CsvfsError, DriveFailed, StaleEpoch, UnflushedLost
from csvfs.ids import DriveId, Epoch, Incarnation, NodeName, SlabId, Term, VolumeId
from csvfs.net.calls import CallTable, field, optional_field
from csvfs.net.detours import Paths
from csvfs.net.engine import Engine
from csvfs.net.link import Link
from csvfs.units import BLOCKS_PER_CHUNK
from csvfs.wire.block_messages import ROLE_IN_SYNC, ROLE_JOINING

NO_VOLUME = VolumeId(b"")
ITEMS_MAX = 65_536


def _client(link: Link) -> Client:
    if link.owner is None:
        raise BadRequest("say hello first")
    client: Client = link.owner
    return client


def _numbers(values: list[Any]) -> list[int]:
    if not all(isinstance(number, int) for number in values):
        raise BadRequest("items are named by their numbers")
    return values


def _accepted(args: dict[str, Any]) -> dict[int, int]:
    """By the number of an item: the opening of its drive whose loss is known."""
    rows = optional_field(args, "accepted", list) or []
    if not all(isinstance(row, list) and len(row) == 2 for row in rows):
        raise BadRequest("accepted must be [[item, opens]]")
    return {number: opens for number, opens in (_numbers(row) for row in rows)}  # noqa: C416


def _active_chunks(copy: SlabCopy) -> list[int]:
    """None of a copy whose tables are damaged, or whose drive has failed just now: it is made anew or resynced."""
    try:
        return copy.active_chunks()
    except (Corrupt, DriveFailed):
        return []


class DriveCalls:
    """Handlers by name. `desk`: of those who want to be passed on; `paths`: of pulls. None: no detours."""

    def __init__(
        self, service: BlockService, engine: Engine, *, desk: TunnelDesk | None = None, paths: Paths | None = None
    ) -> None:
        self._service = service
        self._paths = paths
        self._desk = desk
        self._engine = engine
        self.pulls: dict[tuple[DriveId, VolumeId, SlabId], Pull] = {}
        self._pacers: dict[DriveId, Pacer] = {}
        self._is_pacing = False
        service.calls = CallTable(
            {
                "hello": self.hello,
                "drives": self.drives,
                "ping": lambda link, args: None,
                "create_slab": self.create_slab,
                "delete_slab": self.delete_slab,
                "install": self.install,
                "fence": self.fence,
                "settle": self.settle,
                "register_term": self.register_term,
                "completed": self.completed,
                "trim": self.trim,
                "active": self.active,
                "stamp": self.stamp,
                "equal": self.equal,
                "unequal": self.unequal,
                "pull": self.pull,
                "load": self.load,
                "list_slabs": self.list_slabs,
                "status": self.status,
                "locate": self.locate,
                "read_table": self.read_table,
                "scrub": self.scrub,
                "unwritten": self.unwritten,
                "scrub_tables": self.scrub_tables,
                "heal_from": self.heal_from,
                **({} if desk is None else {"via": desk.via}),
            }
        )

    def _drive(self, args: dict[str, Any], name: str = "drive") -> ServedDrive:
        return self._service.drives.by_id(DriveId(field(args, name, bytes)))

    def _copy(self, link: Link, args: dict[str, Any]) -> tuple[ServedDrive, SlabCopy]:
        served = self._drive(args)
        slab = SlabId(field(args, "slab", int))
        return served, self._service.drives.copy(served, _client(link).volume, slab)

    def _check_term(self, link: Link, args: dict[str, Any]) -> int:
        term = field(args, "term", int)
        self._service.check_term(_client(link).volume, term)
        return term

    # -- peers -----------------------------------------------------------------------------------

    def hello(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        service = self._service
        if field(args, "cluster", bytes) != service.cluster:
            raise BadRequest(f"node {service.node} belongs to another cluster")
        volume = VolumeId(optional_field(args, "volume", bytes) or NO_VOLUME)
        service.hello(link, volume, field(args, "writer", str), Incarnation(field(args, "incarnation", int)))
        rows = self.drives(link, {})
        return {"node": service.node, "incarnation": service.incarnation, "drives": rows}

    def drives(self, link: Link, args: dict[str, Any]) -> list[dict[str, Any]]:
        """As in the reply of `hello`, as of now."""
        return [
            {"id": served.drive_id, "index": served.index, "path": served.path, "state": served.condition[0]}
            for served in self._service.drives
        ]

    def register_term(self, link: Link, args: dict[str, Any]) -> None:
        self._check_term(link, args)

    def fence(self, link: Link, args: dict[str, Any]) -> None:
        minimum = Incarnation(field(args, "min_incarnation", int))
        self._service.fence(_client(link).volume, field(args, "writer", str), minimum)

    def settle(self, link: Link, args: dict[str, Any]) -> None:
        minimum = Incarnation(field(args, "min_incarnation", int))
        self._service.marks.settle(_client(link).volume, field(args, "writer", str), minimum)

    def completed(self, link: Link, args: dict[str, Any]) -> None:
        marks = _client(link).marks
        marks.below = max(marks.below, field(args, "below", int))

    # -- slabs -----------------------------------------------------------------------------------

    async def create_slab(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        term = self._check_term(link, args)
        served = self._drive(args)
        slab, epoch = SlabId(field(args, "slab", int)), Epoch(field(args, "epoch", int))
        role = optional_field(args, "role", int) or ROLE_IN_SYNC
        volume = _client(link).volume
        drive = served.opened()
        for _ in range(2):
            if drive.needs_flush_for_slot:
                await self._service.flushes.flush(served)
        self._service.check_term(volume, term)  # nobody else's by now
        copy = drive.create_slab(volume, slab, epoch, role, Term(term))
        if role == ROLE_JOINING:
            copy.joining_begin()
        self._service.put_in_service(served, copy)
        return {"slot": copy.slot}

    def delete_slab(self, link: Link, args: dict[str, Any]) -> None:
        self._check_term(link, args)
        served = self._drive(args)
        slab, volume = SlabId(field(args, "slab", int)), _client(link).volume
        copy = served.opened().find(volume, slab)
        if copy is not None:
            self._service.marks.forget(copy)
            served.in_service.discard(copy)
            self._service.forget_copies()
            served.opened().delete_slab(volume, slab)

    async def install(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        term = self._check_term(link, args)
        volume = _client(link).volume
        alone, accepted = set(_numbers(optional_field(args, "alone", list) or [])), _accepted(args)
        rows = self._rows(args, 4)
        refused: list[list[Any]] = []
        lost: list[list[Any]] = []
        if not all(isinstance(drive_id, bytes) for drive_id, _, _, _ in rows):
            raise BadRequest("items must name drives by their ids")
        for number, (drive_id, slab, epoch, role) in enumerate(rows):
            try:
                served = self._service.drives.by_id(DriveId(drive_id))
                if role not in (ROLE_IN_SYNC, ROLE_JOINING) or not isinstance(epoch, int) or not isinstance(slab, int):
                    raise BadRequest(f"role {role!r} at epoch {epoch!r} cannot be installed")
                await self._service.install(
                    served, volume, SlabId(slab), Epoch(epoch), role, term,
                    alone=number in alone, accepts_loss=accepted.get(number),
                )  # fmt: skip
            except UnflushedLost as error:
                lost.append([drive_id, slab, str(error), error.opens])
            except CsvfsError as error:
                refused.append([drive_id, slab, str(error)])
        return {"refused": refused, "lost": lost}

    def _rows(self, args: dict[str, Any], width: int) -> list[list[Any]]:
        rows = field(args, "items", list)
        if len(rows) > ITEMS_MAX or not all(isinstance(row, list) and len(row) == width for row in rows):
            raise BadRequest(f"items must be at most {ITEMS_MAX} lists of {width}")
        return rows

    def trim(self, link: Link, args: dict[str, Any]) -> None:
        client, rows = _client(link), self._rows(args, 5)
        if not all(isinstance(number, int) for row in rows for number in row):
            raise BadRequest("items of a trim are whole numbers")
        for index, slab, epoch, block, count in rows:
            served = self._service.drives.by_index(index)
            copy = self._service.drives.copy_in_service(served, client.volume, SlabId(slab))
            if epoch != copy.epoch:
                raise StaleEpoch(f"slab {slab} is at epoch {copy.epoch}, not {epoch}")
            if not (block >= 0 and count > 0 and block + count <= copy.block_count):
                raise BadRequest(f"blocks {block} + {count} are not in a slab of {copy.block_count}")
            copy.trim_blocks(block, count)

    def list_slabs(self, link: Link, args: dict[str, Any]) -> list[list[Any]]:
        served = self._drive(args)
        drive = served.opened()
        return [
            [copy.volume, copy.slab, copy.epoch, copy.role, copy in served.in_service, drive.contents_lost]
            for copy in drive.slabs()
            if not copy.damaged  # as good as none: whoever misses it has it made anew
        ]

    def locate(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        served = self._drive(args)
        slab = SlabId(field(args, "slab", int))
        copy = self._service.drives.copy_in_service(served, _client(link).volume, slab)
        self._service.check_in_sync(copy)
        layout = served.opened().layout
        return {
            "slot": copy.slot,
            "data_offset": copy.data_offset,
            "checksum_offset": layout.block_checksum_offset(copy.slot, 0),
            "written_offset": layout.block_written_offset(copy.slot, 0),
            "header_offset": layout.slot_header_offset(copy.slot),
            "header": pack_slot_header(served.drive_id, copy.volume, copy.slab, copy.slot),
        }

    def read_table(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        _, copy = self._copy(link, args)
        return {
            "epoch": copy.epoch,
            "checksums": bytes(copy.checksums()),
            "chunk_epochs": bytes(copy.chunk_epochs()),
            "active": copy.active_chunks(),
        }

    # -- recovery --------------------------------------------------------------------------------

    def active(self, link: Link, args: dict[str, Any]) -> list[list[Any]]:
        """Chunks marked by the writer, those nobody in this process's life has marked, and unsettled ones."""
        volume = _client(link).volume
        writer = optional_field(args, "writer", str)
        marks = self._service.marks
        of_writer = marks.of_writer(volume, writer)
        of_all = of_writer if writer is None else marks.of_writer(volume, None)
        rows = []
        for served in self._service.drives:
            if served.drive is None:
                continue
            for copy in served.drive.slabs():
                if copy.volume == volume:
                    chunks = [
                        chunk
                        for chunk in _active_chunks(copy)
                        if (copy, chunk) in of_writer
                        or marks.is_unsettled((copy, chunk))
                        or ((copy, chunk) not in of_all and not marks.is_resting((copy, chunk)))
                    ]
                    if chunks:
                        rows.append([served.drive_id, copy.slab, chunks])
        return rows

    def _chunks(self, copy: SlabCopy, args: dict[str, Any]) -> list[int]:
        """Of a call about chunks at the installed epoch."""
        epoch = Epoch(field(args, "epoch", int))
        if epoch != copy.epoch:
            raise StaleEpoch(f"slab {copy.slab} is at epoch {copy.epoch}, not {epoch}")
        chunks = field(args, "chunks", list)
        if not all(isinstance(chunk, int) and 0 <= chunk < copy.block_count // BLOCKS_PER_CHUNK for chunk in chunks):
            raise BadRequest(f"chunks out of range for slab {copy.slab}")
        return chunks

    def stamp(self, link: Link, args: dict[str, Any]) -> None:
        _, copy = self._copy(link, args)
        copy.stamp_chunks(self._chunks(copy, args), copy.epoch)

    def equal(self, link: Link, args: dict[str, Any]) -> None:
        """The chunks are the same on all members: what fenced writers left there, nobody has to look for any more."""
        _, copy = self._copy(link, args)
        active = set(copy.active_chunks())
        chunks = [(copy, chunk) for chunk in self._chunks(copy, args) if chunk in active]
        self._service.marks.made_equal(chunks, self._service.is_over)

    def unequal(self, link: Link, args: dict[str, Any]) -> list[int]:
        """Active chunks that may have what other members lack: asked by pulls from here, at their end."""
        _, copy = self._copy(link, args)
        marks = self._service.marks
        marks.sweep()
        return [chunk for chunk in copy.active_chunks() if marks.is_incomplete((copy, chunk))]

    async def pull(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        self._check_term(link, args)
        served, copy = self._copy(link, args)
        volume = _client(link).volume
        source = Source.from_wire(field(args, "source", dict))
        chunks = optional_field(args, "chunks", list)
        speed = optional_field(args, "speed", int)
        pull = Pull(
            self._engine,
            copy,
            source,
            cluster=self._service.cluster,
            writer=f"server/{self._service.node}/{copy.slab}/{served.index}",
            epoch=Epoch(field(args, "epoch", int)),
            since=Epoch(field(args, "since", int)),
            chunks=chunks,
            marks=self._service.marks,
            # Named chunks are those a dead writer left unequal: other programs wait for them.
            pacer=self._pacer(served, speed) if chunks is None else None,
            even_if_lost=bool(optional_field(args, "even_if_lost", bool)),
            paths=self._paths,
        )
        key = (served.drive_id, volume, copy.slab)
        self.pulls[key] = pull
        try:
            await pull.run()
            await self._service.flushes.flush(served)
            marks = self._service.marks
            marks.forget_unsettled((copy, chunk) for chunk in pull.settled_chunks())
            copy.clear_active([chunk for chunk in pull.settled_chunks() if not marks.is_marked((copy, chunk))])
        finally:
            if served.drive is not None:
                served.drive.counters.pulled += pull.bytes_done
            if self.pulls.get(key) is pull:
                del self.pulls[key]
        return {"bytes": pull.bytes_done, "chunks": pull.chunk_count, "lost": sorted(pull.lost)}

    def _pacer(self, served: ServedDrive, speed: int | None) -> Pacer:
        pacer = self._pacers.setdefault(served.drive_id, Pacer())
        if speed is not None:
            if not 0 <= speed < len(SPEEDS):
                raise BadRequest(f"speed {speed} is none of 0 to {len(SPEEDS) - 1}")
            pacer.level = speed
        if not self._is_pacing:
            assert self._service.nursery is not None
            self._is_pacing = True
            self._service.foreground.load(trio.current_time(), pulling=False)  # what it was like before
            self._service.nursery.start_soon(self._pace_while_pulling)
        return pacer

    async def _pace_while_pulling(self) -> None:
        """Set the rates anew every INTERVAL_S, for as long as there are pulls."""
        foreground = self._service.foreground
        try:
            while True:
                due_s = trio.current_time() + INTERVAL_S
                await trio.sleep(INTERVAL_S)
                now_s = trio.current_time()
                foreground.note_lag(now_s - due_s)
                here = foreground.load(now_s, pulling=True)
                if not self.pulls:
                    return
                for drive_id, pacer in self._pacers.items():
                    sources = [p.source_load for (drive, _, _), p in self.pulls.items() if drive == drive_id]
                    pacer.adjust([here, *sources])
        finally:
            self._is_pacing = False

    def load(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        """How long foreground requests took here lately: asked by those who pull from here."""
        load = self._service.foreground.load(trio.current_time(), pulling=True)
        return {"latency_us": load.latency_us, "baseline_us": load.baseline_us}

    # -- scrub -----------------------------------------------------------------------------------

    async def scrub(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        """Verify a range of a copy that is in service: blocks `block` to `block + count - 1`."""
        served = self._drive(args)
        slab = SlabId(field(args, "slab", int))
        copy = self._service.drives.copy_in_service(served, _client(link).volume, slab)
        rate = rate_of(optional_field(args, "rate_mib_s", int))
        return (await scrub_blocks(copy, field(args, "block", int), field(args, "count", int), rate)).to_wire()

    def unwritten(self, link: Link, args: dict[str, Any]) -> int:
        """Of `ranges` [block, count] of a copy that is in service: how many blocks have no content."""
        served = self._drive(args)
        copy = self._service.drives.copy_in_service(served, _client(link).volume, SlabId(field(args, "slab", int)))
        rows = field(args, "ranges", list)
        if len(rows) > ITEMS_MAX or not all(isinstance(row, list) and len(row) == 2 for row in rows):
            raise BadRequest(f"ranges must be at most {ITEMS_MAX} lists of 2")
        if not all(isinstance(number, int) for row in rows for number in row):
            raise BadRequest("ranges are whole numbers")
        return sum(copy.unwritten(block, count) for block, count in rows)

    async def scrub_tables(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        """Superblocks and slot table of a drive: put right where they rotted."""
        served = self._drive(args)
        drive = served.opened()
        report = await trio.to_thread.run_sync(check_medium, drive)
        if report.bad_copies and not report.failure:
            await trio.to_thread.run_sync(drive.rewrite_superblocks)
            drive.counters.healed += len(report.bad_copies)
        for _ in range(2):  # entries that were changed just now come to rest: only such can be compared
            await self._service.flushes.flush(served)
        repaired = scrub_tables(served.opened())
        for _ in range(2 if repaired else 0):
            await self._service.flushes.flush(served)
        return {"repaired": repaired + len(report.bad_copies)}

    async def heal_from(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        """Rewrite `blocks` of an in-sync copy, as far as they do not verify, from another in-sync one."""
        self._check_term(link, args)
        served, copy = self._copy(link, args)
        healer = Healer(
            self._engine, self._service.cluster, f"healer/{self._service.node}/{copy.slab}/{served.index}", self._paths
        )
        source = Source.from_wire(field(args, "source", dict))
        epoch = Epoch(field(args, "epoch", int))
        if copy.epoch != epoch:
            raise StaleEpoch(f"slab {copy.slab} is at epoch {copy.epoch}, not {epoch}")
        return await healer.heal(copy, source, epoch, field(args, "blocks", list))

    # -- the rest --------------------------------------------------------------------------------

    def status(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        service = self._service
        rows = []
        for served in service.drives:
            state, fault = served.condition
            row: dict[str, Any] = {
                "id": served.drive_id, "path": served.path, "state": state, "fault": fault,
                "slow": served.slow, "latency": served.latency.to_map(trio.current_time()),
            }  # fmt: skip
            if served.drive is not None:
                drive = served.drive
                row.update(
                    slots=drive.slot_count,
                    free_slots=drive.free_slots,
                    slab_size=drive.superblock.slab_size,
                    counters=asdict(drive.counters),
                    failure=drive.failure,
                    repairs=drive.repairs,
                    quarantined=drive.quarantined,
                    stale=served.stale_count,
                )
            if served.failed_at is not None:
                ago_s = trio.current_time() - served.failed_at
                row.update(
                    failures=served.failures, last_failure=served.last_failure, last_fault=served.last_fault,
                    failed_ago_s=ago_s,
                )  # fmt: skip
            rows.append(row)
        pulls = [
            {
                "drive": drive, "volume": volume, "slab": slab,
                "rate_max": self._pacers[drive].rate if drive in self._pacers else None,
                "bytes_done": pull.bytes_done, "bytes_total": pull.bytes_total,
            }
            for (drive, volume, slab), pull in self.pulls.items()
        ]  # fmt: skip
        return {
            "node": NodeName(service.node),
            "drives": rows,
            "pulls": pulls,
            "refused": self._engine.refusals.counts,
            "passed_on": 0 if self._desk is None else self._desk.tunnels.count,
            "clients": sorted({client.writer for client in service.clients}),
        }
