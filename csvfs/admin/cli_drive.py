"""`csvfs drive`: the disks of the pool."""

import click

from csvfs.admin import drive_ops
from csvfs.admin.cli_context import Here, json_option, run_here, run_with_peers
from csvfs.admin.cluster_view import Record
from csvfs.admin.peers import Peers
from csvfs.admin.render import print_json, print_table, size_or_unknown
from csvfs.admin.status import DriveStatus, collect_status
from csvfs.units import format_size


@click.group("drive")
def drive_group() -> None:
    """The disks of the pool."""


@drive_group.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List all drives of the cluster."""

    async def work(here: Here, peers: Peers) -> list[DriveStatus]:
        return (await collect_status(here.store, peers, ask_coordinators=False)).drives

    drives = run_with_peers(work)
    if as_json:
        print_json(drives)
        return
    print_table(
        ("DRIVE", "NODE", "PATH", "STATE", ">SIZE", ">FREE", ">BAD BLOCKS", ">HEALED"),
        [
            (
                drive.id[:8],
                drive.node,
                drive.path,
                drive.state,
                format_size(drive.size),
                size_or_unknown(drive.free),
                drive.counters.get("checksum_errors"),
                drive.counters.get("healed"),
            )
            for drive in drives
        ],
        empty="no drives yet: csvfs drive add PATH... on each node",
    )


@drive_group.command("add")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Say what would be done, write nothing.")
@json_option
def add_command(paths: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Format blank disks or files of this node and add them to the pool.

    A path that is not blank (partitions, a file system, RAID, in use, too small) is refused with its reason,
    and then nothing at all is written.
    """
    added: list[Record] = []

    def announce(drive: Record) -> None:
        added.append(drive)
        if not as_json:
            size = format_size(drive.number("size"))
            click.echo(f"drive {drive.name[:8]} added: {drive.text('path')}, {size}")

    async def check(here: Here) -> list[drive_ops.DriveCandidate]:
        return await drive_ops.check_candidates(here.store, paths)

    async def add(here: Here) -> None:
        await drive_ops.add_drives(here.store, here.config.node, paths, announce)

    if dry_run:
        candidates = run_here(check)
        if as_json:
            print_json(candidates)
            return
        for candidate in candidates:
            click.echo(f"would add {candidate.path}: {candidate.kind}, {format_size(candidate.size)}")
        return
    run_here(add)
    if as_json:
        print_json([{"id": drive.name, **drive.value} for drive in added])
