"""`csvfs node`: running this node, listing all."""

import logging
import sys
from dataclasses import dataclass

import click
import trio

from csvfs.admin import node_evict, node_life
from csvfs.admin.cli_context import CommandFailed, Here, json_option, run_here, run_with_peers, yes_option
from csvfs.admin.cluster_view import ClusterView, read_cluster_view
from csvfs.admin.peers import Peers
from csvfs.admin.render import note, print_json, print_table, progress
from csvfs.config import load_config


@click.group("node")
def node_group() -> None:
    """The servers of the cluster."""


@node_group.command("run")
def run_command() -> None:
    """Run this node until it is told to stop: the one service of csvfs (examples/csvfs-node.service)."""
    # The service's own imports slow down no other command.
    from csvfs.admin.evicted_watch import EXIT_STATUS, Evicted
    from csvfs.admin.node_run import run_node

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        trio.run(run_node, load_config())
    except Evicted as error:
        logging.error("%s", error)
        sys.exit(EXIT_STATUS)


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
    for row in rows:
        if row.reason:
            click.echo(f"node {row.name}: {row.reason}")


@node_group.command("drain")
@click.argument("node", metavar="NODE")
@click.option("--dry-run", is_flag=True, help="Only say what speaks against it.")
@click.option("--force", is_flag=True, help="Drain it whatever speaks against it.")
@json_option
def drain_command(node: str, dry_run: bool, force: bool, as_json: bool) -> None:
    """Prepare a node to be switched off: move its volumes away, and wait until nothing needs it.

    Refused, with the reasons, when something would wait for the node. Interrupted, the node stays draining; run
    this again to finish, or csvfs node resume.
    """

    async def check(here: Here, peers: Peers) -> list[str]:
        return await node_life.check_drain(here.config, here.store, peers, node)

    against = run_with_peers(check)
    if dry_run:
        _print_objections(node, against, as_json)
        return
    if against and not force:
        raise CommandFailed(f"node {node} is not drained: {'; '.join(against)}; --force drains it all the same")
    for line in against:
        note(line)
    said: list[str] = []

    def told(how_far: node_life.Drain) -> None:
        nonlocal said
        waits = how_far.waits_for()
        if waits != said:
            said = waits
            for line in waits:
                note(f"waits for {line}")

    async def work(here: Here, peers: Peers) -> None:
        with progress(f"draining node {node}"):
            await node_life.drain(here.store, peers, node, told)

    run_with_peers(work)
    if as_json:
        print_json({"node": node, "state": node_life.PAUSED})
    else:
        click.echo(f"node {node} is paused and may be switched off; afterwards: csvfs node resume {node}")


def _print_objections(node: str, against: list[str], as_json: bool, what: str = "be drained") -> None:
    if as_json:
        print_json({"node": node, "objections": against})
    elif not against:
        click.echo(f"node {node} can {what}")
    else:
        click.echo(f"node {node} should not {what} now:")
        for line in against:
            click.echo(f"  {line}")


@node_group.command("resume")
@click.argument("node", metavar="NODE")
@json_option
def resume_command(node: str, as_json: bool) -> None:
    """Take a node back that was drained, or quarantined: it coordinates volumes and takes new copies again."""

    async def work(here: Here) -> bool:
        return await node_life.resume(here.store, node)

    was_away = run_here(work)
    if as_json:
        print_json({"node": node, "resumed": was_away})
    elif was_away:
        click.echo(f"node {node} takes part again; what it missed is copied: csvfs job watch")
    else:
        click.echo(f"node {node} was neither draining nor paused nor quarantined")


@node_group.command("evict")
@click.argument("node", metavar="NODE")
@click.option("--dry-run", is_flag=True, help="Only say what speaks against it.")
@yes_option
@json_option
def evict_command(node: str, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Take a node out of the cluster for good: its certificate is revoked, its drives are forgotten.

    Their copies are made elsewhere. Refused while others would have too few copies without it. A node that was evicted
    does not start again; it can join as a new one.
    """

    async def check(here: Here, peers: Peers) -> node_evict.Objections:
        return await node_evict.check_evict(here.config, here.store, peers, node)

    against = run_with_peers(check)
    if dry_run:
        _print_objections(node, [*against.final, *against.losses], as_json, "be evicted")
        return
    if against.final or (against.losses and not yes):
        how = "" if against.final else "; --yes evicts it all the same"
        raise CommandFailed(f"node {node} is not evicted: {'; '.join([*against.final, *against.losses])}{how}")
    for line in against.losses:
        note(line)

    async def work(here: Here, peers: Peers) -> int:
        with progress(f"evicting node {node}"):
            return await node_evict.evict(here.config, here.store, peers, node, note, accept_losses=yes)

    drives = run_with_peers(work)
    if as_json:
        print_json({"node": node, "drives": drives})
    else:
        click.echo(f"node {node} is evicted, {drives} drives with it; what they held is made elsewhere: csvfs job watch")


@dataclass(slots=True, frozen=True)
class NodeRow:
    name: str
    state: str  # up, down, isolated, quarantined, draining, paused
    address: str
    place: dict[str, str]  # site, rack, chassis, as far as they are said
    drives: int
    coordinates: list[str]  # volumes
    reason: str = ""  # of the state
    witness: bool = False


def node_rows(view: ClusterView) -> list[NodeRow]:
    rows = []
    for name in view.node_names:
        record = view.alive.get(name) or view.nodes.get(name)
        rows.append(
            NodeRow(
                name=name,
                state=node_life.node_state(view, name),
                address=record.text("address") if record else "",
                place=view.place_of(name).to_map(),
                drives=len(view.drives_of(name)),
                coordinates=sorted(
                    volume for volume, owner in view.owners.items() if owner.text("node") == name
                ),
                reason=node_life.state_reason(view, name),
            )
        )
    for name, record in sorted(view.witnesses.items()):
        rows.append(NodeRow(name, "witness", record.text("address"), {}, 0, [], witness=True))
    return rows
