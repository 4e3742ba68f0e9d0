"""`csvfs cluster`: making a cluster, letting machines into it.

Place      admin floor. What does the work is imported where it is used: certificates slow down no other command.
"""

import click
import trio

from csvfs.admin.cli_context import Here, json_option, run_here
from csvfs.admin.cluster_view import Record
from csvfs.admin.join_messages import JoinAnswer
from csvfs.admin.join_token import VALID_S, VALID_S_MAX
from csvfs.admin.node_setup import PORT_BASE_DEFAULT, Wish, start_hint
from csvfs.admin.pool_ops import create_cluster, set_quarantine
from csvfs.admin.render import note, print_json
from csvfs.cluster.departures import LIMIT_MAX
from csvfs.config import config_path, load_config
from csvfs.errors import Conflict, NotSupported
from csvfs.store.opening import etcd_place, is_etcd

ETCD, EMBEDDED = "etcd", "embedded"

node_option = click.option("--node", metavar="NAME", help="What this node is called; by default as the machine.")
address_option = click.option(
    "--address", metavar="IP", help="Where the others reach it; by default the only address that it has."
)
port_option = click.option(
    "--port-base", type=int, help=f"It uses ten ports from here on; by default {PORT_BASE_DEFAULT}."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would be done.")


@click.group("cluster")
def cluster_group() -> None:
    """The cluster itself: making it, letting machines in."""


@cluster_group.command("create")
@click.argument("name")
@click.option(
    "--store",
    type=click.Choice([ETCD, EMBEDDED]),
    help="etcd, for several machines, or embedded, for one; by default as node.toml says, without one etcd.",
)
@node_option
@address_option
@port_option
@dry_run_option
@json_option
def create_command(
    name: str, store: str | None, node: str | None, address: str | None, port_base: int | None, dry_run: bool, as_json: bool
) -> None:
    """Make a new cluster called NAME, with this machine as its first node. Once per cluster.

    With etcd: the cluster's certificates, node.toml if there is none, the first member of the cluster store and the
    systemd unit. Nothing that is there is overwritten; interrupted, it is finished by running it again.
    """
    if (store or _configured_store()) == EMBEDDED:
        _create_embedded(name, dry_run, as_json)
        return
    from csvfs.admin import cluster_create

    plan = cluster_create.plan_create(name, Wish(node, address, port_base))
    if dry_run:
        _print_plan(plan.steps, as_json)
        return

    async def work() -> bytes:
        return await cluster_create.create(plan, note)

    cluster_id = trio.run(work)
    if as_json:
        print_json({"id": cluster_id, "name": name, "node": plan.node.config.node})
        return
    click.echo(
        f"cluster {name} created with node {plan.node.config.node}; next: {start_hint()}, then csvfs cluster token for"
        " each further machine, and csvfs pool create"
    )


def _configured_store() -> str:
    if not config_path().exists():
        return ETCD
    return ETCD if is_etcd(load_config().store) else EMBEDDED


def _create_embedded(name: str, dry_run: bool, as_json: bool) -> None:
    if is_etcd(load_config().store):
        raise Conflict(f"{config_path()} says that the store is etcd; leave --store out")
    if dry_run:
        _print_plan([f"the cluster {name} in {load_config().store}"], as_json)
        return

    async def work(here: Here) -> Record:
        return await create_cluster(here.store, name)

    cluster = run_here(work)
    if as_json:
        print_json({"id": cluster.id(), "name": name})
    else:
        click.echo(f"cluster {name} created; next: csvfs pool create")


@cluster_group.command("token")
@click.option(
    "--valid",
    "valid_s",
    type=click.IntRange(1, VALID_S_MAX),
    default=VALID_S,
    show_default=True,
    metavar="SECONDS",
    help="How long it can be used.",
)
@json_option
def token_command(valid_s: int, as_json: bool) -> None:
    """Print a token that lets one machine join. Whoever has it can join: keep it to yourself."""

    from csvfs.admin.join_admission import make_token

    async def work(here: Here) -> str:
        if not is_etcd(here.config.store):
            raise NotSupported("machines can join a cluster whose store is etcd; this one's serves a single machine")
        return await make_token(here.store, etcd_place(here.config.store), here.config.node, valid_s)

    token = run_here(work)
    if as_json:
        print_json({"token": token, "valid_s": valid_s})
        return
    click.echo(token)
    note(f"good once, within {valid_s} s; on the new machine: csvfs cluster join TOKEN")


@cluster_group.command("join")
@click.argument("token")
@node_option
@address_option
@port_option
@click.option("--witness", is_flag=True, help="Run a member of the cluster store and nothing else: the third of two nodes.")
@dry_run_option
@json_option
def join_command(
    token: str, node: str | None, address: str | None, port_base: int | None, witness: bool, dry_run: bool, as_json: bool
) -> None:
    """Make this machine a node of the cluster that printed TOKEN (csvfs cluster token).

    Its key is made here and stays here. The first three machines get a member of the cluster store.
    """
    from csvfs.admin import cluster_join

    plan = cluster_join.plan_join(token, Wish(node, address, port_base, witness))
    if dry_run:
        _print_plan(plan.steps, as_json)
        return

    async def work() -> JoinAnswer:
        return await cluster_join.join(plan, note)

    answer = trio.run(work)
    name = plan.node.config.node
    if as_json:
        print_json({"cluster": answer.cluster, "node": name, "store_member": bool(answer.peers)})
        return
    what = "witness" if witness else "node"
    click.echo(f"{what} {name} has joined cluster {answer.cluster}; next: {start_hint()}")


@cluster_group.command("set")
@click.option(
    "--quarantine",
    type=click.IntRange(0, LIMIT_MAX),
    required=True,
    metavar="COUNT",
    help="After how often going away within an hour a node is quarantined for two; 0: never.",
)
@json_option
def set_command(quarantine: int, as_json: bool) -> None:
    """Change what holds for all nodes."""

    async def work(here: Here) -> Record:
        return await set_quarantine(here.store, quarantine)

    run_here(work)
    if as_json:
        print_json({"quarantine": quarantine})
    elif quarantine:
        click.echo(f"a node that goes away {quarantine} times within an hour is quarantined")
    else:
        click.echo("no node is quarantined any more")


def _print_plan(steps: list[str], as_json: bool) -> None:
    if as_json:
        print_json({"steps": steps})
        return
    click.echo("would make:")
    for step in steps:
        click.echo(f"  {step}")
