"""`csvfs cluster`: making a new cluster in an empty cluster store."""

import click

from csvfs.admin.cli_context import Here, json_option, run_here
from csvfs.admin.cluster_view import Record
from csvfs.admin.pool_ops import create_cluster
from csvfs.admin.render import print_json


@click.group("cluster")
def cluster_group() -> None:
    """The cluster itself."""


@cluster_group.command("create")
@click.argument("name")
@json_option
def create_command(name: str, as_json: bool) -> None:
    """Make a new cluster called NAME in this node's cluster store. Once per cluster."""

    async def work(here: Here) -> Record:
        return await create_cluster(here.store, name)

    cluster = run_here(work)
    if as_json:
        print_json({"id": cluster.id(), "name": name})
    else:
        click.echo(f"cluster {name} created; next: csvfs pool create")
