"""`csvfs pool`: all drives of the cluster together."""

import os
from typing import Any

import click
import trio

from csvfs.admin.cli_context import SIZE, Here, json_option, run_here, run_with_peers
from csvfs.admin.cluster_view import Record, read_cluster_view
from csvfs.admin.job_ops import control_jobs
from csvfs.admin.peers import Peers, answer_or_error
from csvfs.admin.pool_ops import create_pool, require_pool, set_auto_claim
from csvfs.admin.pool_recover import CLUSTER_NAME, Recovery, rebuild, require_empty_store, scan
from csvfs.admin.render import note, print_json, print_table, size_or_unknown
from csvfs.admin.status import ClusterStatus, collect_status
from csvfs.errors import Unavailable
from csvfs.units import SLAB_SIZE_DEFAULT, format_size


@click.group("pool")
def pool_group() -> None:
    """All drives together; volumes are cut from it."""


@pool_group.command("create")
@click.option("--name", default="pool", show_default=True, help="What to call it.")
@click.option(
    "--slab-size",
    type=SIZE,
    default=SLAB_SIZE_DEFAULT,
    show_default="64M",
    help="Unit of allocation: 4M to 256M.",
)
@json_option
def create_command(name: str, slab_size: int, as_json: bool) -> None:
    """Make the cluster's one pool. Drives are added by csvfs drive add."""

    async def work(here: Here) -> Record:
        return await create_pool(here.store, name, slab_size)

    pool = run_here(work)
    if as_json:
        print_json({"id": pool.id(), "name": name, "slab_size": slab_size})
    else:
        click.echo(f"pool {name} created; next: csvfs drive add PATH... on each node")


@pool_group.command("optimize")
@json_option
def optimize_command(as_json: bool) -> None:
    """Move slabs from the fullest to the emptiest drives until they are within 5 % of each other.

    It goes on in the background: csvfs job watch. After a drive was added it begins by itself.
    """
    answers = run_with_peers(lambda here, peers: control_jobs(here.store, peers, None, "optimize"))
    if as_json:
        print_json(answers)
    else:
        click.echo(f"levelling the drives for {', '.join(sorted(answers)) or 'no volumes'}: csvfs job watch")


@pool_group.command("set")
@click.option(
    "--auto-claim",
    type=click.Choice(("on", "off")),
    required=True,
    help="Whether nodes take blank drives that their [drives] claim names into the pool by themselves.",
)
@json_option
def set_command(auto_claim: str, as_json: bool) -> None:
    """Change the pool. With auto-claim on, a node claims what its node.toml names and what is blank: see
    csvfs drive claim --dry-run on each node first."""

    async def work(here: Here) -> Record:
        return await set_auto_claim(here.store, auto_claim == "on")

    pool = run_here(work)
    if as_json:
        print_json({"name": pool.text("name"), "auto_claim": auto_claim == "on"})
        return
    click.echo(f"auto-claim of pool {pool.text('name')} is {auto_claim}")
    if auto_claim == "on":
        note("what would be claimed on a node: csvfs drive claim --dry-run")


@pool_group.command("scrub")
@json_option
def scrub_command(as_json: bool) -> None:
    """Verify every copy of every volume now, and heal what has rotted; and the tables of all drives."""

    async def work(here: Here, peers: Peers) -> dict[str, str]:
        view = await read_cluster_view(here.store)
        begun: dict[str, Any] = {}
        errors: dict[str, str] = {}
        for name in sorted(view.volumes):
            await answer_or_error(peers.coordinator(view, name, "scrub"), name, begun, errors)
        return {name: errors.get(name, "") for name in sorted(view.volumes)}

    rows = run_with_peers(work)
    if as_json:
        print_json(rows)
    for name, error in rows.items() if not as_json else ():
        click.echo(f"volume {name}: {error or 'being scrubbed'}")
    if any(rows.values()):
        raise Unavailable("not every volume is being scrubbed: try again")


@pool_group.command("recover")
@click.option(
    "--drives", "paths", multiple=True, required=True, type=click.Path(), help="A drive; once for each."
)
@click.argument("more", metavar="[PATH]...", nargs=-1, type=click.Path())
@click.option("--cluster-name", default=CLUSTER_NAME, show_default=True, help="It is on no drive.")
@click.option("--dry-run", is_flag=True, help="Say what is there, write nothing.")
@json_option
def recover_command(
    paths: tuple[str, ...], more: tuple[str, ...], cluster_name: str, dry_run: bool, as_json: bool
) -> None:
    """Rebuild the cluster store from the drives alone, after it was lost: csvfs pool recover --drives PATH...

    Give all drives of the pool. Nothing on them is changed, and a cluster store that is not empty is refused. Says what
    could not be recovered.
    """

    async def work(here: Here) -> Recovery:
        if not dry_run:
            await require_empty_store(here.store)
        given = [os.path.realpath(path) for path in (*paths, *more)]
        found = await trio.to_thread.run_sync(scan, given)
        if not dry_run:
            await rebuild(here.store, found, cluster_name)
        return found

    found = run_here(work)
    if as_json:
        print_json(found)
        return
    click.echo(
        f"pool {found.pool.hex()[:8]}: slabs of {format_size(found.slab_size)}, {len(found.drives)} drives"
    )
    for hex_id, value in sorted(found.drives.items()):
        click.echo(f"drive {hex_id[:8]}: {value['path']}, of node {value['node']}")
    for volume in found.volumes:
        click.echo(f"volume {volume.name}: {volume.files} files and directories")
    for problem in found.problems:
        click.echo(f"not recovered: {problem}")
    click.echo("a drive that was not given may hold newer copies: give all there are")
    click.echo("nothing was written" if dry_run else "next: csvfs node run on each node")


@pool_group.command("status")
@json_option
def status_command(as_json: bool) -> None:
    """Show the pool's space, by node."""

    async def work(here: Here, peers: Peers) -> ClusterStatus:
        await require_pool(here.store)
        return await collect_status(here.store, peers, ask_coordinators=False)

    status = run_with_peers(work)
    pool = status.pool
    assert pool is not None, "require_pool has seen it, and nothing deletes a pool"
    if as_json:
        print_json({"pool": pool, "drives": status.drives})
        return
    used = pool.size - pool.free
    click.echo(
        f"pool {pool.name}: {format_size(pool.size)}, {format_size(used)} in use, "
        f"{format_size(pool.free)} free, "
        f"{format_size(pool.reserve)} of it kept for repairs, slabs of {format_size(pool.slab_size)}"
    )
    if pool.warning:
        click.echo(pool.warning)
    rows = []
    for node in status.nodes:
        drives = [drive for drive in status.drives if drive.node == node.name]
        known = all(drive.free is not None for drive in drives)
        free = sum(drive.free or 0 for drive in drives) if known else None
        size = sum(drive.size for drive in drives)
        rows.append((node.name, node.state, len(drives), format_size(size), size_or_unknown(free)))
    print_table(("NODE", "STATE", ">DRIVES", ">SIZE", ">FREE"), rows, empty="no nodes yet: csvfs node run")
    if pool.nodes_unknown:
        note(f"not counted, as they cannot be asked: the drives of {', '.join(pool.nodes_unknown)}")
