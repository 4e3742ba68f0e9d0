"""`csvfs volume`: what virtual machines live on."""

import time
from typing import Any

import click

from csvfs.admin import volume_ops
from csvfs.admin.cli_context import SIZE, Here, json_option, run_with_peers, yes_option
from csvfs.admin.cli_status import job_line, resiliency_text, volume_row
from csvfs.admin.cluster_view import ALIVE, read_cluster_view
from csvfs.admin.peers import Peers
from csvfs.admin.render import print_json, print_table, progress, size_or_unknown
from csvfs.admin.status import ClusterStatus, JobStatus, VolumeStatus, collect_status

ONLINE_TIMEOUT_S = 60.0
MOUNT_TIMEOUT_S = 30.0
MOVE_TIMEOUT_S = 60.0
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
    help="Copies of a mirror, each on a node of its own: 2 or 3 (default).",
)
@click.option(
    "--size", type=SIZE, default=0, show_default="as large as the pool", help="At least 64M, like 500G."
)
@click.option("--timeout", "timeout_s", type=click.FloatRange(1, 3600), default=ONLINE_TIMEOUT_S, hidden=True)
@json_option
def create_command(
    name: str, resiliency: str, copies: int | None, size: int, timeout_s: float, as_json: bool
) -> None:
    """Create volume NAME and wait until it is mounted on this node."""

    async def work(here: Here, peers: Peers) -> str:
        volume = await volume_ops.create_volume(
            here.store, name, resiliency=resiliency, copies=copies, size=size
        )
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


@volume_group.command("status")
@click.argument("name")
@json_option
def status_command(name: str, as_json: bool) -> None:
    """Show one volume: health, space, and what is being repaired."""

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
        "state": volume.state,
        "health": volume.health,
        "coordinator": volume.coordinator or "none at the moment",
        "size": size_or_unknown(volume.size),
        "free": size_or_unknown(volume.free),
    }
    if volume.slabs:
        lines["slabs"] = ", ".join(f"{count} {state}" for state, count in volume.slabs.items())
    if volume.scrub.get("finished"):
        lines["scrubbed"] = scrub_text(volume.scrub)
    if volume.note:
        lines["note"] = volume.note
    for title, value in lines.items():
        click.echo(f"{title + ':':13}{value}")
    for job in jobs:
        click.echo(f"{'repairing:':13}{job_line(job).partition(': ')[2]}")


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
def move_command(name: str, node: str) -> None:
    """Let NODE coordinate volume NAME. Programs that use it notice a pause of a second at most."""

    async def work(here: Here, peers: Peers) -> None:
        view = await read_cluster_view(here.store)
        await volume_ops.prefer_node(here.store, view, name, node)
        with progress(f"moving volume {name} to {node}"):
            await volume_ops.wait_owner(here.store, name, node, MOVE_TIMEOUT_S)

    run_with_peers(work)
    click.echo(f"volume {name} is coordinated by {node}")


@volume_group.command("delete")
@click.argument("name")
@yes_option
def delete_command(name: str, yes: bool) -> None:
    """Delete volume NAME. One that is not empty is refused without --yes."""

    async def work(here: Here, peers: Peers) -> None:
        view = await read_cluster_view(here.store)
        volume = view.volume(name)
        being_deleted = volume.text("state") == volume_ops.VOLUME_DELETING
        if not yes and not being_deleted:
            await volume_ops.require_empty(view, peers, name)
        await volume_ops.mark_deleting(here.store, name, volume.id())
        with progress(f"deleting volume {name}"):
            await volume_ops.wait_volume_gone(here.store, name, DELETE_TIMEOUT_S)

    run_with_peers(work)
    click.echo(f"volume {name} is deleted")
