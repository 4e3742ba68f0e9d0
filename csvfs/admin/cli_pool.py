"""`csvfs pool`: all drives of the cluster together."""

import click

from csvfs.admin.cli_context import SIZE, Here, json_option, run_here, run_with_peers
from csvfs.admin.cluster_view import Record
from csvfs.admin.job_ops import control_jobs
from csvfs.admin.peers import Peers
from csvfs.admin.pool_ops import create_pool, require_pool
from csvfs.admin.render import note, print_json, print_table, size_or_unknown
from csvfs.admin.status import ClusterStatus, collect_status
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
        f"slabs of {format_size(pool.slab_size)}"
    )
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
