"""`csvfs node`: running this node, listing all."""

from dataclasses import dataclass

import click
import trio

from csvfs.admin.cli_context import Here, json_option, run_here
from csvfs.admin.cluster_view import ClusterView, read_cluster_view
from csvfs.admin.render import print_json, print_table
from csvfs.config import load_config


@click.group("node")
def node_group() -> None:
    """The servers of the cluster."""


@node_group.command("run")
def run_command() -> None:
    """Run this node until it is told to stop: the one service of csvfs (examples/csvfs-node.service)."""
    from csvfs.admin.node_run import run_node  # the service's own imports slow down no other command

    trio.run(run_node, load_config())


@node_group.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List the nodes that ever joined, and which are up."""

    async def work(here: Here) -> ClusterView:
        return await read_cluster_view(here.store)

    rows = node_rows(run_here(work))
    if as_json:
        print_json(rows)
        return
    print_table(
        ("NODE", "STATE", "ADDRESS", "PLACE", ">DRIVES", "COORDINATES"),
        [
            (row.name, row.state, row.address, "/".join(row.place.values()) or "-", row.drives, ", ".join(row.coordinates))
            for row in rows
        ],
        empty="no nodes yet: start one with csvfs node run",
    )


@dataclass(slots=True, frozen=True)
class NodeRow:
    name: str
    state: str  # up, down
    address: str
    place: dict[str, str]  # site, rack, chassis, as far as they are said
    drives: int
    coordinates: list[str]  # volumes


def node_rows(view: ClusterView) -> list[NodeRow]:
    rows = []
    for name in view.node_names:
        record = view.alive.get(name) or view.nodes.get(name)
        rows.append(
            NodeRow(
                name=name,
                state="up" if name in view.alive else "down",
                address=record.text("address") if record else "",
                place=view.place_of(name).to_map(),
                drives=len(view.drives_of(name)),
                coordinates=sorted(
                    volume for volume, owner in view.owners.items() if owner.text("node") == name
                ),
            )
        )
    return rows
