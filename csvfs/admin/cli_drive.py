"""`csvfs drive`: the disks of the pool."""

import time

import click

from csvfs.admin import drive_life, drive_ops
from csvfs.admin.claim_watch import BY_ITSELF
from csvfs.admin.cli_claim import claim_command
from csvfs.admin.cli_context import Here, is_interrupt, json_option, run_here, run_with_peers, yes_option
from csvfs.admin.cluster_view import USAGE_AUTO, Record, read_cluster_view
from csvfs.admin.drive_locate import DriveLocation, blink, locate_drive
from csvfs.admin.drive_names import find_drive
from csvfs.admin.peers import Peers
from csvfs.admin.render import format_duration, note, print_json, print_table, progress, size_or_unknown
from csvfs.admin.status import DriveStatus, collect_status
from csvfs.block.device_facts import KINDS
from csvfs.errors import BadRequest
from csvfs.units import format_size

CLAIMED_LATELY_S = 86_400.0  # for so long a drive list says that a drive was claimed by itself


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
        ("DRIVE", "NODE", "PATH", "KIND", ">SIZE", ">USED", ">SLOTS", ">FULL", "STATE"),
        [drive_row(drive) for drive in drives],
        empty="no drives yet: csvfs drive add PATH... on each node",
    )
    for drive in drives:
        for text in remarks(drive, time.time()):
            note(f"{drive.id[:8]} on {drive.node}: {text}")


def drive_row(drive: DriveStatus) -> tuple[str | None, ...]:
    used = drive.used_slots is not None
    return (
        drive.id[:8],
        drive.node,
        drive.path,
        drive.kind or None,
        format_size(drive.size),
        size_or_unknown(drive.used),
        f"{drive.used_slots}/{drive.slots}" if used else None,
        f"{drive.percent_used:.0f} %" if drive.percent_used is not None else None,
        drive.state,
    )


def remarks(drive: DriveStatus, now_s: float) -> list[str]:
    """What is said of a drive beside the table: why it is as it is, and what to do. `now_s`: seconds since 1970."""
    found = []
    if drive.reason or drive.next_step:
        found.append("; ".join(text for text in (drive.reason or drive.state, drive.next_step) if text))
    if drive.hot_points:
        found.append(f"{drive.hot_points:.0f} points fuller than the pool; csvfs pool optimize levels the drives")
    bad, healed = drive.counters.get("checksum_errors"), drive.counters.get("healed")
    if bad or healed:
        found.append(f"{bad or 0} bad blocks, {healed or 0} healed since it was opened")
    if drive.added_by == BY_ITSELF and now_s - drive.added < CLAIMED_LATELY_S:
        found.append(f"claimed by itself {format_duration(max(0.0, now_s - drive.added))} ago")
    return found


@drive_group.command("locate")
@click.argument("drive", metavar="DRIVE")
@click.option(
    "--blink", "blink_s", type=click.FloatRange(0, 3600), default=0, help="Seconds; on its own node."
)
@json_option
def locate_command(drive: str, blink_s: float, as_json: bool) -> None:
    """Say where a drive is: node, path, device, serial number. DRIVE is the beginning of its id, or its path."""

    async def work(here: Here) -> DriveLocation:
        node = here.config.node
        return locate_drive(find_drive(await read_cluster_view(here.store), drive, node), node)

    found = run_here(work)
    if blink_s and not found.here:
        raise BadRequest(f"drive {found.id[:8]} is on node {found.node}: run this there to make it blink")
    if as_json:
        print_json(found)
    else:
        rows = {"drive": found.id, "node": found.node, "path": found.path, "kind": found.kind or "not known"}
        if found.here:
            rows |= {"device": found.device, "model": found.model, "serial": found.serial}
        for title, value in rows.items():
            click.echo(f"{title + ':':9}{value or 'none'}")
        for link in found.links:
            click.echo(f"{'link:':9}{link}")
        if not found.here:
            note(f"its device is known on node {found.node}: run this there")
    if blink_s:
        with progress(f"blinking {found.path}"):
            blink(found.path, blink_s)


@drive_group.command("add")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--kind", type=click.Choice(KINDS), default=None, help="What they are; by default detected.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, write nothing.")
@json_option
def add_command(paths: tuple[str, ...], kind: str | None, dry_run: bool, as_json: bool) -> None:
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
        return await drive_ops.check_candidates(here.store, paths, kind)

    async def add(here: Here) -> None:
        await drive_ops.add_drives(here.store, here.config.node, paths, announce, kind)

    if dry_run:
        candidates = run_here(check)
        if as_json:
            print_json(candidates)
            return
        for candidate in candidates:
            kind_text = candidate.kind or "of unknown kind"
            click.echo(
                f"would add {candidate.path}: {candidate.backing}, {kind_text}, {format_size(candidate.size)}"
            )
        return
    run_here(add)
    if as_json:
        print_json([{"id": drive.name, **drive.value} for drive in added])


drive_group.add_command(claim_command)


@drive_group.command("retire")
@click.argument("drive", metavar="ID|PATH")
@click.option("--undo", is_flag=True, help="Use it again, with what is still on it.")
@json_option
def retire_command(drive: str, undo: bool, as_json: bool) -> None:
    """Put nothing more on a drive and move its slabs elsewhere. It stays in the pool."""

    async def work(here: Here) -> Record:
        view = await read_cluster_view(here.store)
        found = find_drive(view, drive, here.config.node)
        usage = USAGE_AUTO if undo else drive_life.RETIRED
        return await drive_life.set_usage(here.store, found, usage)

    changed = run_here(work)
    if as_json:
        print_json({"id": changed.name, **changed.value})
    elif undo:
        click.echo(f"drive {changed.name[:8]} is used again")
    else:
        click.echo(f"drive {changed.name[:8]} is retired and being emptied: csvfs job watch")


@drive_group.command("remove")
@click.argument("drive", metavar="ID|PATH")
@yes_option
@click.option("--no-wait", is_flag=True, help="Only begin to empty it.")
def remove_command(drive: str, yes: bool, no_wait: bool) -> None:
    """Move all slabs off a drive, then take it out of the pool.

    Refused when the other drives cannot hold them. It says what it waits for. Interrupted (or with --no-wait), the drive
    goes on being emptied: csvfs job list. Run it again to finish, or csvfs drive retire --undo to keep the drive.
    """

    async def check(here: Here, peers: Peers) -> tuple[Record, drive_life.Needs]:
        view = await read_cluster_view(here.store)
        found = find_drive(view, drive, here.config.node)
        needs = await drive_life.needs_of(view, peers, found)
        await drive_life.check_room(view, peers, found, needs)
        return found, needs

    found, needs = run_with_peers(check)
    name = f"drive {found.name[:8]} ({found.text('path')} on {found.text('node')})"
    if not yes:
        click.confirm(f"move {needs.count} slabs off {name} and take it out of the pool?", abort=True)
    if no_wait:
        run_here(lambda here: drive_life.set_usage(here.store, found, drive_life.REMOVING))
        click.echo(f"{name} is being emptied: csvfs job list. Run csvfs drive remove again to take it out")
        return
    said = ""

    def left(needs: drive_life.Needs) -> None:
        nonlocal said
        text = drive_life.left_text(found, needs)
        if text != said:
            said = text
            note(text)

    async def work(here: Here, peers: Peers) -> None:
        with progress(f"emptying {name}"):
            emptied = await drive_life.evacuate(here.store, peers, found, left)
            await drive_life.take_out(here.store, peers, emptied)

    try:
        run_with_peers(work)
    except BaseException as error:
        if not is_interrupt(error):
            raise
        note(
            f"{name} goes on being emptied: csvfs job list. To finish: csvfs drive remove {found.name[:8]}; to keep it: "
            f"csvfs drive retire --undo {found.name[:8]}"
        )
        raise click.Abort from None
    click.echo(f"{name} is out of the pool")


@drive_group.command("maintenance")
@click.argument("switch", type=click.Choice(("on", "off")))
@click.argument("drive", metavar="ID|PATH")
@json_option
def maintenance_command(switch: str, drive: str, as_json: bool) -> None:
    """Say that somebody is at a drive, or is done. Meanwhile it takes no new slabs, keeps what it has, and is not
    rebuilt elsewhere however long it is away."""

    async def work(here: Here) -> Record:
        found = find_drive(await read_cluster_view(here.store), drive, here.config.node)
        return await drive_life.set_maintenance(here.store, found, switch == "on")

    changed = run_here(work)
    if as_json:
        print_json({"id": changed.name, **changed.value})
    elif switch == "on":
        click.echo(f"drive {changed.name[:8]} is in maintenance; when done: csvfs drive maintenance off {drive}")
    else:
        click.echo(f"drive {changed.name[:8]} is used again")


@drive_group.command("set")
@click.argument("drive", metavar="ID|PATH")
@click.option(
    "--kind", type=click.Choice((*KINDS, "detected")), required=True, help="What it is, whatever the machine says."
)
@json_option
def set_command(drive: str, kind: str, as_json: bool) -> None:
    """Declare the kind of a drive; `detected`: as the machine says (on the drive's own node)."""

    async def work(here: Here) -> Record:
        found = find_drive(await read_cluster_view(here.store), drive, here.config.node)
        return await drive_life.set_kind(here.store, here.config.node, found, None if kind == "detected" else kind)

    changed = run_here(work)
    if as_json:
        print_json({"id": changed.name, **changed.value})
    else:
        click.echo(f"drive {changed.name[:8]} is of kind {changed.text('kind') or 'not known'}")


@drive_group.command("reset")
@click.argument("drive", metavar="ID|PATH")
@json_option
def reset_command(drive: str, as_json: bool) -> None:
    """Wipe a drive of this node that no slab needs any more, and let it join as a new one."""

    async def work(here: Here, peers: Peers) -> Record:
        view = await read_cluster_view(here.store)
        found = find_drive(view, drive, here.config.node)
        return await drive_life.reset_drive(here.store, peers, here.config.node, found)

    joined = run_with_peers(work)
    if as_json:
        print_json({"id": joined.name, **joined.value})
    else:
        click.echo(f"{joined.text('path')} was wiped and joins as drive {joined.name[:8]}")
