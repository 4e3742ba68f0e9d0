"""`csvfs domain`: where nodes stand, so that no two copies fail together."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import click

from csvfs.admin import domain_ops
from csvfs.admin.cli_context import Here, json_option, run_here, run_with_peers
from csvfs.admin.cluster_view import ClusterView, read_cluster_view
from csvfs.admin.domain_ops import Change, Effect, NodePlace
from csvfs.admin.peers import Peers
from csvfs.admin.render import print_json
from csvfs.fault_domains import Level, Place
from csvfs.units import format_size

force_option = click.option(
    "--force", is_flag=True, help="Also where a volume then has fewer fault domains or less room than it needs."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what it would mean.")


@click.group("domain")
def domain_group() -> None:
    """Fault domains: site > rack > chassis > node. A volume says at which level its copies are kept apart."""


@domain_group.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """Show where the nodes stand, as a tree, and what the volumes need."""

    async def work(here: Here) -> ClusterView:
        return await read_cluster_view(here.store)

    view = run_here(work)
    rows, volumes = domain_ops.node_places(view), domain_ops.volume_domains(view)
    if as_json:
        print_json({"nodes": rows, "volumes": volumes})
        return
    if not rows:
        click.echo("no nodes yet: start one with csvfs node run")
    for line in tree_lines(rows):
        click.echo(line)
    for row in volumes:
        click.echo(domain_ops.volume_line(row))


def tree_lines(rows: list[NodePlace]) -> list[str]:
    """A line for each site, rack and chassis, and for each node."""
    lines: list[str] = []
    above: tuple[str, ...] = ()
    for row in rows:
        path = (row.site, row.rack, row.chassis)
        for depth, level in enumerate(("site", "rack", "chassis")):
            if path[depth] and path[: depth + 1] != above[: depth + 1]:
                indent = sum(map(bool, path[:depth]))
                lines.append(f"{'  ' * indent}{level} {path[depth]}")
        above = path
        drives = "1 drive" if row.drives == 1 else f"{row.drives} drives"
        indent = sum(map(bool, path))
        lines.append(f"{'  ' * indent}node {row.node}  {row.state}, {drives}, {format_size(row.size)}")
    return lines


@domain_group.command("set")
@click.argument("node")
@click.option("--site", default=None, help="A building; '' for none.")
@click.option("--rack", default=None, help="In the site; '' for none.")
@click.option("--chassis", default=None, help="In the rack; '' for none.")
@dry_run_option
@force_option
@json_option
def set_command(
    node: str, site: str | None, rack: str | None, chassis: str | None, dry_run: bool, force: bool, as_json: bool
) -> None:
    """Say where NODE stands; what is not given stays as it is. It counts at once, without a restart.

    Slabs that then have two copies in one fault domain of their volume are moved apart: copied first, then given up.
    """
    if site is None and rack is None and chassis is None:
        raise click.UsageError("say where it stands: --site, --rack, --chassis")

    async def work(here: Here, peers: Peers) -> tuple[Place, list[Effect]]:
        view = await read_cluster_view(here.store)
        place = domain_ops.changed_place(view.place_of(node), site, rack, chassis)
        change = Change({node: place}, {})
        return place, await domain_ops.apply(here.store, peers, change, force=force, dry_run=dry_run)

    place, found = run_with_peers(work)
    _print_effects({node: place}, {}, found, dry_run, as_json)


@domain_group.command("load")
@click.argument("file", type=click.Path(path_type=Path))
@dry_run_option
@force_option
@json_option
def load_command(file: Path, dry_run: bool, force: bool, as_json: bool) -> None:
    """Say where all nodes stand, in one step: FILE has a table for each.

    \b
    [nodes.n1]
    site = "dc1"
    rack = "r1"
    chassis = "c1"      any of them may be left out
    """
    places = domain_ops.read_places(file)

    async def work(here: Here, peers: Peers) -> list[Effect]:
        change = Change(places, {})
        return await domain_ops.apply(
            here.store, peers, change, all_nodes=True, force=force, dry_run=dry_run
        )

    _print_effects(places, {}, run_with_peers(work), dry_run, as_json)


def _print_effects(
    places: Mapping[str, Place], levels: Mapping[str, Level], found: list[Effect], dry_run: bool, as_json: bool
) -> None:
    if as_json:
        nodes = {node: place.to_map() for node, place in places.items()}
        rows = [{**asdict(effect), "objection": effect.objection} for effect in found]
        print_json({"changed": not dry_run, "nodes": nodes, "levels": dict(levels), "volumes": rows})
        return
    for node, place in sorted(places.items()):
        click.echo(f"node {node}: {place}")
    for effect in found:
        click.echo(effect.text)
    if dry_run:
        refused = any(effect.objection for effect in found)
        click.echo("nothing was changed" + (": it would be refused without --force" if refused else ""))
