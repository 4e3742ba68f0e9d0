"""The calls a drive server answers (PROTOCOL.md, "Calls to a drive server").

Place      block floor, between drive_server.py (the process) and block_service.py (the state).
"""

from dataclasses import asdict
from typing import Any

from csvfs.block.block_service import BlockService, Client
from csvfs.block.pull import Pull, Source
from csvfs.block.served_drives import ServedDrive
from csvfs.block.slab_copy import SlabCopy
from csvfs.block.slot_tables import pack_slot_header
from csvfs.errors import BadRequest, CsvfsError, StaleEpoch
from csvfs.ids import DriveId, Epoch, Incarnation, NodeName, SlabId, Term, VolumeId
from csvfs.net.calls import CallTable, field, optional_field
from csvfs.net.engine import Engine
from csvfs.net.link import Link
from csvfs.wire.block_messages import ROLE_IN_SYNC, ROLE_JOINING

NO_VOLUME = VolumeId(b"")
ITEMS_MAX = 65_536


def _client(link: Link) -> Client:
    if link.owner is None:
        raise BadRequest("say hello first")
    client: Client = link.owner
    return client


class DriveCalls:
    """Handlers by name. All but install and pull are answered at once."""

    def __init__(self, service: BlockService, engine: Engine) -> None:
        self._service = service
        self._engine = engine
        self.pulls: dict[tuple[DriveId, VolumeId, SlabId], Pull] = {}
        service.calls = CallTable(
            {
                "hello": self.hello,
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
                "pull": self.pull,
                "list_slabs": self.list_slabs,
                "status": self.status,
                "locate": self.locate,
                "read_table": self.read_table,
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
        rows = [
            {"id": served.drive_id, "index": served.index, "path": served.path, "state": served.state}
            for served in service.drives
        ]
        return {"node": service.node, "incarnation": service.incarnation, "drives": rows}

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

    def create_slab(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        term = self._check_term(link, args)
        served = self._drive(args)
        slab, epoch = SlabId(field(args, "slab", int)), Epoch(field(args, "epoch", int))
        role = optional_field(args, "role", int) or ROLE_IN_SYNC
        volume = _client(link).volume
        drive = served.opened()
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
        alone = set(optional_field(args, "alone", list) or ())
        refused = []
        for number, row in enumerate(self._rows(args, 4)):
            drive_id, slab, epoch, role = row
            try:
                served = self._service.drives.by_id(DriveId(drive_id))
                if role not in (ROLE_IN_SYNC, ROLE_JOINING) or not isinstance(epoch, int):
                    raise BadRequest(f"role {role!r} at epoch {epoch!r} cannot be installed")
                await self._service.install(
                    served, volume, SlabId(slab), Epoch(epoch), role, term, alone=number in alone
                )
            except CsvfsError as error:
                refused.append([drive_id, slab, str(error)])
        return {"refused": refused}

    def _rows(self, args: dict[str, Any], width: int) -> list[list[Any]]:
        rows = field(args, "items", list)
        if len(rows) > ITEMS_MAX or not all(isinstance(row, list) and len(row) == width for row in rows):
            raise BadRequest(f"items must be at most {ITEMS_MAX} lists of {width}")
        return rows

    def trim(self, link: Link, args: dict[str, Any]) -> None:
        client = _client(link)
        for index, slab, epoch, block, count in self._rows(args, 5):
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
        ]

    def locate(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        served = self._drive(args)
        slab = SlabId(field(args, "slab", int))
        copy = self._service.drives.copy_in_service(served, _client(link).volume, slab)
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
        """Chunks marked by the writer, and those nobody in this process's life has marked."""
        volume = _client(link).volume
        writer = optional_field(args, "writer", str)
        of_writer = self._service.marks.of_writer(volume, writer)
        of_all = of_writer if writer is None else self._service.marks.of_writer(volume, None)
        rows = []
        for served in self._service.drives:
            if served.drive is None:
                continue
            for copy in served.drive.slabs():
                if copy.volume == volume:
                    chunks = [
                        chunk
                        for chunk in copy.active_chunks()
                        if (copy, chunk) in of_writer or (copy, chunk) not in of_all
                    ]
                    if chunks:
                        rows.append([served.drive_id, copy.slab, chunks])
        return rows

    def stamp(self, link: Link, args: dict[str, Any]) -> None:
        _, copy = self._copy(link, args)
        epoch = Epoch(field(args, "epoch", int))
        if epoch != copy.epoch:
            raise StaleEpoch(f"slab {copy.slab} is at epoch {copy.epoch}, not {epoch}")
        copy.stamp_chunks(field(args, "chunks", list), epoch)

    async def pull(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        self._check_term(link, args)
        served, copy = self._copy(link, args)
        volume = _client(link).volume
        source = Source.from_wire(field(args, "source", dict))
        pull = Pull(
            self._engine,
            copy,
            source,
            cluster=self._service.cluster,
            writer=f"server/{self._service.node}/{copy.slab}/{served.index}",
            epoch=Epoch(field(args, "epoch", int)),
            since=Epoch(field(args, "since", int)),
            chunks=optional_field(args, "chunks", list),
        )
        key = (served.drive_id, volume, copy.slab)
        self.pulls[key] = pull
        try:
            await pull.run()
            await self._service.flush(served)
            marked = self._service.marks.of_writer(volume, None)
            copy.clear_active([chunk for chunk in pull.settled_chunks() if (copy, chunk) not in marked])
        finally:
            if self.pulls.get(key) is pull:
                del self.pulls[key]
        return {"bytes": pull.bytes_done, "chunks": pull.chunk_count}

    # -- the rest --------------------------------------------------------------------------------

    def status(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        service = self._service
        rows = []
        for served in service.drives:
            row: dict[str, Any] = {"id": served.drive_id, "path": served.path, "state": served.state}
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
                )
            rows.append(row)
        pulls = [
            {"drive": drive, "volume": volume, "slab": slab, "bytes_done": pull.bytes_done, "bytes_total": pull.bytes_total}
            for (drive, volume, slab), pull in self.pulls.items()
        ]  # fmt: skip
        return {
            "node": NodeName(service.node),
            "drives": rows,
            "pulls": pulls,
            "refused": service.refused,
            "clients": sorted({client.writer for client in service.clients}),
        }
