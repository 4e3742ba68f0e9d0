"""`csvfs volume`: what virtual machines live on."""

import time
from typing import Any

import click

from csvfs.admin import domain_ops, volume_ops
from csvfs.admin.cli_context import SIZE, Here, json_option, run_with_peers, yes_option
from csvfs.admin.cli_status import job_line, job_map, resiliency_text, volume_row
from csvfs.admin.cluster_view import ALIVE, read_cluster_view
from csvfs.admin.domain_ops import Change, Effect
from csvfs.admin.io_modes import modes_text
from csvfs.admin.lost_ranges import LostReport, accept_loss, lost_report
from csvfs.admin.peers import Peers
from csvfs.admin.remount import Remounted, remount
from csvfs.admin.render import print_json, print_table, progress, size_or_unknown
from csvfs.admin.status import ClusterStatus, JobStatus, VolumeStatus, collect_status, job_statuses
from csvfs.errors import Unavailable
from csvfs.fault_domains import LEVEL_DEFAULT, LEVELS, Level
from csvfs.units import format_size

ONLINE_TIMEOUT_S = 60.0
MOUNT_TIMEOUT_S = 30.0
MOVE_TIMEOUT_S = 60.0
REMOUNT_TIMEOUT_S = 30.0
DELETE_TIMEOUT_S = 120.0


@click.group("volume")
def volume_group() -> None:
    """Volumes: created on any node, they appear on all, under /clusterstorage."""


@volume_group.command("create")
@click.argument("name")
@click.option(
    "--resiliency",
    type=click.Choice(["simple", "mirror"]),
    default="mirror",
    show_default=True,
    help="How it is kept.",
)
@click.option(
    "--copies",
    type=int,
    default=None,
    help="Copies of a mirror, each in a fault domain of its own: 2 or 3 (default).",
)
@click.option(
    "--fault-domain",
    type=click.Choice(LEVELS),
    default=LEVEL_DEFAULT,
    show_default=True,
    help="No two copies in one node, chassis, rack or site (csvfs domain list).",
)
@click.option(
    "--size", type=SIZE, default=0, show_default="as large as the pool", help="At least 64M, like 500G."
)
@click.option(
    "--min-copies",
    type=click.IntRange(1, volume_ops.COPIES_MAX),
    default=1,
    show_default=True,
    help="Writes wait while fewer copies are in sync, and fail after the io_timeout.",
)
@click.option("--timeout", "timeout_s", type=click.FloatRange(1, 3600), default=ONLINE_TIMEOUT_S, hidden=True)
@json_option
def create_command(
    name: str,
    resiliency: str,
    copies: int | None,
    size: int,
    min_copies: int,
    fault_domain: Level,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Create volume NAME and wait until it is mounted on this node."""

    async def work(here: Here, peers: Peers) -> str:
        volume = await volume_ops.create_volume(
            here.store, name, resiliency=resiliency, copies=copies, size=size, min_copies=min_copies,
            fault_domain=fault_domain,
        )  # fmt: skip
        path = here.config.cluster_root / name
        with progress(f"creating volume {name}"):
            await volume_ops.wait_volume_online(here.store, name, timeout_s)
            if await here.store.get(ALIVE + here.config.node) is not None:
                await volume_ops.wait_mounted(path, min(timeout_s, MOUNT_TIMEOUT_S))
        if as_json:
            print_json({**volume.value, "state": "online", "path": str(path)})
        else:
            words = resiliency_text(resiliency, volume.number("copies"))
            click.echo(f"volume {name} ({words}) is online at {path}")
        return str(path)

    run_with_peers(work)


@volume_group.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List all volumes with their coordinators, health and space."""
    volumes = _status().volumes
    if as_json:
        print_json(volumes)
        return
    print_table(
        ("VOLUME", "RESILIENCY", "STATE", "HEALTH", "COORDINATOR", ">SIZE", ">FREE"),
        [volume_row(volume) for volume in volumes],
        empty="no volumes yet: csvfs volume create NAME",
    )


@volume_group.command("resize")
@click.argument("name")
@click.option("--size", type=SIZE, required=True, help="At least 64M, like 500G; 0: as large as the pool.")
@json_option
def resize_command(name: str, size: int, as_json: bool) -> None:
    """Make volume NAME larger or smaller while it is in use.

    A size is a bound, no space is taken for it: it may be larger than the pool. One below what files use is refused.
    """
    answer = _set(name, size=size)
    if as_json:
        print_json(answer)
    else:
        words = format_size(answer["size"]) if answer["size"] else "as large as the pool"
        click.echo(f"volume {name} is {words} now, {format_size(answer['used'])} are used")


@volume_group.command("set")
@click.argument("name")
@click.option(
    "--copies",
    type=click.IntRange(1, volume_ops.COPIES_MAX),
    default=None,
    help="Copies of everything, 2 or 3; a simple volume becomes a mirror.",
)
@click.option(
    "--min-copies",
    type=click.IntRange(1, volume_ops.COPIES_MAX),
    default=None,
    help="Writes wait while fewer copies are in sync, and fail after the io_timeout.",
)
@click.option(
    "--fault-domain", type=click.Choice(LEVELS), default=None, help="No two copies in one; given alone."
)
@click.option("--force", is_flag=True, help="With --fault-domain: also where there are too few, or too little room.")
@click.option(
    "--preferred", metavar="NODE|none", default=None,
    help="Coordinated there whenever the node is up; none: anywhere, spread evenly. Given alone.",
)  # fmt: skip
@json_option
def set_command(
    name: str, copies: int | None, min_copies: int | None, fault_domain: Level | None, force: bool,
    preferred: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Change volume NAME while it is in use.

    With --copies new data has so many copies at once; what is there already follows as a storage job
    (csvfs job list, watch, pause): copies are made before any is given up. Likewise with --fault-domain: copies
    that then share one are moved apart.
    """
    if preferred is not None:
        if (copies, min_copies, fault_domain, force) != (None, None, None, False):
            raise click.UsageError("give --preferred alone: it is another step than the others")
        _set_preferred(name, None if preferred == "none" else preferred, as_json)
        return
    if fault_domain is not None:
        if copies is not None or min_copies is not None:
            raise click.UsageError("give --fault-domain alone: it is another step than --copies and --min-copies")
        _set_fault_domain(name, fault_domain, force, as_json)
        return
    if force:
        raise click.UsageError("--force goes with --fault-domain only")
    wanted = {"copies": copies, "min_copies": min_copies}
    given = {what: number for what, number in wanted.items() if number is not None}
    if not given:
        raise click.UsageError("say what to change: --copies, --min-copies, --fault-domain, --preferred; its size: csvfs volume resize")
    answer = _set(name, **given)
    if as_json:
        print_json(answer)
        return
    parts = [f"{answer['copies']} copies, writes want {answer['min_copies']} in sync"]
    for what, verb in (("to_copy", "to be copied"), ("to_drop", "to be given back")):
        if answer[what]:
            parts.append(f"{format_size(answer[what])} {verb}: csvfs job watch --volume {name}")
    click.echo(f"volume {name}: {'; '.join(parts)}")


def _set_preferred(name: str, node: str | None, as_json: bool) -> None:
    run_with_peers(lambda here, peers: volume_ops.set_preferred(here.store, name, node))
    if as_json:
        print_json({"name": name, "preferred": node})
    elif node is None:
        click.echo(f"volume {name} is coordinated by any node, spread evenly")
    else:
        click.echo(f"volume {name} is coordinated by {node} whenever it is up")


def _set_fault_domain(name: str, level: Level, force: bool, as_json: bool) -> None:
    async def work(here: Here, peers: Peers) -> list[Effect]:
        return await domain_ops.apply(here.store, peers, Change({}, {name: level}), force=force)

    found = run_with_peers(work)
    if as_json:
        print_json({"volume": name, "fault_domain": level, "effects": found})
        return
    click.echo(f"volume {name}: no two copies in one {level}")
    for effect in found:
        click.echo(effect.text)


def _set(name: str, **wanted: int) -> dict[str, Any]:
    async def work(here: Here, peers: Peers) -> dict[str, Any]:
        return await volume_ops.set_volume(here.store, peers, name, **wanted)

    return run_with_peers(work)


@volume_group.command("repair")
@click.argument("name")
@click.option(
    "--accept-data-loss", is_flag=True, help="Go on with stale copies, or zeros, where all is lost."
)
@yes_option
@json_option
def repair_command(name: str, accept_data_loss: bool, yes: bool, as_json: bool) -> None:
    """Look for what there is to repair of volume NAME now, and say how far it is. Repairs begin by themselves, too.

    With --accept-data-loss, for slabs of which no in-sync copy can be reached (csvfs volume status NAME --lost): the
    newest stale copy goes on, or zeros where there is none. It is written down in the cluster store for ever. There is
    no way back: first try to bring back a drive.
    """
    if accept_data_loss:
        _accept_data_loss(name, yes, as_json)
        return
    answer = run_with_peers(lambda here, peers: volume_ops.repair_now(here.store, peers, name))
    jobs = job_statuses(name, answer)
    if as_json:
        print_json({"health": answer.get("health"), "jobs": [job_map(job) for job in jobs]})
        return
    for job in jobs:
        click.echo(job_line(job))
    if not jobs:
        click.echo(f"volume {name} is {answer.get('health')}: nothing is to be repaired")


def _accept_data_loss(name: str, yes: bool, as_json: bool) -> None:
    async def look(here: Here, peers: Peers) -> LostReport:
        return await lost_report(here.store, peers, name)

    async def accept(here: Here, peers: Peers) -> list[dict[str, Any]]:
        return await accept_loss(here.store, peers, name)

    report = run_with_peers(look)
    if not report.slabs:
        click.echo(f"nothing of volume {name} is lost")
        return
    if not yes:
        print_lost(name, report)
        click.confirm("Give up what was in these slabs, for ever?", abort=True, err=True)
    rows = run_with_peers(accept)
    if as_json:
        print_json(rows)
    for row in rows if not as_json else ():
        click.echo(f"slab {row['slab']}: {row.get('error') or row['took']}")
    if any(row.get("error") for row in rows):
        raise Unavailable("not everything could be done: try again")


def print_lost(name: str, report: LostReport) -> None:
    if not report.slabs and not report.blocks:
        click.echo(f"nothing of volume {name} is lost")
        return
    if report.blocks:
        click.echo(f"{report.blocks} blocks are bad on all their copies; one that is overwritten as a whole is good again")
    for slab in report.slabs:
        stale = f"; stale copies: {slab.stale}" if slab.stale else "; no other copy"
        click.echo(f"slab {slab.slab}: {', '.join(slab.why)}{stale}")
    if not report.files:
        click.echo("no file has anything there")
    for file in report.files:
        ranges = ", ".join(f"{start} to {start + size - 1}" for start, size in file.ranges)
        click.echo(f"{file.path}: bytes {ranges}")
    if report.file_count > len(report.files):
        click.echo(f"and {report.file_count - len(report.files)} more files")


@volume_group.command("status")
@click.argument("name")
@click.option("--lost", is_flag=True, help="List what no in-sync copy has, and the files that it belongs to.")
@json_option
def status_command(name: str, lost: bool, as_json: bool) -> None:
    """Show one volume: health, space, and what is being repaired."""

    async def look(here: Here, peers: Peers) -> LostReport:
        return await lost_report(here.store, peers, name)

    if lost:
        report = run_with_peers(look)
        print_json(report) if as_json else print_lost(name, report)
        return

    async def work(here: Here, peers: Peers) -> ClusterStatus:
        (await read_cluster_view(here.store)).volume(name)
        return await collect_status(here.store, peers)

    status = run_with_peers(work)
    volume = next((volume for volume in status.volumes if volume.name == name), None)
    if volume is None:
        raise click.ClickException(f"volume {name} was deleted just now")
    jobs = [job for job in status.jobs if job.volume == name]
    if as_json:
        print_json({"volume": volume, "jobs": jobs})
    else:
        _print_volume(volume, jobs)


def _print_volume(volume: VolumeStatus, jobs: list[JobStatus]) -> None:
    lines = {
        "volume": volume.name,
        "resiliency": resiliency_text(volume.resiliency, volume.copies),
        "domains": f"no two copies in one {volume.fault_domain}",
        "state": volume.state,
        "health": volume.health,
        "coordinator": coordinator_text(volume),
        "size": size_text(volume),
        "free": size_or_unknown(volume.free),
        "copies": copies_text(volume),
    }
    if volume.slabs:
        lines["slabs"] = ", ".join(f"{count} {state}" for state, count in volume.slabs.items())
    if volume.io:
        lines["I/O"] = modes_text(volume.io)
    used = ", ".join(f"{count} on {node}" for node, count in sorted(volume.open_files.items()) if count)
    lines["open files"] = used or "none"
    if volume.scrub.get("finished"):
        lines["scrubbed"] = scrub_text(volume.scrub)
    if volume.scrub.get("lost_blocks"):
        lines["lost"] = f"{volume.scrub['lost_blocks']} blocks are bad on all copies; csvfs volume status {volume.name} --lost"
    if volume.note:
        lines["note"] = volume.note
    for title, value in lines.items():
        click.echo(f"{title + ':':13}{value}")
    for job in jobs:
        click.echo(f"{'repairing:':13}{job_line(job).partition(': ')[2]}")


def coordinator_text(volume: VolumeStatus) -> str:
    """Which node, and which one is preferred, if another."""
    text = volume.coordinator or "none at the moment"
    return f"{text} (preferred: {volume.preferred})" if volume.preferred not in ("", volume.coordinator) else text


def size_text(volume: VolumeStatus) -> str:
    """What files may have, and the bound that was set, where the pool cannot give all of it."""
    text = size_or_unknown(volume.size)
    if volume.size_limit and volume.size_limit != volume.size:
        return f"{text} of {format_size(volume.size_limit)}"
    return text if volume.size_limit else f"{text}, as large as the pool"


def copies_text(volume: VolumeStatus) -> str:
    """How many copies are wanted, and how many slabs have how many."""
    text = f"{volume.copies} wanted"
    if volume.min_copies > 1:
        text += f", writes wait below {volume.min_copies}"
    has = ", ".join(f"{slabs} slabs have {copies}" for copies, slabs in sorted(volume.slabs_by_copies.items()))
    return f"{text}; in sync: {has}" if has else text


def scrub_text(scrub: dict[str, Any]) -> str:
    """Of the last round that went through, in words."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(int(scrub["finished"]) // 10**9))
    if scrub.get("under_way"):
        return f"{when}, and being scrubbed now"
    lost = f", {scrub['lost']} LOST: no copy has them" if scrub.get("lost") else ""
    return f"{when}: {scrub.get('found', 0)} errors found, {scrub.get('healed', 0)} healed{lost}"


def _status() -> ClusterStatus:
    async def work(here: Here, peers: Peers) -> ClusterStatus:
        return await collect_status(here.store, peers)

    return run_with_peers(work)


@volume_group.command("scrub")
@click.argument("name")
@json_option
def scrub_command(name: str, as_json: bool) -> None:
    """Verify every copy of volume NAME now, and heal what has rotted. It happens every four weeks anyway.

    Returns at once; csvfs volume status NAME shows how far it is and what it has found.
    """

    async def work(here: Here, peers: Peers) -> dict[str, Any]:
        view = await read_cluster_view(here.store)
        view.volume(name)
        return dict(await peers.coordinator(view, name, "scrub"))

    answer = run_with_peers(work)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"volume {name} is being scrubbed: see csvfs volume status {name}")


@volume_group.command("move")
@click.argument("name")
@click.argument("node")
@json_option
def move_command(name: str, node: str, as_json: bool) -> None:
    """Let NODE coordinate volume NAME, from now on. Programs notice a pause of a second at most.

    NODE stays preferred until csvfs volume set NAME --preferred none.
    """

    async def work(here: Here, peers: Peers) -> None:
        view = await read_cluster_view(here.store)
        await volume_ops.prefer_node(here.store, view, name, node)
        with progress(f"moving volume {name} to {node}"):
            await volume_ops.wait_owner(here.store, name, node, MOVE_TIMEOUT_S)

    run_with_peers(work)
    if as_json:
        print_json({"name": name, "coordinator": node})
    else:
        click.echo(f"volume {name} is coordinated by {node}")


@volume_group.command("remount")
@click.argument("name")
@json_option
def remount_command(name: str, as_json: bool) -> None:
    """Replace the process that serves volume NAME on this node. Programs notice a pause of a second at most.

    It is what brings a new version of csvfs to a mount that is in use.
    """

    async def work(here: Here, peers: Peers) -> Remounted:
        return await remount(here.config, peers, name, REMOUNT_TIMEOUT_S)

    done = run_with_peers(work)
    if as_json:
        print_json({"name": name, "incarnation": done.incarnation, "pause_ms": round(done.pause_s * 1000)})
    else:
        click.echo(f"volume {name} is served by a new process after {done.pause_s * 1000:.0f} ms")


@volume_group.command("delete")
@click.argument("name")
@yes_option
@click.option("--force", is_flag=True, help="Also while programs have files of it open: they get errors.")
@json_option
def delete_command(name: str, yes: bool, force: bool, as_json: bool) -> None:
    """Delete volume NAME on all nodes. One that is not empty is refused without --yes, one in use without --force."""

    async def work(here: Here, peers: Peers) -> None:
        view = await read_cluster_view(here.store)
        volume = view.volume(name)
        being_deleted = volume.text("state") == volume_ops.VOLUME_DELETING
        if not yes and not being_deleted:
            await volume_ops.require_empty(view, peers, name)
        if not force and not being_deleted:
            await volume_ops.require_unused(view, peers, name)
        await volume_ops.mark_deleting(here.store, name, volume.id())
        with progress(f"deleting volume {name}"):
            await volume_ops.wait_volume_gone(here.store, name, DELETE_TIMEOUT_S)

    run_with_peers(work)
    if as_json:
        print_json({"name": name, "state": "deleted"})
    else:
        click.echo(f"volume {name} is deleted")
